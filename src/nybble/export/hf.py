"""Write the dequantized weights as a folder for everything that reads folders of transformers.

model.safetensors holds for every quantized module NAME with O rows and I columns

    NAME.weight    float16 [O, I]    linear layers exactly; embedding and head rounded to float16

and all other tensors under their own names in their own dtype. Conv1D layers (GPT-2) have [I, O], as in transformers.
A head that is tied to the embedding is not stored. config.json has `"dtype": "float16"`, or "float32" where
activations overflow in float16.

Refused: models that come with Python code of their own (ExportError).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nybble.export.base import Exporter
from nybble.export.safetensors_writer import (
    MODEL_FILE,
    TensorLayout,
    read_metadata,
    safetensors_writer,
    written_by,
)
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
from nybble.models.linearize import transposed_layers
from nybble.models.quantized_file import LazyMapping
from nybble.models.selection import LayerSelection
from nybble.quant.scheme import QuantScheme
from nybble.quant.weight import QuantizedWeight

_TRANSPOSED = "nybble.transposed"
"""Key in the header of model.safetensors: names of the layers whose weight is [I, O]."""

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
    decodes = False  # transformers opens it

    def check(self, config: Any, selection: LayerSelection, scheme: QuantScheme) -> None:
        """Refuse models with Python code of their own; see `Exporter.check`."""
        check_code_in_transformers(config, self.name)

    def limits(self, config: Any) -> tuple[str, ...]:
        """Name the dtype for models that overflow in float16; see `Exporter.limits`."""
        return float16_limits(config)

    def write(self, checkpoint: QuantizedCheckpoint, folder: Path) -> None:
        """Write model.safetensors; see `Exporter.write`."""
        model = empty_model(checkpoint.config, checkpoint.trust_remote_code)
        transposed, layouts = transposed_layers(model), other_layouts(checkpoint)
        for name, shape in checkpoint.shapes.items():
            layouts[f"{name}.weight"] = TensorLayout(torch.float16, shape[::-1] if name in transposed else shape)
        texts = metadata(checkpoint, self.name) | {_TRANSPOSED: " ".join(sorted(transposed))}
        with safetensors_writer(folder / MODEL_FILE, layouts, texts) as writer:
            write_others(writer, checkpoint)
            for name, weight in checkpoint.quantized.items():
                blocks = float16_blocks(weight)
                writer.write_blocks(f"{name}.weight", [torch.cat([*blocks]).T] if name in transposed else blocks)
        update_config(folder, model)

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
        transposed = read_metadata(folder).get(_TRANSPOSED, "").split()

        def read(name: str) -> Tensor:
            weight = read_tensor(folder, f"{name}.weight").float()
            return weight.T.contiguous() if name in transposed else weight

        return LazyMapping(quantized_names(folder), read)
