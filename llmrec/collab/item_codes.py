"""Items as short strings of codes, for models that read and write codes in place of item ids.

Residual codes are semantic IDs by k-means alone: every level codes what the levels before left over. Product
codes cut a vector into pieces and code each. Neither is trained.

Sources: Rajput et al., "Recommender Systems with Generative Retrieval" (TIGER, NeurIPS 2023) for codes by
residual quantisation, one more that tells items apart, and random codes as an ablation; snap-research/GRID
for k-means in place of RQ-VAE; Zhang et al., arXiv 2410.19276 (MOTOR) for product quantisation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from llmrec.errors import ConfigError
from llmrec.semantic_ids.kmeans import kmeans, nearest

Kind = Literal["residual", "product"]

ROUNDS = 50
"""Most rounds of k-means."""


def codes_of_all(
    vectors: Mapping[str, np.ndarray], names: Iterable[str], num_places: int, num_codes: int, kind: Kind
) -> np.ndarray:
    """Codes of several modalities, one after the other, int64 (N + 1, modalities * num_places); see
    `codes_of`. The seed is torch's."""
    seed = torch.initial_seed() % 2**31
    return np.concatenate(
        [codes_of(vectors[name], num_places, num_codes, kind, seed) for name in names], axis=1
    )


def codes_of(vectors: np.ndarray, num_places: int, num_codes: int, kind: Kind, seed: int) -> np.ndarray:
    """Codes of every item, int64 (N + 1, num_places), from content vectors (N + 1, D); row 0 is 0.

    Items without a vector (zeros) are coded like any others, and so are alike.

    Raises:
        ConfigError: there are fewer items than codes, or fewer columns than pieces.
    """
    rows = torch.from_numpy(vectors[1:]).float()
    if len(rows) < num_codes:
        raise ConfigError(f"{len(rows)} items cannot fill {num_codes} codes; set num_codes lower")
    if kind == "product" and rows.shape[1] < num_places:
        raise ConfigError(f"vectors of width {rows.shape[1]} cannot be cut into {num_places} pieces")
    generator = torch.Generator().manual_seed(seed)

    def coded(left: Tensor) -> tuple[Tensor, Tensor]:
        centres = kmeans(left, num_codes, ROUNDS, generator, relocate_idle=True)
        codes = nearest(left, centres)[1]
        return codes, left - centres[codes]

    rows = rows - rows.mean(0)
    if kind == "product":
        found = [coded(piece)[0] for piece in rows.tensor_split(num_places, dim=1)]
    else:
        found = []
        for _ in range(num_places):
            codes, rows = coded(rows)
            found.append(codes)
    return np.pad(torch.stack(found, 1).numpy(), ((1, 0), (0, 0)))


def told_apart(codes: np.ndarray, num_codes: int) -> np.ndarray:
    """Codes (N + 1, P) with one more place, int64 (N + 1, P + 1), that numbers the items of equal codes.

    Of more than num_codes items with equal codes, those beyond have the last of these codes replaced by the
    next one under which there is room.

    Raises:
        ConfigError: there is no room for all.
    """
    taken: dict[tuple[int, ...], int] = {}
    found = np.zeros((len(codes), codes.shape[1] + 1), dtype=np.int64)
    for item, own in enumerate(codes[1:].tolist(), start=1):
        first = own[-1]
        for step in range(num_codes):
            own[-1] = (first + step) % num_codes
            number = taken.get(tuple(own), 0)
            if number < num_codes:
                break
        else:
            raise ConfigError(
                f"more than {num_codes**2:,} items share all codes but the last, too many to tell apart; set "
                "num_codes higher, or give these items content"
            )
        taken[tuple(own)] = number + 1
        found[item] = [*own, number]
    return found


def random_codes(num_items: int, num_places: int, num_codes: int, seed: int) -> np.ndarray:
    """Codes without meaning, int64 (N + 1, num_places), row 0 is 0."""
    drawn = np.random.default_rng(seed).integers(num_codes, size=(num_items + 1, num_places))
    drawn[0] = 0
    return drawn
