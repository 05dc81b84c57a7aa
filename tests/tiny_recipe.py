"""A recipe that runs every stage in seconds."""

from __future__ import annotations

from dataclasses import replace

from llmrec.collab.config import SASRecConfig, TrainCollabConfig
from llmrec.data.config import PrepareDataConfig, SampleMarketConfig
from llmrec.encoders.config import EncodeItemsConfig, ImageEncoderConfig, TextEncoderConfig
from llmrec.evaluation.config import EvaluateConfig
from llmrec.finetune.config import FinetuneConfig, MiniConfig
from llmrec.recipe import Recipe
from llmrec.semantic_ids.config import LearnSemanticIdsConfig


def tiny() -> Recipe:
    """Every stage, in seconds."""
    return Recipe(
        prepare_data=PrepareDataConfig(
            market=SampleMarketConfig(num_users=120, num_items=96, num_interests=8, max_length=10)
        ),
        train_collab=TrainCollabConfig(
            sasrec=SASRecConfig(embed_dim=16, num_layers=1, num_heads=2, inner_dim=32, dropout_rate=0.1),
            epochs=3,
        ),
        encode_items=EncodeItemsConfig(text=TextEncoderConfig(dim=16), image=ImageEncoderConfig(dim=16)),
        learn_semantic_ids=LearnSemanticIdsConfig(
            num_codes=8, num_levels=2, code_dim=16, hidden_dims=(32,), epochs=5, batch_size=96
        ),
        finetune=FinetuneConfig(
            mini=MiniConfig(hidden_size=16, num_layers=1, num_heads=2, intermediate_size=32),
            prompt="compact",
            fusion_temperature=1.0,
            epochs=2,
            batch_size=128,
            learning_rate=3e-3,
            warmup_steps=2,
        ),
        evaluate=EvaluateConfig(bootstrap_samples=50, num_examples=3),
    )


def chosen_by_validation() -> Recipe:
    """The same, but fine-tuning keeps the epoch that is best on the validation items."""
    made = tiny()
    return replace(made, finetune=replace(made.finetune, select="valid"))
