"""QuantizedInit: a conversion to 16 bits keeps every code, and most positions between the codes."""

import pytest
import torch

from nybble.compression.init import QuantizedInit, RoundedWeight
from nybble.quant.grid import dequantize, min_max_qparams, quantize
from nybble.quant.position import pack_positions, weight_at_positions
from nybble.quant.scheme import QuantScheme
from nybble.quant.weight import QuantizedWeight

SCHEME = QuantScheme(group_size=32)


def near_boundary() -> RoundedWeight:
    """Weights next to a rounding boundary, where compression methods leave them."""
    weight = torch.randn(64, 64)
    scale, zero_point = min_max_qparams(weight, SCHEME)
    codes = quantize(weight, scale, zero_point, SCHEME)
    near = scale.repeat_interleave(32, 1) * (codes - zero_point.repeat_interleave(32, 1) + 0.4999)
    return RoundedWeight(quantize(near, scale, zero_point, SCHEME), near, scale, zero_point)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_init_keeps_all_codes(dtype: torch.dtype) -> None:
    rounded = near_boundary()
    cast = quantize(rounded.weight_OI.to(dtype).float(), rounded.scale_OG, rounded.zero_point_OG, SCHEME)
    assert not torch.equal(cast, rounded.codes_OI), "a plain cast must change codes, or this test shows nothing"
    init = QuantizedInit.from_rounded(rounded, SCHEME, dtype)
    assert init.weight_OI.dtype == dtype
    assert torch.equal(init.quantized(SCHEME).codes_OI, rounded.codes_OI)
    moved = cast != rounded.codes_OI
    assert torch.equal(init.weight_OI[~moved], rounded.weight_OI.to(dtype)[~moved])
    code_values = dequantize(rounded.codes_OI, rounded.scale_OG, rounded.zero_point_OG).to(dtype)
    assert torch.equal(init.weight_OI[moved], code_values[moved])


def test_a_weight_that_does_not_round_to_the_codes_is_replaced() -> None:
    rounded = near_boundary()
    other_codes = torch.flip(rounded.codes_OI, (0,))
    init = QuantizedInit.from_rounded(
        RoundedWeight(other_codes, rounded.weight_OI, rounded.scale_OG, rounded.zero_point_OG), SCHEME, torch.float32
    )
    assert torch.equal(init.quantized(SCHEME).codes_OI, other_codes)


def test_quantized_has_whole_zero_points_and_the_scheme() -> None:
    weight = torch.randn(4, 64)
    quantized = QuantizedInit(weight, *min_max_qparams(weight, SCHEME)).quantized(SCHEME)
    assert quantized.zero_point_OG.dtype == quantized.codes_OI.dtype == torch.uint8
    assert quantized.scheme == SCHEME
    assert torch.equal(quantized.codes_OI, quantize(weight, *min_max_qparams(weight, SCHEME), SCHEME))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_init_from_stored_codes_keeps_them_in_every_dtype(dtype: torch.dtype) -> None:
    """A run that was compressed in float32 can be trained further in bfloat16, from positions of both kinds."""
    rounded = near_boundary()
    zero_point_OG = rounded.zero_point_OG.to(torch.uint8)
    quantized = QuantizedWeight(rounded.codes_OI, rounded.scale_OG, zero_point_OG, SCHEME)
    fixed = weight_at_positions(pack_positions(rounded.weight_OI, quantized), quantized)
    for weight_OI in (rounded.weight_OI, fixed):
        init = QuantizedInit.with_codes(quantized, weight_OI, dtype)
        assert torch.equal(init.quantized(SCHEME).codes_OI, rounded.codes_OI)
        kept = (
            quantize(weight_OI.to(dtype).float(), rounded.scale_OG, rounded.zero_point_OG, SCHEME) == rounded.codes_OI
        )
        assert torch.equal(init.weight_OI[kept], weight_OI.to(dtype)[kept])
