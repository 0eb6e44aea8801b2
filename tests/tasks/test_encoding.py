"""Questions to tokens, prefixes, padded batches and their losses."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble.errors import DataError
from nybble.models.head import LMHead
from nybble.tasks import encoding
from nybble.tasks.dataset import Question
from nybble.tasks.encoding import EncodedAnswer
from tests.helpers.questions import MIXED_QUESTIONS, ExportedModel, choice_question
from tests.helpers.tiny import make_model, make_tokenizer

PAIRS = (("a b", " c"), ("a b ", "c"), ("a b\n", " c d"), ("", "cd"))


@pytest.mark.parametrize("begin", [False, True])
@pytest.mark.parametrize(("prompt", "answer"), PAIRS)
def test_prompt_and_answer_are_one_text(prompt: str, answer: str, begin: bool) -> None:
    """One token a byte, so the places of all tokens are known."""
    text = encoding.encode_answer(make_tokenizer(begin), prompt, answer)
    tokenizer = make_tokenizer()
    assert tokenizer.decode(text.ids[begin:]) == prompt + answer
    assert text.ids[:begin] == [256][:begin]
    assert text.prompt_length == begin + len(prompt.rstrip()), "spaces at the prompt's end belong to the answer"
    assert text.first_target == max(1, text.prompt_length)
    assert text.num_targets == len(text.ids) - text.first_target


@pytest.mark.slow  # importing lm-eval takes seconds
@pytest.mark.parametrize("begin", [False, True])
def test_answers_are_encoded_as_lm_eval_does(begin: bool) -> None:
    from lm_eval.models.huggingface import HFLM

    tokenizer = make_tokenizer(begin)
    reference = HFLM(pretrained=make_model("smollm"), tokenizer=tokenizer)
    for prompt, answer in PAIRS[:3]:
        ids, prompt_length = encoding.encode_answer(tokenizer, prompt, answer)
        assert (ids[:prompt_length], ids[prompt_length:]) == tuple(reference._encode_pair(prompt, answer))


def test_completions_are_followed_by_the_end_of_text() -> None:
    tokenizer = make_tokenizer()
    completion, choice = encoding.encode_right_answers(
        tokenizer, [Question.with_completion("ask", " yes"), choice_question("ask", "no", "yes", label=1)], 64
    )
    assert choice == encoding.encode_answer(tokenizer, "ask", " yes")
    assert completion.ids == [*choice.ids, tokenizer.eos_token_id]


def test_right_answers_are_truncated_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = make_tokenizer()
    questions = [Question.with_completion(*pair) for pair in (("ask", " yes"), ("ask", " " + "x" * 90), ("q" * 8, "y"))]
    texts = encoding.encode_right_answers(tokenizer, questions, 8)  # the first one with its end
    assert [(len(text.ids), text.prompt_length) for text in texts] == [(8, 3), (8, 3)]
    assert "left out 1 of 3 rows, which have no answer within 8 tokens" in caplog.text
    assert "truncated 1 of 3 answers at token 8" in caplog.text
    caplog.clear()
    encoding.encode_right_answers(tokenizer, questions[:1], 8)
    assert not caplog.text


def test_right_answers_without_any_token_are_refused() -> None:
    with pytest.raises(DataError, match="none of 1 has; the shortest prompt has 9 tokens; use a larger --seq_len"):
        encoding.encode_right_answers(make_tokenizer(), [Question.with_completion("q" * 9, "y")], 8)
    with pytest.raises(DataError, match="none of 0 has"):
        encoding.encode_right_answers(make_tokenizer(), [], 64)


def test_choices_lose_the_beginning_of_long_prompts() -> None:
    ((short, long),) = encoding.encode_choices(make_tokenizer(), [choice_question("abcdef", "g", "hij")], 8)
    assert (make_tokenizer().decode(short.ids), short.prompt_length) == ("abcdef g", 6)
    assert (make_tokenizer().decode(long.ids), long.prompt_length) == ("cdef hij", 4)
    ((cut, _),) = encoding.encode_choices(make_tokenizer(), [choice_question("ab", "c" * 9, "d")], 8)
    assert cut.prompt_length == 0
    assert cut.num_targets == 7, "nothing predicts the first token"


def test_choice_without_tokens_is_refused() -> None:
    question = Question(("ask", "ask"), (" a", ""), 0, (1, 1))
    with pytest.raises(
        DataError, match="every answer must have a token that its prompt predicts; '' after 'ask' has none"
    ):
        encoding.encode_choices(make_tokenizer(), [question], 64)


TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=8)


@settings(max_examples=60, deadline=None)
@given(TOKENS, st.lists(st.tuples(TOKENS, TOKENS), min_size=2, max_size=4))
def test_shared_prefix_is_the_longest_one_before_all_answers(
    common: list[int], rests: list[tuple[list[int], list[int]]]
) -> None:
    texts = [EncodedAnswer([*common, *prompt, *answer], len(common) + len(prompt)) for prompt, answer in rests]
    length = encoding.shared_prefix_length(texts)
    assert all(text.ids[:length] == texts[0].ids[:length] for text in texts)
    assert all(length < text.prompt_length for text in texts), "the last prompt token predicts the answer"
    longer_is_shared = len({tuple(text.ids[: length + 1]) for text in texts}) == 1
    assert not longer_is_shared or any(length + 1 == text.prompt_length for text in texts)
    longest_rest = max(len(text.ids) for text in texts) - length
    assert encoding.num_forward_tokens(texts) == length + len(texts) * longest_rest


def test_a_single_text_shares_nothing() -> None:
    text = EncodedAnswer([1, 2, 3], 2)
    assert encoding.shared_prefix_length([text]) == 0
    assert encoding.num_forward_tokens([text]) == 3


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(TOKENS, st.integers(0, 8)), min_size=1, max_size=4), st.booleans())
def test_padded_batch_holds_texts_and_masks_their_targets(
    rows: list[tuple[list[int], int]], include_prompt: bool
) -> None:
    texts = [EncodedAnswer(ids, min(length, len(ids))) for ids, length in rows]
    batch = encoding.pad_batch(texts, include_prompt)
    assert batch.ids.shape == batch.loss_mask.shape == (len(texts), max(len(text.ids) for text in texts))
    for text, ids, mask in zip(texts, batch.ids, batch.loss_mask, strict=True):
        assert ids[: len(text.ids)].tolist() == text.ids
        first = 1 if include_prompt else text.first_target
        assert (mask.nonzero()[:, 0] + 1).tolist() == list(range(first, len(text.ids)))


def test_token_losses_are_negative_log_probabilities() -> None:
    model, tokenizer = make_model("llama", dtype=torch.float64), make_tokenizer()
    text = encoding.encode_answer(tokenizer, "ask", " yes")
    batch = encoding.pad_batch([text])
    log_q = model(torch.tensor([text.ids])).logits[0].log_softmax(-1)
    expected = [-float(log_q[t - 1, text.ids[t]]) for t in range(3, 7)]
    assert batch.token_losses(model, LMHead.of(model)).tolist() == pytest.approx(expected, abs=1e-5)
    assert batch.token_losses(ExportedModel(model), None).tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_padding_does_not_change_losses(family: str) -> None:
    model, tokenizer = make_model(family), make_tokenizer(begin=True)
    head = LMHead.of(model)
    texts = [encoding.encode_answer(tokenizer, "p" * n, " answer") for n in (1, 20, 7)]

    def sums(texts: list[EncodedAnswer]) -> torch.Tensor:
        batch = encoding.pad_batch(texts)
        return batch.sum_by_text(batch.token_losses(model, head))

    torch.testing.assert_close(sums(texts), torch.cat([sums([text]) for text in texts]), rtol=1e-5, atol=1e-4)


def test_kl_to_teacher_is_the_mean_over_predicted_tokens() -> None:
    model, teacher = make_model("smollm", dtype=torch.float64), make_model("smollm", seed=1, dtype=torch.float64)
    (texts, *_) = encoding.encode_choices(make_tokenizer(), MIXED_QUESTIONS, 64)
    batch = encoding.pad_batch(texts)
    log_q, log_p = (m(batch.ids).logits[batch.loss_mask].log_softmax(-1) for m in (model, teacher))
    expected = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    found = batch.kl_to_teacher(model, LMHead.of(model), teacher, LMHead.of(teacher))
    assert float(found) == pytest.approx(float(expected), rel=1e-5)
    assert float(found) > 0.1
