"""Post-training compression: where tuning starts. One file a method.

    rtn          round-to-nearest; no data
    awq          scales folded between layers          \\
    se           scale estimation                       |  any of these, joined by + in this order
    gptq         error-compensated rounding             |
    blockwise    block-wise reconstruction by gradient /

One block of the decoder after the other, from the first to the last: gather statistics of what reaches its layers; fold; find scales; round; train
on what comes through the blocks compressed before it. Methods change the model in place (norms, weights of folded layers); the 16-bit
function stays the same. Afterwards its layers hold the weights of the starts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nybble.compress import awq, blockwise, gptq, rtn, scale_estimation
from nybble.compress.blocks import Blocks, Statistics, linear
from nybble.compress.scale_estimation import Quadratic
from nybble.compress.start import Start
from nybble.errors import OptionError
from nybble.grid import Grid, dequantize, min_max, quantize, wide

METHODS = ("awq", "se", "gptq", "blockwise")
# Tokens in one forward of a block.
_TOKENS = 2048


def parse(method: str, option: str = "--method") -> tuple[str, ...]:
    """ "awq+se" -> ("awq", "se"); OptionError, listing what is valid, for anything else. "rtn" -> ()."""
    parts = tuple(method.split("+"))
    if parts == ("rtn",):
        return ()
    if not parts or any(part not in METHODS for part in parts) or parts != tuple(name for name in METHODS if name in parts):
        raise OptionError(f"{option} must be rtn, or one or more of {', '.join(METHODS)} in this order, joined by +; got {method}; awq+se+gptq, for example")
    return parts


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
    recipe: blockwise.Recipe = field(default_factory=blockwise.Recipe)
    limit_blocks: int | None = None
    folder: Path | None = None


@dataclass(frozen=True)
class LayerError:
    """How a layer came out.

    Attributes:
        rtn, start: mean square error of the layer's outputs relative to their mean square, on the calibration text, rounded to nearest and as compressed.
            None without calibration text.
        weight: root mean square error of the weights relative to their root mean square.
        clipped: share of the weights outside of their group's range.
    """

    rtn: float | None
    start: float | None
    weight: float
    clipped: float


@dataclass(frozen=True)
class Compressed:
    """Starts, in the order of the names asked for, and how good they are.

    Attributes:
        starts: layer name -> Start.
        errors: layer name -> LayerError.
        blocks: loss of block-wise reconstruction before and after, by block; empty without it.
    """

    starts: dict[str, Start]
    errors: dict[str, LayerError]
    blocks: dict[str, tuple[float, float]]


class Store:
    """Where finished blocks are kept, so that an interrupted compression goes on; this one keeps nothing."""

    def load(self, block: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors and note of a finished block, or None."""
        return None

    def save(self, block: str, tensors: dict[str, Tensor], note: dict[str, Any]) -> None:
        """Keep a finished block."""


def compress(
    model: Any,
    names: Iterable[str],
    grid: Grid,
    method: str = "rtn",
    calibration: Calibration | None = None,
    store: Store | None = None,
    advance: Callable[[int, str], None] = lambda layers, text: None,
) -> Compressed:
    """Compress the layers `names`; the model's layers then hold the weights of the starts.

    Args:
        model: a transformers model; changed in place.
        calibration: required by every method but rtn.
        store: keeps finished blocks.
        advance: called with the number of layers just finished, and a text.

    Raises:
        OptionError: unknown method; awq on a family without folding rows.
        ModelError: see the methods.
    """
    names, steps = list(names), parse(method)
    compressed = Compressed({}, {}, {})
    if steps:
        assert calibration is not None, f"{method} needs calibration text"
        if "awq" in steps:
            awq.check_family(model.config)
        device = model.device
        batch = max(1, _TOKENS // calibration.input_ids.shape[1])
        blocks = Blocks(model, names, calibration.input_ids, batch, "blockwise" in steps, calibration.folder)
        for i in range(len(blocks.modules))[: calibration.limit_blocks]:
            with blocks.at_hand(i):
                _compress_block(blocks, i, grid, steps, calibration, compressed, store or Store(), advance)
            for name in blocks.layers[i]:  # the block has moved
                start = compressed.starts[blocks.prefixes[i] + name]
                weight_OI = linear(blocks.modules[i], name).weight.detach()
                compressed.starts[blocks.prefixes[i] + name] = Start(weight_OI, start.scale_OG.cpu(), start.zero_OG.cpu())
        model.to(device)
    rest = [name for name in names if name not in compressed.starts]
    for name, start in rtn.compress(model, rest, grid).items():
        compressed.starts[name], compressed.errors[name] = start, _weight_error(model.get_submodule(name).weight, start, grid)
        advance(1, f"{name}: weight error {compressed.errors[name].weight:.2%}")
    return Compressed({name: compressed.starts[name] for name in names}, {name: compressed.errors[name] for name in names}, compressed.blocks)


def _compress_block(
    blocks: Blocks,
    i: int,
    grid: Grid,
    steps: tuple[str, ...],
    calibration: Calibration,
    compressed: Compressed,
    store: Store,
    advance: Callable[[int, str], None],
) -> None:
    """One block: compressed by all steps, or taken from the store; its starts and errors go into `compressed`."""
    block, prefix = blocks.modules[i], blocks.prefixes[i]
    kept = store.load(prefix)
    if kept is None:
        starts: dict[str, Start] = {}
        errors: dict[str, LayerError] = {}
        statistics = blocks.observe(i)
        if "awq" in steps:
            awq.fold(block, statistics, blocks.model.config, grid)
        for shared in statistics:
            found = _round(block, shared, grid, steps, calibration, prefix)
            starts |= found
            for name, start in found.items():
                errors[name] = _output_error(linear(block, name).weight, start, grid, shared.gram_II)
                advance(1, f"{prefix}{name}: output error {errors[name].rtn:.2%} -> {errors[name].start:.2%}")
        losses: list[float] | None = None
        if "blockwise" in steps:
            starts, *losses = blockwise.train(blocks, i, starts, grid, calibration.recipe, calibration.seed, lambda text: advance(0, prefix[:-1] + ": " + text))
            for shared in statistics:
                for name in shared.layers:
                    errors[name] = _output_error(linear(block, name).weight, starts[name], grid, shared.gram_II)
        tensors = {f"{name}:{leaf}": getattr(start, leaf) for name, start in starts.items() for leaf in ("weight_OI", "scale_OG", "zero_OG")}
        others = {key: value for key, value in block.state_dict().items() if key.removesuffix(".weight") not in starts}
        store.save(prefix, tensors | others, {"errors": {name: asdict(error) for name, error in errors.items()}, "losses": losses})
    else:
        tensors, note = kept
        names = blocks.layers[i]
        blocks.advance_full(i)
        starts = {name: Start(*(tensors.pop(f"{name}:{leaf}").to(blocks.device) for leaf in ("weight_OI", "scale_OG", "zero_OG"))) for name in names}
        block.load_state_dict(tensors, strict=False)
        errors, losses = {name: LayerError(**fields) for name, fields in note["errors"].items()}, note["losses"]
        advance(len(names), f"{prefix[:-1]}: from the last sitting")
    if blocks.quantized is not None:
        for name, start in starts.items():
            _set_weight(block, name, start.quantized(grid).dequantize().to(start.weight_OI.dtype))
        blocks.advance_quantized(i)
    for name, start in starts.items():
        _set_weight(block, name, start.weight_OI)
        compressed.starts[prefix + name], compressed.errors[prefix + name] = start, errors[name]
    if losses is not None:
        compressed.blocks[prefix[:-1]] = (losses[0], losses[1])


@torch.no_grad()
def _round(block: nn.Module, shared: Statistics, grid: Grid, steps: tuple[str, ...], calibration: Calibration, prefix: str) -> dict[str, Start]:
    """Scales, zeros and codes of the layers that share an input, their rows stacked."""
    linears = {name: linear(block, name) for name in shared.layers}
    weight_OI, gram_II = torch.cat([wide(layer.weight) for layer in linears.values()]), shared.gram_II
    if "gptq" in steps:
        find = scale_estimation.search if "se" in steps else (lambda weight, importance, grid: min_max(weight, grid))
        name = prefix + shared.layers[0]
        rounded_OI, scale_OG, zero_OG = gptq.compensate(weight_OI, gram_II, grid, find, calibration.damping, calibration.activation_order, name)
    elif "se" in steps:
        rounded_OI, (scale_OG, zero_OG) = weight_OI, scale_estimation.estimate(weight_OI, gram_II, grid)
    else:
        rounded_OI, (scale_OG, zero_OG) = weight_OI, min_max(weight_OI, grid)
    codes_OI = quantize(rounded_OI, scale_OG, zero_OG, grid)
    if "se" in steps and "gptq" in steps:
        codes_OI, scale_OG = _polish(codes_OI, scale_OG, zero_OG, weight_OI, gptq.damped(gram_II, calibration.damping), grid)
    sizes = [len(layer.weight) for layer in linears.values()]
    parts = zip(*(tensor.split(sizes) for tensor in (codes_OI, rounded_OI, scale_OG, zero_OG)), strict=True)
    return {
        name: Start.keeping(codes_OI, rounded_OI.clone(), scale_OG.clone(), zero_OG.clone(), grid, linears[name].weight.dtype)
        for name, (codes_OI, rounded_OI, scale_OG, zero_OG) in zip(linears, parts, strict=True)
    }


def _polish(codes_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor, weight_OI: Tensor, hessian_II: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """What GPTQ gave, improved by fitting all scales of a row, then all codes, then all scales again. No row's error rises."""
    seen_OI = weight_OI @ hessian_II
    scale_OG = Quadratic.of(codes_OI, zero_OG, weight_OI, seen_OI, hessian_II).solve(scale_OG)
    codes_OI = gptq.descend(codes_OI, scale_OG, zero_OG, weight_OI, hessian_II, grid)
    return codes_OI, Quadratic.of(codes_OI, zero_OG, weight_OI, seen_OI, hessian_II).solve(scale_OG)


def _set_weight(block: nn.Module, name: str, weight_OI: Tensor) -> None:
    linear(block, name).weight = nn.Parameter(weight_OI, requires_grad=False)


@torch.no_grad()
def _weight_error(weight_OI: Tensor, start: Start, grid: Grid) -> LayerError:
    """Without calibration text; weight_OI is the 16-bit weight."""
    made_OI, weight_OI = start.quantized(grid).dequantize(), wide(weight_OI)
    error = float((made_OI - weight_OI).norm()) / (float(weight_OI.norm()) or 1.0)
    bounds = (torch.full_like(start.zero_OG, code) for code in (0, grid.max_code))
    low_OG, high_OG = (start.scale_OG * (bound - start.zero_OG) for bound in bounds)
    w_OGK = weight_OI.unflatten(-1, (low_OG.shape[-1], -1))
    slack_OG = start.scale_OG / 2
    outside = (w_OGK < (low_OG - slack_OG)[..., None]) | (w_OGK > (high_OG + slack_OG)[..., None])
    return LayerError(None, None, error, float(outside.float().mean()))


@torch.no_grad()
def _output_error(weight_OI: Tensor, start: Start, grid: Grid, gram_II: Tensor) -> LayerError:
    """weight_OI is the 16-bit weight, folded where that was asked for."""
    known, weight_OI = _weight_error(weight_OI, start, grid), wide(weight_OI)
    whole = float(scale_estimation.output_error(weight_OI, gram_II).sum()) or 1.0
    scale_OG, zero_OG = min_max(weight_OI, grid)
    nearest_OI = dequantize(quantize(weight_OI, scale_OG, zero_OG, grid), scale_OG, zero_OG)
    errors = [float(scale_estimation.output_error(made - weight_OI, gram_II).sum()) / whole for made in (nearest_OI, start.quantized(grid).dequantize())]
    return LayerError(errors[0], errors[1], known.weight, known.clipped)


__all__ = ["METHODS", "Calibration", "Compressed", "LayerError", "Start", "Store", "compress", "parse"]
