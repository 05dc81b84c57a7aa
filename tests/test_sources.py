"""Files of the users' that a stage reads besides its inputs: what was made from others is not used again."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file
from tiny_recipe import tiny

from llmrec.collab.config import TrainCollabConfig
from llmrec.config import as_dict
from llmrec.data.config import PrepareDataConfig
from llmrec.encoders.config import EncodeItemsConfig, ImageEncoderConfig, TextEncoderConfig
from llmrec.errors import DataError, StaleArtifactError
from llmrec.finetune.config import FinetuneConfig
from llmrec.folder_digest import folder_digest, model_digest, weights_digest
from llmrec.interactions import Interactions
from llmrec.pipeline import RunDir, run
from llmrec.stage_changes import changes_of, source_hashes
from llmrec.stages import STAGES

IDS = [f"i{number}" for number in range(8)]


@pytest.fixture
def shop(tmp_path: Path) -> RunDir:
    """Interactions with eight items, of which six have a picture; and where a run goes."""
    rng = np.random.default_rng(0)
    rows = [
        f"u{user},{item},{time}\n" for user in range(12) for time, item in enumerate(rng.permutation(IDS))
    ]
    (tmp_path / "log.csv").write_text("user_id,item_id,timestamp\n" + "".join(rows))
    (tmp_path / "items.csv").write_text(
        "item_id,title,image\n" + "".join(f"{item},Thing {item},{item}.png\n" for item in IDS)
    )
    for number, item in enumerate(IDS[:6]):
        draw(tmp_path / f"{item}.png", number)
    return RunDir(tmp_path / "run")


def draw(path: Path, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((16 + seed, 16)).save(path)


def prepared(run: RunDir) -> Interactions:
    folder = run.root.parent
    table = {"interactions": str(folder / "log.csv"), "items": str(folder / "items.csv")}
    config = PrepareDataConfig(source="table", image_column="image", **table)
    return run.stage(STAGES["prepare_data"], config)


def test_other_pictures_are_noticed_and_absent_ones_let_be(shop):
    data = prepared(shop)
    config = EncodeItemsConfig(text=TextEncoderConfig(encoder="none"), image=ImageEncoderConfig(dim=4))
    made = shop.stage(STAGES["encode_items"], config, data)
    assert made.missing["image"].sum() == 2
    assert shop.stage(STAGES["encode_items"], config, data).vectors["image"].shape == (9, 4)
    first = shop.root.parent / "i0.png"
    before = first.read_bytes()
    draw(first, 9)
    with pytest.raises(StaleArtifactError, match="encode_items was made with other pictures"):
        shop.stage(STAGES["encode_items"], config, data)
    first.write_bytes(before)
    assert np.array_equal(
        shop.stage(STAGES["encode_items"], config, data).vectors["image"], made.vectors["image"]
    )
    first.unlink()
    shop.stage(STAGES["encode_items"], config, data)


def test_texts_alone_do_not_ask_for_pictures(shop):
    data = prepared(shop)
    config = EncodeItemsConfig(text=TextEncoderConfig(dim=4), image=ImageEncoderConfig(encoder="none"))
    shop.stage(STAGES["encode_items"], config, data)
    draw(shop.root.parent / "i0.png", 9)
    shop.stage(STAGES["encode_items"], config, data)


def test_other_ids_beside_ready_made_vectors_are_noticed(shop):
    folder = shop.root.parent
    vectors = np.zeros((9, 4), np.float32)
    vectors[1:] = np.random.default_rng(0).normal(size=(8, 4))
    save_file({"vectors": vectors}, folder / "v.safetensors")
    (folder / "v.ids.json").write_text(json.dumps(IDS))
    data = prepared(shop)
    config = TrainCollabConfig(provider="precomputed", vectors=str(folder / "v.safetensors"))
    shop.stage(STAGES["train_collab"], config, data)
    shop.stage(STAGES["train_collab"], config, data)
    (folder / "v.ids.json").write_text(json.dumps(IDS[::-1]))
    with pytest.raises(StaleArtifactError, match="other content of the vectors ids file"):
        shop.stage(STAGES["train_collab"], config, data)
    encode = EncodeItemsConfig(
        text=TextEncoderConfig(encoder="precomputed", path=str(folder / "v.safetensors")),
        image=ImageEncoderConfig(encoder="none"),
    )
    assert list(source_hashes(encode)) == ["text.path", "text.path ids"]


def test_ids_that_appear_beside_ready_made_vectors_are_noticed(shop):
    """They say which row is whose, and were not there to say it."""
    folder = shop.root.parent
    vectors = np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32)
    vectors[0] = 0
    save_file({"vectors": vectors}, folder / "v.safetensors")
    data = prepared(shop)
    assert data.raw_ids == IDS
    config = TrainCollabConfig(provider="precomputed", vectors=str(folder / "v.safetensors"))
    (folder / "v.ids.json").write_text(json.dumps(IDS))
    manifest = {"config": as_dict(config), "sources": {"vectors": source_hashes(config)["vectors"]}}
    changes = changes_of(manifest, config, source_hashes(config))
    assert changes == ["no vectors ids, which are there now"]


def test_another_picture_of_the_same_size_is_noticed(shop):
    folder = shop.root.parent
    for seed, name in enumerate(IDS[:6]):
        pixels = np.random.default_rng(seed).integers(0, 255, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png", format="BMP")
    data = prepared(shop)
    config = EncodeItemsConfig(text=TextEncoderConfig(encoder="none"), image=ImageEncoderConfig(dim=4))
    shop.stage(STAGES["encode_items"], config, data)
    shop.stage(STAGES["encode_items"], config, data)
    size = (folder / "i0.png").stat().st_size
    (folder / "i0.png").write_bytes((folder / "i1.png").read_bytes())
    assert (folder / "i0.png").stat().st_size == size
    with pytest.raises(StaleArtifactError, match="other pictures"):
        shop.stage(STAGES["encode_items"], config, data)


def test_other_files_in_a_folder_in_the_form_of_the_hub_are_noticed(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "a.csv").write_text("user_id,item_id,timestamp\na,1,1\n")
    config = PrepareDataConfig(source="table", interactions=f"hub:{folder}::train")
    manifest = {"config": as_dict(config), "sources": source_hashes(config)}
    assert list(manifest["sources"]) == ["interactions"]
    (folder / "a.csv").write_text("user_id,item_id,timestamp\na,2,1\n")
    changes = changes_of(manifest, config, source_hashes(config))
    assert changes == ["other files in the interactions folder"]
    manifest["sources"] = source_hashes(config)
    other = PrepareDataConfig(source="table", interactions=f"hub:{folder}::test")
    (change,) = changes_of(manifest, other, source_hashes(other))
    assert change.startswith("interactions=") and "::test" in change


def test_digests_that_were_made_otherwise_are_not_compared():
    """A picture's bytes were not looked at once; its name and size say nothing of them."""
    config = FinetuneConfig()
    manifest = {"config": as_dict(config), "sources": {"pictures": "0123"}}
    assert not changes_of(manifest, config, {"pictures": "ends:4567"})
    assert changes_of(manifest, config, {"pictures": "4567"}) == ["other pictures"]


def test_the_built_in_base_is_no_folder_of_its_name(tmp_path, monkeypatch):
    model_folder(tmp_path / "mini", 0)
    monkeypatch.chdir(tmp_path)
    assert not source_hashes(FinetuneConfig())


def test_the_text_of_a_prompt_of_ones_own_is_part_of_what_was_tuned(tmp_path):
    prompt = tmp_path / "mine.toml"
    prompt.write_text('source = "me"\ntext = "user likes {history} next"\n')
    config = FinetuneConfig(prompt=str(prompt))
    before = source_hashes(config)
    assert list(before) == ["prompt"]
    prompt.write_text('source = "me"\ntext = "and then {history} next"\n')
    assert source_hashes(config) != before
    assert source_hashes(FinetuneConfig()) == {}


def test_files_that_have_moved_are_the_same_files(shop, tmp_path):
    data = prepared(shop)
    other = tmp_path / "elsewhere"
    other.mkdir()
    for name in ("log.csv", "items.csv", *(f"{item}.png" for item in IDS[:6])):
        (tmp_path / name).rename(other / name)
    table = {"interactions": str(other / "log.csv"), "items": str(other / "items.csv")}
    config = PrepareDataConfig(source="table", image_column="image", **table)
    again = shop.stage(STAGES["prepare_data"], config)
    assert np.array_equal(again.item, data.item)
    with (other / "log.csv").open("a") as log:
        log.write("u0,i0,99\n")
    with pytest.raises(StaleArtifactError, match="other content of the interactions file"):
        shop.stage(STAGES["prepare_data"], config)


def test_data_without_a_picture_or_text_are_told_before_anything_is_trained(shop):
    for picture in shop.root.parent.glob("*.png"):
        picture.unlink()
    table = {"interactions": str(shop.root.parent / "log.csv"), "items": str(shop.root.parent / "items.csv")}
    data = PrepareDataConfig(source="table", image_column="image", **table)
    recipe = dataclasses.replace(tiny(), prepare_data=data)
    with pytest.raises(
        DataError, match=r"image.encoder=classical: none of the 8 items has a picture that is"
    ):
        run(recipe, shop)
    assert [path.name for path in shop.root.iterdir()] == ["prepare_data"]
    untitled = dataclasses.replace(prepared(shop), items=prepared(shop).items.drop_columns("title"))
    with pytest.raises(DataError, match=r"text.encoder=tfidf: none of the 8 items has a text"):
        EncodeItemsConfig(image=ImageEncoderConfig(encoder="none")).check_data(untitled)


def model_folder(path: Path, seed: int) -> Path:
    """Settings, and weights of some 6 MB, of which samples are read."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({"hidden_size": 4}))
    rng = np.random.default_rng(seed)
    tensors = {"weight": rng.normal(size=(1200, 1200)), "bias": rng.normal(size=1200)}
    save_file({name: value.astype(np.float32) for name, value in tensors.items()}, path / "model.safetensors")
    return path


def test_a_model_is_known_by_its_settings_and_weights(tmp_path):
    first = model_folder(tmp_path / "first", 0)
    known = model_digest(first)
    assert model_digest(model_folder(tmp_path / "elsewhere" / "same", 0)) == known
    assert model_digest(model_folder(tmp_path / "other", 1)) != known
    for name, place in (("config.json", -3), ("model.safetensors", -1)):
        content = bytearray((first / name).read_bytes())
        content[place] ^= 1
        changed = model_folder(tmp_path / f"changed {name}", 0)
        (changed / name).write_bytes(content)
        assert model_digest(changed) != known and weights_digest(changed) != weights_digest(first)


def test_a_model_is_the_same_whatever_lies_beside_it_and_however_it_was_cut(tmp_path):
    folder = model_folder(tmp_path / "model", 0)
    known, weights = model_digest(folder), weights_digest(folder)
    for name in (
        "README.md",
        "LICENSE",
        "USE_POLICY.txt",
        "generation_config.json",
        ".cache/lock",
        "original/params.json",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("About it.")
    config = json.loads((folder / "config.json").read_text()) | {"transformers_version": "9.9"}
    (folder / "config.json").write_text(json.dumps(config, indent=4))
    assert model_digest(folder) == known
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_file({"bias": tensors["bias"]}, folder / "model-00002-of-00002.safetensors")
    save_file(
        {"weight": tensors["weight"]}, folder / "model-00001-of-00002.safetensors", metadata={"format": "pt"}
    )
    assert model_digest(folder) == known
    (folder / "tokenizer.json").write_text("{}")
    assert model_digest(folder) != known and weights_digest(folder) == weights


@pytest.mark.parametrize(
    "name",
    [
        *("tokenizer.json", "tokenizer_config.json", "vocab.txt", "merges.txt", "special_tokens_map.json"),
        *("added_tokens.json", "spiece.model", "preprocessor_config.json", "processor_config.json"),
        *("open_clip_config.json", "adapter_config.json"),
    ],
)
def test_files_that_change_what_comes_of_a_text_or_a_picture_are_part_of_a_model(name, tmp_path):
    seen = {model_digest(tmp_path)}
    for content in ("{}", "[]"):
        (tmp_path / name).write_text(content)
        seen.add(model_digest(tmp_path))
    assert len(seen) == 3


def test_weights_of_other_names_forms_and_kinds_are_others(tmp_path):
    zeros = np.zeros((2, 3), np.float32)
    seen = set()
    for tensors in ({"a": zeros}, {"b": zeros}, {"a": zeros.T.copy()}, {"a": zeros.astype(np.int32)}):
        save_file(tensors, tmp_path / "model.safetensors")
        seen.add(weights_digest(tmp_path))
    for content in (b"one", b"two"):
        (tmp_path / "pytorch_model.bin").write_bytes(content)
        seen.add(weights_digest(tmp_path))
    assert len(seen) == 6


def test_a_folder_of_data_is_known_by_all_its_files_but_hidden_ones(tmp_path):
    first, last = tmp_path / "train" / "0.csv", tmp_path / "train" / "1.csv"
    first.parent.mkdir()
    first.write_text("one")
    known = folder_digest(tmp_path)
    for hidden in (".gitattributes", ".cache/lock", "train/.0.csv.swp"):
        (tmp_path / hidden).parent.mkdir(exist_ok=True)
        (tmp_path / hidden).write_text("")
        assert folder_digest(tmp_path) == known
    seen = {known, folder_digest(first.rename(last).parents[1])}
    last.write_text("two")
    seen.add(folder_digest(tmp_path))
    last.unlink()
    assert len(seen | {folder_digest(tmp_path)}) == 4


@pytest.mark.parametrize(
    ("settings", "setting"),
    [
        (lambda path: FinetuneConfig(base_model=path), "base_model"),
        (
            lambda path: EncodeItemsConfig(text=TextEncoderConfig(encoder="huggingface", model=path)),
            "text.model",
        ),
        (
            lambda path: EncodeItemsConfig(text=TextEncoderConfig(encoder="llm2clip", adapter=path)),
            "text.adapter",
        ),
        (
            lambda path: EncodeItemsConfig(
                image=ImageEncoderConfig(encoder="openclip", model=f"local-dir:{path}")
            ),
            "image.model",
        ),
    ],
)
def test_other_weights_in_a_local_folder_are_noticed_and_a_moved_folder_is_not(tmp_path, settings, setting):
    folder = model_folder(tmp_path / "model", 0)
    config = settings(str(folder))
    manifest = {"config": as_dict(config), "sources": source_hashes(config)}
    assert list(manifest["sources"]) == [setting]
    assert not changes_of(manifest, config, source_hashes(config))
    moved = settings(str(folder.rename(tmp_path / "moved")))
    assert not changes_of(manifest, moved, source_hashes(moved))
    model_folder(tmp_path / "model", 1)
    assert changes_of(manifest, config, source_hashes(config)) == [f"other files in the {setting} folder"]
    assert not source_hashes(settings("somebody/a-model"))
