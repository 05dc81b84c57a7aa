"""Damage, a full disk and folders that may not be written: refused by name, and the rest left alone."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_recipe import tiny

from llmrec.checkpoint import Checkpoint, Checkpoints
from llmrec.errors import MissingArtifactError, StaleArtifactError
from llmrec.finished import load
from llmrec.manifest import MANIFEST, flush_all, write_manifest
from llmrec.pipeline import RunDir
from llmrec.stages import STAGES


def flip_first(content: bytes) -> bytes:
    return bytes([content[0] ^ 1]) + content[1:]


def flip_middle(content: bytes) -> bytes:
    place = len(content) // 2
    return content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :]


def flip_last(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 16])


DAMAGES = {
    "first byte": flip_first,
    "middle byte": flip_middle,
    "last byte": flip_last,
    "cut": lambda content: content[:-1],
    "cut in half": lambda content: content[: len(content) // 2],
    "emptied": lambda content: b"",
    "longer": lambda content: content + b"\n",
    "gone": None,
}


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("stage", STAGES)
def test_every_damage_of_every_file_is_refused_by_name(stage, finished, tmp_path):
    folder = tmp_path / stage
    shutil.copytree(finished / stage, folder)
    kind = STAGES[stage].artifact_class()
    load(kind, folder)
    before = hashes(folder)
    assert len(before) >= 3
    for name in before:
        path = folder / name
        good = path.read_bytes()
        for what, change in DAMAGES.items():
            path.unlink()
            if change is not None:
                if change(good) == good:  # an empty file cannot be cut
                    continue
                path.write_bytes(change(good))
            with pytest.raises(MissingArtifactError) as found:
                load(kind, folder)
            assert path.name in str(found.value), (name, what)
            others = {other: digest for other, digest in hashes(folder).items() if other != name}
            assert others == {other: digest for other, digest in before.items() if other != name}
            path.write_bytes(good)
    load(kind, folder)


def test_a_manifest_edited_by_hand_is_noticed(finished, tmp_path):
    """Even where the text is as we would write it, and the files are what it says."""
    shutil.copytree(finished / "train_collab", tmp_path / "train_collab")
    path = tmp_path / "train_collab" / MANIFEST
    manifest = json.loads(path.read_text())
    manifest["config"]["seed"] = 7
    path.write_text(json.dumps(manifest, indent=2) + "\n")
    with pytest.raises(MissingArtifactError, match="is damaged or was edited; delete"):
        load(STAGES["train_collab"].artifact_class(), path.parent)
    write_manifest(path, {**manifest, "schema": 1})
    with pytest.raises(StaleArtifactError, match="written in form 1 by llmrec"):
        load(STAGES["train_collab"].artifact_class(), path.parent)


def test_a_manifest_that_may_not_be_read_is_no_reason_to_delete_a_stage(finished, monkeypatch):
    def refused(path: Path, **_) -> str:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "read_text", refused)
    with pytest.raises(PermissionError, match=MANIFEST):
        load(STAGES["train_collab"].artifact_class(), finished / "train_collab")


def test_a_manifest_cannot_point_outside(finished, tmp_path):
    shutil.copytree(finished / "train_collab", tmp_path / "train_collab")
    path = tmp_path / "train_collab" / MANIFEST
    manifest = json.loads(path.read_text())
    (tmp_path / "mine.txt").write_bytes(b"")
    empty = {"bytes": 0, "sha256": hashlib.sha256(b"").hexdigest()}
    for name in ("../mine.txt", str(tmp_path / "mine.txt")):
        write_manifest(path, {**manifest, "files": {**manifest["files"], name: empty}})
        with pytest.raises(MissingArtifactError, match=r"mine\.txt is missing or damaged"):
            load(STAGES["train_collab"].artifact_class(), path.parent)


SMALL_DISK = """
import contextlib, io, os, subprocess, sys
from pathlib import Path
sys.path[:0] = {paths!r}
from llmrec.recipe import main
from tiny_recipe import tiny

disk = Path(sys.argv[1])
stages = ("prepare_data", "train_collab", "encode_items", "learn_semantic_ids", "finetune", "evaluate")

def mount(options):
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)], check=True)

def attempt():
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            main(tiny, ["--run-dir", str(disk / "run"), "--set", "train_collab.save_every_minutes=0.0001",
                        "finetune.save_every_minutes=0.0001"])
        except SystemExit as left:
            return left.code, said.getvalue()

mount("size=16k")
kib, refusals, done = 16, 0, []
while True:
    code, said = attempt()
    here = [name for name in stages if (disk / "run" / name).exists()]
    assert all((disk / "run" / name / "manifest.json").is_file() for name in here), here
    assert here == list(stages[: len(here)]) and len(here) >= len(done), (done, here)
    done = here
    if code == 0:
        break
    assert code == 2, said
    last = said.strip().splitlines()[-1]
    assert last.startswith("error: "), said
    assert ("cannot be written" in last and "No space left" in last) or "is free; make room" in last, said
    refusals += 1
    kib = int(kib * 1.5)
    mount(f"remount,size={{kib}}k")
assert refusals >= 3 and done == list(stages), (refusals, done)
kept = {{path: path.read_bytes() for path in (disk / "run").rglob("*") if path.is_file()}}
subprocess.run(["rm", "-r", str(disk / "run" / "evaluate")], check=True)
mount("remount,ro")
code, said = attempt()
assert code == 2 and "cannot be written" in said and "Read-only" in said, said
assert all(path.read_bytes() == content for path, content in kept.items() if "evaluate" not in path.parts)
print("refusals", refusals)
"""


@pytest.mark.slow
def test_a_full_disk_stops_a_run_with_a_sentence_and_more_room_lets_it_go_on(tmp_path):
    """On a disk of its own that grows until everything fits, and is then made read-only."""
    disk = tmp_path / "disk"
    disk.mkdir()
    script = tmp_path / "fill.py"
    here = Path(__file__).parent
    script.write_text(SMALL_DISK.format(paths=[str(here), str(here.parent)]))
    allowed = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "tmpfs", str(disk)],
        capture_output=True,
    )
    if allowed.returncode:
        pytest.skip("this machine does not let a test mount a small disk (unshare --user --mount)")
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", sys.executable, str(script), str(disk)],
        capture_output=True, text=True, timeout=300, cwd=here.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) >= 3


@pytest.mark.parametrize("what", ["stage", "checkpoint"])
def test_all_is_on_disk_before_it_gets_its_name_and_then_the_name_is(what, tmp_path, monkeypatch):
    """Else a machine that loses its power may come back with a folder that looks whole and is not."""
    fsync, replace, flushed, named = os.fsync, os.replace, {}, []

    def flushing(handle: int) -> None:
        fsync(handle)
        flushed[os.fstat(handle).st_ino] = os.fstat(handle).st_mtime_ns

    def naming(source, target) -> None:
        if Path(source).is_dir():
            inside = [Path(source), *Path(source).rglob("*")]
            assert inside[1:] and not [path for path in inside if not is_flushed(path)]
            named.append(Path(target))
        replace(source, target)

    def is_flushed(path: Path) -> bool:
        return flushed.get(path.stat().st_ino) == path.stat().st_mtime_ns

    monkeypatch.setattr(os, "fsync", flushing)
    monkeypatch.setattr(os, "replace", naming)
    if what == "stage":
        RunDir(tmp_path).stage(STAGES["prepare_data"], tiny().prepare_data)
    else:
        Checkpoints(tmp_path, {}).save(Checkpoint(step=1, tensors={}))
    assert len(named) == 1 and named[0].parent.stat().st_ino in flushed


def test_a_disk_that_cannot_flush_folders_ends_no_stage(tmp_path, monkeypatch):
    """Some that are shared over a network; files must be flushed all the same."""
    (tmp_path / "a.txt").write_text("a")
    real, asked = os.fsync, []

    def fsync(handle: int) -> None:
        asked.append(stat.S_ISDIR(os.fstat(handle).st_mode))
        if asked[-1]:
            raise OSError(errno.EINVAL, "Invalid argument")
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    flush_all(tmp_path)
    assert asked == [False, True]

    def broken(handle: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="Input/output error"):
        flush_all(tmp_path)
