"""Rows of files that people bring: .jsonl, .json, .csv, .parquet. The file named is read, and no other: what is in it now, not what a cache says of it."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from nybble.errors import DataError

ROW_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


def read_utf8(path: Path, flag: str = "--data") -> str:
    """The text of a UTF-8 file, with or without a byte-order mark.

    Raises:
        DataError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{flag} {path} must be UTF-8 text; byte {error.start} is not; convert it first") from error
    except OSError as error:
        raise DataError(f"{flag} {path} cannot be read: {error.strerror}") from error


def read_rows(path: Path, flag: str = "--data") -> list[dict[str, Any]]:
    """The rows of a file, in their order, each as column -> value.

    A .json file is a list of objects, or holds one object a line as .jsonl does. Cells of a .csv file are text; empty ones are None.

    Args:
        flag: the option that named the file, for errors.

    Raises:
        DataError: the file cannot be read, is not UTF-8, or is not what its suffix says.
    """
    kind = path.suffix.lower()
    if kind == ".parquet":
        return _read_parquet(path, flag)
    text = read_utf8(path, flag)
    if kind == ".csv":
        return [
            {name: value or None for name, value in row.items() if name is not None}
            for row in csv.DictReader(io.StringIO(text, newline=""))
        ]
    rows = None
    if kind == ".json":
        try:
            rows = json.loads(text)
        except ValueError:  # one object a line
            rows = None
    if not isinstance(rows, list):
        rows = [
            _object(line, f"{flag} {path} cannot be read as {kind[1:]}: line {i}")
            for i, line in enumerate(text.split("\n"), 1)
            if line.strip()
        ]
    odd = next((i for i, row in enumerate(rows, 1) if not isinstance(row, dict)), None)
    if odd is not None:
        raise DataError(
            f"{flag} {path} cannot be read as {kind[1:]}: row {odd} must be an object with a value for each column; got {str(rows[odd - 1])[:80]}"
        )
    return rows


def _object(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: {error}") from error


def _read_parquet(path: Path, flag: str) -> list[dict[str, Any]]:
    import pyarrow
    from pyarrow import parquet

    try:
        with path.open("rb") as file:  # a name is taken as it is, brackets too
            return parquet.read_table(file).to_pylist()  # type: ignore[no-any-return]
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{flag} {path} cannot be read as parquet: {' '.join(str(error).split())[:200]}") from error
