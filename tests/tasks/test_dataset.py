"""Questions and datasets as plain values."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble.tasks.dataset import Question, TaskDataset


def test_question_with_completion_has_one_choice() -> None:
    question = Question.with_completion("ask", " yes")
    assert (question.prompts, question.choices, question.label) == (("ask",), (" yes",), 0)
    assert not question.has_alternatives
    assert Question.with_completion("ask", "").choice_lengths == (1,)


@pytest.mark.parametrize(
    ("prompts", "choices", "label", "lengths"),
    [
        ((), (), 0, ()),
        (("a",), ("b", "c"), 0, (1, 1)),
        (("a", "a"), ("b", "c"), 0, (1,)),
        (("a", "a"), ("b", "c"), 2, (1, 1)),
        (("a", "a"), ("b", "c"), -1, (1, 1)),
    ],
)
def test_inconsistent_question_is_refused(
    prompts: tuple[str, ...], choices: tuple[str, ...], label: int, lengths: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match="must"):
        Question(prompts, choices, label, lengths)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 200), min_size=2, max_size=6))
def test_score_factors_are_relative_to_the_mean_length(lengths: list[int]) -> None:
    question = Question(("ask",) * len(lengths), ("x",) * len(lengths), 0, tuple(lengths))
    assert question.score_factors(False) == [1.0] * len(lengths)
    factors = question.score_factors(True)
    # Scaling log p by these factors orders the choices as log p per character does.
    per_character = [factor * length for factor, length in zip(factors, lengths, strict=True)]
    assert per_character == pytest.approx([sum(lengths) / len(lengths) / 4] * len(lengths))


def test_only_acc_norm_is_length_normalized() -> None:
    question = Question.with_completion("a", "b")
    assert TaskDataset("t", "acc_norm", [question], [question]).length_normalized
    assert not TaskDataset("t", "acc", [question], [question]).length_normalized
