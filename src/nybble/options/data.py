"""Which text to train on, to calibrate with, and to measure on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from nybble.options.base import Group, option

# A sequence shorter than this has no context to learn from.
MIN_SEQ_LEN = 8


@dataclass(frozen=True, kw_only=True)
class DataOptions(Group):
    """Where text comes from and how it is cut."""

    TITLE: ClassVar[str] = "Data"

    data: tuple[str, ...] = option(
        ("wikitext2-plain",),
        "Text sources: wikitext2-plain, wikitext2, python-docs, a .txt, .md, .jsonl, .json, .csv or .parquet file, a "
        "folder of files, a hub dataset (OWNER/NAME, OWNER/NAME:CONFIGURATION); several as NAME=SHARE. "
        "self: the model generates the text; self:SOURCE: it continues beginnings of SOURCE.",
        basic=True,
    )
    seq_len: int = option(1024, "Tokens per sequence.", basic=True)
    text_column: str = option("text", "Column with the text, in sources that have columns.")
    data_dir: str | None = option(None, "Folder with local copies of datasets, for machines without the hub.")
    assistant_only_loss: bool = option(
        False, "In conversations (a column messages), train and measure only what the assistant says."
    )

    def check(self) -> None:
        """Raise OptionError for values outside of their range."""
        self.require("seq_len", lambda value: value >= MIN_SEQ_LEN, f"at least {MIN_SEQ_LEN}")


@dataclass(frozen=True, kw_only=True)
class TextOptions(DataOptions):
    """Text to train or calibrate on, and text to measure on."""

    eval_data: tuple[str, ...] = option(
        (),
        "Sources of validation and test text. Default: --data; python-docs if the model generates --data from nothing.",
    )
    other_data: tuple[str, ...] = option(
        ("python-docs",), "Text of another domain, of which a little is measured too, or none."
    )
