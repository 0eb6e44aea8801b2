"""Conversations through a chat template: what counts, how rows are packed, and the words of every refusal."""

from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import processors

from nybble.data import chat, mixture, packing
from nybble.errors import DataError

from .tiny import make_tokenizer

TEMPLATE = "{% for m in messages %}[{{ m.role[0] }}]{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"
TALK = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "ok"},
    {"role": "assistant", "content": "a"},
]


def make_chat_tokenizer(template: str | None = TEMPLATE) -> Any:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def learnt_text(tokenizer: Any, ids: list[int], learnt: list[bool]) -> str:
    return str(tokenizer.decode([i for i, counts in zip(ids, learnt, strict=True) if counts]))


def test_only_the_assistants_words_and_ends_of_turn_are_learnt() -> None:
    tokenizer = make_chat_tokenizer()
    ids, learnt = chat.encode_conversation(tokenizer, TALK, assistant_only=True)
    assert tokenizer.decode(ids) == "[u]hi</s>[a]yes</s>[u]ok</s>[a]a</s>"
    assert learnt_text(tokenizer, ids, learnt) == "yes</s>a</s>"
    assert chat.encode_conversation(tokenizer, TALK, assistant_only=False) == (ids, [True] * len(ids))


def test_white_space_is_learnt_also_where_offsets_are_trimmed() -> None:
    tokenizer = make_chat_tokenizer()
    talk = [
        {"role": "user", "content": "go\n"},
        {"role": "assistant", "content": "if x:\n    y \n"},
        {"role": "user", "content": " ok"},
    ]
    for trim in (False, True):
        tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
        assert (
            learnt_text(tokenizer, *chat.encode_conversation(tokenizer, talk, assistant_only=True))
            == "if x:\n    y \n</s>"
        )


def test_a_first_turn_of_the_assistant_is_not_learnt() -> None:
    tokenizer = make_chat_tokenizer()
    ids, learnt = chat.encode_conversation(
        tokenizer, [{"role": "assistant", "content": "hello"}, *TALK], assistant_only=True
    )
    assert learnt_text(tokenizer, ids, learnt) == "yes</s>a</s>"


def test_rows_hold_whole_conversations_and_count_the_prediction_before_a_learnt_token() -> None:
    short = ([1, 2, 3], [False, True, True])
    ids, loss_mask = chat.pack_conversations([short, short, ([9] * 8, [True] * 8), short], 7)
    assert ids.tolist() == [
        [1, 2, 3, 1, 2, 3, 1],
        [1, 2, 3, 1, 2, 3, 1],
    ]  # the one of 8 tokens does not fit into 7; rows are filled with the next one's
    assert loss_mask.int().tolist() == [[1, 1, 0, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0, 0]]


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    changing = make_chat_tokenizer(
        "{% for m in messages %}{% if loop.last %}[last]{% endif %}{{ m.content }}{% endfor %}"
    )
    with pytest.raises(DataError, match="renders a turn differently.*use --loss_on all"):
        chat.encode_conversation(changing, TALK, assistant_only=True)
    assert changing.decode(chat.encode_conversation(changing, TALK, assistant_only=False)[0]) == "hiyesok[last]a"


def test_refusals() -> None:
    with pytest.raises(DataError, match="need a chat template, and this model's tokenizer has none"):
        chat.encode_conversation(make_chat_tokenizer(None), TALK, False)
    with pytest.raises(DataError, match="refuses a conversation of user assistant user assistant: no system"):
        chat.encode_conversation(make_chat_tokenizer("{{ raise_exception('no system') }}"), TALK, False)
    for wrong in ("text", [], [{"content": "x"}], [{"role": "user"}]):
        with pytest.raises(DataError, match="row 3 must be a list of messages"):
            chat.check_messages(wrong, "row 3")
    with pytest.raises(DataError, match=r"must fit into 8 tokens; the shortest has 2\d"):
        packing.pack_documents(make_chat_tokenizer(), [TALK], 8, "training")
    with pytest.raises(
        DataError, match="must have assistant tokens to learn from; the 1 conversations that fit have none"
    ):
        packing.pack_documents(make_chat_tokenizer(), [TALK[:1]], 64, "training", assistant_only=True)
    with pytest.raises(
        DataError, match="--loss_on assistant needs conversations .*; a and b are plain text; use --loss_on all"
    ):
        mixture.check_conversations({"a": ["plain text"], "b": ["more"]})
    mixture.check_conversations({"a": ["plain text"], "b": [TALK]})
    assert bool(
        packing.pack_documents(
            make_chat_tokenizer(), ["plain text"], 4, "training", assistant_only=True
        ).loss_mask.all()
    )


@pytest.mark.parametrize("content", [[{"type": "text", "text": "hi"}], 3])
def test_content_must_be_text(content: Any) -> None:
    with pytest.raises(DataError, match="chats.jsonl: row 2 must have text as the content of its messages"):
        chat.check_messages([TALK[0], {"role": "assistant", "content": content}], "chats.jsonl: row 2")
    assert chat.check_messages([TALK[0], {"role": "assistant", "content": None}], "") != TALK, (
        "a call of a tool says nothing"
    )


def test_a_tokenizer_that_knows_no_places_is_refused() -> None:
    tokenizer = SimpleNamespace(
        is_fast=False, chat_template=TEMPLATE, apply_chat_template=make_chat_tokenizer().apply_chat_template
    )
    with pytest.raises(DataError, match="needs a fast tokenizer.*use --loss_on all"):
        chat.encode_conversation(tokenizer, TALK, assistant_only=True)
