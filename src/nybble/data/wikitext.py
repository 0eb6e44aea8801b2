"""WikiText without its tokenization marks."""

from __future__ import annotations

import re
from itertools import pairwise

# A heading of the first level starts an article: " = Robert Boulter = ".
_TITLE = re.compile(r"^ ?= [^=\n].* = ?$", re.MULTILINE)
# The detokenizer of lm-eval's task wikitext (lm_eval/tasks/wikitext/preprocess_wikitext.py), in its order and with its
# oddities (" N " becomes " 1 "), so that the text a model is trained on looks like the text it is measured on.
_DETOKENIZER_RULES = [
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
    """Cut WikiText into articles, each with its title. Text before the first title is an article too, unless blank."""
    starts = [0, *(title.start() for title in _TITLE.finditer(text)), len(text)]
    return [article for begin, end in pairwise(starts) if (article := text[begin:end]).strip()]


def undo_tokenization(article: str) -> str:
    """Remove the tokenization marks of an article: " @-@ ", spaces before commas and inside quotes."""
    for pattern, replacement in _DETOKENIZER_RULES:
        article = pattern.sub(replacement, article)
    return article
