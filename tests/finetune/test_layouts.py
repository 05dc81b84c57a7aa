"""Every option that changes what tokens there are or where they stand: still the prompts themselves."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from packing_reference import EXACT, NUM_ITEMS, full_scores, gradients, random_users
from test_methods import METHODS, NAMES
from tiny_mme_sid import PROMPT, WIDE, model

from llmrec.errors import ConfigError
from llmrec.finetune import base_model
from llmrec.finetune.config import FinetuneConfig
from llmrec.finetune.flex import NAME as FLEX
from llmrec.finetune.flex import block_mask
from llmrec.finetune.packing import count_tokens, group_rows, lay_out_stream, pack, stream_bucket

NO_RESPONSE = dataclasses.replace(PROMPT, response=[])
ENGINES = {
    "padded": {},
    "padded-own": {"share_instruction": False},
    "per-prefix": {"layout": "per_prefix"},
    "stream": {"rows": "stream"},
    "stream-per-prefix": {"rows": "stream", "layout": "per_prefix"},
}


def prompts(net, item, targets) -> torch.Tensor:
    """Read-outs (n, H): one prompt per target through the base model as Hugging Face runs it, padding with an
    attention mask in front of short histories where the published collator puts it."""
    embed, outputs = net.base.get_input_embeddings(), []
    for start, stop in zip(targets.start, targets.stop):
        history = net.item_tokens(item[start:stop]).flatten(0, -2)
        width = net.item_tokens.tokens_per_item
        empty = max(net.min_slots - (stop - start), 0) * width
        padding = history.new_zeros(empty, history.shape[-1])
        text = [embed(net.instruction), padding, history, embed(net.response)]
        seen = torch.ones(1, sum(map(len, text)))
        seen[0, len(text[0]) : len(text[0]) + empty] = 0
        place = torch.arange(seen.shape[1])[None]
        found = net.base(
            inputs_embeds=torch.cat(text)[None], attention_mask=seen, position_ids=place, use_cache=False
        )
        outputs.append(found.last_hidden_state[0, -1])
    return torch.stack(outputs)


def alignment(net, shown: torch.Tensor) -> torch.Tensor:
    """CTRL-MM's InfoNCE of the collaborative vectors with both others, by hand."""
    first, *others = (F.normalize(part(shown), dim=1) for part in net.item_tokens.parts.values())
    return sum(F.cross_entropy(first @ other.T / 0.1, torch.arange(len(shown))) for other in others)


def compare(net, settings) -> None:
    """Read-outs, loss and every gradient against single prompts."""
    item, targets = random_users([1, 2, 3, 5])
    rows = pack(item, targets, group_rows(targets, settings.get("layout", "packed"), net.min_slots))
    expected_hidden = prompts(net, item, targets)
    loss = F.cross_entropy(
        full_scores(net, expected_hidden), torch.from_numpy(targets.item) - 1, reduction="sum"
    )
    pairs = None
    if settings.get("method") == "ctrl_mm":
        shown = torch.cat([item[start:stop] for start, stop in zip(targets.start, targets.stop)]).unique()
        loss = loss + 0.1 * len(targets) * alignment(net, shown)
        pairs = net.item_tokens.pairs(shown)
    expected = gradients(net, loss)
    torch.testing.assert_close(
        net.hidden(rows, net.item_tokens(torch.arange(NUM_ITEMS + 1))), expected_hidden, **EXACT
    )
    found_loss = net.loss([rows], 1.0, pairs, len(targets))
    torch.testing.assert_close(found_loss, loss, **EXACT)
    found = gradients(net, found_loss)
    assert found.keys() == expected.keys() and found
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], **EXACT)


@pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)
@pytest.mark.parametrize("method", [{}, {"method": "concat", "fusion_temperature": 1e-3}], ids=["1", "3"])
@pytest.mark.parametrize("option", [{}, {"pad_quirk": True}, {"readout": "item"}], ids=["", "quirk", "item"])
def test_options_under_every_layout(option, method, engine):
    settings = {**option, **method, **engine}
    net = model(NUM_ITEMS, prompt=NO_RESPONSE if option.get("readout") else PROMPT, **settings)
    compare(net, settings)


@pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)
@pytest.mark.parametrize("settings", METHODS, ids=NAMES)
def test_packed_prompts_of_every_method_are_the_prompts_themselves(settings, engine):
    settings = {"fusion_temperature": 1e-3, **settings, **engine}
    compare(model(NUM_ITEMS, **settings), settings)


def test_the_quirk_changes_short_histories_alone():
    item, targets = random_users([5])
    found = {}
    for quirk in (False, True):
        net = model(NUM_ITEMS, pad_quirk=quirk)
        rows = pack(item, targets, group_rows(targets, "packed", net.min_slots))
        assert len(rows.items) == 1 + quirk
        found[quirk] = net.hidden(rows, net.item_tokens(torch.arange(NUM_ITEMS + 1)))
    torch.testing.assert_close(found[True][2:], found[False][2:], **EXACT)
    assert (found[True][:2] - found[False][:2]).abs().amax(dim=1).min() > 1e-3


@pytest.mark.parametrize("rows", ["padded", "stream"])
def test_dropout_drops_every_place_by_itself_and_no_text(rows):
    """Not an item's vector once for all the places where it stands."""
    net = model(NUM_ITEMS, rows=rows, dropout_rate=0.5).train()
    shown, real = [], net.base.forward

    def watched(*arguments, inputs_embeds, **named):
        shown.append(inputs_embeds.detach().flatten(0, 1))
        return real(*arguments, inputs_embeds=inputs_embeds, **named)

    net.base.forward = watched
    item, targets = random_users([9, 9])
    item = torch.full_like(item, 3)
    packed = pack(item, targets, group_rows(targets, "packed"))
    token = net.item_tokens(torch.tensor([3])).detach().flatten()
    net.loss([packed])
    places = [place for place in torch.cat(shown) if ((place == 0) | (place == 2 * token)).all()]
    dropped = torch.stack([place == 0 for place in places if 0 < (place == 0).sum() < len(token)])
    assert len(dropped.unique(dim=0)) > 5
    text = net.base.get_input_embeddings()(net.instruction).detach()
    assert all((torch.cat(shown) == row).all(1).any() for row in text)


def test_padding_of_a_stream_changes_nothing_and_sees_nothing():
    net = model(NUM_ITEMS, rows="stream")
    item, targets = random_users([3, 4])
    rows = pack(item, targets, group_rows(targets, "packed"))
    plain, padded = (
        lay_out_stream(rows, instruction=5, response=3, bucketed=bucketed) for bucketed in (False, True)
    )
    size = len(plain.source)
    assert size == 5 + 2 + 3 + 7 * 3 and len(padded.source) == 256
    visible = padded.visible()[0, 0]
    assert torch.equal(visible[:size, :size], plain.visible()[0, 0])
    assert not visible[:size, size:].any() and not visible[size:, :size].any() and visible.any(dim=1).all()
    tokens = net.item_tokens(torch.arange(NUM_ITEMS + 1))
    expected = net.hidden(rows, tokens)
    net.flex = True
    net._run_base = lambda embeddings, mask, place: (
        net.base(
            inputs_embeds=embeddings, attention_mask=padded.visible(), position_ids=place, use_cache=False
        ).last_hidden_state
    )
    torch.testing.assert_close(net.hidden(rows, tokens), expected, **EXACT)


def test_block_masks_are_the_dense_mask_and_flex_attention_gives_its_read_outs():
    """FlexAttention trains on GPUs only; its forward pass also runs here."""
    pytest.importorskip("torch._inductor")
    item, targets = random_users([3, 60, 7, 1])
    rows = pack(item, targets, group_rows(targets, "packed"))
    net = model(NUM_ITEMS, rows="stream").float().eval()
    stream = lay_out_stream(rows, instruction=5, response=3, bucketed=True)
    mask = block_mask(stream, stream.visible_blocks())
    blocks = stream.visible()[0, 0].unflatten(0, (-1, 128)).unflatten(2, (-1, 128)).any(dim=(1, 3))
    assert torch.equal(mask.to_dense()[0, 0].bool(), blocks) and 0 < blocks.float().mean() < 1
    tokens = net.item_tokens(torch.arange(NUM_ITEMS + 1))
    with torch.no_grad():
        expected = net.hidden(rows, tokens)
        net.flex = True
        net.base.set_attn_implementation("flex_attention")
        torch.testing.assert_close(net.hidden(rows, tokens), expected, rtol=1e-4, atol=1e-5)


def on_gpu(scale: float):
    """Rows, a model whose heads FlexAttention's kernels take, and what it makes of the rows."""
    item, targets = random_users([3, 60, 7, 1, 200, 30])
    rows = pack(item, targets, group_rows(targets, "packed"))
    net = model(NUM_ITEMS, rows="stream", width=WIDE).float().cuda()
    with torch.no_grad():
        for layer in net.base.layers:
            for weight in layer.parameters():
                weight.mul_(scale if weight.ndim > 1 else 1.0)

    def found(*, flex: bool, bf16: bool) -> dict[str, torch.Tensor]:
        net.flex = flex
        net.base.set_attn_implementation(FLEX if flex else "sdpa")
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=bf16):
            hidden = net.hidden(rows, net.item_tokens(torch.arange(NUM_ITEMS + 1, device="cuda")))
            loss = net.loss([rows])
        return {"hidden": hidden, "loss": loss[None], **gradients(net, loss)}

    return found


def error(found: torch.Tensor, truth: torch.Tensor) -> float:
    return float(((found.float() - truth).norm() / truth.norm().clamp(min=1e-6)).detach())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_flex_attention_on_a_gpu_gives_the_values_and_gradients_of_dense_masks():
    found = on_gpu(1.0)
    expected = found(flex=False, bf16=False)
    for name, value in found(flex=True, bf16=False).items():
        assert error(value, expected[name]) < 1e-3, name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_flex_attention_in_bfloat16_is_close_to_float32():
    """At weights as they are started with; the tests' own ones of 0.3 make a tenfold of any rounding."""
    found = on_gpu(0.3)
    truth = found(flex=False, bf16=False)
    dense, flex = found(flex=False, bf16=True), found(flex=True, bf16=True)
    assert error(flex["hidden"], truth["hidden"]) < 1e-2
    assert error(flex["loss"], truth["loss"]) < 1e-2
    for name, value in truth.items():
        assert error(flex[name], value) < max(1.5 * error(dense[name], value), 1e-2), name


def test_flex_attention_is_left_to_heads_that_its_kernels_take():
    auto, flex = FinetuneConfig(), FinetuneConfig(attention="flex")
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert base_model.stream_and_flex(auto, gpu, 16) == (True, True)
    assert base_model.stream_and_flex(auto, gpu, 8) == (True, False)
    assert base_model.stream_and_flex(auto, cpu, 16) == (False, False)
    with pytest.raises(ConfigError, match=r"attention heads of 16 numbers at least, and .* has 8"):
        base_model.stream_and_flex(flex, gpu, 8)
    with pytest.raises(ConfigError, match="trains on a GPU, and there is none"):
        base_model.stream_and_flex(flex, cpu, 16)


@pytest.mark.parametrize("size", [1, 128, 129, 2048, 2049, 100_000])
def test_buckets_are_few_and_close(size):
    bucket = stream_bucket(size)
    assert bucket % 128 == 0 and size <= bucket <= max(1.125 * size, size + 127, 256)
    assert stream_bucket(bucket) == bucket


def test_token_counts_are_those_of_the_streams():
    item, targets = random_users([1, 2, 3, 5])
    for quirk, slots in ((0, 1), (2, 1), (0, 3)):
        rows = pack(item, targets, group_rows(targets, "packed", quirk))
        stream = lay_out_stream(rows, instruction=5, response=3, min_slots=quirk, tokens_per_item=slots)
        assert len(stream.source) == count_tokens(
            targets, instruction=5, response=3, layout="packed", shared=True, min_slots=quirk,
            tokens_per_item=slots,
        )  # fmt: skip


@pytest.mark.real_data
def test_token_counts_of_the_published_sequences_with_the_quirk(real_data):
    """One more item token for every history of one item, which stands in a row of its own."""
    from worlds import interactions

    lines = (real_data / "beauty" / "sequences_mme_sid.txt").read_text().splitlines()
    data = interactions([[int(number) for number in line.split()[1:]] for line in lines], 12086)
    targets = data.targets("train", max_targets=50)
    count = {"instruction": 17, "response": 4, "layout": "packed", "shared": True}
    quirk = count_tokens(targets, min_slots=2, **count) - count_tokens(targets, **count)
    history = targets.stop - targets.start
    assert quirk == (history == 1).sum() == 22_206 and (history == 0).sum() == 22_196
