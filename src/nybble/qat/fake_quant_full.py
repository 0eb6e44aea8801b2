"""FakeQuantizedFullLinear: the weight itself is trained inside the rounding, without adapters.

    codes  = clamp(round(latent) + zero_point, 0, 2^bits - 1)
    scale  = round_scale(init_scale * exp(log_scale_shift))
    W_q    = scale * (codes - zero_point)
    output = input @ W_q.T + bias

latent = weight / init_scale is the weight in code units. Its learning rate is therefore relative as well, as those of
scales and norms are: with Adam, 1e-3 moves a weight by about 0.1 % of the distance between two codes per step, so about
that share of the codes can change, whatever the scheme. The quotient is the one that rounding computes, so the
untrained layer computes with the compressed weight it was created from, to the last bit.

CAGE (https://arxiv.org/abs/2510.18784) pulls the weight to its code after each step, like decoupled weight decay:

    latent -= lr * lambda * (latent - (codes - zero_point))
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nybble.compression.init import QuantizedInit
from nybble.qat.fake_quant_linear import FakeQuantizedLinear
from nybble.quant import fake_quant
from nybble.quant import grid as quant_grid
from nybble.quant.scheme import QuantScheme


class FakeQuantizedFullLinear(FakeQuantizedLinear):
    """Fake-quantized linear layer with a trainable weight and trainable scales.

    The weight gets the straight-through gradient of W_q: none where its code is clipped.

    Args:
        init: initial weight (any float dtype), scales and zero points. The weight is not kept.
        scheme, bias, dtype: see `QuantizedLinear`.
        generator: CPU random generator for log_scale_shift. None uses the global one.
    """

    TRAINED = ("latent",)

    def __init__(
        self,
        init: QuantizedInit,
        scheme: QuantScheme,
        bias: Tensor | None,
        dtype: torch.dtype,
        generator: torch.Generator | None = None,
    ) -> None:
        device = init.weight_OI.device
        qparams = init.scale_OG.to(device), init.zero_point_OG.to(device)
        super().__init__(init.weight_OI.shape, qparams, scheme, bias, dtype, generator)
        scale_OG = self.init_scale
        latent_OGK = quant_grid.to_groups(init.weight_OI.float(), scale_OG.shape[-1]) / scale_OG[..., None]
        self.latent = nn.Parameter(latent_OGK.flatten(-2))

    def merged_OI(self) -> Tensor:
        return self.latent

    @torch.no_grad()
    def pull_to_codes(self, share: float) -> None:
        """Move the weight by a share, 0 .. 1, of its distance to the value of its code."""
        centered_OGK = fake_quant.centered_codes(self.latent, self.rounding_scale_OG(), self.zero_point, self.scheme)
        self.latent.lerp_(centered_OGK.flatten(-2), share)

    def rounding_scale_OG(self) -> Tensor:
        """1 for all groups: the weight is in code units already."""
        return torch.ones_like(self.init_scale)
