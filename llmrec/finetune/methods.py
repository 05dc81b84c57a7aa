"""MME-SID and what it is compared with: which parts and which mixer make an item's tokens.

Source: MME-SID Table 2 and section 5.3, E4SRec, CTRL. The formulas of Table 2 are our reading of the
descriptions; where two readings are possible, both are settings (me_mode, concat_mode).

    method      tokens of item i                                     scores
    mme_sid     MLP [a_c; q_c; a_v; q_v; a_t; q_t]                   frequency-aware fusion
    e4srec      a_c                                                  V h
    me          A [a_c; R] or a_c + A R, R a table of its own        V h
    concat      a_c, a_v, a_t: three tokens, or side by side         V h
    concat_mlp  MLP [a_c; a_v; a_t]                                  V h
    ctrl_mm     as concat_mlp, with InfoNCE(a_c, a_v) + (a_c, a_t)   V h
    se_sid      MLP [a_c; q_c]                                       V h + a_c h
    se_random   A R                                                  V h
    mme_random  MLP [a_c; R_c; a_v; R_v; a_t; R_t]                   frequency-aware fusion

R of mme_random has as many numbers per modality as that modality's code embeddings.
"""

from __future__ import annotations

from torch import Tensor, nn

from llmrec.errors import ConfigError
from llmrec.finetune.config import FinetuneConfig
from llmrec.finetune.item_inputs import (
    CodeSums,
    ItemTokens,
    LinearMix,
    Mlp,
    OneTokenEach,
    OwnTable,
    ProjectedVectors,
    SideBySide,
    SumOfParts,
)

WITH_CODES = ("mme_sid", "se_sid")
"""Methods that read semantic IDs."""


def item_tokens(
    config: FinetuneConfig,
    vectors: dict[str, Tensor],
    codes: dict[str, Tensor],
    codebooks: dict[str, Tensor],
    hidden_size: int,
) -> ItemTokens:
    """The item inputs of a method.

    Args:
        config: settings.
        vectors: frozen item vectors (N + 1, D_m) of the modalities that `modalities_of` names.
        codes: semantic IDs (N + 1, L) by modality.
        codebooks: code embeddings (L, K, D) by modality.
        hidden_size: H.

    Raises:
        ConfigError: widths that do not fit.
    """
    num_items = len(next(iter(vectors.values()))) - 1
    parts: dict[str, nn.Module] = {}
    aligned = config.ctrl_temperature if config.method == "ctrl_mm" else None
    width = hidden_size
    if config.method == "concat" and config.concat_mode == "feature":
        if hidden_size % len(vectors):
            raise ConfigError(
                f"finetune.concat_mode='feature' deals the model's width among {len(vectors)} modalities, "
                f"which must divide it, got {hidden_size}"
            )
        width = hidden_size // len(vectors)
    if config.method == "se_random":
        parts["own"] = OwnTable(num_items, config.own_dim, hidden_size)
        return ItemTokens(parts, SumOfParts())
    for name, table in vectors.items():
        parts[f"vectors_{name}"] = ProjectedVectors(table, width)
        if config.method in WITH_CODES:
            parts[f"codes_{name}"] = CodeSums(
                codes[name], codebooks[name], hidden_size if config.project_codes else None
            )
        elif config.method == "mme_random":
            dim = max(1, round(codebooks[name].numel() / num_items))
            parts[f"own_{name}"] = OwnTable(num_items, dim, hidden_size)
    if config.method == "me":
        added = config.me_mode == "sum"
        parts["own"] = OwnTable(num_items, config.own_dim, hidden_size if added else None)
    widths = [part.width for part in parts.values()]
    if config.method == "e4srec" or (config.method == "me" and config.me_mode == "sum"):
        mixer: nn.Module = SumOfParts()
    elif config.method == "me":
        mixer = LinearMix(widths, hidden_size)
    elif config.method == "concat":
        mixer = OneTokenEach() if config.concat_mode == "sequence" else SideBySide()
    else:
        expansion = len(parts) / 2 if config.mlp_expansion is None else config.mlp_expansion
        mixer = Mlp(widths, hidden_size, max(1, round(expansion * hidden_size)), config.mlp_out_activation)
    return ItemTokens(parts, mixer, alignment_temperature=aligned)
