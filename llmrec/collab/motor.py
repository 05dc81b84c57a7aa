"""MOTOR: no table of items; an item's vector is made of its codes' vectors, crossed with each other.

Source: Zhang et al., "Learning ID-free Item Representation with Token Crossing for Multimodal Recommendation"
(2024), arXiv 2410.19276: product quantisation of texts and images, a vector per code, a Token Cross Network,
no further loss. Its code is not public and the network's formula not known to us: ours has the cross layers
of DCN-V2 (Wang et al., WWW 2021). SASRec reads and scores the vectors, as in the MME-SID paper's table.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmrec.collab.item_codes import Kind, codes_of_all, random_codes
from llmrec.collab.layers import init_weights
from llmrec.collab.sasrec import SASRec

logger = logging.getLogger("llmrec")


class Motor(SASRec):
    """See the module's head; a `llmrec.collab.provider.CollabProvider`.

    Items of equal codes have equal vectors and share every place in a ranking.
    """

    def __init__(
        self,
        *,
        num_items: int,
        content: Iterable[str],
        quantizer: Kind,
        num_levels: int,
        num_codes: int,
        num_crosses: int,
        embed_dim: int,
        **of_sasrec: Any,
    ) -> None:
        super().__init__(num_items=num_items, embed_dim=embed_dim, **of_sasrec)
        self.modalities, self.quantizer = tuple(content), quantizer
        self.num_levels, self.num_codes = num_levels, num_codes
        places = num_levels * max(len(self.modalities), 1)
        del self.item  # SASRec's table, in whose place come
        self.items = CrossedCodes(num_items, places, num_codes, num_crosses, embed_dim)

    def read_content(self, vectors: Mapping[str, np.ndarray]) -> None:
        """Make the items' codes of their content vectors, float (N + 1, D_m) by modality; once, before
        training. A model that is loaded has them among its weights."""
        self._take(codes_of_all(vectors, self.modalities, self.num_levels, self.num_codes, self.quantizer))

    def read_codes(self, codes: Mapping[str, np.ndarray]) -> None:
        """Take codes made elsewhere in their place, int64 (N + 1, num_levels) by modality."""
        self._take(np.concatenate([codes[name] for name in self.modalities], axis=1))

    def _take(self, found: np.ndarray) -> None:
        """Give the items these codes, int64 (N + 1, places), and say how many cannot be told apart."""
        self.items.codes.copy_(torch.from_numpy(found))
        _, count = np.unique(found[1:], axis=0, return_counts=True)
        logger.info(
            "train_collab: %d of %d items share all their codes with others, and so their places in rankings",
            count[count > 1].sum(), self.num_items,
        )  # fmt: skip

    def _table(self) -> Tensor:
        return self.items()


class CrossedCodes(nn.Module):
    """Vectors of all items, (N + 1, D), row 0 zero, from those of their codes.

        x_0 = the codes' vectors side by side
        x_l+1 = x_0 * (W_l x_l + b_l) + x_l, and a linear map of the last

    Args:
        num_items: N.
        num_places: codes P of an item; random until others are copied into `codes`, int64 (N + 1, P).
        num_codes: codes to choose from at every place.
        num_crosses: layers.
        embed_dim: width D of code vectors and of item vectors.
    """

    codes: Tensor
    first: Tensor

    def __init__(
        self, num_items: int, num_places: int, num_codes: int, num_crosses: int, embed_dim: int
    ) -> None:
        super().__init__()
        width = num_places * embed_dim
        seed = int(torch.randint(2**31, ()))
        self.register_buffer("codes", torch.from_numpy(random_codes(num_items, num_places, num_codes, seed)))
        self.register_buffer("first", num_codes * torch.arange(num_places), persistent=False)
        self.token = nn.Embedding(num_places * num_codes, embed_dim)
        self.crosses = nn.ModuleList(nn.Linear(width, width) for _ in range(num_crosses))
        self.out = nn.Linear(width, embed_dim, bias=False)
        nn.init.normal_(self.token.weight, std=0.02)
        self.crosses.apply(init_weights)
        nn.init.normal_(self.out.weight, std=width**-0.5)  # item vectors as spread as code vectors

    def forward(self) -> Tensor:
        first = self.token(self.codes[1:] + self.first).flatten(1)
        crossed = first
        for layer in self.crosses:
            crossed = first * layer(crossed) + crossed
        return F.pad(self.out(crossed), (0, 0, 1, 0))
