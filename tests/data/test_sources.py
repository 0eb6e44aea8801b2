"""nybble.data.sources: every kind of source, and the message for every source that cannot be read."""

import json
import logging
from pathlib import Path
from typing import Any

import datasets
import pandas
import pytest

from nybble.data import sources
from nybble.data.chat import Conversation
from nybble.data.sources import load_documents, prefix_source
from nybble.data.splits import SPLITS, DocumentSplits
from nybble.errors import DataError
from tests.helpers.chat import CONVERSATION


def load(name: str | Path, column: str = "text", data_dir: Path | None = None, **options: Any) -> DocumentSplits:
    options.setdefault("wanted", SPLITS)
    return load_documents(str(name), column, None if data_dir is None else str(data_dir), **options)


def everything(splits: DocumentSplits) -> list[Any]:
    return [*splits.train, *splits.validation, *splits.test]


def write_rows(path: Path, values: list[Any], column: str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({column: value}) + "\n" for value in values))
    return path


# --- built-in texts ---


def test_python_docs_are_all_topics_split_without_overlap() -> None:
    from pydoc_data.topics import topics

    splits = load("python-docs")
    assert len(everything(splits)) == len(set(everything(splits)))
    assert set(everything(splits)) == set(topics.values())
    assert min(len(splits[split]) for split in SPLITS) > 5


def test_wikitext2_is_the_raw_text(shared_data: Path) -> None:
    splits = load("wikitext2", data_dir=shared_data)
    folder = shared_data / "wikitext" / "wikitext-2-raw"
    assert splits.validation == [(folder / "wiki.valid.raw").read_text()]
    assert splits.test == [(folder / "wiki.test.raw").read_text()]
    assert len(splits.train) == 1


def test_wikitext2_of_rows_is_one_text_and_other_versions_are_left_alone(tmp_path: Path) -> None:
    lines = [" = Title = \n", "", " words \n"]
    for split in SPLITS:
        write_rows(tmp_path / "wikitext" / "wikitext-2-raw-v1" / f"{split}.jsonl", lines)
        write_rows(tmp_path / "wikitext" / "wikitext-103-raw-v1" / f"{split}.jsonl", ["other"])
        write_rows(tmp_path / "wikitext" / "document_level" / f"{split}.jsonl", ["page"], "page")
    for column in ("text", "body"):  # --text_column is for sources whose column is not known
        splits = sources.load_documents("wikitext2", column, str(tmp_path), SPLITS)
        assert [splits[split] for split in SPLITS] == [["".join(lines)]] * 3


def test_plain_wikitext2_has_an_article_per_document_without_marks(tmp_path: Path) -> None:
    folder = tmp_path / "wikitext" / "wikitext-2-raw"
    folder.mkdir(parents=True)
    for split, word in (("train", "one"), ("valid", "two"), ("test", "three")):
        (folder / f"wiki.{split}.raw").write_text(f" = First = \n\n {word} , a @-@ b \n = Second = \n\n c \n")
    splits = load("wikitext2-plain", data_dir=tmp_path)
    assert splits.test == [" = First =\n\nthree, a-b\n", " = Second =\n\nc\n"]
    assert len(splits.train) == len(splits.validation) == 2


def test_errors_name_plain_wikitext2_as_the_user_wrote_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--data wikitext2-plain is not on this machine and the Hugging Face hub"):
        load("wikitext2-plain", data_dir=tmp_path)


# --- files ---


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_row_files_of_all_kinds_give_the_same_documents(suffix: str, tmp_path: Path) -> None:
    documents = [f"document {i}, with a comma\nand two lines" for i in range(40)]
    frame, path = pandas.DataFrame({"body": documents}), tmp_path / f"mine.{suffix}"
    if suffix == "jsonl":
        frame.to_json(path, orient="records", lines=True)
    elif suffix == "csv":
        frame.to_csv(path, index=False)
    else:
        frame.to_parquet(path)
    splits = load(path, column="body")
    assert sorted(everything(splits)) == sorted(documents)
    assert [len(splits[split]) for split in SPLITS] == [32, 4, 4]


def test_a_text_file_is_cut_into_blocks_of_lines_and_loses_none(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("".join(f"document {i}\n" for i in range(1200)))
    splits = load(tmp_path / "mine.txt")
    lines = "".join(everything(splits)).splitlines()
    assert sorted(lines) == sorted(f"document {i}" for i in range(1200))
    assert splits.validation
    assert splits.test


def test_a_file_is_read_under_exactly_its_name(tmp_path: Path) -> None:
    """Brackets are part of the name: x[12].jsonl as a pattern would match x1.jsonl."""
    named = write_rows(tmp_path / "x[12].jsonl", [f"mine {i}" for i in range(10)])
    write_rows(tmp_path / "x1.jsonl", [f"other {i}" for i in range(10)])
    assert all(document.startswith("mine") for document in everything(load(named)))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "must have text in its train split; the split is empty"),
        ("mine.docx", b"x", "must end with one of .raw .txt .md .jsonl .json .csv .parquet; got .docx"),
        ("mine", b"x", "got no suffix"),
        ("bad.jsonl", b"{", "cannot be read as jsonl"),
        ("latin.txt", b"caf\xe9", "must be UTF-8 text; byte 3 is not"),
    ],
)
def test_unusable_files_are_named_with_the_option(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"--eval_data .*{name} .*{message}"):
        load(tmp_path / name, option="--eval_data")


def test_an_unknown_column_is_reported_with_the_existing_ones(tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text('{"body": "x", "title": "y"}\n')
    with pytest.raises(
        DataError, match=r"--text_column must be a column of .*mine.jsonl: got text; it has body, title"
    ):
        load(tmp_path / "mine.jsonl")


def test_rows_without_text_are_left_out_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_rows(tmp_path / "mine.jsonl", [None, "", " \n", *(f"row {i}" for i in range(20))])
    with path.open("a") as file:
        file.write('{"other": 1}\n')
    with caplog.at_level("WARNING", "nybble"):
        splits = load(path)
    assert sorted(everything(splits)) == sorted(f"row {i}" for i in range(20))
    assert "left out 4 of 24 rows, which have nothing in column text" in caplog.text


def test_rows_that_are_not_text_are_refused(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "mine.jsonl", [None, "text", 7])
    with pytest.raises(DataError, match=r"mine.jsonl: row 3, column text must be text; got 7; .*--text_column"):
        load(path)


# --- conversations ---


def test_a_messages_column_holds_conversations(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "chat.jsonl", [None, *[CONVERSATION] * 20], "messages")
    splits = load(path)
    assert [len(splits[split]) for split in SPLITS] == [16, 2, 2]
    assert all(document == Conversation(CONVERSATION) for document in everything(splits))


def test_rows_of_sharegpt_are_conversations(tmp_path: Path) -> None:
    shared = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}, {"from": "system", "value": "x"}]
    path = write_rows(tmp_path / "chat.jsonl", [shared] * 10, "conversations")
    assert load(path).train[0] == Conversation(
        [
            {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"},
            {"role": "system", "content": "x"},
        ]
    )  # fmt: skip


def test_a_column_of_lists_holds_conversations_whatever_its_name(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "chat.jsonl", [CONVERSATION] * 10, "talk")
    assert load(path, column="talk").train[0] == Conversation(CONVERSATION)
    with pytest.raises(DataError, match=r"--text_column must be a column of .*: got body; it has talk"):
        load(path, column="body")


@pytest.mark.parametrize("value", [json.dumps(CONVERSATION), [{"role": "user"}]])
def test_a_messages_column_must_hold_conversations(value: Any, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "chat.jsonl", [value], "messages")
    with pytest.raises(DataError, match="row 1, column messages must be a list of messages"):
        load(path)


# --- folders ---


def test_words_in_file_names_choose_the_split(tmp_path: Path) -> None:
    names = ("train-00000-of-00001.txt", "my_valid.txt", "test.txt", "constraints.txt", "latest.txt", "devices.txt")
    for name in names:
        (tmp_path / name).write_text(f"{name}\n")
    (tmp_path / "train.txt").mkdir()
    splits = load(tmp_path)
    assert (splits.train, splits.validation, splits.test) == (
        ["train-00000-of-00001.txt\n"],
        ["my_valid.txt\n"],
        ["test.txt\n"],
    )


def test_plain_text_of_a_folder_comes_before_rows(tmp_path: Path) -> None:
    for split in SPLITS:
        write_rows(tmp_path / f"{split}.jsonl", ["row"])
        (tmp_path / f"{split}.raw").write_text("raw")
    assert load(tmp_path).test == ["raw"]


def test_a_training_split_gives_only_the_missing_splits(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", [f"row {i}" for i in range(100)])
    write_rows(tmp_path / "test.jsonl", ["test"])
    splits = load(tmp_path)
    assert (len(splits.train), len(splits.validation), splits.test) == (90, 10, ["test"])
    assert len({*splits.train, *splits.validation}) == 100


def test_files_of_a_folder_are_read_together_where_no_name_has_a_split(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for i in range(20):
        (tmp_path / f"page{i:02}.md").write_text(f"page {i}\n")
    caplog.set_level("INFO", "nybble")
    splits = load(tmp_path)
    assert sorted(everything(splits)) == sorted(f"page {i}\n" for i in range(20))
    assert [len(splits[split]) for split in SPLITS] == [16, 2, 2]
    assert "its 20 files are read together; no name has train, validation or test" in caplog.text


def test_a_folder_without_a_wanted_split_is_refused(tmp_path: Path) -> None:
    (tmp_path / "validation.txt").write_text("one\n")
    splits = load(tmp_path, wanted=("validation",))
    assert (list(splits.train), list(splits.validation), list(splits.test)) == ([], ["one\n"], [])
    for wanted, missing in ((("validation", "test"), "test"), (SPLITS, "train")):
        with pytest.raises(DataError, match=f"must hold a file with the word {missing} in its name"):
            load(tmp_path, wanted=wanted)


def test_only_wanted_splits_must_have_text(tmp_path: Path) -> None:
    (tmp_path / "two.txt").write_text("one line\n")
    assert load(tmp_path / "two.txt", wanted=["train"]).train == ["one line\n"]
    with pytest.raises(DataError, match="must have text in its validation split; the split is empty"):
        load(tmp_path / "two.txt")


def test_data_dir_holds_data_sets_by_their_names(tmp_path: Path) -> None:
    for split in SPLITS:
        write_rows(tmp_path / "mine" / f"{split}.jsonl", [split])
    for name in ("mine", "someone/mine"):
        assert load(name, data_dir=tmp_path).test == ["test"]
    with pytest.raises(DataError, match="--data_dir .*nowhere must be a folder of data sets"):
        load("mine", data_dir=tmp_path / "nowhere")


def test_a_configuration_is_a_folder_in_the_data_set(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for part in ("main", "socratic"):
        for split in SPLITS:
            write_rows(tmp_path / "gsm" / part / f"{split}.jsonl", [part])
    assert load("me/gsm:main", data_dir=tmp_path).test == ["main"]
    assert not caplog.text
    assert load("me/gsm", data_dir=tmp_path).test == ["main", "socratic"]
    assert f"{tmp_path}/gsm: test text is read from main and socratic together" in caplog.text


def test_hidden_folders_are_not_read(tmp_path: Path) -> None:
    for split in SPLITS:
        write_rows(tmp_path / "mine" / f"{split}.jsonl", [split])
        write_rows(tmp_path / "mine" / ".ipynb_checkpoints" / f"{split}-checkpoint.jsonl", ["copy"])
    assert load(tmp_path / "mine").train == ["train"]


@pytest.mark.parametrize("as_text", [False, True])
def test_conversations_have_the_tools_of_their_row(as_text: bool, tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "weather"}}]
    rows = [
        {"messages": CONVERSATION, "tools": json.dumps(tools) if as_text else tools},
        {"messages": CONVERSATION, "tools": "[]" if as_text else []},
        {"messages": CONVERSATION, "tools": None},
        {"messages": CONVERSATION},
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = everything(load(tmp_path / "train.jsonl"))
    expected = [Conversation(CONVERSATION, tools), *[Conversation(CONVERSATION)] * 3]
    assert sorted(found, key=str) == sorted(expected, key=str)


@pytest.mark.parametrize("tools", ["weather", "{}", ["weather"], {"name": "weather"}, 3])
def test_a_column_of_this_name_may_hold_anything(tools: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = [json.dumps({"messages": CONVERSATION, "tools": tools}) + "\n" for _ in range(10)]
    (tmp_path / "chats.jsonl").write_text("".join(lines))
    assert load(tmp_path / "chats.jsonl").train[0] == Conversation(CONVERSATION)
    assert "row 1, column tools must be a list of tools like" in caplog.text
    assert "conversations are rendered without it" in caplog.text


def test_tools_of_a_table_have_their_own_keys_alone(tmp_path: Path) -> None:
    """A column of structs gives every tool the keys of all."""
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    tools = [{"name": "add", "parameters": {"n": {"type": "integer"}}}, {"name": "look", "parameters": {"city": None}}]
    rows = pa.table({"messages": [CONVERSATION] * 10, "tools": [tools] * 10})
    parquet.write_table(rows, tmp_path / "chats.parquet")
    found = load(tmp_path / "chats.parquet").train[0]
    assert isinstance(found, Conversation)
    assert found.tools == [
        {"name": "add", "parameters": {"n": {"type": "integer"}}},
        {"name": "look", "parameters": {}},
    ]


def test_folders_name_splits_too(tmp_path: Path) -> None:
    for split in SPLITS:
        write_rows(tmp_path / "mine" / split / "0000.jsonl", [f"{split} {i}" for i in range(20)])
    splits = load(tmp_path / "mine")
    assert [splits[split][0] for split in SPLITS] == [f"{split} 0" for split in SPLITS]


def test_files_that_are_left_out_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("how-to-train", "a", "b"):
        (tmp_path / f"{name}.md").write_text(f"{name}\n" * 300)
    load(tmp_path)
    assert "2 files are not read, as others have train, validation or test in their names" in caplog.text
    copy = tmp_path / "data" / "org" / "set"
    copy.mkdir(parents=True)
    (copy / "README.md").write_text("card")
    write_rows(copy / "data.jsonl", ["x"] * 20)
    with pytest.raises(DataError, match="must hold a file with the word train"):
        load("org/set", data_dir=tmp_path / "data")


# --- what is not there ---


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere", "~/nowhere", "nowhere.txt", "nowhere.parquet"])
def test_a_path_without_a_file_is_refused(name: str) -> None:
    with pytest.raises(DataError, match="must be an existing file or folder, .*; there is nothing at this path"):
        load(name)


def test_without_the_hub_the_local_choices_are_named() -> None:
    with pytest.raises(DataError, match="hub cannot be reached; did you mean python-docs[?] otherwise name a local"):
        load("python_docs")
    with pytest.raises(
        DataError, match="hub cannot be reached; name a local file or folder, give --data_dir .* python-docs"
    ):
        load("someone/some-data")


def test_a_data_set_that_the_hub_does_not_have_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_found(*arguments: object) -> None:
        raise FileNotFoundError("Dataset 'a/b' was not found on the Hub") from ValueError("404  for\nurl")

    monkeypatch.setattr(datasets, "load_dataset", not_found)
    with pytest.raises(
        DataError, match="--data a/b must be a data set on the hub, .*; it was not found .*; 404 for url"
    ):
        load("a/b")


def test_self_has_no_documents() -> None:
    with pytest.raises(DataError, match="--eval_data self:x.txt is text that the model generates, .*; name a text"):
        load("self:x.txt", option="--eval_data")


def test_prefix_source_tells_generated_text_from_other_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "self:mine").write_text("a file with an odd name")
    (tmp_path / "self").write_text("never read")
    names = ("self", "self:", "self:notes.txt", "self:mine", "notes.txt", "selfish:x")
    assert [prefix_source(name) for name in names] == ["", "", "notes.txt", None, None, None]


# --- the hub ---


def hub_data(splits: dict[str, list[Any]], column: str = "text") -> datasets.DatasetDict:
    return datasets.DatasetDict(
        {split: datasets.Dataset.from_dict({column: values}) for split, values in splits.items()}
    )


def test_a_hub_data_set_with_all_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    published = hub_data({"train": ["a"], "validation": ["b"], "test": ["c"], "extra": ["d"]}, "body")
    monkeypatch.setattr(datasets, "load_dataset", lambda *arguments: {("some/data",): published}[arguments])
    assert everything(load("some/data", column="body")) == ["a", "b", "c"]


def test_splits_of_other_names_are_found_by_their_word(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    published = hub_data({"train_sft": ["a"], "test_sft": ["b"], "train_gen": ["c"], "test_gen": ["d"], "dev": ["e"]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *arguments: published)
    with caplog.at_level(logging.INFO, "nybble"):
        found = load("some/chats")
    assert (found.train, found.validation, found.test) == (["a"], ["e"], ["b"])
    assert "some/chats: train is train_sft, validation is dev, test is test_sft" in caplog.text


@pytest.mark.parametrize("values", [[["a", "b"]] * 12, [[1, 2]] * 12, [{"a": "b"}] * 12, [3] * 12])
def test_a_column_of_a_hub_data_set_that_is_no_text_is_refused(
    values: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *arguments: hub_data({"train": values}))
    with pytest.raises(DataError, match="some/data: row 1, column text"):
        load("some/data")


@pytest.fixture
def two_configurations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The data set some/data with the configurations en and de, as the library itself finds and misses them."""
    lines = ["---", "configs:"]
    for name in ("en", "de"):
        lines += [f"- config_name: {name}", "  data_files:", "  - split: train", f"    path: {name}/train.jsonl"]
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text("".join(f'{{"text": "{name} {i}"}}\n' for i in range(30)))
    (tmp_path / "README.md").write_text("\n".join([*lines, "---", ""]))
    real = datasets.load_dataset
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda name, *configuration: real(str(tmp_path), *configuration, cache_dir=str(tmp_path / "cache")),
    )


@pytest.mark.usefixtures("two_configurations")
def test_a_configuration_of_a_hub_data_set_is_named_after_a_colon() -> None:
    assert set(everything(load("some/data:de"))) == {f"de {i}" for i in range(30)}


@pytest.mark.usefixtures("two_configurations")
@pytest.mark.parametrize("name", ["some/data", "some/data:fr"])
def test_the_configurations_are_listed_where_none_of_them_is_named(name: str) -> None:
    match = f"--data {name} must name a configuration of the data set, as in some/data:en; it has en, de"
    with pytest.raises(DataError, match=match):
        load(name)


def test_of_a_huge_hub_data_set_evenly_spaced_rows_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_MOST_CHARACTERS", 3000)
    published = hub_data({"train": [f"{i:010}" for i in range(1000)], "validation": ["b"], "test": ["d"] * 3 + ["c"]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *arguments: published)
    found = load("some/data")
    assert list(found.train) == [f"{i:010}" for i in range(0, 1000, 4)]
    assert found.validation == ["b"]
    assert list(found.test) == ["d", "d", "d", "c"]


def test_wikitext2_of_the_hub_is_one_text_per_split(monkeypatch: pytest.MonkeyPatch) -> None:
    published = hub_data({split: [f"{split}\n", "", "end\n"] for split in SPLITS})
    names = ("Salesforce/wikitext", "wikitext-2-raw-v1")
    monkeypatch.setattr(datasets, "load_dataset", lambda *arguments: {names: published}[arguments])
    assert everything(load("wikitext2")) == ["train\nend\n", "validation\nend\n", "test\nend\n"]


def test_a_hub_data_set_without_a_wanted_split_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *arguments: hub_data({"validation": ["b"]}))
    with pytest.raises(DataError, match="--data some/data must have a train split; it has validation"):
        load("some/data")
    assert load("some/data", wanted=["validation"]).validation == ["b"]
