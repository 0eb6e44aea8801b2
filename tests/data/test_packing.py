"""nybble.data.packing: tokens are neither lost nor changed, and the loss mask says what is trained."""

import argparse
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from nybble.data import packing
from nybble.data.chat import Conversation, EncodedConversation
from nybble.data.packing import TokenRows
from nybble.errors import DataError
from tests.helpers.chat import CONVERSATION, TEMPLATE, make_chat_tokenizer
from tests.helpers.tiny import make_tokenizer

CHAT, QUESTION = Conversation(CONVERSATION), Conversation(CONVERSATION[:1])

SOURCE_CODE = Path(argparse.__file__).read_text()[:40_000]
KINDS = ["split into bytes", "marked words", "marked text", "not split"]


@cache
def trained_tokenizer(kind: str) -> Any:
    """A BPE tokenizer of one of the kinds that models come with.

    Text is split by a pattern into bytes (GPT-2, Llama 3, Qwen), split into words with a mark in front (T5), not split
    but with a mark in front of the whole text (Llama 2, Mistral), or not split at all (Gemma).
    """
    tokenizer, lines = Tokenizer(models.BPE(unk_token="<unk>")), SOURCE_CODE
    if kind == "split into bytes":
        pattern = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
        split = pre_tokenizers.Split(pattern, "isolated")
        as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, as_bytes])
    elif kind == "marked words":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    else:
        spaces = normalizers.Replace(" ", "▁")
        marked = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
        tokenizer.normalizer = marked if kind == "marked text" else spaces
        lines = SOURCE_CODE.replace(" ", " \n")  # as SentencePiece trains: no token goes beyond a space
    tokenizer.train_from_iterator(
        lines.splitlines(keepends=kind == "split into bytes"),
        trainers.BpeTrainer(vocab_size=600, special_tokens=["<unk>"], show_progress=False),
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_pieces_give_the_ids_of_the_whole_text(kind: str, data: st.DataObject) -> None:
    start, length = data.draw(st.integers(0, 30_000)), data.draw(st.integers(0, 8_000))
    size = data.draw(st.integers(250, 3_000))
    text, tokenizer = SOURCE_CODE[start : start + length], trained_tokenizer(kind)
    whole = tokenizer(text, add_special_tokens=False).input_ids
    assert packing.tokenize(tokenizer, [text], piece_size=size).tolist() == whole


@pytest.mark.parametrize("kind", KINDS)
def test_no_piece_is_larger_than_its_size(kind: str) -> None:
    tokenizer, sizes = trained_tokenizer(kind), []

    def spy(text: str, **options: Any) -> Any:
        sizes.append(len(text))
        return tokenizer(text, **options)

    spy.eos_token_id = None  # type: ignore[attr-defined]
    assert len(packing.tokenize(spy, [SOURCE_CODE], piece_size=4000)) > 5000
    assert max(sizes) <= 4000


def test_a_text_that_cannot_be_cut_is_tokenized_whole() -> None:
    def length_tokenizer(text: str, **options: Any) -> Any:
        """The only token is the length of the text, so that no two parts give what the whole gives."""
        return SimpleNamespace(input_ids=[len(text)])

    length_tokenizer.eos_token_id = None  # type: ignore[attr-defined]
    assert packing.tokenize(length_tokenizer, ["a b " * 1000], piece_size=500).tolist() == [4000]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 200), st.integers(2, 20), st.booleans())
def test_cutting_loses_only_the_incomplete_rest(count: int, length: int, with_begin: bool) -> None:
    begin = [777] if with_begin else []
    rows_ST = packing.cut_sequences(torch.arange(count), length, begin)
    body = length - len(begin)
    assert rows_ST.shape == (count // body, length)
    assert rows_ST.dtype == torch.int64
    assert rows_ST[:, : len(begin)].flatten().tolist() == begin * len(rows_ST)
    assert rows_ST[:, len(begin) :].flatten().tolist() == list(range(count // body * body))


@pytest.mark.parametrize("begin", [True, False])
def test_texts_are_joined_by_the_end_token_and_rows_start_as_the_tokenizer_does(begin: bool) -> None:
    tokenizer = make_tokenizer(begin)
    a, b, c, d, e, f, g = tokenizer.convert_tokens_to_ids(list("abcdefg"))
    end = tokenizer.eos_token_id
    rows = packing.pack_documents(tokenizer, ["abc", "defg"], 4, "training")
    assert rows.ids.tolist() == ([[256, a, b, c], [256, end, d, e]] if begin else [[a, b, c, end], [d, e, f, g]])
    assert rows.loss_mask.all()


def test_a_tokenizer_without_an_end_token_joins_texts_directly() -> None:
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    assert packing.end_tokens(tokenizer) == []
    assert packing.tokenize(tokenizer, ["ab", "c"]).tolist() == tokenizer("abc").input_ids
    assert packing.end_tokens(make_tokenizer()) == [257]


def test_no_documents_give_no_tokens() -> None:
    tokens = packing.tokenize(make_tokenizer(), [])
    assert (len(tokens), tokens.dtype) == (0, torch.int64)


@st.composite
def conversations(draw: st.DrawFn) -> list[EncodedConversation]:
    """Conversations of distinct tokens."""
    sizes = draw(st.lists(st.integers(1, 12), max_size=12))
    result, first = [], 0
    for size in sizes:
        labels = draw(st.lists(st.booleans(), min_size=size, max_size=size))
        result.append(EncodedConversation(list(range(first, first + size)), labels))
        first += size
    return result


@settings(max_examples=60, deadline=None)
@given(conversations(), st.integers(2, 10))
def test_conversations_stay_whole_and_in_order(encoded: list[EncodedConversation], length: int) -> None:
    packed = packing.pack_conversations(encoded, length)
    fitting = [conversation for conversation in encoded if len(conversation.ids) <= length]
    pairs = [pair for item in fitting for pair in zip(item.ids, item.label_mask, strict=True)]
    labels = {i for i, is_label in pairs if is_label}
    row, position = -1, length
    trained = set()
    for conversation in fitting:
        if position + len(conversation.ids) > length:
            row, position = row + 1, 0
        end = position + len(conversation.ids)
        assert packed.ids[row, position:end].tolist() == conversation.ids
        # The first token of a row is predicted by nothing.
        trained |= {i for i in conversation.ids if position > 0 or i != conversation.ids[0]}
        position = end
    assert len(packed) == row + 1
    predicted = packed.ids[:, 1:][packed.loss_mask[:, :-1]].tolist()
    assert sorted(predicted) == sorted(trained & labels), "each label once: the filling counts nothing"
    assert not packed.loss_mask[:, -1].any()


def test_the_end_of_a_row_is_filled_with_the_next_row_and_then_with_itself() -> None:
    short = EncodedConversation([1, 2, 3], [False, True, True])
    packed = packing.pack_conversations([short, EncodedConversation([7, 8], [True, True])], 4)
    assert packed.ids.tolist() == [[1, 2, 3, 7], [7, 8, 1, 2]]
    assert packed.loss_mask.int().tolist() == [[1, 1, 0, 0], [1, 0, 0, 0]]
    alone = packing.pack_conversations([short], 8)
    assert alone.ids.tolist() == [[1, 2, 3, 1, 2, 3, 1, 2]]


def test_conversations_that_are_too_long_are_left_out_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer, long = make_chat_tokenizer(), Conversation([{"role": "user", "content": "x" * 100}])
    with caplog.at_level("WARNING", "nybble"):
        rows = packing.pack_documents(tokenizer, [long, CHAT], 40, "training")
    assert "training data: left out 1 of 2 conversations, which are longer than 40 tokens" in caplog.text
    assert tokenizer.decode(rows.ids[0]).startswith("[u]hi</s>")


def test_rows_without_labels_are_left_out() -> None:
    rows = packing.pack_documents(make_chat_tokenizer(), [QUESTION, CHAT], 24, "training", 1, True)
    assert len(rows) == 1
    assert rows.loss_mask.any()


def test_plain_text_is_trained_whole_with_assistant_only_loss() -> None:
    assert packing.pack_documents(make_chat_tokenizer(), ["plain text"], 4, "training", 1, True).loss_mask.all()


def test_too_little_text_is_reported_with_its_size() -> None:
    with pytest.raises(DataError) as error:
        packing.pack_documents(make_tokenizer(), ["a" * 100], 64, "training", minimum=8)
    assert str(error.value) == (
        "the training text must give at least 8 sequences of 64 tokens; it gives 100 tokens = 1 sequences; "
        "use more text or a smaller --seq_len"
    )


def test_texts_beside_conversations_are_refused() -> None:
    with pytest.raises(DataError, match="either plain text or conversations; it has 1 texts and 2 conversations"):
        packing.pack_documents(make_chat_tokenizer(), [CHAT, "text", CHAT], 64, "training")


TOOLS = [{"type": "function", "function": {"name": "t", "parameters": {}}}]


def test_tools_are_part_of_the_text_and_give_no_labels(caplog: pytest.LogCaptureFixture) -> None:
    shown = "{% if tools %}<{{ tools[0].function.name }}>{% endif %}" + TEMPLATE
    tokenizer, conversation = make_chat_tokenizer(shown), Conversation(CONVERSATION, TOOLS)
    rows = packing.pack_documents(tokenizer, [conversation], 40, "training", 1, True)
    text = tokenizer.decode(rows.ids[0])
    assert text.startswith("<t>[u]hi</s>[a]yes</s>")
    bare = packing.pack_documents(tokenizer, [CHAT], 40, "training", 1, True)
    assert not bare.loss_mask[:, -3:].any()
    assert torch.equal(rows.loss_mask[:, 3:], bare.loss_mask[:, :-3]), "the same labels, three tokens further"
    assert not caplog.text
    packing.pack_documents(make_chat_tokenizer(), [conversation], 40, "training")
    assert "training data: the chat template of this model does not show the tools of conversations" in caplog.text


def test_conversations_of_which_none_fits_are_refused() -> None:
    size = len("[u]hi</s>[a]yes</s>[u]ok</s>[a]a</s>") - 4 * (len("</s>") - 1)
    with pytest.raises(DataError, match=f"must fit into 8 tokens; the shortest has {size}; use a larger --seq_len"):
        packing.pack_documents(make_chat_tokenizer(), [CHAT], 8, "training")


def test_conversations_without_assistant_messages_are_refused_for_assistant_only_loss() -> None:
    with pytest.raises(DataError, match="must have assistant messages after others; the 1 conversations that fit"):
        packing.pack_documents(make_chat_tokenizer(), [QUESTION], 64, "training", assistant_only=True)


def test_rows_are_selected_and_joined_with_their_loss_mask() -> None:
    rows = TokenRows(torch.arange(6).view(3, 2), torch.tensor([[True, False], [False, False], [True, True]]))
    joined = TokenRows.cat([rows[1:], rows[torch.tensor([0])]])
    assert joined.ids.tolist() == [[2, 3], [4, 5], [0, 1]]
    assert joined.loss_mask.tolist() == [[False, False], [True, True], [True, False]]
    assert len(joined) == 3


def test_the_fingerprint_depends_on_tokens_and_identity() -> None:
    ids = torch.arange(8)
    prints = {packing.token_fingerprint(ids, "m"), packing.token_fingerprint(ids + 1, "m")}
    prints |= {packing.token_fingerprint(ids, "n"), packing.token_fingerprint(ids.clone(), "m")}
    assert len(prints) == 3
