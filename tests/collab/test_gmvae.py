"""SIGMA-GMVAE: divergences against loops and many samples, interests against loops, and its limits."""

from __future__ import annotations

import itertools
from dataclasses import replace

import providers_beauty
import pytest
import torch
import torch.nn.functional as F
from cases import batch
from torch import Tensor
from torch.distributions import Normal, kl_divergence
from worlds import cycle

from llmrec.collab.config import TrainCollabConfig
from llmrec.collab.configs.gmvae import GmvaeConfig
from llmrec.collab.gmvae import GMVAE, gaussian_kl, latent_report, mixture_kl
from llmrec.collab.interests import Interests, Prior
from llmrec.collab.layers import mean_cosine
from llmrec.collab.losses import Loss
from llmrec.collab.train import item_groups, train_collab
from llmrec.collab.trainer import Sums
from llmrec.data.batches import Batch

SIZES = vars(TrainCollabConfig().gmvae) | {
    "num_items": 30,
    "embed_dim": 8,
    "num_heads": 2,
    "num_interests": 3,
    "max_history": 10,
    "kl_steps": 10,
}


def model(**settings) -> GMVAE:
    torch.manual_seed(0)
    return GMVAE(**SIZES | settings)


def logged(*losses: Loss) -> dict[str, float | list[float]]:
    """What the trainer makes of the parts of some passes."""
    sums = Sums()
    for loss in losses:
        sums.add(loss)
    return sums.over(sum(loss.num_targets for loss in losses))["parts"]


def rows_of(number: int, length: int) -> Batch:
    """Random rows, the same every time."""
    items = torch.randint(1, 31, (number, length), generator=torch.Generator().manual_seed(0))
    return batch(*items.tolist())


def part(rows: Batch, which: slice) -> Batch:
    return replace(rows, item=rows.item[which], target=rows.target[which], time=rows.time[which])


def mixture(number: int, width: int = 4) -> tuple[Tensor, Tensor, Prior]:
    torch.manual_seed(number)
    mean, log_variance = torch.randn(2, 5, width, dtype=torch.float64)
    made = torch.randn(2, 5, number, width, dtype=torch.float64)
    weight = torch.rand(5, number, dtype=torch.float64).softmax(1)
    return mean, log_variance, Prior(mean=made[0], log_variance=made[1], intensity=weight, assignment=weight)


def test_the_divergence_of_gaussians_is_that_of_torch():
    mean, log_variance, prior = mixture(1)
    found = gaussian_kl(mean, log_variance, prior.mean[:, 0], prior.log_variance[:, 0])
    expected = kl_divergence(
        Normal(mean, (log_variance / 2).exp()),
        Normal(prior.mean[:, 0], (prior.log_variance[:, 0] / 2).exp()),
    )
    torch.testing.assert_close(found, expected)
    zero = gaussian_kl(mean, log_variance, mean, log_variance)
    torch.testing.assert_close(zero, torch.zeros_like(zero))


@pytest.mark.parametrize("kind", ["lse", "convex"])
def test_bounds_equal_a_loop_over_components(kind):
    mean, log_variance, prior = mixture(3)
    found = mixture_kl(mean, log_variance, prior, kind, mean)
    for row in range(5):
        each = []
        for k in range(3):
            total = 0.0
            for d in range(4):
                w, s = prior.log_variance[row, k, d].exp(), log_variance[row, d].exp()
                apart = (mean[row, d] - prior.mean[row, k, d]) ** 2
                total += 0.5 * (torch.log(w) - torch.log(s) + (s + apart) / w - 1)
            each.append(total)
        alpha = prior.intensity[row]
        if kind == "convex":
            expected = sum(a * kl for a, kl in zip(alpha, each))
        else:
            expected = -torch.log(sum(a * torch.exp(-kl) for a, kl in zip(alpha, each)))
        torch.testing.assert_close(found[row], expected)


def test_both_bounds_lie_above_the_divergence_and_in_order():
    """The divergence itself is measured with 200,000 draws."""
    mean, log_variance, prior = mixture(3)
    draws = mean + (log_variance / 2).exp() * torch.randn(200_000, 5, 4, dtype=torch.float64)
    true = torch.stack([mixture_kl(mean, log_variance, prior, "monte_carlo", draw) for draw in draws[:2]])
    own = Normal(mean, (log_variance / 2).exp()).log_prob(draws).sum(-1)
    each = Normal(prior.mean, (prior.log_variance / 2).exp()).log_prob(draws[:, :, None]).sum(-1)
    sampled = own - (prior.intensity.log() + each).logsumexp(-1)
    torch.testing.assert_close(true, sampled[:2])
    divergence = sampled.mean(0)
    lse = mixture_kl(mean, log_variance, prior, "lse", mean)
    convex = mixture_kl(mean, log_variance, prior, "convex", mean)
    assert (lse > divergence - 0.02).all() and (convex >= lse).all()
    assert (convex > divergence + 0.1).any()


def test_one_component_is_the_plain_divergence():
    mean, log_variance, prior = mixture(1)
    plain = gaussian_kl(mean, log_variance, prior.mean[:, 0], prior.log_variance[:, 0]).sum(-1)
    for kind in ("lse", "convex"):
        torch.testing.assert_close(mixture_kl(mean, log_variance, prior, kind, mean), plain)


def test_the_divergence_is_zero_where_prior_and_posterior_agree():
    mean, log_variance, _ = mixture(2)
    same = Prior(
        mean=mean[:, None].expand(-1, 3, -1),
        log_variance=log_variance[:, None].expand(-1, 3, -1),
        intensity=torch.full((5, 3), 1 / 3, dtype=torch.float64),
        assignment=mean,
    )
    for kind in ("lse", "convex", "monte_carlo"):
        found = mixture_kl(mean, log_variance, same, kind, mean + 0.3)
        torch.testing.assert_close(found, torch.zeros_like(found))


@pytest.mark.parametrize("prefix", [False, True])
def test_interests_equal_loops_over_items_and_categories(prefix):
    torch.manual_seed(0)
    interests = Interests(4, 3, 0.1, 1.0, 0.0).double().eval()
    items = torch.randn(2, 5, 4, dtype=torch.float64)
    valid = torch.tensor([[True] * 5, [True, True, False, False, False]])
    found = interests(items, valid, temporal=False, prefix=prefix)
    unit = F.normalize(interests.prototype.weight, dim=-1)
    close = {"rtol": 1e-4, "atol": 1e-5}  # a category that got nearly nothing is divided by it
    for row, length in ((0, 5), (1, 2)):
        share = [
            torch.softmax(torch.stack([F.cosine_similarity(items[row, t], g, 0) for g in unit]) / 0.1, 0)
            for t in range(length)
        ]
        for end in range(1, length + 1) if prefix else (length,):
            place = end - 1 if prefix else 0
            total = sum(float(share[t].sum()) for t in range(end))
            for k in range(3):
                weight = sum(share[t][k] for t in range(end))
                mean = sum(share[t][k] * items[row, t] for t in range(end)) / weight
                torch.testing.assert_close(found.mean[row, place, k], mean, **close)
                torch.testing.assert_close(
                    float(found.intensity[row, place, k]), float(weight) / total, **close
                )
                expected = interests.log_variance(torch.cat([unit[k], mean])).clamp(-8, 8)
                torch.testing.assert_close(found.log_variance[row, place, k], expected, **close)


def test_hard_interests_read_their_own_items_in_order():
    torch.manual_seed(0)
    interests = Interests(4, 3, 0.1, 1.0, 0.0).double().eval()
    items = torch.randn(2, 6, 4, dtype=torch.float64)
    valid = torch.tensor([[True] * 6, [True, True, True, False, False, False]])
    soft = torch.randn(2, 3, 4, dtype=torch.float64)
    found = interests.in_order(items, valid, soft)
    best = (F.normalize(items, dim=-1) @ interests.directions().T).argmax(-1)
    for row in range(2):
        for k in range(3):
            mine = items[row][valid[row] & (best[row] == k)]
            if len(mine):
                state = interests.gru(mine[None])[0][0, -1]
                expected = torch.relu(interests.gru_out(state))
            else:
                expected = soft[row, k]
            torch.testing.assert_close(found[row, k], expected)


def test_hard_interests_are_half_of_the_means_and_training_draws_who_belongs_where(monkeypatch):
    """m = (h + r) / 2, with the variance and the norm of that; hard interests of the items drawn."""
    torch.manual_seed(0)
    interests = Interests(4, 3, 0.1, 0.5, 0.0).double().train()
    items = torch.randn(2, 5, 4, dtype=torch.float64)
    valid = torch.tensor([[True] * 5, [True, True, True, False, False]])
    place = torch.randint(0, 3, (2, 5))
    asked = []

    def drawn(logits: Tensor, tau: float = 1.0, hard: bool = False) -> Tensor:
        asked.append((tau, hard))
        torch.testing.assert_close(logits, F.normalize(items, dim=-1) @ interests.directions().T / 0.1)
        return F.one_hot(place, 3).double()

    with monkeypatch.context() as patched:
        patched.setattr(F, "gumbel_softmax", drawn)
        found = interests(items, valid, temporal=True, prefix=False)
    assert asked == [(0.5, False), (1.0, True)]
    for row, k in itertools.product(range(2), range(3)):
        mine = items[row][valid[row] & (place[row] == k)]
        mean = torch.zeros(4, dtype=torch.float64)
        if len(mine):
            hard = torch.relu(interests.gru_out(interests.gru(mine[None])[0][0, -1]))
            mean = (mine.mean(0) + hard) / 2
        torch.testing.assert_close(found.mean[row, 0, k], interests.norm(mean), rtol=1e-6, atol=1e-6)
        expected = interests.log_variance(torch.cat([interests.directions()[k], mean])).clamp(-8, 8)
        torch.testing.assert_close(found.log_variance[row, 0, k], expected, rtol=1e-6, atol=1e-6)
    one, other = (interests.assign(items, valid) for _ in range(2))
    assert (one - other).abs().max() > 1e-3
    interests.eval()
    assert torch.equal(interests.assign(items, valid), interests.assign(items, valid))


def test_gradients_reach_every_part_of_the_prior_through_the_divergence():
    gm = model(temporal_from_epoch=1).train()
    rows = batch([1, 2, 3, 4, 5], [6, 7, 8, 0, 0])
    mean, log_variance = gm.encode(rows.item)
    at = rows.target != 0
    mixture_kl(mean[at], log_variance[at], gm.prior_of(rows).at(at), "lse", mean[at]).sum().backward()
    for name, weight in gm.interests.named_parameters():
        assert weight.grad is not None and weight.grad.any(), name
    assert gm.mean.layer.linear1.weight.grad.any() and gm.log_variance.layer.linear1.weight.grad.any()


def test_orthogonality_is_zero_at_right_angles_and_pushes_there():
    interests = Interests(4, 3, 0.1, 1.0, 0.0)
    with torch.no_grad():
        interests.prototype.weight.copy_(3 * torch.eye(4)[:3])
    assert float(interests.orthogonality()) == pytest.approx(0, abs=1e-7)
    with torch.no_grad():
        interests.prototype.weight.fill_(1.0)
    assert float(interests.orthogonality()) == pytest.approx(6 / 9)


def test_the_weights_of_divergence_and_interests_follow_step_and_epoch(monkeypatch):
    gm = model(temporal_from_epoch=0, kl_weight=2.0, kl_cap=0.5, interest_weight=0.1).eval()
    rows = batch([1, 2, 3, 4], [5, 6, 7, 0])
    monkeypatch.setattr(gm, "interest_loss", lambda *_: (torch.tensor(3.0), {}))

    def extra(step: int, epoch: int) -> tuple[float, float]:
        found = gm.loss(replace(rows, step=step, epoch=epoch))
        rest = found.total - found.parts["prediction_loss"]
        return float(rest) / found.num_targets, float(found.parts["kl"]) / found.num_targets

    rest, kl = extra(0, 1)
    assert rest == pytest.approx(0.1 * 200 * 3, rel=1e-4)
    rest, _ = extra(2, 150)
    assert rest == pytest.approx(0.1 * 51 * 3 + 0.2 * 2 * kl, rel=1e-4)
    rest, _ = extra(10**6, 500)
    assert rest == pytest.approx(0.1 * 1 * 3 + 0.5 * 2 * kl, rel=1e-4)


def test_a_divergence_by_one_sample_is_taken_at_the_state_that_was_drawn(monkeypatch):
    gm = model(kl="monte_carlo", temporal_from_epoch=0, dropout_rate=0.0).train()
    rows, made, real = batch([1, 2, 3, 4], [5, 6, 7, 0]), [], gm.prior_of
    monkeypatch.setattr(torch, "randn_like", torch.ones_like)
    monkeypatch.setattr(gm, "prior_of", lambda given: made.append(real(given)) or made[0])
    found = gm.loss(rows).parts["kl"]
    mean, log_variance = (value[rows.target != 0] for value in gm.encode(rows.item))
    drawn = mean + torch.exp(log_variance / 2)
    prior = made[0].at(rows.target != 0)
    expected = mixture_kl(mean, log_variance, prior, "monte_carlo", drawn).sum()
    torch.testing.assert_close(found, expected.detach())
    other = mixture_kl(mean, log_variance, prior, "monte_carlo", mean).sum()
    assert abs(float(found - other.detach())) > 1


def test_temperatures_reach_what_they_are_of_and_padding_is_nobodys_negative():
    gm = model(assignment_temperature=0.3, gumbel_temperature=0.7)
    assert (gm.interests.temperature, gm.interests.gumbel_temperature) == (0.3, 0.7)
    alone = model(num_items=1)
    means, target = torch.randn(2, 3, 8), torch.ones(2, dtype=torch.int64)
    assert alone.interest_ranking(means, target) == 0


def test_scores_use_the_mean_and_the_release_adds_a_deviation():
    plain, shifted = model().eval(), model(eval_add_std=True).eval()
    history = torch.tensor([[1, 2, 3]])
    mean, log_variance = plain.encode(history)
    for gm, state in ((plain, mean), (shifted, mean + torch.exp(log_variance / 2))):
        torch.testing.assert_close(gm.score(history), gm.decoder(state)[:, -1] @ gm.item.weight.T)


def test_collapse_is_seen_in_what_is_reported():
    same = torch.zeros(50, 6)
    assert float(latent_report(same, same)["active_units"].figure()) == 0
    varied = torch.randn(50, 6) * torch.tensor([1.0, 1, 1, 0, 0, 0])
    found = latent_report(varied, same - 2)
    assert float(found["active_units"].figure()) == 0.5
    assert float(found["posterior_std"]) / 50 == pytest.approx(0.3679, abs=1e-4)
    assert float(mean_cosine(torch.ones(3, 4, 5))) == pytest.approx(1)
    assert float(mean_cosine(torch.eye(4)[None].expand(3, 4, 4))) == pytest.approx(0)


@pytest.mark.parametrize("temporal", [0, 1], ids=["soft", "hard"])
def test_collapsed_interests_are_seen_through_the_noise_of_training(temporal):
    figures = {}
    for name, prototypes in (("apart", torch.eye(8)[:3]), ("collapsed", torch.ones(3, 8))):
        gm = model(temporal_from_epoch=temporal).train()
        with torch.no_grad():
            gm.interests.prototype.weight.copy_(prototypes)
        figures[name] = logged(gm.loss(rows_of(20, 9)))
    assert figures["collapsed"]["interest_overlap"] == pytest.approx(1, abs=1e-4)
    assert figures["collapsed"]["category_use"] == pytest.approx([1 / 3] * 3, abs=1e-4)
    assert figures["apart"]["interest_overlap"] < 0.7
    assert ("interest_overlap_with_hard" in figures["apart"]) == bool(temporal)


def test_the_overlap_with_hard_interests_is_that_of_the_means_of_evaluation():
    gm = model(temporal_from_epoch=1).train()
    rows = rows_of(9, 6)
    reported = logged(gm.loss(rows))["interest_overlap_with_hard"]
    gm.eval()
    means = gm.prior_of(part(rows, slice(None, None, 4))).mean[:, 0]
    cosines = [F.cosine_similarity(row[a], row[b], 0) for row in means for a in range(3) for b in range(a)]
    assert reported == pytest.approx(float(torch.stack(cosines).mean()), abs=1e-6)


@pytest.mark.parametrize("scope", ["sequence", "prefix"])
def test_the_interest_loss_equals_loops_over_rows_and_interests(monkeypatch, scope):
    gm = model(prior_scope=scope, temporal_from_epoch=0, interest_negatives=4, orthogonal_weight=3.0)
    gm = gm.double().eval()
    rows = batch([1, 2, 3, 4], [5, 6, 7, 0], [9, 0, 0, 0])  # the last one has no target
    drawn = torch.tensor([4, 11, 12, 4])
    monkeypatch.setattr(torch, "randint", lambda *_, **__: drawn)
    prior = gm.prior_of(rows)
    found, parts = gm.interest_loss(rows, prior, 0.25)
    ranking, strengths, divergences = [], [], []
    for row, target in ((0, 4), (1, 7)):
        place = len(rows.item[row].nonzero()) - 1 if scope == "prefix" else 0
        means, table = prior.mean[row, place], gm.item.weight
        scores = [max(float(m @ table[item]) for m in means) for item in [target, *drawn.tolist()]]
        kept = [
            score / 0.1
            for score, item in zip(scores, [None, *drawn.tolist()])
            if item is None or item != target
        ]
        ranking.append(torch.tensor(kept, dtype=torch.float64).logsumexp(0) - kept[0])
        strengths.append(prior.intensity[row, place])
        for m, v in zip(means, prior.log_variance[row, place]):
            divergences.append(0.5 * (m**2 + v.exp() - 1 - v).sum())
    use = torch.stack(strengths).mean(0)
    uneven = ((use - use.mean()).square().sum() / 2).sqrt() / use.mean()
    undecided = [
        torch.logsumexp(share / 0.1, 0) - share.max() / 0.1
        for share, item in zip(prior.assignment.flatten(0, 1), rows.item.flatten())
        if item
    ]
    expected = {
        "interest_ranking": torch.stack(ranking).mean(),
        "orthogonality": gm.interests.orthogonality(),
        "uneven_use": uneven,
        "indecision": torch.stack(undecided).mean(),
        "interest_kl": torch.stack(divergences).mean(),
    }
    for name, value in expected.items():
        torch.testing.assert_close(parts[name], value, msg=name)
    small = 3 * expected["orthogonality"] + uneven + expected["indecision"] + 0.25 * expected["interest_kl"]
    torch.testing.assert_close(found, expected["interest_ranking"] + 0.01 * small)


def test_means_that_do_not_depend_on_the_input_are_inactive_whatever_dropout_does():
    gm = model(dropout_rate=0.5).train()
    with torch.no_grad():
        gm.item.weight[1:] = torch.randn(8)
        gm.position.weight.zero_()
    assert logged(gm.loss(rows_of(20, 9)))["active_units"] == 0
    with torch.no_grad():
        gm.item.weight[1:] = torch.randn(30, 8)
    assert logged(gm.loss(rows_of(20, 9)))["active_units"] > 0.5


def test_active_units_are_those_of_all_passes():
    """What varies between passes alone varies."""
    level = torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0]])
    passes = [latent_report(row.expand(50, 2), torch.zeros(50, 2))["active_units"] for row in level]
    assert [float(found.figure()) for found in passes] == [0, 0, 0]
    assert float(sum(passes[1:], passes[0]).figure()) == 0.5


def test_what_is_logged_costs_no_random_number(monkeypatch):
    ends, totals = [], []
    for reports in (True, False):
        gm = model(temporal_from_epoch=1).train()
        if not reports:
            monkeypatch.setattr(gm, "report", lambda *_: {})
        total = gm.loss(rows_of(20, 9)).total
        total.backward()
        totals.append((total.detach(), gm.item.weight.grad))
        ends.append(torch.get_rng_state())
        assert all(module.training for module in gm.modules())
    assert torch.equal(*ends)
    assert torch.equal(totals[0][0], totals[1][0]) and torch.equal(totals[0][1], totals[1][1])


def test_interests_are_ranked_against_as_many_items_however_rows_are_cut():
    """The mean over draws of one pass of six rows, and of three passes of two."""
    gm = model(interest_negatives=16).eval()
    with torch.no_grad():
        gm.item.weight[1:] = 0.2 * torch.randn(30, 8)
    rows = rows_of(6, 5)

    def ranking(passes: list[Batch]) -> float:
        found = [
            gm.interest_loss(one, gm.prior_of(one), 0.0)[1]["interest_ranking"].detach()
            for _ in range(300)
            for one in passes
        ]
        return float(torch.stack(found).mean())

    torch.manual_seed(0)
    whole = ranking([rows])
    cut = ranking([part(rows, slice(start, start + 2)) for start in (0, 2, 4)])
    # The means' errors are 0.03; with one negative a row they differ by 2.
    assert cut == pytest.approx(whole, abs=0.15)


def test_all_negatives_stand_against_a_rows_target_but_that_target_itself(monkeypatch):
    gm = model().eval()
    rows = batch([1, 2, 3, 4], [5, 6, 7, 0])
    monkeypatch.setattr(torch, "randint", lambda *_, **__: torch.tensor([20, 21, 7]))
    prior = gm.prior_of(rows)
    _, parts = gm.interest_loss(rows, prior, 0.0)
    expected = 0.0
    for row, candidates in ((0, (4, 20, 21, 7)), (1, (7, 20, 21))):
        best = [float((prior.mean[row, 0] @ gm.item.weight[item]).max()) for item in candidates]
        expected -= float(torch.log_softmax(torch.tensor(best) / 0.1, 0)[0]) / 2
    assert float(parts["interest_ranking"]) == pytest.approx(expected, rel=1e-4)


def test_items_belong_to_the_hyper_category_they_point_to():
    one = model()
    with torch.no_grad():
        one.item.weight[1:] = torch.randn(30, 8)
    name, weights = one.eval().item_groups()
    assert name == "hyper-category" and weights.shape == (31, 3) and not weights[0].any()
    directions = F.normalize(one.interests.prototype.weight, dim=-1)
    for item in (1, 17, 30):
        cosine = F.cosine_similarity(one.norm(one.item.weight[item])[None], directions)
        torch.testing.assert_close(weights[item], (cosine / one.interests.temperature).softmax(0))
    groups = item_groups(one)["item_groups"]["groups"]
    assert sum(group["share"] for group in groups) == pytest.approx(1.0, abs=1e-3)
    for k, group in enumerate(groups):
        order = weights[1:, k].argsort(descending=True)[:8] + 1
        assert group["items"] == order.tolist()
        assert group["weights"] == pytest.approx(weights[order, k].tolist(), abs=1e-4)
    assert item_groups(model(prior="gaussian")) == {}


def test_the_row_of_one_gaussian_reaches_full_weight_while_it_trains():
    config = providers_beauty.rows()["gmvae-1"]
    assert config.gmvae.num_interests == 1
    assert config.gmvae.kl_weight * config.gmvae.kl_cap == 1
    steps_per_epoch = 22_363 / config.batch_size
    assert config.gmvae.kl_steps < 20 * steps_per_epoch


@pytest.mark.parametrize(
    ("settings", "warned"),
    [
        ({"temporal_from_epoch": 3}, True),
        ({"temporal_from_epoch": 2}, False),
        ({"temporal_from_epoch": 0}, False),
        ({"prior": "standard"}, False),
    ],
    ids=str,
)
def test_a_run_that_ends_before_hard_interests_begin_says_so(settings, warned, caplog):
    gmvae = GmvaeConfig(embed_dim=8, max_history=8, **settings)
    train_collab(TrainCollabConfig(provider="gmvae", gmvae=gmvae, epochs=2), cycle())
    assert ("gmvae ended with epoch 2, before its hard interests begin" in caplog.text) == warned
