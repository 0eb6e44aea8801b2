"""Models whose decoder blocks are no chain of hidden states are refused, with the block that breaks it."""

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM

from nybble.compression.chain import check_chain, find_block_list, nonfinite_remedy, record_blocks
from nybble.errors import ModelError
from nybble.models.selection import select_layers
from tests.helpers.compression import IDS, decoder_blocks
from tests.helpers.tiny import FAMILIES, make_model

NO_CHAIN = (
    r"the blocks of {} must be a chain, each taking nothing but the hidden states .*; block {} is not; use the .* rtn"
)


def check(model: object) -> None:
    check_chain(model, select_layers(model).linears, IDS[:2])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_a_chain(family: str) -> None:
    check(make_model(family))


def test_a_block_that_takes_something_else_from_the_tokens_is_refused() -> None:
    model = make_model("llama")
    original = model.model.layers[1].forward
    token_ids = [torch.zeros(1)]
    model.model.layers[1].forward = lambda hidden_states, **rest: (
        original(hidden_states, **rest) + rest["token_ids"].mean()
    )
    model.model.layers[1].register_forward_pre_hook(
        lambda module, args, kwargs: (args, {"token_ids": token_ids[0]} | kwargs), with_kwargs=True
    )
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: token_ids.insert(0, kwargs["input_ids"].float()), with_kwargs=True
    )
    with pytest.raises(ModelError, match=NO_CHAIN.format("llama", 1)):
        check(model)


def test_a_block_whose_arguments_depend_on_the_batch_is_refused() -> None:
    model = BloomForCausalLM(BloomConfig(vocab_size=256, hidden_size=64, n_layer=2, n_head=4)).eval()
    with pytest.raises(ModelError, match=NO_CHAIN.format("bloom", 0)):
        check(model)


def test_a_block_that_does_not_reproduce_itself_is_refused() -> None:
    model = make_model("llama")
    calls = [0]

    def drift(module: torch.nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        return output * calls[0]

    model.model.layers[1].register_forward_hook(drift)
    with pytest.raises(ModelError, match=NO_CHAIN.format("llama", 1)):
        decoder_blocks(model)


def test_one_large_token_does_not_hide_others_that_differ() -> None:
    model = make_model("llama")
    calls = [0]

    def noise(module: torch.nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        changed = output + torch.randn_like(output) * (calls[0] > 1)
        changed[:, 0] = 1e5
        return changed

    model.model.layers[1].register_forward_hook(noise)
    with pytest.raises(ModelError, match="block 1 is not"):
        check(model)


def test_the_record_has_the_states_around_every_block_and_leaves_no_hooks() -> None:
    model = make_model("llama")
    record = record_blocks(model, list(model.model.layers), IDS[:1])
    assert len(record.arguments) == 2
    assert len(record.hidden) == 3
    assert torch.equal(record.hidden[0], model.model.embed_tokens(IDS[:1]))
    assert not any(layer._forward_pre_hooks or layer._forward_hooks for layer in model.model.layers)


def test_outputs_that_are_not_finite_name_block_and_module() -> None:
    model = make_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    message = r"the outputs of block 1 \(mlp\.down_proj\) must be finite; they are not on this text; .* are broken"
    with pytest.raises(ModelError, match=message):
        check(model)


def test_the_remedy_for_numbers_that_are_not_finite_depends_on_the_dtype() -> None:
    assert nonfinite_remedy(torch.float16) == "use --dtype float32"
    assert nonfinite_remedy(torch.float32) == "the model's weights or this text are broken"


def test_a_model_without_a_list_of_blocks_is_refused() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    with pytest.raises(ModelError, match=r"Sequential must keep its decoder blocks in one nn\.ModuleList"):
        find_block_list(model, ["0"])


def test_the_list_with_most_of_the_layers_is_found() -> None:
    model = make_model("llama")
    model.other = torch.nn.ModuleList([torch.nn.Linear(4, 4)])
    assert find_block_list(model, [*select_layers(model).linears, "other.0"]) == "model.layers"
