"""Checks before the expensive part."""

import pytest
import torch

from nybble.compression.checks import check_model
from nybble.errors import ModelError, OptionError
from nybble.models.selection import select_layers
from tests.helpers.compression import IDS, break_chain
from tests.helpers.dense import make_dense
from tests.helpers.tiny import make_model


def test_a_layer_whose_weight_is_used_without_a_call_is_refused() -> None:
    model = make_model("llama")
    names = select_layers(model).int4
    check_model(model, names, IDS[:2], ())
    mlp = model.model.layers[1].mlp
    mlp.forward = lambda x: mlp.down_proj(mlp.gate_proj(x) * torch.nn.functional.linear(x, mlp.up_proj.weight))
    message = (
        r"LlamaForCausalLM must call the layers that get 4 bits; it uses the weight of model\.layers\.1\.mlp\.up_proj "
        r"without calling the layer \(1 such layers\); the model cannot be compressed"
    )
    with pytest.raises(ModelError, match=message):
        check_model(model, names, IDS[:2], ())
    assert not any(module._forward_hooks for module in model.modules()), "the hooks are removed after an error too"


def test_an_expert_without_tokens_is_no_error() -> None:
    model = make_model("llama")
    model.unused = torch.nn.ModuleDict({"expert": torch.nn.Linear(4, 4)})
    check_model(model, [*select_layers(model).int4, "unused.expert"], IDS[:2], ())


def test_methods_check_the_model() -> None:
    model = make_dense("gpt_neo")
    behind_gelu = [name for name in select_layers(model).int4 if name.endswith("c_proj")]
    with pytest.raises(OptionError, match="gpt_neo has none"):
        check_model(model, behind_gelu, IDS[:2], ("awq", "se"))
    check_model(model, behind_gelu, IDS[:2], ("se",))


def test_only_methods_that_need_calibration_text_need_a_chain_of_blocks() -> None:
    model = make_model("llama")
    break_chain(model)
    check_model(model, select_layers(model).int4, IDS[:2], ())
    with pytest.raises(ModelError, match="block 1 is not; use the method rtn"):
        check_model(model, select_layers(model).int4, IDS[:2], ("se",))
