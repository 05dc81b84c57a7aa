"""LLM2CLIP on tiny random weights in the published layout, against the formula one text at a time."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import tiny
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from llmrec.encoders import llm2clip
from llmrec.encoders.again import ItemEncoders
from llmrec.encoders.config import EncodeItemsConfig, ImageEncoderConfig, TextEncoderConfig
from llmrec.encoders.encode import encode_items
from llmrec.encoders.llm2clip import ImageEncoder, TextEncoder, commit_of, wrapping
from llmrec.errors import ConfigError, DataError

CHAT = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
OFF = ImageEncoderConfig(encoder="none")


def chat_tokenizer(folder, special=CHAT):
    words = {word: number for number, word in enumerate([*special, "[UNK]", "user", *tiny.WORDS])}
    core = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"unk_token": "[UNK]", "bos_token": special[0], "additional_special_tokens": special[1:]}
    transformers.PreTrainedTokenizerFast(tokenizer_object=core, **names).save_pretrained(folder)


def language_model(folder, **sizes):
    chat_tokenizer(folder)
    config = transformers.LlamaConfig(
        vocab_size=32, num_key_value_heads=1, max_position_embeddings=64, **{**tiny.SIZES, **sizes}
    )
    return tiny.save(tiny.seeded(transformers.LlamaModel, config), folder)


def clip(folder, width=16, dim=12, blocks=2, bias=True):
    """Names as in the published file, layer by layer."""
    torch.manual_seed(1)
    size, inner = tiny.SIZES["hidden_size"], tiny.SIZES["intermediate_size"]
    shapes = {
        "logit_scale": (),
        "vision_model.embeddings.position_ids": (1, 17),
        "visual_projection.weight": (dim, size),
        "vision_model.embeddings.class_embedding": (size,),
        "vision_model.embeddings.patch_embedding.weight": (size, 3, 8, 8),
        "vision_model.embeddings.position_embedding.weight": (17, size),
    }
    for norm in ("pre_layrnorm", "post_layernorm"):
        shapes |= {f"vision_model.{norm}.{part}": (size,) for part in ("weight", "bias")}
    for layer in range(2):
        start = f"vision_model.encoder.layers.{layer}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= {f"{start}.self_attn.{name}.weight": (size, size)}
            shapes |= {f"{start}.self_attn.{name}.bias": (size,)}
        shapes |= {f"{start}.mlp.fc1.weight": (inner, size), f"{start}.mlp.fc1.bias": (inner,)}
        shapes |= {f"{start}.mlp.fc2.weight": (size, inner), f"{start}.mlp.fc2.bias": (size,)}
        for norm in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{start}.{norm}.{part}": (size,) for part in ("weight", "bias")}
    for block in range(blocks):
        start = f"text_adapter.adaptor.{block}"
        shapes |= {f"{start}.fn.0.weight": (2 * width, width), f"{start}.fn.0.bias": (2 * width,)}
        shapes |= {f"{start}.fn.3.weight": (width, 2 * width), f"{start}.fn.3.bias": (width,)}
        shapes |= {f"{start}.ln.{part}": (width,) for part in ("weight", "bias")}
    shapes |= {f"text_adapter.adaptor.{blocks}.{part}": (width,) for part in ("weight", "bias")}
    shapes[f"text_adapter.adaptor.{blocks + 1}.weight"] = (dim, width)
    if bias:
        shapes[f"text_adapter.adaptor.{blocks + 1}.bias"] = (dim,)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: 0.3 * torch.randn(shape) for name, shape in shapes.items()}, folder / "model.safetensors"
    )
    vision = {**tiny.SIZES, "image_size": 32, "patch_size": 8, "model_type": "clip_vision_model"}
    content = {"model_type": "clip", "projection_dim": dim, "vision_config": vision}
    (folder / "config.json").write_text(json.dumps(content))
    return str(folder)


def text_by_hand(llm, file, text):
    """Wrap, run without padding or causal mask, average text and <eot>, adapt; each step on its own."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(llm)
    wrapped = f"<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{text}<|eot_id|>"
    ids = tokenizer.encode(wrapped, add_special_tokens=False)
    own = len(tokenizer.encode(f"{text}<|eot_id|>", add_special_tokens=False))
    model = transformers.LlamaModel.from_pretrained(llm, attn_implementation="eager").eval()
    with torch.no_grad():
        nothing_hidden = torch.zeros(1, 1, len(ids), len(ids))
        hidden = model(torch.tensor([ids]), attention_mask=nothing_hidden).last_hidden_state[0]
    x = F.normalize(hidden[-own:].mean(dim=0), dim=0)
    weights = {
        name.removeprefix("text_adapter.adaptor."): tensor
        for name, tensor in load_file(file).items()
        if name.startswith("text_adapter")
    }
    last = max(int(name[0]) for name in weights)
    for block in range(last - 1):
        y = F.layer_norm(x, x.shape, weights[f"{block}.ln.weight"], weights[f"{block}.ln.bias"])
        y = F.gelu(weights[f"{block}.fn.0.weight"] @ y + weights[f"{block}.fn.0.bias"])
        x = x + weights[f"{block}.fn.3.weight"] @ y + weights[f"{block}.fn.3.bias"]
    x = F.layer_norm(x, x.shape, weights[f"{last - 1}.weight"], weights[f"{last - 1}.bias"])
    return (weights[f"{last}.weight"] @ x + weights.get(f"{last}.bias", 0)).numpy()


@pytest.mark.parametrize("bias", [True, False])
def test_texts_equal_the_formula_one_at_a_time(tmp_path, bias):
    llm, adapter = language_model(tmp_path / "llm"), clip(tmp_path / "clip", bias=bias)
    config = TextEncoderConfig(encoder="llm2clip", model=llm, adapter=adapter, batch_size=3)
    made = encode_items(EncodeItemsConfig(text=config, image=OFF), tiny.catalogue(tiny.TEXTS))
    for text, found in zip(tiny.TEXTS, made.vectors["text"][1:]):
        expected = text_by_hand(llm, tmp_path / "clip" / "model.safetensors", text)
        np.testing.assert_allclose(found, expected, atol=1e-5)
    about = made.encoders["text"]
    assert about["width"] == 12 and about["adapter"] == adapter
    assert about["wrapping"].replace(" ", "") == "".join(CHAT[:2]) + "user" + CHAT[2] + "{text}" + CHAT[3]


def test_both_models_are_read_at_their_commits_and_again_for_new_items(tmp_path, monkeypatch):
    llm, adapter = language_model(tmp_path / "llm"), clip(tmp_path / "clip")
    asked = []
    plain = llm2clip.read_weights

    def read_weights(model, revision, where, **parts):
        asked.append((where, revision))
        return plain(model, revision, where, **parts)

    monkeypatch.setattr(llm2clip, "read_weights", read_weights)
    monkeypatch.setattr(llm2clip, "commit_of", lambda path: "b" * 40)
    llamas, plain_llama = [], llm2clip.load_llama

    def load_llama(model, revision, dtype, where):
        llamas.append(revision)
        return plain_llama(model, revision, dtype, where)

    monkeypatch.setattr(llm2clip, "load_llama", load_llama)
    monkeypatch.setattr(llm2clip, "revision_of", lambda model, asked: "a" * 40)
    config = TextEncoderConfig(encoder="llm2clip", model=llm, adapter=adapter, adapter_revision="main")
    made = encode_items(EncodeItemsConfig(text=config, image=OFF), tiny.catalogue(tiny.TEXTS))
    assert asked == [("encode_items.text.adapter", "main")]
    assert made.encoders["text"]["adapter_revision"] == "b" * 40
    items = tiny.catalogue(tiny.TEXTS[:2]).items
    vectors, _ = ItemEncoders(made).text(items)
    assert asked[1:] == [("encode_items.text.adapter", "b" * 40)] and llamas == [None, "a" * 40]
    assert ImageEncoder(adapter, revision="main", dtype="auto").describe()["revision"] == "b" * 40
    np.testing.assert_allclose(vectors, made.vectors["text"][1:3], atol=1e-5)


def test_every_token_sees_those_after_it(tmp_path):
    made = TextEncoder(
        language_model(tmp_path / "llm"), adapter=clip(tmp_path / "clip"), revision=None, max_tokens=None,
        dtype="auto",
    )  # fmt: skip
    first, second = made.prepare(["red lip", "red hammer"])
    seen = []
    made.model.layers[-1].register_forward_hook(lambda *args: seen.append(args[-1]))
    for ids in (first, second):
        made.encode([ids])
    one, other = (found[0] if isinstance(found, tuple) else found for found in seen)
    assert (one[0, 4] - other[0, 4]).abs().max() > 1e-3  # "red", before the words that differ


def test_long_texts_are_cut_and_keep_their_end(tmp_path):
    llm, adapter = language_model(tmp_path / "llm"), clip(tmp_path / "clip")
    made = TextEncoder(llm, adapter=adapter, revision=None, max_tokens=8, dtype="auto")
    (ids,) = made.prepare([" ".join(["soap"] * 50)])
    assert len(ids) == 8 and ids[-1] == made.end and ids[:4].tolist() == made.header
    with pytest.raises(ConfigError, match=r"max_tokens must leave room for text beside the 5 tokens"):
        TextEncoder(llm, adapter=adapter, revision=None, max_tokens=5, dtype="auto")


def test_pictures_equal_the_stock_model(tmp_path):
    folder = clip(tmp_path / "clip")
    names = tiny.pictures(tmp_path / "images", 5)
    data = tiny.catalogue([""] * 5, tmp_path / "images", image_path=pa.array(names))
    config = EncodeItemsConfig(
        text=TextEncoderConfig(encoder="none"),
        image=ImageEncoderConfig(encoder="llm2clip", model=folder, batch_size=2),
    )
    made = encode_items(config, data)
    stock = transformers.CLIPVisionModelWithProjection(
        transformers.CLIPVisionConfig(**tiny.SIZES, image_size=32, patch_size=8, projection_dim=12)
    ).eval()
    weights = load_file(tmp_path / "clip" / "model.safetensors")
    stock.load_state_dict({name: weights[name] for name in stock.state_dict()})
    processor = transformers.CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    for item in range(5):
        picture = tiny.drawing(*[("circle", (210, 30, 30)), ("square", (30, 40, 200))][item % 2], item)
        with torch.no_grad():
            expected = stock(**processor(images=picture, return_tensors="pt")).image_embeds[0]
        np.testing.assert_allclose(made.vectors["image"][item + 1], expected.numpy(), atol=1e-5)
    assert made.encoders["image"]["preprocessing"]["image_mean"][0] == pytest.approx(0.48145466)


def change(file, edit):
    weights = load_file(file)
    edit(weights)
    save_file(weights, file)


def test_a_missing_or_extra_weight_is_an_error(tmp_path):
    file = tmp_path / "clip" / "model.safetensors"
    cases = [
        (lambda w: w.pop("vision_model.encoder.layers.1.mlp.fc1.bias"), ImageEncoder, "1 missing.*fc1.bias"),
        (lambda w: w.update(head=torch.zeros(2)), ImageEncoder, "1 left over, the first is head"),
        (lambda w: w.update({"visual_projection.weight": torch.zeros(2, 3)}), ImageEncoder, "another shape"),
        (lambda w: w.pop("text_adapter.adaptor.1.ln.weight"), TextEncoder, "1 missing.*1.ln.weight"),
        (lambda w: w.update({"text_adapter.adaptor.0.gate": torch.zeros(1)}), TextEncoder, "left over"),
        (lambda w: [w.pop(n) for n in list(w) if "adapter" in n], TextEncoder, "no text adapter of LLM2CLIP"),
    ]
    llm = language_model(tmp_path / "llm")
    for edit, kind, message in cases:
        folder = clip(tmp_path / "clip")
        change(file, edit)
        with pytest.raises(DataError, match=message):
            if kind is ImageEncoder:
                ImageEncoder(folder, revision=None, dtype="auto")
            else:
                TextEncoder(llm, adapter=folder, revision=None, max_tokens=None, dtype="auto")
    folder = clip(tmp_path / "clip")
    for edit, message in (
        (lambda w: w.pop("norm.weight"), "lacks norm.weight"),
        (lambda w: w.update(extra=torch.zeros(1)), "also holds extra"),
    ):
        language_model(tmp_path / "llm")
        change(tmp_path / "llm" / "model.safetensors", edit)
        with pytest.raises(DataError, match=f"no plain Llama: {message}"):
            TextEncoder(llm, adapter=folder, revision=None, max_tokens=None, dtype="auto")
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(DataError, match=r"is damaged .*get it again"):
        ImageEncoder(folder, revision=None, dtype="auto")


def test_weights_in_several_files_are_read_from_all_of_them(tmp_path):
    llm, adapter = language_model(tmp_path / "llm"), clip(tmp_path / "clip")

    def vectors():
        made = TextEncoder(llm, adapter=adapter, revision=None, max_tokens=None, dtype="auto")
        return made.encode(made.prepare(tiny.TEXTS[:2]))

    whole, file = vectors(), tmp_path / "clip" / "model.safetensors"
    weights = load_file(file)
    names = {name: f"model-{number % 2}.safetensors" for number, name in enumerate(sorted(weights))}
    for part in set(names.values()):
        save_file({name: weights[name] for name in weights if names[name] == part}, tmp_path / "clip" / part)
    (tmp_path / "clip" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    file.unlink()
    assert np.array_equal(vectors(), whole)


def test_parts_that_do_not_belong_together_are_refused(tmp_path):
    llm = language_model(tmp_path / "llm")
    with pytest.raises(ConfigError, match=r"takes vectors of width 24, but .* gives 16"):
        TextEncoder(llm, adapter=clip(tmp_path / "c", width=24), revision=None, max_tokens=None, dtype="auto")
    tiny.llama(tmp_path / "other")
    with pytest.raises(ConfigError, match=r"has no <\|start_header_id\|>.*use encoder=huggingface"):
        TextEncoder(
            str(tmp_path / "other"), adapter=str(tmp_path / "c"), revision=None, max_tokens=None, dtype="auto"
        )
    with pytest.raises(ConfigError, match=r"has no config.json"):
        ImageEncoder(str(tmp_path), revision=None, dtype="auto")
    with pytest.raises(ConfigError, match=r"run `hf download nobody/nothing`"):
        ImageEncoder("nobody/nothing", revision=None, dtype="auto")


def test_the_commit_of_a_cached_file_is_read_off_its_path():
    cached = Path("hub") / "models--a--b" / "snapshots" / "0123abc" / "config.json"
    assert commit_of(cached) == "0123abc" and commit_of(Path("folder") / "config.json") is None
    assert commit_of(Path("snapshots") / "hf" / cached) == "0123abc"
    assert commit_of(Path("snapshots") / "own" / "config.json") is None


@pytest.mark.real_data
def test_the_real_tokenizer_wraps_as_published(real_data):
    folder = real_data.parent / "models" / "llama3-tokenizer"
    if not folder.is_dir():
        pytest.skip(f"no tokenizer at {folder}")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    header, end = wrapping(tokenizer, "llama3", "encode_items.text")
    assert (header, end) == ([128000, 128006, 882, 128007, 271], 128009)
    for text in ("Crest 3D White Toothpaste, 4.1 oz", "1,000 & more (new!)", "L'Oreal", "été"):
        wrapped = f"<|start_header_id|>user<|end_header_id|>\n\n{text}<|eot_id|>"
        own = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert [*header[1:], *own, end] == tokenizer(wrapped, add_special_tokens=False)["input_ids"]
