"""Exporter: the contract of an export format, the registry of formats, and the checks that all formats share.

An exporter gets a quantized checkpoint, whose tensors it reads one at a time, and writes it to one folder. What it
wrote is read back and compared: codes, scales and zero points where the format holds them, the dequantized weights by
the runtime's own reader, and logits. A format that cannot hold a model refuses it in `check`, before training starts.

Another package adds its format through the entry point group "nybble.exporters" (see registry.py), or in the same
process with `EXPORTERS.register(exporter.name, exporter)`. The registry holds instances, not classes.
"""

from __future__ import annotations

import importlib.util
import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from nybble.errors import ExportError, MissingExtraError, OptionError
from nybble.export.read_back import compare_weights, decode_logits, runtime_errors
from nybble.models.checkpoint import QuantizedCheckpoint
from nybble.models.quantized_file import LazyMapping
from nybble.models.selection import LayerSelection
from nybble.quant.scheme import QuantScheme
from nybble.quant.weight import QuantizedWeight
from nybble.registry import Registry

log = logging.getLogger("nybble")

_PROMPT_LENGTH, _DECODED_TOKENS = 44, 4
"""Tokens of the comparison of logits that are given at once, and then one by one."""

OVERHEAD_BYTES = 700_000_000
"""Memory of an export beside the tensors: Python, torch, transformers and a runtime."""


@dataclass(frozen=True)
class ExportResult:
    """What was exported.

    Attributes:
        int4_weights: number of weights written with 4-bit codes.
        int8_weights: number of weights with 8-bit codes; a format may hold them in 16 bits.
        bytes: size of the model files, without the tokenizer.
        logit_difference: largest absolute difference between the logits of the exported model and those of torch in
            float32 with the weights that the export holds; None where they were not compared.
        rounded: weight that the format cannot hold exactly -> largest difference of one of its values.
    """

    int4_weights: int
    int8_weights: int
    bytes: int
    logit_difference: float | None
    rounded: dict[str, float] = field(default_factory=dict)


class Exporter(ABC):
    """One export format.

    Attributes:
        name: what --export calls the format, and the name of its folder in a run.
        label: how people write the name, for tables and messages.
        model_file: file name by which a folder is recognized as an export in this format.
        modules: top-level modules that exporting, opening and reading import.
        extra: optional extra of nybble that installs `modules`. A package that brings its own exporter depends on its
            modules directly and leaves both empty.
        library: what the hub calls the library that loads the format.
        usage: Markdown for the model card: the shortest way to run the export, from its folder.
        tested_families: model types (`config.model_type`) whose export the exporter's own tests cover.
        weight_files: patterns of the files that hold the model, whose sizes are added up.
        holds_codes: whether the format holds INT4 codes, not their values in 16 bits.
        int8_tolerance: largest allowed difference of a value in an 8-bit weight, relative to the largest in its row; 0
            where the format holds these weights exactly.
        logit_tolerance: largest allowed difference of logits, relative to the largest logit, between the runtime in its
            most exact mode and torch in float32.
        decodes: whether decoding with past tokens is compared too; not where transformers runs the export.
        most_parameters_compared: logits of larger models are not compared, as that takes memory. None: always compared.
    """

    name: ClassVar[str]
    label: ClassVar[str]
    model_file: ClassVar[str]
    weight_files: ClassVar[tuple[str, ...]]
    modules: ClassVar[tuple[str, ...]] = ()
    extra: ClassVar[str] = ""
    library: ClassVar[str] = ""
    usage: ClassVar[str] = ""
    tested_families: ClassVar[frozenset[str]] = frozenset()
    holds_codes: ClassVar[bool] = True
    int8_tolerance: ClassVar[float] = 0.0
    logit_tolerance: ClassVar[float] = 1e-4
    decodes: ClassVar[bool] = True
    most_parameters_compared: ClassVar[int | None] = 150_000_000

    def check_installed(self) -> None:
        """Check that `modules` can be imported, without importing them.

        Raises:
            MissingExtraError: a module is not installed.
        """
        if any(importlib.util.find_spec(module) is None for module in self.modules):
            raise MissingExtraError(self.extra, f"exporting to {self.name}")

    @abstractmethod
    def check(self, config: Any, selection: LayerSelection, scheme: QuantScheme) -> None:
        """Refuse what the format cannot hold. A run calls this before it compresses or trains.

        Args:
            config: transformers configuration of the model.
            selection: layers that get 4-bit and 8-bit codes.
            scheme: of the 4-bit layers.

        Raises:
            ExportError: the format cannot hold this model.
            OptionError: the format cannot hold this scheme.
        """

    def limits(self, config: Any) -> tuple[str, ...]:
        """Return what an export of this model cannot do, in sentences for the log and the report.

        Args:
            config: transformers configuration of the model.
        """
        return ()

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

    def export(self, checkpoint: QuantizedCheckpoint, folder: Path) -> ExportResult:
        """Write a model and compare what was written.

        Args:
            checkpoint: the quantized model.
            folder: existing empty folder. Configuration and tokenizer are written there first, in the format of
                transformers.

        Returns:
            What was written.

        Raises:
            ExportError: the format or its runtime cannot take the model, or what was read back differs.
        """
        checkpoint.config.save_pretrained(folder)
        checkpoint.tokenizer.save_pretrained(folder)
        with runtime_errors(self.label, self.name):
            self.write(checkpoint, folder)
            return ExportResult(
                int4_weights=len(checkpoint.selection.int4),
                int8_weights=len(checkpoint.selection.int8),
                bytes=sum(file.stat().st_size for pattern in self.weight_files for file in folder.glob(pattern)),
                rounded=self.compare_weights(checkpoint.quantized, folder),
                logit_difference=self.compare_logits(checkpoint, folder),
            )

    @abstractmethod
    def write(self, checkpoint: QuantizedCheckpoint, folder: Path) -> None:
        """Write the model.

        Args:
            checkpoint: the quantized model. Its tensors are to be read one at a time.
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

    def compare_logits(self, checkpoint: QuantizedCheckpoint, folder: Path) -> float | None:
        """Compare logits with torch in float32 on fixed pseudo-random tokens: whole, or a prompt and decoding steps.

        torch computes with the weights that the export holds, so that only the runtime can cause a difference.

        Args:
            checkpoint: the quantized model. torch reads one weight at a time.
            folder: the export.

        Returns:
            The largest absolute difference; None for a model of more than `most_parameters_compared`.

        Raises:
            ExportError: it is above `tolerance` times the largest logit.
        """
        limit = self.most_parameters_compared
        if limit is not None and checkpoint.num_parameters > limit:
            return None
        length = _PROMPT_LENGTH + _DECODED_TOKENS
        generator = torch.Generator().manual_seed(0)
        ids_1T = torch.randint(0, checkpoint.config.vocab_size, (1, length), generator=generator)
        weight_of = self.read_weights(folder).__getitem__ if self.int8_tolerance else None
        with torch.no_grad():
            expected_1TV = checkpoint.build(weight_of)(input_ids=ids_1T, use_cache=False).logits
            exported = self.open_model(folder, checkpoint.config, strict=True)
            if self.decodes:
                logits_1TV = decode_logits(exported, ids_1T, _PROMPT_LENGTH)
            else:
                logits_1TV = exported(input_ids=ids_1T, use_cache=False).logits
        difference = float((logits_1TV.float() - expected_1TV).abs().max())
        largest = float(expected_1TV.abs().max())
        tolerance = self.tolerance(checkpoint.config)
        if not difference <= tolerance * largest:  # also true for NaN
            raise ExportError(
                f"{folder} must give the logits of torch within {tolerance} of the largest in float32; they "
                f"differ by {difference:.3g}, the largest is {largest:.3g}; please report this"
            )
        return difference

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

        Returns:
            The model.
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


ALL = "all"
"""What --export and --to call all formats that can hold the model."""

EXPORTERS: Registry[Exporter] = Registry("export format", "nybble.exporters")


def check_formats(formats: Sequence[str], option: str) -> None:
    """Check that formats are known and installed.

    Args:
        formats: names, or ALL.
        option: the option that named them, for the error message.

    Raises:
        OptionError: no exporter has this name.
        MissingExtraError: the modules that the exporter needs are not installed.
    """
    for name in (*(n for n in formats if n != ALL), *(EXPORTERS if ALL in formats else ())):
        EXPORTERS.get(name, option).check_installed()


def check_exportable(
    formats: Sequence[str], config: Any, selection: LayerSelection, scheme: QuantScheme
) -> tuple[str, ...]:
    """Check that every format can hold the model, and warn of families that its tests do not cover.

    Args:
        formats: names of known formats. ALL stands for those that can hold the model; the log says which cannot.
        config: transformers configuration of the model.
        selection: layers that get 4-bit and 8-bit codes.
        scheme: of the 4-bit layers.

    Returns:
        The formats, with those that ALL stands for.

    Raises:
        ExportError: a format cannot hold the model.
        OptionError: a format cannot hold the scheme.
    """
    named = [name for name in formats if name != ALL]
    others = [name for name in EXPORTERS if name not in named] if ALL in formats else []
    for name in named:
        EXPORTERS[name].check(config, selection, scheme)
    for name in others:
        try:
            EXPORTERS[name].check(config, selection, scheme)
        except (ExportError, OptionError) as error:
            log.warning("there is no export to %s: %s", EXPORTERS[name].label, error)
        else:
            named.append(name)
    for name in named:
        exporter = EXPORTERS[name]
        for limit in exporter.limits(config):
            log.warning(limit)
        if config.model_type not in exporter.tested_families:
            log.warning(
                "export of %s models to %s is not tested; if it fails, the run keeps its 4-bit model in quantized/",
                config.model_type,
                exporter.label,
            )
    return tuple(named)


def exporter_of(folder: Path) -> Exporter | None:
    """Return the exporter whose format the folder holds, or None."""
    exporters = (EXPORTERS[name] for name in EXPORTERS)
    return next((exporter for exporter in exporters if exporter.recognizes(folder)), None)
