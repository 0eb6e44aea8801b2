"""The text model alone out of a model with vision or audio parts, for formats that do not hold these.

It is the causal language model of the inner configuration, under the names of its own class:

    model.language_model.layers.0.mlp.up_proj   ->   model.layers.0.mlp.up_proj

Refused (ExportError): text models that have no class of their own in transformers, or that transformers stores in
another way when they are alone.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from nybble.errors import ExportError
from nybble.models.checkpoint import QuantizedCheckpoint, empty_model
from nybble.models.composite import decoder_path, is_composite, text_config
from nybble.models.quantized_file import LazyMapping
from nybble.models.selection import LayerSelection


def text_part_config(config: Any, tied: bool, label: str) -> Any:
    """Return the configuration of the text model alone; of a language model alone, the configuration itself.

    Args:
        config: transformers configuration.
        tied: whether the head is tied to the embedding.
        label: of the export format, for the error message.

    Raises:
        ExportError: transformers has no class for the text model alone.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if not is_composite(config):
        return config
    text = copy.deepcopy(text_config(config))
    if text.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ExportError(
            f"an export to {label} holds the text model of {config.model_type} alone, which must have a class of its "
            f"own in transformers; {text.model_type} has none; export to hf or vllm"
        )
    text.tie_word_embeddings, text.architectures = tied, None
    return text


def text_part(checkpoint: QuantizedCheckpoint, label: str) -> QuantizedCheckpoint:
    """Return the text model alone of a quantized model with further parts, under the names of its own class.

    Args:
        checkpoint: of any model; one of a language model alone is returned as it is.
        label: of the export format, for error messages.

    Raises:
        ExportError: see the top of this file.
    """
    config = text_part_config(checkpoint.config, checkpoint.selection.tied, label)
    if config is checkpoint.config:
        return checkpoint
    text = empty_model(config, checkpoint.trust_remote_code)
    tensors = _text_names(empty_model(checkpoint.config, checkpoint.trust_remote_code), text)
    modules = _module_names(tensors, checkpoint.shapes)
    selection, own = checkpoint.selection, {other: name for name, other in modules.items()}
    return replace(
        checkpoint,
        config=config,
        quantized=LazyMapping(modules, lambda name: checkpoint.quantized[modules[name]]),
        shapes={name: checkpoint.shapes[other] for name, other in modules.items()},
        others=LazyMapping(
            (name for name, other in tensors.items() if other in checkpoint.others),
            lambda name: checkpoint.others[tensors[name]],
        ),
        selection=LayerSelection(
            tuple(own[name] for name in selection.linears),
            tuple(own[name] for name in selection.embeddings),
            selection.tied,
            {own[name]: scheme for name, scheme in selection.schemes.items()},
        ),
        num_parameters=sum(parameter.numel() for parameter in text.parameters()),
    )


def _text_names(composite: Any, text: Any) -> Mapping[str, str]:
    """Return the name in a model with parts of each tensor of its text model alone.

    Args:
        composite: transformers.PreTrainedModel with parts.
        text: transformers.PreTrainedModel, its text model.

    Returns:
        Name in the text model -> name in the composite.

    Raises:
        ExportError: the composite does not hold the text model.
    """
    prefixes = {
        _path(text, text.get_output_embeddings()): _path(composite, composite.get_output_embeddings()),
        _path(text, text.base_model): decoder_path(composite),
    }
    known = composite.state_dict()
    names = {}
    for name, tensor in text.state_dict().items():
        own = next((prefix for prefix in prefixes if name.startswith(prefix + ".")), None)
        other = "" if own is None else prefixes[own] + name.removeprefix(own)
        if other not in known or known[other].shape != tensor.shape:
            raise ExportError(
                f"{type(composite).__name__} must hold the tensors of a {type(text).__name__}; it has none for {name}; "
                "export to hf or vllm"
            )
        names[name] = other
    return names


def _module_names(tensors: Mapping[str, str], modules: Iterable[str]) -> dict[str, str]:
    """Name in the text model -> name in the composite, of modules whose weights are among the `tensors`."""
    by_weight = {other: name for name, other in tensors.items()}
    return {by_weight[f"{m}.weight"].removesuffix(".weight"): m for m in modules if f"{m}.weight" in by_weight}


def _path(model: Any, module: Any) -> str:
    return str(next(name for name, other in model.named_modules() if other is module))
