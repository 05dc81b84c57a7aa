"""Every sequence model on Amazon Beauty, three seeds each: one table and one page.

Run:       python recipes/providers_beauty.py --data interactions=interactions.csv
           python recipes/providers_beauty.py --rows sasrec gmvae --seeds 0 1 2 --jobs 2   (some of it)
           python recipes/providers_beauty.py --summarise   (the table of what is finished so far)
Settings:  the models' defaults where their papers give Beauty's; dropout 0.5 as for SASRec where a paper
           gives none for sparse data. BERT4Rec gets more epochs of patience, since it learns slowly.
"""

from llmrec.collab.compare_cli import Rows, main
from llmrec.collab.config import TrainCollabConfig
from llmrec.collab.configs.bert4rec import Bert4RecConfig
from llmrec.collab.configs.diffusion import DiffusionConfig
from llmrec.collab.configs.mamba import MambaConfig
from llmrec.collab.configs.sasrec import SASRecConfig
from llmrec.data.config import PrepareDataConfig


def data() -> PrepareDataConfig:
    return PrepareDataConfig(source="table", interactions="data/beauty/interactions.csv")


def rows() -> Rows:
    return {
        "sasrec": TrainCollabConfig(),
        "sasrec-bce": TrainCollabConfig(sasrec=SASRecConfig(loss="bce")),
        "gru4rec": TrainCollabConfig(provider="gru4rec"),
        "bert4rec": TrainCollabConfig(
            provider="bert4rec", bert4rec=Bert4RecConfig(dropout_rate=0.5, num_masks=4), patience=20
        ),
        "svae": TrainCollabConfig(provider="svae"),
        "gmvae": TrainCollabConfig(provider="gmvae"),
        "mamba4rec": TrainCollabConfig(provider="mamba4rec"),
        "mamba": TrainCollabConfig(provider="mamba"),
        "mamba-released": TrainCollabConfig(provider="mamba", mamba=MambaConfig(variant="released")),
        "diffurec": TrainCollabConfig(provider="diffurec", eval_every_epochs=5, patience=4),
        "diffusion": TrainCollabConfig(provider="diffusion", eval_every_epochs=5, patience=4),
        "diffusion-released": TrainCollabConfig(
            provider="diffusion",
            diffusion=DiffusionConfig(variant="released"),
            eval_every_epochs=5,
            patience=4,
        ),
        "fuxi": TrainCollabConfig(provider="fuxi"),
        "moe": TrainCollabConfig(provider="moe"),
        "comirec": TrainCollabConfig(provider="comirec"),
        "mind": TrainCollabConfig(provider="mind"),
    }


if __name__ == "__main__":
    main(rows, data, name="providers_beauty", description=__doc__)
