"""Training, validation and test splits."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from nybble.data import chat
from nybble.errors import DataError

log = logging.getLogger("nybble")
SPLITS = ("train", "validation", "test")
SPLIT_WORDS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev"},
    "test": {"test", "testing"},
}


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


def hold_out(documents: Sequence[Document], lacking: Collection[str] = SPLITS[1:]) -> Texts:
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


def splits_of(file: Path) -> list[str]:
    """The splits that a file's name speaks of: none or one; DataError for more."""
    words = set(re.split(r"[^a-z]+", file.name.lower()))
    splits = [split for split, known in SPLIT_WORDS.items() if words & known]
    if len(splits) > 1:
        raise DataError(
            f"--data: the name of {file} must speak of one split; it speaks of {' and '.join(splits)}; rename it, or move it away"
        )
    return splits
