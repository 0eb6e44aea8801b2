"""FakeQuantizedLinear: what the layers whose codes are trained have in common.

    codes  = clamp(round(w / rounding_scale) + zero_point, 0, 2^bits - 1)        w: the weight before rounding
    scale  = round_scale(init_scale * exp(log_scale_shift))
    W_q    = scale * (codes - zero_point)
    output = input @ W_q.T + bias

w and rounding_scale are what the layers differ in. The rounding scale is not trained, so that a trained scale changes
no code. Otherwise a scale that moves by a percent would flip many of the codes that a compression method has fitted to
each other.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nybble.compression.init import QuantizedInit
from nybble.qat.base import QuantizedLinear
from nybble.quant import fake_quant
from nybble.quant import grid as quant_grid
from nybble.quant.position import MAX_CODE_BITS, from_bytes, to_bytes
from nybble.quant.weight import QuantizedWeight


class FakeQuantizedLinear(QuantizedLinear):
    """Linear layer that quantizes a trained weight in its forward. Subclasses define the weight.

    Attributes:
        weight: the frozen weight before rounding, in subclasses that keep one; uint8 [O, I] after `to_fixed_point`.
    """

    weight: nn.Parameter

    @torch.no_grad()
    def to_fixed_point(self) -> None:
        """Keep a byte for each frozen weight, with its code and its position in the cell (quant/position.py).

        The codes of the untrained layer stay. Codes of 8 bits leave no room for a position; such weights stay.
        """
        if self.scheme.bits > MAX_CODE_BITS:
            return
        init = QuantizedInit(self.weight.detach(), self.init_scale, self.zero_point)
        bytes_OI = to_bytes(init.weight_OI, init.quantized(self.scheme))
        self.weight = nn.Parameter(bytes_OI, requires_grad=False)

    def base_OI(self) -> Tensor:
        """Return the frozen weight before rounding, float32; with a row shard its own rows."""
        if self.weight.dtype != torch.uint8:
            return self.weight.float()
        own = slice(None) if self.shard is None else self.shard.own
        return from_bytes(self.weight, self.init_scale[own], self.zero_point[own])

    @property
    def trains_weight(self) -> bool:
        """Whether a gradient of the size of the weight is needed."""
        return True

    def merged_OI(self) -> Tensor:
        """Compute the weight before rounding, in multiples of what `rounding_scale_OG` divides by; float32."""
        raise NotImplementedError

    def rounding_scale_OG(self) -> Tensor:
        """What the weight before rounding is divided by to be in code units; float32."""
        raise NotImplementedError

    @torch.no_grad()
    def latent_OI(self) -> Tensor:
        """Compute the weight before rounding in units of the current scales, with the codes of the forward; float32."""
        scale_OG = self.scale_OG()
        factor_OG1 = (scale_OG / self.rounding_scale_OG())[..., None]
        return (quant_grid.to_groups(self.merged_OI(), scale_OG.shape[-1]) * factor_OG1).flatten(-2)

    def fake_quantized_OI(self) -> Tensor:
        """Compute W_q, the weight of the forward before the cast to `dtype`; float32, differentiable."""
        centered_OGK = fake_quant.centered_codes(
            self.merged_OI(), self.rounding_scale_OG(), self.zero_point, self.scheme
        )
        return (centered_OGK * self.scale_OG()[..., None]).flatten(-2)

    def compute_weight(self) -> Tensor:
        return self.fake_quantized_OI().to(self.dtype)

    @torch.no_grad()
    def absorb(self) -> QuantizedWeight:
        """Return W_q as codes, scales and zero points, from the same weight and by the same rounding as the forward."""
        codes_OI = quant_grid.quantize(self.merged_OI(), self.rounding_scale_OG(), self.zero_point, self.scheme)
        return QuantizedWeight(codes_OI, self.scale_OG(), self.zero_point.to(torch.uint8), self.scheme)

    def forward(self, inputs: Tensor) -> Tensor:
        if self.cached_weight is not None:
            return F.linear(inputs, self.cached_weight, self.bias)
        if not torch.is_grad_enabled():
            return self._linear(inputs)
        return checkpoint(self._linear, inputs, use_reentrant=False, preserve_rng_state=False)  # type: ignore[no-any-return]

    def _linear(self, inputs: Tensor) -> Tensor:
        return F.linear(inputs, self.compute_weight(), self.bias)

    def fill_weight_cache(self) -> None:
        """Compute W_q once. Where a gradient of its size is needed, the cached weight is a leaf that accumulates it."""
        super().fill_weight_cache()
        assert self.cached_weight is not None
        self.cached_weight.requires_grad_(self.trains_weight)

    def flush_weight_cache(self) -> None:
        """Propagate the accumulated gradient of W_q to the trained parameters; empty the cache.

        Raises:
            AssertionError: the cache is empty.
        """
        leaf = self.cached_weight
        super().flush_weight_cache()
        if leaf is not None and leaf.grad is not None:
            self.fake_quantized_OI().backward(leaf.grad.float())
