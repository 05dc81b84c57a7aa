"""Gaussian diffusion of one vector per row: schedules, the way forward and the way back.

Sources: Ho et al., "Denoising Diffusion Probabilistic Models" (2020), Eq. 2 to 7; schedules of Nichol and
Dhariwal (2021, cosine) and Li et al. (2022, sqrt, truncated linear) as WHUIR/DiffuRec sets them for T steps.
Steps count from 0; x_0 is clean, abar_t the share of signal after step t.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from llmrec.collab.layers import normal_like


def betas(schedule: str, num_steps: int) -> Tensor:
    """Variances added at every step, float64 (T,).

    ``trunc_lin`` adds 0.01 to ``linear``, which is stretched from 1,000 steps to T; where its end would
    exceed 1, the end is a tenth, as released.
    """
    if schedule in ("linear", "trunc_lin"):
        scale, more = 1000 / num_steps, 0.01 if schedule == "trunc_lin" else 0.0
        last = 0.02 * scale + more
        last = min(last, 0.999) if schedule == "linear" else (1e-3 * scale + more if last > 1 else last)
        return torch.linspace(1e-4 * scale + more, last, num_steps, dtype=torch.float64)
    place = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
    if schedule == "cosine":
        signal = torch.cos((place + 0.008) / 1.008 * math.pi / 2).square()
    elif schedule == "sqrt":
        signal = 1 - torch.sqrt(place + 1e-4)
    else:
        raise AssertionError(schedule)
    signal = signal.clamp(min=0)
    return (1 - signal[1:] / signal[:-1]).clamp(max=0.999)


class Diffusion(nn.Module):
    """A schedule, and the noise that the way back uses: drawn once, the same for every user.

    Args:
        schedule: see `betas`.
        num_steps: T.
        width: D.
        offset: delta_c, strength of what offset noise adds.
        offset_kind: ``row``: one more normal number for all dimensions of a row; ``element``: one for each
            (all that the release ever had, a slightly larger variance); ``constant``: delta_c itself.
        num_samples: start vectors that scores are averaged over.
    """

    signal: Tensor
    to_clean: Tensor
    to_noisy: Tensor
    deviation: Tensor
    start: Tensor
    steps_noise: Tensor

    def __init__(
        self,
        schedule: str,
        num_steps: int,
        width: int,
        *,
        offset: float = 0.0,
        offset_kind: str = "row",
        num_samples: int = 1,
    ) -> None:
        super().__init__()
        self.num_steps, self.offset, self.offset_kind = num_steps, offset, offset_kind
        beta = betas(schedule, num_steps)
        signal = torch.cumprod(1 - beta, 0)
        before = torch.cat([torch.ones(1, dtype=torch.float64), signal[:-1]])
        # mean and variance of q(x_{t-1} | x_t, x_0); the variance is the "fixed large" one, beta_t
        constants = {
            "signal": signal,
            "to_clean": beta * before.sqrt() / (1 - signal),
            "to_noisy": (1 - before) * (1 - beta).sqrt() / (1 - signal),
            "deviation": torch.cat([torch.zeros(1, dtype=torch.float64), beta[1:].sqrt()]),
        }
        for name, values in constants.items():
            self.register_buffer(name, values.float(), persistent=False)
        self.register_buffer("start", self.draw(torch.empty(num_samples, width)))
        self.register_buffer("steps_noise", torch.randn(num_samples, num_steps, width))

    def draw(self, like: Tensor) -> Tensor:
        """Noise for rows (n, D)."""
        noise = normal_like(like)
        if not self.offset:
            return noise
        if self.offset_kind == "constant":
            return noise + self.offset
        width = 1 if self.offset_kind == "row" else like.shape[1]
        return noise + self.offset * torch.randn(len(like), width, device=like.device, dtype=noise.dtype)

    def forward_to(self, clean: Tensor, step: Tensor, noise: Tensor) -> Tensor:
        """x_t of clean vectors (n, D) at steps int64 (n,)."""
        signal = self.signal[step, None].to(clean.dtype)
        return signal.sqrt() * clean + (1 - signal).sqrt() * noise

    def back(self, clean: Tensor, noisy: Tensor, step: int, noise: Tensor) -> Tensor:
        """x_{t-1} from the estimate of x_0 and x_t, both (n, D); at t = 0 it is the estimate."""
        mean = self.to_clean[step] * clean + self.to_noisy[step] * noisy
        return mean + self.deviation[step] * noise

    def reverse(self, estimate: Callable[[Tensor, int], Tensor], rows: int, num_steps: int) -> Tensor:
        """x_0 from pure noise, (samples, rows, D), through the last num_steps steps.

        Args:
            estimate: x_0 from x_t (rows, D) and t.
        """
        found = []
        for start, noise in zip(self.start, self.steps_noise):
            state = start.expand(rows, -1)
            for step in range(num_steps - 1, -1, -1):
                state = self.back(estimate(state, step), state, step, noise[step])
            found.append(state)
        return torch.stack(found)


def step_features(step: Tensor, num_steps: int, width: int) -> Tensor:
    """Cosines and sines of steps int64 (n,), stretched to 0..1000, (n, width); width is even."""
    rate = torch.exp(-math.log(10_000) * torch.arange(width // 2, device=step.device) / (width // 2))
    angle = (step * (1000 / num_steps))[:, None] * rate
    return torch.cat([angle.cos(), angle.sin()], dim=1)
