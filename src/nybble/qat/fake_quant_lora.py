"""FakeQuantizedLoRALinear: LoRA adapters inside the rounding, so that they can be absorbed into the codes.

    merged = weight + lora_b[:, :r] @ lora_a[:r]                           r = active_rank
    codes  = clamp(round(merged / init_scale) + zero_point, 0, 2^bits - 1)
    scale  = round_scale(init_scale * exp(log_scale_shift))
    W_q    = scale * (codes - zero_point)
    output = input @ W_q.T + bias

lora_b starts at zero and log_scale_shift starts at values that leave the rounded scales unchanged. The untrained layer
therefore computes with the compressed weight it was created from.

Codes are computed with init_scale, so that a trained scale changes no code; only the adapters do. Otherwise a scale
that moves by a percent would flip many of the codes that a compression method has fitted to each other.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nybble.compression.init import QuantizedInit
from nybble.qat.base import QuantizedLinear
from nybble.qat.lora import AdapterGradient, add_adapters, init_adapters
from nybble.quant import fake_quant
from nybble.quant import grid as quant_grid
from nybble.quant.scheme import QuantScheme
from nybble.quant.weight import QuantizedWeight


class FakeQuantizedLoRALinear(QuantizedLinear):
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
        """Compute weight + lora_b @ lora_a at the active rank; float32, differentiable."""
        return add_adapters(self.weight, self.lora_a, self.lora_b, self.active_rank)

    def fake_quantized_OI(self) -> Tensor:
        """Compute W_q, the weight of the forward before the cast to `dtype`; float32, differentiable."""
        centered_OGK = fake_quant.centered_codes(self.merged_OI(), self.init_scale, self.zero_point, self.scheme)
        return (centered_OGK * self.scale_OG()[..., None]).flatten(-2)

    @torch.no_grad()
    def latent_OI(self) -> Tensor:
        """Compute the weight before rounding in units of the current scales, with the codes of the forward; float32."""
        groups = self.init_scale.shape[-1]
        factor_OG1 = (self.scale_OG() / self.init_scale)[..., None]
        return (quant_grid.to_groups(self.merged_OI(), groups) * factor_OG1).flatten(-2)

    def compute_weight(self) -> Tensor:
        return self.fake_quantized_OI().to(self.dtype)

    @torch.no_grad()
    def absorb(self) -> QuantizedWeight:
        """Return W_q as codes, scales and zero points, from the same sum and by the same rounding as the forward."""
        codes_OI = quant_grid.quantize(self.merged_OI(), self.init_scale, self.zero_point, self.scheme)
        return QuantizedWeight(codes_OI, self.scale_OG(), self.zero_point.to(torch.uint8), self.scheme)

    def forward(self, inputs: Tensor) -> Tensor:
        if torch.is_grad_enabled() and not self.log_scale_shift.requires_grad:
            r = self.active_rank
            return AdapterGradient.apply(self, inputs, self.lora_a[:r], self.lora_b[:, :r])  # type: ignore[no-any-return]
        if self.cached_weight is not None:
            return F.linear(inputs, self.cached_weight, self.bias)
        if not torch.is_grad_enabled():
            return self._linear(inputs)
        return checkpoint(self._linear, inputs, use_reentrant=False, preserve_rng_state=False)  # type: ignore[no-any-return]

    def _linear(self, inputs: Tensor) -> Tensor:
        return F.linear(inputs, self.compute_weight(), self.bias)

    def fill_weight_cache(self) -> None:
        """Compute W_q once. If scales are trained, the cached weight is a leaf that accumulates gradients."""
        super().fill_weight_cache()
        assert self.cached_weight is not None
        self.cached_weight.requires_grad_(self.log_scale_shift.requires_grad)

    def flush_weight_cache(self) -> None:
        """Propagate the accumulated gradient of W_q to adapters and scales; empty the cache.

        Raises:
            AssertionError: the cache is empty.
        """
        leaf = self.cached_weight
        super().flush_weight_cache()
        if leaf is not None and leaf.grad is not None:
            self.fake_quantized_OI().backward(leaf.grad.float())
