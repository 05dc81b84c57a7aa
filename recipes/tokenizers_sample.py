"""Tokenizers of items for TIGER, on the sample market: random codes, k-means, RQ-VAE, LETTER with its parts.

Method:    TIGER (NeurIPS 2023), LETTER (CIKM 2024) at small scale; codes of texts, only the tokenizer differs
Run:       python recipes/tokenizers_sample.py
           python recipes/tokenizers_sample.py --rows k-means letter --seeds 0 1 2   (some of it)
Settings:  TIGER with one layer, shorter histories and larger steps than in recipes/providers_sample.py;
           LETTER's weights are larger than published, as an epoch of its tokenizer has one step here; the
           collaborative vectors are those of SASRec with 32 numbers an item
Seeds:     of TIGER; the tokenizers are trained once
Measured:  README of this folder
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from mme_sid_sample import recipe as mme_sid_sample
from providers_sample import recipe as with_provider

from llmrec.collab.compare_cli import Rows, compare
from llmrec.collab.config import SASRecConfig, TrainCollabConfig
from llmrec.console import guarded, set_up_logging
from llmrec.data.config import PrepareDataConfig
from llmrec.pipeline import run_stage
from llmrec.semantic_ids.config import LearnSemanticIdsConfig

NAME = "tokenizers_sample"


def tokenizers() -> dict[str, LearnSemanticIdsConfig]:
    """Settings of the tokenizers that are trained, by row."""
    rq_vae = LearnSemanticIdsConfig(
        modalities=("text",),
        alignment="none",
        num_levels=3,
        num_codes=32,
        code_dim=32,
        hidden_dims=(128, 64),
        codebook_update="gradient",
        epochs=2000,
        log_every_epochs=100,
    )
    clusters = {"diversity_weight": 0.01, "diversity_clusters": 8}
    return {
        "rq-vae": rq_vae,
        "letter": replace(rq_vae, collaborative_weight=0.1, **clusters),
        "letter-collaborative": replace(rq_vae, collaborative_weight=0.1),
        "letter-diversity": replace(rq_vae, **clusters),
    }


def teacher() -> TrainCollabConfig:
    """The model whose item vectors LETTER's tokenizer learns from."""
    return replace(mme_sid_sample().train_collab, sasrec=SASRecConfig(embed_dim=32, dropout_rate=0.3))


def data() -> PrepareDataConfig:
    return mme_sid_sample().prepare_data


def rows(root: Path = Path("runs") / NAME) -> Rows:
    """Settings by row; codes that are trained lie below root."""
    tiger = with_provider("tiger").train_collab
    small = replace(tiger.tiger, num_layers=1, max_history=10)
    tiger = replace(tiger, tiger=small, learning_rate=4e-3, epochs=40)
    found = {"random": replace(tiger, tiger=replace(tiger.tiger, content=())), "k-means": tiger}
    for name in tokenizers():
        found[name] = replace(tiger, semantic_ids=str(root / "tokenizers" / name))
    return found


def make_tokenizers(root: Path, names: list[str]) -> None:
    """Train those of these rows that are not there yet; finished stages are kept."""
    market = run_stage("prepare_data", data(), (), root / "prepare_data")
    content = run_stage("encode_items", mme_sid_sample().encode_items, (market,), root / "encode_items")
    for name in (name for name in names if name in tokenizers()):
        collab = run_stage("train_collab", teacher(), (market,), root / "train_collab")
        inputs = market, collab, content
        run_stage("learn_semantic_ids", tokenizers()[name], inputs, root / "tokenizers" / name)


def run_all(arguments: list[str] | None = None) -> None:
    """Train the tokenizers, then TIGER with the codes of each, and print one table."""
    typed = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--run-dir", default=f"runs/{NAME}")
    parser.add_argument("--rows", nargs="+")
    options, rest = parser.parse_known_args(typed)
    root = Path(options.run_dir)
    asked = options.rows or list(rows(root))
    rest += ["--rows", *options.rows] if options.rows else []
    # What the comparison will refuse trains nothing before.
    if not {"-h", "--help", "--summarise"}.intersection(rest) and set(asked) <= set(rows(root)):
        set_up_logging()
        make_tokenizers(root, asked)
    folders = {"run-dir": root, "prepare-data": root / "prepare_data", "encode-items": root / "encode_items"}
    given = [f"--{name}={folder}" for name, folder in folders.items()]
    compare(rows(root), None, NAME, __doc__, [*given, *rest])


if __name__ == "__main__":
    raise SystemExit(guarded(run_all))
