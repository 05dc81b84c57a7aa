"""What is looked for before anything starts: a line that says what is wrong, never a traceback."""

from __future__ import annotations

import dataclasses
import gzip
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from backbones import save_backbone
from huggingface_hub import constants
from tiny_recipe import tiny
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llmrec import cli, network, pipeline
from llmrec.assignments import override
from llmrec.collab.config import TrainCollabConfig
from llmrec.data.config import PrepareDataConfig
from llmrec.encoders.config import EncodeItemsConfig, ImageEncoderConfig, TextEncoderConfig
from llmrec.errors import ConfigError
from llmrec.estimate import estimate
from llmrec.estimate_inputs import encoder_width, meta_base
from llmrec.finetune.base_model import load_base, load_prompt
from llmrec.finetune.config import FinetuneConfig, MiniConfig
from llmrec.finetune.prompt import Prompt
from llmrec.preflight import contents, in_the_way, template
from llmrec.recipe import Recipe, main
from llmrec.stages import STAGES

NO_MODELS = (
    "/nosuch/model",
    "./models/llama",
    "../llama",
    "~/models/llama",
    "models\\llama",
)
"""Paths that lead nowhere and cannot be ids of the Hub either."""


def with_base(model: str) -> Recipe:
    tuned = dataclasses.replace(tiny().finetune, base_model=model, mini=MiniConfig())
    return dataclasses.replace(tiny(), finetune=tuned)


def problems(recipe: Recipe, *stages: str) -> list[str]:
    return [one.what for one in in_the_way(recipe, stages) if one.status == "problem"]


@pytest.mark.parametrize("model", NO_MODELS)
def test_a_model_that_is_neither_a_folder_nor_a_hub_id_is_a_finding(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = f"={model}: no such folder, and not a Hub id (owner/name)"
    assert problems(with_base(model), "finetune") == [f"finetune.base_model{said}"]
    for encoder in ("huggingface", "llm2clip"):
        text = TextEncoderConfig(encoder=encoder, model=model)
        image = ImageEncoderConfig(encoder=encoder, model=model)
        recipe = dataclasses.replace(tiny(), encode_items=EncodeItemsConfig(text=text, image=image))
        found = problems(recipe, "encode_items")
        assert {f"encode_items.{name}.model{said}" for name in ("text", "image")} <= set(found)
    text = TextEncoderConfig(encoder="llm2clip", adapter=model)
    recipe = dataclasses.replace(tiny(), encode_items=EncodeItemsConfig(text=text))
    assert f"encode_items.text.adapter{said}" in problems(recipe, "encode_items")


@pytest.mark.parametrize(
    ("log", "items", "settings", "said"),
    [
        ("user_id,item_id,timestamp\n", "item_id,title\n", {}, []),
        ("user,item_id,timestamp\n", "item_id,title\n", {}, ["log.csv has no column 'user_id'"]),
        ("user_id;item_id;timestamp\n", "item_id\tname\n", {}, ["items.csv has no column 'title'"]),
        ("a,1,2\n", "item_id,title\n", {"column_names": ("user_id", "item_id", "timestamp")}, []),
        ("a,1\n", "item_id,title\n", {"column_names": ("user_id", "item_id", "timestamp")}, ["2 columns"]),
        ("", "item_id,title\n", {}, ["log.csv is empty"]),
        ("user_id,item_id,timestamp\n", "sku,title\n", {"items_item_column": "sku"}, []),
    ],
)
def test_tables_without_the_columns_that_are_asked_for_are_a_finding(tmp_path, log, items, settings, said):
    (tmp_path / "log.csv").write_text(log)
    (tmp_path / "items.csv").write_text(items)
    paths = {"interactions": str(tmp_path / "log.csv"), "items": str(tmp_path / "items.csv")}
    data = PrepareDataConfig(source="table", **paths, **settings)
    found = problems(dataclasses.replace(tiny(), prepare_data=data), "prepare_data")
    assert len(found) == len(said) and all(words in one for words, one in zip(said, found)), found


def test_a_packed_table_that_is_damaged_is_a_finding(tmp_path):
    packed = gzip.compress(b"user_id,item_id,timestamp\n" * 50)
    for content in (packed[:15], packed[:12] + b"\xff" * 8 + packed[20:]):
        (tmp_path / "log.csv.gz").write_bytes(content)
        data = PrepareDataConfig(source="table", interactions=str(tmp_path / "log.csv.gz"))
        (found,) = problems(dataclasses.replace(tiny(), prepare_data=data), "prepare_data")
        assert "log.csv.gz is cut or damaged" in found


def test_a_folder_is_no_table(tmp_path):
    data = PrepareDataConfig(source="table", interactions=str(tmp_path))
    (found,) = problems(dataclasses.replace(tiny(), prepare_data=data), "prepare_data")
    assert found.endswith(f"interactions={tmp_path}: is a folder")


def test_recipes_and_commands_say_so_in_one_line(tmp_path, capsys):
    file = tmp_path / "mine.py"
    file.write_text("from tiny_recipe import tiny as recipe\n")
    said = "finetune.base_model=./models/llama: no such folder, and not a Hub id (owner/name)"
    setting = ["--set", "finetune.base_model=./models/llama"]
    for go in (
        lambda: main(tiny, ["--run-dir", str(tmp_path / "run"), *setting]),
        lambda: cli.main(["doctor", str(file), *setting]),
    ):
        with pytest.raises(SystemExit) as left:
            go()
        captured = capsys.readouterr()
        assert left.value.code == 2 and said in captured.out + captured.err
        assert "Traceback" not in captured.err and not (tmp_path / "run").exists()


def test_more_codes_than_items_are_refused_as_soon_as_the_items_are_known(tmp_path):
    made = dataclasses.replace(tiny().learn_semantic_ids, num_codes=200)
    recipe = dataclasses.replace(tiny(), learn_semantic_ids=made)
    run = pipeline.RunDir(tmp_path)
    for _ in range(2):  # before the data are prepared, and after
        with pytest.raises(ConfigError, match=r"at most the number of items \(96\), got 200.*num_codes=8"):
            pipeline.run(recipe, run)
        assert [path.name for path in tmp_path.iterdir()] == ["prepare_data"]
    assert pipeline.run(recipe, run, until="prepare_data") is None
    assert pipeline.run(recipe, run, until="train_collab") is None, "no codes are learned"


def beauty(folder, **changes) -> Recipe:
    named = PrepareDataConfig(source="amazon_2014", category="beauty", folder=str(folder), **changes)
    return dataclasses.replace(tiny(), prepare_data=named)


@pytest.mark.parametrize("known", [True, False])
def test_data_that_must_be_fetched_are_told_with_the_host_and_whether_it_is_found(
    known, tmp_path, monkeypatch
):
    from llmrec import doctor

    asked = []

    def look_up(host, port):
        asked.append(host)
        if not known:
            raise OSError("Name or service not known")
        return ["an address"]

    monkeypatch.setattr(network.socket, "getaddrinfo", look_up)
    monkeypatch.setattr(network.urllib.request, "getproxies", dict)
    recipe = beauty(tmp_path, mirrors=("https://mirror.example/data",))
    [found] = doctor.network(recipe)
    assert found.status == ("note" if known else "problem") and found.what == (
        "reviews_Beauty_5.json.gz and meta_Beauty.json.gz must be fetched from mirror.example or "
        f"snap.stanford.edu, whose name can{' be resolved' if known else 'not be resolved from here'}"
    )
    assert asked == (["mirror.example"] if known else ["mirror.example", "snap.stanford.edu"])
    if not known:
        with pytest.raises(
            ConfigError, match=r"cannot be fetched: .*Put them into .*, or give the --run-dir"
        ):
            estimate(recipe)
    for name in ("reviews_Beauty_5.json.gz", "meta_Beauty.json.gz"):
        (tmp_path / name).write_bytes(b"")
    assert list(doctor.network(recipe)) == []


def test_a_name_that_nobody_answers_for_is_not_waited_for(monkeypatch):
    import threading

    answered = threading.Event()
    monkeypatch.setattr(network.socket, "getaddrinfo", lambda *_: answered.wait(60))
    monkeypatch.setattr(network.urllib.request, "getproxies", dict)
    assert not network.resolves("slow.example", seconds=0.05)
    answered.set()
    monkeypatch.setattr(network.urllib.request, "getproxies", lambda: {"https": "http://proxy:3128"})
    assert network.resolves("slow.example", seconds=0.05), "the proxy is asked, not the system"


def test_hosts_that_need_no_proxy_are_no_proxy(monkeypatch):
    def nowhere(*_):
        raise OSError("Name or service not known")

    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr(network.socket, "getaddrinfo", nowhere)
    monkeypatch.setenv("NO_PROXY", "localhost,.inner.example")
    assert not network.resolves("outer.example")
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:3128")
    assert network.resolves("outer.example") and not network.resolves("mirror.inner.example")


def test_data_that_are_absent_and_may_not_be_fetched_are_a_problem(tmp_path):
    found = problems(beauty(tmp_path, offline=True), "prepare_data")
    assert len(found) == 2 and all("is absent, and prepare_data.offline=true" in one for one in found)


NONE = ["encode_items.text.encoder=none"]
OTHER_METHOD = [f"finetune.fusion_temperature={FinetuneConfig().fusion_temperature}"]
OWN_VECTORS = {"encoder": "precomputed", "path": "own.parquet"}
NOTHING = [*NONE, "encode_items.image.encoder=none"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            ["train_collab.include_valid=true", "train_collab.select=last"],
            "train_collab.include_valid=true makes the collaborative vectors from validation items",
        ),
        (
            [*NONE, "train_collab.sasrec.content=text"],
            "train_collab.sasrec.content=text: there will be no text vectors",
        ),
        (
            [*NONE, "learn_semantic_ids.modalities=collab,text"],
            "learn_semantic_ids.modalities=collab,text: there will be no text vectors",
        ),
        (
            [*NOTHING, *OTHER_METHOD, "finetune.method=concat"],
            "puts modalities together and needs at least two, got collab",
        ),
        (
            [*OTHER_METHOD, "learn_semantic_ids.modalities=text", "finetune.method=e4srec"],
            "needs collaborative vectors",
        ),
    ],
)
def test_stages_that_do_not_go_together_are_told_before_the_first_one(settings, said):
    recipe = override(tiny(), dict(setting.split("=") for setting in settings))
    found = problems(recipe, *STAGES)
    assert len(found) == 1 and said in found[0]
    assert problems(tiny(), *STAGES) == []


def test_what_was_learned_from_validation_items_may_be_used_where_nothing_is_validated():
    learned = {"train_collab.include_valid": "true", "train_collab.select": "last"}
    recipe = override(tiny(), {**learned, "finetune.eval_every_epochs": "0"})
    assert problems(recipe, *STAGES) == []


TABLE = {"source": "table", "interactions": "log.csv"}
ITEMS = {**TABLE, "items": "items.csv"}
AMAZON = {"source": "amazon_2014", "category": "beauty", "folder": "data"}


@pytest.mark.parametrize(
    ("data", "text", "image", "said"),
    [
        (TABLE, {}, {"encoder": "none"}, ["text.encoder=tfidf finds no texts"]),
        (TABLE, {"encoder": "none"}, {}, ["image.encoder=classical finds no pictures"]),
        (TABLE, OWN_VECTORS, OWN_VECTORS, []),
        (ITEMS, {}, {}, ["finds no pictures"]),
        ({**ITEMS, "image_column": "file"}, {}, {}, []),
        ({**ITEMS, "image_url_column": "url", "image_folder": "pictures"}, {}, {}, []),
        (ITEMS, {"columns": ("title", "brand")}, {"encoder": "none"}, ["title, brand: brand will not be"]),
        (ITEMS, {"template": "{title} by {brand}"}, {"encoder": "none"}, ["brand will not be there, but"]),
        ({**ITEMS, "text_columns": ("brand",)}, {"columns": ("brand",)}, {"encoder": "none"}, []),
        (
            {**ITEMS, "title_column": None, "text_columns": ("brand",)}, {"columns": ("title",)},
            {"encoder": "none"}, ["title will not be there, but brand"],
        ),
        ({**ITEMS, "title_column": None}, {}, {"encoder": "none"}, ["finds no texts"]),
        (AMAZON, {"columns": ("brand",)}, {}, ["set prepare_data.image_folder"]),
        ({**AMAZON, "image_folder": "pictures"}, {}, {}, []),
    ],
)  # fmt: skip
def test_texts_and_pictures_that_will_not_be_there_are_told(data, text, image, said):
    recipe = dataclasses.replace(
        tiny(), prepare_data=PrepareDataConfig(**data),
        encode_items=EncodeItemsConfig(text=TextEncoderConfig(**text), image=ImageEncoderConfig(**image)),
    )  # fmt: skip
    found = [f"{one.what}; {one.advice}" for one in contents(recipe)]
    assert len(found) == len(said) and all(words in one for words, one in zip(said, found)), found


def test_libraries_and_devices_that_settings_need_are_told(monkeypatch):
    find = importlib.util.find_spec
    absent = {"liger_kernel", "k_means_constrained"}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name in absent else find(name, *rest)
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    made = {"finetune.attention": "flex", "finetune.rows": "stream", "finetune.kernels": "liger"}
    recipe = override(tiny(), {**made, "learn_semantic_ids.init": "kmeans_constrained"})
    assert problems(recipe, "finetune") == [
        "finetune.attention=flex, finetune.kernels=liger: there is no CUDA device",
        "finetune.kernels=liger: not installed",
    ]
    (found,) = problems(recipe, "learn_semantic_ids")
    assert found.endswith("kmeans_constrained: its library is not installed")
    diverse = {"codebook_update": "gradient", "diversity_weight": "0.1", "diversity_clusters": "2"}
    recipe = override(recipe, {f"learn_semantic_ids.{name}": value for name, value in diverse.items()})
    assert problems(recipe, "learn_semantic_ids") == [
        found, "learn_semantic_ids.diversity_weight=0.1: its library is not installed"
    ]  # fmt: skip
    absent.clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: find("json"))
    assert problems(recipe, "finetune", "learn_semantic_ids") == []


def test_epochs_chosen_by_another_ranking_than_the_last_are_noted():
    kept = override(tiny(), {"evaluate.mask_seen": "false"})
    (note,) = [one for one in in_the_way(kept) if "mask_seen" in one.what]
    assert note.status == "note" and note.what.startswith("evaluate.mask_seen=false, but epochs are chosen")
    settings = note.advice.removeprefix("set ").split()
    assert "train_collab.mask_seen=false" in settings
    alike = override(kept, dict(setting.split("=") for setting in settings))
    assert not [one for one in in_the_way(alike) if "mask_seen" in one.what]
    assert not [one for one in in_the_way(kept, ["evaluate"]) if "mask_seen" in one.what]
    read = TrainCollabConfig(provider="precomputed", vectors="own.parquet")
    of_file = dataclasses.replace(override(kept, {"finetune.select": "valid"}), train_collab=read)
    (note,) = [one for one in in_the_way(of_file) if "mask_seen" in one.what]
    assert note.advice == "set finetune.mask_seen=false"


def save_tokenizer(folder: Path, *special: str) -> Path:
    """A tokenizer with these special tokens."""
    words = ["<unk>", "user", *special]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    made.add_special_tokens({"additional_special_tokens": list(special)})
    made.save_pretrained(folder)
    return folder


def with_prompt(base: object, prompt: str) -> FinetuneConfig:
    return dataclasses.replace(with_base(str(base)).finetune, prompt=prompt)


def test_a_template_in_another_base_models_format_is_a_problem(tmp_path):
    save_tokenizer(tmp_path, "<|im_start|>", "<|im_end|>")
    found = template(with_prompt(tmp_path, "chat"))
    assert found.status == "problem"
    assert found.what == f"finetune.prompt=chat uses <|begin_of_text|>, which is not a token of {tmp_path}"
    assert "(of chat, chatml, compact, gemma, mistral, official17 these do: chatml, compact)" in found.advice
    assert template(with_prompt(tmp_path, "chatml")).status == "ok"
    own = tmp_path / "own.toml"
    own.write_text("text = '<|im_start|>{history}<|im_over|>'")
    assert "uses <|im_over|>, which is not a token" in template(with_prompt(tmp_path, str(own))).what


def test_templates_of_every_family_fit_by_their_own_markers(tmp_path):
    save_tokenizer(tmp_path / "gemma", "<bos>", "<start_of_turn>", "<end_of_turn>")
    save_tokenizer(tmp_path / "mistral", "<s>", "[INST]")
    for family in ("gemma", "mistral"):
        assert f"these do: compact, {family})" in template(with_prompt(tmp_path / family, "chat")).advice
        assert template(with_prompt(tmp_path / family, family)).status == "ok"
    assert "uses <s>, which is not a token" in template(with_prompt(tmp_path / "gemma", "mistral")).what
    assert "uses <bos>, which is not a token" in template(with_prompt(tmp_path / "mistral", "gemma")).what
    own = tmp_path / "own.toml"
    own.write_text("text = 'in <b>bold</b>: {history} next'")
    assert template(with_prompt(tmp_path / "gemma", str(own))).status == "ok"


def test_a_marker_that_is_read_as_one_unknown_word_is_no_token(tmp_path):
    words = Tokenizer(models.WordLevel({"<unk>": 0, "user": 1}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(tmp_path)
    own = tmp_path / "own.toml"
    own.write_text("text = '<|go|> {history} next'")
    assert "uses <|go|>, which is not a token" in template(with_prompt(tmp_path, str(own))).what


def test_a_tokenizer_in_the_cache_is_read_and_none_is_fetched(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    config = with_prompt("ann/qwen", "chat")
    assert template(config).status == "ok", "it is not here, so nothing is known of it"
    commit = "0" * 40
    (tmp_path / "models--ann--qwen" / "refs").mkdir(parents=True)
    (tmp_path / "models--ann--qwen" / "refs" / "main").write_text(commit)
    folder = save_tokenizer(tmp_path / "models--ann--qwen" / "snapshots" / commit, "<|im_start|>")
    assert template(config).what.endswith("which is not a token of ann/qwen")
    (folder / "tokenizer.json").unlink()
    assert template(config).status == "ok", "the run fetches the rest"


def test_nobody_is_asked_whether_to_run_a_models_own_code(tmp_path, monkeypatch):
    """transformers would ask on the terminal, and do so for a yes; there is no way to allow it here."""
    monkeypatch.setattr("builtins.input", lambda asked="": pytest.fail(asked))
    (tmp_path / "code.py").write_text("raise SystemExit('this ran')\n")
    own = {"AutoConfig": "code.X", "AutoModel": "code.X", "AutoTokenizer": ["code.X", None]}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "made-up", "auto_map": own}))
    made = {"auto_map": own, "tokenizer_class": "MadeUp"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(made))
    (tmp_path / "model.safetensors").touch()
    config = with_prompt(tmp_path, "compact")
    assert "cannot be loaded" in template(config).what
    prompt = Prompt(instruction=[1], response=[2], vocab_size=3)
    text = TextEncoderConfig(encoder="huggingface", model=str(tmp_path))
    for load in (
        lambda: load_prompt(config),
        lambda: load_base(config, prompt),
        lambda: meta_base(config, prompt),
        lambda: encoder_width(text, None, "text"),
    ):
        with pytest.raises(ConfigError, match=r"cannot be (loaded|read)|is not known before"):
            load()


@pytest.mark.parametrize("content", ["", "{}", "[]"])
def test_a_tokenizer_that_cannot_be_read_is_a_problem(content, tmp_path):
    (tmp_path / "tokenizer.json").write_text(content)
    found = template(with_prompt(tmp_path, "chat"))
    assert found.what.startswith(f"the tokenizer of finetune.base_model={tmp_path} cannot be loaded: ")


def test_a_template_that_does_not_fit_keeps_a_run_from_beginning(tmp_path, capsys):
    base = save_backbone(tmp_path / "base")
    settings = [f"finetune.base_model={base}", "finetune.prompt=chatml", "finetune.project_codes=true"]
    with pytest.raises(SystemExit) as left:
        main(tiny, ["--run-dir", str(tmp_path / "run"), "--set", *settings])
    assert left.value.code == 2 and not (tmp_path / "run").exists()
    assert "finetune.prompt=chatml uses <|im_start|>, which is not a token of" in capsys.readouterr().err


def test_codes_of_another_number_or_width_than_other_stages_have_are_told(tmp_path):
    recipe = override(tiny(), {"learn_semantic_ids.collaborative_weight": "0.1"})
    assert problems(recipe, "learn_semantic_ids", "train_collab") == []
    wider = override(recipe, {"train_collab.sasrec.embed_dim": "32"})
    (found,) = problems(wider, "learn_semantic_ids", "train_collab")
    assert "code_dim=16 differs from train_collab.sasrec.embed_dim=32" in found
    content = {"model": {"quantizer": {"num_levels": 3, "num_codes": 16}}}
    (tmp_path / "semantic_ids.json").write_text(json.dumps(content))
    (tmp_path / "text.safetensors").touch()
    coded = dataclasses.replace(tiny(), train_collab=TrainCollabConfig())
    made = {"provider": "tiger", "semantic_ids": str(tmp_path), "tiger.num_codes": "16"}
    coded = override(coded, {f"train_collab.{name}": value for name, value in made.items()})
    assert problems(coded, "train_collab") == []
    (found,) = problems(override(coded, {"train_collab.tiger.num_codes": "32"}), "train_collab")
    assert found.startswith("train_collab.tiger.num_codes=32, and train_collab.semantic_ids=")
