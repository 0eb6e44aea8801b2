"""GPTQ against an unblocked float64 reference that shares no formula with it; damping; errors."""

import logging

import pytest
import torch

from nybble.compress import calibration as compress_calibration
from nybble.compress import gptq, methods, pipeline
from nybble.compress.blocks import InputStatistics
from nybble.compress.gptq import Hessian
from nybble.compress.scale_estimation import output_error, search
from nybble.errors import ModelError
from nybble.quant.grid import dequantize, min_max_qparams, quantize
from nybble.quant.scheme import QuantScheme
from tests.reference.gptq import gptq as reference

GRID = QuantScheme(group_size=8)


def layer(outputs: int = 5, inputs: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    weight = torch.randn(outputs, inputs, dtype=torch.float64)
    x = torch.randn(200, inputs, dtype=torch.float64) @ torch.randn(inputs, inputs, dtype=torch.float64)
    return weight, x.T @ x / 200


def plain(weight: torch.Tensor, importance: torch.Tensor, scheme: QuantScheme) -> tuple[torch.Tensor, torch.Tensor]:
    return min_max_qparams(weight, scheme)


@pytest.mark.parametrize("activation_order", [False, True])
@pytest.mark.parametrize("damping", [0.01, 0.3])
def test_equals_the_slow_reference(activation_order: bool, damping: float) -> None:
    weight, gram = layer()
    running, scale, zero = gptq.compensate(
        weight, Hessian.of(gram, damping, activation_order=activation_order), GRID, plain
    )
    order = gram.diagonal().argsort(descending=True).tolist() if activation_order else list(range(32))
    assert torch.equal(quantize(running, scale, zero, GRID), reference(weight, gram, damping, scale, zero, 15, order))


def test_scales_come_from_the_running_weights() -> None:
    weight, gram = layer()
    _, scale, _ = gptq.compensate(weight, Hessian.of(gram), GRID, plain)
    assert torch.equal(
        scale[:, 0], min_max_qparams(weight, GRID)[0][:, 0]
    )  # nothing has been rounded before the first group
    assert not torch.equal(scale[:, 1:], min_max_qparams(weight, GRID)[0][:, 1:])
    seen = []

    def find(weight: torch.Tensor, importance: torch.Tensor, scheme: QuantScheme) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append((weight.clone(), importance))
        return min_max_qparams(weight, scheme)

    gptq.compensate(weight, Hessian.of(gram), GRID, find)
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(32, dtype=torch.float64)
    for g, (_, importance) in enumerate(seen):
        costs = [1 / torch.linalg.inv(damped[j:, j:])[0, 0] for j in range(8 * g, 8 * g + 8)]
        assert torch.allclose(importance, torch.stack(costs))


def test_activation_order_finds_scales_on_the_weights_as_they_were() -> None:
    weight, gram = layer()
    _, scale, zero = gptq.compensate(weight, Hessian.of(gram, activation_order=True), GRID, plain)
    assert torch.equal(scale, min_max_qparams(weight, GRID)[0])
    assert torch.equal(zero, min_max_qparams(weight, GRID)[1])


@pytest.mark.parametrize("find", [plain, search])
def test_less_output_error_than_rounding_to_nearest(find: gptq.Find) -> None:
    weight, gram = layer(64, 64)
    scale, zero = min_max_qparams(weight, GRID)
    nearest = output_error(dequantize(quantize(weight, scale, zero, GRID), scale, zero) - weight, gram).sum()
    running, scale, zero = gptq.compensate(weight, Hessian.of(gram), GRID, find)
    made = output_error(dequantize(quantize(running, scale, zero, GRID), scale, zero) - weight, gram).sum()
    assert made < 0.6 * nearest


def test_more_damping_is_used_and_said(caplog: pytest.LogCaptureFixture) -> None:
    gram = torch.eye(8)
    gram[0, 1] = gram[1, 0] = 1.05  # an eigenvalue of -0.05
    with caplog.at_level(logging.WARNING, "nybble"):
        upper = Hessian.of(gram, 0.01, "layers.0.q_proj").upper_II
    assert "layers.0.q_proj: the Hessian is not positive definite with damping 0.01; used 0.1" in caplog.text
    assert torch.allclose(upper.T @ upper, torch.linalg.inv(gram + 0.1 * torch.eye(8)), atol=1e-4)


def test_a_hessian_that_no_damping_repairs_is_an_error() -> None:
    for seed in range(200):  # nearly singular: whether it can be factored depends on the order of its columns
        x = torch.randn(24, 32, generator=torch.Generator().manual_seed(seed)) * torch.logspace(0, 3, 32)
        hessian = Hessian.of(x.T @ x / 24, 1e-9, activation_order=True)
        assert hessian.upper_II.isfinite().all()
        assert hessian.order_I is not None
        assert hessian.order_I[0] == (x**2).mean(0).argmax()
    with pytest.raises(
        ModelError,
        match=r"the Hessian of layers\.0\.q_proj must be positive definite; it is not, even with damping 1; .* or leave gptq out",
    ):
        Hessian.of(torch.eye(4) - 5 * torch.ones(4, 4), 0.03, "layers.0.q_proj")


def test_descent_gives_each_code_its_best_value() -> None:
    weight, gram = layer(3)
    hessian = Hessian.of(gram).matrix_II
    scale, zero = min_max_qparams(weight, GRID)
    start = quantize(weight, scale, zero, GRID)
    codes = start.clone()
    for o in range(3):
        for j in range(32):
            errors = []
            for code in range(16):
                trial = codes[o].clone()
                trial[j] = code
                errors.append(
                    float(output_error(dequantize(trial[None], scale[o, None], zero[o, None]) - weight[o], hessian))
                )
            codes[o, j] = errors.index(min(errors))
    assert not torch.equal(codes, start)
    assert torch.equal(gptq.descend(start, scale, zero, weight, hessian, GRID), codes)


def test_polishing_raises_no_error() -> None:
    weight, gram = layer(64, 64)
    hessian = Hessian.of(gram).matrix_II
    running, scale, zero = gptq.compensate(weight, Hessian.of(gram), GRID, search)
    codes = quantize(running, scale, zero, GRID)
    polished, fitted = pipeline._polish(codes, scale, zero, weight, hessian, GRID)
    before, after = (
        output_error(dequantize(c, s, zero) - weight, hessian) for c, s in ((codes, scale), (polished, fitted))
    )
    assert (after <= before * (1 + 1e-9)).all()
    assert after.sum() < 0.95 * before.sum()


def test_unused_inputs_do_no_harm() -> None:
    weight, gram = layer()
    gram[:8] = gram[:, :8] = 0
    running, _, _ = gptq.compensate(weight, Hessian.of(gram), GRID, plain)
    assert running.isfinite().all()


@pytest.mark.parametrize("method", ["se", "gptq", "se+gptq"])
def test_a_layer_that_sees_nothing_is_rounded_well_all_the_same(method: str) -> None:
    block = torch.nn.ModuleDict({"dead": torch.nn.Linear(32, 16)})
    shared, calibration = (
        InputStatistics(("dead",), torch.zeros(32, 32)),
        compress_calibration.Calibration(torch.zeros(1, 1)),
    )
    start = pipeline._round(block, shared, GRID, methods.parse_method(method), calibration, "layers.0.")["dead"]
    weight = block["dead"].weight.detach()
    nearest = dequantize(quantize(weight, *min_max_qparams(weight, GRID), GRID), *min_max_qparams(weight, GRID))
    assert (start.quantized(GRID).dequantize() - weight).norm() < 1.3 * (nearest - weight).norm()


@pytest.mark.parametrize("method", ["se", "gptq", "se+gptq"])
def test_rows_at_a_time_give_the_same(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, gram = layer(20, 32)
    block = torch.nn.ModuleDict(
        {"a": torch.nn.Linear(32, 12, dtype=torch.float64), "b": torch.nn.Linear(32, 8, dtype=torch.float64)}
    )
    with torch.no_grad():
        block["a"].weight.copy_(weight[:12])
        block["b"].weight.copy_(weight[12:])
    made = []
    for equations in (16 << 20, 16 * 7):
        monkeypatch.setattr(pipeline, "_EQUATIONS", equations)
        made.append(
            pipeline._round(
                block,
                InputStatistics(("a", "b"), gram),
                GRID,
                methods.parse_method(method),
                compress_calibration.Calibration(torch.zeros(1, 1)),
                "",
            )
        )
    for name, size in (("a", 12), ("b", 8)):
        one, two = (part[name].quantized(GRID) for part in made)
        assert one.codes_OI.shape == (size, 32)
        assert torch.equal(one.codes_OI, two.codes_OI)
        assert torch.equal(one.scale_OG, two.scale_OG)
