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

A method in a package of your own needs nothing here: it is a subclass of `ItemTokens` whose constructor takes
`ItemInputs` and its settings by name, called ``finetune.method=package.module:Class finetune.own=width=16``.
To add one to this package: a function here, in `METHODS`, and what settings have to know of it in
`llmrec.finetune.method_table`; a row in `compare_cells.py` puts it into comparisons.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn

from llmrec.errors import ConfigError
from llmrec.finetune.config import FinetuneConfig
from llmrec.finetune.item_inputs import (
    CodeSums,
    ItemInputs,
    ItemTokens,
    LinearMix,
    Mlp,
    OneTokenEach,
    OwnTable,
    ProjectedVectors,
    SideBySide,
    SumOfParts,
)
from llmrec.own import check_takes, is_own, own_class

Parts = dict[str, nn.Module]


def projected(inputs: ItemInputs) -> Parts:
    """a_m of every modality, H wide."""
    return {
        f"vectors_{name}": ProjectedVectors(table, inputs.hidden_size)
        for name, table in inputs.vectors.items()
    }


def mlp(parts: Parts, inputs: ItemInputs, config: FinetuneConfig) -> Mlp:
    """The item MLP over these parts (MME-SID Eq. 13)."""
    widths = widths_of(parts)
    expansion = len(widths) / 2 if config.mlp_expansion is None else config.mlp_expansion
    inner = max(1, round(expansion * inputs.hidden_size))
    return Mlp(widths, inputs.hidden_size, inner, config.mlp_out_activation)


def widths_of(parts: Parts) -> list[int]:
    """Of what parts give."""
    return [cast(int, part.width) for part in parts.values()]


def with_codes(inputs: ItemInputs, config: FinetuneConfig) -> ItemTokens:
    """mme_sid, and se_sid on one modality."""
    width = inputs.hidden_size if config.project_codes else None
    parts: Parts = {}
    for name, table in inputs.vectors.items():
        parts[f"vectors_{name}"] = ProjectedVectors(table, inputs.hidden_size)
        parts[f"codes_{name}"] = CodeSums(inputs.codes[name], inputs.codebooks[name], width)
    return ItemTokens(parts, mlp(parts, inputs, config))


def e4srec(inputs: ItemInputs, config: FinetuneConfig) -> ItemTokens:
    return ItemTokens(projected(inputs), SumOfParts())


def me(inputs: ItemInputs, config: FinetuneConfig) -> ItemTokens:
    added = config.me_mode == "sum"
    parts = projected(inputs)
    parts["own"] = OwnTable(inputs.num_items, config.own_dim, inputs.hidden_size if added else None)
    return ItemTokens(parts, SumOfParts() if added else LinearMix(widths_of(parts), inputs.hidden_size))


def concat(inputs: ItemInputs, config: FinetuneConfig) -> ItemTokens:
    if config.concat_mode == "sequence":
        return ItemTokens(projected(inputs), OneTokenEach(len(inputs.vectors)))
    shares = shares_of_width(inputs.hidden_size, len(inputs.vectors))
    if not all(shares):
        raise ConfigError(
            f"finetune.concat_mode='feature' deals the base model's {inputs.hidden_size} dimensions among "
            f"{len(inputs.vectors)} modalities, and there is not one for each"
        )
    parts: Parts = {
        f"vectors_{name}": ProjectedVectors(table, share)
        for (name, table), share in zip(inputs.vectors.items(), shares)
    }
    return ItemTokens(parts, SideBySide())


def shares_of_width(width: int, parts: int) -> list[int]:
    """A token's dimensions, dealt as evenly as they go: where some are left over, the first parts get them.

    Llama-3-8B's 4,096 are not a multiple of three modalities either; the paper does not say what then.
    """
    share, left = divmod(width, parts)
    return [share + (part < left) for part in range(parts)]


def concat_mlp(inputs: ItemInputs, config: FinetuneConfig) -> ItemTokens:
    parts = projected(inputs)
    return ItemTokens(parts, mlp(parts, inputs, config))


def ctrl_mm(inputs: ItemInputs, config: FinetuneConfig) -> ItemTokens:
    parts = projected(inputs)
    mixer = mlp(parts, inputs, config)
    return ItemTokens(parts, mixer, alignment_temperature=config.ctrl_temperature)


def se_random(inputs: ItemInputs, config: FinetuneConfig) -> ItemTokens:
    return ItemTokens({"own": OwnTable(inputs.num_items, config.own_dim, inputs.hidden_size)}, SumOfParts())


def mme_random(inputs: ItemInputs, config: FinetuneConfig) -> ItemTokens:
    parts: Parts = {}
    for name, table in inputs.vectors.items():
        parts[f"vectors_{name}"] = ProjectedVectors(table, inputs.hidden_size)
        # Items that were added change no width.
        dim = max(1, round(inputs.codebooks[name].numel() / (inputs.num_items - inputs.num_added)))
        parts[f"own_{name}"] = OwnTable(inputs.num_items, dim, inputs.hidden_size)
    return ItemTokens(parts, mlp(parts, inputs, config))


METHODS: dict[str, Callable[[ItemInputs, FinetuneConfig], ItemTokens]] = {
    "mme_sid": with_codes,
    "e4srec": e4srec,
    "me": me,
    "concat": concat,
    "concat_mlp": concat_mlp,
    "ctrl_mm": ctrl_mm,
    "se_sid": with_codes,
    "se_random": se_random,
    "mme_random": mme_random,
}
"""The item tokens of each method, by its name in `llmrec.finetune.method_table`."""


def item_tokens(config: FinetuneConfig, inputs: ItemInputs) -> ItemTokens:
    """The item tokens of the method that the settings name.

    Raises:
        ConfigError: widths that do not fit, or a method of the user's own that does not do what it must.
    """
    if not is_own(config.method):
        return METHODS[config.method](inputs, config)
    kind = tokens_class(config.method)
    check_takes(kind, config.method, "finetune.own", inputs, **config.own)
    where, device = f"finetune.method={config.method}", next(iter(inputs.vectors.values())).device
    tokens = kind(inputs, **config.own).to(device)
    check_shape(tokens.eval(), inputs, where)
    if device.type != "meta":
        check_all_is_used(tokens, inputs, where)
        with torch.random.fork_rng():
            torch.manual_seed(torch.initial_seed() + 1)
            again = kind(inputs, **config.own).to(device)
            check_comes_again(tokens, again, where)
            check_same_tokens(tokens, again, inputs, where)
    return tokens.train()


def tokens_class(name: str) -> Any:
    """The `ItemTokens` of the user's own, package.module:Class.

    Raises:
        ConfigError: it cannot be imported, or is none.
    """
    kind = own_class(name, "finetune.method")
    if not issubclass(kind, ItemTokens):
        raise ConfigError(
            f"finetune.method={name} must be a subclass of llmrec.finetune.item_inputs.ItemTokens"
        )
    return kind


def check_comes_again(tokens: ItemTokens, again: ItemTokens, where: str) -> None:
    """Raise ConfigError unless what is not trained, so not saved, comes out the same when made again."""
    for name, kept in {**dict(tokens.named_buffers()), **dict(tokens.named_parameters())}.items():
        other = again.get_buffer(name) if name in dict(again.named_buffers()) else again.get_parameter(name)
        if not kept.requires_grad and not torch.equal(kept, other):
            raise ConfigError(
                f"{where}: {name} is not trained, so it is not saved, and is another one when the class is "
                "made again; make it from the inputs, or with a generator of its own"
            )


@torch.no_grad()
def check_same_tokens(tokens: ItemTokens, again: ItemTokens, inputs: ItemInputs, where: str) -> None:
    """Raise ConfigError unless tokens are the same every time, and the same of another object that has these
    trained weights and was shown items in training mode."""
    item = torch.arange(1, min(64, inputs.num_items) + 1).to(next(iter(inputs.vectors.values())).device)
    found = tokens(item).float()
    tolerance = 1e-3 * found.abs().max()
    if not (found - tokens(item).float()).abs().max() <= tolerance:
        raise ConfigError(
            f"{where}: tokens are other ones when they are made again; draw nothing random once it is in "
            "evaluation mode (F.dropout asks for training=self.training)"
        )
    for name, weight in tokens.named_parameters():
        again.get_parameter(name).copy_(weight)
    again.train()(item)
    if not (found - again.eval()(item).float()).abs().max() <= tolerance:
        raise ConfigError(
            f"{where}: made again with the same trained weights it gives other tokens, as it would once it "
            "is loaded; all but trained parameters must come out of the constructor, and training must "
            "change nothing else (as it does BatchNorm's running means, which are not saved)"
        )


def check_all_is_used(tokens: ItemTokens, inputs: ItemInputs, where: str) -> None:
    """Raise ConfigError unless every trained parameter has a part in tokens or in their own loss: several
    processes would wait for its gradient."""
    item = torch.arange(1, min(64, inputs.num_items) + 1)
    trained = {name: value for name, value in tokens.named_parameters() if value.requires_grad}
    found = tokens(item.to(next(iter(inputs.vectors.values())).device)).float().sum()
    if tokens.has_alignment:
        pairs = [pair.to(found.device) for pair in tokens.pairs(item)]
        found = found + tokens.alignment(pairs)
    if not trained:
        return
    gradients = torch.autograd.grad(found, list(trained.values()), allow_unused=True)
    unused = [name for name, gradient in zip(trained, gradients) if gradient is None]
    if unused:
        raise ConfigError(
            f"{where}: {', '.join(unused)} has no part in the tokens; leave it out, or set its requires_grad "
            "to False"
        )


@torch.no_grad()
def check_shape(tokens: ItemTokens, inputs: ItemInputs, where: str) -> None:
    """Raise ConfigError unless tokens have the shape that the base model takes, and parts the names by which
    scores and reports know them."""
    for name, part in tokens.parts.items():
        prefix = {ProjectedVectors: "vectors_", CodeSums: "codes_"}.get(type(part))
        if prefix and name not in {f"{prefix}{modality}" for modality in inputs.vectors}:
            raise ConfigError(
                f"{where}: a {type(part).__name__} must be called {prefix}MODALITY, with one of "
                f"{', '.join(inputs.vectors)}, got {name}"
            )
    item = torch.arange(min(3, inputs.num_items + 1), device=next(iter(inputs.vectors.values())).device)
    found = tuple(tokens(item).shape)
    per_item = (tokens.tokens_per_item,) if tokens.tokens_per_item > 1 else ()
    if found != (len(item), *per_item, inputs.hidden_size):
        raise ConfigError(
            f"{where} makes {' x '.join(map(str, found))} numbers of {len(item)} items, expected "
            f"{' x '.join(map(str, (len(item), *per_item, inputs.hidden_size)))} (a mixer that makes several "
            "tokens an item, two or more, says how many in its attribute tokens_per_item)"
        )
