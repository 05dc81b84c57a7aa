"""Tiny random models and catalogues for tests of the encoders."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
import transformers
import worlds
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from llmrec.interactions import Interactions

WORDS = [
    *("red", "blue", "green", "lip", "gloss", "stick", "drill", "hammer"),
    *("cream", "soap", "brush", "nail", "oil", "hair", "mask", "kit"),
]
TEXTS = [
    "red lip gloss",
    "hammer",
    "blue soap brush kit for hair and nail",
    "cream",
    "hair oil mask",
    "green nail kit brush brush brush lip gloss stick oil hair",
    "drill hammer",
]


def catalogue(titles: list[str | None], image_root: Path | None = None, **columns: list) -> Interactions:
    """Interactions of one user over items with these titles and further columns."""
    data = worlds.interactions([[1, 1, 1]], len(titles))
    table = {
        "raw_id": data.items["raw_id"],
        "title": pa.array(titles, pa.string()),
        "train_count": data.items["train_count"],
        "image_path": data.items["image_path"],
        **columns,
    }
    return dataclasses.replace(data, items=pa.table(table), image_root=image_root)


def tokenizer(folder: Path, *, pad: bool = True) -> None:
    """A word tokenizer that puts [CLS] before and [SEP] after each text."""
    special = ["[UNK]", "[CLS]", "[SEP]", *(["[PAD]"] if pad else [])]
    vocabulary = {word: number for number, word in enumerate(special + WORDS)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    names = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "eos_token": "[SEP]"}
    if pad:
        names["pad_token"] = "[PAD]"
    transformers.PreTrainedTokenizerFast(tokenizer_object=core, **names).save_pretrained(folder)


def save(model: torch.nn.Module, folder: Path) -> str:
    model.save_pretrained(folder)
    return str(folder)


def seeded(build, config) -> torch.nn.Module:
    """A model with visibly different random weights from a fixed seed."""
    torch.manual_seed(0)
    model = build(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3)
    return model


SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def bert(folder: Path) -> str:
    tokenizer(folder)
    config = transformers.BertConfig(
        vocab_size=32, max_position_embeddings=24, pad_token_id=3, hidden_act="gelu", **SIZES
    )
    return save(seeded(transformers.BertModel, config), folder)


def roberta(folder: Path) -> str:
    tokenizer(folder)
    config = transformers.RobertaConfig(vocab_size=32, max_position_embeddings=24, pad_token_id=3, **SIZES)
    return save(seeded(transformers.RobertaModel, config), folder)


def llama(folder: Path) -> str:
    tokenizer(folder, pad=False)
    config = transformers.LlamaConfig(
        vocab_size=32, num_key_value_heads=2, max_position_embeddings=64, pad_token_id=None, **SIZES
    )
    return save(seeded(transformers.LlamaForCausalLM, config), folder)


def t5(folder: Path) -> str:
    tokenizer(folder)
    config = transformers.T5Config(
        vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, pad_token_id=3,
        decoder_start_token_id=3,
    )  # fmt: skip
    return save(seeded(transformers.T5Model, config), folder)


def siglip(folder: Path) -> str:
    tokenizer(folder)
    config = transformers.SiglipConfig(
        text_config={
            **SIZES, "vocab_size": 32, "max_position_embeddings": 16, "pad_token_id": 3,
            "bos_token_id": 1, "eos_token_id": 2, "projection_size": 16,
        },
        vision_config={**SIZES, "image_size": 32, "patch_size": 8},
    )  # fmt: skip
    return save(seeded(transformers.SiglipModel, config), folder)


def clip(folder: Path) -> str:
    tokenizer(folder)
    config = transformers.CLIPConfig(
        text_config={
            **SIZES, "vocab_size": 32, "max_position_embeddings": 16, "pad_token_id": 3,
            "bos_token_id": 1, "eos_token_id": 2,
        },
        vision_config={**SIZES, "image_size": 32, "patch_size": 8},
        projection_dim=12,
    )  # fmt: skip
    size = {"shortest_edge": 32}
    crop = {"height": 32, "width": 32}
    transformers.CLIPImageProcessor(size=size, crop_size=crop).save_pretrained(folder)
    return save(seeded(transformers.CLIPModel, config), folder)


def vit(folder: Path, *, pooler: bool = True) -> str:
    config = transformers.ViTConfig(image_size=32, patch_size=8, **SIZES)
    size = {"height": 32, "width": 32}
    transformers.ViTImageProcessor(size=size).save_pretrained(folder)
    model = seeded(lambda config: transformers.ViTModel(config, add_pooling_layer=pooler), config)
    return save(model, folder)


def segformer(folder: Path) -> str:
    """A vision model without a pooler, whose hidden states are a map (B, C, height, width)."""
    config = transformers.SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 16], patch_sizes=[3, 3],
        strides=[4, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2],
    )  # fmt: skip
    transformers.SegformerImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return save(seeded(transformers.SegformerModel, config), folder)


def drawing(shape: str, colour: tuple[int, int, int], seed: int) -> Image.Image:
    """A circle or square of some place and size on a light ground."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (80, 60), (240, 240, 235))
    x, y, side = *rng.integers(2, 20, 2), rng.integers(25, 36)
    box = [int(x), int(y), int(x + side), int(y + side)]
    shade = tuple(int(np.clip(value + rng.integers(-20, 21), 0, 255)) for value in colour)
    draw = ImageDraw.Draw(image)
    (draw.ellipse if shape == "circle" else draw.rectangle)(box, fill=shade)
    return image


def pictures(folder: Path, number: int) -> list[str]:
    """Red circles (even items) and blue squares (odd ones) as PNG files."""
    folder.mkdir(exist_ok=True)
    names = []
    for index in range(number):
        kind = ("circle", (210, 30, 30)) if index % 2 == 0 else ("square", (30, 40, 200))
        drawing(*kind, seed=index).save(folder / f"{index}.png")
        names.append(f"{index}.png")
    return names
