"""What settings have to know of each method. Imports no torch: they are checked before anything starts.

How their item tokens are made is in `llmrec.finetune.methods`, under the same names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from llmrec.own import is_own

MethodName = Literal[
    "mme_sid",
    "e4srec",
    "me",
    "concat",
    "concat_mlp",
    "ctrl_mm",
    "se_sid",
    "se_random",
    "mme_random",
]

FusionName = Literal["frequency", "equal", "sum", "target"]


@dataclass(frozen=True, kw_only=True)
class Method:
    """What settings have to know of a method.

    Attributes:
        fusion: what finetune.fusion='auto' means.
        modalities: those it reads: all that have semantic IDs, the collaborative one, or at least two.
        reads_codes: whether it puts code embeddings, as wide as the base model, into tokens.
        settings: of finetune, those that it shares with some methods only.
    """

    fusion: FusionName = "target"
    modalities: Literal["all", "collab", "several"] = "all"
    reads_codes: bool = False
    settings: tuple[str, ...] = ()


MLP = ("mlp_expansion", "mlp_out_activation")
CODES = ("project_codes", "random_codes")
CTRL = ("ctrl_weight", "ctrl_temperature", "ctrl_stage", "ctrl_epochs")

METHODS: dict[str, Method] = {
    "mme_sid": Method(fusion="frequency", reads_codes=True, settings=(*MLP, *CODES)),
    "e4srec": Method(modalities="collab"),
    "me": Method(modalities="collab", settings=("me_mode", "own_dim")),
    "concat": Method(modalities="several", settings=("concat_mode",)),
    "concat_mlp": Method(modalities="several", settings=MLP),
    "ctrl_mm": Method(modalities="several", settings=(*MLP, *CTRL)),
    "se_sid": Method(fusion="sum", modalities="collab", reads_codes=True, settings=(*MLP, *CODES)),
    "se_random": Method(modalities="collab", settings=("own_dim",)),
    "mme_random": Method(fusion="frequency", settings=MLP),
}

assert set(METHODS) == set(get_args(MethodName))

OF_THE_USER = Method(settings=("own", "ctrl_weight"))
"""A method of the user's own, package.module:Class."""

SPECIAL = frozenset(name for method in (*METHODS.values(), OF_THE_USER) for name in method.settings)
"""Settings of finetune that only some methods have."""

FREQUENCY_FIELDS = ("fusion_temperature", "fusion_weights", "count_valid")
"""Settings of finetune that fusion='frequency' alone has."""


def method_of(name: str) -> Method:
    """What is known of a method.

    Raises:
        KeyError: there is none of that name.
    """
    return OF_THE_USER if is_own(name) else METHODS[name]


def without_effect(name: str) -> list[str]:
    """Settings of finetune that some methods have, and this one has not."""
    return sorted(SPECIAL.difference(method_of(name).settings))
