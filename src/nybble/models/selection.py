"""LayerSelection: which layers of a model are quantized, and how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from nybble.errors import ModelError
from nybble.quant.scheme import QuantScheme


@dataclass(frozen=True)
class LayerSelection:
    """Names of the modules to quantize, and their schemes.

    Attributes:
        int4: linear layers of the decoder: 4 bits unless options give them another scheme.
        int8: the embedding, and the language-model head unless it is tied to the embedding: 8 bits unless options give
            them another scheme.
        tied: whether the head and the embedding are one weight.
        schemes: name -> scheme (schemes.py); empty until schemes are assigned.
        notes: sentences on layers that have another scheme than was asked for.
    """

    int4: tuple[str, ...]
    int8: tuple[str, ...]
    tied: bool
    schemes: Mapping[str, QuantScheme] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def select_layers(model: Any) -> LayerSelection:
    """Select the layers of a model: every nn.Linear except the head gets 4 bits, embedding and head get 8 bits.

    Args:
        model: transformers.PreTrainedModel.

    Returns:
        The selection, in the order of `model.named_modules()`.

    Raises:
        ModelError: the model has no embedding or no head.
    """
    names = {id(module): name for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if embedding is None or head is None:
        raise ModelError(
            f"the model must have an embedding and a language-model head; {type(model).__name__} does not; "
            "choose a causal language model"
        )
    tied = head.weight is embedding.weight
    int8 = [names[id(embedding)]] + ([] if tied else [names[id(head)]])
    int4 = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head]
    return LayerSelection(tuple(int4), tuple(int8), tied)


def three_axis_parameters(model: nn.Module) -> list[str]:
    """Return the names of all parameters with three axes outside of convolutions: mixtures store experts like this."""
    return [
        f"{name}.{leaf}" if name else leaf
        for name, module in model.named_modules()
        if not isinstance(module, nn.modules.conv._ConvNd)
        for leaf, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3
    ]


def shared_weight(model: Any) -> tuple[str, str] | None:
    """Return two names of the same weight, if two layers share one; a head tied to the embedding does not count.

    Args:
        model: transformers.PreTrainedModel.
    """
    tied = model.get_input_embeddings().weight.data_ptr()
    names: dict[tuple[int, Any], str] = {}
    for name, tensor in model.state_dict().items():
        key = (tensor.data_ptr(), tensor.shape)
        if tensor.numel() and tensor.data_ptr() != tied and names.setdefault(key, name) != name:
            return names[key], name
    return None
