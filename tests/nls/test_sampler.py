"""Which ranks each training pass uses."""

import dataclasses
from typing import Any

import pytest

from nybble.nls import ranks
from nybble.nls.sampler import RankSampler

SPACE = (8, 4, 2)


def make_sampler(sampling: Any, space: tuple[int, ...] = SPACE) -> RankSampler:
    return RankSampler(space, 3, sampling, 5)


def random_configurations(steps: range) -> list[tuple[int, ...]]:
    return [ranks.sample_configuration(SPACE, 3, 5, step) for step in steps]


def test_half_trains_the_largest_ranks_in_even_steps() -> None:
    sampler = make_sampler("half")
    trained = [sampler.configuration_at_step(step, 0) for step in range(10)]
    assert trained[::2] == [(8, 8, 8)] * 5
    assert trained[1::2] == random_configurations(range(1, 10, 2))
    assert sampler.passes_per_step == 1


def test_random_trains_a_random_configuration_in_every_step() -> None:
    sampler = make_sampler("random")
    trained = [sampler.configuration_at_step(step, 0) for step in range(10)]
    assert trained == random_configurations(range(10))
    assert sampler.passes_per_step == 1


def test_sandwich_trains_largest_smallest_and_random_in_every_step() -> None:
    sampler = make_sampler("sandwich")
    assert sampler.passes_per_step == 3
    for step in range(4):
        first, second, third = (sampler.configuration_at_step(step, number) for number in range(3))
        assert (first, second) == ((8, 8, 8), (2, 2, 2)) == sampler.extreme_configurations()
        assert third == ranks.sample_configuration(SPACE, 3, 5, step)


def test_single_rank_needs_one_pass() -> None:
    sampler = make_sampler("sandwich", (4,))
    assert sampler.passes_per_step == 1
    assert sampler.configuration_at_step(0, 0) == (4, 4, 4)


@pytest.mark.parametrize("sampling", ["half", "random", "sandwich"])
def test_configuration_depends_on_seed_and_step(sampling: str) -> None:
    sampler = make_sampler(sampling)
    trained = [sampler.configuration_at_step(step, 2) for step in range(20)]
    assert trained == [make_sampler(sampling).configuration_at_step(step, 2) for step in range(20)]
    other = dataclasses.replace(sampler, seed=6)
    assert trained != [other.configuration_at_step(step, 2) for step in range(20)]
    assert sampler.median_configuration() == (4, 4, 4)
