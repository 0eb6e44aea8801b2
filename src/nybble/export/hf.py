"""Write the dequantized weights as a folder for everything that reads folders of transformers.

model.safetensors holds the weights of all quantized modules in float16, up to 4 bits exactly, 8 bits (embedding and
head) rounded, and all other tensors in float16 where that is exact, else in bfloat16 or float32. Names and shapes are
those of models on the hub (published.py). A head that is tied to the embedding is not stored.
config.json has `"dtype": "float16"`, or "float32" where activations overflow in float16, or a tensor would be
rounded.

Refused: models that come with Python code of their own (ExportError).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nybble.export.base import Exporter
from nybble.export.published import float16_blocks, locate_modules, published_layout, read_rows, tensor_layout
from nybble.export.safetensors_writer import MODEL_FILE, written_by
from nybble.export.transformers_folder import (
    BEGINNING,
    INT8_TOLERANCE,
    QUESTION,
    check_code_in_transformers,
    float16_limits,
    load_with_transformers,
    metadata,
    update_config,
)
from nybble.files import TensorReader
from nybble.models.checkpoint import QuantizedCheckpoint, empty_model
from nybble.models.dtypes import kept_dtype
from nybble.models.quantized_file import LazyMapping
from nybble.models.selection import LayerSelection
from nybble.models.tensor_writer import safetensors_writer
from nybble.quant.scheme import QuantScheme
from nybble.quant.weight import QuantizedWeight

_TRANSPOSED = "nybble.transposed"
"""Key in the header of model.safetensors: names of the layers whose weight is [I, O]."""

USAGE = """
```python
# pip install transformers
from transformers import pipeline

pipe = pipeline("text-generation", ".")
print(pipe([{"role": "user", "content": "What is 4-bit quantization?"}], max_new_tokens=100))
```
"""


class HFExporter(Exporter):
    """Export to safetensors in float16, without codes."""

    name = "hf"
    label = "hf in float16"
    model_file = MODEL_FILE
    weight_files = (MODEL_FILE,)
    runtime = "transformers"
    library = "transformers"
    usage = USAGE
    completion_usage = USAGE.replace(QUESTION, BEGINNING)
    tested_families = frozenset(
        {
            "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3",
            "mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "llama4_text", "deepseek_v2", "deepseek_v3", "glm4_moe",
            "granitemoe", "olmoe", "lfm2_moe", "qwen3_5_moe_text", "qwen3_next", "ernie4_5_moe", "phimoe", "jetmoe",
            "nemotron_h", "kimi_linear",
        }
    )  # fmt: skip
    holds_codes = False
    int8_tolerance = INT8_TOLERANCE
    holds_parts = True
    decodes = False  # transformers opens it

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
        tensors = published_layout(checkpoint.config, checkpoint.shapes)
        layouts = {name: tensor_layout(checkpoint, places) for name, places in tensors.items()}
        with safetensors_writer(folder / MODEL_FILE, layouts, metadata(checkpoint, self.name)) as writer:
            for name, places in tensors.items():
                writer.write_blocks(name, float16_blocks(checkpoint, places, layouts[name].dtype))
        model = empty_model(checkpoint.config, checkpoint.trust_remote_code)
        exact = all(
            layouts[name].dtype == torch.float16 or kept_dtype(model, places[0].name, torch.float16) == torch.float32
            for name, places in tensors.items()
            if layouts[name].dtype.is_floating_point
        )
        update_config(folder, model, exact)

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
        places, reader = locate_modules(folder), TensorReader(folder / MODEL_FILE)
        return LazyMapping(places, lambda name: read_rows(reader, places[name]).float())
