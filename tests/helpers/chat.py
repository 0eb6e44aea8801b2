"""A small chat template and a conversation."""

from typing import Any

from tests.helpers.tiny import make_tokenizer

# [u]...</s>[a]...</s>: the first letter of the role, the content, an end token. The generation prompt is "[a]".
TEMPLATE = (
    "{% for m in messages %}[{{ m.role[0] }}]{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[a]{% endif %}"
)
CONVERSATION = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "ok"},
    {"role": "assistant", "content": "a"},
]


def make_chat_tokenizer(template: str | None = TEMPLATE) -> Any:
    """The byte-level tokenizer of the tiny models, with a chat template."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return tokenizer
