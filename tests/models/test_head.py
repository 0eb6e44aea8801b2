"""LMHead compared with the logits of transformers models."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from nybble.errors import ModelError
from nybble.models.head import LMHead, last_hidden_states
from tests.helpers.tiny import FAMILIES, make_model

IDS = torch.arange(12).view(2, 6)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_model(family: str) -> None:
    model = make_model(family)
    head = LMHead.of(model)
    with torch.no_grad():
        torch.testing.assert_close(head.logits(last_hidden_states(model, IDS)), model(IDS).logits, rtol=1e-5, atol=1e-5)
    head.verify(model, IDS)


def test_logits_follow_the_formula() -> None:
    head = LMHead(torch.randn(5, 3), torch.randn(5), multiplier=0.5, cap=2.0)
    hidden = torch.randn(4, 3)
    expected = 2.0 * torch.tanh(0.5 * (hidden @ head.weight_VD.T + head.bias_V) / 2.0)
    torch.testing.assert_close(head.logits(hidden), expected)


def test_a_bias_is_part_of_the_head() -> None:
    model = make_model("llama")
    model.lm_head = nn.Linear(64, 260)
    assert LMHead.of(model).bias_V is model.lm_head.bias


def test_a_copy_does_not_follow_the_model() -> None:
    model = make_model("llama")
    shared, copied = LMHead.of(model), LMHead.of(model, copy=True)
    before = model.lm_head.weight.clone()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert torch.equal(shared.weight_VD, model.lm_head.weight)
    assert torch.equal(copied.weight_VD, before)


def test_bfloat16_rounding_is_within_the_tolerance() -> None:
    model = make_model("gemma2", dtype=torch.bfloat16)
    LMHead.of(model).verify(model, IDS)


@pytest.mark.parametrize(
    ("family", "change"), [("gemma2", {"cap": None}), ("llama", {"multiplier": 1.1}), ("llama", {"cap": 3.0})]
)
def test_a_head_that_differs_is_refused(family: str, change: dict[str, Any]) -> None:
    model = make_model(family)
    with pytest.raises(
        ModelError,
        match=rf"the logits of {family} must be head\(hidden states\).*this family needs a row in families.py",
    ):
        replace(LMHead.of(model), **change).verify(model, IDS)


@pytest.mark.parametrize(
    ("dtype", "remedy"), [(torch.float32, "download the model again"), (torch.float16, "use --dtype float32")]
)
def test_logits_that_are_not_finite_are_refused(dtype: torch.dtype, remedy: str) -> None:
    model = make_model("llama", dtype=dtype)
    with torch.no_grad():
        model.lm_head.weight[3, 4] = torch.nan
    with pytest.raises(ModelError, match=f"the logits of llama must be finite numbers; .*; {remedy}"):
        LMHead.of(model).verify(model, IDS)


def test_a_nan_that_only_the_head_computes_is_refused() -> None:
    """NaN is not above a tolerance, but it is no agreement either."""
    model = make_model("llama")
    head = LMHead(torch.full_like(model.lm_head.weight, torch.nan), None, 1.0, None)
    with pytest.raises(ModelError, match="they differ by nan"):
        head.verify(model, IDS)


def test_last_hidden_states_come_after_the_final_norm() -> None:
    states = torch.randn(1, 2, 3)
    calls = []

    def base_model(**arguments: Any) -> SimpleNamespace:
        calls.append(arguments)
        return SimpleNamespace(last_hidden_state=states)

    assert last_hidden_states(SimpleNamespace(base_model=base_model), IDS) is states
    assert calls == [{"input_ids": IDS, "use_cache": False}]
    model = make_model("llama")
    with torch.no_grad():
        every_layer = model.base_model(input_ids=IDS, output_hidden_states=True).hidden_states
        assert torch.equal(last_hidden_states(model, IDS), every_layer[-1])
