"""Every form of interactions and items, read by prepare_data."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fuzzing.changes import Change, Target
from llmrec.data.config import PrepareDataConfig
from llmrec.data.prepare import prepare_data


def targets(root: Path) -> Iterator[Target]:
    """Every form of interactions and items."""
    rng = np.random.default_rng(0)
    rows = [(f"u{user}", f"i{rng.integers(0, 6)}", 100 + step) for user in range(6) for step in range(5)]
    names = ("user_id", "item_id", "timestamp")
    table = pa.table({name: list(values) for name, values in zip(names, zip(*rows))})
    packed = io.BytesIO()
    pq.write_table(table, packed)
    objects = "".join(json.dumps(dict(zip(names, row))) + "\n" for row in rows)
    literals = "".join(repr(dict(zip(names, row))) + "\n" for row in rows)
    comma = "\n".join(",".join(map(str, row)) for row in (names, *rows)) + "\n"
    items = "item_id,title,brand\n" + "".join(f'i{item},"Thing, number {item}",Acme\n' for item in range(6))
    good = {
        "interactions.csv": comma.encode(),
        "interactions.tsv": comma.replace(",", "\t").encode(),
        "interactions.csv.gz": gzip.compress(comma.encode(), mtime=0),
        "interactions.parquet": packed.getvalue(),
        "interactions.jsonl": objects.encode(),
        "interactions.json": literals.encode(),
        "interactions.json.gz": gzip.compress(objects.encode(), mtime=0),
        "sequences.txt": b"1 3 2 5 4\n2 1 2 3\n3 5 4 3 2 1\n",
        "sequences.txt.gz": gzip.compress(b"1 3 2 5 4\n2 1 2 3\n3 5 4 3 2 1\n", mtime=0),
        "items.csv": items.encode(),
    }
    plain = root / "plain.csv"
    plain.write_text(comma)
    for name, content in good.items():
        path = root / name
        options: dict[str, Any] = {"source": "table", "interactions": str(path), "k_core": 2}
        if name.startswith("items"):
            options |= {"interactions": str(plain), "items": str(path), "text_columns": ("brand",)}
        elif name.startswith("sequences"):
            options |= {"source": "sequences", "k_core": None}
        config = PrepareDataConfig(**options)

        def case(change: Change, path: Path = path, content: bytes = content, config: Any = config) -> None:
            path.write_bytes(change(content))
            prepare_data(config)

        yield Target(name=f"prepare_data: {name}", case=case)
