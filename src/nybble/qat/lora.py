"""LoRA adapters, and LoRALinear, which trains them on a 16-bit weight before it is compressed.

    output = input @ (weight + 2 * lora_b[:, :r] @ lora_a[:r]).T + bias        r = active_rank

This layer needs no full gradient of the weight, and neither does FakeQuantizedLoRALinear with frozen scales. The
gradients of the adapters are products of rank r. With D = grad_output, flattened over tokens:

    grad lora_a = (D @ lora_b).T @ input
    grad lora_b = D.T @ (input @ lora_a.T)

Two thin products replace a full one, and nothing of the size of a weight is kept for the backward.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from nybble.qat.base import CachedWeightLinear


def init_adapters(
    weight_OI: Tensor, rank: int, variance: float, generator: torch.Generator | None
) -> tuple[nn.Parameter, nn.Parameter]:
    """Create the trainable adapters of a weight.

    Args:
        weight_OI: the weight that the adapters are added to; only its shape and device are used.
        rank: rank R of the adapters, clamped to min(O, I).
        variance: variance of the entries of lora_a, times I.
        generator: CPU random generator for lora_a. None uses the global one.

    Returns:
        lora_a [R, I], uniform with mean 0, and lora_b [O, R], zeros; both float32.
    """
    outputs, inputs = weight_OI.shape
    rank = min(rank, outputs, inputs)
    # Drawn on the CPU, so that the values do not depend on the device. A uniform distribution over -b .. b has
    # variance b^2 / 3.
    lora_a = (torch.rand(rank, inputs, generator=generator) * 2 - 1) * math.sqrt(3 * variance / inputs)
    lora_b = torch.zeros(outputs, rank, device=weight_OI.device)
    return nn.Parameter(lora_a.to(weight_OI.device)), nn.Parameter(lora_b)


def add_adapters(weight_OI: Tensor, lora_a_RI: Tensor, lora_b_OR: Tensor, rank: int) -> Tensor:
    """Compute weight + lora_b[:, :rank] @ lora_a[:rank].

    Args:
        weight_OI: base weight, any float dtype.
        lora_a_RI, lora_b_OR: adapters, float32.
        rank: number of leading ranks to use, 0 .. R.

    Returns:
        float32 [O, I], differentiable.
    """
    return torch.addmm(weight_OI.float(), lora_b_OR[:, :rank], lora_a_RI[:rank]) if rank else weight_OI.float()


class AdapterGradient(torch.autograd.Function):
    """Linear layer with the weight `layer.current_weight()` that sends gradients to the input and to the adapters only.

    The gradients of the adapters are those of an unrounded sum of weight and adapters (see the top of this file).

    Args of `apply`:
        layer: provides current_weight() and bias. Without a weight cache, the backward computes the weight again.
        inputs: [..., I] in the layer's dtype.
        lora_a_RI, lora_b_OR: adapters at the active rank, float32.
    """

    @staticmethod
    def forward(  # type: ignore[no-untyped-def,override]
        ctx, layer: CachedWeightLinear, inputs: Tensor, lora_a_RI: Tensor, lora_b_OR: Tensor
    ) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(inputs, lora_a_RI, lora_b_OR)
        return layer.apply_current_weight(inputs)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def,override]
        inputs, lora_a_RI, lora_b_OR = ctx.saved_tensors
        grad_inputs = grad @ ctx.layer.current_weight() if ctx.needs_input_grad[1] else None
        inputs_TI, grad_TO = inputs.flatten(0, -2), grad.flatten(0, -2)
        grad_a_RI = (grad_TO @ lora_b_OR.to(grad.dtype)).T @ inputs_TI
        grad_b_OR = grad_TO.T @ (inputs_TI @ lora_a_RI.to(inputs.dtype).T)
        return None, grad_inputs, grad_a_RI.to(lora_a_RI.dtype), grad_b_OR.to(lora_b_OR.dtype)


class LoRALinear(CachedWeightLinear):
    """Linear layer with a frozen 16-bit weight and LoRA adapters.

    The forward uses the sum of weight and adapters rounded to `dtype`, which is the weight that
    `absorb.merge_adapters` keeps. The gradients of the adapters ignore this rounding.

    Args:
        weight_OI: frozen base weight, any float dtype. The sum with the adapters is computed in float32.
        bias, dtype: see `CachedWeightLinear`.
        rank: rank of the adapters, clamped to min(O, I).
        generator: CPU random generator for lora_a. None uses the global one.
    """

    TRAINED = ("lora_a", "lora_b")
    # Both as in the peft library with lora_alpha = 2 * rank, whose kaiming_uniform_(lora_a, a=sqrt(5)) has the variance
    # 1 / (3 I). Without the scaling and with the variance 1 / I, tasks were learned less well.
    SCALING = 2.0
    VARIANCE = 1 / 3

    def __init__(
        self,
        weight_OI: Tensor,
        bias: Tensor | None,
        rank: int,
        dtype: torch.dtype,
        generator: torch.Generator | None,
    ) -> None:
        super().__init__(weight_OI.shape, bias, dtype)
        self.weight = nn.Parameter(weight_OI.detach(), requires_grad=False)
        self.lora_a, self.lora_b = init_adapters(weight_OI, rank, self.VARIANCE, generator)
        self.rank = self.active_rank = len(self.lora_a)

    def compute_weight(self) -> Tensor:
        return add_adapters(self.weight, self.lora_a, self.SCALING * self.lora_b, self.active_rank).to(self.dtype)

    def forward(self, inputs: Tensor) -> Tensor:
        r = self.active_rank
        return AdapterGradient.apply(self, inputs, self.lora_a[:r], self.SCALING * self.lora_b[:, :r])  # type: ignore[no-any-return]
