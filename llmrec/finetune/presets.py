"""Settings of finetune as we recommend them, as the paper prints them, and as the published code has them."""

from __future__ import annotations

from llmrec.finetune.config import FinetuneConfig

PRESETS: dict[str, FinetuneConfig] = {
    "default": FinetuneConfig(),
    "paper": FinetuneConfig(
        base_model="meta-llama/Meta-Llama-3-8B-Instruct",
        precision="bf16",
        lora_dropout_rate=0.05,
        loss="bce_full",
        targets="last_only",
        include_valid=True,
        eval_every_epochs=0,
        max_history=50,
        mlp_out_activation="none",
        fusion_weights="modalities",
    ),
    "official": FinetuneConfig(
        base_model="meta-llama/Meta-Llama-3-8B-Instruct",
        prompt="official17",
        precision="bf16",
        quantize="nf4",
        checkpoint_activations=True,
        lora_dropout_rate=0.05,
        mask_pad=False,
        pad_quirk=True,
        target_std=0.00902,  # a linear layer of 4,096 inputs starts as U(-1, 1) / sqrt(4096)
        epochs=4,
    ),
}
"""default: what we recommend; paper: MME-SID as printed, our default where the paper says nothing;
official: the published code (Applied-Machine-Learning-Lab/MME-SID@bc95e1a), in packed prompts and bfloat16 in
place of float16 with scaled losses."""
