"""Progress on long work: a bar on a terminal, a log line now and then where there is none."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

from llmrec import launched

logger = logging.getLogger("llmrec")

LOG_EVERY_SECONDS = 30.0
LINE = "{desc}: {percentage:.0f} %, {n_fmt} of {total_fmt}, {elapsed}, {remaining} to go, {rate_fmt}{postfix}"
LINE_OF_UNKNOWN = "{desc}: {n_fmt}, {elapsed}, {rate_fmt}{postfix}"


def progress(
    work: Iterable[Any] | None, what: str, *, total: int | None = None, unit: str = "it", initial: int = 0
) -> tqdm:
    """A tqdm bar over work, shown by the main process only.

    Where standard error is no terminal, commands log a line every `LOG_EVERY_SECONDS` in place of the bar,
    and nothing of work that takes less.

    Args:
        work: what to iterate, or None to advance by hand with ``bar.update``.
        what: shown before the bar.
        total: number of steps, where `work` does not know it.
        unit: name of one step.
        initial: steps done before.
    """
    terminal = sys.stderr.isatty()
    shown: dict[str, Any] = {"mininterval": 0.2, "dynamic_ncols": True}
    if not terminal:  # a notebook, or a file that nobody logs to
        shown = {"mininterval": 15.0, "delay": 1.0}
    if not terminal and logger.isEnabledFor(logging.INFO):
        known = total is not None or hasattr(work, "__len__")
        shown = {
            "file": LogLines(),
            "mininterval": LOG_EVERY_SECONDS,
            "maxinterval": LOG_EVERY_SECONDS,
            "delay": LOG_EVERY_SECONDS,
            "bar_format": LINE if known else LINE_OF_UNKNOWN,
        }
    return tqdm(
        work,
        desc=what,
        total=total,
        initial=initial,
        unit=unit,
        unit_scale=unit == "B",
        disable=not launched.is_main(),
        leave=False,
        **shown,
    )


class LogLines:
    """A file for tqdm whose lines go to the log, one in `LOG_EVERY_SECONDS` at most."""

    encoding = "utf-8"

    def __init__(self) -> None:
        self.last = time.monotonic()

    def write(self, text: str) -> None:
        """Log the text, unless it only clears the line."""
        line = text.strip()
        if line and time.monotonic() - self.last >= LOG_EVERY_SECONDS:
            self.last = time.monotonic()
            logger.info("%s", line)

    def flush(self) -> None:
        """Nothing is held back."""
