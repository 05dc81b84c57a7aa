"""Training steps of MM-RQ-VAE timed against two references in the same run.

    python tools/benchmark_semantic_ids.py mmd          (MMD by inner products against the difference tensor)
    python tools/benchmark_semantic_ids.py quantiser    (needs vector-quantize-pytorch, from the extra `test`)
    python tools/benchmark_semantic_ids.py official     (for a GPU: the published sizes)
    python tools/benchmark_semantic_ids.py catalogue --items 1000000     (time and memory of a large one)

mmd: one modality, the published loss (MMD reconstruction), the same weights and batches; the reference forms
all differences of 2B rows, (2B, 2B, D) numbers, as the library does that the published code calls. quantiser:
encoder, 4 x 256 codes by running means, decoder, squared error; the reference is ResidualVQ between the same
encoder and decoder. Rounds alternate; the ratio is the median over rounds. catalogue: random vectors,
residual k-means (or --epochs of training) and the report on it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from llmrec import arguments, distributed, global_state, machine
from llmrec.console import guarded, set_up_logging, show_lines_at_once
from llmrec.errors import ConfigError
from llmrec.semantic_ids.config import PRESETS, LearnSemanticIdsConfig

if TYPE_CHECKING:
    from torch import Tensor, nn

    from llmrec.artifacts import CollabEmbeddings, ContentEmbeddings
    from llmrec.interactions import Interactions

H200_FLOPS = {"tf32": 495e12, "bfloat16": 990e12}
"""Dense peak of an H200, for the share that the official size reaches."""


def main(arguments: list[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    show_lines_at_once()
    raise SystemExit(guarded(lambda: measure(options)))


def parser() -> argparse.ArgumentParser:
    made, verb = arguments.with_verbs(__doc__)
    mmd = verb("mmd", "training step with MMD by inner products against the difference tensor")
    quantiser = verb("quantiser", "our quantiser against ResidualVQ; needs vector-quantize-pytorch")
    official = verb("official", "training steps of the published size; for a GPU")
    large = verb("catalogue", "time and memory of semantic IDs for a large catalogue, and of their report")
    arguments.add_count(mmd, "--batch-size", 256, "items per step, at least 2")
    arguments.add_count(quantiser, "--batch-size", 1024, "items per step")
    for one in (mmd, quantiser, large):
        arguments.add_count(one, "--dim", 1280, "width of item vectors")
    for one in (mmd, quantiser, official):
        arguments.add_count(one, "--steps", 5, "steps per round")
        arguments.add_count(one, "--rounds", 5, "rounds, which alternate where there is a reference")
    official.add_argument(
        "--precision", default="tf32", choices=["float32", "tf32", "bfloat16"],
        help="number format of matrix products; tf32 is float32 on a CPU (tf32)",
    )  # fmt: skip
    arguments.add_count(
        large, "--items", 1_000_000,
        "number of items; vectors of a million take 5.1 GB and all of it about 8; with one thread 100,000 "
        "take 9 minutes and 3.9 GB, a million far longer",
    )  # fmt: skip
    arguments.add_count(large, "--epochs", 0, "train so long; 0: residual k-means", arguments.whole)
    return made


def measure(options: argparse.Namespace) -> None:
    """Do what the command line says."""
    set_up_logging()
    import torch

    distributed.device()
    kinds = {
        "mmd": compare_mmd,
        "quantiser": compare_quantisers,
        "official": official_size,
        "catalogue": large_catalogue,
    }
    kinds[options.verb](options)
    print(f"{machine.describe()}, {torch.get_num_threads()} threads")


def compare_mmd(options: argparse.Namespace) -> None:
    """Our step against the same step with the difference tensor."""
    import torch

    from llmrec.semantic_ids import mm_rqvae

    size = options.batch_size
    if size < 2:
        raise ConfigError(f"--batch-size of mmd must be at least 2, as MMD compares pairs, got {size}")
    config = LearnSemanticIdsConfig(reconstruction="mmd", alignment="none")
    rows = {"text": torch.randn(size, options.dim, generator=torch.Generator().manual_seed(0))}
    ours = trainer(config, {"text": options.dim}, rows)
    by_differences = trainer(config, {"text": options.dim}, rows)

    def reference() -> None:
        plain, mm_rqvae.mmd = mm_rqvae.mmd, mmd_by_differences
        try:
            by_differences()
        finally:
            mm_rqvae.mmd = plain

    report(
        f"batch {size}, vectors of {options.dim}", "inner products", ours, "differences", reference, options
    )


def mmd_by_differences(x: Tensor, y: Tensor, *, estimator: Literal["tllib", "unbiased"] = "tllib") -> Tensor:
    """The same value from all differences of the 2B rows, differentiated by autograd."""
    import torch

    joint = torch.cat([x, y])
    squares = (joint[None] - joint[:, None]).square().sum(dim=-1)
    kernel = torch.exp(-squares / squares.detach().mean())
    size = len(x)
    same = kernel[:size, :size].sum() + kernel[size:, size:].sum() - 2 * size
    return same / (size * (size - 1)) - 2 * kernel[:size, size:].mean() + 2 / (size - 1)


def compare_quantisers(options: argparse.Namespace) -> None:
    """Our quantiser against ResidualVQ, each between the same encoder and decoder."""
    import torch
    from torch.nn import functional as F

    from llmrec.semantic_ids.mm_rqvae import mlp

    try:
        from vector_quantize_pytorch import ResidualVQ
    except ImportError:
        raise ConfigError(
            "quantiser needs vector-quantize-pytorch: pip install vector-quantize-pytorch"
        ) from None
    size = options.batch_size
    config = LearnSemanticIdsConfig(
        reconstruction="mse", alignment="none", sinkhorn="none", codebook_update="ema"
    )
    rows = torch.randn(size, options.dim, generator=torch.Generator().manual_seed(0))
    ours = trainer(config, {"text": options.dim}, {"text": rows})
    widths = (options.dim, *config.hidden_dims, config.code_dim)
    encoder, decoder = mlp(widths), mlp(widths[::-1])
    quantiser = ResidualVQ(
        dim=config.code_dim, num_quantizers=config.num_levels, codebook_size=config.num_codes, decay=0.99,
        commitment_weight=config.commitment_weight,
    ).to(distributed.device())  # fmt: skip
    device = distributed.device()
    encoder, decoder, rows = encoder.to(device), decoder.to(device), rows.to(device)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *decoder.parameters()], lr=1e-3, fused=True)

    def reference() -> None:
        vectors, _codes, loss = quantiser(encoder(rows)[None])
        total = F.mse_loss(decoder(vectors[0]), rows) + loss.sum()
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        optimizer.step()

    what = f"batch {size}, vectors of {options.dim}, {config.num_levels} x {config.num_codes} codes"
    report(what, "ours", ours, "ResidualVQ", reference, options)


def official_size(options: argparse.Namespace) -> None:
    """Steps of the published size: three modalities, 4096-wide layers and codes, batches of 1,024."""
    import torch

    from llmrec.precision import matrix_precision
    from llmrec.semantic_ids.learn import model_settings
    from llmrec.semantic_ids.mm_rqvae import MMRQVAE

    dims = {"collab": 64, "text": 1280, "image": 1280}
    config = PRESETS["official"]
    with torch.device("meta"):
        weights = sum(one.numel() for one in MMRQVAE(**model_settings(config, dims)).parameters())
    device = distributed.device()
    if device.type == "cpu":
        announce(6 * 1024 * weights, weights, options)
    rows = {name: torch.randn(1024, dim) for name, dim in dims.items()}
    step = trainer(config, dims, rows)
    with matrix_precision(options.precision, device):
        seconds = statistics.median(timed(step, options.steps) for _ in range(options.rounds))
    epoch = 12 * seconds
    flops = 6 * 1024 * weights / seconds
    peak = H200_FLOPS.get(options.precision)
    share = f", {flops / peak:.1%} of an H200's peak" if peak and device.type == "cuda" else ""
    print(f"{seconds * 1e3:.1f} ms per step; 12,086 items: {1000 * epoch:.1f} s per 1,000 epochs")
    print(f"{weights / 1e6:.1f} M weights, 6 x weights x rows: {flops / 1e12:.3g} TFLOP/s{share}")


def announce(flops: int, weights: int, options: argparse.Namespace) -> None:
    """Say on a CPU what is to be computed: it is meant for a GPU.

    Args:
        flops: operations of a step.
        weights: how many are trained; each takes 16 bytes with its gradient and the two states of Adam.
        options: the command line.
    """
    import torch

    number = options.steps * options.rounds
    least = number * flops / machine.matmul_peak(torch.device("cpu"), torch.float32)
    print(
        f"official is meant for a GPU, and this is a CPU: {number} x {flops / 1e12:.1f} TFLOP take "
        f"at least {duration(least)} here, and {16 * weights / 1e9:.1f} GB of memory (--steps and --rounds "
        "make them fewer; Ctrl-C stops)"
    )


def large_catalogue(options: argparse.Namespace) -> None:
    """Codes for random vectors of many items, and the report on them."""
    import torch

    from llmrec.semantic_ids.config import ReportSemanticIdsConfig
    from llmrec.semantic_ids.learn import learn_semantic_ids
    from llmrec.semantic_ids.report import report_semantic_ids

    if options.items < LearnSemanticIdsConfig.num_codes:
        raise ConfigError(
            f"--items must be at least {LearnSemanticIdsConfig.num_codes}, as many as there are codes, got "
            f"{options.items}"
        )
    data, collab, content = random_catalogue(options.items, options.dim)
    chosen = {"epochs": options.epochs, "log_every_epochs": 1} if options.epochs else {"method": "rkmeans"}
    config = LearnSemanticIdsConfig(modalities=("text",), min_utilisation=0.0, **chosen)
    started = time.perf_counter()
    ids = learn_semantic_ids(config, data, collab, content)
    learned = time.perf_counter()
    metrics = report_semantic_ids(ReportSemanticIdsConfig(), data, collab, content, ids).metrics
    done = time.perf_counter()
    found = metrics["modalities"]["text"]
    used = min(level["utilisation"] for level in found["levels"])
    size = content.vectors["text"].nbytes / 1e9
    memory = machine.peak_memory(torch.device("cpu")) / 1e9
    print(
        f"{options.items:,} items of {options.dim} numbers ({size:.1f} GB): learn_semantic_ids "
        f"{duration(learned - started)}, report {duration(done - learned)}, peak memory {memory:.1f} GB; "
        f"codes used {used:.1%}, collision rate {found['collision_rate']:.4f}"
    )


def random_catalogue(number: int, dim: int) -> tuple[Interactions, CollabEmbeddings, ContentEmbeddings]:
    """Random vectors of many items, and users of eight random items each."""
    import numpy as np
    import pyarrow as pa

    from llmrec.artifacts import CollabEmbeddings, ContentEmbeddings
    from llmrec.interactions import Interactions

    rng = np.random.default_rng(0)
    vectors = np.empty((number + 1, dim), np.float32)
    rng.standard_normal(out=vectors, dtype=np.float32)
    vectors[0] = 0
    users = min(20_000, number)
    item = rng.integers(1, number + 1, 8 * users)
    split = np.tile(np.array([0, 0, 0, 0, 0, 0, 1, 2], np.int8), users)
    names = [f"item {place}" for place in range(number)]
    count = np.bincount(item[split == 0], minlength=number + 1)[1:]
    table = {
        "raw_id": names,
        "title": names,
        "train_count": count,
        "image_path": pa.nulls(number, pa.string()),
    }
    data = Interactions(
        user_raw_ids=[str(user) for user in range(users)],
        items=pa.table(table),
        offset=np.arange(users + 1) * 8,
        item=item,
        timestamp=np.tile(np.arange(8), users),
        split=split,
        summary={},
    )
    flat = np.zeros((number + 1, 1), np.float32)
    collab = CollabEmbeddings(catalog=data.catalog, provider="precomputed", vectors=flat)
    missing = {"text": np.zeros(number + 1, bool)}
    content = ContentEmbeddings(catalog=data.catalog, vectors={"text": vectors}, missing=missing)
    return data, collab, content


def duration(seconds: float) -> str:
    """In seconds below a minute, else in minutes."""
    return f"{seconds:.1f} s" if seconds < 60 else f"{seconds / 60:.1f} min"


def trainer(
    config: LearnSemanticIdsConfig, dims: dict[str, int], rows: dict[str, Tensor]
) -> Callable[[], None]:
    """One training step on fixed rows."""
    import torch

    from llmrec.semantic_ids.learn import model_settings
    from llmrec.semantic_ids.mm_rqvae import MMRQVAE

    global_state.seed_everything(0)
    device = distributed.device()
    model: nn.Module = MMRQVAE(**model_settings(config, dims)).to(device).train()
    rows = {name: table.to(device) for name, table in rows.items()}
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(wanted, lr=1e-3, fused=True)

    def step() -> None:
        total = model(rows)[1].total
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        optimizer.step()

    return step


def report(
    what: str, name: str, ours: Callable[[], Any], other: str, reference: Callable[[], Any], options: Any
) -> None:
    """Time both in alternating rounds and print steps per second and their ratio."""
    ours(), reference()
    pairs = [(timed(ours, options.steps), timed(reference, options.steps)) for _ in range(options.rounds)]
    mine, theirs = (statistics.median(column) for column in zip(*pairs))
    ratios = [second / first for first, second in pairs]
    print(f"{what}: {name} {1 / mine:.2f} steps/s, {other} {1 / theirs:.2f} steps/s")
    print(f"ratio: median {statistics.median(ratios):.2f}, min {min(ratios):.2f}, max {max(ratios):.2f}")


def timed(step: Callable[[], Any], steps: int) -> float:
    """Seconds per step."""
    machine.finish(distributed.device())
    started = time.perf_counter()
    for _ in range(steps):
        step()
    machine.finish(distributed.device())
    return (time.perf_counter() - started) / steps


if __name__ == "__main__":
    main()
