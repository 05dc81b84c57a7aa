"""The stage: which items count as missing, what is written down, and what is refused."""

import json
import logging
import threading

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import worlds
from PIL import Image
from skimage.feature import hog

from llmrec.artifacts import ContentEmbeddings
from llmrec.encoders import classical
from llmrec.encoders.config import EncodeItemsConfig, ImageEncoderConfig, TextEncoderConfig
from llmrec.encoders.encode import encode_items
from llmrec.encoders.encoder import encode_pictures, finish, map_ahead
from llmrec.encoders.tfidf import FittedTfidf, TfidfEncoder
from llmrec.errors import ArtifactMismatchError, ConfigError, DataError

NO_TEXT = TextEncoderConfig(encoder="none")
NO_IMAGE = ImageEncoderConfig(encoder="none")


def text(data, **settings):
    made = encode_items(EncodeItemsConfig(text=TextEncoderConfig(**settings), image=NO_IMAGE), data)
    return made.vectors["text"], made.missing["text"], made.encoders["text"]


def image(data, **settings):
    made = encode_items(EncodeItemsConfig(text=NO_TEXT, image=ImageEncoderConfig(**settings)), data)
    return made.vectors["image"], made.missing["image"], made.encoders["image"]


def illustrated(folder, number=8, without=()):
    names = [None if index in without else name for index, name in enumerate(tiny.pictures(folder, number))]
    return tiny.catalogue([f"item {index}" for index in range(number)], folder, image_path=pa.array(names))


# Text: columns, templates, missing items


def test_title_and_every_other_text_column_are_used_unless_columns_are_named():
    data = tiny.catalogue(["red", "blue"], brand=["acme", None], price=[1.0, 2.0], note=["x", "y"])
    assert text(data)[2]["columns"] == ["title", "brand", "note"]
    _, _, about = text(data, columns=("brand", "title"))
    assert about["columns"] == ["brand", "title"]


def recorded(monkeypatch, data, **settings):
    """The texts that reach the encoder."""
    seen = []

    class Recorder:
        def __init__(self, texts, **_):
            seen.extend(texts)

        def prepare(self, inputs):
            return inputs

        def encode(self, batch):
            return np.ones((len(batch), 2), np.float32)

        def describe(self):
            return {}

    monkeypatch.setattr("llmrec.encoders.tfidf.TfidfEncoder", Recorder)
    text(data, **settings)
    return seen


def test_columns_are_joined_and_templates_filled(monkeypatch):
    data = tiny.catalogue(["Red  gloss", "Blue\nsoap", "Oil"], brand=["Acme", None, ""])
    assert recorded(monkeypatch, data) == ["Red gloss. Acme", "Blue soap", "Oil"]
    made = recorded(monkeypatch, data, template="{title} by {brand}")
    assert made == ["Red gloss by Acme", "Blue soap by", "Oil by"]
    assert recorded(monkeypatch, data, columns=("brand",)) == ["Acme"]


def test_braces_in_values_and_repeated_names_are_taken_as_they_are(monkeypatch):
    data = tiny.catalogue(["{brand} x", "y"], brand=["acme", "b"])
    assert recorded(monkeypatch, data, template="{title} {title}")[0] == "{brand} x {brand} x"


@pytest.mark.parametrize("name", ["brnad", "price", "raw_id", "image_path"])
def test_a_column_that_holds_no_text_is_refused(name):
    data = tiny.catalogue(["red", "blue"], brand=["a", "b"], price=[1.0, 2.0])
    with pytest.raises(ConfigError, match=rf"text.columns must name .*\(title, brand\), got {name}"):
        text(data, columns=(name,))
    with pytest.raises(ConfigError, match=r"text.template must name"):
        text(data, template="{title} {" + name + "}")


@pytest.mark.parametrize("how", ["mean", "zero"])
def test_items_without_text_get_the_mean_or_zero(how):
    data = tiny.catalogue(["red gloss", "", "hammer drill", None, "!?", "blue soap"])
    vectors, missing, about = text(data, missing=how)
    assert missing.tolist() == [False, False, True, False, True, True, False]
    assert about["num_missing"] == 3 and about["missing"] == how
    expected = vectors[[1, 3, 6]].mean(axis=0) if how == "mean" else np.zeros(vectors.shape[1])
    np.testing.assert_allclose(vectors[[2, 4, 5]], [expected] * 3, atol=1e-7)
    assert not vectors[0].any() and vectors[[1, 3, 6]].any(axis=1).all()


def test_no_text_at_all_is_an_error_with_advice():
    with pytest.raises(DataError, match=r"none of the 2 items has text in title.*text.encoder=none"):
        text(tiny.catalogue(["", None]))


def test_an_encoder_that_overflows_is_named_with_the_item():
    vectors = np.array([[1, 2], [np.inf, 0]], np.float32)
    present = np.array([True, False, True])
    with pytest.raises(DataError, match=r"1 items, the first is 'c'.*float32"):
        finish(vectors, present, normalise=False, missing="mean", what="text", raw_ids=["a", "b", "c"])


# TF-IDF


def test_tfidf_is_deterministic_to_the_byte_and_blind_to_item_order():
    rng = np.random.default_rng(0)
    titles = [" ".join(rng.choice(tiny.WORDS, 4)) for _ in range(300)]
    first, _, about = text(tiny.catalogue(titles), dim=8)
    second, _, _ = text(tiny.catalogue(titles), dim=8)
    assert first.tobytes() == second.tobytes()
    assert first.shape == (301, 8) and about["dim_asked"] == 8 and 0 < about["explained_variance_rate"] < 1
    order = rng.permutation(300)
    mixed, _, _ = text(tiny.catalogue([titles[index] for index in order]), dim=8)
    gram, expected = mixed[1:] @ mixed[1:].T, first[1:][order] @ first[1:][order].T
    np.testing.assert_allclose(gram, expected, atol=0.05)


def test_tfidf_of_full_width_keeps_the_cosines_of_the_term_table():
    titles = ["red gloss", "red soap soap", "hammer drill", "drill hammer red", "oil"]
    vectors, _, about = text(tiny.catalogue(titles), dim=5)
    words = sorted({word for title in titles for word in title.split()})
    count = np.array([[title.split().count(word) for word in words] for title in titles])
    idf = np.log((1 + len(titles)) / (1 + (count > 0).sum(0))) + 1
    table = np.where(count > 0, 1 + np.log(np.maximum(count, 1)), 0) * idf
    table /= np.linalg.norm(table, axis=1, keepdims=True)
    np.testing.assert_allclose(vectors[1:] @ vectors[1:].T, table @ table.T, atol=1e-6)
    assert about["num_terms"] == len(words) and about["explained_variance_rate"] == pytest.approx(1)


def test_a_width_beyond_the_rank_is_cut_and_said(caplog):
    vectors, _, about = text(tiny.catalogue(["red gloss", "red gloss", "hammer", "hammer red gloss"]))
    assert vectors.shape[1] == about["width"] == 2 and about["dim_asked"] == 128
    assert "width 2 instead of 128" in caplog.text


@pytest.mark.parametrize("titles", [["red gloss"], ["red", "red x"], ["X", "7"]])
def test_tiny_catalogues_give_finite_vectors(titles):
    vectors, _, about = text(tiny.catalogue(titles))
    assert np.isfinite(vectors).all() and vectors[1:].any(axis=1).all()
    json.dumps(about, allow_nan=False)


@pytest.mark.parametrize("titles", [["red"], ["red", "red!", ""], ["red gloss", "Gloss, red"]])
def test_texts_that_all_hold_the_same_words_are_refused(titles):
    with pytest.raises(DataError, match=r"texts hold the same words, such as 'red"):
        text(tiny.catalogue(titles))


def test_texts_are_made_vectors_of_again_as_they_were_at_first():
    """From what is kept, words that stand twice in a text, and rare directions, included."""
    texts = ["red gloss"] * 400 + ["red soap soap", "hammer drill drill drill"]
    made = TfidfEncoder(texts, dim=8, seed=0)
    vectors = made.encode(texts[399:])
    assert vectors.shape == (3, 3), "a direction that one text in 402 has is kept"
    kept = FittedTfidf({name: array.copy() for name, array in made.fitted().items()})
    assert np.array_equal(kept.encode(texts[399:]), vectors)
    assert not kept.encode(["a word that nobody knows"]).any()


# Pictures and the classical encoder


def test_a_descriptor_is_the_rate_of_each_colour_and_hog():
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    pixels[:20] = (255, 64, 0)
    found = classical.descriptor(Image.fromarray(pixels))
    rate = np.zeros((4, 4, 4))
    for red, green, blue in pixels.reshape(-1, 3).tolist():
        rate[red // 64, green // 64, blue // 64] += 1 / 4096
    np.testing.assert_allclose(found[:64], np.sqrt(rate).ravel(), rtol=1e-6)
    grey = np.asarray(Image.fromarray(pixels).convert("L"), np.float64) / 255
    expected = hog(grey, orientations=9, pixels_per_cell=(8, 8), cells_per_block=(2, 2), block_norm="L2-Hys")
    np.testing.assert_allclose(found[64:], expected, atol=1e-5)


def test_pictures_are_reduced_to_the_directions_of_most_variance_of_both_blocks():
    """Against the eigenvectors of the Gram matrix."""
    features = np.random.default_rng(0).normal(2, 1, (30, 74)).astype(np.float32)
    features[:, 64:] *= 50
    vectors, about, fitted = classical.reduce(features, dim=5, seed=0)
    scaled = features.astype(np.float64) - features.mean(axis=0, dtype=np.float64)
    for part in (scaled[:, :64], scaled[:, 64:]):
        part /= np.sqrt((part**2).sum() / 30)
    size, direction = np.linalg.eigh(scaled @ scaled.T)
    expected = (direction[:, -5:] * size[-5:]) @ direction[:, -5:].T
    np.testing.assert_allclose(vectors @ vectors.T, expected, atol=1e-4)
    assert about == {
        "dim_asked": 5, "explained_variance_rate": pytest.approx(size[-5:].sum() / size.sum(), abs=1e-5)
    }  # fmt: skip
    np.testing.assert_allclose(classical.project(features[3:5], fitted), vectors[3:5], atol=1e-5)


def test_a_random_reduction_takes_the_seed_of_the_settings():
    features = np.random.default_rng(0).normal(size=(60, 600)).astype(np.float32)
    first, again, other = (classical.reduce(features, dim=4, seed=seed)[0] for seed in (1, 1, 2))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_the_classical_encoder_tells_red_circles_from_blue_squares(tmp_path):
    vectors, missing, about = image(illustrated(tmp_path, 24), dim=4)
    assert vectors.shape == (25, 4) and not missing.any() and about["num_unreadable"] == 0
    even, odd = vectors[1::2], vectors[2::2]
    for own, other in ((even, odd), (odd, even)):
        near = np.linalg.norm(own - own.mean(0), axis=1)
        assert (near < np.linalg.norm(own - other.mean(0), axis=1)).all()
    assert (even[:, 0] * even[0, 0] > 0).all() and (odd[:, 0] * even[0, 0] < 0).all()
    again, _, _ = image(illustrated(tmp_path, 24), dim=4)
    assert vectors.tobytes() == again.tobytes()


def test_shape_alone_and_colour_alone_both_show(tmp_path):
    red, blue = (210, 30, 30), (30, 40, 200)
    for name, kinds in {
        "shape": [("circle", red), ("square", red)],
        "colour": [("circle", red), ("circle", blue)],
    }.items():
        folder = tmp_path / name
        folder.mkdir()
        for index in range(24):
            tiny.drawing(*kinds[index % 2], seed=index).save(folder / f"{index}.png")
        names = pa.array([f"{index}.png" for index in range(24)])
        vectors, _, _ = image(tiny.catalogue(["x"] * 24, folder, image_path=names), dim=8)
        distance = np.linalg.norm(vectors[1:, None] - vectors[None, 1:], axis=2)
        same = (np.arange(24)[:, None] - np.arange(24)) % 2 == 0
        off = ~np.eye(24, dtype=bool)
        assert distance[~same].mean() > 1.1 * distance[same & off].mean(), name


@pytest.mark.parametrize("how", ["mean", "zero"])
def test_items_without_a_picture_get_the_mean_or_zero(tmp_path, how):
    vectors, missing, about = image(illustrated(tmp_path, without=(2, 5)), missing=how, dim=3, normalise=True)
    assert np.flatnonzero(missing).tolist() == [3, 6] and about["num_missing"] == 2
    np.testing.assert_allclose(np.linalg.norm(vectors[1:][~missing[1:]], axis=1), 1, atol=1e-6)
    mean = vectors[1:][~missing[1:]].mean(axis=0)
    np.testing.assert_allclose(vectors[3], mean if how == "mean" else 0 * mean, atol=1e-6)


def broken(folder, kind):
    """A catalogue whose picture 3 is broken in some way."""
    data = illustrated(folder)
    file = folder / "3.png"
    if kind == "truncated":
        tiny.drawing("circle", (9, 9, 9), 0).resize((400, 400)).save(folder / "3.jpg")
        file.write_bytes((folder / "3.jpg").read_bytes()[:900])
    elif kind == "text":
        file.write_text("<html>not found</html>")
    elif kind == "empty":
        file.write_bytes(b"")
    else:
        file.unlink()
    return data


@pytest.mark.parametrize("kind", ["truncated", "text", "empty", "absent"])
def test_a_broken_picture_stops_the_run_or_counts_as_missing(tmp_path, kind, caplog):
    data = broken(tmp_path, kind)
    with pytest.raises(DataError, match=r"3\.png, the picture of item 'i4', .*on_error=missing") as caught:
        image(data)
    assert "\n" not in str(caught.value)
    vectors, missing, about = image(data, on_error="missing", dim=3)
    assert np.flatnonzero(missing).tolist() == [4] and about["num_unreadable"] == 1
    assert "1 pictures cannot be read" in caplog.text and np.isfinite(vectors).all()


def test_a_picture_beyond_max_pixels_counts_as_broken(tmp_path):
    data = illustrated(tmp_path)
    assert not image(data, max_pixels=80 * 60, dim=2)[1].any()
    with pytest.raises(DataError, match=r"80 x 60 pixels, more than image\.max_pixels=4799"):
        image(data, max_pixels=80 * 60 - 1)
    with pytest.raises(DataError, match=r"none of the 8 pictures"):
        image(data, max_pixels=10, on_error="missing")


def test_no_picture_at_all_is_an_error_with_advice(tmp_path):
    with pytest.raises(DataError, match=r"none of the 2 items has a picture.*image.encoder=none"):
        image(tiny.catalogue(["a", "b"]))


def test_pictures_that_all_look_the_same_are_refused(tmp_path):
    tiny.drawing("circle", (200, 0, 0), 0).save(tmp_path / "same.png")
    with pytest.raises(DataError, match=r"all 3 pictures look the same"):
        image(tiny.catalogue(["a", "b", "c"], tmp_path, image_path=pa.array(["same.png"] * 3)))


def test_pictures_come_back_in_order_and_missing_ones_are_told():
    class Double:
        def prepare(self, inputs):
            return [2 * value for value in inputs]

        def encode(self, batch):
            sizes.append(len(batch))
            return np.array(batch, np.float32)[:, None]

    sizes = []
    found, present = encode_pictures(Double(), list(range(10)), lambda n: None if n in (1, 4) else n, 3)
    assert found[:, 0].tolist() == [0, 4, 6, 10, 12, 14, 16, 18]
    assert sizes == [2, 2, 3, 1] and np.flatnonzero(~present).tolist() == [1, 4]


def test_reading_ahead_is_bounded_and_stops_at_the_first_error(monkeypatch):
    monkeypatch.setenv("LLMREC_NUM_THREADS", "3")
    started, lock = [], threading.Lock()

    def work(number):
        with lock:
            started.append(number)
        if number == 5:
            raise DataError("five")
        return number

    found = []
    with pytest.raises(DataError, match=r"five"):
        for value in map_ahead(work, list(range(1000)), ahead=4):
            found.append(value)
    assert found == [0, 1, 2, 3, 4] and max(started) <= 10


def test_no_more_is_begun_than_asked_for():
    begun = []

    def sources():
        for number in range(100):
            begun.append(number)
            yield number

    found = map_ahead(str, sources(), ahead=4)
    assert next(found) == "0" and len(begun) == 5
    assert next(found) == "1" and len(begun) == 6
    found.close()


# The whole stage


def test_two_modalities_are_saved_and_loaded_as_made(tmp_path, caplog):
    caplog.set_level(logging.INFO, "llmrec")
    data = illustrated(tmp_path / "images", without=(1,))
    small = EncodeItemsConfig(text=TextEncoderConfig(dim=4), image=ImageEncoderConfig(dim=3))
    made = encode_items(small, data)
    (tmp_path / "out").mkdir()
    made.save(tmp_path / "out")
    loaded = ContentEmbeddings.load(tmp_path / "out")
    assert loaded.catalog == data.catalog and loaded.encoders == made.encoders
    for modality in ("text", "image"):
        assert loaded.vectors[modality].dtype == np.float32
        assert np.array_equal(loaded.vectors[modality], made.vectors[modality])
        assert np.array_equal(loaded.missing[modality], made.missing[modality])
    assert "image by classical, width 3, 1 of 8 items have none" in caplog.text


def test_modalities_that_are_off_are_left_out():
    made = encode_items(EncodeItemsConfig(text=NO_TEXT, image=NO_IMAGE), worlds.cycle())
    assert made.vectors == made.missing == made.encoders == {}


@pytest.mark.parametrize("block", [2, 3, 100])
def test_vectors_are_scaled_in_every_block(monkeypatch, block):
    monkeypatch.setattr("llmrec.encoders.encoder.BLOCK_ROWS", block)
    vectors, present = np.arange(1, 11, dtype=np.float32).reshape(5, 2), np.array([1, 1, 0, 1, 1, 1], bool)
    names = [str(item) for item in range(6)]
    rows, _ = finish(vectors, present, normalise=True, missing="mean", what="text", raw_ids=names)
    expected = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    np.testing.assert_allclose(rows[1:][present], expected, rtol=1e-6)
    np.testing.assert_allclose(rows[3], expected.mean(axis=0), rtol=1e-6)


def test_vectors_from_a_file_are_checked_filled_and_scaled(tmp_path):
    data = tiny.catalogue(["a", "b", "c"])
    table = {"item_id": ["i3", "i1", "i2"], "vector": [[3.0, 4.0], [0.0, 2.0], None]}
    pq.write_table(pa.table(table), tmp_path / "v.parquet")
    made = encode_items(
        EncodeItemsConfig(
            text=TextEncoderConfig(encoder="precomputed", path=str(tmp_path / "v.parquet")),
            image=ImageEncoderConfig(
                encoder="precomputed", path=str(tmp_path / "v.parquet"), normalise=True, missing="zero"
            ),
        ),
        data,
    )
    np.testing.assert_allclose(made.vectors["text"], [[0, 0], [0, 2], [1.5, 3], [3, 4]])
    np.testing.assert_allclose(made.vectors["image"], [[0, 0], [0, 1], [0, 0], [0.6, 0.8]])
    assert made.missing["text"].tolist() == [False, False, True, False]
    pq.write_table(pa.table({"item_id": ["i1"], "vector": [[1.0]]}), tmp_path / "v.parquet")
    with pytest.raises(ArtifactMismatchError, match=r"encode_items.text: .*no row for 2 of 3 items"):
        text(data, encoder="precomputed", path=str(tmp_path / "v.parquet"))


@pytest.mark.real_data
def test_real_posters_are_encoded_and_the_absent_ones_counted(real_data):
    items = (real_data / "ml-1m" / "items.csv").read_text(encoding="utf-8").splitlines()[1:301]
    names = [line.rsplit(",", 1)[1] or None for line in items]
    data = tiny.catalogue([line.split(",", 1)[1] for line in items], real_data / "ml-1m", image_path=names)
    vectors, missing, about = image(data, dim=32)
    assert vectors.shape == (301, 32) and missing.sum() == names.count(None) == about["num_missing"] > 0
