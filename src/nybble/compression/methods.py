"""The registry of compression methods, and combinations of them.

A combination is written as names joined by +, in the order of their stages (base.py): awq+se+gptq. The name rtn
stands for the empty combination, round-to-nearest.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nybble.compression.awq import AWQ
from nybble.compression.awq_mappings import has_mapping
from nybble.compression.base import (
    CompressionMethod,
    FoldingMethod,
    RefinementMethod,
    RoundingMethod,
    ScaleMethod,
    Stage,
)
from nybble.compression.blockwise import BlockwiseReconstruction
from nybble.compression.chain import NoChainError, check_chain, first_forward
from nybble.compression.gptq import GPTQ
from nybble.compression.rtn import MinMaxScales, RoundToNearest
from nybble.compression.scale_estimation import ScaleEstimation
from nybble.errors import ModelError, OptionError
from nybble.registry import Registry

# Name -> class, or a function without arguments that returns a method.
METHODS: Registry[Callable[[], CompressionMethod]] = Registry("compression method", "nybble.methods")
METHODS.register("awq", AWQ)
METHODS.register("se", ScaleEstimation)
METHODS.register("gptq", GPTQ)
METHODS.register("blockwise", BlockwiseReconstruction)

RTN = "rtn"

# Tokens of each of the two sequences by which blocks show whether they are a chain.
_PROBE_TOKENS = 32

log = logging.getLogger("nybble")


@dataclass(frozen=True)
class MethodCombination:
    """Methods by stage.

    Attributes:
        folding: in the order in which they are applied.
        scales: chooses scale and zero point.
        rounding: chooses the codes.
        refinement: in the order in which they are applied.
    """

    folding: tuple[FoldingMethod, ...]
    scales: ScaleMethod
    rounding: RoundingMethod
    refinement: tuple[RefinementMethod, ...]

    @property
    def needs_calibration(self) -> bool:
        """Whether any of the methods needs calibration text. Folding and refinement always do."""
        by_block = bool(self.folding or self.refinement)
        return by_block or self.scales.needs_calibration or self.rounding.needs_calibration

    def check(self, model: Any, names: Sequence[str]) -> None:
        """Refuse a model that one of the methods cannot compress; the arguments are those of CompressionMethod.check.

        Raises:
            OptionError: see CompressionMethod.check.
        """
        for method in (*self.folding, self.scales, self.rounding, *self.refinement):
            method.check(model, names)


def parse_method(text: str, option: str = "--method") -> tuple[str, ...]:
    """Names of the methods in a combination: "awq+se" -> ("awq", "se"), "rtn" -> ().

    Args:
        text: what the user wrote.
        option: the option it was written for, for the error message.

    Raises:
        OptionError: a name is unknown or repeated, the order is wrong, or two methods do the same.
    """
    names = tuple(text.split("+"))
    if names == (RTN,):
        return ()
    known = all(name in METHODS for name in names)
    stages = [_create(name).stage for name in names] if known else []
    if not known or len(set(names)) < len(names) or stages != sorted(stages):
        in_order = sorted(METHODS.usable(), key=lambda name: _create(name).stage)
        raise OptionError(
            f"{option} must be auto, rtn, or one or more of {', '.join(in_order)} in this order, joined by +; "
            f"got {text}; awq+se+gptq, for example"
        )
    for stage in (Stage.SCALE, Stage.ROUND):
        same = [name for name, its in zip(names, stages, strict=True) if its == stage]
        if len(same) > 1:
            raise OptionError(
                f"{option} must have at most one method at the stage {stage.name}; got {', '.join(same)}; keep one"
            )
    return names


def combine(names: Sequence[str]) -> MethodCombination:
    """Create the methods of a combination; round-to-nearest does what none of them does.

    Args:
        names: from `parse_method`.

    Raises:
        OptionError: a registered object is not a compression method.
    """
    methods = [_create(name) for name in names]
    return MethodCombination(
        folding=tuple(method for method in methods if isinstance(method, FoldingMethod)),
        scales=next((method for method in methods if isinstance(method, ScaleMethod)), MinMaxScales()),
        rounding=next((method for method in methods if isinstance(method, RoundingMethod)), RoundToNearest()),
        refinement=tuple(method for method in methods if isinstance(method, RefinementMethod)),
    )


def needs_calibration(names: Sequence[str]) -> bool:
    """Whether a combination from `parse_method` needs calibration text."""
    return combine(names).needs_calibration


def automatic_method(model: Any, names: Sequence[str], trains_scales: bool = False) -> str:
    """The combination if the user names none.

    Where only scales and norms are trained afterwards, blockwise gives the lowest KL divergence, both before and after
    the training. gptq takes about a third of its time, and what was measured on millions of tokens with adapters was
    trained from it. awq is added where it can fold something. Blocks that are no chain leave round-to-nearest, which is
    said.

    Args:
        model: a transformers model; it runs a few times on a few tokens.
        names: paths of the layers that are to be compressed.
        trains_scales: scales and norms are trained afterwards, and the codes stay.

    Raises:
        ModelError: the outputs of a block are not finite, or the model changes its weights.
    """
    with first_forward(model):  # this is the first time that it computes
        is_chain = _is_chain(model, names)
    if not is_chain:
        log.warning(
            "--method auto is rtn: the decoder blocks of %s are no chain, which all other methods need",
            model.config.model_type,
        )
        return RTN
    method = "se+blockwise" if trains_scales else "se+gptq"
    return f"awq+{method}" if can_fold(model, names) else method


def _is_chain(model: Any, names: Sequence[str]) -> bool:
    vocabulary = model.get_input_embeddings().num_embeddings
    try:
        check_chain(model, names, (torch.arange(2 * _PROBE_TOKENS) % vocabulary).view(2, -1))
    except NoChainError:
        return False
    return True


def can_fold(model: Any, names: Sequence[str]) -> bool:
    """Whether awq can fold something; False also for a model whose blocks are no chain.

    Args:
        model: a transformers model.
        names: paths of the layers that are to be compressed.
    """
    try:
        return has_mapping(model, names)
    except ModelError:
        return False


def _create(name: str) -> CompressionMethod:
    method = METHODS[name]()
    if not isinstance(method, FoldingMethod | ScaleMethod | RoundingMethod | RefinementMethod):
        raise OptionError(
            f"the compression method {name} must be a subclass of a stage in nybble.compression.base; it makes a "
            f"{type(method).__name__}; repair the package that registers it, or use another method"
        )
    return method
