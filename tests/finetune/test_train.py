"""The fine-tuning stage: it learns, repeats itself, survives saving, and shares work over processes."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from backbones import save_backbone
from huggingface_hub import constants
from tiny_mme_sid import vectors
from worlds import cycle, interactions

from llmrec.artifacts import CollabEmbeddings, ContentEmbeddings, SemanticIds
from llmrec.errors import ArtifactMismatchError, ConfigError, TrainingError
from llmrec.evaluation.metrics import ndcg_at_k
from llmrec.evaluation.rank import rank_users
from llmrec.files import read_json
from llmrec.finetune import train
from llmrec.finetune.adapter import Adapter
from llmrec.finetune.config import FinetuneConfig, MiniConfig
from llmrec.finetune.engine import Engine
from llmrec.finetune.scoring import load_scorer
from llmrec.finetune.steps import epoch_steps

TINY = FinetuneConfig(
    mini=MiniConfig(hidden_size=16, num_layers=1, num_heads=2, intermediate_size=24),
    prompt="compact",
    fusion_temperature=1.0,
    epochs=2,
    batch_size=64,
    learning_rate=1e-2,
    warmup_steps=2,
)


def inputs(data):
    """Random vectors and codes for a data set, as the stages before finetune would hand over."""
    made = vectors(data.num_items, {"collab": 6, "text": 5})
    rng = np.random.default_rng(0)
    collab = CollabEmbeddings(catalog=data.catalog, provider="precomputed", vectors=made["collab"])
    content = ContentEmbeddings(
        catalog=data.catalog,
        vectors={"text": made["text"]},
        missing={"text": np.zeros(data.num_items + 1, dtype=bool)},
        encoders={"text": {}},
    )
    ids = SemanticIds(
        catalog=data.catalog,
        codes={name: rng.integers(0, 4, (data.num_items + 1, 2)) for name in made},
        codebooks={name: rng.normal(size=(2, 4, 16)).astype(np.float32) for name in made},
    )
    return collab, content, ids


def fit(config: FinetuneConfig, data=None) -> tuple[Adapter, tuple]:
    data = data or cycle()
    made = inputs(data)
    return train.finetune(config, data, *made), made


def weights(adapter: Adapter) -> dict[str, torch.Tensor]:
    base = {f"base.{name}": value for name, value in adapter.base.items()}
    return {**adapter.heads, **adapter.lora, **base}


def test_learns_which_item_follows():
    data = cycle(num_users=200)
    adapter, made = fit(dataclasses.replace(TINY, epochs=10, max_history=4), data)
    scorer = load_scorer(adapter, *made)
    rank = rank_users(scorer, data, data.targets("test"), mask_seen=False).rank
    assert (rank == 0).mean() > 0.95
    losses = [row["loss"] for row in adapter.log if "loss" in row]
    assert losses[-1] < 0.6 * losses[0]


def test_one_seed_gives_one_result_and_another_seed_another():
    first, second = weights(fit(TINY)[0]), weights(fit(TINY)[0])
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = weights(fit(dataclasses.replace(TINY, seed=1))[0])
    assert not torch.equal(first["item_scores.target_table"], other["item_scores.target_table"])


def test_layout_and_micro_batches_change_nothing_but_rounding():
    """One step over all targets: the same gradient however they are laid out."""
    whole = dataclasses.replace(TINY, batch_size=10_000, epochs=2, warmup_steps=0)
    expected = weights(fit(whole)[0])
    for change in (
        {"layout": "per_prefix"},
        {"share_instruction": False},
        {"micro_batch_tokens": 40},
    ):
        got = weights(fit(dataclasses.replace(whole, **change))[0])
        for name, value in got.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=2e-4, msg=f"{change}: {name}")


def test_a_schedule_may_be_longer_than_the_training():
    def rates(**settings) -> list[float]:
        config = dataclasses.replace(TINY, log_every_steps=1, batch_size=32, **settings)
        return [row["learning_rate"] for row in fit(config)[0].log if "learning_rate" in row]

    whole, part, short = rates(epochs=4), rates(epochs=2, schedule_epochs=4), rates(epochs=2)
    assert part == whole[: len(part)] and 2 * len(part) == len(whole)
    assert short[-1] < 0.2 * part[-1]
    with pytest.raises(ConfigError, match=r"must be none or at least finetune\.epochs=3, got 2"):
        FinetuneConfig(epochs=3, schedule_epochs=2)


def test_every_epoch_trains_every_target_once():
    data = interactions([[1, 2, 3, 4, 5], [2, 3, 4], [5, 4, 3, 2, 1, 6, 7]], 7)
    targets = data.targets("train")
    for layout in ("packed", "per_prefix"):
        config = dataclasses.replace(TINY, batch_size=4, layout=layout)
        steps = epoch_steps(targets, config, np.random.default_rng(0))
        assert [len(step) for step in steps] == [4, 4, 1]
        assert sorted(np.concatenate(steps).tolist()) == list(range(9))


@pytest.mark.parametrize("every", [0, 1, 2])
def test_fusion_weights_are_logged_every_epoch_whether_it_is_validated_or_not(every):
    adapter, _ = fit(dataclasses.replace(TINY, epochs=3, eval_every_epochs=every))
    logged = [row for row in adapter.log if "fusion" in row]
    assert [row["epoch"] for row in logged] == [1, 2, 3]
    assert all(sum(row["fusion"]["mean_weight"].values()) == pytest.approx(1) for row in logged)
    validated = {0: [], 1: [1, 2, 3], 2: [2, 3]}[every]
    assert [row["epoch"] for row in adapter.log if "valid_ndcg@10" in row] == validated


def test_the_best_epoch_is_kept_when_asked():
    adapter, _ = fit(dataclasses.replace(TINY, epochs=4, select="valid"))
    valid = {row["epoch"]: row["valid_ndcg@10"] for row in adapter.log if "valid_ndcg@10" in row}
    assert adapter.metrics["epoch_kept"] == max(valid, key=valid.get)
    assert adapter.metrics["valid"]["valid_ndcg@10"] == max(valid.values())


def test_validation_ranks_items_of_the_history_too_when_asked():
    data = cycle()
    masked, made = fit(TINY, data)
    kept, _ = fit(dataclasses.replace(TINY, mask_seen=False), data)
    for name, value in weights(masked).items():
        assert torch.equal(value, weights(kept)[name]), "nothing else differs"
    ranking = rank_users(load_scorer(kept, *made), data, data.targets("valid"))
    found = [adapter.metrics["valid"]["valid_ndcg@10"] for adapter in (masked, kept)]
    wanted = [ndcg_at_k(rank, 10).mean() for rank in (ranking.rank, ranking.rank_seen_kept)]
    assert found == pytest.approx(wanted, abs=1e-6) and wanted[0] != wanted[1]


def test_it_stops_when_validation_no_longer_improves_also_after_a_stop(tmp_path, monkeypatch):
    """Random weights, which cannot improve: a learning rate of nearly 0."""
    config = dataclasses.replace(TINY, epochs=30, select="valid", patience=3, learning_rate=1e-9)
    adapter, _ = fit(config)
    valid = [row["valid_ndcg@10"] for row in adapter.log if "valid_ndcg@10" in row]
    best = int(np.argmax(valid)) + 1
    assert adapter.metrics["epoch_kept"] == best and len(valid) == best + 3 < 30
    with pytest.raises(ConfigError, match="patience has no effect with select='last'"):
        dataclasses.replace(TINY, patience=3)


def test_epochs_cannot_be_chosen_by_validation_items_that_are_not_there():
    data = cycle()
    data.split[data.split == 1] = 0
    train = np.bincount(data.item[data.split == 0], minlength=data.num_items + 1)[1:]
    items = data.items.drop_columns(["train_count"]).append_column("train_count", [train])
    with pytest.raises(ConfigError, match=r"the data set has none; set finetune\.select=last"):
        fit(dataclasses.replace(TINY, select="valid"), dataclasses.replace(data, items=items))


def test_a_line_of_an_epoch_has_its_loss_and_the_best_so_far(caplog):
    caplog.set_level("INFO")
    adapter, _ = fit(dataclasses.replace(TINY, epochs=6, learning_rate=1e-9, select="valid"))
    lines = [one.getMessage() for one in caplog.records if one.getMessage().startswith("finetune: epoch ")]
    best, loss = adapter.metrics["epoch_kept"], [row["loss"] for row in adapter.log if "loss" in row][-1]
    assert lines[-1].startswith(f"finetune: epoch 6, loss {loss:.4f}, valid ndcg@10 ")
    assert lines[-1].endswith(f", best {adapter.metrics['valid']['valid_ndcg@10']:.4f} in epoch {best}")


def test_a_mini_base_takes_histories_of_any_length():
    data = interactions([(np.arange(2300) % 7 + 1).tolist(), [1, 2, 3, 4]], 7)
    adapter, made = fit(dataclasses.replace(TINY, epochs=1, max_targets=2), data)
    assert torch.isfinite(load_scorer(adapter, *made).score(torch.ones(1, 2300, dtype=torch.int64))).all()


def test_valid_and_test_items_change_no_weight():
    data = cycle()
    changed = data.item.copy()
    changed[data.split > 0] = changed[data.split > 0] % data.num_items + 1
    before, after = fit(TINY, data)[0], fit(TINY, dataclasses.replace(data, item=changed))[0]
    assert all(torch.equal(value, weights(after)[name]) for name, value in weights(before).items())


def test_a_loss_that_is_not_a_number_stops_the_run():
    message = r"a gradient is NaN or infinite in step \d+; lower finetune\.learning_rate"
    with pytest.raises(TrainingError, match=message):
        fit(dataclasses.replace(TINY, learning_rate=1e12, clip_norm=1e12, epochs=20))


def poison(monkeypatch, steps: set[int]) -> None:
    """Make a gradient of some steps infinite, the loss being as it should."""
    whole = Engine.step

    def poisoned(self, loss):
        self.number = getattr(self, "number", 0) + 1
        if self.number in steps:
            next(iter(self.parameters.values())).grad.view(-1)[0] = torch.inf
        return whole(self, loss)

    monkeypatch.setattr(Engine, "step", poisoned)


@pytest.mark.parametrize("settings", [{}, {"optimizer": "adamw_8bit"}, {"log_every_steps": 1}])
def test_bad_steps_are_left_out_and_named_and_change_nothing_else(settings, monkeypatch):
    """The same as a run whose learning rate was 0 in those steps, and whose optimiser never saw them."""
    config = dataclasses.replace(TINY, epochs=3, bad_steps=2, weight_decay=0.0, **settings)
    with monkeypatch.context() as patch:
        poison(patch, {2, 8})
        found, _ = fit(config)
    left_out = [row for row in found.log if "left_out" in row]
    assert [(row["epoch"], row["step"]) for row in left_out] == [(1, 2), (2, 8)]
    assert "users" not in left_out[0], "the log is published with the weights"
    whole = Engine.step

    def forgetting(self, loss):
        self.number = getattr(self, "number", 0) + 1
        if self.number not in {2, 8}:
            return whole(self, loss)
        self.optimizer.zero_grad(set_to_none=True)
        return torch.tensor(False)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", forgetting)
        expected, _ = fit(config)
    for name, value in weights(expected).items():
        assert torch.equal(weights(found)[name], value), name
    assert all(np.isfinite(row["loss"]) for row in found.log if "loss" in row)


def test_one_more_bad_step_than_allowed_ends_the_run_and_says_whose_it_was(tmp_path, monkeypatch):
    from test_resume import fine_tune

    poison(monkeypatch, {2, 4})
    config = dataclasses.replace(TINY, bad_steps=1, save_every_minutes=1e-9, log_every_steps=1)
    message = (
        r"in step 4, and 1 are allowed \(finetune\.bad_steps\); its users and items are in (.*)\.json; lower"
    )
    with pytest.raises(TrainingError, match=message):
        fine_tune(config, tmp_path / "out")
    data = cycle()
    for step in (2, 4):
        whose = read_json(tmp_path / ".out.unfinished" / f"bad_step_{step}.json")
        assert whose["step"] == step and 0 < len(whose["users"]) == len(whose["items"]) <= 64
        assert set(whose["users"]) <= set(data.user_raw_ids) and set(whose["items"]) <= set(data.raw_ids)
    kept = sorted(path.name for path in (tmp_path / ".out.unfinished" / "checkpoints").glob("step-*"))
    assert kept == ["step-00000002", "step-00000003"], "nothing of step 4"


def test_an_accelerator_of_another_precision_in_this_process_is_named():
    AcceleratorState._reset_state()
    try:
        Accelerator(mixed_precision="bf16")
        with pytest.raises(ConfigError, match=r"made an Accelerator\(mixed_precision='bf16'\), and"):
            fit(TINY)
        AcceleratorState._reset_state()
        Accelerator()  # the script's own, of the same
        assert fit(dataclasses.replace(TINY, epochs=1))[0].log
    finally:
        AcceleratorState._reset_state()


def test_a_launcher_that_asks_for_compilation_or_accumulation_changes_no_result(monkeypatch, caplog):
    """What `accelerate config` once wrote into its default profile holds for every launch."""
    expected = weights(fit(dataclasses.replace(TINY, epochs=1))[0])
    AcceleratorState._reset_state()
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    try:
        with monkeypatch.context() as patch:
            patch.setattr(torch, "compile", None)
            found = weights(fit(dataclasses.replace(TINY, epochs=1))[0])
    finally:
        AcceleratorState._reset_state()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert "dynamo_backend=eager is left aside" in caplog.text


def test_code_width_and_constant_frequency_are_explained():
    wide = dataclasses.replace(TINY, mini=MiniConfig(hidden_size=32, num_heads=2))
    with pytest.raises(
        ConfigError, match=r"16 wide and the base model 32: set learn_semantic_ids\.code_dim=32"
    ):
        fit(wide)
    fit(dataclasses.replace(wide, project_codes=True, epochs=1))
    with pytest.raises(ConfigError, match=r"no frequency to fuse by; set finetune\.fusion=equal"):
        fit(TINY, interactions([[1, 2, 3, 4], [3, 4, 1, 2]], 4))


def test_foreign_or_missing_weights_are_refused():
    adapter, made = fit(TINY)
    heads = dict(adapter.heads)
    heads.pop("item_scores.target_table")
    with pytest.raises(ArtifactMismatchError, match=r"missing \['item_scores\.target_table'\]"):
        load_scorer(dataclasses.replace(adapter, heads=heads), *made)
    with pytest.raises(ArtifactMismatchError, match="different catalogues"):
        load_scorer(dataclasses.replace(adapter, catalog="other"), *made)


def test_a_loaded_model_is_on_one_device_however_it_was_trained(monkeypatch):
    """Under FSDP a base stays on the host until it is spread, and what is loaded to score is not."""
    plain = {
        "method": "e4srec",
        "fusion_temperature": 1e-3,
    }  # no gate, whose precision is asked of the device
    adapter, made = fit(dataclasses.replace(TINY, epochs=1, **plain))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("WORLD_SIZE", "2")
    model = load_scorer(adapter, *made, device=torch.device("meta")).score.run
    tensors = [*model.parameters(), *model.buffers(), model.instruction, model.response]
    assert {tensor.device.type for tensor in tensors} == {"meta"}


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> Path:
    return save_backbone(tmp_path_factory.mktemp("base"))


def test_lora_is_saved_for_plain_peft_and_scores_survive(pretrained, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    config = FinetuneConfig(
        base_model=str(pretrained), prompt="compact", epochs=3, batch_size=64, learning_rate=1e-2,
        fusion_temperature=1.0, warmup_steps=0,
    )  # fmt: skip
    adapter, made = fit(config)
    assert not adapter.base and len(adapter.lora) == 2 * 3 * 2
    adapter.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "analysis.json", "heads.safetensors",
        "llmrec_config.json", "log.jsonl", "metrics.json",
    }  # fmt: skip

    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(pretrained), tmp_path)
    loaded = {name: value for name, value in plain.state_dict().items() if "lora" in name}
    assert len(loaded) == len(adapter.lora)
    for name, value in loaded.items():
        assert torch.equal(value, adapter.lora[name.replace(".default", "")])
    assert any(value.abs().max() > 0 for name, value in loaded.items() if "lora_B" in name)

    history = torch.tensor([[1, 2, 3], [4, 0, 0]])
    scores = load_scorer(Adapter.load(tmp_path), *made).score(history)
    assert torch.equal(scores, load_scorer(adapter, *made).score(history))
    assert adapter.metrics["parameters"]["base_trainable"] == 2 * 3 * 4 * (16 + 24) * 2


def test_another_base_model_in_the_folder_of_the_one_that_was_trained_is_noticed(pretrained, tmp_path):
    base = shutil.copytree(pretrained, tmp_path / "base")
    adapter, made = fit(
        FinetuneConfig(base_model=str(base), prompt="compact", epochs=1, fusion_temperature=1.0)
    )
    load_scorer(adapter, *made)
    save_backbone(base, initializer_range=0.1)
    with pytest.raises(ArtifactMismatchError, match="base holds another model than the one that was fine-t"):
        load_scorer(adapter, *made)


def test_the_commit_that_was_trained_on_is_loaded_whatever_has_come_since(pretrained, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repo, first, second = tmp_path / "models--ann--base", "0" * 40, "1" * 40
    shutil.copytree(pretrained, repo / "snapshots" / first)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(first)
    config = FinetuneConfig(base_model="ann/base", prompt="compact", epochs=1, fusion_temperature=1.0)
    adapter, made = fit(config)
    assert adapter.settings["revision"] == adapter.lora_config["revision"] == first
    history = torch.tensor([[1, 2, 3], [4, 0, 0]])
    expected = load_scorer(adapter, *made).score(history)
    save_backbone(repo / "snapshots" / second, initializer_range=0.1)
    (repo / "refs" / "main").write_text(second)
    assert torch.equal(load_scorer(adapter, *made).score(history), expected)


def test_weights_that_score_otherwise_once_they_are_saved_are_refused():
    adapter, made = fit(dataclasses.replace(TINY, epochs=1))
    history = torch.tensor([[1, 2, 3], [4, 0, 0]])
    scores = load_scorer(adapter, *made).score(history)
    padding = scores.clone()
    padding[:, 0] += 1.0
    train.check_saved(adapter, (history, padding), *made)
    for wrong in (float(scores[1, 2]) * (1 + 1e-6), float("nan")):
        other = scores.clone()
        other[1, 2] = wrong
        with pytest.raises(ArtifactMismatchError, match="saved adapter scores differently"):
            train.check_saved(adapter, (history, other), *made)


def test_missing_base_models_and_layers_are_explained(pretrained, tmp_path):
    config = FinetuneConfig(base_model=str(tmp_path), prompt="compact")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        fit(config)
    shutil.copytree(pretrained, tmp_path / "odd")
    known = json.loads((tmp_path / "odd" / "config.json").read_text())
    (tmp_path / "odd" / "config.json").write_text(json.dumps(known | {"num_attention_heads": 7}))
    with pytest.raises(ConfigError, match="cannot be loaded"):
        fit(FinetuneConfig(base_model=str(tmp_path / "odd"), prompt="compact"))
    (tmp_path / "odd" / "config.json").write_text(json.dumps(known))
    (tmp_path / "odd" / "model.safetensors").rename(tmp_path / "odd" / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"cannot be loaded.*and safetensors weights"):
        fit(FinetuneConfig(base_model=str(tmp_path / "odd"), prompt="compact"))
    config = FinetuneConfig(base_model=str(pretrained), prompt="compact", lora_targets=("nothing",))
    with pytest.raises(ConfigError, match="has no linear layers called nothing, but q_proj"):
        fit(config)
    with pytest.raises(ConfigError, match=r"finetune.prompt=chat uses <\|begin_of_text\|>"):
        fit(dataclasses.replace(config, prompt="chat"))


@pytest.mark.real_data
def test_lora_trains_a_real_pretrained_llama(real_data):
    """The 260k-parameter story model has no tokenizer file, so the prompt is given in its ids."""
    from llmrec.finetune import base_model, build
    from llmrec.finetune.prompt import Prompt

    config = FinetuneConfig(
        base_model=str(real_data.parent / "models" / "tiny-llama-260k"), project_codes=True
    )
    prompt = Prompt(instruction=[1, 403, 407], response=[261], vocab_size=512)
    base = base_model.load_base(config, prompt)
    data = cycle(num_users=100)
    collab, content, ids = inputs(data)
    frozen = {name: value.clone() for name, value in base.named_parameters() if not value.requires_grad}
    model = build.build_model(
        config, base, prompt, build.item_vectors(config, collab, content, ids), ids,
        torch.arange(data.num_items + 1), torch.device("cpu"),
    )  # fmt: skip
    trainer = train.Trainer(
        dataclasses.replace(config, epochs=10, batch_size=100, learning_rate=1e-2, warmup_steps=0,
                            fusion="equal", fusion_temperature=1e-3), data, model,
    )  # fmt: skip
    trainer.run()
    losses = [row["loss"] for row in trainer.state.log if "loss" in row]
    assert losses[-1] < 0.5 * losses[0]
    assert all(torch.equal(value, base.get_parameter(name)) for name, value in frozen.items())


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        ({}, r"out of memory at step 1; lower finetune\.micro_batch_tokens \(8192 now\)"),
        ({"micro_batch_tokens": 1024}, r"set finetune\.checkpoint_activations=true"),
        ({"micro_batch_tokens": 1024, "checkpoint_activations": True}, "use a smaller base model"),
    ],
)
def test_a_full_gpu_is_answered_with_the_setting_to_turn(settings, advice, monkeypatch):
    def full(self, targets):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train.Trainer, "train_step", full)
    with pytest.raises(TrainingError, match=advice):
        fit(dataclasses.replace(TINY, **settings))
