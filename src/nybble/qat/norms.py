"""Training of norm weights at a relative learning rate.

    weight = init_weight + size * shift        size = mean |init_weight + offset|

`offset` is what the norm adds to its weight before it multiplies (1 in Gemma, else 0), so `size` is the mean factor
of the norm and the learning rate of the shift is relative, like that of the scales.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from nybble.models.norms import norm_offset

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class RelativeShift(nn.Module):
    """Parametrization of a norm's weight: weight + size * shift.

    Args:
        weight_D: initial weight of the norm.
        offset: what the norm adds to its weight before multiplying (models/norms.py).

    Attributes:
        shift: the trained parameter [D], float32 whatever the dtype of the model is, starting at zero.
    """

    def __init__(self, weight_D: Tensor, offset: float) -> None:
        super().__init__()
        self.size = float((weight_D.float() + offset).abs().mean())
        self.shift = nn.Parameter(torch.zeros_like(weight_D, dtype=torch.float32))

    def forward(self, weight_D: Tensor) -> Tensor:
        return torch.add(weight_D.float(), self.shift, alpha=self.size).to(weight_D.dtype)


def _norm_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that normalize and then multiply with a weight vector, by name; not with a fixed one (Falcon Mamba)."""
    return {
        name: module
        for name, module in model.named_modules()
        if type(module).__name__.endswith("Norm")
        and isinstance(weight := getattr(module, "weight", None), Tensor)
        and weight.ndim == 1
        and "weight" not in module._buffers
    }


def make_norms_trainable(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Parametrize the weights of all norms by `RelativeShift`, in place.

    Args:
        model: a model of transformers.

    Returns:
        Parameter name -> trainable shift, in the order of the modules.
    """
    shifts = {}
    for name, norm in _norm_modules(model).items():
        weight_D = norm.get_parameter("weight").requires_grad_(False)
        relative_shift = RelativeShift(weight_D.detach(), norm_offset(norm))
        parametrize.register_parametrization(norm, "weight", relative_shift)
        shifts[f"{name}.shift"] = relative_shift.shift
    return shifts


def bake_norms(model: nn.Module) -> None:
    """Turn the weights of trainable norms back into plain frozen parameters with the trained values, in place."""
    for norm in _norm_modules(model).values():
        if parametrize.is_parametrized(norm, "weight"):
            parametrize.remove_parametrizations(norm, "weight", leave_parametrized=True)
            norm.get_parameter("weight").requires_grad_(False)
