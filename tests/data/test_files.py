"""nybble.data.files: every file type gives the same rows, and a broken file is named."""

import json
import os
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from nybble.data.files import read_rows, read_utf8
from nybble.errors import DataError

ROWS = [{"text": "caf\u00e9 \u2028 one", "n": 1}, {"text": "two", "extra": None}]


@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "byte-order mark"])
@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["LF", "CRLF"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL", "a.json", "list.json"])
def test_json_rows_with_all_line_ends(name: str, end: str, mark: str, tmp_path: Path) -> None:
    if name.startswith("list"):
        text = json.dumps(ROWS, indent=1).replace("\n", end)
    else:
        text = "".join(json.dumps(row, ensure_ascii=False) + end for row in ROWS)
    (tmp_path / name).write_bytes((mark + text).encode())
    assert read_rows(tmp_path / name, "--data") == ROWS


def test_a_json_file_with_a_single_object_is_one_row(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"text": "x"}')
    assert read_rows(tmp_path / "a.json", "--data") == [{"text": "x"}]


def test_csv_cells_are_text_and_empty_cells_are_none(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b'text,n\r\n"two\nlines, one cell",1\r\n,2\r\nx,3,no header\r\n')
    assert read_rows(tmp_path / "a.csv", "--data") == [
        {"text": "two\nlines, one cell", "n": "1"},
        {"text": None, "n": "2"},
        {"text": "x", "n": "3"},
    ]


def test_parquet_file_whose_name_looks_like_a_pattern(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"text": ["a", None], "n": [1, 2]}), tmp_path / "a[1].parquet")
    assert read_rows(tmp_path / "a[1].parquet", "--data") == [{"text": "a", "n": 1}, {"text": None, "n": 2}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a"\n', "--task .*a.jsonl cannot be read as jsonl: line 2: "),
        ("a.json", b"[1, 2]", "a.json cannot be read as json: row 1 must be an object with a value for each column"),
        ("a.jsonl", b"3\n", "a.jsonl cannot be read as jsonl: row 1 must be an object .*; got 3; "),
        ("a.jsonl", b'{"a": "caf\xe9"}', "a.jsonl must be UTF-8 text; byte 10 is not; convert the file to UTF-8"),
        ("a.parquet", b"PAR1", "a.parquet cannot be read as parquet: "),
    ],
)
def test_broken_files_are_named_with_the_option(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_rows(tmp_path / name, "--task")


def test_a_missing_file_is_named_with_the_option(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"--task .*no.jsonl cannot be read: No such file or directory"):
        read_rows(tmp_path / "no.jsonl", "--task")
    with pytest.raises(DataError, match=r"--eval_data .*no.txt cannot be read"):
        read_utf8(tmp_path / "no.txt", "--eval_data")


def test_a_changed_file_is_read_again_even_with_an_old_time_stamp(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "before"}\n')
    stamp = path.stat()
    assert read_rows(path, "--data") == [{"text": "before"}]
    path.write_text('{"text": "after."}\n')
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert read_rows(path, "--data") == [{"text": "after."}]
