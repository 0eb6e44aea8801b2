"""Compare how a runtime and transformers split texts into tokens.

Runtimes have tokenizers of their own, which do less than a tokenizer.json can say: llama.cpp's normalize no Unicode,
onnxruntime-genai's know other numbers. What differs is said in a warning; token ids that are given to a runtime are
right in any case.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

log = logging.getLogger("nybble")

PROBES = (
    "The quick brown fox jumps over the lazy dog.",
    "Hello, world! It's 9 o'clock; I'm, you've, we'll, they'd, DON'T.",
    "1234567890 and 3.14159, 2026-11-21, 0x1F, 1e-5, 1,000,000",
    "٣٤٥ ½ Ⅷ x² + y² = z², ∑∫∂ €5 £5",
    "two  spaces,   three,    four, \t tab\t\ttabs",
    " leading and trailing ",
    "   ",
    "\n",
    "\n\n\n",
    "\r\n",
    "a\n\n b\n \n c",
    "def f(x: int) -> str:\n    return f'{x:>10}'  # comment\n\n\nif __name__ == \"__main__\":\n\tprint(f(42))",
    "http://example.org/a/b?c=1&d=%20#e user@example.org C:\\dir /usr/bin/env",
    '(a) [b] {c} <d> "e" `f` ...!? -- == /* */',
    "ünïcödé naïve Ångström łódź",
    "e\u0301 n\u0303 decomposed",
    "中文字符。日本語のテキスト 한국어",
    "русский ελληνικά العربية עברית हिन्दी ไทย",
    "🙂👩\u200d👩\u200d👧🇩🇪 \u200b\u00a0\ufeff",
    "CamelCase snake_case kebab-case SCREAMING_CASE mIxEd",
    "'quoted' “quoted” ‘quoted’ — – …",
    "| a | b |\n|---|---|\n| 1 | 2 |",
    '{"key": [1, 2.5, null, true]}',
    "\\frac{1}{2} $x_1^2$ \\\\",
    "x =  7",
    "[\n  1,\n  2\n]",
)
"""Words, numbers, spaces, code, marks, scripts, emoji: what pre-tokenizers treat differently."""


def warn_of_other_tokens(
    runtime: str, tokenize: Callable[[str], Sequence[int]], tokenizer: Any, vocab_size: int
) -> None:
    """Split texts with both tokenizers, and warn of differences.

    Args:
        runtime: its name.
        tokenize: text -> the token ids that the runtime computes with.
        tokenizer: of transformers.
        vocab_size: tokens of the model. A small twin of it (rehearsal.py), which has a part of them, is not compared.
    """
    if len(tokenizer) > vocab_size:
        return
    turns = [f"a{text} b{text}{text}c" for text in tokenizer.all_special_tokens]
    texts = (*PROBES, *turns)
    different = [text for text in texts if list(tokenize(text)) != tokenizer(text).input_ids]
    if different:
        log.warning(
            "%s reads %d of %d test texts as other tokens than the tokenizer of this model (first: %r); where this "
            "matters, give %s token ids instead of text",
            runtime, len(different), len(texts), different[0], runtime,
        )  # fmt: skip
