"""MME-SID on Amazon Beauty with Llama-3-8B-Instruct: one user's history in one packed prompt.

Paper:     MME-SID (CIKM 2025), section 5.1 and Table 4: LoRA rank 8 on the feed-forward layers,
           learning rate 3e-4, 16 targets per step, 3 epochs, 100 warm-up steps, 4 levels of 256 codes
Run:       accelerate launch recipes/mme_sid_beauty.py --set prepare_data.interactions=interactions.csv \
               prepare_data.items=items.csv
           items.csv: item_id, title, brand, categories, image (paths of pictures)
Needs:     one GPU with 80 GB; access to the base model on the Hub
Differs:   OpenCLIP ViT-bigG-14 (1280 wide, text and image in one space) stands in for LLM2CLIP
Not run:   no GPU was at hand when this was written; recipes/mme_sid_beauty_mini.py is the same
           pipeline on a base that trains on a CPU, with measured results
"""

from llmrec.collab.config import SASRecConfig, TrainCollabConfig
from llmrec.data.config import PrepareDataConfig
from llmrec.encoders.config import EncodeItemsConfig, ImageEncoderConfig, TextEncoderConfig
from llmrec.finetune.config import FinetuneConfig
from llmrec.recipe import Recipe, main
from llmrec.semantic_ids.config import LearnSemanticIdsConfig

CLIP = {"encoder": "openclip", "model": "ViT-bigG-14", "pretrained": "laion2b_s39b_b160k"}


def recipe() -> Recipe:
    return Recipe(
        prepare_data=PrepareDataConfig(
            source="table",
            interactions="data/beauty/interactions.csv",
            items="data/beauty/items.csv",
            text_columns=("brand", "categories"),
            image_column="image",
            k_core=5,
        ),
        train_collab=TrainCollabConfig(sasrec=SASRecConfig(embed_dim=64, dropout_rate=0.5, loss="ce")),
        encode_items=EncodeItemsConfig(text=TextEncoderConfig(**CLIP), image=ImageEncoderConfig(**CLIP)),
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
            batch_targets=16,
            learning_rate=3e-4,
            warmup_steps=100,
            precision="bf16",
        ),
    )


if __name__ == "__main__":
    main(recipe)
