"""Methods as users have them in packages of their own: some that do what they must, others that do not."""

from __future__ import annotations

import random

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmrec.finetune.item_inputs import ItemInputs, ItemTokens, OneTokenEach, ProjectedVectors, SumOfParts


class SharesOf(nn.Module):
    """Parts added by learned shares."""

    def __init__(self, num_parts: int) -> None:
        super().__init__()
        self.share = nn.Parameter(torch.zeros(num_parts))

    def forward(self, parts: list[Tensor]) -> Tensor:
        """(..., H)."""
        return torch.einsum("p...h,p->...h", torch.stack(parts), self.share.softmax(dim=0))


def frozen(inputs: ItemInputs) -> dict[str, nn.Module]:
    return {
        f"vectors_{name}": ProjectedVectors(table, inputs.hidden_size)
        for name, table in inputs.vectors.items()
    }


class Rank(nn.Module):
    """A vector of an item's first code: a part that the package knows nothing of."""

    codes: Tensor

    def __init__(self, codes: Tensor, num_codes: int, width: int) -> None:
        super().__init__()
        self.vectors_of = nn.Embedding(num_codes, width)
        self.width = width
        self.register_buffer("codes", codes[:, 0].clone(), persistent=False)

    def forward(self, item: Tensor) -> Tensor:
        """(..., width)."""
        return self.vectors_of(self.codes[item])


class Shares(ItemTokens):
    """Every modality and the first collaborative code, mixed by learned shares."""

    def __init__(self, inputs: ItemInputs, scale: float = 1.0) -> None:
        parts = frozen(inputs)
        parts["first_code"] = Rank(
            inputs.codes["collab"], inputs.codebooks["collab"].shape[1], inputs.hidden_size
        )
        super().__init__(parts, SharesOf(len(parts)))
        nn.init.normal_(parts["first_code"].vectors_of.weight, std=0.02 * scale)


class Pulled(Shares):
    """With a loss of its own: shares near one another."""

    def pairs(self, item: Tensor) -> list[Tensor]:
        return [item]

    def alignment(self, pairs: list[Tensor]) -> Tensor:
        return self.mixer.share.square().sum() + 0 * self(pairs[0]).sum()


class Several(ItemTokens):
    """A token a modality."""

    def __init__(self, inputs: ItemInputs) -> None:
        super().__init__(frozen(inputs), OneTokenEach(len(inputs.vectors)))


class Narrow(ItemTokens):
    """Half as wide as it must be."""

    def __init__(self, inputs: ItemInputs) -> None:
        table = inputs.vectors["collab"]
        super().__init__({"vectors_collab": ProjectedVectors(table, inputs.hidden_size // 2)}, SumOfParts())


class Misnamed(ItemTokens):
    """A part whose name says nothing of the modality."""

    def __init__(self, inputs: ItemInputs) -> None:
        super().__init__(
            {"mine": ProjectedVectors(inputs.vectors["collab"], inputs.hidden_size)}, SumOfParts()
        )


class NoTokens(nn.Module):
    """No ItemTokens at all."""


def function(inputs: ItemInputs) -> ItemTokens:
    """No class."""
    return Several(inputs)


class Drawn(Shares):
    """With numbers of its own that nobody keeps."""

    def __init__(self, inputs: ItemInputs) -> None:
        super().__init__(inputs)
        self.register_buffer("noise", torch.randn(4))


class Frozen(Shares):
    """With a table that is drawn and not trained."""

    def __init__(self, inputs: ItemInputs) -> None:
        super().__init__(inputs)
        self.parts["first_code"].vectors_of.weight.requires_grad_(False)


class Seeded(Frozen):
    """The same, drawn alike every time."""

    def __init__(self, inputs: ItemInputs) -> None:
        super().__init__(inputs)
        own = torch.Generator().manual_seed(3)
        nn.init.normal_(self.parts["first_code"].vectors_of.weight, generator=own)


class Idle(Shares):
    """With a layer that nothing goes through."""

    def __init__(self, inputs: ItemInputs) -> None:
        super().__init__(inputs)
        self.later = nn.Linear(3, 3)


class Averaged(Shares):
    """Its norm keeps running means, which are no trained parameters."""

    def __init__(self, inputs: ItemInputs) -> None:
        super().__init__(inputs)
        self.norm = nn.BatchNorm1d(inputs.hidden_size)

    def forward(self, item: Tensor) -> Tensor:
        tokens = super().forward(item)
        return self.norm(tokens.flatten(0, -2)).view_as(tokens)


class Careless(Shares):
    """Leaves things out at random when it recommends, too."""

    def forward(self, item: Tensor) -> Tensor:
        return F.dropout(super().forward(item), 0.1)


class Shuffled(Shares):
    """Draws an order that nobody keeps."""

    def __init__(self, inputs: ItemInputs) -> None:
        super().__init__(inputs)
        self.order = torch.randperm(inputs.hidden_size)

    def forward(self, item: Tensor) -> Tensor:
        return super().forward(item)[..., self.order]


class Dropped(Shares):
    """Dropout as it should be."""

    def __init__(self, inputs: ItemInputs) -> None:
        super().__init__(inputs)
        self.dropout = nn.Dropout(0.5)

    def forward(self, item: Tensor) -> Tensor:
        return self.dropout(super().forward(item))


class Restless(Shares):
    """Draws from the generators of Python and NumPy while it is trained."""

    def forward(self, item: Tensor) -> Tensor:
        tokens = super().forward(item)
        return tokens * (0.5 + random.random() + np.random.rand()) if self.training else tokens
