"""Models as users have them in packages of their own: one that keeps to the protocol, others that do not."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmrec.collab.losses import Loss, last_of, next_item_loss
from llmrec.data.batches import Batch


class Bag(nn.Module):
    """What was seen lately, older things the less."""

    layout = "positions"
    uses_time = False

    def __init__(self, *, num_items: int, embed_dim: int, decay: float = 0.5, max_history: int = 50) -> None:
        super().__init__()
        self.max_history = max_history
        self.decay = decay
        self.item = nn.Embedding(num_items + 1, embed_dim, padding_idx=0)
        self.next = nn.Linear(embed_dim, embed_dim)

    def encode(self, history: Tensor) -> Tensor:
        """(B, T, D) from int64 (B, T)."""
        state, states = 0.0, []
        for vectors in self.item(history).unbind(dim=1):
            state = self.decay * state + vectors
            states.append(state)
        return self.next(torch.stack(states, dim=1))

    def loss(self, batch: Batch) -> Loss:
        return next_item_loss("ce", self.encode(batch.item), self.item.weight, batch)

    def score(self, history: Tensor) -> Tensor:
        return last_of(self.encode(history), history) @ self.item.weight.T

    def item_embeddings(self) -> Tensor:
        return self.item.weight.detach()


class Counts(Bag):
    """Nothing to learn."""

    def __init__(self, *, num_items: int) -> None:
        super().__init__(num_items=num_items, embed_dim=4)
        self.requires_grad_(False)


class Half(nn.Module):
    """No scores."""

    def loss(self, batch: Batch) -> Loss:
        raise NotImplementedError


class Simple(Bag):
    """With defaults, for those below."""

    def __init__(self, *, num_items: int) -> None:
        super().__init__(num_items=num_items, embed_dim=4)


class Sideways(Simple):
    """Trained on rows that there are none of."""

    layout = "suffixes"


class Endless(Simple):
    """Any history."""

    def __init__(self, *, num_items: int) -> None:
        super().__init__(num_items=num_items)
        self.max_history = None


class Timeless(Simple):
    """It asks for the time of the request, and for no other."""

    uses_request_time = True


class Punctual(Bag):
    """What was seen lately, and how long ago that was when the user asked."""

    uses_time = uses_request_time = True

    def waited(self, time: Tensor, next_time: Tensor) -> Tensor:
        return (1 + (next_time - time).float()).log()[..., None]

    def loss(self, batch: Batch) -> Loss:
        query = self.encode(batch.item) * self.waited(batch.time, batch.next_time)
        return next_item_loss("ce", query, self.item.weight, batch)

    def score(self, history: Tensor, time: Tensor, next_time: Tensor) -> Tensor:
        query = self.encode(history) * self.waited(time, next_time)
        return last_of(query, history) @ self.item.weight.T


class Bare(Simple):
    """The loss alone."""

    def loss(self, batch: Batch) -> Tensor:
        return super().loss(batch).total


class Averaged(Simple):
    """A loss for each target."""

    def loss(self, batch: Batch) -> Loss:
        loss = super().loss(batch)
        return Loss(total=loss.total.expand(2), num_targets=loss.num_targets)


class Deaf(Simple):
    """A loss that no weight has a part in."""

    def loss(self, batch: Batch) -> Loss:
        return Loss(total=super().loss(batch).total.detach(), num_targets=1)


class Short(Simple):
    """Scores of items alone."""

    def score(self, history: Tensor) -> Tensor:
        return super().score(history)[:, 1:]


class ShortQuick(Simple):
    """The same of its cheaper scores."""

    def quick_score(self, history: Tensor) -> Tensor:
        return self.score(history)[:, 1:]


class Endful(Simple):
    """Infinite scores."""

    def score(self, history: Tensor) -> Tensor:
        return super().score(history) / 0.0


class Padded(Simple):
    """A vector for padding, which is noise."""

    def __init__(self, *, num_items: int) -> None:
        super().__init__(num_items=num_items)
        nn.init.ones_(self.item.weight)


class Drifting(Simple):
    """Its padding competes with the items, so that it learns a vector."""

    def loss(self, batch: Batch) -> Loss:
        seen = batch.target != 0
        scores = self.encode(batch.item)[seen] @ self.item.weight.T
        total = F.cross_entropy(scores, batch.target[seen], reduction="sum")
        return Loss(total=total, num_targets=int(seen.sum()))


class Flat(Simple):
    """A number an item."""

    def item_embeddings(self) -> Tensor:
        return super().item_embeddings()[:, 0]


class Few(Simple):
    """No row for padding."""

    def item_embeddings(self) -> Tensor:
        return super().item_embeddings()[1:]


class Listed(Simple):
    """No tensor."""

    def item_embeddings(self) -> list[float]:
        return super().item_embeddings().tolist()


class Chatty(Simple):
    """Reports a plain number."""

    def loss(self, batch: Batch) -> Loss:
        return dataclasses.replace(super().loss(batch), parts={"speed": 1.0})


class Clinging(Simple):
    """Reports what gradients could pass through."""

    def loss(self, batch: Batch) -> Loss:
        loss = super().loss(batch)
        return dataclasses.replace(loss, parts={"more": loss.total})


class Sorted(Simple):
    """Sorts items into groups."""

    def item_groups(self) -> tuple[str, Tensor]:
        return "kind", self.next(self.item.weight).softmax(-1)


class Nameless(Sorted):
    """The weights alone."""

    def item_groups(self) -> Tensor:
        return super().item_groups()[1]


class Shifted(Sorted):
    """No weights of padding."""

    def item_groups(self) -> tuple[str, Tensor]:
        name, weights = super().item_groups()
        return name, weights[1:]


class Lost(Sorted):
    """Weights that are no numbers."""

    def item_groups(self) -> tuple[str, Tensor]:
        name, weights = super().item_groups()
        return name, weights / 0.0 * 0.0


class Restless(Simple):
    """Draws random numbers of every kind, keeps statistics, and freezes a part of itself."""

    def __init__(self, *, num_items: int) -> None:
        super().__init__(num_items=num_items)
        self.register_buffer("calls", torch.zeros(()))
        self.norm = nn.BatchNorm1d(4)
        self.frozen = nn.Dropout().eval()

    def encode(self, history: Tensor) -> Tensor:
        states = super().encode(history)
        if self.training:
            states = states * (random.random() + np.random.rand())
            self.calls += 1
        normed = self.norm(states.transpose(1, 2)).transpose(1, 2)
        return self.frozen(F.dropout(normed, 0.3, self.training))


class Sparing(Bag):
    """Learns from a batch of many rows alone: a few may hold nothing to predict."""

    enough = 8

    def loss(self, batch: Batch) -> Loss:
        if len(batch.item) < self.enough:
            return Loss(total=torch.zeros(()), num_targets=0)
        return super().loss(batch)


class Idle(Sparing):
    """Never finds enough rows."""

    enough = 10**6


class Tempered(Simple):
    """A learned number named like an argument of ours, and a norm that counts its calls."""

    def __init__(self, *, num_items: int) -> None:
        super().__init__(num_items=num_items)
        self.path = nn.Parameter(torch.zeros(()))
        self.norm = nn.BatchNorm1d(4)

    def encode(self, history: Tensor) -> Tensor:
        states = super().encode(history)
        return self.norm(states.transpose(1, 2)).transpose(1, 2) * self.path.exp()


class Careless(Simple):
    """Leaves things out at random when it scores, too."""

    def encode(self, history: Tensor) -> Tensor:
        return F.dropout(super().encode(history), 0.3)


class Rightmost(Simple):
    """Reads the last place, which may be padding."""

    def score(self, history: Tensor) -> Tensor:
        return self.encode(history)[:, -1] @ self.item.weight.T


class Comparing(Simple):
    """Looks at the others of a batch."""

    def score(self, history: Tensor) -> Tensor:
        scores = super().score(history)
        return scores - scores.mean(dim=0)


class Scribbling(Simple):
    """Writes into what it is given."""

    def score(self, history: Tensor) -> Tensor:
        return super().score(history.masked_fill_(history == 0, 1))


class Hashing(Simple):
    """Puts items into groups that it draws and nobody keeps."""

    def __init__(self, *, num_items: int) -> None:
        super().__init__(num_items=num_items)
        self.group = torch.randint(0, 3, (num_items + 1,))
        self.of_group = nn.Embedding(3, 4)

    def encode(self, history: Tensor) -> Tensor:
        return super().encode(history) + self.of_group(self.group[history])


class Averaging(Simple):
    """Its running mean is not among what is saved."""

    def __init__(self, *, num_items: int) -> None:
        super().__init__(num_items=num_items)
        self.register_buffer("mean", torch.zeros(4), persistent=False)

    def encode(self, history: Tensor) -> Tensor:
        states = super().encode(history)
        if self.training:
            self.mean.lerp_(states.detach().mean(dim=(0, 1)), 0.1)
        return states * (1 + self.mean)


class Rough(Simple):
    """Keeps something in a type that NumPy lacks."""

    def __init__(self, *, num_items: int) -> None:
        super().__init__(num_items=num_items)
        self.register_buffer("scale", torch.ones(4, dtype=torch.bfloat16))


class Talkative(Simple):
    """Keeps what is no tensor."""

    def get_extra_state(self) -> dict[str, int]:
        return {"version": 2}

    def set_extra_state(self, state: dict[str, int]) -> None:
        pass
