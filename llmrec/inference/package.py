"""A trained recommender as one folder that others can use; no user's data and no pictures are in it.

    package.json                     form, versions, size and SHA-256 of every file
    README.md                        model card (see model_card.py); not hashed, so that it can be edited
    adapter_config.json, adapter_model.safetensors, heads.safetensors, llmrec_config.json, ...   see Adapter
    items.parquet                    raw ids, titles and text columns, in the order of the item tables
    train_collab/ encode_items/ learn_semantic_ids/   item vectors, codes and the frozen quantiser
    data.json, evaluation.json       counts of the data, metrics of the run

Everything is safetensors, JSON, parquet or Markdown. Of the user's own files only the names are written down.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import platform
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from llmrec import __version__
from llmrec.artifacts import CollabEmbeddings, ContentEmbeddings, Report, SemanticIds, check_same_catalog
from llmrec.errors import ConfigError, MissingArtifactError
from llmrec.files import read_json, write_json
from llmrec.finetune.adapter import Adapter
from llmrec.finished import check_lineage, load, manifest_of, require_run
from llmrec.interactions import Interactions
from llmrec.manifest import DamagedError, check_files, describe_files, read_manifest, reading, write_manifest
from llmrec.storage import NO_FOLDER, open_like_folder, writing

FORM = 2
MANIFEST = "package.json"
CARD = "README.md"
NOT_HASHED = (MANIFEST, CARD, ".gitattributes")
ENDINGS = (".safetensors", ".json", ".jsonl", ".parquet", ".md")
OWN_FILES = ("interactions", "items", "exclude_items", "folder", "image_folder")
"""Settings of prepare_data that hold paths."""
ON_HUB = re.compile(r"hub:(?![./~\\]|[A-Za-z]:[\\/])")
"""Beginning of the address of a data set that is no local folder; see `llmrec.data.hub`."""


@dataclass(frozen=True, kw_only=True)
class Package:
    """What a recommender is made of."""

    items: pa.Table
    """One row per item in id order: raw_id, title, train_count and text columns"""
    adapter: Adapter
    collab: CollabEmbeddings
    content: ContentEmbeddings
    ids: SemanticIds
    data: dict[str, Any]
    """Counts, split and settings of the data."""
    evaluation: dict[str, Any]
    """metrics.json of the evaluation, or empty."""

    @property
    def catalog(self) -> str:
        return self.adapter.catalog


def package_run(run_dir: Path, out: Path, *, renamed: dict[str, str] | None = None) -> Path:
    """Gather what a finished run learned into a folder of its own.

    Args:
        run_dir: with the stages up to finetune, and evaluate if it was run.
        out: the folder to make.
        renamed: strings to replace in all settings, such as local model folders by Hub ids.

    Raises:
        MissingArtifactError: a stage is not finished.
        ArtifactMismatchError: one was made from another output than the one that is there.
        ConfigError: out exists.
    """
    if out.exists():
        raise ConfigError(f"{out} exists; give another folder, or delete it")
    return save(without_folders(package_of(run_dir)), out, renamed=renamed)


def package_of(run_dir: Path) -> Package:
    """What a finished run learned, as it is there.

    Raises:
        MissingArtifactError: a stage is not finished.
        ArtifactMismatchError: one was made from another output than the one that is there.
        ConfigError: it is a package.
    """
    kinds: tuple[Any, ...] = (Interactions, CollabEmbeddings, ContentEmbeddings, SemanticIds, Adapter)
    if (run_dir / MANIFEST).is_file():
        raise ConfigError(f"{run_dir} is a package already; give the run folder that it was made from")
    require_run(run_dir, [kind.stage for kind in kinds])
    data, collab, content, ids, adapter = (load(kind, run_dir / kind.stage) for kind in kinds)
    check_same_catalog(data, collab, content, ids, adapter)
    parts: tuple[Any, ...] = (data, collab, content, ids, adapter)
    check_lineage(parts)
    evaluation: dict[str, Any] = {}
    if (run_dir / Report.stage).is_dir():
        report = load(Report, run_dir / Report.stage)
        check_lineage((*parts, report))
        evaluation = {**report.metrics, "seed": adapter.settings["config"].get("seed")}
    about = {
        "summary": data.summary,
        "config": manifest_of(data)["config"],
        "stages": {
            kind.stage: {
                "seconds": manifest_of(artifact)["seconds"],
                "versions": manifest_of(artifact)["versions"],
            }
            for kind, artifact in zip(kinds, (data, collab, content, ids, adapter))
        },
    }
    return Package(
        items=data.items.drop_columns([name for name in data.items.column_names if name == "image_path"]),
        adapter=adapter,
        collab=dataclasses.replace(collab, state={}, log=[]),
        content=content,
        ids=dataclasses.replace(ids, log=[]),
        data=about,
        evaluation=evaluation,
    )


def without_folders(package: Package) -> Package:
    """The package with the names of the user's own files in place of their paths; nothing here reads them.

    Where a base model or an encoder is stays as it is, since they are loaded from there.
    """
    about = dict(package.data["config"])
    about |= {name: file_name(about[name]) for name in OWN_FILES if about.get(name)}
    about["mirrors"] = []
    settings = {**package.adapter.settings, "config": dict(package.adapter.settings["config"])}
    settings["config"]["prompt"] = file_name(settings["config"]["prompt"])
    encoders = {
        modality: without_path({**encoder, "settings": without_path(encoder["settings"])})
        for modality, encoder in package.content.encoders.items()
    }
    return dataclasses.replace(
        package,
        adapter=dataclasses.replace(package.adapter, settings=settings),
        content=dataclasses.replace(package.content, encoders=encoders),
        data={**package.data, "config": about},
    )


def without_path(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of an encoder with the name of the file of vectors, if there is one, in place of its path."""
    return {**settings, "path": file_name(settings["path"])} if settings.get("path") else settings


def file_name(path: str) -> str:
    """The last part of a path; ids on the Hub (`hub:OWNER/NAME`) stay as they are."""
    if ON_HUB.match(path):
        return path
    prefix = "hub:" if path.startswith("hub:") else ""
    return prefix + re.split(r"[\\/]", path.rstrip("\\/"))[-1]


def save(package: Package, out: Path, *, renamed: dict[str, str] | None = None) -> Path:
    """Write a package: all of it or nothing.

    Raises:
        StorageError: the disk is full, or may not be written.
    """
    from llmrec.inference.model_card import card

    scratch = out.with_name(f".{out.name}.{os.getpid()}")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        with writing(out, NO_FOLDER):
            scratch.mkdir(parents=True)
            package.adapter.save(scratch)
            for artifact in (package.collab, package.content, package.ids):
                (scratch / artifact.stage).mkdir()
                artifact.save(scratch / artifact.stage)
            pq.write_table(package.items, scratch / "items.parquet")
            write_json(scratch / "data.json", package.data)
            write_json(scratch / "evaluation.json", package.evaluation)
            for path in scratch.rglob("*.json"):
                write_json(path, rename(read_json(path), renamed or {}))
            (scratch / CARD).write_text(card(package_at(scratch)), encoding="utf-8")
            seal(scratch)
            os.replace(scratch, out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return out


def rename(value: Any, names: dict[str, str]) -> Any:
    """A JSON value with whole strings replaced."""
    if isinstance(value, dict):
        return {key: rename(inner, names) for key, inner in value.items()}
    if isinstance(value, list):
        return [rename(inner, names) for inner in value]
    return names.get(value, value) if isinstance(value, str) else value


def seal(folder: Path) -> None:
    """List every file with size and hash."""
    open_like_folder(folder)
    files = describe_files(folder, NOT_HASHED)
    foreign = [name for name in files if not name.endswith(ENDINGS)]
    assert not foreign, foreign
    versions = {"llmrec": __version__, "python": platform.python_version()}
    write_manifest(folder / MANIFEST, {"schema": FORM, "versions": versions, "files": files})


@contextlib.contextmanager
def advising() -> Iterator[None]:
    """Say of damaged files what to do about them."""
    try:
        yield
    except DamagedError as error:
        raise MissingArtifactError(f"{error}; fetch the package again") from None


def check(folder: Path) -> None:
    """Compare every file of a package with its manifest.

    Raises:
        MissingArtifactError: names what is missing or damaged.
        StaleArtifactError: another version wrote it in another form.
    """
    if not (folder / MANIFEST).is_file():
        raise MissingArtifactError(
            f"{folder} is not a packaged recommender (no {MANIFEST}); make one of a run with "
            f"`llmrec package {folder if (folder / 'finetune').is_dir() else 'RUN'} --out FOLDER`"
        )
    with advising():
        check_files(folder, read_manifest(folder / MANIFEST, FORM))


def load_package(folder: Path) -> Package:
    """A package from its folder, after checking every file.

    Raises:
        MissingArtifactError: a file is missing or damaged.
        ArtifactMismatchError: its parts do not belong together.
    """
    check(folder)
    with advising(), reading(folder):
        package = package_at(folder)
    check_same_catalog(package.adapter, package.collab, package.content, package.ids)
    return package


def package_at(folder: Path) -> Package:
    """A package from its folder as it is."""
    return Package(
        items=pq.read_table(folder / "items.parquet"),
        adapter=Adapter.load(folder),
        collab=CollabEmbeddings.load(folder / CollabEmbeddings.stage),
        content=ContentEmbeddings.load(folder / ContentEmbeddings.stage),
        ids=SemanticIds.load(folder / SemanticIds.stage),
        data=read_json(folder / "data.json"),
        evaluation=read_json(folder / "evaluation.json"),
    )
