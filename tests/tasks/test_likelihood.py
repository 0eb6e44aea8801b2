"""Log-likelihoods of choices: equal to those of whole texts, though the shared prefix is computed once."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble.models.head import LMHead
from nybble.tasks import encoding, likelihood
from nybble.tasks.dataset import Question
from nybble.tasks.encoding import EncodedAnswer
from tests.helpers.cases import fast_cases
from tests.helpers.causal_types import tiny_model
from tests.helpers.questions import MIXED_QUESTIONS, PARTIAL_PROMPTS, choice_question
from tests.helpers.tiny import FAMILIES, FAST_FAMILIES, make_model, make_tokenizer

# Questions whose choices all have a prefix in common.
SHARED_QUESTIONS = (*MIXED_QUESTIONS[:2], PARTIAL_PROMPTS)
SLIDING = [family for family, (_, options) in FAMILIES.items() if "sliding_window" in options]


def make_windowed_model(family: str) -> Any:
    """A model whose attention window, where it has one, is longer than the texts of these tests."""
    return make_model(family, **({"sliding_window": 64} if family in SLIDING else {}))


def whole_text_losses(model: Any, texts: Sequence[EncodedAnswer]) -> torch.Tensor:
    """-log p of each answer in float64, one whole text at a time: the slow reference."""
    losses = []
    for text in texts:
        log_q = model(torch.tensor([text.ids])).logits[0].double().log_softmax(-1)
        losses.append(-sum(log_q[t - 1, text.ids[t]] for t in range(text.prompt_length, len(text.ids))))
    return torch.stack(losses)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", fast_cases(FAMILIES, [*FAST_FAMILIES, "llama"]))
def test_losses_equal_those_of_whole_texts(family: str) -> None:
    model, tokenizer = make_windowed_model(family), make_tokenizer(begin=True)
    questions = encoding.encode_choices(tokenizer, [*MIXED_QUESTIONS, Question.with_completion("own", " words")], 64)
    head = LMHead.of(model)
    prefixes = likelihood.prefix_lengths(model, head, questions)
    assert prefixes[2] == 1, "the begin-of-text token"
    assert prefixes[4] == 0, "a single choice"
    assert min(prefixes[0], prefixes[1], prefixes[3]) > 3
    losses = likelihood.answer_losses(model, head, questions, prefixes)
    expected = whole_text_losses(model, [text for choices in questions for text in choices])
    torch.testing.assert_close(losses.double(), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("family", fast_cases(FAMILIES, [*FAST_FAMILIES, "llama"]))
def test_gradients_pass_through_the_shared_prefix(family: str) -> None:
    model, tokenizer = make_windowed_model(family), make_tokenizer(begin=True)
    questions = encoding.encode_choices(tokenizer, SHARED_QUESTIONS, 64)
    head, label = LMHead.of(model), torch.tensor([question.label for question in SHARED_QUESTIONS])
    weight = next(m for m in model.modules() if type(m) is torch.nn.Linear).weight.requires_grad_()
    shared = likelihood.choice_log_probs(model, head, questions)
    losses = likelihood.answer_losses(model, head, questions, [0] * len(questions))
    whole = torch.nn.utils.rnn.pad_sequence(
        [-part for part in losses.split([len(choices) for choices in questions])], True, -math.inf
    )
    torch.testing.assert_close(shared, whole, rtol=1e-4, atol=1e-4)
    grad, expected = (torch.autograd.grad(F.cross_entropy(scores, label), weight)[0] for scores in (shared, whole))
    torch.testing.assert_close(grad, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    assert float(expected.abs().max()) > 0


def test_missing_choices_have_probability_zero() -> None:
    model, tokenizer = make_model("llama"), make_tokenizer()
    questions = encoding.encode_choices(tokenizer, SHARED_QUESTIONS, 64)
    log_probs = likelihood.choice_log_probs(model, LMHead.of(model), questions)
    assert log_probs.shape == (3, 3)
    assert log_probs.isinf().tolist() == [[False, False, True], [False] * 3, [False, False, True]]


def test_prefixes_need_a_head_and_a_window_as_long_as_the_texts() -> None:
    questions = encoding.encode_choices(make_tokenizer(), [choice_question("0123456789", "a", "b")], 64)
    for window, expected in ((12, [9]), (11, [0])):  # the texts have 12 tokens
        model = make_model("mistral", sliding_window=window)
        assert likelihood.prefix_lengths(model, LMHead.of(model), questions) == expected
        assert likelihood.prefix_lengths(model, None, questions) == [0]


@pytest.mark.parametrize("model_type", ["roberta", "openai-gpt", "megatron-bert", "reformer", "mamba2", "gpt2"])
def test_prefixes_are_shared_only_where_the_result_is_the_same(model_type: str) -> None:
    """RoBERTa has positions of its own, OpenAI GPT and Reformer have no such cache, BERT has one of another kind."""
    model = tiny_model(model_type)
    head, questions = LMHead.of(model), encoding.encode_choices(make_tokenizer(), SHARED_QUESTIONS, 64)
    prefixes = likelihood.prefix_lengths(model, head, questions)
    assert any(prefixes) == (model_type == "gpt2")
    with torch.no_grad():
        losses = likelihood.answer_losses(model, head, questions, prefixes)
    expected = whole_text_losses(model, [text for choices in questions for text in choices])
    torch.testing.assert_close(losses.double(), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("family", SLIDING)
def test_short_prefix_in_a_batch_with_a_long_one_stays_in_the_window(family: str) -> None:
    model, tokenizer = make_model(family, sliding_window=64), make_tokenizer(begin=True)
    asked = [choice_question("p" * 56, "a", "b"), choice_question("q" * 3, "x" * 55, "y" * 50)]
    questions = encoding.encode_choices(tokenizer, asked, 512)
    prefixes = likelihood.prefix_lengths(model, LMHead.of(model), questions)
    assert prefixes == [56, 3]
    losses = likelihood.answer_losses(model, LMHead.of(model), questions, prefixes)
    expected = whole_text_losses(model, [text for choices in questions for text in choices])
    torch.testing.assert_close(losses.double(), expected, rtol=1e-4, atol=1e-3)


def test_prefixes_save_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = make_model("smollm"), make_tokenizer()
    asked = [choice_question(f"a question of {'very ' * i}like length:", "yes", "no", "it depends") for i in range(3)]
    questions = encoding.encode_choices(tokenizer, asked, 64)
    head = LMHead.of(model)
    likelihood.prefix_lengths(model, head, questions)  # tries the model once
    forward, counts = model.base_model.forward, []

    def count(*args: Any, **kwargs: Any) -> Any:
        counts.append(kwargs["input_ids"].numel())
        return forward(*args, **kwargs)

    monkeypatch.setattr(model.base_model, "forward", count)
    likelihood.choice_log_probs(model, head, questions)
    assert sum(counts) < 0.6 * sum(len(text.ids) for choices in questions for text in choices)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 20), st.lists(st.integers(1, 20), min_size=1, max_size=4)), max_size=12),
    st.integers(1, 200),
)
def test_groups_cover_all_questions_within_the_token_limit(rows: list[tuple[int, list[int]]], limit: int) -> None:
    questions = [[EncodedAnswer([0] * (prefix + end), 0) for end in ends] for prefix, ends in rows]
    prefixes = [prefix for prefix, _ in rows]
    groups = list(likelihood.group_questions(questions, prefixes, limit))
    assert sorted(i for group in groups for i in group) == list(range(len(rows)))
    for group in groups:
        ends = [end for i in group for end in rows[i][1]]
        tokens = len(group) * max(prefixes[i] for i in group) + len(ends) * max(ends)
        assert tokens <= limit or len(group) == 1
