"""Errors of a layer against outputs and weights that are computed directly."""

import pytest
import torch

from nybble.compression.init import QuantizedInit
from nybble.compression.layer_error import LayerError, OutputReference, layer_error, weight_error
from nybble.quant.grid import min_max_qparams
from nybble.quant.scheme import QuantScheme
from tests.helpers.compression import round_to_nearest

SCHEME = QuantScheme(group_size=8)


def relative(difference: torch.Tensor, reference: torch.Tensor) -> float:
    return float(difference.square().sum() / reference.square().sum())


def test_errors_are_relative_to_the_outputs_and_to_the_weight() -> None:
    x, weight = torch.randn(100, 16), torch.randn(4, 16)
    gram = x.T @ x / 100
    scale, zero_point = min_max_qparams(0.8 * weight, SCHEME)
    init = QuantizedInit(weight, scale, zero_point)
    error = layer_error(weight, init, SCHEME, gram, OutputReference.of(weight, gram, SCHEME))
    compressed = init.quantized(SCHEME).dequantize()
    nearest = round_to_nearest(weight, SCHEME)
    assert error.rtn == pytest.approx(relative(x @ (nearest - weight).T, x @ weight.T), rel=1e-4)
    assert error.compressed == pytest.approx(relative(x @ (compressed - weight).T, x @ weight.T), rel=1e-4)
    assert error.weight == pytest.approx(relative(compressed - weight, weight) ** 0.5, rel=1e-4)


def test_without_text_only_the_weight_is_measured() -> None:
    weight = torch.randn(4, 16)
    error = weight_error(weight, QuantizedInit(weight, *min_max_qparams(weight, SCHEME)), SCHEME)
    assert (error.rtn, error.compressed) == (None, None)
    assert error.weight == pytest.approx(relative(round_to_nearest(weight, SCHEME) - weight, weight) ** 0.5, rel=1e-5)


def test_clipped_weights_are_those_beyond_half_a_step_of_the_outer_codes() -> None:
    # Scale 0.25 and zero point 4: the codes 0 .. 15 stand for -1 .. 2.75.
    weight = torch.tensor([[-1.2, -1.1, -1.0, 0.0, 2.75, 2.8, 2.9, 3.5]])
    init = QuantizedInit(weight, torch.tensor([[0.25]]), torch.tensor([[4.0]]))
    assert weight_error(weight, init, SCHEME).clipped == 3 / 8


def test_a_negative_scale_turns_the_range_over() -> None:
    # Scale -0.25 and zero point 8: the codes 0 .. 15 stand for 2 .. -1.75.
    weight = torch.tensor([[2.2, 2.1, 2.0, 0.0, -1.75, -1.8, -1.9, -3.5]])
    init = QuantizedInit(weight, torch.tensor([[-0.25]]), torch.tensor([[8.0]]))
    assert weight_error(weight, init, QuantScheme(4, 8, symmetric=True)).clipped == 3 / 8


def test_many_outputs_are_measured_by_some_of_them() -> None:
    x, weight = torch.randn(64, 16, dtype=torch.float64), torch.randn(600, 16, dtype=torch.float64)
    gram = x.T @ x / 64
    init = QuantizedInit(weight, *min_max_qparams(weight, SCHEME))
    error = layer_error(weight, init, SCHEME, gram, OutputReference.of(weight, gram, SCHEME))
    some = weight[::3]
    nearest = round_to_nearest(some, SCHEME)
    assert error.compressed == error.rtn == pytest.approx(relative(x @ (nearest - some).T, x @ some.T), rel=1e-6)
    whole = round_to_nearest(weight, SCHEME)
    assert error.rtn == pytest.approx(relative(x @ (whole - weight).T, x @ weight.T), rel=0.2)
    assert error.rtn != pytest.approx(relative(x @ (whole - weight).T, x @ weight.T), rel=1e-4)
    assert error.weight == pytest.approx(relative(whole - weight, weight) ** 0.5, rel=1e-5), "of all weights"


def test_a_folded_output_counts_with_the_size_it_had() -> None:
    x, weight = torch.randn(100, 16, dtype=torch.float64), torch.randn(4, 16, dtype=torch.float64)
    gram = x.T @ x / 100
    reference = OutputReference.of(weight, gram, SCHEME)
    divided = weight / torch.tensor([[1.0], [2.0], [4.0], [64.0]], dtype=torch.float64)
    init = QuantizedInit(divided, *min_max_qparams(divided, SCHEME))
    error = layer_error(divided, init, SCHEME, gram, reference)
    # Powers of two change neither the codes nor the relative error.
    assert error.compressed == pytest.approx(error.rtn, rel=1e-9)


def test_a_layer_of_zeros_has_no_error() -> None:
    weight, gram = torch.zeros(2, 16), torch.eye(16)
    init = QuantizedInit(weight, *min_max_qparams(weight, SCHEME))
    error = layer_error(weight, init, SCHEME, gram, OutputReference.of(weight, gram, SCHEME))
    assert error == LayerError(0.0, 0.0, 0.0, 0.0)
