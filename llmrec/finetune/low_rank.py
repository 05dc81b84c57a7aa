"""LoRA's linear layers in few operations: what PEFT computes, with products that add to each other.

PEFT computes ``base(x) + B(A(x)) * scaling`` step by step, each step a pass over an activation and a node of
the graph; on a GPU these passes cost about as much as the frozen matrices' own products. Here a product is
added where the other one lies, forward and backward, in one node. Equal to PEFT within rounding (once per
product in place of once per step); tests/finetune/test_low_rank.py holds it to PEFT.

Source: LoRA (arXiv 2106.09685), section 4.1; PEFT's modules, names and files stay as they are.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn


class LowRankLinear(torch.autograd.Function):
    """x W^T + bias + scaling (x A^T) B^T, and its gradients to x, A and B."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
    ) -> Tensor:
        """Rows (n, in) to (n, out); weight (out, in), a (r, in), b (out, r), computed in the dtype of x."""
        low_a, low_b = a.to(x.dtype), (b * scaling).to(x.dtype)
        inner = x @ low_a.T
        result = x @ weight.T if bias is None else torch.addmm(bias, x, weight.T)
        ctx.save_for_backward(x, weight, inner, low_a, low_b)
        ctx.scaling, ctx.dtypes = scaling, (a.dtype, b.dtype)
        return result.addmm_(inner, low_b.T)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, inner, low_a, low_b = ctx.saved_tensors
        inner_grad = grad @ low_b
        x_grad = a_grad = b_grad = None
        if ctx.needs_input_grad[0]:
            x_grad = (grad @ weight).addmm_(inner_grad, low_a)
        if ctx.needs_input_grad[3]:
            a_grad = (inner_grad.T @ x).to(ctx.dtypes[0])
        if ctx.needs_input_grad[4]:
            b_grad = (grad.T @ inner).to(ctx.dtypes[1]) * ctx.scaling
        return x_grad, None, None, a_grad, b_grad, None


def fuse(model: nn.Module) -> None:
    """Let the model's plain LoRA layers compute so; quantised ones and dropout keep PEFT's own way."""
    for layer in model.modules():
        if type(layer) is LoraLinear and is_plain(layer):
            layer.forward = MethodType(forward, layer)  # type: ignore[method-assign]


def is_plain(layer: LoraLinear) -> bool:
    """Whether all that a layer adds to a frozen one is the product of two matrices."""
    base, names = layer.get_base_layer(), layer.active_adapters
    if type(base) is not nn.Linear or base.weight.requires_grad or len(names) != 1:
        return False
    (name,) = names
    bare = name not in layer.lora_variant and layer.lora_B[name].bias is None
    return bare and isinstance(layer.lora_dropout[name], nn.Identity)


def forward(layer: LoraLinear, x: Tensor) -> Tensor:
    """The layer's forward pass (..., in) to (..., out)."""
    base = layer.get_base_layer()
    # ZeRO-3 brings weights together where the module that they belong to is called.
    if layer.disable_adapters or layer.merged or hasattr(base.weight, "ds_id"):
        return LoraLinear.forward(layer, x)
    (name,) = layer.active_adapters
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    rows, weight = x.to(dtype).flatten(0, -2), base.weight.to(dtype)
    bias = None if base.bias is None else base.bias.to(dtype)
    a, b, scaling = layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]
    if torch.compiler.is_compiling():
        # The compiler joins these by itself; torch 2.11 loses all gradients of functions like the one above.
        found = nn.functional.linear(rows, weight, bias)
        found = torch.addmm(found, rows @ a.to(dtype).T, (b * scaling).to(dtype).T)
    else:
        found = LowRankLinear.apply(rows, weight, bias, a, b, scaling)
    return found.unflatten(0, x.shape[:-1])
