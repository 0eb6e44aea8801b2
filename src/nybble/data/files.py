"""Read rows from the files that users bring: .jsonl, .json, .csv and .parquet.

A file is read as it is now, without a cache, and under exactly its name: brackets and asterisks are no patterns. Side
effect: csv's limit on the size of a cell is raised while a .csv file is read.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from nybble.errors import DataError

# Lists in lists. Conversations with tools need some ten; Arrow takes 64, and Python's own limit depends on the caller.
_MAX_NESTING = 50
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
    string; an empty cell is None. Whether a value is of use is for the reader of its column to say.

    Args:
        path: the file; its suffix may be in upper or lower case.
        option: the option that named the file, for error messages.

    Raises:
        DataError: the file cannot be read, is not UTF-8, or does not hold what its suffix says; an object or a header
            has two columns of one name.
    """
    suffix = path.suffix.lower()
    problem = f"{option} {path} cannot be read as {suffix[1:]}"
    if suffix == ".parquet":
        return _read_parquet(path, problem)
    if suffix == ".csv":
        return _parse_csv(read_utf8(path, option), problem)
    if suffix == ".json" and (text := read_utf8(path, option)).lstrip().startswith("["):
        rows = list(_parse_json(text, problem))
    else:
        lines = enumerate(_read_lines(path, option), 1)
        rows = [_parse_json(line, f"{problem}: line {i}") for i, line in lines if line.strip()]
    for i, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise DataError(
                f"{problem}: row {i} must be an object with a value for each column; got {str(row)[:80]}; "
                'write it as {"text": "..."}'
            )
    return rows


def _read_lines(path: Path, option: str) -> Iterator[str]:
    """The lines of a file, which is not read whole: large ones take several times their size as one text.

    Only line feeds end a line: JSON strings may hold other separators (U+2028).
    """
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            yield from file
    except (UnicodeDecodeError, OSError):
        read_utf8(path, option)  # says where
        raise


def check_unicode(value: Any, where: str) -> None:
    """Check that all text in a value is Unicode: a JSON file can hold one half of a pair of surrogates.

    Args:
        value: a text, or lists and objects that hold texts.
        where: where the value stands, for error messages.

    Raises:
        DataError: a surrogate stands alone.
    """
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where} must be Unicode text; it has {text[error.start]!a}, which is half of a character; "
            "remove it from the file"
        ) from error


def _parse_json(text: str, problem: str) -> Any:
    try:
        value = json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{problem}: {error}; correct the file") from error
    if text.count("[") + text.count("{") > _MAX_NESTING and _is_nested_deeper(value, _MAX_NESTING):
        raise DataError(f"{problem}: it has lists in lists, more than {_MAX_NESTING} deep; correct the file")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Raises ValueError for a name that occurs twice, of which json itself would take the last one."""
    found = dict(pairs)
    if len(found) < len(pairs):
        _refuse_repeated([name for name, _ in pairs])
    return found


def _refuse_repeated(names: Sequence[str]) -> None:
    repeated = [name for name, count in Counter(names).items() if count > 1 and name]
    if repeated:
        raise ValueError(f"{repeated[0][:80]!r} must be the name of one value; it occurs more than once")


def _is_nested_deeper(value: Any, most: int) -> bool:
    level = [value]
    for _ in range(most + 1):
        containers = [item for item in level if isinstance(item, dict | list)]
        level = [child for item in containers for child in (item.values() if isinstance(item, dict) else item)]
    return bool(level)


def _parse_csv(text: str, problem: str) -> list[dict[str, Any]]:
    limit = csv.field_size_limit(len(text) + 1)  # a cell may hold a whole document; the limit is of the process
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        _refuse_repeated(reader.fieldnames or ())
        return [{name: value or None for name, value in row.items() if name is not None} for row in reader]
    except (csv.Error, ValueError) as error:
        raise DataError(f"{problem}: line {reader.reader.line_num}: {error}; correct the file") from error
    finally:
        csv.field_size_limit(limit)


def _read_parquet(path: Path, problem: str) -> list[dict[str, Any]]:
    import pyarrow
    from pyarrow import parquet

    try:
        with path.open("rb") as file:  # given a path, pyarrow would take brackets for a pattern
            table = parquet.ParquetFile(file).read()
        _refuse_repeated(table.column_names)
        columns = [_python_values(column) for column in table.columns]
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise DataError(f"{problem}: {' '.join(str(error).split())[:200]}; correct the file") from error
    return [dict(zip(table.column_names, row, strict=True)) for row in zip(*columns, strict=True)]


def _python_values(column: Any) -> list[Any]:
    """Values of a parquet column.

    What Python cannot hold stays raw, as it may be unused: text that is not UTF-8 as bytes, dates as numbers.
    """
    import pyarrow

    try:
        return column.to_pylist()  # type: ignore[no-any-return]
    except (ValueError, OverflowError, KeyError):  # KeyError: an unknown time zone
        is_text = column.type in (pyarrow.string(), pyarrow.large_string())
        return column.cast(pyarrow.binary() if is_text else pyarrow.int64()).to_pylist()  # type: ignore[no-any-return]
