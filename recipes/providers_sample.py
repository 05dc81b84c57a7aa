"""MME-SID on the sample market with the item vectors of every sequence model, one after another.

Method:    MME-SID (CIKM 2025) as in mme_sid_sample.py; only the collaborative provider changes
Run:       accelerate launch recipes/providers_sample.py
           accelerate launch recipes/providers_sample.py --providers sasrec gmvae --run-dir runs/two
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from mme_sid_sample import recipe as mme_sid_sample

from llmrec import tracking
from llmrec.collab.config import PROVIDER_FIELDS, TrainCollabConfig
from llmrec.collab.configs.bert4rec import Bert4RecConfig
from llmrec.collab.configs.diffurec import DiffurecConfig
from llmrec.collab.configs.diffusion import DiffusionConfig
from llmrec.collab.configs.gmvae import GmvaeConfig
from llmrec.collab.configs.motor import MotorConfig
from llmrec.collab.configs.tiger import TigerConfig
from llmrec.config import given
from llmrec.console import guarded, set_up_logging
from llmrec.errors import ConfigError
from llmrec.evaluation.tables import fine_tuned_in
from llmrec.recipe import Recipe, apply_overrides, refuse_what_cannot_finish
from llmrec.stage_changes import refuse_what_is_stale, statuses

# Sizes for a small world, steps as small as in the papers, and patience for a model that learns nothing but
# popularity for many epochs; all others train with their defaults.
PREFIXES = {"batch_by": "targets", "batch_size": 512}
SETTINGS: dict[str, dict[str, Any]] = {
    "bert4rec": {"bert4rec": Bert4RecConfig(num_masks=4), "epochs": 150, "patience": 30},
    "svae": {"batch_size": 32},
    "gmvae": {"gmvae": GmvaeConfig(embed_dim=64)},
    "diffurec": {"diffurec": DiffurecConfig(embed_dim=64, num_layers=2, reverse_steps=8), **PREFIXES},
    "tiger": {
        "tiger": TigerConfig(
            num_codes=32, embed_dim=64, num_layers=2, num_heads=4, head_dim=16, inner_dim=256
        ),
        **PREFIXES,
    },
    "motor": {"motor": MotorConfig(num_codes=32)},
    "diffusion": {"diffusion": DiffusionConfig(embed_dim=64, num_layers=2, reverse_steps=8), **PREFIXES},
}


def recipe(provider: str = "sasrec") -> Recipe:
    base = mme_sid_sample()
    if provider == base.train_collab.provider:
        return base
    settings: dict[str, Any] = {"epochs": 50, "patience": 5, **SETTINGS.get(provider, {})}
    return replace(base, train_collab=TrainCollabConfig(provider=provider, **settings))


def run_all(arguments: list[str] | None = None) -> None:
    """Run the pipeline once per provider and print one table; finished stages are kept."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run-dir", default="runs/providers_sample", help="one folder a provider")
    parser.add_argument(
        "--providers", nargs="+", default=PROVIDER_FIELDS, metavar="NAME", help="which of them (all)"
    )
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="STAGE.FIELD=VALUE", help="settings for all"
    )
    tracking.add_argument(parser)
    options = parser.parse_args(arguments)
    if unknown := set(options.providers) - set(PROVIDER_FIELDS):
        raise ConfigError(
            f"--providers must be among {', '.join(PROVIDER_FIELDS)}, got {', '.join(sorted(unknown))}"
        )
    set_up_logging()
    tracking.choose(options.track)
    from llmrec import launched
    from llmrec.pipeline import RunDir, run

    recipes = {provider: apply_overrides(recipe(provider), options.set) for provider in options.providers}
    if any(chosen.train_collab.provider != provider for provider, chosen in recipes.items()):
        raise ConfigError("--providers chooses the models; leave train_collab.provider out of --set")
    folders = {provider: Path(options.run_dir) / provider for provider in recipes}
    for provider, chosen in recipes.items():  # what the last would stumble over is said before the first
        stages = statuses(chosen, folders[provider], None)
        refuse_what_is_stale(folders[provider], stages)
        refuse_what_cannot_finish(chosen, stages)
    reports = {provider: run(chosen, RunDir(folders[provider])) for provider, chosen in recipes.items()}
    if launched.is_main():
        print(table({name: given(report).metrics for name, report in reports.items()}))


def table(metrics: dict[str, dict[str, Any]]) -> str:
    """What MME-SID makes of each provider's vectors, and what the provider ranks by itself."""
    lines = [f"{'':12}{'provider alone':>22}{'MME-SID with its vectors':>28}"]
    lines.append(f"{'provider':12}{'recall@10':>11}{'ndcg@10':>11}{'recall@10':>17}{'ndcg@10':>11}")
    for name, found in metrics.items():
        alone, mme_sid = found["rows"][name], found["rows"][fine_tuned_in(found)]
        lines.append(
            f"{name:12}{alone['recall@10']:11.4f}{alone['ndcg@10']:11.4f}"
            f"{mme_sid['recall@10']:17.4f}{mme_sid['ndcg@10']:11.4f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(guarded(run_all))
