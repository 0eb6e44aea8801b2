"""Maps of bits: the schemes on both sides of an average, random maps of the same size, and what a map costs."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from nybble.models.schemes import assign_schemes
from nybble.models.selection import select_layers
from nybble.options.scheme import SchemeOptions
from nybble.quant.grid import min_max_qparams, quantize_dequantize
from nybble.quant.scheme import QuantScheme

Schemes = dict[str, QuantScheme]


def both_schemes(model: nn.Module, bits: float, group_size: int = 32) -> tuple[Schemes, Schemes]:
    """Linear layer -> scheme with the bits below an average, and with those above."""
    everything, options = select_layers(model), SchemeOptions(bits=bits, group_size=group_size)
    low, high = (assign_schemes(everything, model, options, names).schemes for names in ((), everything.linears))
    return tuple({name: schemes[name] for name in everything.linears} for schemes in (low, high))  # type: ignore[return-value]


def rounded(weight_OI: Tensor, scheme: QuantScheme) -> Tensor:
    """The weight rounded to nearest, float32."""
    return quantize_dequantize(weight_OI.float(), *min_max_qparams(weight_OI, scheme), scheme)


def kl_of_rounded(model: nn.Module, schemes: Schemes, ids: Tensor) -> float:
    """KL divergence of the model with rounded weights to the model, in nats a token; the model is as before."""
    with torch.no_grad():
        log_p = model(ids).logits.double().log_softmax(-1)
    weights = {name: model.get_submodule(name).weight for name in schemes}
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    for name, weight in weights.items():
        weight.data.copy_(rounded(weight, schemes[name]))
    with torch.no_grad():
        log_q = model(ids).logits.double().log_softmax(-1)
    for name, weight in weights.items():
        weight.data.copy_(before[name])
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


def random_layers(costs: Mapping[str, int], groups: Sequence[Sequence[str]], budget: float, seed: int) -> set[str]:
    """Groups of layers in random order, as long as they fit into the budget of additional bits."""
    shuffled, chosen = list(groups), set[str]()
    random.Random(seed).shuffle(shuffled)
    for names in shuffled:
        cost = sum(costs[name] for name in names)
        if cost <= budget:
            budget -= cost
            chosen.update(names)
    return chosen
