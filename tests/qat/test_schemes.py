"""Layers of every scheme: what is absorbed is what the forward computed, and equals the slow reference."""

import pytest
import torch
import torch.nn.functional as F

from nybble.compression.init import QuantizedInit, RoundedWeight
from nybble.qat.absorb import assert_absorbs_exactly
from nybble.qat.fake_quant_lora import FakeQuantizedLoRALinear
from nybble.qat.fixed_codes import FixedCodesLinear
from nybble.quant.grid import min_max_qparams, quantize
from nybble.quant.scheme import INT8_PER_ROW, QuantScheme
from tests.helpers import reference_quantizer as slow

SCHEMES = [
    *(QuantScheme(bits, size, symmetric) for bits in (2, 3) for size in (32, None) for symmetric in (False, True)),
    QuantScheme(4, 32, symmetric=True),
    QuantScheme(8, 32, symmetric=True),
    INT8_PER_ROW,
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random_init(scheme: QuantScheme, dtype: torch.dtype) -> QuantizedInit:
    weight_OI = (torch.randn(16, 64, generator=torch.Generator().manual_seed(0)) * 0.1).to(dtype)
    return QuantizedInit(weight_OI, *min_max_qparams(weight_OI, scheme))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_absorbed_adapters_are_the_forward(scheme: QuantScheme, dtype: torch.dtype) -> None:
    layer = FakeQuantizedLoRALinear(random_init(scheme, dtype), scheme, None, 4, dtype, None)
    torch.nn.init.normal_(layer.lora_b, 0, 0.1)
    torch.nn.init.normal_(layer.log_scale_shift, 0, 0.1)
    assert_absorbs_exactly("layer", layer)
    absorbed = layer.absorb()
    assert int(absorbed.codes_OI.max()) <= scheme.max_code
    if dtype == torch.float32:
        merged_OI, scales = layer.merged_OI().double(), (layer.init_scale.double(), layer.zero_point.double())
        rounded_OI = slow.fake_quantize(merged_OI, *scales, scheme.bits)
        centered = (rounded_OI.unflatten(1, (scales[0].shape[1], -1)) / scales[0][..., None]).round()
        expected_OI = (centered * layer.scale_OG().double()[..., None]).flatten(1)
        assert torch.equal(absorbed.dequantize().double(), expected_OI)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_fixed_codes_are_the_forward(scheme: QuantScheme, dtype: torch.dtype) -> None:
    layer = FixedCodesLinear(random_init(scheme, dtype).quantized(scheme), None, dtype, None)
    torch.nn.init.normal_(layer.log_scale_shift, 0, 0.1)
    inputs = torch.randn(3, 64).to(dtype)
    assert torch.equal(layer(inputs), F.linear(inputs, layer.absorb().dequantize().to(dtype)))
    assert_absorbs_exactly("layer", layer)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_method_keeps_its_codes_in_16_bits(scheme: QuantScheme, dtype: torch.dtype) -> None:
    """Also at the ends of the range, where a weight is far larger than the distance of two codes."""
    weight_OI = torch.randn(16, 64)
    scale_OG, zero_point_OG = min_max_qparams(weight_OI, scheme)
    codes_OI = torch.randint(0, scheme.max_code + 1, (16, 64), dtype=torch.uint8)
    rounded = RoundedWeight(codes_OI, weight_OI, scale_OG, zero_point_OG)
    init = QuantizedInit.from_rounded(rounded, scheme, dtype)
    assert torch.equal(init.quantized(scheme).codes_OI, codes_OI)
    again = init.quantized(scheme).dequantize().to(dtype)  # as --init_from takes a run over
    assert torch.equal(quantize(again.float(), scale_OG, zero_point_OG, scheme), codes_OI)
