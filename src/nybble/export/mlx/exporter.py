"""Write a folder for mlx-lm, with affine quantization: weight = scale * code + bias, bias = -scale * zero_point.

model.safetensors holds for every quantized module NAME with O rows and I columns, in groups of K columns

    NAME.weight    uint32 [O, I * bits / 32]    packed codes, the first in the lowest bits
    NAME.scales    [O, I / K]                   float16 for up to 4 bits; 8 bits: in the dtype below
    NAME.biases    [O, I / K]                   as scales

and all other tensors. Names are those of transformers, or of mlx-lm where they differ (families.py). Experts are
stacked, gate and up apart (stacks.py); their tensors have the number of the expert as the first axis.

The other tensors, and the scales of 8 bits, are float16, or float32 where float16 cannot hold the other tensors exactly
or the activations overflow in it. mlx-lm then computes in this dtype.
`quantization` in config.json has the group size and the bits of most linear layers, and of the layers that have others.
A head that is tied to the embedding is not stored. A row with one scale is held as groups with that scale.

With up to 4 bits, mlx's own dequantization in float16 is exact. With 8 bits it rounds twice, and is exact in float32
only.

Refused (OptionError): groups, or whole rows, that 32 does not divide (`container`). Refused (ExportError): a model that
mlx-lm computes otherwise than transformers (families.py).
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nybble.errors import ExportError
from nybble.export.base import Exporter
from nybble.export.containers import split_groups
from nybble.export.mlx import families
from nybble.export.places import Place, by_tensor, join_tensors, join_weights, stored_shape, take_rows
from nybble.export.safetensors_writer import MODEL_FILE, row_blocks, written_by
from nybble.export.stacks import stack_problem
from nybble.export.transformers_folder import (
    codes_to_words,
    metadata,
    quantized_names,
    update_config,
    words_to_codes,
)
from nybble.export.yarn import truncated_yarn
from nybble.files import TensorReader
from nybble.models.checkpoint import QuantizedCheckpoint, empty_model
from nybble.models.quantized_file import LazyMapping
from nybble.models.selection import LayerSelection
from nybble.models.tensor_writer import SafetensorsWriter, TensorLayout, safetensors_writer
from nybble.quant.scheme import QuantScheme
from nybble.quant.weight import QuantizedWeight
from nybble.schema import read_json

# mlx, mlx_lm and transformers are imported where they are used: they take seconds to import.

USAGE = """
```python
# pip install mlx-lm, on Linux: pip install "mlx[cpu]" mlx-lm
import mlx.core as mx
from mlx_lm import generate, load

model, tokenizer = load(".")
if mx.default_device() == mx.Device(mx.cpu):  # where float16 takes seconds for a token
    model.set_dtype(mx.float32)
question = [{"role": "user", "content": "What is 4-bit quantization?"}]
prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True)
print(generate(model, tokenizer, prompt, max_tokens=100))
```
"""

COMPLETION_USAGE = """
```python
# pip install mlx-lm, on Linux: pip install "mlx[cpu]" mlx-lm
import mlx.core as mx
from mlx_lm import generate, load

model, tokenizer = load(".")
if mx.default_device() == mx.Device(mx.cpu):  # where float16 takes seconds for a token
    model.set_dtype(mx.float32)
print(generate(model, tokenizer, "The capital of France is", max_tokens=100))
```
"""

_GROUP_SIZES = (32, 64, 128)


class MLXExporter(Exporter):
    """Export for mlx-lm."""

    name = "mlx"
    label = "MLX"
    model_file = MODEL_FILE
    weight_files = (MODEL_FILE,)
    modules = ("mlx", "mlx_lm")
    extra = "mlx"
    runtime = "mlx-lm"
    library = "mlx"
    usage = USAGE
    completion_usage = COMPLETION_USAGE
    tested_families = frozenset(
        {
            "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "mixtral", "qwen2_moe", "qwen3_moe",
            "olmoe", "granitemoe", "glm4_moe", "gpt_oss",
        }
    )  # fmt: skip
    scheme_requirement = "groups, or whole rows, of a multiple of 32 weights"

    def check(self, config: Any, selection: LayerSelection) -> None:
        """Refuse models that mlx-lm does not compute; see `Exporter.check`.

        Raises:
            ExportError: one of the reasons at the top of families.py.
        """
        families.check_model(config)
        found = stack_problem(config, selection, lambda scheme: (scheme.bits, scheme.group_size))
        if found is not None:
            raise ExportError(
                f"an export to MLX needs the same quantization for all experts of a layer; this model has {found}; "
                f"change --layer or --ignore, or remove {self.name} from --export"
            )

    def container(self, scheme: QuantScheme, columns: int, embedding: bool) -> QuantScheme | None:
        """Return the scheme with groups of 32, 64 or 128; mlx has all bits; see `Exporter.container`."""
        return split_groups(scheme, columns, _GROUP_SIZES)

    def too_slow(self) -> str:
        """Only Apple's GPUs are fast: a token of a model with 135 M parameters takes 0.3 to 7 s on an x86 CPU."""
        return "" if sys.platform == "darwin" else "mlx is slow without an Apple GPU"

    def limits(self, config: Any) -> tuple[str, ...]:
        """Say up to which length the export is right, and where it is computed in float32; see `Exporter.limits`."""
        return families.limits(config)

    def computed_config(self, config: Any) -> Any:
        """Return the configuration with the rotary embeddings that mlx-lm computes; see `Exporter`."""
        return truncated_yarn(config)

    def write(self, checkpoint: QuantizedCheckpoint, folder: Path) -> None:
        """Write model.safetensors and config.json; see `Exporter.write`."""
        schemes, shapes, tensors = checkpoint.selection.schemes, checkpoint.shapes, checkpoint.others
        places, dtype, layouts = families.places(checkpoint.config), _dtype(checkpoint), dict[str, TensorLayout]()
        layers, others = (by_tensor(place for name in names for place in places(name)) for names in (shapes, tensors))
        for name, parts in others.items():
            kind = tensors[parts[0].name].dtype
            shape = stored_shape(parts, lambda other: tuple(tensors[other].shape))
            layouts[name] = TensorLayout(dtype if kind.is_floating_point else kind, shape)
        for name, parts in layers.items():
            scheme, (*rows, columns) = schemes[parts[0].name], stored_shape(parts, shapes.__getitem__)
            layouts[f"{name}.weight"] = TensorLayout(torch.uint32, (*rows, columns * scheme.bits // 32))
            for leaf in ("scales", "biases"):
                scales = dtype if scheme.bits == 8 else torch.float16
                layouts[f"{name}.{leaf}"] = TensorLayout(scales, (*rows, scheme.num_groups(columns)))
        with safetensors_writer(folder / MODEL_FILE, layouts, metadata(checkpoint, self.name)) as writer:
            for name, parts in others.items():
                values = (tensors[part.name] for part in parts)
                blocks = (value[part.rows] if value.ndim else value for part, value in zip(parts, values, strict=True))
                writer.write_blocks(name, (block.to(layouts[name].dtype) for block in blocks))
            for name, parts in layers.items():
                weights = [take_rows(checkpoint.quantized[part.name], part.rows) for part in parts]
                _write_layer(writer, name, weights, layouts[f"{name}.scales"])
        common = Counter(schemes[name] for name in checkpoint.selection.linears).most_common(1)[0][0]
        of_layer = {name: schemes[parts[0].name] for name, parts in sorted(layers.items())}
        quantization = _settings(common)
        quantization |= {name: _settings(scheme) for name, scheme in of_layer.items() if scheme != common}
        update_config(
            folder,
            empty_model(checkpoint.config, checkpoint.trust_remote_code),
            **families.mlx_config(checkpoint.config, checkpoint.selection.tied),
            quantization=quantization,
            quantization_config=quantization,
        )

    def recognizes(self, folder: Path) -> bool:
        """Return whether nybble wrote the folder in this format; other models have files of the same names."""
        return written_by(folder) == self.name

    def open_model(self, folder: Path, config: Any, strict: bool = False) -> Any:
        """Open the export in mlx-lm: in float32 if strict; see `Exporter.open_model`.

        Returns:
            An MLXModel.
        """
        from nybble.export.mlx.runtime import MLXModel

        return MLXModel(folder, config, strict)

    def read_codes(self, folder: Path) -> Mapping[str, QuantizedWeight]:
        """Read codes, scales and zero points; see `Exporter.read_codes`."""
        read_layer, places = _Layers(folder).read_layer, _places(folder)
        return LazyMapping(places, lambda name: join_weights(places[name], [read_layer(part) for part in places[name]]))

    def read_weights(self, folder: Path) -> Mapping[str, Tensor]:
        """Read the weights with mlx's own dequantization; see `Exporter.read_weights`.

        4 bits in the dtype of the file, 8 bits in float32, as mlx would round them in float16.
        """
        dequantize, places = _Layers(folder).dequantize, _places(folder)
        return LazyMapping(places, lambda name: join_tensors(places[name], [dequantize(part) for part in places[name]]))


def _settings(scheme: QuantScheme) -> dict[str, Any]:
    """Entry of `quantization` in config.json."""
    return {"group_size": scheme.group_size, "bits": scheme.bits, "mode": "affine"}


def _dtype(checkpoint: QuantizedCheckpoint) -> torch.dtype:
    """The dtype in which mlx-lm computes: float16, if it holds the other tensors and activations."""
    exact = all(
        torch.equal(tensor.half().float(), tensor.float())
        for tensor in checkpoint.others.values()
        if tensor.is_floating_point()
    )
    return torch.float16 if exact and not families.overflows_in_float16(checkpoint.config) else torch.float32


def _write_layer(
    writer: SafetensorsWriter, name: str, weights: Sequence[QuantizedWeight], scales: TensorLayout
) -> None:
    """Write the tensors of a quantized layer of mlx-lm: of one weight, or a stack of several."""
    words = (codes_to_words(weight.codes_OI, weight.scheme.bits).view(torch.uint32) for weight in weights)
    writer.write_blocks(f"{name}.weight", words)
    writer.write_blocks(f"{name}.scales", (weight.scale_OG.to(scales.dtype) for weight in weights))
    biases = ((-weight.scale_OG * weight.zero_point_OG).to(scales.dtype) for weight in weights)
    writer.write_blocks(f"{name}.biases", biases)


def _places(folder: Path) -> dict[str, list[Place]]:
    """Where the rows of each quantized module are in an export."""
    from transformers import AutoConfig

    find = families.places(AutoConfig.from_pretrained(folder))
    return {name: find(name) for name in quantized_names(folder)}


class _Layers:
    """The quantized layers of an export, read one at a time."""

    def __init__(self, folder: Path) -> None:
        self._reader = TensorReader(folder / MODEL_FILE)
        self._quantization = read_json(folder / "config.json")["quantization"]

    def read_layer(self, place: Place) -> QuantizedWeight:
        """Read one weight of a layer; the inverse of `_write_layer`."""
        words, scale_OG, bias_OG = self._tensors(place)
        zero_point_OG = (-bias_OG.float() / scale_OG.float()).to(torch.uint8)
        bits, group_size = self._settings(place)
        symmetric = bool((zero_point_OG == QuantScheme(bits).middle_code).all())
        scheme = QuantScheme(bits, group_size, symmetric)
        return QuantizedWeight(words_to_codes(words, bits), scale_OG.float(), zero_point_OG, scheme)

    def dequantize(self, place: Place) -> Tensor:
        """Dequantize one weight of a layer with mlx, float32 [O, I]."""
        import mlx.core as mx

        words, scale_OG, bias_OG = self._tensors(place)
        bits, group_size = self._settings(place)
        if bits == 8:
            scale_OG, bias_OG = scale_OG.float(), bias_OG.float()
        weight_OI = torch.empty(len(words), words.shape[1] * 32 // bits)
        for part in row_blocks(weight_OI.shape):  # mlx keeps memory that it has freed
            block_OI = mx.dequantize(
                mx.array(words[part].numpy()),
                mx.array(scale_OG[part].numpy()),
                mx.array(bias_OG[part].numpy()),
                group_size=group_size,
                bits=bits,
            )
            weight_OI[part] = torch.from_numpy(np.array(block_OI.astype(mx.float32)))
        return weight_OI

    def _settings(self, place: Place) -> tuple[int, int]:
        """Bits and group size of a layer."""
        settings = self._quantization.get(place.tensor, self._quantization)
        return settings["bits"], settings["group_size"]

    def _tensors(self, place: Place) -> tuple[Tensor, Tensor, Tensor]:
        """Words, scales and biases of one weight of a layer, as they are in the file."""
        index = () if place.matrix is None else (place.matrix,)
        words, scales, biases = (
            self._reader.read(f"{place.tensor}.{leaf}", *index) for leaf in ("weight", "scales", "biases")
        )
        return words, scales, biases
