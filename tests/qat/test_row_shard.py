"""Row shards: what several processes gather is the whole weight, and gradients are those of the whole layer.

Threads stand for the processes; tests/processes has real ones.
"""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import pytest
import torch
from torch import Tensor

from nybble import processes
from nybble.qat.base import QuantizedLinear
from nybble.qat.row_shard import RowShard
from nybble.quant import fake_quant, grid
from tests.helpers.qat_layers import DTYPES, INPUTS, SCHEME, fake_quant_layer, fixed_codes_layer

T = TypeVar("T")


def in_processes(count: int, function: Callable[[int], T], monkeypatch: pytest.MonkeyPatch) -> list[T]:
    """What a function of the number of a process returns in each of them."""
    here, barrier, parts = threading.local(), threading.Barrier(count, timeout=20), dict[int, Tensor]()

    def gather(part: Tensor, what: str) -> Tensor:
        parts[here.index] = part
        barrier.wait()
        whole = torch.stack([parts[i] for i in range(count)])
        barrier.wait()
        return whole

    def run(index: int) -> T:
        here.index = index
        return function(index)

    monkeypatch.setattr(processes, "count", lambda: count)
    monkeypatch.setattr(processes, "index", lambda: here.index)
    monkeypatch.setattr(processes, "gather_parts", gather)
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("outputs", "count"), [(8, 2), (7, 2), (5, 4), (2, 3)])
def test_all_rows_are_gathered(bits: int, outputs: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    codes_OI = torch.randint(0, 1 << bits, (outputs, 12), dtype=torch.uint8)
    inside_OI = torch.rand(outputs, 12) < 0.5
    weight_OI = torch.randn(outputs, 12, dtype=torch.bfloat16)

    def gathered(index: int) -> tuple[slice, list[Tensor]]:
        shard = RowShard((outputs, 12), bits, 300)
        packed = shard.pack(codes_OI[shard.own])
        assert packed.nbytes <= -(-outputs // count) * 12 * bits / 8 + bits
        both = shard.codes_and_inside(packed, inside_OI[shard.own])
        return shard.own, [shard.codes(packed), *both, shard.rows(weight_OI[shard.own])]

    found = in_processes(count, gathered, monkeypatch)
    assert [row for own, _ in found for row in range(outputs)[own]] == list(range(outputs))
    for _, tensors in found:
        for tensor, expected in zip(tensors, (codes_OI, codes_OI, inside_OI, weight_OI), strict=True):
            assert torch.equal(tensor, expected)


def test_processes_that_compute_different_layers_are_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    def mixed(index: int) -> None:
        shard = RowShard((4, 8), 4, 3 + index)
        with pytest.raises(AssertionError, match="all processes must compute the same layer"):
            shard.codes(shard.pack(torch.zeros(2, 8, dtype=torch.uint8)))

    in_processes(2, mixed, monkeypatch)


def layer_of(kind: str, dtype: torch.dtype) -> QuantizedLinear:
    """A trained layer: without adapters, with adapters and scales, or with adapters alone."""
    layer = fixed_codes_layer(dtype=dtype) if kind == "codes" else fake_quant_layer(dtype=dtype)
    layer.log_scale_shift.requires_grad_(kind != "adapters")
    return layer


def computed(layer: QuantizedLinear, seed: int) -> list[Tensor]:
    """Output, gradient of the input, and gradients of the parameters."""
    inputs = torch.randn(5, INPUTS, generator=torch.Generator().manual_seed(seed)).to(layer.dtype).requires_grad_()
    with torch.no_grad():
        evaluated = layer(inputs)
    output = layer(inputs)
    assert torch.equal(evaluated, output)
    output.float().square().sum().backward()
    assert inputs.grad is not None
    return [output.detach(), inputs.grad, *(p.grad for p in layer.parameters() if p.grad is not None)]


@pytest.mark.parametrize("kind", ["codes", "adapters and scales", "adapters"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [2, 5])  # 24 rows: five processes do not divide them evenly
def test_a_sharded_layer_computes_as_a_whole_one(
    kind: str, dtype: torch.dtype, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = layer_of(kind, dtype)
    size = sum(tensor.nbytes for tensor in (*whole.parameters(), *whole.buffers()))
    expected = [computed(layer_of(kind, dtype), seed) for seed in range(count)]

    def train(index: int) -> list[Tensor]:
        layer = layer_of(kind, dtype)
        layer.divide_rows(0)
        assert sum(tensor.nbytes for tensor in (*layer.parameters(), *layer.buffers())) < size
        found = computed(layer, index)
        layer.bring_all_rows()
        if index == 0:
            assert layer.shard is None
            for name, tensor in whole.state_dict().items():
                assert torch.equal(layer.state_dict()[name], tensor), name
        return found

    for found, wanted in zip(in_processes(count, train, monkeypatch), expected, strict=True):
        assert len(found) == len(wanted) == {"codes": 3, "adapters and scales": 5, "adapters": 4}[kind]
        assert torch.equal(found[0], wanted[0])
        for tensor, other in zip(found[1:], wanted[1:], strict=True):
            torch.testing.assert_close(tensor, other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))


def test_clipped_codes_are_found() -> None:
    weight_OI = torch.tensor([[-3.0, 0.4, 15.4, 16.0, 15.5, 14.5, -0.4, 8.0] * 2])
    codes_OI, inside_OI = fake_quant.codes_and_inside(weight_OI, torch.ones(1, 1), torch.zeros(1, 1), SCHEME)
    assert torch.equal(codes_OI, grid.quantize(weight_OI, torch.ones(1, 1), torch.zeros(1, 1), SCHEME))
    assert inside_OI[0, :8].tolist() == [False, True, True, False, False, True, True, True]
