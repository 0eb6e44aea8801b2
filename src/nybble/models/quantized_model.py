"""The quantized model on disk: the folder quantized/ of a run.

The folder is complete in itself: weights.safetensors, config.json, generation_config.json, the files of the tokenizer,
and Python code that came with the model.

weights.safetensors holds, for every quantized module NAME:

    NAME.weight.codes         uint8: [O, I / 2] with two 4-bit codes per byte (weight.py), or [O, I] with 8-bit codes
    NAME.weight.scale         float16 [O, G]
    NAME.weight.zero_point    uint8 [O, G]

and all other tensors of the model under their own names and in their own dtype. The note in the header of the file
holds the format ("nybble-2") and the QuantScheme of every NAME. A head that is tied to the embedding is not stored.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nybble.errors import RunError
from nybble.files import atomic_folder, load_tensors, open_tensors, save_tensors
from nybble.models.companions import GENERATION_CONFIG, copy_companions, load_generation_config
from nybble.models.loading import LoadedModel
from nybble.quant.scheme import QuantScheme
from nybble.quant.weight import QuantizedWeight, pack_nibbles, unpack_nibbles

WEIGHTS_FILE, WEIGHTS_FORMAT = "weights.safetensors", "nybble-2"

_CODES, _SCALE, _ZERO_POINT = ".weight.codes", ".weight.scale", ".weight.zero_point"


class QuantizedModel(NamedTuple):
    """A quantized model as loaded from its folder.

    Attributes:
        model: transformers.PreTrainedModel with dequantized weights, on the CPU, in evaluation mode, frozen.
        tokenizer: transformers.PreTrainedTokenizerBase.
        quantized: module name -> quantized weight.
    """

    model: Any
    tokenizer: Any
    quantized: dict[str, QuantizedWeight]


def unquantized_tensors(model: Any, names: Iterable[str]) -> dict[str, Tensor]:
    """Return all tensors of a model except the weights of some modules.

    Args:
        model: transformers.PreTrainedModel.
        names: modules whose weights are quantized. A head that is tied to one of them is left out too.

    Returns:
        Name in the state dict -> tensor, shared with the model.
    """
    state = model.state_dict()
    quantized = {state[f"{name}.weight"].data_ptr() for name in names}
    return {name: tensor for name, tensor in state.items() if tensor.data_ptr() not in quantized}


def save_quantized(folder: Path, loaded: LoadedModel, quantized: Mapping[str, QuantizedWeight]) -> None:
    """Write a quantized model atomically. An earlier folder of the same name is replaced.

    Args:
        folder: where to write.
        loaded: the model, of which the weights of quantized modules are not read, and its tokenizer and files.
        quantized: module name -> quantized weight.

    Raises:
        RunError: the disk is full.
    """
    from transformers.dynamic_module_utils import custom_object_save

    model = loaded.model
    tensors = unquantized_tensors(model, quantized)
    for name, weight in quantized.items():
        four_bits = weight.scheme.bits == 4
        tensors[name + _CODES] = pack_nibbles(weight.codes_OI) if four_bits else weight.codes_OI
        tensors[name + _SCALE] = weight.scale_OG.half()
        tensors[name + _ZERO_POINT] = weight.zero_point_OG
    note = {"format": WEIGHTS_FORMAT, "schemes": {name: asdict(weight.scheme) for name, weight in quantized.items()}}
    with atomic_folder(folder) as temporary:
        save_tensors(temporary / WEIGHTS_FILE, tensors, note)
        if model._auto_class is not None:  # the model came with Python code
            custom_object_save(model, temporary, config=model.config)
        model.config.save_pretrained(temporary)
        if not any(file.name == GENERATION_CONFIG for file in loaded.files) and model.generation_config is not None:
            model.generation_config.save_pretrained(temporary)
        loaded.tokenizer.save_pretrained(temporary)
        copy_companions(loaded.files, temporary)


def load_weights(folder: Path) -> tuple[dict[str, QuantizedWeight], dict[str, Tensor]]:
    """Read the tensors of a quantized model.

    Args:
        folder: what `save_quantized` wrote.

    Returns:
        Module name -> quantized weight; and name -> tensor for all others. Everything is on the CPU.

    Raises:
        RunError: the file is damaged, or nybble did not write it.
    """
    tensors, note = load_tensors(folder / WEIGHTS_FILE)
    if note.get("format") != WEIGHTS_FORMAT:
        raise RunError(
            f"{folder / WEIGHTS_FILE} must be a 4-bit model that nybble wrote ({WEIGHTS_FORMAT}); it is something else;"
            " name a folder quantized/ that this version of nybble wrote"
        )
    quantized = {}
    for name, fields in note["schemes"].items():
        scheme = QuantScheme(**fields)
        codes, scale_OG, zero_point_OG = (tensors.pop(name + leaf) for leaf in (_CODES, _SCALE, _ZERO_POINT))
        codes_OI = unpack_nibbles(codes) if scheme.bits == 4 else codes
        quantized[name] = QuantizedWeight(codes_OI, scale_OG.float(), zero_point_OG, scheme)
    return quantized, tensors


def load_quantized(folder: Path, dtype: torch.dtype, trust_remote_code: bool = False) -> QuantizedModel:
    """Load a quantized model as a transformers model that computes with the dequantized weights.

    Args:
        folder: what `save_quantized` wrote.
        dtype: of all parameters.
        trust_remote_code: whether to run Python code that comes with the model.

    Returns:
        The model, its tokenizer and its quantized weights.

    Raises:
        RunError: the files are damaged or do not fit each other, nybble did not write them, or the model needs Python
            code that is not trusted.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.initialization import no_init_weights

    config = load_config(folder, trust_remote_code)
    quantized, others = load_weights(folder)
    state = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in others.items()}
    state |= {f"{name}.weight": weight.dequantize().to(dtype) for name, weight in quantized.items()}
    with no_init_weights():  # all weights are loaded, so random initialization would be wasted
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    missing, unknown = model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    absent = set(missing) - _tied_parameters(model)
    if absent or unknown:
        raise RunError(
            f"{folder} must hold the tensors of the model in its config.json; "
            f"missing: {', '.join(sorted(absent)[:3]) or 'none'}, unknown: {', '.join(list(unknown)[:3]) or 'none'}; "
            "delete it and compress again"
        )
    load_generation_config(folder, model)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    return QuantizedModel(model.requires_grad_(False).eval(), tokenizer, quantized)


def load_config(folder: Path, trust_remote_code: bool) -> Any:
    """Load the configuration of a model that nybble wrote: quantized/ or an export.

    Args:
        folder: with config.json.
        trust_remote_code: whether to run Python code that comes with the model.

    Returns:
        A transformers.PreTrainedConfig.

    Raises:
        RunError: the model needs Python code that is not trusted.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise RunError(
            f"{folder} needs Python code that comes with the model; if you trust it, add --trust_remote_code"
        ) from error


def weights_fingerprint(folder: Path) -> str:
    """Return 16 hexadecimal digits of the SHA-256 of the weights file."""
    with (folder / WEIGHTS_FILE).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def scale_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape [O, G] of the scales of every quantized module. Only the header of the file is read.

    Raises:
        RunError: the file is damaged.
    """
    with open_tensors(folder / WEIGHTS_FILE) as file:
        names = [name for name in file.keys() if name.endswith(_SCALE)]  # noqa: SIM118 - not a dict, and not iterable
        return {name.removesuffix(_SCALE): tuple(file.get_slice(name).get_shape()) for name in names}


def unquantized_names(folder: Path) -> set[str]:
    """Return the names of the tensors that are stored unquantized. Only the header of the file is read.

    Raises:
        RunError: the file is damaged.
    """
    with open_tensors(folder / WEIGHTS_FILE) as file:
        return {name for name in file.keys() if not name.endswith((_CODES, _SCALE, _ZERO_POINT))}  # noqa: SIM118 - same


def _tied_parameters(model: Any) -> set[str]:
    """Return the names of the parameters that are the embedding, if the configuration ties the head to it."""
    if not model.config.tie_word_embeddings:
        return set()
    embedding = model.get_input_embeddings().weight
    return {name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter is embedding}
