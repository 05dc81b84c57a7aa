"""Every sequence model on MovieLens-1M, three seeds each: one table and one page.

Data:      ratings.dat of MovieLens-1M (GroupLens), 5-core: 6,040 users, 3,416 items, 999,611 ratings
Run:       python recipes/providers_ml1m.py --set prepare_data.interactions=ml-1m/ratings.dat
           python recipes/providers_ml1m.py --rows sasrec mamba4rec --seeds 0 1 2   (some of it)
           python recipes/providers_ml1m.py --summarise   (the table of what is finished so far)
Settings:  histories of 200 and dropout 0.2, as most papers have them for this data set; where a model's own
           paper or code gives MovieLens-1M's, those: 8 interests (SIGMA-GMVAE), FuXi-alpha's small form,
           512 prefixes a step for the diffusion models, width 256 and histories of 100 for DiffuRecSys; 2,048
           targets a step from all windows of a user for the recurrent models, as RecBole trains them; short
           histories for MIND, by validation
Measured:  README of this folder; a GPU is advised: a core of a CPU takes a minute an epoch for SASRec, and
           hours for the models that learn from one prefix at a time
"""

from dataclasses import replace

from llmrec.collab.compare_cli import Rows, main
from llmrec.collab.config import TrainCollabConfig
from llmrec.collab.configs.bert4rec import Bert4RecConfig
from llmrec.collab.configs.comirec import ComirecConfig
from llmrec.collab.configs.diffurec import DiffurecConfig
from llmrec.collab.configs.diffusion import DiffusionConfig
from llmrec.collab.configs.fuxi import FuxiConfig
from llmrec.collab.configs.gmvae import GmvaeConfig
from llmrec.collab.configs.gru4rec import GRU4RecConfig
from llmrec.collab.configs.mamba import MambaConfig
from llmrec.collab.configs.mamba4rec import Mamba4RecConfig
from llmrec.collab.configs.mind import MindConfig
from llmrec.collab.configs.moe import MoeConfig
from llmrec.collab.configs.motor import MotorConfig
from llmrec.collab.configs.sasrec import SASRecConfig
from llmrec.collab.configs.svae import SvaeConfig
from llmrec.data.config import PrepareDataConfig


def data() -> PrepareDataConfig:
    return PrepareDataConfig(source="table", interactions="data/ml-1m/ratings.dat")


def rows() -> Rows:
    # Of a user's last 200 targets there are 107 in the mean: a step of 128 users is nine times one on Beauty.
    users = TrainCollabConfig(batch_size=128)
    recurrent = TrainCollabConfig(batch_by="targets", batch_size=2048, windows="all")
    prefixes = TrainCollabConfig(batch_by="targets", batch_size=2048)
    noisy = TrainCollabConfig(batch_by="targets", batch_size=512, eval_every_epochs=2, patience=5)
    # A weight decay of the size that the release has; ours is decoupled (AdamW).
    released = replace(noisy, weight_decay=1e-4, decay_every_epochs=30)
    sasrec = SASRecConfig(max_history=200, dropout_rate=0.2)
    fuxi = FuxiConfig(max_history=200, embed_dim=50, num_heads=1, inner_multiplier=1, dropout_rate=0.2)
    mamba = MambaConfig(max_history=200)
    diffusion = DiffusionConfig(max_history=100, embed_dim=256)
    return {
        "sasrec": replace(users, sasrec=sasrec),
        "sasrec-bce": replace(users, sasrec=replace(sasrec, loss="bce")),
        "gru4rec": replace(recurrent, provider="gru4rec", gru4rec=GRU4RecConfig(max_history=200)),
        "bert4rec": replace(
            users, provider="bert4rec", bert4rec=Bert4RecConfig(max_history=200), patience=20
        ),
        "svae": replace(users, provider="svae", svae=SvaeConfig(max_history=200), batch_size=16),
        "gmvae": replace(
            users,
            patience=20,
            provider="gmvae",
            gmvae=GmvaeConfig(
                max_history=200,
                num_interests=8,
                dropout_rate=0.2,
                attention_dropout_rate=0.2,
                kl_steps=20_000,
            ),
        ),
        "mamba4rec": replace(recurrent, provider="mamba4rec", mamba4rec=Mamba4RecConfig(max_history=200)),
        "mamba": replace(recurrent, provider="mamba", mamba=mamba),
        "mamba-released": replace(prefixes, provider="mamba", mamba=replace(mamba, variant="released")),
        "diffurec": replace(noisy, provider="diffurec", diffurec=DiffurecConfig(max_history=200)),
        "diffusion": replace(noisy, provider="diffusion", diffusion=diffusion),
        "diffusion-released": replace(
            released,
            provider="diffusion",
            diffusion=replace(diffusion, variant="released", init_std=1.0, offset=0.0),
        ),
        "fuxi": replace(users, provider="fuxi", fuxi=fuxi),
        # As released: it knows when the target came.
        "fuxi-request": replace(users, provider="fuxi", fuxi=replace(fuxi, use_request_time=True)),
        "moe": replace(users, provider="moe", moe=MoeConfig(max_history=200, dropout_rate=0.2)),
        # Means of 200 vectors are short: at 128 users and 1e-3 two seeds of three had stopped at nothing.
        "comirec": replace(
            users,
            provider="comirec",
            comirec=ComirecConfig(max_history=200),
            batch_size=16,
            learning_rate=5e-3,
        ),
        # Interests do not know the order of a history: those of 200 items are the same for any target.
        "mind": replace(noisy, provider="mind", mind=MindConfig(max_history=10), learning_rate=5e-3),
        # Codes of texts: these two need --encode-items, the output of `llmrec encode_items`.
        "tiger": replace(noisy, provider="tiger", batch_size=256, patience=10),
        "motor": replace(users, provider="motor", motor=MotorConfig(max_history=200, dropout_rate=0.2)),
    }


if __name__ == "__main__":
    main(rows, data, name="providers_ml1m", description=__doc__)
