"""Choices within the sequence models, on the sample market: released forms beside corrected ones, and what
the papers' parts do one at a time.

Run:       python recipes/variants_sample.py
           python recipes/variants_sample.py --rows sasrec mamba mamba-released --seeds 0 1 2   (some of it)
Settings:  those of recipes/providers_sample.py; DiffuRecSys's released form starts from N(0, 1), as
           published, and takes far more epochs
Measured:  README of this folder
"""

from dataclasses import replace

from providers_sample import recipe as with_provider

from llmrec.collab.compare_cli import Rows, main
from llmrec.collab.configs.mamba import MambaConfig
from llmrec.collab.configs.mamba4rec import Mamba4RecConfig
from llmrec.collab.configs.moe import MoeConfig
from llmrec.collab.configs.svae import SvaeConfig
from llmrec.data.config import PrepareDataConfig


def data() -> PrepareDataConfig:
    return with_provider().prepare_data


def rows() -> Rows:
    sasrec, svae, gmvae, mamba4rec, mamba, moe, diffurec, diffusion = (
        with_provider(name).train_collab
        for name in ("sasrec", "svae", "gmvae", "mamba4rec", "mamba", "moe", "diffurec", "diffusion")
    )
    prefixes = replace(mamba, batch_by="targets", batch_size=512)
    long = replace(diffusion, epochs=200, eval_every_epochs=20)
    return {
        "sasrec": sasrec,
        "svae": svae,
        "svae-released": replace(svae, svae=SvaeConfig(variance="released")),
        "gmvae": gmvae,
        # One learned Gaussian with its divergence in full, N(0, I) in its place, and categories of any use.
        "gmvae-1": replace(
            gmvae, gmvae=replace(gmvae.gmvae, num_interests=1, kl_weight=1.0, kl_cap=1.0, kl_steps=100)
        ),
        "gmvae-standard": replace(gmvae, gmvae=replace(gmvae.gmvae, prior="standard")),
        "gmvae-uneven": replace(gmvae, gmvae=replace(gmvae.gmvae, orthogonal_weight=0.0)),
        "mamba4rec": mamba4rec,
        "mamba4rec-released": replace(mamba4rec, mamba4rec=Mamba4RecConfig(init="released")),
        "mamba": mamba,
        "mamba-forward": replace(mamba, mamba=MambaConfig(flip="none")),
        "mamba-no-gru": replace(mamba, mamba=MambaConfig(gru=False)),
        "mamba-released": replace(prefixes, mamba=MambaConfig(variant="released")),
        "fuxi": with_provider("fuxi").train_collab,
        "moe": moe,
        "moe-one-expert": replace(moe, moe=MoeConfig(num_experts=1)),
        "moe-one-table": replace(moe, moe=MoeConfig(num_tables=1)),
        "diffurec": diffurec,
        "diffusion": diffusion,
        "diffusion-cross": replace(diffusion, diffusion=replace(diffusion.diffusion, offset=0.0)),
        "diffusion-offset": replace(diffusion, diffusion=replace(diffusion.diffusion, injection="add")),
        "diffusion-released": replace(
            long, diffusion=replace(diffusion.diffusion, variant="released", init_std=1.0, offset=0.0)
        ),
    }


if __name__ == "__main__":
    main(rows, data, name="variants_sample", description=__doc__)
