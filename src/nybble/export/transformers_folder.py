"""What the exports to folders in the format of transformers share: config.json, float16 weights, all other tensors.

Weights with codes of up to 4 bits are exact in float16, as they have at most 11 bits. Weights with 8-bit codes, such as
embedding and head, are rounded to float16: scale * (code - 128) has up to 14 bits.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nybble.errors import ExportError
from nybble.export.safetensors_writer import MODEL_FILE, read_metadata
from nybble.files import open_tensors, write_text
from nybble.models.checkpoint import QuantizedCheckpoint, transformers_model
from nybble.models.composite import auto_class
from nybble.quant.weight import pack_codes, unpack_codes

_QUANTIZED = "nybble.quantized"
"""Key in the header of model.safetensors: names of the modules that are quantized in the checkpoint."""

QUESTION, BEGINNING = '[{"role": "user", "content": "What is 4-bit quantization?"}]', '"The capital of France is"'
"""What cards ask a chat model, and what they let another model continue."""

INT8_TOLERANCE = 2.0**-11
"""Half the distance of neighbouring float16 numbers, relative to the larger one."""

FLOAT16_OVERFLOWS = frozenset({"gemma2", "gemma3", "gemma3_text", "glm4"})
"""Model types whose activations exceed the largest float16 number, 65504. vLLM refuses float16 for the same types."""


def check_code_in_transformers(config: Any, name: str) -> None:
    """Check that the model's code is part of transformers.

    Args:
        config: transformers configuration of the model.
        name: of the export format.

    Raises:
        ExportError: the code comes with the model.
    """
    if getattr(config, "auto_map", None):
        raise ExportError(
            f"an export to {name} needs a model whose code is in transformers; {config.model_type} comes with Python "
            f"code of its own; remove {name} from --export"
        )


def float16_limits(config: Any) -> tuple[str, ...]:
    """Say what to do where the activations of a model overflow in float16; see `Exporter.limits`."""
    if config.model_type not in FLOAT16_OVERFLOWS:
        return ()
    return (
        f"activations of {config.model_type} exceed the range of float16: compute in float32, as config.json of the "
        "export says, or in bfloat16, which rounds the weights of linear layers from 11 to 8 bits",
    )


def update_config(folder: Path, model: Any, fits_float16: bool = True, **fields: Any) -> None:
    """Set fields of config.json: the class of the model, which vLLM needs, and the dtype that loaders take from there.

    Args:
        folder: with config.json.
        model: transformers.PreTrainedModel; its weights are not read.
        fits_float16: whether the tensors may be loaded in float16.
        fields: name -> what JSON can hold.
    """
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    overflows = config.get("model_type") in FLOAT16_OVERFLOWS
    dtype = "float16" if fits_float16 and not overflows else "float32"
    config |= {"architectures": [type(model).__name__], "dtype": dtype} | fields
    write_text(path, json.dumps(config, indent=2) + "\n")


def codes_to_words(codes_MN: Tensor, bits: int) -> Tensor:
    """Pack codes into words, the first in the lowest bits: uint8 [M, N] -> int32 [M, N * bits / 32].

    Packed bytes are such words on little-endian machines. Codes of 3 bits cross words.
    """
    packed = pack_codes(codes_MN, bits).contiguous()
    return packed.flatten().view(torch.int32).view(len(codes_MN), -1)  # a row of one byte has any stride


def words_to_codes(words_MN: Tensor, bits: int) -> Tensor:
    """Unpack the result of `codes_to_words`: a 32-bit type [M, N * bits / 32] -> uint8 [M, N]."""
    packed = words_MN.contiguous().flatten().view(torch.uint8).view(len(words_MN), -1)
    return unpack_codes(packed, bits)


def metadata(checkpoint: QuantizedCheckpoint, name: str) -> dict[str, str]:
    """Return the texts for the header of model.safetensors.

    Args:
        checkpoint: the quantized model.
        name: of the export format.
    """
    return {"format": "pt", "nybble": name, _QUANTIZED: " ".join(checkpoint.shapes)}


def quantized_names(folder: Path) -> list[str]:
    """Names of the modules that are quantized in the model of which FOLDER is an export, as `metadata` noted them."""
    return read_metadata(folder).get(_QUANTIZED, "").split()


def tensor_names(folder: Path) -> set[str]:
    """Names of all tensors in FOLDER/model.safetensors."""
    with open_tensors(folder / MODEL_FILE) as file:
        return set(file.keys())


def load_with_transformers(folder: Path, strict: bool, state: dict[str, Tensor] | None = None) -> Any:
    """Load a folder as users of transformers do.

    Codes of one scheme are dequantized at once, not at the first call. transformers 5.23 does this in float16, which
    rounds what codes of 8 bits give, and would read codes of several schemes with the first of them: both are
    dequantized at the first call, the former only if `strict`.

    Args:
        folder: the export.
        strict: in float32, instead of the dtype in config.json.
        state: published name -> tensor, without codes, in place of those in the folder.

    Returns:
        A transformers.PreTrainedModel on the CPU, in evaluation mode.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    dtype = torch.float32 if strict else config.dtype
    if state is not None:
        del config.quantization_config
        kind = type(transformers_model(config, trust_remote_code=False))
        model = kind.from_pretrained(None, config=config, dtype=dtype, state_dict=state)
        return model.requires_grad_(False).eval()
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        bits = [group["weights"]["num_bits"] for group in quantization["config_groups"].values()]
        quantization["dequantize"] = len(bits) == 1 and not (strict and bits[0] == 8)
    model = auto_class(config).from_pretrained(folder, config=config, dtype=dtype)
    return model.requires_grad_(False).eval()
