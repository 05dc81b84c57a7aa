"""Comparisons of methods: rows, cells, processes that share them, and what the table says."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from tiny_recipe import chosen_by_validation, tiny

from llmrec.errors import ConfigError
from llmrec.finetune.config import FinetuneConfig
from llmrec.semantic_ids.config import LearnSemanticIdsConfig


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


@pytest.mark.parametrize("setting", ["seed=5", "method=e4srec"])
def test_what_tells_cells_apart_is_not_set_for_all(setting, finished, tmp_path, capsys):
    from llmrec.finetune import compare

    out = tmp_path / "out"
    with pytest.raises(SystemExit) as left:
        compare.main(tiny, ["--run-dir", str(finished), "--out", str(out), "--set", f"finetune.{setting}"])
    name = setting.partition("=")[0]
    assert left.value.code == 2 and f"--set finetune.{name}: {name}s are " in capsys.readouterr().err
    assert not out.exists()


def test_a_table_of_methods_needs_no_more_than_the_ranks():
    """Whatever cut-offs the evaluations were asked for."""
    from llmrec.evaluation.metrics import ndcg_at_k
    from llmrec.finetune import compare_report

    def cell(seed: int) -> dict:
        rng = np.random.default_rng(seed)
        ranks = {name: np.floor(rng.exponential(12, 50)) for name in ("mme_sid", "popularity")}
        rows = {name: {"recall@10": float((rank < 10).mean())} for name, rank in ranks.items()}
        metrics = {
            "parameters": {"trainable": 1},
            "tokens": 1 + 2 * seed,
            "train_seconds": 3.0,
            "align_seconds": 4.0,
        }
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
            "length_edges": [9, 30],
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
    assert (table[0]["seconds"], table[0]["tokens"]) == (7, 2), "means over seeds, which may end early"
    parts = results["slices"]["popularity of the target"]
    assert parts == {"head": 30, "cold": 20} and sum(results["slices"]["history length"].values()) == 50
    assert results["slices"]["history length"] == {"0-9": 10, "10-30": 21, "31+": 19}
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
    one_seed = compare_report.summarise({"mme_sid": cells[:1]}, [0, 1])
    assert "Of `mme_sid` some seeds are missing" in compare_report.markdown(one_seed)
    assert "some seeds are missing" not in text
    assert "The data are odd.\n" in compare_report.markdown(
        results | {"data_warnings": ["The data are odd."]}
    )
    seen_left_out = compare_report.markdown(results | {"mask_seen": True})
    assert "Items of the history are left out." in seen_left_out and "At validation" not in seen_left_out
    assert "missing" in shown and "http" not in shown.replace("http://www.w3", "")
    assert shown.count("<svg") == 6, "quality, differences, cost, two slices, validation"
    assert 'href="mme_sid/seed1/evaluate/report.html"' in shown


@pytest.mark.parametrize(
    ("stage", "part", "message"),
    [
        ("finetune", {"inputs": {"prepare_data": "other"}}, "another prepare_data than .*mme_sid"),
        ("finetune", {"inputs": {"train_collab": "other"}}, "another train_collab than .*mme_sid"),
        ("evaluate", {"config": {"mask_seen": False}}, "mask_seen=false"),
    ],
)
def test_cells_from_elsewhere_are_not_summed_up(stage, part, message, tmp_path, monkeypatch):
    """Users of other data would pair, were there as many, and ranks of another protocol."""
    from llmrec.config import as_dict
    from llmrec.finetune import compare_cells

    rows = {name: compare_cells.ROWS[name] for name in ("mme_sid", "e4srec")}
    asked = compare_cells.Comparison(recipe=tiny(), rows=rows, seeds=[0], root=tmp_path, out=tmp_path)
    manifests = {}
    for name in rows:
        folder = compare_cells.folder_of(tmp_path, name, 0)
        (folder / "evaluate").mkdir(parents=True)
        tuned = {"config": as_dict(compare_cells.cell_settings(asked, name, 0))}
        manifests[folder / "finetune"] = tuned | {"inputs": dict.fromkeys(compare_cells.SHARED, "one")}
        manifests[folder / "evaluate"] = {"config": as_dict(asked.recipe.evaluate)}
    monkeypatch.setattr("llmrec.finished.stage_manifest", manifests.__getitem__)
    compare_cells.check_settings(asked)
    for name, changes in part.items():
        manifests[tmp_path / "e4srec" / "seed0" / stage][name] |= changes
    with pytest.raises(ConfigError, match=rf"e4srec.seed0 was made with {message}"):
        compare_cells.check_settings(asked)


def test_cells_of_another_template_are_not_summed_up(tmp_path, monkeypatch):
    from llmrec.config import as_dict
    from llmrec.finetune import compare_cells
    from llmrec.stage_changes import source_hashes

    template = tmp_path / "own.toml"
    shutil.copy(Path(__file__).parents[2] / "prompts" / "compact.toml", template)
    recipe = tiny()
    recipe = dataclasses.replace(recipe, finetune=dataclasses.replace(recipe.finetune, prompt=str(template)))
    rows = {"mme_sid": compare_cells.ROWS["mme_sid"]}
    asked = compare_cells.Comparison(recipe=recipe, rows=rows, seeds=[0], root=tmp_path, out=tmp_path)
    folder = compare_cells.folder_of(tmp_path, "mme_sid", 0)
    (folder / "evaluate").mkdir(parents=True)
    config = compare_cells.cell_settings(asked, "mme_sid", 0)
    tuned = {"config": as_dict(config), "sources": source_hashes(config), "inputs": {}}
    manifests = {folder / "finetune": tuned, folder / "evaluate": {"config": as_dict(asked.recipe.evaluate)}}
    monkeypatch.setattr("llmrec.finished.stage_manifest", manifests.__getitem__)
    compare_cells.check_settings(asked)
    template.write_text(template.read_text() + "\n# edited\n")
    with pytest.raises(ConfigError, match=r"mme_sid.seed0 was made with other content of the prompt file"):
        compare_cells.check_settings(asked)


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
        LearnSemanticIdsConfig(
            collaborative_weight=0.1, codebook_update="gradient", diversity_weight=0.2, diversity_clusters=5
        ),
    ]
    for base in bases:
        for name, kind in (("se_sid_mmd", "mmd"), ("se_sid_mse", "mse")):
            made = ids_settings(base, ROWS[name])
            assert (made.modalities, made.alignment, made.reconstruction) == (("collab",), "none", kind)
            assert made.num_codes == base.num_codes
