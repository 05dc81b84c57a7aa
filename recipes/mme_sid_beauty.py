"""MME-SID on Amazon Beauty with Llama-3-8B-Instruct: one user's history in one packed prompt.

Paper:     MME-SID (CIKM 2025), section 5.1 and Table 4: LoRA rank 8 on the feed-forward layers,
           learning rate 3e-4, 16 targets per step, 3 epochs, 100 warm-up steps, 4 levels of 256 codes
Run:       accelerate launch recipes/mme_sid_beauty.py
Fetches:   reviews and metadata (2014), one picture per item, into data/amazon_2014; the models from the Hub
Needs:     one GPU with 40 GB or more (fine-tuning took 21.9 GB with a random base of this shape, and the
           vocabulary takes 1 GB more: 24 GB are tight); access to the base model on the Hub
Takes:     an epoch of fine-tuning 6.1 minutes on an H200, 4.7 to 5.0 with finetune.compile=true; measured
           with a random base of this shape and no dropout (tools/engine.md)
Not run:   from end to end, for want of the base's weights; recipes/mme_sid_beauty_mini.py is the same
           pipeline on a base that trains on a CPU, with measured results
"""

from llmrec.collab.config import SASRecConfig, TrainCollabConfig
from llmrec.data.config import Category, PrepareDataConfig
from llmrec.encoders.config import EncodeItemsConfig, ImageEncoderConfig, TextEncoderConfig
from llmrec.finetune.config import FinetuneConfig
from llmrec.recipe import Recipe, main
from llmrec.semantic_ids.config import LearnSemanticIdsConfig


def recipe(category: Category = "beauty") -> Recipe:
    return Recipe(
        prepare_data=PrepareDataConfig(
            source="amazon_2014",
            category=category,
            folder="data/amazon_2014",
            image_folder=f"data/amazon_2014/{category}_pictures",
            incomplete_items="drop",
        ),
        train_collab=TrainCollabConfig(sasrec=SASRecConfig(embed_dim=64, dropout_rate=0.5, loss="ce")),
        encode_items=EncodeItemsConfig(
            text=TextEncoderConfig(encoder="llm2clip", columns=("title", "brand", "categories")),
            image=ImageEncoderConfig(encoder="llm2clip", on_error="missing"),
        ),
        learn_semantic_ids=LearnSemanticIdsConfig(
            num_levels=4, num_codes=256, code_dim=4096, hidden_dims=(4096, 4096, 4096), learning_rate=2e-4
        ),
        finetune=FinetuneConfig(
            base_model="meta-llama/Meta-Llama-3-8B-Instruct",
            prompt="chat",
            lora_rank=8,
            lora_alpha=16,
            lora_dropout_rate=0.05,
            fusion_temperature=1e-3,
            epochs=3,
            batch_size=16,
            learning_rate=3e-4,
            warmup_steps=100,
            precision="bf16",
        ),
    )


if __name__ == "__main__":
    main(recipe)
