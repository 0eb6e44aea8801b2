"""What --data can name, and the documents of it.

- `wikitext2`: wikitext-2-raw from the Hugging Face hub or its cache, or from the folder `wikitext` in --data_dir;
- `wikitext2-plain`: the same text without its tokenization marks, as lm-eval reads it, one document per article;
- `python-docs`: the prose of CPython's own pydoc_data.topics, which is on every machine;
- a file: .txt, .raw or .md (one document), or .jsonl, .json, .csv or .parquet (one document per row, --text_column);
- a folder with one or more files per split, whose names contain the word train, validation, valid, val, dev or test,
  or a folder of files of which none does: all of them are training text;
- any hub data set, OWNER/NAME or OWNER/NAME:CONFIGURATION (--text_column names the column), or a folder of its name in
  --data_dir;
- `self` and `self:SOURCE`: text that the model generates (generate.py). It has no documents and is refused here.

Rows without the column "text" but with a column "messages" or "conversations" are conversations, with the tools in a
column "tools" (columns.py, chat.py).

A source without validation or test split takes them from its training documents (splits.py).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from nybble.data import files as data_files
from nybble.data.columns import TOOLS, checked_documents, document_column
from nybble.data.splits import SPLITS, Document, DocumentSplits, hold_out, split_named, splits_of
from nybble.data.wikitext import split_articles, undo_tokenization
from nybble.errors import DataError, HubUnreachableError

log = logging.getLogger("nybble")

WIKITEXT2 = "wikitext2"
WIKITEXT2_PLAIN = "wikitext2-plain"
PYTHON_DOCS = "python-docs"
SELF = "self"
_TEXT_SUFFIXES = (".raw", ".txt", ".md")
# Plain text first: papers measure perplexity on the plain text of WikiText, where a folder may hold its rows too.
_SUFFIXES = (*_TEXT_SUFFIXES, *data_files.ROW_SUFFIXES)
# Other versions of WikiText that may lie beside wikitext-2-raw in --data_dir.
_OTHER_WIKITEXT = {"document_level", "wikitext-2-v1", "wikitext-103-v1", "wikitext-103-raw-v1"}

# Of a hub data set with more characters in a split, evenly spaced rows are read: a gigabyte of memory, and 250 million
# tokens, which are more than a run needs.
_MOST_CHARACTERS = 1 << 30
_TRIED_ROWS = 200


@dataclass(frozen=True)
class _Request:
    """Attributes:
    name: the source, as the user wrote it.
    column: --text_column.
    data_dir: --data_dir.
    wanted: the splits that must not be empty.
    option: the option that named the source, for error messages.
    """

    name: str
    column: str
    data_dir: str | None
    wanted: Sequence[str]
    option: str

    @property
    def location(self) -> str:
        """The name under which the source is looked for."""
        return WIKITEXT2 if self.name == WIKITEXT2_PLAIN else self.name


def prefix_source(name: str) -> str | None:
    """The source whose text the model continues: "notes.txt" for "self:notes.txt", "" for "self".

    None for a source that the model does not generate. An existing file named "self:..." is such a source.
    """
    if Path(name).exists() and name != SELF:
        return None
    kind, _, source = name.partition(":")
    return source if kind == SELF else None


def load_documents(
    name: str,
    column: str,
    data_dir: str | None,
    wanted: Sequence[str],
    option: str = "--data",
    measured: str = "--eval_data",
) -> DocumentSplits:
    """Read the documents of a source.

    Args:
        name: the source; see the head of this file.
        column: the column of row-wise data that holds the documents (--text_column).
        data_dir: a folder with local copies of data sets, or None (--data_dir).
        wanted: the splits that must not be empty.
        option: the option that names the source, for error messages.
        measured: the option that names the text to measure on.

    Raises:
        DataError: the source does not exist or cannot be read; it lacks the column (the existing ones are named); a
            wanted split is missing or empty; the source is `self`.
    """
    if prefix_source(name) is not None:
        raise DataError(
            f"{option} {name} is text that the model generates, which serves for training only (--data of compress and "
            "distill); name a text to measure on"
        )
    if name in (WIKITEXT2, WIKITEXT2_PLAIN):
        column = "text"  # the option is for sources whose column nybble does not know
    request = _Request(name, column, data_dir, wanted, option)
    documents = _load(request)
    for split in wanted:
        if not any(not isinstance(document, str) or document.strip() for document in documents[split]):
            raise DataError(
                f"{option} {name} must have text in its {split} split; the split is empty (splits can be taken from 10 "
                "rows, 3 conversations, or 201 lines of text); use more text, or name another to measure on with "
                f"{measured}"
            )
    if name == WIKITEXT2_PLAIN:
        return DocumentSplits(*(_plain_articles(documents[split]) for split in SPLITS))
    return documents


def _load(request: _Request) -> DocumentSplits:
    location, local = request.location, _local_copy(request)
    if location == PYTHON_DOCS:
        return hold_out(_python_docs())
    if local is not None:
        return _from_folder(local, request, lines=location == WIKITEXT2, is_copy=True)
    path = Path(location)
    if path.is_dir():
        return _from_folder(path, request)
    if path.is_file():
        return hold_out(_read_file(path, request.column, request.option))
    check_place(location, request.option)
    return _from_hub(request)


def check_place(name: str, option: str) -> None:
    """Raise DataError for a source that can only be a path, where nothing is. It takes no time and reads nothing."""
    place = prefix_source(name) or name
    is_path = place.startswith((".", "/", "~")) or Path(place).suffix.lower() in _SUFFIXES
    if is_path and not Path(place).exists():
        raise DataError(
            f"{option} {place} must be an existing file or folder, wikitext2, wikitext2-plain, python-docs, or a hub "
            "data set; there is nothing at this path; check the path"
        )


def _plain_articles(texts: Sequence[Document]) -> list[Document]:
    return [undo_tokenization(article) for text in texts for article in split_articles(str(text))]


def _local_copy(request: _Request) -> Path | None:
    """The folder of a hub data set in --data_dir, or None if it has none."""
    if request.data_dir is None or Path(request.location).exists():
        return None
    data_dir = Path(request.data_dir)
    if not data_dir.is_dir():
        raise DataError(f"--data_dir {data_dir} must be a folder of data sets; there is no folder at this path")
    published, _, configuration = request.location.partition(":")
    names = ("wikitext",) if published == WIKITEXT2 else (published, published.split("/")[-1])
    return next((data_dir / name / configuration for name in names if (data_dir / name / configuration).is_dir()), None)


def _python_docs() -> list[Document]:
    from pydoc_data.topics import topics

    return list(dict.fromkeys(text for _, text in sorted(topics.items())))  # some topics have two names


def _read_file(path: Path, column: str, option: str, keep_blank: bool = False) -> Sequence[Document]:
    suffix = path.suffix.lower()
    if suffix in _TEXT_SUFFIXES:
        return [data_files.read_utf8(path, option)]
    if suffix not in data_files.ROW_SUFFIXES:
        raise DataError(
            f"{option} {path} must end with one of {' '.join(_SUFFIXES)}; got {path.suffix or 'no suffix'}; "
            "convert the file, or rename it"
        )
    rows = data_files.read_rows(path, option)
    if not rows:
        raise DataError(f"{option} {path} must have at least one row; it has none; name another file")
    columns = list(dict.fromkeys(name for row in rows for name in row))
    column = document_column(columns, column, str(path))
    values, tools = ([row.get(name) for row in rows] for name in (column, TOOLS))
    return checked_documents(values, tools, column, str(path), keep_blank)


def _is_text_file(file: Path) -> bool:
    return file.suffix.lower() in _TEXT_SUFFIXES


def _from_folder(folder: Path, request: _Request, lines: bool = False, is_copy: bool = False) -> DocumentSplits:
    """The files of a folder.

    Args:
        lines: its rows are the lines of one text (WikiText), and other versions lie beside.
        is_copy: of a hub data set, so that its splits have names, and other files (a card) may lie there.
    """
    found, read = dict[str, Sequence[Document]](), set[str]()
    known = sorted(
        file
        for file in folder.rglob("*")
        if file.suffix.lower() in _SUFFIXES
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )
    for split in SPLITS:
        for suffix in _SUFFIXES:
            files = [file for file in known if file.suffix.lower() == suffix and split in splits_of(file, folder)]
            if lines:
                files = [file for file in files if not _OTHER_WIKITEXT & set(file.relative_to(folder).parts)]
            if files:
                rowwise = suffix in data_files.ROW_SUFFIXES
                column = request.column if rowwise else "text"
                places = sorted({str(file.parent.relative_to(folder)) for file in files})
                if len(places) > 1 and not lines:
                    log.warning("%s: %s text is read from %s together", folder, split, " and ".join(places[:3]))
                documents = [doc for file in files for doc in _read_file(file, column, request.option, lines)]
                found[split] = ["".join(map(str, documents))] if lines and rowwise else documents
                read.add(suffix)
                break
    unsplit = [file for file in known if not splits_of(file, folder)]
    left = [file for file in unsplit if file.suffix.lower() in read]
    if left and not is_copy:
        log.warning(
            "%s: %d files are not read, as others have train, validation or test in their names", folder, len(left)
        )
    if not found and not is_copy and len({_is_text_file(file) for file in unsplit}) == 1:
        log.info("%s: its %d files are read together; no name has train, validation or test", folder, len(unsplit))
        found["train"] = [document for file in unsplit for document in _read_file(file, request.column, request.option)]
    missing = _missing_split(found, request.wanted)
    if missing:
        raise DataError(
            f"{request.option} {folder} must hold a file with the word {missing} in its name "
            f"({' '.join(_SUFFIXES)}); there is none; rename a file (where none has such a word, all are read)"
        )
    return _with_all_splits(found)


def _missing_split(splits: Collection[str], wanted: Sequence[str]) -> str | None:
    """A wanted split that does not exist and that no training split can give; None if there is none."""
    return None if "train" in splits else next((split for split in wanted if split not in splits), None)


def _with_all_splits(found: Mapping[str, Sequence[Document]]) -> DocumentSplits:
    """All splits of a source. Those it does not have are taken from its training split, or are empty without one."""
    if found.keys() >= set(SPLITS):
        return DocumentSplits(found["train"], found["validation"], found["test"])
    taken = hold_out(found.get("train", ()), tuple(split for split in SPLITS[1:] if split not in found))
    return DocumentSplits(taken.train, found.get("validation", taken.validation), found.get("test", taken.test))


def _from_hub(request: _Request) -> DocumentSplits:
    import datasets

    location, name, option = request.location, request.name, request.option
    published, _, configuration = location.partition(":")
    if location == WIKITEXT2:
        published, configuration = "Salesforce/wikitext", "wikitext-2-raw-v1"
    arguments = (published, configuration) if configuration else (published,)
    try:
        splits = datasets.load_dataset(*arguments)
    except Exception as error:  # the hub's errors have no common base
        raise _hub_error(request, error) from error
    known = list(splits) if isinstance(splits, datasets.DatasetDict) else []
    names = {split: own for split in SPLITS if (own := split_named(split, known)) is not None}
    missing = _missing_split(names, request.wanted)
    if missing:
        raise DataError(
            f"{option} {name} must have a {missing} split; it has {', '.join(known) or 'none'}; name another data set"
        )
    others = ", ".join(f"{split} is {own}" for split, own in names.items() if own != split)
    if others:
        log.info("%s: %s", name, others)
    found: dict[str, Sequence[Document]] = {}
    for split, own in names.items():
        column = document_column(splits[own].column_names, request.column, name)
        rows = _some_rows(splits[own], column, name)
        has_tools = TOOLS in rows.column_names and len(rows) and not isinstance(rows[0][column], str)
        tools = rows[TOOLS] if has_tools else [None] * len(rows)
        documents = checked_documents(rows[column], tools, column, name, location == WIKITEXT2)
        # The rows of wikitext-2 are the lines of one text.
        found[split] = ["".join(map(str, documents))] if location == WIKITEXT2 else documents
    return _with_all_splits(found)


def _some_rows(rows: Any, column: str, name: str) -> Any:
    """A split of a hub data set, or evenly spaced rows of one that would not fit into memory."""
    tried = rows[:: max(1, len(rows) // _TRIED_ROWS)][column]
    characters = sum(len(str(value)) for value in tried)  # no row has been checked yet
    step = -(-characters * len(rows) // (max(1, len(tried)) * _MOST_CHARACTERS))
    if step < 2:
        return rows
    log.info("%s: 1 in %d of its %d rows is read", name, step, len(rows))
    return rows.select(range(0, len(rows), step))


def _hub_error(request: _Request, error: Exception) -> DataError:
    message, cause = str(error).lower(), " ".join(str(error.__cause__ or error).split())[:200]
    if "config name is missing" in message or "builderconfig" in message:
        known = ", ".join(re.findall(r"'([^']*)'", str(error).partition("[")[2].partition("]")[0]))
        published = request.name.partition(":")[0]
        return DataError(
            f"{request.option} {request.name} must name a configuration of the data set, as in "
            f"{published}:{known.partition(',')[0]}; it has {known[:200]}"
        )
    if "not found" in message and "offline" not in message and "reach" not in message:
        return DataError(
            f"{request.option} {request.name} must be a data set on the hub, or a local file or folder; "
            f"it was not found on the hub; {cause}"
        )
    names = (WIKITEXT2, WIKITEXT2_PLAIN, PYTHON_DOCS, SELF)
    near = [name for name in get_close_matches(request.location, names, 1) if name != request.location]
    guess = f"did you mean {near[0]}? otherwise " if near else ""
    return HubUnreachableError(
        f"{request.option} {request.name} is not on this machine and the Hugging Face hub cannot be reached; {guess}"
        "name a local file or folder, give --data_dir (a folder of data sets), or use "
        f"{request.option} python-docs ({cause})"
    )
