"""report.html: one page that stands alone, offline, on paper and on a phone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from llmrec import __version__
from llmrec.config import as_dict
from llmrec.evaluation.config import EvaluateConfig
from llmrec.evaluation.metrics import METRICS
from llmrec.evaluation.rank import Ranking
from llmrec.evaluation.tables import p_text
from llmrec.finished import peak_memory_of
from llmrec.interactions import Interactions, Targets
from llmrec.pages import (
    COLOURS,
    drawing,
    environment,
    epochs_along,
    legend_above,
    legend_beside,
    line_colours,
    line_looks,
    plot,
    svg,
    thumbnail,
)


def render(
    metrics: dict[str, Any],
    data: Interactions,
    targets: Targets,
    rankings: dict[str, Ranking],
    artifacts: list[Any],
    config: EvaluateConfig,
) -> str:
    """The page as HTML.

    Args:
        metrics: see evaluate.summarise_all.
        data: for titles and the data summary.
        targets: what was ranked.
        rankings: by method.
        artifacts: outputs of all stages before, for curves, quality and provenance.
        config: of evaluate.
    """
    by_stage = {artifact.stage: artifact for artifact in artifacts}
    collab, ids = by_stage.get("train_collab"), by_stage.get("learn_semantic_ids")
    adapter = by_stage.get("finetune")
    shown = metrics.get("labels", {})

    def label(name: str) -> str:
        return shown.get(name, name)

    with drawing():
        charts = {
            "groups": bars(metrics["groups"], label),
            "lengths": bars(metrics["history_length"], label),
            "curves": curves(collab, ids, adapter),
            "parts": part_curves(collab.log if collab else []),
            "fusion": fusion_curve(adapter),
            "frequency": frequency_curve(adapter),
            "spectra": spectra_curve(adapter),
        }
    return (
        environment(Path(__file__).parent)
        .get_template("report.html.j2")
        .render(
            metrics=metrics,
            about=about([manifest_if_stored(artifact) for artifact in artifacts]),
            label=label,
            table_name=table_name,
            p_text=p_text,
            columns=[f"{metric}@{k}" for metric in METRICS for k in config.ks],
            best=best_values(metrics["rows"]),
            charts=charts,
            quality=ids.quality if ids is not None else {},
            analysis=adapter.analysis if adapter is not None else {},
            summary=data.summary,
            groups=item_groups(collab, data),
            examples=examples(data, targets, rankings, config),
            stages=[provenance(artifact) for artifact in artifacts],
            evaluate_config=as_dict(config),
            version=__version__,
        )
    )


def about(manifests: list[dict[str, Any]]) -> list[str]:
    """What was ranked and by what, in a few words each, as far as it was loaded from a run folder."""
    config = {manifest["stage"]: manifest["config"] for manifest in manifests if manifest}
    found = []
    if data := config.get("prepare_data"):
        named = data.get("interactions") or data.get("category") or ""
        found.append(f"data: {data['source']} {PurePath(named).name}".rstrip())
    if collab := config.get("train_collab"):
        seed = "" if collab["provider"] == "precomputed" else f", seed {collab['seed']}"
        found.append(f"collaborative vectors: {collab['provider']}{seed}")
    if tuned := config.get("finetune"):
        base = tuned["base_model"]
        base = PurePath(base).name if PurePath(base).is_absolute() else base
        found.append(f"fine-tuned: {tuned['method']} on {base}, seed {tuned['seed']}")
    return found


def best_values(rows: dict[str, dict[str, float]]) -> dict[str, float]:
    """The largest value of each metric among real methods, to be set in bold."""
    real = [row for name, row in rows.items() if name != "best_possible"]
    return {name: max(row[name] for row in real) for name in real[0]}


def bars(slices: dict[str, Any], label: Callable[[str], str]) -> str:
    """Grouped bars of recall@10: one cluster per slice, one bar per method; SVG."""
    methods = list(next(iter(slices.values()))["rows"])
    figure_, axes = plot(6, 2.4)
    place, width = np.arange(len(slices)), 0.8 / len(methods)
    for number, method in enumerate(methods):
        values = [part["rows"][method]["recall@10"] for part in slices.values()]
        axes.bar(place + (number - (len(methods) - 1) / 2) * width, values, width, label=label(method))
    axes.set_xticks(place, [f"{name}\n{part['num_users']:,} users" for name, part in slices.items()])
    axes.set_ylabel("recall@10")
    legend_above(axes)
    return svg(figure_)


def curves(collab: Any, ids: Any, adapter: Any) -> list[str]:
    """Losses over training, one SVG per stage that logged them."""
    panels: list[tuple[str, list[dict[str, Any]], str, str, str | None]] = []
    rows = [row for row in (collab.log if collab else []) if "train_loss" in row]
    if rows:
        panels.append(("train_collab", rows, "epoch", "train_loss", "valid_ndcg@10"))
    rows = [row for row in (ids.log if ids else []) if "loss" in row]
    if rows:
        panels.append(("learn_semantic_ids", rows, "epoch", "loss", None))
    if adapter is not None and adapter.log:
        panels.append(("finetune", adapter.log, "step", "loss", "valid_ndcg@10"))
    return [curve(*panel) for panel in panels]


def curve(title: str, rows: list[dict[str, Any]], x: str, loss: str, valid: str | None) -> str:
    """Train loss and, on a second axis, a validation metric over epochs or steps; SVG."""
    figure_, axes = plot(3.4, 2.4)
    shown = [row for row in rows if loss in row]
    axes.plot([row[x] for row in shown], [row[loss] for row in shown], color=COLOURS[0], marker=dots(shown))
    axes.set_title(title, fontsize=9)
    axes.set_xlabel(x)
    axes.set_ylabel("train loss", color=COLOURS[0])
    ranked = [row for row in rows if valid in row]
    if valid is not None and ranked:
        twin = axes.twinx()
        values = [row[valid] for row in ranked]
        twin.plot([row[x] for row in ranked], values, color=COLOURS[1], marker=dots(ranked))
        twin.set_ylabel("valid ndcg@10", color=COLOURS[1])
        twin.spines["right"].set_visible(True)
    return svg(figure_)


def dots(rows: list[dict[str, Any]]) -> str | None:
    """The marker of a line of so few points that it could not be seen without."""
    return "." if len(rows) < 3 else None


def part_curves(log: list[dict[str, Any]]) -> list[str]:
    """What a sequence model reported about itself over training, one SVG per quantity.

    A vector has one line per entry, named by its place: experts, interests, weights. What begins late, such
    as SIGMA-GMVAE's hard interests, has a plot of the epochs from then on.
    """
    rows = [row for row in log if row.get("parts")]
    return [part_curve(name, rows) for name in dict.fromkeys(name for row in rows for name in row["parts"])]


def part_curve(name: str, rows: list[dict[str, Any]]) -> str:
    """One reported quantity over epochs; SVG."""
    figure_, axes = plot(2.3, 1.9)
    rows = [row for row in rows if name in row["parts"]]
    values = np.array([row["parts"][name] for row in rows], dtype=float)
    lines = axes.plot([row["epoch"] for row in rows], values, marker=dots(rows))
    if len(lines) > 1:
        for line, colour in zip(lines, line_colours(len(lines))):
            line.set_color(colour)
        axes.legend(
            lines,
            [str(place + 1) for place in range(len(lines))],
            frameon=False,
            fontsize=6,
            ncols=4,
            loc="best",
        )
    axes.set_title(name.replace("_", " "), fontsize=8)
    epochs_along(axes, fontsize=8)
    axes.tick_params(labelsize=7)
    return svg(figure_)


def fusion_curve(adapter: Any) -> str:
    """Mean fusion weight of every score source over training; SVG, or '' without fusion."""
    rows = [row for row in (adapter.log if adapter else []) if row.get("fusion")]
    if not rows:
        return ""
    figure_, axes = plot(6, 2.2)
    for source in rows[0]["fusion"]["mean_weight"]:
        axes.plot(
            [row["epoch"] for row in rows],
            [row["fusion"]["mean_weight"][source] for row in rows],
            marker="o",
            markersize=3,
            label=source,
        )
    epochs_along(axes)
    axes.set_ylabel("mean weight")
    axes.set_ylim(0, 1)
    legend_above(axes)
    return svg(figure_)


def frequency_curve(adapter: Any) -> str:
    """Fusion weights by popularity of the item, the first and last time they were logged; SVG, or ''."""
    rows = [row for row in (adapter.log if adapter else []) if row.get("fusion")]
    if not rows or "by_frequency" not in rows[0]["fusion"]:
        return ""
    figure_, axes = plot(6, 2.2)
    groups = list(rows[0]["fusion"]["by_frequency"])
    for number, source in enumerate(rows[0]["fusion"]["mean_weight"]):
        for row, style in ((rows[0], ":"), (rows[-1], "-")):
            values = [row["fusion"]["by_frequency"][group][source] for group in groups]
            shown = source if row is rows[-1] else None
            axes.plot(groups, values, style, marker="o", markersize=3, color=COLOURS[number], label=shown)
    axes.set_xlabel("train interactions of the item")
    axes.set_ylabel("mean weight")
    axes.set_ylim(0, 1)
    legend_above(axes)
    return svg(figure_)


def spectra_curve(adapter: Any) -> str:
    """Singular values of the item tables over the largest, on a logarithmic scale; SVG, or ''."""
    found = adapter.analysis.get("spectra", {}) if adapter is not None else {}
    if not found:
        return ""
    figure_, axes = plot(6, 2.8)
    for look, (name, values) in zip(line_looks(len(found)), found.items()):
        ratio = np.maximum(values["log10_ratio"], -8)
        axes.plot(np.arange(1, len(ratio) + 1), ratio, label=table_name(name), **look)
    axes.set_xlabel("place of the singular value")
    axes.set_ylabel("log10 of its share of the largest")
    legend_beside(axes)
    return svg(figure_)


def table_name(name: str) -> str:
    """An item table of `finetune.analysis` as people call it."""
    kind, _, modality = name.partition("_")
    if name == "collab_vectors":
        return "collab vectors, frozen"
    if modality and kind in ("vectors", "codes"):
        return f"{modality} {'projection' if kind == 'vectors' else 'codes'}"
    return name.replace("_", " ")


def item_groups(collab: Any, data: Interactions) -> dict[str, Any]:
    """What the sequence model sorts items into, each group with its most typical items; {} if nothing."""
    found = (collab.metrics if collab is not None else {}).get("item_groups")
    if not found:
        return {}
    names = shown_names(data)
    groups = [
        {
            "share": group["share"],
            "items": [
                card(data, item, f"{names[item]} ({weight:.0%})")
                for item, weight in zip(group["items"], group["weights"])
            ],
        }
        for group in found["groups"]
    ]
    return {"name": found["name"], "groups": groups}


def shown_names(data: Interactions) -> list[str]:
    """What people call the items, by item id: titles, or raw ids where there is none."""
    return ["", *(title or raw for title, raw in zip(data.titles, data.raw_ids))]


def card(data: Interactions, item: int, title: str, *, hit: bool = False) -> dict[str, Any]:
    """An item with its picture, as the page shows it; a hit stands out."""
    return {"title": title, "picture": thumbnail(data.image_file(item)), "hit": hit}


def examples(
    data: Interactions, targets: Targets, rankings: dict[str, Ranking], config: EvaluateConfig
) -> list[dict[str, Any]]:
    """A few random users: the end of the history, the target, its rank, and the first method's best ten, with
    pictures where there are some."""
    from llmrec.evaluation.evaluate import pick_examples

    names, first = shown_names(data), next(iter(rankings.values()))
    shown = []
    for place in pick_examples(targets, config.num_examples, config.seed):
        rank = float(first.rank[place]) + 1  # that of a tie lies between places
        history = data.item[targets.start[place] : targets.stop[place]]
        target = targets.item[place]
        shown.append(
            {
                "user": data.user_raw_ids[targets.user[place]],
                "length": len(history),
                "history": [card(data, item, names[item]) for item in history[-5:]],
                "target": card(data, target, names[target]),
                "hit": rank <= 10,
                "rank": f"{rank:,.1f}".removesuffix(".0"),
                "top": [
                    card(data, item, names[item], hit=item == target)
                    for item in first.top[place][:10]
                    if item
                ],
            }
        )
    return shown


def manifest_if_stored(artifact: Any) -> dict[str, Any]:
    """The manifest of an artefact that was loaded from a run folder, else {}."""
    return getattr(artifact, "_manifest", None) or {}


def provenance(artifact: Any) -> dict[str, Any]:
    """What made a stage's output, as far as it was loaded from a run folder."""
    manifest = manifest_if_stored(artifact)
    return {
        "stage": artifact.stage,
        "config": manifest.get("config", {}),
        "seconds": manifest.get("seconds"),
        "peak_memory_bytes": peak_memory_of(manifest) if manifest else None,
        "versions": manifest.get("versions", {}),
        "metrics": getattr(artifact, "metrics", {}),
    }
