"""The headline table of an evaluation, as text and in a notebook."""

from __future__ import annotations

from html import escape
from typing import Any

from llmrec.evaluation.metrics import METRICS


def format_table(metrics: dict[str, Any]) -> str:
    """The headline table as aligned text, with the ratios below."""
    names, rows = columns(metrics), metrics["rows"]
    width = 1 + max(15, *(len(label(metrics, method)) for method in rows))
    lines = [f"{'method':{width}s}" + "".join(f"{name:>10s}" for name in names)]
    for method, row in rows.items():
        lines.append(f"{label(metrics, method):{width}s}" + "".join(f"{row[name]:10.4f}" for name in names))
    return "\n".join([*lines, *below(metrics)])


def html_table(metrics: dict[str, Any]) -> str:
    """The same as an HTML element."""
    names = columns(metrics)
    head = "".join(f"<th>{name}</th>" for name in ("method", *names))
    rows = (
        f"<tr><td>{escape(label(metrics, method))}</td>"
        + "".join(f"<td>{row[name]:.4f}</td>" for name in names)
        + "</tr>"
        for method, row in metrics["rows"].items()
    )
    return f"<table><tr>{head}</tr>{''.join(rows)}</table>" + "<br>".join(map(escape, below(metrics)))


def columns(metrics: dict[str, Any]) -> list[str]:
    """Names of the metrics, in order."""
    ks = sorted({int(name.partition("@")[2]) for name in next(iter(metrics["rows"].values()))})
    return [f"{metric}@{k}" for metric in METRICS for k in ks]


def label(metrics: dict[str, Any], method: str) -> str:
    """What a method is called where people read."""
    return str(metrics.get("labels", {}).get(method, method))


def below(metrics: dict[str, Any]) -> list[str]:
    """Lines on how many were ranked, and how far above popularity and below the best possible."""
    lines = [f"{metrics['num_users']:,} users, {metrics['num_items']:,} items, {metrics['split']}"]
    lines += metrics.get("notes", [])
    for method, found in metrics["ratios"].items():
        parts = []
        if "over_popularity" in found:
            parts.append(f"{found['over_popularity']:.1f} x popularity")
        if "over_best_possible" in found:
            parts.append(f"{found['over_best_possible']:.1%} of the best possible")
        if parts:
            lines.append(f"recall@10 of {label(metrics, method)}: {', '.join(parts)}")
    return lines
