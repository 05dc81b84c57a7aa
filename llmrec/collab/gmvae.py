"""SIGMA-GMVAE: a sequence VAE whose prior is a mixture with one Gaussian per interest of the user.

Sources: Li et al., "Semantic Gaussian Mixture Variational Autoencoder for Sequential Recommendation"
(DASFAA 2025), arXiv 2502.16140, and libeibei95/SIGMA. Three places are blanked in every commit of the
release: the soft interest encoder, the call of the temporal encoder and the mixture divergence. Those are
ours, held by the shapes and comments around them and by the paper's words; each says so below.

Two encoders share the item table. The MIE-VAE (`Interests`) sorts a user's items into K hyper-categories
and makes of each an interest N(m_k, w_k) with intensity alpha_k. The SGM-VAE reads the sequence causally
into z_t ~ N(mu_t, s_t), decodes it, and is kept near the prior sum_k alpha_k N(m_k, w_k).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmrec.collab.interests import Interests, Prior
from llmrec.collab.layers import init_weights, noise_free, normal_like
from llmrec.collab.losses import Loss, Pooled, last_of, next_item_loss, ratio
from llmrec.config import given
from llmrec.data.batches import Batch

LOG_VARIANCE = 8.0
"""Logarithms of variances are kept in [-this, this]; ours."""
INTEREST_TEMPERATURE = 0.1
"""Of items under interests, and of hyper-categories in `indecision`; released."""


class GMVAE(nn.Module):
    """See the module's head; a `llmrec.collab.provider.CollabProvider`.

    The prior shapes training alone: scores come from the means mu, decoded, against the tied item table
    (the release adds one standard deviation, ``eval_add_std``). The released interest decoder is bypassed
    there and left out here. Histories stand on the left of their rows, positions count from the first item.
    """

    layout = "positions"
    uses_time = False

    def __init__(
        self,
        *,
        num_items: int,
        embed_dim: int,
        num_interests: int,
        num_heads: int,
        dropout_rate: float,
        attention_dropout_rate: float,
        prior: str,
        prior_scope: str,
        kl: str,
        kl_weight: float,
        kl_cap: float,
        kl_steps: int,
        interest_weight: float,
        orthogonal_weight: float,
        assignment_temperature: float,
        gumbel_temperature: float,
        temporal_from_epoch: int,
        eval_add_std: bool,
        max_history: int,
        interest_negatives: int = 256,
        loss: str = "ce",
        num_negatives: int = 0,
    ) -> None:
        super().__init__()
        self.max_history = max_history
        self.kl, self.kl_weight, self.kl_cap, self.kl_steps = kl, kl_weight, kl_cap, kl_steps
        self.prefix_prior = prior_scope == "prefix"
        self.interest_weight, self.orthogonal_weight = interest_weight, orthogonal_weight
        self.interest_negatives = interest_negatives
        self.temporal_from_epoch = temporal_from_epoch
        self.eval_add_std = eval_add_std
        self.loss_name = loss
        self.num_negatives = num_negatives
        self.item = nn.Embedding(num_items + 1, embed_dim, padding_idx=0)
        self.position = nn.Embedding(max_history, embed_dim)
        self.norm = nn.LayerNorm(embed_dim, eps=1e-12)
        self.dropout = nn.Dropout(dropout_rate)
        sizes = embed_dim, num_heads, dropout_rate, attention_dropout_rate
        self.mean, self.log_variance, self.decoder = (CausalLayer(*sizes) for _ in range(3))
        self.interests = None
        if prior == "mixture":
            self.interests = Interests(
                embed_dim, num_interests, assignment_temperature, gumbel_temperature, dropout_rate
            )
        self.apply(init_weights)

    def embed(self, history: Tensor) -> Tensor:
        """What the encoders read, (B, T, D), from int64 (B, T)."""
        hidden = self.item(history) + self.position.weight[: history.shape[1]]
        return self.dropout(self.norm(hidden))

    def encode(self, history: Tensor) -> tuple[Tensor, Tensor]:
        """Means and log variances of the latent state after each position, (B, T, D) twice."""
        hidden = self.embed(history)
        return self.mean(hidden), self.log_variance(hidden).clamp(-LOG_VARIANCE, LOG_VARIANCE)

    def loss(self, batch: Batch) -> Loss:
        """Reconstruction, divergence from the prior and, with a mixture, the interest loss (paper 3.4)."""
        mean, log_variance = self.encode(batch.item)
        state = sample(mean, log_variance) if self.training else mean
        found = next_item_loss(
            self.loss_name,
            self.decoder(state),
            self.item.weight,
            batch,
            num_negatives=self.num_negatives,
        )
        number = found.num_targets
        if not number:
            return found
        anneal = min(self.kl_cap, batch.step / self.kl_steps)
        at = batch.target != 0
        posterior = mean[at], log_variance[at]
        parts: dict[str, Tensor | Pooled] = {"prediction_loss": found.total.detach()}
        parts |= self.report(batch, log_variance[at])
        if self.interests is None:
            kl = gaussian_kl(*posterior, torch.zeros_like(mean[at]), torch.zeros_like(mean[at])).sum(-1)
            interest_loss = mean.new_zeros(())
        else:
            prior = self.prior_of(batch)
            kl = mixture_kl(*posterior, prior.at(at), self.kl, state[at])
            interest_loss, more = self.interest_loss(batch, prior, anneal)
            parts |= {name: value.detach() * number for name, value in more.items()}
        parts["kl"] = kl.detach().sum()
        weight = self.interest_weight * max(1, 201 - batch.epoch)  # the release counts epochs from 0
        total = found.total + anneal * self.kl_weight * kl.sum() + weight * interest_loss * number
        return Loss(total=total, num_targets=number, parts=parts)

    def report(self, batch: Batch, log_variance: Tensor) -> dict[str, Tensor | Pooled]:
        """Signs of collapse, of the posteriors at the targets and of the interests.

        Means and interests are those of evaluation: dropout and random assignments vary even where the model
        no longer tells inputs apart. The means are of every fourth row: all this takes 2 % of a step (a core,
        Beauty), with all rows 4 %.
        """
        with noise_free(self):
            mean = self.mean(self.embed(batch.item[::4]))
            found = latent_report(mean[batch.target[::4] != 0], log_variance)
            if self.interests is not None:
                items = self.norm(self.item(batch.item))
                found |= self.interests.report(items, batch.item != 0, temporal=self.is_temporal(batch))
        return found

    def is_temporal(self, batch: Batch) -> bool:
        """Whether hard interests have begun."""
        return 0 < self.temporal_from_epoch <= batch.epoch

    def never_began(self, epochs: int) -> str | None:
        """What training of so many epochs left out, if it ended before its second phase."""
        if self.interests is None or epochs >= self.temporal_from_epoch:
            return None
        return (
            "before its hard interests begin (train_collab.gmvae.temporal_from_epoch="
            f"{self.temporal_from_epoch}), so its interests are soft ones alone; more train_collab.patience "
            "or epochs would reach them"
        )

    def prior_of(self, batch: Batch) -> Prior:
        """The mixture of every row or, with prior_scope='prefix', of every position."""
        items = self.dropout(self.norm(self.item(batch.item)))
        assert self.interests is not None
        return self.interests(
            items, batch.item != 0, temporal=self.is_temporal(batch), prefix=self.prefix_prior
        )

    def interest_loss(self, batch: Batch, prior: Prior, anneal: float) -> tuple[Tensor, dict[str, Tensor]]:
        """What makes interests useful, apart and evenly used; a mean over rows, and its parts.

        Of every row the last target is to be told from interest_negatives items by its best interest
        (`interest_ranking`). Orthogonality, uniform use, decided assignment and N(0, I) enter with 0.01.

        All terms are of one forward pass: uneven_use is of the mean over its rows, and a pass weighs as much
        as it has targets.
        """
        last = last_targets(batch.target)
        mixture = prior.at(last)
        ranking = self.interest_ranking(mixture.mean, batch.target[last])
        terms = {
            "orthogonality": given(self.interests).orthogonality(),
            "uneven_use": uneven_use(mixture.intensity),
            "indecision": indecision(prior.assignment[batch.item != 0]),
            "interest_kl": gaussian_kl(mixture.mean, mixture.log_variance, 0.0, 0.0).sum(-1).mean(),
        }
        small = self.orthogonal_weight * terms["orthogonality"] + terms["uneven_use"]
        small = small + terms["indecision"] + anneal * terms["interest_kl"]
        return ranking + 0.01 * small, {"interest_ranking": ranking, **terms}

    def interest_ranking(self, means: Tensor, target: Tensor) -> Tensor:
        """Mean loss of telling each target from random items by the best of its row's interests.

        Negatives are drawn from all items, once for the pass; one that is a row's target is left out of that
        row. The release shares the negatives of a batch, one outside each row's items; a pass here is often a
        part of a batch, and their number must not depend on how it is cut.

        Args:
            means: of the interests, (n, K, D).
            target: int64 (n,).
        """
        drawn = (self.interest_negatives,)
        negative = torch.randint(1, self.item.num_embeddings, drawn, device=target.device)
        wanted = torch.einsum("bkd,bd->bk", means, self.item(target)).amax(1)
        unwanted = torch.einsum("bkd,nd->bkn", means, self.item(negative)).amax(1)
        unwanted = unwanted.masked_fill(negative == target[:, None], -torch.inf)
        logits = torch.cat([wanted[:, None], unwanted], 1) / INTEREST_TEMPERATURE
        return (logits.logsumexp(1) - logits[:, 0]).mean()

    def score(self, history: Tensor) -> Tensor:
        """Scores of all items after each history, (B, N + 1), from int64 (B, T)."""
        mean, log_variance = self.encode(history)
        state = mean + torch.exp(0.5 * log_variance) if self.eval_add_std else mean
        return last_of(self.decoder(state), history) @ self.item.weight.T

    def item_embeddings(self) -> Tensor:
        """The item vectors (N + 1, D), row 0 zero."""
        return self.item.weight.detach()

    @torch.no_grad()
    def item_groups(self) -> tuple[str, Tensor]:
        """What an item belongs to, as the interests see it: the name of such groups, and the soft assignment
        (N + 1, K), row 0 zero; (N + 1, 0) without a mixture. For evaluation: training adds noise."""
        items = self.norm(self.item.weight)[None]
        if self.interests is None:
            return "hyper-category", items.new_zeros(items.shape[1], 0)
        there = torch.arange(items.shape[1], device=items.device)[None] > 0
        return "hyper-category", self.interests.assign(items, there)[0]


class CausalLayer(nn.Module):
    """One post-norm transformer layer with GELU, each position seeing itself and earlier ones."""

    def __init__(self, width: int, num_heads: int, dropout_rate: float, attention_rate: float) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(
            width, num_heads, 4 * width, dropout_rate, "gelu", layer_norm_eps=1e-12, batch_first=True
        )
        self.layer.self_attn.dropout = attention_rate
        self.layer.dropout.p = 0.0  # between the feed-forward layers the release has none
        nn.init.normal_(self.layer.self_attn.in_proj_weight, std=0.02)

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D). Padding stands on the right, so the causal mask hides it too."""
        mask = nn.Transformer.generate_square_subsequent_mask(
            hidden.shape[1], device=hidden.device, dtype=hidden.dtype
        )
        return self.layer(hidden, src_mask=mask, is_causal=True)


def last_targets(target: Tensor) -> Tensor:
    """Where the last target of each row stands, if it has any: bool (B, T), from int64 (B, T)."""
    place = (target != 0).long() * torch.arange(1, target.shape[1] + 1, device=target.device)
    return (target != 0) & (place == place.amax(1, keepdim=True))


def uneven_use(intensity: Tensor) -> Tensor:
    """How unevenly rows use the K interests, from (n, K): deviation over mean, 0 if all are used alike."""
    use = intensity.mean(0)
    return (use.std() if len(use) > 1 else torch.zeros_like(use[0])) / use.mean()


def indecision(assignment: Tensor) -> Tensor:
    """How far items are from belonging to one hyper-category alone: the cross entropy of their best one."""
    return F.cross_entropy(assignment / INTEREST_TEMPERATURE, assignment.argmax(1))


def sample(mean: Tensor, log_variance: Tensor) -> Tensor:
    """A draw that gradients pass through."""
    return mean + torch.exp(0.5 * log_variance) * normal_like(mean)


def gaussian_kl(
    mean: Tensor, log_variance: Tensor, prior_mean: Tensor | float, prior_log_variance: Tensor | float
) -> Tensor:
    """KL(N(mean, exp(log_variance)) || N(prior_mean, exp(prior_log_variance))) of each dimension."""
    prior_log_variance = torch.as_tensor(prior_log_variance, dtype=mean.dtype, device=mean.device)
    spread = torch.exp(log_variance) + (mean - prior_mean).square()
    return 0.5 * (prior_log_variance - log_variance + spread / torch.exp(prior_log_variance) - 1)


def mixture_kl(mean: Tensor, log_variance: Tensor, prior: Prior, kind: str, state: Tensor) -> Tensor:
    """Divergence of N(mean, exp(log_variance)) from the mixture, (n,), from (n, D).

    With KL_k the divergence from component k: ``convex`` sum_k alpha_k KL_k, ``lse``
    -log sum_k alpha_k exp(-KL_k), which is never larger (Jensen) and, as a bound of the divergence itself
    (Hershey and Olsen 2007, with one component), never smaller than it; ``monte_carlo`` the unbiased
    log q(z) - log p(z) at the drawn state. With one component the first two are KL_1. The release blanks
    this place; the choice is ours.
    """
    weight = prior.intensity.clamp(min=1e-20).log()
    if kind == "monte_carlo":
        own = log_density(state, mean, log_variance)
        each = log_density(state[:, None], prior.mean, prior.log_variance)
        return own - (weight + each).logsumexp(1)
    each = gaussian_kl(mean[:, None], log_variance[:, None], prior.mean, prior.log_variance).sum(-1)
    if kind == "convex":
        return (prior.intensity * each).sum(1)
    return -(weight - each).logsumexp(1)


def log_density(state: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """log N(state; mean, exp(log_variance)), summed over the last axis."""
    scaled = (state - mean).square() / torch.exp(log_variance)
    return -0.5 * (log_variance + scaled + math.log(2 * math.pi)).sum(-1)


@torch.no_grad()
def latent_report(mean: Tensor, log_variance: Tensor) -> dict[str, Tensor | Pooled]:
    """Signs of posterior collapse: the standard deviation, and the share of dimensions whose mean varies with
    the input, over all passes.

    Args:
        mean: (m, D), at targets, or at some; without dropout, whose noise would count as variation.
        log_variance: (n, D), of what is sampled at each target.
    """
    mean = mean.double()
    count = mean.new_full((), len(mean))
    return {
        "posterior_std": torch.exp(0.5 * log_variance).mean(-1).sum(),
        "active_units": Pooled((mean.sum(0), mean.square().sum(0), count), active_units),
    }


def active_units(total: Tensor, squares: Tensor, count: Tensor) -> Tensor:
    """Share of dimensions with a variance above 0.01 (Burda et al. 2016), from sums (D,) over inputs."""
    variance = ratio(squares, count) - ratio(total, count).square()
    return (variance > 0.01).to(total.dtype).mean()
