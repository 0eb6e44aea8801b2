"""Scale estimation: the quadratic form against direct evaluation, its solution against least squares, errors that only fall."""

import itertools

import torch

from nybble.compress.scale_estimation import SHRINKS, Quadratic, estimate, output_error, search
from nybble.quant.grid import dequantize, min_max_qparams, qparams_from_range, quantize
from nybble.quant.scheme import QuantScheme

GRID = QuantScheme(group_size=8)


def layer(outputs: int = 16, inputs: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    weight = torch.randn(outputs, inputs, dtype=torch.float64)
    x = torch.randn(200, inputs, dtype=torch.float64) @ torch.randn(inputs, inputs, dtype=torch.float64)
    return weight, x.T @ x / 200


def error(weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    return output_error(dequantize(quantize(weight, scale, zero, GRID), scale, zero) - weight, gram)


def test_output_error_is_the_mean_square_of_the_outputs() -> None:
    x, difference = torch.randn(50, 32, dtype=torch.float64), torch.randn(3, 32, dtype=torch.float64)
    assert torch.allclose(output_error(difference, x.T @ x / 50), (x @ difference.T).square().mean(0))


def test_quadratic_is_the_error() -> None:
    weight, gram = layer()
    scale, zero = min_max_qparams(weight, GRID)
    codes = quantize(weight, scale, zero, GRID)
    quadratic = Quadratic.of(codes, zero, weight, weight @ gram, gram)
    for candidate in (scale, scale * 0.9, scale * torch.rand_like(scale)):
        assert torch.allclose(
            quadratic.error(candidate), output_error(dequantize(codes, candidate, zero) - weight, gram)
        )


def test_solution_is_that_of_least_squares() -> None:
    weight, gram = layer()
    x = torch.linalg.cholesky(gram).T  # x^T x = gram
    scale, zero = min_max_qparams(weight, GRID)
    codes = quantize(weight, scale, zero, GRID)
    solved = Quadratic.of(codes, zero, weight, weight @ gram, gram).solve(scale)
    for o in range(len(weight)):
        columns = torch.block_diag(*((codes[o].double() - zero[o].repeat_interleave(8)).view(4, 8, 1)))
        exact = torch.linalg.lstsq(x @ columns, x @ weight[o]).solution
        assert (exact > 0).all()
        assert torch.allclose(solved[o], exact, rtol=2**-7)  # the scale grid has 7 bits


def test_search_takes_the_best_of_its_ranges() -> None:
    weight, gram = layer(4)
    importance = gram.diagonal()
    scale, zero = search(weight, importance, GRID)
    groups = weight.view(4, 4, 8)
    for o in range(4):
        for g in range(4):
            errors = []
            for shrink in SHRINKS:
                low, high = groups[o, g].min() * shrink, groups[o, g].max() * shrink
                s, z = qparams_from_range(low[None], high[None], GRID)
                made = dequantize(quantize(groups[o, g][None], s[None], z[None], GRID), s[None], z[None])[0]
                errors.append(
                    (float(((made - groups[o, g]).square() * importance[8 * g : 8 * g + 8]).sum()), float(s), float(z))
                )
            assert (float(scale[o, g]), float(zero[o, g])) == min(errors)[1:]


def test_each_stage_lowers_the_error_of_every_row() -> None:
    weight = torch.randn(64, 32, dtype=torch.float64)
    x = torch.randn(200, 32, dtype=torch.float64) @ (
        torch.eye(32, dtype=torch.float64) + 0.1 * torch.randn(32, 32, dtype=torch.float64)
    )
    gram = x.T @ x / 200
    searched = error(weight, *search(weight, gram.diagonal(), GRID), gram)
    errors = [error(weight, *estimate(weight, gram, GRID, turns), gram) for turns in range(4)]
    assert torch.allclose(errors[0], searched)
    for before, after in itertools.pairwise(errors):
        assert (after <= before * (1 + 1e-9)).all()
    assert errors[3].sum() < 0.9 * searched.sum() < 0.9 * error(weight, *min_max_qparams(weight, GRID), gram).sum()


def test_scales_are_on_the_scale_grid_and_zeros_whole() -> None:
    weight, gram = layer()
    scale, zero = estimate(weight.float(), gram.float(), GRID)
    assert torch.equal(scale.half().float(), scale)
    assert torch.equal((scale * 15).half().float(), scale * 15)
    assert torch.equal(zero, zero.round())
    assert zero.min() >= 0
    assert zero.max() <= 15


def test_rows_of_zeros_are_no_trouble() -> None:
    _, gram = layer()
    scale, zero = estimate(torch.zeros(3, 32), gram.float(), GRID)
    assert scale.isfinite().all()
    assert torch.equal(dequantize(quantize(torch.zeros(3, 32), scale, zero, GRID), scale, zero), torch.zeros(3, 32))
