"""How well items are recommended that no one had seen in training: withheld, then added by text and picture.

    python tools/evaluate_cold_items.py recipes/mme_sid_sample.py --rate 0.1

A share of the items, drawn at random, is taken out of all data of a recipe, and everything is trained without
them. Then they are added with `Recommender.add_items`, and users whose last interaction was with one of them
are
ranked: their history is what came before, without such items. Beside it: popularity of what is similar (an
item counts as popular as its ten nearest by content, one with a history as popular as it is), and chance.
"""

from __future__ import annotations

import argparse
import csv
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from llmrec.console import guarded, set_up_logging
from llmrec.data.config import PrepareDataConfig
from llmrec.errors import ConfigError
from llmrec.evaluation.metrics import ndcg_at_k, recall_at_k
from llmrec.finished import load
from llmrec.inference.new_items import nearest
from llmrec.inference.package import package_run
from llmrec.inference.recommender import Recommender
from llmrec.interactions import Interactions
from llmrec.pipeline import RunDir, run
from llmrec.recipe import Recipe, apply_overrides, recipe_of

K = 10


def withhold(data: Interactions, rate: float, seed: int) -> np.ndarray:
    """Items to take out, bool (N + 1,)."""
    drawn = np.random.default_rng(seed).permutation(data.num_items)[: max(1, round(rate * data.num_items))]
    out = np.zeros(data.num_items + 1, dtype=bool)
    out[drawn + 1] = True
    return out


def write_rest(data: Interactions, out: np.ndarray, folder: Path) -> None:
    """Interactions and items that are left, as tables."""
    folder.mkdir(parents=True, exist_ok=True)
    users = np.repeat(np.arange(data.num_users), np.diff(data.offset))
    raw = ["", *data.raw_ids]
    with (folder / "interactions.csv").open("w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle)
        writer.writerow(["user_id", "item_id", "timestamp"])
        for place in np.flatnonzero(~out[data.item]):
            writer.writerow([data.user_raw_ids[users[place]], raw[data.item[place]], data.timestamp[place]])
    names = text_columns(data.items)
    with (folder / "items.csv").open("w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle)
        writer.writerow(["item_id", "image", *names])
        for number, row in enumerate(data.items.to_pylist(), start=1):
            if not out[number]:
                picture = data.image_file(number)
                there = picture is not None and picture.is_file()
                writer.writerow([row["raw_id"], picture.resolve() if there else "", *(row[n] for n in names)])


def text_columns(items: pa.Table) -> list[str]:
    return [name for name in items.column_names if name not in ("raw_id", "train_count", "image_path")]


def on_the_rest(recipe: Recipe, data: Interactions, folder: Path) -> Recipe:
    """The recipe on the tables that `write_rest` made."""
    names = text_columns(data.items)
    pictures = recipe.encode_items.image.encoder != "none"
    prepared = PrepareDataConfig(
        source="table",
        interactions=str(folder / "interactions.csv"),
        items=str(folder / "items.csv"),
        text_columns=tuple(name for name in names if name != "title"),
        image_column="image" if pictures else None,
    )
    return replace(recipe, prepare_data=prepared)


def cold_users(data: Interactions, out: np.ndarray, known: set[str]) -> list[tuple[list[str], str]]:
    """Histories and targets of users whose last item was withheld; histories hold known items only."""
    raw, found = ["", *data.raw_ids], []
    for user in range(data.num_users):
        items = data.item[data.offset[user] : data.offset[user + 1]]
        history = [raw[item] for item in items[:-1] if raw[item] in known]
        if len(items) and out[items[-1]] and history:
            found.append((history, raw[items[-1]]))
    return found


def compare(options: argparse.Namespace) -> None:
    """Train without the withheld items, add them, rank, print."""
    set_up_logging()
    logging.getLogger("llmrec").setLevel(logging.INFO)
    if not 0 < options.rate < 1:
        raise ConfigError(f"--rate must lie between 0 and 1, got {options.rate}")
    recipe = apply_overrides(recipe_of(Path(options.recipe)), options.set)
    root = Path(options.run_dir or Path("runs") / f"cold_{Path(options.recipe).stem}")
    run(recipe, RunDir(root / "all"), until="prepare_data")
    data = load(Interactions, root / "all" / "prepare_data")
    out = withhold(data, options.rate, options.seed)
    if not (root / "rest" / "interactions.csv").is_file():
        write_rest(data, out, root / "rest")
    run(on_the_rest(recipe, data, root / "rest"), RunDir(root / "run"), until="finetune")
    if not (root / "package").is_dir():
        package_run(root / "run", root / "package")
    recommender = Recommender.from_pretrained(root / "package")
    users = cold_users(data, out, set(recommender.raw_ids))
    added = [number for number in np.flatnonzero(out) if data.raw_ids[number - 1] not in recommender.number]
    rows = data.items.to_pylist()
    names = text_columns(data.items)
    recommender.add_items(
        [
            {
                "item_id": rows[number - 1]["raw_id"],
                "image": data.image_file(number),
                **{name: rows[number - 1][name] for name in names},
            }
            for number in added
        ]
    )
    print("\n".join(table(recommender, users, len(added))))


def table(recommender: Recommender, users: list[tuple[list[str], str]], added: int) -> list[str]:
    """recall@10 and ndcg@10 among all items and among the new ones, of us, similar popularity and chance."""
    package, total = recommender.package, len(recommender.raw_ids)
    new = np.arange(total - added, total)
    count = package.adapter.heads["train_count"].numpy().astype(np.float64)
    rows = {name: table[new + 1] for name, table in package.content.vectors.items()}
    known = {name: ~missing[new + 1] for name, missing in package.content.missing.items()}
    popularity = count.copy()
    popularity[new + 1] = count[nearest(package, rows, known, K)].mean(axis=1)
    scores = {
        "MME-SID, item added": recommender.score([history for history, _ in users]),
        "popularity of what is similar": np.tile(popularity[1:], (len(users), 1)),
    }
    target = np.array([recommender.number[name] - 1 for _, name in users])
    seen = [[recommender.number[name] - 1 for name in history] for history, _ in users]
    lines = [
        f"{len(users)} users whose last item is one of {added} new ones; {total} items",
        f"{'':32}{'among all items':>24}{'among new items':>24}",
        f"{'':32}{'recall@10':>12}{'ndcg@10':>12}{'recall@10':>12}{'ndcg@10':>12}",
    ]
    for name, table_ in scores.items():
        values = table_.astype(np.float64).copy()
        for place, items in enumerate(seen):
            values[place, items] = -np.inf
        cells = ""
        for columns in (np.arange(total), new):
            own = values[np.arange(len(users)), target][:, None]
            some = values[:, columns]
            rank = (some > own).sum(axis=1) + ((some == own).sum(axis=1) - 1) / 2
            cells += f"{recall_at_k(rank, K).mean():12.4f}{ndcg_at_k(rank, K).mean():12.4f}"
        lines.append(f"{name:32}{cells}")
    discount = (1 / np.log2(np.arange(2, K + 2))).sum()
    cells = "".join(f"{min(K, size) / size:12.4f}{discount / size:12.4f}" for size in (total, added))
    lines.append(f"{'chance':32}{cells}")
    return lines


def main(arguments: list[str] | None = None) -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("recipe", metavar="RECIPE", help="a recipe's file")
    made.add_argument("--rate", type=float, default=0.1, help="share of the items that is withheld (0.1)")
    made.add_argument("--seed", type=int, default=0, help="of the draw")
    made.add_argument("--run-dir", metavar="DIR", help="where everything goes (runs/cold_NAME)")
    made.add_argument("--set", nargs="+", action="extend", default=[], metavar="STAGE.FIELD=VALUE")
    options = made.parse_args(arguments)
    raise SystemExit(guarded(lambda: compare(options)))


if __name__ == "__main__":
    main()
