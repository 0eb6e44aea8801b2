"""Compare how llama.cpp and transformers split texts into tokens.

llama.cpp has its own tokenizers, which do less than a tokenizer.json can say: they normalize no Unicode, and know no
words that are stripped around added tokens. What differs is said in a warning; token ids that are given to llama.cpp
are right in any case.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from nybble.export.gguf.llama_cpp import LlamaModel

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
)
"""Words, numbers, spaces, code, marks, scripts, emoji: what pre-tokenizers treat differently."""


def check_tokenizer(path: Path, tokenizer: Any, vocab_size: int) -> None:
    """Load a file in llama.cpp, split texts with both tokenizers, and warn of differences.

    Args:
        path: of the .gguf file.
        tokenizer: transformers tokenizer from which its fields were made.
        vocab_size: tokens of the file.

    Raises:
        ExportError: llama.cpp does not load the file.
    """
    model = LlamaModel(path)
    if len(tokenizer) > vocab_size:  # a small twin of a model (rehearsal.py) has a part of the tokens
        return
    turns = [f"a{text} b{text}{text}c" for text in tokenizer.all_special_tokens]
    texts = (*PROBES, *turns)
    different = [text for text in texts if model.tokenize(text) != tokenizer(text).input_ids]
    if different:
        log.warning(
            "llama.cpp reads %d of %d test texts as other tokens than the tokenizer of this model (first: %r); where "
            "this matters, give llama.cpp token ids instead of text",
            len(different),
            len(texts),
            different[0],
        )
