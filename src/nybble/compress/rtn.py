"""Round-to-nearest: the range of each group spread over all codes. No data, no search."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from nybble.compress.start import Start
from nybble.grid import Grid, min_max


def compress(model: Any, names: Iterable[str], grid: Grid) -> dict[str, Start]:
    """Layer name -> Start; the weights are the model's own tensors."""
    weights = {name: model.get_submodule(name).weight.detach() for name in names}
    return {name: Start(weight_OI, *min_max(weight_OI, grid)) for name, weight_OI in weights.items()}
