"""Settings of learn_semantic_ids."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from llmrec.config import StageSettings, require
from llmrec.errors import ConfigError

if TYPE_CHECKING:
    from llmrec.interactions import Interactions

MIN_SINKHORN_EPS = 0.003
"""Below, exp(1 / eps) leaves the range of float64."""


@dataclass(frozen=True, kw_only=True)
class LearnSemanticIdsConfig(StageSettings, path="learn_semantic_ids"):
    """MM-RQ-VAE: one residual-quantised autoencoder per modality (MME-SID section 4.2)."""

    modalities: tuple[Literal["collab", "text", "image"], ...] | None = None
    """Modalities that get semantic IDs; none: all that exist."""

    method: Literal["mm_rqvae", "rkmeans"] = "mm_rqvae"
    """mm_rqvae: trained autoencoders with residual quantisers; rkmeans: residual k-means on the (scaled)
    item vectors themselves, without training, code embeddings as wide as these."""

    num_levels: int = 4
    """Codes per item and modality (L)."""

    num_codes: int = 256
    """Codes in the codebook of one level (K); at most the number of items, better a tenth of it."""

    code_dim: int = 128
    """Width of a code embedding; the base model's width, so that codes can enter it directly."""

    hidden_dims: tuple[int, ...] = (512, 256)
    """Widths between an item vector and its latent vector; the decoder mirrors them (official: 3 x 4096)."""

    normalise: Literal["none", "standardise", "l2"] = "standardise"
    """Scaling of item vectors before the encoder. standardise: zero mean, and one factor per modality
    for unit variance, so distances keep their order; l2: unit rows; none: as they come (official)."""

    reconstruction: Literal["mmd", "mse", "mmd+mse"] = "mse"
    """What decoded vectors are compared by: mse: each item with itself, which keeps distances best (README);
    mmd: the whole batch as a set (the paper's), which ties no item to its own reconstruction; mmd+mse: the
    weighted sum."""

    mmd_estimator: Literal["tllib", "unbiased"] = "tllib"
    """Reported MMD value: with tllib's constant 2 / (B - 1), or without; gradients are the same."""

    mmd_weight: float = 3.0
    """Weight of the MMD reconstruction loss (official: 3)."""

    mse_weight: float = 1.0
    """Weight of the mean squared reconstruction error."""

    alignment: Literal["infonce", "mmd", "none"] = "infonce"
    """Pulls the first modality's latent vectors and each other's together: infonce: item by item; mmd: as
    sets (what the published code does). Left out, and said so, when there is one modality only."""

    alignment_weight: float = 0.01
    """Weight of the alignment loss (official: 0.01)."""

    alignment_temperature: float = 0.1
    """Softmax temperature of alignment='infonce'."""

    collaborative_weight: float = 0.0
    """Weight of LETTER's collaborative loss: an item's codes shall pick out its collaborative vector among
    those of its batch, by inner products (paper: 0.02, released script: 0.01). It needs code_dim of that
    vector's width."""

    diversity_weight: float = 0.0
    """Weight of LETTER's loss of diversity: codes shall pick out others of their cluster (published: 1e-4).
    It needs codebook_update=gradient, and the extra `constrained`, whose k-means takes about half a second an
    epoch for 4 levels of 256 codes."""

    diversity_clusters: int = 10
    """Clusters that the codes of a level are put into again before every epoch, for diversity_weight."""

    commitment_weight: float = 0.25
    """Weight of pulling latent vectors to their codes, inside the quantisation loss (official: 0.01)."""

    commitment: Literal["all", "first"] = "all"
    """Levels whose commitment moves the encoder: all, as Eq. 5 reads, or the first alone (official)."""

    quantization_weight: float = 1.0
    """Weight of the quantisation loss."""

    rq_reduce: Literal["mean", "sum"] = "mean"
    """Quantisation loss: mean over numbers and levels, or squared norms summed over both (Eq. 5)."""

    sinkhorn: Literal["last", "all", "none"] = "last"
    """Levels that spread a training batch evenly over their codes (Sinkhorn; official: the last)."""

    sinkhorn_eps: float = 0.003
    """Entropy of the even assignment, in half ranges of the batch's distances; smaller is sharper."""

    sinkhorn_iterations: int = 50
    """Row and column scalings per batch."""

    codebook_update: Literal["gradient", "ema"] = "ema"
    """How codes move: as running means of what is given to them, or by gradients (official)."""

    ema_decay: float = 0.99
    """codebook_update='ema': what a running mean keeps per batch, in (0, 1)."""

    estimator: Literal["straight_through", "rotation"] = "straight_through"
    """How gradients pass the rounding to codes: copied, or turned as the vector would have to turn."""

    init: Literal["kmeans", "kmeans_constrained", "random"] = "kmeans"
    """First codes: k-means on each level's residuals; the same with bounds on cluster sizes (official; needs
    the extra `constrained`); or small uniform noise."""

    kmeans_iterations: int = 10
    """Rounds of k-means (official: 10)."""

    kmeans_restarts: int = 1
    """Seeds that k-means tries, of which the tightest result is kept (official: 10)."""

    kmeans_rows: int = 65_536
    """Items that k-means looks at, at most; of more, a random sample."""

    restart_dead_codes: bool = True
    """After an epoch, move each code that no item used to the residual of a random item."""

    min_utilisation: float = 0.5
    """Fail if fewer than this share of a level's codes is used by any item after training."""

    repair_collisions: bool = False
    """After training, give items that share all codes other last codes, the nearest free ones together
    (the paper leaves collisions; new items that are added later take their nearest codes all the same)."""

    include_pad: bool = False
    """Train on the padding row as if it were an item (official)."""

    precision: Literal["float32", "tf32", "bfloat16"] = "float32"
    """Matrix products of encoders and decoders while training; tf32 changes nothing on a CPU. Distances,
    losses and the final codes are never computed in less than float32."""

    epochs: int = 100
    """Passes over the items; the last one is kept."""

    batch_size: int = 1024
    """Items per optimiser step at most; the items are dealt into batches of equal size."""

    learning_rate: float = 1e-3
    """Step size of AdamW, constant (official: 2e-4, for thousands of epochs)."""

    weight_decay: float = 1e-4
    """AdamW weight decay."""

    log_every_epochs: int = 5
    """Epochs between log rows; the last epoch always has one."""

    save_every_minutes: float = 10.0
    """Least minutes between checkpoints, at ends of epochs, that a stopped run goes on from; 0: none."""

    seed: int = 0
    """Seed of initial weights, initial codes, batches, restarts and the sample for Kendall's tau."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in LEAST.items():
            value = getattr(self, name)
            require(value >= least, f"learn_semantic_ids.{name} must be at least {least}, got {value}")
        for name in POSITIVE:
            value = getattr(self, name)
            require(value > 0, f"learn_semantic_ids.{name} must be greater than 0, got {value}")
        for name in NOT_NEGATIVE:
            value = getattr(self, name)
            require(value >= 0, f"learn_semantic_ids.{name} must be at least 0, got {value}")
        require(
            all(width >= 1 for width in self.hidden_dims),
            f"learn_semantic_ids.hidden_dims must be widths of at least 1, got {self.hidden_dims}",
        )
        require(
            0 <= self.min_utilisation <= 1,
            f"learn_semantic_ids.min_utilisation must lie in [0, 1], got {self.min_utilisation}",
        )
        require(
            0 < self.ema_decay < 1,
            f"learn_semantic_ids.ema_decay must lie between 0 and 1, got {self.ema_decay}",
        )
        require(
            self.kmeans_rows >= self.num_codes,
            "learn_semantic_ids.kmeans_rows must be at least learn_semantic_ids.num_codes "
            f"({self.num_codes}), got {self.kmeans_rows}",
        )
        require(
            not self.diversity_weight or self.num_codes >= 8,
            f"learn_semantic_ids.num_codes must be at least 8 with diversity_weight, got {self.num_codes}",
        )
        require(
            not self.diversity_weight or self.diversity_clusters <= self.num_codes // 4,
            "learn_semantic_ids.diversity_clusters must be at most a fourth of learn_semantic_ids.num_codes "
            f"({self.num_codes}), got {self.diversity_clusters}",
        )
        require(
            not self.diversity_weight or self.codebook_update == "gradient",
            "learn_semantic_ids.diversity_weight moves codes by gradients; set "
            f"learn_semantic_ids.codebook_update=gradient, got {self.codebook_update}",
        )
        if self.modalities is not None:
            require(
                self.modalities != ("collab",) or not self.collaborative_weight,
                "learn_semantic_ids.collaborative_weight ties codes of texts and images to collaborative "
                "vectors, and learn_semantic_ids.modalities has neither",
            )
            require(
                0 < len(set(self.modalities)) == len(self.modalities),
                "learn_semantic_ids.modalities must be different names out of collab, text and image (none: "
                f"all that exist), got {self.modalities}",
            )
        self._refuse_settings_without_effect()

    def incidental_fields(self) -> tuple[str, ...]:
        """Settings that change how the result is computed, but not the result."""
        return ("log_every_epochs", "save_every_minutes")

    def check_data(self, data: Interactions) -> None:
        """Refuse data with too few items; see `check_items`."""
        self.check_items(data.num_items)

    def check_items(self, count: int, which: str = "items") -> None:
        """Refuse more codes than there are items to make them from.

        Args:
            count: how many there are.
            which: what they are.
        """
        require(
            self.num_codes <= count,
            f"learn_semantic_ids.num_codes must be at most the number of {which} ({count}), got "
            f"{self.num_codes}; about a tenth of it suits, such as "
            f"learn_semantic_ids.num_codes={max(2, 2 ** round(math.log2(max(count, 20) / 10)))}",
        )
        if self.init == "kmeans_constrained":
            size_bounds(min(count + self.include_pad, self.kmeans_rows), self.num_codes)

    def _refuse_settings_without_effect(self) -> None:
        """A setting that cannot change the result is a mistake of whoever set it."""
        parts, reason = self.reconstruction.split("+"), f"reconstruction={self.reconstruction!r}"
        self.refuse_changed([f"{part}_weight" for part in ("mmd", "mse") if part not in parts], reason)
        if "mmd" not in parts and self.alignment != "mmd":
            self.refuse_changed(["mmd_estimator"], reason)
        if self.alignment == "none":
            self.refuse_changed(["alignment_weight"], "alignment='none'")
        if self.alignment != "infonce":
            self.refuse_changed(["alignment_temperature"], f"alignment={self.alignment!r}")
        if not self.diversity_weight:
            self.refuse_changed(["diversity_clusters"], "diversity_weight=0")
        if self.sinkhorn == "none":
            self.refuse_changed(["sinkhorn_eps", "sinkhorn_iterations"], "sinkhorn='none'")
        if self.init == "random":
            names = ["kmeans_iterations", "kmeans_restarts", "kmeans_rows"]
            self.refuse_changed(names, "init='random'")
        if self.codebook_update != "ema":
            self.refuse_changed(["ema_decay"], f"codebook_update={self.codebook_update!r}")
        if self.method == "rkmeans":
            require(
                self.init != "random",
                "learn_semantic_ids.init must be kmeans or kmeans_constrained with method='rkmeans', got "
                f"{self.init!r}",
            )
            idle = [name for name in self.__dataclass_fields__ if name not in RKMEANS_FIELDS]
            self.refuse_changed(idle, "method='rkmeans'")


@dataclass(frozen=True, kw_only=True)
class ReportSemanticIdsConfig(StageSettings, path="report_semantic_ids"):
    """The page on which semantic IDs are judged."""

    samples: Literal["train", "test"] = "train"
    """(history item, target) samples for Kendall's tau: from the train split alone, so that settings may be
    chosen by it, or with the test targets, as the paper seems to do."""

    num_codes: int = 6
    """Codes of the first level shown with their items, per modality."""

    num_items: int = 8
    """Items shown of each code and each collision."""

    seed: int = 0
    """Seed of samples and examples."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_codes", "num_items"):
            value = getattr(self, name)
            require(value >= 1, f"report_semantic_ids.{name} must be at least 1, got {value}")
        require(self.seed >= 0, f"report_semantic_ids.seed must be at least 0, got {self.seed}")


LEAST = {
    "num_levels": 1,
    "num_codes": 2,
    "code_dim": 1,
    "sinkhorn_eps": MIN_SINKHORN_EPS,
    "sinkhorn_iterations": 1,
    "kmeans_iterations": 1,
    "kmeans_restarts": 1,
    "kmeans_rows": 2,
    "diversity_clusters": 2,
    "epochs": 1,
    "batch_size": 2,
    "log_every_epochs": 1,
    "seed": 0,
}
"""Smallest possible values."""

POSITIVE = ("mmd_weight", "mse_weight", "alignment_temperature", "quantization_weight", "learning_rate")
"""Settings that must be greater than 0; another setting switches a loss off."""

NOT_NEGATIVE = (
    *("alignment_weight", "collaborative_weight", "diversity_weight", "commitment_weight", "weight_decay"),
    "save_every_minutes",
)
"""Settings that may be 0."""

RKMEANS_FIELDS = {
    *("method", "modalities", "num_levels", "num_codes", "normalise", "repair_collisions"),
    *("init", "kmeans_iterations", "kmeans_restarts", "kmeans_rows", "min_utilisation", "seed"),
}
"""Settings that take effect with method='rkmeans'."""

PRESETS: dict[str, LearnSemanticIdsConfig] = {
    "default": LearnSemanticIdsConfig(),
    "paper": LearnSemanticIdsConfig(
        code_dim=4096,
        hidden_dims=(4096, 4096, 4096),
        normalise="none",
        reconstruction="mmd",
        codebook_update="gradient",
        rq_reduce="sum",
        sinkhorn="none",
        epochs=2000,
        learning_rate=2e-4,
        log_every_epochs=50,
        restart_dead_codes=False,
        min_utilisation=0.0,
    ),
    "official": LearnSemanticIdsConfig(
        code_dim=4096,
        hidden_dims=(4096, 4096, 4096),
        normalise="none",
        reconstruction="mmd",
        codebook_update="gradient",
        alignment="mmd",
        commitment="first",
        commitment_weight=0.01,
        init="kmeans_constrained",
        kmeans_restarts=10,
        include_pad=True,
        epochs=2000,
        learning_rate=2e-4,
        log_every_epochs=50,
        restart_dead_codes=False,
        min_utilisation=0.0,
    ),
    "letter": LearnSemanticIdsConfig(
        modalities=("text",),
        code_dim=32,
        hidden_dims=(2048, 1024, 512, 256, 128, 64),
        normalise="none",
        alignment="none",
        collaborative_weight=0.02,
        diversity_weight=1e-4,
        codebook_update="gradient",
        commitment="first",
        init="kmeans_constrained",
        kmeans_restarts=10,
        epochs=10_000,
        log_every_epochs=50,
        restart_dead_codes=False,
        min_utilisation=0.0,
        repair_collisions=True,
    ),
}
"""default: what keeps distances best (README); paper: MME-SID section 4.2 as printed, with the widths and the
length of training of the published code, else our default; official: the published code
(Applied-Machine-Learning-Lab/MME-SID@bc95e1a, which aligns by MMD), but for its choice of the epoch with the
lowest training loss: the last one is kept; letter: the tokenizer of LETTER (Wang et al., CIKM 2024), as in
HonghuiBao2000/LETTER@0d4a115 with the paper's weights, which its authors confirm (issue 26), for
collaborative vectors of 32 numbers. It differs in the repair of collisions
(`llmrec.semantic_ids.assign.separate`), in the length (half of the script's 20,000 epochs, of which the last
one is kept, not that of fewest collisions), and in one k-means an epoch for the clusters of codes, not the
best of ten."""


def size_bounds(num_rows: int, num_clusters: int) -> tuple[int, int]:
    """Smallest and largest cluster of the published initialisation: min(n / 2K, 50), and four times that.

    Raises:
        ConfigError: so many rows do not fit in clusters of these sizes.
    """
    least = min(num_rows // (2 * num_clusters), 50)
    most = 4 * least
    if num_clusters * least <= num_rows <= num_clusters * most:
        return least, most
    if least == 0:
        reason = f"at least 2 items for each of {num_clusters} codes, and there are {num_rows}"
        advice = f"at most {num_rows // 2}"
    else:
        reason = f"clusters of {least} to {most} items, which {num_clusters} codes and {num_rows} items"
        reason, advice = f"{reason} do not allow", f"at least {-(-num_rows // most)}"
    raise ConfigError(
        f"learn_semantic_ids.init='kmeans_constrained' needs {reason}; use init=kmeans, or "
        f"learn_semantic_ids.num_codes of {advice}"
    )


def cluster_bounds(num_codes: int, num_clusters: int) -> tuple[int, int]:
    """Smallest and largest cluster of a level's codes: min(K / 2C, 10) and 6 C as published (for C = 10
    clusters of K = 256 codes), the latter at least twice the mean and at most K."""
    most = max(6 * num_clusters, -(-2 * num_codes // num_clusters))
    return min(num_codes // (2 * num_clusters), 10), min(most, num_codes)
