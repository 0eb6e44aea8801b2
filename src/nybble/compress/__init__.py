"""Post-training compression: where tuning starts. One file a method, listed in METHODS.

A method takes the 16-bit model and gives, for every layer that gets 4 bits, the weight to be rounded and the grid to round it on.
It may change other parameters of the model in place (folding scales into norms, say), as long as the 16-bit function stays the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from nybble.compress import rtn
from nybble.compress.start import Start
from nybble.errors import OptionError
from nybble.grid import Grid

METHODS: dict[str, Callable[[Any, Iterable[str], Grid], dict[str, Start]]] = {"rtn": rtn.compress}


def check_method(method: str) -> None:
    """Raise OptionError, listing the valid ones, for an unknown method."""
    if method not in METHODS:
        raise OptionError(f"--start must be one of {', '.join(METHODS)}; got {method}")


def compress(model: Any, names: Iterable[str], grid: Grid, method: str) -> dict[str, Start]:
    """Layer name -> Start for all `names`, in that order."""
    check_method(method)
    return METHODS[method](model, names, grid)


__all__ = ["METHODS", "Start", "check_method", "compress"]
