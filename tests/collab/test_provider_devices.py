"""Sequence models on a GPU that is not there: what they score with lies where the histories lie."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch
from cases import CASES
from fake_gpu import fake_gpu
from torch import nn

from llmrec.collab.config import TrainCollabConfig
from llmrec.collab.provider import PROVIDERS

HISTORY = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0], [0, 0, 0, 0]])
TIME = torch.arange(12).view(3, 4)


@pytest.mark.parametrize("name", CASES)
def test_scores_keep_to_the_gpu(name):
    case = CASES[name]
    settings = asdict(getattr(TrainCollabConfig(), case.provider)) | case.settings
    model = PROVIDERS[case.provider](num_items=40, **settings).eval()
    if any(isinstance(part, nn.GRU) for part in model.modules()) and case.provider != "gmvae":
        pytest.skip("cuDNN's GRU asks a real GPU for its workspace")
    with fake_gpu() as gpu:
        gpu.move(model)
        number = 1 + model.uses_time + getattr(model, "uses_request_time", False)
        inputs = [part.to("cuda") for part in (HISTORY, TIME, TIME + 1)[:number]]
        scores = model.score(*inputs)
        assert (scores.device.type, scores.dtype, tuple(scores.shape)) == ("cuda", torch.float32, (3, 41))
