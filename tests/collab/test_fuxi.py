"""FuXi-alpha and Fuxi-MME: sizes, channels and routing against loops, and the limit that joins them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from cases import batch
from torch import Tensor

from llmrec.collab.fuxi import Channels, Fuxi, context_of, fuxi_block, rms_norm, run_blocks
from llmrec.collab.moe import Experts, FuxiMME, Routing, table_similarity
from llmrec.collab.trainer import Sums

SIZES = {
    "num_items": 30,
    "embed_dim": 8,
    "num_layers": 2,
    "num_heads": 2,
    "head_dim": None,
    "inner_multiplier": 2,
    "semantic": True,
    "positional": True,
    "temporal": True,
    "single_stage": False,
    "dropout_rate": 0.2,
    "temperature": 0.05,
    "max_history": 10,
}
MIXTURE = {
    "num_tables": 2,
    "num_experts": 4,
    "top_k": 2,
    "moe_targets": ("ffn",),
    "router_noise": 1.0,
    "balance": "switch",
    "balance_weight": 0.01,
}


def channels(max_history: int) -> Channels:
    return Channels(semantic=True, positional=True, temporal=True, max_history=max_history)


@pytest.mark.parametrize(
    ("width", "heads", "head_dim", "inner", "expected"),
    [(50, 1, 50, 50, 30_600), (256, 4, 64, 1024, 1_377_062)],
    ids=["ml-1m base", "ml-20m base"],
)
def test_a_block_has_the_published_number_of_weights(width, heads, head_dim, inner, expected):
    block = fuxi_block(width, heads, head_dim, channels(211), 0.2, inner)
    assert sum(weight.numel() for weight in block.parameters()) == expected


@torch.no_grad()
@pytest.mark.parametrize("asked", [False, True], ids=["last item", "request"])
def test_a_block_equals_a_loop_over_positions(asked):
    torch.manual_seed(0)
    block = fuxi_block(8, 2, 4, channels(10), 0.0, 16).double()
    history = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 0, 0, 0]])
    time = torch.tensor([[0, 10, 86_400, 86_400, 10**9], [5, 7, 0, 0, 0]])
    hidden = torch.randn(2, 5, 8, dtype=torch.float64)
    now = torch.tensor([[10, 86_400, 86_400, 10**9, 10**9 + 7], [7, 10**6, 0, 0, 0]]) if asked else time
    context = context_of(history, time, now) if asked else context_of(history, time)
    found = run_blocks(torch.nn.ModuleList([block]), hidden, context)
    for row, length in ((0, 5), (1, 2)):
        x = hidden[row, :length]
        parts = F.silu(block.project.linear(rms_norm(x))).split([24, 8, 8, 8], -1)
        gate, value, query, key = (part.view(length, -1, 4) for part in parts)
        for i in range(length):
            place, moment, content = torch.zeros(3, 2, 4, dtype=torch.float64)
            for j in range(i + 1):
                bucket = min(int(math.log(max(1, abs(int(now[row, i] - time[row, j])))) / 0.301), 128)
                for head in range(2):
                    place[head] += block.by_place[j - i + 9] * value[j, head]
                    moment[head] += block.by_time[bucket] * value[j, head]
                    content[head] += F.silu(query[i, head] @ key[j, head]) / 10 * value[j, head]
            mixed = torch.stack([place, moment, content]).flatten()
            mixed = mixed / (mixed.square().mean() + 1e-6).sqrt() * gate[i].flatten()
            first = block.out.linear(mixed) + x[i]
            inner = first / (first.square().mean() + 1e-6).sqrt()
            second = block.feed_forward
            out = second.inner_out(F.silu(second.gate(inner)) * second.inner(inner)) + first
            torch.testing.assert_close(found[row, i], out, rtol=1e-9, atol=1e-9)
    assert not found[1, 2:].any()


@torch.no_grad()
@pytest.mark.parametrize("mixed", [False, True], ids=["fuxi", "moe"])
def test_blocks_are_given_scaled_items_with_places_and_branches_told_apart(mixed):
    torch.manual_seed(0)
    model = FuxiMME(**SIZES | MIXTURE).eval() if mixed else Fuxi(**SIZES).eval()
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    if mixed:
        model.branch.normal_()
    history = torch.tensor([[3, 1, 4], [9, 0, 0]])
    model.encode(history, torch.zeros_like(history))
    tables = 2 if mixed else 1
    width = 8 // tables
    for row, place in ((0, 0), (0, 2), (1, 0)):
        for table in range(tables):
            vector = model.item.weight[history[row, place], table * width : (table + 1) * width]
            expected = math.sqrt(width) * vector + model.position.weight[place]
            if mixed:
                expected = expected + model.branch[table]
            torch.testing.assert_close(seen[0][row * tables + table, place], expected)


@pytest.mark.parametrize("mixed", [False, True], ids=["fuxi", "moe"])
def test_strengths_of_channels_are_of_the_targets_however_rows_are_padded_and_cut(mixed):
    torch.manual_seed(0)
    model = FuxiMME(**SIZES | MIXTURE).eval() if mixed else Fuxi(**SIZES).eval()
    rows = batch([1, 2, 3, 4, 5], [6, 7, 8, 0, 0], [9, 8, 0, 0, 0])
    rows = replace(rows, target=rows.target * torch.tensor([[0, 1, 0, 1]]) + rows.target * (rows.target == 8))
    one, several = Sums(), Sums()
    one.add(model.loss(rows))
    for row in range(3):
        single = {
            name: F.pad(getattr(rows, name)[row : row + 1], (0, row))
            for name in ("item", "target", "time", "next_time")
        }
        several.add(model.loss(replace(rows, **single)))
    number = int((rows.target != 0).sum())
    found, apart = one.over(number)["parts"], several.over(number)["parts"]
    for name in ("channel_rms_1", "channel_rms_2"):
        assert found[name] == pytest.approx(apart[name], rel=1e-5)
    if not mixed:
        context = model.encode(rows.item, rows.time)[1]
        squares = torch.stack(context.channel_squares)[:, rows.target != 0]
        assert found["channel_rms_1"] == pytest.approx(squares[0].mean(0).sqrt().tolist(), rel=1e-5)


@pytest.mark.parametrize(("seconds", "bucket"), [(0, 0), (1, 0), (2, 2), (86_400, 37), (10**18, 128)])
def test_times_fall_into_the_published_buckets(seconds, bucket):
    found = context_of(torch.tensor([[1, 2]]), torch.tensor([[0, seconds]])).bucket
    assert found[0, 1, 0] == bucket


def test_one_table_and_one_expert_are_fuxi_alpha_to_the_last_bit():
    torch.manual_seed(0)
    plain = Fuxi(**SIZES)
    torch.manual_seed(0)
    mixed = FuxiMME(**SIZES | MIXTURE | {"num_tables": 1, "num_experts": 1})
    rows = batch([1, 2, 3, 0], [4, 5, 6, 7])
    for model in (plain, mixed):
        torch.manual_seed(1)
        model.optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for _ in range(3):
            model.optimizer.zero_grad()
            model.found = model.loss(rows).total
            model.found.backward()
            model.optimizer.step()
    assert torch.equal(plain.found, mixed.found)
    assert torch.equal(plain.item_embeddings(), mixed.item_embeddings())
    assert torch.equal(plain.eval().score(rows.item, rows.time), mixed.eval().score(rows.item, rows.time))


@pytest.mark.parametrize("mixed", [False, True], ids=["fuxi", "moe"])
def test_a_model_that_uses_the_time_of_the_request_differs_by_it_alone(mixed):
    """With the times of the last items in place of the requests' it is the model that does not."""
    models = []
    for use in (False, True):
        torch.manual_seed(0)
        sizes = SIZES | {"use_request_time": use}
        models.append(FuxiMME(**sizes | MIXTURE).eval() if mixed else Fuxi(**sizes).eval())
    plain, asked = models
    assert (plain.uses_request_time, asked.uses_request_time) == (False, True)
    history, time = torch.tensor([[3, 1, 4], [9, 0, 0]]), torch.tensor([[5, 70, 10**6], [8, 0, 0]])
    later = torch.tensor([[70, 10**6, 10**6], [10**9, 0, 0]])
    assert torch.equal(asked.score(history, time, time), plain.score(history, time))
    same = (asked.score(history, time, later) - plain.score(history, time)).abs().amax(1) == 0
    assert same.tolist() == [False, False]
    rows = replace(batch([3, 1, 4, 7], [9, 2, 0, 0]), time=time, next_time=later)
    losses = [model.loss(rows).total for model in models]
    assert losses[0] != losses[1]
    torch.testing.assert_close(asked.loss(replace(rows, next_time=time)).total, losses[0])


def test_tables_are_independent_at_the_input_and_joined_in_the_score():
    torch.manual_seed(0)
    model = FuxiMME(**SIZES | MIXTURE).eval()
    history, time = torch.tensor([[3, 1, 4]]), torch.zeros(1, 3, dtype=torch.int64)
    before = model.encode(history, time)[0]
    with torch.no_grad():
        model.item.weight[3, 4:] += 1  # the second table of one item
    after = model.encode(history, time)[0]
    assert torch.equal(before[..., :4], after[..., :4])
    assert (before[..., 4:] != after[..., 4:]).any()


def experts_and_tokens(training: bool = False) -> tuple[Experts, Tensor]:
    class Line(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.in_dim = torch.nn.Linear(6, 5), 6

        def forward(self, hidden: Tensor, context: object) -> Tensor:
            return self.linear(hidden)

    torch.manual_seed(0)
    experts = Experts([Line() for _ in range(4)], top_k=2, router_noise=1.0).double().train(training)
    with torch.no_grad():
        experts.router.normal_()
    return experts, torch.randn(2, 3, 6, dtype=torch.float64)


@torch.no_grad()
def test_a_mixture_equals_a_loop_over_tokens_and_experts():
    experts, hidden = experts_and_tokens()
    context = context_of(torch.tensor([[1, 2, 3], [4, 0, 0]]), None)
    found = experts(hidden, context)
    for row in range(2):
        for place in range(3):
            token = hidden[row, place]
            scores = token @ experts.router
            best = sorted(range(4), key=lambda k: -float(scores[k]))[:2]
            weight = torch.stack([scores[k] for k in best]).exp()
            weight = weight / weight.sum()
            expected = sum(w * experts.experts[k].linear(token) for w, k in zip(weight, best))
            torch.testing.assert_close(found[row, place], expected, rtol=1e-12, atol=1e-12)
    assert len(context.routing[0].at(context.valid).weight) == 4  # padding is left out


def test_balance_losses_equal_loops_and_know_even_routing():
    experts, hidden = experts_and_tokens()
    routing = experts.route(hidden.flatten(0, 1))
    share = [sum(float(row[k]) for row in routing.chosen) / 12 for k in range(4)]
    mean = [sum(float(row[k]) for row in routing.probability) / 6 for k in range(4)]
    torch.testing.assert_close(routing.load, torch.tensor(share, dtype=torch.float64))
    expected = 4 * sum(f * p for f, p in zip(share, mean))
    torch.testing.assert_close(float(routing.imbalance("switch")), expected)
    total = routing.weight.sum(0)
    expected = float(((total - total.mean()) ** 2).mean() / total.mean() ** 2)
    torch.testing.assert_close(float(routing.imbalance("cv2")), expected)
    even = torch.eye(4, dtype=torch.float64)
    flat = Routing(chosen=even.bool(), weight=even, probability=torch.full((4, 4), 0.25))
    assert float(flat.imbalance("switch")) == 1 and float(flat.imbalance("cv2")) == 0
    assert float(flat.entropy) == pytest.approx(math.log(4))
    one = Routing(
        chosen=torch.tensor([[True, False]] * 4),
        weight=torch.tensor([[1.0, 0.0]] * 4),
        probability=torch.tensor([[1.0, 0.0]] * 4),
    )
    assert float(one.imbalance("switch")) == 2 and float(one.imbalance("cv2")) == 1


@pytest.mark.parametrize("rows", [([1, 2, 3, 4],), ([1, 2, 3, 4], [9, 8, 7, 6], [3, 1, 0, 0])])
def test_the_loss_holds_the_balance_of_experts_in_units_of_its_targets(rows):
    """Of a batch of any size: balance_weight times the imbalance, a target."""
    torch.manual_seed(0)
    model = FuxiMME(**SIZES, **MIXTURE | {"balance_weight": 0.5})
    found = model.loss(batch(*rows))
    balance = found.parts["balance_loss"]
    torch.testing.assert_close(found.total.detach(), found.parts["prediction_loss"] + 0.5 * balance)
    assert float(balance) >= found.num_targets  # even routing has 1, in every mixture
    without = FuxiMME(**SIZES, **MIXTURE | {"balance_weight": 0.0})
    without.load_state_dict(model.state_dict())
    gradients = []
    for one in (model, without):
        torch.manual_seed(1)
        one.loss(batch(*rows)).total.backward()
        gradients.append(torch.cat([weight.grad.flatten() for weight in one.parameters()]))
    assert (gradients[0] - gradients[1]).abs().max() > 1e-4


@torch.no_grad()
@pytest.mark.parametrize("kind", ["switch", "cv2", "none"])
def test_every_mixture_is_balanced_and_logged_by_itself_and_padding_by_none(kind):
    torch.manual_seed(0)
    model = FuxiMME(**SIZES | MIXTURE | {"moe_targets": ("ffn", "out"), "balance": kind}).eval()
    for weight in model.parameters():
        weight += 0.5 * torch.randn_like(weight)
    rows = batch([1, 2, 3, 4, 5], [6, 7, 8, 0, 0])
    found = model.loss(rows).parts
    context = model.encode(rows.item, rows.time)[1]
    shown = (rows.item != 0).repeat_interleave(2, 0)
    routings = [routing.at(shown) for routing in context.routing]
    assert len(routings) == 4
    uneven = sum(float(routing.imbalance(kind)) for routing in routings)
    assert float(found["balance_loss"]) == pytest.approx(6 * uneven, rel=1e-5)
    for place, routing in enumerate(routings, start=1):
        torch.testing.assert_close(found[f"expert_load_{place}"], 6 * routing.load)
    assert float(found["table_similarity"]) == pytest.approx(
        6 * float(table_similarity(model.item.weight, 2))
    )


@torch.no_grad()
def test_noise_of_routing_has_its_scale():
    experts, hidden = experts_and_tokens(training=True)
    experts.noise.normal_()
    experts.router_noise = 0.5
    torch.manual_seed(1)
    found = experts.route(hidden).probability
    torch.manual_seed(1)
    spread = 0.5 * torch.log1p(torch.exp(hidden @ experts.noise))
    scores = hidden @ experts.router + torch.randn(2, 3, 4, dtype=torch.float64) * spread
    torch.testing.assert_close(found, scores.softmax(-1))


@pytest.mark.parametrize("mixed", [False, True], ids=["fuxi", "moe"])
def test_settings_of_blocks_reach_them(mixed):
    def block(**settings):
        return (FuxiMME(**SIZES | MIXTURE | settings) if mixed else Fuxi(**SIZES | settings)).blocks[0]

    def parts(made):
        return {
            name for name in ("project", "out", "feed_forward") if isinstance(getattr(made, name), Experts)
        }

    width = 4 if mixed else 8
    assert block().head_dim == width // 2 and block(head_dim=3).head_dim == 3
    names = ("semantic", "positional", "temporal")
    for left_out in names:
        found = block(**{left_out: False}).channels
        assert {name: getattr(found, name) for name in names} == {name: name != left_out for name in names}
    inner = block(inner_multiplier=3).feed_forward
    assert (inner.experts[0] if mixed else inner).gate.out_features == 3 * width
    targets = {"moe_targets": ("out",)} if mixed else {}
    assert block(single_stage=True, **targets).feed_forward is None
    if mixed:
        assert parts(block()) == {"feed_forward"}
        assert parts(block(moe_targets=("out", "uvqk"))) == {"out", "project"}


def test_noise_routes_only_while_training_and_the_router_learns():
    experts, hidden = experts_and_tokens(training=True)
    assert not torch.equal(experts.route(hidden).weight, experts.route(hidden).weight)
    experts.eval()
    assert torch.equal(experts.route(hidden).weight, experts.route(hidden).weight)
    model = FuxiMME(**SIZES | MIXTURE)
    model.loss(batch([1, 2, 3, 4], [4, 5, 6, 7])).total.backward()
    for block in model.blocks:
        assert block.feed_forward.router.grad.any() and block.feed_forward.noise.grad.any()


def test_similarity_of_tables_is_one_for_turned_and_small_for_unrelated_ones():
    torch.manual_seed(0)
    first, other = torch.randn(2, 1001, 6, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
    assert float(table_similarity(torch.cat([first, 3 * first @ turn], 1), 2)) == pytest.approx(1)
    assert float(table_similarity(torch.cat([first, other], 1), 2)) < 0.05
