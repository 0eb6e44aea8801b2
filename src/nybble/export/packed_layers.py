"""Linear layers in the layout of compressed-tensors (pack-quantized), and how config.json describes them.

For a linear layer NAME with O rows, I columns and G groups per row

    NAME.weight_packed        int32 [O, I * bits / 32]    packed codes, the first in the lowest bits
    NAME.weight_scale         float16 [O, G]
    NAME.weight_zero_point    int32 [O / 8, G]            eight rows a word, the first in the lowest bits; not if
                                                          symmetric
    NAME.weight_shape         int64 [2]                   O, I

https://github.com/vllm-project/compressed-tensors
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nybble.errors import ExportError
from nybble.export.safetensors_writer import MODEL_FILE
from nybble.export.transformers_folder import codes_to_words, tensor_names, words_to_codes
from nybble.files import TensorReader
from nybble.models.tensor_writer import SafetensorsWriter, TensorLayout
from nybble.quant.scheme import QuantScheme
from nybble.quant.weight import QuantizedWeight
from nybble.schema import read_json

# compressed_tensors is imported where it is used: it takes seconds to import.

_WORD = 8
"""4-bit codes in an int32."""

_PACKED, _SCALE, _ZERO_POINT, _SHAPE = ".weight_packed", ".weight_scale", ".weight_zero_point", ".weight_shape"
_LEAVES = (_PACKED, _SCALE, _ZERO_POINT, _SHAPE)


def layer_layouts(name: str, shape: tuple[int, int], scheme: QuantScheme) -> dict[str, TensorLayout]:
    """Layouts of the tensors of a linear layer. ExportError for rows that vLLM cannot split."""
    rows, columns = shape
    if rows % _WORD and not scheme.symmetric:
        raise ExportError(
            f"an export to vLLM needs rows in multiples of {_WORD} for packed zero points; {name} has {rows}; remove "
            "vllm from --export"
        )
    groups = scheme.num_groups(columns)
    layouts = {
        name + _PACKED: TensorLayout(torch.int32, (rows, columns * scheme.bits // 32)),
        name + _SCALE: TensorLayout(torch.float16, (rows, groups)),
        name + _SHAPE: TensorLayout(torch.int64, (2,)),
    }
    if not scheme.symmetric:
        layouts[name + _ZERO_POINT] = TensorLayout(torch.int32, (rows // _WORD, groups))
    return layouts


def write_layer(writer: SafetensorsWriter, name: str, weight: QuantizedWeight) -> None:
    """Write the tensors of a linear layer."""
    writer.write(name + _PACKED, codes_to_words(weight.codes_OI, weight.scheme.bits))
    writer.write(name + _SCALE, weight.scale_OG.half())
    writer.write(name + _SHAPE, torch.tensor(weight.codes_OI.shape))
    if not weight.scheme.symmetric:
        writer.write(name + _ZERO_POINT, codes_to_words(weight.zero_point_OG.T, weight.scheme.bits).T)


class PackedFolder:
    """An export whose layers are read one at a time. The file is opened, and config.json read, once.

    Args:
        folder: the export.

    Attributes:
        names: of all tensors.
        packed: published names of all modules with codes.
        dense: names of all modules with a plain weight. Of those that the checkpoint quantizes: embedding and head.
    """

    def __init__(self, folder: Path) -> None:
        self._reader = TensorReader(folder / MODEL_FILE)
        groups = read_json(folder / "config.json")["quantization_config"]["config_groups"].values()
        self._settings = {target: group for group in groups for target in group["targets"]}
        self.names = tensor_names(folder)
        self.packed = {name.removesuffix(_PACKED) for name in self.names if name.endswith(_PACKED)}
        self.dense = {name.removesuffix(".weight") for name in self.names if name.endswith(".weight")}

    def read_layer(self, name: str) -> QuantizedWeight:
        """Read the tensors of a linear layer; the inverse of `write_layer`."""
        settings, read = self._settings_of(name)["weights"], self._reader.read
        scheme = QuantScheme(settings["num_bits"], settings["group_size"], settings["symmetric"])
        scale_OG = read(name + _SCALE).float()
        zero_point_OG = torch.full_like(scale_OG, scheme.middle_code, dtype=torch.uint8)
        if not scheme.symmetric:
            zero_point_OG = words_to_codes(read(name + _ZERO_POINT).T, scheme.bits).T.contiguous()
        return QuantizedWeight(words_to_codes(read(name + _PACKED), scheme.bits), scale_OG, zero_point_OG, scheme)

    def decompress(self, name: str) -> Tensor:
        """Read the weight of a linear layer as compressed-tensors dequantizes it, float32 [O, I]."""
        from compressed_tensors.compressors import PackedQuantizationCompressor
        from compressed_tensors.quantization import QuantizationScheme

        scheme = QuantizationScheme.model_validate(self._settings_of(name))
        leaves = PackedQuantizationCompressor.compression_param_names(scheme)
        state = {leaf: self._reader.read(f"{name}.{leaf}") for leaf in leaves}
        state["weight_scale"] = state["weight_scale"].float()
        return PackedQuantizationCompressor.decompress(state, scheme)["weight"]  # type: ignore[no-any-return]

    def read_plain(self, name: str) -> Tensor:
        """Read a tensor of a module without codes."""
        return self._reader.read(name)

    def weights(self) -> dict[str, Tensor]:
        """Read the model without codes: published name -> tensor."""
        state = {f"{name}.weight": self.decompress(name) for name in self.packed}
        return state | {name: self._reader.read(name) for name in self.names if not name.endswith(_LEAVES)}

    def _settings_of(self, name: str) -> dict[str, Any]:
        """The scheme of a linear layer, as compressed-tensors describes it."""
        return self._settings.get(name) or self._settings["Linear"]  # type: ignore[no-any-return]


def quantization_config(schemes: Mapping[str, QuantScheme], ignored: Sequence[str]) -> dict[str, Any]:
    """Entry of config.json by which readers find the layers with codes.

    Args:
        schemes: name of each linear layer with codes, published and in memory -> scheme.
        ignored: names of the layers without, published and in memory.
    """
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
        "ignore": list(ignored),
    }
