"""Log-likelihoods of the choices of questions.

The tokens that all choices of a question have in common go through the model once:

    1. prefixes     The common prefix of each question goes through the model, one row a question. Prefixes are padded
                    on the left, so that all end at the same cache position and a sliding attention window has no gap.
                    The model returns its key-value cache.
    2. endings      The rest of each choice goes through the model, one row a choice, padded on the right. Each row
                    attends to its question's row of the cache.
    3. losses       -log p of each answer's tokens, summed by choice.

The results equal those of running every text whole, up to the order of floating-point sums. Gradients pass through the
cache.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from nybble.models.head import LMHead, last_hidden_states
from nybble.tasks.encoding import EncodedAnswer, pad_batch, shared_prefix_length
from nybble.training.losses import cross_entropy

_ROUNDING = 0.05
"""Relative difference that rounding may cause in 16 bits. Wrong positions cause ten times as much in random models."""

_SHARES_PREFIXES: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
"""Model -> whether prefixes may be shared, which is tried once for each model."""


def choice_log_probs(model: Any, head: LMHead, questions: Sequence[Sequence[EncodedAnswer]]) -> Tensor:
    """log p(choice | prompt) of every choice, in nats; differentiable.

    Args:
        model: transformers model.
        head: its head.
        questions: encoded choices of each question (encode_choices).

    Returns: float32 [questions, C], C = largest number of choices; -inf where a question has fewer.
    """
    losses_A = answer_losses(model, head, questions, prefix_lengths(model, head, questions))
    most = max(map(len, questions))
    return torch.stack(
        [
            F.pad(-losses, (0, most - len(losses)), value=-math.inf)
            for losses in losses_A.split([len(choices) for choices in questions])
        ]
    )


def prefix_lengths(model: Any, head: LMHead | None, questions: Sequence[Sequence[EncodedAnswer]]) -> list[int]:
    """Number of tokens that go through the model once for all choices of a question, for each question.

    All are 0 for exported models (no head), which take no cache; where the attention window is shorter than a text: the
    cache of a sliding window keeps only its last tokens; for models with a recurrent state, which cannot be divided
    among choices; and for models that give other results with a cache (RoBERTa counts positions in its own way).
    """
    window = getattr(model.config.get_text_config(), "sliding_window", None)
    longest = max(len(text.ids) for choices in questions for text in choices)
    if head is None or (window and window < longest) or not _keeps_keys_and_values(model):
        return [0] * len(questions)
    if model not in _SHARES_PREFIXES:
        _SHARES_PREFIXES[model] = _gives_the_same(model, head)
    if not _SHARES_PREFIXES[model]:
        return [0] * len(questions)
    return [shared_prefix_length(choices) for choices in questions]


def _keeps_keys_and_values(model: Any) -> bool:
    """Whether the cache of a model is keys and values in all layers."""
    if getattr(model, "_is_stateful", False):
        return False
    layers = DynamicCache(config=model.config).layers
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


@torch.no_grad()
def _gives_the_same(model: Any, head: LMHead) -> bool:
    """Whether a model computes the same with the positions and the cache that shared prefixes need."""
    positions_1T = torch.arange(8, device=model.device)[None]
    ids_1T = (positions_1T + 2) % head.weight_VD.shape[0]
    placed = {"position_ids": positions_1T, "attention_mask": torch.ones_like(ids_1T)}
    questions = [
        [EncodedAnswer([1, 2, 3, 4, ending], 4) for ending in (5, 6)],
        [EncodedAnswer([7, 8, *ending], 2) for ending in ([1], [2, 3, 4])],
    ]
    try:
        states = last_hidden_states(model, ids_1T, **placed), last_hidden_states(model, ids_1T)
        losses = [answer_losses(model, head, questions, prefixes) for prefixes in ([3, 1], [0, 0])]
    except torch.OutOfMemoryError:
        raise
    except Exception:  # a model without a cache, or with another one, raises whatever its code leads to
        return False
    return all(float((a - b).norm()) <= _ROUNDING * float(b.norm()) for a, b in (states, losses))


def group_questions(
    questions: Sequence[Sequence[EncodedAnswer]], prefixes: Sequence[int], max_tokens: int
) -> Iterator[list[int]]:
    """Group questions for forward passes of at most `max_tokens` tokens, padding included.

    Questions are ordered by prefix length and text length, longest first, so that a group has little padding. A group
    has at least one question.

    Args:
        questions: encoded choices of each question.
        prefixes: result of `prefix_lengths`.

    Yields: indices of the questions of a group.
    """

    def longest(i: int) -> int:
        return max(len(text.ids) for text in questions[i])

    group: list[int] = []
    prefix_width = ending_width = num_endings = 0
    for i in sorted(range(len(questions)), key=lambda i: (-prefixes[i], -longest(i))):
        width = max(ending_width, longest(i) - prefixes[i])
        rows = num_endings + len(questions[i])
        if group and (len(group) + 1) * prefix_width + rows * width > max_tokens:
            yield group
            group, prefix_width, width, rows = [], 0, longest(i) - prefixes[i], len(questions[i])
        group, prefix_width = [*group, i], max(prefix_width, prefixes[i])
        ending_width, num_endings = width, rows
    if group:
        yield group


def answer_losses(
    model: Any, head: LMHead | None, questions: Sequence[Sequence[EncodedAnswer]], prefixes: Sequence[int]
) -> Tensor:
    """-log p of every answer, in nats, summed over its tokens: float32 [A].

    The A answers are the choices of all questions, one after the other.

    Args:
        model: transformers model, or an exported model with the same call.
        head: head of the model; None = use the model's own logits, as for exported models.
        questions: encoded choices of each question.
        prefixes: tokens of each question that go through the model once (prefix_lengths).
    """
    texts = [text for choices in questions for text in choices]
    if head is None or not max(prefixes):
        batch = pad_batch(texts)
        return batch.sum_by_text(batch.token_losses(model, head))
    cache = _run_prefixes(model, questions, prefixes)
    question_A = [i for i, choices in enumerate(questions) for _ in choices]
    endings = [
        EncodedAnswer(text.ids[prefixes[i] :], text.prompt_length - prefixes[i])
        for text, i in zip(texts, question_A, strict=True)
    ]
    # Endings of similar length go through the model together, a few at a time: each takes a copy of its question's
    # cache.
    order_A = torch.tensor([len(text.ids) for text in endings]).argsort(stable=True)
    losses = []
    for part in order_A.split(2 * len(questions)):
        question_B = torch.tensor([question_A[i] for i in part.tolist()])
        losses.append(_ending_losses(model, head, [endings[i] for i in part.tolist()], cache, question_B))
    return torch.cat(losses)[order_A.argsort().to(model.device)]


@dataclass(frozen=True)
class _PrefixCache:
    """Keys and values of the prefixes of Q questions, padded on the left to P tokens.

    Attributes:
        key_values: transformers cache with Q rows.
        mask_QP: bool; True where a cache position holds a token, False where it is padding.
        length_Q1: int64; tokens of each prefix.
    """

    key_values: Any
    mask_QP: Tensor
    length_Q1: Tensor


def _run_prefixes(model: Any, questions: Sequence[Sequence[EncodedAnswer]], prefixes: Sequence[int]) -> _PrefixCache:
    """Run the common prefix of each question through the model."""
    width, length_Q1 = max(prefixes), torch.tensor(prefixes)[:, None]
    column_P = torch.arange(width)
    mask_QP = column_P >= width - length_Q1
    ids_QP = torch.tensor(
        [[0] * (width - length) + choices[0].ids[:length] for choices, length in zip(questions, prefixes, strict=True)]
    )
    key_values = model.base_model(
        input_ids=ids_QP.to(model.device),
        attention_mask=mask_QP.long().to(model.device),
        position_ids=(column_P - width + length_Q1).relu().to(model.device),
        use_cache=True,
    ).past_key_values
    return _PrefixCache(key_values, mask_QP, length_Q1)


def _ending_losses(
    model: Any, head: LMHead, endings: Sequence[EncodedAnswer], cache: _PrefixCache, question_B: Tensor
) -> Tensor:
    """-log p of the answer of each ending: float32 [B].

    Args:
        endings: texts without their prefixes.
        question_B: question of each ending, int64: its row of the cache.
    """
    batch, device = pad_batch(endings), model.device
    mask_BT = torch.ones_like(batch.loss_mask)  # padding on the right needs no mask
    hidden_BTD = last_hidden_states(
        model,
        batch.ids.to(device),
        attention_mask=torch.cat([cache.mask_QP[question_B], mask_BT], 1).long().to(device),
        position_ids=(cache.length_Q1[question_B] + torch.arange(batch.ids.shape[1])).to(device),
        past_key_values=_select_rows(cache.key_values, question_B.to(device)),
        use_cache=True,
    )
    loss_mask, targets_BT = batch.loss_mask.to(device), batch.ids.roll(-1, 1).to(device)
    return batch.sum_by_text(cross_entropy(hidden_BTD[loss_mask], targets_BT[loss_mask], head))


def _select_rows(key_values: Any, row_B: Tensor) -> Any:
    """A new transformers cache with the given rows of another one, which keeps its own; differentiable."""
    selected = copy.copy(key_values)
    selected.layers = [copy.copy(layer) for layer in key_values.layers]
    selected.batch_select_indices(row_B)
    return selected
