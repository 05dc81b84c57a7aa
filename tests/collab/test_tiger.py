"""TIGER: its loss and its search against transformers' T5 and plain loops, and codes made of content."""

from __future__ import annotations

import itertools
import shutil
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
import torch
from cases import CASES, batch
from test_content import twins
from tiny_recipe import tiny
from transformers import T5Config, T5ForConditionalGeneration
from worlds import cycle

from llmrec.artifacts import CollabEmbeddings, SemanticIds
from llmrec.assignments import override
from llmrec.collab import rows as rows_module
from llmrec.collab.code_tree import LEVEL, CodeTree
from llmrec.collab.compare import prepare_cell, run_cell
from llmrec.collab.config import TrainCollabConfig
from llmrec.collab.item_codes import codes_of, random_codes, told_apart
from llmrec.collab.provider import load_provider
from llmrec.collab.tiger import NUM_SPECIAL, START, Tiger
from llmrec.collab.train import train_collab, training_rows
from llmrec.data.prepare import prepare_data
from llmrec.errors import ArtifactMismatchError, ConfigError, MissingArtifactError
from llmrec.interactions import Interactions
from llmrec.pipeline import run_stage
from llmrec.semantic_ids.config import LearnSemanticIdsConfig
from llmrec.stage_changes import source_hashes

NUM_ITEMS = 30


def tiger(**changed) -> Tiger:
    """A small model with large weights, so that no two codes are as good as equal; in float64."""
    torch.manual_seed(0)
    settings = CASES["tiger-ce"].config().of_model | {"num_layers": 2, "num_levels": 3, "num_codes": 4}
    model = Tiger(num_items=NUM_ITEMS, **settings | changed).double().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "layer_norm" not in name:
                weight.copy_(torch.randn_like(weight) * (2.0 if "token" in name else 0.5))
    return model


def of_transformers(model: Tiger) -> T5ForConditionalGeneration:
    """The same weights in the class that the public reproductions use."""
    table = model.token.weight
    config = T5Config(
        vocab_size=len(table), d_model=table.shape[1], d_kv=8, d_ff=32, num_layers=2, num_heads=2,
        dropout_rate=0.1, feed_forward_proj="relu", decoder_start_token_id=START, pad_token_id=START,
    )  # fmt: skip
    theirs = T5ForConditionalGeneration(config).double().eval()
    own = {
        name: weight for name, weight in model.state_dict().items() if name.startswith(("encoder", "decoder"))
    }
    tables = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
    theirs.load_state_dict(own | dict.fromkeys(tables, table))
    return theirs


def strings(model: Tiger, items: list[int]) -> torch.Tensor:
    """Tokens of items, by a loop: (len(items), P)."""
    return torch.tensor(
        [
            [NUM_SPECIAL + place * model.num_codes + code for place, code in enumerate(codes)]
            for codes in model.codes[items].tolist()
        ]
    )


def written(model: Tiger, history: list[int]) -> torch.Tensor:
    """What the encoder reads of one history: the token before it, and its items' tokens."""
    return torch.cat([torch.tensor([1]), strings(model, history).flatten()])[None]


@torch.no_grad()
def test_the_loss_is_that_of_transformers_t5_over_the_whole_vocabulary():
    model = tiger()
    theirs = of_transformers(model)
    rows, expected = [], 0.0
    for history, target in (([3, 1, 4], 2), ([5], 30), ([9, 8, 7, 6], 9)):
        rows.append([*history, target])
        found = theirs(input_ids=written(model, history), labels=strings(model, [target]))
        expected += found.loss * model.codes.shape[1]
    prefixes = batch(*(row + [0] * (5 - len(row)) for row in rows))
    last = torch.tensor([len(row) - 2 for row in rows])[:, None]
    prefixes.target[torch.arange(4) != last] = 0
    loss = model.loss(prefixes)
    assert loss.num_targets == 3
    torch.testing.assert_close(loss.total.double(), expected, rtol=1e-5, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("loss", ["ce", "tree_ce"])
def test_a_search_that_follows_all_strings_gives_every_item_its_probability(loss):
    """Item by item, each string by itself through transformers' decoder; among the codes of all places, or
    among those that lead on to an item."""
    model = tiger(loss=loss, beams=1000)
    theirs = of_transformers(model)
    history = [3, 1, 4]
    codes = model.codes[1:].tolist()
    expected = torch.zeros(NUM_ITEMS, dtype=torch.float64)
    for item, own in enumerate(codes):
        logits = theirs(input_ids=written(model, history), labels=strings(model, [item + 1])).logits[0]
        for place, code in enumerate(own):
            first = NUM_SPECIAL + place * model.num_codes
            if loss == "ce":
                expected[item] += logits[place].log_softmax(0)[first + code]
            else:
                follow = sorted({other[place] for other in codes if other[:place] == own[:place]})
                among = logits[place][[first + other for other in follow]]
                expected[item] += among.log_softmax(0)[follow.index(code)]
    found = model.score(torch.tensor([history]))[0, 1:]
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    if loss == "tree_ce":
        torch.testing.assert_close(expected.logsumexp(0).exp(), torch.ones(1, dtype=torch.float64)[0])


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 2, 5])
def test_a_narrow_search_is_that_of_a_loop_over_strings(beams):
    """Items that it comes to have their log-probability; the others stand behind them, by what it saw."""
    model = tiger(beams=beams)
    theirs = of_transformers(model)
    codes = [tuple(own) for own in model.codes[1:].tolist()]
    for history in ([3, 1, 4], [7], [12, 13, 14, 15]):
        kept, seen = {(): 0.0}, {}
        for place in range(len(codes[0])):
            reached = {}
            for string, before in kept.items():
                given = [START, *(NUM_SPECIAL + k * model.num_codes + code for k, code in enumerate(string))]
                logits = theirs(
                    input_ids=written(model, history), decoder_input_ids=torch.tensor([given])
                ).logits[0, -1]
                for own in {own[: place + 1] for own in codes if own[:place] == string}:
                    token = NUM_SPECIAL + place * model.num_codes + own[-1]
                    reached[own] = before + float(logits.log_softmax(0)[token])
            seen |= reached
            kept = dict(sorted(reached.items(), key=lambda one: -one[1])[:beams])
        expected = []
        for own in codes:
            known = max(length for length in range(1, len(own) + 1) if own[:length] in seen)
            expected.append(seen[own[:known]] - LEVEL * (len(own) - known))
        found = model.score(torch.tensor([history]))[0, 1:]
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6, atol=2e-3)
        assert (found > -LEVEL).sum() >= min(beams, NUM_ITEMS)


def test_validation_ranks_by_the_narrower_search():
    model = tiger(beams=1000, valid_beams=1).float()
    with torch.no_grad():
        wide, narrow = model.score(torch.tensor([[3]])), model.quick_score(torch.tensor([[3]]))
    assert (wide[0, 1:] > -LEVEL).all() and not (narrow[0, 1:] > -LEVEL).all()


def test_the_tree_holds_every_beginning_of_a_string_once():
    codes = told_apart(random_codes(50, 3, 3, seed=1), 3)
    tree = CodeTree(torch.from_numpy(codes), 3)
    beginnings = [defaultdict(set) for _ in range(5)]
    for item in range(1, 51):
        for level in range(5):
            beginnings[level][tuple(codes[item, :level])].add(item)
    for level, known in enumerate(beginnings):
        node = tree.node_of[level][1:]
        assert len(tree.code[level]) == len(known) == len(node.unique())
        for items in known.values():
            assert len({int(node[item - 1]) for item in items}) == 1
    for level in range(4):
        for item in range(1, 51):
            own = tuple(codes[item, :level])
            follow = [(*own, code) in beginnings[level + 1] for code in range(3)]
            assert tree.children(level, tree.node_of[level][item]).tolist() == follow
            node = tree.node_of[level + 1][item]
            assert tree.parent[level + 1][node] == tree.node_of[level][item]
            assert tree.code[level + 1][node] == codes[item, level]


def test_residual_codes_name_the_nearest_centre_of_what_is_left():
    """Clusters within clusters: the first code tells the large ones, the second the small ones."""
    rng = np.random.default_rng(0)
    large, small = rng.normal(size=(4, 6)) * 100, rng.normal(size=(4, 6)) * 10
    member = np.array(list(itertools.product(range(4), range(4))) * 5)
    table = large[member[:, 0]] + small[member[:, 1]] + rng.normal(size=(80, 6)) * 0.01
    codes = codes_of(np.vstack([np.zeros(6), table]), 2, 4, "residual", seed=0)
    assert codes.shape == (81, 2) and not codes[0].any()
    assert one_to_one(codes[1:, 0], member[:, 0]) and one_to_one(codes[1:, 1], member[:, 1])


def test_product_codes_know_a_piece_of_the_vector_each():
    rng = np.random.default_rng(0)
    member = rng.integers(4, size=(200, 2))
    table = np.hstack([rng.normal(size=(4, 3))[member[:, 0]], rng.normal(size=(4, 3))[member[:, 1]]])
    codes = codes_of(np.vstack([np.zeros(6), table]), 2, 4, "product", seed=0)
    assert one_to_one(codes[1:, 0], member[:, 0]) and one_to_one(codes[1:, 1], member[:, 1])


def one_to_one(left, right) -> bool:
    """Whether equal on one side is equal on the other."""
    left, right = list(left), list(right)
    return len(set(zip(left, right))) == len(set(left)) == len(set(right))


def test_items_of_equal_codes_are_numbered():
    same = np.array([[0, 0], [1, 2], [1, 2], [0, 1], [1, 2]])
    assert told_apart(same, 3).tolist() == [[0, 0, 0], [1, 2, 0], [1, 2, 1], [0, 1, 0], [1, 2, 2]]


def test_more_items_of_equal_codes_than_numbers_move_on_to_the_next_code():
    found = told_apart(np.zeros((8, 2), dtype=np.int64), 3)[1:]
    assert found.tolist() == [[0, 0, 0], [0, 0, 1], [0, 0, 2], [0, 1, 0], [0, 1, 1], [0, 1, 2], [0, 2, 0]]
    with pytest.raises(ConfigError, match="more than 4 items share all codes but the last"):
        told_apart(np.zeros((6, 2), dtype=np.int64), 2)


def test_impossible_codes_are_refused():
    table = np.random.default_rng(0).normal(size=(9, 3)).astype(np.float32)
    with pytest.raises(ConfigError, match="8 items cannot fill 9 codes; set num_codes lower"):
        codes_of(table, 2, 9, "residual", seed=0)
    with pytest.raises(ConfigError, match="vectors of width 3 cannot be cut into 4 pieces"):
        codes_of(table, 4, 2, "product", seed=0)
    data, content, _ = twins()
    with pytest.raises(ConfigError, match=r"^train_collab\.motor: 40 items cannot fill 41 codes"):
        train_collab(
            override(TrainCollabConfig(), {"provider": "motor", "motor.num_codes": "41"}), data, content
        )


def test_codes_are_made_of_content_and_kept_with_the_weights(tmp_path):
    data, content, look = twins()
    config = CASES["tiger-ce"].config(epochs=1, batch_size=64)
    config = replace(config, tiger=replace(config.tiger, content=("text",), num_levels=1, num_codes=10))
    collab = train_collab(config, data, content)
    collab.save(tmp_path)
    codes = load_provider(CollabEmbeddings.load(tmp_path)).codes
    assert torch.equal(codes, load_provider(collab).codes)
    assert one_to_one(codes[1:, 0].tolist(), look[1:])
    assert len({tuple(own) for own in codes[1:].tolist()}) == data.num_items


def test_codes_of_several_modalities_stand_one_after_the_other():
    table = np.random.default_rng(0).normal(size=(NUM_ITEMS + 1, 5)).astype(np.float32)
    torch.manual_seed(3)
    alone, both = (
        tiger(content=names, num_levels=2, num_codes=8) for names in (("text",), ("text", "image"))
    )
    alone.read_content({"text": table})
    both.read_content({"text": table, "image": np.cos(9 * table)})
    assert alone.codes.shape == (NUM_ITEMS + 1, 3) and both.codes.shape == (NUM_ITEMS + 1, 5)
    assert torch.equal(alone.codes[:, :2], both.codes[:, :2])
    assert not torch.equal(both.codes[:, 2:4], both.codes[:, :2])


def test_a_pass_holds_fewer_rows_of_items_that_take_several_places():
    """As many positions as of a model that takes an item as one."""
    data, _, _ = twins()
    config = CASES["tiger-ce"].config()
    model = tiger(num_levels=7)
    rows = training_rows(model, config, data.sequences("train"))
    positions = rows_module.MAX_CELLS["cpu"]
    assert rows.num_rows * 3 > positions // 8  # more than a pass may hold
    batches = list(rows.batches(np.arange(rows.num_rows)))
    assert max(batch.item.numel() for batch in batches) * 8 <= positions
    assert sum(len(batch.item) for batch in batches) == rows.num_rows
    model.places_per_item = 1
    plain = training_rows(model, config, data.sequences("train"))
    assert max(batch.item.numel() for batch in plain.batches(np.arange(plain.num_rows))) * 8 > positions


def test_codes_of_another_models_item_vectors(tmp_path):
    """TIGER-MM: what another run's train_collab left, named as a file."""
    data, content, _ = twins()
    other = train_collab(TrainCollabConfig(epochs=1), data)
    other.save(tmp_path)
    config = CASES["tiger-ce"].config(epochs=1, batch_size=64)
    model = replace(config.tiger, content=("collab", "text"), num_levels=1, num_codes=10)
    config = replace(config, tiger=model, vectors=str(tmp_path / "item_embeddings.safetensors"))
    assert config.content == ("text",) and config.source_files() == {"vectors": config.vectors}
    codes = load_provider(train_collab(config, data, content)).codes.cpu().numpy()
    seed = config.seed
    assert np.array_equal(codes[:, :1], codes_of(other.vectors, 1, 10, "residual", seed))
    assert np.array_equal(codes[:, 1:2], codes_of(content.vectors["text"], 1, 10, "residual", seed))


def ids_of(data, folder, names=("text",), levels=2, size=6, seed=0, inputs=()):
    """A finished learn_semantic_ids with random codes, some of them equal."""
    rng = np.random.default_rng(seed)
    codes = {name: rng.integers(size, size=(data.num_items + 1, levels)) for name in names}
    for table in codes.values():
        table[0], table[2] = 0, table[1]
    books = {name: np.zeros((levels, size, 3), dtype=np.float32) for name in names}
    made = SemanticIds(catalog=data.catalog, codes=codes, codebooks=books)

    def learn_semantic_ids(config: LearnSemanticIdsConfig, *inputs: Interactions) -> SemanticIds:
        return made

    return run_stage(learn_semantic_ids, LearnSemanticIdsConfig(), inputs, folder)


def coded(provider, folder, **changes):
    """Settings of a small model that reads codes of a folder."""
    config = CASES[f"{provider}-ce"].config(epochs=1, batch_size=64)
    model = replace(getattr(config, provider), content=("text",), num_levels=2, num_codes=6)
    return replace(config, semantic_ids=str(folder), **{provider: replace(model, **changes)})


@pytest.mark.parametrize("provider", ["tiger", "motor"])
def test_codes_are_those_of_a_folder_of_semantic_ids(provider, tmp_path):
    data, _, _ = twins()
    ids = ids_of(data, tmp_path / "ids", ("collab", "text", "image"))
    config = coded(provider, tmp_path / "ids", content=("image", "text"))
    assert config.content == () and not config.optional_inputs()
    model = load_provider(train_collab(config, data))
    codes = (model if provider == "tiger" else model.items).codes.cpu().numpy()
    assert np.array_equal(codes[:, :4], np.concatenate([ids.codes["image"], ids.codes["text"]], axis=1))
    assert codes.shape[1] == (5 if provider == "tiger" else 4)


def test_a_model_of_other_codes_is_trained_anew(tmp_path):
    """The folder is hashed like any file that settings name."""
    data, _, _ = twins()
    ids_of(data, tmp_path / "ids")
    config = coded("tiger", tmp_path / "ids")
    found = source_hashes(config)
    assert found.keys() == {"semantic_ids", "semantic_ids text"}
    shutil.rmtree(tmp_path / "ids")
    ids_of(data, tmp_path / "ids", levels=3)
    assert source_hashes(config)["semantic_ids text"] != found["semantic_ids text"]


def test_a_finished_cell_of_other_codes_is_refused(tmp_path):
    folder, cell = tmp_path / "data", tmp_path / "cell"
    data = run_stage(prepare_data, tiny().prepare_data, (), folder)
    ids_of(data, tmp_path / "ids")
    config = coded("tiger", tmp_path / "ids")
    prepare_cell(cell, config, "letter, seed 0")
    run_cell(cell, folder)
    prepare_cell(cell, config, "letter, seed 0")
    shutil.rmtree(tmp_path / "ids")
    ids_of(data, tmp_path / "ids", seed=1)
    with pytest.raises(ConfigError, match="was made with other content of the semantic_ids text file"):
        prepare_cell(cell, config, "letter, seed 0")
    shutil.rmtree(tmp_path / "ids")  # what is gone cannot differ
    prepare_cell(cell, config, "letter, seed 0")
    ids_of(data, tmp_path / "moved")
    prepare_cell(cell, replace(config, semantic_ids=str(tmp_path / "moved")), "letter, seed 0")


def test_items_of_equal_codes_share_their_place_unless_told_apart(tmp_path):
    data, _, _ = twins()
    ids = ids_of(data, tmp_path / "ids")
    config = coded("tiger", tmp_path / "ids", tell_apart=False)
    model = load_provider(train_collab(config, data)).eval()
    assert np.array_equal(model.codes.cpu().numpy(), ids.codes["text"])
    assert model.token.num_embeddings == NUM_SPECIAL + 2 * 6
    with torch.no_grad():
        scores = model.score(torch.tensor([[3, 4, 5]]))[0]
    assert scores[1] == scores[2]
    same = (ids.codes["text"][1:] == ids.codes["text"][1]).all(axis=1)
    assert torch.equal(scores[1:] == scores[1], torch.from_numpy(same))


@pytest.mark.parametrize("loss", ["ce", "tree_ce"])
def test_the_temperature_is_of_the_loss_and_not_of_the_search(loss):
    warm, plain = tiger(temperature=0.7, loss=loss), tiger(loss=loss)
    warm.load_state_dict(plain.state_dict())
    rows = batch([3, 4, 5], [7, 2, 9])
    history = torch.tensor([[3, 4], [7, 2]])
    with torch.no_grad():
        assert torch.equal(warm.score(history), plain.score(history))
        found = warm.loss(rows).total
        # A model whose logits are that much larger has this loss: all that comes last is divided.
        plain.logits = lambda hidden, tokens=None: Tiger.logits(plain, hidden, tokens) / 0.7
        torch.testing.assert_close(found, plain.loss(rows).total)
        assert abs(float(found) - float(tiger(loss=loss).loss(rows).total)) > 1e-3


@pytest.mark.parametrize(
    ("provider", "changes", "message"),
    [
        ("tiger", {"num_levels": 3}, r"tiger\.num_levels must be 2, as it is in .*ids, got 3"),
        ("motor", {"num_codes": 8}, r"motor\.num_codes must be 6, as it is in .*ids, got 8"),
        ("tiger", {"content": ("image",)}, r"content names image, of which .*ids has no codes, but of text"),
    ],
)
def test_codes_that_do_not_fit_the_model_are_refused(provider, changes, message, tmp_path):
    data, _, _ = twins()
    ids_of(data, tmp_path / "ids")
    with pytest.raises(ConfigError, match=message):
        train_collab(coded(provider, tmp_path / "ids", **changes), data)


def test_codes_of_other_items_or_of_no_stage_are_refused(tmp_path):
    data, _, _ = twins()
    with pytest.raises(MissingArtifactError, match=r"^train_collab\.semantic_ids=.*ids: "):
        train_collab(coded("tiger", tmp_path / "ids"), data)
    ids_of(cycle(num_users=30), tmp_path / "ids")
    with pytest.raises(ArtifactMismatchError, match=r"^train_collab\.semantic_ids=.*ids: "):
        train_collab(coded("tiger", tmp_path / "ids"), data)


def test_codes_that_learned_from_other_data_or_another_split_are_refused(tmp_path):
    """Those of LETTER know what users did: in another split maybe what is to be predicted here."""
    base = tiny().prepare_data
    one, other = (
        run_stage(prepare_data, replace(base, seed=seed), (), tmp_path / str(seed)) for seed in (0, 1)
    )
    assert one.catalog == other.catalog
    ids_of(other, tmp_path / "ids", inputs=(other,))
    train_collab(coded("tiger", tmp_path / "ids"), other)
    with pytest.raises(ArtifactMismatchError, match="learn_semantic_ids was made from another prepare_data"):
        train_collab(coded("tiger", tmp_path / "ids"), one)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"provider": "sasrec"}, r"semantic_ids has no effect with provider='sasrec'; .* tiger, motor"),
        (
            {"provider": "tiger", "tiger.content": "none"},
            r"no effect with train_collab\.tiger\.content=none",
        ),
        ({"provider": "motor", "motor.quantizer": "residual"}, r"quantizer has no effect with semantic"),
        (
            {"provider": "tiger", "vectors": "x.parquet"},
            r"vectors has no effect with provider='tiger' and semantic_ids",
        ),
    ],
)
def test_semantic_ids_without_effect_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        override(TrainCollabConfig(), {**settings, "semantic_ids": "ids"})


def test_a_file_is_asked_for_and_nothing_else_reads_one():
    model = replace(TrainCollabConfig().tiger, content=("collab",))
    with pytest.raises(
        ConfigError, match=r"must be a file of item vectors with train_collab\.tiger\.content"
    ):
        TrainCollabConfig(provider="tiger", tiger=model)
    with pytest.raises(ConfigError, match=r"train_collab\.vectors has no effect with provider='tiger'"):
        TrainCollabConfig(provider="tiger", vectors="x.parquet")


def test_an_empty_name_of_a_folder_is_refused():
    with pytest.raises(ConfigError, match=r"train_collab\.semantic_ids must be a folder \(or none\), got ''"):
        TrainCollabConfig(provider="tiger", semantic_ids="")
