"""Right answers as running text."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble.errors import DataError
from nybble.tasks import running_text as running
from nybble.tasks.running_text import RunningTextConfig, running_text
from nybble.tasks.task_data import TaskData
from tests.helpers.questions import choice_question, make_task_data
from tests.helpers.tiny import make_tokenizer

CONFIG = RunningTextConfig(seq_len=64, num_calibration_samples=8, num_test_samples=0, seed=0)


def make_data(begin: bool = False, rows: int = 40) -> TaskData:
    questions = [choice_question(f"row {i:03}", "yes", "no", label=i % 2) for i in range(rows)]
    return make_task_data(make_tokenizer(begin), questions, "choices")


@pytest.mark.parametrize("begin", [False, True])
def test_texts_are_joined_and_cut(begin: bool) -> None:
    data, tokenizer = make_data(begin), make_tokenizer(begin)
    text = running_text(data, tokenizer, CONFIG)
    joined = [token for answer in data.texts for token in (*answer.ids, tokenizer.eos_token_id)]
    length = text.test.ids.shape[1]
    assert length == 32  # 470 tokens are 9 sequences of 32, not of 64
    body = length - begin
    sequences = [[256] * begin + joined[i : i + body] for i in range(0, len(joined) - body + 1, body)]
    assert text.test.ids.tolist() == sequences, "the held-out rows are the training rows here"
    assert text.test.loss_mask.all()
    assert len(text.calibration_ST) == 8
    assert all(row in sequences for row in text.calibration_ST.tolist())


def test_sequences_are_limited_and_drawn_by_the_seed() -> None:
    data, tokenizer = make_data(), make_tokenizer()
    assert len(running_text(data, tokenizer, dataclasses.replace(CONFIG, num_test_samples=2)).test) == 2
    everything = running_text(data, tokenizer, dataclasses.replace(CONFIG, num_calibration_samples=99)).calibration_ST
    assert len(everything) == len(running_text(data, tokenizer, CONFIG).test)
    other = running_text(data, tokenizer, dataclasses.replace(CONFIG, num_calibration_samples=99, seed=1))
    assert not torch.equal(other.calibration_ST, everything)


def test_texts_that_end_are_not_ended_twice() -> None:
    questions = [choice_question("ask", "a", "b")]
    data = make_task_data(make_tokenizer(), questions, "answer")
    ended = dataclasses.replace(data, texts=[data.texts[0]._replace(ids=[1, 2, 257])])
    assert running.join_texts([*data.texts, *ended.texts], [257]).tolist() == [*data.texts[0].ids, 257, 1, 2, 257]
    assert running.join_texts(data.texts, []).tolist() == data.texts[0].ids


@settings(max_examples=60, deadline=None)
@given(st.integers(8, 600), st.integers(0, 4000), st.integers(0, 1000))
def test_sequence_length_is_the_largest_that_fits(seq_len: int, train: int, held_out: int) -> None:
    fitting = [n for n in (256, 128, 64, 32, 16) if n <= seq_len and train >= 9 * n and held_out >= 2 * n]
    if fitting:
        assert running.sequence_length(seq_len, train, held_out) == fitting[0]
    elif train >= 9 * 16 and held_out >= 17:
        assert running.sequence_length(seq_len, train, held_out) == 16
    else:
        with pytest.raises(DataError, match=f"at least 144 tokens to train on and 17 held out; got {train} and"):
            running.sequence_length(seq_len, train, held_out)
