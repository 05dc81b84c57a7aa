"""Vectors that were computed already, by what made them and of what: work that is stopped goes on.

A folder of parts, each written under another name first; every process adds its own, and all of them read
all of them, so this is also how processes hand each other their share.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
import uuid
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from llmrec.running import goes_on_with, note_spent

logger = logging.getLogger("llmrec")

PART_ROWS = 4096
PART_SECONDS = 30.0
"""A part is written when it has so many rows, or its first row is so old."""


class VectorCache:
    """Vectors by key; in memory, and in a folder if there is one.

    Args:
        folder: parts of all encoders lie below; None: memory only.
        about: what the encoder says of itself; another encoder has another cache.
    """

    def __init__(self, folder: Path | None, about: dict[str, Any]) -> None:
        name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:24]
        self.folder = None if folder is None else folder / name
        self.place: dict[str, tuple[int, int]] = {}
        self.tables: list[np.ndarray] = []
        self.waiting: list[tuple[str, np.ndarray]] = []
        self.seen: set[str] = set()
        self.since = time.monotonic()
        self.read()
        if self.folder is not None and self.place:
            goes_on_with(self.folder)

    def __contains__(self, key: str) -> bool:
        return key in self.place

    def __len__(self) -> int:
        return len(self.place)

    def read(self) -> None:
        """Take in parts that were not read yet; a damaged one is left aside, and its vectors made again."""
        if self.folder is None or not self.folder.is_dir():
            return
        for path in sorted(self.folder.glob("part-*.safetensors")):
            if path.name in self.seen:
                continue
            self.seen.add(path.name)
            try:
                found = load_file(path)
            except SafetensorError:
                logger.warning("%s is damaged and left aside", path)
                continue
            self.keep([bytes(key).hex() for key in found["keys"]], found["vectors"])

    def keep(self, keys: list[str], vectors: np.ndarray) -> None:
        """Hold vectors in memory."""
        self.tables.append(vectors)
        self.place |= {key: (len(self.tables) - 1, row) for row, key in enumerate(keys)}

    def add(self, keys: list[str], vectors: np.ndarray) -> None:
        """Hold vectors (n, D) of keys, hex sha256, and write them with the next part."""
        self.keep(keys, vectors)
        if self.folder is not None:
            self.waiting += list(zip(keys, vectors))
            old = time.monotonic() - self.since > PART_SECONDS
            if len(self.waiting) >= PART_ROWS or old:
                self.flush()

    def flush(self) -> None:
        """Write what was added since the last part."""
        self.since = time.monotonic()
        if not self.waiting or self.folder is None:
            return
        keys, vectors = zip(*self.waiting)
        self.waiting = []
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"part-{uuid.uuid4().hex}.safetensors"
        scratch = path.with_suffix(".tmp")
        rows = np.frombuffer(bytes.fromhex("".join(keys)), np.uint8).reshape(len(keys), 32)
        save_file({"keys": rows, "vectors": np.stack(vectors)}, scratch)
        os.replace(scratch, path)
        self.seen.add(path.name)
        note_spent(self.folder)

    def hand_over(self, keys: list[str]) -> np.ndarray:
        """Vectors float32 (n, D) of keys that are all there; here they are let go of."""
        found = self.take(keys)
        self.tables, self.place = [], {}
        return found

    def take(self, keys: list[str]) -> np.ndarray:
        """Vectors float32 (n, D) of keys that are all there."""
        if not keys:
            return np.zeros((0, 1), np.float32)
        table, row = self.place[keys[0]]
        found = np.empty((len(keys), self.tables[table].shape[1]), np.float32)
        for index, key in enumerate(keys):
            table, row = self.place[key]
            found[index] = self.tables[table][row]
        return found
