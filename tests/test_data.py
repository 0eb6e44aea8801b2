"""Text and sequences: splits, cutting, order, and the words of every refusal."""

import argparse
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nybble.data import mixture as data_mixture
from nybble.data import packing, sampling, sources, splits, wikitext
from nybble.errors import DataError, OptionError
from tests.tiny import make_tokenizer


def test_python_docs_are_split_by_topic_without_overlap() -> None:
    from pydoc_data.topics import topics

    texts = sources.load_texts("python-docs")
    train, validation, test = map(set, (texts.train, texts.validation, texts.test))
    assert train | validation | test == set(topics.values())
    assert not train & validation
    assert not train & test
    assert not validation & test
    assert len(" ".join(texts.train)) > 300_000


def test_cut_uses_every_token_once_and_starts_rows_with_begin() -> None:
    rows = packing.cut_sequences(torch.arange(103), 10)
    assert torch.equal(rows.flatten(), torch.arange(100))
    rows = packing.cut_sequences(torch.arange(103), 10, begin=[777])
    assert rows.shape == (11, 10)
    assert (rows[:, 0] == 777).all()
    assert torch.equal(rows[:, 1:].flatten(), torch.arange(99))


def test_order_uses_all_sequences_before_any_is_repeated() -> None:
    drawn = sampling.draw_order(available=10, wanted=25, seed=3)
    assert sorted(drawn[:10].tolist()) == list(range(10))
    assert sorted(drawn[10:20].tolist()) == list(range(10))
    assert drawn[:10].tolist() != drawn[10:20].tolist()
    assert torch.equal(drawn, sampling.draw_order(10, 25, 3))
    assert not torch.equal(drawn, sampling.draw_order(10, 25, 4))
    assert torch.equal(drawn[:7], sampling.draw_order(10, 7, 3)), "a longer run starts with the same draws"


@pytest.mark.parametrize("begin", [True, False])
def test_sequences_begin_as_the_tokenizer_does_and_join_documents(begin: bool) -> None:
    tokenizer = make_tokenizer(begin)
    rows = packing.pack_documents(tokenizer, ["abc", "defg"], 4, "training")
    text = (
        [tokenizer.convert_tokens_to_ids(c) for c in "abc"]
        + [tokenizer.eos_token_id]
        + [tokenizer.convert_tokens_to_ids(c) for c in "defg"]
    )
    expected = [[256, *text[:3]], [256, *text[3:6]]] if begin else [text[:4], text[4:8]]
    assert rows.ids.tolist() == expected
    assert rows.loss_mask.all()


def test_wikitext_is_the_raw_text(shared_data: Path) -> None:
    texts = sources.load_texts("wikitext2", data_dir=str(shared_data))
    assert texts.test == [(shared_data / "wikitext/wikitext-2-raw/wiki.test.raw").read_text()]
    assert texts.validation == [(shared_data / "wikitext/wikitext-2-raw/wiki.valid.raw").read_text()]
    assert len(texts.train) == 1
    assert texts == sources.load_texts(str(shared_data / "wikitext"))


def test_plain_wikitext_is_what_lm_eval_reads(shared_data: Path) -> None:
    theirs = pytest.importorskip("lm_eval.tasks.wikitext.preprocess_wikitext").wikitext_detokenizer
    texts = sources.load_texts("wikitext2-plain", data_dir=str(shared_data))
    for split in ("validation", "test"):
        rows = (shared_data / f"wikitext/document_level/{split}.jsonl").read_text().splitlines()
        assert [text.strip() for text in texts[split]] == [theirs(json.loads(row)).strip() for row in rows]
    assert len(texts.train) > 10
    assert not any(" @-@ " in str(text) for text in texts.train)


def test_articles_begin_at_titles_of_the_first_order() -> None:
    text = " \n = One = \n\n a\n = = Part = = \n b\n = Two ( 2 ) = \n\n x = y = z \n"
    assert wikitext.split_articles(text) == [
        " = One = \n\n a\n = = Part = = \n b\n",
        " = Two ( 2 ) = \n\n x = y = z \n",
    ]
    assert wikitext.split_articles("before\n" + text)[0] == "before\n \n"
    assert wikitext.undo_tokenization(wikitext.split_articles(text)[1]) == " = Two (2) =\n\nx = y = z\n"


def trained_tokenizer(kind: str, text: str) -> Any:
    """Of the three kinds that models come with: split by a pattern into bytes (GPT-2, Llama 3, Qwen), words with a mark in front (Llama 2), and not split at
    all (Gemma)."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE(unk_token="<unk>"))
    if kind == "bytes":
        pattern = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
        made.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(pattern, "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    elif kind == "marked words":
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    else:
        made.normalizer = normalizers.Replace(" ", "▁")
    lines = (
        text if kind != "not split" else text.replace(" ", " \n")
    )  # as SentencePiece learns: no token goes beyond a space
    made.train_from_iterator(
        lines.splitlines(keepends=kind == "bytes"),
        trainers.BpeTrainer(vocab_size=600, special_tokens=["<unk>"], show_progress=False),
    )
    return PreTrainedTokenizerFast(tokenizer_object=made)


@pytest.mark.parametrize("kind", ["bytes", "marked words", "not split"])
def test_long_documents_are_tokenized_in_pieces_with_the_same_ids(kind: str) -> None:
    text = Path(argparse.__file__).read_text()
    tokenizer = trained_tokenizer(kind, text)
    whole = tokenizer(text, add_special_tokens=False).input_ids
    calls = []

    def spy(part: str, **settings: Any) -> Any:
        calls.append(len(part))
        return tokenizer(part, **settings)

    spy.eos_token_id = None  # type: ignore[attr-defined]
    assert packing.tokenize(spy, [text], piece=4000).tolist() == whole
    assert max(calls) <= 4000
    assert len(whole) > 10000


def test_a_text_that_cannot_be_cut_is_tokenized_whole() -> None:
    def odd(text: str, **settings: Any) -> Any:
        """No two parts of a text give what the whole gives."""
        return SimpleNamespace(input_ids=[len(text)])

    odd.eos_token_id = None  # type: ignore[attr-defined]
    assert packing.tokenize(odd, ["a b " * 1000], piece=500).tolist() == [4000]


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet", "txt"])
def test_files_give_the_same_documents(suffix: str, tmp_path: Path) -> None:
    import pandas

    documents = [f"document {i}, with a comma\nand two lines" for i in range(40)]
    path = tmp_path / f"mine.{suffix}"
    frame = pandas.DataFrame({"body": documents})
    if suffix == "jsonl":
        path.write_text("".join(json.dumps({"body": d}) + "\n" for d in documents))
    elif suffix == "txt":
        path.write_text("\n".join(documents * 10))
    else:
        frame.to_csv(path, index=False) if suffix == "csv" else frame.to_parquet(path)
    texts = sources.load_texts(str(path), column="body")
    if suffix == "txt":
        assert (
            "".join(sorted(texts.train)).count("document")
            + sum(t.count("document") for t in (*texts.validation, *texts.test))
            == 400
        )
    else:
        assert sorted((*texts.train, *texts.validation, *texts.test)) == sorted(documents)
        assert (len(texts.train), len(texts.validation), len(texts.test)) == (32, 4, 4)


def test_equal_documents_are_not_lost_to_each_other() -> None:
    texts = splits.hold_out(["same"] * 20)
    assert (len(texts.train), len(texts.validation), len(texts.test)) == (16, 2, 2)


def test_unknown_column_names_the_columns(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text('{"body": "x", "title": "y"}\n')
    with pytest.raises(
        DataError, match=r"--data_column must be a column of .*mine.jsonl: got text; it has body, title"
    ):
        sources.load_texts(str(path))


def test_too_short_text_says_how_much_there_is() -> None:
    with pytest.raises(DataError) as error:
        packing.pack_documents(make_tokenizer(), ["a" * 100], 64, "training", minimum=8)
    assert str(error.value) == (
        "the training text must give at least 8 sequences of 64 tokens; it has 100 tokens = 1 sequences; use more text or a smaller --seq_len"
    )


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.txt", "", "must have text in its train split; it is empty"),
        ("mine.docx", "x", "must end with one of .raw .txt .md .jsonl .json .csv .parquet; got .docx"),
        ("bad.jsonl", "{", "cannot be read as jsonl"),
        ("latin.txt", b"caf\xe9", "must be UTF-8 text; byte 3 is not; convert it first"),
    ],
)
def test_unusable_files(name: str, content: str | bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=words):
        sources.load_texts(str(tmp_path / name))


def test_the_file_that_is_named_is_read_and_no_other(tmp_path: Path) -> None:
    """Brackets are part of the name, not a pattern; and its content now counts, not what it was when it had this time stamp before."""
    named, other = tmp_path / "x[12].jsonl", tmp_path / "x1.jsonl"
    named.write_text("".join(json.dumps({"text": f"mine {i}"}) + "\n" for i in range(10)))
    other.write_text("".join(json.dumps({"text": f"other {i}"}) + "\n" for i in range(10)))
    assert sorted(sources.load_texts(str(named)).train)[0] == "mine 0"
    stamp = named.stat()
    named.write_text("".join(json.dumps({"text": f"MINE {i}"}) + "\n" for i in range(10)))
    os.utime(named, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert sorted(sources.load_texts(str(named)).train)[0] == "MINE 0"


def test_missing_things_name_the_local_choices(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is nothing at this path"):
        sources.load_texts("./nowhere.txt")
    with pytest.raises(DataError, match="must hold a file with the word train in its name"):
        sources.load_texts(str(tmp_path))
    with pytest.raises(
        DataError, match="hub cannot be reached; did you mean python-docs[?] else name a local file or folder"
    ):
        sources.load_texts("python_docs")
    with pytest.raises(
        DataError,
        match="hub cannot be reached; name a local file or folder, --data_dir for a folder of data sets, or --data python-docs",
    ):
        sources.load_texts("someone/some-data")


def test_text_to_measure_on_needs_no_training_text(tmp_path: Path) -> None:
    (tmp_path / "validation.txt").write_text("one\n")
    texts = sources.load_texts(str(tmp_path), wanted=("validation",))
    assert (list(texts.train), list(texts.validation), list(texts.test)) == ([], ["one\n"], [])
    for wanted, lacking in ((("validation", "test"), "test"), (splits.SPLITS, "train")):
        with pytest.raises(DataError, match=f"must hold a file with the word {lacking} in its name"):
            sources.load_texts(str(tmp_path), wanted=wanted)


def test_words_in_file_names_choose_the_split(tmp_path: Path) -> None:
    for name in (
        "train-00000-of-00001.txt",
        "my_valid.txt",
        "test.txt",
        "constraints.txt",
        "latest.txt",
        "devices.txt",
    ):
        (tmp_path / name).write_text(f"{name}\n")
    (tmp_path / "train.txt").mkdir()
    texts = sources.load_texts(str(tmp_path))
    assert (texts.train, texts.validation, texts.test) == (
        ["train-00000-of-00001.txt\n"],
        ["my_valid.txt\n"],
        ["test.txt\n"],
    )
    (tmp_path / "test_of_training.txt").write_text("secret")
    with pytest.raises(DataError, match=r"test_of_training.txt must speak of one split; it speaks of train and test"):
        sources.load_texts(str(tmp_path))


def test_rows_without_text_are_left_out_and_other_things_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "mine.jsonl"
    rows: list[dict[str, object]] = [{"text": f"row {i}"} for i in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in [{"text": None}, *rows, {"other": 1}]))
    with caplog.at_level("WARNING", "nybble"):
        texts = sources.load_texts(str(path))
    assert sorted((*texts.train, *texts.validation, *texts.test)) == sorted(str(row["text"]) for row in rows)
    assert "2 of 22 rows have nothing in column text and were left out" in caplog.text
    path.write_text("".join(json.dumps({"text": i}) + "\n" for i in range(20)))
    with pytest.raises(
        DataError, match=r"mine.jsonl: row 1, column text must be text; got 0; name another --data_column"
    ):
        sources.load_texts(str(path))
    talks = [{"messages": None}, *({"messages": [{"role": "user", "content": "hi"}]} for _ in range(20))]
    path.write_text("".join(json.dumps(row) + "\n" for row in talks))
    assert all(isinstance(talk, list) for talk in sources.load_texts(str(path)).train)


def test_only_the_wanted_splits_must_have_text(tmp_path: Path) -> None:
    path = tmp_path / "two.txt"
    path.write_text("one line\n")
    assert sources.load_texts(str(path), wanted=["train"]).train
    with pytest.raises(DataError, match="must have text in its validation split; it is empty"):
        sources.load_texts(str(path))
    with pytest.raises(DataError, match="name a text to measure on"):
        sources.load_texts("self")


def test_what_is_measured_is_never_used_twice() -> None:
    many, few = (
        packing.TokenRows.of(torch.arange(first, first + count)[:, None].expand(-1, 4))
        for first, count in ((0, 100), (1000, 100))
    )
    shared = data_mixture.Mixture.parse(["a=0.9", "b=0.1"])
    every = shared.first([many, few], 0).ids[:, 0].tolist()
    assert (len(every), len(set(every)), sum(i >= 1000 for i in every)) == (111, 111, 11)
    assert len(shared.first([many, few], 1000)) == 111
    assert len(shared.first([many, few], 20)) == 20
    assert len(data_mixture.Mixture.parse(["a", "b"]).first([many, few], 0)) == 200
    assert data_mixture.Mixture.parse(["a"]).first([many], 3).ids[:, 0].tolist() == [0, 1, 2]
    for nothing in ("", " ", "=0.5"):
        with pytest.raises(OptionError, match="--data must name every source"):
            data_mixture.Mixture.parse([nothing])


def test_mixture_gives_every_source_its_share() -> None:
    mixture = data_mixture.Mixture.parse(["a=3", "b=1"])
    many, few = (
        packing.TokenRows.of(torch.arange(first, first + count)[:, None].expand(-1, 4))
        for first, count in ((0, 100), (1000, 4))
    )
    drawn = mixture.mix([many, few], 40, 0).ids[:, 0]
    assert len(drawn) == 40
    assert (drawn >= 1000).sum() == 10  # a quarter; its 4 rows are used again
    assert len(drawn[drawn < 1000].unique()) == 30
    assert (drawn[:20] >= 1000).any(), "mixed, not one after the other"
    assert torch.equal(drawn, mixture.mix([many, few], 40, 0).ids[:, 0])
    plain = data_mixture.Mixture.parse(["a", "b"]).mix([many, few], 1000, 0).ids[:, 0]
    assert sorted(plain.tolist()) == [*range(100), *range(1000, 1004)], "without shares nothing is used twice"


def test_equal_rows_are_told_once() -> None:
    rows = torch.tensor([[3, 3], [1, 2], [3, 3], [0, 0], [1, 2]])
    first, which = sampling.distinct_rows(rows)
    assert (first.tolist(), which.tolist()) == ([0, 1, 3], [0, 1, 0, 2, 1])
    assert torch.equal(rows[first][which], rows)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (["a=0.5", "b"], "NAME=SHARE for every source"),
        (["a=x", "b=1"], "NAME=SHARE for every source"),
        (["a=0", "b=1"], "shares above 0"),
        (["a=inf"], "shares above 0"),
        (["a=1", "a=2"], "got a more than once"),
        ([], "at least one source"),
    ],
)
def test_wrong_mixtures(entries: list[str], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        data_mixture.Mixture.parse(entries)


def test_rows_with_messages_are_conversations(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps({"messages": talk}) + "\n" for _ in range(20)))
    texts = sources.load_texts(str(path))
    assert texts.train[0] == talk
    assert [len(texts[split]) for split in splits.SPLITS] == [16, 2, 2]
    with pytest.raises(DataError, match="--data_column must be a column of.*got body; it has messages"):
        sources.load_texts(str(path), column="body")
    with pytest.raises(DataError, match="it has 1 texts beside conversations; name them as two sources"):
        packing.pack_documents(make_tokenizer(), [talk, "text"], 64, "training")
    path.write_text(json.dumps({"messages": json.dumps(talk)}))
    with pytest.raises(DataError, match="row 1, column messages must be a list of messages"):
        sources.load_texts(str(path))
    path.write_text(json.dumps({"messages": [{"role": "user"}]}))
    with pytest.raises(DataError, match="row 1, column messages must be a list of messages"):
        sources.load_texts(str(path))


def write_rows(path: Path, rows: list[str], column: str = "text") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({column: row}) + "\n" for row in rows))


def test_wikitext_from_a_folder_is_one_text_as_from_the_hub(tmp_path: Path) -> None:
    lines = [" = Title = \n", "", " words \n"]
    for split in splits.SPLITS:
        write_rows(tmp_path / "wikitext" / "wikitext-2-raw-v1" / f"{split}.jsonl", lines)
        write_rows(tmp_path / "wikitext" / "wikitext-103-raw-v1" / f"{split}.jsonl", ["other"])
        write_rows(tmp_path / "wikitext" / "document_level" / f"{split}.jsonl", ["page"], "page")
    texts = sources.load_texts("wikitext2", data_dir=str(tmp_path))
    assert [texts[split] for split in splits.SPLITS] == [["".join(lines)]] * 3


def test_a_folder_of_data_sets_holds_any_by_its_name(tmp_path: Path) -> None:
    for split in splits.SPLITS:
        write_rows(tmp_path / "mine" / f"{split}.jsonl", [split])
    for name in ("mine", "someone/mine"):
        assert sources.load_texts(name, data_dir=str(tmp_path)).test == ["test"]
    with pytest.raises(DataError, match="--data_dir .*nowhere must be a folder of data sets"):
        sources.load_texts("mine", data_dir=str(tmp_path / "nowhere"))


def test_training_text_gives_up_only_what_is_lacking(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", [f"row {i}" for i in range(100)])
    write_rows(tmp_path / "test.jsonl", ["test"])
    texts = sources.load_texts(str(tmp_path))
    assert (len(texts.train), len(texts.validation), texts.test) == (90, 10, ["test"])
    assert len({*texts.train, *texts.validation}) == 100
