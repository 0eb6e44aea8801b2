"""GPTQ against a slow float64 reference that shares no formula with it; damping; polishing."""

import logging

import pytest
import torch

from nybble.compression import gptq
from nybble.compression.base import ScaleMethod
from nybble.compression.calibration import Calibration
from nybble.compression.gptq import GPTQ, Hessian
from nybble.compression.init import RoundedWeight
from nybble.compression.output_error import RoundingTarget, output_error
from nybble.compression.rtn import MinMaxScales
from nybble.compression.scale_estimation import ScaleEstimation
from nybble.errors import ModelError
from nybble.quant.grid import dequantize, min_max_qparams, quantize
from nybble.quant.scheme import QuantScheme
from tests.helpers.compression import RecordingScales, random_layer, round_to_nearest
from tests.helpers.reference_gptq import reference_gptq

SCHEME = QuantScheme(group_size=8)
DAMPING = 0.01


def damped(gram: torch.Tensor, damping: float = DAMPING) -> torch.Tensor:
    return gram + damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)


def error_of(
    codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, target: RoundingTarget
) -> torch.Tensor:
    return output_error(dequantize(codes, scale, zero_point) - target.weight_OI, target.gram_II)


@pytest.mark.parametrize("activation_order", [False, True])
@pytest.mark.parametrize("damping", [0.01, 0.3])
def test_codes_equal_those_of_the_slow_reference(activation_order: bool, damping: float) -> None:
    weight, gram = random_layer(5, 32)
    hessian = Hessian.of(gram.clone(), damping, activation_order=activation_order)
    running, scale, zero_point = gptq.compensate(weight, hessian, SCHEME, MinMaxScales())
    order = gram.diagonal().argsort(descending=True).tolist() if activation_order else list(range(32))
    expected = reference_gptq(weight, damped(gram, damping), scale, zero_point, 15, order)
    assert torch.equal(quantize(running, scale, zero_point, SCHEME), expected)


def test_scales_are_chosen_for_the_running_weights() -> None:
    weight, gram = random_layer(5, 32)
    _, scale, _ = gptq.compensate(weight, Hessian.of(gram.clone(), DAMPING), SCHEME, MinMaxScales())
    original, _ = min_max_qparams(weight, SCHEME)
    assert torch.equal(scale[:, 0], original[:, 0]), "nothing is rounded before the first group"
    assert not torch.equal(scale[:, 1:], original[:, 1:])


def test_importance_is_the_error_that_later_columns_cannot_compensate() -> None:
    weight, gram = random_layer(5, 32)
    scales = RecordingScales()
    gptq.compensate(weight, Hessian.of(gram.clone(), DAMPING), SCHEME, scales)
    assert len(scales.importances) == 4
    for g, importance in enumerate(scales.importances):
        costs = [1 / torch.linalg.inv(damped(gram)[j:, j:])[0, 0] for j in range(8 * g, 8 * g + 8)]
        assert torch.allclose(importance, torch.stack(costs))


def test_activation_order_chooses_scales_for_the_original_weights() -> None:
    weight, gram = random_layer(5, 32)
    hessian = Hessian.of(gram.clone(), DAMPING, activation_order=True)
    _, scale, zero_point = gptq.compensate(weight, hessian, SCHEME, MinMaxScales())
    assert torch.equal(scale, min_max_qparams(weight, SCHEME)[0])
    assert torch.equal(zero_point, min_max_qparams(weight, SCHEME)[1])


@pytest.mark.parametrize("scales", [MinMaxScales(), ScaleEstimation()], ids=["minmax", "se"])
def test_output_error_is_below_that_of_rounding_to_nearest(scales: ScaleMethod) -> None:
    weight, gram = random_layer(64, 64)
    nearest = output_error(round_to_nearest(weight, SCHEME) - weight, gram).sum()
    running, scale, zero_point = gptq.compensate(weight, Hessian.of(gram.clone(), DAMPING), SCHEME, scales)
    codes = quantize(running, scale, zero_point, SCHEME)
    assert error_of(codes, scale, zero_point, RoundingTarget(weight, gram)).sum() < 0.6 * nearest


def test_an_unused_input_does_no_harm() -> None:
    weight, gram = random_layer(5, 32)
    gram[:8] = gram[:, :8] = 0
    running, scale, zero_point = gptq.compensate(weight, Hessian.of(gram.clone(), DAMPING), SCHEME, MinMaxScales())
    assert torch.equal(running[:, :8], weight[:, :8]), "an unused column gets no compensation and gives none"
    assert running.isfinite().all()
    assert scale.isfinite().all()
    assert zero_point.isfinite().all()


def test_damping_is_raised_until_the_hessian_is_positive_definite(caplog: pytest.LogCaptureFixture) -> None:
    gram = torch.eye(8)
    gram[0, 1] = gram[1, 0] = 1.05  # an eigenvalue of -0.05
    with caplog.at_level(logging.WARNING, "nybble"):
        upper = Hessian.of(gram.clone(), 0.01, "layers.0.q_proj").upper_II
    assert "layers.0.q_proj: the Hessian is not positive definite with damping 0.01; used 0.1" in caplog.text
    # The smallest eigenvalue is 0.05, so float32 leaves a relative error of about 1e-6 in an inverse of up to 20.
    assert torch.allclose(upper.T @ upper, torch.linalg.inv(gram + 0.1 * torch.eye(8)), atol=1e-3)


@pytest.mark.parametrize("seed", range(20))
def test_a_nearly_singular_hessian_is_factored(seed: int) -> None:
    # Whether such a matrix can be factored depends on the order of its columns.
    x = torch.randn(24, 32, generator=torch.Generator().manual_seed(seed)) * torch.logspace(0, 3, 32)
    hessian = Hessian.of(x.T @ x / 24, 1e-9, activation_order=True)
    assert hessian.upper_II.isfinite().all()
    assert hessian.order_I is not None
    assert hessian.order_I[0] == (x**2).mean(0).argmax()


def test_a_hessian_that_no_damping_repairs_is_an_error() -> None:
    message = (
        r"the Hessian of layers\.0\.q_proj must be positive definite; it is not, even with damping 1; "
        "check the calibration text, or leave gptq out"
    )
    with pytest.raises(ModelError, match=message):
        Hessian.of(torch.eye(4) - 5 * torch.ones(4, 4), 0.03, "layers.0.q_proj")


def test_descent_gives_each_code_its_best_value() -> None:
    weight, gram = random_layer(3, 32)
    target = RoundingTarget(weight, damped(gram))
    scale, zero_point = min_max_qparams(weight, SCHEME)
    initial = quantize(weight, scale, zero_point, SCHEME)
    expected = initial.clone()
    for o in range(3):
        row = RoundingTarget(weight[o, None], target.gram_II)
        for j in range(32):
            trials = expected[o].repeat(16, 1)
            trials[:, j] = torch.arange(16)
            errors = [float(error_of(trial[None], scale[o, None], zero_point[o, None], row)) for trial in trials]
            expected[o, j] = errors.index(min(errors))
    assert not torch.equal(expected, initial)
    assert torch.equal(gptq.descend(initial, scale, zero_point, target, SCHEME), expected)


def test_polishing_raises_the_error_of_no_row() -> None:
    weight, gram = random_layer(32, 64)
    hessian = Hessian.of(gram.clone(), DAMPING)
    target = RoundingTarget(weight, hessian.matrix_II)
    running, scale, zero_point = gptq.compensate(weight, hessian, SCHEME, ScaleEstimation())
    rounded = RoundedWeight(quantize(running, scale, zero_point, SCHEME), running, scale, zero_point)
    polished = gptq.polish(rounded, target, SCHEME, ScaleEstimation())
    before = error_of(rounded.codes_OI, scale, zero_point, target)
    after = error_of(polished.codes_OI, polished.scale_OG, zero_point, target)
    assert (after <= before * (1 + 1e-9)).all()
    assert after.sum() < 0.95 * before.sum()


def test_scales_that_cannot_be_fitted_leave_the_result_of_gptq() -> None:
    weight, gram = random_layer(5, 32)
    rounder = GPTQ().make_rounder(
        "a", gram.clone(), MinMaxScales(), SCHEME, Calibration(torch.zeros(1, 1), gptq_damping=0.3)
    )
    rounded = rounder(weight)
    running, scale, zero_point = gptq.compensate(weight, Hessian.of(gram.clone(), 0.3), SCHEME, MinMaxScales())
    assert torch.equal(rounded.codes_OI, quantize(running, scale, zero_point, SCHEME))
    assert torch.equal(rounded.weight_OI, running)


def test_the_rounder_uses_the_settings_and_polishes() -> None:
    weight, gram = random_layer(5, 32)
    calibration = Calibration(torch.zeros(1, 1), gptq_damping=0.3, gptq_activation_order=True)
    rounded = GPTQ().make_rounder("a", gram.clone(), ScaleEstimation(), SCHEME, calibration)(weight)
    hessian = Hessian.of(gram.clone(), 0.3, activation_order=True)
    running, scale, zero_point = gptq.compensate(weight, hessian, SCHEME, ScaleEstimation())
    expected = gptq.polish(
        RoundedWeight(quantize(running, scale, zero_point, SCHEME), running, scale, zero_point),
        RoundingTarget(weight, hessian.matrix_II),
        SCHEME,
        ScaleEstimation(),
    )
    assert torch.equal(rounded.codes_OI, expected.codes_OI)
    assert torch.equal(rounded.scale_OG, expected.scale_OG)
    assert not torch.equal(rounded.scale_OG, scale)
