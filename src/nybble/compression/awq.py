"""AWQ (https://arxiv.org/abs/2306.00978): before rounding, scale up the input channels that matter most.

    y = W x = (W diag(s)) (x / s)        s = r^alpha / geometric mean        r = root mean square of each input channel

The division of x by s is folded into whatever produces x: the weight of a norm, or the rows of a linear layer. Which
module that is, is found by trial (awq_mappings.py). The 16-bit model computes the same function as before. All that
reads x shares s. alpha is searched from 0 (nothing changes) to 1; the best one has the least output error after
round-to-nearest, with the error of each channel weighed by r^2.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nybble.compression.awq_mappings import AWQMapping, find_mappings, has_mapping
from nybble.compression.base import FoldingMethod
from nybble.compression.blocks import InputStatistics, get_linear
from nybble.errors import OptionError
from nybble.quant.grid import at_least_float32, min_max_qparams, quantize_dequantize
from nybble.quant.scheme import QuantScheme

log = logging.getLogger("nybble")

ALPHAS = tuple(i / 10 for i in range(11))
# Lower bound on r relative to the largest r. Without it the factor of a channel that is never used would have no bound.
_MIN_RELATIVE_RMS = 1e-4


class AWQ(FoldingMethod):
    """The method awq."""

    def __init__(self) -> None:
        self._mappings: dict[str, tuple[AWQMapping, ...]] = {}

    def check(self, model: Any, names: Sequence[str]) -> None:
        """See CompressionMethod.check.

        Raises:
            OptionError: there is nothing to fold.
        """
        if not has_mapping(model, names):
            raise OptionError(
                "awq must have a norm or a linear layer in the decoder blocks whose outputs it can rescale; "
                f"{model.config.model_type} has none; use a method without awq, for example se+gptq"
            )

    def prepare(self, model: Any, names: Sequence[str]) -> None:
        """See FoldingMethod.prepare."""
        self._mappings = find_mappings(model, names)
        for mappings in dict.fromkeys(self._mappings.values()):
            blocks = [path for path, own in self._mappings.items() if own is mappings]
            log.info("awq folds in %d blocks like %s: %s", len(blocks), blocks[0], _describe(mappings) or "nothing")

    def fold_block(
        self, name: str, block: nn.Module, statistics: Sequence[InputStatistics], schemes: Mapping[str, QuantScheme]
    ) -> None:
        """See FoldingMethod.fold_block."""
        fold(block, self._mappings[name], statistics, schemes)


def _describe(mappings: Sequence[AWQMapping]) -> str:
    """Sources and layers, such as "mlp.experts.N.up_proj -> down_proj (4 times)": experts are alike."""
    texts: Counter[str] = Counter()
    for mapping in mappings:
        layers = Counter(name.rpartition(".")[2] for name in mapping.layers)
        readers = " + ".join(name if count == 1 else f"{count} {name}" for name, count in layers.items())
        texts[f"{re.sub(r'(?<=[.])[0-9]+(?=[.])', 'N', mapping.source)} -> {readers}"] += 1
    return ", ".join(text if count == 1 else f"{text} ({count} times)" for text, count in texts.items())


@torch.no_grad()
def fold(
    block: nn.Module,
    mappings: Sequence[AWQMapping],
    statistics: Sequence[InputStatistics],
    schemes: Mapping[str, QuantScheme],
) -> None:
    """Apply mappings to a block, in place; the statistics are changed to fit.

    Args:
        block: the 16-bit decoder block.
        mappings: of this block.
        statistics: of the inputs of its layers.
        schemes: layer name within the block -> scheme.
    """
    for mapping in mappings:
        inputs = [shared for shared in statistics if not set(mapping.layers).isdisjoint(shared.layers)]
        if inputs:
            _fold_mapping(block, mapping, inputs, schemes)


class Part(NamedTuple):
    """Layers with the same inputs x and the same scheme.

    Attributes:
        weight_OI: their stacked rows, at least float32.
        gram_II: mean of x x^T in the same dtype.
        scheme: bits and group size.
    """

    weight_OI: Tensor
    gram_II: Tensor
    scheme: QuantScheme


def _fold_mapping(
    block: nn.Module, mapping: AWQMapping, inputs: Sequence[InputStatistics], schemes: Mapping[str, QuantScheme]
) -> None:
    """Search the factors of one mapping, and apply them to source, layers, followers and statistics in place."""
    source, channel_I = block.get_submodule(mapping.source), mapping.channel_I
    parts = []
    for shared in inputs:
        for scheme in dict.fromkeys(schemes[name] for name in shared.layers):
            names = [name for name in shared.layers if schemes[name] == scheme]
            rows = [at_least_float32(get_linear(block, name).weight) for name in names]
            parts.append(Part(torch.cat(rows), shared.gram_II, scheme))
    s_I = search(parts, channel_I)
    s_R = s_I.new_ones(len(source.get_parameter("weight")))
    s_R[channel_I] = s_I
    s_I = divide_source(source, s_R, mapping.norm_offset)[channel_I]
    for name in (*mapping.layers, *mapping.followers):
        weight_OI = block.get_submodule(name).get_parameter("weight")
        weight_OI.copy_(at_least_float32(weight_OI) * s_I)
    for shared in inputs:
        shared.gram_II.div_(s_I).div_(s_I[:, None])


def search(parts: Sequence[Part], channel_I: Tensor | None = None) -> Tensor:
    """The best factors over ALPHAS.

    Args:
        parts: all layers that read the channels. Experts are several parts, each with its own inputs.
        channel_I: see `factors`.

    Returns:
        s [I], in the dtype of the parts.
    """
    grams = list({id(part.gram_II): part.gram_II for part in parts}.values())
    gram_II = grams[0] if len(grams) == 1 else torch.stack(grams).sum(0)
    least_error, best_I = torch.inf, torch.ones_like(gram_II[0])
    for alpha in ALPHAS:
        s_I = factors(gram_II, alpha, channel_I)
        error = sum(_rounding_error(part, s_I) for part in parts)
        if error < least_error:
            least_error, best_I = error, s_I
    return best_I


def _rounding_error(part: Part, s_I: Tensor) -> float:
    """Error of round-to-nearest after scaling, weighed by the importance of each input."""
    scaled_OI = part.weight_OI * s_I
    scale_OG, zero_point_OG = min_max_qparams(scaled_OI, part.scheme)
    difference_OI = quantize_dequantize(scaled_OI, scale_OG, zero_point_OG, part.scheme).sub_(scaled_OI)
    return float(difference_OI.square_().sum(0) @ (part.gram_II.diagonal() / s_I**2))


def factors(gram_II: Tensor, alpha: float, channel_I: Tensor | None = None) -> Tensor:
    """s = r^alpha, divided by its geometric mean.

    Args:
        gram_II: mean of x x^T over the inputs x.
        alpha: exponent; 0 gives factors of 1.
        channel_I: channel of the source that each input comes from (AWQMapping); None: each has its own. Inputs from
            one channel get the same factor, from the mean of their r.

    Returns:
        s [I], in the same dtype.
    """
    rms_I = gram_II.diagonal().abs().sqrt()
    if channel_I is not None:
        rms_I = _mean_by_channel(rms_I, channel_I)
    log_I = torch.maximum(rms_I, _MIN_RELATIVE_RMS * rms_I.max() + torch.finfo(rms_I.dtype).tiny).log()
    return ((log_I - log_I.mean()) * alpha).exp()


def _mean_by_channel(values_I: Tensor, channel_I: Tensor) -> Tensor:
    """Replace each value by the mean of all values of its channel. The order of the sums is fixed on every device."""
    _, place_I, count_C = channel_I.unique(return_inverse=True, return_counts=True)
    order_I = place_I.argsort(stable=True)
    start_C = count_C.cumsum(0) - count_C
    rank_I = torch.arange(len(order_I), device=order_I.device) - start_C[place_I[order_I]]
    table_QC = values_I.new_zeros(int(count_C.max()), len(count_C))
    table_QC[rank_I, place_I[order_I]] = values_I[order_I]
    mean_C: Tensor = table_QC.sum(0) / count_C
    return mean_C[place_I]


def divide_source(source: nn.Module, s_R: Tensor, norm_offset: float) -> Tensor:
    """Divide the outputs of a norm or of a linear layer by s, in place.

    The factors of a norm are read back from its rounded weight, so a 16-bit norm stays as exact as it was. A channel
    keeps its weight if the norm turns it off, or if rounding would turn it off.

    Args:
        source: a norm or a linear layer.
        s_R: a factor for each output channel.
        norm_offset: a norm multiplies by its weight plus this.

    Returns:
        The factors [R] that the source was really divided by.
    """
    weight, bias = source.get_parameter("weight"), getattr(source, "bias", None)
    if weight.ndim == 1:
        before_R, original_R = at_least_float32(weight) + norm_offset, weight.clone()
        weight.copy_(before_R / s_R - norm_offset)
        used_R: Tensor = before_R / (at_least_float32(weight) + norm_offset)
        valid_R = used_R.isfinite() & (used_R > 0)
        weight.copy_(torch.where(valid_R, weight, original_R))
        s_R = torch.where(valid_R, used_R, torch.ones_like(used_R))
    else:
        weight.copy_(at_least_float32(weight) / s_R[:, None])
    if bias is not None:
        bias.copy_(at_least_float32(bias) / s_R)
    return s_R
