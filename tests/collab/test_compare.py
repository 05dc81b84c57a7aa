"""Comparing models: cells that resume, fail alone and are refused when changed; figures against SciPy."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from llmrec.artifacts import ContentEmbeddings
from llmrec.collab import compare_cli
from llmrec.collab.compare import (
    cell_to_run,
    check_made_from,
    check_one_content,
    prepare_cell,
    run_cell,
    run_cells,
    summarise_cells,
)
from llmrec.collab.compare_cli import by_stage, chosen_rows, every_provider, own_rows
from llmrec.collab.compare_report import how_epochs_were_chosen, label, markdown, page
from llmrec.collab.config import TrainCollabConfig
from llmrec.collab.configs.gru4rec import GRU4RecConfig
from llmrec.collab.configs.mamba import MambaConfig
from llmrec.collab.configs.sasrec import SASRecConfig
from llmrec.collab.train import train_collab
from llmrec.data.config import PrepareDataConfig, SampleMarketConfig
from llmrec.data.prepare import prepare_data
from llmrec.encoders.config import EncodeItemsConfig, ImageEncoderConfig, TextEncoderConfig
from llmrec.encoders.encode import encode_items
from llmrec.errors import BusyError, ConfigError
from llmrec.evaluation.analysis import holm
from llmrec.finished import load
from llmrec.interactions import Interactions
from llmrec.pipeline import run_stage
from llmrec.storage import locked

ROOT = Path(__file__).resolve().parents[2]
MARKET = SampleMarketConfig(num_users=120, num_items=96, num_interests=8, max_length=10)


def rows() -> dict[str, TrainCollabConfig]:
    return {
        "sasrec": TrainCollabConfig(sasrec=SASRecConfig(embed_dim=8, inner_dim=16), epochs=2),
        "gru4rec": TrainCollabConfig(
            provider="gru4rec", gru4rec=GRU4RecConfig(embed_dim=8, hidden_dim=8), epochs=2
        ),
        # diverges: the cell must fail alone
        "broken": TrainCollabConfig(
            sasrec=SASRecConfig(embed_dim=8, loss="bce"), learning_rate=1e30, epochs=2
        ),
    }


# Every cell starts a process that loads torch, so this file is marked slow.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, list[str], dict]:
    root = tmp_path_factory.mktemp("compare")
    run_stage(prepare_data, PrepareDataConfig(market=MARKET), (), root / "prepare_data")
    failed = run_cells(rows(), [0, 1], root / "prepare_data", root, jobs=2)
    data = load(Interactions, root / "prepare_data")
    results = summarise_cells(rows(), [0, 1], data, root, reference="sasrec", samples=50)
    return root, failed, results | {"machine": "m", "jobs": 2, "command": "c"}


def test_a_cell_that_fails_is_named_with_its_reason_and_the_others_finish(finished):
    _, failed, results = finished
    assert len(failed) == 2
    assert "broken, seed 0" in " ".join(failed) and "its training went wrong" in failed[0]
    assert [results["rows"][name]["num_seeds"] for name in rows()] == [2, 2, 0]


def test_figures_are_means_over_seeds_of_what_the_cells_wrote(finished):
    root, _, results = finished
    cells = [
        json.loads((root / "cells" / "sasrec" / f"seed{seed}" / "metrics.json").read_text())
        for seed in (0, 1)
    ]
    values = [cell["test"]["ndcg@10"] for cell in cells]
    row = results["rows"]["sasrec"]
    assert row["test"]["ndcg@10"]["mean"] == pytest.approx(np.mean(values))
    assert row["test"]["ndcg@10"]["sd"] == pytest.approx(np.std(values, ddof=1))
    assert values[0] != values[1]
    length = row["slices"]["history length"]
    counts = results["slices"]["history length"]
    weighted = sum(length[part]["recall@10"] * counts[part] for part in counts) / sum(counts.values())
    assert weighted == pytest.approx(row["test"]["recall@10"]["mean"])
    gap = results["rows"]["gru4rec"]["difference"]["ndcg@10"]
    other = results["rows"]["gru4rec"]["test"]["ndcg@10"]["mean"]
    assert gap["difference"] == pytest.approx(other - row["test"]["ndcg@10"]["mean"])
    assert gap["low"] <= gap["difference"] <= gap["high"]
    assert "difference" not in row


def test_users_are_grouped_by_the_lengths_that_are_asked_for(finished):
    root, _, results = finished
    data = load(Interactions, root / "prepare_data")
    targets = data.targets("test")
    length = targets.stop - targets.start
    edge = int(np.median(length))
    found = summarise_cells(rows(), [0, 1], data, root, reference="sasrec", samples=50, length_edges=(edge,))
    below = length <= edge
    assert found["slices"]["history length"] == {
        f"0-{edge}": int(below.sum()),
        f"{edge + 1}+": int((~below).sum()),
    }
    recall = [
        load_file(root / "cells" / "sasrec" / f"seed{seed}" / "ranks.safetensors")["rank"] < 10
        for seed in (0, 1)
    ]
    shown = found["rows"]["sasrec"]["slices"]["history length"][f"{edge + 1}+"]["recall@10"]
    assert shown == pytest.approx(np.mean([hits[~below].mean() for hits in recall]))
    assert found["rows"]["sasrec"]["test"] == results["rows"]["sasrec"]["test"]


@pytest.mark.parametrize(
    ("edges", "message"), [("9 5", "must ascend"), ("5 5", "ascend"), ("0 5", "at least 1")]
)
def test_lengths_that_part_nobody_are_refused(edges, message, capsys):
    with pytest.raises(SystemExit):
        compare_cli.parser(every_provider(), None, "x", None).parse_args(
            ["--prepare-data", "d", "--length-edges", *edges.split()]
        )
    assert message in capsys.readouterr().err


def test_popularity_is_there_for_scale(finished):
    """By counting: of unseen items, those that more people took than the target, and half of the equals."""
    root, _, results = finished
    data = load(Interactions, root / "prepare_data")
    count, hits = data.train_count, 0
    targets = data.targets("test")
    for start, stop, item in zip(targets.start, targets.stop, targets.item):
        seen = set(data.item[start:stop].tolist()) - {item}
        others = [count[one] for one in range(1, data.num_items + 1) if one not in seen and one != item]
        rank = sum(other > count[item] for other in others) + sum(o == count[item] for o in others) / 2
        hits += rank + 1 <= 10
    assert results["popularity"]["test"]["recall@10"] == pytest.approx(hits / len(targets))
    shown = f"| popularity |  | {hits / len(targets):.4f} |"
    assert shown in markdown(results) and "<td>popularity</td>" in page(results)


def test_finished_cells_are_not_run_again_and_changed_ones_refused(finished, monkeypatch):
    root, _, _ = finished
    only = {"sasrec": rows()["sasrec"]}
    monkeypatch.setattr(subprocess, "Popen", None)  # nothing may be started
    assert run_cells(only, [0, 1], root / "prepare_data", root, jobs=1) == []
    changed = {"sasrec": TrainCollabConfig(sasrec=SASRecConfig(embed_dim=8, inner_dim=16), epochs=3)}
    with pytest.raises(ConfigError, match=r"seed0 \(sasrec, seed 0\) was made with epochs=2 \(now 3\)"):
        run_cells(changed, [0], root / "prepare_data", root, jobs=1)


def test_a_cell_that_another_process_ranks_is_left_to_it(finished, tmp_path):
    root, _, _ = finished
    folder = tmp_path / "cell"
    shutil.copytree(root / "cells" / "sasrec" / "seed0", folder)
    written = (folder / "metrics.json").read_bytes()
    (folder / "metrics.json").unlink()
    cell = cell_to_run("sasrec", 0, folder, [root / "prepare_data"])
    with locked(folder / "ranking"):
        assert cell.busy() and not cell.done()
        with pytest.raises(BusyError, match="another process is computing ranking"):
            run_cell(folder, root / "prepare_data")
        assert not cell.done()
    assert not cell.busy()
    run_cell(folder, root / "prepare_data")
    assert cell.done() and (folder / "metrics.json").read_bytes() == written


def test_cells_of_other_data_are_refused(finished, tmp_path):
    root, _, _ = finished
    config = PrepareDataConfig(market=MARKET, seed=1)
    other = run_stage(prepare_data, config, (), tmp_path / "prepare_data")
    only = {"sasrec": rows()["sasrec"]}
    with pytest.raises(ConfigError, match=r"seed0 was trained on other data; use another --run-dir"):
        run_cells(only, [0], tmp_path / "prepare_data", root, jobs=1)
    with pytest.raises(ConfigError, match=r"seed0 was trained on other data"):
        summarise_cells(only, [0], other, root, reference="sasrec", samples=50)


def test_cells_of_other_settings_are_not_summed_up(finished):
    root = finished[0]
    data = load(Interactions, root / "prepare_data")
    other = {"sasrec": replace(rows()["sasrec"], learning_rate=0.5)}
    with pytest.raises(ConfigError, match=r"seed 0\) was made with learning_rate=.* \(now 0.5\)"):
        summarise_cells(other, [0], data, root, reference="sasrec", samples=50)


def test_cells_with_other_texts_are_refused(finished, tmp_path):
    root, _, _ = finished
    folder = tmp_path / "cell"
    shutil.copytree(root / "cells" / "sasrec" / "seed0", folder)
    data = load(Interactions, root / "prepare_data")

    def encoded(name: str, dim: int) -> ContentEmbeddings:
        config = EncodeItemsConfig(text=TextEncoderConfig(dim=dim), image=ImageEncoderConfig(encoder="none"))
        return run_stage(encode_items, config, (data,), tmp_path / name)

    shutil.rmtree(folder / "train_collab")
    content = encoded("first", 4)
    config = TrainCollabConfig(sasrec=SASRecConfig(embed_dim=8, inner_dim=16, content=("text",)), epochs=1)
    run_stage(train_collab, config, (data, content), folder / "train_collab")
    check_made_from(folder, data, content)
    one, two = tmp_path / "one", tmp_path / "two"
    for cell, vectors in ((one, content), (two, encoded("third", 6))):
        run_stage(train_collab, config, (data, vectors), cell / "train_collab")
    check_one_content([root / "cells" / "sasrec" / "seed0", folder, one])
    with pytest.raises(ConfigError, match=r"cell and .*two were trained with different text or image vec"):
        check_one_content([folder, one, two])
    with pytest.raises(ConfigError, match="cell was trained with other text or image vectors"):
        check_made_from(folder, data, encoded("second", 5))


def test_the_table_and_the_page_show_what_is_there_and_what_is_missing(finished):
    _, _, results = finished
    text = markdown(results)
    lines = [line for line in text.splitlines() if line.startswith("| broken")]
    assert "0 of 2" in lines[0] and "missing" in lines[0]
    assert "| sasrec (ce) | 2 of 2 |" in text and "ndcg@10 minus sasrec" in text
    shown = page(results)
    assert shown.count("<svg") == 6, "quality, differences, cost, two slices, validation"
    told = markdown(results | {"data_warnings": ["The data are odd."]})
    assert told.splitlines()[-2:] == ["The data are odd.", text.splitlines()[-1]]
    assert "missing" in shown and "http" not in shown.replace("http://www.w3", "")
    some = results["rows"] | {"gru4rec": results["rows"]["gru4rec"] | {"num_seeds": 1}}
    assert "Of gru4rec some seeds are missing" in markdown(results | {"rows": some})
    assert "some seeds are missing" not in text
    assert label("sasrec-bce", {"loss": "bce"}) == "sasrec-bce"


def test_settings_reach_the_rows_they_are_meant_for():
    found = chosen_rows(every_provider(), ["sasrec", "gmvae"], {"epochs": "7", "gmvae.num_interests": "8"})
    assert [config.epochs for config in found.values()] == [7, 7]
    assert found["gmvae"].gmvae.num_interests == 8
    with pytest.raises(ConfigError, match=r"mind\.num_interests has no effect: no row trains mind"):
        chosen_rows(every_provider(), ["sasrec"], {"mind.num_interests": "8"})
    with pytest.raises(ConfigError, match="--rows must be among sasrec"):
        chosen_rows(every_provider(), ["sasrek"], {})


def test_settings_name_their_stage():
    given = ["prepare_data.k_core=10", "train_collab.gmvae.num_interests=8", "train_collab.epochs = 7"]
    of_data, of_rows = by_stage(given, has_data=True)
    assert of_data == {"k_core": "10"}
    assert of_rows == {"gmvae.num_interests": "8", "epochs": "7"}
    for bad, has_data in (
        (["epochs=7"], True),
        (["train_collab.epochs"], True),
        (["prepare_data.k_core=10"], False),
        (["finetune.epochs=3"], True),
    ):
        with pytest.raises(ConfigError, match=r"not of the form STAGE\.FIELD=VALUE"):
            by_stage(bad, has_data)


def test_rows_of_ones_own_differ_in_what_they_name_from_the_row_of_their_model():
    known = rows()
    given = [["wide", "sasrec.embed_dim=32"], ["twice", "provider=gru4rec", "train_collab.epochs=4"]]
    found = own_rows(known, given)
    assert found["wide"] == replace(known["sasrec"], sasrec=SASRecConfig(embed_dim=32, inner_dim=16))
    assert found["twice"] == replace(known["gru4rec"], epochs=4)
    (other,) = own_rows(known, [["m", "provider=mamba", "mamba.variant=released"]]).values()
    assert other == TrainCollabConfig(provider="mamba", mamba=MambaConfig(variant="released"))
    chosen = chosen_rows(known | found, ["gru4rec", *found], {"epochs": "3", "sasrec.num_layers": "1"})
    assert list(chosen) == ["gru4rec", "wide", "twice"]
    assert chosen["wide"].sasrec.num_layers == 1 and chosen["twice"].epochs == 3


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (["a/b", "epochs=1"], "--row 'a/b': a name has letters"),
        (["sasrec", "epochs=1"], "--row sasrec: there is a row of this name already"),
        (["popularity", "epochs=1"], "--row popularity: there is a row of this name already"),
        (["mine", "seed=5"], "--row mine: seeds are given by --seeds"),
        (["mine"], "--row mine: give it settings of train_collab"),
        (["mine", "epoch=1"], "unknown setting 'train_collab.epoch'; did you mean train_collab.epochs?"),
        (["mine", "provider=gmvae", "sasrec.embed_dim=8"], "sasrec"),
        (["mine", "provider=lstm"], "train_collab.provider"),
        (["mine", "provider=precomputed", "vectors=x.parquet"], "trains no model that could be compared"),
    ],
)
def test_rows_that_cannot_be_are_refused(row, message):
    with pytest.raises(ConfigError) as caught:
        own_rows(rows(), [row])
    assert message in str(caught.value)


def test_a_row_of_ones_own_is_trained_beside_the_others(finished, tmp_path, capsys):
    root, _, _ = finished
    command = ["--prepare-data", str(root / "prepare_data"), "--run-dir", str(tmp_path), "--seeds", "0"]
    command += ["--row", "own", "provider=gru4rec", "epochs=1"]
    with pytest.raises(SystemExit) as left:
        compare_cli.main(rows, arguments=command)
    assert not left.value.code, capsys.readouterr().err
    assert list(json.loads((tmp_path / "results.json").read_text())["rows"]) == ["own"]
    kept = json.loads((tmp_path / "cells" / "own" / "seed0" / "config.json").read_text())
    assert (kept["provider"], kept["epochs"], kept["gru4rec"]["hidden_dim"]) == ("gru4rec", 1, 8)


def test_holms_correction_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


def test_a_cell_begun_with_the_same_settings_goes_on(tmp_path):
    config = rows()["sasrec"]
    prepare_cell(tmp_path / "cell", config, "x")
    prepare_cell(tmp_path / "cell", config, "x")


def test_the_tool_makes_its_table_from_unfinished_work(finished, tmp_path):
    root, _, _ = finished
    command = [sys.executable, str(ROOT / "tools" / "compare_providers.py"), "--summarise"]
    command += ["--prepare-data", str(root / "prepare_data"), "--run-dir", str(tmp_path)]
    command += ["--rows", "sasrec", "mind", "--seeds", "0"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "| mind | 0 of 1 | missing" in done.stdout
    written = (tmp_path / "results.json").read_text()
    assert (tmp_path / "report.html").exists() and "Summed up on" in done.stdout
    command[command.index("mind")] = "gru4rec"  # a table of some rows takes the place of no other
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert "| gru4rec | 0 of 1 | missing" in done.stdout
    assert (tmp_path / "results.json").read_text() == written


def test_a_comparison_needs_data():
    with pytest.raises(SystemExit):
        compare_cli.parser(every_provider(), None, "x", None).parse_args([])


def test_the_notes_say_how_epochs_were_chosen_and_what_was_learned_from():
    def row(select: str, include_valid: bool = False, seeds: int = 1) -> dict:
        return {"num_seeds": seeds, "select": select, "include_valid": include_valid}

    alike = {"a": row("valid"), "b": row("valid"), "c": row("last", seeds=0)}
    assert how_epochs_were_chosen(alike) == ["All rows chose their epoch by validation ndcg@10."]
    mixed = {"a": row("valid"), "b": row("last", include_valid=True), "c": row("last"), "d": row("valid")}
    assert how_epochs_were_chosen(mixed) == [
        "a, d chose their epoch by validation ndcg@10.",
        "c kept the last epoch.",
        "b kept the last epoch, and learned from validation items too.",
    ]


def test_a_seed_that_is_no_better_than_popularity_is_named(finished, tmp_path):
    root, _, _ = finished
    idle = replace(rows()["sasrec"], learning_rate=1e-12, epochs=1)
    shutil.copytree(root / "prepare_data", tmp_path / "prepare_data")
    asked = {"idle": idle, "last": replace(idle, select="last")}
    assert not run_cells(asked, [0, 1], tmp_path / "prepare_data", tmp_path, jobs=2)
    data = load(Interactions, tmp_path / "prepare_data")
    results = summarise_cells(asked, [0, 1], data, tmp_path, reference="idle", samples=50)
    assert results["rows"]["idle"]["learned_nothing"] == [0, 1]
    text = markdown(results | {"machine": "m", "jobs": 2, "command": "c"})
    assert "idle, seed 0, 1: no better than popularity on validation items" in text
    assert "last, seed" not in text
