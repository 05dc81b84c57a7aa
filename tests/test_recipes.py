"""Recipes and commands as people use them: help, overrides, plans, and one whole tiny run."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import inspect
import json
import os
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
from tiny_recipe import chosen_by_validation, tiny

from llmrec import cli, jobs, pipeline
from llmrec.artifacts import CollabEmbeddings, ContentEmbeddings, SemanticIds
from llmrec.collab.config import PROVIDER_FIELDS, SASRecConfig, TrainCollabConfig
from llmrec.collab.provider import provider_class
from llmrec.config import flatten
from llmrec.data.config import PrepareDataConfig
from llmrec.encoders.config import EncodeItemsConfig
from llmrec.errors import ConfigError
from llmrec.files import read_json
from llmrec.finished import load
from llmrec.interactions import Interactions
from llmrec.manifest import write_manifest
from llmrec.own import own_class
from llmrec.pipeline import RunDir
from llmrec.preflight import in_the_way
from llmrec.recipe import (
    Recipe,
    apply_overrides,
    main,
    module_of,
    recipe_of,
    run_recipe,
    with_preset,
    with_seed,
)
from llmrec.refit import refit
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


def test_a_preset_is_that_of_the_data_set_that_set_chooses(capsys):
    def made(name: str, *arguments: str) -> str:
        recipe = module_of(ROOT / "recipes" / f"{name}.py").recipe
        run_recipe(recipe, ["--print-config", "--preset", "paper", *arguments])
        return "".join(
            line for line in capsys.readouterr().out.splitlines(True) if "prepare_data" not in line
        )

    assert made("mme_sid_beauty", "--set", "prepare_data.category=sports_and_outdoors") == made(
        "mme_sid_sports"
    )
    assert made("mme_sid_beauty") != made("mme_sid_sports")


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
    assert config["schedule_epochs"] == chosen_by_validation().finetune.epochs
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


@pytest.mark.parametrize(
    ("stage", "made_from", "name", "said"),
    [
        ("train_collab", "inputs", "prepare_data", "another prepare_data"),
        ("finetune", "inputs", "train_collab", "another train_collab"),
        ("finetune", "sources", "prompt", "other content of the prompt file"),
    ],
)
def test_epochs_that_were_chosen_on_other_files_are_not_taken(
    stage, made_from, name, said, finished, tmp_path
):
    shutil.copytree(finished, tmp_path / "run")
    prompt = Path(shutil.copy(ROOT / "prompts" / "compact.toml", tmp_path))
    path = tmp_path / "run" / stage / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest[made_from][name] = "0" * 64
    recipe = tiny()
    if made_from == "sources":
        manifest["config"]["prompt"] = str(prompt)
        recipe = dataclasses.replace(
            recipe, finetune=dataclasses.replace(recipe.finetune, prompt=str(prompt))
        )
    write_manifest(path, {key: value for key, value in manifest.items() if key != "digest"})
    with pytest.raises(ConfigError, match=f"--refit: .*{stage} was made with {said}; run with the same"):
        refit(recipe, tmp_path / "run")


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
    from llmrec.assignments import describe

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
        some = path.stem in ("variants_sample", "tokenizers_sample")
        assert trained == set(PROVIDER_FIELDS) or (trained and some)
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


def test_the_downstream_recipe_trains_nothing_before_a_run_that_cannot_finish(tmp_path):
    import providers_sample

    typed = ["--run-dir", str(tmp_path / "runs"), "--set", "train_collab.semantic_ids=no_such_folder"]
    with pytest.raises(ConfigError, match=r"semantic_ids=no_such_folder.*no such file"):
        providers_sample.run_all(["--providers", "motor", "tiger", *typed])
    assert not (tmp_path / "runs").exists()


def test_tokenizers_are_trained_before_the_models_that_read_their_codes(tmp_path, monkeypatch, capsys):
    module = module_of(ROOT / "recipes" / "tokenizers_sample.py")
    quick = {name: dataclasses.replace(one, epochs=2, log_every_epochs=1, min_utilisation=0.0)
             for name, one in module.tokenizers().items()}  # fmt: skip
    monkeypatch.setattr(module, "tokenizers", lambda: quick)
    teacher = dataclasses.replace(module.teacher(), epochs=1)
    monkeypatch.setattr(module, "teacher", lambda: teacher)
    market = tiny().prepare_data
    monkeypatch.setattr(module, "data", lambda: market)
    settings = ["train_collab.epochs=1", "train_collab.tiger.beams=2", "train_collab.tiger.valid_beams=2"]
    asked = ["--run-dir", str(tmp_path), "--rows", "letter", "--seeds", "0", "--set", *settings]
    module.run_all(asked)
    assert "letter" in capsys.readouterr().out
    ids = load(SemanticIds, tmp_path / "tokenizers" / "letter")
    cell = load(CollabEmbeddings, tmp_path / "cells" / "letter" / "seed0" / "train_collab")
    assert np.array_equal(cell.state["codes"][1:, :3], ids.codes["text"][1:])
    assert set(ids.log[-1]["parts"]["text"]) == {"quantization", "mse", "collaborative", "diversity"}
    module.run_all([*asked, "--summarise"])
    assert "letter" in capsys.readouterr().out


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


def two_experiments(folder: Path, name: str, *, imported: bool) -> list[Path]:
    """Recipes of one name in two folders, each with a module of the same name beside it."""
    paths = []
    for number in (1, 2):
        (folder / f"{number}").mkdir()
        (folder / f"{number}" / f"{name}.py").write_text(f"EPOCHS = {number}\nclass Mine:\n    pass\n")
        paths.append(folder / f"{number}" / "experiment.py")
        paths[-1].write_text(
            (f"from {name} import EPOCHS\n" if imported else f"EPOCHS = {number}\n")
            + "from llmrec.collab.config import TrainCollabConfig\nfrom llmrec.recipe import Recipe\n"
            "def recipe():\n    return Recipe(train_collab=TrainCollabConfig(epochs=EPOCHS, "
            f"provider='{name}:Mine'))\n"
        )
    return paths


def test_a_recipe_is_not_given_what_lies_beside_another(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    first, second = two_experiments(tmp_path, "settings_of_an_experiment", imported=True)
    assert recipe_of(first).train_collab.epochs == recipe_of(first).train_collab.epochs == 1
    with pytest.raises(
        ConfigError, match="imports settings_of_an_experiment, which lies beside it, and this"
    ):
        recipe_of(second)


@pytest.mark.parametrize("line", ["from .settings import EPOCHS", "from .. import settings"])
def test_a_recipe_that_imports_by_dots_is_told_so(line, tmp_path):
    path = tmp_path / "experiment.py"
    path.write_text(f"import os\n{line}\n")
    with pytest.raises(ConfigError, match=r"experiment.py, line 2: a recipe is .* without a package"):
        recipe_of(path)


def test_a_class_that_lies_beside_two_recipes_is_not_guessed(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    first, second = two_experiments(tmp_path, "models_of_an_experiment", imported=False)
    name = recipe_of(first).train_collab.provider
    assert own_class(name, "x").__name__ == "Mine"
    assert recipe_of(second).train_collab.epochs == 2
    with pytest.raises(ConfigError, match=r"such a module beside them each, in .*1 and in .*2; give them"):
        own_class(name, "train_collab.provider")


def test_a_recipe_may_be_a_function_with_some_arguments_given(capsys):
    def recipe(source: str) -> Recipe:
        return Recipe(prepare_data=PrepareDataConfig(source=source))

    with pytest.raises(SystemExit) as left:
        main(functools.partial(recipe, source="sample_market"), ["--print-config"])
    assert left.value.code == 0 and "prepare_data.source=sample_market" in capsys.readouterr().out
