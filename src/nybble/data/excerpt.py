"""A part of the documents of a large source, where a run needs no more.

A source of gigabytes would be tokenized for an hour to calibrate on a few hundred sequences. Sources of up to 16
million characters are always taken whole.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nybble.data.splits import Document

# Half as much again as wikitext-2.
_TAKEN_WHOLE = 1 << 24
# Of a larger source, at least as many characters are taken.
_LEAST = 1 << 20
# Tokenizers give some four characters of English to a token, and more of repetitions.
_CHARACTERS_PER_TOKEN = 16


def count_characters(documents: Sequence[Document]) -> int:
    """Characters of all texts, and of the contents of all messages with their tools."""
    return sum(map(_size, documents))


def share_for(characters: int, tokens: int) -> float:
    """The share of a text that is likely to give some tokens.

    Args:
        characters: of the text.
        tokens: how many are needed.

    Returns: above 0; 1 means the whole text.
    """
    if characters <= _TAKEN_WHOLE:
        return 1.0
    return min(1.0, max(_LEAST, tokens * _CHARACTERS_PER_TOKEN) / characters)


def first_documents(documents: Sequence[Document], share: float) -> Sequence[Document]:
    """The first documents that hold a share of all characters; all of them from a share of 1 on."""
    return _take(documents, share, range(len(documents)))


def draw_documents(documents: Sequence[Document], share: float, seed: int) -> Sequence[Document]:
    """Documents drawn at random, in their order, that hold a share of all characters; all from a share of 1 on."""
    if share >= 1:
        return documents
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed)).tolist()
    return _take(documents, share, order)


def _take(documents: Sequence[Document], share: float, order: Sequence[int]) -> Sequence[Document]:
    if share >= 1:
        return documents
    wanted, chosen = share * count_characters(documents), list[int]()
    for i in order:
        if wanted <= 0:
            break
        chosen.append(i)
        wanted -= _size(documents[i])
    return [documents[i] for i in sorted(chosen)]


def _size(document: Document) -> int:
    if isinstance(document, str):
        return len(document)
    return sum(len(str(message.get("content", ""))) for message in document.messages) + len(str(document.tools or ""))
