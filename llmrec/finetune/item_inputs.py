"""One token per item: frozen multimodal vectors and trained code embeddings through an MLP."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# The published concatenation is collaborative, image, text.
MODALITY_ORDER = ("collab", "image", "text")


class ItemTokens(nn.Module):
    """Item ids to input embeddings of the language model.

    a_m(i) = W_m E_m[i] + b_m             projected frozen vector, m in {collab, image, text}
    q_m(i) = sum_l C_m^l[S_m[i, l]]       sum of the item's code embeddings, trained on
    x(i)   = act(A_2 ReLU(A_1 [a_c; q_c; a_v; q_v; a_t; q_t] + c_1) + c_2)

    Source: MME-SID Eq. 13; Applied-Machine-Learning-Lab/MME-SID@bc95e1a model.py.
    Differs: the code embeddings may be narrower than H and then pass a linear map (project_codes).

    Args:
        vectors: frozen item vectors by modality, float (N + 1, D_m), row 0 zero.
        codes: semantic IDs by modality, int64 (N + 1, L).
        codebooks: code embeddings by modality, float (L, K, D), the initial values of the trained ones.
        hidden_size: H, width of the language model.
        expansion: hidden width of the MLP in multiples of H.
        out_activation: 'gelu' or 'none', after the MLP.
        project_codes: whether to map code embeddings from D to H.

    Raises:
        ValueError: if code embeddings are not H wide and project_codes is off.
    """

    def __init__(
        self,
        vectors: dict[str, Tensor],
        codes: dict[str, Tensor],
        codebooks: dict[str, Tensor],
        hidden_size: int,
        *,
        expansion: float,
        out_activation: str,
        project_codes: bool,
    ) -> None:
        super().__init__()
        self.modalities = tuple(name for name in MODALITY_ORDER if name in vectors)
        code_dims = {name: codebooks[name].shape[-1] for name in self.modalities}
        if not project_codes and set(code_dims.values()) != {hidden_size}:
            raise ValueError(
                f"code embeddings are {code_dims} wide and the base model {hidden_size}: set "
                f"learn_semantic_ids.code_dim={hidden_size}, or finetune.project_codes=true"
            )
        self.projections = nn.ModuleDict(
            {name: nn.Linear(vectors[name].shape[1], hidden_size) for name in self.modalities}
        )
        self.codebooks = nn.ParameterDict(
            {name: nn.Parameter(codebooks[name].clone()) for name in self.modalities}
        )
        self.code_projections = nn.ModuleDict(
            {name: nn.Linear(code_dims[name], hidden_size) for name in self.modalities if project_codes}
        )
        width = 2 * len(self.modalities) * hidden_size
        inner = round(expansion * hidden_size)
        self.mlp = nn.Sequential(nn.Linear(width, inner), nn.ReLU(), nn.Linear(inner, hidden_size))
        self.out_activation = out_activation
        for name in self.modalities:
            self.register_buffer(f"vectors_{name}", vectors[name], persistent=False)
            # Code l * K + c of the flattened table, so that one lookup serves all levels.
            levels, size, _ = codebooks[name].shape
            flat = codes[name] + size * torch.arange(levels, device=codes[name].device)
            self.register_buffer(f"codes_{name}", flat, persistent=False)

    def code_sum(self, name: str, item: Tensor) -> Tensor:
        """q_m: the sum of the code embeddings of each item, (..., D)."""
        codes = getattr(self, f"codes_{name}")[item]
        return F.embedding_bag(
            codes.reshape(-1, codes.shape[-1]), self.codebooks[name].flatten(0, 1), mode="sum"
        ).unflatten(0, item.shape)

    def forward(self, item: Tensor) -> Tensor:
        """Tokens (..., H) of item ids (...); padding gets some vector that must be masked."""
        parts = []
        for name in self.modalities:
            parts.append(self.projections[name](getattr(self, f"vectors_{name}")[item]))
            codes = self.code_sum(name, item)
            parts.append(self.code_projections[name](codes) if self.code_projections else codes)
        tokens = self.mlp(torch.cat(parts, dim=-1))
        return F.gelu(tokens) if self.out_activation == "gelu" else tokens
