"""A trained recommender in use: histories of raw ids in, ranked items out."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from llmrec.data.batches import length_groups
from llmrec.errors import ConfigError, DataError, MissingArtifactError
from llmrec.finetune.base_model import window_of
from llmrec.finetune.model import MMESID
from llmrec.finetune.scoring import CatalogueScores, load_scorer
from llmrec.global_state import usual_torch
from llmrec.inference.best import Graph, best_of_all
from llmrec.inference.devices import default_device, usable
from llmrec.inference.package import MANIFEST, Package, advising, load_package
from llmrec.manifest import reading

MAX_CELLS = 1 << 13
"""Tokens in one forward pass."""


class UnknownItemError(DataError):
    """An id that is not in the catalogue.

    Args:
        where: 'histories[N]' or 'candidates'.
        place: N, counted from 0; None: in the candidates.
        reason: what is wrong, without where it is and what to do.
    """

    def __init__(self, where: str, place: int | None, reason: str) -> None:
        # What Python makes it of again where it is handed to another process.
        super().__init__(where, place, reason)
        self.where = where
        self.place = place
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}; unknown='skip' leaves such ids out"


@dataclass(frozen=True, kw_only=True)
class Recommendation:
    """One recommended item."""

    item_id: str
    title: str | None
    score: float
    """Larger is better; scores of one history can be compared with each other."""
    parts: dict[str, float] = field(default_factory=dict)
    """What each source added to the score: the target table, and each modality."""


class Recommender:
    """Ranks the catalogue for histories, those of training and any others.

    Args:
        package: what was trained.
        device: where to compute; None: a GPU if there is one.
        index: 'exact' compares with every item; 'faiss' looks candidates up in a graph (HNSW, inner product)
            and compares with these, which may miss some: for catalogues of millions (pip install faiss-cpu).

    Raises:
        ConfigError: faiss is not installed, or torch can use no such device here.
    """

    def __init__(
        self, package: Package, device: str | torch.device | None = None, *, index: str = "exact"
    ) -> None:
        if index not in ("exact", "faiss"):
            raise ConfigError(f"index must be 'exact' or 'faiss', got {index!r}")
        self.index = index
        self.package = package
        self.device = default_device() if device is None else usable(device)
        self._load()

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        revision: str | None = None,
        device: str | torch.device | None = None,
        base_model: str | None = None,
        cache_dir: str | Path | None = None,
        index: str = "exact",
    ) -> Recommender:
        """Load a packaged recommender from a folder or from the Hub.

        Args:
            source: a folder, or a Hub id (owner/name).
            revision: commit, branch or tag on the Hub.
            device: where to compute; None: a GPU if there is one.
            base_model: where the base model is, if not where the package says.
            cache_dir: where downloads are kept; None: the Hub client's own place.
            index: see the class.

        Raises:
            MissingArtifactError: a file is missing or damaged, or the repository does not exist.
        """
        folder = Path(source)
        device = None if device is None else usable(device)
        if not folder.is_dir():
            from llmrec.hub import download

            folder = download(str(source), revision=revision, cache_dir=cache_dir)
            if not (folder / MANIFEST).is_file():
                raise MissingArtifactError(
                    f"{source} on the Hub holds no packaged recommender; push one with `llmrec push_to_hub`"
                )
        package = load_package(folder)
        if base_model is not None:
            settings = {**package.adapter.settings, "revision": None}
            settings["config"] = {**settings["config"], "base_model": base_model, "revision": None}
            adapter = dataclasses.replace(package.adapter, settings=settings)
            package = dataclasses.replace(package, adapter=adapter)
        with advising(), reading(folder):
            return cls(package, device, index=index)

    @usual_torch()
    def _load(self) -> None:
        package = self.package
        scorer = load_scorer(package.adapter, package.collab, package.content, package.ids, self.device)
        self.scores = cast(CatalogueScores, scorer.score)
        self.max_history = shown_items(self.model, scorer.max_history)
        self.raw_ids: list[str] = package.items["raw_id"].to_pylist()
        self.titles: list[str | None] = (
            package.items["title"].to_pylist()
            if "title" in package.items.column_names
            else [None] * len(self.raw_ids)
        )
        self.number = {name: place for place, name in enumerate(self.raw_ids, start=1)}
        self.sources = ("target", *self.model.item_scores.modalities)
        self.graph = Graph(self.scores.matrix) if self.index == "faiss" else None

    def __repr__(self) -> str:
        name, items = type(self).__name__, len(self.raw_ids)
        return f"{name}({self.config['method']}, {items:,} items, device={str(self.device)!r})"

    @property
    def model(self) -> MMESID:
        return cast(MMESID, self.scores.run)

    @property
    def config(self) -> dict[str, Any]:
        """Settings of fine-tuning."""
        return self.package.adapter.settings["config"]

    @usual_torch()
    def recommend(
        self,
        histories: Sequence[Sequence[str]],
        k: int = 10,
        *,
        exclude_seen: bool = True,
        candidates: Sequence[str] | None = None,
        unknown: str = "error",
        explain: bool = False,
    ) -> list[list[Recommendation]]:
        """The best items for every history.

        Args:
            histories: raw item ids, oldest first; an empty history is allowed. Of one that is longer than
                `finetune.max_history`, or than the base model sees at once, the last items are read.
            k: items per history; fewer come back if fewer are left.
            exclude_seen: leave out the items of the history.
            candidates: rank only these items; None: the whole catalogue.
            unknown: ids that are not in the catalogue: 'error', or 'skip' them.
            explain: say what each score source added.

        Raises:
            UnknownItemError: an id is not in the catalogue.
            DataError: something is not a list of ids, or another argument cannot be.
        """
        if not isinstance(k, int | np.integer) or isinstance(k, bool) or k < 1:
            raise DataError(f"k must be a whole number of at least 1, got {k!r}")
        if unknown not in ("error", "skip"):
            raise DataError(f"unknown must be 'error' or 'skip', got {unknown!r}")
        rows = self._rows(histories, unknown)
        allowed = None
        if candidates is not None:
            allowed = np.unique(self._numbers(candidates, unknown, "candidates"))
            if not len(allowed):
                raise DataError("candidates: none of them is in the catalogue")
        found: list[list[Recommendation]] = [[] for _ in rows]
        for group in self._groups(rows):
            asked = [rows[place] for place in group]
            hidden = self._read_out(asked)
            seen = asked if exclude_seen else [row[:0] for row in asked]
            if self.graph is not None and allowed is None:
                best = self.graph.best(self.scores.matrix, hidden, seen, k)
            else:
                best = best_of_all(self.scores.matrix, hidden, seen, k, allowed)
            for place, state, (items, values) in zip(group, hidden, best):
                found[place] = self._describe(state, items, values, explain)
        return found

    @usual_torch()
    def score(self, histories: Sequence[Sequence[str]], *, unknown: str = "error") -> np.ndarray:
        """Scores of all items, float32 (n, N), in the order of `raw_ids`."""
        rows = self._rows(histories, unknown)
        found = np.empty((len(rows), len(self.raw_ids)), np.float32)
        for group in self._groups(rows):
            hidden = self._read_out([rows[place] for place in group])
            found[group] = (hidden @ self.scores.matrix.T)[:, 1:].cpu().numpy()
        return found

    @usual_torch()
    def add_items(
        self,
        items: Sequence[Mapping[str, Any]],
        *,
        vectors: Mapping[str, np.ndarray] | None = None,
        neighbours: int = 10,
    ) -> None:
        """Make items known that came after training; nothing is trained (see `new_items`). Encoders run on
        the GPU of the process, whatever this recommender's device is. Other threads must not ask meanwhile.

        Args:
            items: each with `item_id`, the catalogue's text columns as far as they are known (`title`...),
                and `image`, a picture's path, where there is one; a recommender that was trained without
                pictures makes no use of it, and warns.
            vectors: content vectors (n, D_m) by modality, in place of encoding; scaled as the catalogue's.
            neighbours: see `new_items.extended`.

        Raises:
            DataError: ids that are taken, doubled or no text; a picture that cannot be read; an item of which
                neither a text nor a picture is known.
            ConfigError: the catalogue's vectors came from a file and none are given.
        """
        from llmrec.inference.new_items import check_ids, content_of, extended, item_table

        if not isinstance(items, Sequence):
            raise DataError(
                f"new items must be a list of mappings with item_id, got a {type(items).__name__}; of a "
                "DataFrame, give frame.to_dict('records')"
            )
        if not items:
            return
        table = item_table(items, self.package.items.column_names)
        check_ids(self.package, table)
        pictures = [item.get("image") for item in items]
        content, present = content_of(self.package, table, pictures, vectors or {})
        before = self.package
        self.package = extended(before, table, content, present=present, neighbours=neighbours)
        del self.scores, self.graph  # the model that is made anew needs their room
        whole = False
        try:
            self._load()
            whole = True
        finally:
            if not whole:
                self.package = before
                self._load()

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write the package, with the items that were added, into a new folder; `from_pretrained` reads it.

        Raises:
            ConfigError: the folder exists.
            StorageError: it cannot be written.
        """
        from llmrec.inference.package import save

        out = Path(folder)
        if out.exists():
            raise ConfigError(f"{out} exists; give another folder, or delete it")
        return save(self.package, out)

    def _groups(self, rows: list[np.ndarray]) -> list[np.ndarray]:
        """Which histories go through the model together."""
        if not rows:
            return []
        slots = self.model.item_tokens.tokens_per_item
        most = self.max_history or max(map(len, rows))
        length = [slots * max(min(len(row), most), 1) + len(self.model.response) for row in rows]
        return length_groups(np.array(length), MAX_CELLS)

    def _rows(self, histories: Sequence[Sequence[str]], unknown: str) -> list[np.ndarray]:
        """Item ids of several histories."""
        if isinstance(histories, str) or not isinstance(histories, Iterable):
            raise DataError(f"histories must be a list of lists of item ids, got {histories!r:.80}")
        return [
            self._numbers(history, unknown, f"histories[{place}]", place)
            for place, history in enumerate(histories)
        ]

    def _numbers(
        self, history: Sequence[str], unknown: str, where: str, place: int | None = None
    ) -> np.ndarray:
        """Item ids int64 of raw ids."""
        unordered = place is not None and isinstance(history, Set)
        if isinstance(history, str | bytes | Mapping) or unordered or not isinstance(history, Iterable):
            raise DataError(f"{where} must be a list of item ids, got {history!r:.80}")
        history = list(history)  # of a frame's column or an array, too
        numbers = [self.number.get(name) if isinstance(name, str) else None for name in history]
        if unknown == "error" and None in numbers:
            name = history[numbers.index(None)]
            raise UnknownItemError(
                where,
                place,
                f"{name!r:.80} is not in the catalogue of {len(self.raw_ids):,} items; raw ids are texts "
                f"such as {self.raw_ids[0]!r}",
            )
        return np.array([number for number in numbers if number is not None], dtype=np.int64)

    def _read_out(self, rows: list[np.ndarray]) -> Tensor:
        """Read-out vectors float32 (n, H)."""
        if self.max_history is not None:
            rows = [row[-self.max_history :] for row in rows]
        width = max([1, *map(len, rows)])
        padded = np.zeros((len(rows), width), dtype=np.int64)
        for place, row in enumerate(rows):
            padded[place, : len(row)] = row
        return self.scores.read_out(torch.from_numpy(padded).to(self.device))

    def _describe(
        self, hidden: Tensor, items: np.ndarray, values: np.ndarray, explain: bool
    ) -> list[Recommendation]:
        parts = self._parts(hidden, items) if explain and len(items) else [{}] * len(items)
        return [
            Recommendation(
                item_id=self.raw_ids[item - 1], title=self.titles[item - 1], score=float(value), parts=part
            )
            for item, value, part in zip(items.tolist(), values.tolist(), parts)
        ]

    @torch.no_grad()
    def _parts(self, hidden: Tensor, items: np.ndarray) -> list[dict[str, float]]:
        """What each source adds to the scores of items."""
        found = self.model.item_scores.by_source(hidden, torch.from_numpy(items).to(self.device))
        table = found.cpu().numpy()
        return [dict(zip(self.sources, map(float, row))) for row in table]


def shown_items(model: MMESID, trained: int | None) -> int | None:
    """Most recent items that a model is shown: as many as it was trained on, if that is bounded, and as its
    base's window holds beside the prompt; None: all."""
    window = window_of(model.base)
    if window is None:
        return trained
    room = window - len(model.instruction) - len(model.response)
    fitting = max(1, room // model.item_tokens.tokens_per_item)
    return fitting if trained is None else min(trained, fitting)
