"""What each of several trainings side by side gets of the machine."""

from __future__ import annotations

import argparse
import os

import pytest
import torch

from llmrec import jobs


@pytest.fixture(autouse=True)
def no_settings(monkeypatch):
    for name in ("LLMREC_NUM_THREADS", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 12)


def on(number: int, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: number)


def test_without_a_gpu_the_cores_are_shared(monkeypatch):
    on(0, monkeypatch)
    assert jobs.default() == 12
    assert jobs.share(3, 4) == {"LLMREC_NUM_THREADS": "3", "OMP_NUM_THREADS": "3"}
    assert jobs.share(0, 20)["LLMREC_NUM_THREADS"] == "1"
    monkeypatch.setenv("LLMREC_NUM_THREADS", "2")
    assert jobs.share(0, 20)["OMP_NUM_THREADS"] == "2"


def test_each_job_gets_a_gpu_of_its_own(monkeypatch):
    on(3, monkeypatch)
    assert jobs.default() == 3
    assert [jobs.share(job, 5)["CUDA_VISIBLE_DEVICES"] for job in range(5)] == ["0", "1", "2", "0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-a,7")
    assert [jobs.share(job, 3)["CUDA_VISIBLE_DEVICES"] for job in range(3)] == ["4", "GPU-a", "7"]


def test_one_gpu_is_left_as_it_is(monkeypatch):
    on(1, monkeypatch)
    assert jobs.default() == 1 and "CUDA_VISIBLE_DEVICES" not in jobs.share(0, 2)


@pytest.mark.parametrize("bad", ["0", "-1", "two", "1.5"])
def test_jobs_are_counted(bad, capsys):
    parser = argparse.ArgumentParser()
    jobs.add_argument(parser)
    assert parser.parse_args(["--jobs", "3"]).jobs == 3 and parser.parse_args([]).jobs is None
    with pytest.raises(SystemExit):
        parser.parse_args(["--jobs", bad])
    assert "--jobs: must be a whole number of at least 1" in capsys.readouterr().err
