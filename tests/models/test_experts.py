import pytest
import torch
from torch import nn

from nybble.models.experts import RoutedExperts, SplitExperts, split_experts
from nybble.models.linearize import linearize
from nybble.models.selection import routing_layers, select_layers, three_axis_parameters
from tests.helpers.cases import fast_cases
from tests.helpers.mixtures import EXPERTS, FAMILIES, make_mixture
from tests.helpers.tiny import make_model

FAST = ("mixtral", "gpt_oss", "llama4", "deepseek_v3", "jetmoe", "nemotron_h")
TOKENS = torch.arange(2 * 40).view(2, 40) * 7 % 256


def logits(model):
    with torch.no_grad():
        return model(input_ids=TOKENS, use_cache=False).logits


@pytest.mark.parametrize("family", fast_cases(FAMILIES, FAST))
def test_split_experts_compute_what_the_stacked_ones_do(family):
    model = make_mixture(family)
    expected = logits(model)
    split_experts(model)
    assert any(isinstance(module, SplitExperts) for module in model.modules())
    assert not three_axis_parameters(model)
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "family", fast_cases(sorted(set(FAMILIES) - {"longcat_flash"}), FAST)
)  # which stores unused weights
def test_no_weight_is_lost(family):
    model = make_mixture(family)
    before = sum(parameter.double().square().sum() for parameter in model.parameters())
    split_experts(model)
    after = sum(parameter.double().square().sum() for parameter in model.parameters())
    torch.testing.assert_close(after, before)


def test_the_experts_share_the_memory_of_the_stack():
    model = make_mixture("mixtral")
    stack = model.model.layers[0].mlp.experts.gate_up_proj
    split_experts(model)
    for i in range(EXPERTS):
        weight = model.model.layers[0].mlp.experts.get_submodule(f"{i}.gate_up_proj").weight
        assert weight.data_ptr() == stack[i].data_ptr()


def test_transposed_experts_keep_weights_and_biases():
    model = make_mixture("gpt_oss")
    experts = model.model.layers[0].mlp.experts
    weight, bias = experts.gate_up_proj.clone(), experts.gate_up_proj_bias.clone()
    split_experts(model)
    for i in range(EXPERTS):
        linear = experts.get_submodule(f"{i}.gate_up_proj")
        assert torch.equal(linear.weight, weight[i].T)
        assert torch.equal(linear.bias, bias[i])


def test_a_model_on_the_meta_device_gets_the_same_names():
    with torch.device("meta"):
        empty = make_mixture("gpt_oss")
    model = make_mixture("gpt_oss")
    linearize(empty)
    linearize(model)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert {name: tensor.shape for name, tensor in empty.state_dict().items()} == shapes


def test_a_second_split_changes_nothing():
    model = make_mixture("mixtral")
    linearize(model)
    names = list(model.state_dict())
    linearize(model)
    assert list(model.state_dict()) == names


def test_dense_models_stay_as_they_are():
    llama = make_model("llama")
    names = list(llama.state_dict())
    linearize(llama)
    assert list(llama.state_dict()) == names


def split_layer(family="mixtral"):
    model = make_mixture(family)
    linearize(model)
    return model.model.layers[0].mlp.experts


def test_an_expert_without_tokens_is_not_called():
    experts, called = split_layer(), []
    for i in range(EXPERTS):
        experts.get_submodule(f"{i}.down_proj").register_forward_hook(lambda *_, i=i: called.append(i))
    experts(torch.randn(3, 64), torch.tensor([[0, 2], [2, 0], [2, 0]]), torch.ones(3, 2))
    assert called == [0, 2]


def test_an_expert_is_called_with_its_own_tokens_in_their_order():
    experts, seen = split_layer(), {}
    for i in range(EXPERTS):
        linear = experts.get_submodule(f"{i}.gate_up_proj")
        linear.register_forward_pre_hook(lambda module, args, i=i: seen.update({i: args[0]}))
    hidden = torch.randn(3, 64)
    experts(hidden, torch.tensor([[0, 1], [3, 0], [1, 3]]), torch.ones(3, 2))
    assert {i: part.tolist() for i, part in seen.items()} == {
        0: hidden[[0, 1]].tolist(),
        1: hidden[[0, 2]].tolist(),
        3: hidden[[1, 2]].tolist(),
    }


def test_choices_above_the_last_expert_add_nothing():
    experts = split_layer()
    hidden, weights = torch.randn(5, 64), torch.rand(5, 2)
    index = torch.tensor([[0, EXPERTS]] * 5)
    expected = experts(hidden, index[:, :1], weights[:, :1])
    torch.testing.assert_close(experts(hidden, index, weights), expected)


def test_no_tokens_give_no_outputs():
    experts = split_layer()
    assert experts(torch.randn(0, 64), torch.zeros(0, 2, dtype=torch.int64), torch.ones(0, 2)).shape == (0, 64)


def test_gradients_reach_the_experts_that_have_tokens():
    experts = split_layer()
    for parameter in experts.parameters():
        parameter.requires_grad_(True)
    experts(torch.randn(3, 64), torch.tensor([[0], [0], [2]]), torch.ones(3, 1)).sum().backward()
    with_gradient = [i for i in range(EXPERTS) if experts.get_submodule(f"{i}.down_proj").weight.grad is not None]
    assert with_gradient == [0, 2]


@pytest.mark.parametrize(
    ("family", "routers"),
    [
        ("mixtral", []),  # a parameter
        ("qwen2_moe", ["mlp.shared_expert_gate"]),
        ("llama4", ["feed_forward.router"]),
        ("phimoe", ["mlp.router"]),
        ("jetmoe", ["mlp.router.layer", "self_attention.experts.router.layer"]),
        ("longcat_flash", ["mlp.router.classifier"]),
    ],
)
def test_routers_stay_in_16_bits(family, routers):
    model = make_mixture(family)
    linearize(model)
    found = {name.split(".", 3)[-1] for name in routing_layers(model)}
    assert found == set(routers)
    assert not set(routing_layers(model)) & set(select_layers(model).linears)


def test_routers_of_experts_in_a_list_stay_in_16_bits():
    class Mixture(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = nn.Linear(8, 3)
            self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
            self.shared_expert = nn.Linear(8, 3)  # as many outputs as experts, by chance

    assert routing_layers(nn.ModuleDict({"mlp": Mixture()})) == ["mlp.gate"]


def test_all_experts_get_4_bits():
    model = make_mixture("qwen3_moe")
    linearize(model)
    experts = [name for name in select_layers(model).linears if ".experts." in name]
    assert experts == [
        f"model.layers.0.mlp.experts.{i}.{leaf}" for i in range(4) for leaf in ("gate_up_proj", "down_proj")
    ]


def test_kinds_are_subclasses_of_the_models_own_class():
    experts = split_layer()
    assert isinstance(experts, RoutedExperts)
    assert type(experts).__name__ == "MixtralExperts"
