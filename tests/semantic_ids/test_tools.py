"""The tools that compare and time semantic IDs do what they say."""

import argparse
import functools
import re

import pytest
import torch
from test_learn import artefacts, clustered
from tool import ended, load

from llmrec import machine
from llmrec.semantic_ids.config import LearnSemanticIdsConfig
from llmrec.semantic_ids.losses import mmd


def test_settings_are_compared_over_seeds(tmp_path, capsys, monkeypatch):
    data, made = clustered(num_items=80)
    found = {type(one).stage: one for one in (data, *artefacts(data, made))}
    monkeypatch.setattr("llmrec.finished.load", lambda kind, folder: found[folder.name])
    command = ["--modality", "text", "--seeds", "0", "1", "--out", str(tmp_path / "cells.json")]
    for name in ("prepare_data", "train_collab", "encode_items"):
        command += [f"--{name.replace('_', '-')}", str(tmp_path / name)]
    settings = ["num_levels=2", "num_codes=8"]
    command += ["--row", "kmeans", "method=rkmeans", *settings]
    command += ["--row", "mse", "reconstruction=mse", "epochs=2", "log_every_epochs=1", *settings]
    with pytest.raises(SystemExit) as left:
        load("compare_semantic_ids").main(command)
    assert not left.value.code
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("text, 2 seeds; ") and len(lines) == 4
    assert [line.split()[0] for line in lines[2:]] == ["kmeans", "mse"]
    assert all(len(re.findall(r"-?\d+\.\d+", line)) == 2 * 7 + 1 for line in lines[2:])
    assert (tmp_path / "cells.json").read_text().count('"seed"') == 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--row", "mse", "--out", "no/such/folder/cells.json"], "no/such/folder: no such folder; make it"),
        (["--row", "mse", "--out", __file__], "exists; give another file"),
        (["--row", "reconstruction=mse"], "give --row NAME reconstruction=mse"),
        (["--row", "mse", "seed=5"], "seed is set by --seeds"),
        (["--row", "mse", "mmd", "reconstruction=mmd"], "mse: 'mmd' is not of the form FIELD=VALUE"),
        (["--row", "mse", "modalities=text"], "modalities is set by --modality"),
    ],
)
def test_a_comparison_that_cannot_be_kept_or_says_something_else_is_not_begun(arguments, words, capsys):
    folders = [f"--{name}=no folder" for name in ("prepare-data", "train-collab", "encode-items")]
    with pytest.raises(SystemExit) as left:
        load("compare_semantic_ids").main([*folders, *arguments])
    assert left.value.code == 2 and words in capsys.readouterr().err


@pytest.fixture
def run(capsys):
    return functools.partial(ended, load("benchmark_semantic_ids").main, capsys)


def test_both_references_are_timed_and_the_difference_tensor_gives_the_same_value(run):
    benchmark = load("benchmark_semantic_ids")
    x, y = torch.randn(2, 12, 5, generator=torch.Generator().manual_seed(0))
    ours = mmd(x, y, estimator="tllib")
    torch.testing.assert_close(benchmark.mmd_by_differences(x, y, estimator="tllib"), ours)
    for what in ("mmd", "quantiser"):
        code, text, _ = run(what, "--batch-size", "16", "--dim", "8", "--steps", "1", "--rounds", "1")
        assert code == 0 and text.startswith("batch 16, vectors of 8")
        assert re.search(r"ratio: median \d+\.\d\d, min", text)


def test_a_catalogue_is_timed_with_its_memory(run):
    code, text, _ = run("catalogue", "--items", "2000", "--dim", "8")
    line = text.splitlines()[0]
    found = re.match(
        r"2,000 items of 8 numbers \(0.0 GB\): learn_semantic_ids [\d.]+ s, report [\d.]+ s, "
        r"peak memory ([\d.]+) GB; codes used [\d.]+%, collision rate [\d.]+$",
        line,
    )
    assert code == 0 and found, text
    assert float(found[1]) == pytest.approx(machine.peak_resident_memory() / 1e9, abs=0.06)
    assert load("benchmark_semantic_ids").duration(90.0) == "1.5 min"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["mmd", "--batch-size", "0"], "at least 1, got '0'"),
        (["mmd", "--batch-size", "1"], "at least 2"),
        (["mmd", "--precision", "tf32"], "unrecognized arguments: --precision"),
        (["quantiser", "--items", "9"], "unrecognized arguments: --items"),
        (["official", "--dim", "64"], "unrecognized arguments: --dim"),
        (["official", "--batch-size", "64"], "unrecognized arguments: --batch-size"),
        (["catalogue", "--rounds", "2"], "unrecognized arguments: --rounds"),
        (["catalogue", "--items", "255"], "--items must be at least 256"),
    ],
)
def test_settings_without_effect_or_sense_are_refused(arguments, words, run):
    code, text, said = run(*arguments)
    assert code == 2 and not text and words in said, said


def test_the_published_size_is_timed_by_its_steps(capsys, monkeypatch):
    """At a size that a test can pay for."""
    tool = load("benchmark_semantic_ids")
    small = {"official": LearnSemanticIdsConfig(hidden_dims=(8,), code_dim=4, num_codes=8, num_levels=2)}
    monkeypatch.setattr(tool, "PRESETS", small)
    monkeypatch.setattr(tool, "timed", lambda step, number: step() or 0.5)
    code, text, _ = ended(tool.main, capsys, "official", "--steps", "1", "--rounds", "1")
    assert code == 0 and "500.0 ms per step; 12,086 items: 6000.0 s per 1,000 epochs" in text


def test_the_published_size_says_on_a_cpu_what_it_will_take(capsys):
    options = argparse.Namespace(steps=2, rounds=3)
    load("benchmark_semantic_ids").announce(6 * 1024 * 336_000_000, 336_000_000, options)
    assert re.match(
        r"official is meant for a GPU, and this is a CPU: 6 x 2.1 TFLOP take at least .* 5.4 GB",
        capsys.readouterr().out,
    )
