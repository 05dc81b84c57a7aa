"""Sequence models in training, written once more by plain formulas: dropout doubles every other number, so
that its places show too."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from cases import batch
from torch import Tensor

from llmrec.collab import gmvae
from llmrec.collab.bert4rec import BERT4Rec
from llmrec.collab.comirec import ComiRec
from llmrec.collab.config import TrainCollabConfig
from llmrec.collab.diffurec import DiffuRec
from llmrec.collab.diffusion import DiffuRecSys
from llmrec.collab.fuxi import Fuxi, rms_norm
from llmrec.collab.gmvae import GMVAE
from llmrec.collab.gru4rec import GRU4Rec
from llmrec.collab.interests import Interests
from llmrec.collab.mamba import SigmaMamba
from llmrec.collab.mamba4rec import Mamba4Rec
from llmrec.collab.mind import MIND
from llmrec.collab.moe import FuxiMME
from llmrec.collab.sasrec import SASRec
from llmrec.collab.svae import SVAE


class Uneven:
    """What dropout is here, as a factor; a norm would not notice one number for all."""

    def __mul__(self, values: Tensor) -> Tensor:
        return values * (1 + torch.arange(values.shape[-1]) % 2)


HISTORY = torch.tensor([[3, 1, 4, 1], [9, 2, 6, 5]])


@pytest.fixture(autouse=True)
def uneven_dropout(monkeypatch):
    """Dropout as a factor, see `Uneven`; that of attention weights, inside torch's own function, as a factor
    of three on what they gather."""
    real = F.scaled_dot_product_attention

    def dropout(values, p=0.5, training=True, inplace=False):
        return Uneven() * values if training and p else values

    def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **rest):
        found = real(query, key, value, attn_mask=attn_mask, is_causal=is_causal, **rest)
        return 3 * found if dropout_p else found

    monkeypatch.setattr(F, "dropout", dropout)
    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)


def made(cls: type, provider: str, training: bool, **settings):
    """A small model whose weights, norms' and biases' too, are anything."""
    defaults = vars(getattr(TrainCollabConfig(), provider))
    small = {"num_items": 12, "embed_dim": 8, "max_history": 6}
    torch.manual_seed(0)
    model = cls(**defaults | small | settings).double().train(training)
    for weight in model.parameters():
        weight.data += 0.3 * torch.randn_like(weight)
    return model


def attended(
    asked: list[Tensor], keys: list[Tensor], values: list[Tensor], heads: int, *, causal: bool
) -> list[Tensor]:
    """Multi-head attention by loops."""
    found = []
    for i, query in enumerate(asked):
        parts = []
        for head in range(heads):
            width = len(query) // heads
            one = slice(head * width, (head + 1) * width)
            scores = [
                float(query[one] @ key[one]) / math.sqrt(width) for key in keys[: i + 1 if causal else None]
            ]
            weights = torch.tensor(scores, dtype=torch.float64).softmax(0)
            parts.append(sum(w * value[one] for w, value in zip(weights, values)))
        found.append(torch.cat(parts))
    return found


def post_norm(
    layer: torch.nn.TransformerEncoderLayer,
    hidden: list[Tensor],
    heads: int,
    once: Uneven | int,
    inner: Uneven | int,
    gathered: int,
    causal: bool,
) -> list[Tensor]:
    """A post-norm transformer layer by loops.

    Args:
        once: factor of dropout on both branches; inner: inside the feed-forward part; gathered: on attention.
    """
    attention = layer.self_attn
    mapped = [(attention.in_proj_weight @ one + attention.in_proj_bias).split(len(one)) for one in hidden]
    queries, keys, values = zip(*mapped)
    every = attended(queries, keys, values, heads, causal=causal)
    out = []
    for one, found in zip(hidden, every):
        one = layer.norm1(one + once * attention.out_proj(gathered * found))
        wide = inner * F.gelu(layer.linear1(one))
        out.append(layer.norm2(one + once * layer.linear2(wide)))
    return out


both = pytest.mark.parametrize("training", [False, True])


@torch.no_grad()
@both
def test_sasrec(training):
    model = made(SASRec, "sasrec", training, inner_dim=10)
    twice, thrice = (Uneven(), 3) if training else (1, 1)
    found = model.encode(HISTORY)
    for row, items in enumerate(HISTORY.tolist()):
        x = [
            twice * (8**0.5 * model.item.weight[item] + model.position.weight[place])
            for place, item in enumerate(items)
        ]
        for block in model.blocks:
            mapped = [block.query_key_value(block.attention_norm(one)).split(8) for one in x]
            every = attended(*zip(*mapped), 2, causal=True)
            x = [one + twice * block.attention_out(thrice * part) for one, part in zip(x, every)]
            x = [one + twice * block.inner_out(F.gelu(block.inner(block.inner_norm(one)))) for one in x]
        torch.testing.assert_close(found[row], torch.stack([model.norm(one) for one in x]))


@torch.no_grad()
@pytest.mark.parametrize(("training", "num_layers"), [(False, 2), (True, 1)])
def test_gru4rec(training, num_layers):
    """Gates by their formulas; between layers, dropout is inside torch's own function."""
    model = made(GRU4Rec, "gru4rec", training, hidden_dim=5, num_layers=num_layers, dropout_rate=0.4)
    assert model.gru.dropout == (0.4 if num_layers > 1 else 0)
    assert not any("bias" in name for name, _ in model.gru.named_parameters())
    found = model.encode(HISTORY)
    for row, items in enumerate(HISTORY.tolist()):
        states = [torch.zeros(5, dtype=torch.float64) for _ in range(num_layers)]
        for place, item in enumerate(items):
            below = (Uneven() if training else 1) * model.item.weight[item]
            for layer, state in enumerate(states):
                r, z, c = (getattr(model.gru, f"weight_ih_l{layer}") @ below).chunk(3)
                own_r, own_z, own_c = (getattr(model.gru, f"weight_hh_l{layer}") @ state).chunk(3)
                r, z = torch.sigmoid(r + own_r), torch.sigmoid(z + own_z)
                below = states[layer] = (1 - z) * torch.tanh(c + r * own_c) + z * state
            torch.testing.assert_close(found[row, place], model.out(below))


@torch.no_grad()
@both
def test_bert4rec(training):
    """Places are counted from the end of each row, and everyone sees everyone but padding."""
    model = made(BERT4Rec, "bert4rec", training, inner_dim=10)
    twice, thrice = (Uneven(), 3) if training else (1, 1)
    found = model.encode(torch.tensor([[3, 1, 13, 4], [9, 13, 0, 0]]))
    for row, items in enumerate([[3, 1, 13, 4], [9, 13]]):
        x = [
            twice * model.norm(model.item.weight[item] + model.position.weight[len(items) - 1 - place])
            for place, item in enumerate(items)
        ]
        for layer in model.layers:
            x = post_norm(layer, x, 2, twice, twice, thrice, causal=False)
        expected = torch.stack([model.head_norm(F.gelu(model.head(one))) for one in x])
        torch.testing.assert_close(found[row, : len(items)], expected)


@torch.no_grad()
@both
def test_svae(training):
    model = made(SVAE, "svae", training, hidden_dim=5, inner_dim=7, latent_dim=3, dropout_rate=0.5)
    mean, spread = model.encode(HISTORY)
    hidden = model.gru((Uneven() if training else 1) * model.item.weight[HISTORY])[0]
    inner = torch.tanh(hidden @ model.inner.weight.T + model.inner.bias)
    expected = inner @ model.latent.weight.T + model.latent.bias
    torch.testing.assert_close(mean, expected[..., :3])
    torch.testing.assert_close(spread, expected[..., 3:])
    state = torch.tanh(mean @ model.decoder.weight.T + model.decoder.bias)
    logits = state @ model.out.weight.T + model.out.bias
    torch.testing.assert_close(model.score(HISTORY), logits[:, -1])


@torch.no_grad()
@both
@pytest.mark.parametrize("attention_rate", [0.0, 0.3])
def test_gmvae(training, attention_rate, monkeypatch):
    """Means, variances and what is decoded of a drawn state, at every position."""
    rates = {"attention_dropout_rate": attention_rate}
    model = made(GMVAE, "gmvae", training, num_heads=2, prior="standard", **rates)
    twice, thrice = (Uneven(), 3 if attention_rate else 1) if training else (1, 1)
    noise = torch.randn(2, 4, 8, dtype=torch.float64)
    monkeypatch.setattr(torch, "randn_like", lambda _: noise)
    mean, log_variance = model.encode(HISTORY)
    decoded = []
    monkeypatch.setattr(
        gmvae,
        "next_item_loss",
        lambda name, query, *_, **__: decoded.append(query) or gmvae.Loss(total=query.sum(), num_targets=0),
    )
    model.loss(batch([3, 1, 4, 1, 5], [9, 2, 6, 5, 3]))
    for row, items in enumerate(HISTORY.tolist()):
        x = [
            twice * model.norm(model.item.weight[item] + model.position.weight[place])
            for place, item in enumerate(items)
        ]
        ways = {"heads": 2, "once": twice, "inner": 1, "gathered": thrice, "causal": True}
        means = torch.stack(post_norm(model.mean.layer, x, **ways))
        spreads = torch.stack(post_norm(model.log_variance.layer, x, **ways))
        torch.testing.assert_close(mean[row], means)
        torch.testing.assert_close(log_variance[row], spreads.clamp(-8, 8))
        state = means + torch.exp(spreads / 2) * noise[row] if training else means
        torch.testing.assert_close(
            decoded[0][row], torch.stack(post_norm(model.decoder.layer, [*state], **ways))
        )


def diffusion_block(
    block, query: Tensor, hidden: list[Tensor], heads: int, twice: Uneven | int, thrice: int
) -> Tensor:
    """A block of DiffuRec at one place by loops; it may look at all of them."""
    attention = block.attention
    normed = [block.attention_norm(one) for one in hidden]
    asked = attention.query(block.attention_norm(query))
    keys, values = ([part(one) for one in normed] for part in (attention.key, attention.value))
    (gathered,) = attended([asked], keys, values, heads, causal=False)
    query = query + twice * attention.out(thrice * gathered)
    wide = twice * F.gelu(block.inner.inner(block.inner_norm(query)), approximate="tanh")
    return twice * (query + twice * block.inner.out(wide))


@torch.no_grad()
@both
@pytest.mark.parametrize("form", ["diffurec", "cross"])
def test_diffusion_models(form, training, monkeypatch):
    """What is recovered from a noisy vector; in training its strength is drawn, here one deviation above."""
    cls, provider = (DiffuRec, "diffurec") if form == "diffurec" else (DiffuRecSys, "diffusion")
    model = made(cls, provider, training, num_heads=2, num_layers=2)
    twice, thrice = (Uneven(), 3) if training else (1, 1)
    monkeypatch.setattr(torch, "randn_like", torch.ones_like)
    strength = 0.002 if training else 0.001
    noisy, step = torch.randn(2, 8, dtype=torch.float64), torch.tensor([5, 1])
    history = torch.tensor([[3, 1, 4, 1], [9, 2, 0, 0]])
    found = model.estimate(model.embed(history), history, noisy, step)
    for row, items in enumerate([[3, 1, 4, 1], [9, 2]]):
        angle = [float(step[row]) * 31.25 * 10_000 ** (-j / 4) for j in range(4)]
        waves = torch.tensor([*map(math.cos, angle), *map(math.sin, angle)], dtype=torch.float64)
        injected = noisy[row] + model.step.out(F.silu(model.step.inner(waves)))
        injected = strength * injected
        x = [model.norm(twice * model.item.weight[item]) for item in items]
        if form == "diffurec":
            x = [one + injected for one in x]
        for block in model.blocks:
            if form == "cross":
                cross, normed = block.cross, [block.cross_norm(one) for one in x]
                keys, values = ([part(one) for one in normed] for part in (cross.key, cross.value))
                asked = cross.query(block.asked_norm(injected))
                (gathered,) = attended([asked], keys, values, 2, causal=False)
                x = [one + twice * cross.out(thrice * gathered) for one in x]
                block = block.block
            x = [diffusion_block(block, one, x, 2, twice, thrice) for one in x]
        torch.testing.assert_close(found[row], model.out_norm(twice * x[-1]), rtol=1e-5, atol=1e-6)


@torch.no_grad()
@both
def test_the_released_block_of_diffurecsys(training):
    """Dropout on each of its three branches, beside that inside them; `test_diffusion` has these by loops."""
    model = made(DiffuRecSys, "diffusion", training, variant="released", num_heads=2)
    twice, block = (Uneven() if training else 1), model.blocks[-1]
    hidden, injected = torch.randn(2, 2, 6, 8, dtype=torch.float64)
    found = block(hidden, injected, torch.tensor([[1, 2, 3, 4, 5, 6]] * 2))
    cross, normed = block.cross, block.norm(hidden)
    query = cross.heads(cross.query(injected)).softmax(-1)
    key, value = cross.heads(cross.key(normed)).softmax(1), cross.heads(cross.value(normed))
    gathered = torch.einsum("bhtd,bhsd,bhse->bthe", query, key, value).flatten(2)
    x = hidden + twice * cross.out(gathered)
    x = x + twice * block.attention(block.norm(x), block.norm(x), None)
    torch.testing.assert_close(found, x + twice * block.inner(block.inner_norm(x)))


@torch.no_grad()
@both
@pytest.mark.parametrize("num_layers", [1, 2])
def test_mamba4rec(training, num_layers):
    """With several layers each has its input added; a single one has not."""
    model = made(Mamba4Rec, "mamba4rec", training, num_layers=num_layers, state_dim=4)
    twice = Uneven() if training else 1
    x = model.norm(twice * model.item.weight[HISTORY])
    for layer in model.layers:
        x = layer.norm(twice * layer.mixer(x) + (x if num_layers > 1 else 0))
        inner = twice * F.gelu(layer.inner(x))
        x = layer.inner_norm(x + twice * layer.inner_out(inner))
    torch.testing.assert_close(model.encode(HISTORY), x)


@torch.no_grad()
@both
def test_sigma_mamba(training):
    """One layer, corrected, of a history by itself: two directions, gated, and a GRU that looks back."""
    model = made(SigmaMamba, "mamba", training, state_dim=4, kept_items=1)
    twice = Uneven() if training else 1
    layer, block = model.layers[0], model.layers[0].mixer
    x = model.norm(twice * model.item.weight[HISTORY])
    turned = x[:, [2, 1, 0, 3]]

    def gated(hidden: Tensor, dense: str) -> Tensor:
        u = hidden + block.gates[dense](hidden)
        gate = F.silu(block.gates["silu"](u)) + torch.sigmoid(block.gates["sigmoid"](u))
        return block.mamba(hidden) * (1 + twice * gate)

    before = F.pad(x, (0, 0, 2, 0))
    local = block.conv.bias + sum(before[:, k : k + 4] @ block.conv.weight[:, :, k].T for k in range(3))
    weight = block.mixing.softmax(0)
    mixed = weight[0] * gated(x, "forward_dense") + weight[1] * gated(turned, "flipped_dense")
    mixed = block.mixing_out(mixed + weight[2] * block.gru(local)[0])
    hidden = layer.norm(twice * mixed)
    hidden = layer.inner_norm(hidden + twice * layer.inner_out(twice * F.gelu(layer.inner(hidden))))
    torch.testing.assert_close(model.encode(HISTORY)[:, -1], hidden[:, -1])
    torch.testing.assert_close(model.encode_prefixes(HISTORY)[:, -1], hidden[:, -1])


@torch.no_grad()
@both
@pytest.mark.parametrize("tables", [0, 2], ids=["fuxi", "moe"])
def test_fuxi_and_moe(tables, training):
    """Dropout on the input, on what attention gathered, and before the feed-forward part."""
    experts = {"num_tables": tables, "num_experts": 1}
    model = made(*(FuxiMME, "moe") if tables else (Fuxi, "fuxi"), training, **experts if tables else {})
    twice, width = (Uneven() if training else 1), 8 // max(tables, 1)
    time = torch.tensor([[0, 5, 900, 10**6], [0, 1, 2, 3]])
    found, context = model.encode(HISTORY, time)
    x = model.item.weight[HISTORY].unflatten(2, (-1, width)) * math.sqrt(width)
    x = x + model.position.weight[:4, None] + (model.branch if tables else 0)
    x = twice * x.transpose(1, 2).flatten(0, 1)
    for block in model.blocks:
        first = block.out.linear(twice * block.attend(rms_norm(x), context)) + x
        x = block.feed_forward(twice * rms_norm(first), context) + first
    torch.testing.assert_close(found, x.unflatten(0, (2, -1)).transpose(1, 2).flatten(2))


@torch.no_grad()
@both
@pytest.mark.parametrize(("cls", "settings"), [(ComiRec, {}), (ComiRec, {"routing": "capsule"}), (MIND, {})])
def test_comirec_and_mind(cls, settings, training):
    """Dropout is on the items of the history, and nowhere else."""
    provider = "mind" if cls is MIND else "comirec"
    model = made(cls, provider, training, dropout_rate=0.5, **settings)
    plain = made(cls, provider, training=False, **settings)
    plain.load_state_dict(model.state_dict())
    if training:
        plain.item.weight.copy_(Uneven() * plain.item.weight)
    torch.testing.assert_close(model.interests(HISTORY), plain.interests(HISTORY))


@torch.no_grad()
@both
def test_interests_are_made_of_normalised_items_without_places(training):
    model = made(GMVAE, "gmvae", training, num_heads=2)
    seen = []
    model.interests.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    model.prior_of(batch([3, 1, 4, 1, 5], [9, 2, 6, 5, 3]))
    expected = (Uneven() if training else 1) * model.norm(model.item.weight[HISTORY])
    torch.testing.assert_close(seen[0], expected)


@torch.no_grad()
@both
def test_interests(training):
    """The variance of an interest: three layers with ReLU and dropout, and a last one without."""
    torch.manual_seed(0)
    interests = Interests(4, 3, 0.1, 1.0, 0.3).double().train(training)
    twice = Uneven() if training else 1
    x = wide = torch.randn(5, 8, dtype=torch.float64)
    linear = [layer for layer in interests.log_variance if isinstance(layer, torch.nn.Linear)]
    assert [layer.out_features for layer in linear] == [256, 512, 256, 4]
    for layer in linear[:-1]:
        wide = twice * layer(wide).clamp(min=0)
    torch.testing.assert_close(interests.log_variance(x), linear[-1](wide))
    items, valid = torch.randn(1, 3, 4, dtype=torch.float64), torch.ones(1, 3, dtype=torch.bool)
    seen = []
    interests.norm.register_forward_hook(lambda *given: seen.append(given[2]))
    found = interests(items, valid, temporal=True, prefix=False).mean
    torch.testing.assert_close(found, twice * seen[0])
