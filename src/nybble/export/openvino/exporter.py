"""Write the OpenVINO model of a quantized model.

Files: openvino_model.xml and .bin, openvino_tokenizer.*, openvino_detokenizer.*, and the configuration and tokenizer
files of transformers; a run adds the files that came with the model. Names of inputs and outputs, their shapes and the
state are those of optimum-intel's exports, so a tool that accepts those accepts these.

Refused (ExportError): a layer that keeps something that is not known here, a model or tokenizer that OpenVINO cannot
convert, and a weight that the traced graph does not use.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nybble.errors import ExportError, describe_error
from nybble.export.base import OVERHEAD_BYTES, Exporter
from nybble.export.containers import four_or_eight_bits
from nybble.export.tokenizer_check import warn_of_other_tokens
from nybble.models.checkpoint import QuantizedCheckpoint
from nybble.models.selection import LayerSelection
from nybble.quant.scheme import QuantScheme
from nybble.quant.weight import QuantizedWeight

# openvino, openvino_tokenizers and transformers are imported where they are used: they take seconds to import.

MODEL_XML = "openvino_model.xml"
USAGE = """
```python
# pip install openvino-genai
import openvino_genai

pipe = openvino_genai.LLMPipeline(".", "CPU")
print(pipe.generate("What is 4-bit quantization?", max_new_tokens=100))
```
"""

_LENGTH_DEPENDENT_ROPE = {"dynamic", "longrope"}
"""Types of rotary embeddings whose frequencies depend on the length of the context."""


_SPACES, _SPACES_BEFORE_DIGITS = r"|\s+(?!\S)|\s+", r"|\s+(?=\p{N})"
"""Parts of the regular expression that splits text for byte-level BPE."""


class OpenVINOExporter(Exporter):
    """Export to an OpenVINO model for openvino-genai and other tools that read stateful IR models."""

    name = "openvino"
    label = "OpenVINO"
    model_file = MODEL_XML
    weight_files = ("openvino_model.*",)
    modules = ("openvino", "openvino_tokenizers")
    extra = "openvino"
    runtime = "OpenVINO"
    library = "openvino"
    usage = USAGE
    completion_usage = USAGE.replace("What is 4-bit quantization?", "The capital of France is")
    tested_families = frozenset(
        {
            "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3",
            "falcon", "bloom", "mpt", "gpt_bigcode", "youtu",
            "lfm2", "qwen3_5_text", "qwen3_next", "olmo_hybrid", "mamba", "mamba2", "falcon_mamba", "falcon_h1",
            "bamba", "granitemoehybrid", "nemotron_h", "jamba",
            "mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "glm4_moe", "granitemoe", "olmoe", "ernie4_5_moe", "phimoe",
            "llama4_text", "deepseek_v2", "deepseek_v3", "lfm2_moe", "qwen3_5_moe_text", "longcat_flash",
            "jetmoe", "kimi_linear",
        }
    )  # fmt: skip
    scheme_requirement = "an even number of weights in a group"
    most_parameters_compared = None  # the runtime computes with the codes

    def check(self, config: Any, selection: LayerSelection) -> None:
        """Refuse layers with unknown states; see `Exporter.check`.

        Raises:
            ExportError: a layer of the model keeps something that states.py does not know.
        """
        from nybble.export.openvino.states import check_cache

        check_cache(config)

    def container(self, scheme: QuantScheme, columns: int, embedding: bool) -> QuantScheme | None:
        """Return a scheme of 4 or 8 bits, with even groups of 4-bit codes; see `Exporter.container`.

        The CPU plugin reads 2-bit constants too, but fails on them with the 8-bit activations of its defaults.
        """
        held = four_or_eight_bits(scheme)
        return held if held.bits == 8 or (held.group_size or columns) % 2 == 0 else None

    def limits(self, config: Any) -> tuple[str, ...]:
        """Say up to which length rotary embeddings are right that depend on the length; see `Exporter.limits`."""
        parameters = getattr(config, "rope_parameters", None) or {}
        of_layers = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
        if _LENGTH_DEPENDENT_ROPE.isdisjoint({entry.get("rope_type") for entry in of_layers}):
            return ()
        tokens = parameters.get("original_max_position_embeddings") or config.max_position_embeddings
        return (
            f"the OpenVINO export is right up to {tokens} tokens: beyond them this model changes its rotary "
            "embeddings, and the export keeps those of short contexts",
        )

    def peak_memory(self, num_parameters: int, largest_tensor: int) -> int:
        """Estimate the peak memory: the graph holds all codes, and so does the compiled model; see `Exporter`."""
        return OVERHEAD_BYTES + 3 * num_parameters // 2

    def write(self, checkpoint: QuantizedCheckpoint, folder: Path) -> None:
        """Write the model and the tokenizer; see `Exporter.write`.

        Raises:
            ExportError: one of the reasons at the top of this file.
        """
        from nybble.export.openvino.constants import insert_codes, shrink_constants
        from nybble.export.openvino.trace import trace_model

        traced = trace_model(checkpoint)
        shrink_constants(traced.graph)
        insert_codes(traced, checkpoint.quantized, checkpoint.selection.embeddings)
        _save_graph(traced.graph, folder / MODEL_XML)
        _save_tokenizer(checkpoint.tokenizer, folder, checkpoint.config.vocab_size)

    def open_model(self, folder: Path, config: Any, strict: bool = False) -> Any:
        """Compile the exported model for the CPU; see `Exporter.open_model`.

        Args:
            folder: the export.
            config: transformers configuration of the model.
            strict: compute in float32. Otherwise with OpenVINO's own settings: 8-bit activations that are quantized
                dynamically, and bf16 where the hardware has it.

        Returns:
            An OpenVINOModel.
        """
        from nybble.export.openvino.runtime import FLOAT32_PROPERTIES, OpenVINOModel

        return OpenVINOModel(folder / MODEL_XML, config, FLOAT32_PROPERTIES if strict else {})

    def read_codes(self, folder: Path) -> Mapping[str, QuantizedWeight]:
        """Read codes, scales and zero points from the constants of the saved graph; see `Exporter.read_codes`."""
        from nybble.export.openvino.constants import read_constants
        from nybble.export.openvino.runtime import core

        return read_constants(core().read_model(folder / MODEL_XML))


def _save_tokenizer(tokenizer: Any, folder: Path, vocab_size: int) -> None:
    """Write the tokenizer as OpenVINO models in both directions, and warn where it splits texts in another way.

    Raises:
        ExportError: openvino_tokenizers cannot convert it.
    """
    import openvino as ov
    from openvino_tokenizers import convert_tokenizer

    try:
        text_to_ids, ids_to_text = convert_tokenizer(tokenizer, with_detokenizer=True)
    except Exception as error:  # the converter raises errors of many types
        raise ExportError(
            f"an export to OpenVINO needs a tokenizer that openvino_tokenizers converts; {type(tokenizer).__name__} "
            f"cannot be converted ({describe_error(error)}); remove openvino from --export"
        ) from error
    if _splits_digits_first(tokenizer):
        _keep_spaces_before_digits(text_to_ids)
    compiled = ov.compile_model(text_to_ids, "CPU")
    warn_of_other_tokens("OpenVINO", lambda text: compiled({0: [text]})["input_ids"][0].tolist(), tokenizer, vocab_size)
    _save_graph(text_to_ids, folder / "openvino_tokenizer.xml")
    _save_graph(ids_to_text, folder / "openvino_detokenizer.xml")


def _splits_digits_first(tokenizer: Any) -> bool:
    """Whether digits are split off before the regular expression of byte-level BPE sees the text (SmolLM2)."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    pre = (json.loads(backend.to_str())["pre_tokenizer"] or {}) if backend is not None else {}
    return [step["type"] for step in pre.get("pretokenizers", ())] == ["Digits", "ByteLevel"]


def _keep_spaces_before_digits(graph: Any) -> None:
    """Let a run of spaces before a digit stay whole, in place.

    openvino_tokenizers puts both steps into one regular expression, in which the last space goes to what follows.
    """
    import numpy as np
    import openvino as ov

    for node in graph.get_ordered_ops():
        if node.get_type_name() != "RegexSplit":
            continue
        constant = node.input_value(node.get_input_size() - 1).get_node()
        pattern = bytes(constant.get_data()).decode()
        if pattern.endswith(_SPACES):
            changed = pattern.removesuffix(_SPACES) + _SPACES_BEFORE_DIGITS + _SPACES
            new = ov.opset1.constant(np.frombuffer(changed.encode(), np.uint8))
            node.input(node.get_input_size() - 1).replace_source_output(new.output(0))


def _save_graph(graph: Any, path: Path) -> None:
    """Write a graph. Names with a number of this process get one of this graph: equal models have equal files."""
    import openvino as ov

    graph.set_friendly_name("model")
    for i, node in enumerate(graph.get_ordered_ops()):
        kind, _, number = node.get_friendly_name().rpartition("_")
        if number.isdigit():
            node.set_friendly_name(f"{kind}_{i}")
    with _writing(path.parent):
        ov.save_model(graph, path, compress_to_fp16=False)


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Turn the errors of libraries that cannot write into ExportError; they have no common type."""
    try:
        yield
    except Exception as error:
        free = shutil.disk_usage(folder).free
        raise ExportError(
            f"the export to {folder.parent} must be written to disk; it cannot be ({describe_error(error)}); "
            f"{free / 1e6:.0f} MB are free; free some disk space, then run: nybble export {folder.parent} --to openvino"
        ) from error
