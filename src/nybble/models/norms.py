"""What a norm adds to its weight before it multiplies: 1 in Gemma, else mostly 0.

No configuration states it, and one model can have norms of both kinds (qwen3_next), so it is measured.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call


def own_weight(module: nn.Module) -> Tensor | None:
    """The parameter of a module itself that is named weight and is not of integers; None if there is none."""
    weight = module._parameters.get("weight")
    return weight if weight is not None and weight.is_floating_point() else None


@torch.no_grad()
def norm_offset(norm: nn.Module) -> float:
    """What a norm adds to its weight: y = x / |x| * (weight + offset) + bias.

    It is found by calling the norm with weights of 0 and of 1, and without a bias. A norm that cannot be called with
    one or two tensors counts as one without an offset.

    Args:
        norm: a module with a weight [D], on any device, in any dtype.

    Returns:
        A whole number.
    """
    weight_D = norm.get_parameter("weight")
    angle_D = torch.arange(1, len(weight_D) + 1, dtype=torch.float32, device=weight_D.device)
    x_D = angle_D.sin().to(weight_D.dtype)[None, None]
    replaced = {name: torch.zeros_like(parameter) for name, parameter in norm.named_parameters()}
    for inputs in ((x_D,), (x_D, x_D)):  # a gated norm also takes the gate
        try:
            without_D = functional_call(norm, replaced, inputs).double()
            with_one_D = functional_call(norm, replaced | {"weight": torch.ones_like(weight_D)}, inputs).double()
        except (TypeError, AttributeError, RuntimeError, ValueError):
            continue
        factor_D = with_one_D - without_D
        square = float(factor_D.square().sum())
        return float(round(float((without_D * factor_D).sum()) / square)) if square > 0 else 0.0
    return 0.0
