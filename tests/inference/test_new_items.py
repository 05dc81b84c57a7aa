"""Items added after training: known ones keep their numbers, new ones are found by what they look like."""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from tiny_recipe import tiny

from llmrec.artifacts import CollabEmbeddings, ContentEmbeddings, SemanticIds
from llmrec.errors import ConfigError, DataError
from llmrec.finetune.config import FinetuneConfig
from llmrec.finetune.train import finetune
from llmrec.finished import load
from llmrec.inference.new_items import extended, nearest
from llmrec.inference.package import load_package, package_run
from llmrec.inference.recommender import Recommender
from llmrec.interactions import Interactions
from llmrec.recipe import main
from llmrec.semantic_ids.assign import assign


@pytest.fixture
def fresh(packaged) -> Recommender:
    return Recommender.from_pretrained(packaged)


def picture(finished, number: int):
    return load(Interactions, finished / "prepare_data").image_file(number)


def test_known_items_keep_every_score(fresh):
    asked = [fresh.raw_ids[:3], [], fresh.raw_ids[4:9]]
    before = fresh.score(asked)
    fresh.add_items([{"item_id": "n1", "title": "Plain red drum"}, {"item_id": "n2", "title": "Red kite"}])
    after = fresh.score(asked)
    assert after.shape == (3, before.shape[1] + 2)
    np.testing.assert_allclose(after[:, :-2], before, rtol=0, atol=1e-5)
    assert np.isfinite(after).all()


def test_a_weight_as_long_as_the_catalogue_is_not_taken_for_a_table_of_items(fresh):
    package = fresh.package
    num_rows = len(package.collab.vectors)
    heads = {**package.adapter.heads, "item_tokens.mixer.layers.9.weight": torch.ones(num_rows, 2)}
    heads["item_tokens.parts.own.table"] = torch.ones(3, 2)  # of a user's own method, and not of items
    package = dataclasses.replace(package, adapter=dataclasses.replace(package.adapter, heads=heads))
    items = pa.table({"raw_id": ["n1"], "title": ["Plain red drum"]})
    content = {name: table[1:2] for name, table in package.content.vectors.items()}
    after = extended(package, items, content).adapter.heads
    assert len(after["item_tokens.mixer.layers.9.weight"]) == num_rows
    assert len(after["item_scores.target_table"]) == num_rows + 1
    assert len(after["item_tokens.parts.own.table"]) == 3


def test_new_ids_work_in_histories_and_results(fresh):
    fresh.add_items([{"item_id": "n1", "title": "Plain red drum"}])
    (found,) = fresh.recommend([["n1"]], k=5)
    assert found and all(item.item_id != "n1" for item in found)
    (found,) = fresh.recommend([fresh.raw_ids[:2]], k=len(fresh.raw_ids))
    assert "n1" in [item.item_id for item in found]
    assert fresh.titles[-1] == "Plain red drum" and fresh.raw_ids[-1] == "n1"


def test_a_twin_of_a_known_item_gets_its_vectors_and_codes(fresh, finished):
    package = fresh.package
    number = int(np.argmax(package.adapter.heads["train_count"].numpy()))
    title = fresh.titles[number - 1]
    columns = [name for name in package.items.column_names if name not in ("raw_id", "train_count", "title")]
    row = {name: package.items[name][number - 1].as_py() for name in columns}
    fresh.add_items([{"item_id": "twin", "title": title, **row, "image": picture(finished, number)}])
    content, ids = fresh.package.content, fresh.package.ids
    for name in ("text", "image"):
        np.testing.assert_allclose(content.vectors[name][-1], content.vectors[name][number], atol=1e-4)
        assert ids.codes[name][-1].tolist() == ids.codes[name][number].tolist()
    assert int(fresh.package.adapter.heads["train_count"][-1]) == 0


def test_what_training_would_have_given_is_the_mean_of_neighbours(fresh):
    package = fresh.package
    width = {name: rows.shape[1] for name, rows in package.content.vectors.items()}
    rng = np.random.default_rng(0)
    vectors = {name: rng.normal(size=(3, dim)).astype(np.float32) for name, dim in width.items()}
    fresh.add_items([{"item_id": f"n{n}"} for n in range(3)], vectors=vectors, neighbours=4)
    trained = np.flatnonzero(package.adapter.heads["train_count"].numpy() > 0)
    for place in range(3):
        similarity = np.zeros(len(trained))
        for name, rows in vectors.items():
            table = package.content.vectors[name][trained]
            known, new = table - table.mean(axis=0), rows[place] - table.mean(axis=0)
            similarity += known @ new / np.linalg.norm(known, axis=1) / np.linalg.norm(new)
        near = trained[np.argsort(-similarity)[:4]]
        rows = package.collab.vectors[near].astype(np.float64)
        mean = rows.mean(axis=0)
        expected = mean / np.linalg.norm(mean) * np.mean([np.linalg.norm(row) for row in rows])
        np.testing.assert_allclose(fresh.package.collab.vectors[97 + place], expected, atol=1e-5)
        rows = package.adapter.heads["item_scores.target_table"][torch.from_numpy(near)]
        target = rows.mean(dim=0) / rows.mean(dim=0).norm() * rows.norm(dim=1).mean()
        torch.testing.assert_close(
            fresh.package.adapter.heads["item_scores.target_table"][97 + place], target, rtol=1e-5, atol=1e-6
        )
    new = {"collab": fresh.package.collab.vectors[97:], **vectors}
    expected_codes = assign(package.ids, {name: new[name] for name in package.ids.modalities})
    for name, codes in expected_codes.items():
        assert np.array_equal(fresh.package.ids.codes[name][97:], codes)


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([{"item_id": "P01"}], "1 ids are in the catalogue"),
        ([{"item_id": "a"}, {"item_id": "a"}], "an id is given twice"),
        ([{"item_id": ""}], "a text that is not empty"),
        ([{"item_id": "a"}, {"item_id": 7, "title": "x"}], "a text that is not empty, got 7"),
        ([{"item_id": None}], "a text that is not empty, got None"),
        ([{"item_id": "a", "title": 7}], "title of 'a' must be a text or None, got 7"),
        ([{"item_id": "a", 7: "x"}], "7 is no column of the catalogue"),
        ([{"title": "x"}], "each must be a mapping with item_id"),
        ([{"item_id": "a", "colour": "red"}], "colour is no column of the catalogue"),
        ([{"item_id": "a", "image": "no/such/file.png"}], "no/such/file.png"),
        ([{"item_id": "a", "image": b"GIF89a"}], "image of 'a' must be a file's path, got b'GIF89a'"),
    ],
)
def test_impossible_items_are_refused_and_change_nothing(items, message, fresh):
    if items[0].get("item_id") == "P01":
        items = [{"item_id": fresh.raw_ids[0]}]
    before = len(fresh.raw_ids), fresh.package.catalog
    with pytest.raises(DataError, match=message):
        fresh.add_items(items)
    with pytest.raises(DataError, match=r"got a DataFrame; .*, give frame\.to_dict\('records'\)"):
        fresh.add_items(pd.DataFrame(items))
    assert before == (len(fresh.raw_ids), fresh.package.catalog)


def test_vectors_of_the_wrong_shape_or_kind_are_refused(fresh):
    for bad in ({"text": np.zeros((2, 3))}, {"smell": np.zeros((1, 3))}, {"text": np.full((1, 16), np.nan)}):
        with pytest.raises(DataError, match=r"must be finite numbers of shape \(1, width of"):
            fresh.add_items([{"item_id": "a"}], vectors=bad)


def test_vectors_from_a_file_must_come_with_new_items(packaged):
    package = load_package(packaged)
    package.content.encoders["text"]["encoder"] = "precomputed"
    with pytest.raises(ConfigError, match=r"text vectors came from a file.*vectors=\{'text'"):
        Recommender(package).add_items([{"item_id": "a", "title": "x"}])


def test_a_picture_that_nothing_looks_at_is_told(finished, tmp_path, caplog):
    for stage in ("prepare_data", "train_collab"):
        shutil.copytree(finished / stage, tmp_path / "run" / stage)
    options = ["--run-dir", str(tmp_path / "run"), "--until", "finetune"]
    with pytest.raises(SystemExit) as left:
        main(tiny, [*options, "--set", "encode_items.image.encoder=none"])
    assert left.value.code == 0
    recommender = Recommender(load_package(package_run(tmp_path / "run", tmp_path / "package")))
    caplog.clear()
    recommender.add_items([{"item_id": "a", "title": "Red drum", "image": None}])
    assert not caplog.records
    recommender.add_items(
        [{"item_id": "b", "title": "Red drum", "image": "b.png"}, {"item_id": "c", "title": "Blue kettle"}]
    )
    assert "1 of 2 items come with a picture, which is not used" in caplog.text
    assert recommender.raw_ids[-3:] == ["a", "b", "c"]


@pytest.mark.parametrize("missing", ["mean", "zero"])
def test_a_picture_that_cannot_be_read_counts_as_none_where_the_catalogue_says_so(
    packaged, finished, tmp_path, missing
):
    package = load_package(packaged)
    about = package.content.encoders["image"]
    about |= {"missing": missing, "settings": {**about["settings"], "on_error": "missing", "max_pixels": 10}}
    (tmp_path / "a.png").write_bytes(b"no picture")
    recommender = Recommender(package)
    recommender.add_items([{"item_id": "a", "title": "Red drum", "image": str(tmp_path / "a.png")}])
    recommender.add_items([{"item_id": "b", "title": "Red drum"}])
    recommender.add_items([{"item_id": "c", "title": "Red drum", "image": str(picture(finished, 1))}])
    content = recommender.package.content
    assert content.missing["image"][-3:].all(), "of the last, it is too large"
    assert (content.vectors["image"][-3:] == content.vectors["image"][-1]).all()
    assert content.vectors["image"][-1].any() == (missing == "mean")


def test_at_least_one_neighbour_is_needed(fresh):
    for wrong in (0, 1.5, True, "3"):
        with pytest.raises(DataError, match="neighbours must be a whole number of at least 1, got"):
            fresh.add_items([{"item_id": "a", "title": "Red drum"}], neighbours=wrong)


def test_words_that_nobody_knows_say_nothing(fresh):
    """TF-IDF makes nothing of them, and nothing is near to nothing."""
    with pytest.raises(DataError, match="nothing is known of 'a'"):
        fresh.add_items([{"item_id": "a", "title": "zzzz qqqq"}])


@pytest.mark.parametrize("encoder", ["tfidf", "precomputed"])
def test_vectors_that_are_given_are_scaled_as_the_catalogues(packaged, encoder):
    package = load_package(packaged)
    about = package.content.encoders["text"]
    about |= {"encoder": encoder, "normalised": True}
    vectors = package.content.vectors["text"]
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)
    recommender = Recommender(package)
    number = int(np.argmax(vectors.any(axis=1)))
    recommender.add_items([{"item_id": "twin"}], vectors={"text": 7 * vectors[number : number + 1]})
    made = recommender.package
    np.testing.assert_allclose(made.content.vectors["text"][-1], vectors[number], atol=1e-6)
    assert np.array_equal(made.ids.codes["text"][-1], made.ids.codes["text"][number])


def test_what_is_not_known_of_an_item_has_no_say_in_who_is_near(packaged):
    """The mean stands in for a missing picture, and the direction from the mean to itself is rounding."""
    package = load_package(packaged)
    rows = np.arange(1, 21)
    items = pa.table({"raw_id": [f"new {row}" for row in rows]})
    text, image = (package.content.vectors[name][rows] for name in ("text", "image"))
    stand_in = package.content.vectors["image"][1:].mean(axis=0, dtype=np.float64).astype(np.float32)
    nothing = np.zeros(len(rows), dtype=bool)
    everything = ~nothing
    known = {"text": everything, "image": nothing}
    without = {"text": text, "image": np.repeat(stand_in[None], len(rows), axis=0)}
    found = nearest(package, without, known, 5)
    wanted = nearest(package, {"text": text}, {"text": everything}, 5)
    assert [set(row) for row in found.tolist()] == [set(row) for row in wanted.tolist()]
    made = extended(package, items, without, present=known)
    assert (
        made.content.missing["image"][-len(rows) :].all()
        and not made.content.missing["text"][-len(rows) :].any()
    )
    both = nearest(package, {"text": text, "image": image}, {"text": everything, "image": everything}, 1)
    trained = package.adapter.heads["train_count"].numpy()[rows] > 0
    assert np.array_equal(both[trained, 0], rows[trained])
    with pytest.raises(
        DataError, match=r"nothing is known of 'new 1' \(and 19 more\) .* goes by text and image"
    ):
        extended(package, items, without, present={"text": nothing, "image": nothing})


def test_an_item_without_a_picture_is_as_near_as_its_text_says(packaged):
    """Against a loop over items: the mean over what both have, and last who shares nothing."""
    package = load_package(packaged)
    missing = {name: flags.copy() for name, flags in package.content.missing.items()}
    half = np.arange(len(missing["image"])) % 2 == 0
    missing["image"][half] = True
    missing["text"][4:8] = True
    package = dataclasses.replace(package, content=dataclasses.replace(package.content, missing=missing))
    trained = np.flatnonzero(package.adapter.heads["train_count"].numpy() > 0)
    rows = trained[10:14]
    content = {name: package.content.vectors[name][rows] for name in ("text", "image")}
    there = {"text": np.array([True, True, True, False]), "image": np.array([True, False, True, True])}
    found = nearest(package, content, there, 5)
    for place in range(4):
        likeness = {}
        for item in trained:
            both = [name for name in there if there[name][place] and not missing[name][item]]
            cosines = []
            for name in both:
                table = package.content.vectors[name].astype(np.float64)
                centre = table[trained].mean(axis=0)
                one, other = content[name][place] - centre, table[item] - centre
                cosines.append(one @ other / np.linalg.norm(one) / np.linalg.norm(other))
            likeness[item] = np.mean(cosines) if both else -np.inf
        wanted = sorted(likeness.values(), reverse=True)[:5]
        assert sorted((likeness[item] for item in found[place]), reverse=True) == pytest.approx(wanted)
    several = nearest(package, content, there, len(trained))
    nothing = [item for item in trained if missing["image"][item]]
    assert set(several[3, -len(nothing) :]) == set(nothing), "of the last only the picture is known"


def test_items_that_were_added_are_saved_with_the_others(packaged, tmp_path):
    recommender = Recommender.from_pretrained(packaged)
    recommender.add_items([{"item_id": "new", "title": "Plain red drum"}])
    with pytest.raises(ConfigError, match="exists; give another folder"):
        recommender.save_pretrained(packaged)
    again = Recommender.from_pretrained(recommender.save_pretrained(tmp_path / "more"))
    history = [np.array(recommender.raw_ids[:2])]  # arrays are lists too
    found, same = (one.recommend(history, k=np.int64(200)) for one in (recommender, again))
    assert found == same and any(one.item_id == "new" for one in found[0])
    with pytest.raises(DataError, match="nothing is known of 'bare' that"):
        again.add_items([{"item_id": "bare"}])


@pytest.mark.parametrize(
    ("device", "said"),
    [("gpu", "expected cpu, cuda or a GPU"), ("meta", "expected cpu"), ("cuda:7", "no GPU")],
)
def test_a_device_that_is_not_there_is_named(device, said, packaged):
    with pytest.raises(ConfigError, match=f"device='{device}': .*{said}"):
        Recommender.from_pretrained(packaged, device=device)


def test_a_table_as_wide_as_the_catalogue_was_long_takes_new_items(packaged, finished):
    """Tables of mme_random have a width that follows from the number of items at training."""
    kinds = (Interactions, CollabEmbeddings, ContentEmbeddings, SemanticIds)
    inputs = [load(kind, finished / kind.stage) for kind in kinds]
    config = FinetuneConfig(
        method="mme_random",
        mini=tiny().finetune.mini,
        prompt="compact",
        epochs=1,
        batch_size=512,
        analyse=False,
    )
    adapter = finetune(config, *inputs)
    recommender = Recommender(dataclasses.replace(load_package(packaged), adapter=adapter))
    asked, before = [recommender.raw_ids[:3]], len(recommender.raw_ids)
    scores = recommender.score(asked)
    for name in ("a", "b"):
        recommender.add_items([{"item_id": f"{name}{n}", "title": "Plain red drum"} for n in range(before)])
    np.testing.assert_allclose(recommender.score(asked)[:, :before], scores, rtol=0, atol=1e-5)
