"""Mixtures of experts in OpenVINO: the same weights, the same logits, and only the chosen experts are computed."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from nybble.export.openvino.experts import graph_weights, stack_places, trace_experts
from nybble.export.openvino.exporter import MODEL_XML, OpenVINOExporter
from nybble.export.places import Place
from nybble.models.linearize import linearize
from nybble.quant.scheme import QuantScheme
from tests.helpers.checkpoints import save_checkpoint, save_uneven_mixture
from tests.helpers.mixtures import EXPERTS, FAMILIES, make_mixture

openvino = pytest.importorskip("openvino")

# Products that compute the chosen experts only, for each layer with experts: gate, up and down; or gate and up in one.
# None where the plugin does not know the pattern, and all experts are computed: no gates, inputs scaled by the router,
# experts that return their inputs, rows of one expert each.
PRODUCTS = {
    "mixtral": 3, "qwen2_moe": 3, "qwen3_moe": 3, "gpt_oss": 2, "glm4_moe": 3, "granitemoe": 3, "olmoe": 3,
    "ernie4_5_moe": 3, "phimoe": 3, "deepseek_v2": 3, "deepseek_v3": 3, "lfm2_moe": 3, "qwen3_5_moe": 3,
    "qwen3_next": 3, "kimi_linear": 3, "nemotron_h": 0, "llama4": 0, "longcat_flash": 0, "jetmoe": 0,
}  # fmt: skip
FAST = {"mixtral"}  # gpt_oss is tested with several schemes


def linear_mixture(family: str, **changes: Any) -> Any:
    model = make_mixture(family, **changes)
    linearize(model)
    return model


@pytest.mark.parametrize(
    "family", [family if family in FAST else pytest.param(family, marks=pytest.mark.slow) for family in PRODUCTS]
)
def test_a_mixture_has_the_logits_of_torch_and_computes_the_chosen_experts_only(family: str, tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path / "quantized", linear_mixture(family))
    folder = tmp_path / "openvino"
    folder.mkdir()
    result = OpenVINOExporter().export(checkpoint, folder)  # compares codes, and logits of a prompt and of decoding
    assert result.linear_weights == len(checkpoint.selection.linears)
    assert result.rounded == {}
    assert result.logit_difference is not None
    assert result.logit_difference < 2e-4
    compiled = openvino.Core().compile_model(folder / MODEL_XML, "CPU").get_runtime_model()
    kinds = Counter(str(node.get_rt_info()["layerType"].astype(str)) for node in compiled.get_ops())
    layers = sum(".experts.0.down_proj" in name for name in checkpoint.shapes)
    assert kinds["GatherMatmul"] == PRODUCTS[family] * layers


@pytest.mark.slow
def test_experts_with_an_odd_number_of_groups_are_read_back(tmp_path: Path) -> None:
    """Zero points of one expert end in the middle of a byte."""
    model = linear_mixture(
        "mixtral", hidden_size=96, intermediate_size=97 * 32, num_attention_heads=3, num_key_value_heads=1
    )
    checkpoint = save_checkpoint(tmp_path / "quantized", model, QuantScheme(group_size=32))
    folder = tmp_path / "openvino"
    folder.mkdir()
    OpenVINOExporter().write(checkpoint, folder)
    assert OpenVINOExporter().compare_weights(checkpoint.quantized, folder) == {}


@pytest.mark.parametrize("family", PRODUCTS)
def test_the_traced_forward_computes_what_the_experts_do(family: str) -> None:
    model = linear_mixture(family)
    ids = torch.arange(24)[None]
    expected = model(input_ids=ids, use_cache=False).logits
    shapes = {name: tuple(module.weight.shape) for name, module in model.named_modules() if is_linear(module)}
    stacks = graph_weights(model, shapes, dict.fromkeys(shapes, QuantScheme()))
    linears = dict(model.named_modules())

    def weight_of(name: str) -> torch.Tensor:
        return torch.stack([linears[place.name].weight[place.rows] for place in stacks[name]])

    trace_experts(model, weight_of, stacks)
    torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    "family", ["gpt_oss", *(pytest.param(f, marks=pytest.mark.slow) for f in ("llama4", "mixtral"))]
)
def test_experts_with_different_schemes_or_none_have_the_logits_of_torch(family: str, tmp_path: Path) -> None:
    checkpoint = save_uneven_mixture(tmp_path / "quantized", linear_mixture(family))
    assert len({checkpoint.selection.schemes.get(name) for name in expert_layers(family, "down_proj")}) == 3
    folder = tmp_path / "openvino"
    folder.mkdir()
    result = OpenVINOExporter().export(checkpoint, folder)  # compares codes, and logits of a prompt and of decoding
    assert result.rounded == {}


def expert_layers(family: str, leaf: str) -> list[str]:
    """The experts of the last decoder layer."""
    mixture = "feed_forward" if family == "llama4" else "mlp"
    return [f"model.layers.1.{mixture}.experts.{i}.{leaf}" for i in range(EXPERTS)]


def is_linear(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Linear)


def test_gates_and_the_rows_behind_them_are_weights_of_their_own() -> None:
    model = linear_mixture("qwen3_moe")
    shapes = {name: tuple(module.weight.shape) for name, module in model.named_modules() if is_linear(module)}
    weights = graph_weights(model, shapes, dict.fromkeys(shapes, QuantScheme()))
    path = "model.layers.0.mlp.experts"
    for part in range(2):
        name, rows = f"{path}.*.gate_up_proj.{part}", slice(32 * part, 32 * part + 32)
        assert weights[name] == [Place(name, f"{path}.{i}.gate_up_proj", rows, i) for i in range(EXPERTS)]
        assert stack_places(name, (EXPERTS, 32, 1, 64)) == weights[name]  # as a saved graph has it
    assert weights["lm_head"] == [Place("lm_head", "lm_head")]
    assert not any(f"{path}.{i}.gate_up_proj" in weights for i in range(EXPERTS))


def test_every_mixture_is_tried() -> None:
    assert PRODUCTS.keys() == FAMILIES.keys()
