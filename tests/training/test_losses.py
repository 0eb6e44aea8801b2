"""nybble.training.losses compared with torch's losses in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nybble.models.head import LMHead
from nybble.training import losses
from nybble.training.losses import cross_entropy, kl_to_teacher, next_token_cross_entropy

N, D, V = 37, 16, 101


@pytest.fixture
def chunks_of_8(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five chunks for 37 tokens, the last of them shorter."""
    monkeypatch.setattr(losses, "CHUNK_TOKENS", {"cpu": 8})


def make_heads(cap: float | None = None, multiplier: float = 1.0, bias: bool = False) -> tuple[LMHead, LMHead]:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(V, D, generator=generator) for _ in range(2)]
    biases = [torch.randn(V, generator=generator) if bias else None for _ in range(2)]
    return LMHead(weights[0], biases[0], multiplier, cap), LMHead(weights[1], biases[1], multiplier, cap)


def float64_logits(hidden_ND: Tensor, head: LMHead) -> Tensor:
    bias_V = None if head.bias_V is None else head.bias_V.double()
    z = F.linear(hidden_ND, head.weight_VD.double(), bias_V) * head.multiplier
    return z if head.cap is None else head.cap * torch.tanh(z / head.cap)


@pytest.mark.usefixtures("chunks_of_8")
@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize("multiplier", [1.0, 0.25])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.7])
def test_kl_and_its_gradient_equal_those_of_torch(
    cap: float | None, multiplier: float, bias: bool, temperature: float
) -> None:
    student_head, teacher_head = make_heads(cap, multiplier, bias)
    student, teacher = torch.randn(N, D, requires_grad=True), torch.randn(N, D)
    student64 = student.detach().double().requires_grad_()
    loss = kl_to_teacher(student, teacher, student_head, teacher_head, temperature)
    log_q = F.log_softmax(float64_logits(student64, student_head) / temperature, -1)
    log_p = F.log_softmax(float64_logits(teacher.double(), teacher_head) / temperature, -1)
    expected = temperature**2 * F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    (3 * loss).backward()
    (3 * expected).backward()
    # float32 sums over 101 logits: 101 * 2**-24 = 6e-6 relative, and more where terms cancel.
    torch.testing.assert_close(loss.double(), expected, rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(student.grad.double(), student64.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("chunks_of_8")
@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize("multiplier", [1.0, 0.25])
def test_cross_entropy_and_its_gradient_equal_those_of_torch(cap: float | None, multiplier: float) -> None:
    head, _ = make_heads(cap, multiplier, bias=True)
    hidden, targets, weights = torch.randn(N, D, requires_grad=True), torch.randint(V, (N,)), torch.rand(N)
    hidden64 = hidden.detach().double().requires_grad_()
    loss = cross_entropy(hidden, targets, head)
    expected = F.cross_entropy(float64_logits(hidden64, head), targets, reduction="none")
    (loss * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(loss.double(), expected, rtol=2e-5, atol=1e-5)  # as above
    torch.testing.assert_close(hidden.grad.double(), hidden64.grad, rtol=1e-4, atol=1e-5)


def test_the_cross_entropy_of_next_tokens_is_the_mean_over_those_that_count() -> None:
    head, _ = make_heads()
    hidden, ids = torch.randn(3, 5, D, requires_grad=True), torch.randint(V, (3, 5))
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 0, 0, 1], [0, 0, 0, 0, 1]]).bool()
    loss = next_token_cross_entropy(hidden, ids, mask, head)
    labels = ids[:, 1:].masked_fill(~mask[:, :-1], -100)
    hidden64 = hidden.detach().double().requires_grad_()
    expected = F.cross_entropy(float64_logits(hidden64[:, :-1], head).flatten(0, 1), labels.flatten())
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=2e-5, atol=1e-5)
    torch.testing.assert_close(hidden.grad.double(), hidden64.grad, rtol=1e-4, atol=1e-5)
    assert next_token_cross_entropy(hidden, ids, torch.zeros_like(mask), head) == 0


@pytest.mark.usefixtures("chunks_of_8")
def test_values_without_gradients_are_the_same() -> None:
    student_head, teacher_head = make_heads(cap=5.0)
    hidden, teacher, targets = torch.randn(N, D, requires_grad=True), torch.randn(N, D), torch.randint(V, (N,))
    kl = kl_to_teacher(hidden.detach(), teacher, student_head, teacher_head)
    ce = cross_entropy(hidden.detach(), targets, student_head)
    assert not kl.requires_grad
    assert torch.equal(kl, kl_to_teacher(hidden, teacher, student_head, teacher_head))
    assert torch.equal(ce, cross_entropy(hidden, targets, student_head))


def test_kl_between_equal_models_is_zero() -> None:
    head, _ = make_heads()
    hidden = torch.randn(N, D, requires_grad=True)
    loss = kl_to_teacher(hidden, hidden.detach(), head, head)
    loss.backward()
    assert abs(loss.item()) < 1e-6  # p (z - z) is exactly zero; log Z is the same float32 number twice
    assert hidden.grad.abs().max() < 1e-7


@pytest.mark.parametrize("chunk", [1, 7, 37])
def test_result_does_not_depend_on_the_chunk_size(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    student_head, teacher_head = make_heads(cap=30.0)
    student, teacher = torch.randn(N, D), torch.randn(N, D)
    whole = kl_to_teacher(student, teacher, student_head, teacher_head).item()
    monkeypatch.setattr(losses, "CHUNK_TOKENS", {"cpu": chunk})
    # Matrix products of other shapes may add up in another order.
    assert kl_to_teacher(student, teacher, student_head, teacher_head).item() == pytest.approx(whole, rel=1e-5)


@pytest.mark.usefixtures("chunks_of_8")
def test_logits_exist_for_one_chunk_only(monkeypatch: pytest.MonkeyPatch) -> None:
    student_head, teacher_head = make_heads()
    chunk_sizes, saved_sizes, original = [], [], LMHead.logits

    def record_size(self: LMHead, hidden: Tensor) -> Tensor:
        chunk_sizes.append(len(hidden))
        return original(self, hidden)

    def record_saved(tensor: Tensor) -> Tensor:
        saved_sizes.append(tensor.numel())
        return tensor

    monkeypatch.setattr(LMHead, "logits", record_size)
    student = torch.randn(N, D, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(record_saved, lambda tensor: tensor):
        kl_to_teacher(student, torch.randn(N, D), student_head, teacher_head)
    assert max(chunk_sizes) == 8
    assert sum(chunk_sizes) == 2 * N
    assert max(saved_sizes) <= N * D, "only the gradient of the hidden states may be kept for the backward"


def test_bfloat16_hidden_states_give_a_float32_loss_and_a_bfloat16_gradient() -> None:
    head = LMHead(torch.randn(V, D).bfloat16(), None, 1.0, None)
    student = torch.randn(N, D).bfloat16().requires_grad_()
    loss = kl_to_teacher(student, torch.randn(N, D).bfloat16(), head, head)
    loss.backward()
    assert loss.dtype == torch.float32
    assert student.grad.dtype == torch.bfloat16


def test_unknown_devices_use_the_chunk_size_of_the_cpu() -> None:
    assert losses.chunk_tokens(torch.device("cuda"), 49152) == losses.CHUNK_TOKENS["cuda"]
    assert losses.chunk_tokens(torch.device("mps"), 49152) == losses.CHUNK_TOKENS["cpu"]
    assert [losses.chunk_tokens(torch.device("cuda"), size) for size in (128256, 262144, 10**7)] == [512, 256, 128]
    assert losses.chunk_tokens(torch.device("cpu"), 10**7) == losses.CHUNK_TOKENS["cpu"]
