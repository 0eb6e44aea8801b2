"""WikiText without the marks of its tokenization."""

from __future__ import annotations

import logging
import re
from itertools import pairwise

log = logging.getLogger("nybble")


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


def split_articles(text: str) -> list[str]:
    """The articles of wikitext, each from its title on; what stands before the first title is one too, if it is more than space."""
    starts = [0, *(found.start() for found in _TITLE.finditer(text)), len(text)]
    return [part for begin, end in pairwise(starts) if (part := text[begin:end]).strip()]


def undo_tokenization(article: str) -> str:
    """An article of wikitext without the marks of its tokenization (" @-@ ", spaces before commas and inside quotes)."""
    for pattern, replacement in _PLAIN_RULES:
        article = pattern.sub(replacement, article)
    return article
