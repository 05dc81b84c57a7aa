"""Item ids to input embeddings of the language model, put together from small parts.

A part turns an item id into a vector (frozen vectors through a linear map; sums of code embeddings; a table
of its own), a mixer turns the vectors of all parts into one token or several. `llmrec.finetune.methods` says
which parts and which mixer make MME-SID and the methods it is compared with.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmrec.config import given
from llmrec.semantic_ids.losses import info_nce


@dataclass(frozen=True, kw_only=True)
class ItemInputs:
    """What item tokens are made from.

    Attributes:
        vectors: frozen item vectors float32 (N + 1, D_m) of the modalities that the method reads, row 0 zero.
        codes: their semantic IDs int64 (N + 1, L).
        codebooks: their code embeddings float32 (L, K, D).
        hidden_size: H, width of the base model.
        num_added: items among them that came after training (see `inference.new_items`); they stand last.
    """

    vectors: dict[str, Tensor]
    codes: dict[str, Tensor]
    codebooks: dict[str, Tensor]
    hidden_size: int
    num_added: int = 0

    @property
    def num_items(self) -> int:
        """N."""
        return len(next(iter(self.vectors.values()))) - 1


class ProjectedVectors(nn.Module):
    """a(i) = W E[i] + b, from frozen item vectors.

    Args:
        vectors: float (N + 1, D_m), row 0 zero; not saved with the weights.
        width: of a(i).
    """

    vectors: Tensor

    def __init__(self, vectors: Tensor, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(vectors.shape[1], width)
        self.width = width
        self.register_buffer("vectors", vectors, persistent=False)

    def forward(self, item: Tensor) -> Tensor:
        """(...) to (..., width)."""
        return self.linear(self.vectors[item])


class CodeSums(nn.Module):
    """q(i) = sum_l C^l[S[i, l]]: the sum of an item's code embeddings, trained on.

    Args:
        codes: semantic IDs int64 (N + 1, L); not saved with the weights.
        codebooks: code embeddings float (L, K, D), the initial values of the trained ones.
        width: of q(i); a linear map follows if it is given, else D is the width.
    """

    codes: Tensor

    def __init__(self, codes: Tensor, codebooks: Tensor, width: int | None) -> None:
        super().__init__()
        levels, size, dim = codebooks.shape
        self.codebooks = nn.Parameter(codebooks.clone())
        self.linear = None if width is None else nn.Linear(dim, width)
        self.width = width or dim
        # Code l * K + c of the flattened table, so that one lookup serves all levels.
        flat = codes + size * torch.arange(levels, device=codes.device)
        self.register_buffer("codes", flat, persistent=False)

    def forward(self, item: Tensor) -> Tensor:
        """(...) to (..., width)."""
        codes = self.codes[item]
        flat = codes.reshape(-1, codes.shape[-1])
        sums = F.embedding_bag(flat, self.codebooks.flatten(0, 1), mode="sum").unflatten(0, item.shape)
        return sums if self.linear is None else self.linear(sums)


class OwnTable(nn.Module):
    """R[i]: a table trained from N(0, 0.02), through a linear map if a width is given.

    Args:
        num_items: N.
        dim: width of the table.
        width: of the map's output; None: no map.
    """

    def __init__(self, num_items: int, dim: int, width: int | None) -> None:
        super().__init__()
        self.table = nn.Parameter(0.02 * torch.randn(num_items + 1, dim))
        self.linear = None if width is None else nn.Linear(dim, width)
        self.width = width or dim

    def forward(self, item: Tensor) -> Tensor:
        """(...) to (..., width)."""
        rows = F.embedding(item, self.table)
        return rows if self.linear is None else self.linear(rows)


class Mlp(nn.Module):
    """act(A_2 ReLU(A_1 [parts] + c_1) + c_2), MME-SID Eq. 13.

    Args:
        widths: of the parts.
        hidden_size: H.
        inner: hidden width.
        out_activation: 'gelu' or 'none', after the second layer.
    """

    def __init__(self, widths: list[int], hidden_size: int, inner: int, out_activation: str) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(sum(widths), inner), nn.ReLU(), nn.Linear(inner, hidden_size))
        self.out_activation = out_activation

    def forward(self, parts: list[Tensor]) -> Tensor:
        """(..., H)."""
        tokens = self.layers(torch.cat(parts, dim=-1))
        return F.gelu(tokens) if self.out_activation == "gelu" else tokens


class LinearMix(nn.Module):
    """A [parts] + c.

    Args:
        widths: of the parts.
        hidden_size: H.
    """

    def __init__(self, widths: list[int], hidden_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(sum(widths), hidden_size)

    def forward(self, parts: list[Tensor]) -> Tensor:
        """(..., H)."""
        return self.linear(torch.cat(parts, dim=-1))


class SumOfParts(nn.Module):
    """All parts added; also the mixer of a single part."""

    def forward(self, parts: list[Tensor]) -> Tensor:
        """(..., H)."""
        return sum(parts[1:], parts[0])


class SideBySide(nn.Module):
    """Parts whose widths add up to H, one behind the other in one token."""

    def forward(self, parts: list[Tensor]) -> Tensor:
        """(..., H)."""
        return torch.cat(parts, dim=-1)


class OneTokenEach(nn.Module):
    """Every part is a token of its own.

    Args:
        num_parts: P.
    """

    def __init__(self, num_parts: int) -> None:
        super().__init__()
        self.tokens_per_item = num_parts

    def forward(self, parts: list[Tensor]) -> Tensor:
        """(..., P, H)."""
        return torch.stack(parts, dim=-2)


class ItemTokens(nn.Module):
    """Item ids to tokens: parts, then a mixer. A method of your own is a subclass that is made from
    `ItemInputs` and its own settings::

        class Gated(ItemTokens):
            def __init__(self, inputs: ItemInputs, dropout_rate: float = 0.1) -> None:
                parts = {
                    f"vectors_{name}": ProjectedVectors(table, inputs.hidden_size)
                    for name, table in inputs.vectors.items()
                }
                super().__init__(parts, MyMixer(len(parts), inputs.hidden_size, dropout_rate))

    What is trained of it is saved; all else must come out of the constructor again. Frozen vectors
    are a part ``vectors_MODALITY``, sums of code embeddings ``codes_MODALITY``: by these names scores find
    the maps that finetune.fusion mixes, and reports the vectors that a table is held to. Other parts have
    any name. `pairs` and `alignment` may be of its own: another loss, weighed by finetune.ctrl_weight.

    Args:
        parts: modules (...) to (..., width), by name.
        mixer: list of the parts' vectors to (..., H); or to (..., P, H), with P in its ``tokens_per_item``.
        alignment_temperature: of the alignment loss between parts; None: there is none.
    """

    def __init__(
        self, parts: dict[str, nn.Module], mixer: nn.Module, *, alignment_temperature: float | None = None
    ) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(parts)
        self.mixer = mixer
        self.tokens_per_item: int = getattr(mixer, "tokens_per_item", 1)
        self.alignment_temperature = alignment_temperature
        self.both_known: list[Tensor] = []
        if alignment_temperature is not None:
            tables = [part.vectors for part in self.parts.values() if isinstance(part, ProjectedVectors)]
            known = [table.any(dim=1) if table.is_meta else table.any(dim=1).cpu() for table in tables]
            self.both_known = [known[0] & one for one in known[1:]]

    @property
    def has_alignment(self) -> bool:
        """Whether there is a loss beside that of the targets."""
        return self.alignment_temperature is not None or type(self).alignment is not ItemTokens.alignment

    @property
    def projections(self) -> nn.ModuleDict:
        """The maps of frozen vectors by modality, which scoring shares."""
        return nn.ModuleDict(
            {
                name.removeprefix("vectors_"): part.linear
                for name, part in self.parts.items()
                if isinstance(part, ProjectedVectors)
            }
        )

    def forward(self, item: Tensor) -> Tensor:
        """Tokens (..., H), or (..., P, H), of item ids; padding gets some vector that must be masked."""
        return self.mixer([part(item) for part in self.parts.values()])

    def pairs(self, item: Tensor) -> list[Tensor]:
        """For each pair of parts that `alignment` compares, those of the items (n,) that have both vectors:
        all that lack one would have the same. On the host."""
        return [item[both[item]] for both in self.both_known]

    def alignment(self, pairs: list[Tensor]) -> Tensor:
        """InfoNCE of the first part with each other one, scalar; 0 if there is none.

        One direction, other items as negatives (CTRL-MM; MME-SID Eq. 11 reads the same way).

        Args:
            pairs: as `pairs` gave them, on the device.
        """
        first, *others = self.parts.values()
        found = [
            info_nce(first(item), other(item), given(self.alignment_temperature))
            for item, other in zip(pairs, others)
            if len(item) > 1
        ]
        return torch.stack(found).sum() if found else next(self.parameters()).new_zeros(())
