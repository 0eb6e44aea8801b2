"""Conversations: each assistant turn is learnt as it stands, and templates that go wrong are named in one line."""

import signal
import time
from typing import Any

import pytest

from nybble.data import chat
from nybble.data.chat import Conversation
from nybble.data.packing import pack_documents
from nybble.errors import DataError
from tests.helpers.cases import fast_cases
from tests.helpers.chat import CONVERSATION, TEMPLATE, make_chat_tokenizer

# As Qwen3: a turn after the last question of the user has a block of reasoning, which is empty where the message has
# none; earlier turns lose theirs.
THINKING = """
{%- set ns = namespace(last=-1) -%}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor -%}
{%- for m in messages -%}
    {%- set content = m.content or '' -%}
    {%- set thought = m.reasoning_content or '' -%}
    {%- if '</think>' in content -%}
        {%- set thought = content.split('</think>')[0].split('<think>')[-1] -%}
        {%- set content = content.split('</think>')[-1] -%}
    {%- endif -%}
    {{- '<' + m.role + '>' -}}
    {%- if m.role == 'assistant' and loop.index0 > ns.last and (loop.last or thought) -%}
        {{- '<think>' + thought + '</think>' -}}
    {%- endif -%}
    {{- content -}}
    {%- for call in m.tool_calls or [] %}{{ '<call>' + call + '</call>' }}{% endfor -%}
    {{- '<end>' -}}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<assistant>' }}{% endif -%}
"""
# As QwQ and DeepSeek-R1: the model is made to think, and what it thought is not kept.
OPENED_THOUGHT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content.split('</think>')[-1] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant><think>{% endif %}"
)
NO_GENERATION_PROMPT = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}<end>{% endfor %}"
LAST_MARKED = "{% for m in messages %}{% if loop.last %}[last]{% endif %}{{ m.content }}{% endfor %}"
# As Phi-3: the end of the text follows the end of the last turn.
END_AT_THE_END = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>\n{% endfor %}</s>"
SPACE_BEFORE = "{% for m in messages %}[{{ m.role[0] }}] {{ m.content }}</s>{% endfor %}"
TWICE = TEMPLATE.replace("{{ m.content }}", "{{ m.content }}|{{ m.content }}")


def turn(text: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


THOUGHTS = [
    user("hi"), turn("<think>hm</think>yes"), user("ok"), turn("<think>ah</think>no"),
]  # fmt: skip
TOOLS = [
    user("hi"), turn("wait", tool_calls=["f"]), {"role": "tool", "content": "3"}, turn("it is 3"),
    user("thx"), turn("bye"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("template", "conversation", "expected"),
    [
        (TEMPLATE, CONVERSATION, "yes</s>a</s>"),
        (THINKING, CONVERSATION[:2], "yes<end>"),
        (THINKING, CONVERSATION, "yes<end>a<end>"),
        (THINKING, CONVERSATION[:3], "yes<end>"),
        (THINKING, THOUGHTS, "yes<end><think>ah</think>no<end>"),
        (THINKING, [user("hi"), turn("yes", reasoning_content="hm")], "<think>hm</think>yes<end>"),
        (THINKING, TOOLS, "wait<call>f</call><end>it is 3<end>bye<end>"),
        (THINKING, TOOLS[:4], "wait<call>f</call><end>it is 3<end>"),
        (THINKING, TOOLS[:2], "wait<call>f</call><end>"),
        (THINKING, [user("hi"), turn(None, tool_calls=["f"]), user("ok"), turn("a")], "<call>f</call><end>a<end>"),
        (THINKING, [user("hi"), turn(""), user("ok"), turn("")], "<end><end>"),
        (THINKING, [user("a"), turn("a"), user("a"), turn("a")], "a<end>a<end>"),
        (OPENED_THOUGHT, CONVERSATION, "yes<end>a<end>"),
        (OPENED_THOUGHT, THOUGHTS, "yes<end>no<end>"),
        (NO_GENERATION_PROMPT, [user("hi"), turn(" yes \n"), user("ok"), turn("a")], "yes<end>a<end>"),
        (LAST_MARKED, CONVERSATION, "yesa"),
        (END_AT_THE_END, CONVERSATION, "yes<end>\na<end>\n</s>"),
        (SPACE_BEFORE, CONVERSATION, " yes</s> a</s>"),
        (TWICE, CONVERSATION, "yes|yes</s>a|a</s>"),
    ],
)
def test_labels_are_the_turns_as_they_stand(template: str, conversation: list[Any], expected: str) -> None:
    tokenizer = make_chat_tokenizer(template)
    tokenizer.add_tokens(["<user>", "<end>"], special_tokens=True)
    encoded = chat.encode_conversation(tokenizer, conversation, assistant_only=True)
    labels = [i for i, is_label in zip(encoded.ids, encoded.label_mask, strict=True) if is_label]
    assert tokenizer.decode(labels) == expected
    assert tokenizer.decode(encoded.ids) == tokenizer.apply_chat_template(conversation, tokenize=False)


def test_turns_that_cannot_be_found_are_refused() -> None:
    tokenizer = make_chat_tokenizer("{% for m in messages %}{% if loop.last %}{{ m.content }}{% endif %}{% endfor %}")
    with pytest.raises(DataError, match="needs a chat template that shows every assistant message; .*; leave out"):
        chat.encode_conversation(tokenizer, CONVERSATION, assistant_only=True)


@pytest.mark.parametrize("assistant_only", [False, True])
@pytest.mark.parametrize("template", ["{{ '' }}", "{% for m in messages %}{{ m.content }}{% endfor %}"])
def test_a_conversation_that_renders_to_nothing_is_refused(template: str, assistant_only: bool) -> None:
    message = (
        "the chat template must render every conversation to text; it renders one with the roles user assistant to"
    )
    with pytest.raises(DataError, match=message):
        pack_documents(
            make_chat_tokenizer(template),
            [Conversation([user(""), turn("")])],
            16,
            "training",
            assistant_only=assistant_only,
        )


def test_conversations_of_a_single_token_are_refused() -> None:
    with pytest.raises(DataError, match="the training data must have conversations with something to learn"):
        pack_documents(make_chat_tokenizer("x"), [Conversation(CONVERSATION)], 16, "training")


ENDLESS = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
    "{% set ns = namespace(n=0) %}{% for i in range(99999) %}{% for j in range(99999) %}{% set ns.n = i * j %}"
    "{% endfor %}{% endfor %}",
    "{% set s = 'x' * 9999 %}{% for a in s %}{% for b in s %}{% for c in s %}{% endfor %}{% endfor %}{% endfor %}",
    "{{ 10 ** (10 ** 9) }}",
    "{{ messages | length ** (10 ** 9) }}",
]


@pytest.mark.parametrize("template", fast_cases(ENDLESS, [ENDLESS[1], ENDLESS[4]]))
def test_a_template_that_does_not_end_is_stopped(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nybble.data.rendering.MAX_SECONDS", 0.3)
    started, handler = time.perf_counter(), signal.getsignal(signal.SIGALRM)
    message = "the chat template must end; with the roles user assistant user assistant it has not after 0.3 seconds"
    with pytest.raises(DataError, match=message):
        chat.encode_conversation(make_chat_tokenizer(template), CONVERSATION, assistant_only=False)
    assert time.perf_counter() - started < 5
    assert signal.getsignal(signal.SIGALRM) is handler
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for i in range(10**12) %}x{% endfor %}", "it rejects one with the roles .*: Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "it rejects one with the roles .*recursion"),
        ("{{ 'x' * 10**7 }}", "it gives 10000000 characters for a conversation of "),
        ("{% for m in messages %}", "it rejects one with the roles"),
        ("{{ messages[9].content.x }}", "it rejects one with the roles"),
    ],
)
def test_templates_that_fail_are_named_in_one_line(template: str, reason: str) -> None:
    with pytest.raises(DataError, match=f"the chat template must .*{reason}") as error:
        chat.encode_conversation(make_chat_tokenizer(template), CONVERSATION, assistant_only=False)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_a_long_conversation_is_no_fault_of_the_template() -> None:
    conversation = [user("x" * 3_000_000), turn("y")]
    assert len(chat.encode_conversation(make_chat_tokenizer(), conversation, assistant_only=False).ids) > 3_000_000
