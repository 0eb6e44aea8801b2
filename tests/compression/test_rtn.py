"""Round-to-nearest as the default of the stages SCALE and ROUND."""

import torch

from nybble.compression.rtn import MinMaxScales, RoundToNearest
from nybble.quant.grid import min_max_qparams, quantize
from nybble.quant.scheme import QuantScheme
from tests.helpers.compression import RecordingScales, random_layer

SCHEME = QuantScheme(group_size=8)


def test_weights_get_the_nearest_code_and_stay() -> None:
    weight = torch.randn(4, 16)
    rounded = RoundToNearest().make_rounder("a", None, MinMaxScales(), SCHEME, None)(weight)
    scale, zero_point = min_max_qparams(weight, SCHEME)
    assert torch.equal(rounded.codes_OI, quantize(weight, scale, zero_point, SCHEME))
    assert rounded.weight_OI is weight
    assert torch.equal(rounded.scale_OG, scale)
    assert torch.equal(rounded.zero_point_OG, zero_point)


def test_without_text_all_columns_are_equally_important() -> None:
    scales, weight = RecordingScales(), torch.randn(4, 16)
    RoundToNearest().make_rounder("a", None, scales, SCHEME, None)(weight)
    assert torch.equal(scales.importances[0], torch.ones(16))


def test_with_text_scales_are_estimated_from_the_second_moments() -> None:
    scales = RecordingScales()
    weight, gram = random_layer(4, 16)
    RoundToNearest().make_rounder("a", gram, scales, SCHEME, None)(weight)
    assert torch.equal(scales.importances[0], gram.diagonal())


def test_round_to_nearest_needs_no_text() -> None:
    assert not MinMaxScales().needs_calibration
    assert not RoundToNearest().needs_calibration
