"""The right answers of a task as running text.

It serves calibration, and the measurement of perplexity and KL divergence in addition to the task's own metric.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nybble.data import packing, sampling
from nybble.data.packing import TokenRows
from nybble.errors import DataError
from nybble.tasks import encoding
from nybble.tasks.encoding import EncodedAnswer
from nybble.tasks.task_data import TaskData, right_answers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Tokens in a sequence, where there is enough text.
MAX_LENGTH = 256
# Sequences are halved in length, down to this, until there are enough of them.
MIN_LENGTH = 16
# Sequences of the training text below which calibration has too little to go by: 8, and one more because the last one
# is dropped if it is incomplete.
_MIN_TRAIN_SEQUENCES = 9


@dataclass(frozen=True)
class RunningTextConfig:
    """How much running text is needed.

    Attributes:
        seq_len: maximum number of tokens in a sequence.
        num_calibration_samples: maximum number of calibration sequences, chosen at random.
        num_test_samples: maximum number of test sequences; 0 = all.
        seed: of the choice of calibration sequences.
    """

    seq_len: int
    num_calibration_samples: int
    num_test_samples: int
    seed: int


@dataclass(frozen=True)
class RunningText:
    """Token sequences of a task's rows.

    Attributes:
        calibration_ST: int64; prompts with their right answers of the training rows.
        test: of all held-out rows.
    """

    calibration_ST: Tensor
    test: TokenRows


def running_text(data: TaskData, tokenizer: PreTrainedTokenizerBase, config: RunningTextConfig) -> RunningText:
    """Join prompts and right answers by the end-of-text token, and cut them into sequences.

    Raises:
        DataError: there are too few tokens for 9 calibration sequences of 16 tokens, or for one test sequence.
    """
    questions = data.dataset.held_out
    encoded = encoding.encode_choices(tokenizer, questions, config.seq_len, "held-out")
    end = packing.end_tokens(tokenizer)
    train_N, held_out_N = join_texts(data.texts, end), join_texts(right_answers(questions, encoded), end)
    length = sequence_length(config.seq_len, len(train_N), len(held_out_N))
    begin = packing.begin_tokens(tokenizer)
    calibration_ST = packing.cut_sequences(train_N, length, begin)
    test_ST = packing.cut_sequences(held_out_N, length, begin)
    count = min(len(calibration_ST), config.num_calibration_samples)
    order = sampling.draw_order(len(calibration_ST), count, config.seed)
    return RunningText(calibration_ST[order], TokenRows.of(test_ST[: config.num_test_samples or None]))


def join_texts(texts: Sequence[EncodedAnswer], end: list[int]) -> Tensor:
    """Token ids of all texts, int64 [N], each followed by the tokens `end` unless it ends with them already."""
    return torch.tensor(
        [token for text in texts for token in (*text.ids, *(end if text.ids[-1:] != end else []))], dtype=torch.int64
    )


def sequence_length(seq_len: int, num_train_tokens: int, num_held_out_tokens: int) -> int:
    """Number of tokens in a sequence.

    It is the largest power of two from 256 to 16 that is at most seq_len and gives 9 training and 2 held-out sequences.

    Sequences of 16 tokens are accepted with a single held-out sequence, and with a shorter seq_len.

    Raises:
        DataError: there are too few tokens for sequences of 16 tokens.
    """
    length = MAX_LENGTH
    while length > MIN_LENGTH and (
        length > seq_len or num_train_tokens < _MIN_TRAIN_SEQUENCES * length or num_held_out_tokens < 2 * length
    ):
        length //= 2
    num_train_needed, num_held_out_needed = _MIN_TRAIN_SEQUENCES * length, length + 1
    if num_train_tokens < num_train_needed or num_held_out_tokens < num_held_out_needed:
        raise DataError(
            f"the rows of --task must have at least {num_train_needed} tokens to train on and {num_held_out_needed} "
            f"held out; got {num_train_tokens} and {num_held_out_tokens}; use a task with more rows "
            "or a larger --num_train_samples"
        )
    return length
