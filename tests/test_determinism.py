"""One seed, one result: all of it, wherever and whenever it runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from llmrec.contents import content_of
from llmrec.stages import STAGES

SCRIPT = """
import sys
sys.path[:0] = {paths!r}
from llmrec.recipe import main
from tiny_recipe import tiny
main(tiny, ["--run-dir", sys.argv[1]])
"""


def test_two_runs_of_a_recipe_make_the_same_files(finished, tmp_path):
    """In another process, folder, time zone, language and order of hashes; all but `contents.MEASURED`.

    Nor does it need torch's deterministic mode, which would fail here if an operation had none.
    """
    here = Path(__file__).parent
    script = tmp_path / "run.py"
    script.write_text(SCRIPT.format(paths=[str(here), str(here.parent)]))
    places = {name: tmp_path / name for name in ("home", "temporary", "elsewhere")}
    for place in places.values():
        place.mkdir()
    folders = {"HOME": places["home"], "TMPDIR": places["temporary"], "MPLCONFIGDIR": tmp_path / "fonts"}
    other = {"TZ": "Asia/Kathmandu", "PYTHONHASHSEED": "7", "LC_ALL": "C", "LLMREC_DETERMINISTIC": "1"}
    subprocess.run(
        [sys.executable, str(script), str(tmp_path / "again")],
        check=True, capture_output=True, cwd=places["elsewhere"],
        env={**os.environ, **other, **{name: str(place) for name, place in folders.items()}},
    )  # fmt: skip
    written = [path for place in places.values() for path in place.rglob("*") if path.is_file()]
    assert written == [], "nothing is written outside of the run folder"
    for stage in STAGES:
        found, expected = content_of(tmp_path / "again" / stage), content_of(finished / stage)
        assert list(found) == list(expected) and found, stage
        assert [name for name in expected if found[name] != expected[name]] == [], stage


def test_one_setting_rules_the_threads_of_all_libraries():
    plain = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    script = (
        "import llmrec.distributed, numpy, sklearn.cluster, threadpoolctl, torch\n"
        "llmrec.distributed.state()\n"
        "pools = threadpoolctl.threadpool_info()\n"
        "assert pools and {pool['num_threads'] for pool in pools} == {1} == {torch.get_num_threads()}, pools"
    )
    subprocess.run([sys.executable, "-c", script], check=True, env=plain | {"LLMREC_NUM_THREADS": "1"})
