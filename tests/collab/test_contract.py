"""What every collaborative provider must do, whatever is inside; runs over all of PROVIDERS."""

from __future__ import annotations

import functools
import typing
from dataclasses import replace

import numpy as np
import pytest
import torch
from worlds import cycle, interactions, two_communities

from llmrec import distributed
from llmrec.artifacts import CollabEmbeddings, Interactions
from llmrec.collab.config import PROVIDER_FIELDS, TrainCollabConfig
from llmrec.collab.provider import PROVIDERS, load_provider
from llmrec.collab.train import train_collab
from llmrec.evaluation.rank import Scorer, rank_users


def losses_of(provider: str) -> tuple[str, ...]:
    settings = type(getattr(TrainCollabConfig(), provider))
    return typing.get_args(typing.get_type_hints(settings)["loss"])


CASES = [(name, loss) for name in PROVIDERS for loss in losses_of(name)]


def small(provider: str, loss: str, **trainer) -> TrainCollabConfig:
    settings = getattr(TrainCollabConfig(), provider)
    sizes = {"embed_dim": 16, "inner_dim": 32, "max_history": 12, "dropout_rate": 0.1}
    if loss == "sampled_ce":
        sizes["num_negatives"] = 16
    trainer = {"epochs": 15, "batch_size": 16, "learning_rate": 1e-2} | trainer
    return TrainCollabConfig(
        provider=provider, **{provider: replace(settings, loss=loss, **sizes)}, **trainer
    )


@functools.cache
def trained(provider: str, loss: str) -> CollabEmbeddings:
    return train_collab(small(provider, loss), two_communities())


@pytest.fixture(params=CASES, ids="-".join)
def case(request):
    return request.param


@pytest.fixture
def on_cpu(monkeypatch):
    """Equal bytes are promised on the CPU only."""
    monkeypatch.setattr(distributed, "device", lambda: torch.device("cpu"))


def ranks(collab: CollabEmbeddings, data: Interactions) -> np.ndarray:
    model = load_provider(collab)
    scorer = Scorer(name=collab.provider, score=model.score, max_history=model.max_history)
    return rank_users(scorer, data, data.targets("test"), shard=False).rank


def test_every_provider_has_settings_of_its_name():
    assert set(PROVIDERS) == set(PROVIDER_FIELDS)
    for name, model in PROVIDERS.items():
        assert callable(model)
        assert hasattr(TrainCollabConfig(), name)


def test_it_learns_which_community_a_user_belongs_to(case):
    assert (ranks(trained(*case), two_communities()) == 0).mean() > 0.8


def test_it_learns_that_one_item_follows_another(case):
    data = cycle()
    assert (ranks(train_collab(small(*case), data), data) == 0).mean() > 0.9


def test_padding_never_changes_a_score(case):
    model = load_provider(trained(*case))
    history = torch.tensor([[3, 5, 7, 0, 0], [2, 4, 6, 8, 10], [9, 0, 0, 0, 0]], device=distributed.device())
    together = model.score(history)
    for row, length in zip(range(3), (3, 5, 1)):
        alone = model.score(history[row : row + 1, :length])
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-5, atol=1e-5)


def test_the_loss_at_a_position_is_that_of_scoring_its_prefix_alone(case):
    if case[1] != "ce":
        pytest.skip("negatives are random")
    model = load_provider(trained(*case))
    sequence = torch.tensor([[3, 5, 7, 11, 2, 4], [2, 8, 6, 0, 0, 0]], device=distributed.device())
    found, number = model.loss(sequence)
    expected = 0.0
    for row, length in ((0, 6), (1, 3)):
        for end in range(1, length):
            scores = model.score(sequence[row : row + 1, :end])[:, 1:]
            expected = expected - scores.log_softmax(1)[0, sequence[row, end] - 1]
    assert number == 7
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_short_and_empty_histories_have_finite_scores_and_no_loss(case):
    model = load_provider(trained(*case))
    history = torch.tensor([[4, 0], [0, 0]], device=distributed.device())
    assert model.score(history).isfinite().all()
    assert model.score(history[:, :1]).isfinite().all()
    for sequence in (history, history[:, :1]):
        loss, number = model.loss(sequence)
        assert (loss.item(), number) == (0.0, 0)


def test_item_vectors_are_one_per_item_with_a_zero_padding_row(case):
    collab = trained(*case)
    assert collab.vectors.shape == (21, 16)
    assert not collab.vectors[0].any()
    assert collab.vectors[1:].any(axis=1).all()
    assert np.array_equal(load_provider(collab).item_embeddings().cpu().numpy(), collab.vectors)


def test_saved_and_loaded_it_scores_the_same(case, tmp_path):
    collab = trained(*case)
    collab.save(tmp_path)
    loaded = CollabEmbeddings.load(tmp_path)
    history = torch.tensor([[3, 5, 7], [2, 4, 0]], device=distributed.device())
    with torch.no_grad():
        assert torch.equal(load_provider(collab).score(history), load_provider(loaded).score(history))
    assert loaded.metrics == collab.metrics
    assert loaded.log == collab.log


def test_one_seed_gives_equal_bytes_and_another_does_not(case, on_cpu):
    data = two_communities()
    first, second = (train_collab(small(*case, epochs=3), data) for _ in range(2))
    assert_same_weights(first, second)
    other = train_collab(small(*case, epochs=3, seed=1), data)
    assert not np.array_equal(first.vectors, other.vectors)


def test_test_items_have_no_influence(case, on_cpu):
    data = two_communities()
    first = train_collab(small(*case, epochs=3), data)
    second = train_collab(small(*case, epochs=3), shift_items(data, splits=(2,)))
    assert_same_weights(first, second)
    for row in first.log + second.log:
        del row["seconds"]
    assert first.log == second.log
    assert first.metrics == second.metrics


def test_validation_items_have_no_influence_when_the_last_epoch_is_kept(case, on_cpu):
    data = two_communities()
    config = TrainCollabConfig(
        provider=case[0], epochs=3, batch_size=16, select="last", **{case[0]: getattr(small(*case), case[0])}
    )
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


def test_histories_longer_than_the_model_are_cut(case):
    settings = small(*case, epochs=1)
    settings = replace(settings, **{case[0]: replace(getattr(settings, case[0]), max_history=3)})
    data = interactions([[1, 2, 3, 4, 5, 6, 7, 8], [8, 7, 6, 5, 4, 3, 2, 1]], 8)
    collab = train_collab(settings, data)
    assert collab.metrics["num_targets"] == 6
    assert np.isfinite(ranks(collab, data)).all()
