"""Progress: log lines where there is no terminal, a bar with log lines above it where there is one."""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios

import pytest

from llmrec import progress as module

WORK = """
import logging, time
from llmrec import console, progress
console.set_up_logging()
progress.LOG_EVERY_SECONDS = 0.2
for number in progress.progress(range(10), "counting", unit="step"):
    time.sleep(0.1)
    if number == 4:
        logging.getLogger("llmrec").info("half of it")
for _ in progress.progress(iter("abc"), "endless", unit="B"):
    time.sleep(0.1)
"""


def test_without_a_terminal_progress_is_lines_of_a_log():
    done = subprocess.run([sys.executable, "-c", WORK], capture_output=True, text=True, check=True)
    lines = done.stderr.splitlines()
    assert "\r" not in done.stderr
    bars = [line for line in lines if "counting: " in line]
    assert 2 <= len(bars) <= 5, lines
    assert "%, " in bars[0] and " of 10, " in bars[0] and "to go" in bars[0]
    assert any(line.endswith(" half of it") for line in lines)
    assert sum("endless: " in line for line in lines) <= 1


def test_on_a_terminal_log_lines_stand_above_the_bar():
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    with subprocess.Popen([sys.executable, "-c", WORK], stderr=slave) as process:
        os.close(slave)
        read = b""
        while True:
            try:
                block = os.read(master, 4096)
            except OSError:  # the other end is closed
                break
            if not block:
                break
            read += block
    os.close(master)
    assert process.returncode == 0
    shown = read.decode().replace("\r\n", "\n")
    assert "10" in shown and "counting" in shown
    line = next(line for line in shown.split("\n") if "half of it" in line)
    # What the bar had written of this line was cleared before, up to the last return of the carriage.
    assert "counting" not in line.rpartition("\r")[2]


@pytest.mark.parametrize("total", [None, 3])
def test_a_bar_counts_what_it_does_not_show(total, monkeypatch):
    monkeypatch.setattr(module.logger, "level", 20)
    bar = module.progress(None, "work", total=total)
    bar.update(2)
    assert bar.n == 2
    bar.close()
