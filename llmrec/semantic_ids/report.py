"""report_semantic_ids: judge semantic IDs in a minute, before any language model is trained.

Reads what earlier stages made and computes every figure anew, exactly where it is cheap and on a seeded
sample where it is not: the page says which.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from llmrec import __version__
from llmrec.artifacts import CollabEmbeddings, ContentEmbeddings, SemanticIds, check_same_catalog
from llmrec.files import read_json, write_json
from llmrec.finished import manifest_of
from llmrec.interactions import Interactions
from llmrec.pages import (
    COLOURS,
    LINE_STYLES,
    drawing,
    environment,
    epochs_along,
    legend_above,
    plot,
    svg,
    thumbnail,
)
from llmrec.semantic_ids.assign import Rebuilt, frozen, load_quantizer
from llmrec.semantic_ids.config import ReportSemanticIdsConfig
from llmrec.semantic_ids.diagnostics import (
    Coded,
    Pairs,
    behaviour_target_pairs,
    collisions,
    distances,
    group_sizes,
    modality_quality,
    spectrum,
    tau_per_user,
)
from llmrec.semantic_ids.learn import ItemRows
from llmrec.semantic_ids.remedies import remedies

logger = logging.getLogger("llmrec")

DOTS = 4000
"""Pairs of items drawn in the plot of distances."""


@dataclass(frozen=True, kw_only=True)
class SemanticIdsReport:
    """Figures and a page about semantic IDs; made by report_semantic_ids."""

    stage: ClassVar[str] = "report_semantic_ids"

    metrics: dict[str, Any]
    """By modality: everything of quality.json, and spectra, group sizes, tau by user; and the joined codes"""
    html: str
    """The page; stands alone offline"""

    def save(self, folder: Path) -> None:
        write_json(folder / "metrics.json", self.metrics)
        (folder / "report.html").write_text(self.html, encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> SemanticIdsReport:
        html = (folder / "report.html").read_text(encoding="utf-8")
        return cls(metrics=read_json(folder / "metrics.json"), html=html)


def report_semantic_ids(
    config: ReportSemanticIdsConfig,
    data: Interactions,
    collab: CollabEmbeddings,
    content: ContentEmbeddings,
    ids: SemanticIds,
) -> SemanticIdsReport:
    """Measure the codes of every modality, and write the page.

    Raises:
        ArtifactMismatchError: artefacts of different catalogues, or IDs without their quantiser.
    """
    check_same_catalog(data, collab, content, ids)
    model = load_quantizer(ids)
    coded = {}
    for name in ids.modalities:
        rows = ItemRows.of(name, collab, content, data.num_items)
        coded[name] = Coded(
            source=rows.vectors,
            present=rows.present,
            codes=ids.codes[name],
            codebooks=ids.codebooks[name],
            rebuilt=Rebuilt(frozen(model, name), ids.codes[name]),
        )
    pairs = behaviour_target_pairs(data, config.seed, config.samples)
    modalities = {name: measure(found, pairs, config.seed) for name, found in coded.items()}
    joined = np.concatenate([found.codes[1:] for found in coded.values()], axis=1)
    metrics: dict[str, Any] = {
        "modalities": modalities,
        "joined": {**collisions(joined), "group_sizes": group_sizes(joined)},
        "num_items": data.num_items,
        "samples": config.samples,
    }
    metrics["findings"] = findings(metrics, settings_of(ids))
    for sentence in metrics["findings"]:
        logger.info("report_semantic_ids: %s", sentence)
    return SemanticIdsReport(metrics=metrics, html=page(metrics, config, data, coded, pairs, ids))


def measure(coded: Coded, pairs: Pairs, seed: int) -> dict[str, Any]:
    """All figures of one modality."""
    items = coded.items
    found = modality_quality(coded, pairs, seed)
    found["tau"]["per_user"] = tau_per_user(coded, pairs)
    found["group_sizes"] = group_sizes(coded.codes[items])
    found["spectra"] = {
        "item vectors": spectrum(coded.table("source"), items),
        "sums of codes": spectrum(coded.table("latent"), items),
        "decoded": spectrum(coded.table("decoded"), items),
    }
    return found


def settings_of(ids: SemanticIds) -> dict[str, Any]:
    """What the codes were learned with; nothing for codes that were never stored."""
    return manifest_of(ids)["config"] if hasattr(ids, "_manifest") else {}


def findings(metrics: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    """What a careful reader would be told about these codes, as sentences; none if all is well.

    Args:
        metrics: see `SemanticIdsReport`.
        settings: those of learn_semantic_ids, as far as they are known.
    """
    told, advice = [], remedies(settings)
    for name, found in metrics["modalities"].items():
        for level, entry in enumerate(found["levels"], start=1):
            if entry["utilisation"] < 0.95:
                dead = entry["dead_codes"]
                told.append(
                    f"{name}, level {level}: {dead} {'code is' if dead == 1 else 'codes are'} not used by "
                    f"any item ({entry['utilisation']:.1%} are){advice['unused']}."
                )
        tau = found["tau"]["latent"]
        if tau is not None and tau < 0.3:
            told.append(
                f"{name}: the codes keep little of which items are near each other (tau {tau:.2f})"
                f"{advice['distances']}."
            )
        if found["reconstruction_error"] >= 1:
            told.append(
                f"{name}: decoded vectors are further from their items than the mean vector is "
                f"({found['reconstruction_error']:.2f} of the variance)."
            )
        if found["collision_rate"] > 0.1:
            told.append(
                f"{name}: {found['items_in_collision']:,} items share all codes with another one"
                f"{advice['collisions']}."
            )
    joined = metrics["joined"]
    if joined["collision_rate"] > 0.005:
        told.append(
            f"{joined['items_in_collision']:,} of {metrics['num_items']:,} items share the codes of all "
            "modalities with another one; only their vectors tell the language model which is which."
        )
    return told


def page(
    metrics: dict[str, Any],
    config: ReportSemanticIdsConfig,
    data: Interactions,
    coded: dict[str, Coded],
    pairs: Pairs,
    ids: SemanticIds,
) -> str:
    """The page as HTML."""
    with drawing():
        charts = {
            name: {
                "usage": usage_chart(found),
                "groups": group_chart(metrics["modalities"][name]["group_sizes"]),
                "spectra": spectrum_chart(metrics["modalities"][name]["spectra"]),
                "distances": distance_chart(found, pairs, config.seed),
            }
            for name, found in coded.items()
        }
        training = training_chart(ids.log)
    shown = {name: shared_codes(data, found, config) for name, found in coded.items()}
    together = {name: collision_groups(data, found, config) for name, found in coded.items()}
    return (
        environment(Path(__file__).parent)
        .get_template("report.html.j2")
        .render(
            metrics=metrics,
            model=ids.model,
            charts=charts,
            training=training,
            shown=shown,
            together=together,
            version=__version__,
        )
    )


def usage_chart(coded: Coded) -> str:
    """Items per code, most used first, one line per level; SVG."""
    figure, axes = plot(4.5, 2.4)
    codes, size = coded.codes[coded.items], coded.codebooks.shape[1]
    for level in range(codes.shape[1]):
        count = np.sort(np.bincount(codes[:, level], minlength=size))[::-1]
        axes.plot(np.arange(1, size + 1), count, label=f"level {level + 1}")
    axes.axhline(len(codes) / size, color="#999999", linewidth=0.8, linestyle=":")
    axes.set_xlabel("codes, most used first (dotted: even use)")
    axes.set_ylabel("items")
    axes.set_yscale("symlog", linthresh=10)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=7)
    return svg(figure)


def group_chart(sizes: dict[str, int]) -> str:
    """Number of items by how many share all their codes; SVG."""
    figure, axes = plot(4.5, 2.4)
    bins = {"1": 0, "2": 0, "3": 0, "4": 0, "5-9": 0, "10+": 0}
    for size, count in sizes.items():
        number = int(size)
        key = size if number < 5 else "5-9" if number < 10 else "10+"
        bins[key] += number * count
    bars = axes.bar(list(bins), list(bins.values()), color=COLOURS[0])
    axes.bar_label(bars, [f"{value:,}" if value else "" for value in bins.values()], fontsize=7)
    axes.set_xlabel("items that share all codes")
    axes.set_ylabel("items")
    axes.set_yscale("symlog", linthresh=10)
    return svg(figure)


def spectrum_chart(spectra: dict[str, Any]) -> str:
    """Singular values over the largest; SVG."""
    figure, axes = plot(4.5, 2.4)
    for (name, found), colour in zip(spectra.items(), COLOURS):
        curve = [value for value in found["log10_ratio"] if value > -8]
        axes.plot(np.arange(1, len(curve) + 1), curve, label=name, color=colour)
    axes.set_xlabel("singular value")
    axes.set_ylabel("log10 of it over the largest")
    axes.legend(frameon=False, fontsize=7)
    return svg(figure)


def distance_chart(coded: Coded, pairs: Pairs, seed: int) -> str:
    """Distance of (history item, target) under the codes against that of the item vectors; SVG."""
    both = np.flatnonzero(coded.present[pairs.history] & coded.present[pairs.target])
    if len(both) > DOTS:
        both = np.random.default_rng(seed).choice(both, DOTS, replace=False)
    history, target = pairs.history[both], pairs.target[both]
    figure, axes = plot(4.5, 2.4)
    axes.hexbin(
        distances(coded.table("source"), history, target),
        distances(coded.table("latent"), history, target),
        gridsize=30,
        mincnt=1,
        bins="log",
        cmap="viridis",
        linewidths=0.1,
    )
    axes.set_xlabel("distance of item vectors")
    axes.set_ylabel("distance of sums of codes")
    return svg(figure)


def training_chart(log: list[dict[str, Any]]) -> str:
    """Parts of the loss over epochs; SVG, or '' where nothing was trained."""
    rows = [row for row in log if row.get("parts")]
    if len(rows) < 2:
        return ""
    figure, axes = plot(6.8, 2.4)
    for colour, name in zip(COLOURS, rows[0]["parts"]):
        # An epoch may have had no batch with two vectors of a modality that few items have.
        parts = dict.fromkeys(part for row in rows for part in row["parts"][name])
        for style, part in zip(LINE_STYLES, parts):
            values = [row["parts"][name].get(part, np.nan) for row in rows]
            epochs = [row["epoch"] for row in rows]
            axes.plot(epochs, values, linestyle=style, color=colour, label=f"{name}: {part}")
    epochs_along(axes)
    axes.set_ylabel("loss, unweighted")
    axes.set_yscale("log")
    legend_above(axes)
    return svg(figure)


def shared_codes(data: Interactions, coded: Coded, config: ReportSemanticIdsConfig) -> list[dict[str, Any]]:
    """Some codes of the first level, from often used to rarely used, with items that have them."""
    rng = np.random.default_rng(config.seed)
    items = coded.items
    first = coded.codes[items, 0]
    count = np.bincount(first, minlength=coded.codebooks.shape[1])
    used = np.flatnonzero(count > 1)
    used = used[np.argsort(-count[used], kind="stable")]
    places = np.unique(np.linspace(0, len(used) - 1, min(config.num_codes, len(used))).astype(int))
    shown = []
    for code in used[places]:
        own = items[first == code]
        chosen = (
            own if len(own) <= config.num_items else np.sort(rng.choice(own, config.num_items, replace=False))
        )
        shown.append({"code": int(code), "count": len(own), "items": cards(data, chosen)})
    return shown


def collision_groups(
    data: Interactions, coded: Coded, config: ReportSemanticIdsConfig
) -> list[dict[str, Any]]:
    """The largest groups of items that share all codes."""
    items = coded.items
    tuples, group, size = np.unique(coded.codes[items], axis=0, return_inverse=True, return_counts=True)
    shown = []
    for number in np.argsort(-size, kind="stable")[: config.num_codes]:
        if size[number] < 2:
            break
        own = items[group.ravel() == number]
        code = " ".join(str(part) for part in tuples[number])
        shown.append({"code": code, "count": len(own), "items": cards(data, own[: config.num_items])})
    return shown


def cards(data: Interactions, items: np.ndarray) -> list[dict[str, str | None]]:
    """Title (or raw id) and small picture of items."""
    found = []
    for item in items.tolist():
        title = data.items["title"][item - 1].as_py() or data.items["raw_id"][item - 1].as_py()
        found.append({"title": title[:80], "picture": thumbnail(data.image_file(item))})
    return found
