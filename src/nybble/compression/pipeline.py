"""Post-training compression of a model by a combination of methods (base.py, methods.py).

With calibration text, the decoder blocks are compressed one after the other, from the first to the last. Layers
outside of the blocks, and a combination that needs no text, are compressed layer by layer.

Methods change the model in place: norms and weights are folded, but the 16-bit function stays the same. Afterwards the
layers of the model hold the weights before rounding that the result holds, in the same memory.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from nybble.compression.block_compression import BlockCompressor, Progress, share_model_memory
from nybble.compression.blocks import MIN_TOKENS, DecoderBlocks, get_linear, set_weight
from nybble.compression.calibration import TOKENS_PER_FORWARD, Calibration
from nybble.compression.checks import warn_of_small_weights
from nybble.compression.init import QuantizedInit
from nybble.compression.layer_error import LayerError, weight_error
from nybble.compression.methods import MethodCombination, combine, parse_method
from nybble.compression.rounding import round_layers
from nybble.compression.store import BlockStore
from nybble.compression.stored_block import CompressedBlock, StoredBlock
from nybble.models.layers_on_disk import LayersOnDisk, block_number, by_block, layers_on_disk, tensors_of
from nybble.models.quantized_file import LazyMapping
from nybble.quant.scheme import QuantScheme

log = logging.getLogger("nybble")


@dataclass(frozen=True)
class CompressionResult:
    """Compressed layers and their errors.

    Attributes:
        inits: layer path -> the compressed layer, in the order of the names asked for. Those of a model on disk are
            read at each access.
        errors: layer path -> its errors, in the same order.
        blocks: block path -> loss before and after refinement; empty without refinement.
    """

    inits: Mapping[str, QuantizedInit] = field(default_factory=dict)
    errors: dict[str, LayerError] = field(default_factory=dict)
    blocks: dict[str, tuple[float, float]] = field(default_factory=dict)


def compress(
    model: Any,
    schemes: Mapping[str, QuantScheme],
    method: str = "rtn",
    calibration: Calibration | None = None,
    progress: Progress = lambda layers, text: None,
    store: BlockStore | None = None,
) -> CompressionResult:
    """Compress layers of a model; the layers then hold the weights of the result.

    Args:
        model: a transformers model; it is changed in place.
        schemes: path of each linear layer to compress -> its scheme.
        method: names of methods joined by +, or rtn.
        calibration: text and settings; required if the method needs calibration text.
        progress: called with the number of layers just finished, and a text.
        store: for a model on disk, whose finished blocks are read from the store afterwards.

    Raises:
        OptionError: the method is unknown.
        ModelError: the blocks are no chain, inputs or a loss are not finite, or a Hessian is not positive definite.
        RunError: the disk is full, or a stored block is damaged.
    """
    methods = combine(parse_method(method))
    weights = tensors_of(model, (f"{name}.weight" for name in schemes))
    warn_of_small_weights(((name.removesuffix(".weight"), weight) for name, weight in weights), schemes)
    work = _Work(model, schemes, progress, store)
    if methods.needs_calibration:
        assert calibration is not None, f"{method} needs calibration text"
        work.compress_blocks(methods, calibration)
        methods = combine(())
    work.compress_layers(methods)
    return work.result()


@dataclass(frozen=True)
class _Work:
    """A compression while it runs.

    Attributes:
        model, schemes, progress, store: see `compress`.
        inits: of the layers that are in memory.
        errors, losses: see CompressionResult.
    """

    model: Any
    schemes: Mapping[str, QuantScheme]
    progress: Progress
    store: BlockStore | None
    inits: dict[str, QuantizedInit] = field(default_factory=dict)
    errors: dict[str, LayerError] = field(default_factory=dict)
    losses: dict[str, tuple[float, float]] = field(default_factory=dict)

    def compress_blocks(self, methods: MethodCombination, calibration: Calibration) -> None:
        """Compress the layers inside the decoder blocks, as many blocks as `calibration` says."""
        names, layers = list(self.schemes), layers_on_disk(self.model)
        batch = max(1, TOKENS_PER_FORWARD // calibration.input_ids.shape[1])
        for folding in methods.folding:
            folding.prepare(self.model, names)
        refines = bool(methods.refinement)
        blocks = DecoderBlocks(self.model, names, calibration.input_ids, batch, refines, calibration.folder)
        compressor = BlockCompressor(blocks, methods, self.schemes, calibration, self.progress)
        for i, prefix in list(enumerate(blocks.prefixes))[: calibration.limit_blocks]:
            with blocks.on_device(i):
                block = compressor.compress_block(i)
            self._note(prefix, block)
            if layers is not None:
                layers.replace(i, self._place(i).weights)
            else:
                share_model_memory(self.inits, self.model, [prefix + name for name in block.inits])
            del block  # before the next one is there
        blocks.restore_model()
        share_model_memory(self.inits, self.model, list(self.inits))
        _warn_of_few_tokens(self.errors)

    def compress_layers(self, methods: MethodCombination) -> None:
        """Compress layer by layer what is left, with methods that need no calibration text."""
        layers = layers_on_disk(self.model)
        left = [name for name in self.schemes if name not in self.errors]
        for i, names in by_block(self.model, left):
            if layers is None or i is None:
                self._note("", self._round(methods, "", names))
                continue
            place, prefix = self._place(i), layers.prefix(i)
            with layers.loaded(i) as module:
                stored = place.read(module)
                if stored is None:
                    block = self._round(methods, prefix, [name.removeprefix(prefix) for name in names])
                    place.save(module, block)
                else:
                    block = place.restore(module, *stored)
                    self.progress(len(block.inits), f"{prefix[:-1]}: restored")
            self._note(prefix, block)
            layers.replace(i, place.weights)
            del block

    def result(self) -> CompressionResult:
        """What was done, in the order of the names asked for."""
        layers = layers_on_disk(self.model)
        inits: Mapping[str, QuantizedInit] = {name: self.inits[name] for name in self.schemes if layers is None}
        if layers is not None:
            inits = LazyMapping(self.schemes, partial(self._read_init, layers))
        return CompressionResult(inits, {name: self.errors[name] for name in self.schemes}, self.losses)

    def _round(self, methods: MethodCombination, prefix: str, names: Sequence[str]) -> CompressedBlock:
        """Round layers one by one, and put the new weights in; `names` come after the prefix."""
        result = CompressedBlock()
        for name in names:
            linear, scheme = get_linear(self.model, prefix + name), self.schemes[prefix + name]
            rounder = methods.rounding.make_rounder(prefix + name, None, methods.scales, scheme, None)
            result.inits |= round_layers({name: linear}, rounder, scheme)
            result.errors[name] = weight_error(linear.weight, result.inits[name], scheme)
            set_weight(self.model, prefix + name, result.inits[name].weight_OI)
            self.progress(1, f"{prefix}{name}: weight error {result.errors[name].weight:.2%}")
        return result

    def _note(self, prefix: str, block: CompressedBlock) -> None:
        """Keep the errors of a block, and its layers unless they are in the store."""
        if not (prefix and layers_on_disk(self.model)):
            self.inits.update({prefix + name: init for name, init in block.inits.items()})
        self.errors.update({prefix + name: error for name, error in block.errors.items()})
        if block.losses is not None:
            self.losses[prefix[:-1]] = block.losses

    def _place(self, i: int) -> StoredBlock:
        """Where block i of a model on disk is stored."""
        layers = layers_on_disk(self.model)
        assert layers is not None, "blocks in memory have no such place"
        assert self.store is not None, "a model on disk needs a store for its finished blocks"
        prefix = layers.prefix(i)
        own = {name.removeprefix(prefix): scheme for name, scheme in self.schemes.items() if name.startswith(prefix)}
        return StoredBlock(self.store, prefix, own, layers.device)

    def _read_init(self, layers: LayersOnDisk, name: str) -> QuantizedInit:
        i = block_number(layers, name)
        if i is None or self.store is None:
            return self.inits[name]
        prefix = layers.prefix(i)
        return StoredBlock(self.store, prefix, {}, layers.device).init(name.removeprefix(prefix))


def _warn_of_few_tokens(errors: Mapping[str, LayerError]) -> None:
    """Say which layers were rounded to nearest for want of calibration tokens."""
    few = [name for name, error in errors.items() if error.compressed is None]
    if few:
        log.warning(
            "%d of %d layers are those of experts that got fewer than %d calibration tokens; they were rounded to "
            "nearest (first: %s); more --num_calibration_samples give them more",
            len(few), len(errors), MIN_TOKENS, few[0],
        )  # fmt: skip
