"""The methods MME-SID is compared with: tokens by their formulas, exact under packing, trained and saved."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from packing_reference import EXACT, NUM_ITEMS, full_scores, plain_prompts, random_users
from tiny_mme_sid import CODES, LEVELS, WIDTH, model, semantic_ids
from worlds import cycle

from llmrec import launched
from llmrec.errors import ConfigError
from llmrec.finetune.build import code_embeddings, parameter_counts
from llmrec.finetune.config import FinetuneConfig
from llmrec.finetune.item_inputs import ItemInputs, ItemTokens, OwnTable
from llmrec.finetune.method_table import METHODS as KNOWN
from llmrec.finetune.methods import METHODS as MADE
from llmrec.finetune.methods import item_tokens
from llmrec.finetune.modalities import modalities_of
from llmrec.finetune.packing import count_tokens, group_rows, pack
from llmrec.finetune.passes import Passes
from llmrec.semantic_ids.diagnostics import spectrum

METHODS = [
    {"method": "e4srec"},
    {"method": "me"},
    {"method": "me", "me_mode": "sum"},
    {"method": "concat"},
    {"method": "concat", "concat_mode": "feature"},
    {"method": "concat_mlp"},
    {"method": "ctrl_mm"},
    {"method": "se_sid"},
    {"method": "se_random"},
    {"method": "mme_random", "fusion_temperature": 1.0},
]
NAMES = [
    "-".join(settings.values()) if len(settings) < 3 else "?"
    for settings in [{key: str(value) for key, value in settings.items()} for settings in METHODS]
]
ITEMS = torch.arange(1, NUM_ITEMS + 1)


def build(settings, **more):
    """The tiny model's own temperature only where there is a gate."""
    return model(NUM_ITEMS, **{"fusion_temperature": 1e-3, **settings, **more})


def linear(part, rows):
    return rows @ part.linear.weight.T + part.linear.bias


def test_what_settings_know_of_can_be_made():
    assert list(MADE) == list(KNOWN)


def test_tokens_follow_their_formulas():
    net = build({"method": "e4srec"})
    part = net.item_tokens.parts["vectors_collab"]
    torch.testing.assert_close(net.item_tokens(ITEMS), linear(part, part.vectors[ITEMS]))

    parts = build({"method": "me"}).item_tokens
    both = torch.cat(
        [linear(parts.parts["vectors_collab"], part.vectors[ITEMS]), parts.parts["own"].table[ITEMS]], dim=-1
    )
    assert both.shape[1] == WIDTH + 64
    torch.testing.assert_close(parts(ITEMS), linear(parts.mixer, both))

    parts = build({"method": "me", "me_mode": "sum"}).item_tokens
    added = linear(parts.parts["vectors_collab"], part.vectors[ITEMS])
    added = added + linear(parts.parts["own"], parts.parts["own"].table[ITEMS])
    torch.testing.assert_close(parts(ITEMS), added)

    parts = build({"method": "concat"}).item_tokens
    tokens = parts(ITEMS)
    assert tokens.shape == (NUM_ITEMS, 3, WIDTH)
    for place, name in enumerate(("collab", "image", "text")):
        own = parts.parts[f"vectors_{name}"]
        torch.testing.assert_close(tokens[:, place], linear(own, own.vectors[ITEMS]))

    parts = build({"method": "concat_mlp"}).item_tokens
    first, _, second = parts.mixer.layers
    assert first.weight.shape == (WIDTH * 3 // 2, 3 * WIDTH)
    inputs = torch.cat([linear(own, own.vectors[ITEMS]) for own in parts.parts.values()], dim=-1)
    torch.testing.assert_close(parts(ITEMS), F.gelu(second(torch.relu(first(inputs)))))

    parts = build({"method": "se_sid"}).item_tokens
    codes = parts.parts["codes_collab"]
    sums = torch.stack(
        [sum(codes.codebooks.flatten(0, 1)[code] for code in codes.codes[item]) for item in ITEMS]
    )
    inputs = torch.cat([linear(parts.parts["vectors_collab"], part.vectors[ITEMS]), sums], dim=-1)
    first, _, second = parts.mixer.layers
    assert first.weight.shape == (WIDTH, 2 * WIDTH)
    torch.testing.assert_close(parts(ITEMS), F.gelu(second(torch.relu(first(inputs)))))


def test_tokens_of_random_tables_follow_their_formulas():
    net = build({"method": "se_random", "own_dim": 5})
    (own,) = net.item_tokens.parts.values()
    assert own.table.shape == (NUM_ITEMS + 1, 5)
    torch.testing.assert_close(net.item_tokens(ITEMS), linear(own, own.table[ITEMS]))

    net = build({"method": "mme_random", "fusion_temperature": 1.0})
    parts, columns = net.item_tokens.parts, []
    for name in ("collab", "image", "text"):
        own, vectors = parts[f"own_{name}"], parts[f"vectors_{name}"]
        # As many numbers an item as the modality's code embeddings have, rounded.
        assert own.table.shape == (NUM_ITEMS + 1, round(LEVELS * CODES * WIDTH / NUM_ITEMS))
        columns += [linear(vectors, vectors.vectors[ITEMS]), linear(own, own.table[ITEMS])]
    first, _, second = net.item_tokens.mixer.layers
    assert first.weight.shape == (3 * WIDTH, 6 * WIDTH)
    expected = F.gelu(second(torch.relu(first(torch.cat(columns, dim=-1)))))
    torch.testing.assert_close(net.item_tokens(ITEMS), expected)


@pytest.mark.parametrize("method", ["mme_sid", "concat_mlp", "ctrl_mm", "se_sid", "mme_random"])
def test_the_item_mlp_ends_as_it_is_told_to(method):
    frequency = {"fusion_temperature": 1.0} if method in ("mme_sid", "mme_random") else {}
    for activation, last in (("none", lambda tokens: tokens), ("gelu", F.gelu)):
        net = build({"method": method, "mlp_out_activation": activation, **frequency})
        parts = torch.cat([part(ITEMS) for part in net.item_tokens.parts.values()], dim=-1)
        first, _, second = net.item_tokens.mixer.layers
        tokens = torch.relu(parts @ first.weight.T + first.bias) @ second.weight.T + second.bias
        assert tokens.min() < -0.2, "where a GELU changes much"
        torch.testing.assert_close(net.item_tokens(ITEMS), last(tokens))


@pytest.mark.parametrize(
    ("expansion", "inner"), [(None, WIDTH * 3 // 2), (2.0, 2 * WIDTH), (0.3, 5), (0.01, 1)]
)
def test_the_item_mlp_is_as_wide_inside_as_asked(expansion, inner):
    first, _, second = build({"method": "concat_mlp", "mlp_expansion": expansion}).item_tokens.mixer.layers
    assert first.weight.shape == (inner, 3 * WIDTH) and second.weight.shape == (WIDTH, inner)


def test_code_embeddings_start_at_the_codebooks_unless_random_ones_are_asked_for():
    learned = semantic_ids(NUM_ITEMS, ("collab", "text", "image")).codebooks
    for random in (False, True):
        parts = model(NUM_ITEMS, random_codes=random).item_tokens.parts
        for name, codebooks in learned.items():
            found = parts[f"codes_{name}"].codebooks.detach()
            assert found.shape == codebooks.shape
            assert np.array_equal(found.numpy(), codebooks) != random
            if random:
                assert 0.015 < found.std().item() < 0.025 < 0.8 < codebooks.std()


def test_random_tables_start_with_a_standard_deviation_of_0_02():
    torch.manual_seed(0)
    names = ("collab", "text")
    ids = semantic_ids(3, names, width=1000)
    tables = code_embeddings(FinetuneConfig(random_codes=True), names, ids, 1000)
    assert not torch.equal(*tables.values())
    for table in (*tables.values(), OwnTable(100, 100, 8).table.detach()):
        assert table.std().item() == pytest.approx(0.02, rel=0.05)
        assert abs(table.mean().item()) < 0.001


@pytest.mark.parametrize(
    ("dims", "widths"),
    [({"collab": 5, "text": 7}, [8, 8]), ({"collab": 5, "image": 3, "text": 7}, [6, 5, 5])],
)
def test_one_token_of_all_modalities_deals_its_width_among_them(dims, widths):
    settings = {"method": "concat", "concat_mode": "feature", "fusion_temperature": 1e-3}
    net = model(NUM_ITEMS, dims=dims, **settings)
    parts = [net.item_tokens.parts[f"vectors_{name}"] for name in dims]
    assert [part.width for part in parts] == widths and sum(widths) == WIDTH
    tokens = net.item_tokens(ITEMS)
    expected = torch.cat([linear(part, part.vectors[ITEMS]) for part in parts], dim=-1)
    torch.testing.assert_close(tokens, expected)


def test_one_token_of_more_modalities_than_it_has_dimensions_is_refused():
    names = ("collab", "text", "image")
    vectors = {name: torch.zeros(3, 4) for name in names}
    narrow = ItemInputs(vectors=vectors, codes={}, codebooks={}, hidden_size=2)
    with pytest.raises(ConfigError, match=r"2 dimensions among 3 modalities, and there is not one for"):
        item_tokens(FinetuneConfig(method="concat", concat_mode="feature"), narrow)


def test_scores_of_a_single_modality_add_the_collaborative_term():
    net = build({"method": "se_sid"})
    hidden = torch.randn(4, WIDTH, dtype=torch.float64)
    part = net.item_tokens.parts["vectors_collab"]
    expected = hidden @ net.item_scores.target_table.T + hidden @ linear(part, part.vectors).T
    torch.testing.assert_close(hidden @ net.item_scores.folded().T, expected)


def align(net, items: torch.Tensor) -> torch.Tensor:
    return net.item_tokens.alignment(net.item_tokens.pairs(items))


def test_items_without_a_vector_are_nobodys_negatives():
    """They, and padding, would all have the same vector."""

    def made_from(vectors: dict[str, torch.Tensor]) -> ItemTokens:
        inputs = ItemInputs(vectors=dict(vectors), codes={}, codebooks={}, hidden_size=WIDTH)
        return item_tokens(FinetuneConfig(method="ctrl_mm"), inputs)

    frozen = {name: torch.randn(9, dim) for name, dim in (("collab", 5), ("image", 6), ("text", 7))}
    for table in frozen.values():
        table[0] = 0
    whole = made_from(frozen)
    frozen["image"] = frozen["image"].clone()
    frozen["image"][[2, 5]] = 0
    holes = made_from(frozen)
    whole.load_state_dict(holes.state_dict())
    items = torch.arange(9)
    assert [pair.tolist() for pair in whole.pairs(items)] == [list(range(1, 9))] * 2
    assert [pair.tolist() for pair in holes.pairs(items)] == [[1, 3, 4, 6, 7, 8], list(range(1, 9))]
    image, text = holes.pairs(items)
    torch.testing.assert_close(
        holes.alignment([image, text]),
        whole.alignment([image, image[:0]]) + whole.alignment([text[:0], text]),
    )
    assert float(holes.alignment(holes.pairs(torch.tensor([0, 2])))) == 0


def test_an_alignment_of_a_step_does_not_depend_on_who_computes_what(monkeypatch):
    """The gradient of all processes and passes together is that of one pass."""
    net = build({"method": "ctrl_mm"})
    data = cycle(num_users=7, num_items=NUM_ITEMS)
    targets = data.targets("train")

    def gradient(tokens: int, world: int) -> dict[str, torch.Tensor]:
        net.zero_grad()
        config = FinetuneConfig(method="ctrl_mm", micro_batch_tokens=tokens)
        monkeypatch.setattr(launched, "world_size", lambda: world)
        for rank in range(world):
            monkeypatch.setattr(launched, "rank", lambda rank=rank: rank)
            passes, _ = Passes(config, data, net).of(targets, 0)
            assert (len(passes) > 1) == (tokens < 1000)
            for one in passes:
                net.loss(one.groups, one.weight, one.pairs, one.targets).backward()
        return {name: value.grad.clone() for name, value in net.named_parameters() if value.grad is not None}

    expected = gradient(10_000, 1)
    for tokens, world in ((60, 1), (10_000, 2), (60, 3)):
        for name, value in gradient(tokens, world).items():
            torch.testing.assert_close(value, expected[name], **EXACT)


def test_tokens_of_a_step_are_those_of_every_pass_of_every_process(monkeypatch):
    """Rows share an instruction within a pass alone."""
    net = build({})
    data = cycle(num_users=7, num_items=NUM_ITEMS)
    targets = data.targets("train")
    for tokens, world in ((10_000, 1), (60, 1), (10_000, 2), (60, 3)):
        monkeypatch.setattr(launched, "world_size", lambda world=world: world)
        told, encoded = set(), 0
        for rank in range(world):
            monkeypatch.setattr(launched, "rank", lambda rank=rank: rank)
            passes, number = Passes(FinetuneConfig(micro_batch_tokens=tokens), data, net).of(targets, 0)
            told.add(number)
            for one in passes:
                if one.weight:
                    shown = sum(int((rows.items != 0).sum()) for rows in one.groups)
                    wanted = sum(len(rows.target) for rows in one.groups)
                    encoded += len(net.instruction) + shown + len(net.response) * wanted
        assert told == {encoded} and net.share_instruction


def test_every_block_of_items_has_negatives_before_fine_tuning(monkeypatch):
    from llmrec.finetune import train

    monkeypatch.setattr(train, "ALIGN_ITEMS", NUM_ITEMS - 1)
    two = build({"method": "ctrl_mm", "ctrl_stage": "two"})
    sizes: list[int] = []
    whole = two.item_tokens.pairs
    two.item_tokens.pairs = lambda items: sizes.append(len(items)) or whole(items)
    config = FinetuneConfig(method="ctrl_mm", ctrl_stage="two", ctrl_epochs=1)
    train.align_first(config, two, NUM_ITEMS)
    assert sorted(sizes) == [NUM_ITEMS // 2, NUM_ITEMS - NUM_ITEMS // 2]


def test_the_alignment_is_info_nce_of_pairs_and_is_trained_first_or_along():
    net = build({"method": "ctrl_mm"})
    a, image, text = (part(ITEMS) for part in net.item_tokens.parts.values())
    expected = 0.0
    for other in (image, text):
        cosine = F.normalize(a, dim=1) @ F.normalize(other, dim=1).T
        expected = expected + F.cross_entropy(cosine / 0.1, torch.arange(NUM_ITEMS))
    torch.testing.assert_close(align(net, ITEMS), expected)
    assert net.aligns and not build({"method": "concat_mlp"}).aligns
    two = build({"method": "ctrl_mm", "ctrl_stage": "two"})
    from llmrec.finetune.train import align_first

    assert not two.aligns
    before = float(align(two, ITEMS))
    config = FinetuneConfig(method="ctrl_mm", ctrl_stage="two", learning_rate=1e-2)
    align_first(config, two, NUM_ITEMS)
    assert float(align(two, ITEMS)) < before - 0.1
    item, targets = random_users([3])
    rows = pack(item, targets, group_rows(targets, "packed"))
    plain = F.cross_entropy(
        full_scores(two, plain_prompts(two, item, targets)),
        torch.from_numpy(targets.item) - 1,
        reduction="sum",
    )
    torch.testing.assert_close(two.loss([rows]), plain, **EXACT)


def test_collapse_is_as_the_paper_says():
    """Eq. 7: a projected table of 5 numbers spans at most 6 directions; codes and a GELU lift it."""
    ranks = {}
    for settings in ({"method": "e4srec"}, {"method": "se_sid"}):
        with torch.no_grad():
            table = build(settings).item_tokens(ITEMS).numpy()
        ranks[settings["method"]] = spectrum(lambda items, table=table: table[items], np.arange(NUM_ITEMS))
    assert ranks["e4srec"]["numerical_rank"] <= 6 < ranks["se_sid"]["numerical_rank"]


def test_modalities_and_tokens_of_a_method():
    assert modalities_of(FinetuneConfig(method="e4srec"), ("collab", "text")) == ("collab",)
    assert modalities_of(FinetuneConfig(), ("text", "collab", "image")) == ("collab", "image", "text")
    for method, available, message in (
        ("e4srec", ("text",), "needs collaborative vectors"),
        ("concat", ("collab",), "needs at least two, got collab"),
    ):
        with pytest.raises(ConfigError, match=message):
            modalities_of(FinetuneConfig(method=method), available)
    _, targets = random_users([4])
    one, three = (
        count_tokens(targets, instruction=5, response=3, layout="packed", shared=True, tokens_per_item=k)
        for k in (1, 3)
    )
    assert three - one == 2 * 3
    counts = parameter_counts(build({"method": "se_random"}))
    assert counts["own_tables"] == (NUM_ITEMS + 1) * 64 + 64 * WIDTH + WIDTH and counts["projections"] == 0
    matched = parameter_counts(build({"method": "mme_random", "fusion_temperature": 1.0}))
    codes = parameter_counts(model(NUM_ITEMS))["code_embeddings"]
    tables = sum(
        part.table.numel()
        for name, part in build({"method": "mme_random", "fusion_temperature": 1.0}).item_tokens.parts.items()
        if name.startswith("own")
    )
    assert abs(tables - codes) / codes < 0.2 and matched["code_embeddings"] == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"me_mode": "sum"}, "me_mode has no effect with method='mme_sid'"),
        ({"method": "e4srec", "own_dim": 8}, "own_dim has no effect"),
        ({"method": "e4srec", "project_codes": True}, "project_codes has no effect"),
        ({"method": "e4srec", "mlp_expansion": 2.0}, "mlp_expansion has no effect"),
        (
            {"method": "e4srec", "fusion_temperature": 1.0},
            "fusion_temperature has no effect with fusion='target'",
        ),
        ({"method": "se_random", "fusion": "equal"}, "fusion has no effect"),
        ({"method": "ctrl_mm", "ctrl_epochs": 3}, "ctrl_epochs has no effect with .*ctrl_stage='joint'"),
        ({"method": "ctrl_mm", "ctrl_stage": "two", "ctrl_weight": 1.0}, "ctrl_weight has no effect"),
        ({"method": "me", "own_dim": 0}, "own_dim must be at least 1, got 0"),
    ],
)
def test_settings_that_cannot_take_effect_are_refused(changes, message):
    with pytest.raises(ConfigError, match=rf"finetune\.{message}"):
        FinetuneConfig(**changes)


def test_every_method_has_a_fusion_of_its_own():
    used = {name: FinetuneConfig(method=name).fusion_used for name in ("mme_sid", "e4srec", "se_sid")}
    assert used == {"mme_sid": "frequency", "e4srec": "target", "se_sid": "sum"}
    assert dataclasses.replace(FinetuneConfig(), fusion="equal").fusion_used == "equal"
