"""Losses of training on a task, and the order of its rows."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble.data import sampling
from nybble.models.head import LMHead
from nybble.tasks import likelihood, objective
from nybble.tasks.objective import TaskBatches, task_loss
from tests.helpers.questions import MIXED_QUESTIONS, choice_question, make_task_data
from tests.helpers.tiny import make_model, make_tokenizer

ROWS = torch.tensor([1, 0, 3])


def log_shares(model: Any, data: Any, length_normalized: bool) -> list[torch.Tensor]:
    """Logarithm of the distribution over the choices of each training row: float64, one question at a time."""
    log_shares = []
    for question, choices in zip(data.dataset.train, data.choices, strict=True):
        log_p = likelihood.choice_log_probs(model, LMHead.of(model), [choices]).double()[0]
        lengths = torch.tensor(question.choice_lengths, dtype=torch.float64)
        log_shares.append((log_p * (lengths.mean() / lengths / 4 if length_normalized else 1)).log_softmax(0))
    return log_shares


@pytest.mark.parametrize("metric", ["acc", "acc_norm"])
def test_loss_on_choices_is_that_of_the_distribution_over_choices(metric: str) -> None:
    model, teacher = make_model("llama"), make_model("llama", seed=1)
    data = make_task_data(make_tokenizer(), MIXED_QUESTIONS, "choices", metric)
    log_q, log_p = (log_shares(m, data, metric == "acc_norm") for m in (model, teacher))
    expected = -sum(float(log_q[i][MIXED_QUESTIONS[i].label]) for i in ROWS.tolist()) / 3
    loss = task_loss(model, data, None)
    assert float(loss.loss(ROWS)) == pytest.approx(expected, rel=1e-4)
    assert loss.weight(ROWS) == 3
    kl = sum(float((log_p[i].exp() * (log_p[i] - log_q[i])).sum()) for i in ROWS.tolist()) / 3
    assert float(task_loss(model, data, teacher).loss(ROWS)) == pytest.approx(kl, rel=1e-4)
    assert kl > 0.01


@pytest.mark.parametrize("mode", ["answer", "all"])
def test_loss_on_tokens_is_their_mean(mode: Any) -> None:
    model, teacher = make_model("smollm"), make_model("smollm", seed=1)
    data = make_task_data(make_tokenizer(), MIXED_QUESTIONS, mode)
    losses, kls = [], []
    for i in ROWS.tolist():
        ids, prompt_length = data.texts[i]
        log_q, log_p = (m(torch.tensor([ids])).logits[0].double().log_softmax(-1) for m in (model, teacher))
        for t in range(1 if mode == "all" else prompt_length, len(ids)):
            losses.append(-float(log_q[t - 1, ids[t]]))
            kls.append(float((log_p[t - 1].exp() * (log_p[t - 1] - log_q[t - 1])).sum()))
    loss = task_loss(model, data, None)
    assert float(loss.loss(ROWS)) == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    assert loss.weight(ROWS) == len(losses)
    assert float(task_loss(model, data, teacher).loss(ROWS)) == pytest.approx(sum(kls) / len(kls), rel=1e-4)


def test_microbatches_add_up_to_their_batch() -> None:
    for mode in ("choices", "answer", "all"):
        model = make_model("smollm")
        loss = task_loss(model, make_task_data(make_tokenizer(), MIXED_QUESTIONS, mode), None)  # type: ignore[arg-type]
        parts = sum(float(loss.loss(part)) * loss.weight(part) for part in ROWS.split(2))
        assert float(loss.loss(ROWS)) == pytest.approx(parts / loss.weight(ROWS), rel=1e-5)


@pytest.mark.parametrize("mode", ["choices", "answer"])
def test_gradients_reach_the_model_and_not_the_teacher(mode: Any) -> None:
    model, teacher = (make_model("smollm", seed=seed).requires_grad_() for seed in (0, 1))
    data = make_task_data(make_tokenizer(), MIXED_QUESTIONS, mode)
    task_loss(model, data, teacher).loss(torch.arange(4)).backward()
    weight = model.model.layers[0].mlp.up_proj.weight
    assert math.isfinite(float(weight.grad.abs().max()))
    assert float(weight.grad.abs().max()) > 0
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_only_padded_rows_have_a_limit_on_a_cpu() -> None:
    answers, choices = (
        make_task_data(make_tokenizer(), [choice_question("ask", "a", "b")], mode) for mode in ("answer", "choices")
    )
    assert objective.max_microbatch_rows(answers, "cpu") == 4
    assert objective.max_microbatch_rows(answers, "cuda") is None
    assert objective.max_microbatch_rows(choices, "cpu") is None


@settings(max_examples=40, deadline=None)
@given(st.data(), st.integers(1, 6), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_steps_draw_all_rows_before_any_again(data: st.DataObject, batch_size: int, epochs: int, seed: int) -> None:
    lengths = data.draw(st.lists(st.integers(1, 5), min_size=batch_size, max_size=20))
    batches = TaskBatches(lengths, batch_size, epochs, seed)
    assert batches.steps_per_epoch == len(lengths) // batch_size
    drawn = [batches.draw(step) for step in range(epochs * batches.steps_per_epoch)]
    order = sampling.draw_order(len(lengths), len(drawn) * batch_size, seed)
    for rows, expected in zip(drawn, order.split(batch_size), strict=True):
        assert sorted(rows.tolist()) == sorted(expected.tolist())
        assert [lengths[i] for i in rows] == sorted(lengths[i] for i in rows)
    first_epoch = torch.cat(drawn[: batches.steps_per_epoch]).tolist()
    assert len(set(first_epoch)) == len(first_epoch)
    assert torch.equal(TaskBatches(lengths, batch_size, epochs, seed).draw(0), drawn[0]), "known from the seed"
