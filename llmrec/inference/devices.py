"""Where a recommender computes."""

from __future__ import annotations

import torch

from llmrec.errors import ConfigError


def usable(device: str | torch.device) -> torch.device:
    """A device by its name.

    Raises:
        ConfigError: there is none of that name that torch can use here.
    """
    try:
        found = torch.device(device)
    except RuntimeError:
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        raise ConfigError(f"device={str(device)!r}: expected cpu, cuda or a GPU by its number such as cuda:1")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device={str(device)!r}: there is no GPU that torch can use here; leave it out"
            if not torch.cuda.device_count()
            else f"device={str(device)!r}: torch sees {torch.cuda.device_count()} GPUs here, counted from 0"
        )
    return found


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
