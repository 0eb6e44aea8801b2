"""Training of norm weights: relative shifts on real model families."""

import pytest
import torch
from torch import nn
from transformers import FalconMambaConfig, FalconMambaForCausalLM

from nybble.qat.norms import RelativeShift, bake_norms, make_norms_trainable
from tests.helpers.tiny import make_model


@pytest.mark.parametrize(("family", "offset", "norms"), [("gemma2", 1.0, 2 * 4 + 1), ("smollm", 0.0, 2 * 2 + 1)])
def test_a_shift_moves_a_norm_relative_to_its_mean_factor(family: str, offset: float, norms: int) -> None:
    model = make_model(family)
    shifts = make_norms_trainable(model)
    assert len(shifts) == norms
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == {
        name.removesuffix("shift") + "parametrizations.weight.0.shift" for name in shifts
    }
    before = model.model.norm.weight.clone()
    with torch.no_grad():
        shifts["model.norm.shift"].fill_(0.01)
    torch.testing.assert_close(model.model.norm.weight, before + 0.01 * (offset + before).abs().mean())


def test_untrained_norms_compute_the_same_outputs() -> None:
    model, ids = make_model("gemma2"), torch.arange(12)[None]
    with torch.no_grad():
        before = model(ids).logits
        make_norms_trainable(model)
        assert torch.equal(model(ids).logits, before)


def test_baked_norms_are_plain_frozen_parameters_with_the_trained_values() -> None:
    model = make_model("smollm")
    keys = list(model.state_dict())
    for shift in make_norms_trainable(model).values():
        nn.init.constant_(shift, 0.01)
    trained = model.model.norm.weight.clone()
    bake_norms(model)
    assert torch.equal(model.model.norm.weight, trained)
    assert sorted(model.state_dict()) == sorted(keys)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_baking_untrained_norms_changes_nothing() -> None:
    model = make_model("smollm")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    bake_norms(model)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_shifts_are_float32_and_norms_keep_their_dtype() -> None:
    weight = torch.full((4,), 2.0, dtype=torch.bfloat16)
    shift = RelativeShift(weight, offset=1.0)
    assert (shift.size, shift.shift.dtype) == (3.0, torch.float32)
    nn.init.constant_(shift.shift, 0.5)
    shifted = shift(weight)
    assert shifted.dtype == torch.bfloat16
    assert shifted.tolist() == [3.5] * 4


def test_fixed_weights_of_norms_are_not_trained() -> None:
    """Falcon Mamba normalizes inside its scan with weights that are no parameters and in no checkpoint."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "state_size": 16, "time_step_rank": 32}
    model = FalconMambaForCausalLM(FalconMambaConfig(vocab_size=260, **sizes))
    assert set(make_norms_trainable(model)) == {"backbone.layers.0.norm.shift", "backbone.norm_f.shift"}
