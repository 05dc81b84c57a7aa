"""What every collaborative provider must do, whatever is inside; runs over all of PROVIDERS."""

from __future__ import annotations

import functools
import typing
from dataclasses import replace

import numpy as np
import pytest
import torch
from cases import CASES
from torch import nn
from worlds import cycle, interactions, two_communities

from llmrec import distributed
from llmrec.artifacts import CollabEmbeddings
from llmrec.collab import losses
from llmrec.collab.config import PROVIDER_FIELDS, TrainCollabConfig
from llmrec.collab.losses import Pooled
from llmrec.collab.provider import PROVIDERS, load_provider, provider_scorer
from llmrec.collab.train import train_collab
from llmrec.collab.trainer import Sums, train_step
from llmrec.data.batches import Batch
from llmrec.evaluation.rank import rank_users
from llmrec.interactions import Interactions, Split


@functools.cache
def trained(name: str) -> CollabEmbeddings:
    return train_collab(CASES[name].config(), two_communities())


@pytest.fixture(params=CASES)
def name(request):
    """Name of a case; marked where the case must fail the test, which is then checked too."""
    test = request.node.originalname
    if reason := CASES[request.param].by_design.get(test):
        request.applymarker(pytest.mark.xfail(reason=reason, strict=True))
    return request.param


@pytest.fixture
def on_cpu(monkeypatch):
    """Equal bytes are promised on the CPU only."""
    monkeypatch.setattr(distributed, "device", lambda: torch.device("cpu"))


def ranks(collab: CollabEmbeddings, data: Interactions, split: Split = "test") -> np.ndarray:
    return rank_users(provider_scorer(collab), data, data.targets(split), shard=False).rank


def scores(model: nn.Module, history: list[list[int]]) -> torch.Tensor:
    """Scores after histories; the k-th item of each came at time 1,000 k, where the model asks."""
    item = torch.tensor(history, device=distributed.device())
    place = torch.arange(item.shape[1], device=item.device)
    times = [place * 1000 * (item != 0)] * model.uses_time
    if getattr(model, "uses_request_time", False):
        times.append((place + 1) * 1000 * (item != 0))
    return model.score(item, *times)


def batch_of(sequence: list[list[int]], layout: str = "positions") -> Batch:
    """Rows of train sequences as the trainer gives them to a model."""
    item = torch.tensor(sequence, device=distributed.device())
    times = torch.arange(item.shape[1], device=item.device) * 1000 * (item != 0)
    shown = torch.where(item[:, 1:] != 0, item[:, :-1], 0)
    time = torch.where(shown != 0, times[:, :-1], 0)
    next_time = times[:, 1:]
    if layout == "positions":
        return Batch(item=shown, target=item[:, 1:], time=time, next_time=next_time)
    row, last = item[:, 1:].nonzero(as_tuple=True)
    place = torch.arange(shown.shape[1], device=item.device)
    kept = place <= last[:, None]
    target = torch.where(place == last[:, None], item[row, last + 1][:, None], 0)
    times = {"time": time[row] * kept, "next_time": next_time[row] * kept}
    return Batch(item=shown[row] * kept, target=target, **times)


def loss_of(name: str) -> str:
    return getattr(CASES[name].config(), CASES[name].provider).loss


def prediction_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    torch.manual_seed(0)
    loss = model.loss(batch)
    return loss.parts.get("prediction_loss", loss.total).detach()


def test_every_provider_has_settings_of_its_name():
    assert set(PROVIDERS) == set(PROVIDER_FIELDS)
    for provider, model in PROVIDERS.items():
        assert callable(model)
        assert hasattr(TrainCollabConfig(), provider)


def test_every_provider_and_every_loss_has_a_case():
    found = {(case.provider, loss_of(name)) for name, case in CASES.items()}
    offered = {
        (provider, loss)
        for provider in PROVIDERS
        for loss in typing.get_args(
            typing.get_type_hints(type(getattr(TrainCollabConfig(), provider)))["loss"]
        )
    }
    assert found == offered


def test_what_a_case_must_fail_is_a_test_of_this_file():
    for case in CASES.values():
        assert set(case.by_design) <= set(globals())


def test_it_learns_which_community_a_user_belongs_to(name):
    assert (ranks(trained(name), two_communities()) == 0).mean() > 0.8


def test_it_learns_a_cycle_by_heart(name):
    """32 users who go round 20 items, baselines' usual check: the next one is first, or nearly always."""
    data = cycle(num_users=32, num_items=20, length=16)
    config = CASES[name].config(**{"epochs": 60, "select": "last"} | CASES[name].cycle)
    collab = train_collab(config, data)
    unseen: tuple[Split, ...] = ("valid", "test") if config.select == "last" else ("test",)
    found = np.concatenate([ranks(collab, data, split) for split in unseen])
    assert (found == 0).mean() > 0.95


@torch.no_grad()
def test_padding_never_changes_a_score(name):
    model = load_provider(trained(name))
    together = scores(model, [[3, 5, 7, 0, 0], [2, 4, 6, 8, 10], [9, 0, 0, 0, 0]])
    for row, alone in enumerate(([3, 5, 7], [2, 4, 6, 8, 10], [9])):
        torch.testing.assert_close(together[row], scores(model, [alone])[0], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_what_else_is_in_the_batch_never_changes_a_score(name):
    model = load_provider(trained(name))
    first = scores(model, [[3, 5, 7], [2, 4, 6]])
    second = scores(model, [[9, 1, 11], [3, 5, 7]])
    torch.testing.assert_close(first[0], second[1], rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_later_items_never_change_what_is_predicted_before_them(name):
    model = load_provider(trained(name))
    if loss_of(name) != "ce":
        pytest.skip("negatives are random")
    if model.layout == "prefixes":
        pytest.skip("a row of this layout ends with its history")
    sequence = [[3, 5, 7, 11, 2, 4], [2, 8, 6, 12, 1, 9]]
    changed = [[3, 5, 7, 11, 13, 14], [2, 8, 6, 12, 15, 16]]
    found = []
    for rows in (sequence, changed):
        batch = batch_of(rows)
        wanted = torch.where(
            torch.arange(batch.target.shape[1], device=batch.target.device) < 3, batch.target, 0
        )
        found.append(prediction_loss(model, replace(batch, target=wanted)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_loss_at_a_position_is_that_of_scoring_its_prefix_alone(name):
    if loss_of(name) != "ce":
        pytest.skip("negatives are random")
    model = load_provider(trained(name))
    sequence = [[3, 5, 7, 11, 2, 4], [2, 8, 6, 0, 0, 0]]
    expected = 0.0
    for row, length in ((0, 6), (1, 3)):
        for end in range(1, length):
            found = scores(model, [sequence[row][:end]])[0, 1:]
            expected = expected - found.log_softmax(0)[sequence[row][end] - 1]
    batch = batch_of(sequence, model.layout)
    assert model.loss(batch).num_targets == 7
    torch.testing.assert_close(prediction_loss(model, batch), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_short_and_empty_histories_have_finite_scores_and_no_loss(name):
    model = load_provider(trained(name))
    for history in ([[4, 0], [0, 0]], [[4], [0]]):
        assert scores(model, history).isfinite().all()
    item = torch.tensor([[4, 0], [0, 0]], device=distributed.device())
    with torch.enable_grad():
        none = torch.zeros_like(item)
        loss = model.loss(Batch(item=item, target=none, time=none, next_time=none))
        assert (loss.total.item(), loss.num_targets) == (0.0, 0)
        loss.total.backward()
    assert all(weight.grad is None or weight.grad.isfinite().all() for weight in model.parameters())


@torch.no_grad()
def test_what_is_logged_is_small_detached_and_finite(name):
    model = load_provider(trained(name)).train()
    with torch.enable_grad():
        loss = model.loss(batch_of([[3, 5, 7, 11, 2, 4], [2, 8, 6, 0, 0, 0]], model.layout))
    assert loss.total.ndim == 0
    for part in loss.parts.values():
        if isinstance(part, Pooled):
            assert not any(value.requires_grad for value in part.sums)
            part = part.figure()
        assert part.ndim <= 1 and part.numel() <= 64
        assert not part.requires_grad
        assert part.isfinite().all()


def test_item_vectors_are_one_per_item_with_a_zero_padding_row(name):
    collab = trained(name)
    assert collab.vectors.shape == (21, CASES[name].settings["embed_dim"])
    assert np.isfinite(collab.vectors).all()
    assert not collab.vectors[0].any()
    assert collab.vectors[1:].any(axis=1).all()
    assert np.array_equal(load_provider(collab).item_embeddings().cpu().numpy(), collab.vectors)


def test_saved_and_loaded_it_scores_the_same(name, tmp_path):
    collab = trained(name)
    collab.save(tmp_path)
    loaded = CollabEmbeddings.load(tmp_path)
    history = [[3, 5, 7], [2, 4, 0]]
    with torch.no_grad():
        assert torch.equal(scores(load_provider(collab), history), scores(load_provider(loaded), history))
    assert loaded.metrics == collab.metrics
    assert loaded.log == collab.log


def test_one_seed_gives_equal_bytes_and_another_does_not(name, on_cpu):
    data = two_communities()
    first, second = (train_collab(CASES[name].config(epochs=3), data) for _ in range(2))
    assert_same_weights(first, second)
    other = train_collab(CASES[name].config(epochs=3, seed=1), data)
    assert not np.array_equal(first.vectors, other.vectors)


def test_test_items_have_no_influence(name, on_cpu):
    data = two_communities()
    first = train_collab(CASES[name].config(epochs=3), data)
    second = train_collab(CASES[name].config(epochs=3), shift_items(data, splits=(2,)))
    assert_same_weights(first, second)
    for row in first.log + second.log:
        del row["seconds"], row["train_seconds"]
    assert first.log == second.log
    assert first.metrics == second.metrics


def test_validation_items_have_no_influence_when_the_last_epoch_is_kept(name, on_cpu):
    data = two_communities()
    config = CASES[name].config(epochs=3, select="last")
    first = train_collab(config, data)
    second = train_collab(config, shift_items(data, splits=(1, 2)))
    assert_same_weights(first, second)
    assert first.metrics == second.metrics


def shift_items(data: Interactions, splits: tuple[int, ...]) -> Interactions:
    """Other items in the given splits, the train split as it was."""
    item = np.where(np.isin(data.split, splits), data.item % data.num_items + 1, data.item)
    changed = replace(data, item=item)
    assert not np.array_equal(changed.item, data.item)
    return changed


def assert_same_weights(first: CollabEmbeddings, second: CollabEmbeddings) -> None:
    assert first.vectors.tobytes() == second.vectors.tobytes()
    assert first.state.keys() == second.state.keys()
    for name, array in first.state.items():
        assert array.tobytes() == second.state[name].tobytes(), name


@pytest.mark.parametrize(("windows", "num_targets"), [("last", 6), ("all", 10)])
def test_histories_longer_than_the_model_are_cut(name, windows, num_targets):
    case = CASES[name]
    provider = case.provider
    if provider == "svae" and windows == "all":  # what it says of whole users is refused
        case = replace(case, settings=case.settings | {"num_next": 1, "kl_scope": "target"})
    settings = case.config(epochs=1, windows=windows)
    settings = replace(settings, **{provider: replace(getattr(settings, provider), max_history=3)})
    data = interactions([[1, 2, 3, 4, 5, 6, 7, 8], [8, 7, 6, 5, 4, 3, 2, 1]], 8)
    collab = train_collab(settings, data)
    assert collab.metrics["num_targets"] == num_targets
    assert np.isfinite(ranks(collab, data)).all()


@pytest.mark.parametrize("case", [case for name, case in CASES.items() if name.endswith("sampled_ce")])
def test_as_many_negatives_are_drawn_as_it_is_set_to(case, monkeypatch):
    asked, real = [], losses.draw_unseen
    monkeypatch.setattr(losses, "draw_unseen", lambda known, *rest: asked.append(rest) or real(known, *rest))
    settings = case.config().of_model | {"num_negatives": 7}
    model = PROVIDERS[case.provider](num_items=20, **settings)
    model.to(distributed.device()).loss(batch_of([[1, 2, 3, 4, 5, 6, 7]], model.layout))
    assert asked == [(7, 20)]


def test_half_precision_changes_little_of_a_gradient(name):
    """Products in bfloat16, 8 bits of mantissa, whose gradients point where float32's do."""
    case = CASES[name]
    gradients = []
    for precision in ("float32", "bfloat16"):
        torch.manual_seed(case.start)
        config = case.config(precision=precision, clip_norm=1e9)
        settings = {"num_items": 20, **config.of_model}
        model = PROVIDERS[case.provider](**settings).to(distributed.device()).train()
        batch = batch_of([[1, 2, 3, 4, 5, 6, 7], [8, 9, 10, 11, 0, 0, 0]], model.layout)
        torch.manual_seed(1)
        sums = Sums()
        train_step(model, torch.optim.SGD(model.parameters(), lr=0.0), config, [batch], sums)
        found = [weight.grad for weight in model.parameters() if weight.grad is not None]
        assert all(gradient.dtype == torch.float32 for gradient in found)
        gradients.append(torch.cat([gradient.flatten() for gradient in found]))
    assert not torch.equal(*gradients)
    assert torch.cosine_similarity(*gradients, dim=0) > 0.99
