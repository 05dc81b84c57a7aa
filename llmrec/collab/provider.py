"""What a sequential model must offer to give collaborative vectors, and the models that do.

To add a model: one file with one `nn.Module` that keeps to `CollabProvider`, its name in
`PROVIDERS`, its settings as a nested config in `collab/config.py`. The contract tests then run
over it.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from llmrec import distributed
from llmrec.artifacts import CollabEmbeddings
from llmrec.collab.sasrec import SASRec
from llmrec.errors import ArtifactMismatchError


class CollabProvider(Protocol):
    """A sequence model that learns one vector per item. The trainer knows nothing else.

    An `nn.Module` whose constructor takes ``num_items`` and the fields of its config by name.
    Sequences are item ids padded on the right with 0; what stands at a position may depend on it
    and on earlier ones only, so padding never matters.
    """

    max_history: int
    """Most items of a history the model can take."""

    def loss(self, sequence: Tensor) -> tuple[Tensor, int]:
        """Sum of the losses of predicting each next item, and how many items were predicted.

        Args:
            sequence: train items of B users, int64 (B, T), T at most max_history + 1; position t
                predicts position t + 1.
        """

    def score(self, history: Tensor) -> Tensor:
        """Scores of every item as the next one, (B, N + 1), from histories int64 (B, T).

        Column 0 means nothing. An empty history (all padding) gives finite scores.
        """

    def item_embeddings(self) -> Tensor:
        """The item vectors (N + 1, D), row 0 zero."""


PROVIDERS = {"sasrec": SASRec}
"""Models by name; the name is the value of train_collab.provider and the field of its settings."""


def load_provider(collab: CollabEmbeddings) -> nn.Module:
    """Rebuild the trained model of an artefact, on this process's device, ready to score.

    Raises:
        ArtifactMismatchError: the artefact holds ready-made vectors, or another version's model.
    """
    if collab.provider not in PROVIDERS:
        raise ArtifactMismatchError(
            f"the collab vectors come from {collab.provider!r}, which has no model to score with, expected "
            f"one of {', '.join(PROVIDERS)}; leave this row out or train a model with train_collab"
        )
    model = PROVIDERS[collab.provider](**collab.model)
    expected, found = model.state_dict(), collab.state
    changed = sorted(
        name
        for name in expected.keys() | found.keys()
        if name not in expected or name not in found or expected[name].shape != found[name].shape
    )
    if changed:
        raise ArtifactMismatchError(
            f"the weights of {collab.provider} do not fit its settings ({', '.join(changed[:3])} differ); "
            "recompute train_collab"
        )
    model.load_state_dict({name: torch.from_numpy(array) for name, array in found.items()})
    return model.to(distributed.device()).eval()
