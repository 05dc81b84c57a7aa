"""From settings and artefacts to the MME-SID module, for training and for scoring alike."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from llmrec.artifacts import CollabEmbeddings, ContentEmbeddings, SemanticIds
from llmrec.config import unhandled
from llmrec.errors import ConfigError
from llmrec.finetune.base_model import head_width, set_up_base, stream_and_flex
from llmrec.finetune.config import FinetuneConfig
from llmrec.finetune.fusion import EqualWeights, FrequencyGate, ItemScores
from llmrec.finetune.item_inputs import CodeSums, ItemInputs, ItemTokens, OwnTable, ProjectedVectors
from llmrec.finetune.method_table import method_of
from llmrec.finetune.methods import item_tokens
from llmrec.finetune.modalities import modalities_of
from llmrec.finetune.model import MMESID
from llmrec.finetune.prompt import Prompt
from llmrec.folder_digest import revision_of, weights_digest


def item_vectors(
    config: FinetuneConfig, collab: CollabEmbeddings, content: ContentEmbeddings, ids: SemanticIds
) -> dict[str, np.ndarray]:
    """Frozen vectors of the modalities that have semantic IDs and that the method uses, as encoded."""
    known = {"collab": collab.vectors, **content.vectors}
    return {name: known[name] for name in modalities_of(config, ids.modalities)}


def build_model(
    config: FinetuneConfig,
    base: Any,
    prompt: Prompt,
    vectors: dict[str, np.ndarray],
    ids: SemanticIds,
    train_count: Tensor,
    device: torch.device,
    *,
    spread: bool = False,
    num_added: int = 0,
) -> MMESID:
    """Put the parts together on a device.

    Args:
        config: settings.
        base: the decoder, see `load_base`.
        prompt: the prompt in its token ids.
        vectors: float32 (N + 1, D_m) by modality, scaled; those that the method does not use are left out.
        ids: codes and codebooks.
        train_count: int64 (N + 1,).
        device: where everything is put.
        spread: leave the base model where it is, for `base_model.shard` to move block by block: a whole one
            may not fit.
        num_added: how many of the items came after training.
    """
    width = base.config.hidden_size
    vectors = {name: vectors[name] for name in modalities_of(config, tuple(vectors))}
    frozen = {name: torch.from_numpy(array).to(device) for name, array in vectors.items()}
    codes = {name: torch.from_numpy(ids.codes[name]).to(device) for name in vectors}
    given = ItemInputs(
        vectors=frozen,
        codes=codes,
        codebooks=code_embeddings(config, vectors, ids, width),
        hidden_size=width,
        num_added=num_added,
    )
    tokens = item_tokens(config, given)
    scores = item_scores(config, tokens, given, train_count)
    stream, flex = stream_and_flex(config, device, head_width(base))
    set_up_base(config, base, flex)
    model = MMESID(
        base,
        tokens,
        scores,
        torch.tensor(prompt.instruction, dtype=torch.long),
        torch.tensor(prompt.response, dtype=torch.long),
        share_instruction=stream or (config.share_instruction and config.layout == "packed"),
        stream=stream,
        flex=flex,
        min_slots=2 if config.pad_quirk else 0,
        loss=config.loss,
        mask_pad=config.mask_pad,
        precision=config.precision,
        dropout_rate=config.dropout_rate,
        alignment_weight=config.ctrl_weight if config.ctrl_stage == "joint" else 0.0,
    )
    if spread:
        for part in (model.item_tokens, model.item_scores):
            part.to(device)
        model.instruction, model.response = model.instruction.to(device), model.response.to(device)
        return model
    return model.to(device)


def code_embeddings(
    config: FinetuneConfig, names: Iterable[str], ids: SemanticIds, width: int
) -> dict[str, Tensor]:
    """Initial code embeddings by modality: the codebooks, or random ones of their shape.

    Raises:
        ConfigError: they are not as wide as the base model, and nothing is there to project them.
    """
    tables = {name: torch.from_numpy(ids.codebooks[name]) for name in names}
    if config.random_codes:
        tables = {name: torch.randn_like(table) * 0.02 for name, table in tables.items()}
    widths = sorted({table.shape[-1] for table in tables.values()})
    if method_of(config.method).reads_codes and widths != [width] and not config.project_codes:
        raise ConfigError(
            f"code embeddings are {', '.join(map(str, widths))} wide and the base model {width}: set "
            f"learn_semantic_ids.code_dim={width}, or finetune.project_codes=true"
        )
    return tables


def item_scores(
    config: FinetuneConfig, tokens: ItemTokens, given: ItemInputs, train_count: Tensor
) -> ItemScores:
    """What scores items, of the sources and the gate that `config.fusion_used` names.

    Raises:
        ConfigError: the fusion asks for what these tokens or these items do not have.
    """
    width, fusion = given.hidden_size, config.fusion_used
    if fusion == "target":
        return ItemScores(given.vectors, nn.ModuleDict(), nn.Identity(), width, config.target_std)
    if fusion == "frequency" and (train_count[1:] == train_count[1]).all():
        raise ConfigError(
            f"all items have {int(train_count[1])} training interactions, so there is no frequency to "
            "fuse by; set finetune.fusion=equal"
        )
    maps = tokens.projections
    if not maps or any(linear.out_features != width for linear in maps.values()):
        raise ConfigError(
            f"finetune.fusion={config.fusion!r} scores with the maps of frozen vectors to the model's "
            f"width ({width}), which these item tokens do not have; set finetune.fusion=target"
        )
    num_items, sources = len(train_count) - 1, 1 + len(maps)
    gate: nn.Module
    if fusion == "frequency":
        add_first = config.fusion_weights == "modalities"
        gate = FrequencyGate(train_count, sources, config.fusion_temperature, add_first=add_first)
    elif fusion == "equal":
        gate = EqualWeights(num_items, sources)
    elif fusion == "sum":
        gate = EqualWeights(num_items, sources, weight=1.0)
    else:
        unhandled(fusion)
    return ItemScores(given.vectors, maps, gate, width, config.target_std)


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable parameters by name; shared ones once."""
    return {name: value for name, value in module.named_parameters() if value.requires_grad}


def parameter_counts(model: MMESID) -> dict[str, int]:
    """Trainable parameters by part, and all parameters of the base model."""

    def count(parameters: Any) -> int:
        return sum(parameter.numel() for parameter in parameters)

    def sized(kind: type) -> int:
        return sum(count(part.parameters()) for part in tokens.parts.values() if isinstance(part, kind))

    tokens = model.item_tokens
    gate = model.item_scores.gate
    return {
        "base_trainable": count(trainable(model.base).values()),
        "base_total": count(model.base.parameters()),
        "projections": sized(ProjectedVectors),
        "code_embeddings": sized(CodeSums),
        "own_tables": sized(OwnTable),
        "other_parts": sum(
            count(part.parameters())
            for part in tokens.parts.values()
            if not isinstance(part, (ProjectedVectors, CodeSums, OwnTable))
        ),
        "item_mlp": count(tokens.mixer.parameters()),
        "target_table": model.item_scores.target_table.numel(),
        "gate": count(gate.parameters()),
        "trainable": count(trainable(model).values()),
    }


def flops_per_token(model: MMESID) -> float:
    """Floating-point operations a token costs in the base model's linear layers, forward and backward: 4 for
    a frozen weight, 6 for a trained one."""
    return float(
        sum(
            (6 if module.weight.requires_grad else 4) * module.in_features * module.out_features
            for module in model.base.modules()
            if isinstance(module, nn.Linear)
        )
    )


def settings_of(config: FinetuneConfig, prompt: Prompt, base: Any) -> dict[str, Any]:
    """What `scoring.load_scorer` needs beside the weights."""
    local = not config.is_mini and Path(config.base_model).is_dir()
    return {
        "config": asdict(config),
        "base_digest": weights_digest(Path(config.base_model)) if local else None,
        "prompt": asdict(prompt),
        "revision": None if config.is_mini else revision_of(config.base_model, config.revision),
        "hidden_size": base.config.hidden_size,
    }
