"""TIGER: items are strings of codes, and a transformer writes the next item code by code.

Source: Rajput et al., "Recommender Systems with Generative Retrieval" (NeurIPS 2023), whose code is not
public; sizes of the T5 model as in the public reproductions, which agree on them (4 + 4 blocks, width 128, 6
heads of 64, 1024 inside, ReLU, dropout 0.1). TIGER-MM of the MME-SID paper has the codes of several
modalities, one after the other. LETTER (Wang et al., CIKM 2024) is TIGER with codes of its own tokenizer and
a temperature in the loss (HonghuiBao2000/LETTER@0d4a115 LETTER-TIGER/modeling_letter.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmrec.collab.code_tree import CodeTree
from llmrec.collab.item_codes import codes_of_all, random_codes, told_apart
from llmrec.collab.losses import Loss
from llmrec.collab.tree_decoder import TreeDecoder
from llmrec.data.batches import Batch

START, HISTORY = 0, 1
"""Tokens before the codes: what the decoder begins with, and what stands before every history, so that an
empty one is something to look at (in the paper a token of the user; here all users have the same)."""

NUM_SPECIAL = 2


class Tiger(nn.Module):
    """See the module's head; a `llmrec.collab.provider.CollabProvider`.

    Differs from the paper: codes by k-means (`llmrec.collab.item_codes`) unless those of an RQ-VAE are given;
    no token of the user, of whom a sequence model knows the history alone; the search names items only
    (`CodeTree`), and the whole catalogue has scores, with items that it did not reach behind the others. What
    other models get as an item's vector is the mean of its codes' vectors.
    """

    layout = "prefixes"
    uses_time = False
    codes: Tensor

    def __init__(
        self,
        *,
        num_items: int,
        content: Iterable[str],
        num_levels: int,
        num_codes: int,
        embed_dim: int,
        num_layers: int,
        num_heads: int,
        head_dim: int,
        inner_dim: int,
        dropout_rate: float,
        max_history: int,
        beams: int,
        valid_beams: int,
        loss: str = "ce",
        tell_apart: bool = True,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        self.content = tuple(content)
        self.num_levels, self.num_codes = num_levels, num_codes
        self.max_history = max_history
        self.beams, self.valid_beams = beams, valid_beams
        self.within_tree = loss == "tree_ce"
        self.tell_apart, self.temperature = tell_apart, temperature
        places = num_levels * max(len(self.content), 1)
        drawn = random_codes(num_items, places, num_codes, int(torch.randint(2**31, ())))
        self.register_buffer("codes", torch.from_numpy(self._told_apart(drawn)))
        self.places_per_item = self.codes.shape[1]
        self.token = nn.Embedding(NUM_SPECIAL + self.codes.shape[1] * num_codes, embed_dim)
        self.encoder, self.decoder = t5_stacks(
            embed_dim, num_layers, num_heads, head_dim, inner_dim, dropout_rate
        )
        self._grow()
        self.register_load_state_dict_post_hook(lambda model, _: model._grow())

    def read_content(self, vectors: Mapping[str, np.ndarray]) -> None:
        """Make the items' codes of their content vectors, float (N + 1, D_m) by modality; once, before
        training. A model that is loaded has them among its weights."""
        self._take(codes_of_all(vectors, self.content, self.num_levels, self.num_codes, "residual"))

    def read_codes(self, codes: Mapping[str, np.ndarray]) -> None:
        """Take codes made elsewhere in their place, int64 (N + 1, num_levels) by modality."""
        self._take(np.concatenate([codes[name] for name in self.content], axis=1))

    def _take(self, found: np.ndarray) -> None:
        self.codes.copy_(torch.from_numpy(self._told_apart(found)))
        self._grow()

    def _told_apart(self, codes: np.ndarray) -> np.ndarray:
        return told_apart(codes, self.num_codes) if self.tell_apart else codes

    def _grow(self) -> None:
        """Make the tree of the codes as they are now."""
        self._tree = CodeTree(self.codes, self.num_codes)

    @property
    def tree(self) -> CodeTree:
        """Of all items' codes, where the codes are."""
        return self._tree.to(self.codes.device)

    def tokens(self, item: Tensor) -> Tensor:
        """The tokens of items (...), int64 (..., P)."""
        return self.codes[item] + self.first_token()

    def first_token(self) -> Tensor:
        """The token of code 0 at every place, int64 (P,)."""
        return NUM_SPECIAL + self.num_codes * torch.arange(self.codes.shape[1], device=self.codes.device)

    def encode(self, history: Tensor) -> tuple[Tensor, Tensor]:
        """What the encoder makes of histories int64 (B, T): (B, 1 + T P, D), and which of it is there."""
        assert history.shape[1] <= self.max_history, (history.shape, self.max_history)
        token = F.pad(self.tokens(history).flatten(1), (1, 0), value=HISTORY)
        visible = F.pad((history != 0).repeat_interleave(self.codes.shape[1], dim=1), (1, 0), value=True)
        encoded = self.encoder(inputs_embeds=self.token(token), attention_mask=visible.long())
        return encoded.last_hidden_state, visible

    def log_probabilities(self, hidden: Tensor, place: int, node: Tensor, temperature: float = 1.0) -> Tensor:
        """Of the codes of a place, (..., K), from what the decoder says, (..., D).

        Args:
            hidden: what the decoder says.
            place: which code comes next.
            node: int64 (...), the codes before as a node of the tree.
            temperature: divides the logits.
        """
        first = NUM_SPECIAL + place * self.num_codes
        own = slice(first, first + self.num_codes)
        if not self.within_tree:
            return (self.logits(hidden) / temperature).log_softmax(-1)[..., own]
        open_codes = self.tree.children(place, node)
        logits = self.logits(hidden, self.token.weight[own]) / temperature
        return logits.masked_fill(~open_codes, -torch.inf).log_softmax(-1)

    def logits(self, hidden: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Of all tokens, or of those with the given vectors; in float32."""
        table = self.token.weight if tokens is None else tokens
        return ((hidden * table.shape[1] ** -0.5) @ table.T).float()

    def loss(self, batch: Batch) -> Loss:
        """-log of the probability of each row's target: of its codes, each after those before it."""
        row, last = batch.target.nonzero(as_tuple=True)
        if not len(row):
            return Loss(total=self.token.weight.sum() * 0.0, num_targets=0)
        target = batch.target[row, last]
        encoded, visible = self.encode(batch.item[row])
        token = self.tokens(target)
        given = F.pad(token[:, :-1], (1, 0), value=START)
        hidden = self.decoder(
            inputs_embeds=self.token(given),
            encoder_hidden_states=encoded,
            encoder_attention_mask=visible.long(),
            use_cache=False,
        ).last_hidden_state
        if not self.within_tree:
            logits = self.logits(hidden).flatten(0, 1) / self.temperature
            total = F.cross_entropy(logits, token.flatten(), reduction="sum")
            return Loss(total=total, num_targets=len(row))
        total = hidden.new_zeros((), dtype=torch.float32)
        for place in range(token.shape[1]):
            node = self.tree.node_of[place][target]
            found = self.log_probabilities(hidden[:, place], place, node, self.temperature)
            total = total - found.gather(1, self.codes[target, place, None]).sum()
        return Loss(total=total, num_targets=len(row))

    def score(self, history: Tensor) -> Tensor:
        """Log-probabilities of all items after each history, (B, N + 1), from int64 (B, T); see
        `CodeTree.search` for items that the search does not reach."""
        return self._search(history, self.beams)

    def quick_score(self, history: Tensor) -> Tensor:
        """As `score`, by a narrower search."""
        return self._search(history, self.valid_beams)

    def _search(self, history: Tensor, beams: int) -> Tensor:
        encoded, visible = self.encode(history)
        decoder = TreeDecoder(self.decoder, encoded, visible, self.codes.shape[1])

        def step(level: int, node: Tensor, code: Tensor, came_from: Tensor) -> Tensor:
            token = (
                code + NUM_SPECIAL + (level - 1) * self.num_codes if level else torch.full_like(code, START)
            )
            return self.log_probabilities(decoder.step(self.token(token), came_from), level, node)

        return self.tree.search(step, len(history), beams)

    def item_embeddings(self) -> Tensor:
        """The item vectors (N + 1, D), row 0 zero: means over the items' codes."""
        vectors = self.token.weight.detach()[
            self.tokens(torch.arange(len(self.codes), device=self.codes.device))
        ]
        vectors = vectors.mean(1)
        vectors[0] = 0
        return vectors


def t5_stacks(
    embed_dim: int, num_layers: int, num_heads: int, head_dim: int, inner_dim: int, dropout_rate: float
) -> tuple[Any, Any]:
    """A fresh T5 encoder and decoder, which take vectors in place of tokens."""
    from transformers import T5Config, T5Model  # seconds to import, and one model needs it

    config = T5Config(
        vocab_size=1,
        eos_token_id=0,
        d_model=embed_dim,
        num_layers=num_layers,
        num_heads=num_heads,
        d_kv=head_dim,
        d_ff=inner_dim,
        dropout_rate=dropout_rate,
        feed_forward_proj="relu",
        use_cache=False,
    )
    model: Any = T5Model(config)
    for stack in (model.encoder, model.decoder):
        stack.embed_tokens = nn.Identity()
    return model.encoder, model.decoder
