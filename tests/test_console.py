"""What is said when things go wrong: without secrets, and once for all processes."""

from __future__ import annotations

import errno
import functools
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmrec import console, pipeline
from llmrec.artifacts import Report
from llmrec.errors import ConfigError, StoppedError
from llmrec.evaluation.config import EvaluateConfig

TOKEN = "hf_" + "aB3" * 12


@pytest.mark.parametrize(
    "text",
    [
        f"401 for {TOKEN}",
        "https://ann:s3cret-word@mirror.example/beauty.csv",
        "https://ann:with@s3cret-word@mirror.example/beauty.csv",
        "http://:s3cret-word@mirror.example",
        "https://mirror.example/beauty.csv?size=3&X-Amz-Signature=s3cret-word&x=1",
        "https://mirror.example/beauty.csv?sig=s3cret-word",
        "https://mirror.example/b?access_token=s3cret-word",
        "{'Authorization': 'Bearer s3cret-word'}",
        "https://mirror.example/b?password=s3cret-word&x=1",
        "https://mirror.example/b?client_secret=s3cret-word",
        "https://mirror.example/b?api_key=s3cret-word",
        "the password is in-the-environment",
    ],
)
def test_secrets_are_hidden_and_the_rest_is_not(text, monkeypatch):
    monkeypatch.setenv("MIRROR_PASSWORD", "in-the-environment")
    found = console.redact(text)
    assert console.HIDDEN in found
    assert not any(secret in found for secret in (TOKEN, "s3cret-word", "in-the-environment"))
    for plain in ("mirror.example", "beauty.csv", "size=3", "x=1", "401 for"):
        assert (plain in found) == (plain in text)


@pytest.mark.parametrize("token", [TOKEN, "ghp_" + "aB3" * 12, "gho_" + "aB3" * 12, "AKIA" + "AB34" * 4])
def test_tokens_of_common_services_are_hidden_wherever_they_stand(token):
    assert console.redact(f"401 for {token}, again") == "401 for [hidden], again"


@pytest.mark.parametrize(
    "name",
    ["HF_TOKEN", "client_secret", "DB_PASSWD", "WANDB_API_KEY", "AWS_ACCESS_KEY_ID", "MY_CREDENTIALS"],
)
def test_what_the_environment_calls_a_secret_is_hidden_and_short_words_of_it_are_not(name, monkeypatch):
    """Else a password such as `a` would hide all lines, and be read from what it hides."""
    monkeypatch.setenv(name, "long-and-secret")
    monkeypatch.setenv(f"{name}_2", "step")
    assert console.redact("step 3 of long-and-secret") == "step 3 of [hidden]"


@pytest.mark.parametrize(
    "text",
    [
        "finetune: step 20, 1,024 tokens/s, loss 6.5",
        "runs/mme_sid_beauty/finetune was made with finetune.epochs=3 (now 4)",
        "https://mirror.example/beauty.csv?size=3",
    ],
)
def test_ordinary_lines_stay_as_they_are(text):
    assert console.redact(text) == text


def test_log_lines_and_their_tracebacks_are_without_secrets(capsys, monkeypatch):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    console.set_up_logging()
    try:
        raise ValueError(f"bad token {TOKEN}")
    except ValueError:
        logging.getLogger("llmrec").exception("asking with %s", TOKEN)
    said = capsys.readouterr().err
    assert said.count(console.HIDDEN) == 2 and TOKEN not in said and "ValueError" in said


def test_a_traceback_is_without_secrets(tmp_path):
    script = tmp_path / "bad.py"
    script.write_text(
        f"from llmrec.console import guarded\nguarded(lambda: 1 / 0 if False else {{}}[{TOKEN!r}])\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.returncode == 1 and "KeyError" in done.stderr and "Traceback" in done.stderr
    # The line of source that Python quotes holds the token too.
    assert TOKEN not in done.stderr


def raising(error: BaseException):
    def command() -> None:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ConfigError(f"no such {TOKEN}"), 2, "error: no such [hidden]"),
        (StoppedError("stopped after step 3"), 130, "stopped after step 3"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_errors_for_users_are_one_line(error, code, said, capsys, monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    assert console.guarded(raising(error)) == code
    assert capsys.readouterr().err.startswith(said)


def test_an_interrupted_command_says_what_is_kept_only_where_something_is(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)

    def interrupted(config) -> Report:
        raise KeyboardInterrupt

    assert console.guarded(raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "interrupted\n"
    stage = functools.partial(pipeline.run_stage, interrupted, EvaluateConfig(), (), tmp_path / "out")
    assert console.guarded(stage) == 130
    said = capsys.readouterr().err
    assert said == "interrupted: finished stages are kept; the same command goes on from there\n"


def test_other_errors_are_raised(monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    with pytest.raises(RuntimeError, match="timed out waiting"):
        console.guarded(raising(RuntimeError("timed out waiting, with one process")))


SCRIPT = """
import os, signal, sys, time
from pathlib import Path
from types import SimpleNamespace
import torch
from llmrec import distributed, launched, pipeline
from llmrec.artifacts import Report
from llmrec.console import guarded
from llmrec.errors import ConfigError
from llmrec.evaluation.config import EvaluateConfig

what = sys.argv[1]

def shared(config) -> Report:
    wanted = distributed.Agreement()
    if what == "all raise":
        raise ConfigError("a setting that cannot work")
    for step in range(1000):
        if step == 5 and launched.rank() == 1:
            if what == "one raises":
                raise ZeroDivisionError("a mistake of ours")
            if what == "one is killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if what == "one hangs":
                time.sleep(600)
        wanted(False)

def alone(config) -> Report:
    if what == "main alone raises":
        time.sleep(8)  # longer than the others would wait in shared work
        raise ConfigError("a setting that cannot work")

distributed.state()
stage = alone if what == "main alone raises" else distributed.every_process(shared)
sys.exit(guarded(lambda: pipeline.run_stage(stage, EvaluateConfig(), (), Path(sys.argv[2]))))
"""


@pytest.mark.parametrize(
    ("number", "file", "said"),
    [
        (errno.EACCES, "mine.csv", "error: mine.csv: Permission denied\n"),
        (errno.ENOSPC, None, "error: No space left on device\n"),
        (errno.ESTALE, "mine.csv", "error: mine.csv: Stale file handle\n"),
        (errno.ENAMETOOLONG, "x", "error: x: File name too long\n"),
    ],
)
def test_files_and_disks_are_the_users_to_mend(number, file, said, capsys, monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    assert console.guarded(raising(OSError(number, os.strerror(number), file))) == 2
    assert capsys.readouterr().err == said
    with pytest.raises(FileNotFoundError):
        console.guarded(raising(FileNotFoundError(errno.ENOENT, "No such file", "ours.json")))


def test_letters_that_the_locale_has_not_are_told_with_what_to_do(tmp_path):
    """Titles to a terminal that is not in UTF-8, and names of files that are not."""
    script = (
        "import sys, pyarrow.parquet\nfrom llmrec.console import guarded\n"
        "sys.exit(guarded(lambda: pyarrow.parquet.read_table(sys.argv[1]) if sys.argv[1:] else print('茶')))"
    )
    command = [sys.executable, "-c", script]
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(r"error: '\u8336' cannot be written in latin-1; use a locale in UTF-8")
    done = subprocess.run([*command, b"t\xfcr"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.startswith(r"error: '\udcfc' cannot be written in utf-8; use")


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("all raise", "error: a setting that cannot work"),
        ("main alone raises", "error: a setting that cannot work"),
        ("one raises", "ZeroDivisionError: a mistake of ours"),
        ("one is killed", "lost the others"),
        ("one hangs", "lost the others: one ended, or did not answer for 0:00:06"),
    ],
)
def test_when_a_process_fails_the_run_ends_and_says_so_once(what, words, tmp_path):
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "LLMREC_TIMEOUT_MINUTES": "0.1", "LLMREC_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    command += [
        "--monitor-interval",
        "1",
    ]  # a launcher that looks more often may end the others before they speak
    begun = time.monotonic()
    done = subprocess.run(
        [*command, str(script), what, str(tmp_path / "out")],
        capture_output=True, text=True, env=environment, timeout=120, cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert done.returncode != 0 and time.monotonic() - begun < 60
    assert done.stderr.count(words) == 1, done.stderr
    assert done.stderr.count("error: ") + done.stderr.count("ZeroDivisionError:") == 1, done.stderr
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out.[0-9]*"))


def test_an_interrupt_while_the_command_is_still_being_imported_is_one_line():
    script = (
        "import runpy, sys\n"
        "class Interrupted:\n"
        "    def find_spec(name, *_):\n"
        "        if name == 'llmrec.cli':\n"
        "            raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupted)\n"
        "runpy.run_module('llmrec', run_name='__main__', alter_sys=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (console.INTERRUPTED, "", "interrupted\n")


def test_python_m_is_the_command():
    done = subprocess.run([sys.executable, "-m", "llmrec", "--version"], capture_output=True, text=True)
    assert done.stdout.startswith("llmrec ") and not done.returncode, done.stderr
    done = subprocess.run(
        [sys.executable, "-m", "llmrec", "finetune", "--help"], capture_output=True, text=True
    )
    assert done.stdout.startswith("usage: llmrec finetune"), done.stdout[:200]


WAITS = """
import sys, time
from llmrec.console import guarded

def wait():
    print("begun", flush=True)
    time.sleep(30)

sys.exit(guarded(wait))
"""


@pytest.mark.parametrize("launched", [False, True], ids=["python", "accelerate"])
def test_a_command_that_is_terminated_ends_as_an_interrupted_one(launched, tmp_path):
    """SIGTERM goes to the launcher alone, as from `timeout` or a container that stops."""
    script = tmp_path / "waits.py"
    script.write_text(WAITS)
    command = [sys.executable]
    if launched:
        command += ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    said = tmp_path / "said.txt"
    with said.open("w") as out:
        process = subprocess.Popen([*command, str(script)], stdout=out, stderr=out)
        wait_for(lambda: "begun" in said.read_text())
        process.terminate()
        code = process.wait(30)
    wait_for(lambda: "interrupted" in said.read_text())
    assert launched or code == console.INTERRUPTED
    assert "Traceback" not in said.read_text()


def wait_for(condition, seconds: float = 60.0) -> None:
    """Until it is so; a test that waits longer fails."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


CLEANS_UP = """
import os, signal, sys, time
from llmrec.console import guarded

def work():
    try:
        os.kill(os.getpid(), signal.{first})
        time.sleep(30)
    finally:
        os.kill(os.getpid(), signal.SIGTERM)  # the launcher was interrupted too, and ended
        os.kill(os.getpid(), signal.SIGHUP)
        time.sleep(0.2)
        print("cleaned up")

sys.exit(guarded(work))
"""


@pytest.mark.parametrize("first", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_what_comes_after_an_interrupt_breaks_off_no_clean_up(first):
    command = [sys.executable, "-c", CLEANS_UP.format(first=first)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == console.INTERRUPTED, done.stderr
    assert done.stdout == "cleaned up\n" and done.stderr == "interrupted\n"


def test_a_command_leaves_signals_as_it_found_them():
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    assert console.guarded(lambda: None) == 0
    assert [signal.getsignal(number) for number in numbers] == before


def test_a_terminal_that_closes_is_no_matter_under_nohup():
    command = "import os, signal; os.kill(os.getpid(), signal.SIGHUP); print('went on')"
    script = (
        "import signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "from llmrec.stopping import stop_requests\nfrom llmrec.console import guarded\n"
        "def work():\n"
        f"    {command}\n"
        "    with stop_requests() as stop:\n"
        f"        {command}\n"
        "        assert not stop.asked\n"
        "sys.exit(guarded(work))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "went on\nwent on\n"), done.stderr


def test_a_last_word_that_nobody_can_hear_changes_no_exit_code():
    """As of a command whose terminal is closed, or `2>&1 | head`."""
    script = (
        "import os, sys; os.dup2(os.open('/dev/full', os.O_WRONLY), 2)\n"
        "from llmrec.console import guarded\nfrom llmrec.errors import ConfigError\n"
        "def work(): raise ConfigError('this cannot work')\n"
        "sys.exit(guarded(work))"
    )
    assert subprocess.run([sys.executable, "-c", script], timeout=120).returncode == console.USER_ERROR


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_streams_that_are_closed_are_no_matter_and_no_file_takes_their_place(closed, tmp_path):
    script = tmp_path / "speaks.py"
    script.write_text(
        "import os, pathlib, subprocess, sys\n"
        "from llmrec.console import guarded, set_up_logging\n"
        "from llmrec.progress import progress\n"
        "def work():\n"
        "    set_up_logging()\n"
        "    file = pathlib.Path(sys.argv[1]).open('w')\n"
        "    for _ in progress(range(3), 'counting'):\n"
        "        print('to standard output')\n"
        "    for number in 1, 2:\n"
        "        os.write(number, b'by a library')\n"
        "    subprocess.run('echo x && echo y >&2', shell=True, check=True)\n"
        "    file.write('ours')\n"
        "sys.exit(guarded(work))\n"
    )
    command = f'"$0" "$1" "$2" {closed}'
    out = tmp_path / "out"
    done = subprocess.run(["sh", "-c", command, sys.executable, script, out], capture_output=True, timeout=60)
    assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr
    assert out.read_text() == "ours"


@pytest.mark.parametrize(
    ("asked", "expected"),
    [({}, console.SPINS), ({"GOMP_SPINCOUNT": "5"}, "5"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)],
    ids=["nothing", "spins", "policy"],
)
def test_threads_of_commands_wait_briefly_unless_told_otherwise(asked, expected, monkeypatch):
    """Which OpenMP reads when torch is imported, so no command may have done that before."""
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    code = (
        "import os, sys, llmrec.cli, llmrec.recipe, llmrec.collab.compare_cli, llmrec.finetune.compare\n"
        "from llmrec.console import guarded\n"
        "assert 'torch' not in sys.modules\n"
        "guarded(lambda: print(os.environ.get('GOMP_SPINCOUNT')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | asked, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(expected)
