"""Write a compressed-tensors folder (pack-quantized) for vLLM and transformers.

model.safetensors holds for every linear layer NAME with O rows, I columns and G groups per row

    NAME.weight_packed        int32 [O, I / 8]      eight codes a word, the first in the lowest bits
    NAME.weight_scale         float16 [O, G]
    NAME.weight_zero_point    int32 [O / 8, G]      eight rows a word, the first in the lowest bits; not if symmetric
    NAME.weight_shape         int64 [2]             O, I

for the embedding and the head `NAME.weight`, float16 [rows, I], rounded; and all other tensors under their own names in
their own dtype. Names are those of models on the hub (published.py). A head that is tied to the embedding is not
stored. `quantization_config` in config.json describes the linear layers, and names those that have no codes.

Refused (OptionError): widths other than 4 bits, and group sizes that vLLM's kernel for GPUs (Marlin) does not have.
Refused (ExportError): models that come with Python code of their own, models with Conv1D layers (GPT-2), and rows that
are no multiple of 8 in asymmetric schemes: vLLM splits zero points at words.

https://github.com/vllm-project/compressed-tensors
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nybble.errors import ExportError, OptionError
from nybble.export.base import Exporter
from nybble.export.published import (
    Location,
    Piece,
    PublishedTensor,
    float16_blocks,
    locate_modules,
    published_layout,
    rows_of,
    tensor_layout,
)
from nybble.export.safetensors_writer import (
    MODEL_FILE,
    SafetensorsWriter,
    TensorLayout,
    safetensors_writer,
    written_by,
)
from nybble.export.transformers_folder import (
    INT8_TOLERANCE,
    check_code_in_transformers,
    float16_limits,
    load_with_transformers,
    metadata,
    nibbles_to_words,
    quantized_names,
    read_tensor,
    tensor_names,
    update_config,
    words_to_nibbles,
)
from nybble.models.checkpoint import QuantizedCheckpoint, empty_model, transformers_model
from nybble.models.experts import find_stacks
from nybble.models.linearize import transposed_layers
from nybble.models.quantized_file import LazyMapping
from nybble.models.selection import LayerSelection
from nybble.quant.scheme import QuantScheme
from nybble.quant.weight import QuantizedWeight
from nybble.schema import read_json

# compressed_tensors and transformers are imported where they are used: they take seconds to import.

USAGE = """
```bash
pip install vllm
vllm serve .
```

transformers loads the folder too, with `pip install compressed-tensors`.
"""

_GROUP_SIZES = (32, 64, 128)
"""Of MARLIN_SUPPORTED_GROUP_SIZES in vLLM 0.32; its kernel for Hopper GPUs (Machete) has 64 and 128 only."""

_WORD = 8
"""4-bit codes in an int32."""

_PACKED, _SCALE, _ZERO_POINT, _SHAPE = ".weight_packed", ".weight_scale", ".weight_zero_point", ".weight_shape"


class VLLMExporter(Exporter):
    """Export to compressed-tensors."""

    name = "vllm"
    label = "vLLM (compressed-tensors)"
    model_file = MODEL_FILE
    weight_files = (MODEL_FILE,)
    modules = ("compressed_tensors",)
    extra = "vllm"
    library = "vllm"
    usage = USAGE
    tested_families = frozenset(
        {
            "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3",
            "mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "glm4_moe", "olmoe", "lfm2_moe",
            "qwen3_next", "ernie4_5_moe", "phimoe",
        }
    )  # fmt: skip
    int8_tolerance = INT8_TOLERANCE
    decodes = False  # transformers opens it

    def check(self, config: Any, selection: LayerSelection, scheme: QuantScheme) -> None:
        """Refuse schemes that vLLM has no kernel for, and models with code of their own; see `Exporter.check`.

        Raises:
            ExportError: the model comes with Python code of its own.
            OptionError: the codes do not have 4 bits, or the groups have another size than 32, 64 or 128.
        """
        check_code_in_transformers(config, self.name)
        if scheme.bits != 4:
            raise OptionError(f"an export to vLLM needs 4-bit codes; got {scheme}; remove {self.name} from --export")
        if scheme.group_size not in _GROUP_SIZES:
            raise OptionError(
                f"an export to vLLM needs a --group_size of {', '.join(map(str, _GROUP_SIZES))}; got "
                f"{scheme.group_size}; choose one of these, or remove {self.name} from --export"
            )

    def limits(self, config: Any) -> tuple[str, ...]:
        """Name the dtype for models that overflow in float16, and what mixtures need; see `Exporter.limits`."""
        if not find_stacks(transformers_model(config, trust_remote_code=False)):
            return float16_limits(config)
        return (
            *float16_limits(config),
            "experts with zero points run in vLLM since its change of May 2026 (#44025), on GPUs that its Marlin "
            "kernel supports; transformers 5.23 does not load them",
        )

    def write(self, checkpoint: QuantizedCheckpoint, folder: Path) -> None:
        """Write model.safetensors and config.json; see `Exporter.write`.

        Raises:
            ExportError: a layer has a number of rows that vLLM cannot split, or is a Conv1D in the model's own class.
        """
        model = empty_model(checkpoint.config, checkpoint.trust_remote_code)
        if transposed_layers(model):
            raise ExportError(
                f"an export to vLLM needs nn.Linear layers, which compressed-tensors packs; {type(model).__name__} has "
                f"Conv1D layers; remove {self.name} from --export"
            )
        int4, scheme = set(checkpoint.selection.int4), checkpoint.scheme
        tensors = published_layout(checkpoint.config, checkpoint.shapes)
        packed = {name: _single_piece(name, t) for name, t in tensors.items() if t.matrices[0][0].module in int4}
        layouts = {name: tensor_layout(checkpoint, t) for name, t in tensors.items() if name not in packed}
        dense = [name for name, layout in layouts.items() if len(layout.shape) == 2]
        for name, piece in packed.items():
            layouts |= _layer_layouts(_module(name), (len(piece), checkpoint.shapes[piece.module][1]), scheme)
        with safetensors_writer(folder / MODEL_FILE, layouts, metadata(checkpoint, self.name)) as writer:
            for name, tensor in tensors.items():
                if name in packed:
                    _write_layer(writer, _module(name), rows_of(checkpoint.quantized, packed[name]))
                else:
                    writer.write_blocks(name, float16_blocks(checkpoint, tensor))
        ignored = sorted({_name_of_head(model), *(_module(name) for name in dense if name.endswith(".weight"))})
        update_config(folder, model, quantization_config=_quantization_config(scheme, ignored))

    def recognizes(self, folder: Path) -> bool:
        """Return whether nybble wrote the folder in this format; other models have files of the same names."""
        return written_by(folder) == self.name

    def open_model(self, folder: Path, config: Any, strict: bool = False) -> Any:
        """Load the folder with transformers, which dequantizes the weights; see `Exporter.open_model`.

        Args:
            folder: the export.
            config: transformers configuration of the model.
            strict: compute in float32, instead of the dtype in config.json.

        Returns:
            A transformers.PreTrainedModel on the CPU. vLLM computes with the codes; it is not used here.
        """
        if not find_stacks(transformers_model(config, trust_remote_code=False)):
            return load_with_transformers(folder, strict)
        # transformers 5.23 forgets the zero points of experts when it stacks them.
        state = {f"{name}.weight": _decompress(folder, name) for name in _packed_modules(folder)}
        state |= {name: read_tensor(folder, name) for name in tensor_names(folder) if not _belongs_to_codes(name)}
        return load_with_transformers(folder, strict, state)

    def read_codes(self, folder: Path) -> Mapping[str, QuantizedWeight]:
        """Read the codes of the linear layers; see `Exporter.read_codes`."""
        settings = _read_settings(folder)["weights"]
        scheme = QuantScheme(4, settings["group_size"], settings["symmetric"])
        dense, locations = _dense_modules(folder), locate_modules(folder)
        names = [name for name in quantized_names(folder) if _module(locations[name][0].tensor) not in dense]
        return LazyMapping(names, lambda name: _read_module(folder, locations[name], scheme))

    def read_weights(self, folder: Path) -> Mapping[str, Tensor]:
        """Read the weights with compressed-tensors' own decompression, in float32; see `Exporter.read_weights`."""
        dense, locations = _dense_modules(folder), locate_modules(folder)

        def read(name: str) -> Tensor:
            if _module(locations[name][0].tensor) in dense:
                return read_tensor(folder, locations[name][0].tensor).float()
            parts = [_decompress(folder, _module(location.tensor)) for location in locations[name]]
            return _in_memory(parts, locations[name])

        return LazyMapping(quantized_names(folder), read)


def _module(name: str) -> str:
    """Published name of the module of a weight."""
    return name.removesuffix(".weight")


def _single_piece(name: str, tensor: PublishedTensor) -> Piece:
    """The rows of a published tensor that holds a matrix of one layer. ExportError for others."""
    if tensor.is_stack or tensor.transposed or len(tensor.matrices[0]) > 1:
        raise ExportError(
            f"an export to vLLM needs models that are published with one matrix for each layer and expert; {name} "
            "holds several; remove vllm from --export"
        )
    return tensor.matrices[0][0]


def _in_memory(parts: Sequence[Tensor], locations: Sequence[Location]) -> Tensor:
    """Put the rows of published layers [rows, ...] where they are in memory [O, ...]."""
    whole = parts[0].new_empty(sum(map(len, parts)), *parts[0].shape[1:])
    for part, location in zip(parts, locations, strict=True):
        whole[location.piece.rows] = part
    return whole


def _read_module(folder: Path, locations: Sequence[Location], scheme: QuantScheme) -> QuantizedWeight:
    """Read the published layers that make a layer in memory."""
    layers = [_read_layer(folder, _module(location.tensor), scheme) for location in locations]
    codes_OI, scale_OG, zero_point_OG = (
        _in_memory([getattr(layer, leaf) for layer in layers], locations)
        for leaf in ("codes_OI", "scale_OG", "zero_point_OG")
    )
    return QuantizedWeight(codes_OI, scale_OG, zero_point_OG, scheme)


def _layer_layouts(name: str, shape: tuple[int, int], scheme: QuantScheme) -> dict[str, TensorLayout]:
    """Layouts of the tensors of a linear layer. ExportError for rows that vLLM cannot split."""
    rows, columns = shape
    if rows % _WORD and not scheme.symmetric:
        raise ExportError(
            f"an export to vLLM needs rows in multiples of {_WORD} for packed zero points; {name} has {rows}; remove "
            "vllm from --export"
        )
    groups = scheme.num_groups(columns)
    layouts = {
        name + _PACKED: TensorLayout(torch.int32, (rows, columns // _WORD)),
        name + _SCALE: TensorLayout(torch.float16, (rows, groups)),
        name + _SHAPE: TensorLayout(torch.int64, (2,)),
    }
    if not scheme.symmetric:
        layouts[name + _ZERO_POINT] = TensorLayout(torch.int32, (rows // _WORD, groups))
    return layouts


def _write_layer(writer: SafetensorsWriter, name: str, weight: QuantizedWeight) -> None:
    """Write the tensors of a linear layer."""
    writer.write(name + _PACKED, nibbles_to_words(weight.codes_OI))
    writer.write(name + _SCALE, weight.scale_OG.half())
    writer.write(name + _SHAPE, torch.tensor(weight.codes_OI.shape))
    if not weight.scheme.symmetric:
        writer.write(name + _ZERO_POINT, nibbles_to_words(weight.zero_point_OG.T).T)


def _read_layer(folder: Path, name: str, scheme: QuantScheme) -> QuantizedWeight:
    """Read the tensors of a linear layer; the inverse of `_write_layer`."""
    scale_OG = read_tensor(folder, name + _SCALE).float()
    zero_point_OG = torch.full_like(scale_OG, scheme.middle_code, dtype=torch.uint8)
    if not scheme.symmetric:
        zero_point_OG = words_to_nibbles(read_tensor(folder, name + _ZERO_POINT).T).T.contiguous()
    codes_OI = words_to_nibbles(read_tensor(folder, name + _PACKED))
    return QuantizedWeight(codes_OI, scale_OG, zero_point_OG, scheme)


def _decompress(folder: Path, name: str) -> Tensor:
    """Read the weight of a linear layer as compressed-tensors dequantizes it, float32 [O, I]."""
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationScheme

    scheme = QuantizationScheme.model_validate(_read_settings(folder))
    leaves = PackedQuantizationCompressor.compression_param_names(scheme)
    state = {leaf: read_tensor(folder, f"{name}.{leaf}") for leaf in leaves}
    state["weight_scale"] = state["weight_scale"].float()
    return PackedQuantizationCompressor.decompress(state, scheme)["weight"]  # type: ignore[no-any-return]


def _belongs_to_codes(name: str) -> bool:
    """Whether a tensor is one of those that make a linear layer."""
    return name.endswith((_PACKED, _SCALE, _ZERO_POINT, _SHAPE))


def _packed_modules(folder: Path) -> list[str]:
    """Published names of all modules with codes."""
    return [name.removesuffix(_PACKED) for name in tensor_names(folder) if name.endswith(_PACKED)]


def _dense_modules(folder: Path) -> set[str]:
    """Names of all modules with a plain weight. Of those that the checkpoint quantizes: embedding and head."""
    return {name.removesuffix(".weight") for name in tensor_names(folder) if name.endswith(".weight")}


def _name_of_head(model: Any) -> str:
    """Name of the module that is the head, which the model has also where it is tied to the embedding."""
    head = model.get_output_embeddings()
    return str(next(name for name, module in model.named_modules() if module is head))


def _quantization_config(scheme: QuantScheme, ignored: Sequence[str]) -> dict[str, Any]:
    """Entry of config.json by which readers find the layers with codes: every linear layer that is not ignored."""
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "group",
        "group_size": scheme.group_size,
        "dynamic": False,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": list(ignored),
    }


def _read_settings(folder: Path) -> dict[str, Any]:
    """The scheme of the linear layers, as compressed-tensors describes it."""
    config = read_json(folder / "config.json")
    return config["quantization_config"]["config_groups"]["group_0"]  # type: ignore[no-any-return]
