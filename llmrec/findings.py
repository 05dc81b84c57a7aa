"""What was looked at before a run, and whether it stands in the way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """One thing looked at."""

    status: Literal["ok", "note", "problem"]
    what: str
    advice: str = ""
