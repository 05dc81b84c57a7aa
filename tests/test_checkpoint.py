"""Checkpoints: whole or absent, verified, the one before as a fallback."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llmrec import checkpoint, running, stopping
from llmrec.checkpoint import (
    Checkpoint,
    Checkpoints,
    pack_optimizer,
    pack_states,
    unpack_optimizer,
    unpack_states,
)
from llmrec.errors import LlmrecError, StorageError
from llmrec.manifest import write_manifest


def saved(folder, *steps: int, made_from="a") -> Checkpoints:
    store = Checkpoints(folder, {"config": made_from})
    for step in steps:
        store.save(Checkpoint(step=step, tensors={"w": torch.full((3,), float(step))}, state={"at": step}))
    return store


def test_the_newest_is_found_and_two_are_kept(tmp_path):
    store = saved(tmp_path, 5, 10, 20)
    assert [path.name for path in store.found()] == ["step-00000010", "step-00000020"]
    found = store.latest()
    assert found.step == 20 and found.state == {"at": 20} and found.tensors["w"].tolist() == [20.0] * 3
    assert Checkpoints(tmp_path / "none", {}).latest() is None


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("how", ["flipped", "cut", "emptied", "gone"])
def test_a_damaged_one_is_named_kept_aside_and_passed_over(name, how, tmp_path, caplog):
    store = saved(tmp_path, 1, 2)
    path = tmp_path / "step-00000002" / name
    content = bytearray(path.read_bytes())
    if how == "flipped":
        content[len(content) // 2] ^= 1
    elif how == "cut":
        del content[-3:]
    elif how == "emptied":
        content.clear()
    path.unlink() if how == "gone" else path.write_bytes(bytes(content))
    assert store.latest().step == 1
    assert "step-00000002 is damaged" in caplog.text and "going on from the one before" in caplog.text
    assert (tmp_path / "damaged-step-00000002").is_dir()
    assert store.latest().step == 1, "and it is not looked at again"


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO])
@pytest.mark.parametrize("name", ["state.json", "manifest.json"])
def test_one_that_cannot_be_read_now_is_not_taken_for_damaged(name, number, tmp_path, monkeypatch):
    """As of a colleague's run, or on a disk that is away for a moment; hours of work would be put aside."""
    store, read = saved(tmp_path, 1, 2), Path.read_text

    def refused(path: Path, *arguments, **named) -> str:
        if path.name == name:
            raise OSError(number, os.strerror(number), str(path))
        return read(path, *arguments, **named)

    with monkeypatch.context() as patch, pytest.raises(OSError, match=os.strerror(number)):
        patch.setattr(Path, "read_text", refused)
        store.latest()
    assert store.latest().step == 2


def test_another_runs_work_is_not_taken_up(tmp_path, caplog):
    saved(tmp_path, 1, 2)
    assert Checkpoints(tmp_path, {"config": "b"}).latest() is None
    assert "made with other settings or inputs" in caplog.text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other-step-00000001", "other-step-00000002"]


def test_a_stop_in_the_middle_of_saving_leaves_the_one_before(tmp_path, monkeypatch):
    store = saved(tmp_path, 1)
    (tmp_path / ".step-00000002.77").mkdir()
    (tmp_path / ".step-00000002.77" / "tensors.safetensors").write_bytes(b"half")
    assert store.latest().step == 1
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]

    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "flush_all", full)
    with pytest.raises(LlmrecError, match=r"cannot be written .*No space left.*make room and start again"):
        saved(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


@pytest.mark.parametrize(
    "text", ["[]", "null", '{"files": {}}', '{"files": {"x": 1}, "step": 1}', "{", '{"files": 3}']
)
def test_manifests_of_any_form_are_refused(text, tmp_path):
    store = saved(tmp_path, 1)
    (tmp_path / "step-00000001" / "manifest.json").write_text(text)
    assert store.latest() is None


def test_optimiser_states_survive_the_way_to_json_and_back():
    weights = [torch.nn.Parameter(torch.randn(3, 2)), torch.nn.Parameter(torch.randn(2))]
    optimizer = torch.optim.AdamW(weights, lr=0.1)
    sum(weight.square().sum() for weight in weights).backward()
    optimizer.step()
    tensors, plain = pack_optimizer(optimizer.state_dict())
    other = torch.optim.AdamW(weights, lr=0.5)
    other.load_state_dict(
        unpack_optimizer({**tensors, "weights.a": weights[0]}, json.loads(json.dumps(plain)))
    )
    assert other.param_groups[0]["lr"] == 0.1
    for one, two in zip(optimizer.state.values(), other.state.values()):
        assert one.keys() == two.keys()
        assert all(torch.equal(torch.as_tensor(one[key]), torch.as_tensor(two[key])) for key in one)


def test_a_stop_signal_is_asked_once_and_handlers_come_back():
    before = signal.getsignal(signal.SIGTERM)
    with stopping.stop_requests() as stop:
        assert not stop.asked
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked
        assert signal.getsignal(signal.SIGTERM) is before, "a second one acts at once"
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_terminal_that_closes_asks_once_however_often_it_is_told():
    """A shell that loses its terminal hands the signal on, and a launcher that ended with it adds SIGTERM."""
    before = signal.getsignal(signal.SIGHUP)
    with stopping.stop_requests() as stop:
        for number in (signal.SIGHUP, signal.SIGHUP, signal.SIGTERM):
            os.kill(os.getpid(), number)
            assert stop.asked
    assert signal.getsignal(signal.SIGHUP) is before


def test_weights_that_are_not_numbers_do_not_replace_good_ones(tmp_path):
    store = saved(tmp_path, 1)
    with pytest.raises(LlmrecError, match=r"weights\.a is NaN or infinite at step 2"):
        store.save(Checkpoint(step=2, tensors={"weights.a": torch.tensor([1.0, torch.nan])}))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_nested_states_and_plain_numbers_survive_too():
    """8-bit optimisers keep states in states, and some keep plain numbers."""
    states = {
        0: {"step": 3, "blocks": {"map": torch.arange(4), "deep": {"scale": torch.ones(2)}}},
        1: {"step": 4, "exp_avg": torch.zeros(2, 2)},
    }
    tensors, plain = pack_states(states)
    assert all(name.startswith("optimizer/") for name in tensors)
    found = unpack_states({**tensors, "weights.w": torch.ones(1)}, json.loads(json.dumps(plain)))
    assert found[0]["step"] == 3 and found[1]["step"] == 4 and found.keys() == states.keys()
    assert torch.equal(found[0]["blocks"]["map"], torch.arange(4))
    assert torch.equal(found[0]["blocks"]["deep"]["scale"], torch.ones(2))
    assert torch.equal(found[1]["exp_avg"], torch.zeros(2, 2))


def test_saving_a_step_again_replaces_it_and_leaves_nothing_else(tmp_path):
    store = saved(tmp_path / "deep" / "folder", 3)
    store.save(Checkpoint(step=3, tensors={"w": torch.zeros(2)}, state={"again": True}))
    assert store.latest().state == {"again": True}
    assert [path.name for path in store.folder.iterdir()] == ["step-00000003"]


def test_what_it_was_made_from_is_compared_by_content_not_by_order(tmp_path):
    Checkpoints(tmp_path, {"b": (1, 2), "a": 1}).save(Checkpoint(step=1, tensors={}))
    assert Checkpoints(tmp_path, {"a": 1, "b": [1, 2]}).latest().step == 1


def test_a_second_damage_takes_the_place_of_the_first(tmp_path):
    for content in ("one", "two"):
        store = saved(tmp_path, 2)
        (tmp_path / "step-00000002" / "state.json").write_text(content)
        assert store.latest() is None
    assert (tmp_path / "damaged-step-00000002" / "state.json").read_text() == "two"


def test_checkpoints_of_another_form_are_named(tmp_path, caplog):
    store = saved(tmp_path, 2)
    path = tmp_path / "step-00000002" / "manifest.json"
    write_manifest(path, {**json.loads(path.read_text()), "schema": 99, "versions": {"llmrec": "7.1"}})
    assert store.latest() is None
    assert "written in form 99 by llmrec 7.1" in caplog.text


def test_room_is_looked_for_before_long_work(tmp_path, monkeypatch):
    store = saved(tmp_path / "runs", 2)
    free = shutil.disk_usage(tmp_path).free
    store.require_room(free // 4)
    message = r"checkpoints in .* need [\d,]+\.\d GiB more and [\d,]+\.\d GiB is free; make room"
    with pytest.raises(StorageError, match=message):
        store.require_room(free // 2)
    Checkpoints(tmp_path / "not" / "there" / "yet", {}).require_room(1)
    with pytest.raises(StorageError):
        Checkpoints(Path("not/there/yet"), {}).require_room(free)


def test_room_that_checkpoints_take_already_is_not_asked_for_again(tmp_path, monkeypatch):
    """Old ones make room for the next; those kept and the one being written are there at once."""
    store = saved(tmp_path, 1, 2)
    held = sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**6))
    store.require_room((10**6 + held) // 3)
    with pytest.raises(StorageError):
        store.require_room((10**6 + held) // 3 + 1)


def test_checkpoints_are_as_many_minutes_apart_as_was_asked(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: clock[0])
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters())
    with running.running(tmp_path, {"config": {}}):
        kept = checkpoint.EpochCheckpoints(model, optimizer, {}, minutes=2.0, what="training")
        for epoch, clock[0] in enumerate((60.0, 119.0, 121.0, 200.0, 240.0, 242.0, 300.0), start=1):
            kept.after_epoch(epoch, {}, None, stopping.StopRequests())
    assert [path.name for path in kept.store.found()] == ["step-00000003", "step-00000006"]
