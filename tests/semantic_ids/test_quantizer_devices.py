"""MM-RQ-VAE on a GPU that is not there: the loss, running means and restarts keep to it."""

from __future__ import annotations

import pytest
import torch
from fake_gpu import fake_gpu
from test_mm_rqvae import SETTINGS

from llmrec.semantic_ids.mm_rqvae import MMRQVAE

CASES = [
    {},
    {"reconstruction": "mmd", "alignment": "mmd"},
    {"reconstruction": "mmd+mse", "mmd_estimator": "unbiased", "alignment": "none"},
    {"quantizer": {"estimator": "rotation"}},
    {"quantizer": {"codebook_update": "ema"}},
    {"quantizer": {"sinkhorn": "all"}},
]


@pytest.mark.parametrize("changes", CASES, ids=str)
def test_training_keeps_to_the_gpu(changes):
    quantizer = {**SETTINGS["quantizer"], **changes.get("quantizer", {})}
    model = MMRQVAE({"collab": 6, "text": 5}, **{**SETTINGS, **changes, "quantizer": quantizer})
    with fake_gpu() as gpu:
        gpu.move(model)
        vectors = {"collab": torch.randn(12, 6).to("cuda"), "text": torch.randn(12, 5).to("cuda")}
        encoded, losses = model(vectors)
        assert (losses.total.device.type, losses.total.dtype) == ("cuda", torch.float32)
        for name, found in encoded.items():
            quantised = found.quantized
            assert quantised.codes.device.type == "cuda" and quantised.codes.dtype == torch.int64
            own = model.autoencoders[name].quantizer
            if own.ema_decay is not None:
                own.follow(quantised.codes, quantised.residuals)
            used = torch.zeros(own.codebooks.shape[:2], dtype=torch.bool)
            own.restart(used, quantised.residuals, torch.Generator())
