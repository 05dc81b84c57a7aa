"""transformers models as encoders: equal to one text or picture at a time, by plain calls."""

import json
import logging
import shutil

import numpy as np
import pyarrow as pa
import pytest
import tiny
import torch
import transformers
from huggingface_hub import constants
from safetensors.numpy import load_file, save_file
from transformers.utils import logging as transformers_logging

from llmrec import distributed
from llmrec.encoders import huggingface
from llmrec.encoders.config import EncodeItemsConfig, ImageEncoderConfig, TextEncoderConfig
from llmrec.encoders.encode import encode_items
from llmrec.encoders.encoder import encode_texts
from llmrec.encoders.huggingface import ImageEncoder, TextEncoder
from llmrec.encoders.loading import quiet
from llmrec.errors import ConfigError, DataError

NO_IMAGE = ImageEncoderConfig(encoder="none")
TEXT_MODELS = {"bert": tiny.bert, "roberta": tiny.roberta, "llama": tiny.llama, "t5": tiny.t5}


def encode(model, texts=tiny.TEXTS, **settings):
    config = TextEncoderConfig(encoder="huggingface", model=model, **settings)
    made = encode_items(EncodeItemsConfig(text=config, image=NO_IMAGE), tiny.catalogue(texts))
    return made.vectors["text"], made.encoders["text"]


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
@pytest.mark.parametrize("kind", TEXT_MODELS)
def test_pooling_equals_a_plain_loop_over_single_texts(tmp_path, kind, pooling):
    folder = TEXT_MODELS[kind](tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    model = model.get_encoder() if model.config.is_encoder_decoder else model
    expected = []
    for text in tiny.TEXTS:
        with torch.no_grad():
            hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        expected.append({"mean": hidden.mean(0), "cls": hidden[0], "last": hidden[-1]}[pooling].numpy())
    vectors, about = encode(folder, pooling=pooling)
    assert vectors.shape == (len(tiny.TEXTS) + 1, 16) and not vectors[0].any()
    np.testing.assert_allclose(vectors[1:], expected, atol=2e-6)
    assert about["pooling"] == pooling and about["dtype"] == "float32" and about["revision"] is None


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_batch_size_and_item_order_do_not_change_vectors(tmp_path, batch_size):
    folder = tiny.roberta(tmp_path)
    reference, _ = encode(folder)
    order = np.random.default_rng(0).permutation(len(tiny.TEXTS))
    shuffled, _ = encode(folder, [tiny.TEXTS[index] for index in order], batch_size=batch_size)
    np.testing.assert_allclose(shuffled[1:], reference[1:][order], atol=2e-6)


def test_same_settings_give_equal_bytes(tmp_path):
    folder = tiny.bert(tmp_path)
    assert encode(folder)[0].tobytes() == encode(folder)[0].tobytes()


def test_long_texts_are_cut_at_max_tokens(tmp_path):
    folder = tiny.bert(tmp_path)
    vectors, about = encode(folder, ["red lip gloss stick", "red lip soap oil"], max_tokens=4)
    assert about["max_tokens"] == 4
    np.testing.assert_allclose(vectors[1], vectors[2], atol=1e-6)
    assert not np.allclose(*encode(folder, ["red lip gloss stick", "red lip soap oil"])[0][1:], atol=1e-3)


@pytest.mark.parametrize(("kind", "limit"), [("bert", 24), ("roberta", 20), ("llama", 64)])
def test_texts_longer_than_the_model_takes_are_cut_to_its_limit(tmp_path, kind, limit):
    folder = TEXT_MODELS[kind](tmp_path)
    vectors, about = encode(folder, ["red " * 100, "blue"])
    assert about["max_tokens"] == limit and np.isfinite(vectors).all()
    with pytest.raises(ConfigError, match=f"max_tokens must be at most {limit}"):
        encode(folder, max_tokens=limit + 1)


def test_normalised_vectors_have_length_one(tmp_path):
    vectors, about = encode(tiny.bert(tmp_path), normalise=True)
    np.testing.assert_allclose(np.linalg.norm(vectors[1:], axis=1), 1, atol=1e-6)
    assert about["normalised"] is True


def test_lower_precision_is_close_and_recorded(tmp_path):
    folder = tiny.bert(tmp_path)
    exact, _ = encode(folder)
    rough, about = encode(folder, dtype="bfloat16")
    assert about["dtype"] == "bfloat16" and rough.dtype == np.float32
    cosine = (exact[1:] * rough[1:]).sum(1) / np.linalg.norm(exact[1:], axis=1)
    assert (cosine / np.linalg.norm(rough[1:], axis=1) > 0.99).all()
    assert not np.array_equal(exact, rough)


def test_clip_uses_its_own_heads(tmp_path):
    folder = tiny.clip(tmp_path)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    names = tiny.pictures(tmp_path / "images", len(tiny.TEXTS))
    data = tiny.catalogue(tiny.TEXTS, tmp_path / "images", image_path=pa.array(names))
    made = encode_items(
        EncodeItemsConfig(
            text=TextEncoderConfig(encoder="huggingface", model=folder),
            image=ImageEncoderConfig(encoder="huggingface", model=folder, batch_size=3),
        ),
        data,
    )
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    for item, text in enumerate(tiny.TEXTS, start=1):
        picture = tiny.drawing(
            *[("circle", (210, 30, 30)), ("square", (30, 40, 200))][1 - item % 2], item - 1
        )
        pixels = processor(images=picture, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            outputs = model(**tokenizer(text, return_tensors="pt"), pixel_values=pixels)
        for modality, found in (("text", outputs.text_embeds), ("image", outputs.image_embeds)):
            ours = made.vectors[modality][item]
            np.testing.assert_allclose(ours / np.linalg.norm(ours), found[0].numpy(), atol=1e-5)
    assert made.encoders["image"]["pooling"] == "own image head"
    assert made.encoders["image"]["preprocessing"]["crop_size"] == {"height": 32, "width": 32}
    json.dumps(made.encoders, allow_nan=False)
    with pytest.raises(ConfigError, match=r"text.pooling must be auto"):
        TextEncoder(folder, revision=None, pooling="mean", max_tokens=None, dtype="auto")
    with pytest.raises(ConfigError, match=r"image.pooling must be auto"):
        ImageEncoder(folder, revision=None, pooling="cls", dtype="auto")


def test_siglip_texts_are_padded_to_full_length_as_in_its_training(tmp_path):
    folder = tiny.siglip(tmp_path)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(tiny.TEXTS, padding="max_length", max_length=16, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = model.text_model(input_ids=tokens).pooler_output
    np.testing.assert_allclose(encode(folder, batch_size=2)[0][1:], expected.numpy(), atol=1e-5)


@pytest.mark.parametrize("pooling", ["auto", "mean", "cls"])
def test_a_vision_model_is_pooled_as_asked(tmp_path, pooling):
    encoder = ImageEncoder(tiny.vit(tmp_path), revision=None, pooling=pooling, dtype="auto")
    pictures = [tiny.drawing("circle", (200, 0, 0), 1), tiny.drawing("square", (0, 0, 200), 2)]
    found = encoder.encode(encoder.prepare(pictures))
    model = transformers.ViTModel.from_pretrained(tmp_path).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    with torch.no_grad():
        outputs = model(**processor(images=pictures, return_tensors="pt"))
    hidden = outputs.last_hidden_state
    expected = {"auto": outputs.pooler_output, "mean": hidden.mean(1), "cls": hidden[:, 0]}[pooling]
    np.testing.assert_allclose(found, expected.numpy(), atol=2e-6)


def test_a_map_of_hidden_states_is_pooled_over_its_places(tmp_path):
    encoder = ImageEncoder(tiny.segformer(tmp_path), revision=None, pooling="auto", dtype="auto")
    assert encoder.describe()["pooling"] == "mean"
    pictures = [tiny.drawing("circle", (200, 0, 0), 1), tiny.drawing("square", (0, 0, 200), 2)]
    found = encoder.encode(encoder.prepare(pictures))
    model = transformers.SegformerModel.from_pretrained(tmp_path).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    with torch.no_grad():
        hidden = model(**processor(images=pictures, return_tensors="pt")).last_hidden_state
    assert hidden.shape == (2, 16, 4, 4)
    np.testing.assert_allclose(found, hidden.mean(dim=(2, 3)).numpy(), atol=2e-6)


def test_a_pooler_without_trained_weights_is_not_used(tmp_path):
    encoder = ImageEncoder(tiny.vit(tmp_path, pooler=False), revision=None, pooling="auto", dtype="auto")
    prepared = encoder.prepare([tiny.drawing("circle", (200, 0, 0), 1)])
    assert encoder.describe()["pooling"] == "mean"
    mean = ImageEncoder(str(tmp_path), revision=None, pooling="mean", dtype="auto")
    assert np.array_equal(encoder.encode(prepared), mean.encode(prepared))


def test_incomplete_weights_are_refused(tmp_path):
    folder = tiny.bert(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(DataError, match=r"lack 1 tensors.*encoder.layer.1.output.dense.weight"):
        encode(folder)


def test_an_encoder_that_is_published_without_its_decoder_is_read(tmp_path):
    """As sentence encoders made of T5 are."""
    folder = tiny.t5(tmp_path)
    expected = encode(folder)[0]
    weights = load_file(tmp_path / "model.safetensors")
    alone = {name: array for name, array in weights.items() if not name.startswith("decoder.")}
    save_file(alone, tmp_path / "model.safetensors", {"format": "pt"})
    assert len(alone) < len(weights) and np.array_equal(encode(folder)[0], expected)
    del alone["encoder.block.1.layer.0.SelfAttention.k.weight"]
    save_file(alone, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(DataError, match="lack 1 tensors"):
        encode(folder)


def test_texts_are_no_longer_than_the_tokenizer_says_though_the_model_takes_more(tmp_path):
    folder = tiny.bert(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "model_max_length": 5}))
    assert encode(folder)[1]["max_tokens"] == 5
    with pytest.raises(ConfigError, match=r"max_tokens must be at most 5 with"):
        encode(folder, max_tokens=6)


def test_a_model_whose_positions_have_no_end_takes_512_tokens(tmp_path):
    tiny.tokenizer(tmp_path)
    config = transformers.XLNetConfig(
        vocab_size=32, d_model=16, n_layer=1, n_head=2, d_inner=32, pad_token_id=3
    )
    folder = tiny.save(tiny.seeded(transformers.XLNetModel, config), tmp_path)
    vectors, about = encode(folder)
    assert about["max_tokens"] == 512 and vectors[1:].any(axis=1).all()


def test_a_model_that_cannot_be_had_gives_one_line_with_a_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match=r"encode_items.text.model='nobody/nothing'.*hf download") as caught:
        encode("nobody/nothing")
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"no such folder"):
        encode(str(tmp_path / "absent" / "folder"))
    (tmp_path / "config.json").write_text('{"model_type": "made-up", "auto_map": {"AutoModel": "code.X"}}')
    tiny.tokenizer(tmp_path)
    with pytest.raises(ConfigError, match=r"must hold a transformers model"):
        encode(str(tmp_path))


def test_half_a_download_is_refused(tmp_path):
    folder = tiny.bert(tmp_path)
    content = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ConfigError, match=r"cannot be loaded by AutoModel"):
        encode(folder)


def test_weights_of_another_shape_are_refused(tmp_path):
    folder = tiny.bert(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["encoder.layer.1.output.dense.weight"] = np.zeros((4, 4), np.float32)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises((ConfigError, DataError), match=r"encoder.layer.1.output.dense|mismatch"):
        encode(folder)


def test_pickled_weights_are_refused(tmp_path):
    folder = tiny.bert(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"safetensors weights"):
        encode(folder)


def test_texts_are_tokenized_in_parts(tmp_path, monkeypatch):
    folder = tiny.bert(tmp_path)
    whole, _ = encode(folder)
    monkeypatch.setattr(huggingface, "TOKENIZE_AT_ONCE", 3)
    assert np.array_equal(encode(folder)[0], whole)


def test_a_model_that_takes_thousands_of_tokens_is_given_512(tmp_path):
    tiny.tokenizer(tmp_path)
    config = transformers.BertConfig(vocab_size=32, max_position_embeddings=2000, **tiny.SIZES)
    folder = tiny.save(tiny.seeded(transformers.BertModel, config), tmp_path)
    encoder = TextEncoder(folder, revision=None, pooling="mean", max_tokens=None, dtype="auto")
    assert encoder.max_tokens == 512 == len(encoder.prepare(["red " * 900])[0])
    encoder = TextEncoder(folder, revision=None, pooling="mean", max_tokens=700, dtype="auto")
    assert len(encoder.prepare(["red " * 900])[0]) == 700


def test_a_decoder_keeps_no_keys_and_values(tmp_path):
    """Of an 8B model they take more room than all else of a batch."""
    folder = tiny.llama(tmp_path)
    encoder = TextEncoder(folder, revision=None, pooling="last", max_tokens=None, dtype="auto")
    kept = []
    encoder.model.register_forward_hook(lambda *given: kept.append(given[-1].past_key_values))
    encoder.encode(encoder.prepare(["red lip gloss"]))
    assert kept == [None]


@pytest.mark.parametrize("how", ["mean", "cls", "last"])
def test_pooling_is_in_float32_and_finite_without_any_token(how):
    hidden = torch.randn(3, 400, 5, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    lengths = [400, 7, 0]
    mask = (torch.arange(400) < torch.tensor(lengths)[:, None]).long()
    found = huggingface.pool(hidden, mask, how)
    assert found.dtype == torch.float32 and found.isfinite().all()
    for row, length in zip((0, 1), lengths):
        real = hidden[row, :length].double()
        expected = {"mean": real.mean(0), "cls": real[0], "last": real[-1]}[how]
        torch.testing.assert_close(found[row].double(), expected, rtol=1e-6, atol=1e-6)


def test_the_revision_that_is_asked_for_is_loaded_and_its_commit_recorded(tmp_path, monkeypatch):
    """Two commits of one repository in the Hub's cache."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    repo, source = tmp_path / "cache" / "models--ann--tiny", tmp_path / "source"
    commits = {"main": "0" * 40, "v1": "1" * 40}
    source.mkdir()
    expected = {}
    for (name, commit), factor in zip(commits.items(), (1.0, 1.5)):
        (repo / "refs").mkdir(parents=True, exist_ok=True)
        (repo / "refs" / name).write_text(commit)
        tiny.bert(source)
        weights = load_file(source / "model.safetensors")
        scaled = {key: factor * value for key, value in weights.items()}
        save_file(scaled, source / "model.safetensors", {"format": "pt"})
        shutil.copytree(source, repo / "snapshots" / commit)
        expected[name], _ = encode(str(source))
    assert not np.allclose(expected["main"], expected["v1"])
    for revision, name in ((None, "main"), ("v1", "v1"), (commits["v1"], "v1")):
        vectors, about = encode("ann/tiny", revision=revision)
        assert np.array_equal(vectors, expected[name])
        assert about["revision"] == commits[name]


def test_numbers_are_computed_as_they_are_stored_but_on_a_cpu(tmp_path, monkeypatch):
    folder = tiny.bert(tmp_path)
    transformers.AutoModel.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    found, _, _ = huggingface.load_model(folder, None, "auto", "here")
    assert found.dtype == torch.float32
    monkeypatch.setattr(distributed, "device", lambda: torch.device("meta"))
    found, _, _ = huggingface.load_model(folder, None, "auto", "here")
    assert found.dtype == torch.bfloat16


def test_other_libraries_report_again_after_a_model_was_loaded(monkeypatch):
    monkeypatch.setattr(logging.getLogger(), "level", logging.INFO)
    monkeypatch.setattr(logging.getLogger("transformers"), "level", logging.WARNING)

    def reports():
        root = logging.getLogger()
        return (
            *(root.level, list(root.handlers), transformers_logging.get_verbosity()),
            transformers_logging.is_progress_bar_enabled(),
        )

    before = reports()
    with pytest.raises(KeyError), quiet():
        assert reports() != before
        raise KeyError
    assert reports() == before and before[-1]


def test_texts_come_back_in_their_own_order():
    class Length:
        def prepare(self, inputs):
            return inputs

        def encode(self, batch):
            seen.append([len(text) for text in batch])
            return np.array([[len(text), ord(text[0])] for text in batch], np.float32)

    seen, texts = [], ["bb", "a", "cccc", "d", "eee"]
    found = encode_texts(Length(), texts, 2)
    assert found.tolist() == [[len(text), ord(text[0])] for text in texts]
    assert seen == [[4, 3], [2, 1], [1]]


@pytest.mark.real_data
def test_a_real_sentence_encoder_puts_like_items_together(real_data):
    folder = str(real_data.parent / "models" / "all-MiniLM-L6-v2")
    texts = ["red lipstick", "lip gloss", "hammer drill", "cordless screwdriver", ""]
    vectors, about = encode(folder, texts, normalise=True)
    likeness = vectors @ vectors.T
    lipstick, gloss, hammer, screwdriver, _ = range(1, 6)
    assert likeness[lipstick, gloss] > likeness[lipstick, hammer] + 0.4
    assert likeness[hammer, screwdriver] > likeness[hammer, gloss] + 0.2
    assert about["width"] == 384 and about["num_missing"] == 1 and about["max_tokens"] == 512


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_vectors_of_the_cpu(tmp_path):
    folder = tiny.bert(tmp_path)
    found, _ = encode(folder)
    encoder = TextEncoder(folder, revision=None, pooling="mean", max_tokens=None, dtype="float32")
    encoder.model, encoder.device = encoder.model.cpu(), torch.device("cpu")
    np.testing.assert_allclose(found[1:], encode_texts(encoder, tiny.TEXTS, 64), atol=1e-4)
