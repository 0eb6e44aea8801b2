"""Documents to token sequences of equal length."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nybble.data import chat
from nybble.data.splits import Document
from nybble.errors import DataError

log = logging.getLogger("nybble")


# Characters that are tokenized at a time: tokenizers need some 200 bytes of memory for each.
PIECE = 1 << 20
# Characters on both sides of a cut that are tokenized with it and without.
_AROUND = 100


def tokenize(tokenizer: Any, documents: Sequence[str], piece: int = PIECE) -> Tensor:
    """All documents as one row of token ids [N] (int64), joined by the end-of-sequence token. Long ones are tokenized in pieces, with the same ids."""

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False).input_ids  # type: ignore[no-any-return]

    parts = []
    for i, document in enumerate(documents):
        if i and tokenizer.eos_token_id is not None:
            parts.append(torch.tensor([tokenizer.eos_token_id]))
        parts += [torch.tensor(encode(text), dtype=torch.int64) for text in _pieces(encode, document, piece)]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)


def _pieces(encode: Callable[[str], list[int]], text: str, piece: int) -> Iterator[str]:
    """Parts of a text whose token ids make up those of the whole: cut where the text around gives the same ids when it is cut.

    A space at the cut is left out where the tokenizer puts one before every text. Where 1000 places in a row will not do, the piece grows.
    """
    start = 0
    while len(text) - start > piece:
        for at in range(start + piece, max(start + _AROUND, start + piece - 1000), -1):
            before, after = text[at - _AROUND : at], text[at : at + _AROUND]
            whole, left = encode(before + after), encode(before)
            skipped = next(
                (n for n in (0, 1) if (n == 0 or after.startswith(" ")) and whole == left + encode(after[n:])), None
            )
            if skipped is not None:
                yield text[start:at]
                start = at + skipped
                break
        else:
            piece *= 2
    yield text[start:]


def begin_tokens(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before every text: [bos] for Gemma and Llama 3, nothing for SmolLM2 and Qwen."""
    ids = tokenizer("").input_ids
    return [i for i in ids if i == tokenizer.bos_token_id]


def end_tokens(tokenizer: Any) -> list[int]:
    """What ends a text: [eos], or nothing for a tokenizer without."""
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def cut_sequences(tokens: Tensor, length: int, begin: Sequence[int] = ()) -> Tensor:
    """[N] -> [S, length] without overlap, each row starting with `begin`; the incomplete rest is dropped."""
    body = length - len(begin)
    rows = tokens[: len(tokens) // body * body].view(-1, body)
    return torch.cat([torch.tensor(list(begin), dtype=torch.int64).expand(len(rows), -1), rows], dim=1)


@dataclass(frozen=True)
class TokenRows:
    """Token sequences.

    Attributes:
        ids: [S, T], int64.
        counted: [S, T], bool: whether the prediction made at a position (of the token after it) is trained and measured.
    """

    ids: Tensor
    loss_mask: Tensor

    @staticmethod
    def of(ids: Tensor) -> TokenRows:
        """Sequences of plain text: everything counts."""
        return TokenRows(ids, torch.ones_like(ids, dtype=torch.bool))

    @staticmethod
    def cat(parts: Sequence[TokenRows]) -> TokenRows:
        return TokenRows(torch.cat([part.ids for part in parts]), torch.cat([part.loss_mask for part in parts]))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, which: slice | Tensor) -> TokenRows:
        return TokenRows(self.ids[which], self.loss_mask[which])


def pack_documents(
    tokenizer: Any,
    documents: Sequence[Document],
    length: int,
    what: str,
    minimum: int = 1,
    assistant_only: bool = False,
) -> TokenRows:
    """Documents -> token sequences. Of plain text everything counts, with `assistant_only` too.

    Raises:
        DataError: fewer than `minimum` sequences; see chat.py for conversations.
    """
    texts = [document for document in documents if isinstance(document, str)]
    if texts and len(texts) < len(documents):
        raise DataError(
            f"the {what} data must be plain text or conversations; it has {len(texts)} texts beside conversations; name them as two sources"
        )
    if len(texts) < len(documents):
        rows, size = _conversations(
            tokenizer,
            [document for document in documents if not isinstance(document, str)],
            length,
            what,
            assistant_only,
        )
    else:
        tokens = tokenize(tokenizer, texts)
        rows, size = TokenRows.of(cut_sequences(tokens, length, begin_tokens(tokenizer))), len(tokens)
    if len(rows) < minimum:
        raise too_few(what, minimum, length, len(rows), size)
    return rows


def too_few(what: str, minimum: int, length: int, count: int, tokens: int | None = None) -> DataError:
    """The error of a text that is too short."""
    has = f"{count} sequences" if tokens is None else f"{tokens} tokens = {count} sequences"
    return DataError(
        f"the {what} text must give at least {minimum} sequences of {length} tokens; it has {has}; use more text or a smaller --seq_len"
    )


def _conversations(
    tokenizer: Any, conversations: Sequence[list[chat.Message]], length: int, what: str, assistant_only: bool
) -> tuple[TokenRows, int]:
    """Rows, and tokens in all."""
    encoded = [chat.encode_conversation(tokenizer, messages, assistant_only) for messages in conversations]
    long = sum(len(ids) > length for ids, _ in encoded)
    if long == len(encoded):
        shortest = min(len(ids) for ids, _ in encoded)
        raise DataError(
            f"at least one conversation of the {what} data must fit into {length} tokens; the shortest has {shortest}; use a larger --seq_len"
        )
    if long:
        log.warning(
            "%s: %d of %d conversations are longer than %d tokens and were left out", what, long, len(encoded), length
        )
    rows = TokenRows(*chat.pack_conversations(encoded, length))
    if not rows.loss_mask.any():
        raise DataError(
            f"the {what} data must have assistant tokens to learn from; the {len(encoded) - long} conversations that fit have none; use --loss_on all"
        )
    return rows[rows.loss_mask.any(1)], sum(len(ids) for ids, _ in encoded)


def token_fingerprint(input_ids: Tensor, identity: str) -> str:
    """Short hash of what the states depend on: the tokens and the model."""
    return hashlib.sha256(input_ids.numpy().tobytes() + identity.encode()).hexdigest()[:16]
