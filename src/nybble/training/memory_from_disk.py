"""Estimates of the memory of a compression whose decoder blocks stay on the disk; see memory.py. Sizes in bytes.

overhead + all outside of the blocks + the head again + two blocks + what one block needs
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from nybble.compression.calibration import TOKENS_PER_FORWARD
from nybble.models.streamed import MAX_BYTES_IN_MEMORY
from nybble.training.memory import (
    ADAM,
    CHUNK_COPIES,
    FLOAT32,
    MATRICES,
    MEASURED_POSITIONS,
    OVERHEAD,
    ROW_COPIES,
    ModelShapes,
    activations,
)


@dataclass(frozen=True)
class BlockShapes:
    """Sizes of the decoder blocks of a model.

    Attributes:
        rest: numbers in the parameters outside of the blocks.
        block: numbers in the parameters of the largest block.
        groups: (I, O) for the layers of the block with most weights in 4 bits that may share an input: its width, and
            the sum of their outputs. None where no layer of a block gets 4 bits.
    """

    rest: int
    block: int
    groups: tuple[tuple[int, int], ...]

    @staticmethod
    def of(model: Any, path: str, names: tuple[str, ...]) -> BlockShapes:
        """Return the sizes of the list of blocks at `path`, in which the layers `names` get 4 bits."""
        blocks = list(model.get_submodule(path))
        sizes = [sum(parameter.numel() for parameter in block.parameters()) for block in blocks]
        groups: list[tuple[tuple[int, int], ...]] = [()]
        for i in range(len(blocks)):
            outputs: Counter[tuple[str, int]] = Counter()
            for name in names:
                if name.startswith(f"{path}.{i}."):
                    rows, columns = model.get_submodule(name).weight.shape
                    outputs[name.rpartition(".")[0], columns] += rows
            groups.append(tuple((columns, rows) for (_, columns), rows in outputs.items()))
        largest = max(groups, key=lambda group: sum(columns * rows for columns, rows in group))
        return BlockShapes(sum(p.numel() for p in model.parameters()) - sum(sizes), max(sizes), largest)

    @property
    def moments(self) -> int:
        """Numbers in the second moments of all inputs of a block."""
        return sum(inputs**2 for inputs, _ in self.groups)


@dataclass(frozen=True)
class CompressionSetup:
    """What the memory of a compression from disk depends on, besides the model.

    Attributes:
        steps: of the method, see `methods.parse_method`.
        sequences, length: of the calibration text; 0 where nothing is calibrated.
        logits_bytes: bytes of the logits that exist at the same time while the model is measured.
        on_gpu: the peak is that of the GPU; hidden states of the text are in the CPU's memory.
    """

    steps: tuple[str, ...]
    sequences: int
    length: int
    logits_bytes: int
    on_gpu: bool = False


def offloaded_memory(shapes: ModelShapes, blocks: BlockShapes, setup: CompressionSetup) -> int:
    """Return the peak memory of a compression from disk, or of measuring in it if that is larger.

    Outside of the blocks all is in memory, and the head twice. Of the blocks one is, and what is read of it or made of
    it. A step of the method needs the second moments of all inputs of a block, and beside them the activations of a
    microbatch, or the matrices and rows of the largest layer, or what reconstruction trains.

    Args:
        shapes: sizes of the model.
        blocks: sizes of its blocks.
        setup: the compression.
    """
    held = OVERHEAD + blocks.rest * shapes.itemsize + shapes.head_bytes + 2 * blocks.block * shapes.itemsize
    measuring = setup.logits_bytes + CHUNK_COPIES * MEASURED_POSITIONS * shapes.vocab_size * FLOAT32
    if not setup.sequences:
        rows = max((ROW_COPIES * inputs * outputs * FLOAT32 for inputs, outputs in blocks.groups), default=0)
        return held + max(measuring, rows)
    rounding = max((_rounding(inputs, outputs, setup) for inputs, outputs in blocks.groups), default=0)
    trained = (ADAM + 2 * FLOAT32) * blocks.block if "blockwise" in setup.steps else 0
    kept = activations(shapes, max(setup.length, TOKENS_PER_FORWARD))
    stream = setup.sequences * setup.length * shapes.hidden_size * shapes.itemsize
    streams = 0 if setup.on_gpu else (2 if "blockwise" in setup.steps else 1) * min(stream, MAX_BYTES_IN_MEMORY)
    work = streams + max(blocks.moments * FLOAT32 + max(rounding, kept), trained + kept)
    return held + max(measuring, work)


def _rounding(inputs: int, outputs: int, setup: CompressionSetup) -> int:
    """Bytes of the matrices and rows that exist while the layers with one input are rounded.

    Args:
        inputs: width of the input, I.
        outputs: rows of all these layers.
        setup: the compression.
    """
    rows = ROW_COPIES * inputs * outputs
    if "gptq" not in setup.steps:
        return (inputs**2 + rows) * FLOAT32
    return max((MATRICES + setup.on_gpu) * inputs**2, MATRICES * inputs**2 + rows) * FLOAT32
