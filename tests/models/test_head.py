"""LMHead compared with the logits of transformers models."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.modeling_outputs import CausalLMOutput

from nybble.errors import ModelError
from nybble.models.head import LMHead, last_hidden_states
from tests.helpers.causal_types import tiny_config, tiny_model
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
        match=rf"the logits of {family} must be head\(hidden states\) with a multiplier and a soft cap; they differ by",
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


def test_last_hidden_states_are_those_of_the_decoder() -> None:
    model = make_model("llama")
    with torch.no_grad():
        expected = model.base_model(input_ids=IDS, output_hidden_states=True)
        found = last_hidden_states(model, IDS)
    assert torch.equal(found, expected.last_hidden_state)
    assert torch.equal(found, expected.hidden_states[-1])
    assert found.data_ptr() != expected.last_hidden_state.data_ptr()


def test_the_forward_stops_before_the_head() -> None:
    model = make_model("llama")
    calls: list[int] = []
    model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    last_hidden_states(model, IDS)
    assert not calls
    model(IDS)
    assert calls == [1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("model_type", "fields", "expected"),
    [
        ("granite", {"logits_scaling": 13.0}, (1 / 13, None)),
        ("cohere", {"logit_scale": 0.0625}, (0.0625, None)),
        ("falcon_h1", {"lm_head_multiplier": 0.3}, (0.3, None)),
        ("gemma2", {"final_logit_softcapping": 5.3}, (1.0, 5.3)),
        ("gemma2", {"final_logit_softcapping": None}, (1.0, None)),
        ("nanochat", {}, (1.0, 15.0)),
        ("xlstm", {"output_logit_soft_cap": 30.0}, (1.0, 30.0)),
        ("minicpm3", {}, (1.0, None)),
    ],
)
def test_multiplier_and_cap_are_measured(
    model_type: str, fields: dict[str, Any], expected: tuple[float, float | None], dtype: torch.dtype
) -> None:
    """They are the numbers of the configuration, to the last bit of float32."""
    model = AutoModelForCausalLM.from_config(tiny_config(model_type, **fields), dtype=dtype).eval()
    head = LMHead.of(model)
    for found, number in zip((head.multiplier, head.cap), expected, strict=True):
        assert number == found or torch.equal(torch.tensor(found), torch.tensor(number))


@pytest.mark.parametrize("model_type", ["electra", "rembert", "modernbert-decoder", "minicpm3", "opt"])
def test_layers_before_the_head_belong_to_the_hidden_states(model_type: str) -> None:
    model = tiny_model(model_type)
    LMHead.of(model).verify(model, IDS)


def test_a_head_that_is_not_called_is_refused() -> None:
    model = make_model("llama")
    weight = model.lm_head.weight
    model.lm_head.forward = None
    model.forward = lambda **_: CausalLMOutput(logits=torch.zeros(1, 8, len(weight)))
    for compute in (LMHead.of, lambda model: last_hidden_states(model, IDS)):
        with pytest.raises(ModelError, match="LlamaForCausalLM must call its language-model head"):
            compute(model)


def test_a_head_that_is_called_with_other_states_is_refused() -> None:
    model = make_model("llama")
    forward = model.lm_head.forward
    model.lm_head.forward = lambda hidden: forward(hidden.squeeze(1))
    model.lm_head.register_forward_pre_hook(lambda module, inputs: inputs[0][:, None])
    with pytest.raises(ModelError, match=r"one state for each token; for \[2, 6\] tokens .* \[2, 1, 6, 64\]"):
        LMHead.of(model).verify(model, IDS)
