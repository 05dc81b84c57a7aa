"""Sequence models side by side: each row trained with several seeds on one data set, one table.

A cell is one row with one seed: a folder with the output of train_collab and the ranks of the test
targets. Every cell runs in a process of its own (`llmrec.jobs`), so that its seconds and memory are its own;
finished cells are kept, so the same command goes on where it stopped.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from llmrec import jobs as side_by_side
from llmrec import storage
from llmrec.artifacts import CollabEmbeddings, ContentEmbeddings
from llmrec.collab.config import TrainCollabConfig
from llmrec.config import as_dict, changed_settings, from_dict
from llmrec.errors import ConfigError
from llmrec.evaluation import analysis
from llmrec.evaluation.config import EvaluateConfig
from llmrec.evaluation.metrics import ndcg_at_k, per_user, summarise
from llmrec.evaluation.tables import mean_and_spread
from llmrec.files import read_json, read_jsonl, write_json
from llmrec.finished import checked_file, fingerprint, load, peak_memory_of, stage_manifest
from llmrec.interactions import Interactions, Targets
from llmrec.pipeline import run_stage
from llmrec.stage_changes import changes_of, source_hashes

logger = logging.getLogger("llmrec")

KS = (5, 10, 20)
MAIN = "ndcg@10"
"""Metric of the significance test and of the order of rows."""
SHOWN = ("recall@10", MAIN)
"""Metrics whose differences and slices are shown."""
RANKING = "ranking"
"""What a cell does after train_collab, as its lock names it."""


def run_cells(
    rows: dict[str, TrainCollabConfig],
    seeds: list[int],
    data_folder: Path,
    root: Path,
    jobs: int,
    content_folder: Path | None = None,
) -> list[str]:
    """Run every cell that is not finished, several at a time; a failed one does not stop the others.

    Args:
        rows: settings by row.
        seeds: of every row.
        data_folder: output of prepare_data.
        root: where cells are kept.
        jobs: cells trained at a time.
        content_folder: output of encode_items, for rows that ask for it.

    Returns:
        One line per failed cell.
    """
    data = load(Interactions, data_folder)
    content = None if content_folder is None else load(ContentEmbeddings, content_folder)
    found = []
    for name, seed, folder, config in cells_of(rows, seeds, root):
        prepare_cell(folder, config, f"{name}, seed {seed}")
        check_made_from(folder, data, content if config.content else None)
        inputs = [data_folder, *([content_folder] if content_folder and config.content else [])]
        found.append(cell_to_run(name, seed, folder, inputs))
    return side_by_side.run(found, jobs)


def cell_to_run(name: str, seed: int, folder: Path, inputs: list[Path]) -> side_by_side.Cell:
    """A cell for `llmrec.jobs.run`."""
    return side_by_side.Cell(
        row=name,
        seed=seed,
        folder=folder,
        command=["llmrec.collab.compare", str(folder), *map(str, inputs)],
        stages=(folder / "train_collab", folder / RANKING),
        done=lambda: (folder / "metrics.json").exists(),
        outcome=lambda: outcome(folder),
    )


def cells_of(
    rows: dict[str, TrainCollabConfig], seeds: list[int], root: Path
) -> Iterator[tuple[str, int, Path, TrainCollabConfig]]:
    """Row, seed, folder and settings of every cell, seed by seed so that all rows have results early."""
    for seed in seeds:
        for name, config in rows.items():
            yield name, seed, root / "cells" / name / f"seed{seed}", replace(config, seed=seed)


def prepare_cell(folder: Path, config: TrainCollabConfig, what: str) -> None:
    """Write a cell's settings, or check that they are those it was begun with.

    Raises:
        ConfigError: the cell was begun with others.
    """
    if (folder / "config.json").exists():
        check_settings(folder, config, what)
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", as_dict(config))


def check_settings(folder: Path, config: TrainCollabConfig, what: str) -> None:
    """Raise ConfigError if a cell was begun with other settings, or trained from other files or by other code
    of the user's."""
    if (folder / "metrics.json").exists():
        changes = changes_of(stage_manifest(folder / "train_collab"), config, source_hashes(config))
    else:
        changes = changed_settings(read_json(folder / "config.json"), config)
    if changes:
        raise ConfigError(
            f"{folder} ({what}) was made with {', '.join(changes)}; use another folder, or delete it"
        )


def check_made_from(folder: Path, data: Interactions, content: ContentEmbeddings | None = None) -> None:
    """Refuse a finished cell of other data, whose users would not pair, or of other texts and pictures.

    Raises:
        ConfigError: it was trained on others.
    """
    if not (folder / "metrics.json").exists():
        return
    made_from = stage_manifest(folder / "train_collab")["inputs"]
    if made_from["prepare_data"] != fingerprint(data):
        raise ConfigError(f"{folder} was trained on other data; use another --run-dir, or delete it")
    if content is not None and made_from.get("encode_items") != fingerprint(content):
        raise ConfigError(
            f"{folder} was trained with other text or image vectors; use another --run-dir, or delete it"
        )


def check_one_content(cells: list[Path]) -> None:
    """Raise ConfigError if finished cells learned from different text or image vectors."""
    found: dict[str, Path] = {}
    for cell in cells:
        if made_from := stage_manifest(cell / "train_collab")["inputs"].get("encode_items"):
            found.setdefault(made_from, cell)
    if len(found) > 1:
        one, other, *_ = found.values()
        raise ConfigError(
            f"{one} and {other} were trained with different text or image vectors; delete those that are not "
            "to be compared"
        )


def run_cell(folder: Path, data_folder: Path, content_folder: Path | None = None) -> None:
    """Train the cell's model, rank the test targets, and write the ranks, then metrics.json.

    Raises:
        BusyError: another process is at it.
    """
    from llmrec.collab.train import train_collab

    data = load(Interactions, data_folder)
    config = from_dict(TrainCollabConfig, read_json(folder / "config.json"))
    content = () if content_folder is None else (load(ContentEmbeddings, content_folder),)
    collab = run_stage(train_collab, config, (data, *content), folder / "train_collab")
    with storage.locked(folder / RANKING):
        if not (folder / "metrics.json").exists():
            rank_cell(folder, collab, data)


def rank_cell(folder: Path, collab: CollabEmbeddings, data: Interactions) -> None:
    """Rank the test targets by a cell's trained model, and write the ranks, then metrics.json."""
    from llmrec.collab.provider import provider_scorer
    from llmrec.evaluation.rank import rank_users

    ranking = rank_users(provider_scorer(collab), data, data.targets("test"))
    ranks = {"rank": ranking.rank, "rank_seen_kept": ranking.rank_seen_kept}
    save_file(ranks, folder / "ranks.safetensors")
    storage.open_like_folder(folder)
    manifest = stage_manifest(folder / "train_collab")
    seconds = [row["train_seconds"] for row in collab.log]
    write_json(
        folder / "metrics.json.part",
        {
            "test": summarise(ranking.rank, KS),
            "test_seen_kept": summarise(ranking.rank_seen_kept, KS),
            "valid": {name[6:]: value for name, value in collab.metrics.items() if name.startswith("valid")},
            "num_parameters": collab.metrics["num_parameters"],
            "best_epoch": collab.metrics["best_epoch"],
            "epochs": collab.metrics["epochs"],
            # The median: the first epoch also starts up libraries.
            "seconds_per_epoch": float(np.median(seconds)),
            "targets_per_second": collab.metrics["num_targets"] / float(np.median(seconds)),
            "seconds": manifest["seconds"],
            "peak_memory_bytes": peak_memory_of(manifest),
            "loss": collab.model.get("loss"),
            "provider": collab.provider,
        },
    )
    os.replace(folder / "metrics.json.part", folder / "metrics.json")


def outcome(folder: Path) -> str:
    """One phrase about a finished cell."""
    found = read_json(folder / "metrics.json")
    return (
        f"recall@10 {found['test']['recall@10']:.4f}, ndcg@10 {found['test']['ndcg@10']:.4f}, best epoch "
        f"{found['best_epoch']} of {found['epochs']}, {found['seconds_per_epoch']:.1f} s per epoch"
    )


def summarise_cells(
    rows: dict[str, TrainCollabConfig],
    seeds: list[int],
    data: Interactions,
    root: Path,
    *,
    reference: str,
    samples: int = analysis.SAMPLES,
    length_edges: Sequence[int] = EvaluateConfig.length_edges,
) -> dict[str, Any]:
    """Everything the table and the page show, from the cells that are finished.

    A row's metric of a user is its mean over seeds. Differences to the reference row are tested user by
    user (t-test, bootstrap interval) on these means, and p is corrected for the number of rows by Holm's
    method; the spread over seeds stands beside them.

    Raises:
        ConfigError: a cell was trained with other settings, on other data, or with other text or image
            vectors than another one.
    """
    from llmrec.evaluation.rank import popularity, rank_users

    targets = data.targets("test")
    slices = slices_of(data, targets, length_edges)
    popular_valid = popular_ndcg(rows, data)
    found: dict[str, Any] = {}
    users: dict[str, dict[str, np.ndarray]] = {}
    cells = {name: finished_cells(name, config, seeds, data, root) for name, config in rows.items()}
    check_one_content([cell for done in cells.values() for cell in done.values()])
    for name, config in rows.items():
        done = cells[name]
        found[name] = {"num_seeds": len(done), "num_wanted": len(seeds)}
        found[name] |= {key: getattr(config, key) for key in ("select", "include_valid", "mask_seen")}
        if done:
            users[name] = mean_by_user(list(done.values()))
            metrics = {seed: read_json(cell / "metrics.json") for seed, cell in done.items()}
            found[name] |= row_figures(list(metrics.values()))
            if config.select == "valid":
                found[name]["learned_nothing"] = [
                    seed
                    for seed, one in metrics.items()
                    if one["valid"]["ndcg@10"] <= popular_valid[config.mask_seen]
                ]
            found[name]["slices"] = {
                what: {part: means_of(users[name], chosen) for part, chosen in parts.items()}
                for what, parts in slices.items()
            }
            log = read_jsonl(checked_file(next(iter(done.values())) / "train_collab", "log.jsonl"))
            found[name]["log"] = [{key: row[key] for key in row if key != "seconds"} for row in log]
    if reference in users:
        add_differences(found, users, reference, samples)
    popular = rank_users(popularity(data), data, targets)
    return {
        "rows": found,
        "popularity": {
            "test": summarise(popular.rank, KS),
            "test_seen_kept": summarise(popular.rank_seen_kept, KS),
        },
        "reference": reference,
        "seeds": seeds,
        "num_users": len(targets),
        "num_items": data.num_items,
        "split": data.summary.get("split"),
        "data_warnings": data.summary.get("warnings", []),
        "slices": {
            what: {part: int(mask.sum()) for part, mask in parts.items()} for what, parts in slices.items()
        },
    }


def slices_of(
    data: Interactions, targets: Targets, length_edges: Sequence[int]
) -> dict[str, dict[str, np.ndarray]]:
    """Parts of the users whose metrics are shown by themselves, bool (U,), by what parts them."""
    groups = analysis.item_groups(data.train_count, 0.1, 0.4)[targets.item]
    return {
        "history length": analysis.parts_by_length(targets.stop - targets.start, length_edges),
        "popularity of the target": analysis.parts_by_group(np.array(analysis.GROUPS)[groups]),
    }


def finished_cells(
    name: str, config: TrainCollabConfig, seeds: list[int], data: Interactions, root: Path
) -> dict[int, Path]:
    """Folders of a row's finished cells by seed.

    Raises:
        ConfigError: one was trained with other settings, or on other data.
    """
    found = {}
    for _, seed, cell, settings in cells_of({name: config}, seeds, root):
        if (cell / "metrics.json").exists():
            check_settings(cell, settings, f"{name}, seed {seed}")
            check_made_from(cell, data)
            found[seed] = cell
    return found


def popular_ndcg(rows: dict[str, TrainCollabConfig], data: Interactions) -> dict[bool, float]:
    """Popularity's ndcg@10 of the validation items, by whether items of the history are left out; as far as
    rows chose their epoch so."""
    from llmrec.evaluation.rank import popularity, rank_users

    targets, scorer = data.targets("valid"), popularity(data)
    ways = {config.mask_seen for config in rows.values() if config.select == "valid"}
    ranks = {way: rank_users(scorer, data, targets, mask_seen=way).rank for way in ways}
    return {way: float(np.mean(ndcg_at_k(rank, 10))) for way, rank in ranks.items()}


def mean_by_user(cells: list[Path]) -> dict[str, np.ndarray]:
    """Every metric of every user, float64 (U,): the mean over a row's seeds."""
    per_seed = [per_user(load_file(cell / "ranks.safetensors")["rank"], KS) for cell in cells]
    return {metric: np.mean([one[metric] for one in per_seed], axis=0) for metric in per_seed[0]}


def means_of(users: dict[str, np.ndarray], chosen: np.ndarray) -> dict[str, float]:
    """The metrics that are shown for a part of the users."""
    return {metric: float(users[metric][chosen].mean()) for metric in SHOWN}


def row_figures(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over seeds (None for one seed) of a row's metrics, and its costs."""
    figures: dict[str, Any] = {
        split: {name: mean_and_spread([cell[split][name] for cell in cells]) for name in cells[0][split]}
        for split in ("test", "test_seen_kept", "valid")
    }
    for name in ("seconds_per_epoch", "targets_per_second", "epochs", "best_epoch", "seconds"):
        figures[name] = float(np.mean([cell[name] for cell in cells]))
    figures["peak_memory_bytes"] = max(cell["peak_memory_bytes"] for cell in cells)
    return figures | {name: cells[0][name] for name in ("num_parameters", "loss", "provider")}


def add_differences(
    found: dict[str, Any], users: dict[str, dict[str, np.ndarray]], reference: str, samples: int
) -> None:
    """Put each row's difference to the reference, with its interval and corrected p, into found."""
    others = [name for name in users if name != reference]
    for name in others:
        found[name]["difference"] = {
            metric: analysis.difference_of(users[name][metric] - users[reference][metric], samples=samples)
            for metric in SHOWN
        }
    for metric in SHOWN:
        tested = [name for name in others if found[name]["difference"][metric]["p_value"] is not None]
        corrected = analysis.holm([found[name]["difference"][metric]["p_value"] for name in tested])
        for name, p in zip(tested, corrected):
            found[name]["difference"][metric]["holm_p"] = p


def main(arguments: list[str]) -> None:
    """One cell, in a process of its own; see `cell_to_run`."""
    from llmrec.console import set_up_logging

    set_up_logging()
    run_cell(*map(Path, arguments))


if __name__ == "__main__":
    sys.exit(side_by_side.end_cell(lambda: main(sys.argv[1:])))
