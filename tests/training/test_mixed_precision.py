"""Which layers get more bits: gains against plain autograd in float64, the greedy choice, and what it is worth."""

import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nybble.errors import ModelError
from nybble.models.linearize import linearize
from nybble.models.selection import select_layers
from nybble.training.mixed_precision import choice_groups, choose_layers, layer_gains
from tests.helpers import mixtures
from tests.helpers.causal_types import tiny_model
from tests.helpers.mixed import Schemes, both_schemes, kl_of_rounded, random_layers, rounded
from tests.helpers.tiny import VOCABULARY, make_model


def slow_gains(model: nn.Module, low: Schemes, high: Schemes, ids: Tensor) -> dict[str, float]:
    """The formula at the top of mixed_precision.py in float64, by autograd and with all gradients at once."""
    model, weights = model.double(), {}
    log_p = model(ids).logits.log_softmax(-1)
    steps = {}
    for name in low:
        linear = model.get_submodule(name)
        low_OI = rounded(linear.weight, low[name]).double()
        steps[name] = low_OI - rounded(linear.weight, high[name]).double() if name in high else low_OI
        linear.weight = weights[name] = nn.Parameter(low_OI)
    log_q = model(ids).logits.log_softmax(-1)
    F.kl_div(log_q.flatten(0, 1), log_p.flatten(0, 1), log_target=True, reduction="batchmean").backward()
    unreached = torch.zeros(())
    return {
        name: float(((unreached if weights[name].grad is None else weights[name].grad) * steps[name]).sum())
        for name in high
    }


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3_moe"])
def test_gains_equal_those_of_autograd(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In batches of two sequences, with a layer that has no high bits, and with experts."""
    monkeypatch.setattr("nybble.training.mixed_precision.TOKENS_PER_BACKWARD", 64)
    model = linearize(mixtures.make_mixture(family)) if family in mixtures.FAMILIES else make_model(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    low, high = both_schemes(model, 3.5)
    del high[next(iter(high))]
    ids = torch.randint(0, VOCABULARY, (3, 32))
    gains = layer_gains(model, low, high, ids)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all("forward" not in module.__dict__ and not module.weight.requires_grad for module in linears(model))
    expected = slow_gains(model, low, high, ids)
    largest = max(map(abs, expected.values()))
    for name, gain in expected.items():
        assert gains[name] == pytest.approx(gain, rel=1e-4, abs=1e-5 * largest), name  # float32 against float64
    assert gains.keys() == high.keys()


def linears(model: nn.Module) -> list[nn.Linear]:
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


def test_one_sensitive_layer_is_found_and_the_map_beats_random_ones() -> None:
    """down_proj of layer 1 has a large weight in every group, whose input is zero: the others share a few codes."""
    model = make_model("llama")
    sensitive = "model.layers.1.mlp.down_proj"
    model.get_submodule(sensitive).weight.data[:, ::32] *= 40
    model.model.layers[1].mlp.up_proj.weight.data[::32] = 0
    ids = torch.randint(0, VOCABULARY, (8, 32))
    low, high = both_schemes(model, 4.5)
    costs = {name: 4 * model.get_submodule(name).weight.numel() for name in low}
    groups, budget = choice_groups(model, list(low)), 0.5 * sum(costs.values()) / 4
    chosen = choose_layers(layer_gains(model, low, high, ids[:4]), costs, groups, budget)
    assert sensitive in chosen
    held_out = ids[4:]
    best = kl_of_rounded(model, low | {name: high[name] for name in chosen}, held_out)
    others = [random_layers(costs, groups, budget, seed) for seed in range(6)]
    without = [names for names in others if sensitive not in names]
    assert len(without) >= 3
    for names in without:
        assert best < 0.8 * kl_of_rounded(model, low | {name: high[name] for name in names}, held_out)
    assert best < 0.8 * kl_of_rounded(model, low, held_out)


def test_what_is_chosen_fits_and_nothing_else_would() -> None:
    draw = random.Random(0)
    for _ in range(50):
        costs = {f"{i}": draw.randint(1, 20) for i in range(12)}
        gains = {name: draw.uniform(-1, 5) for name in costs}
        groups = [["0", "1", "2"], *([name] for name in list(costs)[3:])]
        budget = draw.uniform(0, 150)
        chosen = choose_layers(gains, costs, groups, budget)
        spent = sum(costs[name] for name in chosen)
        assert spent <= budget
        assert {"0", "1", "2"} <= chosen or not {"0", "1", "2"} & chosen
        for names in groups:
            assert names[0] in chosen or spent + sum(costs[name] for name in names) > budget
        assert chosen == choose_layers(gains, costs, groups, budget)


def test_layers_that_runtimes_compute_as_one_are_chosen_together() -> None:
    model = make_model("llama")
    names = [name for name in select_layers(model).linears if not name.endswith("1.self_attn.k_proj")]
    groups = choice_groups(model, names)
    assert sorted(name for group in groups for name in group) == sorted(names)
    assert [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.k_proj",
        "model.layers.0.self_attn.v_proj",
    ] in (groups)
    assert ["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"] in groups
    assert ["model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj"] in groups
    assert ["model.layers.1.mlp.down_proj"] in groups


def test_all_experts_of_a_layer_are_chosen_together() -> None:
    model = linearize(mixtures.make_mixture("deepseek_v3"))
    groups = choice_groups(model, select_layers(model).linears)
    (experts,) = (group for group in groups if "model.layers.1.mlp.experts.0.down_proj" in group)
    assert len(experts) == 2 * mixtures.EXPERTS
    assert ["model.layers.1.self_attn.q_a_proj", "model.layers.1.self_attn.kv_a_proj_with_mqa"] in groups


def test_a_model_without_gradients_is_refused_and_left_as_it_was() -> None:
    model = make_model("llama")
    low, high = both_schemes(model, 4.5)
    ids = torch.randint(0, VOCABULARY, (1, 8))
    norm = model.model.layers[1].input_layernorm
    handle = norm.register_forward_hook(lambda module, inputs, output: output.detach())
    assert set(layer_gains(model, low, high, ids)) == set(high), "through the residual stream"
    handle.remove()
    model.model.norm.register_forward_hook(lambda module, inputs, output: output.detach())
    with pytest.raises(ModelError, match="LlamaForCausalLM must have gradients, by which an average of --bits chooses"):
        layer_gains(model, low, high, ids)
    assert all("forward" not in module.__dict__ for module in linears(model))


def test_a_model_that_changes_outputs_in_place_has_gains() -> None:
    """RoCBert adds to the outputs of a linear layer with a bias in place."""
    model = tiny_model("roc_bert")
    low, high = both_schemes(model, 3.5)
    gains = layer_gains(model, low, high, torch.randint(0, VOCABULARY, (1, 16)))
    assert any(gains.values())
