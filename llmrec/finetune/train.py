"""finetune: from the artefacts before to an adapter; the loop itself is in `llmrec.finetune.trainer`."""

from __future__ import annotations

import dataclasses
import logging
import tempfile
import time
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from llmrec import distributed, global_state, launched, machine
from llmrec.artifacts import CollabEmbeddings, ContentEmbeddings, SemanticIds, check_same_catalog
from llmrec.checkpoint import checkpoints_here
from llmrec.config import from_dict
from llmrec.data.batches import sent
from llmrec.errors import ArtifactMismatchError, ConfigError
from llmrec.finetune import analysis, base_model, build
from llmrec.finetune.adapter import Adapter
from llmrec.finetune.config import FinetuneConfig
from llmrec.finetune.model import MMESID
from llmrec.finetune.scaling import fit_scaling, scale
from llmrec.finetune.scoring import CatalogueScores, for_scoring, load_scorer
from llmrec.finetune.steps import train_counts
from llmrec.finetune.trainer import Trainer
from llmrec.interactions import Interactions
from llmrec.progress import progress

logger = logging.getLogger("llmrec")

ALIGN_ITEMS = 1024


@distributed.every_process
def finetune(
    config: FinetuneConfig,
    data: Interactions,
    collab: CollabEmbeddings,
    content: ContentEmbeddings,
    ids: SemanticIds,
) -> Adapter:
    """Fine-tune the base model on the train split.

    Every training item is a target (of the last `max_targets` of a user, and with `skip_empty` all but a
    user's first); its history is all that came before it in the train split, up to `max_history` items
    (MME-SID section 4.3; the official release trains the same instances, except that it pads histories of 0
    and 1 items to two slots).

    Raises:
        ConfigError: settings that cannot work with these inputs, or that would validate on items which the
            collaborative vectors were learned from.
        TrainingError: the loss became NaN or infinite.
    """
    check_same_catalog(data, collab, content, ids)
    refuse_what_cannot_be_measured(config, data, collab)
    device = distributed.device()
    global_state.seed_everything(config.seed)
    prompt = base_model.load_prompt(config)
    spread = launched.uses_fsdp()
    base = base_model.load_base(config, prompt, device, spread=spread)
    encoded = build.item_vectors(config, collab, content, ids)
    scaling = fit_scaling(encoded, config.vectors)
    vectors = scale(encoded, config.vectors, scaling)
    train_count = torch.from_numpy(train_counts(config, data))
    model = build.build_model(config, base, prompt, vectors, ids, train_count, device, spread=spread)
    longest = data.targets("train", "valid", "test", max_history=config.max_history)
    items = int((longest.stop - longest.start).max(initial=0)) * model.item_tokens.tokens_per_item
    base_model.check_context(config, base, len(prompt.instruction) + items + len(prompt.response))
    align_seconds = align_first(config, model, data.num_items) if config.ctrl_stage == "two" else 0.0
    before = analysis.taus(model, data, collab.vectors) if config.analyse and launched.is_main() else {}
    trainer = Trainer(config, data, model, checkpoints_here(("analyse",)))
    trainer.run()
    expected = trainer.sample_scores()
    trainer.engine.close()
    heads, weights = weights_of(config, base, trainer.engine.weights())
    adapter = Adapter(
        catalog=data.catalog,
        settings=build.settings_of(config, prompt, base),
        heads={**heads, "train_count": train_count},
        scaling=scaling,
        metrics=trainer.metrics() | {"align_seconds": round(align_seconds, 3)},
        log=trainer.state.log,
        **weights,
    )
    # What was trained makes room for what is loaded, which may be as large.
    del trainer, model, base
    machine.make_room()
    if launched.is_main() or spread:
        loaded = check_saved(adapter, expected, collab, content, ids)
        if spread:
            cast(FSDPModule, loaded).unshard()
        if config.analyse and launched.is_main():
            found = {
                "tau": {"before": before, "after": analysis.taus(loaded, data, collab.vectors)},
                "spectra": analysis.spectra(loaded, collab.vectors),
            }
            adapter = dataclasses.replace(adapter, analysis=found)
    return adapter


def refuse_what_cannot_be_measured(
    config: FinetuneConfig, data: Interactions, collab: CollabEmbeddings
) -> None:
    """Refuse to validate on what was learned from, and to choose an epoch by nothing.

    Raises:
        ConfigError: that was asked for.
    """
    if collab.knows_valid and config.eval_every_epochs:
        raise ConfigError(
            "train_collab.include_valid made the collaborative vectors from validation items, so these can "
            "measure nothing here; set finetune.eval_every_epochs=0 and finetune.select=last"
        )
    if config.select == "valid" and not len(data.targets("valid")):
        raise ConfigError(
            "finetune.select='valid' needs validation targets to choose the epoch by, and the data set has "
            "none; set finetune.select=last, or change the split"
        )


def weights_of(
    config: FinetuneConfig, base: Any, weights: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What was trained, on the host: beside the base model, and of it, as an `Adapter` holds them."""
    trained = {name: value.cpu() for name, value in weights.items()}
    heads = {name: value for name, value in trained.items() if not name.startswith("base.")}
    of_base = {name.removeprefix("base."): trained[name] for name in trained.keys() - heads.keys()}
    if config.is_mini:
        return heads, {"base": of_base, "base_config": base.config.to_dict()}
    from llmrec.finetune.lora import lora_weights

    lora, lora_config = lora_weights(base, config, of_base)
    return heads, {"lora": lora, "lora_config": lora_config}


def check_saved(
    adapter: Adapter,
    expected: tuple[Tensor, Tensor],
    collab: CollabEmbeddings,
    content: ContentEmbeddings,
    ids: SemanticIds,
) -> MMESID:
    """Save, load and compare scores, so that no run ends with weights that cannot be loaded. Under FSDP every
    process must call.

    Returns:
        The loaded model.

    Raises:
        ArtifactMismatchError: if the loaded model scores differently.
    """
    history, scores = expected
    with tempfile.TemporaryDirectory() as folder:
        adapter.save(Path(folder))
        loaded = load_scorer(Adapter.load(Path(folder)), collab, content, ids, spread=True)
    difference = (loaded.score(history) - scores)[:, 1:].abs().max().item()
    config = from_dict(FinetuneConfig, adapter.settings["config"])
    same = config == for_scoring(config)
    # Another layout or kernel sums in another order, which bfloat16 rounds by up to a hundredth.
    share = 3e-2 if config.precision == "bf16" and not same else 1e-3
    exact = history.device.type == "cpu" and same
    tolerance = 0.0 if exact else share * scores.abs().max().item()
    if not difference <= tolerance:
        raise ArtifactMismatchError(
            f"the saved adapter scores differently from the trained one (largest difference {difference:g})"
        )
    logger.info("finetune: saved, loaded and compared; largest score difference %g", difference)
    return cast(MMESID, cast(CatalogueScores, loaded.score).run)


def align_first(config: FinetuneConfig, model: MMESID, num_items: int) -> float:
    """Train the item tokens' alignment loss alone, over all items, before the language model is tuned.

    Returns:
        Seconds.
    """
    begun = time.perf_counter()
    parameters = [value for value in model.item_tokens.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=0.0)
    rng = np.random.default_rng(config.seed)
    device = model.instruction.device
    for _ in progress(range(config.ctrl_epochs), "align", unit="epoch"):
        order = torch.from_numpy(rng.permutation(num_items) + 1)
        # Blocks of nearly the same size: an item alone would have no negatives.
        for items in order.tensor_split(-(-num_items // ALIGN_ITEMS)):
            pairs = [sent(pair, device) for pair in model.item_tokens.pairs(items)]
            loss = model.item_tokens.alignment(pairs)
            if loss.requires_grad:
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
    logger.info("finetune: alignment before fine-tuning, loss %.4f", float(loss.detach()))
    return time.perf_counter() - begun
