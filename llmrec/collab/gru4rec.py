"""GRU4Rec: a gated recurrent network over item ids, trained with a softmax over all items.

Source: Hidasi et al., "Session-based Recommendations with Recurrent Neural Networks" (ICLR 2016), in the
form of RUCAIBox/RecBole: item vectors, one bias-free GRU, a linear map back to the width of the item
vectors, tied output. Differs from hidasib/GRU4Rec: no session-parallel batches with carried states (a
row starts from a zero state), no output bias, Adam, and a loss over all items in place of BPR-max and
popularity-sampled negatives; its authors report that such versions can be far worse on session data.
"""

from __future__ import annotations

from torch import Tensor, nn

from llmrec.collab.losses import Loss, last_of, next_item_loss
from llmrec.data.batches import Batch


class GRU4Rec(nn.Module):
    """See the module's head; a `llmrec.collab.provider.CollabProvider`.

    Initial weights as in RecBole: Xavier-normal item vectors, Xavier-uniform recurrent weights.
    """

    layout = "positions"
    uses_time = False

    def __init__(
        self,
        *,
        num_items: int,
        embed_dim: int,
        hidden_dim: int,
        num_layers: int,
        dropout_rate: float,
        max_history: int,
        loss: str = "ce",
        num_negatives: int = 0,
    ) -> None:
        super().__init__()
        self.max_history = max_history
        self.loss_name = loss
        self.num_negatives = num_negatives
        self.item = nn.Embedding(num_items + 1, embed_dim, padding_idx=0)
        self.dropout = nn.Dropout(dropout_rate)
        self.gru = nn.GRU(
            embed_dim,
            hidden_dim,
            num_layers,
            bias=False,
            batch_first=True,
            dropout=dropout_rate if num_layers > 1 else 0.0,
        )
        self.out = nn.Linear(hidden_dim, embed_dim)
        nn.init.xavier_normal_(self.item.weight)
        self.item.weight.data[0] = 0
        for weight in self.gru.parameters():
            nn.init.xavier_uniform_(weight)

    def encode(self, history: Tensor) -> Tensor:
        """What the model knows after each position, (B, T, D), from int64 (B, T)."""
        hidden, _ = self.gru(self.dropout(self.item(history)))
        return self.out(hidden)

    def loss(self, batch: Batch) -> Loss:
        """Loss of naming the next item at every position of a batch."""
        query = self.encode(batch.item)
        return next_item_loss(
            self.loss_name, query, self.item.weight, batch, num_negatives=self.num_negatives
        )

    def score(self, history: Tensor) -> Tensor:
        """Scores of all items after each history, (B, N + 1), from int64 (B, T)."""
        return last_of(self.encode(history), history) @ self.item.weight.T

    def item_embeddings(self) -> Tensor:
        """The item vectors (N + 1, D), row 0 zero."""
        return self.item.weight.detach()
