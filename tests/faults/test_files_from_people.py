"""Files that users bring: --data, --task and the local files of lm-eval read them alike, or name what is wrong."""

import codecs
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from nybble.cli.main import main
from nybble.data.files import read_rows
from nybble.data.sources import load_documents
from nybble.errors import DataError, NybbleError, OptionError
from nybble.evaluation import lm_eval
from nybble.evaluation.local_tasks import read_dataset
from nybble.tasks import sources
from tests.helpers.cases import fast_cases
from tests.helpers.chat import CONVERSATION
from tests.helpers.questions import request

ROWS: list[dict[str, Any]] = [
    {"text": f"caf\u00e9 \u2028 {i}\n", "prompt": f"p{i}", "choices": ["a", "b"], "answer": i % 2} for i in range(20)
]


def lines(rows: list[Any], end: str = "\n") -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + end for row in rows)


def with_row(line: str) -> str:
    """The rows and one more, which is given as JSON."""
    return lines(ROWS) + line + "\n"


def odd(value: str, name: str = "unused") -> str:
    """The rows and one more with another column."""
    return with_row(f'{{"text": "t", "prompt": "p", "choices": ["a", "b"], "answer": 0, "{name}": {value}}}')


def read_data(path: Path) -> int:
    splits = load_documents(str(path), "text", None, ("train", "test"))
    return sum(len(splits[split]) for split in ("train", "validation", "test"))


def read_task(path: Path) -> int:
    assert not sources.is_scored_by_lm_eval(str(path))
    dataset = sources.load_task(request(path))
    return len(dataset.train) + len(dataset.held_out) + len(dataset.scored)


def read_local(path: Path) -> int:
    return len(read_dataset({"test": [str(path)]})["test"])


READERS = {"--data": read_data, "--task": read_task, "--data_dir": read_local}


@pytest.fixture(params=READERS)
def option(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def read(option: str) -> Callable[[Path], int]:
    return READERS[option]


SUFFIXES, MARKS, ENDS = ("jsonl", "JSONL", "Jsonl", "json", "JSON"), (b"", codecs.BOM_UTF8), ("\n", "\r\n", "\n\n \n")
COMBINATIONS = [*itertools.product(SUFFIXES, MARKS, ENDS)]
TOGETHER = [("jsonl", b"", "\n"), ("JSONL", codecs.BOM_UTF8, "\r\n"), ("json", b"", "\r\n"), ("Jsonl", b"", "\n\n \n"),
            ("JSON", codecs.BOM_UTF8, "\n\n \n")]  # fmt: skip


@pytest.mark.parametrize(("suffix", "mark", "end"), fast_cases(COMBINATIONS, TOGETHER))
def test_json_lines_are_read(read: Callable[[Path], int], suffix: str, mark: bytes, end: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows.{suffix}"
    path.write_bytes(mark + lines(ROWS, end).encode())
    assert read(path) == 20


@pytest.mark.parametrize("suffix", ["parquet", "PARQUET", "list.json"])
def test_other_files_of_rows_are_read(read: Callable[[Path], int], suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows.{suffix}"
    if suffix == "list.json":
        path.write_text(json.dumps(ROWS, indent=1))
    else:
        parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    assert read(path) == 20


@pytest.mark.parametrize(
    "content",
    [
        lines([row | {"x": 1 if i < 5 else None, "date": "2024-01-01T00:00:00"} for i, row in enumerate(ROWS)]),
        odd("NaN"),
        odd("-Infinity"),
        odd("1e999"),
        odd('{"a": [[{}]]}'),
        odd("[" * 40 + "]" * 40),
        odd(r'"\ud83d\ude00"'),
        with_row('{"text": "only", "prompt": "p", "choices": ["a", "b"], "answer": 0}'),
    ],
)
def test_unused_columns_do_not_matter(read: Callable[[Path], int], content: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(content)
    assert read(tmp_path / "rows.jsonl") == content.count("\n")


@pytest.mark.parametrize(
    "content",
    [
        odd("9" * 50),
        odd(r'"\udfff"'),
        odd("1", r"\udfff"),
        lines([row | {"x": 1 if i < 5 else "one"} for i, row in enumerate(ROWS)]),
    ],
)
def test_columns_that_arrow_cannot_hold_matter_to_lm_eval_only(content: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    assert read_data(path) == read_task(path) == content.count("\n")
    with pytest.raises(DataError, match="column x|column unused|the column names of") as error:
        read_local(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "caf\xe9"}', "must be UTF-8 text; byte 13 is not; convert the file to UTF-8"),
        ("a.json", b'[{"text": "caf\xe9"}]', "must be UTF-8 text; byte 14"),
        ("a.JSONL", "\u20ac".encode("utf-16"), "must be UTF-8 text; byte 0"),
        ("a.jsonl", odd("1", "text"), "line 21: 'text' must be the name of one value; it occurs more than once"),
        ("a.json", '[{"text": "a",\n"x": {"y": 1, "y": 2}}]', "'y' must be the name of one value"),
        ("a.jsonl", odd("[" * 60 + "]" * 60), "line 21: it has lists in lists, more than 50 deep"),
        ("a.jsonl", odd("[" * 900 + "]" * 900), "line 21: .* more than 50 deep"),
        ("a.jsonl", odd('{"a":' * 10**5 + "1" + "}" * 10**5), "line 21: maximum recursion depth exceeded"),
        ("a.json", "[" * 10**5, "maximum recursion depth exceeded"),
        ("a.jsonl", odd("9" * 5000), "line 21: Exceeds the limit"),
        ("a.jsonl", with_row('{"text": "a"} x'), "line 21: Extra data"),
        ("a.json", '[{"text": "a"},', "cannot be read as json: Expecting value"),
        ("a.jsonl", "", "must have at least|must hold rows in"),
        ("a.jsonl", "\n \n", "must have at least|must hold rows in"),
        ("a.json", "[]", "must have at least|must hold rows in"),
        ("a.parquet", b"", "cannot be read as parquet: Parquet file size is 0 bytes"),
        ("a.jsonl", None, "Is a directory|must hold a file with the word train"),
        ("a.parquet", None, "Is a directory|must hold a file with the word train"),
    ],
)
def test_what_cannot_be_read_is_named_in_one_line(
    read: Callable[[Path], int], option: str, name: str, content: bytes | str | None, message: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(DataError, match=message) as error:
        read(path)
    assert str(error.value).startswith(option)
    assert name in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", ["txt", "md", "raw", "csv", "CSV", "TXT"])
def test_text_of_another_encoding_is_refused_for_every_suffix(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{suffix}"
    path.write_bytes("text\ncaf\u00e9\n".encode("latin-1"))
    with pytest.raises(DataError, match=f"--data .*a.{suffix} must be UTF-8 text; byte 8 is not"):
        read_data(path)


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        (["a\0b", "c"], ["a\0b", "c"]),
        (["x" * 200_000, "c"], ["x" * 200_000, "c"]),
        (['"two\nlines ""quoted"""', 'inside "quotes"'], ['two\nlines "quoted"', 'inside "quotes"']),
    ],
    ids=["NUL", "long", "quotes"],
)
def test_cells_of_a_csv_file(cells: list[str], expected: list[str], tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\n" + "\n".join(cells) + "\n")
    assert [row["text"] for row in read_rows(tmp_path / "a.csv", "--data")] == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('text\na\n"b\nc\n', "cannot be read as csv: line 4: unexpected end of data"),
        ('text\n"a"b\n', "cannot be read as csv: line 2: .* expected after"),
        ("text,text\na,b\n", "line 1: 'text' must be the name of one value; it occurs more than once"),
        ("text\n", "must have at least one row; it has none"),
        ("a,b\nc,d\n", "--text_column must be a column of .*: got text; it has a, b"),
        ('"a\nb"\nc\n', "--text_column must be a column of .*: got text; it has a b$"),
    ],
)
def test_csv_files_that_cannot_be_read(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        read_data(path)


def invalid_text() -> Any:
    """A column that says it is text and is not UTF-8."""
    raw = pyarrow.array([b"\xff\xfe"] * 20)
    return pyarrow.Array.from_buffers(pyarrow.string(), 20, raw.buffers())


@pytest.mark.parametrize(
    "column",
    [
        pyarrow.array([{"a": [{"b": 2}]}] * 20),
        pyarrow.array([2**62] * 20, pyarrow.timestamp("us")),
        pyarrow.array([1] * 20, pyarrow.timestamp("us", "Mars/Phobos")),
        pyarrow.array([b"\xff"] * 20),
        invalid_text(),
    ],
    ids=["nested", "far date", "time zone", "bytes", "not UTF-8"],
)
def test_unused_columns_of_parquet_do_not_matter(column: Any, tmp_path: Path) -> None:
    table = pyarrow.Table.from_pylist(ROWS).append_column("unused", column)
    parquet.write_table(table, tmp_path / "a.parquet")
    assert read_data(tmp_path / "a.parquet") == read_task(tmp_path / "a.parquet") == 20
    parquet.write_table(table.select(["unused"]).rename_columns(["text"]), tmp_path / "used.parquet")
    with pytest.raises(DataError, match="row 1, column text must be text; got"):
        read_data(tmp_path / "used.parquet")


def test_parquet_without_rows_and_with_columns_of_one_name(tmp_path: Path) -> None:
    table = pyarrow.Table.from_pylist(ROWS)
    parquet.write_table(table[:0], tmp_path / "none.parquet")
    with pytest.raises(DataError, match="none.parquet must have at least one row; it has none"):
        read_data(tmp_path / "none.parquet")
    parquet.write_table(table.append_column("text", table["text"]), tmp_path / "two.parquet")
    with pytest.raises(DataError, match="'text' must be the name of one value; it occurs more than once"):
        read_data(tmp_path / "two.parquet")


HALF = json.loads(r'"a\ud800"')


@pytest.mark.parametrize(
    "row",
    [
        {"text": HALF},
        {"messages": [{"role": "user", "content": HALF}]},
        {"messages": [*CONVERSATION, {"role": HALF, "content": "x"}]},
        {"messages": [{"role": "user", "content": "x", "tools": [{"a": HALF}]}]},
    ],
)
def test_half_a_character_in_a_document_is_refused(row: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    message = r"a.jsonl: row 1, column \w+ must be Unicode text; it has '\\ud800', which is half of a character"
    with pytest.raises(DataError, match=message):
        read_data(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": HALF}, "row 3 must be Unicode text"),
        ({"choices": ["a", HALF]}, "row 3 must be Unicode text"),
        ({"choices": None, "completion": HALF}, "row 3 must be Unicode text"),
        ({"choices": ["a", float("nan")]}, "row 3 must have prompt, choices"),
        ({"choices": [float("inf"), 1]}, "row 3 must have prompt, choices"),
        ({"answer": 10**50}, "row 3 must have prompt, choices"),
        ({"answer": float("inf")}, "row 3 must have prompt, choices"),
    ],
)
def test_values_of_a_task_that_are_no_text(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    rows = [*ROWS[:2], ROWS[2] | change, *ROWS[3:]]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=message):
        read_task(tmp_path / "a.jsonl")


@pytest.mark.parametrize("content", ["a\nb", 3, ["x\ny"]])
def test_errors_of_conversations_have_one_line(content: Any, tmp_path: Path) -> None:
    for row in ({"messages": content}, {"messages": [{"role": "user", "content": ["a\nb"]}]}):
        (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
        with pytest.raises(DataError) as error:
            read_data(tmp_path / "a.jsonl")
        assert "\n" not in str(error.value)


def test_splits_of_a_folder_may_be_in_upper_case(tmp_path: Path) -> None:
    (tmp_path / "TRAIN.JSONL").write_text(lines(ROWS[:12]))
    (tmp_path / "Test.Csv").write_text("text\nx\n")
    (tmp_path / "VALID.JSON").write_text(lines(ROWS[:1]))
    splits = load_documents(str(tmp_path), "text", None, ("train", "validation", "test"))
    assert (len(splits.train), len(splits.validation), splits.test) == (12, 1, ["x"])


@pytest.mark.parametrize("name", ["notes.txt", "README", "folder/", "no/such/file", "./absent.txt"])
def test_a_task_that_is_a_path_is_no_task_of_lm_eval(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "README").write_text("x")
    with pytest.raises(OptionError, match="--task must be a file that ends with one of .jsonl .json .csv .parquet, or"):
        sources.find_source(name)
    assert main(["tune", "--pretrained", "x", "--output_dir", str(tmp_path / "run"), "--task", name]) == 2
    assert "nybble: --task must be a file that ends with" in capsys.readouterr().err


@pytest.mark.slow  # importing lm-eval takes seconds
@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"text": "x"}', "the files in --data_dir must have rows that lm-eval's task wikitext can read; .* 'page'"),
        ('{"page": "caf\\ud800"}', "column page"),
        ('{"page": ', "test.JSONL cannot be read as jsonl: line 1"),
    ],
)
def test_local_files_of_lm_eval_are_read_before_a_run(row: str, message: str, tmp_path: Path) -> None:
    folder = tmp_path / "wikitext" / "document_level"
    folder.mkdir(parents=True)
    (folder / "test.JSONL").write_text(row + "\n")
    with pytest.raises(NybbleError, match=message):
        lm_eval.check_tasks(("wikitext",), str(tmp_path))
