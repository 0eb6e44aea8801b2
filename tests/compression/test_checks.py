"""Checks before the expensive part."""

from pathlib import Path
from typing import Any

import pytest
import torch

from nybble.compression.checks import check_model
from nybble.compression.methods import automatic_method
from nybble.errors import ModelError, OptionError
from nybble.models.loading import load
from nybble.models.selection import select_layers
from tests.helpers.causal_types import save_tiny, tiny_model
from tests.helpers.compression import IDS, break_chain
from tests.helpers.dense import make_dense
from tests.helpers.tiny import make_model


def test_a_layer_whose_weight_is_used_without_a_call_is_refused() -> None:
    model = make_model("llama")
    names = select_layers(model).linears
    check_model(model, names, IDS[:2], ())
    mlp = model.model.layers[1].mlp
    mlp.forward = lambda x: mlp.down_proj(mlp.gate_proj(x) * torch.nn.functional.linear(x, mlp.up_proj.weight))
    message = (
        r"LlamaForCausalLM must call the layers that get 4 bits; it uses the weight of model\.layers\.1\.mlp\.up_proj "
        r"without calling the layer \(1 such layers\); leave them in 16 bits with --ignore \"\*\.up_proj\""
    )
    with pytest.raises(ModelError, match=message):
        check_model(model, names, IDS[:2], ())
    assert not any(module._forward_hooks for module in model.modules()), "the hooks are removed after an error too"


def add_layers(model: Any, *names: str) -> list[str]:
    """Linear layers in model.model.layers.1.more, of which the first is called."""
    block, mlp = model.model.layers[1], model.model.layers[1].mlp.forward
    block.more = torch.nn.ModuleDict({name: torch.nn.Linear(64, 64) for name in names})
    block.mlp.forward = lambda x: mlp(x) + block.more[names[0]](x)
    return [*select_layers(model).linears]


def test_an_expert_without_tokens_is_no_error() -> None:
    model = make_model("llama")
    names = add_layers(model, "used", "unused")
    assert "model.layers.1.more.unused" in names
    check_model(model, names, IDS[:2], ())


def test_layers_that_text_does_not_reach_are_refused() -> None:
    model = make_model("llama")
    model.model.vision = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.Linear(64, 64)])})
    message = r"alone; text does not reach 1 layers \(first: model.vision.layers.0\), which read an encoder or images"
    with pytest.raises(ModelError, match=message):
        check_model(model, select_layers(model).linears, IDS[:2], ())


def test_a_model_that_cannot_compute_in_16_bits_is_refused(tmp_path: Path) -> None:
    model = load(str(save_tiny(tmp_path / "model", "reformer")), torch.bfloat16, torch.device("cpu")).model
    names = select_layers(model).linears
    message = r"ReformerModelWithLMHead must compute in bfloat16; it does not \(mixed dtype .*\); use --dtype float32"
    for check in (lambda: check_model(model, names, IDS[:2], ()), lambda: automatic_method(model, names)):
        with pytest.raises(ModelError, match=message):
            check()
    model.forward = lambda **_: torch.nn.functional.linear(torch.zeros(2), torch.zeros(3, 3))
    with pytest.raises(RuntimeError, match="mat") as error:
        check_model(model, names, IDS[:2], ())
    assert not isinstance(error.value, ModelError)


@pytest.mark.parametrize("model_type", ["bart", "prophetnet", "git", "phi4_multimodal"])
def test_cross_attention_and_images_are_refused(model_type: str) -> None:
    model = tiny_model(model_type)
    with pytest.raises(ModelError, match=r"must be a language model alone; text does not reach \d+ layers"):
        check_model(model, select_layers(model).linears, IDS[:2], ())


@pytest.mark.parametrize(("model_type", "fields"), [("bert", {"is_decoder": False}), ("xlm", {"causal": False})])
def test_models_that_are_not_causal_are_refused(model_type: str, fields: dict[str, Any]) -> None:
    causal, model = tiny_model(model_type), tiny_model(model_type, **fields)
    check_model(causal, select_layers(causal).linears, IDS[:2], ())
    message = r"must predict a token from the tokens before it; its states change by 0\.\d+ with later tokens; choose a"
    with pytest.raises(ModelError, match=message):
        check_model(model, select_layers(model).linears, IDS[:2], ())


def test_a_model_that_changes_its_weights_is_refused() -> None:
    model = tiny_model("rwkv")
    message = (
        r"RwkvForCausalLM must leave its weights as they are .* changes 4 of them \(first: rwkv.blocks.0.attention"
    )
    with pytest.raises(ModelError, match=message):
        check_model(model, select_layers(model).linears, IDS[:2], ())


def test_methods_check_the_model() -> None:
    model = make_dense("gpt_neo")
    behind_gelu = [name for name in select_layers(model).linears if name.endswith("c_proj")]
    with pytest.raises(OptionError, match="gpt_neo has none"):
        check_model(model, behind_gelu, IDS[:2], ("awq", "se"))
    check_model(model, behind_gelu, IDS[:2], ("se",))


def test_only_methods_that_need_calibration_text_need_a_chain_of_blocks() -> None:
    model = make_model("llama")
    break_chain(model)
    check_model(model, select_layers(model).linears, IDS[:2], ())
    with pytest.raises(ModelError, match="block 1 is not; use the method rtn"):
        check_model(model, select_layers(model).linears, IDS[:2], ("se",))
