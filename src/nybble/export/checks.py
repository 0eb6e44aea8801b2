"""Checks of the formats that a run is asked for, before it compresses or trains; and the format of a folder."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from nybble.errors import ExportError, OptionError, RunError, without_remedy
from nybble.export.base import EXPORTERS, Exporter, check_schemes
from nybble.files import file_sizes, write_text
from nybble.models.selection import LayerSelection
from nybble.schema import SchemaError, read_json

log = logging.getLogger("nybble")

NOTE = "nybble-export.json"
"""What an export says of itself: {"format": NAME, "bytes": {FILE: SIZE}}, for what is no text."""

_TEXTS = {"", ".md", ".txt", ".jinja"}
"""Suffixes of files for people, and of chat templates, which people may edit."""

ALL = "all"
"""What --export and --to call all formats that can hold the model."""


def check_formats(formats: Sequence[str], option: str) -> None:
    """Check that formats are known and installed.

    Args:
        formats: names, or ALL.
        option: the option that named them, for the error message.

    Raises:
        OptionError: no exporter has this name.
        MissingExtraError: the modules that the exporter needs are not installed.
    """
    known = (*EXPORTERS, ALL)
    for name in formats:
        if name not in known:
            raise OptionError(
                f"{option} must name a known export format ({', '.join(known)}); got {name}; {_meant(name, known)}"
            )
    for name in (*(n for n in formats if n != ALL), *(EXPORTERS if ALL in formats else ())):
        EXPORTERS[name].check_installed()


def _meant(given: str, known: Sequence[str]) -> str:
    """What the person may have wanted to write instead of an unknown format."""
    near = [get_close_matches(part.lower(), known, 1) for part in re.split(r"[,;+/\s]+", given) if part]
    if not near or not all(near):
        return "choose one of these"
    spaces = " (several are separated by spaces)" if len(near) > 1 else ""
    return f"did you mean {' '.join(part for (part,) in near)}?{spaces}"


def check_exportable(
    formats: Sequence[str], config: Any, selection: LayerSelection, columns: Mapping[str, int]
) -> tuple[str, ...]:
    """Check that every format can hold the model, and warn of families that its tests do not cover.

    Args:
        formats: names of known formats. ALL stands for those that can hold the model; the log says which cannot.
        config: transformers configuration of the model.
        selection: layers that are quantized, with their schemes.
        columns: layer name -> weights in a row.

    Returns:
        The formats, with those that ALL stands for.

    Raises:
        ExportError: a format cannot hold the model.
        OptionError: a format cannot hold the scheme.
    """
    named = check_named(formats, config, selection, columns)
    others = [name for name in EXPORTERS if name not in named] if ALL in formats else []
    for name in others:
        try:
            _check(EXPORTERS[name], config, selection, columns)
        except (ExportError, OptionError) as error:
            # The remedy is to leave the format out, which is done here.
            log.warning("there is no export to %s: %s", EXPORTERS[name].label, without_remedy(error))
        else:
            named.append(name)
    for name in named:
        exporter = EXPORTERS[name]
        exported = exporter.exported_config(config, selection)
        if exported is not config:
            log.warning(
                "the export to %s holds the text model (%s) alone, without the other parts of %s",
                exporter.label, exported.model_type, config.model_type,
            )  # fmt: skip
        for limit in exporter.limits(exported):
            log.warning(limit)
        if exported.model_type not in exporter.tested_families:
            log.warning(
                "export of %s models to %s is not tested; if it fails, the run keeps its 4-bit model in quantized/",
                exported.model_type,
                exporter.label,
            )
    return tuple(named)


def check_named(
    formats: Sequence[str], config: Any, selection: LayerSelection, columns: Mapping[str, int]
) -> list[str]:
    """Check that every format but ALL can hold the model, without a warning; see `check_exportable`.

    Returns:
        The formats without ALL.
    """
    named = [name for name in formats if name != ALL]
    for name in named:
        _check(EXPORTERS[name], config, selection, columns)
    return named


def _check(exporter: Exporter, config: Any, selection: LayerSelection, columns: Mapping[str, int]) -> None:
    """Raise ExportError or OptionError where a format cannot hold the model or its schemes."""
    exporter.check(exporter.exported_config(config, selection), selection)
    check_schemes(exporter, selection, columns)


def note_files(folder: Path, name: str) -> None:
    """Write which format an export has and how large its files are, for `exporter_of`.

    Args:
        folder: a complete export. The note goes with it, wherever it is copied to.
        name: of its format.
    """
    sizes = {file: size for file, size in file_sizes(folder).items() if Path(file).suffix not in _TEXTS}
    write_text(folder / NOTE, json.dumps({"format": name, "bytes": sizes}, indent=2) + "\n")


def exporter_of(folder: Path) -> Exporter | None:
    """Return the exporter whose format the folder holds, or None.

    Raises:
        RunError: a file of the export is missing, or shorter than it was written.
    """
    try:
        note = read_json(folder / NOTE)
    except SchemaError:  # no export, or one of an earlier version
        note = {}
    if not isinstance(note, dict) or not isinstance(note.get("format"), str) or note["format"] not in EXPORTERS:
        exporters = (EXPORTERS[name] for name in EXPORTERS)
        return next((exporter for exporter in exporters if exporter.recognizes(folder)), None)
    sizes = note.get("bytes")
    for name, size in sizes.items() if isinstance(sizes, dict) else ():
        file = folder / name
        found = file.stat().st_size if file.is_file() else None
        if isinstance(size, int) and (found is None or found < size) and not _may_be_edited(file):
            what = "it is missing" if found is None else f"it is cut to {found}"
            raise damaged_export(file, note["format"], f"must have {size} bytes; {what}")
    return EXPORTERS[note["format"]]


def _may_be_edited(file: Path) -> bool:
    """Whether a file is JSON that is whole, or deleted: settings that people may change."""
    if file.suffix != ".json" or not file.is_file():
        return file.suffix == ".json"
    try:
        read_json(file)
    except SchemaError:
        return False
    return True


def damaged_export(path: Path, name: str, words: str) -> RunError:
    """The error for an export, or a file of one, that cannot be opened.

    Args:
        path: the export or the file.
        name: of the format.
        words: what it must be, and what it is.
    """
    return RunError(f"{path} {words}; copy it again, or make it again: nybble export RUN --to {name}")
