"""Item vectors that know what items look like: one of its own for every item, plus maps of content.

    e_i = ID_i + sum_m W_m x_m[i]

x_m are the content vectors of modality m, centred and turned to their principal components, each with unit
variance ("whitened"). Where the table is input and output of a model, what is learned about one item moves
all that read or look like it, and the vectors of their own learn what content does not say.

Source: the sum is that of many models with side information; whitening is Zhang et al., "Are ID Embeddings
Necessary? Whitening Pre-trained Text Embeddings for Effective Sequential Recommendation" (ICDE 2024), who use
several groups of components and no vectors of their own beside them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

INIT_STD = 0.02
"""Spread of the item vectors at the start, and of what content adds to them."""


class ContentMaps(nn.Module):
    """The maps W_m, and the components x_m of every item.

    Args:
        num_items: N.
        embed_dim: width D.
        content: modalities; empty: nothing is added.
        content_dim: components of each.
    """

    def __init__(self, num_items: int, embed_dim: int, content: Iterable[str], content_dim: int) -> None:
        super().__init__()
        self.maps = nn.ModuleDict({name: nn.Linear(content_dim, embed_dim, bias=False) for name in content})
        for name in self.maps:
            self.register_buffer(name, torch.zeros(num_items + 1, content_dim))

    def read(self, vectors: Mapping[str, np.ndarray]) -> None:
        """Take the components of every item's content vectors, float (N + 1, D_m) by modality, and start the
        maps small.

        Called once before training; a model that is loaded has them among its weights.
        """
        for name, linear in self.maps.items():
            assert isinstance(linear, nn.Linear)
            self.get_buffer(name).copy_(
                torch.from_numpy(principal_components(vectors[name], linear.in_features))
            )
            nn.init.normal_(linear.weight, std=INIT_STD / linear.in_features**0.5)

    def forward(self, own: Tensor) -> Tensor:
        """The items' own vectors (N + 1, D) plus what their content adds; row 0 of that is zero."""
        for name, linear in self.maps.items():
            own = own + linear(self.get_buffer(name))
        return own


def principal_components(vectors: np.ndarray, width: int) -> np.ndarray:
    """Whitened principal components of item vectors, float32 (N + 1, width), the strongest first.

    Rows of zeros (padding, items without a vector) take no part and stay zero, and so do columns beyond the
    directions in which the others differ.

    Args:
        vectors: (N + 1, D_m).
        width: number of components.
    """
    found = np.zeros((len(vectors), width), dtype=np.float32)
    there = vectors.any(axis=1)
    rows = vectors[there].astype(np.float64)
    if len(rows) < 2 or not rows.var(axis=0).any():
        return found
    # scikit-learn makes the signs of directions certain, so machines agree but for rounding.
    from sklearn.decomposition import PCA  # seconds to import, and few models need it

    fitted = PCA(n_components=min(width, *rows.shape), whiten=True, svd_solver="covariance_eigh").fit(rows)
    kept = int((fitted.explained_variance_ > 1e-9 * fitted.explained_variance_[0]).sum())
    found[there, :kept] = fitted.transform(rows)[:, :kept]
    return found
