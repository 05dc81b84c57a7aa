"""Settings that go with a provider, method or base model when `--set` puts another in its place.

They would have no effect any more, which is an error where a user sets them.
"""

from __future__ import annotations

from dataclasses import replace

from llmrec.collab.config import PROVIDER_FIELDS, TrainCollabConfig
from llmrec.finetune.config import LORA_FIELDS, FinetuneConfig
from llmrec.finetune.method_table import FREQUENCY_FIELDS, METHODS, method_of, without_effect
from llmrec.own import is_own


def exchanged_for(pairs: dict[str, str], path: str, now: str) -> str | None:
    """What pairs put in place of a setting; None if they leave it as it is."""
    new = pairs.get(path, now)
    return None if new == now else new


def collab_without_what_goes(collab: TrainCollabConfig, pairs: dict[str, str]) -> TrainCollabConfig:
    """The settings of train_collab without those of a provider that is exchanged."""
    old, new = collab.provider, exchanged_for(pairs, "train_collab.provider", collab.provider)
    if not new:
        return collab
    if old in PROVIDER_FIELDS and not any(path.startswith(f"train_collab.{old}.") for path in pairs):
        collab = replace(collab, **{old: type(getattr(collab, old))()})
    if collab.is_own and "train_collab.own" not in pairs:
        collab = replace(collab, own={}, provider="sasrec")
    if new == "precomputed":
        collab = TrainCollabConfig(provider=collab.provider)  # nothing is trained any more
    return collab


def finetune_without_what_goes(finetune: FinetuneConfig, pairs: dict[str, str]) -> FinetuneConfig:
    """The settings of finetune without those of a method or base model that is exchanged."""
    defaults = FinetuneConfig()
    idle: set[str] = set()
    if base := exchanged_for(pairs, "finetune.base_model", finetune.base_model):
        if finetune.is_mini:
            idle.add("mini")
        elif base == "mini":
            idle |= {"revision", *LORA_FIELDS, "quantize"}
    method = exchanged_for(pairs, "finetune.method", finetune.method)
    if method is not None:
        idle |= idle_with(method, pairs)
        if is_own(finetune.method) and "finetune.own" not in pairs:
            finetune = replace(finetune, method="mme_sid", own={}, ctrl_weight=defaults.ctrl_weight)
    if any(path.startswith("finetune.mini.") for path in pairs):
        idle.discard("mini")
    changes = {name: getattr(defaults, name) for name in idle if f"finetune.{name}" not in pairs}
    return replace(finetune, **changes)


def idle_with(method: str, pairs: dict[str, str]) -> set[str]:
    """Settings of finetune that have no effect with a method; none, for one that does not exist."""
    if method not in METHODS and not is_own(method):
        return set()
    idle = set(without_effect(method))
    if pairs.get("finetune.fusion", "auto") == "auto" and method_of(method).fusion != "frequency":
        idle |= {"fusion", *FREQUENCY_FIELDS}
    return idle
