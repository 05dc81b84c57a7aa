"""Vectors, pictures, prompts and files of histories."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from safetensors.numpy import save_file

from fuzzing.changes import Change, Target
from llmrec.encoders.pictures import read_picture
from llmrec.encoders.precomputed import read_vectors
from llmrec.finetune.prompt import tokenize_words
from llmrec.inference.command import parse_lines


def targets(root: Path) -> Iterator[Target]:
    """Vectors, pictures, prompts and files of histories."""
    ids = [f"i{number}" for number in range(5)]
    vectors = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    vectors[0] = 0
    pq.write_table(pa.table({"item_id": ids, "vector": vectors[1:].tolist()}), root / "vectors.parquet")
    save_file({"vectors": vectors, "missing": np.zeros(6, bool)}, root / "vectors.safetensors")
    (root / "changed_vectors.ids.json").write_text(json.dumps(ids))
    for name in ("vectors.parquet", "vectors.safetensors"):
        content, path = (root / name).read_bytes(), root / f"changed_{name}"

        def vectors_case(change: Change, path: Path = path, content: bytes = content) -> None:
            path.write_bytes(change(content))
            read_vectors(str(path), ids, "vectors")

        yield Target(name=f"read_vectors: {name}", case=vectors_case)
    pixels = np.random.default_rng(0).integers(0, 256, (24, 20, 3), dtype=np.uint8)
    for kind in ("png", "jpeg", "gif", "webp", "bmp", "tiff"):
        packed = io.BytesIO()
        Image.fromarray(pixels).save(packed, kind)
        path = root / f"picture.{kind}"

        def picture_case(change: Change, path: Path = path, content: bytes = packed.getvalue()) -> None:
            path.write_bytes(change(content))
            read_picture(path, "i1", max_pixels=1_000_000, on_error="error")

        yield Target(name=f"read_picture: {kind}", case=picture_case)
    prompt = b'source = "ours"\ntext = "The user bought {history} and then"\n'

    def prompt_case(change: Change) -> None:
        (root / "prompt.toml").write_bytes(change(prompt))
        tokenize_words(str(root / "prompt.toml"))

    yield Target(name="prompt file", case=prompt_case)
    lines = b'i1,i2\n["i1", "i3"]\n{"history": ["i2"]}\n'

    def lines_case(change: Change) -> None:
        text = change(lines).decode("utf-8", "surrogateescape")
        list(parse_lines(io.StringIO(text), "histories"))

    yield Target(name="file of histories", case=lines_case)
