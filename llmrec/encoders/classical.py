"""Colour and shape of a picture in numbers: image vectors without a download.

Per picture, on a square of 64 pixels: a joint RGB histogram (4 bins a channel, square roots of
rates) and histograms of oriented gradients (HOG; Dalal and Triggs, 2005). Over all pictures: each
of the two blocks is centred and scaled to total variance 1, then PCA. Scaling single features
instead would blow up colours that hardly any picture has.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
from PIL import Image
from skimage.feature import hog
from sklearn.decomposition import PCA

from llmrec.errors import DataError

logger = logging.getLogger("llmrec")

SIDE = 64
COLOURS = 4**3


class ClassicalEncoder:
    """The per-picture part: prepare does the work, in threads; encode only stacks."""

    def prepare(self, inputs: list[Image.Image]) -> list[np.ndarray]:
        return [descriptor(picture) for picture in inputs]

    def encode(self, batch: list[np.ndarray]) -> np.ndarray:
        return np.stack(batch)

    def describe(self) -> dict[str, Any]:
        return {"preprocessing": f"{SIDE} x {SIDE} pixels, bilinear; RGB histogram; HOG"}


def descriptor(picture: Image.Image) -> np.ndarray:
    """Colour histogram, then HOG, of an RGB picture; float32 (64 + 1764,)."""
    small = picture.resize((SIDE, SIDE), Image.Resampling.BILINEAR, reducing_gap=2.0)
    pixels = np.asarray(small)
    bins = (pixels // 64).astype(np.int64) @ np.array([16, 4, 1])
    colour = np.sqrt(np.bincount(bins.ravel(), minlength=COLOURS) / SIDE**2)
    shape = hog(
        np.asarray(small.convert("L"), np.float32) / 255,
        orientations=9,
        pixels_per_cell=(8, 8),
        cells_per_block=(2, 2),
        feature_vector=True,
    )
    return np.concatenate([colour, shape]).astype(np.float32)


def reduce(
    features: np.ndarray, *, dim: int, seed: int
) -> tuple[np.ndarray, dict[str, Any], dict[str, np.ndarray]]:
    """PCA of descriptors, colour and shape weighing the same.

    Args:
        features: float32 (n, F) from `descriptor`.
        dim: width D; a smaller one results if the pictures do not span as many directions.
        seed: of the PCA where it is randomised.

    Returns:
        float32 (n, D), what was kept, and what `project` needs for other pictures.
    """
    centre = features.mean(axis=0)
    features, plain = features - centre, features
    if not (np.abs(features) > 1e-6).any():
        raise DataError(
            f"encode_items.image: all {len(features)} pictures look the same; check the image paths, or set "
            "encode_items.image.encoder=none"
        )
    scale = np.ones(features.shape[1], np.float32)
    for part in (slice(None, COLOURS), slice(COLOURS, None)):
        scale[part] = max(float(np.sqrt((features[:, part] ** 2).sum(axis=1).mean())), 1e-12)
    features /= scale
    pca = PCA(min(dim, *features.shape), random_state=seed).fit(features)
    sizes = pca.singular_values_
    rank = max(1, int((sizes > 1e-4 * sizes[0]).sum()))
    if rank < dim:
        logger.warning(
            "image: %d pictures span %d directions; width %d instead of %d", len(features), rank, rank, dim
        )
    fitted = {"centre": centre, "scale": scale, "mean": pca.mean_, "components": pca.components_[:rank]}
    kept = pca.explained_variance_ratio_[:rank].sum()
    about = {"dim_asked": dim, "explained_variance_rate": round(float(kept), 6)}
    return project(plain, fitted), about, fitted


def project(features: np.ndarray, fitted: dict[str, np.ndarray]) -> np.ndarray:
    """Vectors float32 (n, D) of descriptors, by a PCA that was fitted before."""
    scaled = (features - fitted["centre"]) / fitted["scale"]
    return ((scaled - fitted["mean"]) @ fitted["components"].T).astype(np.float32)
