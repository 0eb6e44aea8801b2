"""Documents to token sequences of equal length.

Plain texts are tokenized, joined by the end-of-sequence token, and cut without overlap. Every sequence starts with the
begin-of-text token if the tokenizer puts one before a text. The incomplete rest at the end is dropped.

Conversations stay whole: they are packed one after the other into rows. The free end of a row is filled with the
beginning of the next row, so that calibration sees text only; the loss mask is False there.

Dimensions: N tokens, S sequences, T tokens per sequence.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nybble.data.boundaries import added_tokens
from nybble.data.chat import Conversation, EncodedConversation, encode_conversation, shows_tools
from nybble.data.splits import Document
from nybble.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger("nybble")

# Characters that are tokenized at a time. Tokenizers need some 200 bytes of memory for each.
PIECE_SIZE = 1 << 20
# Characters before and after a cut that are tokenized with and without the cut.
_CUT_CONTEXT = 100
# Positions that are tried for a cut before the piece grows.
_CUT_TRIES = 1000


@dataclass(frozen=True)
class TokenRows:
    """Token sequences.

    Attributes:
        ids: [S, T], int64.
        loss_mask: [S, T], bool: whether the prediction made at a position, of the token after it, is trained and
            measured.
    """

    ids: Tensor
    loss_mask: Tensor

    @staticmethod
    def of(ids: Tensor) -> TokenRows:
        """Sequences of plain text: the loss mask is True everywhere."""
        return TokenRows(ids, torch.ones_like(ids, dtype=torch.bool))

    @staticmethod
    def cat(parts: Sequence[TokenRows]) -> TokenRows:
        """All sequences of several parts with the same T."""
        return TokenRows(torch.cat([part.ids for part in parts]), torch.cat([part.loss_mask for part in parts]))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: slice | Tensor) -> TokenRows:
        return TokenRows(self.ids[rows], self.loss_mask[rows])


def tokenize(tokenizer: PreTrainedTokenizerBase, documents: Sequence[str], piece_size: int = PIECE_SIZE) -> Tensor:
    """Tokenize texts and join them by the end-of-sequence token.

    Args:
        tokenizer: of the model.
        documents: the texts.
        piece_size: characters; a longer text is tokenized in pieces, with the same token ids.

    Returns: [N], int64.
    """

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False).input_ids  # type: ignore[no-any-return]

    parts = []
    for i, document in enumerate(documents):
        if i and tokenizer.eos_token_id is not None:
            parts.append(torch.tensor([tokenizer.eos_token_id]))
        parts += [torch.tensor(encode(piece), dtype=torch.int64) for piece in _pieces(encode, document, piece_size)]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)


def _pieces(encode: Callable[[str], list[int]], text: str, size: int) -> Iterator[str]:
    """Cut a text into pieces whose token ids, put together, are those of the whole text.

    A cut is accepted if the text around it gives the same ids with and without the cut. A space after the cut is
    dropped where the tokenizer puts one before every text. If 1000 positions in a row fail, the piece doubles.
    """
    start = 0
    while len(text) - start > size:
        last = start + size
        for cut in range(last, max(start + _CUT_CONTEXT, last - _CUT_TRIES), -1):
            before, after = text[cut - _CUT_CONTEXT : cut], text[cut : cut + _CUT_CONTEXT]
            whole, left = encode(before + after), encode(before)
            spaces = (0, 1) if after.startswith(" ") else (0,)
            dropped = next((n for n in spaces if whole == left + encode(after[n:])), None)
            if dropped is not None:
                yield text[start:cut]
                start = cut + dropped
                break
        else:
            size *= 2
    yield text[start:]


def begin_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The begin-of-text token that the tokenizer puts before a text: [bos] for Gemma and Llama 3, [] for Qwen."""
    return [i for i in added_tokens(tokenizer).before if i == tokenizer.bos_token_id]


def end_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token that ends a text: [eos], or [] if the tokenizer has none."""
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def cut_sequences(tokens_N: Tensor, length: int, begin: Sequence[int] = ()) -> Tensor:
    """Cut tokens into sequences without overlap. The incomplete rest is dropped.

    Args:
        tokens_N: token ids, int64.
        length: tokens per sequence, more than len(begin).
        begin: tokens at the start of every sequence.

    Returns: [S, length], int64, with S = N // (length - len(begin)).
    """
    body = length - len(begin)
    rows = tokens_N[: len(tokens_N) // body * body].view(-1, body)
    return torch.cat([torch.tensor(list(begin), dtype=torch.int64).expand(len(rows), -1), rows], dim=1)


def pack_conversations(conversations: Sequence[EncodedConversation], length: int) -> TokenRows:
    """Pack encoded conversations, in their order, into rows of `length` tokens. Longer conversations are left out.

    Returns: rows [S, length]. loss_mask[s, t] is True if token t + 1 is a label of a conversation packed into row s.
    """
    rows: list[EncodedConversation] = []
    for conversation in conversations:
        if len(conversation.ids) > length:
            continue
        if not rows or len(rows[-1].ids) + len(conversation.ids) > length:
            rows.append(EncodedConversation([], []))
        rows[-1].ids.extend(conversation.ids)
        rows[-1].label_mask.extend(conversation.label_mask)
    ids_ST = torch.empty(len(rows), length, dtype=torch.int64)
    loss_mask_ST = torch.zeros(len(rows), length, dtype=torch.bool)
    for i, row in enumerate(rows):
        filling = itertools.cycle([*rows[(i + 1) % len(rows)].ids, *row.ids])
        ids_ST[i] = torch.tensor([*row.ids, *itertools.islice(filling, length - len(row.ids))])
        loss_mask_ST[i, : len(row.ids) - 1] = torch.tensor(row.label_mask[1:], dtype=torch.bool)
    return TokenRows(ids_ST, loss_mask_ST)


def pack_documents(
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Document],
    length: int,
    split: str,
    minimum: int = 1,
    assistant_only: bool = False,
) -> TokenRows:
    """Tokenize and pack the documents of one source: either plain texts or conversations.

    Args:
        tokenizer: of the model.
        documents: the documents.
        length: tokens per sequence.
        split: what the sequences are for, for error messages ("training").
        minimum: fewest sequences.
        assistant_only: the loss mask of conversations holds assistant messages only. Plain text is trained whole.

    Raises:
        DataError: texts and conversations are mixed; there are fewer than `minimum` sequences; no conversation fits
            into `length` tokens or has assistant tokens; what `chat.encode_conversation` raises.
    """
    texts = [document for document in documents if isinstance(document, str)]
    conversations = [document for document in documents if not isinstance(document, str)]
    if texts and conversations:
        raise DataError(
            f"the {split} data must be either plain text or conversations; it has {len(texts)} texts and "
            f"{len(conversations)} conversations; put them into two files and name both"
        )
    if conversations:
        rows, count = _pack_chat(tokenizer, conversations, length, split, assistant_only)
    else:
        tokens_N = tokenize(tokenizer, texts)
        rows, count = TokenRows.of(cut_sequences(tokens_N, length, begin_tokens(tokenizer))), len(tokens_N)
    if len(rows) < minimum:
        raise too_few_sequences(split, minimum, length, f"{count} tokens = {len(rows)} sequences")
    return rows


def too_few_sequences(split: str, minimum: int, length: int, got: str) -> DataError:
    """The error for a text that is too short."""
    return DataError(
        f"the {split} text must give at least {minimum} sequences of {length} tokens; it gives {got}; "
        "use more text or a smaller --seq_len"
    )


def _pack_chat(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Conversation],
    length: int,
    split: str,
    assistant_only: bool,
) -> tuple[TokenRows, int]:
    """Rows that have something to learn, and the number of tokens of all conversations."""
    encoded = [encode_conversation(tokenizer, c.messages, assistant_only, c.tools) for c in conversations]
    with_tools = next((conversation for conversation in conversations if conversation.tools), None)
    if with_tools is not None and not shows_tools(tokenizer, with_tools):
        log.warning("%s data: the chat template of this model does not show the tools of conversations", split)
    sizes = [len(conversation.ids) for conversation in encoded]
    too_long = sum(size > length for size in sizes)
    if too_long == len(encoded):
        raise DataError(
            f"at least one conversation of the {split} data must fit into {length} tokens; the shortest has "
            f"{min(sizes)}; use a larger --seq_len"
        )
    if too_long:
        log.warning(
            "%s data: left out %d of %d conversations, which are longer than %d tokens",
            split, too_long, len(encoded), length,
        )  # fmt: skip
    rows = pack_conversations(encoded, length)
    if not rows.loss_mask.any() and not assistant_only:
        raise DataError(
            f"the {split} data must have conversations with something to learn; those that fit have one token each; "
            "use longer conversations, or the template that belongs to the model"
        )
    if not rows.loss_mask.any():
        raise DataError(
            f"the {split} data must have assistant messages after others; the {len(encoded) - too_long} conversations "
            "that fit have none; leave out --assistant_only_loss"
        )
    return rows[rows.loss_mask.any(1)], sum(sizes)


def token_fingerprint(ids: Tensor, identity: str) -> str:
    """Short hash of token ids and of whatever else a cached result depends on.

    Args:
        ids: on the CPU.
        identity: for example the name and weights of the model; "" for the tokens alone.
    """
    return hashlib.sha256(ids.numpy().tobytes() + identity.encode()).hexdigest()[:16]
