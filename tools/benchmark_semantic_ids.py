"""Training steps of MM-RQ-VAE timed against two references in the same run.

    python tools/benchmark_semantic_ids.py mmd          (MMD by inner products against the difference tensor)
    python tools/benchmark_semantic_ids.py quantiser    (needs vector-quantize-pytorch, from the extra `test`)
    python tools/benchmark_semantic_ids.py official     (for a GPU: the published sizes)
    python tools/benchmark_semantic_ids.py catalogue --items 1000000     (time and memory of a large one)

mmd: one modality, the published loss (MMD reconstruction), the same weights and batches; the reference forms
all differences of 2B rows, (2B, 2B, D) numbers, as the library does that the published code calls. quantiser:
encoder, 4 x 256 codes by running means, decoder, squared error; the reference is ResidualVQ between the same
encoder and decoder. Rounds alternate; the ratio is that of the medians. catalogue: random vectors, residual
k-means (or --epochs of training) and the report on it.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmrec import distributed, machine
from llmrec.semantic_ids import mm_rqvae
from llmrec.semantic_ids.config import PRESETS, LearnSemanticIdsConfig
from llmrec.semantic_ids.learn import model_settings
from llmrec.semantic_ids.mm_rqvae import MMRQVAE, mlp

H200_FLOPS = {"tf32": 495e12, "bfloat16": 990e12}
"""Dense peak of an H200, for the share that the official size reaches."""


def main(arguments: list[str] | None = None) -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("what", choices=["mmd", "quantiser", "official", "catalogue"])
    made.add_argument("--batch-size", type=int, help="items per step (256; quantiser 1024)")
    made.add_argument("--dim", type=int, default=1280, help="width of item vectors (1280)")
    made.add_argument("--steps", type=int, default=5, help="steps per round")
    made.add_argument("--rounds", type=int, default=5, help="alternating rounds")
    made.add_argument("--items", type=int, default=1_000_000, help="catalogue: number of items")
    made.add_argument("--epochs", type=int, default=0, help="catalogue: train so long; 0: residual k-means")
    made.add_argument("--precision", default="tf32", choices=["float32", "tf32", "bfloat16"])
    options = made.parse_args(arguments)
    distributed.device()
    kinds = {
        "mmd": compare_mmd,
        "quantiser": compare_quantisers,
        "official": official_size,
        "catalogue": large_catalogue,
    }
    kinds[options.what](options)
    print(f"{machine.describe()}, {torch.get_num_threads()} threads")


def compare_mmd(options: argparse.Namespace) -> None:
    """Our step against the same step with the difference tensor."""
    size = options.batch_size or 256
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


def mmd_by_differences(x: Tensor, y: Tensor, *, estimator: str) -> Tensor:
    """The same value from all differences of the 2B rows, differentiated by autograd."""
    joint = torch.cat([x, y])
    squares = (joint[None] - joint[:, None]).square().sum(dim=-1)
    kernel = torch.exp(-squares / squares.detach().mean())
    size = len(x)
    same = kernel[:size, :size].sum() + kernel[size:, size:].sum() - 2 * size
    return same / (size * (size - 1)) - 2 * kernel[:size, size:].mean() + 2 / (size - 1)


def compare_quantisers(options: argparse.Namespace) -> None:
    """Our quantiser against ResidualVQ, each between the same encoder and decoder."""
    from vector_quantize_pytorch import ResidualVQ

    size = options.batch_size or 1024
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
    dims = {"collab": 64, "text": 1280, "image": 1280}
    rows = {name: torch.randn(1024, dim) for name, dim in dims.items()}
    config = PRESETS["official"]
    from llmrec.semantic_ids.train import matrix_precision

    step = trainer(config, dims, rows)
    with matrix_precision(options.precision, distributed.device()):
        seconds = statistics.median(timed(step, options.steps) for _ in range(options.rounds))
    epoch = 12 * seconds
    weights = sum(parameter.numel() for parameter in MMRQVAE(**model_settings(config, dims)).parameters())
    flops = 6 * 1024 * weights / seconds
    peak = H200_FLOPS.get(options.precision)
    share = f", {flops / peak:.1%} of an H200's peak" if peak and torch.cuda.is_available() else ""
    print(f"{seconds * 1e3:.1f} ms per step; 12,086 items: {1000 * epoch:.1f} s per 1,000 epochs")
    print(f"{weights / 1e6:.1f} M weights, 6 x weights x rows: {flops / 1e12:.1f} TFLOP/s{share}")


def large_catalogue(options: argparse.Namespace) -> None:
    """Codes for random vectors of many items, and the report on them."""
    import resource

    import numpy as np
    import pyarrow as pa

    from llmrec.artifacts import CollabEmbeddings, ContentEmbeddings
    from llmrec.interactions import Interactions
    from llmrec.semantic_ids.config import ReportSemanticIdsConfig
    from llmrec.semantic_ids.learn import learn_semantic_ids
    from llmrec.semantic_ids.report import report_semantic_ids

    number, rng = options.items, np.random.default_rng(0)
    vectors = np.empty((number + 1, options.dim), np.float32)
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
    chosen = {"epochs": options.epochs, "log_every_epochs": 1} if options.epochs else {"method": "rkmeans"}
    config = LearnSemanticIdsConfig(modalities=("text",), min_utilisation=0.0, **chosen)
    started = time.perf_counter()
    ids = learn_semantic_ids(config, data, collab, content)
    learned = time.perf_counter()
    metrics = report_semantic_ids(ReportSemanticIdsConfig(), data, collab, content, ids).metrics
    done = time.perf_counter()
    found = metrics["modalities"]["text"]
    used = min(level["utilisation"] for level in found["levels"])
    print(f"{number:,} items of {options.dim} numbers ({vectors.nbytes / 1e9:.1f} GB): learn_semantic_ids")
    print(f"{(learned - started) / 60:.1f} min, report {(done - learned) / 60:.1f} min, peak memory")
    print(f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.1f} GB; codes used {used:.1%},")
    print(f"collision rate {found['collision_rate']:.4f}")


def trainer(
    config: LearnSemanticIdsConfig, dims: dict[str, int], rows: dict[str, Tensor]
) -> Callable[[], None]:
    """One training step on fixed rows."""
    distributed.seed_everything(0)
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
    print(f"ratio: median {theirs / mine:.2f}, min {min(ratios):.2f}, max {max(ratios):.2f}")


def timed(step: Callable[[], Any], steps: int) -> float:
    """Seconds per step."""
    synchronise()
    started = time.perf_counter()
    for _ in range(steps):
        step()
    synchronise()
    return (time.perf_counter() - started) / steps


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
