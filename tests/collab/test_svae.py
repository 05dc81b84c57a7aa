"""SVAE: its loss against a loop, the released inconsistency, and which table it hands on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import batch

from llmrec.collab.config import TrainCollabConfig
from llmrec.collab.svae import SVAE

SIZES = vars(TrainCollabConfig().svae) | {
    "num_items": 30,
    "embed_dim": 8,
    "hidden_dim": 12,
    "inner_dim": 10,
    "latent_dim": 4,
    "kl_steps": 10,
}


def model(**settings) -> SVAE:
    torch.manual_seed(0)
    return SVAE(**SIZES | settings).double()


@pytest.mark.parametrize(("num_next", "scope"), [(1, "user"), (3, "user"), (9, "user"), (1, "target")])
def test_the_loss_equals_a_loop_over_positions_and_next_items(num_next, scope):
    """More next items may be asked for than rows have."""
    svae = model(num_next=num_next, kl_scope=scope).eval()
    sequences = [[1, 2, 3, 4, 5], [6, 7, 8, 0, 0]]
    found = svae.loss(replace(batch(*sequences), step=2))
    mean, log_variance = svae.encode(batch(*sequences).item)
    expected, kl, penalty = 0.0, 0.0, 0.0
    for row, length in ((0, 5), (1, 3)):
        for place in range(length - 1):
            logits = svae.out(torch.tanh(svae.decoder(mean[row, place])))[1:]
            for target in sequences[row][place + 1 : place + 1 + num_next]:
                if target:
                    expected = expected - logits.log_softmax(0)[target - 1] / num_next
            m, v = mean[row, place], log_variance[row, place]
            each = 0.5 * (v.exp() + m**2 - 1 - v).sum()
            kl = kl + each
            penalty = penalty + each / (length - 1 if scope == "user" else 1)
    assert found.num_targets == 6
    torch.testing.assert_close(found.parts["prediction_loss"], expected.detach())
    torch.testing.assert_close(found.parts["kl"], kl.detach())
    torch.testing.assert_close(found.total, expected + 0.2 * penalty)


def test_sampling_reads_the_second_output_as_told(monkeypatch):
    monkeypatch.setattr(torch, "randn_like", torch.ones_like)
    rows = batch([1, 2, 3])
    for variance, factor in (("consistent", 0.5), ("released", 1.0)):
        svae = model(variance=variance).train()
        mean, spread = svae.encode(rows.item)
        query = svae.decode(mean + torch.exp(factor * spread))
        logits = query @ svae.output_table()[1:].T
        expected = -logits.log_softmax(-1)[0, [0, 1], [1, 2]].sum()
        torch.testing.assert_close(svae.loss(rows).parts["prediction_loss"], expected.detach())


def test_the_deviation_that_is_logged_is_the_one_that_is_sampled():
    rows = batch([1, 2, 3], [4, 5, 0])
    for variance, factor in (("consistent", 0.5), ("released", 1.0)):
        svae = model(variance=variance).train()
        spread = svae.encode(rows.item)[1][rows.target != 0]
        found = svae.loss(rows)
        expected = torch.exp(factor * spread).mean().detach()
        torch.testing.assert_close(found.parts["posterior_std"] / found.num_targets, expected)


def test_means_that_do_not_depend_on_the_input_are_inactive_whatever_dropout_does():
    rows = batch(*[[item, item + 1] for item in range(1, 21)])
    for vary in (False, True):
        svae = model(dropout_rate=0.5).train()
        with torch.no_grad():
            svae.item.weight[1:] = 3 * torch.randn(30 if vary else 1, 8)
        assert bool(svae.loss(rows).parts["active_units"].figure()) == vary


@pytest.mark.parametrize(("scope", "same"), [("target", True), ("user", False)])
def test_a_row_per_target_has_the_same_loss_if_every_target_counts_in_full(scope, same):
    svae = model(kl_scope=scope).eval()
    whole = svae.loss(replace(batch([1, 2, 3, 4, 5]), step=2)).total
    prefixes = batch(*[[1, 2, 3, 4, 5][:end] + [0] * (5 - end) for end in range(2, 6)])
    last = (prefixes.target != 0).sum(1, keepdim=True) - 1
    target = prefixes.target * (torch.arange(4) == last)
    apart = svae.loss(replace(prefixes, target=target, step=2)).total
    assert torch.allclose(whole, apart) == same


def test_item_vectors_come_from_the_chosen_table():
    assert model().item_embeddings().shape == (31, 10)
    assert model(vectors="input").item_embeddings().shape == (31, 8)
    for vectors in ("input", "output"):
        assert not model(vectors=vectors).item_embeddings()[0].any()
