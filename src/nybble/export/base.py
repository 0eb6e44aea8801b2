"""Exporter: the contract of an export format, the registry of formats, and the checks that all formats share.

An exporter gets the quantized weights as codes, scales and zero points, and the rest of the model as float32 tensors.
It writes them to one folder and reads its own output back. A format that cannot hold a model refuses it in `check`,
before training starts.

Another package adds its format through the entry point group "nybble.exporters" (see registry.py), or in the same
process with `EXPORTERS.register(exporter.name, exporter)`. The registry holds instances, not classes.
"""

from __future__ import annotations

import importlib.util
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from nybble.errors import ExportError, MissingExtraError
from nybble.models.selection import LayerSelection
from nybble.quant.scheme import QuantScheme
from nybble.quant.weight import QuantizedWeight
from nybble.registry import Registry

log = logging.getLogger("nybble")


@dataclass(frozen=True)
class ExportResult:
    """What an exporter wrote.

    Attributes:
        int4_weights: number of weights written with 4-bit codes.
        int8_weights: number of weights written with 8-bit codes.
        bytes: size of the model files, without the tokenizer.
        logit_difference: largest absolute difference between the logits of the exported model and those of torch,
            both computed in float32.
    """

    int4_weights: int
    int8_weights: int
    bytes: int
    logit_difference: float


class Exporter(ABC):
    """One export format.

    Attributes:
        name: what --export calls the format, and the name of its folder in a run.
        label: how people write the name, for tables and messages.
        model_file: file name by which a folder is recognized as an export in this format.
        modules: top-level modules that exporting, opening and reading import.
        extra: optional extra of nybble that installs `modules`. A package that brings its own exporter depends on its
            modules directly and leaves both empty.
        tested_families: model types (`config.model_type`) whose export the exporter's own tests cover.
    """

    name: ClassVar[str]
    label: ClassVar[str]
    model_file: ClassVar[str]
    modules: ClassVar[tuple[str, ...]] = ()
    extra: ClassVar[str] = ""
    tested_families: ClassVar[frozenset[str]] = frozenset()

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

    @abstractmethod
    def export(
        self, model: Any, tokenizer: Any, quantized: Mapping[str, QuantizedWeight], folder: Path
    ) -> ExportResult:
        """Write the model and its tokenizer, read the codes back, and compare logits with torch.

        Args:
            model: transformers model on the CPU, float32. Its quantized layers hold the dequantized weights.
            tokenizer: transformers tokenizer of the model.
            quantized: module name -> quantized weight.
            folder: existing empty folder.

        Returns:
            What was written.

        Raises:
            ExportError: the format cannot hold the model, or what was read back differs.
        """

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
    def read_weights(self, folder: Path) -> dict[str, QuantizedWeight]:
        """Read the quantized weights of an export back from its files.

        Args:
            folder: what `export` wrote.

        Returns:
            Module name -> quantized weight.
        """


EXPORTERS: Registry[Exporter] = Registry("export format", "nybble.exporters")


def check_formats(formats: Iterable[str], option: str) -> None:
    """Check that formats are known and installed.

    Args:
        formats: names.
        option: the option that named them, for the error message.

    Raises:
        OptionError: no exporter has this name.
        MissingExtraError: the modules that the exporter needs are not installed.
    """
    for name in formats:
        EXPORTERS.get(name, option).check_installed()


def check_exportable(formats: Iterable[str], config: Any, selection: LayerSelection, scheme: QuantScheme) -> None:
    """Check that every format can hold the model, and warn of families that its tests do not cover.

    Args:
        formats: names of known formats.
        config: transformers configuration of the model.
        selection: layers that get 4-bit and 8-bit codes.
        scheme: of the 4-bit layers.

    Raises:
        ExportError: a format cannot hold the model.
        OptionError: a format cannot hold the scheme.
    """
    for name in formats:
        exporter = EXPORTERS[name]
        exporter.check(config, selection, scheme)
        for limit in exporter.limits(config):
            log.warning(limit)
        if config.model_type not in exporter.tested_families:
            log.warning(
                "export of %s models to %s is not tested; if it fails, the run keeps its 4-bit model in quantized/",
                config.model_type,
                exporter.label,
            )


def exporter_of(folder: Path) -> Exporter | None:
    """Return the exporter whose format the folder holds, or None."""
    exporters = (EXPORTERS[name] for name in EXPORTERS)
    return next((exporter for exporter in exporters if exporter.recognizes(folder)), None)


def check_read_back(written: Mapping[str, QuantizedWeight], read: Mapping[str, QuantizedWeight], folder: Path) -> None:
    """Check that an export holds exactly the quantized weights that were given to it.

    Args:
        written: module name -> quantized weight, as given to the exporter.
        read: the same, as read from the files.
        folder: the export, for the error message.

    Raises:
        ExportError: names, codes, scales or zero points differ.
    """
    if read.keys() != written.keys():
        raise ExportError(
            f"{folder} must hold {len(written)} quantized weights; {len(read)} were read back; please report this"
        )
    for name, weight in written.items():
        for what, field in (("codes", "codes_OI"), ("scales", "scale_OG"), ("zero points", "zero_point_OG")):
            if not torch.equal(getattr(weight, field).cpu(), getattr(read[name], field)):
                raise ExportError(
                    f"{folder} must hold the weights that were given to it; the {what} of {name} read back differently;"
                    " please report this"
                )
