"""Fixtures shared by all tests."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("LLMREC_NUM_THREADS", "1")  # tests are small; more threads only wait
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data sets; tests that need it are skipped where it is absent."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("LLMREC_DATA", default))
    if not (folder / "beauty" / "sequences_mme_sid.txt").exists():
        pytest.skip(f"no real data at {folder} (set LLMREC_DATA)")
    return folder
