"""TIGER's search beside transformers' beam search: both are timed, and find the same."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tool import ended, load

from llmrec.data.config import PrepareDataConfig, SampleMarketConfig
from llmrec.data.prepare import prepare_data
from llmrec.pipeline import run_stage


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    market = SampleMarketConfig(num_users=60, num_items=96, num_interests=8, max_length=8)
    folder = tmp_path_factory.mktemp("search") / "prepare_data"
    run_stage(prepare_data, PrepareDataConfig(market=market), (), folder)
    return folder


def test_searches_are_compared_as_a_ratio_and_by_what_they_find(folder, capsys):
    main = load("benchmark_search").main
    given = ["--prepare-data", str(folder), "--users", "5", "--beams", "12", "--rounds", "1"]
    code, text, said = ended(main, capsys, *given)
    assert code == 0, said
    assert re.search(r"ratio: median \d+\.\d\d, min", text)
    assert "equal lists of the best 10: 5 of 5 users" in text
    code, _, said = ended(main, capsys, "--prepare-data", str(folder), "--beams", "9")
    assert code == 2 and "--beams must be at least 10" in said
