"""Stage output and packages: manifests, and the files that they vouch for."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from fuzzing.changes import Change, Target
from llmrec.finished import SCHEMA_VERSION, load
from llmrec.inference import package
from llmrec.inference.recommender import Recommender
from llmrec.manifest import MANIFEST, describe_files, read_manifest, write_manifest
from llmrec.stages import STAGES


def targets(root: Path, run: Path, packaged: Path) -> Iterator[Target]:
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
