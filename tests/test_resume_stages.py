"""Sequence models and semantic IDs: a run that was stopped ends with the bytes of one that was not."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal

import numpy as np
import pytest
from cases import CASES
from worlds import cycle

from llmrec import checkpoint, contents, pipeline, running
from llmrec.artifacts import CollabEmbeddings, ContentEmbeddings
from llmrec.collab import train as collab
from llmrec.collab import trainer
from llmrec.collab.config import TrainCollabConfig
from llmrec.errors import ConfigError, StoppedError
from llmrec.files import read_json
from llmrec.semantic_ids import train as ids
from llmrec.semantic_ids.config import LearnSemanticIdsConfig
from llmrec.semantic_ids.learn import learn_semantic_ids


def as_loaded(*artifacts):
    """Inputs that are not on disk, with manifests as if they were."""
    for artifact in artifacts:
        object.__setattr__(artifact, "_manifest", {"files": {}})
    return artifacts


def stopped_and_resumed(function, config, inputs, tmp_path, monkeypatch, module, epoch: int) -> list[int]:
    """Run whole, run with a stop in the epoch after `epoch`, run on; compare; epochs of the third run."""
    pipeline.run_stage(function, config, inputs, tmp_path / "whole")
    real, done = module.train_epoch, []

    def failing(*arguments):
        done.append(1)
        if len(done) == epoch + 1:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(module, "train_epoch", failing)
        with pytest.raises(KeyboardInterrupt):
            pipeline.run_stage(function, config, inputs, tmp_path / "cut")
    again: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(module, "train_epoch", lambda *arguments: (again.append(1), real(*arguments))[1])
        pipeline.run_stage(function, config, inputs, tmp_path / "cut")
    assert contents.content_of(tmp_path / "cut") == contents.content_of(tmp_path / "whole")
    assert not list(tmp_path.glob(".*.unfinished"))
    return again


def test_the_time_and_memory_of_stopped_runs_count(tmp_path, monkeypatch):
    """As long as what they left is used; with other settings work begins anew, and so does the clock."""
    clock, interrupted, memory = [0.0], [20.0], [900]
    real = trainer.train_epoch

    def epoch(*arguments):
        clock[0] += 10.0
        if clock[0] in interrupted:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(trainer, "train_epoch", epoch)
    monkeypatch.setattr(running.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(running.machine, "peak_resident_memory", lambda: memory[0])
    monkeypatch.setattr(running.machine, "peak_gpu_memory", lambda: memory[0] // 10)
    config = TrainCollabConfig(epochs=4, save_every_minutes=1e-9)
    other = dataclasses.replace(config, epochs=2)
    inputs = as_loaded(cycle(num_items=8, num_users=8))

    def taken(config, folder):
        pipeline.run_stage(collab.train_collab, config, inputs, folder)
        manifest = read_json(folder / "manifest.json")
        return tuple(manifest[name] for name in ("seconds", "peak_memory_bytes", "peak_gpu_memory_bytes"))

    with pytest.raises(KeyboardInterrupt):  # in the second epoch
        taken(config, tmp_path / "run")
    shutil.copytree(tmp_path / ".run.unfinished", tmp_path / ".other.unfinished")
    with monkeypatch.context() as patch, pytest.raises(ConfigError):  # before it looks for work
        patch.setattr(collab, "training_rows", refuse)
        taken(other, tmp_path / "run")
    memory[0] = 500
    assert taken(config, tmp_path / "run") == (20.0 + 30.0, 900, 90)
    interrupted.append(clock[0] + 10.0)
    with pytest.raises(KeyboardInterrupt):  # in the first epoch, so nothing is left
        taken(other, tmp_path / "other")
    assert taken(other, tmp_path / "other") == (20.0, 500, 50)


def refuse(*_):
    raise ConfigError("settings that cannot be")


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_sequence_model_goes_on_where_it_was(case, tmp_path, monkeypatch):
    config = dataclasses.replace(
        case.config(), epochs=4, save_every_minutes=1e-9, eval_every_epochs=1, patience=4
    )
    again = stopped_and_resumed(
        collab.train_collab, config, as_loaded(cycle(num_users=30)), tmp_path, monkeypatch, trainer, 2
    )
    assert len(again) == 2


def test_a_model_of_ones_own_draws_on_from_the_generators_of_python_and_numpy(tmp_path, monkeypatch):
    config = TrainCollabConfig(provider="own_models:Restless", epochs=4, save_every_minutes=1e-9)
    again = stopped_and_resumed(
        collab.train_collab, config, as_loaded(cycle(num_users=30)), tmp_path, monkeypatch, trainer, 2
    )
    assert len(again) == 2


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"codebook_update": "gradient"},
        {"reconstruction": "mmd", "alignment": "mmd"},
        {
            **{"codebook_update": "gradient", "num_codes": 8, "diversity_weight": 0.1},
            **{"diversity_clusters": 2, "code_dim": 6, "collaborative_weight": 0.1},
        },
    ],
    ids=["ema", "gradient", "mmd", "letter"],
)
def test_semantic_ids_go_on_where_they_were(settings, tmp_path, monkeypatch):
    data = cycle(num_users=30, num_items=60)
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(2, data.num_items + 1, 6)).astype(np.float32)
    rows[:, 0] = 0
    made = CollabEmbeddings(catalog=data.catalog, provider="precomputed", vectors=rows[0])
    content = ContentEmbeddings(
        catalog=data.catalog,
        vectors={"text": rows[1]},
        missing={"text": np.zeros(data.num_items + 1, dtype=bool)},
        encoders={"text": {}},
    )
    config = LearnSemanticIdsConfig(
        num_levels=2, hidden_dims=(8,), epochs=6, batch_size=8, save_every_minutes=1e-9,
        min_utilisation=0.0, **{"num_codes": 4, "code_dim": 4, **settings},
    )  # fmt: skip
    inputs = as_loaded(data, made, content)
    again = stopped_and_resumed(learn_semantic_ids, config, inputs, tmp_path, monkeypatch, ids, 4)
    assert len(again) == 2


def test_a_polite_stop_ends_the_epoch_and_keeps_it(tmp_path, monkeypatch):
    config = TrainCollabConfig(epochs=3)
    inputs = as_loaded(cycle(num_users=30))
    real = trainer.train_epoch

    def asking(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "train_epoch", asking)
        with pytest.raises(StoppedError, match="stopped after epoch 1; the same command goes on"):
            pipeline.run_stage(collab.train_collab, config, inputs, tmp_path / "out")
    store = checkpoint.Checkpoints(tmp_path / ".out.unfinished" / "checkpoints", None)
    assert [path.name for path in store.found()] == ["step-00000001"]
    pipeline.run_stage(collab.train_collab, config, inputs, tmp_path / "out")
    assert (tmp_path / "out" / "manifest.json").is_file()
