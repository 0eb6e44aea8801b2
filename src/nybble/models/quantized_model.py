"""The 4-bit model on disk."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nybble.errors import RunError
from nybble.files import atomic_folder, load_tensors, open_tensors, save_tensors
from nybble.quant.scheme import QuantScheme
from nybble.quant.weight import QuantizedWeight, pack_nibbles, unpack_nibbles

log = logging.getLogger("nybble")


# --- the 4-bit model on disk ---------------------------------------------------------------------------------------------


WEIGHTS_FILE, WEIGHTS_FORMAT = "weights.safetensors", "nybble-2"


def other_tensors(model: Any, quantized: Iterable[str]) -> dict[str, Tensor]:
    """The model's tensors that are no weight of the layers `quantized`; a tied head, which repeats its embedding, is one."""
    state = model.state_dict()
    weights = {state[f"{name}.weight"].data_ptr() for name in quantized}
    return {key: value for key, value in state.items() if value.data_ptr() not in weights}


def save_quantized(folder: Path, model: Any, tokenizer: Any, quantized: dict[str, QuantizedWeight]) -> None:
    """Write a self-contained folder: codes (4-bit ones packed), scales, zeros, all other tensors as they are, configuration, tokenizer.

    Keys: NAME.weight.codes uint8, NAME.weight.scale float16 [O, G], NAME.weight.zero uint8 [O, G]; the header's note holds the grid by NAME.
    """
    from transformers.dynamic_module_utils import custom_object_save

    tensors = other_tensors(model, quantized)
    for name, weight in quantized.items():
        four = weight.scheme.bits == 4
        tensors[f"{name}.weight.codes"] = pack_nibbles(weight.codes_OI) if four else weight.codes_OI
        tensors[f"{name}.weight.scale"] = weight.scale_OG.half()
        tensors[f"{name}.weight.zero_point"] = weight.zero_point_OG
    note = {"format": WEIGHTS_FORMAT, "schemes": {name: asdict(weight.scheme) for name, weight in quantized.items()}}
    with atomic_folder(folder) as temporary:
        save_tensors(temporary / WEIGHTS_FILE, tensors, note)
        if model._auto_class is not None:  # Python code that came with the model
            custom_object_save(model, temporary, config=model.config)
        model.config.save_pretrained(temporary)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


def load_weights(folder: Path) -> tuple[dict[str, QuantizedWeight], dict[str, Tensor]]:
    """The tensors that `save_quantized` wrote: name -> codes, and all others."""
    tensors, note = load_tensors(folder / WEIGHTS_FILE)
    if note.get("format") != WEIGHTS_FORMAT:
        raise RunError(
            f"{folder / WEIGHTS_FILE} must be a 4-bit model that nybble wrote ({WEIGHTS_FORMAT}); it is something else"
        )
    quantized = {}
    for name, fields in note["schemes"].items():
        scheme = QuantScheme(**fields)
        codes, scale, zero = (tensors.pop(f"{name}.weight.{leaf}") for leaf in ("codes", "scale", "zero_point"))
        quantized[name] = QuantizedWeight(
            unpack_nibbles(codes) if scheme.bits == 4 else codes, scale.float(), zero, scheme
        )
    return quantized, tensors


def weights_fingerprint(folder: Path) -> str:
    """Short hash of the weights file of a 4-bit model."""
    with (folder / WEIGHTS_FILE).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def scale_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shape [O, G] of the scales of every layer that `save_quantized` wrote; reads no weights."""
    end = ".weight.scale"
    with open_tensors(folder / WEIGHTS_FILE) as file:
        keys = file.keys()
        return {key.removesuffix(end): tuple(file.get_slice(key).get_shape()) for key in keys if key.endswith(end)}


def plain_tensors(folder: Path) -> set[str]:
    """Names of the tensors that `save_quantized` wrote as they were; reads no weights."""
    with open_tensors(folder / WEIGHTS_FILE) as file:
        keys = file.keys()
        return {key for key in keys if not key.endswith((".weight.codes", ".weight.scale", ".weight.zero_point"))}


def load_config(folder: Path, trust_remote_code: bool) -> Any:
    """The configuration of a model that nybble wrote; RunError where it needs Python code that comes with it, and nobody allowed that."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise RunError(
            f"{folder} needs Python code that comes with the model; if you trust it, add --trust_remote_code"
        ) from error


def load_quantized(
    folder: Path, dtype: torch.dtype, trust_remote_code: bool = False
) -> tuple[Any, Any, dict[str, QuantizedWeight]]:
    """What `save_quantized` wrote: (model with dequantized weights in `dtype`, tokenizer, name -> codes)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.initialization import no_init_weights

    config = load_config(folder, trust_remote_code)
    quantized, tensors = load_weights(folder)
    tensors = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    tensors |= {f"{name}.weight": weight.dequantize().to(dtype) for name, weight in quantized.items()}
    with no_init_weights():  # every weight is loaded; random starts would be made for nothing
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    missing, unknown = model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    embedding = model.get_input_embeddings().weight
    tied = {
        name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter is embedding and config.tie_word_embeddings
    }
    if set(missing) - tied or unknown:
        raise RunError(
            f"{folder} does not fit its config.json: missing {sorted(set(missing) - tied)[:3]}, unknown {list(unknown)[:3]}"
        )
    return (
        model.requires_grad_(False).eval(),
        AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code),
        quantized,
    )
