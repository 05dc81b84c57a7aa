"""Encoding that is stopped goes on, and processes share it, with equal vectors."""

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import tiny
from PIL import Image
from safetensors.numpy import load_file, save_file

from llmrec import running
from llmrec.encoders import cache as module
from llmrec.encoders.cache import VectorCache
from llmrec.encoders.config import EncodeItemsConfig, ImageEncoderConfig, TextEncoderConfig
from llmrec.encoders.encode import encode_image, encode_items, encode_text
from llmrec.encoders.encoder import encode_pictures, encode_texts, finish, is_to_do
from llmrec.errors import DataError
from llmrec.files import read_json
from llmrec.pipeline import run_stage

KEYS = [f"{number:064x}" for number in range(10)]


def test_vectors_survive_the_disk_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PART_ROWS", 4)
    rows = np.random.default_rng(0).normal(size=(10, 3)).astype(np.float32)
    made = VectorCache(tmp_path, {"model": "a"})
    made.add(KEYS[:5], rows[:5])
    made.add(KEYS[5:7], rows[5:7])
    assert len(list(made.folder.glob("*.safetensors"))) == 1
    assert len(VectorCache(tmp_path, {"model": "a"})) == 5  # two rows wait for their part
    made.flush()
    again = VectorCache(tmp_path, {"model": "a"})
    assert np.array_equal(again.take([KEYS[6], KEYS[0]]), rows[[6, 0]]) and KEYS[7] not in again
    assert len(VectorCache(tmp_path, {"model": "b"})) == 0


def test_a_part_is_written_when_it_is_old_and_its_writer_does_not_read_it(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    made = VectorCache(tmp_path, {})
    for clock[0], parts in ((1.0, 0), (module.PART_SECONDS + 1, 1), (module.PART_SECONDS + 2, 1)):
        made.add([KEYS[int(clock[0]) % 10]], np.ones((1, 3), np.float32))
        assert len(list(tmp_path.rglob("part-*"))) == parts
    made.read()
    assert len(made.tables) == 3


def test_a_damaged_part_is_made_again(tmp_path, caplog):
    made = VectorCache(tmp_path, {})
    made.add(KEYS[:2], np.ones((2, 3), np.float32))
    made.flush()
    (part,) = made.folder.glob("*.safetensors")
    part.write_bytes(part.read_bytes()[:-3])
    assert len(VectorCache(tmp_path, {})) == 0 and "is damaged and left aside" in caplog.text


class Stops:
    """An encoder that dies at some batch."""

    def __init__(self, at):
        self.at, self.batches = at, []

    def prepare(self, inputs):
        return inputs

    def encode(self, batch):
        self.batches.append(list(batch))
        if len(self.batches) == self.at:
            raise KeyboardInterrupt
        return np.array([[len(str(one)), len(batch)] for one in batch], np.float32)


def test_every_batch_is_one_process_s_alone(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    shares = []
    for rank in ("0", "1", "2"):
        monkeypatch.setenv("RANK", rank)
        shares.append([n for n in range(7) if is_to_do(n, KEYS[:2], VectorCache(None, {}))])
    assert shares == [[0, 3, 6], [1, 4], [2, 5]]


def test_texts_go_on_with_the_same_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PART_ROWS", 1)
    texts = ["bb", "a", "cccc", "d", "eee", "bb"]
    whole = Stops(at=99)
    expected = encode_texts(whole, texts, 2)
    assert whole.batches == [["cccc", "eee"], ["bb", "a"], ["d"]]  # equal texts once
    with pytest.raises(KeyboardInterrupt):
        encode_texts(Stops(at=2), texts, 2, VectorCache(tmp_path, {}))
    rest = Stops(at=99)
    assert np.array_equal(encode_texts(rest, texts, 2, VectorCache(tmp_path, {})), expected)
    assert rest.batches == whole.batches[1:]


def test_pictures_go_on_and_broken_ones_are_remembered(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PART_ROWS", 1)
    reads = []

    def read(number):
        reads.append(number)
        return None if number == 3 else number

    def run(encoder):
        cache = VectorCache(tmp_path, {})
        return encode_pictures(encoder, list(range(7)), read, 2, cache, lambda number: KEYS[number])

    with pytest.raises(KeyboardInterrupt):
        run(Stops(at=4))
    first, present = run(Stops(at=99))
    assert np.flatnonzero(~present).tolist() == [3] and len(first) == 6
    reads.clear()
    again, present = run(Stops(at=1))
    assert reads == [] and np.array_equal(again, first) and not present[3]


def test_equal_pictures_are_encoded_once(tmp_path):
    encoder = Stops(at=99)
    keys = [KEYS[number % 2] for number in range(7)]
    cache = VectorCache(tmp_path, {})
    vectors, present = encode_pictures(encoder, list(range(7)), str, 3, cache, lambda number: keys[number])
    assert encoder.batches == [["0", "1"]] or encoder.batches == [["6", "5"]]
    assert present.all() and len(vectors) == 7
    assert len(cache) == 0 and len(VectorCache(tmp_path, {})) == 2, "handed over, and kept on disk alone"


class Overflows(Stops):
    """An encoder whose numbers are too large for its format at some pictures."""

    def encode(self, batch):
        return np.array([[np.nan] * 2 if number % 3 == 0 else [1.0, number] for number in batch], np.float32)


@pytest.mark.parametrize("numbers", [range(1, 7), range(3, 4)])
def test_an_encoder_that_gives_no_numbers_is_told_from_a_picture_that_cannot_be_read(numbers):
    vectors, present = encode_pictures(Overflows(at=99), list(numbers), int, 2)
    assert present.all() and len(vectors) == len(numbers)
    with pytest.raises(DataError, match=r"gave NaN or infinity for \d items, the first is 'i3'; try dtype"):
        finish(
            vectors, present, normalise=False, missing="mean", what="image",
            raw_ids=[f"i{number}" for number in numbers],
        )  # fmt: skip


def unfinished(tmp_path, monkeypatch):
    """Stop-proof vectors of a run, each written at once."""
    monkeypatch.setattr(module, "PART_ROWS", 1)
    monkeypatch.setattr("llmrec.encoders.encode.resume_folder", lambda: tmp_path / "unfinished")


def test_vectors_of_another_fit_are_not_taken(tmp_path, monkeypatch):
    config = TextEncoderConfig(dim=4)
    other = [*tiny.TEXTS[:-1], "drill hammer soap soap"]
    expected = encode_text(config, tiny.catalogue(other))[0]
    unfinished(tmp_path, monkeypatch)
    encode_text(config, tiny.catalogue(tiny.TEXTS))
    assert np.array_equal(encode_text(config, tiny.catalogue(other))[0], expected)


def test_vectors_of_another_seed_are_not_taken(tmp_path, monkeypatch):
    """Of a width at which the randomised directions differ."""
    data = tiny.catalogue([" ".join(np.random.default_rng(n).permutation(tiny.WORDS)[:4]) for n in range(60)])
    config = TextEncoderConfig(dim=2)
    other = dataclasses.replace(config, seed=1)
    expected = encode_text(other, data)[0]
    unfinished(tmp_path, monkeypatch)
    assert not np.array_equal(encode_text(config, data)[0], expected)
    assert np.array_equal(encode_text(other, data)[0], expected)


def test_how_pictures_are_pooled_is_told_though_all_vectors_are_there(tmp_path, monkeypatch):
    names = tiny.pictures(tmp_path / "images", 3)
    data = tiny.catalogue(tiny.TEXTS[:3], tmp_path / "images", image_path=pa.array(names))
    config = ImageEncoderConfig(encoder="huggingface", model=tiny.segformer(tmp_path / "model"))
    unfinished(tmp_path, monkeypatch)
    first, again = (encode_image(config, data) for _ in range(2))
    assert first[2] == again[2] and first[2]["pooling"] == "mean"
    assert np.array_equal(first[0], again[0])


def test_vectors_of_other_weights_in_the_same_folder_are_not_taken(tmp_path, monkeypatch):
    folder = tiny.bert(tmp_path / "model")
    config = TextEncoderConfig(encoder="huggingface", model=folder)
    data = tiny.catalogue(tiny.TEXTS)
    unfinished(tmp_path, monkeypatch)
    before = encode_text(config, data)[0]
    file = Path(folder) / "model.safetensors"
    weights = {name: array[::-1].copy() for name, array in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    after = encode_text(config, data)[0]
    assert not np.allclose(before, after)
    shutil.rmtree(tmp_path / "unfinished")
    assert np.array_equal(encode_text(config, data)[0], after)


def test_what_to_do_with_broken_pictures_is_asked_again(tmp_path, monkeypatch):
    names = tiny.pictures(tmp_path / "images", 4)
    (tmp_path / "images" / names[1]).write_bytes(b"no picture")
    data = tiny.catalogue(tiny.TEXTS[:4], tmp_path / "images", image_path=pa.array(names))
    unfinished(tmp_path, monkeypatch)
    config = ImageEncoderConfig(encoder="classical", dim=2, on_error="missing")
    assert encode_image(config, data)[1].tolist() == [False, False, True, False, False]
    with pytest.raises(DataError, match="on_error=missing"):
        encode_image(dataclasses.replace(config, on_error="error"), data)


def settings(folder):
    return EncodeItemsConfig(
        text=TextEncoderConfig(encoder="huggingface", model=folder, batch_size=2),
        image=ImageEncoderConfig(encoder="none"),
    )


def test_a_stopped_stage_leaves_its_work_and_a_finished_one_nothing(tmp_path, monkeypatch):
    folder = tiny.bert(tmp_path / "model")
    data = tiny.catalogue(tiny.TEXTS)
    expected = encode_items(settings(folder), data)
    data.save(fresh(tmp_path / "data"))
    monkeypatch.setattr(module, "PART_ROWS", 1)
    from llmrec.encoders.huggingface import TextEncoder

    plain, calls = TextEncoder.encode, []

    def encode(self, batch):
        calls.append(len(batch))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return plain(self, batch)

    monkeypatch.setattr(TextEncoder, "encode", encode)
    monkeypatch.setattr("llmrec.stage_changes.fingerprint", lambda artifact: {})
    out = tmp_path / "run" / "encode_items"
    with pytest.raises(KeyboardInterrupt):
        run_stage(encode_items, settings(folder), (data,), out)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".encode_items.unfinished"]
    made = run_stage(encode_items, settings(folder), (data,), out)
    assert len(calls) == 3 + 2  # four batches, of which two were done
    assert np.array_equal(made.vectors["text"], expected.vectors["text"])
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["encode_items"]


def test_the_time_of_vectors_that_are_used_counts_whatever_else_is_set(tmp_path, monkeypatch):
    clock = [0.0]

    def encode(self, batch):
        clock[0] += 10.0
        if clock[0] == 30.0:
            raise KeyboardInterrupt
        return plain(self, batch)

    from llmrec.encoders.huggingface import TextEncoder

    plain = TextEncoder.encode
    monkeypatch.setattr(TextEncoder, "encode", encode)
    monkeypatch.setattr(module, "PART_ROWS", 1)
    monkeypatch.setattr(running.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr("llmrec.stage_changes.fingerprint", lambda artifact: {})
    config, data = settings(tiny.bert(tmp_path / "model")), tiny.catalogue(tiny.TEXTS)
    with pytest.raises(KeyboardInterrupt):
        run_stage(encode_items, config, (data,), tmp_path / "run")
    other = dataclasses.replace(config, text=dataclasses.replace(config.text, missing="zero"))
    run_stage(encode_items, other, (data,), tmp_path / "run")
    assert read_json(tmp_path / "run" / "manifest.json")["seconds"] == 30.0 + 20.0  # two of four batches


def test_another_limit_on_pictures_reads_them_again(tmp_path, monkeypatch):
    names = tiny.pictures(tmp_path / "images", 4)
    with Image.open(tmp_path / "images" / names[0]) as first:
        first.resize((200, 200)).save(tmp_path / "images" / names[0])
    data = tiny.catalogue(tiny.TEXTS[:4], tmp_path / "images", image_path=pa.array(names))
    monkeypatch.setattr("llmrec.encoders.encode.resume_folder", lambda: tmp_path / "unfinished")
    found = {
        limit: encode_image(
            ImageEncoderConfig(encoder="classical", dim=2, max_pixels=limit, on_error="missing"), data
        )[1]
        for limit in (200 * 200 - 1, 200 * 200)
    }
    assert [missing[1] for missing in found.values()] == [True, False]
    assert not any(missing[2:].any() for missing in found.values())


def fresh(folder: Path) -> Path:
    folder.mkdir()
    return folder


@pytest.mark.slow
def test_two_processes_share_the_work_and_give_equal_vectors(tmp_path):
    model, pictures = tiny.bert(tmp_path / "model"), tiny.clip(tmp_path / "clip")
    names = tiny.pictures(tmp_path / "images", len(tiny.TEXTS))
    script = tmp_path / "run.py"
    script.write_text(
        "import sys; from pathlib import Path\n"
        f"sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1])]!r}\n"
        "import pyarrow as pa, tiny, llmrec.pipeline as pipeline, llmrec.stage_changes\n"
        "from llmrec.encoders.config import *; from llmrec.encoders.encode import encode_items\n"
        "llmrec.stage_changes.fingerprint = lambda artifact: {}\n"
        f"root = Path({str(tmp_path / 'images')!r})\n"
        f"data = tiny.catalogue(tiny.TEXTS, root, image_path=pa.array({names!r}))\n"
        f"text = TextEncoderConfig(encoder='huggingface', model={model!r}, batch_size=2)\n"
        f"image = ImageEncoderConfig(encoder='huggingface', model={pictures!r}, batch_size=2)\n"
        "config = EncodeItemsConfig(text=text, image=image)\n"
        "pipeline.run_stage(encode_items, config, (data,), Path(sys.argv[1]))\n"
    )
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    for out, command in (
        ("one", [sys.executable]),
        (
            "two",
            [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--nproc_per_node",
                "2",
                "--master_port",
                "29713",
            ],
        ),
    ):
        subprocess.run([*command, str(script), str(tmp_path / out)], check=True, env=environment, timeout=300)
    for name in ("text.safetensors", "image.safetensors"):
        one, two = (load_file(tmp_path / out / name) for out in ("one", "two"))
        np.testing.assert_allclose(one["vectors"], two["vectors"], rtol=0, atol=1e-6)
        assert one["vectors"].any() and np.array_equal(one["missing"], two["missing"])
