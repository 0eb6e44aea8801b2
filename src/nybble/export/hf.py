"""Write the dequantized weights as a folder for everything that reads folders of transformers.

model.safetensors holds for every quantized module NAME with O rows and I columns

    NAME.weight    float16 [O, I]    up to 4 bits exactly; 8 bits (embedding and head) rounded to float16

and all other tensors under their own names in their own dtype. A head that is tied to the embedding is not stored.
config.json has `"dtype": "float16"`, or "float32" where activations overflow in float16.

Refused: models that come with Python code of their own (ExportError).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nybble.export.base import Exporter
from nybble.export.safetensors_writer import MODEL_FILE, TensorLayout, safetensors_writer, written_by
from nybble.export.transformers_folder import (
    INT8_TOLERANCE,
    check_code_in_transformers,
    float16_blocks,
    float16_limits,
    load_with_transformers,
    metadata,
    other_layouts,
    quantized_names,
    read_tensor,
    update_config,
    write_others,
)
from nybble.models.checkpoint import QuantizedCheckpoint, empty_model
from nybble.models.quantized_file import LazyMapping
from nybble.models.selection import LayerSelection
from nybble.quant.scheme import QuantScheme
from nybble.quant.weight import QuantizedWeight

USAGE = """
```python
# pip install transformers
from transformers import pipeline

chat = pipeline("text-generation", ".")
print(chat([{"role": "user", "content": "What is 4-bit quantization?"}], max_new_tokens=100))
```
"""


class HFExporter(Exporter):
    """Export to safetensors in float16, without codes."""

    name = "hf"
    label = "safetensors (float16)"
    model_file = MODEL_FILE
    weight_files = (MODEL_FILE,)
    library = "transformers"
    usage = USAGE
    tested_families = frozenset({"llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3"})
    holds_codes = False
    int8_tolerance = INT8_TOLERANCE

    def check(self, config: Any, selection: LayerSelection) -> None:
        """Refuse models with Python code of their own; see `Exporter.check`."""
        check_code_in_transformers(config, self.name)

    def container(self, scheme: QuantScheme, columns: int, embedding: bool) -> QuantScheme:
        """Return the scheme itself: values of all schemes are held; see `Exporter.container`."""
        return scheme

    def limits(self, config: Any) -> tuple[str, ...]:
        """Name the dtype for models that overflow in float16; see `Exporter.limits`."""
        return float16_limits(config)

    def write(self, checkpoint: QuantizedCheckpoint, folder: Path) -> None:
        """Write model.safetensors; see `Exporter.write`."""
        layouts = other_layouts(checkpoint)
        layouts |= {f"{name}.weight": TensorLayout(torch.float16, shape) for name, shape in checkpoint.shapes.items()}
        with safetensors_writer(folder / MODEL_FILE, layouts, metadata(checkpoint, self.name)) as writer:
            write_others(writer, checkpoint)
            for name, weight in checkpoint.quantized.items():
                writer.write_blocks(f"{name}.weight", float16_blocks(weight))
        update_config(folder, empty_model(checkpoint.config, checkpoint.trust_remote_code))

    def recognizes(self, folder: Path) -> bool:
        """Return whether nybble wrote the folder in this format; other models have files of the same names."""
        return written_by(folder) == self.name

    def open_model(self, folder: Path, config: Any, strict: bool = False) -> Any:
        """Load the folder with transformers: in float32 if strict; see `Exporter.open_model`."""
        return load_with_transformers(folder, strict)

    def read_codes(self, folder: Path) -> Mapping[str, QuantizedWeight]:
        """Return nothing: the format has no codes."""
        return {}

    def read_weights(self, folder: Path) -> Mapping[str, Tensor]:
        """Read the weights of the modules that were quantized; see `Exporter.read_weights`."""
        return LazyMapping(quantized_names(folder), lambda name: read_tensor(folder, f"{name}.weight").float())
