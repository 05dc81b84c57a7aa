"""The tools that compare and time semantic IDs do what they say."""

import re

import pytest
import torch
from test_learn import artefacts, clustered
from tool import load

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


def test_both_references_are_timed_and_the_difference_tensor_gives_the_same_value(capsys):
    benchmark = load("benchmark_semantic_ids")
    x, y = torch.randn(2, 12, 5, generator=torch.Generator().manual_seed(0))
    ours = mmd(x, y, estimator="tllib")
    torch.testing.assert_close(benchmark.mmd_by_differences(x, y, estimator="tllib"), ours)
    for what in ("mmd", "quantiser"):
        benchmark.main([what, "--batch-size", "16", "--dim", "8", "--steps", "1", "--rounds", "1"])
        assert re.search(r"ratio: median \d+\.\d\d, min", capsys.readouterr().out)


def test_a_catalogue_is_timed_with_its_memory(capsys):
    options = ["catalogue", "--items", "2000", "--dim", "8"]
    load("benchmark_semantic_ids").main(options)
    assert re.search(
        r"2,000 items of 8 numbers .*peak memory\n\d+\.\d GB", capsys.readouterr().out, re.DOTALL
    )
