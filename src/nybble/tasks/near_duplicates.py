"""Detection of rows that nearly repeat other rows, so that held-out rows are not trained on in disguise.

WinoGrande, for example, comes in pairs: one word of the sentence is changed, and the answer is the opposite one.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

# A row is a near duplicate if it shares more than this fraction of its word trigrams with a single indexed row.
MAX_SHARED_TRIGRAMS = 0.3

Trigram = tuple[str, str, str]


class NearDuplicateIndex:
    """Index of rows by their word trigrams.

    Args:
        rows: rows of a data set: dicts, lists and texts in any nesting.
    """

    def __init__(self, rows: Sequence[Any]) -> None:
        self._rows_with: dict[Trigram, list[int]] = {}
        for i, row in enumerate(rows):
            for trigram in word_trigrams(row):
                self._rows_with.setdefault(trigram, []).append(i)

    def contains(self, row: Any) -> bool:
        """Whether one of the indexed rows shares more than MAX_SHARED_TRIGRAMS of the trigrams of `row`."""
        trigrams = word_trigrams(row) if self._rows_with else set()
        shared = Counter(i for trigram in trigrams for i in self._rows_with.get(trigram, ()))
        return bool(shared) and max(shared.values()) > MAX_SHARED_TRIGRAMS * len(trigrams)


def word_trigrams(value: Any) -> set[Trigram]:
    """All runs of three words, in lower case, in the texts of a row.

    Args:
        value: dicts, lists and texts in any nesting; other values have no words.
    """
    if isinstance(value, str):
        words = re.findall(r"\w+", value.lower())
        return set(zip(words, words[1:], words[2:], strict=False))
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return set().union(*map(word_trigrams, parts))
