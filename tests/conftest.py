"""Fixtures shared by all tests."""

import logging
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Tests are small and several run at a time: more threads would only wait for each other. Set before torch is
# imported, here and in the processes that tests start.
os.environ.setdefault("LLMREC_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


# Started in the background by a shell, Python ignores SIGINT, and under nohup SIGHUP; so would the processes
# that tests start.
for number, usual in (signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, usual)


def pytest_configure(config: pytest.Config) -> None:
    """Without ``-m gpu`` tests run on the CPU, where equal runs are equal to the last bit, on any machine."""
    wanted = config.option.markexpr
    if "gpu" not in wanted or "not gpu" in wanted:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(autouse=True)
def as_loud_as_before() -> Iterator[None]:
    """Commands that a test calls set the level of the package's log."""
    log = logging.getLogger("llmrec")
    level = log.level
    yield
    log.setLevel(level)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data sets; tests that need it are skipped where it is absent."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("LLMREC_DATA", default))
    if not (folder / "beauty" / "sequences_mme_sid.txt").exists():
        pytest.skip(f"no real data at {folder} (set LLMREC_DATA)")
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium; tests that need it are skipped where there is none. No longer than a module: until
    it is closed, its event loop counts as running."""
    playwright = pytest.importorskip("playwright.sync_api")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no Chromium on this machine")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Path:
    """A run folder of the tiny recipe, made once; not to be changed."""
    from tiny_recipe import tiny

    from llmrec.recipe import main

    folder = tmp_path_factory.mktemp("run") / "tiny"
    with pytest.raises(SystemExit) as left:
        main(tiny, ["--run-dir", str(folder)])
    assert left.value.code == 0
    return folder


@pytest.fixture(scope="session")
def packaged(finished, tmp_path_factory) -> Path:
    """The same as a package; not to be changed."""
    from llmrec.inference.package import package_run

    return package_run(finished, tmp_path_factory.mktemp("package") / "tiny")
