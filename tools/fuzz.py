"""Give every reader, setting and request what nobody would give on purpose, and see what it says.

    python tools/fuzz.py --cases 500 --seed 0

Files are changed byte by byte from good ones (stage output and packages with a manifest that fits the change,
as somebody with bad intentions would write it); settings, histories and requests are made from odd pieces.
Everything must be taken, or refused with one of our errors; anything else is a fault, shown with the number
of its case, as is a case that takes longer than --seconds. Prints the number of cases; leaves with 1 if there
were faults.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from safetensors.numpy import save_file

from llmrec import pipeline
from llmrec.arguments import positive, positive_number, whole
from llmrec.console import guarded, set_up_logging
from llmrec.data.config import PrepareDataConfig
from llmrec.data.prepare import prepare_data
from llmrec.encoders.pictures import read_picture
from llmrec.encoders.precomputed import read_vectors
from llmrec.errors import ConfigError, LlmrecError
from llmrec.finetune.prompt import tokenize_words
from llmrec.finished import SCHEMA_VERSION, load
from llmrec.inference import package
from llmrec.inference.command import parse_lines
from llmrec.inference.recommender import Recommender
from llmrec.manifest import MANIFEST, describe_files, read_manifest, write_manifest
from llmrec.recipe import Recipe, apply_overrides, format_value, with_preset
from llmrec.stages import STAGES

Rng = np.random.Generator
TOKENS = "nan inf -1 1e999 0 null true ../ __import__('os') {history} %s :: , ' \" { } [ ] \t \r \n é \u202e"
SETTINGS = "0 -1 1 2 7 1e-3 -0.5 nan inf -inf 1e400 true none None a é a,b 1,2 , {} [] ../x null = valid mini"
PIECES = (
    *(token.encode() for token in TOKENS.split(" ")),
    *(b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"9" * 30, b" "),
)
VALUES = (*SETTINGS.split(" "), "", " ", "9" * 25)


@dataclass(frozen=True, kw_only=True)
class Target:
    """Something that takes what people or files give."""

    name: str
    case: Callable[[Change], Any]
    """Runs one case; returns, or raises what is to be judged."""


class Change:
    """The change of one case; number 0 changes nothing, so that a target that refuses all is found out."""

    def __init__(self, seed: int, target: int, number: int) -> None:
        self.rng = np.random.default_rng((seed, target, number))
        self.nothing = number == 0

    def __call__(self, content: bytes) -> bytes:
        return content if self.nothing else mutated(content, self.rng)


def mutated(content: bytes, rng: Rng) -> bytes:
    """The content with one to four changes."""
    for _ in range(rng.integers(1, 5)):
        place = int(rng.integers(0, len(content) + 1))
        other = int(rng.integers(0, len(content) + 1))
        size = int(rng.integers(1, 20))
        match rng.integers(0, 7):
            case 0 if place < len(content):
                content = (
                    content[:place]
                    + bytes([content[place] ^ (1 << rng.integers(0, 8))])
                    + content[place + 1 :]
                )
            case 1:
                content = content[:place] + content[place + size :]
            case 2:
                content = content[:place] + content[other : other + size] + content[place:]
            case 3:
                content = content[:place] + PIECES[rng.integers(0, len(PIECES))] + content[place:]
            case 4:
                content = content[:place] + rng.bytes(size) + content[place + size :]
            case 5:
                content = content[: max(place, len(content) // 2)]
            case _:
                lines = content.split(b"\n")
                first, second = rng.integers(0, len(lines), 2)
                lines[first], lines[second] = lines[second], lines[first]
                content = b"\n".join(lines)
    return content


def anything(rng: Rng, names: list[str], depth: int = 0) -> Any:
    """A JSON value that may or may not make sense."""
    match rng.integers(0, 9 if depth < 3 else 7):
        case 0 | 1:
            return names[rng.integers(0, len(names))]
        case 2:
            return VALUES[rng.integers(0, len(VALUES))]
        case 3:
            return int(rng.integers(-(2**62), 2**62)) if rng.random() < 0.3 else int(rng.integers(-2, 12))
        case 4:
            return float(rng.normal() * 10.0 ** rng.integers(-3, 300))
        case 5:
            return [None, True, False][rng.integers(0, 3)]
        case 6:
            return names[: rng.integers(0, 8)]
        case 7:
            return [anything(rng, names, depth + 1) for _ in range(rng.integers(0, 5))]
        case _:
            keys = ("history", "histories", "k", "candidates", "unknown", "explain", "model", "é")
            return {keys[rng.integers(0, len(keys))]: anything(rng, names, depth + 1) for _ in range(3)}


def data_targets(root: Path) -> Iterator[Target]:
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


def file_targets(root: Path) -> Iterator[Target]:
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


def folder_targets(root: Path, run: Path, packaged: Path) -> Iterator[Target]:
    """Stage output and packages: manifests as they are, and every other file under a manifest that fits."""
    for stage, about in STAGES.items():
        folder = root / "stages" / stage
        shutil.copytree(run / stage, folder)

        kind = about.artifact_class()

        def reload(folder: Path = folder, kind: type = kind) -> None:
            load(kind, folder)

        yield from damaged(f"{stage}", folder, MANIFEST, SCHEMA_VERSION, reload)
    folder = root / "package"
    shutil.copytree(packaged, folder)

    def recommend() -> None:
        found = Recommender.from_pretrained(folder)
        found.recommend([found.raw_ids[:2]], k=3)

    yield from damaged("package", folder, package.MANIFEST, package.FORM, recommend)


def damaged(
    what: str, folder: Path, manifest: str, schema: int, reload: Callable[[], None]
) -> Iterator[Target]:
    """A folder whose manifest is changed, and one whose other files are, the manifest made to fit."""
    content = read_manifest(folder / manifest, schema)
    good = (folder / manifest).read_bytes()
    skip = {manifest, package.CARD}
    names = [name for name in describe_files(folder, skip) if (folder / name).stat().st_size]

    def manifest_case(change: Change) -> None:
        try:
            (folder / manifest).write_bytes(change(good))
            reload()
        finally:
            (folder / manifest).write_bytes(good)

    def content_case(change: Change) -> None:
        path = folder / names[change.rng.integers(0, len(names))]
        before = path.read_bytes()
        try:
            path.write_bytes(change(before))
            write_manifest(folder / manifest, {**content, "files": describe_files(folder, skip)})
            reload()
        finally:
            path.write_bytes(before)
            (folder / manifest).write_bytes(good)

    yield Target(name=f"{what}: manifest", case=manifest_case)
    yield Target(name=f"{what}: files that its manifest vouches for", case=content_case)


def call_targets(packaged: Path) -> Iterator[Target]:
    """Settings, the Python API and the server."""
    from llmrec.config import flatten

    defaults = dict(flatten(Recipe()))
    paths = list(defaults)
    pieces = [part for path in paths for part in path.split(".")]

    def settings_case(change: Change) -> None:
        rng, chosen = change.rng, []
        if change.nothing:
            return
        for _ in range(rng.integers(1, 4)):
            path = paths[rng.integers(0, len(paths))]
            if rng.random() < 0.2:
                path = ".".join(pieces[place] for place in rng.integers(0, len(pieces), rng.integers(1, 4)))
            value = VALUES[rng.integers(0, len(VALUES))]
            if path in defaults and rng.random() < 0.4:
                value = format_value(defaults[path])
            chosen.append(f"{path}={value}" if rng.random() < 0.95 else value)
        preset = (None, "paper", "official")[rng.integers(0, 3)]
        apply_overrides(with_preset(Recipe(), preset), chosen)

    yield Target(name="settings", case=settings_case)
    model = Recommender.from_pretrained(packaged)
    names = [*model.raw_ids[:6], "no such item"]

    def recommend_case(change: Change) -> None:
        rng = change.rng
        if change.nothing:
            model.recommend([names[:2]])
            return
        options = {
            name: anything(rng, names)
            for name in ("k", "candidates", "unknown", "exclude_seen", "explain")
            if rng.random() < 0.3
        }
        model.recommend(anything(rng, names), **options)

    yield Target(name="Recommender.recommend", case=recommend_case)
    yield from server_targets(model, names)


def server_targets(model: Recommender, names: list[str]) -> Iterator[Target]:
    """Requests; those that are wrong must be answered with 4xx."""
    try:
        from fastapi.testclient import TestClient

        from llmrec.inference.server import application
    except ImportError:
        return
    client = TestClient(application({"first": model}), raise_server_exceptions=True)
    client.__enter__()
    good = json.dumps({"histories": [names[:3]], "k": 3}).encode()

    def judge(answer: Any) -> None:
        assert answer.status_code < 500, answer.text
        if answer.status_code >= 400:
            raise LlmrecError(answer.text)

    def body_case(change: Change) -> None:
        own = change.nothing or change.rng.random() < 0.5
        body = change(good) if own else json.dumps(anything(change.rng, names)).encode()
        judge(client.post("/recommend", content=body, headers={"content-type": "application/json"}))

    def address_case(change: Change) -> None:
        rng = change.rng
        place = "/items" if change.nothing else PLACES[rng.integers(0, len(PLACES))]
        tail = change(b"?q=red&limit=3" if place == "/items" else b"i1")
        shown = [byte for byte in tail if 32 < byte < 127]
        share = 0 if change.nothing else 0.3
        text = "".join(f"%{byte:02x}" if rng.random() < share else chr(byte) for byte in shown)
        judge(client.get(place + text))

    yield Target(name="server: bodies", case=body_case)
    yield Target(name="server: addresses", case=address_case)


PLACES = ("/items", "/picture?item_id=", "/", "/recommend", "/metrics", "/health")


class SlowError(Exception):
    """A case took too long."""


def too_slow(*_: Any) -> None:
    raise SlowError


class Judge:
    """Around one case: 'taken', 'refused' with one of our errors, or among the 'faults'."""

    verdict = "taken"
    error: BaseException | None = None

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __enter__(self) -> Judge:
        signal.setitimer(signal.ITIMER_REAL, self.seconds)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: Any) -> bool:
        signal.setitimer(signal.ITIMER_REAL, 0)
        self.error = error
        if error is not None:
            self.verdict = "refused" if isinstance(error, LlmrecError) else "faults"
        return not isinstance(error, KeyboardInterrupt | SystemExit)


def fuzz(
    targets: list[Target], cases: int, seconds: float, seed: int, shown: int = 3
) -> tuple[list[tuple[str, Counter[str]]], list[str]]:
    """Run the cases of every target; counts by target, and the first faults of each with their traces."""
    results, faults = [], []
    signal.signal(signal.SIGALRM, too_slow)
    for number, target in enumerate(targets):
        counts: Counter[str] = Counter()
        started = time.perf_counter()
        for case in range(cases):
            change = Change(seed, number, case)
            with Judge(seconds) as judge:
                target.case(change)
            counts[judge.verdict] += 1
            if judge.verdict == "refused" and change.nothing:
                faults.append(f"{target.name} refuses what is good: {judge.error}")
            if judge.verdict == "faults" and counts["faults"] <= shown:
                trace = "".join(traceback.format_exception(judge.error)[-3:])
                faults.append(f"{target.name}, case {case} of seed {seed}:\n{trace}")
        counts["milliseconds"] = round(1000 * (time.perf_counter() - started) / max(cases, 1))
        results.append((target.name, counts))
    return results, faults


SMALL = """
prepare_data.market.num_users=80 prepare_data.market.num_items=40 prepare_data.market.num_interests=4
prepare_data.market.max_length=8 train_collab.epochs=2 train_collab.sasrec.embed_dim=8
train_collab.sasrec.num_layers=1 train_collab.sasrec.num_heads=1 train_collab.sasrec.inner_dim=16
encode_items.text.dim=8 encode_items.image.dim=8 learn_semantic_ids.num_codes=4
learn_semantic_ids.num_levels=2 learn_semantic_ids.code_dim=8 learn_semantic_ids.hidden_dims=16
learn_semantic_ids.batch_size=40 learn_semantic_ids.epochs=5 learn_semantic_ids.min_utilisation=0
finetune.mini.hidden_size=8 finetune.mini.num_layers=1 finetune.mini.num_heads=1
finetune.mini.intermediate_size=16 finetune.prompt=compact finetune.epochs=1 finetune.fusion_temperature=1
evaluate.bootstrap_samples=20 evaluate.num_examples=2
"""


def tiny_run(root: Path) -> tuple[Path, Path]:
    """A small finished run of every stage, and its package."""
    pipeline.run(apply_overrides(Recipe(), SMALL.split()), root / "run")
    return root / "run", package.package_run(root / "run", root / "packaged")


def all_targets(root: Path, run: Path, packaged: Path) -> list[Target]:
    root.mkdir(parents=True, exist_ok=True)
    return [
        *data_targets(root),
        *file_targets(root),
        *folder_targets(root, run, packaged),
        *call_targets(packaged),
    ]


def report(results: list[tuple[str, Counter[str]]], faults: list[str]) -> str:
    lines = [f"{'target':58} {'cases':>7} {'taken':>7} {'refused':>8} {'faults':>7} {'ms each':>8}"]
    total: Counter[str] = Counter()
    for name, counts in [*results, ("all", total)]:
        cases = counts["taken"] + counts["refused"] + counts["faults"]
        each = str(counts["milliseconds"]) if counts is not total else ""
        numbers = f"{counts['taken']:7,} {counts['refused']:8,} {counts['faults']:7,} {each:>8}"
        lines.append(f"{name:58} {cases:7,} {numbers}")
        if counts is not total:
            total.update({key: counts[key] for key in ("taken", "refused", "faults")})
    return "\n".join([*lines, *faults])


def chosen(targets: list[Target], text: str) -> list[Target]:
    """Those whose names hold a text.

    Raises:
        ConfigError: none does.
    """
    found = [one for one in targets if text in one.name]
    if not found:
        names = "; ".join(one.name for one in targets)
        raise ConfigError(f"--only {text!r} is in no target's name; give a part of one of: {names}")
    return found


def command(options: argparse.Namespace) -> None:
    """Fuzz, print, and leave with 1 if there were faults."""
    set_up_logging()
    os.environ["TQDM_DISABLE"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        finished, packaged = tiny_run(root)
        logging.getLogger("llmrec").setLevel(logging.CRITICAL)
        warnings.simplefilter("ignore")
        targets = chosen(all_targets(root / "files", finished, packaged), options.only)
        results, faults = fuzz(targets, options.cases, options.seconds, options.seed)
    print(report(results, faults))
    sys.exit(bool(faults))


def main(arguments: list[str] | None = None) -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--cases", type=positive, default=200, help="cases of each target (200)")
    made.add_argument("--seed", type=whole, default=0, help="of the changes (0)")
    made.add_argument("--seconds", type=positive_number, default=10.0, help="longest time of a case (10)")
    made.add_argument("--only", default="", metavar="TEXT", help="targets whose names hold this (all)")
    options = made.parse_args(arguments)
    raise SystemExit(guarded(lambda: command(options)))


if __name__ == "__main__":
    main()
