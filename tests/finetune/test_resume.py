"""A fine-tuning run that was stopped ends with the very weights of one that was not."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_train import TINY, inputs, weights
from worlds import cycle

from llmrec import contents, pipeline
from llmrec.errors import StoppedError
from llmrec.finetune import train, trainer
from llmrec.finetune.adapter import Adapter
from llmrec.finetune.run_state import RunCheckpoints, RunState, Window

OFTEN = dataclasses.replace(TINY, epochs=3, save_every_minutes=1e-9, dropout_rate=0.2, select="valid")


def fine_tune(config, folder: Path, data=None) -> Adapter:
    """The stage in a run folder, with inputs that are not on disk."""
    data = data or cycle()
    made = inputs(data)
    for artifact in (data, *made):
        object.__setattr__(artifact, "_manifest", {"files": {}})
    return pipeline.run_stage(train.finetune, config, (data, *made), folder)


def stop_at(step: int, monkeypatch, error: BaseException) -> None:
    """Let the step after this many fail."""
    whole = train.Trainer.train_step

    def failing(self, targets):
        if self.state.step == step:
            raise error
        return whole(self, targets)

    monkeypatch.setattr(train.Trainer, "train_step", failing)


@pytest.mark.parametrize(
    "settings",
    [
        *({}, {"loss": "bce_sampled"}, {"optimizer": "adamw_8bit"}, {"batch_by": "tokens", "rows": "stream"}),
        {"method": "own_methods:Restless", "fusion": "frequency"},
    ],
    ids=["adamw", "sampled", "8bit", "tokens", "own"],
)
@pytest.mark.parametrize("step", [1, 6])
def test_stopped_and_resumed_equals_never_stopped(settings, step, tmp_path, monkeypatch):
    config = dataclasses.replace(OFTEN, **settings)
    expected = fine_tune(dataclasses.replace(config), tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_at(step, patch, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            fine_tune(config, tmp_path / "stopped")
    assert list((tmp_path / ".stopped.unfinished" / "checkpoints").glob("step-*"))
    begun = []
    whole = train.Trainer._train_epoch
    monkeypatch.setattr(
        train.Trainer, "_train_epoch", lambda self, *rest: (begun.append(self.state.step), whole(self, *rest))
    )
    found = fine_tune(config, tmp_path / "stopped")
    assert begun[0] == step, "nothing is done twice"
    for name, value in weights(expected).items():
        assert torch.equal(weights(found)[name], value), name
    assert contents.content_of(tmp_path / "stopped") == contents.content_of(tmp_path / "whole")
    assert not (tmp_path / ".stopped.unfinished").exists()


def test_writing_checkpoints_is_no_training_time(tmp_path, monkeypatch):
    """Tokens a second are of the time since a window of the log began, which moves by what writing takes."""
    now, ticks, moved = [0.0], itertools.count(), []
    write, save = RunCheckpoints.save, train.Trainer._save
    monkeypatch.setattr(trainer, "time", SimpleNamespace(perf_counter=lambda: now[0] + next(ticks) / 1e6))

    def writing(self, *state):
        now[0] += 100.0
        write(self, *state)

    def saving(self):
        before = self.state.window.started
        save(self)
        moved.append(self.state.window.started - before)

    monkeypatch.setattr(RunCheckpoints, "save", writing)
    monkeypatch.setattr(train.Trainer, "_save", saving)
    fine_tune(OFTEN, tmp_path / "run")
    assert moved and moved == pytest.approx([100.0] * len(moved), abs=1e-3)


def test_work_of_other_settings_is_not_taken_up(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(3, patch, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            fine_tune(OFTEN, tmp_path / "out")
    other = dataclasses.replace(OFTEN, learning_rate=2e-2)
    found, expected = fine_tune(other, tmp_path / "out"), fine_tune(other, tmp_path / "whole")
    for name, value in weights(expected).items():
        assert torch.equal(weights(found)[name], value)


def test_settings_that_change_no_result_may_change_after_a_stop(tmp_path, monkeypatch):
    """Out of memory at step 8,000 is advised to lower micro_batch_tokens, and must not start over."""
    config = dataclasses.replace(OFTEN, dropout_rate=0.0)
    expected = fine_tune(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_at(5, patch, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            fine_tune(config, tmp_path / "out")
    steps = []
    whole = train.Trainer.train_step
    monkeypatch.setattr(
        train.Trainer,
        "train_step",
        lambda self, targets: steps.append(self.state.step) or whole(self, targets),
    )
    found = fine_tune(dataclasses.replace(config, micro_batch_tokens=64, log_every_steps=3), tmp_path / "out")
    assert steps[0] == 5
    for name, value in weights(expected).items():
        torch.testing.assert_close(weights(found)[name], value, rtol=1e-4, atol=1e-5)


def test_a_polite_stop_ends_the_step_saves_and_says_so(tmp_path, monkeypatch):
    config = dataclasses.replace(OFTEN, save_every_minutes=1000.0)
    whole = train.Trainer.train_step

    def asking(self, targets):
        if self.state.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return whole(self, targets)

    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "train_step", asking)
        with pytest.raises(StoppedError, match=r"stopped after step 5 of \d+; the same command goes on"):
            fine_tune(config, tmp_path / "out")
    found, expected = fine_tune(config, tmp_path / "out"), fine_tune(config, tmp_path / "whole")
    for name, value in weights(expected).items():
        assert torch.equal(weights(found)[name], value)


def test_the_clock_of_a_window_goes_on_where_it_was():
    state = RunState(window=Window(loss=1.0, targets=3, tokens=30, started=time.perf_counter() - 20))
    resumed = RunState.from_json(json.loads(json.dumps(state.as_json())))
    assert time.perf_counter() - resumed.window.started == pytest.approx(20, abs=5)
    assert (resumed.window.loss, resumed.window.targets, resumed.window.tokens) == (1.0, 3, 30)
