"""Post-training compression: where tuning starts. One file a method.

    rtn          round-to-nearest; no data
    awq          factors folded between layers         \\
    se           scale estimation                       |  any of these, joined by + in this order
    gptq         error-compensated rounding             |
    blockwise    block-wise reconstruction by gradient /

One block of the decoder after the other, from the first to the last: gather statistics of what reaches its layers; fold; find scales; round; train
on what comes through the blocks compressed before it. Methods change the model in place (norms, weights of folded layers); the 16-bit
function stays the same. Afterwards its layers hold the weights of the starts.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from nybble.compress import awq, blockwise, gptq, rtn, scale_estimation
from nybble.compress.blocks import Blocks, Statistics, check_chain, linear
from nybble.compress.gptq import Hessian
from nybble.compress.scale_estimation import Quadratic
from nybble.compress.start import Start
from nybble.errors import ModelError, OptionError
from nybble.families import family_of
from nybble.grid import Grid, min_max, quantize, quantize_dequantize, wide

METHODS = ("awq", "se", "gptq", "blockwise")
# Tokens in one forward of a block.
TOKENS = 2048
# Numbers in the equations of scale estimation that exist at a time.
_EQUATIONS = 16 << 20


log = logging.getLogger("nybble")


def parse(method: str, option: str = "--method") -> tuple[str, ...]:
    """ "awq+se" -> ("awq", "se"); OptionError, listing what is valid, for anything else. "rtn" -> ()."""
    parts = tuple(method.split("+"))
    if parts == ("rtn",):
        return ()
    if any(part not in METHODS for part in parts) or parts != tuple(name for name in METHODS if name in parts):
        raise OptionError(f"{option} must be rtn, or one or more of {', '.join(METHODS)} in this order, joined by +; got {method}; awq+se+gptq, for example")
    return parts


def automatic(config: Any, adapters: bool) -> str:
    """What training was measured to end best from (docs/log.md), as far as it can be applied to this family: where only scales are trained, what has the least
    KL; with adapters, whose codes are to move, what leaves the weights between their codes."""
    method = "se+gptq" if adapters else "se+blockwise"
    return f"awq+{method}" if family_of(config).feeds else method


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

    starts: dict[str, Start] = field(default_factory=dict)
    errors: dict[str, LayerError] = field(default_factory=dict)
    blocks: dict[str, tuple[float, float]] = field(default_factory=dict)


def check_model(model: Any, names: Iterable[str], input_ids: Tensor, steps: tuple[str, ...]) -> None:
    """Raise OptionError or ModelError, before the expensive part, for a model that these steps cannot compress; input_ids [2, T] are any text."""
    names = list(names)
    _check_called(model, names, input_ids)
    if "awq" in steps:
        awq.check_family(model.config)
    if steps:
        check_chain(model, names, input_ids)


def _check_called(model: Any, names: Sequence[str], input_ids: Tensor) -> None:
    """Raise ModelError for a layer whose weight the model reads without calling it: another layer cannot take its place."""
    called: set[str] = set()
    around = {name.rpartition(".")[0] for name in names}
    hooks = [model.get_submodule(name).register_forward_hook(lambda *_, name=name: called.add(name)) for name in {*names, *around}]
    try:
        with torch.no_grad():
            model.base_model(input_ids=input_ids.to(model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    read = [name for name in names if name not in called and name.rpartition(".")[0] in called]  # an expert without tokens is in no module that was called
    if read:
        raise ModelError(f"{type(model).__name__} reads the weight of {read[0]} without calling the layer ({len(read)} such), so it cannot get 4 bits")


class Store(Protocol):
    """Where finished blocks are kept, so that an interrupted compression goes on."""

    def load(self, block: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors and note of a finished block, or None."""

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
    compressed = Compressed()
    if steps:
        assert calibration is not None, f"{method} needs calibration text"
        device = model.device
        batch = max(1, TOKENS // calibration.input_ids.shape[1])
        blocks = Blocks(model, names, calibration.input_ids, batch, "blockwise" in steps, calibration.folder)
        for i in range(len(blocks.modules))[: calibration.limit_blocks]:
            prefix = blocks.prefixes[i]
            with blocks.at_hand(i):
                kept = store.load(prefix) if store else None
                if kept is None:
                    block = _compress_block(blocks, i, grid, steps, calibration, advance)
                    if store:
                        store.save(prefix, *_to_keep(blocks, i, block))
                else:
                    block = _restore_block(blocks, i, *kept)
                    advance(len(block.starts), f"{prefix[:-1]}: restored")
                _pass_on(blocks, i, block.starts, grid)
            compressed.starts.update({prefix + name: start for name, start in block.starts.items()})
            compressed.errors.update({prefix + name: error for name, error in block.errors.items()})
            compressed.blocks.update(block.blocks)
            _let_go(compressed.starts, prefix, model)
        model.to(device)
        _let_go(compressed.starts, "", model)
    rest = [name for name in names if name not in compressed.starts]
    for name, start in rtn.compress(model, rest, grid).items():
        compressed.starts[name], compressed.errors[name] = start, _weight_error(model.get_submodule(name).weight, start, grid)
        advance(1, f"{name}: weight error {compressed.errors[name].weight:.2%}")
    return Compressed({name: compressed.starts[name] for name in names}, {name: compressed.errors[name] for name in names}, compressed.blocks)


def _let_go(starts: dict[str, Start], prefix: str, model: Any) -> None:
    """The model has moved to another device: let its starts follow, and hold no tensor but the model's own."""
    for name, start in starts.items():
        if name.startswith(prefix):
            weight_OI = linear(model, name).weight.detach()
            starts[name] = Start(weight_OI, start.scale_OG.to(weight_OI.device), start.zero_OG.to(weight_OI.device))


def _compress_block(blocks: Blocks, i: int, grid: Grid, steps: tuple[str, ...], calibration: Calibration, advance: Callable[[int, str], None]) -> Compressed:
    """Block i by all steps; names are those within the block."""
    block, prefix = blocks.modules[i], blocks.prefixes[i]
    made = Compressed()
    statistics = blocks.observe(i)
    nearest = {name: _Nearest.of(linear(block, name).weight, grid, shared.gram_II) for shared in statistics for name in shared.layers}

    def judge(shared: Statistics, names: Iterable[str]) -> None:
        for name in names:
            made.errors[name] = _layer_error(linear(block, name).weight, made.starts[name], grid, shared.gram_II, nearest[name])

    if "awq" in steps and not awq.fold(block, statistics, blocks.model.config, grid):
        log.warning("%s: awq folded nothing, no layers read what families.py says they do", prefix[:-1])
    for shared in statistics:
        found = _round(block, shared, grid, steps, calibration, prefix)
        made.starts.update(found)
        for name in found:
            judge(shared, [name])
            advance(1, f"{prefix}{name}: output error {made.errors[name].rtn:.2%} -> {made.errors[name].start:.2%}")
    if "blockwise" in steps and made.starts:
        recipe, seed = calibration.recipe, calibration.seed
        starts, *losses = blockwise.train(blocks, i, made.starts, grid, recipe, seed, lambda text: advance(0, f"{prefix[:-1]}: {text}"))
        made.starts.update(starts)
        made.blocks[prefix[:-1]] = (losses[0], losses[1])
        for shared in statistics:
            judge(shared, shared.layers)
    return made


def _to_keep(blocks: Blocks, i: int, made: Compressed) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `_restore_block` takes: the tensors of the starts and what else the block has (awq folds norms), and a note."""
    tensors = {f"{name}:{leaf}": getattr(start, leaf) for name, start in made.starts.items() for leaf in ("weight_OI", "scale_OG", "zero_OG")}
    others = {key: value for key, value in blocks.modules[i].state_dict().items() if key.removesuffix(".weight") not in made.starts}
    return tensors | others, {"errors": {name: asdict(error) for name, error in made.errors.items()}, "losses": next(iter(made.blocks.values()), None)}


def _restore_block(blocks: Blocks, i: int, tensors: dict[str, Tensor], note: dict[str, Any]) -> Compressed:
    """Block i as an earlier sitting made it."""
    prefix, names = blocks.prefixes[i], blocks.layers[i]
    blocks.advance_full(i)
    starts = {name: Start(*(tensors.pop(f"{name}:{leaf}").to(blocks.device) for leaf in ("weight_OI", "scale_OG", "zero_OG"))) for name in names}
    missing = blocks.modules[i].load_state_dict(tensors, strict=False).missing_keys
    assert all(key.removesuffix(".weight") in starts for key in missing), f"{prefix}: the stored block lacks {missing}"
    errors, losses = {name: LayerError(**fields) for name, fields in note["errors"].items()}, note["losses"]
    return Compressed(starts, errors, {prefix[:-1]: (losses[0], losses[1])} if losses else {})


def _pass_on(blocks: Blocks, i: int, starts: dict[str, Start], grid: Grid) -> None:
    """The block holds the weights of its starts; where the compressed blocks have a stream of their own, that goes through the 4-bit weights first."""
    block = blocks.modules[i]
    if blocks.quantized is not None:
        for name, start in starts.items():
            _set_weight(block, name, start.quantized(grid).dequantize().to(start.weight_OI.dtype))
        blocks.advance_quantized(i)
    for name, start in starts.items():
        _set_weight(block, name, start.weight_OI)


@torch.no_grad()
def _round(block: nn.Module, shared: Statistics, grid: Grid, steps: tuple[str, ...], calibration: Calibration, prefix: str) -> dict[str, Start]:
    """Scales, zeros and codes of the layers that share an input. Their rows are stacked, and worked off so many at a time that the
    equations of scale estimation, G x G numbers a row, stay small."""
    linears = {name: linear(block, name) for name in shared.layers}
    weight_OI, gram_II = torch.cat([wide(layer.weight) for layer in linears.values()]), shared.gram_II
    hessian = Hessian.of(gram_II, calibration.damping, prefix + shared.layers[0], calibration.activation_order) if "gptq" in steps else None

    def rounded(weight_OI: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if hessian is not None:
            find = scale_estimation.search if "se" in steps else (lambda weight, importance, grid: min_max(weight, grid))
            moved_OI, scale_OG, zero_OG = gptq.compensate(weight_OI, hessian, grid, find)
            codes_OI = quantize(moved_OI, scale_OG, zero_OG, grid)
            if "se" in steps:
                codes_OI, scale_OG = _polish(codes_OI, scale_OG, zero_OG, weight_OI, hessian.matrix_II, grid)
            return codes_OI, moved_OI, scale_OG, zero_OG
        scale_OG, zero_OG = scale_estimation.estimate(weight_OI, gram_II, grid) if "se" in steps else min_max(weight_OI, grid)
        return quantize(weight_OI, scale_OG, zero_OG, grid), weight_OI, scale_OG, zero_OG

    rows = max(1, _EQUATIONS // grid.groups(weight_OI.shape[-1]) ** 2)
    parts = [torch.cat(tensors) for tensors in zip(*(rounded(part) for part in weight_OI.split(rows)), strict=True)]
    sizes = [len(layer.weight) for layer in linears.values()]
    by_layer = zip(*(tensor.split(sizes) for tensor in parts), strict=True)
    return {
        name: Start.keeping(codes, moved.clone(), scale.clone(), zero.clone(), grid, linears[name].weight.dtype)
        for name, (codes, moved, scale, zero) in zip(linears, by_layer, strict=True)
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


@dataclass(frozen=True)
class _Nearest:
    """What the outputs of a layer are like: the mean square of each, and the share of their sum that rounding to nearest gets wrong."""

    square_O: Tensor
    error: float

    @staticmethod
    @torch.no_grad()
    def of(weight_OI: Tensor, grid: Grid, gram_II: Tensor) -> _Nearest:
        weight_OI = wide(weight_OI)
        square_O = scale_estimation.output_error(weight_OI, gram_II)
        scale_OG, zero_OG = min_max(weight_OI, grid)
        made_OI = quantize_dequantize(weight_OI, scale_OG, zero_OG, grid)
        return _Nearest(square_O, float(scale_estimation.output_error(made_OI - weight_OI, gram_II).sum()) / (float(square_O.sum()) or 1.0))


@torch.no_grad()
def _layer_error(weight_OI: Tensor, start: Start, grid: Grid, gram_II: Tensor, nearest: _Nearest) -> LayerError:
    """weight_OI is the 16-bit weight, folded where that was asked for, and gram_II belongs to it. Folding divides the outputs of what feeds other layers
    (v_proj, up_proj): each counts as what it was before."""
    known, weight_OI = _weight_error(weight_OI, start, grid), wide(weight_OI)
    error_O = scale_estimation.output_error(start.quantized(grid).dequantize() - weight_OI, gram_II)
    before_O, after_O = nearest.square_O, scale_estimation.output_error(weight_OI, gram_II)
    error = float((error_O * torch.where(after_O > 0, before_O / after_O, 1.0)).sum())
    return LayerError(nearest.error, error / (float(before_O.sum()) or 1.0), known.weight, known.clipped)


__all__ = ["METHODS", "Calibration", "Compressed", "LayerError", "Start", "Store", "check_model", "compress", "parse"]
