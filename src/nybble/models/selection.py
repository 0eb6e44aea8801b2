"""LayerSelection: which layers of a model are quantized, and how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from nybble.errors import ModelError
from nybble.models.composite import decoder_path, is_inside, unreached_blocks
from nybble.models.experts import SplitExperts
from nybble.quant.scheme import QuantScheme

_ROUTERS = {"router", "gate"}
"""Names of modules beside experts that choose among them."""


@dataclass(frozen=True)
class LayerSelection:
    """Names of the modules to quantize, and their schemes.

    Attributes:
        linears: linear layers of the decoder, without those that route tokens to experts and those of the time steps of
            a scan: 4 bits unless options give them another scheme.
        embeddings: the embedding, and the language-model head unless it is tied to the embedding: 8 bits unless
            options give them another scheme.
        tied: whether the head and the embedding are one weight.
        schemes: name -> scheme (schemes.py); empty until schemes are assigned.
        notes: sentences on layers that have another scheme than was asked for.
    """

    linears: tuple[str, ...]
    embeddings: tuple[str, ...]
    tied: bool
    schemes: Mapping[str, QuantScheme] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def select_layers(model: Any) -> LayerSelection:
    """Select the layers of a model: linear layers get 4 bits, embedding and head get 8 bits.

    Linear layers that choose or weigh experts stay in 16 bits: they are small, and an error in a choice costs more than
    one in a sum. So do the time steps of a state space scan (Mamba, Jamba), whose weights are used without a call of
    their layers; all layers outside of the text decoder; and decoder blocks that text alone does not reach: no text
    says which error of theirs matters.

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
    decoder, unreached = decoder_path(model), unreached_blocks(model)
    int8 = [names[id(embedding)]] + ([] if tied else [names[id(head)]])
    kept = {*routing_layers(model), *time_step_layers(model)}
    int4 = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module is not head
        and name not in kept
        and is_inside(name, decoder)
        and not name.startswith(unreached)
    ]
    return LayerSelection(tuple(int4), tuple(int8), tied)


def routing_layers(model: nn.Module) -> list[str]:
    """Return the names of the linear layers that choose experts or weigh a shared expert.

    They stand beside the experts of a mixture, and have one output for each expert, one output, or a router's name.
    Routers that keep their weight outside of an nn.Linear need no selection.

    Args:
        model: transformers.PreTrainedModel after `linearize`.
    """
    found = []
    for path, module in model.named_modules():
        listed = isinstance(module, nn.ModuleList) and path.endswith(".experts")
        if not isinstance(module, SplitExperts) and not listed:
            continue
        count = module.split_count if isinstance(module, SplitExperts) else len(module)  # type: ignore[arg-type]
        mixture = path.rpartition(".")[0]
        for name, layer in model.get_submodule(mixture).named_modules():
            parts = name.split(".")
            is_expert = parts[0] in (path.rpartition(".")[2], "shared_expert", "shared_experts")
            routes = isinstance(layer, nn.Linear) and (layer.out_features in (1, count) or parts[0] in _ROUTERS)
            if routes and not is_expert:
                found.append(f"{mixture}.{name}")
    return found


def time_step_layers(model: nn.Module) -> list[str]:
    """Return the names of the linear layers `dt_proj` beside the decay `A_log` of a state space scan."""
    return [f"{name}.dt_proj" for name, m in model.named_modules() if hasattr(m, "A_log") and hasattr(m, "dt_proj")]


def three_axis_parameters(model: nn.Module) -> list[str]:
    """Return the decoder's parameters with three axes outside of convolutions: mixtures store experts like this."""
    decoder = decoder_path(model)
    return [
        f"{name}.{leaf}" if name else leaf
        for name, module in model.named_modules()
        if not isinstance(module, nn.modules.conv._ConvNd) and is_inside(name, decoder)
        for leaf, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3
    ]


def shared_weight(model: Any) -> tuple[str, str] | None:
    """Return two names of the same matrix, if two layers share one; a head tied to the embedding does not count.

    Vectors may be shared: biases are not trained, and every name of one is saved.

    Args:
        model: transformers.PreTrainedModel.
    """
    tied = _place(model.get_input_embeddings().weight)
    names: dict[tuple[int, Any], str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        key = (_place(tensor), tensor.shape)
        if tensor.ndim > 1 and key[0] != tied and names.setdefault(key, name) != name:
            return names[key], name
    return None


def _place(tensor: Tensor) -> int:
    """Where a tensor is; one on the meta device, which has no memory, is told apart by the object."""
    return id(tensor) if tensor.device.type == "meta" else tensor.data_ptr()
