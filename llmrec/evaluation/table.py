"""The headline table of an evaluation as text."""

from __future__ import annotations

from typing import Any

from llmrec.evaluation.metrics import METRICS


def format_table(metrics: dict[str, Any]) -> str:
    """The headline table as aligned text, with the ratios below."""
    rows, shown = metrics["rows"], metrics.get("labels", {})
    ks = sorted({int(name.partition("@")[2]) for name in next(iter(rows.values()))})
    names = [f"{metric}@{k}" for metric in METRICS for k in ks]
    width = 1 + max(15, *(len(shown.get(method, method)) for method in rows))
    lines = [f"{'method':{width}s}" + "".join(f"{name:>10s}" for name in names)]
    for method, row in rows.items():
        lines.append(
            f"{shown.get(method, method):{width}s}" + "".join(f"{row[name]:10.4f}" for name in names)
        )
    lines.append(f"{metrics['num_users']:,} users, {metrics['num_items']:,} items, {metrics['split']}")
    lines += metrics.get("notes", [])
    for method, found in metrics["ratios"].items():
        parts = []
        if "over_popularity" in found:
            parts.append(f"{found['over_popularity']:.1f} x popularity")
        if "over_best_possible" in found:
            parts.append(f"{found['over_best_possible']:.1%} of the best possible")
        if parts:
            lines.append(f"recall@10 of {shown.get(method, method)}: {', '.join(parts)}")
    return "\n".join(lines)
