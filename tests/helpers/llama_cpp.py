"""llama.cpp's own tokenizer on a GGUF file, and texts on which tokenizers may differ."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

_TEXTS = [
    "1234567890 and 3.14159, 2026-11-21, 0x1F, 1e-5, ٣٤٥",
    "two  spaces,   three, \t tab,\r\ncarriage return",
    "line\n\n\nlines\n \n indented\n",
    "emoji 🙂👩‍👩‍👧‍👦🇩🇪 and ünïcödé, 中文字, \u200bzero width",
    "def f(x: int) -> str:\n    return f'{x:>10}'  # comment\n\n\nif __name__ == \"__main__\":\n\tprint(f(42))",
    "I'm, you've, we'll, it's; don't! (really?) [yes] {no} <a href='x'>",
    " leading and trailing ",
    "",
    "= = Title = = \n\n The @-@ 1 @,@ 000 unk",
]


def texts_to_tokenize(shared_data: Path) -> list[str]:
    """Texts with what tokenizers disagree about, 200 lines of wikitext-2 and 100 questions of GSM8K."""
    lines = (shared_data / "wikitext/wikitext-2-raw/wiki.test.raw").read_text().splitlines()[:200]
    rows = (shared_data / "gsm8k/main/test.jsonl").read_text().splitlines()[:100]
    return _TEXTS + lines + [json.loads(row)["question"] for row in rows]


def llama_tokenizer(file: Path) -> Callable[[str, bool], list[int]]:
    """Return a function of a text, and of whether special tokens are read in it, that gives tokens without BOS.

    xllamacpp's server answers on the loopback interface.
    """
    xllamacpp = pytest.importorskip("xllamacpp", reason="xllamacpp (extra dev) carries llama.cpp")
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(file)
    parameters.n_ctx, parameters.n_parallel, parameters.cpuparams.n_threads, parameters.warmup = 256, 1, 1, False
    server = xllamacpp.Server(parameters)
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def tokenize(text: str, special: bool) -> list[int]:
        body = json.dumps({"content": text, "add_special": False, "parse_special": special}).encode()
        request = urllib.request.Request(
            f"{server.listening_address}/tokenize", body, {"Content-Type": "application/json"}
        )
        with direct.open(request, timeout=60) as answer:
            return list(json.load(answer)["tokens"])

    return tokenize
