"""The layers that take the place of nn.Linear while a model is trained.

LoRALinear, 16-bit weights with adapters, for what is learnt before the weights are compressed:

    output = input @ (weight + 2 * lora_b[:, :r] @ lora_a[:r]).T + bias                                 r = active_rank

FakeQuantizedLoRALinear, whose adapters are inside the rounding, so that they vanish into the codes:

    codes  = clamp(round((weight + lora_b[:, :r] @ lora_a[:r]) / init_scale) + zero, 0, 15)
    scale  = round7(init_scale * exp(log_scale_shift))
    W_q    = scale * (codes - zero)
    output = input @ W_q.T + bias

ScaledCodesLinear, without adapters: the codes are those of the start and the only weight that is kept, a byte each; scales are trained.

lora_b starts at zero, log_scale_shift somewhere in what rounds to the start: the untrained layer is exactly what it takes the place of.
Codes are made with the scales of the start, so a trained scale moves no code: only adapters do.
The shift is the logarithm of what the scale is multiplied with, so its learning rate is a relative one: 1e-3 moves a scale
by about 0.1 % a step.

The weights do not change within an optimizer step, which gives two ways to compute, with the same gradients:
- recompute: W_q (of LoRALinear the sum) is made in every forward and again in every backward; nothing is kept.
- step cache: `fill_step_cache` makes it once, and all microbatches run on it. With adapters and trained scales it is a leaf that adds up its gradient;
  `push_step_cache` sends that gradient through the quantizer and the adapters once. Costs one weight, and with a leaf one gradient copy.

Where no weight needs a leaf, no gradient of the size of a weight is kept. With D = grad_output, summed over tokens,

    grad lora_a = (D @ lora_b).T @ input        grad lora_b = D.T @ (input @ lora_a.T)             adapters, scales not trained
    grad log_scale_shift = sum over the group of (D.T @ input) * W_q * (init_scale * exp(log_scale_shift) / scale)         codes that stay

The first are two thin products in place of a third full one; they pass clipped codes too, which the full gradient leaves out. The second makes the full
product, sums it over groups at once, and drops it.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nybble.quant import fake_quant
from nybble.quant import grid as quant_grid
from nybble.quant.scheme import QuantScheme
from nybble.quant.weight import QuantizedWeight


class _ThinGradient(torch.autograd.Function):
    """input @ W.T + bias, whose gradient reaches the adapters as if nothing were rounded; W is the layer's cache, or made again in the backward."""

    @staticmethod
    def forward(ctx, layer: LoRALinear | FakeQuantizedLoRALinear, inputs: Tensor, a_RI: Tensor, b_OR: Tensor) -> Tensor:  # type: ignore[no-untyped-def,override]
        ctx.layer = layer
        ctx.save_for_backward(inputs, a_RI, b_OR)
        return F.linear(inputs, layer.current_weight(), layer.bias)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def,override]
        inputs, a_RI, b_OR = ctx.saved_tensors
        grad_inputs = grad @ ctx.layer.current_weight() if ctx.needs_input_grad[1] else None
        x, d = inputs.flatten(0, -2), grad.flatten(0, -2)
        grad_a = (d @ b_OR.to(d.dtype)).T @ x
        grad_b = d.T @ (x @ a_RI.to(x.dtype).T)
        return None, grad_inputs, grad_a.to(a_RI.dtype), grad_b.to(b_OR.dtype)


class CachedWeightLinear(nn.Module):
    """What the layers share: a weight that is made of what is trained, in every forward or once a step.

    Args:
        shape: [O, I] of the weight.
        bias: [O] or None, frozen.
        dtype: of inputs and outputs; the weight is cast to it just before the matrix product.
    """

    rank = active_rank = 0

    def __init__(self, shape: torch.Size, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.dtype = dtype
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.cached_weight: Tensor | None = None

    def compute_weight(self) -> Tensor:
        """The weight in `dtype`, made anew."""
        raise NotImplementedError

    @torch.no_grad()
    def current_weight(self) -> Tensor:
        """The weight in `dtype`: the step cache, or made anew."""
        return self.compute_weight() if self.cached_weight is None else self.cached_weight

    @torch.no_grad()
    def fill_weight_cache(self) -> None:
        """Make the weight once for all microbatches until `push_step_cache`."""
        self.cached_weight = self.compute_weight()

    def flush_weight_cache(self) -> None:
        """Send what gradient the cache has collected to what is trained, and drop the cache."""
        assert self.cached_weight is not None, "push_step_cache without fill_step_cache"
        self.cached_weight = None

    def drop_weight_cache(self) -> None:
        """Forget the cache (after evaluation)."""
        self.cached_weight = None

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, rank {self.active_rank} of {self.rank}"


def _adapters(
    shape: torch.Size, rank: int, device: torch.device, generator: torch.Generator | None, variance: float = 1.0
) -> tuple[nn.Parameter, nn.Parameter]:
    """lora_a [R, I], uniform with `variance` / I, and lora_b [O, R], zeros; float32."""
    outputs, inputs = shape
    rank = min(rank, outputs, inputs)
    # drawn on the CPU so that every device starts alike
    lora_a = (torch.rand(rank, inputs, generator=generator) * 2 - 1) * math.sqrt(3 * variance / inputs)
    return nn.Parameter(lora_a.to(device)), nn.Parameter(torch.zeros(outputs, rank, device=device))


def _merged(weight_OI: Tensor, a_RI: Tensor, b_OR: Tensor, rank: int) -> Tensor:
    """weight + b @ a at a rank; float32, differentiable."""
    return torch.addmm(weight_OI.float(), b_OR[:, :rank], a_RI[:rank]) if rank else weight_OI.float()


class LoRALinear(CachedWeightLinear):
    """Replaces nn.Linear while adapters are trained on 16-bit weights.

    The forward computes with the sum rounded to `dtype`, the weight that `absorb.merge` leaves; gradients reach the adapters as if it were not.

    Args:
        weight_OI: frozen; the sum with the adapters is made in float32.
        bias, dtype: see StepLinear.
        rank: of the adapters, clamped to min(O, I).
        generator: for the random start of lora_a.
    """

    # With it and a third of the variance of lora_a, both as with peft, a task is learnt as with peft's adapters; without, less of it (docs/log.md).
    SCALING = 2.0

    def __init__(
        self,
        weight_OI: Tensor,
        bias: Tensor | None,
        rank: int,
        dtype: torch.dtype,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(weight_OI.shape, bias, dtype)
        self.weight = nn.Parameter(weight_OI.detach(), requires_grad=False)
        self.lora_a, self.lora_b = _adapters(weight_OI.shape, rank, weight_OI.device, generator, 1 / 3)
        self.rank = self.active_rank = len(self.lora_a)

    def compute_weight(self) -> Tensor:
        return _merged(self.weight, self.lora_a, self.SCALING * self.lora_b, self.active_rank).to(self.dtype)

    def forward(self, inputs: Tensor) -> Tensor:
        r = self.active_rank
        return _ThinGradient.apply(self, inputs, self.lora_a[:r], self.SCALING * self.lora_b[:, :r])  # type: ignore[no-any-return]


class QuantizedLinear(CachedWeightLinear):
    """What the 4-bit layers share: scales that are trained.

    Args:
        shape, bias, dtype: see StepLinear.
        scale_OG, zero_point_OG: the start: float32 on the scale grid, and whole numbers.
        grid: of the codes.
        generator: for the random start of log_scale_shift.
    """

    def __init__(
        self,
        shape: torch.Size,
        scale_OG: Tensor,
        zero_point_OG: Tensor,
        scheme: QuantScheme,
        bias: Tensor | None,
        dtype: torch.dtype,
        generator: torch.Generator | None,
    ) -> None:
        super().__init__(shape, bias, dtype)
        self.scheme = scheme
        self.init_scale: Tensor
        self.zero_point: Tensor
        self.register_buffer("init_scale", scale_OG.float())
        self.register_buffer("zero_point", zero_point_OG.float())
        self.log_scale_shift = nn.Parameter(quant_grid.shift_within_cell(self.init_scale, generator))

    def scale_OG(self) -> Tensor:
        """Current scale, on the scale grid; float32, differentiable."""
        return fake_quant.round_scale_ste(self.init_scale * self.log_scale_shift.exp())

    def absorb(self) -> QuantizedWeight:
        """The codes of W_q."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.scheme}, rank {self.active_rank} of {self.rank}"


class FakeQuantizedLoRALinear(QuantizedLinear):
    """Replaces nn.Linear while adapters are trained.

    Args:
        weight_OI: frozen base weight, float32 / bfloat16 / float16; the sum with the adapters is made in float32.
        scale_OG, zero_point_OG, grid, bias, dtype: see QuantizedLinear.
        rank: of the adapters, clamped to min(O, I).
        generator: for the random starts of lora_a and log_scale_shift.
    """

    def __init__(
        self,
        weight_OI: Tensor,
        scale_OG: Tensor,
        zero_point_OG: Tensor,
        scheme: QuantScheme,
        bias: Tensor | None,
        rank: int,
        dtype: torch.dtype,
        generator: torch.Generator | None = None,
    ) -> None:
        device = weight_OI.device
        lora_a, lora_b = _adapters(weight_OI.shape, rank, device, generator)
        super().__init__(weight_OI.shape, scale_OG.to(device), zero_point_OG.to(device), scheme, bias, dtype, generator)
        self.weight = nn.Parameter(weight_OI.detach(), requires_grad=False)
        self.lora_a, self.lora_b = lora_a, lora_b
        self.rank = self.active_rank = len(lora_a)

    def merged_OI(self) -> Tensor:
        """weight + lora_b @ lora_a at the active rank; float32, differentiable."""
        return _merged(self.weight, self.lora_a, self.lora_b, self.active_rank)

    def quantized_OI(self) -> Tensor:
        """W_q, the weight of the forward before the cast to `dtype`; float32, differentiable."""
        centered_OGK = fake_quant.centered_codes(self.merged_OI(), self.init_scale, self.zero_point, self.scheme)
        return (centered_OGK * self.scale_OG()[..., None]).flatten(-2)

    def compute_weight(self) -> Tensor:
        return self.quantized_OI().to(self.dtype)

    @torch.no_grad()
    def absorb(self) -> QuantizedWeight:
        """The codes of W_q: the adapters are gone. Made from the same sum, by the same rounding as in the forward."""
        codes_OI = quant_grid.quantize(self.merged_OI(), self.init_scale, self.zero_point, self.scheme)
        return QuantizedWeight(codes_OI, self.scale_OG(), self.zero_point.to(torch.uint8), self.scheme)

    def forward(self, inputs: Tensor) -> Tensor:
        if torch.is_grad_enabled() and not self.log_scale_shift.requires_grad:
            r = self.active_rank
            return _ThinGradient.apply(self, inputs, self.lora_a[:r], self.lora_b[:, :r])  # type: ignore[no-any-return]
        if self.cached_weight is not None:
            return F.linear(inputs, self.cached_weight, self.bias)
        if not torch.is_grad_enabled():
            return self._linear(inputs)
        return checkpoint(self._linear, inputs, use_reentrant=False, preserve_rng_state=False)  # type: ignore[no-any-return]

    def _linear(self, inputs: Tensor) -> Tensor:
        return F.linear(inputs, self.compute_weight(), self.bias)

    def fill_weight_cache(self) -> None:
        """Make W_q once for all microbatches until `push_step_cache`; where scales are trained, as a leaf that collects gradients."""
        super().fill_weight_cache()
        assert self.cached_weight is not None
        self.cached_weight.requires_grad_(self.log_scale_shift.requires_grad)

    def flush_weight_cache(self) -> None:
        leaf = self.cached_weight
        super().flush_weight_cache()
        if leaf is not None and leaf.grad is not None:
            self.quantized_OI().backward(leaf.grad.float())


class FixedCodesLinear(QuantizedLinear):
    """Replaces nn.Linear where codes stay and scales are trained (as in the second phase of EfficientQAT, arXiv 2407.11062).

    Args:
        start: the compressed weight; its codes are shared, not copied.
        bias, dtype, generator: see QuantizedLinear.
    """

    def __init__(
        self, start: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype, generator: torch.Generator | None = None
    ) -> None:
        super().__init__(
            start.codes_OI.shape, start.scale_OG, start.zero_point_OG, start.scheme, bias, dtype, generator
        )
        self.codes: Tensor
        self.register_buffer("codes", start.codes_OI)

    def compute_weight(self) -> Tensor:
        # In 16 bits from the start: a scale has 7 significant bits, a code less its zero 4, so only the product is rounded, as the cast from float32 would.
        return quant_grid.dequantize(self.codes, self.scale_OG().to(self.dtype), self.zero_point.to(self.dtype))

    @torch.no_grad()
    def absorb(self) -> QuantizedWeight:
        """The codes of the start with the trained scales."""
        return QuantizedWeight(self.codes, self.scale_OG(), self.zero_point.to(torch.uint8), self.scheme)

    def forward(self, inputs: Tensor) -> Tensor:
        return _ScaleGradient.apply(self, inputs, self.log_scale_shift)  # type: ignore[no-any-return]


class _ScaleGradient(torch.autograd.Function):
    """input @ W_q.T + bias of a ScaledCodesLinear; the gradient of W_q exists for one layer at a time."""

    @staticmethod
    def forward(ctx, layer: FixedCodesLinear, inputs: Tensor, shift_OG: Tensor) -> Tensor:  # type: ignore[no-untyped-def,override]
        ctx.layer = layer
        ctx.save_for_backward(inputs, shift_OG)
        return F.linear(inputs, layer.current_weight(), layer.bias)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def,override]
        inputs, shift_OG = ctx.saved_tensors
        layer, weight_OI = ctx.layer, ctx.layer.current_weight()
        grad_inputs = grad @ weight_OI if ctx.needs_input_grad[1] else None
        grad_shift = None
        if ctx.needs_input_grad[2]:
            grad_OI = grad.flatten(0, -2).T @ inputs.flatten(0, -2)
            grad_OI = (
                grad_OI.float() if grad_OI.dtype == torch.float16 else grad_OI
            )  # float16 has no room for products of gradients and weights
            summed_OG = quant_grid.to_groups(grad_OI.mul_(weight_OI), shift_OG.shape[-1]).sum(-1, dtype=torch.float32)
            grad_shift = summed_OG * (layer.init_scale * shift_OG.exp() / layer.scale_OG())
        return None, grad_inputs, grad_shift


class RelativeShift(nn.Module):
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
