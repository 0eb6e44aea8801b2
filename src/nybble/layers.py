"""The fake-quantized LoRA layer: a frozen weight whose low-rank update is inside the rounding, so that it vanishes into the codes.

    codes  = clamp(round((weight + lora_b[:, :r] @ lora_a[:r]) / start_scale) + zero, 0, 15)            r = active_rank
    scale  = round7(start_scale * exp(log_scale_shift))
    W_q    = scale * (codes - zero)
    output = input @ W_q.T + bias

lora_b starts at zero, log_scale_shift somewhere in what rounds to the start: the untrained layer is exactly the compressed one.
Codes are made with the scales of the start, so a trained scale moves no code: only the adapters do, and at rank 0 nothing does.
The shift is the logarithm of what the scale is multiplied with, so its learning rate is a relative one: 1e-3 moves a scale
by about 0.1 % a step.

The weights do not change within an optimizer step, which gives two ways to compute, with the same gradients:
- recompute: W_q is made in every forward and again in every backward; nothing is kept.
- step cache: `fill_step_cache` makes W_q once as a leaf; all microbatches run on it and add up its gradient;
  `push_step_cache` sends that gradient through the quantizer and the adapters once. Costs one weight and one gradient copy.

Where scales are not trained (log_scale_shift.requires_grad is False), no gradient of the size of a weight is made at all: with D = grad_output,

    grad lora_a = (D @ lora_b).T @ input        grad lora_b = D.T @ (input @ lora_a.T)

two thin products in place of a third full one, and nothing to push. They pass clipped codes too, which the full gradient leaves out.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nybble import grid as g
from nybble.grid import Grid
from nybble.quantized import QuantizedWeight


class _ThinGradient(torch.autograd.Function):
    """input @ W_q.T + bias, whose gradient reaches the adapters as if nothing were rounded; W_q is the layer's cache, or made again in the backward."""

    @staticmethod
    def forward(ctx, layer: FakeQuantizedLoRALinear, inputs: Tensor, a_RI: Tensor, b_OR: Tensor) -> Tensor:  # type: ignore[no-untyped-def,override]
        ctx.layer = layer
        ctx.save_for_backward(inputs, a_RI, b_OR)
        return F.linear(inputs, layer.weight_of_step(), layer.bias)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def,override]
        inputs, a_RI, b_OR = ctx.saved_tensors
        grad_inputs = grad @ ctx.layer.weight_of_step() if ctx.needs_input_grad[1] else None
        x, d = inputs.flatten(0, -2), grad.flatten(0, -2)
        grad_a = (d @ b_OR.to(d.dtype)).T @ x
        grad_b = d.T @ (x @ a_RI.to(x.dtype).T)
        return None, grad_inputs, grad_a.to(a_RI.dtype), grad_b.to(b_OR.dtype)


class FakeQuantizedLoRALinear(nn.Module):
    """Replaces nn.Linear during training.

    Args:
        weight_OI: frozen base weight, float32 / bfloat16 / float16; the sum with the adapters is made in float32.
        scale_OG, zero_OG: the start: float32 on the scale grid, and whole numbers.
        grid: of the codes.
        bias: [O] or None, frozen.
        rank: of the adapters, clamped to min(O, I); 0 keeps the codes and trains scales only.
        dtype: of inputs and outputs; the weight is cast to it just before the matrix product.
        generator: for the random starts of lora_a and log_scale_shift.
    """

    def __init__(
        self,
        weight_OI: Tensor,
        scale_OG: Tensor,
        zero_OG: Tensor,
        grid: Grid,
        bias: Tensor | None,
        rank: int,
        dtype: torch.dtype,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight_OI.shape
        self.rank = self.active_rank = min(rank, self.out_features, self.in_features)
        self.grid, self.dtype = grid, dtype
        device = weight_OI.device
        self.weight = nn.Parameter(weight_OI.detach(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.start_scale: Tensor
        self.zero: Tensor
        self.register_buffer("start_scale", scale_OG.to(device, torch.float32))
        self.register_buffer("zero", zero_OG.to(device, torch.float32))
        # Uniform with variance 1 / I (peft's lora_A: a third of it); drawn on the CPU so that every device starts alike.
        bound = math.sqrt(3 / self.in_features)
        lora_a = (torch.rand(self.rank, self.in_features, generator=generator) * 2 - 1) * bound
        self.lora_a = nn.Parameter(lora_a.to(device))
        self.lora_b = nn.Parameter(torch.zeros(self.out_features, self.rank, device=device))
        self.log_scale_shift = nn.Parameter(g.shift_within_cell(self.start_scale, generator))
        self.step_weight: Tensor | None = None

    def scale_OG(self) -> Tensor:
        """Current scale, on the scale grid; float32, differentiable."""
        return g.round_scale_through(self.start_scale * self.log_scale_shift.exp())

    def merged_OI(self) -> Tensor:
        """weight + lora_b @ lora_a at the active rank; float32, differentiable."""
        weight_OI = self.weight.float()
        if self.active_rank == 0:
            return weight_OI
        return torch.addmm(weight_OI, self.lora_b[:, : self.active_rank], self.lora_a[: self.active_rank])

    def quantized_OI(self) -> Tensor:
        """W_q, the weight of the forward before the cast to `dtype`; float32, differentiable."""
        centered_OGK = g.centered_codes(self.merged_OI(), self.start_scale, self.zero, self.grid)
        return (centered_OGK * self.scale_OG()[..., None]).flatten(-2)

    @torch.no_grad()
    def absorb(self) -> QuantizedWeight:
        """The codes of W_q: the adapters are gone. Made from the same sum, by the same rounding as in the forward."""
        codes_OI = g.quantize(self.merged_OI(), self.start_scale, self.zero, self.grid)
        return QuantizedWeight(codes_OI, self.scale_OG(), self.zero.to(torch.uint8), self.grid)

    def forward(self, inputs: Tensor) -> Tensor:
        if torch.is_grad_enabled() and not self.log_scale_shift.requires_grad:
            r = self.active_rank
            return _ThinGradient.apply(self, inputs, self.lora_a[:r], self.lora_b[:, :r])  # type: ignore[no-any-return]
        if self.step_weight is not None:
            return F.linear(inputs, self.step_weight, self.bias)
        if not torch.is_grad_enabled():
            return self._linear(inputs)
        return checkpoint(self._linear, inputs, use_reentrant=False, preserve_rng_state=False)  # type: ignore[no-any-return]

    def _linear(self, inputs: Tensor) -> Tensor:
        return F.linear(inputs, self.quantized_OI().to(self.dtype), self.bias)

    @torch.no_grad()
    def weight_of_step(self) -> Tensor:
        """W_q in `dtype`: the step cache, or made anew."""
        return self.quantized_OI().to(self.dtype) if self.step_weight is None else self.step_weight

    @torch.no_grad()
    def fill_step_cache(self) -> None:
        """Make W_q once for all microbatches until `push_step_cache`; where scales are trained, as a leaf that collects gradients."""
        self.step_weight = self.quantized_OI().to(self.dtype).requires_grad_(self.log_scale_shift.requires_grad)

    def push_step_cache(self) -> None:
        """Send the collected gradient of W_q to the adapters and the scales, and drop the cache."""
        assert self.step_weight is not None, "push_step_cache without fill_step_cache"
        grad_OI, self.step_weight = self.step_weight.grad, None
        if grad_OI is not None:
            self.quantized_OI().backward(grad_OI.float())

    def drop_step_cache(self) -> None:
        """Forget the cache (after evaluation)."""
        self.step_weight = None

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.grid}, rank {self.active_rank} of {self.rank}"


class ShiftedWeight(nn.Module):
    """Parametrization of a norm's weight while it is trained: weight + size * shift, with size the mean factor that the norm multiplies with.

    So the learning rate of the shift is relative, like that of a scale. The shift is float32 whatever the model's dtype is, and starts at zero.

    Args:
        weight_I: the weight of the start.
        offset: what the norm adds to its weight before multiplying (families.py: norm_offset).
    """

    def __init__(self, weight_I: Tensor, offset: float) -> None:
        super().__init__()
        self.size = float((weight_I.float() + offset).abs().mean())
        self.shift = nn.Parameter(torch.zeros_like(weight_I, dtype=torch.float32))

    def forward(self, weight_I: Tensor) -> Tensor:
        return torch.add(weight_I.float(), self.shift, alpha=self.size).to(weight_I.dtype)
