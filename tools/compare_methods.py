"""MME-SID and the methods it is compared with on one set of vectors and semantic IDs: one table.

    python tools/compare_methods.py --run-dir runs/mme_sid_sample --methods mme_sid e4srec --seeds 0 1 2

The run folder holds the stages up to learn_semantic_ids (a recipe with --until learn_semantic_ids makes
them); every method is fine-tuned on them with the same settings and ranked on the test items. Cells that are
finished are kept, so the same command goes on where it stopped; --summarise prints what there is.

recall and ndcg: mean and standard deviation over seeds. Difference: of ndcg@10 to the first method, user by
user, mean over seeds (95 % bootstrap interval; Wilcoxon p, Holm-corrected over methods). The collaborative
provider's own ranking stands below, for scale.
"""

import argparse
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmrec.collab.config import PROVIDER_FIELDS
from llmrec.errors import MissingArtifactError
from llmrec.finetune.config import METHOD_FIELDS, FinetuneConfig
from llmrec.recipe import apply_overrides, guarded, set_up_logging

METHODS = ("mme_sid", "e4srec", "me", "concat", "concat_mlp", "ctrl_mm", "se_sid", "se_random", "mme_random")
STAGES = ("prepare_data", "train_collab", "encode_items", "learn_semantic_ids")


def main(arguments: list[str] | None = None) -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--run-dir", required=True, metavar="DIR", help="holds the stages before fine-tuning")
    made.add_argument("--out", metavar="DIR", help="where cells go (RUN_DIR/methods)")
    made.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    made.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    made.add_argument("--summarise", action="store_true", help="train nothing")
    made.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="FIELD=VALUE", help="settings of finetune"
    )
    options = made.parse_args(arguments)
    raise SystemExit(guarded(lambda: compare(options)))


def compare(options: argparse.Namespace) -> None:
    """Fine-tune what is missing and print the table."""
    set_up_logging()
    logging.getLogger("llmrec").setLevel(logging.INFO)
    root = Path(options.run_dir)
    out = Path(options.out or root / "methods")
    base = apply_overrides(FinetuneConfig(), options.set)
    if not options.summarise:
        fine_tune(options, root, out, base)
    from llmrec import distributed

    if distributed.is_main():
        print(table({name: cells_of(out, name, options.seeds) for name in options.methods}, options.seeds))


def fine_tune(options: argparse.Namespace, root: Path, out: Path, base: FinetuneConfig) -> None:
    """Run the cells that are not finished, seed by seed so that all methods have results early."""
    from llmrec.evaluation.config import EvaluateConfig
    from llmrec.evaluation.evaluate import evaluate
    from llmrec.finetune.train import finetune
    from llmrec.pipeline import load, run_stage
    from llmrec.stages import STAGES as ALL

    inputs = tuple(load(ALL[name].artifact_class(), root / name) for name in STAGES)
    for seed in options.seeds:
        for name in options.methods:
            folder = out / name / f"seed{seed}"
            config = replace(settings_of(base, name), seed=seed)
            adapter = run_stage(finetune, config, inputs, folder / "finetune")
            run_stage(evaluate, EvaluateConfig(), (*inputs, adapter), folder / "evaluate")


def settings_of(base: FinetuneConfig, method: str) -> FinetuneConfig:
    """The shared settings for one method, without those that it does not have."""
    defaults = {name: spec.default for name, spec in FinetuneConfig.__dataclass_fields__.items()}
    changes: dict[str, Any] = {"method": method}
    for name, methods in METHOD_FIELDS.items():
        if method not in methods:
            changes[name] = defaults[name]
    if FinetuneConfig(method=method).fusion_used != "frequency":
        changes["fusion_temperature"] = defaults["fusion_temperature"]
    return replace(base, **changes)


def cells_of(out: Path, method: str, seeds: list[int]) -> list[dict[str, Any]]:
    """What the finished cells of a method measured: metrics, ranks, costs."""
    import pyarrow.parquet as pq

    from llmrec.artifacts import read_json
    from llmrec.pipeline import read_manifest

    found = []
    for seed in seeds:
        folder = out / method / f"seed{seed}"
        try:
            seconds = read_manifest(folder / "finetune")["seconds"]
            memory = read_manifest(folder / "finetune")["peak_memory_bytes"]
            rows = read_json(folder / "evaluate" / "metrics.json")["rows"]
        except MissingArtifactError:
            continue
        ranks = pq.read_table(folder / "evaluate" / "rankings.parquet")
        found.append(
            {
                "row": rows["mme_sid"],
                "provider": next(((key, row) for key, row in rows.items() if key in PROVIDER_FIELDS), None),
                "rank": ranks["rank_mme_sid"].to_numpy(),
                "metrics": read_json(folder / "finetune" / "metrics.json"),
                "seconds": seconds,
                "memory": memory,
            }
        )
    return found


def table(cells: dict[str, list[dict[str, Any]]], seeds: list[int]) -> str:
    """The comparison as text; methods without a finished cell are shown as missing."""
    import numpy as np

    from llmrec.evaluation.analysis import difference_of, holm
    from llmrec.evaluation.metrics import ndcg_at_k

    reference = next(iter(cells))
    users = {
        name: np.mean([ndcg_at_k(cell["rank"], 10) for cell in found], axis=0)
        for name, found in cells.items()
        if len(found) == len(seeds)
    }
    tests = {
        name: difference_of(users[name] - users[reference], samples=2000, seed=0)
        for name in users
        if name != reference and reference in users
    }
    tested = [name for name, test in tests.items() if test["wilcoxon_p"] is not None]
    corrected = dict(zip(tested, holm([tests[name]["wilcoxon_p"] for name in tested])))
    head = f"{'method':12}{'seeds':>6}{'recall@10':>18}{'ndcg@10':>18}{'ndcg@10 to ' + reference:>38}"
    lines = [head + f"{'trainable':>12}{'tokens':>14}{'seconds':>9}{'peak MiB':>10}"]
    for name, found in cells.items():
        line = f"{name:12}{f'{len(found)} of {len(seeds)}':>6}"
        if not found:
            lines.append(line + "  missing")
            continue
        for metric in ("recall@10", "ndcg@10"):
            values = [cell["row"][metric] for cell in found]
            spread = f" ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else ""
            line += f"{f'{np.mean(values):.4f}{spread}':>18}"
        shown = ""
        if name in tests:
            test = tests[name]
            shown = f"{test['difference']:+.4f} ({test['low']:+.4f} to {test['high']:+.4f})"
            shown += f", p {corrected[name]:.3f}" if name in corrected else ""
        line += f"{shown:>38}"
        line += f"{found[0]['metrics']['parameters']['trainable']:12,}{found[0]['metrics']['tokens']:14,}"
        line += f"{np.mean([cell['seconds'] for cell in found]):9.1f}"
        lines.append(line + f"{max(cell['memory'] for cell in found) / 2**20:10,.0f}")
    alone = next((cell["provider"] for found in cells.values() for cell in found), None)
    if alone is not None:
        name, row = alone
        lines.append(f"{name:18}{row['recall@10']:>18.4f}{row['ndcg@10']:>18.4f}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
