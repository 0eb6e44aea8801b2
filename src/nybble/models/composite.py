"""Models with further parts beside the language model: towers for images or audio, and projectors.

The language model inside is quantized. All else stays in 16 bits and is saved with it. The configuration of such a
model holds another one, of the text model, and this one has the sizes.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from nybble.errors import ModelError, describe_error

log = logging.getLogger("nybble")

_TRIED_TOKENS = 4

DECODER_BLOCKS_WITHOUT_TEXT = "cross_attention_layers"
"""Field of a text configuration: numbers of the blocks that only images reach (Llama 3.2 Vision)."""


def text_config(config: Any) -> Any:
    """Return the configuration of the text model; of a language model alone, the configuration itself.

    Args:
        config: transformers.PreTrainedConfig.
    """
    try:
        return config.get_text_config()
    except ValueError:  # several text models (MusicGen)
        return config


def is_composite(config: Any) -> bool:
    """Whether a configuration holds that of a text model beside others."""
    return text_config(config) is not config


def auto_class(config: Any) -> Any:
    """Return the class of transformers by which a model is loaded and built.

    Args:
        config: transformers.PreTrainedConfig.

    Returns:
        AutoModelForMultimodalLM for a model with further parts, else AutoModelForCausalLM. A configuration with parts
        whose `architectures` names the class of the text model alone is that of a language model.
    """
    from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    )

    whole = MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.get(config.model_type)
    text = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    named = getattr(config, "architectures", None) or []
    if whole is None or not is_composite(config) or (text in named and text != whole):
        return AutoModelForCausalLM
    return AutoModelForMultimodalLM


def decoder_path(model: Any) -> str:
    """Return the path of the text decoder in a model; "" for a language model alone.

    Args:
        model: transformers.PreTrainedModel.

    Raises:
        ModelError: a model with parts has no module that is the text decoder.
    """
    config = getattr(model, "config", None)
    if config is None or not is_composite(config):
        return ""
    decoder = model.get_decoder()
    path: str = next((name for name, module in model.named_modules() if module is decoder), "")
    if decoder is model.base_model or not path:
        raise ModelError(
            f"{type(model).__name__} must keep its language model in a module of its own; its layers stand among those "
            "of its other parts, and nybble cannot tell them apart; choose another model"
        )
    return path


def is_inside(name: str, path: str) -> bool:
    """Whether a module is the one with this path or inside of it; "" is the whole model."""
    return not path or name == path or name.startswith(path + ".")


def unreached_blocks(model: Any) -> tuple[str, ...]:
    """Return the paths of the decoder blocks that text alone does not reach, each with a dot at the end."""
    path = decoder_path(model)
    numbers = getattr(text_config(model.config), DECODER_BLOCKS_WITHOUT_TEXT, None) if path else None
    return tuple(f"{path}.layers.{number}." for number in numbers or ())


@torch.no_grad()
def check_parts(model: Any, name: str) -> None:
    """Check that a model with further parts computes logits of text alone, and say what stays in 16 bits.

    Args:
        model: transformers.PreTrainedModel, in any mode.
        name: of the model, for messages.

    Raises:
        ModelError: its text decoder cannot be told apart, or it needs an image or a sound.
    """
    decoder_path(model)
    ids = torch.arange(_TRIED_TOKENS, device=model.device)[None] % model.get_input_embeddings().num_embeddings
    try:
        shape = tuple(model.eval()(input_ids=ids, use_cache=False).logits.shape[:2])
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # each model's own code says in its own way that an image or a sound is missing
        raise ModelError(
            f"{name} must compute logits of text without an image or a sound; {type(model).__name__} does not "
            f"({describe_error(error)}); choose another model"
        ) from error
    if shape != (1, _TRIED_TOKENS):
        raise ModelError(
            f"{name} must compute one row of logits for each token of text; {type(model).__name__} computes "
            f"{list(shape)} for {[1, _TRIED_TOKENS]}; choose another model"
        )
    log.info(
        "%s: the language model inside (%s) is quantized; the other parts (%.1f M parameters) stay in 16 bits",
        name, text_config(model.config).model_type, _count_other_parameters(model) / 1e6,
    )  # fmt: skip


def _count_other_parameters(model: Any) -> int:
    """Return the number of parameters outside of the text decoder, its embedding and its head."""
    text = [model.get_submodule(decoder_path(model)), model.get_input_embeddings(), model.get_output_embeddings()]
    own = {id(parameter) for module in text for parameter in module.parameters()}
    return sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in own)
