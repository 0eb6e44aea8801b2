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
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nybble import chat, rows
from nybble.errors import DataError, OptionError

log = logging.getLogger("nybble")

WIKITEXT2 = "wikitext2"
WIKITEXT2_PLAIN = "wikitext2-plain"
PYTHON_DOCS = "python-docs"
SELF = "self"
SPLITS = ("train", "validation", "test")
SPLIT_WORDS = {"train": {"train", "training"}, "validation": {"validation", "valid", "val", "dev"}, "test": {"test", "testing"}}
# Column of conversations, where there is no text column.
_MESSAGES = "messages"
_PLAIN = (".raw", ".txt", ".md")
# What may lie beside wikitext-2-raw in --data_dir.
_OTHER_WIKITEXT = {"document_level", "wikitext-2-v1", "wikitext-103-v1", "wikitext-103-raw-v1"}


# Text, or a conversation.
Document = str | list[chat.Message]


@dataclass(frozen=True)
class Texts:
    """Documents by split."""

    train: Sequence[Document]
    validation: Sequence[Document]
    test: Sequence[Document]

    def __getitem__(self, split: str) -> Sequence[Document]:
        assert split in SPLITS, split
        return getattr(self, split)  # type: ignore[no-any-return]


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
        raise DataError("what the model writes itself is for training: --data self of distill and compress; name a text to measure on")
    if data == WIKITEXT2_PLAIN:
        try:
            published = load_texts(WIKITEXT2, column, data_dir, wanted)
        except DataError as error:
            raise DataError(str(error).replace(f"--data {WIKITEXT2} ", f"--data {WIKITEXT2_PLAIN} ")) from error
        return Texts(*([plain(article) for text in published[split] for article in articles(str(text))] for split in SPLITS))
    local = _local(data, data_dir)
    if data == PYTHON_DOCS:
        texts = _held_out(_python_docs())
    elif local is not None:
        texts = _from_folder(local, column, wanted, lines=data == WIKITEXT2)
    elif Path(data).is_dir():
        texts = _from_folder(Path(data), column, wanted)
    elif Path(data).is_file():
        texts = _held_out(_read_file(Path(data), column))
    elif data.startswith((".", "/", "~")) or Path(data).suffix in (*_PLAIN, *rows.SUFFIXES):
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


# A heading of the first order begins an article of wikitext: " = Robert Boulter = ".
_TITLE = re.compile(r"^ ?= [^=\n].* = ?$", re.MULTILINE)
# What undoes the tokenization of wikitext, in this order: lm-eval's rules for its task wikitext (lm_eval/tasks/wikitext/preprocess_wikitext.py), with their
# oddities, so that what is trained is what is measured.
_PLAIN_RULES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"s '", "s'"),
        *((f" @{re.escape(mark)}@ ", mark) for mark in "-,."),
        *((f" {re.escape(mark)} ", f"{mark} ") for mark in ":;.!?,"),
        (r"\(\s*([^)]*?)\s*\)", r"(\1)"),
        (r"\[\s*([^\]]*?)\s*\]", r"[\1]"),
        (r"{\s*([^}]*?)\s*}", r"{\1}"),
        (r"\"\s*([^\"]*?)\s*\"", r'"\1"'),
        (r"'\s*([^']*?)\s*'", r"'\1'"),
        (r"= = = =", "===="),
        (r"= = =", "==="),
        (r"= =", "=="),
        (r" ° ", "°"),
        (r" \n", "\n"),
        (r"\n ", "\n"),
        (r" N ", " 1 "),
        (r" 's", "'s"),
    )
]


def articles(text: str) -> list[str]:
    """The articles of wikitext, each from its title on; what stands before the first title is one too, if it is more than space."""
    starts = [0, *(found.start() for found in _TITLE.finditer(text)), len(text)]
    return [part for begin, end in pairwise(starts) if (part := text[begin:end]).strip()]


def plain(article: str) -> str:
    """An article of wikitext without the marks of its tokenization (" @-@ ", spaces before commas and inside quotes)."""
    for pattern, replacement in _PLAIN_RULES:
        article = pattern.sub(replacement, article)
    return article


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


def _held_out(documents: Sequence[Document], lacking: Collection[str] = SPLITS[1:]) -> Texts:
    """A tenth of the documents for validation, a tenth for test, as far as these are `lacking`; a single text is cut into blocks of 100 lines first."""
    if len(documents) < 10 and all(isinstance(document, str) for document in documents):
        lines = [line for document in documents for line in str(document).splitlines(keepends=True)]
        documents = ["".join(lines[i : i + 100]) for i in range(0, len(lines), 100)]
    if len(documents) < 3:
        return Texts(documents, (), ())
    few = ["train"] * (len(documents) - 2) + ["validation", "test"]
    places = few if len(documents) < 10 else [split_of(i) for i in range(len(documents))]
    parts: dict[str, list[Document]] = {split: [] for split in SPLITS}
    for split, document in zip(places, documents, strict=True):
        parts[split if split in lacking else "train"].append(document)
    return Texts(parts["train"], parts["validation"], parts["test"])


def split_of(i: int) -> str:
    """The split of the i-th of rows that come without: of every ten neighbours one for validation and one for test, each time at another place in the ten, for
    rows may alternate."""
    return {5: "validation", 9: "test"}.get((i + i // 10) % 10, "train")


def _read_file(path: Path, column: str) -> Sequence[Document]:
    kind = path.suffix.lower()
    if kind in _PLAIN:
        return [rows.read_text(path)]
    if kind not in rows.SUFFIXES:
        raise DataError(f"--data {path} must end with one of {' '.join((*_PLAIN, *rows.SUFFIXES))}; got {path.suffix or 'no suffix'}")
    found = rows.read_rows(path)
    known = list(dict.fromkeys(name for row in found for name in row))
    name = _column_of(known, column, str(path))
    return _documents([row.get(name) for row in found], name, str(path))


def _from_folder(folder: Path, column: str, wanted: Sequence[str], lines: bool = False) -> Texts:
    """`lines`: the rows of a file are the lines of one text, as those of wikitext-2 are, beside which lie others."""
    found: dict[str, Sequence[Document]] = {}
    for split in SPLITS:
        for suffix in (*_PLAIN, *rows.SUFFIXES):  # plain text first: it is what the perplexities of papers are measured on
            files = sorted(file for file in folder.rglob(f"*{suffix}") if file.is_file() and split in splits_of(file))
            if lines:
                files = [file for file in files if not _OTHER_WIKITEXT & set(file.relative_to(folder).parts)]
            if files:
                texts = [text for file in files for text in _read_file(file, column if suffix in rows.SUFFIXES else "text")]
                found[split] = ["".join(map(str, texts))] if lines and suffix in rows.SUFFIXES else texts
                break
    lacking = _lacking(found, wanted)
    if lacking:
        raise DataError(f"--data {folder} must hold a file with the word {lacking} in its name ({' '.join((*_PLAIN, *rows.SUFFIXES))}); found none")
    return _filled(found)


def splits_of(file: Path) -> list[str]:
    """The splits that a file's name speaks of: none or one; DataError for more."""
    words = set(re.split(r"[^a-z]+", file.name.lower()))
    splits = [split for split, known in SPLIT_WORDS.items() if words & known]
    if len(splits) > 1:
        raise DataError(f"--data: the name of {file} must speak of one split; it speaks of {' and '.join(splits)}; rename it, or move it away")
    return splits


def _lacking(found: Collection[str], wanted: Sequence[str]) -> str | None:
    """The split that is missing: one of those wanted, where there is no training split that it could be taken from."""
    return None if "train" in found else next((split for split in wanted if split not in found), None)


def _filled(found: dict[str, Sequence[Document]]) -> Texts:
    """The splits of a source; those that it does not have are taken from its training split, where it has one."""
    if found.keys() >= set(SPLITS):
        return Texts(found["train"], found["validation"], found["test"])
    rest = _held_out(found.get("train", ()), tuple(split for split in SPLITS[1:] if split not in found))
    return Texts(rest.train, found.get("validation", rest.validation), found.get("test", rest.test))


def _from_hub(data: str, column: str, wanted: Sequence[str]) -> Texts:
    import datasets

    arguments = ("Salesforce/wikitext", "wikitext-2-raw-v1") if data == WIKITEXT2 else (data,)
    try:
        splits = datasets.load_dataset(*arguments)
    except Exception as error:  # the hub's errors have no common base
        if "not found" in str(error).lower() and "offline" not in str(error).lower() and "reach" not in str(error).lower():
            raise DataError(f"--data {data} was not found on the hub; {_cause(error)}") from error
        near = [name for name in get_close_matches(data, (WIKITEXT2, WIKITEXT2_PLAIN, PYTHON_DOCS, SELF), 1) if name != data]
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
        raise DataError(f"--data_column must be a column of {source}: got {column}; it has {', '.join(known) or 'none'}")
    return column


def _documents(values: Sequence[Any], column: str, source: str) -> Sequence[Document]:
    """The values of a column as texts or conversations."""
    filled = [(i, value) for i, value in enumerate(values, 1) if value is not None]
    if len(filled) < len(values):
        log.warning("%s: %d of %d rows have nothing in column %s and were left out", source, len(values) - len(filled), len(values), column)
    if filled and (isinstance(filled[0][1], list) or column == _MESSAGES):
        return [chat.check_messages(value, f"{source}: row {i}, column {column}") for i, value in filled]
    odd = next((i for i, value in filled if not isinstance(value, str)), None)
    if odd is not None:
        raise DataError(f"{source}: row {odd}, column {column} must be text; got {str(values[odd - 1])[:80]}; name another --data_column")
    return [value for _, value in filled]


def _cause(error: BaseException) -> str:
    return " ".join(str(error.__cause__ or error).split())[:200]


# Characters that are tokenized at a time: tokenizers need some 200 bytes of memory for each.
PIECE = 1 << 20
# Characters on both sides of a cut that are tokenized with it and without.
_AROUND = 100


def tokenize(tokenizer: Any, documents: Sequence[str], piece: int = PIECE) -> Tensor:
    """All documents as one row of token ids [N] (int64), joined by the end-of-sequence token. Long ones are tokenized in pieces, with the same ids."""

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False).input_ids  # type: ignore[no-any-return]

    parts = []
    for i, document in enumerate(documents):
        if i and tokenizer.eos_token_id is not None:
            parts.append(torch.tensor([tokenizer.eos_token_id]))
        parts += [torch.tensor(encode(text), dtype=torch.int64) for text in _pieces(encode, document, piece)]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)


def _pieces(encode: Callable[[str], list[int]], text: str, piece: int) -> Iterator[str]:
    """Parts of a text whose token ids make up those of the whole: cut where the text around gives the same ids when it is cut.

    A space at the cut is left out where the tokenizer puts one before every text. Where 1000 places in a row will not do, the piece grows.
    """
    start = 0
    while len(text) - start > piece:
        for at in range(start + piece, max(start + _AROUND, start + piece - 1000), -1):
            before, after = text[at - _AROUND : at], text[at : at + _AROUND]
            whole, left = encode(before + after), encode(before)
            skipped = next((n for n in (0, 1) if (n == 0 or after.startswith(" ")) and whole == left + encode(after[n:])), None)
            if skipped is not None:
                yield text[start:at]
                start = at + skipped
                break
        else:
            piece *= 2
    yield text[start:]


def begin_tokens(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before every text: [bos] for Gemma and Llama 3, nothing for SmolLM2 and Qwen."""
    ids = tokenizer("").input_ids
    return [i for i in ids if i == tokenizer.bos_token_id]


def end_tokens(tokenizer: Any) -> list[int]:
    """What ends a text: [eos], or nothing for a tokenizer without."""
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def cut(tokens: Tensor, length: int, begin: Sequence[int] = ()) -> Tensor:
    """[N] -> [S, length] without overlap, each row starting with `begin`; the incomplete rest is dropped."""
    body = length - len(begin)
    rows = tokens[: len(tokens) // body * body].view(-1, body)
    return torch.cat([torch.tensor(list(begin), dtype=torch.int64).expand(len(rows), -1), rows], dim=1)


@dataclass(frozen=True)
class Rows:
    """Token sequences.

    Attributes:
        ids: [S, T], int64.
        counted: [S, T], bool: whether the prediction made at a position (of the token after it) is trained and measured.
    """

    ids: Tensor
    counted: Tensor

    @staticmethod
    def of(ids: Tensor) -> Rows:
        """Sequences of plain text: everything counts."""
        return Rows(ids, torch.ones_like(ids, dtype=torch.bool))

    @staticmethod
    def cat(parts: Sequence[Rows]) -> Rows:
        return Rows(torch.cat([part.ids for part in parts]), torch.cat([part.counted for part in parts]))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, which: slice | Tensor) -> Rows:
        return Rows(self.ids[which], self.counted[which])


def sequences(tokenizer: Any, documents: Sequence[Document], length: int, what: str, minimum: int = 1, assistant_only: bool = False) -> Rows:
    """Documents -> token sequences. Of plain text everything counts, with `assistant_only` too.

    Raises:
        DataError: fewer than `minimum` sequences; see chat.py for conversations.
    """
    texts = [document for document in documents if isinstance(document, str)]
    if texts and len(texts) < len(documents):
        raise DataError(f"the {what} data must be plain text or conversations; it has {len(texts)} texts beside conversations; name them as two sources")
    if len(texts) < len(documents):
        rows, size = _conversations(tokenizer, [document for document in documents if not isinstance(document, str)], length, what, assistant_only)
    else:
        tokens = tokenize(tokenizer, texts)
        rows, size = Rows.of(cut(tokens, length, begin_tokens(tokenizer))), len(tokens)
    if len(rows) < minimum:
        raise too_few(what, minimum, length, len(rows), size)
    return rows


def too_few(what: str, minimum: int, length: int, count: int, tokens: int | None = None) -> DataError:
    """The error of a text that is too short."""
    has = f"{count} sequences" if tokens is None else f"{tokens} tokens = {count} sequences"
    return DataError(f"the {what} text must give at least {minimum} sequences of {length} tokens; it has {has}; use more text or a smaller --seq_len")


def _conversations(tokenizer: Any, conversations: Sequence[list[chat.Message]], length: int, what: str, assistant_only: bool) -> tuple[Rows, int]:
    """Rows, and tokens in all."""
    encoded = [chat.encode(tokenizer, messages, assistant_only) for messages in conversations]
    long = sum(len(ids) > length for ids, _ in encoded)
    if long == len(encoded):
        shortest = min(len(ids) for ids, _ in encoded)
        raise DataError(f"at least one conversation of the {what} data must fit into {length} tokens; the shortest has {shortest}; use a larger --seq_len")
    if long:
        log.warning("%s: %d of %d conversations are longer than %d tokens and were left out", what, long, len(encoded), length)
    rows = Rows(*chat.pack(encoded, length))
    if not rows.counted.any():
        raise DataError(
            f"the {what} data must have assistant tokens to learn from; the {len(encoded) - long} conversations that fit have none; use --loss_on all"
        )
    return rows[rows.counted.any(1)], sum(len(ids) for ids, _ in encoded)


@dataclass(frozen=True)
class Mixture:
    """What `--data` names: sources, and their shares or None.

    Raises:
        OptionError: a share that is not a positive number, on some sources only, or a source named twice.
    """

    names: Sequence[str]
    shares: Sequence[float] | None = None

    @staticmethod
    def parse(entries: Sequence[str]) -> Mixture:
        """["wikitext2=0.7", "chat.jsonl=0.3"]."""
        if not entries:
            raise OptionError("--data must name at least one source")
        parts = [entry.rpartition("=") if "=" in entry and not Path(entry).exists() else (entry, "", "") for entry in entries]
        names, shares = [part[0] for part in parts], [part[2] for part in parts]
        if not all(name.strip() for name in names):
            raise OptionError(f"--data must name every source; got {' '.join(entries) or 'an empty name'}")
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice:
            raise OptionError(f"--data must name every source once; got {twice[0]} more than once")
        if not any(shares):
            return Mixture(names)
        try:
            numbers = [float(share) for share in shares]
        except ValueError:
            numbers = []
        if not numbers or not all(0 < number < float("inf") for number in numbers):
            raise OptionError(f"--data must be NAME=SHARE for every source, with shares above 0, or no shares at all; got {' '.join(entries)}")
        return Mixture(names, numbers)

    def most(self, parts: Sequence[Rows]) -> int:
        """As many rows as `mix` can draw without giving any twice."""
        if self.shares is None:
            return sum(map(len, parts))
        return int(min(len(part) * sum(self.shares) / share for part, share in zip(parts, self.shares, strict=True)))

    def first(self, parts: Sequence[Rows], count: int) -> Rows:
        """`count` rows to measure on (0 = all), none of them twice: the first ones of a single source, of several drawn at random, always the same ones."""
        return parts[0][: count or None] if len(parts) == 1 else self.mix(parts, min(count or self.most(parts), self.most(parts)), 0)

    def mix(self, parts: Sequence[Rows], wanted: int, seed: int) -> Rows:
        """Draw `wanted` rows at random: by share (a part with too few gives some again), or without shares from all alike (never again)."""
        if self.shares is None:
            rows = Rows.cat(parts)
            return rows[order(len(rows), min(len(rows), wanted), seed)]
        exact = [wanted * share / sum(self.shares) for share in self.shares]
        counts = [int(sum(exact[: i + 1]) + 0.5) - int(sum(exact[:i]) + 0.5) for i in range(len(exact))]
        for name, part, count in zip(self.names, parts, counts, strict=True):
            if count > len(part):
                log.warning("--data %s has %d sequences and its share asks for %d of them; some are used again", name, len(part), count)
        drawn = Rows.cat([part[order(len(part), count, seed)] for part, count in zip(parts, counts, strict=True) if count])
        return drawn[order(len(drawn), len(drawn), seed)]


def check_conversations(sources: Mapping[str, Sequence[Document]]) -> None:
    """Raise DataError for --loss_on assistant where no source has conversations."""
    if all(isinstance(document, str) for documents in sources.values() for document in documents):
        raise DataError(
            f"--loss_on assistant needs conversations (rows with messages, or another column named by --data_column); {' and '.join(sources)} "
            f"{'is' if len(sources) == 1 else 'are'} plain text; use --loss_on all"
        )


def distinct(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Where the different ones of the rows [S, T] first stand [U], in their order, and which of those each row is [S]."""
    if ids.device.type == "meta":  # not written yet
        return torch.arange(len(ids)), torch.arange(len(ids))
    numbers: dict[bytes, int] = {}
    which = [numbers.setdefault(row.numpy().tobytes(), len(numbers)) for row in ids]
    first = {number: i for i, number in reversed(list(enumerate(which)))}
    return torch.tensor([first[number] for number in range(len(numbers))], dtype=torch.int64), torch.tensor(which, dtype=torch.int64)


def order(available: int, wanted: int, seed: int) -> Tensor:
    """Which sequence to train on at each of `wanted` draws: all `available` ones in a random order, then all again in another."""
    generator = torch.Generator().manual_seed(seed)
    passes = [torch.randperm(available, generator=generator) for _ in range(-(-wanted // available))]
    return torch.cat(passes)[:wanted]
