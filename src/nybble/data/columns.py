"""The column of row-wise data that holds the documents, and its values as texts or conversations."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from nybble.data import files as data_files
from nybble.data.chat import Conversation, check_messages, check_tools
from nybble.data.splits import Document
from nybble.errors import DataError

log = logging.getLogger("nybble")

# Columns of conversations, in the order in which they are looked for, and that of their tools.
CONVERSATIONS, TOOLS = ("messages", "conversations"), "tools"


def document_column(columns: Sequence[str], wanted: str, source: str) -> str:
    """The column to read: the wanted one; or one of conversations if the default "text" is wanted and does not exist.

    Raises:
        DataError: there is no such column.
    """
    if wanted == "text" and wanted not in columns:
        wanted = next((name for name in CONVERSATIONS if name in columns), wanted)
    if wanted not in columns:
        raise DataError(
            f"--text_column must be a column of {source}: got {wanted}; it has "
            f"{' '.join(', '.join(columns).split())[:200] or 'none'}"
        )
    return wanted


def checked_documents(
    values: Sequence[Any], tools: Sequence[Any], column: str, source: str, keep_blank: bool = False
) -> Sequence[Document]:
    """The values of a column, all of them texts or all of them conversations. Rows without a value are left out.

    Args:
        tools: of conversations, for each row.
        keep_blank: keep texts of white space: the rows are the lines of one text.

    Raises:
        DataError: a value is neither, or there are both.
    """
    filled = [
        (i, value, own_tools)
        for i, (value, own_tools) in enumerate(zip(values, tools, strict=True), 1)
        if value is not None and (keep_blank or not isinstance(value, str) or value.strip())
    ]
    if len(filled) < len(values):
        log.warning(
            "%s: left out %d of %d rows, which have nothing in column %s",
            source, len(values) - len(filled), len(values), column,
        )  # fmt: skip
    if filled and (isinstance(filled[0][1], list) or column == CONVERSATIONS[0]):
        messages = [check_messages(value, f"{source}: row {i}, column {column}") for i, value, _ in filled]
        try:
            given = [check_tools(own_tools, f"{source}: row {i}, column {TOOLS}") for i, _, own_tools in filled]
        except DataError as error:  # a column of this name may hold anything
            log.warning("%s; conversations are rendered without it", error)
            given = [None] * len(filled)
        return [Conversation(*both) for both in zip(messages, given, strict=True)]
    for i, value, _ in filled:
        if not isinstance(value, str):
            raise DataError(
                f"{source}: row {i}, column {column} must be text; got {repr(value)[:80]}; "
                "name another column with --text_column"
            )
        data_files.check_unicode(value, f"{source}: row {i}, column {column}")
    return [value for _, value, _ in filled]
