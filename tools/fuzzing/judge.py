"""The verdict on a case, and the table of all."""

from __future__ import annotations

import signal
import time
import traceback
from collections import Counter
from typing import Any

from fuzzing.changes import Change, Target
from llmrec.errors import LlmrecError


class SlowError(Exception):
    """A case took too long."""


def too_slow(*_: Any) -> None:
    raise SlowError


class Judge:
    """Around one case: 'taken', 'refused' with one of our errors, or among the 'faults'."""

    verdict = "taken"
    error: BaseException | None = None

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __enter__(self) -> Judge:
        signal.setitimer(signal.ITIMER_REAL, self.seconds)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: Any) -> bool:
        signal.setitimer(signal.ITIMER_REAL, 0)
        self.error = error
        if error is not None:
            self.verdict = "refused" if isinstance(error, LlmrecError) else "faults"
        return not isinstance(error, KeyboardInterrupt | SystemExit)


def fuzz(
    targets: list[Target], cases: int, seconds: float, seed: int, shown: int = 3
) -> tuple[list[tuple[str, Counter[str]]], list[str]]:
    """Run the cases of every target; counts by target, and the first faults of each with their traces."""
    results, faults = [], []
    signal.signal(signal.SIGALRM, too_slow)
    for number, target in enumerate(targets):
        counts: Counter[str] = Counter()
        started = time.perf_counter()
        for case in range(cases):
            change = Change(seed, number, case)
            with Judge(seconds) as judge:
                target.case(change)
            counts[judge.verdict] += 1
            if judge.verdict == "refused" and change.nothing:
                faults.append(f"{target.name} refuses what is good: {judge.error}")
            if judge.verdict == "faults" and counts["faults"] <= shown:
                trace = "".join(traceback.format_exception(judge.error)[-3:])
                faults.append(f"{target.name}, case {case} of seed {seed}:\n{trace}")
        counts["milliseconds"] = round(1000 * (time.perf_counter() - started) / max(cases, 1))
        results.append((target.name, counts))
    return results, faults


def report(results: list[tuple[str, Counter[str]]], faults: list[str]) -> str:
    lines = [f"{'target':58} {'cases':>7} {'taken':>7} {'refused':>8} {'faults':>7} {'ms each':>8}"]
    total: Counter[str] = Counter()
    for name, counts in [*results, ("all", total)]:
        cases = counts["taken"] + counts["refused"] + counts["faults"]
        each = str(counts["milliseconds"]) if counts is not total else ""
        numbers = f"{counts['taken']:7,} {counts['refused']:8,} {counts['faults']:7,} {each:>8}"
        lines.append(f"{name:58} {cases:7,} {numbers}")
        if counts is not total:
            total.update({key: counts[key] for key in ("taken", "refused", "faults")})
    return "\n".join([*lines, *faults])
