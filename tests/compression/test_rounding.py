"""Layers that share an input are rounded as one matrix, some rows at a time."""

import pytest
import torch

from nybble.compression import rounding
from nybble.compression.calibration import Calibration
from nybble.compression.init import QuantizedInit
from nybble.compression.methods import combine
from nybble.compression.rounding import round_layers
from nybble.quant.scheme import QuantScheme
from tests.helpers.compression import random_layer, round_to_nearest

SCHEME = QuantScheme(group_size=8)
METHODS = [("se",), ("gptq",), ("se", "gptq")]


def round_with(
    methods: tuple[str, ...], linears: dict[str, torch.nn.Linear], gram: torch.Tensor
) -> dict[str, QuantizedInit]:
    combination = combine(methods)
    calibration = Calibration(torch.zeros(1, 1))
    rounder = combination.rounding.make_rounder("a", gram.clone(), combination.scales, SCHEME, calibration)
    return round_layers(linears, rounder, SCHEME)


def linear(weight: torch.Tensor) -> torch.nn.Linear:
    layer = torch.nn.Linear(1, 1)
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    return layer


@pytest.mark.parametrize("methods", METHODS, ids="+".join)
def test_the_number_of_rows_at_a_time_changes_nothing(
    methods: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, gram = random_layer(20, 32)
    linears = {"a": linear(weight[:12]), "b": linear(weight[12:])}
    results = []
    for numbers in (16 << 20, 7 * 4**2):
        monkeypatch.setattr(rounding, "MAX_EQUATION_NUMBERS", numbers)
        results.append(round_with(methods, linears, gram))
    for name, size in (("a", 12), ("b", 8)):
        at_once, in_parts = (result[name].quantized(SCHEME) for result in results)
        assert at_once.codes_OI.shape == (size, 32)
        assert torch.equal(at_once.codes_OI, in_parts.codes_OI)
        assert torch.equal(at_once.scale_OG, in_parts.scale_OG)


def test_so_many_rows_are_rounded_at_a_time_as_the_equations_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding, "MAX_EQUATION_NUMBERS", 7 * 4**2)
    rows: list[int] = []
    inner = combine(()).rounding.make_rounder("a", None, combine(()).scales, SCHEME, None)
    round_layers({"a": linear(torch.randn(16, 32))}, lambda part: rows.append(len(part)) or inner(part), SCHEME)
    assert rows == [7, 7, 2]


@pytest.mark.parametrize("methods", METHODS, ids="+".join)
def test_a_layer_whose_inputs_are_all_zero_is_rounded_about_as_well_as_by_rtn(methods: tuple[str, ...]) -> None:
    weight = torch.randn(16, 32)
    init = round_with(methods, {"a": linear(weight)}, torch.zeros(32, 32))["a"]
    error = (init.quantized(SCHEME).dequantize() - weight).norm()
    assert error < 1.3 * (round_to_nearest(weight, SCHEME) - weight).norm()


def test_results_have_the_dtype_of_the_layer_and_memory_of_their_own() -> None:
    weight, gram = random_layer(20, 32)
    linears = {"a": linear(weight[:12].bfloat16()), "b": linear(weight[12:].bfloat16())}
    results = round_with(("se", "gptq"), linears, gram.float())
    for name, result in results.items():
        assert result.weight_OI.dtype == torch.bfloat16
        assert result.scale_OG.dtype == torch.float32
        for tensor in (result.weight_OI, result.scale_OG, result.zero_point_OG):
            assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        assert torch.equal(linears[name].weight, {"a": weight[:12], "b": weight[12:]}[name].bfloat16())
