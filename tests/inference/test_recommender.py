"""A packaged recommender: same scores as the run's, exact best items, clear refusals."""

from __future__ import annotations

import ast
import contextlib
import copy
import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from llmrec.artifacts import CollabEmbeddings, ContentEmbeddings, SemanticIds
from llmrec.errors import (
    ArtifactMismatchError,
    ConfigError,
    DataError,
    MissingArtifactError,
    StaleArtifactError,
    StorageError,
)
from llmrec.files import read_json
from llmrec.finetune.adapter import Adapter
from llmrec.finetune.scoring import load_scorer
from llmrec.finished import load
from llmrec.inference import best as best_items
from llmrec.inference import recommender as module
from llmrec.inference.model_card import card
from llmrec.inference.package import ENDINGS, file_name, load_package, package_run, rename, without_folders
from llmrec.inference.recommender import Recommender
from llmrec.interactions import Interactions
from llmrec.manifest import write_manifest


@pytest.fixture(scope="module")
def loaded(packaged) -> Recommender:
    return Recommender.from_pretrained(packaged)


def histories(recommender: Recommender) -> list[list[str]]:
    ids = recommender.raw_ids
    return [ids[:3], [], [ids[5]], ids[10:22], [ids[2], ids[2], ids[7]]]


def test_scores_are_those_of_the_run(finished, loaded):
    kinds = (Interactions, CollabEmbeddings, ContentEmbeddings, SemanticIds, Adapter)
    data, collab, content, ids, adapter = (load(kind, finished / kind.stage) for kind in kinds)
    assert loaded.raw_ids == data.raw_ids
    scorer = load_scorer(adapter, collab, content, ids)
    for history in histories(loaded):
        numbers = torch.tensor([[loaded.number[name] for name in history] or [0]])
        expected = scorer.score(numbers)[:, 1:].numpy()
        assert np.array_equal(loaded.score([history]), expected)


@pytest.mark.parametrize(
    "told",
    [
        *(lambda: torch.device("meta"), lambda: torch.autocast("cpu", dtype=torch.bfloat16)),
        *(torch.inference_mode, lambda: default_dtype(torch.float64)),
    ],
    ids=["device", "autocast", "inference_mode", "float64"],
)
def test_scores_do_not_depend_on_what_torch_was_told(told, loaded, packaged):
    expected, best = loaded.score(histories(loaded)), loaded.recommend(histories(loaded), explain=True)
    with told():
        found = Recommender.from_pretrained(packaged)
        assert np.array_equal(found.score(histories(found)), expected)
        assert found.recommend(histories(found), explain=True) == best
        found.add_items([{"item_id": "new", "title": "Plain red drum"}])
        assert found.score([[]]).shape == (1, len(loaded.raw_ids) + 1)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(before)


def test_recommendations_are_the_best_of_all_scores(loaded, monkeypatch):
    asked = histories(loaded)
    scores = loaded.score(asked)
    for block in (1 << 24, 40):
        monkeypatch.setattr(best_items, "BLOCK_SCORES", block)
        for keep in (False, True):
            found = loaded.recommend(asked, k=7, exclude_seen=not keep)
            for history, row, items in zip(asked, scores, found):
                row = row.copy()
                if not keep:
                    row[[loaded.number[name] - 1 for name in history]] = -np.inf
                best = np.argsort(-row, kind="stable")[:7]
                assert [item.item_id for item in items] == [loaded.raw_ids[place] for place in best]
                np.testing.assert_allclose([item.score for item in items], row[best], rtol=1e-5, atol=1e-5)
                assert items[0].title


def test_batches_change_nothing_but_rounding(loaded):
    asked = histories(loaded)
    together = loaded.recommend(asked, k=5)
    for history, expected in zip(asked, together):
        (alone,) = loaded.recommend([history], k=5)
        assert [item.item_id for item in alone] == [item.item_id for item in expected]
        assert [item.score for item in alone] == pytest.approx([item.score for item in expected], abs=1e-4)
    assert loaded.recommend([]) == []


def test_of_longer_histories_than_the_base_sees_at_once_the_last_items_are_read(packaged):
    package = load_package(packaged)
    prompt = package.adapter.settings["prompt"]
    window = len(prompt["instruction"]) + len(prompt["response"]) + 3
    base_config = {**package.adapter.base_config, "max_position_embeddings": window}
    adapter = dataclasses.replace(package.adapter, base_config=base_config)
    short = Recommender(dataclasses.replace(package, adapter=adapter))
    history = short.raw_ids[:20]
    np.testing.assert_array_equal(short.score([history]), short.score([history[-3:]]))
    found = short.recommend([history], k=len(short.raw_ids))[0]
    assert not {item.item_id for item in found} & set(history), "what is not read is excluded, too"


def test_many_histories_go_through_in_passes_of_bounded_size(loaded, monkeypatch):
    histories = [loaded.raw_ids[:3], [], loaded.raw_ids[2:9]] * 4
    expected = loaded.score(histories)
    passes = []
    read_out = type(loaded)._read_out
    monkeypatch.setattr(
        type(loaded), "_read_out", lambda self, rows: passes.append(len(rows)) or read_out(self, rows)
    )
    monkeypatch.setattr(module, "MAX_CELLS", 20)
    np.testing.assert_allclose(loaded.score(histories), expected, rtol=1e-4, atol=1e-5)
    assert len(passes) > 4 and sum(passes) == 12


def test_what_a_model_is_not_shown_takes_no_room_in_a_pass(packaged, monkeypatch):
    recommender = Recommender.from_pretrained(packaged)
    recommender.max_history = 2
    slots, response = recommender.model.item_tokens.tokens_per_item, len(recommender.model.response)
    monkeypatch.setattr(module, "MAX_CELLS", 4 * (2 * slots + response))
    rows = recommender._rows([recommender.raw_ids[:50]] * 8, "error")
    assert [len(group) for group in recommender._groups(rows)] == [4, 4]


def test_a_full_gpu_is_not_called_a_damaged_package(packaged, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(module, "load_scorer", full)
    with pytest.raises(torch.OutOfMemoryError):
        Recommender.from_pretrained(packaged)


def test_a_failed_addition_leaves_the_catalogue_as_it_was(packaged, monkeypatch):
    recommender = Recommender.from_pretrained(packaged)
    before = list(recommender.raw_ids)
    calls = []

    def fails_once(*arguments):
        calls.append(arguments)
        return load_scorer(*arguments) if len(calls) > 1 else 1 / 0

    with monkeypatch.context() as patch:
        patch.setattr(module, "load_scorer", fails_once)
        with pytest.raises(ZeroDivisionError):
            recommender.add_items([{"item_id": "new", "title": "Plain red drum"}])
    assert recommender.raw_ids == before and len(recommender.recommend([before[:2]], k=3)[0]) == 3
    recommender.add_items([{"item_id": "new", "title": "Plain red drum"}])
    assert recommender.raw_ids == [*before, "new"]


def test_candidates_more_than_there_are_and_parts(loaded):
    ids = loaded.raw_ids
    (found,) = loaded.recommend([ids[:2]], k=50, candidates=[ids[1], ids[4], ids[9], ids[4]])
    assert sorted(item.item_id for item in found) == [ids[4], ids[9]]
    (found,) = loaded.recommend([ids[:2]], k=50, candidates=[ids[9], ids[1], ids[4], ids[0], ids[1]])
    assert sorted(item.item_id for item in found) == [ids[4], ids[9]], "in whatever order they come"
    (found,) = loaded.recommend([ids[:2]], k=len(ids) + 5)
    assert len(found) == len(ids) - 2
    (found,) = loaded.recommend([ids[:2]], k=4, explain=True)
    for item in found:
        assert set(item.parts) == {"target", "collab", "image", "text"}
        assert sum(item.parts.values()) == pytest.approx(item.score, abs=1e-4)


def test_an_unknown_item_is_told_to_another_process_as_it_is(loaded):
    with pytest.raises(module.UnknownItemError) as caught:
        loaded.recommend([[], ["gone"]])
    # Process pools hand errors on as copies are made; one that cannot be copied broke the pool.
    copied = copy.copy(caught.value)
    assert str(copied) == str(caught.value) and "histories[1]: 'gone' is not in the" in str(copied)
    assert (copied.where, copied.place, copied.reason) == ("histories[1]", 1, caught.value.reason)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"histories": [["nothing"]]},
            r"histories\[0\]: 'nothing' is not in the catalogue of 96 items; .*'P",
        ),
        ({"histories": ["P01"]}, r"histories\[0\] must be a list of item ids"),
        ({"histories": [{"P01": 1}]}, r"histories\[0\] must be a list of item ids"),
        ({"histories": [{"P01", "P02"}]}, r"histories\[0\] must be a list of item ids"),
        ({"histories": [[], [7]]}, r"histories\[1\]: 7 is not .*; unknown='skip' leaves such"),
        ({"histories": [[]], "k": 0}, "k must be a whole number of at least 1, got 0"),
        ({"histories": [[]], "k": True}, "k must be a whole number"),
        ({"histories": [[]], "k": 2.5}, "k must be a whole number"),
        ({"histories": [[]], "unknown": "maybe"}, "unknown must be"),
        ({"histories": [[]], "candidates": ["x"]}, "candidates: 'x' is not in the catalogue"),
        ({"histories": [[]], "candidates": ["x"], "unknown": "skip"}, "none of them is in the catalogue"),
    ],
)
def test_what_cannot_be_answered_is_refused_with_a_reason(arguments, message, loaded):
    with pytest.raises(DataError, match=message):
        loaded.recommend(**arguments)


@pytest.mark.parametrize("made", [tuple, np.array, pd.Series, pd.Index, iter], ids=lambda kind: kind.__name__)
def test_histories_and_candidates_may_come_in_anything_that_has_an_order(made, loaded):
    ids = loaded.raw_ids
    expected = loaded.recommend([ids[:3]], k=2, candidates=ids[5:9])
    assert loaded.recommend([made(ids[:3])], k=2, candidates=made(ids[5:9])) == expected
    assert loaded.recommend(pd.Series([ids[:3]]), k=2, candidates=set(ids[5:9])) == expected


def test_unknown_ids_are_skipped_when_asked(loaded):
    ids = loaded.raw_ids
    expected = loaded.recommend([[ids[1], ids[2]]], k=3)
    assert loaded.recommend([[ids[1], "gone", ids[2]]], k=3, unknown="skip") == expected


def test_a_package_holds_no_data_and_no_code(packaged, finished):
    files = [path for path in packaged.rglob("*") if path.is_file()]
    assert files and all(path.suffix in ENDINGS for path in files)
    names = {path.name for path in files}
    assert not names & {
        "interactions.parquet",
        "users.parquet",
        "rankings.parquet",
        "true_scores.safetensors",
    }
    assert "image_path" not in pq.read_schema(packaged / "items.parquet").names
    users = pq.read_table(finished / "prepare_data" / "users.parquet")["raw_id"].to_pylist()
    text = "".join(path.read_text() for path in files if path.suffix in (".json", ".jsonl", ".md"))
    assert not any(f'"{user}"' in text for user in users)
    card = (packaged / "README.md").read_text()
    metrics = json.loads((finished / "evaluate" / "metrics.json").read_text())["rows"]["mme_sid"]
    assert f"{metrics['ndcg@10']:.4f}" in card and "model-index" in card and "from_pretrained" in card


def test_the_card_says_who_learned_from_validation_items(packaged):
    package = load_package(packaged)
    sentence = "mme_sid learned from train and validation items."
    noted = dataclasses.replace(package, evaluation={**package.evaluation, "notes": [sentence]})
    assert sentence in card(noted) and sentence not in card(package)


def test_the_card_says_what_was_ranked(packaged):
    package = load_package(packaged)
    kept = dataclasses.replace(package, evaluation={**package.evaluation, "mask_seen": False})
    assert "items of the history left out; one run" in card(package)
    assert "items of the history kept; one run" in card(kept)


def test_the_card_asks_for_an_item_by_its_whole_id(packaged):
    package = load_package(packaged)
    odd = 'a "b" \\ & <c>'
    names = pa.array([odd, *package.items["raw_id"].to_pylist()[1:]])
    place = package.items.column_names.index("raw_id")
    renamed = dataclasses.replace(package, items=package.items.set_column(place, "raw_id", names))
    asked = next(line for line in card(renamed).splitlines() if line.startswith("for item in"))
    found = ast.parse(f"{asked}\n    pass").body[0].iter.value.args[0]
    assert ast.literal_eval(found) == [[odd]]


def test_the_card_says_which_class_of_ones_own_is_needed(packaged):
    """That of the method, which makes the item tokens; of the sequence model the vectors are there."""
    package = load_package(packaged)
    settings = package.adapter.settings
    own = {**settings, "config": {**settings["config"], "method": "mine.methods:Gated"}}
    needs = dataclasses.replace(package, adapter=dataclasses.replace(package.adapter, settings=own))
    said = "Needs the Python class `mine.methods:Gated`, which is not in this repository: install its package"
    assert said in card(needs) and "Needs the Python class" not in card(package)
    made_by = dataclasses.replace(package.collab, provider="far_away:Model", model={"num_items": 96})
    other = dataclasses.replace(package, collab=made_by)
    assert "Needs the Python class" not in card(other)
    assert Recommender(other, "cpu").score([[]]).shape == (1, 96), "and it is not asked for"


def test_who_may_read_the_folder_may_read_what_is_in_it(packaged):
    modes = {path.name: path.stat().st_mode & 0o777 for path in packaged.rglob("*") if path.is_file()}
    assert any(name.endswith(".safetensors") for name in modes)
    assert set(modes.values()) == {packaged.stat().st_mode & 0o666}


def test_packaging_refuses_what_exists_and_what_is_unfinished(packaged, finished, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="file/package cannot be written"):
        package_run(finished, tmp_path / "file" / "package")
    with pytest.raises(ConfigError, match="exists; give another folder"):
        package_run(finished, packaged)
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "finetune")
    with pytest.raises(MissingArtifactError, match="run has no finished finetune; run its recipe"):
        package_run(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def every_file(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]


@pytest.mark.parametrize("how", ["flipped", "cut", "gone"])
def test_every_damaged_file_is_refused_by_name(how, packaged, tmp_path):
    for name in every_file(packaged):
        if name == "README.md" or (how != "gone" and not (packaged / name).stat().st_size):
            continue
        folder = tmp_path / "copy"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(packaged, folder)
        content = bytearray((folder / name).read_bytes())
        if how == "flipped":
            content[len(content) // 2] ^= 4
        (folder / name).write_bytes(bytes(content[:-1] if how == "cut" else content))
        if how == "gone":
            (folder / name).unlink()
        with pytest.raises(MissingArtifactError, match=name.rpartition("/")[2]):
            Recommender.from_pretrained(folder)


def test_manifests_cannot_point_outside(packaged, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(packaged, folder)
    manifest = json.loads((folder / "package.json").read_text())
    manifest["files"]["../secret.json"] = {"bytes": 2, "sha256": "0" * 64}
    (tmp_path / "secret.json").write_text("{}")

    write_manifest(folder / "package.json", manifest)
    with pytest.raises(MissingArtifactError, match=r"secret\.json is missing or damaged"):
        Recommender.from_pretrained(folder)
    write_manifest(folder / "package.json", {**manifest, "schema": 99})
    with pytest.raises(StaleArtifactError, match="written in form 99 by llmrec"):
        Recommender.from_pretrained(folder)


def test_of_own_files_only_the_names_are_written_down(packaged):
    package = load_package(packaged)
    own = {
        "interactions": "/home/ann/shop/sales.csv",
        "items": "../shop/items.csv",
        "folder": "C:\\shop\\raw\\",
    }
    own |= {"exclude_items": None, "image_folder": "pictures", "mirrors": ["https://ann:secret@shop.example"]}
    package = dataclasses.replace(package, data={"config": {**package.data["config"], **own}})
    package.adapter.settings["config"]["prompt"] = "/home/ann/mine.toml"
    package.content.encoders["text"] |= {
        "path": "/home/ann/v.parquet",
        "settings": {"path": "/home/ann/v.parquet"},
    }
    found = without_folders(package)
    assert found.data["config"] == {
        **package.data["config"], "interactions": "sales.csv", "items": "items.csv", "folder": "raw",
        "exclude_items": None, "image_folder": "pictures", "mirrors": [],
    }  # fmt: skip
    assert found.adapter.settings["config"]["prompt"] == "mine.toml"
    assert (
        found.content.encoders["text"] | {"path": "v.parquet", "settings": {"path": "v.parquet"}}
        == (found.content.encoders["text"])
    )
    assert found.content.encoders["image"] == package.content.encoders["image"]
    assert package.adapter.settings["config"]["prompt"] == "/home/ann/mine.toml", (
        "what was given is left alone"
    )


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("hub:ann/shop", "hub:ann/shop"),
        ("hub:ann/shop@v1:full:train", "hub:ann/shop@v1:full:train"),
        ("hub:/home/ann/shop:full", "hub:shop:full"),
        ("hub:~/shop", "hub:shop"),
        ("chat", "chat"),
        ("~/shop/", "shop"),
    ],
)
def test_names_of_files_and_of_data_sets_on_the_hub(path, name):
    assert file_name(path) == name


def test_texts_are_renamed_wherever_they_stand_alone():
    value = {"a": "/x/y", "b": ["/x/y", {"c": "/x/y/z"}], "d": 3}
    assert rename(value, {"/x/y": "hub/id"}) == {"a": "hub/id", "b": ["hub/id", {"c": "/x/y/z"}], "d": 3}


def test_a_graph_finds_nearly_all_that_a_full_comparison_finds(packaged, loaded):
    approximate = Recommender.from_pretrained(packaged, index="faiss")
    asked = histories(loaded)
    hits = 0
    for ours, exact in zip(approximate.recommend(asked, k=10), loaded.recommend(asked, k=10)):
        scores = {item.item_id: item.score for item in exact}
        hits += sum(item.item_id in scores for item in ours)
        assert [item.score for item in ours] == sorted((item.score for item in ours), reverse=True)
        for item in ours:
            if item.item_id in scores:
                assert item.score == pytest.approx(scores[item.item_id], abs=1e-4)
    assert hits >= 0.9 * 10 * len(asked)
    (found,) = approximate.recommend([loaded.raw_ids[:80]], k=10)
    assert len(found) == 10, "room for what is left out"
    few = approximate.recommend(asked[:1], k=3, candidates=loaded.raw_ids[5:9])
    assert few == loaded.recommend(asked[:1], k=3, candidates=loaded.raw_ids[5:9])
    with pytest.raises(ConfigError, match="index must be"):
        Recommender.from_pretrained(packaged, index="magic")


def test_a_graph_looks_around_wide_enough_and_keeps_nothing_of_a_search():
    """Rows without any structure, of which faiss's own width of 16 finds eight in ten."""
    rng = np.random.default_rng(0)
    matrix, hidden = (torch.from_numpy(rng.normal(size=(n, 64)).astype(np.float32)) for n in (2001, 40))
    graph = best_items.Graph(matrix)
    width = graph.graph.hnsw.efSearch
    for number in (0, 60):
        seen = [rng.choice(2000, number, replace=False) + 1 for _ in hidden]
        found = graph.best(matrix, hidden, seen, 10)
        hits = 0
        for (items, scores), (best, exact), left_out in zip(
            found, best_items.best_of_all(matrix, hidden, seen, 10, None), seen
        ):
            assert len(items) == 10 and not np.isin(items, left_out).any()
            hits += len(np.intersect1d(items, best))
            assert scores[0] <= exact[0] + 1e-4
        assert hits >= 0.98 * 400
    assert graph.graph.hnsw.efSearch == width, "several threads search at once"


def test_parts_that_were_not_made_from_each_other_are_not_packaged(finished, tmp_path):
    """Codes, and an evaluation, of another training than the weights that are there."""
    for stage, words in (
        ("learn_semantic_ids", "finetune was made from another learn_semantic_ids"),
        ("finetune", "evaluate was made from another finetune"),
    ):
        run = tmp_path / stage
        shutil.copytree(finished, run)
        made = read_json(run / stage / "manifest.json")
        name = next(name for name in made["files"] if name.endswith(".safetensors"))
        made["contents"][name] = "0" * 64  # as if it had come out otherwise
        write_manifest(run / stage / "manifest.json", {**made})
        with pytest.raises(ArtifactMismatchError, match=words):
            package_run(run, tmp_path / "out")
        assert not (tmp_path / "out").exists()
