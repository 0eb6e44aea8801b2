"""Maps of bits to compare with the one that is chosen: random ones of the same size."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence


def random_layers(costs: Mapping[str, int], groups: Sequence[Sequence[str]], budget: float, seed: int) -> set[str]:
    """Groups of layers in random order, as long as they fit into the budget of additional bits."""
    shuffled, chosen = list(groups), set[str]()
    random.Random(seed).shuffle(shuffled)
    for names in shuffled:
        cost = sum(costs[name] for name in names)
        if cost <= budget:
            budget -= cost
            chosen.update(names)
    return chosen
