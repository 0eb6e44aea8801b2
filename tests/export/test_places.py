"""Rows of weights in the files of an export: what a tensor consists of, and putting rows together again."""

import torch

from nybble.export.places import (
    Place,
    by_name,
    by_tensor,
    join_tensors,
    join_weights,
    stack_rows,
    stored_shape,
    take_rows,
)
from nybble.quant.scheme import QuantScheme
from nybble.quant.weight import QuantizedWeight

SHAPES = {"a": (6, 8), "b": (6, 8)}
# Two stacks of two matrices, the second expert first; every other row of each weight.
INTERLEAVED = [Place(half, name, slice(i, None, 2), matrix) for matrix, name in ((1, "b"), (0, "a")) for i, half in
               enumerate(("gates", "ups"))]  # fmt: skip


def make_weight(seed: int) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (6, 8), generator=generator, dtype=torch.uint8)
    zero_points = torch.randint(0, 16, (6, 2), generator=generator, dtype=torch.uint8)
    return QuantizedWeight(codes, torch.rand(6, 2, generator=generator), zero_points, QuantScheme(4, 4))


def test_a_tensor_has_its_matrices_in_order() -> None:
    tensors = by_tensor(INTERLEAVED)
    assert [place.name for place in tensors["gates"]] == ["a", "b"]
    assert stored_shape(tensors["gates"], SHAPES.__getitem__) == (2, 3, 8)
    assert stored_shape([Place("x", "a", transposed=True)], SHAPES.__getitem__) == (8, 6)
    one_matrix = [Place("x", "a", slice(0, 4)), Place("x", "b", slice(0, 2), first_row=4)]
    assert stored_shape(one_matrix, SHAPES.__getitem__) == (6, 8)
    assert stored_shape([Place("x", "scalar")], lambda _: ()) == ()


def test_rows_that_were_taken_are_put_together_again() -> None:
    weight = make_weight(0)
    places = by_name(INTERLEAVED)["b"]
    joined = join_weights(places, [take_rows(weight, place.rows) for place in places])
    for leaf in ("codes_OI", "scale_OG", "zero_point_OG"):
        assert torch.equal(getattr(joined, leaf), getattr(weight, leaf))
    parts = [weight.codes_OI[place.rows] for place in places]
    assert torch.equal(join_tensors(places, parts), weight.codes_OI)


def test_weights_of_a_stack_come_one_after_the_other() -> None:
    first, second = make_weight(0), make_weight(1)
    rows = slice(2, 4)
    stack = stack_rows([take_rows(weight, rows) for weight in (first, second)])
    assert torch.equal(stack.codes_OI, torch.stack([*first.codes_OI[2:4], *second.codes_OI[2:4]]))
    assert torch.equal(stack.zero_point_OG, torch.stack([*first.zero_point_OG[2:4], *second.zero_point_OG[2:4]]))
