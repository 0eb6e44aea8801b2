"""nybble.evaluation.perplexity compared with torch's losses in float64."""

import math

import pytest
import torch
import torch.nn.functional as F

from nybble.evaluation import perplexity
from nybble.evaluation.perplexity import logits_from_states, measure_sequences, model_logits
from nybble.models.head import LMHead, last_hidden_states
from tests.helpers.tiny import make_model


@pytest.mark.parametrize("chunk", [4, 256])
@pytest.mark.parametrize("masked", [False, True])
def test_perplexity_and_kl_equal_those_of_torch(chunk: int, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perplexity, "_CHUNK_POSITIONS", chunk)
    model, teacher, ids = make_model("llama"), make_model("llama", seed=1), torch.randint(0, 256, (3, 10))
    mask = torch.rand(ids.shape) < 0.5 if masked else torch.ones_like(ids, dtype=torch.bool)
    advanced: list[int] = []
    measured = measure_sequences(
        model_logits(model, ids), ids, model_logits(teacher, ids), advanced.append, mask if masked else None
    )
    counted = mask[:, :-1]
    z, z_teacher = (m(ids).logits[:, :-1].double()[counted] for m in (model, teacher))
    loss = F.cross_entropy(z, ids[:, 1:][counted])
    kl = F.kl_div(z.log_softmax(-1), z_teacher.log_softmax(-1), log_target=True, reduction="batchmean")
    assert measured["token_perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)  # float32 logits
    assert measured["kl_to_teacher"] == pytest.approx(kl.item(), rel=1e-4)
    assert measured["tokens"] == counted.sum()
    assert advanced == [1, 1, 1]


def test_without_teacher_there_is_no_kl() -> None:
    model, ids = make_model("llama"), torch.randint(0, 256, (1, 6))
    assert measure_sequences(model_logits(model, ids), ids).keys() == {"token_perplexity", "tokens"}


def test_logits_from_states_are_those_of_the_model() -> None:
    model, ids = make_model("gemma2"), torch.randint(0, 256, (2, 12))
    teacher = logits_from_states(LMHead.of(model), last_hidden_states(model, ids))
    positions = torch.tensor([0, 5, 11])
    for i in range(2):
        torch.testing.assert_close(teacher(i)(positions), model_logits(model, ids)(i)(positions), rtol=1e-5, atol=1e-5)


def test_sequences_without_measured_positions_have_perplexity_one() -> None:
    model, ids = make_model("llama"), torch.randint(0, 256, (2, 6))
    measured = measure_sequences(model_logits(model, ids), ids, loss_mask=torch.zeros_like(ids, dtype=torch.bool))
    assert measured == {"token_perplexity": 1.0, "tokens": 0}


def test_perplexity_of_a_ruined_model_stays_finite() -> None:
    ids = torch.tensor([[1, 2, 3]])
    z = torch.zeros(3, 10)
    z[:, 9] = 1e6  # all probability on a token that does not come
    assert measure_sequences(lambda i: lambda positions: z[positions], ids)["token_perplexity"] == math.exp(700)
