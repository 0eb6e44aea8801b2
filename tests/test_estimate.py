"""The estimate: right order of things, and above what tiny runs really take (real peaks are in docs/log.md)."""

from nybble import estimate, models
from tests.tiny import make_model

SHAPES = estimate.Shapes.of(make_model("llama"), models.plan(make_model("llama")).int4, 4)


def test_shapes_are_those_of_the_model() -> None:
    # per layer: q, o 64 x 64; k, v 32 x 64; gate, up 128 x 64; down 64 x 128
    assert SHAPES.int4 == 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64)
    assert SHAPES.features == 2 * (2 * 128 + 2 * 96 + 3 * 192)
    assert SHAPES.largest == 128 * 64


def test_cache_costs_a_weight_and_a_gradient_copy() -> None:
    with_cache, without = (estimate.memory(SHAPES, 8, 64, 256, 64, cache) for cache in (True, False))
    assert with_cache - without == 2 * SHAPES.int4 * 4


def test_microbatch_grows_with_memory_and_stops_at_the_batch() -> None:
    picks = [estimate.pick_microbatch(SHAPES, 8, 64, 1024, 32, 64, True, available=int(available), most=10**9) for available in (1e6, 1.5e9, 3e9, 1e12)]
    assert picks[0] == 1
    assert picks == sorted(picks)
    assert picks[-1] == 32
    assert estimate.pick_microbatch(SHAPES, 8, 64, 1024, 32, 64, True, available=10**12, most=4096) == 4
