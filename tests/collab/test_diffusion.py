"""DiffuRec and DiffuRecSys: the noise process against simulation, and the limit that joins them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from cases import batch

from llmrec.collab.config import TrainCollabConfig
from llmrec.collab.diffurec import DiffuRec
from llmrec.collab.diffusion import DiffuRecSys
from llmrec.collab.noise import Diffusion, betas, step_features
from llmrec.collab.trainer import Sums

SMALL = {
    "num_items": 30,
    "embed_dim": 8,
    "num_layers": 3,
    "num_heads": 2,
    "num_steps": 8,
    "reverse_steps": 8,
    "max_history": 10,
}
ONE = vars(TrainCollabConfig().diffurec) | SMALL
SYS = vars(TrainCollabConfig().diffusion) | SMALL


def rows_of(*histories: list[int]):
    """Rows of the layout `prefixes`: everything but each list's last item is shown."""
    full = batch(*[[*row, *[0] * (max(map(len, histories)) - len(row))] for row in histories])
    last = (full.target != 0).sum(1) - 1
    kept = torch.arange(full.target.shape[1]) == last[:, None]
    return replace(full, target=full.target * kept)


def test_the_published_schedule_keeps_the_published_share_of_signal():
    """Computed by hand from WHUIR/DiffuRec's settings: T = 32, truncated linear."""
    beta = betas("trunc_lin", 32)
    assert float(beta[0]) == pytest.approx(0.013125) and float(beta[-1]) == pytest.approx(0.635)
    signal = torch.cumprod(1 - beta, 0)
    found = [float(signal[step - 1]) for step in (1, 8, 16, 24, 32)]
    assert found == pytest.approx([0.98688, 0.49352, 0.05198, 8.05e-4, 9.9e-7], rel=2e-3)


@pytest.mark.parametrize("schedule", ["trunc_lin", "linear", "cosine", "sqrt"])
@pytest.mark.parametrize("num_steps", [8, 32, 1000])
def test_every_schedule_only_adds_noise(schedule, num_steps):
    beta = betas(schedule, num_steps)
    assert beta.shape == (num_steps,)
    assert (beta > 0).all() and (beta < 1).all()
    # With few steps the published truncated schedule stops half way (its end is cut to a tenth).
    assert torch.cumprod(1 - beta, 0)[-1] < (0.55 if schedule == "trunc_lin" and num_steps < 32 else 0.2)


def test_other_schedules_follow_their_formulas():
    """Nichol and Dhariwal 2021 (cosine), Li et al. 2022 (sqrt), Ho et al. 2020 (linear, of 1,000 steps)."""
    for schedule, share in (
        ("cosine", lambda t: math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2),
        ("sqrt", lambda t: 1 - math.sqrt(t + 1e-4)),
    ):
        signal = torch.cumprod(1 - betas(schedule, 20), 0)
        expected = [share(step / 20) / share(0) for step in range(1, 20)]
        assert signal[:-1].tolist() == pytest.approx(expected)
        assert betas(schedule, 20)[-1] == 0.999
    assert betas("linear", 100)[[0, -1]].tolist() == pytest.approx([1e-3, 0.2])
    assert betas("linear", 8)[[0, -1]].tolist() == pytest.approx([0.0125, 0.999])


@pytest.mark.parametrize(("cls", "settings"), [(DiffuRec, ONE), (DiffuRecSys, SYS)])
def test_settings_of_the_noise_reach_it(cls, settings):
    own = {} if cls is DiffuRec else {"offset": 0.25, "offset_kind": "constant"}
    process = cls(**settings | own | {"schedule": "cosine", "num_steps": 9, "eval_samples": 3}).diffusion
    torch.testing.assert_close(process.signal, torch.cumprod(1 - betas("cosine", 9), 0).float())
    assert process.steps_noise.shape == (3, 9, 8)
    assert (process.offset, process.offset_kind) == ((0.25, "constant") if own else (0, "row"))


@pytest.mark.parametrize(("cls", "settings"), [(DiffuRec, ONE), (DiffuRecSys, SYS | {"offset": 0.5})])
def test_a_target_learns_through_its_noise_at_any_step(cls, settings, monkeypatch):
    """Where the noisy vector itself is what was recovered."""
    torch.manual_seed(0)
    model = cls(**settings)
    seen, real = [], model.diffusion.forward_to
    monkeypatch.setattr(model.diffusion, "forward_to", lambda *given: seen.append(given[1:]) or real(*given))
    monkeypatch.setattr(model, "estimate", lambda hidden, history, noisy, step: noisy)
    model.loss(rows_of(*[[1, 2, 3, 4], [5, 6, 7]] * 2000)).total.backward()
    step, noise = seen[0]
    assert (step.bincount(minlength=8) / len(step) - 1 / 8).abs().max() < 0.02
    assert float(torch.cov(noise.T)[0, 1]) == pytest.approx(0 if cls is DiffuRec else 0.25, abs=0.04)
    table = model.item.weight.detach().clone().requires_grad_()
    target = torch.tensor([4, 7] * 2000)
    signal = torch.cumprod(1 - betas("trunc_lin", 8), 0).float()[step, None]
    noisy = signal.sqrt() * table[target] + (1 - signal).sqrt() * noise
    F.cross_entropy(noisy @ table[1:].T, target - 1, reduction="sum").backward()
    torch.testing.assert_close(model.item.weight.grad, table.grad, rtol=1e-3, atol=0.02)


def test_jumping_forward_has_the_law_of_walking_there():
    torch.manual_seed(0)
    process = Diffusion("trunc_lin", 8, 3)
    clean = torch.tensor([1.0, -2.0, 0.5]).expand(40_000, 3)
    walked = clean
    for step, beta in enumerate(betas("trunc_lin", 8).float()):
        walked = (1 - beta).sqrt() * walked + beta.sqrt() * torch.randn_like(walked)
        jumped = process.forward_to(clean, torch.full((40_000,), step), torch.randn(40_000, 3))
        torch.testing.assert_close(walked.mean(0), jumped.mean(0), rtol=0, atol=0.03)
        torch.testing.assert_close(walked.var(0), jumped.var(0), rtol=0, atol=0.03)


@pytest.mark.parametrize("step", [1, 4, 7])
def test_the_way_back_has_the_mean_of_the_posterior(step):
    """Bayes for Gaussians: q(x_{t-1} | x_0) times q(x_t | x_{t-1})."""
    process = Diffusion("trunc_lin", 8, 1)
    beta = betas("trunc_lin", 8)
    signal = torch.cumprod(1 - beta, 0)
    clean, noisy = 0.7, -1.3
    prior_mean, prior_variance = signal[step - 1].sqrt() * clean, 1 - signal[step - 1]
    precision = 1 / prior_variance + (1 - beta[step]) / beta[step]
    mean = (prior_mean / prior_variance + (1 - beta[step]).sqrt() * noisy / beta[step]) / precision
    found = process.back(torch.tensor(clean), torch.tensor(noisy), step, torch.tensor(0.0))
    assert float(found) == pytest.approx(float(mean), rel=1e-5)
    noise = process.back(torch.tensor(clean), torch.tensor(noisy), step, torch.tensor(1.0)) - found
    assert float(noise) == pytest.approx(float(beta[step].sqrt()), rel=1e-5)


def test_the_last_step_back_is_the_estimate_and_a_perfect_one_comes_through():
    process = Diffusion("trunc_lin", 32, 4, num_samples=3)
    clean, noisy = torch.randn(2, 5, 4)
    torch.testing.assert_close(process.back(clean, noisy, 0, torch.ones(5, 4)), clean)
    found = process.reverse(lambda state, step: clean, 5, 32)
    torch.testing.assert_close(found, clean.expand(3, 5, 4))


def test_fewer_steps_back_are_the_last_ones_and_begin_at_pure_noise():
    """Against the law of a step (Ho et al. 2020, Eq. 7), written again from the schedule."""
    torch.manual_seed(0)
    process = Diffusion("trunc_lin", 8, 4, num_samples=2)
    seen = []

    def estimate(state: torch.Tensor, step: int) -> torch.Tensor:
        seen.append((step, state))
        return 0.5 * state + 1

    found = process.reverse(estimate, 3, 4)
    beta = betas("trunc_lin", 8).float()
    signal = torch.cumprod(1 - beta, 0)
    assert [step for step, _ in seen] == [3, 2, 1, 0] * 2
    for sample in range(2):
        state = process.start[sample].expand(3, 4)
        assert torch.equal(seen[4 * sample][1], state)
        for step in (3, 2, 1):
            clean = 0.5 * state + 1
            mean = beta[step] * signal[step - 1].sqrt() * clean
            mean = mean + (1 - signal[step - 1]) * (1 - beta[step]).sqrt() * state
            state = mean / (1 - signal[step]) + beta[step].sqrt() * process.steps_noise[sample, step]
        torch.testing.assert_close(found[sample], 0.5 * state + 1)


@pytest.mark.parametrize(("cls", "settings"), [(DiffuRec, ONE), (DiffuRecSys, SYS)])
def test_scores_and_quick_scores_walk_as_many_steps_as_they_are_set_to(cls, settings, monkeypatch):
    torch.manual_seed(0)
    model = cls(**settings | {"reverse_steps": 5, "valid_reverse_steps": 2, "eval_samples": 2}).eval()
    steps = []

    def estimate(hidden, history, noisy, step):
        steps.append(step.tolist())
        return noisy

    monkeypatch.setattr(model, "estimate", estimate)
    history = torch.tensor([[1, 2, 3], [4, 5, 0]])
    model.score(history)
    assert steps == [[step] * 2 for step in (4, 3, 2, 1, 0)] * 2
    steps.clear()
    model.quick_score(history)
    assert steps == [[1] * 2, [0] * 2] * 2


def test_what_scoring_starts_from_has_the_offset_and_what_steps_add_has_none():
    torch.manual_seed(0)
    process = Diffusion("linear", 3, 6, offset=0.5, num_samples=20_000)
    for noise, variance, shared in (
        (process.start, 1.25, 0.25),
        (process.steps_noise[:, 1], 1.0, 0.0),
    ):
        assert float(noise.var()) == pytest.approx(variance, abs=0.03)
        assert float(torch.cov(noise.T)[0, 1]) == pytest.approx(shared, abs=0.03)


def test_offsets_move_a_row_as_one_each_number_alone_or_all_the_same():
    like = torch.empty(20_000, 6)
    for kind, variance, shared, mean in (
        ("row", 1.25, 0.25, 0.0),
        ("element", 1.25, 0.0, 0.0),
        ("constant", 1.0, 0.0, 0.5),
    ):
        torch.manual_seed(0)
        noise = Diffusion("linear", 8, 6, offset=0.5, offset_kind=kind).draw(like)
        assert float(noise.var()) == pytest.approx(variance, abs=0.03)
        assert float(noise.mean()) == pytest.approx(mean, abs=0.02)
        assert float(torch.cov(noise.T)[0, 1]) == pytest.approx(shared, abs=0.03)


def test_steps_are_told_apart_by_cosines_and_sines():
    found = step_features(torch.tensor([0, 3]), 32, 4)
    angle = 3 * 31.25
    expected = [angle, angle / 100]
    expected = torch.tensor([[1, 1, 0, 0], [*torch.tensor(expected).cos(), *torch.tensor(expected).sin()]])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_without_offset_and_with_added_noise_it_is_diffurec():
    models = []
    for make in (
        lambda: DiffuRec(**ONE),
        lambda: DiffuRecSys(**SYS | {"injection": "add", "offset": 0.0}),
    ):
        torch.manual_seed(0)
        models.append(make())
    rows = rows_of([1, 2, 3, 4], [5, 6, 7])
    losses = []
    for model in models:
        torch.manual_seed(1)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for _ in range(3):
            optimizer.zero_grad()
            loss = model.loss(rows).total
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[0] == losses[1]
    assert torch.equal(models[0].eval().score(rows.item), models[1].eval().score(rows.item))


def test_reading_one_place_of_the_last_block_is_reading_it_of_all():
    torch.manual_seed(0)
    model = DiffuRec(**ONE).double().eval()
    history = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]])
    hidden = model.embed(history)
    found = model.read(hidden, history)
    mask = (history != 0)[:, None, None]
    for block in model.blocks:
        hidden = block(hidden, hidden, mask)
    torch.testing.assert_close(found, model.out_norm(hidden)[[0, 1], [3, 1]])


@pytest.mark.parametrize("cls", [DiffuRec, DiffuRecSys])
def test_the_noisy_target_is_added_to_normalised_items_at_its_strength(cls, monkeypatch):
    torch.manual_seed(0)
    settings = ONE if cls is DiffuRec else SYS | {"injection": "add"}
    model = cls(**settings | {"strength": 0.25}).double().eval()
    history, noisy = torch.tensor([[1, 2, 3]]), torch.randn(1, 8, dtype=torch.float64)
    seen = []
    monkeypatch.setattr(model.blocks[0], "forward", lambda query, *_: seen.append(query) or query)
    step = torch.tensor([3])
    model.estimate(model.embed(history), history, noisy, step)
    time = model.step(step)[0]
    for place, item in enumerate((1, 2, 3)):
        vector = model.item.weight[item]
        normed = (vector - vector.mean()) / (vector.var(correction=0) + 1e-12).sqrt()
        torch.testing.assert_close(seen[0][0, place], normed + 0.25 * (noisy[0] + time))


@pytest.mark.parametrize("cross_heads", [None, 4])
def test_the_whole_released_form_follows_its_code(cross_heads):
    """shararezr/DiffuRecSys, by loops over places, heads and features: padding takes part, keys are weighed
    over heads, output rows of padding are -1e9, and of the blocks only the last counts."""
    torch.manual_seed(0)
    model = DiffuRecSys(**SYS | {"variant": "released", "max_history": 5, "cross_heads": cross_heads})
    model = model.double().eval()
    for weight in model.parameters():
        weight.data += 0.3 * torch.randn_like(weight)
    history = torch.tensor([[4, 7, 2, 0], [9, 0, 0, 0]])
    noisy, step = torch.randn(2, 8, dtype=torch.float64), torch.tensor([5, 1])
    found = model.estimate(model.embed(history), history, noisy, step)
    block = model.blocks[-1]
    cross, attention = block.cross, block.attention
    for row, length in ((0, 3), (1, 1)):
        items = [*history[row].tolist(), 0]
        hidden = [model.norm(model.item.weight[item]) for item in items]
        asked = cross.query(model.strength * (noisy[row] + model.step(step[row : row + 1])[0]))
        heads = cross_heads or 2
        asked = asked.view(heads, -1).softmax(1)
        keys = [cross.key(block.norm(one)).view(heads, -1).exp() for one in hidden]
        values = [cross.value(block.norm(one)).view(heads, -1) for one in hidden]
        gathered = torch.zeros_like(asked)
        for head in range(heads):
            for key, value in zip(keys, values):
                for feature in range(8 // heads):
                    weight = key[head, feature] / key[:, feature].sum()
                    gathered[head] += asked[head, feature] * weight * value[head]
        for place in range(5):
            rows = gathered.flatten() if place < length else torch.full((8,), -1e9, dtype=torch.float64)
            hidden[place] = hidden[place] + cross.out(rows)
        normed = [block.norm(one) for one in hidden]
        query = attention.query(normed[length - 1]).view(2, 4)
        seen = []
        for head in range(2):
            weight = [query[head] @ attention.key(one).view(2, 4)[head] / 2 for one in normed]
            weight = torch.stack(weight).softmax(0)
            seen.append(sum(w * attention.value(one).view(2, 4)[head] for w, one in zip(weight, normed)))
        last = hidden[length - 1] + attention.out(torch.cat(seen))
        last = last + block.inner(block.inner_norm(last))
        torch.testing.assert_close(found[row], model.out_norm(last), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_cross_attention_equals_a_loop_over_places(heads):
    torch.manual_seed(0)
    block = DiffuRecSys(**SYS | {"cross_heads": heads}).double().eval().blocks[0]
    assert block.block.attention.num_heads == 2
    hidden, injected = torch.randn(1, 4, 8, dtype=torch.float64), torch.randn(1, 1, 8, dtype=torch.float64)
    mask = torch.tensor([[[[True, True, True, False]]]])
    found = block.cross(block.asked_norm(injected), block.cross_norm(hidden), mask)
    asked = block.cross.query(block.asked_norm(injected))[0, 0]
    normed = block.cross_norm(hidden)[0]
    out = []
    for head in range(heads):
        part = slice(8 // heads * head, 8 // heads * (head + 1))
        scores = [asked[part] @ block.cross.key(normed[t])[part] for t in range(3)]
        weight = (torch.stack(scores) / (8 / heads) ** 0.5).softmax(0)
        out.append(sum(w * block.cross.value(normed[t])[part] for t, w in enumerate(weight)))
    torch.testing.assert_close(found[0, 0], block.cross.out(torch.cat(out)))


def test_of_the_released_blocks_only_the_last_one_learns():
    torch.manual_seed(0)
    model = DiffuRecSys(**SYS | {"variant": "released"})
    model.loss(rows_of([1, 2, 3, 4], [5, 6, 7])).total.backward()
    learned = [any(weight.grad is not None for weight in block.parameters()) for block in model.blocks]
    assert learned == [False, False, True]
    corrected = DiffuRecSys(**SYS)
    corrected.loss(rows_of([1, 2, 3, 4], [5, 6, 7])).total.backward()
    assert all(weight.grad is not None for block in corrected.blocks for weight in block.parameters())


def test_the_released_variant_sees_padding_and_the_corrected_one_does_not():
    history = torch.tensor([[1, 2, 3]])
    for variant, sees in (("released", True), ("corrected", False)):
        torch.manual_seed(0)
        model = DiffuRecSys(**SYS | {"variant": variant}).eval()
        before = model.score(history)[:, 1:]
        with torch.no_grad():
            model.item.weight[0] += 5
        assert bool((before != model.score(history)[:, 1:]).any()) == sees
        assert not model.item_embeddings()[0].any()


@pytest.mark.parametrize(("variant", "first"), [("released", 0), ("corrected", 1)])
def test_row_0_is_in_the_softmax_of_the_released_variant_alone(variant, first, monkeypatch):
    torch.manual_seed(0)
    model = DiffuRecSys(**SYS | {"variant": variant})
    with torch.no_grad():
        model.item.weight[0] = 1.0
    found = torch.randn(2, 8)
    monkeypatch.setattr(model, "estimate", lambda *_: found)
    logits = found @ model.item.weight[first:].T
    expected = F.cross_entropy(logits, torch.tensor([4, 7]) - first, reduction="sum")
    torch.testing.assert_close(model.loss(rows_of([1, 2, 3, 4], [5, 6, 7])).total, expected)


def test_likeness_is_a_mean_over_the_rows_that_drew_such_a_step(monkeypatch):
    torch.manual_seed(0)
    model = DiffuRec(**ONE)
    found = torch.randn(3, 8)
    clean = model.item.weight[torch.tensor([4, 7, 9])]
    sums = Sums()
    # Of eight steps the first two are a quarter; the second pass has none of them.
    for steps, rows in (([0, 1], slice(0, 2)), ([7], slice(2, 3))):
        histories = [[1, 2, 3, 4], [5, 6, 7], [8, 9]][rows]
        monkeypatch.setattr(torch, "randint", lambda *_, drawn=steps, **__: torch.tensor(drawn))
        monkeypatch.setattr(model, "estimate", lambda *_, rows=rows: found[rows])
        sums.add(model.loss(rows_of(*histories)))
    likeness = F.cosine_similarity(found, clean).tolist()
    expected = [(likeness[0] + likeness[1]) / 2, 0, 0, likeness[2]]
    assert sums.over(3)["parts"]["target_cosine_by_noise"] == pytest.approx(expected, abs=1e-6)


def test_scores_average_over_starts_and_distance_ranks_by_distance():
    torch.manual_seed(0)
    model = DiffuRec(**ONE | {"rounding": "distance", "eval_samples": 3}).eval()
    history = torch.tensor([[1, 2, 3]])
    hidden = model.embed(history)

    def estimate(noisy, step):
        return model.estimate(hidden, history, noisy, torch.tensor([step]))

    clean = model.diffusion.reverse(estimate, 1, 8).mean(0)
    by_distance = (clean - model.item.weight[1:]).norm(dim=1).argsort()
    assert torch.equal(model.score(history)[0, 1:].argsort(descending=True), by_distance)
