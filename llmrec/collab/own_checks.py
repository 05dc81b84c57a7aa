"""Whether a sequence model of the user's own does what `CollabProvider` says, tried before it is trained.

Models of this package are held to it by their tests.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from llmrec import global_state
from llmrec.artifacts import check_item_rows
from llmrec.collab.losses import Loss, Pooled
from llmrec.data.batches import Batch
from llmrec.errors import ArtifactMismatchError, ConfigError

LAYOUTS = ("positions", "prefixes")

STEP = 1e-3
"""How far weights are moved to see what changes."""

TINY = 1e-20
"""Smallest norm of a gradient to divide by."""

ROUNDING = 1e-2
"""Most that scores may differ by that should be equal, in units of their spread."""

KEPT = {torch.float64, torch.float32, torch.float16, torch.bool, torch.uint8}
KEPT |= {torch.int8, torch.int16, torch.int32, torch.int64}
"""What weights and buffers can be saved as."""


def check_provider(
    name: str, model: Any, batch: Batch, num_items: int, again: Callable[[], Any] | None = None
) -> None:
    """Try the model's methods on a small batch, and leave it and all random numbers as they were.

    Args:
        name: package.module:Class.
        model: a fresh one, on the batch's device.
        batch: of the rows that it will be trained on.
        num_items: N.
        again: makes another one with the same settings; None: whether a loaded one is the same is not tried.

    Raises:
        ConfigError: names the class, the method, what it gave and what it must give.
    """
    where = f"train_collab.provider={name}"
    with as_it_was(model):
        model.train()
        loss = checked_loss(where, model.loss(batch))
        model.eval()
        with torch.no_grad():
            check_scores(where, model, batch, num_items)
            check_same_scores(where, model, batch)
            check_vectors(f"{where}: item_embeddings()", model, num_items)
            check_groups(where, model, num_items)
        if loss.num_targets:
            with one_step_later(model, loss), torch.no_grad():
                check_vectors(f"{where}: item_embeddings() after a step of training", model, num_items)
                if again is not None:
                    check_kept(where, model, again(), batch)


def check_attributes(where: str, model: Any) -> None:
    """Raise ConfigError unless a model says on what rows it is trained, and how long they may be."""
    for part in ("layout", "uses_time", "max_history"):
        if not hasattr(model, part):
            raise ConfigError(f"{where} has no {part}; see CollabProvider")
    if getattr(model, "uses_request_time", False) and not model.uses_time:
        raise ConfigError(f"{where}: uses_request_time needs uses_time, since the request comes third")
    if model.layout not in LAYOUTS:
        raise ConfigError(f"{where}: layout must be one of {', '.join(LAYOUTS)}, got {model.layout!r:.60}")
    if not isinstance(model.max_history, int) or model.max_history < 1:
        raise ConfigError(
            f"{where}: max_history must be a whole number of items, at least 1, got {model.max_history!r:.60}"
        )


@contextlib.contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """Afterwards, what is random goes on as if nothing had been drawn, and the model has its modes and
    buffers again; those of its weights that `one_step_later` moves are put back there."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(value, value.clone()) for value in model.buffers()]
    try:
        with global_state.drawing_alone():
            yield
    finally:
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for value, before in buffers:
                value.copy_(before)


@contextlib.contextmanager
def one_step_later(model: nn.Module, loss: Loss) -> Iterator[None]:
    """The model with its weights moved against the gradient of a loss, and put back afterwards."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    gradients = torch.autograd.grad(loss.total, weights, allow_unused=True)
    before = [weight.detach().clone() for weight in weights]
    try:
        with torch.no_grad():
            for weight, gradient in zip(weights, gradients):
                if gradient is not None:
                    weight.sub_(gradient * (STEP / gradient.norm().clamp(min=TINY)))
        yield
    finally:
        with torch.no_grad():
            for weight, value in zip(weights, before):
                weight.copy_(value)


def checked_loss(where: str, loss: Any) -> Loss:
    """What a model's ``loss`` returned.

    Raises:
        ConfigError: it is no `Loss`, or not what can be differentiated.
    """
    wanted = (
        "return llmrec.collab.losses.Loss(total=SUM, num_targets=N), SUM the sum over the N items predicted"
    )
    if not isinstance(loss, Loss):
        raise ConfigError(f"{where}: loss() gave a {type(loss).__name__}; {wanted}")
    check_parts(where, loss)
    total = loss.total
    if not loss.num_targets:
        return loss  # a few rows may hold nothing to predict, where that is drawn
    if not isinstance(total, Tensor) or total.ndim or not total.requires_grad:
        got = described(total) + ("" if getattr(total, "requires_grad", True) else ", without a gradient")
        raise ConfigError(f"{where}: total of loss() must be a scalar to differentiate, got {got}; {wanted}")
    return loss


def check_parts(where: str, loss: Loss) -> None:
    """Raise ConfigError unless what a model reports about itself can be summed, logged and drawn."""
    for name, part in loss.parts.items():
        figure = part.figure() if isinstance(part, Pooled) else part
        if not isinstance(figure, Tensor) or figure.ndim > 1 or figure.requires_grad:
            got = described(figure) + (", with a gradient" if getattr(figure, "requires_grad", False) else "")
            raise ConfigError(
                f"{where}: parts[{name!r}] of loss() must be a detached tensor, a number or a vector, got "
                f"{got}"
            )


def check_scores(where: str, model: Any, batch: Batch, num_items: int) -> None:
    """Raise ConfigError unless a model scores every item after each history."""
    shown = shown_to(model, batch)
    expected = (len(batch.item), num_items + 1)
    for part in ("score", "quick_score"):
        if part == "quick_score" and not hasattr(model, part):
            continue
        scores = getattr(model, part)(*shown)
        if not isinstance(scores, Tensor) or tuple(scores.shape) != expected:
            raise ConfigError(
                f"{where}: {part}() of {expected[0]} histories must have the shape {expected}, a column for "
                f"each of {num_items} items and column 0 for padding, got {described(scores)}"
            )
        if not scores[:, 1:].isfinite().all():
            raise ConfigError(f"{where}: {part}() gave NaN or infinity, expected finite numbers")


def check_same_scores(where: str, model: Any, batch: Batch) -> None:
    """Raise ConfigError if scores are random, or depend on padding or on what else is in a batch."""
    # Of different lengths, whatever the rows are.
    length = (batch.item != 0).sum(dim=1)
    length = (length - torch.arange(len(length), device=length.device)).clamp(min=1)
    shown = torch.arange(batch.item.shape[1], device=length.device) < length[:, None]
    histories = [torch.where(shown, value, 0) for value in shown_to(model, batch)]
    given = [value.clone() for value in histories]
    scores = model.score(*given)
    if not torch.equal(given[0], histories[0]):
        raise ConfigError(f"{where}: score() changed the histories that it was given; let it work on a copy")
    if not same_scores(scores, model.score(*histories)):
        raise ConfigError(
            f"{where}: score() gave other numbers when it was called again; it must draw nothing random once "
            "the model is in evaluation mode (F.dropout asks for training=self.training)"
        )
    alone = [
        model.score(*(value[row : row + 1, :stop] for value in histories))
        for row, stop in enumerate(length.tolist())
    ]
    if not same_scores(scores, torch.cat(alone)):
        raise ConfigError(
            f"{where}: score() of a history depends on its padding, or on what else is in the batch; items "
            "stand on the left and zeros behind them, so the last item is not at place -1 (see "
            "llmrec.collab.losses.last_of)"
        )


def same_scores(first: Tensor, second: Tensor) -> bool:
    """Whether scores are equal but for rounding; column 0 means nothing."""
    first, second = first[:, 1:].double(), second[:, 1:].double()
    spread = first.max() - first.min()
    return bool((first - second).abs().max() <= ROUNDING * spread + 1e-6 * first.abs().max())


def check_kept(where: str, model: Any, other: Any, batch: Batch) -> None:
    """Raise ConfigError unless another model of the same settings with the same state scores as this one."""
    state = model.state_dict()
    for name, value in state.items():
        if not isinstance(value, Tensor) or value.dtype not in KEPT:
            got = f"{value.dtype}" if isinstance(value, Tensor) else described(value)
            raise ConfigError(
                f"{where}: {name} cannot be saved, which is {got}; weights and buffers must be tensors of "
                "float32, or of another type that NumPy has"
            )
    other.load_state_dict(state)
    shown = shown_to(model, batch)
    if not same_scores(model.score(*shown), other.eval().score(*shown)):
        raise ConfigError(
            f"{where}: made again with the same settings and weights it scores differently, as it would when "
            "it is loaded; what scores depend on must be a parameter, a buffer that state_dict() has, or the "
            "same each time that the constructor makes it"
        )


def shown_to(model: Any, batch: Batch) -> tuple[Tensor, ...]:
    """What a model's scores are made from: the histories, and their times and the next ones if it asks."""
    given = (batch.item, batch.time, batch.next_time)
    return given[: 1 + bool(model.uses_time) + bool(getattr(model, "uses_request_time", False))]


def check_vectors(what: str, model: Any, num_items: int) -> None:
    """Raise ConfigError unless a model has a vector of each item, and zeros for padding."""
    vectors = model.item_embeddings()
    if not isinstance(vectors, Tensor):
        raise ConfigError(f"{what} must be a tensor (num_items + 1, dim), got {described(vectors)}")
    try:
        check_item_rows(vectors.detach().float().cpu().numpy(), what, num_items=num_items)
    except ArtifactMismatchError as error:
        raise ConfigError(f"{error}; see llmrec.collab.provider.CollabProvider") from None


def check_groups(where: str, model: Any, num_items: int) -> None:
    """Raise ConfigError unless a model that sorts items into groups names them and gives all weights."""
    if not hasattr(model, "item_groups"):
        return
    found = model.item_groups()
    pair = isinstance(found, tuple) and len(found) == 2
    if not (pair and isinstance(found[0], str) and isinstance(found[1], Tensor)):
        raise ConfigError(f"{where}: item_groups() must give a name and a tensor, got {described(found)}")
    weights = found[1]
    if weights.ndim != 2 or len(weights) != num_items + 1:
        raise ConfigError(
            f"{where}: weights of item_groups() must have the shape ({num_items + 1}, groups), a row for "
            f"each of {num_items} items and row 0 for padding, got {described(weights)}"
        )
    if not weights.isfinite().all():
        raise ConfigError(f"{where}: item_groups() gave NaN or infinity, expected finite weights")


def described(value: Any) -> str:
    """A value by its shape, or its type."""
    return f"the shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
