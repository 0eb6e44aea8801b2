"""An export format without codes, which needs no other library."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from nybble.export.base import Exporter
from nybble.models.checkpoint import QuantizedCheckpoint
from nybble.models.selection import LayerSelection
from nybble.quant.weight import QuantizedWeight


class PlainExporter(Exporter):
    """One file with the dequantized weights in float32."""

    name = label = "plain"
    model_file = "plain.safetensors"
    weight_files = ("plain.safetensors",)

    def check(self, config: Any, selection: LayerSelection) -> None:
        pass

    def write(self, checkpoint: QuantizedCheckpoint, folder: Path) -> None:
        weights = {f"{name}.weight": weight.dequantize() for name, weight in checkpoint.quantized.items()}
        save_file(weights | dict(checkpoint.others), folder / self.model_file)

    def open_model(self, folder: Path, config: Any, strict: bool = False) -> Any:
        model = AutoModelForCausalLM.from_config(config)
        model.load_state_dict(load_file(folder / self.model_file), strict=False)
        return model.eval()

    def read_codes(self, folder: Path) -> dict[str, QuantizedWeight]:
        return {}

    def read_weights(self, folder: Path) -> Mapping[str, Tensor]:
        tensors = load_file(folder / self.model_file)
        return {name.removesuffix(".weight"): tensor for name, tensor in tensors.items() if tensor.ndim == 2}
