"""Text for calibration, training, validation and test, cut into token sequences. Seeded; knows nothing of models.

`--data` takes
- `wikitext2`: wikitext-2-raw from the hub or its cache, or from the folder `wikitext` in `--data_dir` where that exists;
- `wikitext2-plain`: the same as people write it, and as lm-eval reads it: the marks of its tokenization undone, an article a document;
- `self`: what the model itself writes, or `self:SOURCE`: what it writes from the beginnings of another of these (writing.py);
- `python-docs`: the prose of CPython's own pydoc_data.topics, on every machine;
- a file: .txt .raw .md (one document), .jsonl .json .csv .parquet (one document a row, `--data_column`);
- a folder with one file a split (names with the word train, validation, valid, val or dev, test);
- any hub data set id (`--data_column` names the text), or a folder of its name in `--data_dir`;
- several of these, which are mixed: NAME=SHARE each, or no shares at all, and every sequence counts the same.
Rows with a column `messages` and no text column are conversations (chat.py); those of a column that is named so must be.

A source without validation or test split gives up a tenth of its documents (or blocks of lines) for each (`split_of`).

Sequences are cut without overlap, so the whole split is used before any token is seen twice: training for more sequences than
the split has goes through all of it again, in another order. Documents are joined by the end-of-sequence token; a sequence starts
with the begin-of-text token where the tokenizer puts one.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from nybble.data import chat
from nybble.data import files as data_files
from nybble.data.splits import SPLITS, Document, Texts, hold_out, splits_of
from nybble.data.wikitext import split_articles, undo_tokenization
from nybble.errors import DataError

log = logging.getLogger("nybble")

WIKITEXT2 = "wikitext2"
WIKITEXT2_PLAIN = "wikitext2-plain"
PYTHON_DOCS = "python-docs"
SELF = "self"
# Column of conversations, where there is no text column.
_MESSAGES = "messages"
_PLAIN = (".raw", ".txt", ".md")
# What may lie beside wikitext-2-raw in --data_dir.
_OTHER_WIKITEXT = {"document_level", "wikitext-2-v1", "wikitext-103-v1", "wikitext-103-raw-v1"}


def written_from(name: str) -> str | None:
    """Of a source that the model writes: whose beginnings it goes on from ("self:notes.txt" -> "notes.txt"; "self" -> ""). None for other sources."""
    if Path(name).exists() and name != SELF:
        return None
    kind, _, source = name.partition(":")
    return source if kind == SELF else None


def load_texts(data: str, column: str = "text", data_dir: str | None = None, wanted: Sequence[str] = SPLITS) -> Texts:
    """Read the three splits of a source (see the head of this file), of which those `wanted` must not be empty.

    Raises:
        DataError: not found, no such column (the valid ones are named), empty.
    """
    if written_from(data) is not None:
        raise DataError(
            "what the model writes itself is for training: --data self of distill and compress; name a text to measure on"
        )
    if data == WIKITEXT2_PLAIN:
        try:
            published = load_texts(WIKITEXT2, column, data_dir, wanted)
        except DataError as error:
            raise DataError(str(error).replace(f"--data {WIKITEXT2} ", f"--data {WIKITEXT2_PLAIN} ")) from error
        return Texts(
            *(
                [undo_tokenization(article) for text in published[split] for article in split_articles(str(text))]
                for split in SPLITS
            )
        )
    local = _local(data, data_dir)
    if data == PYTHON_DOCS:
        texts = hold_out(_python_docs())
    elif local is not None:
        texts = _from_folder(local, column, wanted, lines=data == WIKITEXT2)
    elif Path(data).is_dir():
        texts = _from_folder(Path(data), column, wanted)
    elif Path(data).is_file():
        texts = hold_out(_read_file(Path(data), column))
    elif data.startswith((".", "/", "~")) or Path(data).suffix in (*_PLAIN, *data_files.ROW_SUFFIXES):
        raise DataError(
            f"--data {data} must be an existing file or folder, wikitext2, wikitext2-plain, python-docs, or a hub data set; there is nothing at this path"
        )
    else:
        texts = _from_hub(data, column, wanted)
    for split in wanted:
        if not any(not isinstance(text, str) or text.strip() for text in texts[split]):
            raise DataError(
                f"--data {data} must have text in its {split} split; it is empty (splits are taken from 10 rows or 3 conversations on, or 201 lines of "
                "fewer); use more text, or measure on another by --eval_data"
            )
    return texts


def _local(data: str, data_dir: str | None) -> Path | None:
    """The folder of a hub data set in --data_dir; None where it holds none of this name. DataError if it is no folder."""
    if data_dir is None or Path(data).exists():
        return None
    if not Path(data_dir).is_dir():
        raise DataError(f"--data_dir {data_dir} must be a folder of data sets; there is none at this path")
    names = ("wikitext",) if data == WIKITEXT2 else (data, data.split("/")[-1])
    return next((folder for folder in (Path(data_dir, name) for name in names) if folder.is_dir()), None)


def _python_docs() -> list[Document]:
    from pydoc_data.topics import topics

    return list(dict.fromkeys(text for _, text in sorted(topics.items())))  # some topics have two names


def _read_file(path: Path, column: str) -> Sequence[Document]:
    kind = path.suffix.lower()
    if kind in _PLAIN:
        return [data_files.read_utf8(path)]
    if kind not in data_files.ROW_SUFFIXES:
        raise DataError(
            f"--data {path} must end with one of {' '.join((*_PLAIN, *data_files.ROW_SUFFIXES))}; got {path.suffix or 'no suffix'}"
        )
    found = data_files.read_rows(path)
    known = list(dict.fromkeys(name for row in found for name in row))
    name = _column_of(known, column, str(path))
    return _documents([row.get(name) for row in found], name, str(path))


def _from_folder(folder: Path, column: str, wanted: Sequence[str], lines: bool = False) -> Texts:
    """`lines`: the rows of a file are the lines of one text, as those of wikitext-2 are, beside which lie others."""
    found: dict[str, Sequence[Document]] = {}
    for split in SPLITS:
        for suffix in (
            *_PLAIN,
            *data_files.ROW_SUFFIXES,
        ):  # plain text first: it is what the perplexities of papers are measured on
            files = sorted(file for file in folder.rglob(f"*{suffix}") if file.is_file() and split in splits_of(file))
            if lines:
                files = [file for file in files if not _OTHER_WIKITEXT & set(file.relative_to(folder).parts)]
            if files:
                texts = [
                    text
                    for file in files
                    for text in _read_file(file, column if suffix in data_files.ROW_SUFFIXES else "text")
                ]
                found[split] = ["".join(map(str, texts))] if lines and suffix in data_files.ROW_SUFFIXES else texts
                break
    lacking = _lacking(found, wanted)
    if lacking:
        raise DataError(
            f"--data {folder} must hold a file with the word {lacking} in its name ({' '.join((*_PLAIN, *data_files.ROW_SUFFIXES))}); found none"
        )
    return _filled(found)


def _lacking(found: Collection[str], wanted: Sequence[str]) -> str | None:
    """The split that is missing: one of those wanted, where there is no training split that it could be taken from."""
    return None if "train" in found else next((split for split in wanted if split not in found), None)


def _filled(found: dict[str, Sequence[Document]]) -> Texts:
    """The splits of a source; those that it does not have are taken from its training split, where it has one."""
    if found.keys() >= set(SPLITS):
        return Texts(found["train"], found["validation"], found["test"])
    rest = hold_out(found.get("train", ()), tuple(split for split in SPLITS[1:] if split not in found))
    return Texts(rest.train, found.get("validation", rest.validation), found.get("test", rest.test))


def _from_hub(data: str, column: str, wanted: Sequence[str]) -> Texts:
    import datasets

    arguments = ("Salesforce/wikitext", "wikitext-2-raw-v1") if data == WIKITEXT2 else (data,)
    try:
        splits = datasets.load_dataset(*arguments)
    except Exception as error:  # the hub's errors have no common base
        if (
            "not found" in str(error).lower()
            and "offline" not in str(error).lower()
            and "reach" not in str(error).lower()
        ):
            raise DataError(f"--data {data} was not found on the hub; {_cause(error)}") from error
        near = [
            name for name in get_close_matches(data, (WIKITEXT2, WIKITEXT2_PLAIN, PYTHON_DOCS, SELF), 1) if name != data
        ]
        raise DataError(
            f"--data {data} is not on this machine and the Hugging Face hub cannot be reached; {f'did you mean {near[0]}? else ' if near else ''}"
            f"name a local file or folder, --data_dir for a folder of data sets, or --data python-docs ({_cause(error)})"
        ) from error
    known = list(splits) if isinstance(splits, datasets.DatasetDict) else []
    lacking = _lacking(known, wanted)
    if lacking:
        raise DataError(f"--data {data} must have a {lacking} split; it has {', '.join(known) or 'none'}")
    documents = {}
    for split in (split for split in SPLITS if split in splits):
        name = _column_of(splits[split].column_names, column, data)
        documents[split] = _documents(splits[split][name], name, data)
    if data == WIKITEXT2:  # its rows are lines
        documents = {split: ["".join(map(str, lines))] for split, lines in documents.items()}
    return _filled(documents)


def _column_of(known: Sequence[str], column: str, source: str) -> str:
    """The column to read: the one asked for, or conversations, where there is no text and nothing else was asked for."""
    if column == "text" and column not in known and _MESSAGES in known:
        return _MESSAGES
    if column not in known:
        raise DataError(
            f"--data_column must be a column of {source}: got {column}; it has {', '.join(known) or 'none'}"
        )
    return column


def _documents(values: Sequence[Any], column: str, source: str) -> Sequence[Document]:
    """The values of a column as texts or conversations."""
    filled = [(i, value) for i, value in enumerate(values, 1) if value is not None]
    if len(filled) < len(values):
        log.warning(
            "%s: %d of %d rows have nothing in column %s and were left out",
            source,
            len(values) - len(filled),
            len(values),
            column,
        )
    if filled and (isinstance(filled[0][1], list) or column == _MESSAGES):
        return [chat.check_messages(value, f"{source}: row {i}, column {column}") for i, value in filled]
    odd = next((i for i, value in filled if not isinstance(value, str)), None)
    if odd is not None:
        raise DataError(
            f"{source}: row {odd}, column {column} must be text; got {str(values[odd - 1])[:80]}; name another --data_column"
        )
    return [value for _, value in filled]


def _cause(error: BaseException) -> str:
    return " ".join(str(error.__cause__ or error).split())[:200]
