"""Packing against bytes written by hand."""

import torch

from nybble.quant.grid import min_max_qparams, quantize
from nybble.quant.scheme import INT8_PER_ROW, QuantScheme
from nybble.quant.weight import QuantizedWeight, pack_nibbles, unpack_nibbles


def test_golden_bytes() -> None:
    codes = torch.tensor([[1, 2, 15, 0], [8, 7, 3, 12]], dtype=torch.uint8)
    assert pack_nibbles(codes).tolist() == [[0x21, 0x0F], [0x78, 0xC3]]


def test_round_trip_of_every_pair() -> None:
    pairs = torch.cartesian_prod(torch.arange(16), torch.arange(16)).to(torch.uint8)
    assert torch.equal(unpack_nibbles(pack_nibbles(pairs)), pairs)
    assert len(pack_nibbles(pairs).unique()) == 256


def test_bytes_when_shipped() -> None:
    weight = torch.randn(64, 128)
    for scheme, expected in (
        (QuantScheme(), 64 * 128 // 2 + 64 * 2 * 2 + 64 * 2 // 2),
        (INT8_PER_ROW, 64 * 128 + 64 * 2),
    ):
        scale, zero = min_max_qparams(weight, scheme)
        assert QuantizedWeight(quantize(weight, scale, zero, scheme), scale, zero.byte(), scheme).nbytes == expected
