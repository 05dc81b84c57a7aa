"""A trained MME-SID as a scorer: histories in, scores of the whole catalogue out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmrec import distributed, launched
from llmrec.artifacts import CollabEmbeddings, ContentEmbeddings, SemanticIds, check_same_catalog
from llmrec.config import from_dict
from llmrec.errors import ArtifactMismatchError
from llmrec.evaluation.rank import Scorer
from llmrec.finetune.adapter import Adapter
from llmrec.finetune.base_model import load_base, mini, shard
from llmrec.finetune.build import build_model, item_vectors, trainable
from llmrec.finetune.config import FinetuneConfig
from llmrec.finetune.model import MMESID
from llmrec.finetune.packing import PackedRows
from llmrec.finetune.prompt import Prompt
from llmrec.finetune.scaling import scale
from llmrec.folder_digest import weights_digest

TABLE_BLOCK = 4096


class CatalogueScores:
    """Scores of the whole catalogue from histories, with everything that can be computed once kept.

    Item tokens and the folded item matrix are (N + 1, H) tables, the instruction's keys and values are kept;
    a history is one row with one response.

    Args:
        model: the trained module; put into evaluation mode. Tables and scores are float32.
        run: what to call in its place, a wrapper that brings sharded weights together.
    """

    def __init__(self, model: MMESID, run: nn.Module | None = None) -> None:
        self.run = model if run is None else run
        self.run.eval()
        device = model.instruction.device
        with torch.no_grad():
            item = torch.arange(model.item_scores.num_rows, device=device)
            tables = [self.run("tables", block) for block in item.split(TABLE_BLOCK)]
            self.tokens, self.matrix = (torch.cat(parts) for parts in zip(*tables))
            self.matrix = self.matrix.float()
            shared = model.share_instruction and not model.stream
            self.instruction = self.run("encode_instruction") if shared else None

    @torch.no_grad()
    def __call__(self, history: Tensor) -> Tensor:
        """Scores float32 (B, N + 1) of right-padded histories int64 (B, T); column 0 means nothing."""
        return self.read_out(history) @ self.matrix.T

    @torch.no_grad()
    def read_out(self, history: Tensor) -> Tensor:
        """Read-out vectors float32 (B, H) of right-padded histories int64 (B, T)."""
        length = (history > 0).sum(dim=1, keepdim=True)
        rows = PackedRows(items=history, history=length, target=length[:, 0])
        return self.run("hidden", rows, self.tokens, None, self.instruction).float()


def scorer_of(model: MMESID, config: FinetuneConfig, run: nn.Module | None = None) -> Scorer:
    """The module as it is now, to be ranked under its method's name; `run` as in `CatalogueScores`."""
    return Scorer(
        name=config.method,
        score=CatalogueScores(model, run),
        max_history=config.max_history,
        max_items=max(1, config.micro_batch_tokens // model.item_tokens.tokens_per_item),
    )


def load_scorer(
    adapter: Adapter,
    collab: CollabEmbeddings,
    content: ContentEmbeddings,
    ids: SemanticIds,
    device: torch.device | None = None,
    *,
    spread: bool = False,
) -> Scorer:
    """Rebuild the trained module from its artefacts, on a device (None: this process's).

    Args:
        adapter: what was trained.
        collab: what it was trained with, as the next two.
        content: see above.
        ids: see above.
        device: where to score.
        spread: under FSDP, spread the weights over all processes, which must all call, here and at scoring,
            equally often; a whole base model may not fit one GPU.

    Raises:
        ArtifactMismatchError: if the artefacts do not belong together, or weights are missing or too many.
    """
    check_same_catalog(adapter, collab, content, ids)
    spread = spread and launched.uses_fsdp()
    device = device or distributed.device()
    config = for_scoring(from_dict(FinetuneConfig, adapter.settings["config"]))
    if not config.is_mini and adapter.settings.get("revision"):
        # The commit that was trained on, whatever has come since.
        config = replace(config, revision=adapter.settings["revision"])
    prompt = Prompt(**adapter.settings["prompt"])
    if adapter.base:
        base: Any = mini(adapter.base_config)
        base.load_state_dict(adapter.base)
    else:
        from llmrec.finetune.lora import set_lora_weights

        check_base(config.base_model, adapter.settings.get("base_digest"))
        base = load_base(config, prompt, device, spread=spread)
        set_lora_weights(base, adapter.lora)
    heads = dict(adapter.heads)
    train_count = heads.pop("train_count")
    vectors = scale(item_vectors(config, collab, content, ids), config.vectors, adapter.scaling)
    added = adapter.settings.get("num_added", 0)
    model = build_model(
        config, base, prompt, vectors, ids, train_count, device, spread=spread, num_added=added
    )
    set_heads(model, heads)
    if spread:
        shard(model, model.base)
    return scorer_of(model, config)


def check_base(base_model: str, digest: str | None) -> None:
    """Raise ArtifactMismatchError if a local folder holds another model than the one that was trained on."""
    folder = Path(base_model)
    if digest is not None and folder.is_dir() and weights_digest(folder) != digest:
        raise ArtifactMismatchError(
            f"{folder} holds another model than the one that was fine-tuned; put that one there, or "
            "fine-tune this one"
        )


def for_scoring(config: FinetuneConfig) -> FinetuneConfig:
    """The settings without those that concern training or the machine that it ran on."""
    names = ("rows", "attention", "compile", "kernels", "checkpoint_activations", "share_instruction")
    defaults: dict[str, Any] = {name: FinetuneConfig.__dataclass_fields__[name].default for name in names}
    return replace(config, **defaults)


def heads_of(model: MMESID) -> dict[str, Tensor]:
    """Trained weights outside the base model, by name; shared ones once."""
    return {name: value for name, value in trainable(model).items() if not name.startswith("base.")}


def set_heads(model: MMESID, heads: dict[str, Tensor]) -> None:
    """Inverse of `heads_of`; names and shapes must match exactly."""
    own = heads_of(model)
    if own.keys() != heads.keys():
        raise ArtifactMismatchError(
            f"heads.safetensors does not fit the model: missing {sorted(own.keys() - heads.keys())}, "
            f"unknown {sorted(heads.keys() - own.keys())}"
        )
    with torch.no_grad():
        for name, value in heads.items():
            if own[name].shape != value.shape:
                raise ArtifactMismatchError(
                    f"heads.safetensors: {name} has shape {tuple(value.shape)}, expected "
                    f"{tuple(own[name].shape)}"
                )
            own[name].copy_(value)
