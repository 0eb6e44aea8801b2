"""Read rows from the files that users bring: .jsonl, .json, .csv and .parquet.

A file is read as it is now, without a cache, and under exactly its name: brackets and asterisks are no patterns.
"""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from nybble.errors import DataError

ROW_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


def read_utf8(path: Path, option: str) -> str:
    """Read a UTF-8 text file, with or without a byte-order mark.

    Args:
        path: the file.
        option: the option that named the file, for error messages.

    Raises:
        DataError: the file cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{option} {path} must be UTF-8 text; byte {error.start} is not; convert the file to UTF-8"
        ) from error
    except OSError as error:
        raise DataError(f"{option} {path} cannot be read: {error.strerror}") from error


def read_rows(path: Path, option: str) -> list[dict[str, Any]]:
    """Read the rows of a file in order, each as {column: value}.

    A .json file holds a list of objects, or one object a line as a .jsonl file does. A cell of a .csv file is a
    string; an empty cell is None.

    Args:
        path: the file.
        option: the option that named the file, for error messages.

    Raises:
        DataError: the file cannot be read, is not UTF-8, or does not hold what its suffix says.
    """
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _read_parquet(path, option)
    text = read_utf8(path, option)
    if suffix == ".csv":
        return [
            {name: value or None for name, value in row.items() if name is not None}
            for row in csv.DictReader(io.StringIO(text, newline=""))
        ]
    problem = f"{option} {path} cannot be read as {suffix[1:]}"
    rows = _json_list(text) if suffix == ".json" else None
    if rows is None:
        rows = [_json_line(line, f"{problem}: line {i}") for i, line in _numbered_lines(text) if line.strip()]
    for i, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise DataError(
                f"{problem}: row {i} must be an object with a value for each column; got {str(row)[:80]}; "
                'write it as {"text": "..."}'
            )
    return rows


def _numbered_lines(text: str) -> list[tuple[int, str]]:
    """(line number from 1, line). Only line feeds end a line: JSON strings may hold other separators (U+2028)."""
    return list(enumerate(text.split("\n"), 1))


def _json_list(text: str) -> list[Any] | None:
    """The list that a JSON text holds, or None for anything else."""
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, list) else None


def _json_line(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: {error}") from error


def _read_parquet(path: Path, option: str) -> list[dict[str, Any]]:
    import pyarrow
    from pyarrow import parquet

    try:
        with path.open("rb") as file:  # given a path, pyarrow would take brackets for a pattern
            return parquet.read_table(file).to_pylist()  # type: ignore[no-any-return]
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{option} {path} cannot be read as parquet: {' '.join(str(error).split())[:200]}") from error
