"""FakeQuantizedRoundingLinear: the scale that rounds is trained, one for 8 weights, and dropped after training.

    codes  = clamp(round(weight / (init_scale * exp(rho))) + zero_point, 0, 2^bits - 1)       rho: one for 8 weights
    scale  = round_scale(init_scale * exp(log_scale_shift))
    W_q    = scale * (codes - zero_point)
    output = input @ W_q.T + bias

See FOCUS (https://arxiv.org/abs/2608.01847). The codes alone remember rho, so nothing more ships. rho starts at zero:
the untrained layer computes with the compressed weight it was created from, to the last bit. Weights that are zero, or
far below half a scale, keep their codes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nybble.compression.init import QuantizedInit
from nybble.qat.fake_quant_linear import FakeQuantizedLinear
from nybble.quant.scheme import QuantScheme

WEIGHTS_PER_RHO = 8


class FakeQuantizedRoundingLinear(FakeQuantizedLinear):
    """Fake-quantized linear layer with trainable rounding scales and trainable scales.

    rho gets the straight-through gradient of W_q, summed over its weights: none where a code is clipped.

    Args:
        init: frozen weight (any float dtype), scales and zero points.
        scheme, bias, dtype: see `QuantizedLinear`.
        generator: CPU random generator for log_scale_shift. None uses the global one.
    """

    TRAINED = ("rho",)

    def __init__(
        self,
        init: QuantizedInit,
        scheme: QuantScheme,
        bias: Tensor | None,
        dtype: torch.dtype,
        generator: torch.Generator | None = None,
    ) -> None:
        device, (rows, columns) = init.weight_OI.device, init.weight_OI.shape
        qparams = init.scale_OG.to(device), init.zero_point_OG.to(device)
        super().__init__(init.weight_OI.shape, qparams, scheme, bias, dtype, generator)
        self.weight = nn.Parameter(init.weight_OI.detach(), requires_grad=False)
        self.rho = nn.Parameter(torch.zeros(rows, -(-columns // WEIGHTS_PER_RHO), device=device))

    def merged_OI(self) -> Tensor:
        """Compute weight / exp(rho), which the initial scales round; float32, differentiable."""
        factor_OI = (-self.rho).exp().repeat_interleave(WEIGHTS_PER_RHO, 1)[:, : self.in_features]
        return self.base_OI() * factor_OI

    def rounding_scale_OG(self) -> Tensor:
        """The initial scales."""
        return self.init_scale
