"""AWQ (arXiv 2306.00978): make the columns that matter larger before rounding, and what feeds them smaller by as much.

    y = W x = (W diag(s)) (x / s),        s = r^alpha / geometric mean of it,        r = root mean square of each input channel

Dividing x by s costs nothing: it is folded into what makes x, the weight of a norm or the rows of a linear layer (families.py: Feed). The 16-bit model
computes the same function as before. alpha is searched from 0 (nothing changes) to 1, for all layers that read x together: the least
error of the outputs after rounding to nearest, weighed by r^2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nybble.compress.blocks import InputStatistics, get_linear
from nybble.errors import OptionError
from nybble.models.families import FAMILIES, family_of
from nybble.quant.grid import at_least_float32, min_max_qparams, quantize_dequantize
from nybble.quant.scheme import QuantScheme

ALPHAS = tuple(i / 10 for i in range(11))


def check_family(config: Any) -> None:
    """Raise OptionError, saying what does work, for a family without folding rows."""
    if not family_of(config).feeds:
        known = ", ".join(name for name, family in FAMILIES.items() if family.feeds)
        raise OptionError(
            f"awq must know what feeds each layer; families.py has no such row for {config.model_type} (it has: {known}); "
            "use the method without awq: se, gptq, se+gptq and blockwise need no such row"
        )


def factors(gram_II: Tensor, alpha: float, share: tuple[int, int] | None = None) -> Tensor:
    """s [I], of geometric mean 1. With share = (key-value heads, head size), heads that read the same values have the same factors."""
    rms_I = gram_II.diagonal().abs().sqrt()
    if share is not None:
        heads, size = share
        rms_I = (
            rms_I.view(heads, -1, size)
            .mean(1, keepdim=True)
            .expand(heads, len(rms_I) // (heads * size), size)
            .reshape(-1)
        )
    # A channel that is never used has no say; the bound keeps it from being blown up.
    log_I = torch.maximum(rms_I, 1e-4 * rms_I.max() + torch.finfo(rms_I.dtype).tiny).log()
    return ((log_I - log_I.mean()) * alpha).exp()


def search(weight_OI: Tensor, gram_II: Tensor, scheme: QuantScheme, share: tuple[int, int] | None = None) -> Tensor:
    """The best s [I] over ALPHAS for the stacked rows of all layers that read the same input."""
    importance_I, best, found_I = gram_II.diagonal(), torch.inf, torch.ones_like(weight_OI[0])
    for alpha in ALPHAS:
        s_I = factors(gram_II, alpha, share)
        scaled_OI = weight_OI * s_I
        scale_OG, zero_point_OG = min_max_qparams(scaled_OI, scheme)
        difference_OI = quantize_dequantize(scaled_OI, scale_OG, zero_point_OG, scheme).sub_(scaled_OI)
        error = float(difference_OI.square_().sum(0) @ (importance_I / s_I**2))
        if error < best:
            best, found_I = error, s_I
    return found_I


@torch.no_grad()
def fold(block: nn.Module, statistics: list[InputStatistics], config: Any, scheme: QuantScheme) -> int:
    """Search and fold, in place, all feeds of a block; the statistics follow.

    Returns: how many feeds were folded.
    """
    family, folded = family_of(config), 0
    for feed in family.feeds:
        known = next((s for s in statistics if set(s.layers) == set(feed.layers)), None)
        if known is None:  # a layer that is absent or reads something else as well
            continue
        layers = [get_linear(block, name) for name in feed.layers]
        share = None
        if feed.heads:
            heads = config.num_key_value_heads
            size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
            share = (heads, size)
        s_I = search(torch.cat([at_least_float32(layer.weight) for layer in layers]), known.gram_II, scheme, share)
        s_I = divide(get_linear(block, feed.source), s_I, family.norm_offset, share)
        for layer in layers:
            layer.weight.copy_(at_least_float32(layer.weight) * s_I)
        known.gram_II.div_(s_I).div_(s_I[:, None])
        folded += 1
    return folded


def divide(source: nn.Linear, s_I: Tensor, norm_offset: float, share: tuple[int, int] | None) -> Tensor:
    """Divide what `source`, a norm or a linear layer, makes by s, in place.

    Returns: the factors that were really used, read back from the rounded weight of a norm, so that a 16-bit norm is no less exact than it was.
    """
    weight = source.weight
    if weight.ndim == 1:
        before_I, old = at_least_float32(weight) + norm_offset, weight.clone()
        weight.copy_(before_I / s_I - norm_offset)
        used_I: Tensor = before_I / (at_least_float32(weight) + norm_offset)
        # A channel that the norm turns off, or would by rounding, stays as it is.
        fine_I = used_I.isfinite() & (used_I > 0)
        weight.copy_(torch.where(fine_I, weight, old))
        return torch.where(fine_I, used_I, torch.ones_like(used_I))
    rows = s_I if share is None else s_I.view(share[0], -1, share[1])[:, 0].reshape(-1)
    weight[-len(rows) :] = (at_least_float32(weight[-len(rows) :]) / rows[:, None]).to(weight.dtype)
    if source.bias is not None:
        source.bias[-len(rows) :] = (at_least_float32(source.bias[-len(rows) :]) / rows).to(weight.dtype)
    return s_I
