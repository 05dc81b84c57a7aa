"""open_clip models as encoders, on a tiny random model built through open_clip's own config."""

import json

import numpy as np
import open_clip
import pyarrow as pa
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from llmrec.encoders.config import EncodeItemsConfig, ImageEncoderConfig, TextEncoderConfig
from llmrec.encoders.encode import encode_items, encode_text
from llmrec.errors import ConfigError

SHAPE = {
    "embed_dim": 10,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder that open_clip loads by local-dir:, and a model of the same shape known by name."""
    folder = tmp_path_factory.mktemp("openclip")
    (folder / "tiny-clip-for-tests.json").write_text(json.dumps(SHAPE))
    open_clip.add_model_config(folder / "tiny-clip-for-tests.json")
    torch.manual_seed(0)
    model = open_clip.create_model("tiny-clip-for-tests")
    with torch.no_grad():
        model.text_projection.normal_(0, 1)
        model.token_embedding.weight.normal_(0, 1)
    whole = folder / "whole"
    whole.mkdir()
    config = {"model_cfg": SHAPE, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    (whole / "open_clip_config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), whole / "open_clip_model.safetensors")
    return folder


def data(tmp_path):
    names = tiny.pictures(tmp_path / "images", len(tiny.TEXTS))
    return tiny.catalogue(tiny.TEXTS, tmp_path / "images", image_path=pa.array(names))


def test_both_sides_equal_a_plain_loop(folder, tmp_path):
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder / 'whole'}")
    tokenizer, items = open_clip.get_tokenizer(f"local-dir:{folder / 'whole'}"), data(tmp_path)
    settings = {"encoder": "openclip", "model": f"local-dir:{folder / 'whole'}", "batch_size": 3}
    made = encode_items(
        EncodeItemsConfig(text=TextEncoderConfig(**settings), image=ImageEncoderConfig(**settings)), items
    )
    kinds = [("circle", (210, 30, 30)), ("square", (30, 40, 200))]
    for item, text in enumerate(tiny.TEXTS, start=1):
        picture = tiny.drawing(*kinds[1 - item % 2], item - 1)
        with torch.no_grad():
            texts = model.eval().encode_text(tokenizer([text]))
            image = model.encode_image(transform(picture)[None])
        np.testing.assert_allclose(made.vectors["text"][item], texts[0].numpy(), atol=1e-5)
        np.testing.assert_allclose(made.vectors["image"][item], image[0].numpy(), atol=1e-5)
    assert made.encoders["text"]["max_tokens"] == 12 and made.encoders["image"]["width"] == 10
    json.dumps(made.encoders, allow_nan=False)


def test_a_named_model_takes_its_weights_from_a_file(folder, tmp_path):
    weights = folder / "whole" / "open_clip_model.safetensors"
    named = {"encoder": "openclip", "model": "tiny-clip-for-tests", "pretrained": str(weights)}
    whole = {"encoder": "openclip", "model": f"local-dir:{folder / 'whole'}"}
    none = ImageEncoderConfig(encoder="none")
    first, second = (
        encode_items(EncodeItemsConfig(text=TextEncoderConfig(**settings), image=none), data(tmp_path))
        for settings in (named, whole)
    )
    assert np.array_equal(first.vectors["text"], second.vectors["text"])
    assert first.encoders["text"]["pretrained"] == str(weights)


def test_vectors_of_other_weights_in_the_same_file_are_not_taken(folder, tmp_path, monkeypatch):
    file = tmp_path / "weights.safetensors"
    weights = load_file(folder / "whole" / "open_clip_model.safetensors")
    config = TextEncoderConfig(encoder="openclip", model="tiny-clip-for-tests", pretrained=str(file))
    monkeypatch.setattr("llmrec.encoders.encode.resume_folder", lambda: tmp_path / "unfinished")
    save_file(weights, file)
    before = encode_text(config, tiny.catalogue(tiny.TEXTS))[0]
    save_file(weights | {"text_projection": -weights["text_projection"]}, file)
    assert np.array_equal(encode_text(config, tiny.catalogue(tiny.TEXTS))[0], -before)


def wrong(folder, tmp_path):
    """Settings that open_clip cannot load, by what the message must say."""
    (tmp_path / "weights.bin").write_bytes(b"x")
    (tmp_path / "weights.safetensors").write_bytes(b"x")
    return {
        "did you mean ViT-B-32": ("ViT-B-33", "openai"),
        "one of openai, .*for ViT-B-32, got 'nothing'": ("ViT-B-32", "nothing"),
        "must be a .safetensors file that exists": ("ViT-B-32", str(tmp_path / "weights.bin")),
        "cannot load model='tiny-clip-for-tests'": (
            "tiny-clip-for-tests",
            str(tmp_path / "weights.safetensors"),
        ),
        "cannot load model='hf-hub:nobody/nothing'": ("hf-hub:nobody/nothing", None),
        "must be a folder with .safetensors weights": (f"local-dir:{tmp_path}/absent", None),
    }


def test_what_cannot_be_loaded_is_said_in_one_line(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for message, (model, pretrained) in wrong(folder, tmp_path).items():
        config = TextEncoderConfig(encoder="openclip", model=model, pretrained=pretrained)
        none = ImageEncoderConfig(encoder="none")
        with pytest.raises(ConfigError, match=message) as caught:
            encode_items(EncodeItemsConfig(text=config, image=none), tiny.catalogue(tiny.TEXTS))
        assert "\n" not in str(caught.value)
