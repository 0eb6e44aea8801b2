"""Rows of files: every kind gives the same; what is wrong is said in one line."""

import json
import os
from pathlib import Path

import pytest

from nybble.data.files import read_rows
from nybble.errors import DataError
from nybble.evaluation import local_tasks

ROWS = [{"text": "caf\u00e9 \u2028 one", "n": 1}, {"text": "two", "extra": None}]


@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "byte-order mark"])
@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["LF", "CRLF"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL", "a.json", "list.json"])
def test_json(name: str, end: str, mark: str, tmp_path: Path) -> None:
    whole = name.startswith("list")
    text = (
        json.dumps(ROWS, indent=1).replace("\n", end)
        if whole
        else end.join(json.dumps(row, ensure_ascii=False) for row in ROWS) + end
    )
    (tmp_path / name).write_bytes((mark + text).encode())
    assert read_rows(tmp_path / name) == ROWS


def test_csv(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b'text,n\r\n"two\nlines, one cell",1\r\n,2\r\n')
    assert read_rows(tmp_path / "a.csv") == [{"text": "two\nlines, one cell", "n": "1"}, {"text": None, "n": "2"}]


def test_parquet(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": ["a", None], "n": [1, 2]}), tmp_path / "a[1].parquet")
    assert read_rows(tmp_path / "a[1].parquet") == [{"text": "a", "n": 1}, {"text": None, "n": 2}]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a"\n', "--task .*a.jsonl cannot be read as jsonl: line 2: "),
        (
            "a.json",
            b"[1, 2]",
            "a.json cannot be read as json: row 1 must be an object with a value for each column; got 1",
        ),
        ("a.jsonl", b"3\n", "a.jsonl cannot be read as jsonl: row 1 must be an object"),
        ("a.jsonl", b'{"a": "caf\xe9"}', "a.jsonl must be UTF-8 text; byte 10 is not; convert it first"),
        ("a.parquet", b"PAR1", "a.parquet cannot be read as parquet: "),
    ],
)
def test_what_is_wrong_is_named(name: str, content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words):
        read_rows(tmp_path / name, "--task")


def test_local_data_of_tasks_are_what_is_in_the_files_now(tmp_path: Path) -> None:
    """Through the same reader: no cache by time stamp, and columns that the first row lacks are kept."""
    file = tmp_path / "test.jsonl"
    file.write_text('{"a": 1}\n{"a": 2, "b": 3}\n')
    assert local_tasks.read_dataset({"test": [str(file)]})["test"].to_list() == [{"a": 1, "b": None}, {"a": 2, "b": 3}]
    stamp = file.stat()
    file.write_text('{"a": 4}\n{"a": 5, "b": 6}\n')
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert local_tasks.read_dataset({"test": [str(file)]})["test"].to_list()[0]["a"] == 4
