"""FixedCodesLinear: fixed codes, trained scales, no adapters.

    scale  = round_scale(init_scale * exp(log_scale_shift))
    W_q    = scale * (codes - zero_point)
    output = input @ W_q.T + bias

The codes are the only copy of the weight that is kept, one byte per weight. With D = grad_output, flattened over
tokens, the gradient of the scales is

    grad log_scale_shift = sum over the group of (D.T @ input) * W_q  *  init_scale * exp(log_scale_shift) / scale

The backward computes D.T @ input, the full gradient of W_q, sums it over groups and drops it. It exists for one layer
at a time. Training the scales of fixed codes follows the second phase of EfficientQAT
(https://arxiv.org/abs/2407.11062).
"""

from __future__ import annotations

import torch
from torch import Tensor

from nybble import processes
from nybble.qat.base import QuantizedLinear
from nybble.qat.row_shard import RowShard
from nybble.quant import grid as quant_grid
from nybble.quant.weight import QuantizedWeight


class FixedCodesLinear(QuantizedLinear):
    """Linear layer with fixed codes and trainable scales.

    Args:
        quantized: the compressed weight. Its codes are shared, not copied.
        bias, dtype: see `CachedWeightLinear`.
        generator: CPU random generator for log_scale_shift. None uses the global one.
    """

    def __init__(
        self,
        quantized: QuantizedWeight,
        bias: Tensor | None,
        dtype: torch.dtype,
        generator: torch.Generator | None,
    ) -> None:
        qparams = quantized.scale_OG, quantized.zero_point_OG
        super().__init__(quantized.codes_OI.shape, qparams, quantized.scheme, bias, dtype, generator)
        self.codes: Tensor
        self.register_buffer("codes", quantized.codes_OI)

    def compute_weight(self) -> Tensor:
        # Computed in `dtype` throughout, which saves a float32 copy. A scale has 7 significant bits and a centered
        # 4-bit code has 4, so both are exact in 16 bits. Only their product is rounded, and to the same value as by a
        # cast from float32.
        codes_OI = self.codes if self.shard is None else self.shard.codes(self.codes)
        return quant_grid.dequantize(codes_OI, self.scale_OG().to(self.dtype), self.zero_point.to(self.dtype))

    def keep_own_rows(self, shard: RowShard) -> None:
        """Keep the codes of the own rows, packed."""
        self.shard, self.codes = shard, shard.pack(self.codes[shard.own])

    def bring_all_rows(self) -> None:
        """Undo `keep_own_rows` in the first process."""
        assert self.shard is not None, "bring_all_rows needs keep_own_rows before"
        codes_OI = self.shard.codes(self.codes)
        if processes.is_first():
            self.shard, self.codes = None, codes_OI.contiguous()

    @torch.no_grad()
    def absorb(self) -> QuantizedWeight:
        """Return the fixed codes with the trained scales."""
        return QuantizedWeight(self.codes, self.scale_OG(), self.zero_point.to(torch.uint8), self.scheme)

    def forward(self, inputs: Tensor) -> Tensor:
        return _ScaleGradient.apply(self, inputs, self.log_scale_shift)  # type: ignore[no-any-return]


class _ScaleGradient(torch.autograd.Function):
    """Linear layer that sends gradients to the input and to log_scale_shift, by the formula at the top of the file."""

    @staticmethod
    def forward(ctx, layer: FixedCodesLinear, inputs: Tensor, shift_OG: Tensor) -> Tensor:  # type: ignore[no-untyped-def,override]
        ctx.layer = layer
        ctx.save_for_backward(inputs, shift_OG)
        return layer.apply_current_weight(inputs)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def,override]
        inputs, shift_OG = ctx.saved_tensors
        layer, weight_OI = ctx.layer, ctx.layer.current_weight()
        grad_inputs = grad @ weight_OI if ctx.needs_input_grad[1] else None
        grad_shift_OG = None
        if ctx.needs_input_grad[2]:
            grad_OI = grad.flatten(0, -2).T @ inputs.flatten(0, -2)
            if grad_OI.dtype == torch.float16:  # products of gradients and weights underflow in float16
                grad_OI = grad_OI.float()
            summed_OG = quant_grid.to_groups(grad_OI.mul_(weight_OI), shift_OG.shape[-1]).sum(-1, dtype=torch.float32)
            grad_shift_OG = summed_OG * (layer.init_scale * shift_OG.exp() / layer.scale_OG())
        return None, grad_inputs, grad_shift_OG
