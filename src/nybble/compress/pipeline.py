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
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nybble.compress import awq, blockwise, gptq, rtn, scale_estimation
from nybble.compress.blocks import DecoderBlocks, InputStatistics, get_linear
from nybble.compress.calibration import TOKENS, Calibration
from nybble.compress.gptq import Hessian
from nybble.compress.init import QuantizedInit
from nybble.compress.layer_error import LayerError, NearestRounding, layer_error, weight_error
from nybble.compress.methods import parse_method
from nybble.compress.scale_estimation import Quadratic
from nybble.compress.store import Store
from nybble.quant.grid import at_least_float32, min_max_qparams, quantize
from nybble.quant.scheme import QuantScheme

# Numbers in the equations of scale estimation that exist at a time.
_EQUATIONS = 16 << 20


log = logging.getLogger("nybble")


@dataclass(frozen=True)
class CompressionResult:
    """Starts, in the order of the names asked for, and how good they are.

    Attributes:
        starts: layer name -> Start.
        errors: layer name -> LayerError.
        blocks: loss of block-wise reconstruction before and after, by block; empty without it.
    """

    starts: dict[str, QuantizedInit] = field(default_factory=dict)
    errors: dict[str, LayerError] = field(default_factory=dict)
    blocks: dict[str, tuple[float, float]] = field(default_factory=dict)


def compress(
    model: Any,
    names: Iterable[str],
    scheme: QuantScheme,
    method: str = "rtn",
    calibration: Calibration | None = None,
    store: Store | None = None,
    advance: Callable[[int, str], None] = lambda layers, text: None,
) -> CompressionResult:
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
    names, steps = list(names), parse_method(method)
    compressed = CompressionResult()
    if steps:
        assert calibration is not None, f"{method} needs calibration text"
        device = model.device
        batch = max(1, TOKENS // calibration.input_ids.shape[1])
        blocks = DecoderBlocks(model, names, calibration.input_ids, batch, "blockwise" in steps, calibration.folder)
        for i in range(len(blocks.modules))[: calibration.limit_blocks]:
            prefix = blocks.prefixes[i]
            with blocks.at_hand(i):
                kept = store.load(prefix) if store else None
                if kept is None:
                    block = _compress_block(blocks, i, scheme, steps, calibration, advance)
                    if store:
                        store.save(prefix, *_to_keep(blocks, i, block))
                else:
                    block = _restore_block(blocks, i, *kept)
                    advance(len(block.starts), f"{prefix[:-1]}: restored")
                _pass_on(blocks, i, block.starts, scheme)
            compressed.starts.update({prefix + name: start for name, start in block.starts.items()})
            compressed.errors.update({prefix + name: error for name, error in block.errors.items()})
            compressed.blocks.update(block.blocks)
            _let_go(compressed.starts, prefix, model)
        model.to(device)
        _let_go(compressed.starts, "", model)
    rest = [name for name in names if name not in compressed.starts]
    for name, start in rtn.compress(model, rest, scheme).items():
        compressed.starts[name], compressed.errors[name] = (
            start,
            weight_error(model.get_submodule(name).weight, start, scheme),
        )
        advance(1, f"{name}: weight error {compressed.errors[name].weight:.2%}")
    return CompressionResult(
        {name: compressed.starts[name] for name in names},
        {name: compressed.errors[name] for name in names},
        compressed.blocks,
    )


def _let_go(starts: dict[str, QuantizedInit], prefix: str, model: Any) -> None:
    """The model has moved to another device: let its starts follow, and hold no tensor but the model's own."""
    for name, start in starts.items():
        if name.startswith(prefix):
            weight_OI = get_linear(model, name).weight.detach()
            starts[name] = QuantizedInit(
                weight_OI, start.scale_OG.to(weight_OI.device), start.zero_point_OG.to(weight_OI.device)
            )


def _compress_block(
    blocks: DecoderBlocks,
    i: int,
    scheme: QuantScheme,
    steps: tuple[str, ...],
    calibration: Calibration,
    advance: Callable[[int, str], None],
) -> CompressionResult:
    """Block i by all steps; names are those within the block."""
    block, prefix = blocks.modules[i], blocks.prefixes[i]
    made = CompressionResult()
    statistics = blocks.observe(i)
    nearest = {
        name: NearestRounding.of(get_linear(block, name).weight, scheme, shared.gram_II)
        for shared in statistics
        for name in shared.layers
    }

    def judge(shared: InputStatistics, names: Iterable[str]) -> None:
        for name in names:
            made.errors[name] = layer_error(
                get_linear(block, name).weight, made.starts[name], scheme, shared.gram_II, nearest[name]
            )

    if "awq" in steps and not awq.fold(block, statistics, blocks.model.config, scheme):
        log.warning("%s: awq folded nothing, no layers read what families.py says they do", prefix[:-1])
    for shared in statistics:
        found = _round(block, shared, scheme, steps, calibration, prefix)
        made.starts.update(found)
        for name in found:
            judge(shared, [name])
            advance(
                1, f"{prefix}{name}: output error {made.errors[name].rtn:.2%} -> {made.errors[name].compressed:.2%}"
            )
    if "blockwise" in steps and made.starts:
        recipe, seed = calibration.recipe, calibration.seed
        starts, *losses = blockwise.train(
            blocks, i, made.starts, scheme, recipe, seed, lambda text: advance(0, f"{prefix[:-1]}: {text}")
        )
        made.starts.update(starts)
        made.blocks[prefix[:-1]] = (losses[0], losses[1])
        for shared in statistics:
            judge(shared, shared.layers)
    return made


def _to_keep(blocks: DecoderBlocks, i: int, made: CompressionResult) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `_restore_block` takes: the tensors of the starts and what else the block has (awq folds norms), and a note."""
    tensors = {
        f"{name}:{leaf}": getattr(start, leaf)
        for name, start in made.starts.items()
        for leaf in ("weight_OI", "scale_OG", "zero_point_OG")
    }
    others = {
        key: value
        for key, value in blocks.modules[i].state_dict().items()
        if key.removesuffix(".weight") not in made.starts
    }
    return tensors | others, {
        "errors": {name: asdict(error) for name, error in made.errors.items()},
        "losses": next(iter(made.blocks.values()), None),
    }


def _restore_block(
    blocks: DecoderBlocks, i: int, tensors: dict[str, Tensor], note: dict[str, Any]
) -> CompressionResult:
    """Block i as an earlier sitting made it."""
    prefix, names = blocks.prefixes[i], blocks.layers[i]
    blocks.advance_full(i)
    starts = {
        name: QuantizedInit(
            *(tensors.pop(f"{name}:{leaf}").to(blocks.device) for leaf in ("weight_OI", "scale_OG", "zero_point_OG"))
        )
        for name in names
    }
    missing = blocks.modules[i].load_state_dict(tensors, strict=False).missing_keys
    assert all(key.removesuffix(".weight") in starts for key in missing), f"{prefix}: the stored block lacks {missing}"
    errors, losses = {name: LayerError(**fields) for name, fields in note["errors"].items()}, note["losses"]
    return CompressionResult(starts, errors, {prefix[:-1]: (losses[0], losses[1])} if losses else {})


def _pass_on(blocks: DecoderBlocks, i: int, starts: dict[str, QuantizedInit], scheme: QuantScheme) -> None:
    """The block holds the weights of its starts; where the compressed blocks have a stream of their own, that goes through the 4-bit weights first."""
    block = blocks.modules[i]
    if blocks.quantized is not None:
        for name, start in starts.items():
            _set_weight(block, name, start.quantized(scheme).dequantize().to(start.weight_OI.dtype))
        blocks.advance_quantized(i)
    for name, start in starts.items():
        _set_weight(block, name, start.weight_OI)


@torch.no_grad()
def _round(
    block: nn.Module,
    shared: InputStatistics,
    scheme: QuantScheme,
    steps: tuple[str, ...],
    calibration: Calibration,
    prefix: str,
) -> dict[str, QuantizedInit]:
    """Scales, zeros and codes of the layers that share an input. Their rows are stacked, and worked off so many at a time that the
    equations of scale estimation, G x G numbers a row, stay small."""
    linears = {name: get_linear(block, name) for name in shared.layers}
    weight_OI, gram_II = torch.cat([at_least_float32(layer.weight) for layer in linears.values()]), shared.gram_II
    hessian = (
        Hessian.of(gram_II, calibration.damping, prefix + shared.layers[0], calibration.activation_order)
        if "gptq" in steps
        else None
    )

    def rounded(weight_OI: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if hessian is not None:
            find = (
                scale_estimation.search
                if "se" in steps
                else (lambda weight, importance, scheme: min_max_qparams(weight, scheme))
            )
            moved_OI, scale_OG, zero_point_OG = gptq.compensate(weight_OI, hessian, scheme, find)
            codes_OI = quantize(moved_OI, scale_OG, zero_point_OG, scheme)
            if "se" in steps:
                codes_OI, scale_OG = _polish(codes_OI, scale_OG, zero_point_OG, weight_OI, hessian.matrix_II, scheme)
            return codes_OI, moved_OI, scale_OG, zero_point_OG
        scale_OG, zero_point_OG = (
            scale_estimation.estimate(weight_OI, gram_II, scheme)
            if "se" in steps
            else min_max_qparams(weight_OI, scheme)
        )
        return quantize(weight_OI, scale_OG, zero_point_OG, scheme), weight_OI, scale_OG, zero_point_OG

    rows = max(1, _EQUATIONS // scheme.groups(weight_OI.shape[-1]) ** 2)
    parts = [torch.cat(tensors) for tensors in zip(*(rounded(part) for part in weight_OI.split(rows)), strict=True)]
    sizes = [len(layer.weight) for layer in linears.values()]
    by_layer = zip(*(tensor.split(sizes) for tensor in parts), strict=True)
    return {
        name: QuantizedInit.keeping(
            codes, moved.clone(), scale.clone(), zero.clone(), scheme, linears[name].weight.dtype
        )
        for name, (codes, moved, scale, zero) in zip(linears, by_layer, strict=True)
    }


def _polish(
    codes_OI: Tensor,
    scale_OG: Tensor,
    zero_point_OG: Tensor,
    weight_OI: Tensor,
    hessian_II: Tensor,
    scheme: QuantScheme,
) -> tuple[Tensor, Tensor]:
    """What GPTQ gave, improved by fitting all scales of a row, then all codes, then all scales again. No row's error rises."""
    seen_OI = weight_OI @ hessian_II
    scale_OG = Quadratic.of(codes_OI, zero_point_OG, weight_OI, seen_OI, hessian_II).solve(scale_OG)
    codes_OI = gptq.descend(codes_OI, scale_OG, zero_point_OG, weight_OI, hessian_II, scheme)
    return codes_OI, Quadratic.of(codes_OI, zero_point_OG, weight_OI, seen_OI, hessian_II).solve(scale_OG)


def _set_weight(block: nn.Module, name: str, weight_OI: Tensor) -> None:
    get_linear(block, name).weight = nn.Parameter(weight_OI, requires_grad=False)
