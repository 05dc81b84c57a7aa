"""Costs told in advance against what is then counted, and a machine that is looked over."""

import dataclasses
import importlib.metadata
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny as tiny_models
import torch
import transformers
from tiny import tokenizer
from tiny_recipe import tiny
from worlds import cycle

from llmrec import cli, doctor, estimate_inputs, stage_times
from llmrec.collab.config import PROVIDER_FIELDS, SASRecConfig, TrainCollabConfig
from llmrec.collab.configs.mamba import MambaConfig
from llmrec.data.config import PrepareDataConfig
from llmrec.encoders.config import EncodeItemsConfig, ImageEncoderConfig, TextEncoderConfig
from llmrec.encoders.encode import item_texts
from llmrec.errors import ConfigError
from llmrec.estimate import distinct_items, estimate
from llmrec.estimate_inputs import collab_width, encoder_width, fitting, vector_widths
from llmrec.estimate_shown import GPUS, MOVED, scaled, shown
from llmrec.finetune import base_model
from llmrec.finetune.config import FinetuneConfig
from llmrec.finetune.prompt import Prompt
from llmrec.pipeline import RunDir
from llmrec.recipe import Recipe, recipe_of, with_preset
from llmrec.runs import Run
from llmrec.semantic_ids.config import LearnSemanticIdsConfig
from llmrec.stage_times import duration
from llmrec.stages import STAGES


def test_tokens_and_parameters_are_those_of_the_run(finished):
    metrics = json.loads((finished / "finetune" / "metrics.json").read_text())
    for folder in (finished, None):
        found = estimate(tiny(), folder)
        assert found.counts["targets"] == metrics["targets_per_epoch"]
        assert found.counts["steps"] * 2 == metrics["steps"]
        # Which users share a step, and so an instruction, changes from epoch to epoch.
        assert 2 * found.counts["tokens"] == pytest.approx(metrics["tokens"], rel=0.02)
    assert estimate(tiny(), finished).parameters == metrics["parameters"]
    assert found.bounds == {"text": 16, "image": 16} and estimate(tiny(), finished).bounds == {}
    text = shown(found, "H100")
    assert "fits one H100 (80 GB)" in text and "times fewer than one prompt per target" in text


def test_a_width_that_only_the_items_tell_is_told_as_a_bound(tmp_path):
    """Titles of the sample market span fewer directions than the 128 numbers that tf-idf is asked for."""
    made = tiny()
    recipe = dataclasses.replace(
        made, encode_items=EncodeItemsConfig(text=TextEncoderConfig(dim=128), image=made.encode_items.image)
    )
    run = RunDir(tmp_path)
    data = run.stage(STAGES["prepare_data"], recipe.prepare_data)
    before = estimate(recipe, tmp_path)
    text = shown(before, "H100")
    assert f"at most {before.parameters['trainable']:,} trained" in text
    assert "widths      text at most 128 and image at most 16; exact with the --run-dir" in text
    content = run.stage(STAGES["encode_items"], recipe.encode_items, data)
    assert content.vectors["text"].shape[1] < 128
    after = estimate(recipe, tmp_path)
    assert after.bounds == {} and after.parameters["trainable"] < before.parameters["trainable"]
    assert "widths" not in shown(after, "H100") and "at most " not in shown(after, "H100").split("time ")[0]


def test_the_published_size_is_counted_without_building_it(tmp_path):
    """LoRA of rank 8 on the feed-forward layers of Llama-3-8B, and the side network."""
    tokenizer(tmp_path)
    config = transformers.LlamaConfig(
        vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    rng = np.random.default_rng(0)
    lines = [f"u{user} " + " ".join(map(str, rng.permutation(400)[:9] + 1)) for user in range(300)]
    (tmp_path / "sequences.txt").write_text("\n".join(lines))
    clip = {"encoder": "llm2clip"}
    recipe = Recipe(
        prepare_data=PrepareDataConfig(source="sequences", interactions=str(tmp_path / "sequences.txt")),
        encode_items=EncodeItemsConfig(text=TextEncoderConfig(**clip), image=ImageEncoderConfig(**clip)),
        learn_semantic_ids=LearnSemanticIdsConfig(code_dim=4096),
        finetune=FinetuneConfig(base_model=str(tmp_path), prompt="compact", precision="bf16"),
    )
    found = estimate(recipe)
    rows = found.counts["items"] + 1
    assert found.parameters["base_trainable"] == 14_155_776
    assert found.parameters["projections"] == (64 + 1280 + 1280 + 3) * 4096
    assert found.parameters["code_embeddings"] == 3 * 4 * 256 * 4096
    assert found.parameters["item_mlp"] == 24_576 * 12_288 + 12_288 + 12_288 * 4096 + 4096
    assert found.parameters["target_table"] == rows * 4096
    assert found.flops["base model"] == pytest.approx(
        28e9 * found.counts["tokens"], rel=0.01
    )  # 4 x 7e9 a token
    assert found.memory["frozen weights"] == pytest.approx(15.0e9, rel=0.02)
    assert found.total_memory == pytest.approx(21.5e9, rel=0.02)
    assert "fits one RTX4090 (24 GB)" in shown(found, "RTX4090") and "on one H200 (rough)" in shown(
        found, "H200"
    )
    slow = dataclasses.replace(found, precision="fp32")
    # One pass over 300 histories, whose instruction stands in front once, and a product with every item.
    tokens = 300 * (8 + len(base_model.load_prompt(recipe.finetune).response))
    forward = 2 * (7e9 * tokens + 300 * rows * 4096)
    assert found.others["evaluate"].flops == pytest.approx(forward, rel=0.02)
    seconds = slow.total_flops / (67e12 * 0.4) + MOVED * slow.moved / 3.35e12
    assert f"finetune            {duration(3 * seconds)}: 3 epochs of {duration(seconds)}" in shown(
        slow, "H100"
    )
    assert found.moved == found.counts["steps"] * (
        2 * found.memory["frozen weights"] + 28 * found.parameters["trainable"]
    )
    small = dataclasses.replace(
        recipe.finetune, quantize="nf4", optimizer="adamw_8bit", checkpoint_activations=True
    )
    little = estimate(dataclasses.replace(recipe, finetune=small))
    # 4.127 bits for each of 6.98e9 weights in linear layers, 2 bytes for the embeddings.
    assert little.memory["frozen weights"] == pytest.approx(6.98e9 * 4.127 / 8 + 2 * 128_256 * 4096, rel=1e-3)
    activations = "activations (rough)"
    tokens = little.counts["largest_step"]
    assert little.memory[activations] == 2 * tokens * (10 * 4096 + 4 * 14_336 + 32 * 4096)
    assert found.memory[activations] == 2 * tokens * (10 * 4096 + 4 * 14_336) * 32
    assert little.moved is None and "finetune            not known for" in shown(little, "H200")
    early = shown(dataclasses.replace(slow, ends_early=True), "H100")
    assert (
        f"finetune            at most {duration(3 * seconds)}: at most 3 epochs of {duration(seconds)}"
        in early
    )
    # What a step of this shape takes beside its tokens, as measured on an H200 (tools/engine.md).
    beside = MOVED * found.moved / found.counts["steps"] / GPUS["H200"][2]
    assert beside == pytest.approx(0.026, rel=0.1)


def test_widths_of_item_vectors_are_those_that_are_handed_on(tmp_path):
    data = cycle()
    assert collab_width(TrainCollabConfig(provider="svae"), data) == 150  # its output table, as published
    assert collab_width(TrainCollabConfig(provider="gru4rec"), data) == 64
    table = pa.table({"item_id": data.raw_ids, "vector": [[0.5] * 128] * data.num_items})
    pq.write_table(table, tmp_path / "own.parquet")
    config = TrainCollabConfig(provider="precomputed", vectors=str(tmp_path / "own.parquet"))
    assert collab_width(config, data) == 128
    mixed = TrainCollabConfig(sasrec=SASRecConfig(embed_dim=24, num_heads=2, content=("text",)))
    assert collab_width(mixed, data) == 24
    for name, width in (("bert", 16), ("clip", 12)):
        (tmp_path / name).mkdir()
        text = TextEncoderConfig(encoder="huggingface", model=getattr(tiny_models, name)(tmp_path / name))
        assert encoder_width(text, data, "text") == width
    clip = TextEncoderConfig(encoder="openclip", model="ViT-B-32", pretrained="laion2b_s34b_b79k")
    assert encoder_width(clip, data, "text") == 512
    chosen = dataclasses.replace(
        tiny(), learn_semantic_ids=dataclasses.replace(tiny().learn_semantic_ids, modalities=("text",))
    )
    assert vector_widths(chosen, None, data) == ({"text": 16}, {"text": 16, "image": 16})
    own = TextEncoderConfig(encoder="precomputed", path=str(tmp_path / "own.parquet"))
    assert encoder_width(own, data, "text") == 128


def test_settings_of_a_model_are_those_of_its_revision(monkeypatch):
    asked = []

    def settings(model, **given):
        asked.append((model, given["revision"]))
        return transformers.BertConfig(hidden_size=12)

    monkeypatch.setattr(estimate_inputs.AutoConfig, "from_pretrained", settings)
    text = TextEncoderConfig(encoder="huggingface", model="ann/bert", revision="v1")
    assert encoder_width(text, cycle(), "text") == 12
    config = FinetuneConfig(base_model="ann/llama", revision="v2", lora_targets=("query",))
    estimate_inputs.meta_base(config, Prompt(instruction=[1], response=[2], vocab_size=3))
    assert asked == [("ann/bert", "v1"), ("ann/llama", "v2")]


def test_codes_of_residual_k_means_are_as_wide_as_the_vectors(finished):
    ids = LearnSemanticIdsConfig(method="rkmeans", num_levels=2, num_codes=8)
    assert ids.code_dim != 16
    found = estimate(dataclasses.replace(tiny(), learn_semantic_ids=ids))
    assert found.parameters["code_embeddings"] == 3 * 2 * 8 * 16


def test_one_host_that_is_found_is_enough_to_fetch_data(monkeypatch):
    monkeypatch.setattr(estimate_inputs, "to_fetch", lambda recipe: (["a.csv"], ["mirror", "origin"]))
    for found in (set(), {"mirror"}, {"origin"}):
        monkeypatch.setattr(estimate_inputs, "resolves", found.__contains__)
        if found:
            estimate_inputs.refuse_unreachable(tiny())
        else:
            with pytest.raises(ConfigError, match="the name of mirror or origin cannot be resolved"):
                estimate_inputs.refuse_unreachable(tiny())


def test_what_settings_cost_is_counted(finished):
    def with_settings(**changes):
        config = dataclasses.replace(tiny().finetune, **changes)
        return estimate(dataclasses.replace(tiny(), finetune=config), finished)

    plain, best, single = with_settings(), with_settings(select="valid"), with_settings(layout="per_prefix")
    trained = plain.parameters["trainable"]
    assert best.total_memory - plain.total_memory == 4 * trained
    for share, said in ((0.91, "; fits one H100"), (0.93, "; does not fit one H100")):
        assert said in shown(dataclasses.replace(plain, memory={"all": share * 80e9}), "H100")
    # Two moments of 4 bytes a weight, or of 1.
    saved = plain.total_memory - with_settings(optimizer="adamw_8bit").total_memory
    assert saved == pytest.approx(6 * trained)
    assert with_settings(select="valid", patience=2).ends_early and not best.ends_early
    # On a GPU one instruction serves all prompts of a pass, however many there are.
    assert plain.counts["tokens"] < single.counts["tokens"] < single.counts["tokens_per_prefix"]
    sampled = with_settings(loss="bce_sampled")
    matrix = "item matrix and its gradients (rough)"
    assert plain.memory[matrix] > 0 == sampled.memory[matrix]
    assert sampled.flops["catalogue scores"] == pytest.approx(
        plain.flops["catalogue scores"] * 2 / (plain.counts["items"] + 1)
    )
    assert with_settings(method="ctrl_mm", fusion_temperature=1e-3).parameters["trainable"] < trained


@pytest.mark.parametrize("batch_size", [8, 128], ids=["factored", "folded"])
def test_operations_and_memory_by_hand(batch_size, finished):
    """Scores of n targets a step are h times the one matrix, or, of few, the parts of h times the vectors."""
    made = dataclasses.replace(
        tiny().finetune, batch_size=batch_size, micro_batch_tokens=200, batch_by="targets", precision="fp32"
    )
    found = estimate(dataclasses.replace(tiny(), finetune=made), finished)
    content = Run(finished).content
    vectors = 16 + sum(table.shape[1] for table in content.vectors.values())
    counts, parts, width, rows = found.counts, found.parameters, 16, 97
    assert counts["steps"] == -(-counts["targets"] // batch_size)
    if batch_size > width:
        scored = counts["targets"] * rows * width
        # The sum of w (E W + b): forwards, and for W; the vectors themselves are frozen.
        assert found.flops["item matrix"] == 4 * counts["steps"] * rows * width * vectors
    else:
        scored = counts["targets"] * rows * (width + vectors + 3)
        assert found.flops["item matrix"] == 0
    assert found.flops["catalogue scores"] == 6 * scored
    tokens = (4 * parts["projections"] + 6 * parts["item_mlp"]) * counts["item_tokens"]
    assert found.flops["item tokens"] == tokens
    memory = found.memory
    assert memory["frozen weights"] == 0 and memory["item vectors"] == 4 * rows * vectors
    assert memory["trained weights, gradients, AdamW"] == 16 * parts["trainable"]
    pass_tokens = min(200, counts["largest_step"])
    assert (pass_tokens < 200) == (batch_size == 8)
    assert memory["activations (rough)"] == 4 * pass_tokens * (10 * 16 + 4 * 32)
    assert counts["largest_step"] * counts["steps"] >= counts["tokens"] > counts["largest_step"]


def test_every_sequence_model_has_a_time_or_a_reason_why_not(monkeypatch):
    """MovieLens-1M's step and epoch of SASRec, from which the figures come."""
    data = cycle()
    measured = stage_times.PER_MILLION_TARGETS
    assert set(measured) <= set(PROVIDER_FIELDS)
    for provider in measured:
        work = stage_times.sequence_model(TrainCollabConfig(provider=provider), data)
        assert work.on(GPUS["H200"]) > 0 and work.shown(GPUS["H200"]).startswith("at most ")
    others = {name: time for name, time in measured.items() if name != "sasrec"}
    monkeypatch.setattr(stage_times, "PER_MILLION_TARGETS", others)
    unmeasured = stage_times.sequence_model(TrainCollabConfig(), data)
    assert unmeasured == "not known for sasrec, which was not measured"
    monkeypatch.undo()
    one = TrainCollabConfig(epochs=2, batch_size=8, select="last")
    work = stage_times.sequence_model(one, data)
    users = [length for length in np.diff(data.sequences("train").offset).tolist() if length > 1]
    assert work.steps == 2 * -(-len(users) // 8) and not work.most
    patient = stage_times.sequence_model(TrainCollabConfig(patience=None), data)
    assert not patient.most, "by validation, and yet all epochs"
    assert work.seconds == pytest.approx(2 * (sum(users) - len(users)) / 1e6 * 0.48)
    assert work.on(GPUS["A100"]) == max(work.steps * stage_times.SMALL_STEP, work.seconds)
    released = MambaConfig(variant="released")
    work = stage_times.sequence_model(TrainCollabConfig(provider="mamba", mamba=released), data)
    rate = stage_times.AS_RELEASED["mamba"] / stage_times.PER_MILLION_TARGETS["mamba"]
    plain = stage_times.sequence_model(TrainCollabConfig(provider="mamba"), data)
    lower = stage_times.sequence_model(TrainCollabConfig(provider="mamba", precision="bfloat16"), data)
    assert lower.seconds / plain.seconds == pytest.approx(1.19)
    lower = TrainCollabConfig(provider="mamba", precision="bfloat16", mamba=released)
    assert stage_times.sequence_model(lower, data).seconds == work.seconds, "not measured"
    assert rate > 10 and work.seconds == pytest.approx(rate * plain.seconds)
    for settings, reason in (
        ({"layout": "prefixes"}, "not known for sasrec with layout=prefixes"),
        ({"provider": "own_models:Tiny"}, "not known for a model of one's own"),
        ({"provider": "precomputed", "vectors": "x.parquet"}, "read from a file"),
    ):
        assert stage_times.sequence_model(TrainCollabConfig(**settings), data) == reason


def test_encoders_and_quantisers_are_reckoned_by_their_operations(finished):
    data = Run(finished).data
    clip = EncodeItemsConfig(
        text=TextEncoderConfig(encoder="llm2clip"), image=ImageEncoderConfig(encoder="llm2clip")
    )
    letters = sum(len(text) for text in item_texts(clip.text, data.items)[0])
    pictures = sum(map(bool, data.items["image_path"].to_pylist()))
    wanted = 2 * (7.0e9 * letters / 4 + 0.3e9 * 577 * pictures)
    assert pictures and stage_times.encoders(clip, data).flops == pytest.approx(wanted)
    assert stage_times.encoders(tiny().encode_items, data) == "on the CPU"
    some = EncodeItemsConfig(text=TextEncoderConfig(encoder="huggingface", model="x"), image=clip.image)
    assert stage_times.encoders(some, data) == "not known for huggingface"

    config = LearnSemanticIdsConfig(code_dim=8, hidden_dims=(16,), epochs=3, batch_size=50)
    work = stage_times.quantiser(config, 120, {"collab": 4, "text": 6})
    numbers = sum(2 * (dim * 16 + 16 * 8) + (16 + 8) + (16 + dim) for dim in (4, 6))
    assert work.flops == 6 * numbers * 120 * 3 and work.steps == 3 * 3
    whole, fast, half = (
        dataclasses.replace(work, precision=name, steps=0).on(GPUS["H200"])
        for name in ("float32", "tf32", "bfloat16")
    )
    assert work.precision == "float32" and whole == pytest.approx(fast * 495 / 67)
    assert fast == pytest.approx(half * 989 / 495)
    simple = LearnSemanticIdsConfig(method="rkmeans")
    assert stage_times.quantiser(simple, 120, {"collab": 4}).startswith("not known for rkmeans")


@pytest.mark.real_data
def test_the_official_preset_costs_what_the_published_code_counts(real_data, tmp_path):
    """150,041 targets in 9,378 steps, 17 + 4 prompt tokens, 439.3 M trained parameters."""
    for path in (real_data.parent / "models" / "llama3-tokenizer").iterdir():
        (tmp_path / path.name).symlink_to(path)
    transformers.LlamaConfig(
        vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8,
    ).save_pretrained(tmp_path)  # fmt: skip
    clip, base = {"encoder": "llm2clip"}, str(tmp_path)
    sequences = str(real_data / "beauty" / "sequences_mme_sid.txt")
    found = {}
    for preset in ("default", "official"):
        chosen = Recipe(
            prepare_data=PrepareDataConfig(source="sequences", interactions=sequences),
            encode_items=EncodeItemsConfig(text=TextEncoderConfig(**clip), image=ImageEncoderConfig(**clip)),
            learn_semantic_ids=LearnSemanticIdsConfig(code_dim=4096),
        )
        chosen = with_preset(chosen, preset)
        if preset == "default":
            chosen = dataclasses.replace(
                chosen, learn_semantic_ids=LearnSemanticIdsConfig(code_dim=4096),
                finetune=FinetuneConfig(base_model=base, precision="bf16"),
            )  # fmt: skip
        else:
            chosen = dataclasses.replace(
                chosen, finetune=dataclasses.replace(chosen.finetune, base_model=base)
            )
        prompt = base_model.load_prompt(chosen.finetune)
        assert (len(prompt.instruction), len(prompt.response)) == (
            (17, 4) if preset == "official" else (33, 4)
        )
        found[preset] = estimate(chosen)
    official = found["official"]
    assert (official.counts["targets"], official.counts["steps"]) == (150_041, 9_378)
    assert official.counts["epochs"] == 4
    assert official.parameters["base_trainable"] == 14_155_776
    assert official.parameters["trainable"] == pytest.approx(439.3e6, rel=2e-4)
    assert official.counts["tokens_per_prefix"] == 4_315_886
    assert found["default"].memory["frozen weights"] > 3 * official.memory["frozen weights"]


def test_distinct_items_by_hand():
    item = np.array([5, 6, 5, 7, 8])

    class Targets:
        start, stop = np.array([0, 0, 3]), np.array([3, 1, 4])

        def __len__(self):
            return 3

    assert distinct_items(item, Targets()) == 3  # 5, 6 and 7
    assert (scaled(1.234e9, "B"), scaled(5e3, "B")) == ("1.23 GB", "5 kB")
    assert (scaled(999.4e9, "B"), scaled(999.7e9, "B")) == ("999 GB", "1 TB")


def test_the_command_prints_and_says_what_is_wrong(tmp_path, capsys, finished):
    file = tmp_path / "mine.py"
    file.write_text(
        "from llmrec.recipe import Recipe\nfrom llmrec.finetune.config import FinetuneConfig\n"
        "def recipe():\n    return Recipe(finetune=FinetuneConfig(prompt='compact'))\n"
    )
    shutil.copy(file, file.with_suffix(""))
    options = ["--set", "prepare_data.market.num_users=50", "--gpu", "A100"]
    for arguments, code, message in (
        (["estimate", str(file), *options], 0, "not known for a mini base"),
        (["estimate", str(tmp_path / "none.py")], 2, "no such recipe"),
        (["estimate", str(file.with_suffix(""))], 2, "give a Python file"),
        (["estimate", str(file), "--run-dir", str(tmp_path / "none")], 2, "none: no such folder"),
        (["estimate", str(file), "--run-dir", str(finished)], 2, "prepare_data was made with"),
        (["estimate", str(file), "--set", "encode_items.text.encoder=precomputed",
          "encode_items.text.path=x.parquet"], 2, "x.parquet does not exist; check the path"),
        (["estimate", str(file), "--set", "encode_items.text.encoder=huggingface",
          f"encode_items.text.model={tmp_path}"], 2, "is not known before they exist"),
    ):  # fmt: skip
        with pytest.raises(SystemExit) as left:
            cli.main(arguments)
        captured = capsys.readouterr()
        assert left.value.code == code and message in captured.out + captured.err
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "nothing.py").write_text("def recipe():\n    return None\n")
    with pytest.raises(ConfigError, match=r"recipe\(\) must return a Recipe, got NoneType"):
        recipe_of(tmp_path / "nothing.py")
    with pytest.raises(ConfigError, match="defines no function `recipe`"):
        recipe_of(tmp_path / "empty.py")


def test_a_machine_in_order_has_no_problems(capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(["doctor", "--all"])
    out = capsys.readouterr().out
    assert left.value.code == 0 and out.endswith("ready\n")
    assert f"ok       torch {importlib.metadata.version('torch')}" in out and "free on the disk" in out
    assert ("no CUDA device" in out) == (not torch.cuda.is_available())


def test_a_preset_is_looked_at_with_the_models_it_asks_for(tmp_path, capsys):
    file = tmp_path / "mine.py"
    file.write_text("from tiny_recipe import tiny as recipe\n")
    with pytest.raises(SystemExit):
        cli.main(["doctor", str(file), "--all", "--preset", "official"])
    assert "Meta-Llama-3-8B-Instruct" in capsys.readouterr().out


@pytest.mark.parametrize("given", [["--set", "finetune.epochs=1", "mine.py"], ["--preset", "paper"]])
def test_settings_of_no_recipe_do_not_leave_a_machine_ready(given, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(["doctor", *given])
    captured = capsys.readouterr()
    assert left.value.code == 2 and "name it first: llmrec doctor RECIPE" in captured.err
    assert "ready" not in captured.out


def test_what_is_missing_is_a_problem_with_its_fix(tmp_path, monkeypatch, capsys):
    file = tmp_path / "mine.py"
    file.write_text(
        "from llmrec.recipe import Recipe\nfrom llmrec.data.config import PrepareDataConfig\n"
        "from llmrec.finetune.config import FinetuneConfig\n"
        "from llmrec.encoders.config import *\n"
        "NOTHING = EncodeItemsConfig(text=TextEncoderConfig(encoder='none'),\n"
        "    image=ImageEncoderConfig(encoder='none'))\n"
        "def recipe():\n"
        f"    data = PrepareDataConfig(source='table', interactions={str(tmp_path / 'none.csv')!r})\n"
        "    tuned = FinetuneConfig(base_model='nobody/nothing')\n"
        "    return Recipe(prepare_data=data, encode_items=NOTHING, finetune=tuned)\n"
    )
    wanted = importlib.metadata.requires("llmrec")
    extra = ["torch>=99", "no-such-package>=1"]
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda name: [*wanted, *extra])
    with pytest.raises(SystemExit) as left:
        cli.main(["doctor", str(file)])
    captured = capsys.readouterr()
    assert left.value.code == 2 and "4 problems" in captured.err
    for text in (
        'is outside >=99; run `pip install "torch>=99"`',
        'no-such-package is not installed; run `pip install "no-such-package>=1"`',
        "none.csv: no such file",
        "nobody/nothing is not in the Hub's cache, or not all of it; run `hf download nobody/nothing`",
    ):
        assert text in captured.out


def test_a_run_folder_is_used_if_it_fits(finished, tmp_path, caplog):
    caplog.set_level("INFO")
    assert fitting(tiny(), finished) == finished and "finished in" in caplog.text
    other = dataclasses.replace(tiny(), prepare_data=dataclasses.replace(tiny().prepare_data, seed=1))
    assert fitting(other, finished) is None and fitting(tiny(), tmp_path / "none") is None
