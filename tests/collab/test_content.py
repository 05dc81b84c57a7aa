"""SASRec that knows what items look like: components, the sum of maps, and the road through the stages."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from cases import batch
from test_collab_train import TINY, tiny
from worlds import cycle, interactions

from llmrec.artifacts import CollabEmbeddings, ContentEmbeddings
from llmrec.collab.config import SASRecConfig, TrainCollabConfig
from llmrec.collab.content import ContentMaps, principal_components
from llmrec.collab.provider import load_provider, provider_scorer
from llmrec.collab.sasrec import SASRec
from llmrec.collab.train import train_collab
from llmrec.errors import ArtifactMismatchError, ConfigError
from llmrec.evaluation.rank import rank_users
from llmrec.interactions import Interactions


def vectors(rows: int, width: int = 9, seed: int = 0) -> np.ndarray:
    """Item vectors far from the origin, of very uneven spread; row 0 is zero."""
    rng = np.random.default_rng(seed)
    made = rng.normal(size=(rows, width)) * np.logspace(0, -2, width) @ rng.normal(size=(width, width)) + 5
    made[0] = 0
    return made.astype(np.float32)


def encoded(data: Interactions, table: np.ndarray) -> ContentEmbeddings:
    missing = ~table.any(axis=1)
    missing[0] = False
    return ContentEmbeddings(
        catalog=data.catalog, vectors={"text": table}, missing={"text": missing}, encoders={"text": {}}
    )


def test_components_are_uncorrelated_of_unit_variance_and_the_strongest_first():
    table = vectors(500)
    table[7] = 0  # an item without text
    found = principal_components(table, 4)
    assert found.dtype == np.float32 and not found[[0, 7]].any()
    there = np.delete(found.astype(np.float64), [0, 7], axis=0)
    np.testing.assert_allclose(np.cov(there.T), np.eye(4), atol=1e-4)
    rows = np.delete(table.astype(np.float64), [0, 7], axis=0)
    rows = rows - rows.mean(axis=0)
    directions = np.linalg.svd(rows, full_matrices=False)[2][:4]
    cosine = [np.corrcoef(there[:, k], rows @ directions[k])[0, 1] for k in range(4)]
    np.testing.assert_allclose(np.abs(cosine), 1, atol=1e-6)


def test_more_components_than_directions_leave_columns_of_zeros():
    flat = np.outer(np.arange(6), [1.0, 2.0]).astype(np.float32)
    found = principal_components(flat, 5)
    assert found.shape == (6, 5) and found[1:, 0].any() and not found[:, 1:].any()


@pytest.mark.parametrize("table", [np.zeros((4, 3)), np.ones((4, 3)), np.zeros((1, 3))])
def test_items_that_all_look_alike_have_no_components(table):
    assert not principal_components(table.astype(np.float32), 2).any()


def test_the_table_is_the_sum_of_own_vectors_and_maps():
    maps = ContentMaps(5, 3, ("text", "image"), 2)
    parts = {name: np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32) for name in maps.maps}
    maps.read(parts)
    own = torch.randn(6, 3)
    expected = own.clone()
    for name, table in parts.items():
        components = torch.from_numpy(principal_components(table, 2))
        for item in range(6):
            expected[item] += maps.maps[name].weight @ components[item]
    torch.testing.assert_close(maps(own), expected)
    assert maps(own) is not own and ContentMaps(5, 3, (), 2)(own) is own


@torch.no_grad()
def test_a_history_is_read_scored_and_handed_on_by_the_same_table():
    """As by a model of ids alone whose items are the sums."""
    settings = vars(TINY) | {"num_items": 5, "content": ("text",), "content_dim": 2}
    model = SASRec(**settings).eval()
    model.read_content({"text": np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)})
    plain = SASRec(**settings | {"content": ()}).eval()
    plain.load_state_dict(model.state_dict(), strict=False)
    plain.item.weight.copy_(model.item_embeddings())
    history = torch.tensor([[3, 1, 4]])
    torch.testing.assert_close(model.encode(history), plain.encode(history))
    torch.testing.assert_close(model.score(history), plain.score(history))
    rows = batch([3, 1, 4, 2])
    torch.testing.assert_close(model.loss(rows).total, plain.loss(rows).total)


def twins(seed: int = 0) -> tuple[Interactions, ContentEmbeddings, np.ndarray]:
    """Items come in looks: 10 looks of 4 items each, and a look is followed by the next one. Item 40 is seen
    in no train sequence, and is the test item of some users whose history it follows."""
    rng = np.random.default_rng(seed)
    look = np.concatenate([[0], np.arange(40) % 10])
    members = [np.flatnonzero(look[1:] == number) + 1 for number in range(10)]
    sequences = []
    for user in range(400):
        at = rng.integers(10)
        row = [int(rng.choice([m for m in members[(at + step) % 10] if m != 40])) for step in range(6)]
        if user % 4 == 0:
            shift = (9 - (at + 5)) % 10
            row = [int(rng.choice([m for m in members[(at + shift + s) % 10] if m != 40])) for s in range(6)]
            row[-1] = 40
        sequences.append(row)
    data = interactions(sequences, 40)
    table = np.eye(11, 10, -1)[look] + rng.normal(size=(41, 10)) * 0.01
    table[0] = 0
    return data, encoded(data, table.astype(np.float32)), look


def test_what_was_never_seen_is_found_by_its_looks():
    data, content, _ = twins()
    cold = data.targets("test").item == 40
    assert data.train_count[40] == 0 and cold.sum() > 50

    def median_rank(collab: CollabEmbeddings) -> float:
        return float(np.median(rank_users(provider_scorer(collab), data, data.targets("test")).rank[cold]))

    settings = replace(TINY, content=("text",), content_dim=8)
    common = {"epochs": 40, "learning_rate": 0.01}
    assert median_rank(train_collab(tiny(sasrec=settings, **common), data, content)) < 8
    assert median_rank(train_collab(tiny(**common), data)) > 15


def test_saved_and_loaded_it_scores_the_same_without_the_encoded_items(tmp_path):
    data = cycle()
    settings = tiny(sasrec=replace(TINY, content=("text",), content_dim=4), epochs=2)
    collab = train_collab(settings, data, encoded(data, vectors(data.num_items + 1)))
    collab.save(tmp_path)
    loaded = CollabEmbeddings.load(tmp_path)
    history = torch.tensor([[1, 2, 3], [4, 0, 0]])
    assert torch.equal(load_provider(loaded).score(history), load_provider(collab).score(history))
    np.testing.assert_array_equal(loaded.vectors, collab.vectors)
    assert not collab.vectors[0].any()
    model = load_provider(collab)
    np.testing.assert_allclose(
        collab.vectors, (model.item.weight + model.content.maps["text"](model.content.text)).detach().numpy()
    )


def test_without_content_nothing_has_changed():
    """The same weights, by name and number, as the plain model always had."""
    names = train_collab(tiny(epochs=1), cycle()).state
    assert not any("content" in name for name in names) and "item.weight" in names


@pytest.mark.parametrize(
    ("settings", "given", "message"),
    [
        ({"content": ("text",)}, False, "sasrec.content=text needs the output of encode_items"),
        ({}, True, "encoded items were given, and provider='sasrec' as it is set asks for none"),
        ({"content": ("image",)}, True, "names image vectors, which encode_items did not make"),
    ],
)
def test_content_is_there_if_and_only_if_it_is_asked_for(settings, given, message):
    data = cycle()
    content = encoded(data, vectors(data.num_items + 1)) if given else None
    with pytest.raises(ConfigError, match=message):
        train_collab(tiny(sasrec=replace(TINY, **settings)), data, content)


def test_ready_made_vectors_take_no_encoded_items(tmp_path):
    data = cycle()
    config = TrainCollabConfig(provider="precomputed", vectors=str(tmp_path / "vectors.parquet"))
    with pytest.raises(ConfigError, match="encoded items were given, and provider='precomputed'"):
        train_collab(config, data, encoded(data, vectors(data.num_items + 1)))


def test_encoded_items_of_another_catalogue_are_refused():
    data = cycle()
    other = replace(encoded(data, vectors(data.num_items + 1)), catalog="other")
    with pytest.raises(ArtifactMismatchError):
        train_collab(tiny(sasrec=replace(TINY, content=("text",))), data, other)


def test_settings_without_effect_are_refused():
    with pytest.raises(ConfigError, match="content_dim has no effect"):
        SASRecConfig(content_dim=7)
    with pytest.raises(ConfigError, match="names a modality twice"):
        SASRecConfig(content=("text", "text"))


def test_recipes_and_commands_encode_first_where_it_is_asked_for(finished, tmp_path, capsys):
    from test_recipes import run

    from llmrec import cli

    setting = "train_collab.sasrec.content=text,image"
    code, out, _ = run(["--run-dir", str(tmp_path / "run"), "--set", setting], capsys)
    assert code == 0 and "sasrec (ce, text, image)" in out
    manifest = json.loads((tmp_path / "run" / "train_collab" / "manifest.json").read_text())
    assert set(manifest["inputs"]) == {"prepare_data", "encode_items"}

    def one(*arguments: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as left:
            cli.main(
                [
                    "train_collab",
                    "--prepare-data",
                    str(finished / "prepare_data"),
                    "--set",
                    "epochs=1",
                    *arguments,
                ]
            )
        return left.value.code, capsys.readouterr().err

    folder = str(finished / "encode_items")
    code, _ = one("sasrec.content=text", "--encode-items", folder, "--out", str(tmp_path / "one"))
    assert code == 0
    code, error = one("sasrec.content=text", "--out", str(tmp_path / "two"))
    assert code == 2 and "needs the output of encode_items" in error


def test_a_comparison_takes_encoded_items_for_the_rows_that_ask(finished, tmp_path, capsys, caplog):
    from llmrec.collab import compare_cli

    def rows() -> compare_cli.Rows:
        return {
            "sasrec": TrainCollabConfig(sasrec=TINY, epochs=1),
            "sasrec-text": TrainCollabConfig(sasrec=replace(TINY, content=("text",)), epochs=1),
        }

    def go(monkeypatch: pytest.MonkeyPatch, *more: str) -> tuple[int, str]:
        common = [
            "--prepare-data",
            str(finished / "prepare_data"),
            "--run-dir",
            str(tmp_path),
            "--seeds",
            "0",
        ]
        monkeypatch.setattr("sys.argv", ["compare.py", *common, *more])
        with pytest.raises(SystemExit) as left:
            compare_cli.main(rows)
        captured = capsys.readouterr()
        return left.value.code, captured.out + captured.err

    with pytest.MonkeyPatch.context() as patch:
        caplog.set_level("INFO", logger="llmrec")
        code, shown = go(patch)
        assert code == 0
        assert "sasrec-text left out: they read encoded items, see --encode-items" in caplog.text
        assert "sasrec (ce)" in shown and "sasrec-text (ce)" not in shown
        alone = {"sasrec-text": rows()["sasrec-text"]}
        patch.setattr(sys, "argv", ["compare.py", "--prepare-data", str(finished / "prepare_data")])
        with pytest.raises(SystemExit) as left:
            compare_cli.main(lambda: alone)
        assert left.value.code == 2 and "--encode-items: sasrec-text need" in capsys.readouterr().err
        code, shown = go(patch, "--rows", "sasrec-text")
        assert code == 2 and "--encode-items: sasrec-text need the output folder" in shown
        code, shown = go(patch, "--encode-items", str(finished / "encode_items"))
        assert code == 0 and "sasrec-text (ce)" in shown
