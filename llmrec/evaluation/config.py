"""Settings of evaluate."""

from __future__ import annotations

from dataclasses import dataclass

from llmrec.config import StageSettings, require


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(StageSettings, path="evaluate"):
    """Ranking the whole catalogue for every user with a test item."""

    ks: tuple[int, ...] = (5, 10, 20)
    """Cut-offs of recall, nDCG and MRR."""

    mask_seen: bool = True
    """Leave items of a user's history out of the ranking; figures with these items kept are reported too
    (false: no others). Of validation items, by which epochs are chosen, train_collab.mask_seen and
    finetune.mask_seen say the same."""

    batch_size: int = 256
    """Users scored at once."""

    top_k: int = 20
    """Best items kept per user and method in rankings.parquet; coverage is that of ten."""

    head_rate: float = 0.1
    """Share of items, the most popular in the train split, that count as head."""

    mid_rate: float = 0.4
    """Share of items after the head that count as mid; the rest is tail, or cold if never trained."""

    length_edges: tuple[int, ...] = (5, 10, 20, 50, 100, 200)
    """Users are grouped by the length of their history: the longest of each group but the last, in items."""

    num_examples: int = 8
    """Users shown as examples in the report."""

    bootstrap_samples: int = 2000
    """Resamplings of users behind the confidence intervals of differences."""

    seed: int = 0
    """Seed of the bootstrap and of the examples."""

    def incidental_fields(self) -> tuple[str, ...]:
        """Settings that change how the result is computed, but not the result."""
        return ("batch_size",)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            bool(self.ks) and min(self.ks) >= 1 and len(set(self.ks)) == len(self.ks),
            f"evaluate.ks must be different numbers of at least 1, got {self.ks}",
        )
        require(10 in self.ks, f"evaluate.ks must hold 10, which tables and tests use, got {self.ks}")
        for name, least in (("batch_size", 1), ("top_k", 10), ("bootstrap_samples", 1)):
            value = getattr(self, name)
            require(value >= least, f"evaluate.{name} must be at least {least}, got {value}")
        require(self.num_examples >= 0, f"evaluate.num_examples must be >= 0, got {self.num_examples}")
        edges = self.length_edges
        require(
            bool(edges) and edges[0] >= 1 and list(edges) == sorted(set(edges)),
            f"evaluate.length_edges must be ascending numbers of at least 1, got {edges}",
        )
        for name in ("head_rate", "mid_rate"):
            value = getattr(self, name)
            require(0 < value < 1, f"evaluate.{name} must lie between 0 and 1, got {value}")
        require(
            self.head_rate + self.mid_rate < 1,
            f"evaluate.head_rate + evaluate.mid_rate must be below 1, got {self.head_rate + self.mid_rate}",
        )
