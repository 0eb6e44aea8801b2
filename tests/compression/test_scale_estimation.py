"""Scale estimation: the quadratic form against direct evaluation, its solution against least squares."""

import itertools

import pytest
import torch

from nybble.compression import scale_estimation
from nybble.compression.output_error import RoundingTarget, output_error
from nybble.compression.scale_estimation import (
    RANGE_FRACTIONS,
    SIGNED_FRACTIONS,
    ScaleEstimation,
    ScaleQuadratic,
    estimate,
    search,
)
from nybble.quant.grid import (
    dequantize,
    min_max_qparams,
    qparams_from_range,
    quantize,
    quantize_dequantize,
    round_scale,
)
from nybble.quant.scheme import QuantScheme
from tests.helpers.compression import random_layer

SCHEME = QuantScheme(group_size=8)


def error(weight: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    return output_error(quantize_dequantize(weight, scale, zero_point, SCHEME) - weight, gram)


def test_search_keeps_the_best_range_of_each_group() -> None:
    weight, gram = random_layer(4, 32)
    importance = gram.diagonal()
    scale, zero_point = search(weight, importance, SCHEME)
    groups = weight.view(4, 4, 8)
    for o, g in itertools.product(range(4), range(4)):
        group, errors = groups[o, g], []
        for fraction in RANGE_FRACTIONS:
            s, z = qparams_from_range(group.min()[None] * fraction, group.max()[None] * fraction, SCHEME)
            rounded = quantize_dequantize(group[None], s[None], z[None], SCHEME)[0]
            weighed = float(((rounded - group).square() * importance[8 * g : 8 * g + 8]).sum())
            errors.append((weighed, float(s), float(z)))
        assert (float(scale[o, g]), float(zero_point[o, g])) == min(errors)[1:]


def test_search_keeps_the_best_scale_of_each_symmetric_group() -> None:
    weight, gram = random_layer(4, 32)
    importance, scheme = gram.diagonal(), QuantScheme(3, 8, symmetric=True)
    scale, zero_point = search(weight, importance, scheme)
    assert (zero_point == 4).all()
    for o, g in itertools.product(range(4), range(4)):
        group, errors = weight[o, 8 * g : 8 * g + 8], []
        farthest = group[group.abs().argmax()]
        for fraction in SIGNED_FRACTIONS:
            s = round_scale(round_scale(-farthest / 4) * fraction)
            rounded = (group / s).round().clamp(-4, 3) * s
            errors.append((float(((rounded - group).square() * importance[8 * g : 8 * g + 8]).sum()), float(s)))
        assert float(scale[o, g]) == min(errors)[1]
    assert set(scale.sign().flatten().tolist()) == {-1, 1}


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_group_takes_the_other_sign_where_its_farthest_weight_matters_little(bits: int) -> None:
    scheme = QuantScheme(bits, None, symmetric=True)
    levels = -torch.arange(1.0, scheme.middle_code + 1) / scheme.middle_code  # all codes of the longer side
    weight, importance = torch.cat([torch.tensor([1.04]), levels])[None], torch.ones(len(levels) + 1)
    importance[0] = 1e-6
    start, _ = min_max_qparams(weight, scheme)
    scale, _ = search(weight, importance, scheme)
    assert float(start) < 0 < float(scale)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_sign_of_a_symmetric_scale_follows_the_weights(bits: int) -> None:
    """Mirrored weights have mirrored scales, the same codes and the same error, through search and fit."""
    weight, gram = random_layer(16, 32)
    scheme = QuantScheme(bits, 8, symmetric=True)
    scale, zero_point = estimate(weight, gram, scheme)
    mirrored, _ = estimate(-weight, gram, scheme)
    assert torch.equal(mirrored, -scale)
    assert torch.equal(quantize(-weight, mirrored, zero_point, scheme), quantize(weight, scale, zero_point, scheme))


@pytest.mark.parametrize("symmetric", [False, True])
def test_rows_are_computed_some_at_a_time_with_the_same_bits(symmetric: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, gram = random_layer(150, 32)
    scheme = QuantScheme(4, 8, symmetric)
    whole = estimate(weight, gram, scheme)
    monkeypatch.setattr(scale_estimation, "_CACHED_NUMBERS", 1)  # 64 rows at a time
    assert all(map(torch.equal, estimate(weight, gram, scheme), whole))


@pytest.mark.parametrize(("bits", "share"), [(2, 0.75), (3, 0.9), (4, 0.95)])
def test_symmetric_search_is_better_than_round_to_nearest(bits: int, share: float) -> None:
    weight, gram = random_layer(64, 32)
    scheme = QuantScheme(bits, 8, symmetric=True)

    def error_of(scale: torch.Tensor, zero_point: torch.Tensor) -> float:
        rounded = quantize_dequantize(weight, scale, zero_point, scheme)
        return float(output_error(rounded - weight, gram).sum())

    estimated = error_of(*estimate(weight, gram, scheme))
    assert estimated < share * error_of(*min_max_qparams(weight, scheme))


def test_the_quadratic_form_is_the_output_error() -> None:
    weight, gram = random_layer(16, 32)
    scale, zero_point = min_max_qparams(weight, SCHEME)
    codes = quantize(weight, scale, zero_point, SCHEME)
    quadratic = ScaleQuadratic.of(RoundingTarget(weight, gram), codes, zero_point)
    for candidate in (scale, scale * 0.9, scale * torch.rand_like(scale)):
        expected = output_error(dequantize(codes, candidate, zero_point) - weight, gram)
        assert torch.allclose(quadratic.error(candidate), expected)


def test_solved_scales_are_those_of_least_squares() -> None:
    weight, gram = random_layer(16, 32)
    x = torch.linalg.cholesky(gram).T  # x^T x = gram
    scale, zero_point = min_max_qparams(weight, SCHEME)
    codes = quantize(weight, scale, zero_point, SCHEME)
    solved = ScaleEstimation().fit(RoundingTarget(weight, gram), codes, scale, zero_point)
    for o in range(len(weight)):
        columns = torch.block_diag(*(codes[o].double() - zero_point[o].repeat_interleave(8)).view(4, 8, 1))
        exact = torch.linalg.lstsq(x @ columns, x @ weight[o]).solution
        assert (exact > 0).all()
        assert torch.allclose(solved[o], exact, rtol=2**-7)  # scales have 7 significant bits


def test_a_group_without_a_positive_solution_keeps_its_scale() -> None:
    quadratic = ScaleQuadratic(torch.eye(2)[None], torch.tensor([[-1.0, 0.5]]), torch.zeros(1))
    assert quadratic.solve(torch.tensor([[0.25, 0.25]])).tolist() == [[0.25, pytest.approx(0.5)]]


def test_a_row_whose_error_would_rise_keeps_its_scales() -> None:
    exact = 1 + 2**-9  # between two scales of the grid; the nearest is 1
    quadratic = ScaleQuadratic(torch.ones(1, 1, 1), torch.full((1, 1), exact), torch.zeros(1))
    assert quadratic.solve(torch.full((1, 1), exact)).item() == exact
    assert quadratic.solve(torch.full((1, 1), 1.5)).item() == 1


def test_each_pass_lowers_the_error_of_every_row() -> None:
    weight, gram = random_layer(64, 32, correlation=0.1)
    searched = error(weight, *search(weight, gram.diagonal(), SCHEME), gram)
    errors = [error(weight, *estimate(weight, gram, SCHEME, passes), gram) for passes in range(4)]
    assert torch.allclose(errors[0], searched)
    for before, after in itertools.pairwise(errors):
        assert (after <= before * (1 + 1e-9)).all()
    assert errors[3].sum() < 0.9 * searched.sum()
    assert searched.sum() < error(weight, *min_max_qparams(weight, SCHEME), gram).sum()


def test_scales_are_on_the_scale_grid_and_zero_points_are_codes() -> None:
    weight, gram = random_layer(16, 32)
    scale, zero_point = estimate(weight.float(), gram.float(), SCHEME)
    assert torch.equal(scale.half().float(), scale)
    assert torch.equal((scale * 15).half().float(), scale * 15)
    assert torch.equal(zero_point, zero_point.round())
    assert zero_point.min() >= 0
    assert zero_point.max() <= 15


def test_rows_of_zeros_stay_zero() -> None:
    _, gram = random_layer(1, 32)
    scale, zero_point = estimate(torch.zeros(3, 32), gram.float(), SCHEME)
    assert scale.isfinite().all()
    assert torch.equal(quantize_dequantize(torch.zeros(3, 32), scale, zero_point, SCHEME), torch.zeros(3, 32))
