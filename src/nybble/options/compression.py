"""How weights are compressed before any training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from nybble.options.base import Group, option

# Fewer sequences than this are no calibration.
MIN_CALIBRATION_SAMPLES = 8
# The method is chosen when the model is known.
AUTO = "auto"

KeepPositions = Literal["fixed", "exact", "none"]


@dataclass(frozen=True, kw_only=True)
class CompressionOptions(Group):
    """Post-training compression."""

    TITLE: ClassVar[str] = "Compression"

    method: str = option(
        AUTO,
        "rtn, or any of awq, se, gptq, blockwise in this order, joined by +. auto: awq+se+gptq; without awq where it "
        "finds nothing to fold; rtn where the decoder blocks are no chain.",
        basic=True,
    )
    num_calibration_samples: int = option(
        128, "Sequences of the training text that methods other than rtn calibrate on."
    )
    gptq_damping: float = option(0.01, "Damping of the Hessian, relative to the mean of its diagonal.")
    gptq_act_order: bool = option(False, "Round the columns with the largest inputs first.")
    blockwise_epochs: float = option(2.0, "Passes of block-wise reconstruction over the calibration sequences.")
    limit_blocks: int | None = option(
        None, "Apply the method to this many decoder blocks and rtn to the rest, for a trial."
    )
    keep_positions: KeepPositions = option(
        "fixed",
        "Keep where weights lie between their codes, for --init_from. fixed: 4 bits a weight; exact: the weights "
        "before rounding, so that --init_from gives the bits of one run; none.",
    )

    def check(self) -> None:
        """Raise OptionError for values outside of their range."""
        self.require(
            "num_calibration_samples",
            lambda value: value >= MIN_CALIBRATION_SAMPLES,
            f"at least {MIN_CALIBRATION_SAMPLES}",
        )
        self.require("gptq_damping", lambda value: 0 < value <= 1, "more than 0 and at most 1")
        self.require("blockwise_epochs", lambda value: 0 < value < float("inf"), "more than 0")
        self.require("limit_blocks", lambda value: value is None or value >= 0, "0 or more")


@dataclass(frozen=True, kw_only=True)
class InitialCompressionOptions(CompressionOptions):
    """Compression that training starts from."""

    method: str = option(
        AUTO,
        "Compression to start from: rtn, or any of awq, se, gptq, blockwise in this order, joined by +. auto: "
        "awq+se+gptq, or awq+se+blockwise where the training keeps the codes; without awq where it finds nothing to "
        "fold; rtn where the decoder blocks are no chain.",
        basic=True,
    )
    init_from: str | None = option(None, "Start from the 4-bit weights of this finished run instead of compressing.")


@dataclass(frozen=True, kw_only=True)
class TuneCompressionOptions(InitialCompressionOptions):
    """Compression of a model that is tuned on a task."""

    method: str = option(
        "awq+se",
        "rtn, or any of awq, se, gptq, blockwise in this order, joined by +. auto: awq+se+blockwise, with --quantize "
        "during awq+se+gptq; without awq where it finds nothing to fold; rtn where the decoder blocks are no chain.",
        basic=True,
    )
