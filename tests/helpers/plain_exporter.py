"""An export format without codes, which needs no other library."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from nybble.export.base import Exporter, ExportResult
from nybble.models.selection import LayerSelection
from nybble.quant.scheme import QuantScheme
from nybble.quant.weight import QuantizedWeight


class PlainExporter(Exporter):
    """One file with the dequantized weights."""

    name = label = "plain"
    model_file = "plain.safetensors"

    def check(self, config: Any, selection: LayerSelection, scheme: QuantScheme) -> None:
        pass

    def export(
        self, model: Any, tokenizer: Any, quantized: Mapping[str, QuantizedWeight], folder: Path
    ) -> ExportResult:
        save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, folder / self.model_file)
        tokenizer.save_pretrained(folder)
        model.config.save_pretrained(folder)
        return ExportResult(1, 1, 1, 0.0)

    def open_model(self, folder: Path, config: Any, strict: bool = False) -> Any:
        model = AutoModelForCausalLM.from_config(config)
        model.load_state_dict(load_file(folder / self.model_file))
        return model.eval()

    def read_weights(self, folder: Path) -> dict[str, QuantizedWeight]:
        return {}
