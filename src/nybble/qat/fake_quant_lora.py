"""FakeQuantizedLoRALinear: LoRA adapters inside the rounding, so that they can be absorbed into the codes.

    merged = weight + lora_b[:, :r] @ lora_a[:r]                           r = active_rank
    codes  = clamp(round(merged / init_scale) + zero_point, 0, 2^bits - 1)
    scale  = round_scale(init_scale * exp(log_scale_shift))
    W_q    = scale * (codes - zero_point)                                  fake_quant_linear.py
    output = input @ W_q.T + bias

lora_b starts at zero and log_scale_shift starts at values that leave the rounded scales unchanged. The untrained layer
therefore computes with the compressed weight it was created from.

With a symmetric scheme this is NNCF 3.4's SymmetricLoraQuantizer (FQ_LORA, INT4_SYM), whose levels, -8 .. 7 or, with a
negative scale, 8 .. -7, are code - 8 and whose scale is 8 of these. Both compute the same weights at every active rank,
and adapters get the same gradients, except that here

- weights up to half a step outside of the range, which round to the outermost codes, get a gradient: the reference
  clips before it rounds;
- codes keep init_scale; the reference computes them with the trained scale;
- a scale gets the derivative of W_q with respect to its logarithm. The reference trains the scale itself, by 8/15 of
  the derivative of LSQ inside of the range and 8/7 of it outside;
- a scale keeps the sign that compression gave it. In the reference a negative one moves against its gradient;
- weight and adapters are added in float32, and not rounded to the dtype of the weight before they are quantized.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nybble import processes
from nybble.compression.init import QuantizedInit
from nybble.qat.fake_quant_linear import FakeQuantizedLinear
from nybble.qat.lora import AdapterGradient, add_adapters, init_adapters
from nybble.qat.row_shard import RowShard
from nybble.quant import grid
from nybble.quant.fake_quant import codes_and_inside
from nybble.quant.scheme import QuantScheme


class FakeQuantizedLoRALinear(FakeQuantizedLinear):
    """Fake-quantized linear layer with trainable LoRA adapters and scales.

    If log_scale_shift requires a gradient, adapters and scales get the straight-through gradient of W_q. If it does
    not, the adapters get the gradient of the unrounded sum (`lora.AdapterGradient`), which needs no memory of the
    size of a weight. With untrained scales the two differ for clipped codes only: the straight-through gradient leaves
    them out.

    Args:
        init: frozen base weight (any float dtype), scales and zero points. The sum of weight and adapters is computed
            in float32.
        scheme, bias, dtype: see `QuantizedLinear`.
        rank: rank of the adapters, clamped to min(O, I).
        generator: CPU random generator for lora_a and log_scale_shift. None uses the global one.
    """

    TRAINED = ("lora_a", "lora_b")
    VARIANCE = 1.0  # of the entries of lora_a, times I: the rows of lora_a have a mean square length of 1

    def __init__(
        self,
        init: QuantizedInit,
        scheme: QuantScheme,
        bias: Tensor | None,
        rank: int,
        dtype: torch.dtype,
        generator: torch.Generator | None = None,
    ) -> None:
        weight_OI, device = init.weight_OI, init.weight_OI.device
        lora_a, lora_b = init_adapters(weight_OI, rank, self.VARIANCE, generator)
        qparams = init.scale_OG.to(device), init.zero_point_OG.to(device)
        super().__init__(weight_OI.shape, qparams, scheme, bias, dtype, generator)
        self.weight = nn.Parameter(weight_OI.detach(), requires_grad=False)
        self.lora_a, self.lora_b = lora_a, lora_b
        self.rank = self.active_rank = len(lora_a)

    def merged_OI(self) -> Tensor:
        """Compute weight + lora_b @ lora_a at the active rank, of the own rows; float32, differentiable."""
        lora_b = self.lora_b if self.shard is None else self.lora_b[self.shard.own]
        return add_adapters(self.base_OI(), self.lora_a, lora_b, self.active_rank)

    def rounding_scale_OG(self) -> Tensor:
        """The initial scales."""
        return self.init_scale

    @property
    def trains_weight(self) -> bool:
        """Whether scales are trained; adapters alone need no gradient of the size of a weight."""
        return self.log_scale_shift.requires_grad

    def keep_own_rows(self, shard: RowShard) -> None:
        """Keep the base weight of the own rows."""
        self.shard, self.weight = shard, nn.Parameter(self.weight[shard.own].clone(), requires_grad=False)

    def bring_all_rows(self) -> None:
        """Undo `keep_own_rows` in the first process."""
        assert self.shard is not None, "bring_all_rows needs keep_own_rows before"
        weight_OI = self.shard.rows(self.weight)
        if processes.is_first():
            self.shard, self.weight = None, nn.Parameter(weight_OI, requires_grad=False)

    def compute_weight(self) -> Tensor:
        """Compute the weight of the forward; with a row shard, from the codes of all processes, without a gradient."""
        if self.shard is None:
            return super().compute_weight()
        codes_OI, _ = self._own_codes_and_inside(self.shard)
        codes_OI = self.shard.codes(self.shard.pack(codes_OI))
        return grid.dequantize(codes_OI, self.scale_OG().detach(), self.zero_point).to(self.dtype)

    def gathered_codes_and_inside(self) -> tuple[Tensor, Tensor]:
        """With a row shard: the codes [O, I] of all processes, and where they are not clipped."""
        assert self.shard is not None, "gathered_codes_and_inside needs a row shard"
        codes_OI, inside_OI = self._own_codes_and_inside(self.shard)
        return self.shard.codes_and_inside(self.shard.pack(codes_OI), inside_OI)

    @torch.no_grad()
    def _own_codes_and_inside(self, shard: RowShard) -> tuple[Tensor, Tensor]:
        scale_OG, zero_point_OG = self.init_scale[shard.own], self.zero_point[shard.own]
        return codes_and_inside(self.merged_OI(), scale_OG, zero_point_OG, self.scheme)

    def forward(self, inputs: Tensor) -> Tensor:
        r = self.active_rank
        if torch.is_grad_enabled() and not self.log_scale_shift.requires_grad:
            return AdapterGradient.apply(self, inputs, self.lora_a[:r], self.lora_b[:, :r])  # type: ignore[no-any-return]
        if torch.is_grad_enabled() and self.shard is not None:
            given = self.lora_a[:r], self.lora_b[:, :r], self.log_scale_shift
            return _ShardedGradient.apply(self, inputs, *given)  # type: ignore[no-any-return]
        return super().forward(inputs)


class _ShardedGradient(torch.autograd.Function):
    """Linear layer with adapters, scales and a row shard, with the gradients of FakeQuantizedLinear.

    The codes are gathered again, with one more bit of each weight: `inside`, whether its code is not clipped. With D =
    grad_output, flattened over tokens,

        grad W_q             = D.T @ input
        grad merged          = grad W_q * inside * scale / init_scale
        grad lora_a, lora_b  = lora_b.T @ grad merged, grad merged @ lora_a.T
        grad log_scale_shift = sum over the group of grad W_q * (codes - zero_point)  *  init_scale * exp(shift)

    Args of `apply`:
        layer: has a row shard.
        inputs: [..., I] in the layer's dtype.
        lora_a_RI, lora_b_OR: adapters at the active rank, float32.
        shift_OG: log_scale_shift.
    """

    @staticmethod
    def forward(  # type: ignore[no-untyped-def,override]
        ctx, layer: FakeQuantizedLoRALinear, inputs: Tensor, lora_a_RI: Tensor, lora_b_OR: Tensor, shift_OG: Tensor
    ) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(inputs, lora_a_RI, lora_b_OR, shift_OG)
        return layer.apply_current_weight(inputs)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def,override]
        inputs, lora_a_RI, lora_b_OR, shift_OG = ctx.saved_tensors
        layer, groups = ctx.layer, shift_OG.shape[-1]
        codes_OI, inside_OI = layer.gathered_codes_and_inside()
        scale_OG = layer.scale_OG()
        weight_OI = grid.dequantize(codes_OI, scale_OG, layer.zero_point)
        grad_inputs = grad @ weight_OI.to(grad.dtype) if ctx.needs_input_grad[1] else None
        grad_OGK = grid.to_groups((grad.flatten(0, -2).T @ inputs.flatten(0, -2)).float(), groups)
        centered_OGK = grid.to_groups(codes_OI, groups).float().sub_(layer.zero_point[..., None])
        grad_shift_OG = (grad_OGK * centered_OGK).sum(-1).mul_(layer.init_scale * shift_OG.exp())
        factor_OG1 = (scale_OG / layer.init_scale)[..., None]
        merged_OI = (grad_OGK * factor_OG1).mul_(grid.to_groups(inside_OI, groups)).flatten(-2)
        return None, grad_inputs, lora_b_OR.T @ merged_OI, merged_OI @ lora_a_RI.T, grad_shift_OG
