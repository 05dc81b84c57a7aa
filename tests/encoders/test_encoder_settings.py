"""Settings of encode_items: contradictions are refused by name, and help needs no heavy import."""

import subprocess
import sys

import pytest

from llmrec.assignments import describe, override
from llmrec.config import as_dict, from_dict
from llmrec.encoders.config import IMAGE_FIELDS, TEXT_FIELDS, EncodeItemsConfig
from llmrec.encoders.config import ImageEncoderConfig as Image
from llmrec.encoders.config import TextEncoderConfig as Text
from llmrec.errors import ConfigError

WRONG = [
    (Text, {"model": "x"}, "text.model must be left at None with encoder='tfidf'.*huggingface, openclip"),
    (Text, {"encoder": "huggingface"}, "text.model must be set with encoder='huggingface', got None"),
    (Text, {"encoder": "huggingface", "model": "x", "dim": 64}, "text.dim must be left at 128.*tfidf"),
    (Text, {"encoder": "precomputed"}, "text.path must be set"),
    (Text, {"encoder": "openclip", "model": "ViT-B-32"}, "text.pretrained must be set"),
    (
        Text,
        {"encoder": "openclip", "model": "hf-hub:a/b", "pretrained": "x"},
        "pretrained must be none, since the model brings its weights",
    ),
    (Text, {"encoder": "word2vec"}, "encoder='word2vec': expected one of tfidf, huggingface"),
    (Text, {"dim": 0}, "text.dim must be >= 1, got 0"),
    (Text, {"seed": -1}, "text.seed must be >= 0, got -1"),
    (Text, {"encoder": "huggingface", "model": "x", "max_tokens": 0}, "max_tokens must be >= 1 token, got 0"),
    (Text, {"encoder": "huggingface", "model": "x", "batch_size": 0}, "batch_size must be >= 1, got 0"),
    (Text, {"columns": ("title",), "template": "{title}"}, "text.columns must be none"),
    (Text, {"columns": ()}, "columns must be different column names"),
    (Text, {"columns": ("title", "title")}, "columns must be different column names"),
    (Text, {"template": "title"}, "template must hold a column name in braces, got 'title'"),
    (Image, {"model": "x"}, "image.model must be left at None with encoder='classical'"),
    (Image, {"encoder": "precomputed", "path": "x", "max_pixels": 5}, "image.max_pixels must be left"),
    (Image, {"max_pixels": 10**9}, "image.max_pixels must be 1 to 89478485"),
    (Image, {"encoder": "huggingface", "model": "x", "seed": 1}, "image.seed must be left at 0"),
]


@pytest.mark.parametrize(("kind", "settings", "message"), WRONG)
def test_a_contradiction_is_refused_by_name(kind, settings, message):
    with pytest.raises(ConfigError, match=f"^encode_items.*{message}"):
        kind(**settings)


def test_every_field_takes_effect_with_some_encoder():
    for kind, effective in ((Text, TEXT_FIELDS), (Image, IMAGE_FIELDS)):
        fields = set(kind.__dataclass_fields__) - {"encoder"}
        assert set().union(*effective.values()) == fields


def test_settings_can_be_overridden_stored_and_shown():
    config = override(EncodeItemsConfig(), {"image.encoder": "none", "text.columns": "title,brand"})
    assert config.image.encoder == "none" and config.text.columns == ("title", "brand")
    assert from_dict(EncodeItemsConfig, as_dict(config)) == config
    shown = {path: meaning for path, _, _, meaning in describe(EncodeItemsConfig)}
    assert len(shown) == 31 and all(shown.values())


def test_one_setting_takes_a_modality_out_of_a_recipe():
    config = EncodeItemsConfig(image=Image(encoder="huggingface", model="x", batch_size=8))
    assert override(config, {"image.encoder": "none"}).image.encoder == "none"


def test_files_and_models_belong_to_the_stage_unless_their_modality_is_off():
    clip = {"encoder": "openclip", "model": "ViT-B-32", "pretrained": "weights.safetensors"}
    config = EncodeItemsConfig(text=Text(encoder="precomputed", path="x.parquet"), image=Image(**clip))
    assert config.source_files() == {"text.path": "x.parquet", "image.pretrained": "weights.safetensors"}
    assert override(config, {"image.pretrained": "openai"}).source_files() == {"text.path": "x.parquet"}
    assert config.model_folders() == {"image.model": "ViT-B-32"}
    assert set(config.incidental_fields()) == {"text.batch_size", "image.batch_size"}
    off = override(config, {"text.encoder": "none", "image.encoder": "none"})
    assert off.source_files() == off.model_folders() == {}


def test_settings_import_nothing_heavy():
    code = "import sys, llmrec.encoders.config; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not {"torch", "transformers", "sklearn", "numpy"} & set(loaded.split())
