"""What helps codes that came out badly, by the settings that made them."""

from __future__ import annotations

from typing import Any


def remedies(settings: dict[str, Any]) -> dict[str, str]:
    """What helps against unused codes, lost distances and collisions, without what is set already."""

    def off(name: str, value: Any) -> list[str]:
        return [] if settings.get(name) == value else [f"{name}={str(value).lower()}"]

    trained = settings.get("method") != "rkmeans"
    updates = off("codebook_update", "ema") if trained else []
    starts = off("init", "kmeans") if trained and settings.get("init") != "kmeans_constrained" else []
    unused = ["fewer codes", *starts, *(off("restart_dead_codes", True) if trained else []), *updates]
    closer = [*off("reconstruction", "mse"), *updates] if trained else []
    apart = ["more codes", "more levels", *off("repair_collisions", True)]
    distances = [*([" with ".join(closer)] if closer else []), *off("method", "rkmeans")]
    return {
        "unused": f"; {either(unused)} help",
        "distances": f"; {either(distances)} may keep more" if distances else "",
        "collisions": f"; {either(apart)} tell them apart",
    }


def either(choices: list[str]) -> str:
    """a; a or b; a, b or c."""
    return " or ".join(filter(None, (", ".join(choices[:-1]), choices[-1])))
