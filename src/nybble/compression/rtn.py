"""Round-to-nearest: the range of each group is spread over all codes, and each weight gets the nearest code.

It needs no data. A combination uses these two classes where it has no method of its own for scales or for rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nybble.compression.base import Rounder, RoundingMethod, ScaleMethod
from nybble.compression.calibration import Calibration
from nybble.compression.init import RoundedWeight
from nybble.quant.grid import min_max_qparams, quantize
from nybble.quant.scheme import QuantScheme


class MinMaxScales(ScaleMethod):
    """Scale and zero point from the smallest and the largest weight of each group."""

    needs_calibration = False

    def search(self, weight_OI: Tensor, importance_I: Tensor, scheme: QuantScheme) -> tuple[Tensor, Tensor]:
        """See ScaleMethod.search; the importance has no effect."""
        return min_max_qparams(weight_OI, scheme)


class RoundToNearest(RoundingMethod):
    """Each weight gets the code whose value is nearest."""

    needs_calibration = False

    def make_rounder(
        self,
        name: str,
        gram_II: Tensor | None,
        scales: ScaleMethod,
        scheme: QuantScheme,
        calibration: Calibration | None,
    ) -> Rounder:
        """See RoundingMethod.make_rounder."""

        def round_rows(weight_OI: Tensor) -> RoundedWeight:
            if gram_II is None:
                scale_OG, zero_point_OG = scales.search(weight_OI, torch.ones_like(weight_OI[0]), scheme)
            else:
                scale_OG, zero_point_OG = scales.estimate(weight_OI, gram_II, scheme)
            codes_OI = quantize(weight_OI, scale_OG, zero_point_OG, scheme)
            return RoundedWeight(codes_OI, weight_OI, scale_OG, zero_point_OG)

        return round_rows
