"""Write one file model.gguf for llama.cpp and what is built on it (Ollama, LM Studio).

4-bit codes are blocks Q4_1, or Q4_0 for a symmetric scheme, which also holds codes of 2 and 3 bits; 8-bit codes
(embedding and head) are Q8_0 (blocks.py). Layers that stay in 16 bits are float16 or bfloat16, whichever is exact;
everything else is float32. Names of tensors are those of the package gguf,
fields those of llama.cpp's converter (architectures.py, tokenizer.py). One field is ours: nybble.quantized, the names
of the quantized modules.

Changed on the way, so that llama.cpp computes the same:

    query and key projections of the architecture llama: rows are reordered within each head (`to_neighbours`)
    norms of Gemma: weight + 1
    query norms of Gemma 3, where the scale of its queries is not what llama.cpp takes: times the quotient
    experts: one tensor for each projection of all experts of a layer, gate and up apart (experts.py)
    latent attention: two stacks with a matrix for each head, of which that for keys is transposed (latent.py)

Refused: model types without an architecture in the table, and what its graph does not compute (ExportError); groups
that are not made of blocks of 32 weights (OptionError: `container`).
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nybble.errors import ExportError, describe_error
from nybble.export.base import Exporter
from nybble.export.containers import four_or_eight_bits, split_groups
from nybble.export.gguf.architectures import MODEL_TYPES, head_dim, limits, metadata, problem
from nybble.export.gguf.blocks import BLOCK, block_type, from_blocks
from nybble.export.gguf.experts import shared_width
from nybble.export.gguf.file import ARCHITECTURE, QUANTIZED, GGUFContent, write_file
from nybble.export.gguf.latent import latent_heads, latent_widths
from nybble.export.gguf.pretokenizers import UNKNOWN
from nybble.export.gguf.tensors import plan_tensors
from nybble.export.gguf.tokenizer import tokenizer_fields
from nybble.export.places import join_tensors, join_weights, reorder_weight, to_halves
from nybble.export.stacks import expert_width, stack_problem
from nybble.export.yarn import truncated_yarn
from nybble.models.checkpoint import QuantizedCheckpoint
from nybble.models.quantized_file import LazyMapping
from nybble.models.selection import LayerSelection
from nybble.quant.scheme import QuantScheme
from nybble.quant.weight import QuantizedWeight

# gguf, xllamacpp and transformers are imported where they are used: they take seconds to import.

log = logging.getLogger("nybble")

COMPLETION_USAGE = """
```bash
llama-cli -m model.gguf -no-cnv -p "The capital of France is"
llama-server -m model.gguf --port 8080
```

These programs were not run on this file. In Python, with the server of llama.cpp that the tests of nybble run:

```python
# pip install xllamacpp
import xllamacpp

parameters = xllamacpp.CommonParams()
parameters.model.path = "model.gguf"
server = xllamacpp.Server(parameters)
answer = server.handle_completions({"prompt": "The capital of France is", "max_tokens": 100, "temperature": 0})
print(answer["choices"][0]["text"])
```
"""

USAGE = """
```bash
llama-cli -m model.gguf
llama-server -m model.gguf --port 8080
```

For Ollama, write a file `Modelfile` with the line `FROM ./model.gguf` beside it:

```bash
ollama create my-model -f Modelfile
ollama run my-model
```

These programs were not run on this file. In Python, with the server of llama.cpp that the tests of nybble run:

```python
# pip install xllamacpp
import xllamacpp

parameters = xllamacpp.CommonParams()
parameters.model.path = "model.gguf"
server = xllamacpp.Server(parameters)
question = [{"role": "user", "content": "What is 4-bit quantization?"}]
answer = server.handle_chat_completions({"messages": question, "max_tokens": 100, "temperature": 0})
print(answer["choices"][0]["message"]["content"])
```
"""

MODEL_GGUF = "model.gguf"
_FILE_TYPES = {"Q4_0": 2, "Q4_1": 3, "Q8_0": 7}
"""Block type of most weights -> general.file_type."""


_GELU_TOLERANCE = 5e-3
"""llama.cpp looks GELU up in a table of float16. Random models of 2 to 36 layers differ from torch by 2e-4 to 1e-3 of
the largest logit, as torch itself does with such a table; a forgotten field or tensor changes more than 2e-2 of it."""


class GGUFExporter(Exporter):
    """Export to a GGUF file for llama.cpp."""

    name = "gguf"
    label = "GGUF"
    model_file = MODEL_GGUF
    weight_files = (MODEL_GGUF,)
    modules = ("gguf", "xllamacpp")
    extra = "gguf"
    runtime = "llama.cpp"
    usage = USAGE
    completion_usage = COMPLETION_USAGE
    tested_families = frozenset(
        {
            "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "mixtral", "qwen2_moe", "qwen3_moe",
            "olmoe", "granitemoe", "glm4_moe", "ernie4_5_moe", "gpt_oss", "deepseek_v2", "deepseek_v3",
        }
    )  # fmt: skip
    scheme_requirement = f"groups, or whole rows, of a multiple of {BLOCK} weights"

    def check(self, config: Any, selection: LayerSelection) -> None:
        """Refuse other architectures, and what llama.cpp does not compute; see `Exporter.check`.

        Raises:
            ExportError: llama.cpp cannot compute the model.
        """
        if config.model_type not in MODEL_TYPES:
            raise ExportError(
                f"an export to GGUF needs a model type of {', '.join(sorted(MODEL_TYPES))}; got {config.model_type}; "
                f"remove {self.name} from --export"
            )
        if (found := problem(config, selection.tied)) is not None:
            raise ExportError(
                "an export to GGUF needs a model whose parts llama.cpp computes; this model has "
                f"{found}; remove {self.name} from --export"
            )
        if (
            found := stack_problem(config, selection, lambda scheme: block_type(four_or_eight_bits(scheme)))
        ) is not None:
            raise ExportError(
                "an export to GGUF needs the same quantization for all experts of a layer; this model has "
                f"{found}; change --layer or --ignore, or remove {self.name} from --export"
            )
        latent = latent_heads(config) is not None
        widths = latent_widths(config) if latent else [config.num_attention_heads * head_dim(config)]
        widths += [config.hidden_size, config.intermediate_size, expert_width(config), shared_width(config)]
        if odd := [width for width in widths if width % BLOCK]:
            raise ExportError(
                f"an export to GGUF needs rows that are multiples of {BLOCK} weights; this model has rows of {odd[0]}; "
                f"remove {self.name} from --export"
            )

    def container(self, scheme: QuantScheme, columns: int, embedding: bool) -> QuantScheme | None:
        """Return a scheme of 4 or 8 bits with groups of one block; see `Exporter.container`."""
        return split_groups(four_or_eight_bits(scheme), columns, (BLOCK,))

    def limits(self, config: Any) -> tuple[str, ...]:
        """Say for which texts and contexts the export computes what the model does; see `Exporter.limits`."""
        return limits(config)

    def tolerance(self, config: Any) -> float:
        """Return the tolerance of logits: more where the activation is a table in float16; see `Exporter.tolerance`."""
        return self.logit_tolerance if MODEL_TYPES[config.model_type].activation == "silu" else _GELU_TOLERANCE

    def write(self, checkpoint: QuantizedCheckpoint, folder: Path) -> None:
        """Write the file, load it in llama.cpp, and compare its tokenizer; see `Exporter.write`.

        Raises:
            ExportError: llama.cpp has no such tokenizer, does not load the file, or the disk is full.
        """
        from nybble.export.gguf.tokenizer_check import check_tokenizer

        config, path = checkpoint.config, folder / MODEL_GGUF
        fields = _fields(checkpoint)
        try:
            write_file(path, fields, plan_tensors(checkpoint))
        except OSError as error:
            raise ExportError(
                f"the export to {folder} must be written to disk; it cannot be ({describe_error(error)}); free some "
                f"disk space, then run: nybble export {folder.parent} --to {self.name}"
            ) from error
        if fields.get("tokenizer.ggml.pre") == UNKNOWN and fields["tokenizer.ggml.model"] == "gpt2":
            log.warning(
                "llama.cpp has no pre-tokenizer that splits text as the tokenizer of this model does; the GGUF export "
                "uses its default one, and reads some texts as other tokens than the model was trained on"
            )
        check_tokenizer(path, checkpoint.tokenizer, config.vocab_size)

    def computed_config(self, config: Any) -> Any:
        """Return the configuration with the rotary embeddings that llama.cpp computes; see `Exporter`."""
        return truncated_yarn(config)

    def open_model(self, folder: Path, config: Any, strict: bool = False) -> Any:
        """Load the export in llama.cpp; see `Exporter.open_model`.

        Args:
            folder: the export.
            config: transformers configuration of the model.
            strict: compute in float32, from a temporary copy. Otherwise as llama.cpp does: 8-bit activations, and keys
                and values in float16.

        Returns:
            A LlamaCppModel.
        """
        from nybble.export.gguf.runtime import LlamaCppModel

        return LlamaCppModel(folder / MODEL_GGUF, config, strict)

    def read_codes(self, folder: Path) -> Mapping[str, QuantizedWeight]:
        """Read codes, scales and zero points from the blocks; see `Exporter.read_codes`.

        A projection of latent attention, whose half for keys is no blocks, has none.
        """
        content = GGUFContent(folder / MODEL_GGUF)
        modules = {name: places for name, places in content.modules.items() if not any(p.transposed for p in places)}

        def read(module: str) -> QuantizedWeight:
            places = modules[module]
            parts = [from_blocks(content.read(p.tensor, p.matrix), content.kinds[p.tensor]) for p in places]
            return reorder_weight(join_weights(places, parts), content.rope_heads(module), to_halves)

        return LazyMapping(modules, read)

    def read_weights(self, folder: Path) -> Mapping[str, Tensor]:
        """Read weights as the package gguf dequantizes them; see `Exporter.read_weights`."""
        content = GGUFContent(folder / MODEL_GGUF)

        def read(module: str) -> Tensor:
            places = content.modules[module]
            parts = [torch.from_numpy(content.read_floats(place.tensor, place.matrix)) for place in places]
            parts = [part.T if place.transposed else part for place, part in zip(places, parts, strict=True)]
            weight_OI = join_tensors(places, parts)
            heads = content.rope_heads(module)
            return weight_OI if heads is None else to_halves(weight_OI, heads)

        return LazyMapping(content.modules, read)


def _fields(checkpoint: QuantizedCheckpoint) -> dict[str, Any]:
    """All fields of the file."""
    from gguf import GGML_QUANT_VERSION

    config, selection = checkpoint.config, checkpoint.selection
    kinds = Counter(block_type(selection.schemes[name]) for name in selection.linears)
    architecture = MODEL_TYPES[config.model_type].name
    tokenizer = tokenizer_fields(checkpoint.tokenizer, config.vocab_size, checkpoint.folder)
    return (
        {
            ARCHITECTURE: architecture,
            "general.type": "model",
            "general.file_type": _FILE_TYPES[kinds.most_common(1)[0][0]],
            "general.quantization_version": int(GGML_QUANT_VERSION),
            QUANTIZED: list(checkpoint.shapes),
        }
        | {f"{architecture}.{key}": value for key, value in metadata(config).items()}
        | {f"tokenizer.{key}": value for key, value in tokenizer.items()}
    )
