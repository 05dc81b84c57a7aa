"""An estimate as people read it: counts and memory as they are, and times, which are rough, on one GPU."""

from __future__ import annotations

from llmrec.estimate import Estimate
from llmrec.stage_times import UTILISATION, Gpu, duration

GPUS = {
    "A100": Gpu(312e12, 80e9, 2.04e12, 19.5e12, 156e12),
    "H100": Gpu(989e12, 80e9, 3.35e12, 67e12, 495e12),
    "H200": Gpu(989e12, 141e9, 4.8e12, 67e12, 495e12),
    "RTX4090": Gpu(165e12, 24e9, 1.01e12, 82.6e12, 82.6e12),
    "L40S": Gpu(362e12, 48e9, 0.864e12, 91.6e12, 183e12),
}

MOVED = 3.0
"""What a step takes beside its operations, in times of reading the frozen weights twice and of updating the
trained ones once. Fitted, as `UTILISATION` was, to an H200 with Llama-3-8B at 16, 64 and 256 targets a step
(tools/engine.md)."""


def shown(found: Estimate, gpu: str) -> str:
    """The estimate as people read it."""
    memory = GPUS[gpu].memory
    counts, parts = found.counts, found.parameters
    fewer = counts["tokens_per_prefix"] / max(counts["tokens"], 1)
    lines = [
        f"data        {counts['users']:,} users, {counts['items']:,} items, "
        f"{counts['interactions']:,} interactions",
        f"per epoch   {counts['targets']:,} targets in {counts['steps']:,} steps; {counts['tokens']:,} "
        f"tokens ({fewer:.1f} times fewer than one prompt per target)",
        f"parameters  {'at most ' if found.bounds else ''}{parts['trainable']:,} trained, "
        + ("with" if parts["base_trainable"] == parts["base_total"] else "beside")
        + f" a base of {parts['base_total']:,}",
    ]
    lines += [
        f"            {count:>15,}  {name.replace('_', ' ')}"
        for name, count in parts.items()
        if count and name not in ("trainable", "base_total")
    ]
    if found.bounds:
        widths = " and ".join(f"{name} at most {width}" for name, width in found.bounds.items())
        lines.append(
            f"widths      {widths}; exact with the --run-dir of a run that has finished encode_items"
        )
    lines.append(f"operations  {scaled(found.total_flops, 'FLOP')} per epoch")
    lines += [
        f"            {scaled(value, 'FLOP'):>15}  {name}" for name, value in found.flops.items() if value
    ]
    fits = "fits" if found.total_memory < 0.92 * memory else "does not fit"
    lines.append(f"memory      {scaled(found.total_memory, 'B')}; {fits} one {gpu} ({scaled(memory, 'B')})")
    lines += [
        f"            {scaled(value, 'B'):>15}  {name}" for name, value in found.memory.items() if value
    ]
    return "\n".join([*lines, *times(found, gpu)])


def times(found: Estimate, gpu: str) -> list[str]:
    """Lines on how long each stage takes."""
    if found.moved is None:
        fine = "not known for a mini base, 4 bits, 8-bit states or recomputed activations"
    else:
        peak = GPUS[gpu].peak_fp32 if found.precision == "fp32" else GPUS[gpu].peak
        seconds = found.total_flops / (peak * UTILISATION) + MOVED * found.moved / GPUS[gpu].bandwidth
        number = found.counts["epochs"]
        most = "at most " if found.ends_early else ""
        fine = (
            f"{most}{duration(seconds * number)}: {most}{number} epoch{'s' * (number != 1)} of "
            f"{duration(seconds)}"
        )
    others = {
        stage: work if isinstance(work, str) else work.shown(GPUS[gpu])
        for stage, work in found.others.items()
    }
    return [
        f"time        on one {gpu} (rough)",
        *(
            f"            {stage:18}  {others.get(stage, fine)}"
            for stage in ("train_collab", "encode_items", "learn_semantic_ids", "finetune", "evaluate")
        ),
    ]


def scaled(value: float, unit: str) -> str:
    """Three digits with a prefix: 1.23 GB."""
    for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if value >= 0.9995 * size:  # else it might be rounded to 1e+03 of the smaller unit
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value / 1e3:.3g} k{unit}"
