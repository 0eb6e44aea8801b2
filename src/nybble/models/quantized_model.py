"""The quantized model on disk: the folder quantized/ of a run.

The folder is complete in itself: weights.safetensors, config.json, generation_config.json, the files of the tokenizer,
and Python code that came with the model.

weights.safetensors holds, for every quantized module NAME:

    NAME.weight.codes         uint8: [O, I / 2] with two 4-bit codes per byte (weight.py), or [O, I] with 8-bit codes
    NAME.weight.scale         float16 [O, G]
    NAME.weight.zero_point    uint8 [O, G]

and all other tensors of the model under their own names and in their own dtype. The note in the header of the file
holds the format ("nybble-2") and the QuantScheme of every NAME. A head that is tied to the embedding is not stored.

Everything is checked when it is read, because others than nybble may have changed it: names, dtypes and shapes against
the note, zero points and scales against their grid, and all of it against the model in config.json.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nybble.errors import RunError, first_line
from nybble.files import atomic_folder, load_tensors, note_of, open_tensors, save_tensors
from nybble.models.companions import GENERATION_CONFIG, copy_companions, load_generation_config
from nybble.models.loading import LoadedModel
from nybble.quant.grid import round_scale
from nybble.quant.scheme import QuantScheme
from nybble.quant.weight import QuantizedWeight, pack_nibbles, unpack_nibbles
from nybble.schema import SchemaError, from_json

WEIGHTS_FILE, WEIGHTS_FORMAT, CONFIG = "weights.safetensors", "nybble-2", "config.json"

_CODES, _SCALE, _ZERO_POINT = ".weight.codes", ".weight.scale", ".weight.zero_point"
_REMEDY = "delete the folder and let the run make it again (--resume)"


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
    file = folder / WEIGHTS_FILE
    layout = read_layout(folder)
    tensors, _ = load_tensors(file)
    quantized = {}
    for name, layer in layout.quantized.items():
        codes, scale_OG, zero_point_OG = (tensors.pop(name + leaf) for leaf in (_CODES, _SCALE, _ZERO_POINT))
        codes_OI = unpack_nibbles(codes) if layer.scheme.bits == 4 else codes
        weight = QuantizedWeight(codes_OI, scale_OG.float(), zero_point_OG, layer.scheme)
        if wrong := _off_grid(weight):
            raise RunError(f"{file} must hold weights as nybble writes them; in {name} {wrong}; {_REMEDY}")
        quantized[name] = weight
    return quantized, tensors


class LayerLayout(NamedTuple):
    """A quantized layer as the header of the weights file describes it.

    Attributes:
        shape: (O, I).
        scheme: bits, group size and symmetry.
    """

    shape: tuple[int, int]
    scheme: QuantScheme


class WeightsLayout(NamedTuple):
    """What is in a weights file.

    Attributes:
        quantized: module name -> its layout.
        others: name of every other tensor -> its shape.
    """

    quantized: dict[str, LayerLayout]
    others: dict[str, tuple[int, ...]]


def read_layout(folder: Path) -> WeightsLayout:
    """Read the header of the weights file, and check that every quantized module has tensors that fit its scheme.

    Raises:
        RunError: the file is damaged, or nybble did not write it.
    """
    file = folder / WEIGHTS_FILE
    with open_tensors(file) as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - not a dict, not iterable
        headers = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
        note = note_of(opened)
    if note.get("format") != WEIGHTS_FORMAT:
        raise RunError(
            f"{file} must be a 4-bit model that nybble wrote ({WEIGHTS_FORMAT}); it is something else; name a folder "
            "quantized/ that this version of nybble wrote"
        )
    try:
        schemes = from_json(dict[str, QuantScheme], note.get("schemes"), "schemes.")
        quantized = {name: LayerLayout(_layer_shape(name, scheme, headers), scheme) for name, scheme in schemes.items()}
        if left := [name for name in headers if name.endswith((_CODES, _SCALE, _ZERO_POINT))]:
            raise SchemaError(f"{left[0]} has no scheme")
    except SchemaError as error:
        raise RunError(f"{file} must hold weights as nybble writes them; {error}; {_REMEDY}") from error
    return WeightsLayout(quantized, {name: shape for name, (_, shape) in headers.items()})


def _layer_shape(name: str, scheme: QuantScheme, headers: dict[str, tuple[str, tuple[int, ...]]]) -> tuple[int, int]:
    """Take the three tensors of a module out of the headers; returns its shape. SchemaError if they do not fit."""
    group_size = scheme.group_size
    if scheme.bits not in (4, 8) or (group_size is not None and group_size <= 0):
        raise SchemaError(f"schemes.{name} must have 4 or 8 bits and a group size above 0; it is {scheme}")
    for leaf, dtype in ((_CODES, "U8"), (_SCALE, "F16"), (_ZERO_POINT, "U8")):
        found, shape = headers.get(name + leaf, ("missing", ()))
        if found != dtype or len(shape) != 2:
            raise SchemaError(f"{name}{leaf} must be {dtype} with two dimensions; it is {found} {list(shape)}")
    (rows, columns), scales, zero_points = (headers.pop(name + leaf)[1] for leaf in (_CODES, _SCALE, _ZERO_POINT))
    width = columns * (8 // scheme.bits)
    if (
        not rows * width
        or width % (group_size or 1)
        or scales != (rows, scheme.num_groups(width))
        or zero_points != scales
    ):
        raise SchemaError(
            f"{name} must have a scale and a zero point for every group; codes are [{rows}, {width}], scales "
            f"{list(scales)}, zero points {list(zero_points)}, {scheme}"
        )
    return rows, width


def _off_grid(weight: QuantizedWeight) -> str:
    """What is wrong with scales and zero points; "" if nothing is. Codes of 4 bits cannot be wrong: they are packed."""
    scheme, zero_point_OG = weight.scheme, weight.zero_point_OG
    if not torch.equal(round_scale(weight.scale_OG), weight.scale_OG):
        return "a scale is not on the grid of scales (7 significant bits, finite, above 0)"
    if int(zero_point_OG.amax()) > scheme.max_code:
        return f"a zero point is above {scheme.max_code}"
    if scheme.symmetric and bool((zero_point_OG != scheme.middle_code).any()):
        return f"a zero point is not {scheme.middle_code}, as the symmetric scheme has it"
    return ""


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
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    config = load_config(folder, trust_remote_code)
    quantized, others = load_weights(folder)
    state = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in others.items()}
    state |= {f"{name}.weight": weight.dequantize().to(dtype) for name, weight in quantized.items()}
    with _explaining(folder / CONFIG, "the configuration of a model"), no_init_weights():  # all weights are loaded
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    model.tie_weights()
    if wrong := _differing(model, state):
        raise RunError(f"{folder} must hold the tensors of the model in its {CONFIG}; {wrong}; {_REMEDY}")
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    with _explaining(folder / GENERATION_CONFIG, "generation settings"):
        load_generation_config(folder, model)
    tokenizer = load_tokenizer(folder, trust_remote_code)
    return QuantizedModel(model.requires_grad_(False).eval(), tokenizer, quantized)


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
def _explaining(file: Path, what: str) -> Iterator[None]:
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
    with _explaining(settings, "the settings of a tokenizer, with the tokenizer.json or the vocabulary that they name"):
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

    with _explaining(folder / CONFIG, "the configuration of a model"):
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)


def weights_fingerprint(folder: Path) -> str:
    """Return 16 hexadecimal digits of the SHA-256 of the weights file."""
    with (folder / WEIGHTS_FILE).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def _tied_parameters(model: Any) -> set[str]:
    """Return the names of the parameters that are the embedding, if the configuration ties the head to it."""
    if not model.config.tie_word_embeddings:
        return set()
    embedding = model.get_input_embeddings().weight
    return {name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter is embedding}
