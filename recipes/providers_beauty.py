"""Every sequence model on Amazon Beauty, three seeds each: one table and one page.

Run:       python recipes/providers_beauty.py --set prepare_data.interactions=interactions.csv
           python recipes/providers_beauty.py --rows sasrec gmvae --seeds 0 1 2 --jobs 2   (some of it)
           python recipes/providers_beauty.py --summarise   (the table of what is finished so far)
           tiger and motor are left out without --encode-items FOLDER (of `llmrec encode_items`)
Settings:  the models' defaults, and what their papers give for Beauty: 512 prefixes a step for the diffusion
           models, whose released forms start from N(0, 1) and take hundreds of epochs. Dropout 0.5 for SASRec
           and BERT4Rec as for other sparse data. More patience for models that learn slowly (BERT4Rec, binary
           cross-entropy) or in two phases (SIGMA-GMVAE, whose hard interests begin with epoch 32).
Measured:  README of this folder
"""

from dataclasses import replace

from llmrec.collab.compare_cli import Rows, main
from llmrec.collab.config import TrainCollabConfig
from llmrec.collab.configs.bert4rec import Bert4RecConfig
from llmrec.collab.configs.comirec import ComirecConfig
from llmrec.collab.configs.diffusion import DiffusionConfig
from llmrec.collab.configs.fuxi import FuxiConfig
from llmrec.collab.configs.gmvae import GmvaeConfig
from llmrec.collab.configs.mamba import MambaConfig
from llmrec.collab.configs.mamba4rec import Mamba4RecConfig
from llmrec.collab.configs.sasrec import SASRecConfig
from llmrec.collab.configs.svae import SvaeConfig
from llmrec.data.config import PrepareDataConfig


def data() -> PrepareDataConfig:
    return PrepareDataConfig(source="table", interactions="data/beauty/interactions.csv")


def rows() -> Rows:
    gmvae = TrainCollabConfig(provider="gmvae", patience=20)
    prefixes = TrainCollabConfig(batch_by="targets", batch_size=2048)
    noisy = TrainCollabConfig(batch_by="targets", batch_size=512, eval_every_epochs=2, patience=5)
    released = replace(noisy, epochs=500, eval_every_epochs=20, decay_every_epochs=100)
    return {
        "sasrec": TrainCollabConfig(),
        "sasrec-bce": TrainCollabConfig(sasrec=SASRecConfig(loss="bce"), epochs=400, patience=30),
        "gru4rec": TrainCollabConfig(provider="gru4rec"),
        "bert4rec": TrainCollabConfig(
            provider="bert4rec", bert4rec=Bert4RecConfig(dropout_rate=0.5), batch_size=64, patience=20
        ),
        "svae": TrainCollabConfig(provider="svae", batch_size=32),
        "svae-released": TrainCollabConfig(
            provider="svae", svae=SvaeConfig(variance="released"), batch_size=32
        ),
        "gmvae": gmvae,
        # Seed experiments of SIGMA-GMVAE: one Gaussian (learned; N(0, I) is prior="standard") at full weight,
        # which annealing reaches in epoch 12 of 88 steps each; and no orthogonality.
        "gmvae-1": replace(
            gmvae, gmvae=GmvaeConfig(num_interests=1, kl_weight=1.0, kl_cap=1.0, kl_steps=1000)
        ),
        "gmvae-uneven": replace(gmvae, gmvae=GmvaeConfig(orthogonal_weight=0.0)),
        "mamba4rec": TrainCollabConfig(provider="mamba4rec"),
        "mamba4rec-released": TrainCollabConfig(
            provider="mamba4rec", mamba4rec=Mamba4RecConfig(init="released")
        ),
        "mamba": TrainCollabConfig(provider="mamba"),
        "mamba-released": replace(prefixes, provider="mamba", mamba=MambaConfig(variant="released")),
        "diffurec": replace(noisy, provider="diffurec"),
        "diffusion": replace(noisy, provider="diffusion"),
        # What each of DiffuRecSys's two additions does by itself.
        "diffusion-cross": replace(noisy, provider="diffusion", diffusion=DiffusionConfig(offset=0.0)),
        "diffusion-offset": replace(noisy, provider="diffusion", diffusion=DiffusionConfig(injection="add")),
        "diffusion-released": replace(
            released,
            provider="diffusion",
            diffusion=DiffusionConfig(variant="released", init_std=1.0, offset=0.0),
        ),
        "fuxi": TrainCollabConfig(provider="fuxi"),
        # As released: it knows when the target came.
        "fuxi-request": TrainCollabConfig(provider="fuxi", fuxi=FuxiConfig(use_request_time=True)),
        "moe": TrainCollabConfig(provider="moe"),
        "comirec": TrainCollabConfig(provider="comirec"),
        "comirec-dr": TrainCollabConfig(
            provider="comirec", comirec=ComirecConfig(routing="capsule"), learning_rate=5e-3
        ),
        # Interests are shorter than 1, so scores grow as slowly as item vectors do: large steps, and many.
        "mind": TrainCollabConfig(
            provider="mind", batch_by="targets", batch_size=512, learning_rate=5e-3, eval_every_epochs=2
        ),
        # Codes of texts: these two need --encode-items, the output of `llmrec encode_items`.
        "tiger": TrainCollabConfig(
            provider="tiger", batch_by="targets", batch_size=256, eval_every_epochs=2, patience=10
        ),
        "motor": TrainCollabConfig(provider="motor"),
    }


if __name__ == "__main__":
    main(rows, data, name="providers_beauty", description=__doc__)
