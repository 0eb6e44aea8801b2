"""Chunked KL against torch's own in float64: value, gradient, soft cap, multiplier; and that only one chunk of logits exists."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nybble.errors import ModelError
from nybble.models.head import LMHead, last_hidden_states
from nybble.training import losses as training_losses
from nybble.training.losses import cross_entropy, kl_to_teacher
from tests.tiny import make_model

N, D, V = 37, 16, 101


def heads(cap: float | None, multiplier: float, bias: bool, dtype: torch.dtype) -> tuple[LMHead, LMHead]:
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(V, D, generator=generator).to(dtype) for _ in range(2)]
    biases = [torch.randn(V, generator=generator).to(dtype) if bias else None for _ in range(2)]
    return LMHead(made[0], biases[0], multiplier, cap), LMHead(made[1], biases[1], multiplier, cap)


def plain_kl(student: Tensor, teacher: Tensor, student_head: LMHead, teacher_head: LMHead) -> Tensor:
    def logits(hidden: Tensor, head: LMHead) -> Tensor:
        z = (
            F.linear(hidden, head.weight_VD.double(), None if head.bias_V is None else head.bias_V.double())
            * head.multiplier
        )
        return z if head.cap is None else head.cap * torch.tanh(z / head.cap)

    log_q, log_p = (
        F.log_softmax(logits(h, head), -1) for h, head in ((student, student_head), (teacher, teacher_head))
    )
    return F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")


@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize("multiplier", [1.0, 0.25])
@pytest.mark.parametrize("bias", [False, True])
def test_value_and_gradient_equal_torch_in_float64(cap: float | None, multiplier: float, bias: bool) -> None:
    student_head, teacher_head = heads(cap, multiplier, bias, torch.float32)
    student, teacher = torch.randn(N, D), torch.randn(N, D)
    ours, exact = student.clone().requires_grad_(), student.double().requires_grad_()
    loss, expected = (
        kl_to_teacher(ours, teacher, student_head, teacher_head, chunk=8),
        plain_kl(exact, teacher.double(), student_head, teacher_head),
    )
    (3 * loss).backward()
    (3 * expected).backward()
    # float32 sums over 101 words
    torch.testing.assert_close(loss.double(), expected, rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize("multiplier", [1.0, 0.25])
def test_cross_entropy_of_each_token_equals_torch_in_float64(cap: float | None, multiplier: float) -> None:
    head, _ = heads(cap, multiplier, True, torch.float32)
    hidden, targets, weights = torch.randn(N, D), torch.randint(V, (N,)), torch.rand(N)
    ours, exact = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
    losses = cross_entropy(ours, targets, head, chunk=8)
    z = F.linear(exact, head.weight_VD.double(), head.bias_V.double()) * multiplier
    expected = F.cross_entropy(z if cap is None else cap * torch.tanh(z / cap), targets, reduction="none")
    (losses * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(losses.double(), expected, rtol=2e-5, atol=1e-5)
    torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(cross_entropy(hidden, targets, head, chunk=8), losses)


def test_equal_models_have_no_divergence() -> None:
    head, _ = heads(None, 1.0, False, torch.float32)
    hidden = torch.randn(N, D, requires_grad=True)
    loss = kl_to_teacher(hidden, hidden.detach(), head, head)
    loss.backward()
    assert abs(loss.item()) < 1e-6
    assert hidden.grad.abs().max() < 1e-7


def test_result_does_not_depend_on_the_chunk() -> None:
    student_head, teacher_head = heads(30.0, 1.0, False, torch.float32)
    student, teacher = torch.randn(N, D), torch.randn(N, D)
    values = [kl_to_teacher(student, teacher, student_head, teacher_head, chunk).item() for chunk in (1, 7, 37, 1000)]
    assert max(values) - min(values) < 1e-5


def test_never_more_than_one_chunk_of_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    student_head, teacher_head = heads(None, 1.0, False, torch.float32)
    sizes, original = [], LMHead.logits

    def spy(self: LMHead, hidden: Tensor) -> Tensor:
        sizes.append(len(hidden))
        return original(self, hidden)

    monkeypatch.setattr(LMHead, "logits", spy)
    monkeypatch.setattr(training_losses, "CHUNK_TOKENS", {"cpu": 8})
    saved = []
    student = torch.randn(N, D, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t.numel()), t)[1], lambda t: t):
        kl_to_teacher(student, torch.randn(N, D), student_head, teacher_head)
    assert max(sizes) == 8
    assert sum(sizes) == 2 * N
    assert max(saved) <= N * D, "only the gradient of the hidden states may be kept for the backward"


def test_bf16_hidden_states_give_float32_loss() -> None:
    student_head, teacher_head = heads(None, 1.0, False, torch.bfloat16)
    student = torch.randn(N, D).bfloat16().requires_grad_()
    loss = kl_to_teacher(student, torch.randn(N, D).bfloat16(), student_head, teacher_head)
    loss.backward()
    assert loss.dtype == torch.float32
    assert student.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_head_of_a_model_gives_its_logits(family: str) -> None:
    model = make_model(family)
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        head = LMHead.of(model)
        head.verify(model, ids)
        torch.testing.assert_close(head.logits(last_hidden_states(model, ids)), model(ids).logits, rtol=1e-5, atol=1e-5)
    assert (head.cap is not None) == (family == "gemma2")


def test_a_family_that_does_more_to_its_logits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("gemma2")
    wrong = replace(LMHead.of(model), cap=None)
    with pytest.raises(
        ModelError, match=r"the logits of gemma2 must be head\(hidden states\).*this family needs a row in families.py"
    ):
        wrong.verify(model, torch.arange(12).view(2, 6))
