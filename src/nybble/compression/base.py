"""The contract of a compression method.

A method acts at one of four stages. A combination such as awq+se+gptq passes through the decoder blocks from the
first to the last, and in each block through the stages in this order:

    stage    base class        built in   what it does
    FOLD     FoldingMethod     awq        rescales channels between layers; the 16-bit function does not change
    SCALE    ScaleMethod       se         chooses scale and zero point of each group
    ROUND    RoundingMethod    gptq       chooses the codes
    REFINE   RefinementMethod  blockwise  improves codes and scales of a whole block

A combination has at most one method at stage SCALE and at most one at stage ROUND; rtn.py is used where it has none.

To add a method, subclass one of the four base classes and register the class (methods.py), either in the same process
or through an entry point of the group "nybble.methods". The class is created without arguments. This one shrinks the
range:

    class ShrunkRange(ScaleMethod):
        needs_calibration = False

        def search(self, weight_OI, importance_I, scheme):
            return min_max_qparams(0.9 * weight_OI, scheme)

    METHODS.register("shrunk", ShrunkRange)        # nybble compress --method shrunk, or --method awq+shrunk+gptq
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, ClassVar

from torch import Tensor, nn

from nybble.compression.blocks import DecoderBlocks, InputStatistics
from nybble.compression.calibration import Calibration
from nybble.compression.init import QuantizedInit, RoundedWeight
from nybble.compression.output_error import RoundingTarget
from nybble.quant.scheme import QuantScheme

# Rows of a weight [O, I], at least float32 -> the rounded rows. The rows are independent of each other.
Rounder = Callable[[Tensor], RoundedWeight]


class Stage(IntEnum):
    """When a method acts on a block. Methods are combined in this order."""

    FOLD = 1
    SCALE = 2
    ROUND = 3
    REFINE = 4


class CompressionMethod:
    """What all methods have. Subclass one of the four classes below, not this one.

    Attributes:
        stage: set by the four classes below.
        needs_calibration: whether the method needs calibration text. It has an effect at the stages SCALE and ROUND;
            methods at FOLD and REFINE always get text.
    """

    stage: ClassVar[Stage]
    needs_calibration: ClassVar[bool] = True

    def check(self, model: Any, names: Sequence[str]) -> None:
        """Refuse a model that the method cannot compress. It is called before the expensive part of a run.

        Args:
            model: the transformers model; it must not change.
            names: paths of the layers that are to be compressed.

        Raises:
            OptionError: the method cannot compress this model.
        """


class FoldingMethod(CompressionMethod, ABC):
    """Rescales channels between the layers of a block without changing what the 16-bit block computes."""

    stage = Stage.FOLD

    def prepare(self, model: Any, names: Sequence[str]) -> None:
        """See the whole 16-bit model before its first block is compressed; the arguments are those of `check`.

        Raises:
            ModelError: the method cannot compress this model.
        """

    @abstractmethod
    def fold_block(
        self, name: str, block: nn.Module, statistics: Sequence[InputStatistics], schemes: Mapping[str, QuantScheme]
    ) -> None:
        """Change the weights of a block and the statistics of its inputs, both in place.

        Args:
            name: path of the block in the model.
            block: the 16-bit decoder block.
            statistics: of the inputs of all layers that get 4 bits. They must fit the folded block afterwards.
            schemes: layer name within the block -> how the layer will be quantized.
        """


class ScaleMethod(CompressionMethod, ABC):
    """Chooses scale and zero point of each group."""

    stage = Stage.SCALE

    @abstractmethod
    def search(self, weight_OI: Tensor, importance_I: Tensor, scheme: QuantScheme) -> tuple[Tensor, Tensor]:
        """Scale and zero point for an error in which each input channel has a weight of its own.

        A rounding method calls it for the rows, or for one group of columns, as they are when it rounds them.

        Args:
            weight_OI: the weight to be rounded; at least float32.
            importance_I: weight of the square error of each column; 1 without calibration text.
            scheme: bits and group size.

        Returns:
            scale_OG on the scale grid and zero_point_OG (whole numbers), in the dtype of weight_OI.
        """

    def estimate(self, weight_OI: Tensor, gram_II: Tensor, scheme: QuantScheme) -> tuple[Tensor, Tensor]:
        """Scale and zero point for round-to-nearest, given all second moments of the input.

        Args:
            weight_OI: the weight to be rounded; at least float32.
            gram_II: mean of x x^T over the inputs x, in the same dtype.
            scheme: bits and group size.

        Returns:
            As `search`, which the default calls with the diagonal of gram_II.
        """
        return self.search(weight_OI, gram_II.diagonal(), scheme)

    def fit(self, target: RoundingTarget, codes_OI: Tensor, scale_OG: Tensor, zero_point_OG: Tensor) -> Tensor | None:
        """Better scales for codes that are fixed.

        Args:
            target: rows to approximate, and the matrix that weighs the error.
            codes_OI: uint8.
            scale_OG: the present scales.
            zero_point_OG: zero points, which stay.

        Returns:
            New scales [O, G] on the scale grid, none of which raises the error of its row; None if the method cannot
            fit scales, which is the default.
        """
        return None


class RoundingMethod(CompressionMethod, ABC):
    """Chooses the codes."""

    stage = Stage.ROUND

    @abstractmethod
    def make_rounder(
        self,
        name: str,
        gram_II: Tensor | None,
        scales: ScaleMethod,
        scheme: QuantScheme,
        calibration: Calibration | None,
    ) -> Rounder:
        """A function that rounds rows of the layers that share an input.

        Args:
            name: path of the first of these layers in the model, for messages.
            gram_II: mean of x x^T over the inputs x, which the rounder may change; None in a combination that needs no
                calibration text.
            scales: chooses scale and zero point.
            scheme: bits and group size.
            calibration: text and settings; None where gram_II is None.

        Raises:
            ModelError: the statistics cannot be used.
        """


@dataclass(frozen=True)
class RefinedBlock:
    """Result of a refinement.

    Attributes:
        inits: layer name within the block -> its state.
        loss_before, loss_after: the refinement's own loss before and after.
    """

    inits: dict[str, QuantizedInit]
    loss_before: float
    loss_after: float


class RefinementMethod(CompressionMethod, ABC):
    """Improves a block whose layers have been rounded."""

    stage = Stage.REFINE

    @abstractmethod
    def refine_block(
        self,
        blocks: DecoderBlocks,
        i: int,
        inits: dict[str, QuantizedInit],
        schemes: Mapping[str, QuantScheme],
        calibration: Calibration,
        progress: Callable[[str], None],
    ) -> RefinedBlock:
        """Refine block i.

        Args:
            blocks: `blocks.full` holds the outputs of the 16-bit block i, `blocks.quantized` the inputs of the
                compressed one. The block must come back with its own layers.
            i: index of the block.
            inits: layer name within the block -> its state after rounding.
            schemes: layer name within the block -> scheme.
            calibration: text and settings.
            progress: called with a short text after each step.

        Raises:
            ModelError: the loss is not finite.
        """
