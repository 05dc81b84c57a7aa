"""The model card of a packaged recommender: what ran, in numbers of this run, and how to use it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import yaml
from huggingface_hub import ModelCardData

from llmrec import __version__
from llmrec.evaluation.tables import fine_tuned_in
from llmrec.own import is_own

if TYPE_CHECKING:
    from llmrec.inference.package import Package

TAGS = ["recommender-systems", "sequential-recommendation", "mme-sid", "llmrec"]

LLAMA_3_1 = ("llama3.1", "Built with Llama: the Llama 3.1 Community License applies.")
LICENCES = {
    "meta-llama/meta-llama-3.1": LLAMA_3_1,
    "meta-llama/meta-llama-3": (
        "llama3",
        "Built with Meta Llama 3: the Meta Llama 3 Community License applies.",
    ),
    "meta-llama/llama-2": ("llama2", "Llama 2 is licensed under the Llama 2 Community License."),
    "meta-llama/llama-3.1": LLAMA_3_1,
    "meta-llama/llama-3.2": ("llama3.2", "Built with Llama: the Llama 3.2 Community License applies."),
    "meta-llama/llama-3.3": ("llama3.3", "Built with Llama: the Llama 3.3 Community License applies."),
    "google/gemma": ("gemma", "Gemma is provided under and subject to the Gemma Terms of Use."),
}
"""Licence tag and line of base models whose terms follow what is trained on them, by beginning of the id."""


def card(package: Package) -> str:
    """The card in Markdown, with the metadata that the Hub reads in front."""
    settings = package.adapter.settings["config"]
    base = settings["base_model"]
    evaluation, summary = package.evaluation, package.data.get("summary", {})
    rows = evaluation.get("rows", {})
    metrics = rows.get(fine_tuned_in(evaluation), {})
    tag, licence = licence_of(base)
    metadata = ModelCardData(
        library_name="peft" if package.adapter.lora else None,
        base_model=None if base == "mini" else base,
        license=tag,
        base_model_relation=None if base == "mini" else "adapter",
        tags=TAGS,
    )
    head = metadata.to_dict()
    if metrics:
        head["model-index"] = model_index(settings, source_of(package), metrics)
    template = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=jinja2.select_autoescape(),  # which leaves Markdown as it is
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    ).get_template("card.md.j2")
    counts = ("num_users", "num_items", "num_interactions")
    labels = evaluation.get("labels", {})
    return template.render(
        front=yaml.safe_dump(head, sort_keys=False, allow_unicode=True),
        method=settings["method"],
        source=source_of(package),
        version=__version__,
        base=base,
        revision=package.adapter.settings.get("revision"),
        licence=licence,
        counts={name[4:]: summary[name] for name in counts if isinstance(summary.get(name), int)},
        split=str(summary.get("split") or "").replace("_", " "),
        warnings=summary.get("warnings", []),
        columns=list(metrics),
        rows=[(labels.get(name, name), row) for name, row in rows.items()],
        mask_seen=evaluation.get("mask_seen", True),
        seed=settings["seed"],
        notes=evaluation.get("notes"),
        first_id=json.dumps(package.items["raw_id"][0].as_py(), ensure_ascii=False),
        own_class=settings["method"] if is_own(settings["method"]) else None,
        lora=package.adapter.lora,
        num_items=len(package.items),
        trainable=package.adapter.metrics.get("parameters", {}).get("trainable", 0),
    )


def licence_of(base: str) -> tuple[str | None, str | None]:
    """Licence tag and line that a base model asks for; None: see there."""
    found = (terms for start, terms in LICENCES.items() if str(base).lower().startswith(start))
    return next(found, (None, None))


def model_index(settings: dict[str, Any], source: str, metrics: dict[str, float]) -> list[dict[str, Any]]:
    """The metrics, in the form in which the Hub reads results."""
    result = {
        "task": {"type": "sequential-recommendation", "name": "Next-item recommendation"},
        "dataset": {"type": "own", "name": source},
        "metrics": [
            {"type": name, "value": round(value, 6), "name": f"{name}, seed {settings['seed']}"}
            for name, value in metrics.items()
        ],
    }
    return [{"name": settings["method"], "results": [result]}]


def source_of(package: Package) -> str:
    """Short name of the data."""
    config = package.data.get("config", {})
    source = config.get("source", "own data")
    if source == "sample_market":
        return "the sample market"
    return str(config.get("category") or Path(str(config.get("interactions") or source)).stem)
