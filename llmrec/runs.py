"""A run folder in Python: what each stage made, loaded when it is asked for and checked against its manifest.

run = Run("runs/mme_sid_sample")
run.report.metrics["rows"]["sasrec"]["ndcg@10"]
run.per_user()["ndcg@10"]                   # one number a user, of what was fine-tuned
run.recommender().recommend([run.history("U0001")])
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmrec.artifacts import CollabEmbeddings, ContentEmbeddings, Report, SemanticIds
from llmrec.errors import DataError
from llmrec.evaluation.metrics import per_user
from llmrec.evaluation.rankings import ranks_of
from llmrec.finished import load, require_run
from llmrec.interactions import Interactions

if TYPE_CHECKING:
    from llmrec.finetune.adapter import Adapter
    from llmrec.inference.recommender import Recommender


class Run:
    """What a recipe left in its run folder.

    Args:
        folder: where.

    Raises:
        MissingArtifactError: it is no run folder; and where a stage is asked for that is not finished, or was
            damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        require_run(self.folder, [Interactions.stage])

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r})"

    @cached_property
    def data(self) -> Interactions:
        """Interactions, items and users (prepare_data)."""
        return self._load(Interactions)

    @cached_property
    def collab(self) -> CollabEmbeddings:
        """Collaborative item vectors, and the log of the model that learned them (train_collab)."""
        return self._load(CollabEmbeddings)

    @cached_property
    def content(self) -> ContentEmbeddings:
        """Text and image vectors (encode_items)."""
        return self._load(ContentEmbeddings)

    @cached_property
    def ids(self) -> SemanticIds:
        """Semantic IDs, their code embeddings and quality (learn_semantic_ids)."""
        return self._load(SemanticIds)

    @cached_property
    def adapter(self) -> Adapter:
        """Weights, log and analyses of fine-tuning (finetune)."""
        from llmrec.finetune.adapter import Adapter

        return self._load(Adapter)

    @cached_property
    def report(self) -> Report:
        """Metrics, and ranks of every user (evaluate)."""
        return self._load(Report)

    def history(self, user: str) -> list[str]:
        """What a user interacted with, raw ids in order, validation and test items included.

        Args:
            user: raw id.

        Raises:
            DataError: there is no such user.
        """
        data = self.data
        if user not in self._places:
            raise DataError(
                f"{user!r} is none of this run's {data.num_users:,} users; prepare_data leaves out those "
                "with few interactions (prepare_data.k_core)"
            )
        place = self._places[user]
        return [self._raw_ids[item - 1] for item in data.item[data.offset[place] : data.offset[place + 1]]]

    @cached_property
    def _places(self) -> dict[str, int]:
        return {user: place for place, user in enumerate(self.data.user_raw_ids)}

    @cached_property
    def _raw_ids(self) -> list[str]:
        """`Interactions.raw_ids`, which are read from the table each time."""
        return self.data.raw_ids

    def ranks(self, method: str | None = None) -> np.ndarray:
        """The rank of every user's target by a method, 1 the best, float64 (U,); ties in the middle.

        Users are those of ``report.rankings``, in its order.

        Args:
            method: its name in the table or in metrics.json; None: what was fine-tuned.

        Raises:
            ConfigError: no such method.
        """
        return ranks_of(self.report, method) + 1

    def per_user(self, method: str | None = None, ks: tuple[int, ...] = (5, 10, 20)) -> dict[str, np.ndarray]:
        """Recall, ndcg and mrr of every user, float64 (U,) by name such as ``ndcg@10``; see `ranks`."""
        return per_user(ranks_of(self.report, method), ks)

    def recommender(self, **options: Any) -> Recommender:
        """What was trained, ready to recommend; options as of `Recommender`."""
        from llmrec.inference.package import package_of
        from llmrec.inference.recommender import Recommender

        return Recommender(package_of(self.folder), **options)

    def _load(self, kind: Any) -> Any:
        return load(kind, self.folder / kind.stage)
