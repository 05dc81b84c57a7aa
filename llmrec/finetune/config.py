"""Settings of finetune."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from llmrec.config import Settings, StageSettings, require
from llmrec.finetune.method_table import (
    FREQUENCY_FIELDS,
    FusionName,
    MethodName,
    method_of,
    without_effect,
)
from llmrec.own import OwnName, OwnSettings, is_own


@dataclass(frozen=True, kw_only=True)
class MiniConfig(Settings, path="finetune.mini"):
    """Size of the ``mini`` base model: a small Llama, trained in full, for CPUs and tests."""

    hidden_size: int = 128
    """Width H; equals learn_semantic_ids.code_dim unless finetune.project_codes is set."""

    num_layers: int = 2
    """Transformer blocks."""

    num_heads: int = 4
    """Attention heads."""

    intermediate_size: int = 256
    """Width inside the feed-forward part."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.hidden_size % (2 * self.num_heads) == 0,
            "finetune.mini.hidden_size must be divisible by twice num_heads (rotary positions need an "
            f"even head width), got {self.hidden_size} and {self.num_heads}",
        )
        require(self.num_layers >= 1, f"finetune.mini.num_layers must be >= 1, got {self.num_layers}")


LORA_FIELDS = ("lora_rank", "lora_alpha", "lora_dropout_rate", "lora_targets")
"""Settings of LoRA, which a base model of random weights does without."""

CHANGE_NO_RESULT = (
    *("micro_batch_tokens", "checkpoint_activations", "rows", "attention", "compile", "kernels"),
    "cuda_graphs",
    *("log_every_steps", "save_every_minutes", "bad_steps"),
)
"""Settings that change how a run computes: beyond rounding, and which numbers dropout draws, nothing of what.
A stopped run may go on with others, and a finished one stands under others."""


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(StageSettings, path="finetune"):
    """Fine-tuning a causal language model on item tokens, with LoRA (MME-SID section 4.3)."""

    base_model: str = "mini"
    """Hub id or local folder of a Llama-like causal language model, or 'mini'."""

    revision: str | None = None
    """Commit of base_model on the Hub, so that a run can be repeated; none: the newest."""

    mini: MiniConfig = field(default_factory=MiniConfig)

    prompt: str = "chat"
    """Template: a name in prompts/ or the path of a TOML file."""

    lora_rank: int = 8
    """Rank of the LoRA matrices."""

    lora_alpha: float = 16.0
    """LoRA scale; updates are multiplied by lora_alpha / lora_rank."""

    lora_dropout_rate: float = 0.0
    """Dropout before the LoRA matrices (official: 0.05)."""

    lora_targets: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    """Names of the linear layers that get LoRA matrices."""

    method: MethodName | OwnName = "mme_sid"
    """What an item's tokens are made of: MME-SID, a method it is compared with, or an ablation; see
    llmrec/finetune/methods.py. A method of your own is package.module:Class, a
    `llmrec.finetune.item_inputs.ItemTokens`; its settings are in own."""

    own: OwnSettings = field(default_factory=dict)
    """Settings of a method of your own, by name of its constructor's arguments, such as
    width=64,dropout_rate=0.2; the inputs come before them."""

    me_mode: Literal["concat", "sum"] = "concat"
    """method=me: the collaborative vector and the table's row concatenated, or added."""

    concat_mode: Literal["sequence", "feature"] = "sequence"
    """method=concat: one token per modality, collaborative, image, text, or one token that they share."""

    own_dim: int = 64
    """method=me, se_random: width of the table trained from random numbers."""

    ctrl_weight: float = 0.1
    """method=ctrl_mm, or your own with an alignment: weight of its loss beside the cross-entropy."""

    ctrl_temperature: float = 0.1
    """method=ctrl_mm: softmax temperature of the alignment loss."""

    ctrl_stage: Literal["joint", "two"] = "joint"
    """method=ctrl_mm: align while fine-tuning, or first of all (CTRL's own way)."""

    ctrl_epochs: int = 20
    """ctrl_stage=two: passes over the items before fine-tuning, at most 1,024 items a step."""

    project_codes: bool = False
    """Put a linear map between code embeddings and the model; needed if code_dim differs from H."""

    random_codes: bool = False
    """Ablation MME-SID-random: start the code embeddings from N(0, 0.02) instead of the codebooks."""

    mlp_expansion: float | None = None
    """Hidden width of the item MLP, in multiples of H; none: half of what goes in (MME-SID with three
    modalities: 3, as published)."""

    mlp_out_activation: Literal["gelu", "none"] = "gelu"
    """After the item MLP: the published code has a GELU there, the paper's Eq. 13 none."""

    vectors: Literal["raw", "standardise", "whiten", "l2"] = "raw"
    """Scaling of the frozen item vectors: as encoded; centred, with unit variance per modality, or in every
    direction (see llmrec/finetune/scaling.py); or unit rows."""

    fusion: Literal["auto", FusionName] = "auto"
    """Weights of the score sources: by item frequency, all equal, each 1 (sum), or the target table alone;
    auto: frequency for mme_sid and mme_random, sum for se_sid, target for all others, your own among them."""

    fusion_weights: Literal["all", "modalities"] = "all"
    """Which sources share the frequency-driven weights: all (published code), or the modalities alone, with
    the target table added in full (one reading of the paper's Eq. 14)."""

    fusion_temperature: float = 1e-3
    """Softmax temperature of the fusion weights; small ones pick one source per item."""

    target_std: float | None = None
    """Standard deviation of the target table's initial values; none: 1 / sqrt(H). Where other sources score
    too, random scores of items that are rarely trained stand in their way: 0.02 or less is better there."""

    max_history: int | None = None
    """Most items that are shown before a target; none: all. Of longer histories every max_history targets,
    from the last one back, share the items before the last of them, as rows of sequence models do."""

    max_targets: int | None = 50
    """Last so many items of a user's training history serve as targets; none: all."""

    targets: Literal["all", "last_only"] = "all"
    """Which of them: every one after its prefix, or each user's last (the paper's wording)."""

    include_valid: bool = False
    """Train on the validation items too; nothing is left to validate on, so eval_every_epochs must be 0."""

    skip_empty: bool = False
    """Leave out targets that nothing was seen before."""

    count_valid: bool = False
    """Count validation items too where items are weighed by frequency; nothing can be validated then, as with
    include_valid."""

    loss: Literal["ce", "bce_full", "bce_sampled"] = "ce"
    """Cross-entropy over the catalogue; binary cross-entropy summed over the catalogue; or binary
    cross-entropy of the target and one uniformly drawn other item."""

    mask_pad: bool = True
    """Keep the padding row out of the loss (the published code lets it compete)."""

    readout: Literal["response", "item"] = "response"
    """Where the model is read out: at the last token of the response header, or at the last item's token,
    which needs no header (a different model, and 2 to 5 times fewer tokens)."""

    pad_quirk: bool = False
    """Do as the published collator: histories of 0 and 1 items leave room for 2 before the response."""

    layout: Literal["packed", "per_prefix"] = "packed"
    """packed: a user's history is encoded once for all targets; per_prefix: once per target."""

    share_instruction: bool = True
    """Encode the instruction once per micro-batch instead of once per row."""

    rows: Literal["auto", "padded", "stream"] = "auto"
    """padded: rows of similar length side by side (fast on CPUs); stream: all tokens of a micro-batch one
    behind the other, no padding (fast on GPUs); auto: by device."""

    attention: Literal["auto", "sdpa", "flex"] = "auto"
    """Attention kernel: torch's scaled dot product with a dense mask, or FlexAttention with block masks
    (streams on a GPU); auto: by device."""

    epochs: int = 3
    """Passes over the training targets."""

    batch_size: int = 16
    """Targets per optimiser step, over all processes (or users, or tokens, see batch_by)."""

    batch_by: Literal["targets", "users", "tokens"] = "targets"
    """What batch_size counts. Only with targets do all steps weigh targets alike."""

    micro_batch_tokens: int = 8192
    """Most tokens in one forward pass of one process, padding included; lower it if memory runs out."""

    learning_rate: float = 3e-4
    """Peak learning rate of AdamW."""

    weight_decay: float = 0.0
    """AdamW weight decay."""

    warmup_steps: int = 100
    """Optimiser steps of linear warm-up, at most half of all, before a cosine to zero."""

    schedule_epochs: int | None = None
    """Epochs after which the cosine would reach zero, at least `epochs`; none: `epochs`. --refit sets it to
    the epochs among which one was chosen."""

    clip_norm: float = 1.0
    """Largest norm of the gradient; it is scaled down to this."""

    dropout_rate: float = 0.0
    """Dropout on item tokens and on the read-out vector."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """fp32, or bf16: frozen base weights and matrix products in bfloat16."""

    quantize: Literal["none", "nf4"] = "none"
    """nf4: frozen base weights in 4 bits (bitsandbytes, double quantisation), for small cards."""

    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    """AdamW with states in float32, or in 8 bits (bitsandbytes)."""

    checkpoint_activations: bool = False
    """Compute activations twice in place of keeping them: half more time and no recorded passes, but much
    less memory in long ones."""

    cuda_graphs: bool = True
    """Record the base model's passes once per length of stream and replay them (one process on a GPU,
    activations kept, up to 4,096 tokens a pass): asking for thousands of operations a step takes a CPU longer
    than doing them takes the GPU."""

    compile: bool = False
    """Compile the base model's blocks (torch.compile, block by block): some 20 s before the first steps, and
    a fifth less time a step (tools/engine.md)."""

    kernels: Literal["torch", "liger"] = "torch"
    """liger: fused RMSNorm, SwiGLU and rotary positions (a GPU; pip install liger-kernel), about as fast as
    compile, in its place."""

    bad_steps: int = 0
    """Steps with a NaN or infinite loss or gradient that are left out; one more ends the run."""

    save_every_minutes: float = 10.0
    """Minutes between checkpoints that a stopped run goes on from; 0: none."""

    eval_every_epochs: int = 1
    """Epochs between rankings of the validation items; 0: never."""

    select: Literal["last", "valid"] = "last"
    """Weights to keep: of the last epoch, or of the epoch with the best validation ndcg@10."""

    patience: int | None = None
    """Stop after so many validations in a row without a better ndcg@10, with select='valid'; none: train all
    epochs. The learning rate falls as it would over all of them."""

    mask_seen: bool = True
    """Leave items of a user's history out when validation items are ranked, as evaluate.mask_seen does for
    test items."""

    log_every_steps: int = 20
    """Optimiser steps between rows of the log."""

    analyse: bool = True
    """Measure afterwards what became of the item tables: Kendall's tau, singular spectra (minutes for 8B)."""

    seed: int = 0
    """Seed of initial weights, data order and dropout."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in (
            *("epochs", "batch_size", "micro_batch_tokens", "lora_rank", "log_every_steps"),
            *("own_dim", "ctrl_epochs"),
        ):
            value = getattr(self, name)
            require(value >= 1, f"finetune.{name} must be at least 1, got {value}")
        for name in (
            *("learning_rate", "lora_alpha", "fusion_temperature", "mlp_expansion", "clip_norm"),
            *("ctrl_weight", "ctrl_temperature"),
        ):
            value = getattr(self, name)
            require(value is None or value > 0, f"finetune.{name} must be greater than 0, got {value}")
        for name in ("lora_dropout_rate", "dropout_rate"):
            value = getattr(self, name)
            require(0 <= value < 1, f"finetune.{name} must lie in [0, 1), got {value}")
        for name in ("max_history", "max_targets", "patience"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"finetune.{name} must be none or >= 1, got {value}")
        require(
            self.schedule_epochs is None or self.schedule_epochs >= self.epochs,
            f"finetune.schedule_epochs must be none or at least finetune.epochs={self.epochs}, got "
            f"{self.schedule_epochs}",
        )
        require(
            self.target_std is None or self.target_std >= 0,
            f"finetune.target_std must be none or at least 0, got {self.target_std}",
        )
        for name in (
            "seed",
            "weight_decay",
            "warmup_steps",
            "eval_every_epochs",
            "bad_steps",
            "save_every_minutes",
        ):
            value = getattr(self, name)
            require(value >= 0, f"finetune.{name} must be at least 0, got {value}")
        require(
            self.select == "last" or self.eval_every_epochs > 0,
            "finetune.select='valid' needs finetune.eval_every_epochs >= 1, got 0",
        )
        self._check_combinations()
        self._refuse_settings_without_effect()

    def _check_combinations(self) -> None:
        """Settings that contradict each other."""
        require(
            not self.include_valid or self.eval_every_epochs == 0,
            "finetune.include_valid trains on the validation items, so they can measure nothing; set "
            f"finetune.eval_every_epochs=0, got {self.eval_every_epochs}",
        )
        require(
            not self.count_valid or self.eval_every_epochs == 0,
            "finetune.count_valid tells the model how often validation items occur, so they can measure "
            f"nothing; set finetune.eval_every_epochs=0, got {self.eval_every_epochs}",
        )
        require(
            not self.pad_quirk or self.readout == "response",
            "finetune.pad_quirk moves the response, which finetune.readout='item' does not have",
        )
        require(
            self.rows != "stream" or self.share_instruction,
            "finetune.rows='stream' holds the instruction once; set finetune.share_instruction=true",
        )
        require(
            self.attention != "flex" or self.rows != "padded",
            "finetune.attention='flex' works on streams; set finetune.rows=stream or auto",
        )
        require(
            not self.checkpoint_activations or self.rows != "padded" or not self.share_instruction,
            "finetune.checkpoint_activations cannot keep a shared instruction beside padded rows; set "
            "finetune.rows=stream, or finetune.share_instruction=false",
        )
        require(
            self.quantize == "none" or self.precision == "bf16",
            f"finetune.quantize={self.quantize!r} computes in bfloat16; set finetune.precision=bf16",
        )
        require(
            not self.compile or self.kernels == "torch",
            f"finetune.compile cannot trace the kernels of finetune.kernels={self.kernels!r}; leave one out",
        )

    def _refuse_settings_without_effect(self) -> None:
        """A setting that cannot change the result is a mistake of whoever set it."""
        if self.is_mini:
            reason = "base_model='mini', which is trained in full"
            self.refuse_changed(["revision", *LORA_FIELDS, "quantize"], reason)
        else:
            self.refuse_changed(["mini"], f"base_model={self.base_model!r}")
        if self.fusion_used != "frequency":
            self.refuse_changed(FREQUENCY_FIELDS, f"fusion={self.fusion_used!r}")
        reason = f"method={self.method!r}"
        unused = without_effect(self.method)
        if self.method == "se_random":
            unused += ["vectors"] + ["fusion"] * (self.fusion != "target")
        if self.method == "ctrl_mm":
            reason += f", ctrl_stage={self.ctrl_stage!r}"
        unused += ["ctrl_epochs"] if self.ctrl_stage == "joint" else ["ctrl_weight"]
        self.refuse_changed(unused, reason)
        if self.loss == "bce_sampled":
            self.refuse_changed(["mask_pad"], "loss='bce_sampled', which draws items alone")
        if self.targets == "last_only":
            self.refuse_changed(["max_targets"], "targets='last_only'")
        if self.select == "last":
            self.refuse_changed(["patience"], "select='last'")
        if not self.eval_every_epochs:
            self.refuse_changed(["mask_seen"], "eval_every_epochs=0")

    def incidental_fields(self) -> tuple[str, ...]:
        """Settings that change how the result is computed, but not the result, except for rounding."""
        return CHANGE_NO_RESULT

    def source_files(self) -> dict[str, str]:
        """The users' own files that the result depends on, by setting."""
        return {"prompt": self.prompt} if self.prompt.endswith(".toml") else {}

    def own_classes(self) -> dict[str, str]:
        """Classes of the users' own whose code the result depends on, by setting."""
        return {"method": self.method} if is_own(self.method) else {}

    def model_folders(self) -> dict[str, str]:
        """Models that may lie in folders of the user's, by setting."""
        return {} if self.is_mini else {"base_model": self.base_model}

    @property
    def fusion_used(self) -> FusionName:
        """What fusion='auto' stands for."""
        if self.fusion != "auto":
            return self.fusion
        return method_of(self.method).fusion

    @property
    def is_mini(self) -> bool:
        return self.base_model == "mini"
