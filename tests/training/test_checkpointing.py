"""Gradient checkpointing: the same bits, and fewer activations."""

from typing import Any

import pytest
import torch
from torch import Tensor

from nybble.compression.pipeline import compress
from nybble.models.head import last_hidden_states
from nybble.models.linearize import linearize
from nybble.models.selection import select_layers
from nybble.qat.base import cached_weights
from nybble.qat.insert import insert_fake_quant_layers, insert_fixed_codes_layers
from nybble.training.checkpointing import checkpointed_blocks
from tests.helpers.cases import first_fast
from tests.helpers.mixtures import make_mixture
from tests.helpers.rounding import GROUPS_OF_32
from tests.helpers.tiny import make_model


def trained_model(family: str, rank: int) -> tuple[Any, dict[str, Any]]:
    model = linearize(make_mixture(family)) if family == "mixtral" else make_model(family)
    schemes = dict.fromkeys(select_layers(model).linears, GROUPS_OF_32)
    inits = compress(model.requires_grad_(False), schemes).inits
    if rank:
        return model, insert_fake_quant_layers(model, inits, schemes, rank, 0)
    codes = {name: init.quantized(GROUPS_OF_32) for name, init in inits.items()}
    return model, insert_fixed_codes_layers(model, codes, 0)


def backward(model: Any, layers: dict[str, Any], cached: bool) -> tuple[dict[str, Tensor], int]:
    """Gradients of all trained parameters, and the numbers that the forward kept."""
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    def run() -> None:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            hidden = last_hidden_states(model, ids)
        hidden.float().pow(2).mean().backward()  # type: ignore[no-untyped-call]

    ids = torch.arange(48).view(2, 24)
    model.zero_grad(set_to_none=True)
    if cached:
        with cached_weights(layers.values()):
            run()
    else:
        run()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, sum(kept)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("family", first_fast(1, ["mixtral", "llama", "gemma2"]))
def test_gradients_have_the_same_bits_and_less_is_kept(family: str, rank: int, cached: bool) -> None:
    model, layers = trained_model(family, rank)
    expected, without = backward(model, layers, cached)
    with checkpointed_blocks(model):
        found, kept = backward(model, layers, cached)
    assert len(expected) >= len(layers)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert kept < without / 3
    assert backward(model, layers, cached)[1] == without, "blocks are as before"


def test_a_cache_of_keys_and_values_is_filled_once() -> None:
    from transformers import DynamicCache

    model, _ = trained_model("llama", 4)
    ids = torch.arange(24)[None]
    expected = last_hidden_states(model, ids, use_cache=True, past_key_values=DynamicCache(config=model.config))
    cache = DynamicCache(config=model.config)
    with checkpointed_blocks(model):
        hidden = last_hidden_states(model, ids, use_cache=True, past_key_values=cache)
        hidden.sum().backward()  # type: ignore[no-untyped-call]
    assert torch.equal(hidden, expected)
    assert cache.get_seq_length() == 24
