"""A model from a package of the user's own: taken like any other, by name, everywhere."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
import sys
from pathlib import Path

import numpy as np
import own_models
import pytest
import torch
from tiny_recipe import tiny
from worlds import cycle

from llmrec import own
from llmrec.artifacts import CollabEmbeddings
from llmrec.cli import main as llmrec
from llmrec.collab import train
from llmrec.collab.compare import run_cells
from llmrec.collab.compare_cli import chosen_rows
from llmrec.collab.config import TrainCollabConfig
from llmrec.collab.own_checks import check_provider
from llmrec.collab.provider import load_provider, provider_scorer
from llmrec.collab.train import train_collab
from llmrec.data.batches import Batch
from llmrec.errors import ConfigError, StaleArtifactError, TrainingError
from llmrec.estimate_inputs import collab_width
from llmrec.evaluation.rank import rank_users
from llmrec.finished import SCHEMA_VERSION
from llmrec.manifest import read_manifest, write_manifest
from llmrec.pipeline import run
from llmrec.recipe import Recipe, main
from llmrec.runs import Run
from llmrec.stage_changes import statuses

BAG = {"provider": "own_models:Bag", "own": {"embed_dim": 16, "decay": 0.25}}


def mine() -> Recipe:
    return dataclasses.replace(tiny(), train_collab=TrainCollabConfig(**BAG, epochs=3))


def test_it_learns_is_saved_and_scores_as_before(tmp_path):
    data = cycle(num_users=100)
    made = train_collab(TrainCollabConfig(**BAG, epochs=40, learning_rate=0.02), data)
    rank = rank_users(provider_scorer(made), data, data.targets("test"), mask_seen=False).rank
    assert (rank == 0).mean() > 0.9
    made.save(tmp_path)
    loaded = CollabEmbeddings.load(tmp_path)
    assert (loaded.provider, loaded.model["decay"], loaded.model["num_items"]) == ("own_models:Bag", 0.25, 12)
    again = rank_users(provider_scorer(loaded), data, data.targets("test"), mask_seen=False).rank
    assert np.array_equal(rank, again)
    assert load_provider(loaded).decay == 0.25


def test_it_is_given_the_times_it_asks_for():
    data = cycle(num_users=100)
    made = train_collab(
        TrainCollabConfig(provider="own_models:Punctual", own={"embed_dim": 16}, epochs=2), data
    )
    model = load_provider(made)
    rank = rank_users(provider_scorer(made), data, data.targets("test"), mask_seen=False).rank
    for user in (0, 50):
        *history, target = data.item[data.offset[user] : data.offset[user + 1]].tolist()
        times = torch.from_numpy(data.timestamp[data.offset[user] : data.offset[user + 1]])[None]
        with torch.no_grad():
            scores = model.score(torch.tensor([history]), times[:, :-1], times[:, 1:])[0, 1:]
        assert rank[user] == (scores > scores[target - 1]).sum()


def test_single_numbers_among_its_weights_are_saved_as_such_under_any_name(tmp_path):
    made = train_collab(TrainCollabConfig(provider="own_models:Tempered", epochs=1), cycle())
    made.save(tmp_path)
    loaded = CollabEmbeddings.load(tmp_path)
    assert loaded.state["path"].shape == loaded.state["norm.num_batches_tracked"].shape == ()
    again = load_provider(loaded).state_dict()
    assert all(np.array_equal(array, again[name]) for name, array in made.state.items())


def test_the_whole_pipeline_and_its_tools_take_it(tmp_path, capsys):
    for _ in range(2):
        with pytest.raises(SystemExit) as left:
            main(mine, ["--run-dir", str(tmp_path / "run")])
        assert left.value.code == 0, capsys.readouterr().err
    assert "own_models:Bag" in capsys.readouterr().out
    run = Run(tmp_path / "run")
    assert run.collab.vectors.shape == (97, 16) and len(run.ranks("own_models:Bag")) == 120
    assert run.recommender(device="cpu").score([run.data.raw_ids[:2]]).shape == (1, 96)
    with pytest.raises(SystemExit) as left:
        llmrec(["package", str(tmp_path / "run"), "--out", str(tmp_path / "package")])
    assert not left.value.code
    assert collab_width(mine().train_collab, run.data) == 16
    with pytest.raises(SystemExit) as left:
        main(mine, ["--run-dir", str(tmp_path / "run"), "--set", "train_collab.own=embed_dim=16,decay=0.5"])
    assert left.value.code == 2 and "own.decay=0.25 (now 0.5)" in capsys.readouterr().err


def test_a_recipe_of_another_model_is_set_to_it_and_back(tmp_path, capsys):
    both = ["--run-dir", str(tmp_path / "run"), "--until", "train_collab", "--set", "train_collab.epochs=1"]
    named = ["train_collab.provider=own_models:Bag", "train_collab.own=embed_dim=8"]
    with pytest.raises(SystemExit) as left:
        main(tiny, [*both, *named])
    assert left.value.code == 0, capsys.readouterr().err
    shutil.rmtree(tmp_path / "run" / "train_collab")
    with pytest.raises(SystemExit) as left:
        main(mine, [*both, "train_collab.provider=sasrec"])
    assert left.value.code == 0, capsys.readouterr().err
    config = json.loads((tmp_path / "run" / "train_collab" / "manifest.json").read_text())["config"]
    assert config["provider"] == "sasrec" and "own" not in config


def test_cells_of_a_comparison_find_it_beside_the_recipe(tmp_path, monkeypatch, capsys):
    """Each in a process of its own."""
    from llmrec.collab import compare_cli

    shutil.copy(Path(__file__).parent / "own_models.py", tmp_path / "models_beside.py")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(
        sys, "argv", ["compare.py", "--run-dir", str(tmp_path / "out"), "--seeds", "0", "--jobs", "1"]
    )

    def rows():
        own = {**BAG, "provider": "models_beside:Bag"}
        return {"bag": TrainCollabConfig(**own, epochs=2)}

    with pytest.raises(SystemExit) as left:
        compare_cli.main(rows, lambda: tiny().prepare_data)
    assert left.value.code == 0, capsys.readouterr().err
    assert "| bag | 1 of 1 |" in capsys.readouterr().out


def test_other_code_of_it_is_noticed(tmp_path, monkeypatch):
    """Where it is told from a class that was edited: stages, the look before a run, and comparisons."""
    code = tmp_path / "models_edited.py"
    shutil.copy(Path(__file__).parent / "own_models.py", code)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    config = TrainCollabConfig(**(BAG | {"provider": "models_edited:Bag"}), epochs=1)
    recipe = dataclasses.replace(tiny(), train_collab=config)
    run(recipe, tmp_path / "run", until="train_collab")
    cells = tmp_path / "cells"
    data = tmp_path / "run" / "prepare_data"
    assert not run_cells({"bag": config}, [0], data, cells, jobs=1)
    assert set(statuses(recipe, tmp_path / "run", "train_collab").values()) == {"done"}
    code.write_text(code.read_text() + "\n# edited\n")
    status = statuses(recipe, tmp_path / "run", "train_collab")["train_collab"]
    assert status.startswith("was made with other code of provider; use another")
    with pytest.raises(StaleArtifactError, match="made with other code of provider"):
        run(recipe, tmp_path / "run", until="train_collab")
    with pytest.raises(ConfigError, match=r"bag, seed 0\) was made with other code of provider; use"):
        run_cells({"bag": config}, [0], data, cells, jobs=1)
    code.unlink()  # what is gone cannot differ
    assert set(statuses(recipe, tmp_path / "run", "train_collab").values()) == {"done"}


def test_other_code_of_what_it_imports_is_noticed(tmp_path, monkeypatch):
    code = tmp_path / "models_apart.py"
    text = (Path(__file__).parent / "own_models.py").read_text()
    code.write_text(text.replace("import torch\n", "import torch\nimport models_helper\n", 1))
    helper = tmp_path / "models_helper.py"
    helper.write_text("width = 3\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    config = TrainCollabConfig(**(BAG | {"provider": "models_apart:Bag"}), epochs=1)
    recipe = dataclasses.replace(tiny(), train_collab=config)
    run(recipe, tmp_path / "run", until="train_collab")
    (tmp_path / "models_unrelated.py").write_text("width = 4\n")
    assert statuses(recipe, tmp_path / "run", "train_collab")["train_collab"] == "done"
    helper.write_text("width = 5\n")
    with pytest.raises(StaleArtifactError, match=r"made with other code of provider \(models_helper.py\)"):
        run(recipe, tmp_path / "run", until="train_collab")
    path = tmp_path / "run" / "train_collab" / "manifest.json"
    manifest = read_manifest(path, SCHEMA_VERSION)
    assert manifest.pop("digest") and manifest["sources"].pop("code of provider (models_helper.py)")
    write_manifest(path, manifest)  # as of a version that did not look at imports
    assert statuses(recipe, tmp_path / "run", "train_collab")["train_collab"] == "done"


def test_imports_are_followed_through_ones_own_files_without_running_them(tmp_path, monkeypatch):
    """Absolute and relative ones, round in circles, to packages with and without __init__.py; not to Python's
    own modules, to llmrec's, to what cannot be read, or to other modules of a package by its __init__.py."""
    models = """
import os, torch, random
from llmrec import Run
from .parts.blocks import Block
from . import sizes, Constant
def f():
    from other import helper
    import plain.deep as p
"""
    files = {
        "mine/__init__.py": "from .models import Model\nfrom .rival import Rival\nConstant = 3",
        "mine/rival.py": "",
        "mine/models.py": models,
        "mine/sizes.py": "import mine.models",
        "mine/parts/__init__.py": "raise SystemExit('was run')",
        "mine/parts/blocks.py": "from ..sizes import *\nfrom ...high import x\nfrom . import norms, absent",
        "mine/parts/norms.py": "this is no Python",
        "mine/parts/unused.py": "",
        "other.py": "import broken",
        "broken.py": "\0",
        "plain/deep.py": "from .beside import y",
        "plain/beside.py": "",
        "random.py": "",
        "llmrec/__init__.py": "",
        "unused.py": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    def imported(name: str, file: Path) -> dict[str, Path]:
        monkeypatch.setattr(own, "code_file", lambda _: file)
        return own.imported_files(name)

    (tmp_path / "mine" / "models.py").write_text(models.replace(", Constant", ""))
    found = imported("mine.models:Model", tmp_path / "mine" / "models.py")
    assert list(found) == [
        *("broken.py", "mine/parts/__init__.py", "mine/parts/blocks.py", "mine/parts/norms.py"),
        *("mine/sizes.py", "other.py", "plain/beside.py", "plain/deep.py"),
    ]
    assert all(file == tmp_path / name for name, file in found.items())
    (tmp_path / "mine" / "models.py").write_text(models)  # which asks for something that __init__.py makes
    more = imported("mine.models:Model", tmp_path / "mine" / "models.py").keys() - found.keys()
    assert more == {"mine/__init__.py", "mine/rival.py"}
    by_package = imported("mine:Model", tmp_path / "mine" / "__init__.py")
    assert by_package.keys() == found.keys() | {"mine/models.py", "mine/rival.py"}
    installed = tmp_path / "site-packages"
    shutil.copytree(tmp_path / "mine", installed / "mine")
    shutil.copy(tmp_path / "other.py", installed)
    found = imported("mine.models:Model", installed / "mine" / "models.py")
    assert {name.partition("/")[0] for name in found} == {"mine"}
    monkeypatch.setattr(own, "code_file", lambda _: None)
    assert own.imported_files("mine:Model") == {}


def test_runs_from_before_code_was_looked_at_are_kept(tmp_path):
    recipe = mine()
    run(recipe, tmp_path, until="train_collab")
    path = tmp_path / "train_collab" / "manifest.json"
    manifest = read_manifest(path, SCHEMA_VERSION)
    assert manifest.pop("digest") and manifest["sources"].pop("code of provider")
    write_manifest(path, manifest)
    assert statuses(recipe, tmp_path, "train_collab")["train_collab"] == "done"


def test_its_settings_go_to_its_rows_alone_where_it_is_compared():
    rows = {"bag": TrainCollabConfig(**BAG), "sasrec": TrainCollabConfig()}
    found = chosen_rows(rows, ["bag", "sasrec"], {"own": "embed_dim=32", "epochs": "3"})
    assert found["bag"].own == {"embed_dim": 32} and found["sasrec"].own == {}
    assert {row.epochs for row in found.values()} == {3}
    with pytest.raises(ConfigError, match="own has no effect: no row trains a model of your own"):
        chosen_rows(rows, ["sasrec"], {"own": "embed_dim=32"})


@pytest.mark.parametrize(
    ("name", "own", "message"),
    [
        (
            "far_away:Bag",
            {},
            r"=far_away:Bag cannot be imported \(No module named 'far_away'\); install",
        ),
        ("own_models:Bog", {}, r"cannot be imported \(module 'own_models' has no attribute 'Bog'\)"),
        ("own_models:Half", {}, "must be a torch.nn.Module with loss, score, item_embeddings"),
        (
            "own_models:Bag",
            {"width": 3},
            "own: own_models:Bag does not take width and needs embed_dim; its constructor takes num_items, "
            "embed_dim, decay, max_history$",
        ),
        ("own_models:Bag", {"embed_dim": 4, "dim": 3}, "own_models:Bag does not take dim; its constructor"),
        ("own_models:Bag", {}, "own: own_models:Bag needs embed_dim; its constructor takes"),
        ("own_models:Counts", {}, "has no parameters to learn; write its item vectors to a file"),
    ],
)
def test_what_is_no_model_is_said_to_be_none(name, own, message):
    with pytest.raises(ConfigError, match=message):
        train_collab(TrainCollabConfig(provider=name, own=own, epochs=1), cycle())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Sideways", "layout must be one of positions, prefixes, got 'suffixes'"),
        ("Endless", "max_history must be a whole number of items, at least 1, got None"),
        ("Timeless", "uses_request_time needs uses_time, since the request comes third"),
        ("Bare", r"loss\(\) gave a Tensor; return llmrec.collab.losses.Loss\(total=SUM, num_targets=N\)"),
        ("Averaged", r"total of loss\(\) must be a scalar to differentiate, got the shape \(2,\); return"),
        ("Deaf", r"must be a scalar to differentiate, got the shape \(\), without a gradient; return"),
        ("Short", r"score\(\) of 4 histories must have the shape \(4, 13\), .*got the shape \(4, 12\)"),
        ("ShortQuick", r"quick_score\(\) of 4 histories must have the shape \(4, 13\)"),
        ("Endful", r"score\(\) gave NaN or infinity"),
        ("Padded", r"item_embeddings\(\): row 0 is padding and must be zero, got values up to 1; items are"),
        (
            "Drifting",
            r"item_embeddings\(\) after a step of training: row 0 is padding and must be",
        ),
        ("Flat", r"item_embeddings\(\) must be of shape \(num_items \+ 1, dim\), got \(13,\)"),
        ("Few", r"item_embeddings\(\): row 0 is padding"),
        ("Listed", r"item_embeddings\(\) must be a tensor \(num_items \+ 1, dim\), got a list"),
        ("Chatty", r"parts\['speed'\] of loss\(\) must be a detached tensor, .*, got a float"),
        ("Clinging", r"parts\['more'\] of loss\(\) .*, got the shape \(\), with a gradient"),
        ("Nameless", r"item_groups\(\) must give a name and a tensor, got the shape \(13, 4\)"),
        ("Shifted", r"must have the shape \(13, groups\), .* row 0 for padding, got the shape \(12, 4\)"),
        ("Lost", r"item_groups\(\) gave NaN or infinity"),
        ("Careless", r"score\(\) gave other numbers when it was called again"),
        ("Rightmost", r"score\(\) of a history depends on its padding"),
        ("Comparing", r"score\(\) of a history depends on its padding, or on what else is in the batch"),
        ("Scribbling", r"score\(\) changed the histories that it was given"),
        ("Hashing", "made again with the same settings and weights it scores differently"),
        ("Averaging", "made again with the same settings and weights it scores differently"),
        ("Rough", "scale cannot be saved, which is torch.bfloat16"),
        ("Talkative", "_extra_state cannot be saved, which is a dict"),
    ],
)
def test_a_model_that_does_not_keep_to_the_protocol_is_refused_before_it_is_trained(
    name, message, monkeypatch
):
    monkeypatch.setattr(train, "fit", lambda *_: pytest.fail("it was trained"))
    with pytest.raises(ConfigError, match=f"^train_collab.provider=own_models:{name}: .*{message}"):
        train_collab(TrainCollabConfig(provider=f"own_models:{name}", epochs=1), cycle())


def test_groups_that_it_sorts_items_into_are_kept():
    made = train_collab(TrainCollabConfig(provider="own_models:Sorted", epochs=1), cycle())
    groups = made.metrics["item_groups"]
    assert groups["name"] == "kind" and len(groups["groups"]) == 4


def test_checks_of_it_change_nothing_of_its_training(monkeypatch):
    config = TrainCollabConfig(provider="own_models:Restless", epochs=2)
    states = []
    for check in (train.check_provider, lambda *_: None):
        monkeypatch.setattr(train, "check_provider", check)
        random.seed(3)
        np.random.seed(3)
        made = train_collab(config, cycle())
        states.append({**made.state, "vectors": made.vectors, "next": np.random.rand(2)})
    assert all(np.array_equal(states[0][name], states[1][name]) for name in states[0])
    assert states[0]["calls"] > 0


@pytest.mark.parametrize("batch_size", [256, 20])
def test_a_model_may_find_nothing_to_predict_in_a_few_rows(batch_size):
    """Of 64 users the last step of 20 has 4."""
    config = TrainCollabConfig(provider="own_models:Sparing", own={"embed_dim": 8}, epochs=1)
    made = train_collab(dataclasses.replace(config, batch_size=batch_size), cycle())
    assert made.metrics["epochs"] == 1 and all(np.isfinite(array).all() for array in made.state.values())
    assert made.log[0]["train_loss"] < 20 and np.isfinite(made.log[0]["gradient_norm"])


def test_a_model_that_never_finds_anything_to_predict_is_stopped():
    config = TrainCollabConfig(provider="own_models:Idle", own={"embed_dim": 8}, epochs=1)
    with pytest.raises(TrainingError, match="own_models:Idle found nothing to predict in all of epoch 1"):
        train_collab(config, cycle())


def test_checks_of_it_leave_its_modes_and_weights_alone():
    model = own_models.Restless(num_items=12).train(False)
    model.next.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    again = lambda: own_models.Restless(num_items=12)  # noqa: E731
    shown = torch.tensor([[1, 2, 3], [4, 5, 0]])
    time = torch.zeros_like(shown)
    batch = Batch(item=shown, target=shown.roll(-1, 1), time=time, next_time=time)
    check_provider("own_models:Restless", model, batch, 12, again)
    assert [name for name, part in model.named_modules() if part.training] == ["next"]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(weight.grad is None for weight in model.parameters())


def test_a_model_that_is_not_there_is_told_before_anything_is_computed(tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        main(tiny, ["--run-dir", str(tmp_path / "run"), "--set", "train_collab.provider=far_away:Bag"])
    assert left.value.code == 2
    assert "far_away:Bag cannot be imported" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_settings_of_no_model_of_ones_own_have_no_effect():
    with pytest.raises(ConfigError, match="own has no effect with provider='sasrec'"):
        TrainCollabConfig(own={"embed_dim": 4})
    with pytest.raises(ConfigError, match="sasrec has no effect with provider='own_models:Bag'"):
        dataclasses.replace(
            TrainCollabConfig(**BAG), sasrec=dataclasses.replace(TrainCollabConfig().sasrec, embed_dim=8)
        )
