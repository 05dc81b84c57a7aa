"""evaluate: rank the whole catalogue for every user and write down what came out."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch

from llmrec import distributed, tracking
from llmrec.artifacts import CollabEmbeddings, ContentEmbeddings, Report, SemanticIds, check_same_catalog
from llmrec.errors import DataError
from llmrec.evaluation import analysis, report
from llmrec.evaluation.config import EvaluateConfig
from llmrec.evaluation.metrics import summarise
from llmrec.evaluation.rank import Ranking, Scorer, popularity, rank_targets, rank_users, top_items
from llmrec.evaluation.rankings import table_of as rankings_table
from llmrec.finetune.adapter import Adapter
from llmrec.finetune.config import FinetuneConfig
from llmrec.finetune.method_table import method_of
from llmrec.interactions import Interactions, Targets

logger = logging.getLogger("llmrec")

TRAIN, BOTH = "train", "train and valid"
MAKE_ANOTHER_METHOD = ("loss", "random_codes", "fusion", "me_mode", "concat_mode", "ctrl_stage")
"""Settings of finetune that are part of a method's name, where they are not the usual ones."""

UNEQUAL = (
    "Not all methods learned from the same items, and the validation items are worth much: set "
    "train_collab.include_valid and finetune.include_valid alike."
)


@distributed.every_process
def evaluate(
    config: EvaluateConfig,
    data: Interactions,
    collab: CollabEmbeddings,
    content: ContentEmbeddings,
    ids: SemanticIds,
    adapter: Adapter,
) -> Report:
    """Rank what was fine-tuned beside the collaborative model itself, popularity and, where known, the truth.

    Users are shared over processes; the result is that of one process.
    """
    from llmrec.collab.provider import provider_scorer
    from llmrec.finetune.scoring import load_scorer

    check_same_catalog(data, collab, content, ids, adapter)
    scorers = [load_scorer(adapter, collab, content, ids, spread=True)]
    if collab.state:
        scorers.append(provider_scorer(collab))
    scorers.append(popularity(data))
    targets = data.targets("test")
    if not len(targets):
        raise DataError("no user has a test item; change prepare_data.split or its rates")
    shown = labels(collab, adapter, [scorer.name for scorer in scorers])
    rankings = rank_methods(config, data, targets, scorers, shown)
    metrics = summarise_all(config, data, targets, rankings)
    tracking.begin()
    tracking.log(metrics["rows"], 0)
    metrics["fine_tuned"] = scorers[0].name
    metrics["trained_on"] = trained_on(collab, adapter, rankings)
    metrics["labels"] = {name: shown.get(name, name) for name in rankings}
    metrics["repeated_targets"] = repeated_targets(data, targets)
    metrics["notes"] = notes(metrics["trained_on"], metrics["labels"])
    if metrics["repeated_targets"] and config.mask_seen:
        metrics["notes"].append(
            f"{metrics['repeated_targets']:.1%} of the targets were in the user's history already. They stay "
            "candidates where other items of the history do not, which makes them easy to find; with "
            "evaluate.mask_seen=false nothing is left out for anybody."
        )
        logger.warning("evaluate: %s", metrics["notes"][-1])
    if UNEQUAL in metrics["notes"]:
        logger.warning("evaluate: %s", UNEQUAL)
    groups = analysis.item_groups(data.train_count, config.head_rate, config.mid_rate)
    page = report.render(metrics, data, targets, rankings, [data, collab, content, ids, adapter], config)
    return Report(
        catalog=data.catalog,
        metrics=metrics,
        rankings=rankings_table(data, targets, rankings, groups),
        html=page,
    )


def rank_methods(
    config: EvaluateConfig,
    data: Interactions,
    targets: Targets,
    scorers: list[Scorer],
    labels: dict[str, str],
) -> dict[str, Ranking]:
    """Rank every target by every method, and by the true probabilities where they are known; labels are the
    names in the log."""
    rankings = {}
    for scorer in scorers:
        rankings[scorer.name] = rank_users(
            scorer,
            data,
            targets,
            block_size=config.batch_size,
            mask_seen=config.mask_seen,
            top_k=config.top_k,
            shard=True,
        )
        found = summarise(rankings[scorer.name].rank, (10,))
        logger.info(
            "evaluate: %s, recall@10 %.4f, ndcg@10 %.4f",
            labels[scorer.name], found["recall@10"], found["ndcg@10"],
        )  # fmt: skip
    if data.true_scores is not None:
        truth = torch.from_numpy(data.true_scores[targets.user])
        rank = rank_targets(truth, torch.from_numpy(targets.item)).numpy()
        top = top_items(truth, config.top_k).numpy()
        rankings["best_possible"] = Ranking(rank=rank, rank_seen_kept=rank, top=top)
    return rankings


def summarise_all(
    config: EvaluateConfig, data: Interactions, targets: Targets, rankings: dict[str, Ranking]
) -> dict[str, Any]:
    """Every number of metrics.json."""
    rows = {name: summarise(ranking.rank, config.ks) for name, ranking in rankings.items()}
    groups = analysis.item_groups(data.train_count, config.head_rate, config.mid_rate)
    metrics: dict[str, Any] = {
        "num_users": len(targets),
        "num_items": data.num_items,
        "split": data.summary.get("split"),
        "mask_seen": config.mask_seen,
        "data_warnings": data.summary.get("warnings", []),
        "rows": rows,
        "seen_kept": {
            name: summarise(ranking.rank_seen_kept, config.ks) for name, ranking in rankings.items()
        },
        "groups": analysis.by_group(rankings, targets, groups, config.ks),
        "group_rates": {"head": config.head_rate, "mid": config.mid_rate},
        "history_length": analysis.by_length(rankings, targets, config.ks, config.length_edges),
        "length_edges": list(config.length_edges),
        "recommendations": {
            name: analysis.recommendations(ranking.top, data.train_count)
            for name, ranking in rankings.items()
        },
        "ratios": ratios(rows),
        "paired": {},
    }
    names = list(rankings)
    for other in names[1:]:
        if other != "best_possible":
            metrics["paired"][f"{names[0]} - {other}"] = analysis.paired(
                rankings[names[0]].rank,
                rankings[other].rank,
                samples=config.bootstrap_samples,
                seed=config.seed,
            )
    if "market" in data.summary:
        metrics["expected_best"] = data.summary["market"]["best_reachable"]
    return metrics


def ratios(rows: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """recall@10 of each method over popularity's and over the best possible."""
    found: dict[str, dict[str, float]] = {}
    for name, row in rows.items():
        if name in ("popularity", "best_possible"):
            continue
        found[name] = {
            f"over_{other}": row["recall@10"] / rows[other]["recall@10"]
            for other in ("popularity", "best_possible")
            if other in rows and rows[other]["recall@10"] > 0
        }
    return found


def trained_on(collab: CollabEmbeddings, adapter: Adapter, rankings: dict[str, Ranking]) -> dict[str, str]:
    """What each trained method learned from: 'train', 'train and valid', or 'unknown' where collaborative
    vectors come from a file."""
    settings = adapter.settings["config"]
    vectors = "unknown" if "trained_on" not in collab.metrics else TRAIN
    vectors = BOTH if collab.knows_valid else vectors
    ours = BOTH if settings["include_valid"] or settings["count_valid"] else vectors
    learned = {settings["method"]: ours, collab.provider: vectors}
    return {name: on for name, on in learned.items() if name in rankings}


def repeated_targets(data: Interactions, targets: Targets) -> float:
    """Share of targets that the user's history holds already."""
    again = [
        item in data.item[start:stop]
        for item, start, stop in zip(targets.item.tolist(), targets.start.tolist(), targets.stop.tolist())
    ]
    return float(np.mean(again))


def labels(collab: CollabEmbeddings, adapter: Adapter, names: list[str]) -> dict[str, str]:
    """Names as tables show them; what was fine-tuned goes by its method and what makes it another one, and a
    model's loss, and the content it knows, are part of its name."""
    settings = adapter.settings["config"]
    usual = vars(FinetuneConfig()) | {"fusion": method_of(settings["method"]).fusion}
    others = [
        f"{name}={settings[name]}"
        for name in MAKE_ANOTHER_METHOD
        if settings.get(name, "auto") not in (usual[name], "auto")
    ]
    method = settings["method"] + (f" ({', '.join(others)})" if others else "")
    shown = {name: name for name in names} | {settings["method"]: method}
    if collab.provider in shown and "loss" in collab.model:
        parts = [collab.model["loss"], *collab.model.get("content", ())]
        shown[collab.provider] = f"{collab.provider} ({', '.join(parts)})"
    return shown


def notes(trained_on: dict[str, str], labels: dict[str, str]) -> list[str]:
    """Sentences on who learned from validation items, or from nobody knows what; none if nobody did."""
    found = [
        f"{labels[name]} reads collaborative vectors from a file; what they were learned from is not known "
        "here, and if it was test items, its figures mean nothing."
        for name, splits in trained_on.items()
        if splits == "unknown"
    ]
    if more := [labels[name] for name, splits in trained_on.items() if splits == BOTH]:
        found.append(f"{' and '.join(more)} learned from train and validation items.")
        found += [UNEQUAL] if len(more) < len(trained_on) else []
    return found


def pick_examples(targets: Targets, number: int, seed: int) -> np.ndarray:
    """A few users, drawn at random; indices into the targets."""
    rng = np.random.default_rng(seed)
    return np.sort(rng.choice(len(targets), min(number, len(targets)), replace=False))
