"""Exporter: the contract of an export format, the registry of formats, and the checks that all formats share.

An exporter gets a quantized checkpoint, whose tensors it reads one at a time, and writes it to one folder. What it
wrote is read back and compared: codes, scales and zero points where the format holds them, the dequantized weights by
the runtime's own reader, and logits. A format that cannot hold a model refuses it in `check`, before training starts.

Another package adds its format through the entry point group "nybble.exporters" (see registry.py), or in the same
process with `EXPORTERS.register(exporter.name, exporter)`. The registry holds instances, not classes.
"""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from nybble.errors import MissingExtraError, OptionError
from nybble.export.containers import as_held, four_or_eight_bits, widened
from nybble.export.read_back import compare_weights, decode_logits, logit_difference, runtime_errors
from nybble.export.result import ExportResult
from nybble.export.text_part import text_part, text_part_config
from nybble.models.checkpoint import QuantizedCheckpoint
from nybble.models.composite import text_config
from nybble.models.quantized_file import LazyMapping
from nybble.models.selection import LayerSelection
from nybble.quant.scheme import QuantScheme
from nybble.quant.weight import QuantizedWeight
from nybble.registry import Registry

_PROMPT_LENGTH, _DECODED_TOKENS = 44, 4
"""Tokens of the comparison of logits that are given at once, and then one by one."""

OVERHEAD_BYTES = 700_000_000
"""Memory of an export beside the tensors: Python, torch, transformers and a runtime."""


class Exporter(ABC):
    """One export format.

    Attributes:
        name: what --export calls the format, and the name of its folder in a run.
        label: how people write the name, for tables and messages.
        model_file: file name by which a folder is recognized as an export in this format.
        modules: top-level modules that exporting, opening and reading import.
        extra: optional extra of nybble that installs `modules`. A package that brings its own exporter depends on its
            modules directly and leaves both empty.
        runtime: what computes with an export in `open_model`, for people.
        library: what the hub calls the library that loads the format.
        usage: Markdown for the model card: the shortest way to run the export of a chat model, from its folder.
        completion_usage: the same for a model without a chat template. Empty: `usage` suits both.
        tested_families: model types (`config.model_type`) whose export the exporter's own tests cover.
        weight_files: patterns of the files that hold the model, whose sizes are added up.
        holds_codes: whether the format holds codes, not their values in 16 bits.
        scheme_requirement: what a scheme must have so that `container` finds one, in words for the error message.
        int8_tolerance: largest allowed difference of a value in an 8-bit weight, relative to the largest in its row; 0
            where the format holds these weights exactly.
        logit_tolerance: largest allowed difference of logits, relative to the largest logit, between the runtime in its
            most exact mode and torch in float32.
        decodes: whether decoding with past tokens is compared too; not where transformers runs the export.
        holds_parts: whether the format holds vision and audio parts; else an export is that of the text model inside.
        most_parameters_compared: logits of larger models are compared on request, as that takes memory. None: always.
    """

    name: ClassVar[str]
    label: ClassVar[str]
    model_file: ClassVar[str]
    weight_files: ClassVar[tuple[str, ...]]
    modules: ClassVar[tuple[str, ...]] = ()
    extra: ClassVar[str] = ""
    runtime: ClassVar[str] = ""
    library: ClassVar[str] = ""
    usage: ClassVar[str] = ""
    completion_usage: ClassVar[str] = ""
    tested_families: ClassVar[frozenset[str]] = frozenset()
    holds_codes: ClassVar[bool] = True
    scheme_requirement: ClassVar[str] = "other groups"
    int8_tolerance: ClassVar[float] = 0.0
    logit_tolerance: ClassVar[float] = 1e-4
    decodes: ClassVar[bool] = True
    holds_parts: ClassVar[bool] = False
    most_parameters_compared: ClassVar[int | None] = 150_000_000

    def check_installed(self, purpose: str = "") -> None:
        """Raise MissingExtraError, which names `purpose`, unless `modules` can be imported. Imports nothing."""
        if any(importlib.util.find_spec(module) is None for module in self.modules):
            raise MissingExtraError(self.extra, purpose or f"exporting to {self.name}")

    @abstractmethod
    def check(self, config: Any, selection: LayerSelection) -> None:
        """Refuse models that the format cannot hold. A run calls this before it compresses or trains.

        Args:
            config: transformers configuration of the model.
            selection: layers that are quantized, with their schemes.

        Raises:
            ExportError: the format cannot hold this model.
            OptionError: the format cannot hold these schemes together.
        """

    def container(self, scheme: QuantScheme, columns: int, embedding: bool) -> QuantScheme | None:
        """Return the scheme in which the format holds weights exactly (containers.py); None if it has none.

        `write` gets the weights in this scheme.

        Args:
            scheme: of the weight.
            columns: weights in a row.
            embedding: whether it is the weight of the embedding or of the head.
        """
        return four_or_eight_bits(scheme)

    def limits(self, config: Any) -> tuple[str, ...]:
        """Return what an export of this model cannot do, in sentences for the log and the report.

        Args:
            config: transformers configuration of the model.
        """
        return ()

    def how_to_run(self, config: Mapping[str, Any], chat: bool = True) -> str:
        """Return `usage`, or what an export with the config.json `config` needs instead.

        Args:
            config: content of config.json of the export.
            chat: the model has a chat template. Otherwise it continues text.
        """
        return self.usage if chat else self.completion_usage or self.usage

    def too_slow(self) -> str:
        """Why measuring an export would take hours on this machine; "" where it would not.

        A run then exports in this format without measuring; `nybble eval` measures all the same.
        """
        return ""

    def peak_memory(self, num_parameters: int, largest_tensor: int) -> int:
        """Estimate the peak memory of an export in bytes.

        Args:
            num_parameters: of the model.
            largest_tensor: bytes of the largest tensor in 16 bits.
        """
        limit = self.most_parameters_compared
        compared = limit is None or num_parameters <= limit  # the runtime then holds the weights, in float32 at most
        return OVERHEAD_BYTES + 3 * largest_tensor + 4 * num_parameters * compared

    def tolerance(self, config: Any) -> float:
        """Return `logit_tolerance`, or what a model with the transformers configuration `config` needs instead."""
        return self.logit_tolerance

    def computed_config(self, config: Any) -> Any:
        """Return the transformers configuration of what the runtime computes, where that differs (see `limits`)."""
        return config

    def export(self, checkpoint: QuantizedCheckpoint, folder: Path, compare_logits: bool = False) -> ExportResult:
        """Write a model and compare what was written.

        Args:
            checkpoint: the quantized model.
            folder: existing empty folder. Configuration and tokenizer are written there first, in the format of
                transformers.
            compare_logits: compare logits whatever the size of the model.

        Returns:
            What was written.

        Raises:
            ExportError: the format or its runtime cannot take the model, or what was read back differs.
        """
        checkpoint = checkpoint if self.holds_parts else text_part(checkpoint, self.label)
        schemes, checkpoint = checkpoint.selection.schemes, self.held(checkpoint)
        checkpoint.config.save_pretrained(folder)
        checkpoint.tokenizer.save_pretrained(folder)
        with runtime_errors(self.label, self.name):
            self.write(checkpoint, folder)
            return ExportResult(
                linear_weights=len(checkpoint.selection.linears),
                embedding_weights=len(checkpoint.selection.embeddings),
                bytes=sum(file.stat().st_size for pattern in self.weight_files for file in folder.glob(pattern)),
                rounded=self.compare_weights(checkpoint.quantized, folder),
                logit_difference=self.compare_logits(checkpoint, folder, compare_logits),
                widened=widened(schemes, checkpoint.selection.schemes) if self.holds_codes else {},
            )

    def exported_config(self, config: Any, selection: LayerSelection) -> Any:
        """Return the configuration of what is exported: of the text model, where the format does not hold other parts.

        Args:
            config: transformers configuration of the model.
            selection: layers that are quantized.

        Raises:
            ExportError: transformers has no class for the text model alone.
        """
        return config if self.holds_parts else text_part_config(config, selection.tied, self.label)

    def held(self, checkpoint: QuantizedCheckpoint) -> QuantizedCheckpoint:
        """Return the model with its weights in the schemes that the format has for them: what `write` gets.

        Raises:
            OptionError: the format cannot hold one of the schemes.
        """
        columns = {name: shape[1] for name, shape in checkpoint.shapes.items()}
        return as_held(checkpoint, check_schemes(self, checkpoint.selection, columns))

    @abstractmethod
    def write(self, checkpoint: QuantizedCheckpoint, folder: Path) -> None:
        """Write the model.

        Args:
            checkpoint: of `held`. Its tensors are to be read one at a time.
            folder: with configuration and tokenizer in the format of transformers, which may be replaced.

        Raises:
            ExportError: the format cannot hold the model.
        """

    def compare_weights(self, written: Mapping[str, QuantizedWeight], folder: Path) -> dict[str, float]:
        """Read the weights of an export back and compare them with those that were written; see `compare_weights`.

        Args:
            written: module name -> quantized weight.
            folder: the export.
        """
        has_reader = type(self).read_weights is not Exporter.read_weights  # else they are what the codes give
        weights = self.read_weights(folder) if has_reader else None
        return compare_weights(written, self.read_codes(folder), weights, self.int8_tolerance, folder)

    def compare_logits(self, checkpoint: QuantizedCheckpoint, folder: Path, always: bool = False) -> float | None:
        """Compare logits with torch in float32 on fixed pseudo-random tokens: whole, or a prompt and decoding steps.

        torch computes with the weights that the export holds, so that only the runtime can cause a difference.

        Args:
            checkpoint: the quantized model. torch reads one weight at a time.
            folder: the export.
            always: also for models of more than `most_parameters_compared`.

        Returns:
            The largest absolute difference; None where logits were not compared.

        Raises:
            ExportError: it is above `tolerance` times the largest logit.
        """
        limit = self.most_parameters_compared
        if not always and limit is not None and checkpoint.num_parameters > limit:
            return None
        length = _PROMPT_LENGTH + _DECODED_TOKENS
        generator = torch.Generator().manual_seed(0)
        ids_1T = torch.randint(0, text_config(checkpoint.config).vocab_size, (1, length), generator=generator)
        weight_of = self.read_weights(folder).__getitem__ if self.int8_tolerance else None
        with torch.no_grad():
            computed = replace(checkpoint, config=self.computed_config(checkpoint.config))
            expected_1TV = computed.build(weight_of)(input_ids=ids_1T, use_cache=False).logits
            exported = self.open_model(folder, checkpoint.config, strict=True)
            if self.decodes:
                logits_1TV = decode_logits(exported, ids_1T, _PROMPT_LENGTH)
            else:
                logits_1TV = exported(input_ids=ids_1T, use_cache=False).logits
        return logit_difference(logits_1TV, expected_1TV, self.tolerance(checkpoint.config), folder)

    def recognizes(self, folder: Path) -> bool:
        """Return whether the folder holds an export in this format."""
        return (folder / self.model_file).is_file()

    @abstractmethod
    def open_model(self, folder: Path, config: Any, strict: bool = False) -> Any:
        """Open an export as a model with the interface of transformers (forward returns logits; generate).

        Args:
            folder: what `export` wrote.
            config: transformers configuration of the model.
            strict: compute as torch does in float32, instead of as the runtime does when deployed.
        """

    @abstractmethod
    def read_codes(self, folder: Path) -> Mapping[str, QuantizedWeight]:
        """Read codes, scales and zero points of an export back from its files.

        Args:
            folder: the export.

        Returns:
            Module name -> quantized weight, read at each access; empty for a format without codes. A format that holds
            INT8 weights in 16 bits leaves them out.
        """

    def read_weights(self, folder: Path) -> Mapping[str, Tensor]:
        """Read the weights of an export back as numbers, by the reader of the runtime where it has one.

        Args:
            folder: the export.

        Returns:
            Module name -> weight, float32 [O, I], read at each access.
        """
        codes = self.read_codes(folder)
        return LazyMapping(codes, lambda name: codes[name].dequantize())


EXPORTERS: Registry[Exporter] = Registry("export format", "nybble.exporters")


def check_schemes(exporter: Exporter, selection: LayerSelection, columns: Mapping[str, int]) -> dict[str, QuantScheme]:
    """Check that a format can hold the schemes of all layers.

    Args:
        exporter: of the format.
        selection: layers that are quantized, with their schemes.
        columns: layer name -> weights in a row.

    Returns:
        Layer name -> the scheme in which the format holds it.

    Raises:
        OptionError: the format cannot hold one of the schemes.
    """
    containers = {}
    for name, scheme in selection.schemes.items():
        container = exporter.container(scheme, columns[name], name in selection.embeddings)
        if container is None:
            raise OptionError(
                f"an export to {exporter.label} needs {exporter.scheme_requirement}; {name} has {scheme} in rows of "
                f"{columns[name]}; change --bits, --group_size or --layer, or remove {exporter.name} from --export"
            )
        containers[name] = container
    return containers
