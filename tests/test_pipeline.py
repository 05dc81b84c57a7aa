"""A stage is computed once, refused when stale, and complete or absent."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

from llmrec import finished, global_state, pipeline, stage_changes, storage
from llmrec.config import StageSettings
from llmrec.errors import MissingArtifactError, StaleArtifactError, StorageError
from llmrec.finished import fingerprint, manifest_of
from llmrec.pipeline import RunDir

CALLS: list[str] = []


@dataclass(frozen=True, kw_only=True)
class Number:
    """An artefact with one file."""

    stage: ClassVar[str] = "count"
    value: int

    def save(self, folder: Path) -> None:
        (folder / "value.json").write_text(json.dumps(self.value))

    @classmethod
    def load(cls, folder: Path) -> Number:
        return cls(value=json.loads((folder / "value.json").read_text()))


@dataclass(frozen=True, kw_only=True)
class Doubled(Number):
    """Another artefact."""

    stage: ClassVar[str] = "double"


@dataclass(frozen=True, kw_only=True)
class Drawn(Number):
    """A third."""

    stage: ClassVar[str] = "draw"


@dataclass(frozen=True, kw_only=True)
class Config(StageSettings):
    """Settings."""

    number: int = 2
    """A number."""


def count(config: Config) -> Number:
    CALLS.append("count")
    return Number(value=config.number)


def double(config: Config, number: Number) -> Doubled:
    CALLS.append("double")
    if config.number == 13:
        raise KeyboardInterrupt
    return Doubled(value=2 * number.value)


def draw(config: Config) -> Drawn:
    global_state.seed_everything(config.number)
    drawn = []
    for _ in range(5):
        drawn += drawn_by_all()
        time.sleep(0.01)
    if config.number == 13:
        raise KeyboardInterrupt
    return Drawn(value=sum(drawn))


@dataclass(frozen=True, kw_only=True)
class Shaped(Number):
    """A fourth."""

    stage: ClassVar[str] = "shape"


def shape(config: Config) -> Shaped:
    weight = torch.zeros(3, requires_grad=True)
    assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
    (2 * weight).sum().backward()
    return Shaped(value=torch.zeros(config.number).nbytes + int(weight.grad.sum()))


def drawn_by_all() -> list[int]:
    return [random.randrange(1000), int(np.random.randint(1000)), int(torch.randint(1000, ()))]


@pytest.fixture(autouse=True)
def no_calls():
    CALLS.clear()


def both(root: Path, first: int = 2, second: int = 2) -> Doubled:
    run = RunDir(root)
    return run.stage(double, Config(number=second), run.stage(count, Config(number=first)))


def test_a_second_run_computes_nothing(tmp_path):
    assert both(tmp_path).value == 4 and CALLS == ["count", "double"]
    assert both(tmp_path).value == 4 and CALLS == ["count", "double"]


def test_a_changed_field_is_refused_by_name_and_touches_nothing(tmp_path):
    both(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(StaleArtifactError, match=r"count was made with number=2 \(now 3\)"):
        both(tmp_path, first=3)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_other_inputs_are_refused_by_name(tmp_path):
    both(tmp_path / "a", first=2)
    both(tmp_path / "b", first=3)
    (tmp_path / "a" / "count").rename(tmp_path / "kept")
    (tmp_path / "b" / "count").rename(tmp_path / "a" / "count")
    with pytest.raises(StaleArtifactError, match="double was made with another count"):
        both(tmp_path / "a", first=3)


def test_an_interrupted_stage_leaves_nothing_and_finished_ones_stay(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        both(tmp_path, second=13)
    assert [path.name for path in tmp_path.iterdir()] == ["count"]
    assert both(tmp_path).value == 4 and CALLS == ["count", "double", "double"]


def test_a_failed_save_leaves_nothing(tmp_path, monkeypatch):
    def fail(self, folder):
        (folder / "half.json").write_text("1")
        raise OSError(errno.ENOSPC, "disk full")

    monkeypatch.setattr(Number, "save", fail)
    with pytest.raises(StorageError, match=r"count cannot be written \(.*disk full\); nothing of it is kept"):
        RunDir(tmp_path).stage(count, Config())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("seed", [3, 13])
def test_the_callers_random_numbers_go_on_as_if_no_stage_had_drawn_any(seed, tmp_path):
    with global_state.drawing_alone():
        global_state.seed_everything(0)
        expected = [drawn_by_all() for _ in range(3)]
        global_state.seed_everything(0)
        seen = []
        for trial in range(3):
            seen.append(drawn_by_all())
            with contextlib.suppress(KeyboardInterrupt):
                RunDir(tmp_path / f"{trial}").stage(draw, Config(number=seed))
    assert seen == expected


@pytest.mark.parametrize(
    "before",
    [
        *(torch.no_grad, torch.inference_mode, contextlib.nullcontext),
        *(lambda: torch.device("meta"), lambda: torch.autocast("cpu", dtype=torch.bfloat16)),
    ],
    ids=["no_grad", "inference_mode", "nothing", "device", "autocast"],
)
def test_a_stage_does_not_depend_on_what_torch_was_told_before(before, tmp_path):
    torch.set_default_dtype(torch.float64)
    try:
        with before():
            told = what_torch_is_told()
            assert RunDir(tmp_path).stage(shape, Config(number=2)).value == 2 * 4 + 3 * 2
            assert what_torch_is_told() == told
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def what_torch_is_told() -> tuple:
    return (
        *(torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")),
        *(torch.get_default_dtype(), torch.get_default_device()),
    )


def test_threads_draw_what_each_would_draw_alone(tmp_path):
    alone = RunDir(tmp_path / "alone").stage(draw, Config(number=3))
    with ThreadPoolExecutor(3) as threads:
        runs = [threads.submit(RunDir(tmp_path / f"{n}").stage, draw, Config(number=3)) for n in range(3)]
    assert [run.result() for run in runs] == [alone] * 3


def test_the_manifest_lists_every_file_and_what_made_them(tmp_path):
    made = both(tmp_path)
    manifest = json.loads((tmp_path / "double" / "manifest.json").read_text())
    assert manifest == manifest_of(made)
    assert manifest["stage"] == "double" and manifest["config"] == {"number": 2}
    assert manifest["files"]["value.json"]["bytes"] == 1
    number = finished.load(Number, tmp_path / "count")
    assert manifest["inputs"] == {"count": fingerprint(number)}
    assert {"torch", "transformers", "llmrec"} <= manifest["versions"].keys()


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_file_is_refused_by_name(tmp_path, damage):
    both(tmp_path, first=12)
    path = tmp_path / "count" / "value.json"
    {
        "flip": lambda: path.write_text("13"),
        "truncate": lambda: path.write_text("1"),
        "remove": path.unlink,
    }[damage]()
    with pytest.raises(MissingArtifactError, match=r"value\.json is missing or damaged"):
        both(tmp_path, first=12)


def test_a_folder_that_is_no_finished_stage_is_refused(tmp_path):
    (tmp_path / "count").mkdir()
    (tmp_path / "count" / "mine.txt").write_text("precious")
    with pytest.raises(MissingArtifactError, match="not the output of a finished stage"):
        both(tmp_path)
    assert (tmp_path / "count" / "mine.txt").read_text() == "precious"


def test_a_link_to_nothing_is_refused_before_anything_is_computed(tmp_path):
    (tmp_path / "count").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(MissingArtifactError, match=r"count is a link to .*elsewhere, where nothing is"):
        RunDir(tmp_path).stage(count, Config())
    assert CALLS == []
    RunDir(tmp_path / "moved").stage(count, Config())
    (tmp_path / "moved" / "count").rename(tmp_path / "elsewhere")
    assert RunDir(tmp_path).stage(count, Config()).value == 2 and CALLS == ["count"]


def test_what_is_no_stage_is_told_what_to_give_instead_and_never_to_delete(tmp_path):
    @dataclass(frozen=True, kw_only=True)
    class Evaluated(Number):
        stage: ClassVar[str] = "evaluate"

    def said(look, folder) -> str:
        with pytest.raises(MissingArtifactError) as caught:
            look(folder)
        assert "delete" not in str(caught.value)
        return str(caught.value).replace(str(tmp_path), "HERE")

    def load(folder):
        return finished.load(Evaluated, folder)

    head = "is not the output of a finished stage"
    assert said(load, tmp_path / "none") == (
        f"HERE/none {head} (no such folder). Give the folder of a finished stage"
    )
    (tmp_path / "thesis.txt").write_text("precious")
    assert f"thesis.txt {head} (a file). Give" in said(load, tmp_path / "thesis.txt")
    assert said(load, tmp_path).startswith(f"HERE {head} (no manifest.json). Give")
    for name in ("prepare_data", "evaluate"):
        RunDir(tmp_path).stage(count, Config())
        (tmp_path / "count").rename(tmp_path / name)
        if name == "prepare_data":
            assert said(load, tmp_path) == (
                f"HERE {head}, but holds prepare_data without evaluate. Finish that run, or give another one"
            )
    assert said(load, tmp_path) == f"HERE {head}, but holds some. Give HERE/evaluate"
    assert said(finished.stage_manifest, tmp_path).endswith("one of HERE/prepare_data, HERE/evaluate")


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOENT, "No folder can be made there; use another, and start again"),
        (errno.EACCES, "Use a folder that you may write, or change its permissions, and start again"),
        (errno.EROFS, "Use a folder on a disk that may be written, and start again"),
        (errno.ENOSPC, "Make room, or use another folder, and start again"),
        (errno.ENAMETOOLONG, "Use a shorter name, and start again"),
    ],
)
def test_advice_fits_why_a_folder_cannot_be_made(number, advice, tmp_path, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise OSError(number, "no")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(StorageError) as caught:
        RunDir(tmp_path).stage(count, Config())
    assert f"{tmp_path / 'count'} cannot be written" in str(caught.value) and advice in str(caught.value)
    assert CALLS == []


def test_a_file_in_the_way_of_a_folder_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="Something else is in the way there; use another folder"):
        RunDir(tmp_path / "file").stage(count, Config())


def test_what_appears_in_the_place_of_a_folder_while_it_is_made_is_told_and_kept(tmp_path):
    def crowded(config: Config) -> Number:
        (tmp_path / "crowded").mkdir()
        (tmp_path / "crowded" / "mine.txt").write_text("precious")
        return Number(value=1)

    with pytest.raises(StorageError, match="Something else is in the way there; use another folder"):
        RunDir(tmp_path).stage(crowded, Config())
    assert [path.name for path in tmp_path.iterdir()] == ["crowded"]
    assert (tmp_path / "crowded" / "mine.txt").read_text() == "precious"


def test_a_file_elsewhere_that_may_not_be_read_is_no_matter_of_the_stages_folder(tmp_path):
    run, mine = tmp_path / "runs" / "count", tmp_path / "mine.csv"
    with pytest.raises(PermissionError, match=str(mine)), storage.writing(run):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(mine))
    for place in (run / "x.json", run.with_name(".count.unfinished"), tmp_path / "runs", None):
        with pytest.raises(StorageError, match=rf"^{run} cannot be written"), storage.writing(run):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), place and str(place))


def test_a_file_that_a_stage_misses_is_no_matter_of_writing(tmp_path):
    def lost(config: Config) -> Number:
        raise FileNotFoundError(errno.ENOENT, "no such file", "input.csv")

    with pytest.raises(FileNotFoundError, match=r"input\.csv"):
        pipeline.compute(lost, Config(), (), tmp_path / "count", {"config": {}})


def test_the_output_of_another_stage_is_refused(tmp_path):
    both(tmp_path)
    with pytest.raises(MissingArtifactError, match="holds the output of count, expected double"):
        finished.load(Doubled, tmp_path / "count")


def test_the_folder_of_another_stage_is_never_offered_for_deletion(tmp_path):
    both(tmp_path)
    with pytest.raises(
        StaleArtifactError, match=r"holds the output of count; give another folder to double$"
    ):
        stage_changes.check_folder(
            tmp_path / "count", {"stage": "double", "sources": {}, "inputs": {}}, Config()
        )


def test_an_input_that_is_not_given_any_more_is_refused_by_name(tmp_path):
    both(tmp_path)
    wanted = stage_changes.describe_stage("double", Config(), ())
    with pytest.raises(StaleArtifactError, match=r"made with count, which is not given now\. Use another"):
        stage_changes.check_folder(tmp_path / "double", wanted, Config())


@dataclass(frozen=True, kw_only=True)
class Fetched(Config):
    """Settings that name a file of the user's."""

    path: str
    """Where it is."""

    def source_files(self) -> dict[str, str]:
        return {"path": self.path}


def test_a_file_that_a_stage_fetches_is_part_of_what_it_was_made_from(tmp_path):
    file = tmp_path / "fetched.csv"

    def count(config: Fetched) -> Number:
        file.write_text("one")
        return Number(value=1)

    run = RunDir(tmp_path / "run")
    run.stage(count, Fetched(path=str(file)))
    run.stage(count, Fetched(path=str(file)))
    file.write_text("two")
    with pytest.raises(StaleArtifactError, match="other content of the path file"):
        run.stage(count, Fetched(path=str(file)))


def test_whoever_may_read_the_folder_of_a_stage_may_read_its_files(tmp_path, monkeypatch):
    """Libraries keep what they write from all others."""

    def save(self, folder: Path) -> None:
        (folder / "value.json").write_text("1")
        (folder / "value.json").chmod(0o600)

    monkeypatch.setattr(Number, "save", save)
    folder = tmp_path / "count"
    RunDir(tmp_path).stage(count, Config())
    wanted = folder.stat().st_mode & 0o666
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {wanted}


def test_two_processes_cannot_compute_one_stage(tmp_path):
    import multiprocessing

    stage = tmp_path / "stage"
    assert not storage.is_locked(stage)
    with storage.locked(stage):
        context = multiprocessing.get_context("fork")
        results = context.Queue()

        def other() -> None:
            try:
                with storage.locked(stage):
                    results.put("held it too")
            except StaleArtifactError as error:
                results.put(str(error))

        child = context.Process(target=other)
        child.start()
        assert "another process is computing stage in" in results.get(timeout=30)
        child.join()
        assert storage.is_locked(stage), "and asking does not take it"
        assert storage.is_locked(stage)
    assert list(tmp_path.iterdir()) == [], "a lock alone leaves nothing behind"
    assert not storage.is_locked(stage)
    with storage.locked(stage):
        pass


def test_a_lock_given_back_at_the_moment_it_is_taken_is_taken_anew(tmp_path, monkeypatch):
    """Its file is opened, and deleted by whoever held it before it is locked."""
    stage, lock = tmp_path / "stage", storage.lock
    first = storage.locked(stage)
    first.__enter__()

    def late(handle: int) -> bool:
        monkeypatch.setattr(storage, "lock", lock)
        first.__exit__(None, None, None)
        return lock(handle)

    monkeypatch.setattr(storage, "lock", late)
    with storage.locked(stage):
        assert storage.is_locked(stage)
        with pytest.raises(StaleArtifactError, match="another process"), storage.locked(stage):
            pass


def test_a_finished_stage_leaves_the_lock_that_another_process_took_since(tmp_path):
    stage = tmp_path / "stage"
    with storage.locked(stage):
        shutil.rmtree(storage.unfinished(stage))
        other = storage.take(storage.unfinished(stage) / storage.LOCK)
    assert storage.is_locked(stage)
    os.close(other)


@pytest.mark.parametrize("moment", ["made", "opened"])
def test_a_folder_that_goes_while_its_lock_is_taken_is_made_again(moment, tmp_path, monkeypatch):
    error, calls = {"made": FileExistsError, "opened": FileNotFoundError}[moment], []
    owner, name = {"made": (Path, "mkdir"), "opened": (os, "open")}[moment]
    real = getattr(owner, name)

    def gone_once(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 1:
            raise error(errno.EEXIST, "gone")
        return real(*arguments, **options)

    monkeypatch.setattr(owner, name, gone_once)
    with storage.locked(tmp_path / "stage"):
        assert storage.is_locked(tmp_path / "stage")


def test_a_disk_without_locks_is_told(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(storage.fcntl, "flock", refuse)
    with pytest.raises(StorageError, match="Use a folder on a disk that has locks"):
        RunDir(tmp_path).stage(count, Config())
    assert not storage.is_locked(tmp_path / "count")


def test_what_another_process_finished_with_other_settings_is_not_taken(tmp_path, monkeypatch):
    """Between the first look at the folder and the lock."""
    wanted = stage_changes.describe_stage("count", Config(number=3), ())
    RunDir(tmp_path).stage(count, Config(number=2))
    with pytest.raises(StaleArtifactError, match=r"number=2 \(now 3\)"):
        pipeline.compute(count, Config(number=3), (), tmp_path / "count", wanted)
    wanted = stage_changes.describe_stage("count", Config(number=2), ())
    pipeline.compute(count, Config(number=2), (), tmp_path / "count", wanted)
    assert CALLS == ["count"]


def test_what_a_killed_process_left_of_a_stage_is_cleared_and_nothing_else(tmp_path):
    kept = [".count.2024", ".count.v2.writing.7", ".count.writing.mine", ".counts.writing.12", "count.99"]
    for name in (".count.writing.123", ".count.writing.4567", *kept):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half.json").write_text("1")
    RunDir(tmp_path).stage(count, Config())
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, "count"])
