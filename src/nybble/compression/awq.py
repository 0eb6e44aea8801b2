"""AWQ (https://arxiv.org/abs/2306.00978): before rounding, scale up the input channels that matter most.

    y = W x = (W diag(s)) (x / s)        s = r^alpha / geometric mean        r = root mean square of each input channel

The division of x by s is folded into whatever produces x: the weight of a norm, or the rows of a linear layer
(AWQMapping in models/families.py). The 16-bit model computes the same function as before. All layers that read x
share s. alpha is searched from 0 (nothing changes) to 1; the best one has the least output error after
round-to-nearest, with the error of each channel weighed by r^2.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nybble.compression.base import FoldingMethod
from nybble.compression.blocks import InputStatistics, get_linear
from nybble.errors import OptionError
from nybble.models.families import FAMILIES, AWQMapping, family_of
from nybble.quant.grid import at_least_float32, min_max_qparams, quantize_dequantize
from nybble.quant.scheme import QuantScheme

log = logging.getLogger("nybble")

ALPHAS = tuple(i / 10 for i in range(11))
# Lower bound on r relative to the largest r. Without it the factor of a channel that is never used would have no bound.
_MIN_RELATIVE_RMS = 1e-4


@dataclass(frozen=True)
class ValueHeads:
    """The value heads of grouped-query attention.

    Attributes:
        count: number of key-value heads.
        size: channels per head.
    """

    count: int
    size: int


class AWQ(FoldingMethod):
    """The method awq."""

    def check(self, config: Any) -> None:
        """See CompressionMethod.check.

        Raises:
            OptionError: models/families.py has no AWQ mappings for this family.
        """
        if not family_of(config).awq_mappings:
            known = ", ".join(name for name in FAMILIES if FAMILIES[name].awq_mappings)
            raise OptionError(
                "awq must know which layer produces the inputs of which; models/families.py has no AWQ mappings for "
                f"{config.model_type} (it has them for {known}); use a method without awq, for example se+gptq"
            )

    def fold_block(
        self,
        name: str,
        block: nn.Module,
        statistics: Sequence[InputStatistics],
        config: Any,
        schemes: Mapping[str, QuantScheme],
    ) -> None:
        """See FoldingMethod.fold_block; a warning says when no mapping applies to the block."""
        if not fold(block, statistics, config, schemes):
            log.warning("%s: awq folded nothing, because no AWQ mapping of models/families.py fits its layers", name)


@torch.no_grad()
def fold(
    block: nn.Module, statistics: Sequence[InputStatistics], config: Any, schemes: Mapping[str, QuantScheme]
) -> int:
    """Apply all AWQ mappings of the family to a block, in place; the statistics are changed to fit.

    A mapping is skipped if one of its layers is absent or shares its input with a layer outside of the mapping.

    Args:
        block: the 16-bit decoder block.
        statistics: of the inputs of its layers.
        config: configuration of the transformers model.
        schemes: layer name within the block -> scheme.

    Returns:
        The number of mappings that were applied.
    """
    applied = 0
    for mapping in family_of(config).awq_mappings:
        inputs = next((s for s in statistics if set(s.layers) == set(mapping.layers)), None)
        if inputs is not None:
            _fold_mapping(block, mapping, inputs, config, schemes)
            applied += 1
    return applied


def _fold_mapping(
    block: nn.Module, mapping: AWQMapping, inputs: InputStatistics, config: Any, schemes: Mapping[str, QuantScheme]
) -> None:
    """Search the factors of one mapping, and apply them to source, layers and statistics in place."""
    layers = [get_linear(block, name) for name in mapping.layers]
    heads = _value_heads(config) if mapping.value_projection else None
    stacks: dict[QuantScheme, list[Tensor]] = {}
    for name, layer in zip(mapping.layers, layers, strict=True):
        stacks.setdefault(schemes[name], []).append(at_least_float32(layer.weight))
    weights = {scheme: torch.cat(rows) for scheme, rows in stacks.items()}
    s_I = search(weights, inputs.gram_II, heads)
    s_I = divide_source(get_linear(block, mapping.source), s_I, family_of(config).norm_offset, heads)
    for layer in layers:
        layer.weight.copy_(at_least_float32(layer.weight) * s_I)
    inputs.gram_II.div_(s_I).div_(s_I[:, None])


def _value_heads(config: Any) -> ValueHeads:
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return ValueHeads(config.num_key_value_heads, size)


def search(weights: Mapping[QuantScheme, Tensor], gram_II: Tensor, heads: ValueHeads | None = None) -> Tensor:
    """The best factors over ALPHAS.

    Args:
        weights: scheme -> the stacked rows [O, I] of the layers with this scheme; all of them read the same input. At
            least float32.
        gram_II: mean of x x^T over the inputs x, in the same dtype.
        heads: see `factors`.

    Returns:
        s [I], in the same dtype.
    """
    importance_I, least_error, best_I = gram_II.diagonal(), torch.inf, torch.ones_like(gram_II[0])
    for alpha in ALPHAS:
        s_I = factors(gram_II, alpha, heads)
        error = 0.0
        for scheme, weight_OI in weights.items():
            scaled_OI = weight_OI * s_I
            scale_OG, zero_point_OG = min_max_qparams(scaled_OI, scheme)
            difference_OI = quantize_dequantize(scaled_OI, scale_OG, zero_point_OG, scheme).sub_(scaled_OI)
            error += float(difference_OI.square_().sum(0) @ (importance_I / s_I**2))
        if error < least_error:
            least_error, best_I = error, s_I
    return best_I


def factors(gram_II: Tensor, alpha: float, heads: ValueHeads | None = None) -> Tensor:
    """s = r^alpha, divided by its geometric mean.

    Args:
        gram_II: mean of x x^T over the inputs x.
        alpha: exponent; 0 gives factors of 1.
        heads: set where x holds the outputs of attention heads. Query heads that read the same values then get the same
            factors, because the factors are folded into the rows that produce the values.

    Returns:
        s [I], in the same dtype.
    """
    rms_I = gram_II.diagonal().abs().sqrt()
    if heads is not None:
        queries_per_value = len(rms_I) // (heads.count * heads.size)
        mean_rms = rms_I.view(heads.count, -1, heads.size).mean(1, keepdim=True)
        rms_I = mean_rms.expand(heads.count, queries_per_value, heads.size).reshape(-1)
    log_I = torch.maximum(rms_I, _MIN_RELATIVE_RMS * rms_I.max() + torch.finfo(rms_I.dtype).tiny).log()
    return ((log_I - log_I.mean()) * alpha).exp()


def divide_source(source: nn.Linear, s_I: Tensor, norm_offset: float, heads: ValueHeads | None) -> Tensor:
    """Divide the outputs of a norm or of a linear layer by s, in place.

    The factors of a norm are read back from its rounded weight, so a 16-bit norm stays as exact as it was. A channel
    keeps its weight if the norm turns it off, or if rounding would turn it off.

    Args:
        source: a norm, or a linear layer whose last outputs are the inputs of the other layers.
        s_I: factors.
        norm_offset: a norm multiplies by its weight plus this.
        heads: see `factors`; each value head has one factor per channel.

    Returns:
        The factors [I] that the source was really divided by.
    """
    weight = source.weight
    if weight.ndim == 1:
        before_I, original_I = at_least_float32(weight) + norm_offset, weight.clone()
        weight.copy_(before_I / s_I - norm_offset)
        used_I: Tensor = before_I / (at_least_float32(weight) + norm_offset)
        valid_I = used_I.isfinite() & (used_I > 0)
        weight.copy_(torch.where(valid_I, weight, original_I))
        return torch.where(valid_I, used_I, torch.ones_like(used_I))
    s_O = s_I if heads is None else s_I.view(heads.count, -1, heads.size)[:, 0].reshape(-1)
    weight[-len(s_O) :] = (at_least_float32(weight[-len(s_O) :]) / s_O[:, None]).to(weight.dtype)
    if source.bias is not None:
        source.bias[-len(s_O) :] = (at_least_float32(source.bias[-len(s_O) :]) / s_O).to(weight.dtype)
    return s_I
