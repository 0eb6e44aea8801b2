"""Elastic ranks: one rank for each decoder layer, out of a small rank space.

Neural low-rank adapter search (Shears, https://arxiv.org/abs/2404.10934; SQFT, https://arxiv.org/abs/2410.03750): an
adapter of rank 16 is the first 16 ranks of the same adapter of rank 32. A configuration, one rank for each decoder
layer, therefore selects one of many sub-models that share their weights. Training a random configuration in each step
trains all of them; the best one is selected afterwards.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch

from nybble.errors import ModelError, OptionError
from nybble.qat.base import CachedWeightLinear

log = logging.getLogger("nybble")

# The rank of each decoder layer, first layer first.
RankConfiguration = tuple[int, ...]

# The number of a decoder layer in a module name such as model.layers.7.mlp.up_proj.
_LAYER_NUMBER = re.compile(r"\.(\d+)\.")

# Steps of different seeds get different random generators as long as a training has fewer steps than this.
_MAX_STEPS = 1_000_003


def parse_rank_space(values: Sequence[int]) -> tuple[int, ...]:
    """Sort the ranks of --lora_rank_space, largest first, without duplicates. A change is logged.

    Raises:
        OptionError: there is no rank, or one below 1.
    """
    written = " ".join(map(str, values))
    if not values or min(values) < 1:
        raise OptionError(
            f"--lora_rank_space must be one or more ranks of at least 1; got {written or 'none'}; "
            "use, for example, --lora_rank_space 32 24 16"
        )
    space = tuple(sorted(set(values), reverse=True))
    if space != tuple(values):
        log.info("--lora_rank_space: sorted %s to %s", written, " ".join(map(str, space)))
    return space


def decoder_layer_indices(names: Iterable[str]) -> dict[str, int]:
    """Decoder layer of each module, by its name.

    Args:
        names: names of modules with adapters, such as model.layers.7.mlp.up_proj.

    Returns: name -> index of its decoder layer, from 0 in the order of the numbers in the names. A module outside of
        the decoder layers shares the rank of the first, or of the last if it comes after any of them.

    Raises:
        ModelError: no module is in a numbered layer.
    """
    numbers: dict[str, int] = {}
    before: list[str] = []
    after: list[str] = []
    for name in names:
        if match := _LAYER_NUMBER.search(name):
            numbers[name] = int(match[1])
        else:
            (after if numbers else before).append(name)
    if before and not numbers:
        raise ModelError(
            "nybble tune needs linear layers in numbered decoder layers, each of which gets one rank; "
            f"the model has none (first layer: {before[0]}); use nybble distill"
        )
    if numbers:
        numbers |= dict.fromkeys(before, min(numbers.values())) | dict.fromkeys(after, max(numbers.values()))
    index_of = {number: index for index, number in enumerate(sorted(set(numbers.values())))}
    return {name: index_of[number] for name, number in numbers.items()}


def count_decoder_layers(names: Iterable[str]) -> int:
    """Number of decoder layers that modules are in.

    Args:
        names: names of modules with adapters.

    Raises:
        ModelError: no module is in a numbered layer.
    """
    return len(set(decoder_layer_indices(names).values()))


def check_configuration(values: Sequence[int], space: Sequence[int], num_layers: int) -> RankConfiguration:
    """The configuration of --custom_rank_config.

    Args:
        values: ranks as they were given.
        space: ranks to choose from.
        num_layers: decoder layers of the model.

    Raises:
        OptionError: there is not one rank for each decoder layer, or a rank is not in the space.
    """
    if len(values) != num_layers:
        raise OptionError(
            f"--custom_rank_config must give one rank for each of the {num_layers} decoder layers; got {len(values)} "
            "ranks; leave it out to select ranks on held-out rows"
        )
    unknown = sorted(set(values) - set(space))
    if unknown:
        raise OptionError(
            f"--custom_rank_config must take its ranks from --lora_rank_space {' '.join(map(str, space))}; "
            f"got {' '.join(map(str, unknown))}"
        )
    return tuple(values)


def activate_ranks(layers: Mapping[str, CachedWeightLinear], configuration: RankConfiguration) -> None:
    """Set the active rank of every layer, in place. A layer with fewer ranks uses all that it has.

    Args:
        layers: layers with adapters, by module name.
        configuration: rank of each decoder layer.
    """
    for name, index in decoder_layer_indices(layers).items():
        layers[name].active_rank = min(configuration[index], layers[name].rank)


def sample_configuration(space: Sequence[int], num_layers: int, seed: int, step: int) -> RankConfiguration:
    """A uniformly random configuration. It depends on the arguments alone, so a resumed run draws the same.

    Args:
        space: ranks to choose from.
        num_layers: decoder layers of the model.
        seed: seed of the run.
        step: optimizer step, from 0.
    """
    generator = torch.Generator().manual_seed(seed * _MAX_STEPS + step)
    return tuple(space[i] for i in torch.randint(len(space), (num_layers,), generator=generator).tolist())


def uniform_configuration(rank: int, num_layers: int) -> RankConfiguration:
    """The configuration with the same rank in every decoder layer."""
    return (rank,) * num_layers


def median_configuration(space: Sequence[int], num_layers: int) -> RankConfiguration:
    """The configuration with the median of the space in every decoder layer; of two medians the larger one."""
    return uniform_configuration(sorted(space, reverse=True)[(len(space) - 1) // 2], num_layers)


def most_frequent_configuration(trained: Sequence[RankConfiguration]) -> RankConfiguration:
    """For each decoder layer the rank that was trained most often; of equally frequent ones the largest.

    Args:
        trained: the configurations of all training passes, at least one.
    """
    return tuple(
        max(Counter(ranks).items(), key=lambda item: (item[1], item[0]))[0] for ranks in zip(*trained, strict=True)
    )


def least_loss_configurations(
    trained: Sequence[RankConfiguration], losses: Sequence[float], count: int
) -> list[RankConfiguration]:
    """The `count` distinct configurations with the smallest training losses, smallest first.

    Args:
        trained: configuration of each training step.
        losses: its loss at that step. A configuration that was trained several times counts with its smallest loss.
        count: maximum number of configurations.
    """
    least: dict[RankConfiguration, float] = {}
    for configuration, loss in zip(trained, losses, strict=True):
        least[configuration] = min(loss, least.get(configuration, loss))
    return sorted(least, key=least.__getitem__)[:count]
