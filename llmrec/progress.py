"""Progress on long work: a bar on a terminal, a line now and then in a log file."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

from llmrec import distributed


def progress(
    work: Iterable[Any] | None, what: str, *, total: int | None = None, unit: str = "it", initial: int = 0
) -> tqdm:
    """A tqdm bar over work, shown by the main process only.

    Args:
        work: what to iterate, or None to advance by hand with ``bar.update``.
        what: shown before the bar.
        total: number of steps, where `work` does not know it.
        unit: name of one step.
        initial: steps done before.
    """
    terminal = sys.stderr.isatty()
    return tqdm(
        work,
        desc=what,
        total=total,
        initial=initial,
        unit=unit,
        disable=not distributed.is_main(),
        mininterval=0.2 if terminal else 15.0,
        dynamic_ncols=terminal,
        leave=False,
    )
