"""Which modalities a method uses. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable

from llmrec.errors import ConfigError
from llmrec.finetune.config import FinetuneConfig
from llmrec.finetune.method_table import method_of

MODALITY_ORDER = ("collab", "image", "text")
"""The published concatenation is collaborative, image, text."""


def modalities_of(config: FinetuneConfig, available: Iterable[str]) -> tuple[str, ...]:
    """The modalities a method uses, in the published order.

    Args:
        config: names the method.
        available: those that have semantic IDs.

    Raises:
        ConfigError: the method needs one that is not there.
    """
    there, wanted = set(available), method_of(config.method).modalities
    names = tuple(name for name in MODALITY_ORDER if name in there)
    if wanted == "collab":
        names = tuple(name for name in names if name == "collab")
        if not names:
            raise ConfigError(
                f"finetune.method={config.method!r} needs collaborative vectors with semantic IDs"
            )
    if wanted == "several" and len(names) < 2:
        raise ConfigError(
            f"finetune.method={config.method!r} puts modalities together and needs at least two, got "
            f"{', '.join(names)}; encode texts or pictures, or use finetune.method=e4srec"
        )
    return names
