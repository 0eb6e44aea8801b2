"""RankSampler: which rank configuration each training pass uses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nybble.nls import ranks
from nybble.nls.ranks import RankConfiguration

# half: the largest ranks in even steps, a random configuration in odd ones. random: a random configuration in every
# step, as published. sandwich: the largest ranks, the smallest ranks and a random configuration, all three in every
# step (https://arxiv.org/abs/1903.05134).
RankSampling = Literal["half", "random", "sandwich"]


@dataclass(frozen=True)
class RankSampler:
    """Rank configurations of a training.

    Attributes:
        space: ranks to choose from, largest first.
        num_layers: decoder layers of the model.
        sampling: what a step trains.
        seed: of the random configurations.
    """

    space: tuple[int, ...]
    num_layers: int
    sampling: RankSampling
    seed: int

    @property
    def passes_per_step(self) -> int:
        """Forward and backward passes of a step. With a single rank, the passes of the sandwich would all be equal."""
        return 3 if self.sampling == "sandwich" and len(self.space) > 1 else 1

    def extreme_configurations(self) -> tuple[RankConfiguration, RankConfiguration]:
        """The configurations with the largest and with the smallest rank everywhere."""
        largest, smallest = max(self.space), min(self.space)
        return (
            ranks.uniform_configuration(largest, self.num_layers),
            ranks.uniform_configuration(smallest, self.num_layers),
        )

    def configuration_at_step(self, step: int, pass_number: int) -> RankConfiguration:
        """The configuration that is trained in a pass of a step.

        Args:
            step: optimizer step, from 0.
            pass_number: 0, 1 and 2 are the largest, the smallest and the random configuration of a sandwich; the other
                samplings train the same configuration in every pass.
        """
        if self.sampling == "sandwich" and pass_number < 2:
            return self.extreme_configurations()[pass_number]
        if self.sampling == "half" and step % 2 == 0:
            return self.extreme_configurations()[0]
        return self.random_configuration(step)

    def random_configuration(self, step: int) -> RankConfiguration:
        """The random configuration that belongs to a step."""
        return ranks.sample_configuration(self.space, self.num_layers, self.seed, step)

    def median_configuration(self) -> RankConfiguration:
        """The configuration with the median rank everywhere, by which epochs are compared."""
        return ranks.median_configuration(self.space, self.num_layers)
