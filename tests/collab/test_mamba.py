"""Mamba4Rec and SIGMA-Mamba: sizes, transformers' Mamba as oracle, orders of items, and limits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from cases import batch
from fake_gpu import fake_gpu
from transformers import MambaConfig
from transformers.models.mamba.modeling_mamba import MambaMixer

from llmrec.collab.flipped import tail_places
from llmrec.collab.mamba import KeptItems, SigmaMamba
from llmrec.collab.mamba4rec import Mamba4Rec, MambaCore

SIZES = {
    "embed_dim": 64,
    "num_layers": 1,
    "state_dim": 32,
    "conv_width": 4,
    "expand": 2,
    "dropout_rate": 0.2,
    "max_history": 50,
}
SMALL = SIZES | {"num_items": 30, "embed_dim": 16, "state_dim": 4, "max_history": 12}
OFF = {"flip": "none", "gate": False, "gru": False, "mixing": "none"}


def size(module: torch.nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


def test_the_numbers_of_weights_are_the_published_ones():
    assert size(MambaCore(64, 32, 4, 2)) == 38_784
    assert size(Mamba4Rec(num_items=12_101, **SIZES)) == 846_784
    assert size(Mamba4Rec(num_items=3_416, **SIZES)) == 290_944
    for variant in ("released", "corrected"):
        assert size(SigmaMamba(num_items=12_101, variant=variant, **SIZES)) == 904_515


@pytest.mark.parametrize("length", [1, 3, 30])
def test_the_core_equals_that_of_transformers(length):
    torch.manual_seed(0)
    ours = MambaCore(16, 4, 4, 2).double()
    config = MambaConfig(hidden_size=16, state_size=4, conv_kernel=4, expand=2, time_step_rank=1)
    theirs = MambaMixer(config, layer_idx=0).double().eval()
    theirs.load_state_dict(ours.state_dict())
    hidden = torch.randn(3, length, 16, dtype=torch.float64)
    torch.testing.assert_close(ours(hidden), theirs(hidden), rtol=1e-8, atol=1e-8)


def test_step_sizes_begin_where_the_reference_begins_them():
    torch.manual_seed(0)
    found = torch.nn.functional.softplus(MambaCore(64, 32, 4, 8).dt_proj.bias)
    assert 1e-3 * 0.99 < found.min() < 2e-3 and 0.06 < found.max() < 0.1 * 1.01
    kept = Mamba4Rec(**SMALL).layers[0].mixer.dt_proj.bias
    lost = Mamba4Rec(**SMALL, init="released").layers[0].mixer.dt_proj.bias
    assert kept.all() and not lost.any()


def test_all_but_the_last_items_are_flipped_by_the_length_of_the_history():
    model = SigmaMamba(**SMALL, kept_items=2)
    history = torch.tensor([[5, 6, 7, 8, 9], [5, 6, 7, 0, 0], [5, 6, 0, 0, 0], [0, 0, 0, 0, 0]])
    found = history.gather(1, model.flipped_order(history))
    assert found.tolist() == [[7, 6, 5, 8, 9], [5, 6, 7, 0, 0], [5, 6, 0, 0, 0], [0, 0, 0, 0, 0]]
    whole = SigmaMamba(**SMALL, kept_items=0)
    found = history.gather(1, whole.flipped_order(history))
    assert found.tolist() == [[9, 8, 7, 6, 5], [7, 6, 5, 0, 0], [6, 5, 0, 0, 0], [0, 0, 0, 0, 0]]


def test_the_release_flips_slots_and_so_moves_a_short_history_among_the_padding():
    model = SigmaMamba(**SMALL, kept_items=2, variant="released")
    history = torch.nn.functional.pad(torch.tensor([[5, 6, 7]]), (0, 9))
    found = history.gather(1, model.flipped_order(history))
    assert found.tolist() == [[0, 0, 0, 0, 0, 0, 0, 7, 6, 5, 0, 0]]
    assert model.item.weight[0].any() and not model.item_embeddings()[0].any()


def check_same_to_gradients(model, found, expected, weight, rtol: float) -> None:
    """Outputs, and every gradient of their weighted sum, a hundred times less closely."""
    torch.testing.assert_close(found, expected, rtol=rtol, atol=1e-10)
    parameters = list(model.parameters())
    one, other = (torch.autograd.grad((made * weight).sum(), parameters) for made in (found, expected))
    for first, second in zip(one, other):
        torch.testing.assert_close(first, second, rtol=100 * rtol, atol=10 * rtol)


@pytest.mark.parametrize("num_layers", [1, 2])
def test_the_release_is_the_same_to_its_gradients_if_what_nothing_depends_on_is_left_out(num_layers):
    torch.manual_seed(0)
    model = SigmaMamba(**SMALL | {"num_layers": num_layers}, kept_items=2, variant="released").double().eval()
    for weight in model.parameters():
        weight.data += 0.3 * torch.randn_like(weight)
    for places in (1, 7, 11):  # of 12 slots: padding alone is turned into the first, and items from the sixth
        history = torch.randint(1, 31, (3, places))
        weight = torch.randn(3, places, 16, dtype=torch.float64)
        all_slots = model.encode(F.pad(history, (0, 12 - places)))[:, :places]
        found = model.encode(history)
        assert found.shape[1] == places
        check_same_to_gradients(model, found, all_slots, weight, rtol=1e-10)


def test_the_whole_released_form_follows_its_formulas():
    """Written down once more, from the padded slots to the scores."""
    torch.manual_seed(0)
    slots, kept = 12, 2
    model = SigmaMamba(**SMALL, kept_items=kept, variant="released").double().eval()
    for weight in model.parameters():
        weight.data += 0.1 * torch.randn_like(weight)
    layer, block = model.layers[0], model.layers[0].mixer
    gates, length = block.gates, [1, 5, 12]
    history = torch.randint(1, 20, (3, slots))
    for row, number in enumerate(length):
        history[row, number:] = 0
    x = model.norm(model.item(history))
    turned = torch.cat([x[:, : slots - kept].flip(1), x[:, slots - kept :]], dim=1)
    u, v = x + gates["forward_dense"](x), turned + gates["flipped_dense"](turned)
    gate = gates["silu"](u * u.sigmoid()) + gates["sigmoid"](u.sigmoid())
    turned_gate = gates["silu"](v * v.sigmoid()) + gates["sigmoid"](gate.sigmoid())
    around = torch.cat([x[:, :1] * 0, x, x[:, :1] * 0], dim=1)
    local = block.conv.bias + sum(around[:, k : k + slots] @ block.conv.weight[:, :, k].T for k in range(3))
    forward, flipped, gru = block.mixing
    mixed = block.mixing_out(
        forward * block.mamba(x) * (1 + gate)
        + flipped * block.mamba(turned) * (1 + turned_gate)
        + gru * block.gru(local)[0]
    )
    hidden = layer.norm(mixed)
    found = layer.inner_norm(hidden + layer.inner_out(F.gelu(layer.inner(hidden))))
    last = found[torch.arange(3), torch.tensor(length) - 1]
    torch.testing.assert_close(model.score(history), last @ model.item.weight.T, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("variant", "first"), [("released", 0), ("corrected", 1)])
def test_row_0_is_in_the_softmax_of_the_released_variant_alone(variant, first):
    torch.manual_seed(0)
    model = SigmaMamba(**SMALL, kept_items=0, variant=variant).eval()
    with torch.no_grad():
        model.item.weight[1:] += torch.randn_like(model.item.weight[1:])
    rows = replace(batch([1, 2, 3, 4]), target=torch.tensor([[0, 0, 4]]))
    logits = model.score(rows.item)[:, first:]
    expected = F.cross_entropy(logits, torch.tensor([4 - first]))
    torch.testing.assert_close(model.loss(rows).total, expected)


def test_with_everything_off_it_is_mamba4rec():
    models = []
    for make in (lambda: Mamba4Rec(**SMALL), lambda: SigmaMamba(**SMALL, **OFF)):
        torch.manual_seed(0)
        models.append(make())
    plain, gated = models
    assert size(plain) == size(gated)
    rows = batch([1, 2, 3, 0, 0], [4, 5, 6, 7, 8])
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
    assert torch.equal(plain.eval().score(rows.item), gated.eval().score(rows.item))
    assert gated.layout == plain.layout == "positions"


def test_paths_are_weighed_as_told_and_the_missing_ones_not_at_all():
    def weights(**settings):
        block = SigmaMamba(**SMALL, **settings).layers[0].mixer
        found = block.weights(torch.zeros(1, 1, 16), [torch.zeros(1, 1, 16)] * 3)
        return found.flatten().tolist()

    assert weights() == pytest.approx([0.8, 0.1, 0.1])
    assert weights(variant="released", mixing_weights=(0.5, 2.0, 1.0)) == pytest.approx([0.5, 2, 1])
    assert weights(gru=False) == pytest.approx([8 / 9, 1 / 9, 0])
    for mixing in ("gated", "attention"):  # where they begin, and with nothing said
        assert weights(mixing=mixing) == pytest.approx([0.8, 0.1, 0.1])
        assert weights(mixing=mixing, flip="none") == pytest.approx([8 / 9, 0, 1 / 9])
    model = SigmaMamba(**SMALL, mixing="fixed", flip="none")
    model.loss(batch([1, 2, 3, 4])).total.backward()
    assert model.layers[0].mixer.mixing.grad is None


def test_weights_of_each_position_equal_a_plain_loop():
    torch.manual_seed(0)
    hidden, paths = torch.randn(2, 3, 16), [torch.randn(2, 3, 16) for _ in range(3)]
    start = torch.tensor([0.8, 0.1, 0.1]).log()
    gated = SigmaMamba(**SMALL, mixing="gated").layers[0].mixer
    attention = SigmaMamba(**SMALL, mixing="attention").layers[0].mixer
    for block in (gated, attention):
        for weight in block.parameters():
            torch.nn.init.normal_(weight, std=0.5)
        block.mixing.data = start.clone()
    by_gate, by_attention = (block.weights(hidden, paths) for block in (gated, attention))
    for row in range(2):
        for place in range(3):
            x = hidden[row, place]
            logits = [start[n] + gated.mixing_gate.weight[n] @ x for n in range(3)]
            assert by_gate[row, place].tolist() == pytest.approx(
                torch.stack(logits).softmax(0).tolist(), abs=1e-6
            )
            query = attention.mixing_query.weight @ x
            keys = [attention.mixing_key.weight @ path[row, place] for path in paths]
            logits = [start[n] + query @ keys[n] / 4 for n in range(3)]
            assert by_attention[row, place].tolist() == pytest.approx(
                torch.stack(logits).softmax(0).tolist(), abs=1e-6
            )
    mixed = attention(hidden, None)
    report = attention.report(torch.ones(hidden.shape[:2], dtype=torch.bool))
    assert mixed.shape == hidden.shape
    assert report["mixing_weights"].sum() == pytest.approx(hidden.shape[0] * hidden.shape[1])


def test_kept_items_may_grow_with_the_history():
    lengths = torch.tensor([1, 2, 3, 10, 100])
    assert KeptItems(5)(lengths).tolist() == [1, 2, 3, 5, 5]
    assert KeptItems(5, rate=0.1)(lengths).tolist() == [1, 1, 1, 1, 10]
    assert KeptItems(5, rate=0.5)(lengths).tolist() == [1, 1, 2, 5, 50]
    model = SigmaMamba(**SMALL, kept_rate=0.5)
    history = torch.tensor([[5, 6, 7, 8, 9], [5, 6, 7, 0, 0], [5, 0, 0, 0, 0]])
    found = history.gather(1, model.flipped_order(history))
    assert found.tolist() == [[6, 5, 7, 8, 9], [5, 6, 7, 0, 0], [5, 0, 0, 0, 0]]


def test_the_gate_follows_its_formula_in_both_variants():
    torch.manual_seed(0)
    for variant in ("corrected", "released"):
        block = SigmaMamba(**SMALL, variant=variant).eval().layers[0].mixer
        hidden = torch.randn(2, 5, 16)
        _first, gate = block.gated(block.mamba(hidden), hidden, "forward_dense", None)
        turned = hidden.flip(1)
        second, other = block.gated(block.mamba(turned), turned, "flipped_dense", gate)
        silu, sigmoid = block.gates["silu"], block.gates["sigmoid"]
        u = hidden.flip(1) + block.gates["flipped_dense"](hidden.flip(1))
        if variant == "released":
            expected = silu(u * torch.sigmoid(u)) + sigmoid(torch.sigmoid(gate))
        else:
            expected = silu(u) * torch.sigmoid(silu(u)) + torch.sigmoid(sigmoid(u))
        torch.testing.assert_close(other, expected)
        torch.testing.assert_close(second, block.mamba(hidden.flip(1)) * (1 + expected))


LAYOUTS = {
    "one pass": {},
    "prefixes": {"kept_items": 0},
    "two layers": {"num_layers": 2},
    "released": {"variant": "released"},
    "gated": {"mixing": "gated"},
    "attention": {"mixing": "attention", "kept_items": 0},
    "one direction": {"flip": "none"},
}


@pytest.mark.parametrize("settings", LAYOUTS.values(), ids=LAYOUTS)
def test_gates_and_weights_are_logged_of_the_targets_whatever_is_padded(settings):
    torch.manual_seed(0)
    model = SigmaMamba(**SMALL | {"max_history": 50} | settings).eval()
    for weight in model.parameters():
        weight.data += 0.1 * torch.randn_like(weight)
    rows = batch([1, 2, 3, 4], [5, 6, 7, 0])
    if model.layout == "prefixes":
        rows = replace(rows, target=torch.tensor([[0, 0, 4], [0, 7, 0]]))
    found = model.loss(rows).parts
    assert any(name.startswith("forward_gate") for name in found)
    wide = {name: F.pad(getattr(rows, name), (0, 47)) for name in ("item", "target", "time")}
    for name, value in model.loss(replace(rows, **wide)).parts.items():
        torch.testing.assert_close(value, found[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("settings", [{"kept_items": 0}, {"variant": "released"}], ids=str)
def test_of_a_prefix_the_gate_at_its_end_is_logged(settings):
    torch.manual_seed(0)
    model = SigmaMamba(**SMALL, **settings).eval()
    rows = replace(batch([1, 2, 3, 4]), target=torch.tensor([[0, 0, 4]]))
    block, item = model.layers[0].mixer, F.pad(rows.item, (0, 9))
    hidden = model.norm(model.item(item if model.released else rows.item))
    order = model.flipped_order(item if model.released else rows.item)
    turned = hidden.gather(1, order[..., None].expand_as(hidden))
    _, gate = block.gated(block.mamba(hidden), hidden, "forward_dense", None)
    _, other = block.gated(block.mamba(turned), turned, "flipped_dense", gate)
    found = model.loss(rows).parts
    assert float(found["forward_gate"]) == pytest.approx(float(gate[0, 2].mean()), abs=1e-6)
    assert float(found["flipped_gate"]) == pytest.approx(float(other[0, 2].mean()), abs=1e-6)


@pytest.mark.parametrize("kept", [{"kept_items": n} for n in (1, 2, 5, 20)] + [{"kept_rate": 0.4}])
@pytest.mark.parametrize("conv_width", [1, 2, 4])
def test_one_pass_over_all_prefixes_equals_each_prefix_alone(kept, conv_width):
    """Read-outs and every gradient, in float64."""
    torch.manual_seed(0)
    settings = SMALL | {"conv_width": conv_width, "dropout_rate": 0.0}
    model = SigmaMamba(**settings, **kept).double()
    for weight in model.parameters():
        weight.data += 0.1 * torch.randn_like(weight)
    history = torch.randint(1, 31, (3, 11))
    history[1, 7:] = 0
    real = history != 0
    weight = torch.randn(3, 11, 16, dtype=torch.float64)[real]
    together = model.encode_prefixes(history)
    alone = torch.stack([model.encode(history[:, : end + 1])[:, -1] for end in range(11)], 1)
    check_same_to_gradients(model, together[real], alone[real], weight, rtol=1e-9)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kept", [{"kept_items": 5}, {"kept_rate": 0.4}], ids=str)
def test_one_pass_over_all_prefixes_is_the_same_on_a_gpu(kept):
    torch.manual_seed(0)
    model = SigmaMamba(**SMALL | {"dropout_rate": 0.0, "max_history": 60}, **kept).double()
    history = torch.randint(1, 31, (3, 60))
    history[1, 7:] = 0
    real = history != 0
    expected = model.encode_prefixes(history)[real]
    by = torch.autograd.grad(expected.square().sum(), list(model.parameters()))
    found = model.cuda().encode_prefixes(history.cuda())[real.cuda()]
    also_by = torch.autograd.grad(found.square().sum(), list(model.parameters()))
    for one, other in zip([found, *also_by], [expected, *by]):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-8, atol=1e-9)


def test_one_pass_over_all_prefixes_keeps_to_the_gpu():
    model = SigmaMamba(**SMALL, gru=False)  # cuDNN's GRU asks a real GPU for its workspace
    with fake_gpu() as gpu:
        gpu.move(model)
        found = model.encode_prefixes(torch.randint(1, 31, (3, 11)).to("cuda"))
        assert (found.device.type, found.dtype, tuple(found.shape)) == ("cuda", torch.float32, (3, 11, 16))


def test_of_single_prefixes_only_what_they_have_is_computed():
    """Histories of 5 and 2 items, of which each prefix keeps 2, and a convolution over 2."""
    real = torch.tensor([[True] * 5, [True] * 2 + [False] * 3])
    found = tail_places(1, torch.tensor([1, 2, 2, 2, 2]), real)
    places = zip(found.row.tolist(), (found.end + 1).tolist(), found.place.tolist())
    long = [(0, 2, 0), (0, 3, 0), (0, 3, 1), (0, 4, 0), (0, 4, 2), (0, 5, 0), (0, 5, 3)]
    assert list(places) == [*long, (1, 2, 0)]


@pytest.mark.parametrize("number", [1, 2, 3])
def test_layers_have_their_input_added_where_there_are_several(number):
    for cls in (Mamba4Rec, SigmaMamba):
        layers = cls(**SMALL | {"num_layers": number}).layers
        assert [layer.residual for layer in layers] == [number > 1] * number


def test_only_one_layer_with_kept_items_runs_over_all_prefixes_at_once():
    assert SigmaMamba(**SMALL).layout == "positions"
    assert SigmaMamba(**SMALL | {"num_layers": 2}).layout == "prefixes"
    assert SigmaMamba(**SMALL, kept_items=0).layout == "prefixes"
    assert SigmaMamba(**SMALL, variant="released").layout == "prefixes"
