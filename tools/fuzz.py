"""Give every reader, setting and request what nobody would give on purpose, and see what it says.

    python tools/fuzz.py --cases 500 --seed 0

Files are changed byte by byte from good ones (stage output and packages with a manifest that fits the change,
as somebody with bad intentions would write it); settings, histories and requests are made from odd pieces.
Everything must be taken, or refused with one of our errors; anything else is a fault, shown with the number
of its case, as is a case that takes longer than --seconds. Prints the number of cases; leaves with 1 if there
were faults.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
import warnings
from pathlib import Path

from fuzzing import calls, data, files, folders
from fuzzing.changes import Target
from fuzzing.judge import fuzz, report
from llmrec import pipeline
from llmrec.arguments import positive, positive_number, whole
from llmrec.console import guarded, set_up_logging
from llmrec.errors import ConfigError
from llmrec.inference import package
from llmrec.recipe import Recipe, apply_overrides

SMALL = """
prepare_data.market.num_users=80 prepare_data.market.num_items=40 prepare_data.market.num_interests=4
prepare_data.market.max_length=8 train_collab.epochs=2 train_collab.sasrec.embed_dim=8
train_collab.sasrec.num_layers=1 train_collab.sasrec.num_heads=1 train_collab.sasrec.inner_dim=16
encode_items.text.dim=8 encode_items.image.dim=8 learn_semantic_ids.num_codes=4
learn_semantic_ids.num_levels=2 learn_semantic_ids.code_dim=8 learn_semantic_ids.hidden_dims=16
learn_semantic_ids.batch_size=40 learn_semantic_ids.epochs=5 learn_semantic_ids.min_utilisation=0
finetune.mini.hidden_size=8 finetune.mini.num_layers=1 finetune.mini.num_heads=1
finetune.mini.intermediate_size=16 finetune.prompt=compact finetune.epochs=1 finetune.fusion_temperature=1
evaluate.bootstrap_samples=20 evaluate.num_examples=2
"""


def tiny_run(root: Path) -> tuple[Path, Path]:
    """A small finished run of every stage, and its package."""
    pipeline.run(apply_overrides(Recipe(), SMALL.split()), root / "run")
    return root / "run", package.package_run(root / "run", root / "packaged")


def all_targets(root: Path, run: Path, packaged: Path) -> list[Target]:
    """Whatever is tried; each by the number of its place, with which its cases are drawn."""
    root.mkdir(parents=True, exist_ok=True)
    return [
        *data.targets(root),
        *files.targets(root),
        *folders.targets(root, run, packaged),
        *calls.targets(packaged),
    ]


def chosen(targets: list[Target], text: str) -> list[Target]:
    """Those whose names hold a text.

    Raises:
        ConfigError: none does.
    """
    found = [one for one in targets if text in one.name]
    if not found:
        names = "; ".join(one.name for one in targets)
        raise ConfigError(f"--only {text!r} is in no target's name; give a part of one of: {names}")
    return found


def command(options: argparse.Namespace) -> None:
    """Fuzz, print, and leave with 1 if there were faults."""
    set_up_logging()
    os.environ["TQDM_DISABLE"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        finished, packaged = tiny_run(root)
        logging.getLogger("llmrec").setLevel(logging.CRITICAL)
        warnings.simplefilter("ignore")
        targets = chosen(all_targets(root / "files", finished, packaged), options.only)
        results, faults = fuzz(targets, options.cases, options.seconds, options.seed)
    print(report(results, faults))
    sys.exit(bool(faults))


def main(arguments: list[str] | None = None) -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--cases", type=positive, default=200, help="cases of each target (200)")
    made.add_argument("--seed", type=whole, default=0, help="of the changes (0)")
    made.add_argument("--seconds", type=positive_number, default=10.0, help="longest time of a case (10)")
    made.add_argument("--only", default="", metavar="TEXT", help="targets whose names hold this (all)")
    options = made.parse_args(arguments)
    raise SystemExit(guarded(lambda: command(options)))


if __name__ == "__main__":
    main()
