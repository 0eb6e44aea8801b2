"""Write a compressed-tensors folder (pack-quantized) for vLLM and transformers.

model.safetensors holds for every linear layer NAME with O rows, I columns and G groups per row

    NAME.weight_packed        int32 [O, I * bits / 32]    packed codes, the first in the lowest bits
    NAME.weight_scale         float16 [O, G]
    NAME.weight_zero_point    int32 [O / 8, G]            eight rows a word, the first in the lowest bits; not if
                                                          symmetric
    NAME.weight_shape         int64 [2]                   O, I

for the embedding and the head `NAME.weight`, float16 [rows, I], rounded; and all other tensors under their own names in
their own dtype. A head that is tied to the embedding is not stored. `quantization_config` in config.json describes the
linear layers: those of one scheme by the type Linear, those of several by their names. It leaves out the head, and
layers in 16 bits, by their names. vLLM's kernels have 4 bits and 8 symmetric ones; codes of 2 and 3 bits are held in 4.

Refused (OptionError): groups, or whole rows, that 32 does not divide (`container`), as vLLM's kernel for GPUs (Marlin)
has groups of 32, 64 and 128; layers that vLLM fuses and that have different schemes. Refused (ExportError): models that
come with Python code of their own, and rows that are no multiple of 8 in asymmetric schemes: vLLM splits zero points at
words.

https://github.com/vllm-project/compressed-tensors
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nybble.errors import ExportError, OptionError
from nybble.export.base import Exporter
from nybble.export.containers import four_or_eight_bits, split_groups
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
    codes_to_words,
    float16_blocks,
    float16_limits,
    load_with_transformers,
    metadata,
    other_layouts,
    quantized_names,
    read_tensor,
    tensor_names,
    update_config,
    words_to_codes,
    write_others,
)
from nybble.models.checkpoint import QuantizedCheckpoint, empty_model
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
"""4-bit zero points in an int32."""

_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Leaves of linear layers that vLLM computes as one."""

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
    tested_families = frozenset({"llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3"})
    scheme_requirement = "groups, or whole rows, of a multiple of 32 weights"
    int8_tolerance = INT8_TOLERANCE

    def check(self, config: Any, selection: LayerSelection) -> None:
        """Refuse models with code of their own; see `Exporter.check`.

        Raises:
            ExportError: the model comes with Python code of its own.
        """
        check_code_in_transformers(config, self.name)

    def container(self, scheme: QuantScheme, columns: int, embedding: bool) -> QuantScheme | None:
        """Return a scheme of 4 or 8 bits with groups of 32, 64 or 128; see `Exporter.container`.

        Values of embedding and head are held, whatever their scheme.
        """
        return scheme if embedding else split_groups(four_or_eight_bits(scheme), columns, _GROUP_SIZES)

    def limits(self, config: Any) -> tuple[str, ...]:
        """Name the dtype for models that overflow in float16; see `Exporter.limits`."""
        return float16_limits(config)

    def write(self, checkpoint: QuantizedCheckpoint, folder: Path) -> None:
        """Write model.safetensors and config.json; see `Exporter.write`.

        Raises:
            ExportError: a layer has a number of rows that vLLM cannot split.
            OptionError: layers that vLLM fuses have different schemes.
        """
        int4, schemes = set(checkpoint.selection.int4), checkpoint.selection.schemes
        model = empty_model(checkpoint.config, checkpoint.trust_remote_code)
        _check_fused(model, {name: schemes[name] for name in int4})
        layouts = other_layouts(checkpoint)
        for name, shape in checkpoint.shapes.items():
            if name not in int4:
                layouts[f"{name}.weight"] = TensorLayout(torch.float16, shape)
                continue
            if shape[0] % _WORD and not schemes[name].symmetric:
                raise ExportError(
                    f"an export to vLLM needs rows in multiples of {_WORD} for packed zero points; {name} has "
                    f"{shape[0]}; remove {self.name} from --export"
                )
            layouts |= _layer_layouts(name, shape, schemes[name])
        with safetensors_writer(folder / MODEL_FILE, layouts, metadata(checkpoint, self.name)) as writer:
            write_others(writer, checkpoint)
            for name, weight in checkpoint.quantized.items():
                if name in int4:
                    _write_layer(writer, name, weight)
                else:
                    writer.write_blocks(f"{name}.weight", float16_blocks(weight))
        settings = _quantization_config({name: schemes[name] for name in checkpoint.selection.int4}, model)
        update_config(folder, model, quantization_config=settings)

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
        return load_with_transformers(folder, strict)

    def read_codes(self, folder: Path) -> Mapping[str, QuantizedWeight]:
        """Read the codes of the linear layers; see `Exporter.read_codes`."""
        dense = _dense_modules(folder)
        names = [name for name in quantized_names(folder) if name not in dense]
        return LazyMapping(names, lambda name: _read_layer(folder, name))

    def read_weights(self, folder: Path) -> Mapping[str, Tensor]:
        """Read the weights with compressed-tensors' own decompression, in float32; see `Exporter.read_weights`."""
        dense = _dense_modules(folder)

        def read(name: str) -> Tensor:
            return read_tensor(folder, f"{name}.weight").float() if name in dense else _decompress(folder, name)

        return LazyMapping(quantized_names(folder), read)


def _layer_layouts(name: str, shape: tuple[int, int], scheme: QuantScheme) -> dict[str, TensorLayout]:
    """Layouts of the tensors of a linear layer."""
    rows, columns = shape
    groups = scheme.num_groups(columns)
    layouts = {
        name + _PACKED: TensorLayout(torch.int32, (rows, columns * scheme.bits // 32)),
        name + _SCALE: TensorLayout(torch.float16, (rows, groups)),
        name + _SHAPE: TensorLayout(torch.int64, (2,)),
    }
    if not scheme.symmetric:
        layouts[name + _ZERO_POINT] = TensorLayout(torch.int32, (rows // _WORD, groups))
    return layouts


def _write_layer(writer: SafetensorsWriter, name: str, weight: QuantizedWeight) -> None:
    """Write the tensors of a linear layer."""
    writer.write(name + _PACKED, codes_to_words(weight.codes_OI, weight.scheme.bits))
    writer.write(name + _SCALE, weight.scale_OG.half())
    writer.write(name + _SHAPE, torch.tensor(weight.codes_OI.shape))
    if not weight.scheme.symmetric:
        writer.write(name + _ZERO_POINT, codes_to_words(weight.zero_point_OG.T, weight.scheme.bits).T)


def _read_layer(folder: Path, name: str) -> QuantizedWeight:
    """Read the tensors of a linear layer; the inverse of `_write_layer`."""
    settings = _read_settings(folder, name)["weights"]
    scheme = QuantScheme(settings["num_bits"], settings["group_size"], settings["symmetric"])
    scale_OG = read_tensor(folder, name + _SCALE).float()
    zero_point_OG = torch.full_like(scale_OG, scheme.middle_code, dtype=torch.uint8)
    if not scheme.symmetric:
        zero_point_OG = words_to_codes(read_tensor(folder, name + _ZERO_POINT).T, scheme.bits).T.contiguous()
    codes_OI = words_to_codes(read_tensor(folder, name + _PACKED), scheme.bits)
    return QuantizedWeight(codes_OI, scale_OG, zero_point_OG, scheme)


def _decompress(folder: Path, name: str) -> Tensor:
    """Read the weight of a linear layer as compressed-tensors dequantizes it, float32 [O, I]."""
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationScheme

    scheme = QuantizationScheme.model_validate(_read_settings(folder, name))
    leaves = PackedQuantizationCompressor.compression_param_names(scheme)
    state = {leaf: read_tensor(folder, f"{name}.{leaf}") for leaf in leaves}
    state["weight_scale"] = state["weight_scale"].float()
    return PackedQuantizationCompressor.decompress(state, scheme)["weight"]  # type: ignore[no-any-return]


def _dense_modules(folder: Path) -> set[str]:
    """Names of all modules with a plain weight. Of those that the checkpoint quantizes: embedding and head."""
    return {name.removesuffix(".weight") for name in tensor_names(folder) if name.endswith(".weight")}


def _name_of_head(model: Any) -> str:
    """Name of the module that is the head, which the model has also where it is tied to the embedding."""
    head = model.get_output_embeddings()
    return str(next(name for name, module in model.named_modules() if module is head))


def _check_fused(model: Any, schemes: Mapping[str, QuantScheme]) -> None:
    """Raise OptionError where linear layers that vLLM fuses into one have different schemes, or one has none."""
    for parent, module in model.named_modules():
        for leaves in _FUSED:
            names = [f"{parent}.{leaf}" for leaf in leaves if isinstance(getattr(module, leaf, None), torch.nn.Linear)]
            if len({schemes.get(name) for name in names}) > 1:
                found = ", ".join(f"{name} {schemes.get(name, 'in 16 bits')}" for name in names)
                raise OptionError(
                    f"an export to vLLM needs one scheme for layers that it fuses; got {found}; change --layer or "
                    "--ignore, or remove vllm from --export"
                )


def _quantization_config(schemes: Mapping[str, QuantScheme], model: Any) -> dict[str, Any]:
    """Entry of config.json by which readers find the layers with codes.

    Args:
        schemes: name of each linear layer with codes -> scheme.
        model: on the meta device.
    """
    head = _name_of_head(model)
    linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and name != head]
    groups = {}
    for i, scheme in enumerate(kinds := list(dict.fromkeys(schemes.values()))):
        names = [name for name in schemes if schemes[name] == scheme]
        weights = {
            "num_bits": scheme.bits,
            "type": "int",
            "symmetric": scheme.symmetric,
            "strategy": "group",
            "group_size": scheme.group_size,
            "dynamic": False,
        }
        groups[f"group_{i}"] = {"targets": names if len(kinds) > 1 else ["Linear"], "weights": weights}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [head, *(name for name in linears if name not in schemes)],
    }


def _read_settings(folder: Path, name: str) -> dict[str, Any]:
    """The scheme of a linear layer, as compressed-tensors describes it."""
    groups = read_json(folder / "config.json")["quantization_config"]["config_groups"].values()
    return next(group for group in groups if name in group["targets"] or group["targets"] == ["Linear"])  # type: ignore[no-any-return]
