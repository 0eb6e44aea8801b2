"""The output error against outputs that are computed."""

import torch

from nybble.compression.output_error import RoundingTarget, output_error


def test_output_error_is_the_mean_square_of_the_outputs() -> None:
    x, difference = torch.randn(50, 32, dtype=torch.float64), torch.randn(3, 32, dtype=torch.float64)
    assert torch.allclose(output_error(difference, x.T @ x / 50), (x @ difference.T).square().mean(0))


def test_the_product_of_weight_and_gram_is_computed_once() -> None:
    target = RoundingTarget(torch.randn(3, 8), torch.rand(8, 8))
    assert torch.equal(target.weight_gram_OI, target.weight_OI @ target.gram_II)
    assert target.weight_gram_OI is target.weight_gram_OI
