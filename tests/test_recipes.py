"""Recipes and commands as people use them: help, overrides, plans, and one whole tiny run."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import typing
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from tiny_recipe import tiny

from llmrec import cli, jobs, pipeline
from llmrec.artifacts import ContentEmbeddings
from llmrec.collab.config import PROVIDER_FIELDS, SASRecConfig, TrainCollabConfig
from llmrec.collab.provider import provider_class
from llmrec.config import flatten
from llmrec.data.config import PrepareDataConfig
from llmrec.encoders.config import EncodeItemsConfig
from llmrec.errors import ConfigError
from llmrec.files import read_json
from llmrec.finetune.config import FinetuneConfig
from llmrec.interactions import Interactions
from llmrec.pipeline import RunDir
from llmrec.preflight import in_the_way
from llmrec.recipe import Recipe, apply_overrides, main, recipe_of, run_recipe, with_preset, with_seed
from llmrec.runs import Run
from llmrec.semantic_ids.config import LearnSemanticIdsConfig
from llmrec.stage_changes import TO_DO, UNCERTAIN, statuses
from llmrec.stages import STAGES, in_order

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.py"))


def run(arguments: list[str], capsys) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of the tiny recipe."""
    with pytest.raises(SystemExit) as left:
        main(tiny, arguments)
    captured = capsys.readouterr()
    return left.value.code, captured.out, captured.err


def test_a_run_leaves_one_finished_folder_per_stage(finished):
    assert sorted(path.name for path in finished.iterdir()) == sorted(STAGES)
    for name in STAGES:
        manifest = json.loads((finished / name / "manifest.json").read_text())
        assert manifest["stage"] == name and manifest["files"]


def test_metrics_and_rankings_have_one_row_per_user(finished):
    metrics = json.loads((finished / "evaluate" / "metrics.json").read_text())
    rankings = pq.read_table(finished / "evaluate" / "rankings.parquet")
    assert metrics["num_users"] == rankings.num_rows == 120
    assert list(metrics["rows"]) == ["mme_sid", "sasrec", "popularity", "best_possible"]
    rank = rankings["rank_mme_sid"].to_numpy() - 1
    assert metrics["rows"]["mme_sid"]["recall@10"] == pytest.approx((rank < 10).mean())
    assert all(0 <= value <= 1 for row in metrics["rows"].values() for value in row.values())
    best = metrics["rows"]["best_possible"]["recall@10"]
    assert best > metrics["rows"]["popularity"]["recall@10"]


def test_semantic_ids_of_a_run_are_judged_by_a_command(finished, tmp_path, capsys):
    arguments = ["report_semantic_ids", "--out", str(tmp_path / "page")]
    for name in ("prepare_data", "train_collab", "encode_items", "learn_semantic_ids"):
        arguments += [f"--{name.replace('_', '-')}", str(finished / name)]
    with pytest.raises(SystemExit) as left:
        cli.main(arguments)
    assert (
        left.value.code == 0 and capsys.readouterr().out == f"report: {tmp_path / 'page' / 'report.html'}\n"
    )
    quality = json.loads((finished / "learn_semantic_ids" / "quality.json").read_text())
    metrics = json.loads((tmp_path / "page" / "metrics.json").read_text())
    for name, found in quality["modalities"].items():
        assert metrics["modalities"][name]["levels"] == found["levels"]


def test_residual_k_means_goes_all_the_way(finished, tmp_path):
    """Code embeddings as wide as each modality's vectors reach the model through their maps."""
    base = tiny()
    recipe = dataclasses.replace(
        base,
        learn_semantic_ids=LearnSemanticIdsConfig(method="rkmeans", num_codes=8, num_levels=2),
        finetune=dataclasses.replace(base.finetune, project_codes=True),
    )
    for name in ("prepare_data", "train_collab", "encode_items"):
        shutil.copytree(finished / name, tmp_path / name)
    with pytest.raises(SystemExit) as left:
        main(lambda: recipe, ["--run-dir", str(tmp_path)])
    assert left.value.code == 0
    metrics = json.loads((tmp_path / "evaluate" / "metrics.json").read_text())
    assert metrics["rows"]["mme_sid"]["recall@10"] > 10 / 96  # better than chance, after two epochs


def test_a_preset_is_where_changes_begin(finished, tmp_path, capsys):
    arguments = ["learn_semantic_ids", "--out", str(tmp_path / "ids"), "--preset", "paper", "--set"]
    arguments += ["num_codes=8", "code_dim=8", "hidden_dims=8", "epochs=1", "log_every_epochs=1"]
    for name in ("prepare_data", "train_collab", "encode_items"):
        arguments += [f"--{name.replace('_', '-')}", str(finished / name)]
    with pytest.raises(SystemExit) as left:
        cli.main(arguments)
    assert left.value.code == 0, capsys.readouterr().err
    config = json.loads((tmp_path / "ids" / "manifest.json").read_text())["config"]
    assert (config["reconstruction"], config["rq_reduce"], config["epochs"]) == ("mmd", "sum", 1)


def test_one_seed_is_that_of_every_stage_that_is_trained(capsys):
    def seeds(*arguments: str) -> dict[str, str]:
        run_recipe(tiny, ["--print-config", *arguments])
        lines = (line.partition("=") for line in capsys.readouterr().out.splitlines())
        return {path.removesuffix(".seed"): value for path, _, value in lines if path.endswith(".seed")}

    usual = seeds()
    trained = dict.fromkeys(["train_collab", "learn_semantic_ids", "finetune"], "7")
    assert seeds("--seed", "7") == usual | trained
    assert seeds("--seed", "7", "--set", "finetune.seed=2") == usual | trained | {"finetune": "2"}
    given = ["train_collab.provider=precomputed", "train_collab.vectors=v.parquet"]
    assert seeds("--seed", "7", "--set", *given)["train_collab"] == usual["train_collab"], (
        "nothing is trained"
    )
    precomputed = with_seed(apply_overrides(tiny(), given), 7)
    assert (precomputed.train_collab.seed, precomputed.finetune.seed) == (0, 7)


@pytest.mark.parametrize("preset", ["paper", "official"])
@pytest.mark.parametrize("name", ["mme_sid_beauty", "mme_sid_toys", "mme_sid_sports"])
def test_a_preset_keeps_what_the_paper_sets_for_a_data_set(name, preset):
    made = recipe_of(ROOT / "recipes" / f"{name}.py")
    found = with_preset(made, preset)
    fields = ["learning_rate", "warmup_steps"]
    if name != "mme_sid_beauty" or preset == "paper":  # the published script, for Beauty, has 4
        fields.append("epochs")
    assert [getattr(found.finetune, field) for field in fields] == [
        getattr(made.finetune, field) for field in fields
    ]
    assert found.learn_semantic_ids.num_codes == made.learn_semantic_ids.num_codes
    assert found.finetune.prompt != made.finetune.prompt or preset == "paper"


def test_output_of_another_form_is_refused_by_name(finished, tmp_path, capsys):
    shutil.copytree(finished / "prepare_data", tmp_path / "prepare_data")
    manifest = json.loads((tmp_path / "prepare_data" / "manifest.json").read_text())
    (tmp_path / "prepare_data" / "manifest.json").write_text(json.dumps({**manifest, "schema": 1}))
    arguments = [
        "train_collab",
        "--prepare-data",
        str(tmp_path / "prepare_data"),
        "--out",
        str(tmp_path / "x"),
    ]
    with pytest.raises(SystemExit) as left:
        cli.main(arguments)
    assert left.value.code == 2
    assert "prepare_data was written in form 1 by llmrec" in capsys.readouterr().err


def test_a_second_run_computes_nothing_and_prints_the_same_table(finished, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    code, out, _ = run(["--run-dir", str(finished)], capsys)
    assert code == 0 and "mme_sid" in out and "report.html" in out
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*")}


def test_a_changed_setting_of_a_finished_stage_is_refused_by_name(finished, capsys):
    code, out, err = run(["--run-dir", str(finished), "--set", "train_collab.epochs=4"], capsys)
    assert code == 2 and out == ""
    assert "train_collab was made with epochs=3 (now 4)" in err and "Traceback" not in err


def test_a_stage_that_is_computed_again_and_comes_out_the_same_leaves_the_others_finished(
    finished, tmp_path, capsys, caplog
):
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "train_collab")
    caplog.set_level("INFO")
    code, _, err = run(["--run-dir", str(tmp_path / "run")], capsys)
    assert code == 0, err
    done = [stage for stage in STAGES if f"{stage}: already done" in caplog.text]
    assert done == [stage for stage in STAGES if stage != "train_collab"]
    code, _, err = run(["--run-dir", str(tmp_path / "run"), "--dry-run"], capsys)
    assert code == 0, err


def test_settings_that_change_no_result_leave_finished_stages_finished(finished, capsys):
    """Under any of them what is done is done; every one must exist."""
    named = {
        f"{stage}.{path}"
        for stage in STAGES
        for path in getattr(getattr(tiny(), stage), "incidental_fields", tuple)()
    }
    assert named == set(INCIDENTAL) and named <= set(dict(flatten(tiny())))
    usable = [f"{path}={value}" for path, value in INCIDENTAL.items() if value is not None]
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    some = [one for one in usable if "liger" not in one]
    for settings in ([one for one in usable if "compile" not in one], some):  # one excludes the other
        code, out, err = run(["--run-dir", str(finished), "--dry-run", "--set", *settings], capsys)
        assert code == 0 and out.count("done") == len(STAGES), out + err
    code, _, err = run(["--run-dir", str(finished), "--set", *some], capsys)
    assert code == 0, err
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*")}


INCIDENTAL = {
    "prepare_data.mirrors": None,  # nothing is fetched for this recipe
    "train_collab.save_every_minutes": "1",
    "encode_items.text.batch_size": None,  # its encoders have none
    "encode_items.image.batch_size": None,
    "learn_semantic_ids.log_every_epochs": "2",
    "learn_semantic_ids.save_every_minutes": "1",
    "finetune.micro_batch_tokens": "500",
    "finetune.checkpoint_activations": "true",
    "finetune.rows": "stream",
    "finetune.attention": "sdpa",
    "finetune.cuda_graphs": "false",
    "finetune.compile": "true",
    "finetune.kernels": "liger",
    "finetune.log_every_steps": "3",
    "finetune.save_every_minutes": "0",
    "finetune.bad_steps": "1",
    "evaluate.batch_size": "7",
}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["finetune.prompt=none_such"], ["finetune.prompt='none_such' is unknown", "compact"]),
        (["finetune.mini.hidden_size=32"], ["code_dim=16 differs", "hidden_size=32", "project_codes"]),
        (["train_collab.provider=precomputed", "train_collab.vectors=none.parquet"], ["none.parquet"]),
        (
            [
                *("encode_items.text.dim=128", "encode_items.text.encoder=huggingface"),
                "encode_items.text.model=nobody/none",
            ],
            ["nobody/none", "hf download"],
        ),
        (
            ["prepare_data.source=sequences", "prepare_data.interactions=sequences.txt"],
            ["finds no pictures", "finds no texts", "image.encoder=none"],
        ),
        (
            [
                *("prepare_data.source=table", "prepare_data.interactions=sequences.txt"),
                *("prepare_data.items=sequences.txt", "encode_items.text.columns=brand,title"),
                "encode_items.image.encoder=none",
            ],
            ["brand will not be there", "prepare_data.text_columns=brand"],
        ),
    ],
)
def test_what_would_fail_hours_later_is_said_before_anything_starts(
    settings, words, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sequences.txt").write_text("1 2 3\n")
    base = ["--run-dir", str(tmp_path / "run"), "--set", *settings]

    def recipe() -> Recipe:
        own_data = any(setting.startswith("prepare_data") for setting in settings)
        return dataclasses.replace(tiny(), prepare_data=PrepareDataConfig()) if own_data else tiny()

    for arguments in (base, [*base, "--dry-run"]):
        with pytest.raises(SystemExit) as left:
            main(recipe, arguments)
        err = capsys.readouterr().err
        assert left.value.code == 2
        for word in words:
            assert word in err, err
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU they can work")
def test_what_needs_a_gpu_is_refused_before_anything_starts(tmp_path, capsys):
    for setting in ("finetune.kernels=liger", "finetune.attention=flex"):
        code, _, err = run(["--run-dir", str(tmp_path / "run"), "--set", setting], capsys)
        assert code == 2 and setting in err and "no CUDA device" in err


def test_what_works_without_a_gpu_is_not_refused():
    tuned = dataclasses.replace(tiny().finetune, optimizer="adamw_8bit", precision="bf16", compile=True)
    found = in_the_way(dataclasses.replace(tiny(), finetune=tuned))
    assert [one for one in found if one.status == "problem"] == []


def test_only_what_a_stage_was_made_from_makes_it_uncertain(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "train_collab")
    found = statuses(tiny(), tmp_path / "run", None)
    assert (found["train_collab"], found["prepare_data"], found["encode_items"]) == (TO_DO, "done", "done")
    assert {found[name] for name in ("learn_semantic_ids", "finetune", "evaluate")} == {UNCERTAIN}


def test_what_was_made_from_another_output_is_told_before_anything_is_computed(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "train_collab")
    other = dataclasses.replace(tiny(), train_collab=dataclasses.replace(tiny().train_collab, seed=1))
    pipeline.run(other, pipeline.RunDir(tmp_path / "run"), until="train_collab")
    found = statuses(other, tmp_path / "run", None)
    assert (found["train_collab"], found["encode_items"]) == ("done", "done")
    assert found["learn_semantic_ids"].startswith("was made with another train_collab; ")


def test_a_stale_stage_is_told_before_another_one_is_computed(finished, tmp_path, capsys):
    root = tmp_path / "run"
    shutil.copytree(finished, root)
    shutil.rmtree(root / "encode_items")
    for more in ([], ["--dry-run"]):
        code, out, err = run(["--run-dir", str(root), *more, "--set", "finetune.epochs=3"], capsys)
        assert code == 2 and "finetune was made with epochs=2 (now 3)" in err
        assert not (root / "encode_items").exists()
    assert [line.split(maxsplit=1)[1] for line in out.splitlines()][2:4] == [TO_DO, UNCERTAIN]


def test_a_finished_stage_needs_nothing_any_more():
    """Files and models of stages that are done may be gone."""
    changed = dataclasses.replace(tiny(), finetune=dataclasses.replace(tiny().finetune, prompt="gone.toml"))
    assert list(in_the_way(changed, ["evaluate"])) == []
    assert [one.what for one in in_the_way(changed, ["finetune"]) if one.status == "problem"] == [
        "finetune.prompt='gone.toml': no such file"
    ]


def test_a_dry_run_says_what_would_happen(finished, capsys, tmp_path):
    code, out, _ = run(["--run-dir", str(finished), "--dry-run"], capsys)
    assert code == 0 and out.count("done") == len(STAGES)
    _, out, _ = run(["--run-dir", str(tmp_path / "new"), "--dry-run", "--until", "encode_items"], capsys)
    assert out.count("would be computed") == 3 and not (tmp_path / "new").exists()
    changed = dataclasses.replace(tiny(), finetune=dataclasses.replace(tiny().finetune, epochs=7))
    assert "epochs=2 (now 7)" in statuses(changed, finished, None)["finetune"]


def chosen_by_validation() -> Recipe:
    made = tiny()
    return dataclasses.replace(made, finetune=dataclasses.replace(made.finetune, select="valid"))


def test_a_refit_takes_the_epochs_that_validation_chose_and_says_what_it_learned_from(tmp_path, capsys):
    def go(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            main(chosen_by_validation, list(arguments))
        captured = capsys.readouterr()
        return left.value.code, captured.out, captured.err

    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    code, out, _ = go("--run-dir", first)
    assert code == 0 and "learned from" not in out
    code, out, _ = go("--refit", first, "--run-dir", second)
    assert code == 0 and "mme_sid and sasrec (ce) learned from train and validation items." in out
    assert "Not all methods" not in out
    for stage, name in (("train_collab", "best_epoch"), ("finetune", "epoch_kept")):
        metrics = json.loads((tmp_path / "first" / stage / "metrics.json").read_text())
        config = json.loads((tmp_path / "second" / stage / "manifest.json").read_text())["config"]
        assert config["include_valid"] and config["epochs"] == metrics[name]
        assert "valid" not in (tmp_path / "second" / stage / "log.jsonl").read_text()
    page = (tmp_path / "second" / "evaluate" / "report.html").read_text()
    assert "learned from train and validation items" in page
    code, _, error = go("--refit", second, "--run-dir", str(tmp_path / "third"))
    assert code == 2 and "train_collab was made with include_valid=true (now false)" in error
    code, _, error = go("--refit", first, "--set", "train_collab.learning_rate=0.5")
    assert code == 2 and "learning_rate" in error and "run with the same settings first" in error
    for setting, what in (
        ("prepare_data.seed=5", "prepare_data was made with seed="),
        ("learn_semantic_ids.num_codes=5", "learn_semantic_ids was made with num_codes="),
    ):
        code, _, error = go("--refit", first, "--run-dir", str(tmp_path / "third"), "--set", setting)
        assert code == 2 and what in error and "run with the same settings first" in error, error
    code, _, error = go("--refit", str(tmp_path / "nowhere"))
    assert code == 2 and "nowhere is no folder; give a recipe's run folder" in error


def test_a_refit_of_one_model_alone_is_pointed_out(finished, tmp_path, capsys):
    last = ["finetune.include_valid=true", "finetune.eval_every_epochs=0"]
    shutil.copytree(finished, tmp_path / "run")
    for stage in ("finetune", "evaluate"):
        shutil.rmtree(tmp_path / "run" / stage)
    code, out, _ = run(["--run-dir", str(tmp_path / "run"), "--set", *last], capsys)
    assert code == 0 and "mme_sid learned from train and validation items." in out
    assert "Not all methods learned from the same items" in out
    code, _, error = run(["--refit", str(finished), "--run-dir", str(tmp_path / "other")], capsys)
    assert code == 2 and "finetune chose no epoch by validation" in error


def test_until_stops_after_a_stage(tmp_path, capsys):
    code, _, _ = run(["--run-dir", str(tmp_path), "--until", "prepare_data"], capsys)
    assert code == 0 and [path.name for path in tmp_path.iterdir()] == ["prepare_data"]


def test_stages_stand_behind_what_they_read():
    listed = list(STAGES)
    assert [stage.name for stage in in_order(tiny())] == listed
    knowing = dataclasses.replace(tiny().train_collab, sasrec=SASRecConfig(content=("text",)))
    names = [stage.name for stage in in_order(dataclasses.replace(tiny(), train_collab=knowing))]
    assert names[:3] == ["prepare_data", "encode_items", "train_collab"] and names[3:] == listed[3:]


def test_a_finished_run_is_shown_without_the_libraries_that_made_it(finished):
    script = (
        "import sys\nfrom pathlib import Path\nsys.path.insert(0, sys.argv[2])\n"
        "from tiny_recipe import tiny\nfrom llmrec.recipe import run_recipe\n"
        "run_recipe(tiny, ['--run-dir', sys.argv[1]])\n"
        "print(*sorted({'transformers', 'peft', 'sklearn', 'matplotlib', 'scipy'} & set(sys.modules)))\n"
    )
    command = [sys.executable, "-c", script, str(finished), str(ROOT / "tests")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    *shown, imported = done.stdout.splitlines()
    assert "mme_sid" in "".join(shown) and imported == ""


def test_print_config_prints_what_set_takes(capsys):
    code, out, _ = run(["--print-config", "--set", "finetune.learning_rate=0.5"], capsys)
    assert code == 0 and "finetune.learning_rate=0.5" in out
    lines = out.strip().splitlines()
    assert apply_overrides(tiny(), lines) == apply_overrides(tiny(), ["finetune.learning_rate=0.5"])


def test_interrupting_keeps_finished_stages_and_goes_on_from_there(tmp_path, capsys, monkeypatch):
    import llmrec.encoders.encode as module

    original = module.encode_items

    def encode_items(config: EncodeItemsConfig, data: Interactions) -> ContentEmbeddings:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "encode_items", encode_items)
    code, _, err = run(["--run-dir", str(tmp_path)], capsys)
    assert code == 130 and "goes on from there" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prepare_data", "train_collab"]
    kept = (tmp_path / "train_collab" / "manifest.json").stat().st_mtime_ns
    monkeypatch.setattr(module, "encode_items", original)
    code, _, _ = run(["--run-dir", str(tmp_path), "--until", "encode_items"], capsys)
    assert code == 0 and (tmp_path / "encode_items").exists()
    assert (tmp_path / "train_collab" / "manifest.json").stat().st_mtime_ns == kept


def test_the_report_stands_alone_and_shows_every_part(finished):
    from html.parser import HTMLParser

    page = (finished / "evaluate" / "report.html").read_text()
    found = {"links": [], "headings": [], "heading": False}

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attrs):
            found["links"] += [value for name, value in attrs if name in ("src", "href")]
            found["heading"] = tag == "h2"

        def handle_data(self, text):
            if found["heading"]:
                found["headings"].append(text)
                found["heading"] = False

    Reader().feed(page)
    assert [link for link in found["links"] if not link.startswith(("#", "data:image/"))] == []
    assert any(link.startswith("data:image/jpeg") for link in found["links"])
    assert {"Methods", "Training", "Fusion weights", "Semantic IDs", "Examples", "Data"} <= set(
        found["headings"]
    )
    assert page.count("<svg") >= 5 and "<script" not in page
    assert "over popularity, recall@10<" in page and "of the best possible, recall@10<" in page
    for table in ("collab vectors, frozen", "collab projection", "collab codes", "item matrix"):
        assert f"<td>{table}</td>" in page and f">{table}</text>" in page


def test_the_report_shows_what_hyper_categories_hold(tmp_path, capsys):
    settings = ["train_collab.provider=gmvae", "train_collab.epochs=1", "finetune.epochs=1"]
    settings += ["train_collab.gmvae.num_interests=3", "finetune.analyse=false"]
    code, _, err = run(["--run-dir", str(tmp_path / "run"), "--set", *settings], capsys)
    assert code == 0, err
    page = (tmp_path / "run" / "evaluate" / "report.html").read_text()
    assert "What the sequence model sorts items into" in page
    assert page.count("the most typical:") == 3 and "<b>hyper-category 3</b>" in page


def test_the_stage_table_matches_the_functions():
    for stage in STAGES.values():
        function = stage.function()
        assert function.__name__ == stage.name
        hints = typing.get_type_hints(function)
        names = list(inspect.signature(function).parameters)
        assert hints[names[0]] is stage.config and hints["return"] is stage.artifact_class()
        needed = 1 + len(stage.inputs)
        assert [hints[name].stage for name in names[1:needed]] == list(stage.inputs)
        assert [typing.get_args(hints[name])[0].stage for name in names[needed:]] == list(stage.optional)
        assert getattr(Recipe(), stage.name) == stage.config()
        assert (ROOT / "tools" / f"{stage.name}.py").exists()


def test_every_setting_has_a_meaning():
    from llmrec.config import describe

    for stage in STAGES.values():
        for path, _, _, meaning in describe(stage.config):
            assert len(meaning) > 5, f"{stage.name}.{path} lacks its string"


@pytest.mark.parametrize("verb", [[], *([name] for name in STAGES)], ids=lambda verb: " ".join(verb) or "-")
def test_help_is_complete(verb, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main([*verb, "--help"])
    out = capsys.readouterr().out
    assert left.value.code == 0
    expected = STAGES if not verb else [f.name for f in dataclasses.fields(STAGES[verb[0]].config)]
    assert all(name in out for name in expected)


def test_stages_run_one_by_one_with_explicit_folders(finished, tmp_path, capsys):
    """A stage run by its command makes the same files as in the recipe."""
    settings = [line for line in _config_lines(capsys) if line.startswith("train_collab.")]
    # With the stage's name, as messages give them, and without.
    settings = [line.removeprefix("train_collab." * (place % 2)) for place, line in enumerate(settings)]
    out = tmp_path / "collab"
    command = ["train_collab", "--prepare-data", str(finished / "prepare_data"), "--out", str(out)]
    with pytest.raises(SystemExit) as left:
        cli.main([*command, "--set", *settings])
    assert left.value.code == 0
    for name in ("item_embeddings.safetensors", "model.safetensors", "metrics.json"):
        assert (out / name).read_bytes() == (finished / "train_collab" / name).read_bytes()


def _config_lines(capsys) -> list[str]:
    _, out, _ = run(["--print-config"], capsys)
    return out.strip().splitlines()


@pytest.mark.slow
def test_two_processes_evaluate_like_one(finished, tmp_path):
    folders = [f"--{name.replace('_', '-')}={finished / name}" for name in STAGES if name != "evaluate"]
    # `accelerate launch --cpu` starts one process whatever --num_processes says, so torchrun it is.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = str(ROOT / "tools" / "evaluate.py")
    options = ["--set", "bootstrap_samples=50", "num_examples=3"]
    subprocess.run(
        [*command, script, *folders, "--out", str(tmp_path / "two"), *options],
        check=True,
        capture_output=True,
        cwd=ROOT,
    )
    manifest = json.loads((tmp_path / "two" / "manifest.json").read_text())
    assert manifest["processes"] == 2
    for name in ("metrics.json", "rankings.parquet"):
        assert (tmp_path / "two" / name).read_bytes() == (finished / "evaluate" / name).read_bytes()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_builds_and_explains_itself(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert f"recipes/{path.name}" in module.__doc__
    # A backslash at the end of a line joins it to the next, unless the string is raw.
    assert max(map(len, module.__doc__.splitlines())) <= 110
    if hasattr(module, "rows"):  # a comparison of sequence models
        assert isinstance(module.data(), PrepareDataConfig)
        trained = {config.provider for config in module.rows().values()}
        assert trained == set(PROVIDER_FIELDS) or (trained and path.stem == "variants_sample")
        return
    assert isinstance(module.recipe(), Recipe)
    widths = module.recipe()
    if widths.finetune.is_mini and not widths.finetune.project_codes:
        assert widths.learn_semantic_ids.code_dim == widths.finetune.mini.hidden_size


def test_a_provider_method_or_base_is_exchanged_by_one_setting():
    """The recipe's own settings of what goes would have no effect; a user's own still have to have one."""
    import mme_sid_beauty_mini

    base = mme_sid_beauty_mini.recipe()
    assert base.train_collab.sasrec.content and base.finetune.fusion_temperature == 1.0
    found = apply_overrides(base, ["train_collab.provider=gmvae", "finetune.method=e4srec"])
    assert (found.train_collab.provider, found.finetune.fusion_used) == ("gmvae", "target")
    assert found.finetune.epochs == base.finetune.epochs
    assert apply_overrides(base, ["finetune.method=mme_random"]).finetune.fusion_temperature == 1.0
    own = ["train_collab.provider=precomputed", "train_collab.vectors=mine.parquet"]
    assert apply_overrides(base, own).train_collab == TrainCollabConfig(
        provider="precomputed", vectors="mine.parquet"
    )
    large = apply_overrides(base, ["finetune.base_model=meta-llama/x", "finetune.prompt=chat"])
    assert not large.finetune.is_mini
    official = with_preset(base, "official")
    assert apply_overrides(official, ["finetune.base_model=mini"]).finetune.quantize == "none"
    for settings in (
        ["train_collab.provider=gmvae", "train_collab.sasrec.dropout_rate=0.3"],
        [*own, "train_collab.epochs=3"],
        ["finetune.method=e4srec", "finetune.fusion_temperature=0.5"],
        ["finetune.base_model=meta-llama/x", "finetune.mini.num_layers=3"],
    ):
        with pytest.raises(ConfigError, match="has no effect with"):
            apply_overrides(base, settings)


def test_models_of_other_data_are_refused(finished, tmp_path, capsys):
    """The same items and other histories: what was a test item here may be a training item there."""
    market = read_json(finished / "prepare_data" / "manifest.json")["config"]["market"]
    arguments = ["prepare_data", "--out", str(tmp_path / "other"), "--set", "seed=17"]
    arguments += [f"market.{name}={value}" for name, value in market.items()]
    with pytest.raises(SystemExit) as left:
        cli.main(arguments)
    assert left.value.code == 0, capsys.readouterr().err
    arguments = ["learn_semantic_ids", "--out", str(tmp_path / "ids")]
    arguments += ["--prepare-data", str(tmp_path / "other")]
    arguments += [
        f"--{name.replace('_', '-')}={finished / name}" for name in ("train_collab", "encode_items")
    ]
    with pytest.raises(SystemExit) as left:
        cli.main(arguments)
    assert left.value.code == 2
    assert "was made from another prepare_data than the one that is given" in capsys.readouterr().err


def test_the_downstream_recipe_differs_in_the_provider_alone():
    import mme_sid_sample
    import providers_sample

    base = mme_sid_sample.recipe()
    assert providers_sample.recipe() == base
    for provider in PROVIDER_FIELDS:
        made = providers_sample.recipe(provider)
        assert made.train_collab.provider == provider
        assert dataclasses.replace(made, train_collab=base.train_collab) == base


def test_the_downstream_table_names_what_it_shows():
    import providers_sample

    row = {"recall@10": 0.5, "ndcg@10": 0.25}
    text = providers_sample.table(
        {"sasrec": {"rows": {"sasrec": row, "mme_sid": {"recall@10": 0.75, "ndcg@10": 0.125}}}}
    )
    assert text.splitlines()[-1].split() == ["sasrec", "0.5000", "0.2500", "0.7500", "0.1250"]
    with pytest.raises(ConfigError, match="--providers must be among sasrec"):
        providers_sample.run_all(["--providers", "sasrek"])
    for setting, why in (
        ("finetune.epoch=1", "did you mean finetune.epochs"),
        ("train_collab.provider=svae", "--providers chooses the models"),
    ):
        with pytest.raises(ConfigError, match=why):
            providers_sample.run_all(["--providers", "sasrec", "--set", setting])


def test_pictures_that_moved_are_looked_for_where_the_settings_say(shop_with_pictures, tmp_path):
    old, new = shop_with_pictures, tmp_path / "moved"

    def recipe(folder: Path) -> Recipe:
        data = PrepareDataConfig(
            source="table",
            interactions=str(folder / "interactions.csv"),
            items=str(folder / "items.csv"),
            image_column="image",
            k_core=0,
        )
        return dataclasses.replace(tiny(), prepare_data=data)

    run_dir = RunDir(tmp_path / "run")
    pipeline.run(recipe(old), run_dir, until="prepare_data")
    old.rename(new)
    pipeline.run(recipe(new), run_dir, until="encode_items")
    found = Run(tmp_path / "run").content
    assert not found.missing["image"][1:].any()


@pytest.fixture
def shop_with_pictures(tmp_path) -> Path:
    """Twelve users of eight items, each with a picture of one colour."""
    folder = tmp_path / "shop"
    folder.mkdir()
    lines = [f"u{user},i{(user + step) % 8},{step}" for user in range(12) for step in range(5)]
    (folder / "interactions.csv").write_text("\n".join(["user_id,item_id,timestamp", *lines]))
    rows = [f"i{item},Thing {item},i{item}.png" for item in range(8)]
    (folder / "items.csv").write_text("\n".join(["item_id,title,image", *rows]))
    for item in range(8):
        Image.new("RGB", (8, 8), (30 * item, 90, 200 - 20 * item)).save(folder / f"i{item}.png")
    return folder


def test_there_are_recipes():
    assert {"mme_sid_sample", "mme_sid_beauty"} <= {path.stem for path in RECIPES}


def tables_in(text: str) -> list[dict[str, dict[str, str]]]:
    """Markdown tables: cells by row and column."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        head, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in block.splitlines()]
        found.append({row[0].strip("`"): dict(zip(head, row)) for row in rows})
    return found


NARROW = ["--row", "narrow", "method=concat", "concat_mode=feature", "mini.hidden_size=2", "mini.num_heads=1"]
"""A row that cannot be run: three modalities do not share two dimensions."""


def test_methods_are_compared_on_one_run(finished, tmp_path, capsys):
    from llmrec.finetune import compare

    command = ["--run-dir", str(finished), "--out", str(tmp_path), "--jobs", "1", "--seeds", "0", "1"]
    command += ["--rows", "mme_sid", "e4srec", "concat", "se_sid_mmd", "concat_feature"]
    command += NARROW
    for extra in (["--seeds", "0"], [], ["--summarise"]):
        with pytest.raises(SystemExit) as left:
            compare.main(tiny, command + extra)
        out, said = capsys.readouterr()
        assert left.value.code == (0 if extra == ["--summarise"] else 2)
        assert "narrow cannot be run with these settings; the table says" in said or not left.value.code
    reason = "\n`narrow` cannot be run with these settings: finetune.concat_mode='feature'"
    assert reason in out
    written = {path.name for path in tmp_path.iterdir() if path.is_file()}
    assert written == {"table.md", "results.json", "report.html"}
    rows, costs = tables_in(out)[:2]
    trained = ["mme_sid", "e4srec", "concat", "se_sid_mmd", "concat_feature"]
    assert list(rows) == [*trained, "narrow", "sasrec (ce)", "popularity"] and list(costs) == trained
    assert all(rows[name]["seeds"] == "2 of 2" for name in trained)
    assert re.fullmatch(r"0\.\d{4} ± 0\.\d{4}", rows["mme_sid"]["ndcg@10"])
    assert rows["narrow"]["recall@10"] == "missing"
    difference = "ndcg@10 minus mme_sid (95 % interval)"
    assert all(
        re.match(r"[+-]\d\.\d{4} \(", rows[name][difference])
        for name in ("e4srec", "sasrec (ce)", "popularity")
    )
    tokens = {name: int(costs[name]["tokens"].replace(",", "")) for name in ("mme_sid", "e4srec", "concat")}
    assert tokens["concat"] > tokens["mme_sid"] == tokens["e4srec"]  # three tokens an item
    assert int(costs["e4srec"]["rank"]) <= tiny().train_collab.sasrec.embed_dim + 1  # Eq. 7
    own = json.loads((tmp_path / "learn_semantic_ids" / "se_sid_mmd" / "manifest.json").read_text())["config"]
    assert (own["modalities"], own["reconstruction"], own["alignment"]) == (["collab"], "mmd", "none")
    assert json.loads((tmp_path / "results.json").read_text())["rows"][1]["row"] == "e4srec"
    with pytest.raises(SystemExit):
        compare.main(tiny, [*command, "--rows", "me", "mme_sid", "--summarise"])
    assert "missing" in capsys.readouterr().out
    assert json.loads((tmp_path / "results.json").read_text())["rows"][1]["row"] == "e4srec", "as it was"
    with pytest.raises(SystemExit):
        compare.main(tiny, [*command, "--summarise", "--set", "finetune.learning_rate=0.5"])
    assert "mme_sid/seed0 was made with learning_rate=" in capsys.readouterr().err


def test_settings_of_ones_own_are_compared_like_methods(finished, tmp_path, capsys):
    """A sweep: values and seeds, chosen by the validation column."""
    from llmrec.finetune import compare

    command = ["--run-dir", str(finished), "--out", str(tmp_path), "--seeds", "0", "1", "--jobs", "1"]
    command += ["--rows", "mme_sid", "--row", "slow", "learning_rate=1e-4"]
    command += ["--row", "e4", "method=e4srec", "finetune.epochs=1"]
    with pytest.raises(SystemExit) as left:
        compare.main(tiny, command)
    assert not left.value.code, capsys.readouterr().err
    rows, *_ = tables_in(capsys.readouterr().out)
    assert list(rows)[:3] == ["mme_sid", "slow", "e4"]
    assert all(rows[name]["seeds"] == "2 of 2" for name in ("mme_sid", "slow", "e4"))
    assert re.fullmatch(r"0\.\d{4} ± 0\.\d{4}", rows["slow"]["valid ndcg@10"])
    configs = {
        name: json.loads((tmp_path / name / "seed1" / "finetune" / "manifest.json").read_text())["config"]
        for name in ("slow", "e4")
    }
    assert configs["slow"]["learning_rate"] == 1e-4 and configs["slow"]["method"] == "mme_sid"
    assert (configs["e4"]["method"], configs["e4"]["epochs"], configs["e4"]["seed"]) == ("e4srec", 1, 1)


def test_a_row_of_ones_own_reaches_the_process_of_its_cell(finished, tmp_path):
    from llmrec.finetune import compare_cells

    rows = compare_cells.own_rows(tiny(), [["short", "epochs=1", "learning_rate=1e-4"]])
    comparison = compare_cells.Comparison(recipe=tiny(), rows=rows, seeds=[3], root=finished, out=tmp_path)
    cell = compare_cells.cell_to_run(comparison, "short", 3)
    assert not cell.done()
    compare_cells.main(cell.command[1:])
    assert cell.done() and cell.folder == tmp_path / "short" / "seed3"
    config = json.loads((cell.folder / "finetune" / "manifest.json").read_text())["config"]
    assert (config["epochs"], config["learning_rate"], config["seed"]) == (1, 1e-4, 3)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (["a/b", "epochs=1"], "--row 'a/b': a name has letters"),
        (["mme_sid", "epochs=1"], "--row mme_sid: there is a row of this name already"),
        (["sasrec", "epochs=1"], "--row sasrec: there is a row of this name already"),
        (["popularity", "epochs=1"], "--row popularity: there is a row of this name already"),
        (["mine", "seed=5"], "--row mine: seeds are given by --seeds"),
        (["mine"], "--row mine: give it settings of finetune"),
        (["mine", "epochs=1", "other", "epochs=2"], "mine: 'other' is not of the form FIELD=VALUE;"),
        (["mine", "epoch=1"], "unknown setting 'finetune.epoch'; did you mean finetune.epochs?"),
        (["mine", "method=e4srec", "random_codes=true"], "random_codes has no effect with method='e4srec'"),
    ],
)
def test_rows_that_cannot_be_are_refused_before_anything_is_trained(row, message, finished, tmp_path, capsys):
    from llmrec.finetune import compare

    with pytest.raises(SystemExit) as left:
        compare.main(tiny, ["--run-dir", str(finished), "--out", str(tmp_path / "out"), "--row", *row])
    assert left.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_table_of_methods_needs_no_more_than_the_ranks():
    """Whatever cut-offs the evaluations were asked for."""
    from llmrec.evaluation.metrics import ndcg_at_k
    from llmrec.finetune import compare_report

    def cell(seed: int) -> dict:
        rng = np.random.default_rng(seed)
        ranks = {name: np.floor(rng.exponential(12, 50)) for name in ("mme_sid", "popularity")}
        rows = {name: {"recall@10": float((rank < 10).mean())} for name, rank in ranks.items()}
        metrics = {"parameters": {"trainable": 1}, "tokens": 1, "train_seconds": 3.0, "align_seconds": 4.0}
        costs = {"memory": 1, "metrics": metrics}
        labels = {"popularity": "popularity"}
        return {
            "seed": seed,
            "rows": rows,
            "fine_tuned": "mme_sid",
            "ranks": ranks,
            "labels": labels,
            "analysis": {},
            "trained_on": {},
            "history_length": np.arange(50),
            "target_group": np.array(["head"] * 30 + ["cold"] * 20),
            "valid_mask_seen": True,
            "log": [{"step": 3, "loss": 1.0}, {"step": 3, "valid_ndcg@10": 0.25}],
            "of_data": {
                "num_users": 50,
                "num_items": 100,
                "split": "leave_one_out",
                "mask_seen": False,
            },
        } | costs

    cells = [cell(0), cell(1)]
    results = compare_report.summarise({"mme_sid": cells, "me": []}, [0, 1])
    table = results["rows"]
    wanted = np.mean([ndcg_at_k(one["ranks"]["mme_sid"], 20).mean() for one in cells])
    assert table[0]["ndcg@20"]["mean"] == pytest.approx(wanted)
    assert table[0]["seconds"] == 7
    parts = results["slices"]["popularity of the target"]
    assert parts == {"head": 30, "cold": 20} and sum(results["slices"]["history length"].values()) == 50
    shares = table[0]["slices"]["popularity of the target"]
    weighted = sum(shares[part] * number for part, number in parts.items()) / 50
    assert weighted == pytest.approx(table[0]["recall@10"]["mean"])
    head = np.mean([(one["ranks"]["mme_sid"][:30] < 10).mean() for one in cells])
    assert shares["head"] == pytest.approx(head)
    text, shown = compare_report.markdown(results), compare_report.page(results)
    assert tables_in(text)[0]["me"]["recall@10"] == "missing" and "50 users, 100 items" in text
    assert "Items of the history are ranked, too." in text
    assert "At validation they are left out: `mme_sid`." in text
    unvalidated = compare_report.summarise({"mme_sid": [one | {"log": []} for one in cells]}, [0, 1])
    assert "At validation" not in compare_report.markdown(unvalidated), "as after a refit"
    seen_left_out = compare_report.markdown(results | {"mask_seen": True})
    assert "Items of the history are left out." in seen_left_out and "At validation" not in seen_left_out
    assert "missing" in shown and "http" not in shown.replace("http://www.w3", "")
    assert shown.count("<svg") == 6, "quality, differences, cost, two slices, validation"
    assert 'href="mme_sid/seed1/evaluate/report.html"' in shown


def test_a_comparison_without_a_finished_cell_is_shown_as_such():
    from llmrec.finetune import compare_report

    results = compare_report.summarise({"mme_sid": [], "me": []}, [0])
    assert tables_in(compare_report.markdown(results))[0]["me"]["recall@10"] == "missing"
    assert "<svg" not in compare_report.page(results)


def test_a_comparison_is_refitted_with_the_epochs_that_each_cell_chose(tmp_path, capsys):
    from llmrec.finetune import compare

    def go(*arguments: str, code: int = 0) -> list[str]:
        with pytest.raises(SystemExit) as left:
            compare.main(
                chosen_by_validation,
                ["--rows", "mme_sid", "e4srec", "--seeds", "0", "--jobs", "1", *arguments],
            )
        assert left.value.code == code
        return capsys.readouterr().out.splitlines()

    first, second = tmp_path / "first", tmp_path / "second"
    assert not any("Learned from" in line for line in go("--run-dir", str(first)))
    lines = go("--run-dir", str(second), "--refit", str(first))
    assert "Learned from train and validation items: `mme_sid`, `e4srec`, `sasrec`." in lines
    for row in ("mme_sid", "e4srec"):
        place = Path("methods") / row / "seed0" / "finetune"
        chosen = json.loads((first / place / "metrics.json").read_text())["epoch_kept"]
        config = json.loads((second / place / "manifest.json").read_text())["config"]
        assert config["include_valid"] and config["epochs"] == chosen and config["select"] == "last"
    lines = go("--run-dir", str(second), "--refit", str(first), "--rows", "mme_sid", "concat", code=2)
    assert any("`concat`" in line and "missing" in line for line in lines), "the first comparison has none"


def test_a_comparison_goes_on_without_a_row_whose_codebooks_collapse(finished, tmp_path, capsys, monkeypatch):
    from llmrec.artifacts import SemanticIds
    from llmrec.errors import TrainingError
    from llmrec.finetune import compare
    from llmrec.semantic_ids import learn

    def learn_semantic_ids(*_):
        raise TrainingError("the codebooks collapsed")

    learn_semantic_ids.__annotations__["return"] = SemanticIds
    monkeypatch.setattr(learn, "learn_semantic_ids", learn_semantic_ids)
    command = ["--run-dir", str(finished), "--out", str(tmp_path), "--seeds", "0", "--jobs", "1"]
    command += ["--rows", "se_sid_mse", "me"]
    with pytest.raises(SystemExit) as left:
        compare.main(tiny, command)
    assert left.value.code == 2
    said = capsys.readouterr().out
    assert "`se_sid_mse` cannot be run with these settings: the codebooks collapsed" in said
    assert "`se_sid_mse` | 0 of 1 | missing" in said and "`me` | 1 of 1 | 0." in said


@pytest.mark.slow
def test_processes_share_the_cells_of_a_comparison(finished, tmp_path, capsys, caplog):
    from llmrec.finetune import compare

    command = ["--run-dir", str(finished), "--rows", "mme_sid", "me", "--seeds", "0", "1", *NARROW]
    caplog.set_level("INFO")
    with pytest.raises(SystemExit) as left:
        compare.main(tiny, [*command, "--out", str(tmp_path), "--jobs", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert left.value.code == 2, "a row that was asked for cannot be run"
    assert any(line.startswith("`narrow` cannot be run") for line in lines)
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| `")]
    assert [row[:2] for row in table[:3]] == [
        ["`mme_sid`", "2 of 2"], ["`me`", "2 of 2"], ["`narrow`", "0 of 2"],
    ]  # fmt: skip
    assert "narrow cannot be run with these settings" in caplog.text
    assert "me, seed 0: recall@10 0." in caplog.text and "4 of 6 done" in caplog.text
    logs = [
        (tmp_path / row / f"seed{seed}" / "log.txt").read_text()
        for row in ("mme_sid", "me")
        for seed in (0, 1)
    ]
    assert all(log.count("finetune: finished") == 1 for log in logs)
    with pytest.raises(SystemExit) as left:
        compare.main(tiny, [*command, "--out", str(tmp_path), "--jobs", "2", "--set", "finetune.epochs=1"])
    assert left.value.code == 2 and "was made with epochs=2 (now 1)" in capsys.readouterr().err


@pytest.mark.slow
def test_a_cell_that_fails_is_named_below_what_the_others_finished(finished, tmp_path, capsys):
    from llmrec.finetune import compare

    command = ["--run-dir", str(finished), "--out", str(tmp_path), "--seeds", "0", "--rows"]
    with pytest.raises(SystemExit):
        compare.main(tiny, [*command, "me", "--set", "finetune.epochs=1"])
    shutil.rmtree(tmp_path / "me" / "seed0" / "evaluate")
    with pytest.raises(SystemExit) as left:
        compare.main(tiny, [*command, "mme_sid", "me", "--jobs", "2"])
    captured = capsys.readouterr()
    assert left.value.code == 2 and "`mme_sid` | 1 of 1 | 0." in captured.out
    assert "1 of 2 cells failed: me, seed 0: " in captured.err
    assert "was made with epochs=1 (now 2)" in captured.err


def test_cells_of_other_processes_are_waited_for_and_those_they_leave_taken(monkeypatch):
    from llmrec.errors import BusyError
    from llmrec.finetune import compare_cells

    tries: list[tuple[str, int]] = []

    def run_cell(comparison, name, seed, inputs):
        tries.append((name, seed))
        if name == "me" and tries.count((name, seed)) < 3:
            raise BusyError("another process is computing finetune")

    slept: list[float] = []
    monkeypatch.setattr(compare_cells, "run_cell", run_cell)
    monkeypatch.setattr("llmrec.finished.load", lambda *_: None)
    monkeypatch.setattr(compare_cells.time, "sleep", slept.append)
    rows = {name: compare_cells.ROWS[name] for name in ("me", "mme_sid")}
    compare_cells.run_cells(
        compare_cells.Comparison(recipe=tiny(), rows=rows, seeds=[0, 1], root=Path("a"), out=Path("b"))
    )
    assert tries[:4] == [("me", 0), ("mme_sid", 0), ("me", 1), ("mme_sid", 1)]
    assert {cell: tries.count(cell) for cell in tries[:4]} == {
        ("me", 0): 3, ("mme_sid", 0): 1, ("me", 1): 3, ("mme_sid", 1): 1,
    }  # fmt: skip
    assert slept, "not busily"


def test_a_comparison_starts_no_processes_under_a_launcher(finished, capsys, monkeypatch):
    from llmrec.finetune import compare

    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as left:
        compare.main(tiny, ["--run-dir", str(finished), "--jobs", "2"])
    assert left.value.code == 2 and "--jobs starts processes of its own" in capsys.readouterr().err


def test_every_row_of_the_comparison_is_a_valid_setting():
    from llmrec.finetune.compare_cells import ROWS, settings_of

    for base in (FinetuneConfig(), FinetuneConfig(fusion_temperature=1.0, fusion_weights="modalities")):
        for name, row in ROWS.items():
            made = settings_of(base, row)
            assert made.batch_size == base.batch_size
            assert (made.fusion_temperature == 1.0) == (
                base.fusion_temperature == 1.0 and made.fusion_used == "frequency"
            ), name


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "e4srec"},
        {"method": "me", "me_mode": "sum"},
        {"method": "concat", "concat_mode": "feature"},
        {"method": "ctrl_mm", "ctrl_weight": 0.5},
        {"method": "ctrl_mm", "ctrl_stage": "two", "ctrl_epochs": 3},
        {"random_codes": True},
    ],
)
def test_a_row_is_what_its_name_says_whatever_the_recipe_is(changes):
    from llmrec.finetune.compare_cells import ROWS, settings_of

    for name, row in ROWS.items():
        made, plain = (settings_of(base, row) for base in (FinetuneConfig(**changes), FinetuneConfig()))
        own = {key: value for key, value in changes.items() if key in ("ctrl_weight", "ctrl_epochs")}
        if own and name not in ("ctrl_mm", "ctrl_mm_two"):
            own = {}
        for key in ("ctrl_weight", "ctrl_epochs"):
            if getattr(made, key) != getattr(plain, key):
                assert own[key] == getattr(made, key)
                made = dataclasses.replace(made, **{key: getattr(plain, key)})
        assert made == plain, name


@pytest.mark.parametrize("fusion", ["equal", "sum"])
def test_rows_that_fuse_alike_differ_in_one_thing(fusion):
    from llmrec.finetune.compare_cells import ROWS, settings_of

    base = FinetuneConfig(fusion=fusion)
    assert {settings_of(base, ROWS[name]).fusion_used for name in ("mme_sid", "mme_random")} == {fusion}
    assert settings_of(base, ROWS["e4srec"]).fusion_used == "target"


def test_a_rows_own_semantic_ids_read_no_other_modality():
    from llmrec.finetune.compare_cells import ROWS, ids_settings

    bases = [
        LearnSemanticIdsConfig(alignment_weight=0.5, alignment_temperature=0.2, ema_decay=0.9),
        LearnSemanticIdsConfig(reconstruction="mmd+mse", mmd_weight=2.0, mse_weight=3.0, num_codes=64),
        LearnSemanticIdsConfig(alignment="mmd", mmd_estimator="unbiased"),
    ]
    for base in bases:
        for name, kind in (("se_sid_mmd", "mmd"), ("se_sid_mse", "mse")):
            made = ids_settings(base, ROWS[name])
            assert (made.modalities, made.alignment, made.reconstruction) == (("collab",), "none", kind)
            assert made.num_codes == base.num_codes


def test_a_recipe_may_define_dataclasses_of_its_own(tmp_path):
    """Whose annotations are looked up in the module that they stand in."""
    path = tmp_path / "with_a_dataclass.py"
    path.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\nfrom typing import ClassVar\n"
        "from llmrec.recipe import Recipe\n@dataclass\nclass Mine:\n    kind: ClassVar[str] = 'x'\n"
        "    number: int = 1\ndef recipe():\n    return Recipe()\n"
    )
    assert recipe_of(path) == Recipe()


def test_settings_of_a_recipe_may_name_classes_that_lie_beside_it(tmp_path, monkeypatch):
    """Which are imported later than the recipe, from whatever folder."""
    (tmp_path / "recipes").mkdir()
    shutil.copy(ROOT / "tests" / "collab" / "own_models.py", tmp_path / "recipes" / "models_of_a_recipe.py")
    path = tmp_path / "recipes" / "with_a_model.py"
    path.write_text(
        "from llmrec.collab.config import TrainCollabConfig\nfrom llmrec.recipe import Recipe\n"
        "def recipe():\n    return Recipe(train_collab=TrainCollabConfig("
        "provider='models_of_a_recipe:Bag', own={'embed_dim': 4}))\n"
    )
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = sys.path[0]
    made = recipe_of("../recipes/with_a_model.py")
    assert provider_class(made.train_collab.provider).__name__ == "Bag" and sys.path[0] == before
    assert str(tmp_path / "recipes") in jobs.search_path().split(os.pathsep)


def test_a_recipe_may_be_a_function_with_some_arguments_given(capsys):
    def recipe(source: str) -> Recipe:
        return Recipe(prepare_data=PrepareDataConfig(source=source))

    with pytest.raises(SystemExit) as left:
        main(functools.partial(recipe, source="sample_market"), ["--print-config"])
    assert left.value.code == 0 and "prepare_data.source=sample_market" in capsys.readouterr().out
