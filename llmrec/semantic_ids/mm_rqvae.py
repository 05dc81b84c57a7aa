"""MM-RQ-VAE: one residual-quantised autoencoder per modality, tied by an alignment loss (MME-SID 4.2).

    loss = sum over modalities of  w_mmd MMD(SG(s), s_hat) + w_mse mean (s - s_hat)^2 + w_rq L_RQ
         + w_align  sum over the others of  alignment(first modality, other)
         + w_cf  sum over texts and images of  collaborative(s, collaborative vectors)
         + w_div  sum over modalities of  the quantiser's diversity

The first modality is collab where it takes part. Following the published code, alignment compares
the straight-through sums of code embeddings, so it trains encoders and not codebooks. Unlike it, the
default alignment is InfoNCE, as in the paper: a set-level MMD cannot align items one by one. The last two
terms are LETTER's (Wang et al., CIKM 2024), and off by default.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmrec.config import given, unhandled
from llmrec.precision import full_precision
from llmrec.semantic_ids.losses import collaborative, info_nce, mmd
from llmrec.semantic_ids.quantizer import Quantized, ResidualQuantizer


@dataclass(frozen=True)
class Encoded:
    """One modality of a batch."""

    source: Tensor
    """(B, D_m), scaled item vectors"""
    quantized: Quantized
    decoded: Tensor
    """(B, D_m), on the scale of source"""


@dataclass(frozen=True)
class Losses:
    """Parts of a batch's loss, unweighted, and their weighted sum."""

    total: Tensor
    parts: dict[str, dict[str, Tensor]]
    """By modality: mmd, mse, quantization, alignment, collaborative, diversity, where used"""


class MMRQVAE(nn.Module):
    """The autoencoders of all modalities and their joint loss; see the module text.

    Args:
        dims: width D_m of the item vectors by modality; the first one anchors the alignment.
        code_dim: D; None: as wide as the item vectors, for hidden_dims=None.
        hidden_dims: widths between item vector and latent vector; None: no encoder and no decoder, the
            (scaled) item vectors themselves are quantised.
        quantizer: settings of every modality's `ResidualQuantizer` besides its width.
        normalise: none, standardise (see `Scaling.fit`) or l2.
        reconstruction: mmd, mse or mmd+mse.
        mmd_estimator: see `llmrec.semantic_ids.losses.mmd`.
        mmd_weight: w_mmd.
        mse_weight: w_mse.
        alignment: infonce, mmd or none.
        alignment_weight: w_align.
        alignment_temperature: of InfoNCE.
        quantization_weight: w_rq.
        collaborative_weight: w_cf.
        diversity_weight: w_div.
    """

    def __init__(
        self,
        dims: Mapping[str, int],
        *,
        code_dim: int | None,
        hidden_dims: tuple[int, ...] | None,
        quantizer: Mapping[str, Any],
        normalise: Literal["none", "standardise", "l2"],
        reconstruction: Literal["mmd", "mse", "mmd+mse"],
        mmd_estimator: Literal["tllib", "unbiased"],
        mmd_weight: float,
        mse_weight: float,
        alignment: Literal["infonce", "mmd", "none"],
        alignment_weight: float,
        alignment_temperature: float,
        quantization_weight: float,
        collaborative_weight: float = 0.0,
        diversity_weight: float = 0.0,
    ) -> None:
        super().__init__()
        self.mmd_estimator = mmd_estimator
        self.alignment = alignment
        self.alignment_temperature = alignment_temperature
        self.reconstruction = reconstruction.split("+")
        self.weights = {
            "mmd": mmd_weight,
            "mse": mse_weight,
            "quantization": quantization_weight,
            "alignment": alignment_weight,
            "collaborative": collaborative_weight,
            "diversity": diversity_weight,
        }
        self.autoencoders = nn.ModuleDict(
            {
                name: ModalityAutoencoder(
                    (dim,) if hidden_dims is None else (dim, *hidden_dims, given(code_dim)),
                    ResidualQuantizer(code_dim=dim if hidden_dims is None else given(code_dim), **quantizer),
                    normalise,
                )
                for name, dim in dims.items()
            }
        )

    def forward(
        self, vectors: Mapping[str, Tensor], present: Mapping[str, Tensor] | None = None
    ) -> tuple[dict[str, Encoded], Losses]:
        """Autoencode a batch of items and compare.

        Args:
            vectors: item vectors (B, D_m) by modality, row i of each about the same item; with
                collaborative_weight, collab is among them even where it has no codes of its own.
            present: by modality, bool (B,): items that have a vector. A modality that is not named
                has all of them. Only rows with a vector take part; B in its outputs is their number,
                and a modality with fewer than two of them is left out of the batch.
        """
        present = present or {}
        there = {
            name: vectors[name][present[name]] if name in present else vectors[name]
            for name in self.autoencoders
        }
        encoded = {name: self.autoencoders[name](found) for name, found in there.items() if len(found) >= 2}
        parts = {name: self.own_losses(found) for name, found in encoded.items()}
        if self.alignment != "none":
            anchor, *others = self.autoencoders
            for other in others:
                if anchor in encoded and other in encoded:
                    first, second = (encoded[name].quantized.vectors for name in (anchor, other))
                    pair = common_rows(first, second, present, anchor, other)
                    parts[other]["alignment"] = self.align(*pair)
        if self.weights["collaborative"]:
            teacher = vectors["collab"]
            teacher = teacher[present["collab"]] if "collab" in present else teacher
            for name in (name for name in encoded if name != "collab"):
                rows = encoded[name].quantized.vectors
                pair = common_rows(rows, teacher, present, name, "collab")
                if len(pair[0]):
                    parts[name]["collaborative"] = collaborative(*pair)
        total = next(iter(vectors.values())).new_zeros(())
        for found in parts.values():
            total = total + sum(self.weights[part] * value for part, value in found.items())
        return encoded, Losses(total, parts)

    def own_losses(self, found: Encoded) -> dict[str, Tensor]:
        """Reconstruction and quantisation of one modality."""
        source, decoded = found.source.detach(), found.decoded
        made = {
            "mmd": lambda: mmd(source, decoded, estimator=self.mmd_estimator),
            "mse": lambda: F.mse_loss(decoded, source),
        }
        reconstructions = {part: made[part]() for part in self.reconstruction}
        diversity = found.quantized.diversity
        more = {} if diversity is None else {"diversity": diversity}
        return {"quantization": found.quantized.loss, **reconstructions, **more}

    def align(self, anchor: Tensor, other: Tensor) -> Tensor:
        """How far the latent vectors (B, D) of two modalities are apart."""
        if len(anchor) < 2:
            return anchor.new_zeros(())
        if self.alignment == "mmd":
            return mmd(anchor, other, estimator=self.mmd_estimator)
        if self.alignment == "infonce":
            return info_nce(anchor, other, self.alignment_temperature)
        assert self.alignment != "none", "which aligns nothing"
        unhandled(self.alignment)


class ModalityAutoencoder(nn.Module):
    """Scaling, encoder, residual quantiser, decoder of one modality.

    Args:
        widths: of the item vector, the hidden layers and the code embeddings; the decoder mirrors them. One
            width: there are neither.
        quantizer: the codes.
        normalise: none, standardise or l2.
    """

    def __init__(
        self,
        widths: tuple[int, ...],
        quantizer: ResidualQuantizer,
        normalise: Literal["none", "standardise", "l2"],
    ) -> None:
        super().__init__()
        self.scaling = Scaling(widths[0], normalise)
        self.encoder = mlp(widths)
        self.quantizer = quantizer
        self.decoder = mlp(widths[::-1])

    def forward(self, vectors: Tensor) -> Encoded:
        """Item vectors (B, D_m) as given, to codes and back."""
        source = self.scaling(vectors)
        latent = self.encoder(source).to(source.dtype)
        with full_precision(vectors.device):
            quantized = self.quantizer(latent)
        return Encoded(source, quantized, self.decoder(quantized.vectors).to(source.dtype))

    def encode(self, vectors: Tensor) -> Tensor:
        """Latent vectors (B, D)."""
        return self.encoder(self.scaling(vectors))

    def rebuild(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """What codes (B, L) stand for: their sum (B, D), and it decoded (B, D_m), on the encoder's scale."""
        latent = self.quantizer.lookup(codes).sum(dim=1)
        return latent, self.decoder(latent)


class Scaling(nn.Module):
    """Item vectors to what the encoder sees; figures of `fit` are part of the saved weights."""

    mean: Tensor
    factor: Tensor

    def __init__(self, dim: int, normalise: Literal["none", "standardise", "l2"]) -> None:
        super().__init__()
        self.normalise = normalise
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("factor", torch.ones(()))

    @torch.no_grad()
    def fit(self, blocks: Iterable[Tensor]) -> None:
        """standardise: take mean and overall spread from all item vectors, given as blocks (b, D_m).

        One factor for all columns, not one each, so that distances keep their order.
        """
        if self.normalise != "standardise":
            return
        count, total, squares, origin = 0, self.mean.new_zeros(()), self.mean.new_zeros(()), None
        for block in blocks:
            origin = block[:1].double() if origin is None else origin  # near the mean, so little is lost
            rows = block.double() - origin
            count, total, squares = count + len(rows), total + rows.sum(dim=0), squares + rows.square().sum()
        shift = total / count
        spread = (squares / count - shift.square().sum()).clamp_min(0).div(len(self.mean)).sqrt()
        self.mean.copy_(given(origin)[0] + shift)
        self.factor.copy_(1 / spread if spread > 0 else torch.ones_like(spread))

    def forward(self, vectors: Tensor) -> Tensor:
        if self.normalise == "l2":
            return F.normalize(vectors, dim=-1)
        if self.normalise == "standardise":
            return (vectors - self.mean) * self.factor
        return vectors


def mlp(widths: tuple[int, ...]) -> nn.Sequential:
    """Linear layers with ReLU between and nothing at the end; Xavier-normal weights, zero biases."""
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        linear = nn.Linear(before, after)
        nn.init.xavier_normal_(linear.weight)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def common_rows(
    first: Tensor, second: Tensor, present: Mapping[str, Tensor], a: str, b: str
) -> tuple[Tensor, Tensor]:
    """Of the rows of items that have a, and of those that have b, those that have both, in the same order."""
    if b in present:
        first = first[present[b][present[a]] if a in present else present[b]]
    if a in present:
        second = second[present[a][present[b]] if b in present else present[a]]
    return first, second
