"""How well items are recommended that no one had seen in training: withheld, then added by text and picture.

    python tools/evaluate_cold_items.py recipes/mme_sid_sample.py --rate 0.1

A share of the items, drawn at random, is taken out of all data of a recipe, and everything is trained without
them. Then they are added with `Recommender.add_items`, and users whose last interaction was with one of them
are ranked: their history is what came before, without such items. Beside it: popularity of what is similar
(an item counts as popular as its ten nearest by content, one with a history as popular as it is), and chance.

The recipe's filters are applied to the whole data, and not again to what is left of them, nor is the order of
equal times drawn again. What is left is split as the recipe says, under a global-time split at points in time
of its own. Users with fewer than three interactions left, whom leave-one-out cannot split, are not trained
on.

The folder keeps everything, and the same command goes on from there; another draw needs another folder. It
takes little longer than the recipe itself (recipes/mme_sid_sample.py: six minutes on one thread of a busy
machine).
"""

from __future__ import annotations

import argparse
import csv
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from llmrec.arguments import whole
from llmrec.console import guarded, set_up_logging
from llmrec.data.config import PrepareDataConfig
from llmrec.errors import ArtifactMismatchError, ConfigError
from llmrec.evaluation.metrics import ndcg_at_k, recall_at_k
from llmrec.files import read_json, write_json
from llmrec.finished import SCHEMA_VERSION, fingerprint, fingerprint_of, load
from llmrec.inference.new_items import nearest
from llmrec.inference.package import package_run
from llmrec.inference.recommender import Recommender
from llmrec.interactions import Interactions
from llmrec.manifest import MANIFEST, read_manifest
from llmrec.pipeline import RunDir, run
from llmrec.recipe import Recipe, apply_overrides, recipe_of

K = 10
LEAST = 3
"""Interactions that leave-one-out needs of a user."""
DRAW = "draw.json"
"""Note beside the tables of what was withheld, written last."""


def withhold(data: Interactions, rate: float, seed: int) -> np.ndarray:
    """Items to take out, bool (N + 1,)."""
    drawn = np.random.default_rng(seed).permutation(data.num_items)[: max(1, round(rate * data.num_items))]
    out = np.zeros(data.num_items + 1, dtype=bool)
    out[drawn + 1] = True
    return out


def rows_left(data: Interactions, out: np.ndarray, split: str) -> np.ndarray:
    """Interactions to train on, bool (n,): without the withheld items, and users too short to be split."""
    user = np.repeat(np.arange(data.num_users), np.diff(data.offset))
    left = ~out[data.item]
    if split == "leave_one_out":
        left &= (np.bincount(user[left], minlength=data.num_users) >= LEAST)[user]
    return left


def write_rest(data: Interactions, left: np.ndarray, folder: Path) -> None:
    """Interactions that are left and their items, as tables."""
    folder.mkdir(parents=True, exist_ok=True)
    users = np.repeat(np.arange(data.num_users), np.diff(data.offset))
    raw, times = ["", *data.raw_ids], data.knows_times
    with (folder / "interactions.csv").open("w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle)
        writer.writerow(["user_id", "item_id", *(["timestamp"] if times else [])])
        for place in np.flatnonzero(left):
            time = [data.timestamp[place]] if times else []
            writer.writerow([data.user_raw_ids[users[place]], raw[data.item[place]], *time])
    names, rows = text_columns(data.items), data.items.to_pylist()
    with (folder / "items.csv").open("w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle)
        writer.writerow(["item_id", "image", *names])
        for number in np.unique(data.item[left]):
            row = rows[number - 1]
            writer.writerow([row["raw_id"], picture_of(data, number) or "", *(row[name] for name in names)])


def picture_of(data: Interactions, number: int) -> Path | None:
    """An item's picture, if there is one."""
    found = data.image_file(number)
    return found.resolve() if found is not None and found.is_file() else None


def is_written(folder: Path, draw: dict[str, Any]) -> bool:
    """Whether the tables of this draw are there, all of them.

    Raises:
        ConfigError: those of another draw are.
    """
    if not (folder / DRAW).is_file():
        return False
    before = read_json(folder / DRAW)
    if before == draw:
        return True
    changed = [name for name in draw if before.get(name) != draw[name]]
    brief = [", ".join(f"{name} {str(one.get(name))[:12]}" for name in changed) for one in (before, draw)]
    raise ConfigError(
        f"{folder.parent} is about items that were drawn with {brief[0]}, got {brief[1]}; give another "
        f"--run-dir, or delete {folder.parent}"
    )


def write_draw(folder: Path, draw: dict[str, Any]) -> None:
    """Note what the tables are, once they are whole."""
    write_json(folder / f"{DRAW}.part", draw)
    os.replace(folder / f"{DRAW}.part", folder / DRAW)


def text_columns(items: pa.Table) -> list[str]:
    return [name for name in items.column_names if name not in ("raw_id", "train_count", "image_path")]


def on_the_rest(recipe: Recipe, data: Interactions, folder: Path) -> Recipe:
    """The recipe on the tables that `write_rest` made.

    They are filtered and in order, ties included, so of the recipe's preparation the split alone is left to
    apply. Times that were places of interactions are so again.
    """
    names = text_columns(data.items)
    pictures = recipe.encode_items.image.encoder != "none"
    asked = recipe.prepare_data
    prepared = PrepareDataConfig(
        source="table",
        interactions=str(folder / "interactions.csv"),
        items=str(folder / "items.csv"),
        timestamp_column="timestamp" if data.knows_times else None,
        text_columns=tuple(name for name in names if name != "title"),
        image_column="image" if pictures else None,
        k_core=0,
        split=asked.split,
        valid_rate=asked.valid_rate,
        test_rate=asked.test_rate,
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


def require_users(users: list[tuple[list[str], str]], options: argparse.Namespace) -> None:
    """Refuse a draw that leaves nobody to rank.

    Raises:
        ConfigError: no user with a history of known items has a withheld one last.
    """
    if not users:
        raise ConfigError(
            f"--rate {options.rate} with --seed {options.seed} withholds no user's last item, or leaves such "
            "users no history, so there is nobody to rank; give a rate further from 0 and 1, or another seed"
        )


def train(
    recipe: Recipe, data: Interactions, out: np.ndarray, root: Path, options: argparse.Namespace
) -> list[tuple[list[str], str]]:
    """Train without the withheld items; whom to rank, and for what, see `cold_users`.

    Raises:
        ConfigError: the folder is about other items, or there is nobody to rank.
        ArtifactMismatchError: a withheld item would be trained on.
    """
    left, raw = rows_left(data, out, recipe.prepare_data.split), ["", *data.raw_ids]
    require_users(cold_users(data, out, {raw[item] for item in np.unique(data.item[left])}), options)
    draw = {"rate": options.rate, "seed": options.seed, "catalog": data.catalog, "data": fingerprint(data)}
    if not is_written(root / "rest", draw):
        write_rest(data, left, root / "rest")
        write_draw(root / "rest", draw)
    rest = on_the_rest(recipe, data, root / "rest")
    run(rest, RunDir(root / "run"), until="prepare_data")
    known = set(load(Interactions, root / "run" / "prepare_data").raw_ids)
    if both := sorted(known & {raw[item] for item in np.flatnonzero(out)}):
        raise ArtifactMismatchError(
            f"{root / 'run'} knows {len(both)} of the items that are to be new, such as {both[0]!r}; delete "
            f"{root} to begin anew, or give another --run-dir"
        )
    users = cold_users(data, out, known)
    require_users(users, options)
    run(rest, RunDir(root / "run"), until="finetune")
    return users


def packaged(root: Path) -> Path:
    """The package of the run as it is now, made if there is none; one of an earlier training stays aside."""
    trained = fingerprint_of(read_manifest(root / "run" / "finetune" / MANIFEST, SCHEMA_VERSION))
    folder = root / f"package_{trained[:12]}"
    return folder if folder.is_dir() else package_run(root / "run", folder)


def as_new(data: Interactions, out: np.ndarray, pictures: bool) -> list[dict[str, Any]]:
    """The withheld items, as `Recommender.add_items` takes them."""
    rows, names = data.items.to_pylist(), text_columns(data.items)
    return [
        {
            "item_id": rows[number - 1]["raw_id"],
            "image": picture_of(data, number) if pictures else None,
            **{name: rows[number - 1][name] for name in names},
        }
        for number in np.flatnonzero(out).tolist()
    ]


def compare(options: argparse.Namespace) -> None:
    """Train without the withheld items, add them, rank, print."""
    set_up_logging()
    if not 0 < options.rate < 1:
        raise ConfigError(f"--rate must lie between 0 and 1, got {options.rate}")
    recipe = apply_overrides(recipe_of(Path(options.recipe)), options.set)
    root = Path(options.run_dir or Path("runs") / f"cold_{Path(options.recipe).stem}")
    run(recipe, RunDir(root / "all"), until="prepare_data")
    data = load(Interactions, root / "all" / "prepare_data")
    out = withhold(data, options.rate, options.seed)
    users = train(recipe, data, out, root, options)
    recommender = Recommender.from_pretrained(packaged(root))
    new = as_new(data, out, pictures="image" in recommender.package.content.vectors)
    recommender.add_items(new)
    print("\n".join(table(recommender, users, len(new))))


def by_chance(size: int) -> tuple[float, float]:
    """recall@10 and ndcg@10 to be expected of a random order of so many items."""
    discount = 1 / np.log2(np.arange(2, K + 2))
    return min(K, size) / size, float(discount[:size].sum() / size)


def table(recommender: Recommender, users: list[tuple[list[str], str]], added: int) -> list[str]:
    """recall@10 and ndcg@10 among all items and among the new ones, of us, similar popularity and chance."""
    package, total = recommender.package, len(recommender.raw_ids)
    new = np.arange(total - added, total)
    count = package.adapter.heads["train_count"].numpy().astype(np.float64)
    rows = {name: table[new + 1] for name, table in package.content.vectors.items()}
    known = {name: ~missing[new + 1] for name, missing in package.content.missing.items()}
    popularity = count.copy()
    popularity[new + 1] = count[nearest(package, rows, known, K)].mean(axis=1)
    method = package.adapter.settings["config"]["method"]
    scores = {
        f"{method}, item added": recommender.score([history for history, _ in users]),
        "popularity of what is similar": np.tile(popularity[1:], (len(users), 1)),
    }
    target = np.array([recommender.number[name] - 1 for _, name in users])
    assert (target >= total - added).all(), "every target is a new item"
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
    by_user = [(*by_chance(total - len(set(items))), *by_chance(added)) for items in seen]
    cells = "".join(f"{value:12.4f}" for value in np.mean(by_user, axis=0))
    lines.append(f"{'chance':32}{cells}")
    return lines


def main(arguments: list[str] | None = None) -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("recipe", metavar="RECIPE", help="a recipe's file")
    made.add_argument("--rate", type=float, default=0.1, help="share of the items that is withheld (0.1)")
    made.add_argument("--seed", type=whole, default=0, help="of the draw (0)")
    made.add_argument("--run-dir", metavar="DIR", help="where everything goes (runs/cold_NAME)")
    made.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="STAGE.FIELD=VALUE",
        help="settings in place of the recipe's",
    )  # fmt: skip
    options = made.parse_args(arguments)
    raise SystemExit(guarded(lambda: compare(options)))


if __name__ == "__main__":
    main()
