"""Fine-tuning on a GPU that is not there: devices and dtypes of every method, layout and kernel."""

from __future__ import annotations

import pytest
import torch
from fake_gpu import fake_gpu
from packing_reference import NUM_ITEMS, random_users
from tiny_mme_sid import WIDE, model

from llmrec.finetune import flex as module
from llmrec.finetune.config import FinetuneConfig
from llmrec.finetune.packing import group_rows, pack

NO_GATE = {"fusion_temperature": FinetuneConfig.fusion_temperature}
METHODS = [
    {"method": name} | ({} if name == "mme_random" else NO_GATE)
    for name in ("e4srec", "me", "concat", "concat_mlp", "ctrl_mm", "se_sid", "se_random", "mme_random")
]
OPTIONS = [
    {},
    *METHODS,
    {"loss": "bce_full"},
    {"loss": "bce_sampled"},
    {"readout": "item"},
    {"mask_pad": False},
    {"fusion": "equal", **NO_GATE},
    {"fusion_weights": "modalities"},
    {"layout": "per_prefix"},
]


@pytest.mark.parametrize(("rows", "precision"), [("padded", "fp32"), ("stream", "bf16"), ("flex", "bf16")])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_loss_keeps_to_the_gpu(options, rows, precision, monkeypatch):
    item, targets = random_users([3, 60, 7, 1])
    layout = options.get("layout", "packed")
    negative = None
    if options.get("loss") == "bce_sampled":
        negative = targets.item % NUM_ITEMS + 1
    packed = pack(item, targets, group_rows(targets, layout), negative)
    kind = "padded" if rows == "padded" else "stream"
    net = model(NUM_ITEMS, rows=kind, width=WIDE, precision=precision, **options).float()
    if precision == "bf16":
        net.base.to(torch.bfloat16)
    with fake_gpu() as gpu:
        gpu.move(net)
        if rows == "flex":
            net.flex = True
            net.base.set_attn_implementation(module.NAME)
            real = module.block_mask
            monkeypatch.setattr(module, "block_mask", lambda *given: gpu.run(real, *given))
        # FlexAttention without compilation makes its gradients' graph at once, which needs a real GPU.
        with torch.no_grad() if rows == "flex" else torch.enable_grad():
            loss = net("loss", [packed])
        assert (loss.device.type, loss.dtype, loss.shape) == ("cuda", torch.float32, ())
        assert rows == "flex" or loss.requires_grad


def test_what_lies_on_another_device_is_noticed():
    """The test of the tests."""
    item, targets = random_users([3, 7])
    net = model(NUM_ITEMS, rows="stream", width=WIDE).float()
    with fake_gpu() as gpu:
        gpu.move(net)
        net.item_scores.gate.item_frequency = torch.zeros(NUM_ITEMS + 1, dtype=torch.long)
        with pytest.raises(RuntimeError, match=r"two different devices|same device"):
            net("loss", [pack(item, targets, group_rows(targets, "packed"))])
