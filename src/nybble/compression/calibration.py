"""Calibration: the text that compression methods use, and the settings of the methods."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from nybble.compression.store import BlockStore

# Tokens in one forward of a decoder block. It bounds the memory of activations.
TOKENS_PER_FORWARD = 2048


@dataclass(frozen=True)
class BlockwiseConfig:
    """Training settings of block-wise reconstruction (blockwise.py).

    Attributes:
        epochs: passes over the calibration sequences.
        tokens: tokens per optimizer step, rounded down to whole sequences.
        offset_lr: peak learning rate of the rounding offsets, in code units.
        scale_lr: peak learning rate of the logarithms of the scales.
    """

    epochs: float = 2.0
    tokens: int = 2048
    offset_lr: float = 1e-2
    scale_lr: float = 2e-3


@dataclass(frozen=True)
class Calibration:
    """Text and settings of a compression that needs text.

    Attributes:
        input_ids: [S, T] token ids, int64; S sequences of one length T.
        seed: seed of the order of the sequences in block-wise reconstruction.
        gptq_damping: added to the diagonal of the Hessian, relative to the mean of the diagonal.
        gptq_activation_order: round the columns with large inputs first.
        blockwise: settings of block-wise reconstruction.
        limit_blocks: number of decoder blocks, from the first, that the method compresses; the others get rtn.
            None: all blocks.
        folder: folder for temporary files. None: the system's.
        store: keeps finished blocks, so that an interrupted compression can resume. None: nothing is kept.
    """

    input_ids: Tensor
    seed: int = 0
    gptq_damping: float = 0.01
    gptq_activation_order: bool = False
    blockwise: BlockwiseConfig = field(default_factory=BlockwiseConfig)
    limit_blocks: int | None = None
    folder: Path | None = None
    store: BlockStore | None = None
