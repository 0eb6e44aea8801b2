"""Elastic ranks: one rank per decoder layer, out of a small space. (Neural low-rank adapter search: Shears arXiv 2404.10934, SQFT arXiv 2410.03750.)

Ranks are slices of one prefix: an adapter at rank 16 is the first 16 columns of the same adapter at rank 32. So every configuration, one rank for each
decoder layer, is a model of its own, and training a random one each step trains them all.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence

import torch

from nybble.errors import ModelError, OptionError
from nybble.qat.layers import CachedWeightLinear

log = logging.getLogger("nybble")

# One rank for each decoder layer.
RankConfiguration = tuple[int, ...]
_BLOCK = re.compile(r"\.(\d+)\.")


def parse_rank_space(values: Sequence[int], option: str = "--lora_rank_space") -> tuple[int, ...]:
    """The ranks to choose from, largest first, each once; what had to be put in order is said.

    Raises:
        OptionError: none, or one below 1.
    """
    if not values or min(values) < 1:
        raise OptionError(
            f"{option} must be one or more ranks of at least 1, such as 32 24 16; got {' '.join(map(str, values)) or 'none'}"
        )
    space = tuple(sorted(set(values), reverse=True))
    if space != tuple(values):
        log.info("%s: %s taken as %s", option, " ".join(map(str, values)), " ".join(map(str, space)))
    return space


def decoder_layers(names: Sequence[str]) -> dict[str, int]:
    """Name of each adapted layer -> which decoder layer it is in, counted from 0 in the order of the model.

    Raises:
        ModelError: some are in none.
    """
    numbers = {name: int(found[1]) for name in names if (found := _BLOCK.search(name))}
    if len(numbers) < len(names):
        outside = ", ".join(sorted(set(names) - numbers.keys()))
        raise ModelError(
            f"nybble tune needs all linear layers in numbered decoder layers, which get a rank each; outside of them: {outside}; use nybble distill"
        )
    order = {number: i for i, number in enumerate(sorted(set(numbers.values())))}
    return {name: order[number] for name, number in numbers.items()}


def check_configuration(values: Sequence[int], space: Sequence[int], count: int) -> RankConfiguration:
    """A configuration that a person wrote.

    Raises:
        OptionError: not one rank for each of `count` decoder layers, or one that is not in the space.
    """
    if len(values) != count:
        raise OptionError(
            f"--custom_rank_config must give one rank for each of the {count} decoder layers; got {len(values)}"
        )
    outside = sorted(set(values) - set(space))
    if outside:
        raise OptionError(
            f"--custom_rank_config must take its ranks from the space {' '.join(map(str, space))}; got {' '.join(map(str, outside))}"
        )
    return tuple(values)


def activate_ranks(layers: Mapping[str, CachedWeightLinear], configuration: RankConfiguration) -> None:
    """Set the rank of every layer, in place; a layer that is narrower keeps its own largest."""
    for name, block in decoder_layers(list(layers)).items():
        layers[name].active_rank = min(configuration[block], layers[name].rank)


def sample_configuration(space: Sequence[int], count: int, seed: int, step: int) -> RankConfiguration:
    """The configuration of a training step: uniform, and known from seed and step alone."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    return tuple(space[i] for i in torch.randint(len(space), (count,), generator=generator).tolist())


def uniform_configuration(rank: int, count: int) -> RankConfiguration:
    """The same rank everywhere."""
    return (rank,) * count


def median_configuration(space: Sequence[int], count: int) -> RankConfiguration:
    """The median of the space everywhere (the larger of two)."""
    return uniform_configuration(sorted(space, reverse=True)[(len(space) - 1) // 2], count)


def most_frequent_configuration(seen: Sequence[RankConfiguration]) -> RankConfiguration:
    """For each decoder layer the rank that was trained most often (of equals the larger)."""
    return tuple(
        max(Counter(ranks).items(), key=lambda item: (item[1], item[0]))[0] for ranks in zip(*seen, strict=True)
    )


def least_loss_configurations(
    seen: Sequence[RankConfiguration], losses: Sequence[float], count: int
) -> list[RankConfiguration]:
    """The `count` different configurations with the least training loss, least first."""
    best: dict[RankConfiguration, float] = {}
    for configuration, loss in zip(seen, losses, strict=True):
        best[configuration] = min(loss, best.get(configuration, loss))
    return sorted(best, key=lambda configuration: best[configuration])[:count]
