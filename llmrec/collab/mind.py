"""MIND: several interests of a user by dynamic routing with one map for all of them.

Sources: Li et al., "Multi-Interest Network with Dynamic Routing for Recommendation at Tmall" (CIKM 2019), in
the form of THUDM/ComiRec (hard readout, fixed number of interests). Differs: a softmax over all items. A
dense layer with ReLU after the routing is in the paper and in that code's form for one data set of its two:
``relu_layer``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llmrec.collab.comirec import best_interest_loss, best_interest_scores, dynamic_routing
from llmrec.collab.losses import Loss
from llmrec.data.batches import Batch


class MIND(nn.Module):
    """See the module's head; a `llmrec.collab.provider.CollabProvider`.

    Since all interests see the same votes, they differ by their first routing logits alone: N(0, 1) cut at
    two, drawn once and never trained.
    """

    layout = "prefixes"
    uses_time = False

    start: Tensor

    def __init__(
        self,
        *,
        num_items: int,
        embed_dim: int,
        num_interests: int,
        num_routings: int,
        dropout_rate: float,
        max_history: int,
        relu_layer: bool = False,
        loss: str = "ce",
        num_negatives: int = 0,
    ) -> None:
        super().__init__()
        self.max_history = max_history
        self.loss_name = loss
        self.num_negatives = num_negatives
        self.num_routings = num_routings
        self.item = nn.Embedding(num_items + 1, embed_dim, padding_idx=0)
        self.dropout = nn.Dropout(dropout_rate)
        self.map = nn.Linear(embed_dim, embed_dim, bias=False)
        nn.init.xavier_uniform_(self.item.weight)
        nn.init.xavier_uniform_(self.map.weight)
        self.item.weight.data[0] = 0
        start = nn.init.trunc_normal_(torch.empty(max_history, num_interests), a=-2, b=2)
        self.register_buffer("start", start)
        self.after = dense_relu(embed_dim) if relu_layer else nn.Identity()

    def interests(self, history: Tensor) -> Tensor:
        """The interests after a history, (B, 1, K, D), from int64 (B, T)."""
        batch, length = history.shape
        votes = self.map(self.dropout(self.item(history)))[:, :, None]
        votes = votes.expand(-1, -1, self.start.shape[1], -1)
        start = self.start[:length].expand(batch, -1, -1)
        return self.after(dynamic_routing(votes, history != 0, start, self.num_routings))[:, None]

    def loss(self, batch: Batch) -> Loss:
        """Loss of naming the next item by the interest that suits it best."""
        return best_interest_loss(self, batch)

    def score(self, history: Tensor) -> Tensor:
        """Scores of all items after each history, (B, N + 1), from int64 (B, T)."""
        return best_interest_scores(self, history)

    def item_embeddings(self) -> Tensor:
        """The item vectors (N + 1, D), row 0 zero."""
        return self.item.weight.detach()


def dense_relu(width: int) -> nn.Sequential:
    """One map with ReLU for all interests, begun as TensorFlow does: Glorot-uniform, no bias."""
    dense = nn.Linear(width, width)
    nn.init.xavier_uniform_(dense.weight)
    nn.init.zeros_(dense.bias)
    return nn.Sequential(dense, nn.ReLU())
