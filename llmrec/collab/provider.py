"""What a sequential model must offer to give collaborative vectors, and the models that do.

A model in a package of your own needs nothing here: it keeps to `CollabProvider` and is named
``train_collab.provider=package.module:Class``, with its settings in ``train_collab.own``.

To add a model to this package: one file with one `nn.Module` that keeps to `CollabProvider`, its name in
`PROVIDERS`, its settings in `collab/configs/`; in `collab/config.py` their import, the name in
`ProviderName`, and a field of that name. The contract tests then run over it, with the small settings of
`tests/collab/cases.py`; the recipes that compare all models want a row of it.
"""

from __future__ import annotations

from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from llmrec import distributed
from llmrec.artifacts import CollabEmbeddings
from llmrec.collab.bert4rec import BERT4Rec
from llmrec.collab.comirec import ComiRec
from llmrec.collab.config import PROVIDER_FIELDS
from llmrec.collab.diffurec import DiffuRec
from llmrec.collab.diffusion import DiffuRecSys
from llmrec.collab.fuxi import Fuxi
from llmrec.collab.gmvae import GMVAE
from llmrec.collab.gru4rec import GRU4Rec
from llmrec.collab.losses import Loss
from llmrec.collab.mamba import SigmaMamba
from llmrec.collab.mamba4rec import Mamba4Rec
from llmrec.collab.mind import MIND
from llmrec.collab.moe import FuxiMME
from llmrec.collab.motor import Motor
from llmrec.collab.own_checks import check_attributes
from llmrec.collab.sasrec import SASRec
from llmrec.collab.svae import SVAE
from llmrec.collab.tiger import Tiger
from llmrec.data.batches import Batch
from llmrec.errors import ArtifactMismatchError, ConfigError
from llmrec.evaluation.rank import Scorer
from llmrec.own import check_takes, is_own, own_class


class CollabProvider(Protocol):
    """A sequence model that learns one vector per item. The trainer knows nothing else.

    An `nn.Module` whose constructor takes ``num_items`` and the fields of its config by name. Item ids
    are padded on the right with 0, and padding never changes a number. Scores do not depend on what
    else is in a batch, and are the same every time: a model that draws noise in training uses its mean,
    or noise fixed at construction, when it scores.
    """

    layout: Literal["positions", "prefixes"]
    """Rows it is trained on. positions: every user once, a target at each position, for models whose state
    at a position depends on it and on earlier ones only; prefixes: one row per target, which stands at the
    row's last item."""

    uses_time: bool
    """Whether `score` takes the times of the history too."""

    max_history: int
    """Most items of a history the model can take."""

    def loss(self, batch: Batch) -> Loss:
        """Sum of the losses of predicting the batch's targets."""

    def score(self, history: Tensor) -> Tensor:
        """Scores of every item as the next one, (B, N + 1), from histories int64 (B, T).

        With `uses_time`, a second argument holds their times, int64 (B, T); a model that also has
        ``uses_request_time = True`` is given, as a third one, the times of the items that follow them, at
        last that of the request. Column 0 means nothing. An empty history (all padding) gives finite scores.
        A model whose scores are dear may also have ``quick_score``, which ranks validation items in its
        place. A model that sorts items into groups may have ``item_groups``, which names them and gives every
        item's weights, (N + 1, groups). One whose training has phases may have ``never_began``, which says of
        a number of epochs what they left out. One that takes an item as several positions says as how many in
        ``places_per_item``, and gets smaller batches. One of this package whose settings have ``content``,
        modalities of encode_items, has ``read_content``, which is given their vectors before training.
        """

    def item_embeddings(self) -> Tensor:
        """The item vectors (N + 1, D), row 0 zero."""


MUST_HAVE = ("loss", "score", "item_embeddings")

PROVIDERS = {
    "sasrec": SASRec,
    "gru4rec": GRU4Rec,
    "bert4rec": BERT4Rec,
    "svae": SVAE,
    "gmvae": GMVAE,
    "mamba4rec": Mamba4Rec,
    "mamba": SigmaMamba,
    "diffurec": DiffuRec,
    "diffusion": DiffuRecSys,
    "fuxi": Fuxi,
    "moe": FuxiMME,
    "comirec": ComiRec,
    "mind": MIND,
    "tiger": Tiger,
    "motor": Motor,
}
"""Models by name; the name is the value of train_collab.provider and the field of its settings."""

UNPAIRED = set(PROVIDERS) ^ set(PROVIDER_FIELDS)
assert not UNPAIRED, f"PROVIDERS and collab.config.ProviderName must name the same models, not {UNPAIRED}"


def provider_class(name: str) -> Any:
    """The model of that name: one of `PROVIDERS`, or ``package.module:Class``, which may lie in the current
    folder.

    Raises:
        ConfigError: it cannot be imported, or is no model.
    """
    if name in PROVIDERS:
        return PROVIDERS[name]
    found = own_class(name, "train_collab.provider")
    lacks = [part for part in MUST_HAVE if not callable(getattr(found, part, None))]
    if not issubclass(found, nn.Module) or lacks:
        raise ConfigError(
            f"train_collab.provider={name} must be a torch.nn.Module with {', '.join(MUST_HAVE)}; see "
            "llmrec.collab.provider.CollabProvider"
        )
    return found


def make_provider(name: str, settings: dict[str, Any]) -> Any:
    """A fresh model.

    Args:
        name: see `provider_class`.
        settings: its constructor's arguments, num_items among them.

    Raises:
        ConfigError: a model of the user's own does not take them, or has nothing to learn.
    """
    kind = provider_class(name)
    if name in PROVIDERS:
        return kind(**settings)
    check_takes(kind, name, "train_collab.own", **settings)
    model = kind(**settings)
    check_attributes(f"train_collab.provider={name}", model)
    if not any(weight.requires_grad for weight in model.parameters()):
        raise ConfigError(
            f"train_collab.provider={name} has no parameters to learn; write its item vectors to a file, and "
            "use provider=precomputed"
        )
    return model


def load_provider(collab: CollabEmbeddings) -> nn.Module:
    """Rebuild the trained model of an artefact, on this process's device, ready to score.

    Raises:
        ArtifactMismatchError: the artefact holds ready-made vectors, or another version's model.
    """
    if collab.provider not in PROVIDERS and not is_own(collab.provider):
        raise ArtifactMismatchError(
            f"the collab vectors come from {collab.provider!r}, which has no model to score with, expected "
            f"one of {', '.join(PROVIDERS)}; leave this row out or train a model with train_collab"
        )
    model = make_provider(collab.provider, collab.model)
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


def provider_scorer(collab: CollabEmbeddings) -> Scorer:
    """The trained model of an artefact as a method to rank.

    Raises:
        ArtifactMismatchError: the artefact holds ready-made vectors, or another version's model.
    """
    return scorer_of(load_provider(collab), collab.provider)


def scorer_of(model: Any, name: str, *, quick: bool = False) -> Scorer:
    """A provider as a method to rank, under the given name; quick: by its cheaper scores, if it has some."""
    score = getattr(model, "quick_score", model.score) if quick else model.score
    return Scorer(
        name=name,
        score=score,
        max_history=model.max_history,
        uses_time=model.uses_time,
        uses_request_time=getattr(model, "uses_request_time", False),
    )
