"""LoRA's linear layers in few operations: what PEFT computes, with products that add to each other.

PEFT computes ``base(x) + B(A(x)) * scaling`` step by step, each step a pass over an activation and a node of
the graph; on a GPU these passes cost about as much as the frozen matrices' own products. Here a product is
added where the other one lies, forward and backward, in one node. Equal to PEFT within rounding (once per
product in place of once per step); tests/finetune/test_low_rank.py holds it to PEFT.

Source: LoRA (arXiv 2106.09685), section 4.1; PEFT's modules, names and files stay as they are.
"""

from __future__ import annotations

from types import MethodType
from typing import Any, cast

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn


class LowRankLinear(torch.autograd.Function):
    """x W^T + bias + scaling (x' A^T) B^T, where x' is x or x after dropout, and its gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scaling: float,
    ) -> Tensor:
        """Rows (n, in) to (n, out); weight (out, in), a (r, in), b (out, r), computed in the dtype of x."""
        source = x if dropped is None else dropped
        low_a, low_b = a.to(x.dtype), (b * scaling).to(x.dtype)
        inner = source @ low_a.T
        result = x @ weight.T if bias is None else torch.addmm(bias, x, weight.T)
        ctx.save_for_backward(source, weight, inner, low_a, low_b)
        ctx.scaling, ctx.dtypes = scaling, (a.dtype, b.dtype)
        return result.addmm_(inner, low_b.T)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        source, weight, inner, low_a, low_b = ctx.saved_tensors
        inner_grad = grad @ low_b
        x_grad = dropped_grad = a_grad = b_grad = None
        if ctx.needs_input_grad[0]:
            x_grad = grad @ weight
        if ctx.needs_input_grad[1]:
            dropped_grad = inner_grad @ low_a
        elif x_grad is not None:
            x_grad.addmm_(inner_grad, low_a)
        if ctx.needs_input_grad[4]:
            a_grad = (inner_grad.T @ source).to(ctx.dtypes[0])
        if ctx.needs_input_grad[5]:
            b_grad = (grad.T @ inner).to(ctx.dtypes[1]) * ctx.scaling
        return x_grad, dropped_grad, None, None, a_grad, b_grad, None


def fuse(model: nn.Module) -> None:
    """Let the model's plain LoRA layers compute so; quantised ones and variants keep PEFT's own way."""
    for layer in model.modules():
        if type(layer) is LoraLinear and is_plain(layer):
            layer.forward = MethodType(forward, layer)  # type: ignore[method-assign]


def is_plain(layer: LoraLinear) -> bool:
    """Whether all that a layer adds to a frozen one is the product of two matrices."""
    base, names = layer.get_base_layer(), layer.active_adapters
    if type(base) is not nn.Linear or base.weight.requires_grad or len(names) != 1:
        return False
    (name,) = names
    return name not in layer.lora_variant and layer.lora_B[name].bias is None


def forward(layer: LoraLinear, x: Tensor) -> Tensor:
    """The layer's forward pass (..., in) to (..., out)."""
    base = cast(nn.Linear, layer.get_base_layer())
    # ZeRO-3 brings weights together where the module that they belong to is called.
    if layer.disable_adapters or layer.merged or hasattr(base.weight, "ds_id") or not is_plain(layer):
        return LoraLinear.forward(layer, x)
    (name,) = layer.active_adapters
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    rows, weight = x.to(dtype).flatten(0, -2), base.weight.to(dtype)
    bias = None if base.bias is None else base.bias.to(dtype)
    a, b, scaling = layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]
    dropped = layer.lora_dropout[name](rows)
    if torch.compiler.is_compiling():
        # The compiler joins these by itself; torch 2.11 loses all gradients of functions like the one above.
        found = nn.functional.linear(rows, weight, bias)
        found = torch.addmm(found, dropped @ a.to(dtype).T, (b * scaling).to(dtype).T)
    else:
        dropped = None if dropped is rows else dropped
        found = LowRankLinear.apply(rows, dropped, weight, bias, a, b, scaling)
    return found.unflatten(0, x.shape[:-1])
