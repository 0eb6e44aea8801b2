"""Calibration: what compression methods learn from."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from nybble.compress import blockwise, gptq

# Tokens in one forward of a block.
TOKENS = 2048


log = logging.getLogger("nybble")


@dataclass(frozen=True)
class Calibration:
    """What methods learn from.

    Attributes:
        input_ids: [S, T] tokens.
        seed: of the order in which they are trained on.
        damping, activation_order: see gptq.py.
        recipe: of block-wise reconstruction.
        limit_blocks: compress so many blocks by the method and the others by rtn, for trying out; None = all.
        folder: for temporary files; None = the system's.
    """

    input_ids: Tensor
    seed: int = 0
    damping: float = gptq.DAMPING
    activation_order: bool = False
    recipe: blockwise.BlockwiseConfig = field(default_factory=blockwise.BlockwiseConfig)
    limit_blocks: int | None = None
    folder: Path | None = None
