"""Compression of one decoder block: statistics, the stages of a combination (base.py), errors, storing, restoring."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nybble import processes
from nybble.compression.base import RefinementMethod
from nybble.compression.blocks import MIN_TOKENS, DecoderBlocks, InputStatistics, get_linear, set_weight
from nybble.compression.calibration import Calibration
from nybble.compression.init import QuantizedInit
from nybble.compression.layer_error import OutputReference, layer_error, weight_error
from nybble.compression.methods import MethodCombination
from nybble.compression.rounding import round_layers
from nybble.compression.rtn import MinMaxScales, RoundToNearest
from nybble.compression.stored_block import CompressedBlock, StoredBlock
from nybble.quant.scheme import QuantScheme

# Called with the number of layers just finished, and a text about them.
Progress = Callable[[int, str], None]


@dataclass(frozen=True)
class BlockCompressor:
    """Compresses the blocks of a model one after the other.

    Attributes:
        blocks: the blocks. They must be compressed in turn, from the first, because each advances the streams.
        methods: what to do; its folding methods have been prepared.
        schemes: layer path in the model -> scheme.
        calibration: text and settings.
        progress: called after each layer and each step.
    """

    blocks: DecoderBlocks
    methods: MethodCombination
    schemes: Mapping[str, QuantScheme]
    calibration: Calibration
    progress: Progress

    def _schemes(self, i: int) -> dict[str, QuantScheme]:
        """Layer name within block i -> scheme."""
        return {name: self.schemes[self.blocks.prefixes[i] + name] for name in self.blocks.layers[i]}

    def compress_block(self, i: int) -> CompressedBlock:
        """Compress block i, or restore it from the store; then pass the streams on and put the new weights in.

        Raises:
            ModelError: the inputs of a layer or the loss are not finite.
            RunError: a stored block is damaged, or the disk is full.
        """
        block, place = self.blocks.modules[i], self._place(i)
        stored = None if place is None else place.read(block)
        if place is None or stored is None:
            result = self._run_stages(i)
            scales = processes.checksum(init.scale_OG for init in result.inits.values())
            processes.check_same({f"scales of {self.blocks.prefixes[i][:-1]}": scales})
            if place is not None:
                place.save(block, result)
        else:
            self.blocks.advance_full(i)  # the 16-bit block
            result = place.restore(block, *stored)
            self.progress(len(result.inits), f"{self.blocks.prefixes[i][:-1]}: restored")
        self._pass_on(i, result.inits)
        return result

    def _place(self, i: int) -> StoredBlock | None:
        """Where block i is stored; None if nothing is."""
        store = self.calibration.store
        if store is None:
            return None
        return StoredBlock(store, self.blocks.prefixes[i], self._schemes(i), self.blocks.device)

    def _run_stages(self, i: int) -> CompressedBlock:
        block, prefix, schemes = self.blocks.modules[i], self.blocks.prefixes[i], self._schemes(i)
        statistics = [shared for shared in self.blocks.observe(i) if shared.tokens >= MIN_TOKENS]
        references = {
            name: OutputReference.of(get_linear(block, name).weight, shared.gram_II, schemes[name])
            for shared in statistics
            for name in shared.layers
        }
        result = CompressedBlock()
        for folding in self.methods.folding:
            folding.fold_block(prefix[:-1], block, statistics, schemes)
        for shared in statistics:
            inits = self._round(i, shared)
            result.inits.update(inits)
            self._measure(i, shared, references, result)
            for name in inits:
                error = result.errors[name]
                self.progress(1, f"{prefix}{name}: output error {error.rtn:.2%} -> {error.compressed:.2%}")
        rest = [name for name in self.blocks.layers[i] if name not in result.inits]
        self._round_to_nearest(i, rest, result)
        if result.inits:
            for refinement in self.methods.refinement:
                self._refine(i, refinement, result)
                for shared in statistics:
                    self._measure(i, shared, references, result)
                self._measure_weights(i, rest, result)
        return result

    def _round_to_nearest(self, i: int, names: Sequence[str], result: CompressedBlock) -> None:
        """Compress layers without statistics: experts with too few tokens."""
        for name in names:
            linear = get_linear(self.blocks.modules[i], name)
            scheme = self._schemes(i)[name]
            rounder = RoundToNearest().make_rounder(name, None, MinMaxScales(), scheme, None)
            result.inits |= round_layers({name: linear}, rounder, scheme)
        self._measure_weights(i, names, result)
        for name in names:
            self.progress(1, f"{self.blocks.prefixes[i]}{name}: weight error {result.errors[name].weight:.2%}")

    def _measure_weights(self, i: int, names: Sequence[str], result: CompressedBlock) -> None:
        """Set the errors of layers without statistics."""
        for name in names:
            weight_OI = get_linear(self.blocks.modules[i], name).weight
            result.errors[name] = weight_error(weight_OI, result.inits[name], self._schemes(i)[name])

    def _round(self, i: int, shared: InputStatistics) -> dict[str, QuantizedInit]:
        """Round the layers that share an input, those of one scheme at a time."""
        schemes, inits = self._schemes(i), dict[str, QuantizedInit]()
        for scheme in dict.fromkeys(schemes[name] for name in shared.layers):
            names = [name for name in shared.layers if schemes[name] == scheme]
            rounder = self.methods.rounding.make_rounder(
                self.blocks.prefixes[i] + names[0],
                shared.expected_II(),
                self.methods.scales,
                scheme,
                self.calibration,
            )
            linears = {name: get_linear(self.blocks.modules[i], name) for name in names}
            inits |= round_layers(linears, rounder, scheme)
        return inits

    def _refine(self, i: int, refinement: RefinementMethod, result: CompressedBlock) -> None:
        """Apply one refinement to `result`."""
        name = self.blocks.prefixes[i][:-1]
        refined = refinement.refine_block(
            self.blocks,
            i,
            result.inits,
            self._schemes(i),
            self.calibration,
            lambda text: self.progress(0, f"{name}: {text}"),
        )
        result.inits = result.inits | refined.inits
        before = refined.loss_before if result.losses is None else result.losses[0]
        result.losses = (before, refined.loss_after)

    def _measure(
        self, i: int, shared: InputStatistics, references: dict[str, OutputReference], result: CompressedBlock
    ) -> None:
        """Set the errors of the layers that share an input."""
        schemes = self._schemes(i)
        for name in shared.layers:
            weight_OI = get_linear(self.blocks.modules[i], name).weight
            result.errors[name] = layer_error(
                weight_OI, result.inits[name], schemes[name], shared.gram_II, references[name]
            )

    def _pass_on(self, i: int, inits: dict[str, QuantizedInit]) -> None:
        """Pass the quantized stream, if there is one, through the 4-bit block; then put the weights of `inits` in."""
        block, schemes = self.blocks.modules[i], self._schemes(i)
        if self.blocks.quantized is not None:
            for name, init in inits.items():
                set_weight(block, name, init.quantized(schemes[name]).dequantize().to(init.weight_OI.dtype))
            self.blocks.advance_quantized(i)
        for name, init in inits.items():
            set_weight(block, name, init.weight_OI)


def share_model_memory(inits: dict[str, QuantizedInit], model: Any, names: Iterable[str]) -> None:
    """Let inits hold the tensors of the model, in place, after the model or a block has moved to another device."""
    for name in names:
        weight_OI, init = get_linear(model, name).weight.detach(), inits[name]
        inits[name] = QuantizedInit(
            weight_OI, init.scale_OG.to(weight_OI.device), init.zero_point_OG.to(weight_OI.device)
        )
