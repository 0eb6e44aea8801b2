"""Replace layers of other kinds by nn.Linear, in place, so that everything else sees one kind.

    Conv1D (GPT-2, OpenAI GPT)     y = x @ weight_IO + bias       ->      weight_OI = weight_IO^T
    stacked experts                weight_EOI or weight_EIO       ->      E linear layers (experts.py)

A model is linearized wherever it is loaded or built (loading.py, quantized_model.py, checkpoint.py), and quantized/ has
the names of the linear layers. An export that other programs read by the model's own class writes the weights as that
class has them.
"""

from __future__ import annotations

from typing import TypeVar

from torch import nn
from transformers.pytorch_utils import Conv1D

from nybble.models.experts import split_experts

AnyModel = TypeVar("AnyModel", bound=nn.Module)


class TransposedLinear(nn.Linear):
    """A linear layer that is a Conv1D in the model's own class, whose weight is the transpose of this one's."""


def linearize(model: AnyModel) -> AnyModel:
    """Replace all layers of the kinds at the top of this file, in place; on any device, the meta device too.

    Args:
        model: transformers.PreTrainedModel.

    Returns:
        The same model.
    """
    _replace_conv1d(model)
    split_experts(model)
    return model


def transposed_layers(model: nn.Module) -> set[str]:
    """Names of the layers whose weight the model's own class stores as [I, O].

    Args:
        model: transformers.PreTrainedModel that is linearized.
    """
    return {name for name, module in model.named_modules() if isinstance(module, TransposedLinear)}


def _replace_conv1d(model: nn.Module) -> None:
    """Replace every Conv1D by a linear layer with the transposed weight, in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            linear = TransposedLinear(module.nx, module.nf, device="meta", dtype=module.weight.dtype)
            linear.weight = nn.Parameter(module.weight.detach().T.contiguous(), module.weight.requires_grad)
            linear.bias = module.bias
            model.set_submodule(name, linear.train(module.training))
