"""Training, validation and test splits of documents.

A source that lacks a split takes it from its training documents: of every ten documents in a row, one goes to
validation and one to test.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from nybble.data.chat import Conversation
from nybble.errors import DataError

SPLITS = ("train", "validation", "test")
# Words in a file name that say which split the file holds.
SPLIT_WORDS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev"},
    "test": {"test", "testing"},
}
# With fewer documents than this, a text is cut into blocks of lines before splits are taken from it.
_FEW_DOCUMENTS = 10
_LINES_PER_BLOCK = 100

# A plain text, or a conversation.
Document = str | Conversation


@dataclass(frozen=True)
class DocumentSplits:
    """The documents of a source, by split."""

    train: Sequence[Document]
    validation: Sequence[Document]
    test: Sequence[Document]

    def __getitem__(self, split: str) -> Sequence[Document]:
        return {"train": self.train, "validation": self.validation, "test": self.test}[split]


def hold_out(documents: Sequence[Document], missing: Collection[str] = SPLITS[1:]) -> DocumentSplits:
    """Take the missing splits from training documents.

    Fewer than ten plain texts are joined and cut into blocks of 100 lines first. From ten documents on, each missing
    split gets a tenth. From three to nine, each gets one document. With fewer than three, it stays empty.

    Args:
        documents: training documents.
        missing: the splits to take, of "validation" and "test".
    """
    if len(documents) < _FEW_DOCUMENTS and all(isinstance(document, str) for document in documents):
        texts = [str(document) for document in documents]
        texts[:-1] = [text if text.endswith("\n") else f"{text}\n" for text in texts[:-1]]
        lines = [line for text in texts for line in text.splitlines(keepends=True)]
        documents = [
            "".join(lines[i : i + _LINES_PER_BLOCK]) for i in range(0, len(lines), _LINES_PER_BLOCK)
        ]  # fmt: skip
    if len(documents) < 3:
        return DocumentSplits(documents, (), ())
    if len(documents) < _FEW_DOCUMENTS:
        splits = ["train"] * (len(documents) - 2) + ["validation", "test"]
    else:
        splits = [split_of_row(i) for i in range(len(documents))]
    parts: dict[str, list[Document]] = {split: [] for split in SPLITS}
    for split, document in zip(splits, documents, strict=True):
        parts[split if split in missing else "train"].append(document)
    return DocumentSplits(parts["train"], parts["validation"], parts["test"])


def split_of_row(i: int) -> str:
    """The split of row `i` of a source without splits.

    Of every ten rows in a row, one is for validation and one for test. Their positions move by one from ten to ten,
    because rows often alternate between kinds.
    """
    return {5: "validation", 9: "test"}.get((i + i // 10) % 10, "train")


def splits_in_name(file: Path) -> list[str]:
    """The split that the name of a file contains as a word: a list of one, or an empty list.

    Raises:
        DataError: the name contains the words of several splits.
    """
    splits = [split for split in SPLITS if _has_word(file.name, split)]
    if len(splits) > 1:
        raise DataError(
            f"the name of {file} must contain one split; it contains {' and '.join(splits)}; rename the file"
        )
    return splits


def splits_of(file: Path, folder: Path) -> list[str]:
    """The split of a file in a folder: by its name, otherwise by the folders in between (train/0000.parquet).

    Raises:
        DataError: a name contains the words of several splits.
    """
    parents = [parent for parent in file.parents if folder in parent.parents]
    return next((splits for path in (file, *parents) if (splits := splits_in_name(path))), [])


def split_named(split: str, names: Sequence[str]) -> str | None:
    """The name of a split among the names that a data set has: itself, or the first with its word, as in train_sft."""
    return split if split in names else next((name for name in names if _has_word(name, split)), None)


def _has_word(name: str, split: str) -> bool:
    """Whether a name contains one of the words for a split."""
    return bool(SPLIT_WORDS[split] & set(re.split(r"[^a-z]+", name.lower())))
