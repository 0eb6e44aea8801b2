"""Write the OpenVINO model of a quantized model, read its codes back, and compare its logits with torch.

Files: openvino_model.xml and .bin, openvino_tokenizer.*, openvino_detokenizer.*, and the configuration and tokenizer
files of transformers; a run adds the files that came with the model. Names of inputs and outputs, their shapes and the
state are those of optimum-intel's exports, so a tool that accepts those accepts these.

Refused (ExportError): a layer type whose attention mask is not known here, a model or tokenizer that OpenVINO cannot
convert, a weight that the traced graph does not hold as a constant, codes that read back differently, and logits that
differ from those of torch by more than LOGIT_TOLERANCE in float32.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from nybble.errors import ExportError, OptionError, describe_error
from nybble.export.base import Exporter, ExportResult, check_read_back
from nybble.models.selection import LayerSelection
from nybble.quant.scheme import QuantScheme
from nybble.quant.weight import QuantizedWeight

# openvino, openvino_tokenizers and transformers are imported where they are used: they take seconds to import.

MODEL_XML = "openvino_model.xml"
LOGIT_TOLERANCE = 1e-4
"""Largest allowed difference of logits, relative to the largest: well above float32 rounding, and below the effect of
wrong codes or masks."""

_PROMPT_LENGTH, _DECODED_TOKENS = 44, 4
"""Tokens of the comparison of logits that are given at once, and then one by one."""

_ATTENTION_TYPES = {"full_attention", "sliding_attention"}
"""Entries of `config.layer_types` for which trace.py makes a mask."""

_LENGTH_DEPENDENT_ROPE = {"dynamic", "longrope"}
"""Types of rotary embeddings whose frequencies depend on the length of the context."""


class OpenVINOExporter(Exporter):
    """Export to an OpenVINO model for openvino-genai and other tools that read stateful IR models."""

    name = "openvino"
    label = "OpenVINO"
    model_file = MODEL_XML
    modules = ("openvino", "openvino_tokenizers")
    extra = "openvino"
    tested_families = frozenset({"llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3"})

    def check(self, config: Any, selection: LayerSelection, scheme: QuantScheme) -> None:
        """Refuse attention types without a mask, widths other than 4 bits and odd groups; see `Exporter.check`.

        Raises:
            ExportError: a layer of the model has another type than full or sliding-window attention.
            OptionError: the codes do not have 4 bits, or a group has an odd number of them.
        """
        other = sorted(set(getattr(config, "layer_types", None) or ()) - _ATTENTION_TYPES)
        if not other and getattr(config, "num_attention_heads", None) is None:
            other = ["no attention heads"]
        if other:
            raise ExportError(
                f"an export to OpenVINO needs layers with full or sliding-window attention; {config.model_type} has "
                f"{', '.join(other)}; remove {self.name} from --export"
            )
        if scheme.group_size is not None and scheme.group_size % 2:
            raise OptionError(
                f"an export to OpenVINO needs an even --group_size; got {scheme.group_size}; choose an even one, or "
                f"remove {self.name} from --export"
            )
        if scheme.bits != 4:
            raise OptionError(
                f"an export to OpenVINO needs 4-bit codes; got {scheme}; remove {self.name} from --export"
            )

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

    def export(
        self, model: Any, tokenizer: Any, quantized: Mapping[str, QuantizedWeight], folder: Path
    ) -> ExportResult:
        """Write the model, tokenizer and configuration; see `Exporter.export`.

        Raises:
            ExportError: one of the reasons at the top of this file.
        """
        import openvino as ov

        from nybble.export.openvino.constants import compress_constants
        from nybble.export.openvino.trace import trace_model

        graph = trace_model(model)
        compress_constants(graph, quantized)
        with _writing(folder):
            ov.save_model(graph, folder / MODEL_XML, compress_to_fp16=False)
        del graph
        _save_tokenizer(tokenizer, folder)
        with _writing(folder):
            model.config.save_pretrained(folder)
        check_read_back(quantized, self.read_weights(folder), folder)
        bits = [weight.scheme.bits for weight in quantized.values()]
        return ExportResult(
            int4_weights=bits.count(4),
            int8_weights=bits.count(8),
            bytes=sum(file.stat().st_size for file in folder.glob("openvino_model.*")),
            logit_difference=self._compare_logits(folder, model),
        )

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

    def read_weights(self, folder: Path) -> dict[str, QuantizedWeight]:
        """Read codes, scales and zero points from the constants of the saved graph; see `Exporter.read_weights`."""
        import openvino as ov

        from nybble.export.openvino.constants import read_constants

        return read_constants(ov.Core().read_model(folder / MODEL_XML))

    def _compare_logits(self, folder: Path, model: Any) -> float:
        """Compare logits with torch in float32 on fixed pseudo-random tokens, for a prompt and for decoding steps.

        Returns:
            The largest absolute difference.

        Raises:
            ExportError: it is above LOGIT_TOLERANCE times the largest logit.
        """
        length = _PROMPT_LENGTH + _DECODED_TOKENS
        ids_1T = torch.randint(0, model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            expected_1TV = model(input_ids=ids_1T, use_cache=False).logits
        exported = self.open_model(folder, model.config, strict=True)
        parts = [exported.infer(ids_1T[:, :_PROMPT_LENGTH], reset=True)]
        parts += [exported.infer(ids_1T[:, i : i + 1], reset=False) for i in range(_PROMPT_LENGTH, length)]
        difference = float((torch.cat(parts, dim=1) - expected_1TV).abs().max())
        largest = float(expected_1TV.abs().max())
        if not difference <= LOGIT_TOLERANCE * largest:  # also true for NaN
            raise ExportError(
                f"{folder} must give the logits of torch within {LOGIT_TOLERANCE} of the largest in float32; they "
                f"differ by {difference:.3g}, the largest is {largest:.3g}; please report this"
            )
        return difference


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write the tokenizer in the format of transformers and as OpenVINO models in both directions.

    Raises:
        ExportError: openvino_tokenizers cannot convert it.
    """
    import openvino as ov
    from openvino_tokenizers import convert_tokenizer

    with _writing(folder):
        tokenizer.save_pretrained(folder)
    try:
        text_to_ids, ids_to_text = convert_tokenizer(tokenizer, with_detokenizer=True)
    except Exception as error:  # the converter raises errors of many types
        raise ExportError(
            f"an export to OpenVINO needs a tokenizer that openvino_tokenizers converts; {type(tokenizer).__name__} "
            f"cannot be converted ({describe_error(error)}); remove openvino from --export"
        ) from error
    with _writing(folder):
        ov.save_model(text_to_ids, folder / "openvino_tokenizer.xml")
        ov.save_model(ids_to_text, folder / "openvino_detokenizer.xml")


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Turn the errors of libraries that cannot write into ExportError; they have no common type."""
    try:
        yield
    except Exception as error:
        free = shutil.disk_usage(folder).free
        raise ExportError(
            f"the export to {folder.parent} must be written to disk; it cannot be ({describe_error(error)}); "
            f"{free / 1e6:.0f} MB are free; free some disk space, then run: nybble export {folder.parent}"
        ) from error
