"""Post-training compression of a model by a combination of methods (base.py, methods.py).

With calibration text, the decoder blocks are compressed one after the other, from the first to the last. Layers
outside of the blocks, and a combination that needs no text, are compressed layer by layer.

Methods change the model in place: norms and weights are folded, but the 16-bit function stays the same. Afterwards the
layers of the model hold the weights before rounding that the result holds, in the same memory.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nybble.compression.block_compression import BlockCompressor, Progress, share_model_memory
from nybble.compression.blocks import MIN_TOKENS, DecoderBlocks, get_linear, set_weight
from nybble.compression.calibration import TOKENS_PER_FORWARD, Calibration
from nybble.compression.checks import warn_of_small_weights
from nybble.compression.init import QuantizedInit
from nybble.compression.layer_error import LayerError, weight_error
from nybble.compression.methods import MethodCombination, combine, parse_method
from nybble.compression.rounding import round_layers
from nybble.quant.scheme import QuantScheme

log = logging.getLogger("nybble")


@dataclass(frozen=True)
class CompressionResult:
    """Compressed layers and their errors.

    Attributes:
        inits: layer path -> the compressed layer, in the order of the names asked for.
        errors: layer path -> its errors, in the same order.
        blocks: block path -> loss before and after refinement; empty without refinement.
    """

    inits: dict[str, QuantizedInit] = field(default_factory=dict)
    errors: dict[str, LayerError] = field(default_factory=dict)
    blocks: dict[str, tuple[float, float]] = field(default_factory=dict)


def compress(
    model: Any,
    schemes: Mapping[str, QuantScheme],
    method: str = "rtn",
    calibration: Calibration | None = None,
    progress: Progress = lambda layers, text: None,
) -> CompressionResult:
    """Compress layers of a model; the layers then hold the weights of the result.

    Args:
        model: a transformers model; it is changed in place.
        schemes: path of each linear layer to compress -> its scheme.
        method: names of methods joined by +, or rtn.
        calibration: text and settings; required if the method needs calibration text.
        progress: called with the number of layers just finished, and a text.

    Raises:
        OptionError: the method is unknown.
        ModelError: the blocks are no chain, inputs or a loss are not finite, or a Hessian is not positive definite.
        RunError: the disk is full, or a stored block is damaged.
    """
    methods, result = combine(parse_method(method)), CompressionResult()
    warn_of_small_weights({name: get_linear(model, name).weight for name in schemes}, schemes)
    if methods.needs_calibration:
        assert calibration is not None, f"{method} needs calibration text"
        result = _compress_blocks(model, schemes, methods, calibration, progress)
        methods = combine(())
    rest = {name: scheme for name, scheme in schemes.items() if name not in result.inits}
    inits, errors = _compress_layers(model, rest, methods, progress)
    inits, errors = result.inits | inits, result.errors | errors
    return CompressionResult(
        {name: inits[name] for name in schemes}, {name: errors[name] for name in schemes}, result.blocks
    )


def _compress_blocks(
    model: Any,
    schemes: Mapping[str, QuantScheme],
    methods: MethodCombination,
    calibration: Calibration,
    progress: Progress,
) -> CompressionResult:
    """Compress the layers inside the decoder blocks, as many blocks as `calibration` says."""
    device = model.device
    batch = max(1, TOKENS_PER_FORWARD // calibration.input_ids.shape[1])
    for folding in methods.folding:
        folding.prepare(model, list(schemes))
    refines = bool(methods.refinement)
    blocks = DecoderBlocks(model, list(schemes), calibration.input_ids, batch, refines, calibration.folder)
    compressor = BlockCompressor(blocks, methods, schemes, calibration, progress)
    result = CompressionResult()
    for i, prefix in list(enumerate(blocks.prefixes))[: calibration.limit_blocks]:
        with blocks.on_device(i):
            block = compressor.compress_block(i)
        result.inits.update({prefix + name: init for name, init in block.inits.items()})
        result.errors.update({prefix + name: error for name, error in block.errors.items()})
        if block.losses is not None:
            result.blocks[prefix[:-1]] = block.losses
        share_model_memory(result.inits, model, [prefix + name for name in block.inits])
    model.to(device)
    share_model_memory(result.inits, model, list(result.inits))
    _warn_of_few_tokens(result.errors)
    return result


def _warn_of_few_tokens(errors: Mapping[str, LayerError]) -> None:
    """Say which layers were rounded to nearest for want of calibration tokens."""
    few = [name for name, error in errors.items() if error.compressed is None]
    if few:
        log.warning(
            "%d of %d layers are those of experts that got fewer than %d calibration tokens; they were rounded to "
            "nearest (first: %s); more --num_calibration_samples give them more",
            len(few), len(errors), MIN_TOKENS, few[0],
        )  # fmt: skip


def _compress_layers(
    model: Any, schemes: Mapping[str, QuantScheme], methods: MethodCombination, progress: Progress
) -> tuple[dict[str, QuantizedInit], dict[str, LayerError]]:
    """Compress layers one by one with methods that need no calibration text."""
    inits: dict[str, QuantizedInit] = {}
    errors: dict[str, LayerError] = {}
    for name, scheme in schemes.items():
        linear = get_linear(model, name)
        rounder = methods.rounding.make_rounder(name, None, methods.scales, scheme, None)
        inits |= round_layers({name: linear}, rounder, scheme)
        errors[name] = weight_error(linear.weight, inits[name], scheme)
        set_weight(model, name, inits[name].weight_OI)
        progress(1, f"{name}: weight error {errors[name].weight:.2%}")
    return inits, errors
