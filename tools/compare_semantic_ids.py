r"""Semantic IDs under several settings and seeds, judged without any language model: one table.

    python tools/compare_semantic_ids.py --prepare-data runs/x/prepare_data \
        --train-collab runs/x/train_collab --encode-items runs/x/encode_items \
        --modality collab --row mse reconstruction=mse --row mmd reconstruction=mmd --seeds 0 1 2

tau: Kendall's tau between distances of (history item, target) under the codes and under the item vectors,
of the sum of the codes and of the decoded vectors (MME-SID Eq. 8; train split); error: of the decoded
vectors, in units of their variance; overlap: share of 10 nearest items that stay; used: smallest share of
codes used at any level; collisions: collision rate. Mean over seeds, and the spread (standard deviation).
"""

from __future__ import annotations

import argparse
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING

from llmrec import arguments, jobs
from llmrec.console import guarded, show_lines_at_once
from llmrec.errors import ConfigError
from llmrec.recipe import apply_overrides

if TYPE_CHECKING:
    from llmrec.semantic_ids.config import LearnSemanticIdsConfig

FIGURES = {
    "tau latent": lambda found: found["tau"]["latent"],
    "tau decoded": lambda found: found["tau"]["decoded"],
    "tau random": lambda found: found["tau"]["random_codes"],
    "error": lambda found: found["reconstruction_error"],
    "overlap": lambda found: found["neighbour_overlap"]["latent"],
    "used": lambda found: min(level["utilisation"] for level in found["levels"]),
    "collisions": lambda found: found["collision_rate"],
}


SET_ELSEWHERE = {"seed": "--seeds", "modalities": "--modality"}
"""Settings that rows may not change, and what sets them."""


def main(arguments: list[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    show_lines_at_once()
    raise SystemExit(guarded(lambda: compare(options)))


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("prepare-data", "train-collab", "encode-items"):
        made.add_argument(f"--{name}", metavar="DIR", required=True, help="output folder of that stage")
    made.add_argument(
        "--modality", default="collab", choices=["collab", "text", "image"],
        help="vectors that the codes are learned from (collab)",
    )  # fmt: skip
    text = "a name and settings of learn_semantic_ids, the others being defaults"
    jobs.add_row(made, text, required=True)
    jobs.add_seeds(made)
    made.add_argument(
        "--out", metavar="FILE", type=arguments.new_file,
        help="a new file for every figure of every row and seed, as JSON (none)",
    )  # fmt: skip
    return made


def compare(options: argparse.Namespace) -> None:
    """Learn the codes of every row and seed, and print a line per row as soon as it is done."""
    from dataclasses import replace

    import numpy as np

    from llmrec import machine
    from llmrec.artifacts import CollabEmbeddings, ContentEmbeddings
    from llmrec.files import write_json
    from llmrec.finished import load
    from llmrec.interactions import Interactions
    from llmrec.semantic_ids.config import LearnSemanticIdsConfig
    from llmrec.semantic_ids.learn import learn_semantic_ids

    logging.getLogger("llmrec").setLevel(logging.WARNING)
    base = LearnSemanticIdsConfig(modalities=(options.modality,), min_utilisation=0.0)
    rows = rows_of(options.row, base)
    inputs = [
        load(kind, Path(getattr(options, kind.stage)))
        for kind in (Interactions, CollabEmbeddings, ContentEmbeddings)
    ]
    print(f"{options.modality}, {len(options.seeds)} seeds; {machine.describe()}")
    print(f"{'':20}" + "".join(f"{name:>16}" for name in FIGURES) + f"{'seconds':>10}")
    cells = []
    for name, config in rows.items():
        found, started = [], time.perf_counter()
        for seed in options.seeds:
            ids = learn_semantic_ids(replace(config, seed=seed), *inputs)
            found.append(ids.quality["modalities"][options.modality])
            cells.append({"row": name, "seed": seed, "quality": found[-1]})
            if options.out:
                write_json(options.out, cells)
        line = f"{name:20}"
        for figure in FIGURES.values():
            values = [figure(quality) for quality in found]
            spread = f" {np.std(values, ddof=1):6.4f}" if len(values) > 1 else ""
            line += f"{np.mean(values):9.4f}{spread}".rjust(16)
        print(f"{line}{(time.perf_counter() - started) / len(found):10.1f}")


def rows_of(given: list[list[str]], base: LearnSemanticIdsConfig) -> dict[str, LearnSemanticIdsConfig]:
    """Settings by name.

    Raises:
        ConfigError: a row has no name of its own, or settings that it cannot have.
    """
    for name, *settings in given:
        if "=" in name:
            raise ConfigError(f"--row {name}: a row begins with a name; give --row NAME {name}")
        for field in (assignment.partition("=")[0].strip() for assignment in settings):
            if field in SET_ELSEWHERE:
                raise ConfigError(f"--row {name}: {field} is set by {SET_ELSEWHERE[field]} for all rows")
    rows = {name: apply_overrides(base, settings) for name, *settings in given}
    if len(rows) < len(given):
        raise ConfigError("--row: two rows have one name; give each its own")
    return rows


if __name__ == "__main__":
    main()
