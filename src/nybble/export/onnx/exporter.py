"""Write the ONNX model of a quantized model.

Files: model.onnx and model.onnx.data, genai_config.json, and the configuration and tokenizer files of transformers.
onnxruntime-genai loads the folder. codes.py describes the layout of the codes.

Refused (ExportError): model types that the tests do not cover, and rotary embeddings, activations and attention that
the graph cannot compute; experts of a layer with several schemes, with 8 bits, or in 16 bits. Refused (OptionError):
groups that blocks of the operator MatMulNBits do not fill, and an embedding or a head in 16 bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from nybble.errors import ExportError, OptionError
from nybble.export.base import Exporter
from nybble.export.containers import as_held, four_or_eight_bits, split_groups
from nybble.export.onnx.codes import BLOCK_SIZES, read_graph
from nybble.export.onnx.experts import PROJECTIONS, experts_of_layers, experts_problem
from nybble.export.stacks import expert_width, num_experts
from nybble.export.tokenizer_check import warn_of_other_tokens
from nybble.models.checkpoint import QuantizedCheckpoint
from nybble.models.selection import LayerSelection
from nybble.quant.scheme import QuantScheme
from nybble.quant.weight import QuantizedWeight

# onnx, onnxruntime, onnxruntime_genai and transformers are imported where they are used: they take seconds to import.

MODEL_FILE = "model.onnx"

_GENERATE = """\
parameters = og.GeneratorParams(model)
parameters.set_search_options(max_length=len(prompt) + 100)
generator = og.Generator(model, parameters)
generator.append_tokens(prompt)
while not generator.is_done():
    generator.generate_next_token()
print(tokenizer.decode(generator.get_sequence(0)[len(prompt):]))
```
"""

USAGE = f"""\
```bash
pip install onnxruntime-genai
```

```python
import json
import onnxruntime_genai as og

model = og.Model(".")
tokenizer = og.Tokenizer(model)
messages = json.dumps([{{"role": "user", "content": "What is the capital of France?"}}])
prompt = tokenizer.encode(tokenizer.apply_chat_template(messages, add_generation_prompt=True))
{_GENERATE}"""
"""How to run an export from its folder; a slow test does so."""

COMPLETION_USAGE = f"""\
```bash
pip install onnxruntime-genai
```

```python
import onnxruntime_genai as og

model = og.Model(".")
tokenizer = og.Tokenizer(model)
tokenizer.update_options(add_special_tokens="true")  # where the model expects a token before the text
prompt = tokenizer.encode("The capital of France is")
{_GENERATE}"""

_ROPE_TYPES = frozenset({"default", "linear", "llama3", "yarn", "dynamic"})
_ACTIVATIONS = frozenset({"silu", "swish", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "relu", "relu2"})
_ATTENTION_TYPES = frozenset({"full_attention", "sliding_attention"})
_HEAD_MULTIPLE = 16
"""The head size, and the part of it that rotates, are multiples of this in GroupQueryAttention."""

_RECOMPUTED_LENGTH = 4096
"""onnxruntime-genai computes keys again when a text of Phi-3 becomes longer than this, as transformers does."""


class OnnxExporter(Exporter):
    """Export to an ONNX model for onnxruntime-genai."""

    name = "onnx"
    label = "ONNX"
    model_file = MODEL_FILE
    weight_files = (f"{MODEL_FILE}*",)
    modules = ("onnx", "onnx_ir", "onnxruntime", "onnxruntime_genai")
    extra = "onnx"
    runtime = "onnxruntime"
    library = "onnxruntime-genai"
    usage = USAGE
    completion_usage = COMPLETION_USAGE
    tested_families = frozenset(
        {
            "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "mixtral", "qwen2_moe", "qwen3_moe",
        }
    )  # fmt: skip
    scheme_requirement = "groups, or whole rows, of a multiple of 16 weights"

    def check(self, config: Any, selection: LayerSelection) -> None:
        """Refuse what the operators of onnxruntime cannot compute; see `Exporter.check`.

        Raises:
            ExportError: see the top of this file.
            OptionError: embedding or head stay in 16 bits.
        """
        for required, got in _model_requirements(config):
            if got:
                raise ExportError(
                    f"an export to ONNX needs {required}; {config.model_type} has {got}; remove {self.name} from "
                    "--export"
                )
        if selection.schemes and len(selection.embeddings) + selection.tied < 2:
            raise OptionError(
                f"an export to ONNX needs a quantized embedding and head; --ignore leaves one in 16 bits; remove "
                f"{self.name} from --export, or the pattern"
            )
        if (found := self._experts_problem(config, selection)) is not None:
            raise ExportError(
                f"an export to ONNX needs one scheme of 4 bits for all experts of a layer; this model has {found}; "
                f"change --bits, --layer or --ignore, or remove {self.name} from --export"
            )

    def _experts_problem(self, config: Any, selection: LayerSelection) -> str | None:
        """Return what the operator for experts cannot hold; None if it can hold them."""
        widths = dict(zip(PROJECTIONS, (config.hidden_size, expert_width(config)), strict=True))
        for path, names in experts_of_layers(selection.linears).items():
            schemes = {name: selection.schemes[name] for name in names if name in selection.schemes}
            held = [self.container(scheme, widths[n.rpartition(".")[2]], False) for n, scheme in schemes.items()]
            if None in held:
                continue  # `check_schemes` refuses these groups
            missing = len(PROJECTIONS) * num_experts(config) - len(names)
            if (found := experts_problem([*held, *[None] * bool(missing)])) is not None:
                return f"{found} in {path}"
        return None

    def container(self, scheme: QuantScheme, columns: int, embedding: bool) -> QuantScheme | None:
        """Return a scheme of 4 or 8 bits, for embedding and head 8, with blocks of the operators; see `Exporter`."""
        held = four_or_eight_bits(scheme)
        if embedding and held.bits != 8:
            held = QuantScheme(8, held.group_size, symmetric=True)
        return split_groups(held, columns, BLOCK_SIZES)

    def held(self, checkpoint: QuantizedCheckpoint) -> QuantizedCheckpoint:
        """Return the model with one block size for the experts of a layer; see `Exporter.held`."""
        held = super().held(checkpoint)
        schemes = dict(held.selection.schemes)
        for names in experts_of_layers(held.selection.linears).values():
            size = min(schemes[name].group_size or 0 for name in names)
            schemes |= {name: replace(schemes[name], group_size=size) for name in names}
        return as_held(held, schemes)

    def limits(self, config: Any) -> tuple[str, ...]:
        """Say where generation differs with rotary embeddings that depend on the length; see `Exporter.limits`."""
        for parameters in _rope_parameters(config):
            tokens = parameters.get("original_max_position_embeddings")
            if parameters.get("rope_type") == "longrope" and tokens not in (None, _RECOMPUTED_LENGTH):
                return (
                    f"in the ONNX export, a generation that passes {tokens} tokens keeps the rotary embeddings of "
                    "short contexts in the keys of earlier tokens, which transformers computes again",
                )
        return ()

    def write(self, checkpoint: QuantizedCheckpoint, folder: Path) -> None:
        """Write the model; see `Exporter.write`."""
        import onnxruntime_genai as og

        from nybble.export.onnx.graph import write_graph

        write_graph(checkpoint, folder / MODEL_FILE)
        if not (folder / "tokenizer_config.json").is_file():  # a part of an export
            return
        tokenizer = og.Tokenizer(og.Config(str(folder)))
        tokenizer.update_options(add_special_tokens="true")  # as transformers does
        warn_of_other_tokens(
            "onnxruntime-genai",
            lambda text: tokenizer.encode(text).tolist(),
            checkpoint.tokenizer,
            checkpoint.config.vocab_size,
        )

    def open_model(self, folder: Path, config: Any, strict: bool = False) -> Any:
        """Open the exported model on the CPU; see `Exporter.open_model`.

        Args:
            folder: the export.
            config: transformers configuration of the model.
            strict: compute in float32. Otherwise with 8-bit activations, as deployed.

        Returns:
            An OnnxModel.
        """
        from nybble.export.onnx.runtime import FLOAT32_LEVEL, OnnxModel

        return OnnxModel(folder / MODEL_FILE, config, FLOAT32_LEVEL if strict else None)

    def read_codes(self, folder: Path) -> Mapping[str, QuantizedWeight]:
        """Read codes, scales and zero points from the initializers; see `Exporter.read_codes`."""
        return read_graph(folder / MODEL_FILE)


def _model_requirements(config: Any) -> Iterator[tuple[str, str]]:
    """Yield what a model must have, and what this one has instead, "" if it has what is required."""
    families = sorted(OnnxExporter.tested_families)
    known = config.model_type in families
    yield f"one of the model types {', '.join(families)}", "" if known else "another type"
    types = set(getattr(config, "layer_types", None) or ()) - _ATTENTION_TYPES
    yield "layers with full or sliding-window attention", ", ".join(sorted(types))
    bidirectional = getattr(config, "use_bidirectional_attention", None)
    yield "attention to earlier tokens only", "bidirectional attention" if bidirectional else ""
    ropes = _rope_parameters(config)
    allowed = _ROPE_TYPES | ({"longrope"} if config.model_type == "phi3" else set())
    other = {str(parameters.get("rope_type")) for parameters in ropes} - allowed
    yield f"rotary embeddings of type {', '.join(sorted(allowed))}", ", ".join(sorted(other))
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rotated = {int(head_size * parameters.get("partial_rotary_factor", 1)) for parameters in ropes}
    odd = [size for size in sorted({head_size, *rotated}) if size % _HEAD_MULTIPLE]
    yield f"heads that rotate a multiple of {_HEAD_MULTIPLE} values", ", ".join(map(str, odd))
    width = config.hidden_size
    yield f"a hidden size that is a multiple of {BLOCK_SIZES[0]}", str(width) if width % BLOCK_SIZES[0] else ""
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    yield f"one of the activations {', '.join(sorted(_ACTIVATIONS))}", "" if activation in _ACTIVATIONS else activation


def _rope_parameters(config: Any) -> list[Mapping[str, Any]]:
    """Return the parameters of rotary embeddings; several where they differ by the type of layer."""
    parameters = config.rope_parameters
    return [parameters] if "rope_type" in parameters else list(parameters.values())
