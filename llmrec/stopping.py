"""Asked to stop: a run ends in order, after what it is at. Imports no torch."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator
from typing import Any

logger = logging.getLogger("llmrec")

END_OF_EPOCH = "ending this epoch first; asked again, at once, and going on from the checkpoint before it"


class StopRequests:
    """Whether this run was asked to stop (SIGTERM, Ctrl-C once, or its terminal was closed)."""

    def __init__(self) -> None:
        self.asked = False


@contextlib.contextmanager
def stop_requests(first: str = "ending this step first") -> Iterator[StopRequests]:
    """Turn SIGTERM, SIGINT and SIGHUP into requests while work goes on; a second one acts at once, but for
    SIGHUP, which a closed terminal's shell sends again. Where that is ignored (nohup), it stays so.

    Outside of the main thread, where Python allows no handlers, nothing changes.

    Args:
        first: what is done before the work stops, for the log.
    """
    found = StopRequests()
    if threading.current_thread() is not threading.main_thread():
        yield found
        return
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    if before[signal.SIGHUP] is signal.SIG_IGN:
        del before[signal.SIGHUP]

    def ask(number: int, _frame: Any) -> None:
        if not found.asked:
            logger.warning("asked to stop: %s", first)
        found.asked = True
        if number != signal.SIGHUP:
            signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, ask)
    try:
        yield found
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
