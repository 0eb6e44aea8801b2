"""The quantized model on disk: the folder quantized/ of a run.

The folder is complete in itself: weights.safetensors, config.json, generation_config.json, the files of the tokenizer,
and Python code that came with the model. positions.safetensors is for further training alone (positions_file.py).

quantized_file.py describes weights.safetensors, and checks it when it is read. Here it is checked against the model in
config.json.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nybble.errors import RunError, first_line
from nybble.files import atomic_folder
from nybble.models.companions import GENERATION_CONFIG, copy_companions, load_generation_config
from nybble.models.composite import auto_class, text_config
from nybble.models.dtypes import kept_dtype
from nybble.models.layers_on_disk import layers_on_disk, read_tensor
from nybble.models.linearize import linearize
from nybble.models.loading import LoadedModel
from nybble.models.positions_file import save_positions
from nybble.models.pretrained import empty_model, on_disk
from nybble.models.quantized_file import REMEDY, LazyMapping, WeightsLayout, open_weights, read_layout, save_weights
from nybble.models.shards import find_blocks
from nybble.models.tensor_writer import TensorLayout
from nybble.quant.weight import QuantizedWeight
from nybble.runtime import hand_back_freed_memory, returning_freed_memory

CONFIG = "config.json"


class QuantizedModel(NamedTuple):
    """A quantized model as loaded from its folder.

    Attributes:
        model: transformers.PreTrainedModel with dequantized weights, on the CPU, in evaluation mode, frozen.
        tokenizer: transformers.PreTrainedTokenizerBase.
        quantized: module name -> quantized weight, read at each access.
    """

    model: Any
    tokenizer: Any
    quantized: Mapping[str, QuantizedWeight]


def unquantized_tensors(model: Any, names: Iterable[str]) -> Mapping[str, Tensor]:
    """Return all tensors of a model except the weights of some modules.

    Args:
        model: transformers.PreTrainedModel.
        names: modules whose weights are quantized.

    Returns:
        Name in the state dict -> tensor, shared with the model, but with no other tensor. A head that is tied to the
        embedding is left out. Tensors of blocks on disk are read at each access.
    """
    state = {name: tensor for name, tensor in model.state_dict().items() if tensor.device.type != "meta"}
    weights = {f"{name}.weight" for name in names}
    quantized = {state[name].data_ptr() for name in weights & state.keys()}
    embedding = model.get_input_embeddings().weight.data_ptr()
    tied = [name for name, tensor in state.items() if tensor.data_ptr() == embedding][1:]
    kept = {n: tensor for n, tensor in state.items() if tensor.data_ptr() not in quantized and n not in tied}
    first = {tensor.data_ptr(): name for name, tensor in reversed(kept.items()) if tensor.numel()}
    # A file holds no tensor twice under two names: a bias that a head shares with the module around it is copied.
    found = {
        name: tensor if first.get(tensor.data_ptr(), name) == name else tensor.clone() for name, tensor in kept.items()
    }
    layers = layers_on_disk(model)
    if layers is None:
        return found
    everything = model.state_dict()
    kept_names = [*found, *(name for name in everything if name not in state and name not in weights)]
    layouts = {name: TensorLayout.of(everything[name]) for name in kept_names}
    return LazyMapping(kept_names, lambda name: found[name] if name in found else read_tensor(layers, name), layouts)


def save_quantized(
    folder: Path,
    loaded: LoadedModel,
    quantized: Mapping[str, QuantizedWeight],
    positions: Mapping[str, Tensor] = MappingProxyType({}),
    release: bool = False,
) -> None:
    """Write a quantized model atomically. An earlier folder of the same name is replaced.

    Args:
        folder: where to write.
        loaded: the model, of which the weights of quantized modules are not read, and its tokenizer and files.
        quantized: module name -> quantized weight.
        positions: of the linear layers, see positions_file.py; empty = none are written.
        release: free the memory of the model first; it is then on the meta device.

    Raises:
        RunError: the disk is full.
    """
    from transformers.dynamic_module_utils import custom_object_save

    model = loaded.model
    others = unquantized_tensors(model, quantized)
    if release:
        model.to("meta")
        hand_back_freed_memory()
    with atomic_folder(folder) as temporary:
        save_weights(temporary, quantized, others)
        if positions:
            save_positions(temporary, positions)
        if model._auto_class is not None:  # the model came with Python code
            custom_object_save(model, temporary, config=model.config)
        model.config.save_pretrained(temporary)
        if not any(file.name == GENERATION_CONFIG for file in loaded.files) and model.generation_config is not None:
            model.generation_config.save_pretrained(temporary)
        loaded.tokenizer.save_pretrained(temporary)
        copy_companions(loaded.files, temporary)


def load_quantized(folder: Path, dtype: torch.dtype, trust_remote_code: bool = False) -> QuantizedModel:
    """Load a quantized model as a transformers model that computes with the dequantized weights.

    Args:
        folder: what `save_quantized` wrote.
        dtype: of all parameters but those that transformers keeps in float32.
        trust_remote_code: whether to run Python code that comes with the model.

    Returns:
        The model, its tokenizer and its quantized weights.

    Raises:
        RunError: the files are damaged or do not fit each other, nybble did not write them, or the model needs Python
            code that is not trusted.
    """
    from transformers.initialization import no_init_weights

    config, layout = load_config(folder, trust_remote_code), read_layout(folder)
    skeleton = check_layout(folder, config, layout, trust_remote_code)
    quantized, others = open_weights(folder)
    with returning_freed_memory():
        state = {name: _cast(skeleton, name, tensor, dtype) for name, tensor in others.items()}
        for name, weight in quantized.items():
            state[f"{name}.weight"] = _cast(skeleton, f"{name}.weight", weight.dequantize(), dtype)
    with explaining(folder / CONFIG, "the configuration of a model"), no_init_weights():  # all weights are loaded
        model = auto_class(config).from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    linearize(model).tie_weights()
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    with explaining(folder / GENERATION_CONFIG, "generation settings"):
        load_generation_config(folder, model)
    tokenizer = load_tokenizer(folder, trust_remote_code)
    return QuantizedModel(model.requires_grad_(False).eval(), tokenizer, quantized)


def _cast(model: Any, name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor of a weights file as the model has it."""
    return tensor.to(kept_dtype(model, name, dtype)) if tensor.is_floating_point() else tensor


def load_quantized_on_disk(
    folder: Path, dtype: torch.dtype, device: torch.device, trust_remote_code: bool = False
) -> QuantizedModel:
    """As `load_quantized`, but the decoder blocks stay on the disk (layers_on_disk.py).

    Args:
        folder, dtype, trust_remote_code: see `load_quantized`.
        device: where the model computes.
    """
    config, layout = load_config(folder, trust_remote_code), read_layout(folder)
    check_layout(folder, config, layout, trust_remote_code)
    quantized, others = open_weights(folder)

    def read(name: str) -> Tensor:
        module = name.removesuffix(".weight")
        tensor = quantized[module].dequantize() if module in quantized else others[name]
        return _cast(model, name, tensor, dtype)

    with explaining(folder / CONFIG, "the configuration of a model"):
        model = linearize(empty_model(config, dtype, trust_remote_code))
    model.tie_weights()
    path = find_blocks(model)
    assert path is not None, "a model whose blocks were compressed one by one has a list of blocks"
    names = [*others, *(f"{name}.weight" for name in quantized)]
    in_blocks: dict[str, list[str]] = {}
    for name in names:
        prefix = path + "." + name.removeprefix(f"{path}.").partition(".")[0] + "."
        in_blocks.setdefault(prefix if name.startswith(f"{path}.") else "", []).append(name)
    model.load_state_dict({name: read(name) for name in in_blocks.get("", [])}, strict=False, assign=True)
    model.tie_weights()
    with explaining(folder / GENERATION_CONFIG, "generation settings"):
        load_generation_config(folder, model)

    def read_block(i: int) -> dict[str, Tensor]:
        prefix = f"{path}.{i}."
        return {name.removeprefix(prefix): read(name).to(device) for name in in_blocks[prefix]}

    model = on_disk(model.requires_grad_(False).eval(), path, read_block, device)
    return QuantizedModel(model, load_tokenizer(folder, trust_remote_code), quantized)


def check_layout(folder: Path, config: Any, layout: WeightsLayout, trust_remote_code: bool) -> Any:
    """Check that the tensors of a weights file fit a configuration, before memory is used for either.

    Args:
        folder: of both, for error messages.
        config: transformers configuration.
        layout: header of the weights file.
        trust_remote_code: whether to run Python code that comes with the model.

    Returns:
        The model, a transformers.PreTrainedModel on the meta device.

    Raises:
        RunError: names, shapes or kinds of numbers differ, or the configuration is impossible.
    """
    from transformers.initialization import no_init_weights

    shapes = layout.others | {f"{name}.weight": layer.shape for name, layer in layout.quantized.items()}
    layers = getattr(text_config(config), "num_hidden_layers", 0)
    if isinstance(layers, int) and layers > len(shapes):  # they would be built before a tensor is missed
        wrong = f"it has {len(shapes)} tensors for {layers} layers"
        raise RunError(f"{folder} must hold the tensors of the model in its {CONFIG}; {wrong}; {REMEDY}")
    with explaining(folder / CONFIG, "the configuration of a model"), no_init_weights(), torch.device("meta"):
        model = auto_class(config).from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
    linearize(model).tie_weights()
    state = {
        name: torch.empty(shape, dtype=torch.int64 if name in layout.integers else torch.float32, device="meta")
        for name, shape in shapes.items()
    }
    if wrong := _differing(model, state):
        raise RunError(f"{folder} must hold the tensors of the model in its {CONFIG}; {wrong}; {REMEDY}")
    return model


def _differing(model: Any, state: Mapping[str, Tensor]) -> str:
    """How the tensors of a file differ from those of the model, in a few words; "" if they do not."""
    own = model.state_dict()
    absent, unknown = sorted(own.keys() - state.keys() - _tied_parameters(model)), sorted(state.keys() - own.keys())
    if absent or unknown:
        return f"missing: {', '.join(absent[:3]) or 'none'}, unknown: {', '.join(unknown[:3]) or 'none'}"
    for name, tensor in state.items():
        if tensor.shape != own[name].shape or tensor.is_floating_point() != own[name].is_floating_point():
            wanted, found = (f"{t.dtype} {list(t.shape)}".removeprefix("torch.") for t in (own[name], tensor))
            return f"{name} must be {wanted}; it is {found}"
    return ""


@contextmanager
def explaining(file: Path, what: str) -> Iterator[None]:
    """Turn what transformers raises about a file that it reads in the block into a RunError that names the file."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # transformers raises whatever a wrong value leads to
        if "trust_remote_code" in str(error):
            raise RunError(
                f"{file.parent} needs Python code that comes with the model; if you trust it, add --trust_remote_code"
            ) from error
        raise RunError(
            f"{file} must hold {what}; it cannot be used ({type(error).__name__}: {first_line(error)}); bring it back "
            "from the model, or let the run make the folder again (--resume)"
        ) from error


def load_tokenizer(folder: Path, trust_remote_code: bool) -> Any:
    """Load the tokenizer of a model that nybble wrote: quantized/ or an export.

    Args:
        folder: with the files of the tokenizer.
        trust_remote_code: whether to run Python code that comes with the model.

    Returns:
        A transformers.PreTrainedTokenizerBase.

    Raises:
        RunError: a file is missing or damaged.
    """
    from transformers import AutoTokenizer

    settings = folder / "tokenizer_config.json"
    with explaining(settings, "the settings of a tokenizer, with the tokenizer.json or the vocabulary that they name"):
        if not settings.is_file():  # transformers would take a tokenizer without begin and end tokens
            raise FileNotFoundError("there is no such file")
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)


def load_config(folder: Path, trust_remote_code: bool) -> Any:
    """Load the configuration of a model that nybble wrote: quantized/ or an export.

    Args:
        folder: with config.json.
        trust_remote_code: whether to run Python code that comes with the model.

    Returns:
        A transformers.PreTrainedConfig.

    Raises:
        RunError: config.json is missing or damaged, or the model needs Python code that is not trusted.
    """
    from transformers import AutoConfig

    with explaining(folder / CONFIG, "the configuration of a model"):
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)


def _tied_parameters(model: Any) -> set[str]:
    """Return the names of the parameters that are the embedding, if the configuration ties the head to it."""
    if not getattr(model.config, "tie_word_embeddings", False):
        return set()
    embedding = model.get_input_embeddings().weight
    return {name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter is embedding}
