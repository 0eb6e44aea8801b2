"""Read a model as transformers does, whole or without its decoder blocks, or its tokenizer; explain what fails."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nybble.errors import ModelError, NybbleError, first_line
from nybble.models.composite import auto_class, text_config
from nybble.models.configuration import check_config, explain_folder
from nybble.models.layers_on_disk import LayersOnDisk
from nybble.models.linearize import linearize
from nybble.models.shards import CheckpointShards, find_blocks, safetensors_files
from nybble.models.weights import check_complete

_UNREACHABLE = ("connect", "offline", "cached files", "local cache", "timed out", "max retries", "resolve", "network")
"""Words in the errors of transformers and huggingface_hub when the hub does not answer, in lower case."""


def load_whole(pretrained: str, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    """Load a folder or a hub id.

    Args:
        pretrained: folder or hub id.
        dtype: of all parameters.
        trust_remote_code: whether to run Python code that comes with the model.

    Returns:
        The model, on the CPU.

    Raises:
        ModelError: it cannot be read, or is none that nybble can use.
    """
    with _library_errors(lambda error: _explain_failure(pretrained, error)):
        config = read_config(pretrained, trust_remote_code)
        loaded: Any = auto_class(config).from_pretrained(
            pretrained, dtype=dtype, output_loading_info=True, trust_remote_code=trust_remote_code
        )
    model, info = loaded
    has_parts = type(config) is not type(model.config)
    check_complete(model, info["missing_keys"], info["unexpected_keys"], pretrained, has_parts)
    return model


def load_without_blocks(pretrained: str, dtype: torch.dtype, device: torch.device, trust_remote_code: bool) -> Any:
    """Load a folder or a hub id, but leave its decoder blocks on the disk (LayersOnDisk).

    Args:
        pretrained, dtype, trust_remote_code: see `load_whole`.
        device: where the model computes.

    Returns:
        The model, linearized and in evaluation mode.

    Raises:
        ModelError: as `load_whole`; or the model has no list of decoder blocks, or no safetensors files.
    """
    with _library_errors(lambda error: _explain_failure(pretrained, error)):
        config = read_config(pretrained, trust_remote_code)
        files = safetensors_files(pretrained)
        model, skeleton = (empty_model(config, dtype, trust_remote_code) for _ in range(2))
        path = find_blocks(skeleton)
        if path is None:
            raise ModelError(
                f"--offload disk needs decoder blocks in an nn.ModuleList; {type(model).__name__} has none; use "
                "--offload none"
            )
        # As from_pretrained does it: buffers that are made while `dtype` is the default one are less precise (GPT-J).
        model.initialize_weights()
        shards = CheckpointShards(files, skeleton, path, dtype, device)
        missing, unused = shards.compare()
    check_complete(model, missing, unused, pretrained, parts=type(config) is not type(model.config))
    with _library_errors(lambda error: _explain_failure(pretrained, error)):
        shards.load_rest(model)
    return on_disk(model.eval(), path, shards.read_block, device)


def empty_model(config: Any, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    """Build a model as transformers has it, with parameters that have no memory. Buffers are real: they follow from the
    configuration.

    Args:
        config: transformers.PreTrainedConfig; it is not changed.
        dtype: of the parameters.
        trust_remote_code: whether to run Python code that comes with the model.
    """
    from accelerate import init_empty_weights
    from transformers.initialization import no_init_weights

    with no_init_weights(), init_empty_weights(include_buffers=False):
        return auto_class(config).from_config(copy.deepcopy(config), dtype=dtype, trust_remote_code=trust_remote_code)


def on_disk(model: Any, path: str, read: Callable[[int], Mapping[str, Tensor]], device: torch.device) -> Any:
    """Linearize a model whose decoder blocks are empty, move all else to the device, and let the blocks be read.

    Args:
        model: transformers.PreTrainedModel; the parameters of its blocks are on the meta device.
        path: of the list of its decoder blocks.
        read: see LayersOnDisk.
        device: where the model computes.
    """
    linearize(model)
    for _, parameter in model.named_parameters():
        if parameter.device.type != "meta":
            parameter.data = parameter.data.to(device)
    for _, buffer in model.named_buffers():
        buffer.data = buffer.data.to(device)
    LayersOnDisk(model, path, read)
    return model


def read_config(pretrained: str, trust_remote_code: bool) -> Any:
    """Read and check the configuration of a folder or a hub id; returns a transformers.PreTrainedConfig.

    Raises:
        ModelError: it is not that of a decoder-only language model in 16 or 32 bits.
        Exception: whatever transformers raises.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(pretrained, trust_remote_code=trust_remote_code)
    check_config(Path(pretrained) if Path(pretrained).is_dir() else None, config)
    _check_architecture(pretrained, config)
    return config


def load_tokenizer(pretrained: str, trust_remote_code: bool) -> Any:
    """Load the tokenizer of a folder or a hub id, whose configuration is read and checked first.

    Raises:
        ModelError: there is none that can be read, or the model is none that nybble can use.
    """
    from transformers import AutoTokenizer

    with _library_errors(lambda error: _explain_failure(pretrained, error)):
        read_config(pretrained, trust_remote_code)
    with _library_errors(lambda error: _explain_tokenizer(pretrained, error)):
        return AutoTokenizer.from_pretrained(pretrained, trust_remote_code=trust_remote_code)


@contextmanager
def _library_errors(explain: Callable[[Exception], str]) -> Iterator[None]:
    """Turn what transformers raises while it reads a model into a ModelError.

    Whatever it is, the files are the cause: transformers has no common class for them.

    Args:
        explain: returns the message for the user.
    """
    try:
        yield
    except (NybbleError, torch.OutOfMemoryError):  # the command line has a message for memory
        raise
    except Exception as error:
        raise ModelError(explain(error)) from error


def _check_architecture(pretrained: str, config: Any) -> None:
    """Raise ModelError unless a configuration is that of a decoder-only language model in 16 or 32 bits."""
    from transformers import AutoModelForMultimodalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    architectures = getattr(config, "architectures", None) or []
    parts = (config, text_config(config))
    encoder = any(getattr(part, "is_encoder_decoder", False) for part in parts)
    encoder = encoder or any("MaskedLM" in name for name in architectures)
    has_own_code = bool(getattr(config, "auto_map", None))
    is_known = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or has_own_code
    is_known = is_known or auto_class(config) is AutoModelForMultimodalLM
    if not encoder and not is_known and any(name.endswith("ForCausalLM") for name in architectures):
        raise ModelError(
            f"{pretrained} must be of a model type that AutoModelForCausalLM of transformers loads; "
            f"{config.model_type} ({', '.join(architectures)}) is none; choose another model"
        )
    if encoder or not is_known:
        raise ModelError(
            f"{pretrained} must be a causal (decoder-only) language model; "
            f"it is {', '.join(architectures) or config.model_type}; choose a model whose class ends with ForCausalLM"
        )
    quantization = getattr(config, "quantization_config", None)
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise ModelError(
            f"{pretrained} must be a 16-bit model; it is already quantized by {method or 'an unnamed method'}; "
            "name the model from which it was made"
        )


def _explain_tokenizer(pretrained: str, error: Exception) -> str:
    """Return the message for an error of transformers while it loads a tokenizer."""
    if "trust_remote_code" in str(error):
        return _explain_failure(pretrained, error)
    folder = Path(pretrained)
    if folder.is_dir() and not (folder / "tokenizer.json").is_file():
        reason = "there is none, and the other files cannot be converted"
    else:
        reason = _one_line(error)
    return (
        f"the tokenizer of {pretrained} must be a tokenizer.json that transformers can read; {reason}; "
        "copy tokenizer.json and tokenizer_config.json of the original model into the folder"
    )


def _one_line(error: Exception) -> str:
    """Return what a library said, with the kind of its error where the text alone says nothing."""
    if isinstance(error, OSError | ValueError | RuntimeError | ImportError):
        return first_line(error)
    text = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {text}" if isinstance(error, LookupError | TypeError | ArithmeticError) else text


def _explain_failure(pretrained: str, error: Exception) -> str:
    """Return the message for an error of transformers: what went wrong and what to do."""
    text = str(error)
    if "trust_remote_code" in text:
        return f"{pretrained} needs Python code that comes with the model; if you trust it, add --trust_remote_code"
    reason = f"--pretrained {pretrained} cannot be loaded: {_one_line(error)}"
    if Path(pretrained).is_dir():
        return explain_folder(Path(pretrained), _one_line(error)) or reason
    if "not a valid model identifier" in text or "404" in text or "gated" in text:
        return (
            f"--pretrained {pretrained} must be a model on the hub to which you have access; there is none; "
            "check the spelling, or log in with: hf auth login"
        )
    if "Unrecognized model" in text or "does not recognize this architecture" in text:
        return f"--pretrained {pretrained} has an architecture that transformers does not know; {first_line(error)}"
    if any(word in text.lower() for word in _UNREACHABLE):
        return (
            f"--pretrained {pretrained} is not on this machine and the Hugging Face hub cannot be reached; "
            "name a local model folder, a .gguf file, or the built-in smollm2"
        )
    return reason
