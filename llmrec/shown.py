"""What artefacts look like in a notebook: fields with their sizes."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, cast

import numpy as np
import pyarrow as pa

BRIEF = 4
"""Most entries that `brief` shows one by one."""
LONGEST = 60
"""Most letters of anything else."""


class Shown:
    """What artefacts look like in a notebook: fields with their sizes, not a million ids."""

    def __repr__(self) -> str:
        shown = (f"{field.name}={brief(getattr(self, field.name))}" for field in fields(cast(Any, self)))
        return f"{type(self).__name__}({', '.join(shown)})"


def brief(value: Any) -> str:
    """A value in a few words."""
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {value.shape}"
    if isinstance(value, pa.Table):
        return f"table of {value.num_rows:,} rows"
    if isinstance(value, dict) and len(value) <= BRIEF:
        return "{" + ", ".join(f"{key}: {brief(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, (dict, list, tuple)) and len(value) > BRIEF:
        return f"{type(value).__name__} of {len(value):,}"
    text = repr(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
