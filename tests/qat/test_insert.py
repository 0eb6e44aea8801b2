"""Insertion of trained layers into a model, and rounding of the embedding."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from nybble.compression.init import QuantizedInit
from nybble.models.selection import select_layers
from nybble.qat import insert
from nybble.quant.grid import min_max_qparams
from nybble.quant.scheme import INT8_PER_ROW
from tests.helpers.qat_layers import SCHEME
from tests.helpers.tiny import make_model

IDS = torch.arange(12)[None]
Insert = Callable[[nn.Module, dict[str, QuantizedInit], int], dict[str, nn.Module]]


def rtn_inits(model: nn.Module) -> dict[str, QuantizedInit]:
    """Every decoder layer compressed by round-to-nearest, in reverse order of the modules."""
    weights = {name: model.get_submodule(name).weight.detach() for name in reversed(select_layers(model).linears)}
    return {name: QuantizedInit(weight, *min_max_qparams(weight, SCHEME)) for name, weight in weights.items()}


def insert_fake_quant(model: nn.Module, inits: dict[str, QuantizedInit], seed: int) -> dict[str, nn.Module]:
    return dict(insert.insert_fake_quant_layers(model, dict(inits), dict.fromkeys(inits, SCHEME), 4, seed))


def insert_fixed_codes(model: nn.Module, inits: dict[str, QuantizedInit], seed: int) -> dict[str, nn.Module]:
    weights = {name: init.quantized(SCHEME) for name, init in inits.items()}
    return dict(insert.insert_fixed_codes_layers(model, weights, seed))


def insert_lora(model: nn.Module, inits: dict[str, QuantizedInit], seed: int) -> dict[str, nn.Module]:
    return dict(insert.insert_lora_layers(model, inits, 4, seed))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("insert_layers", [insert_fake_quant, insert_fixed_codes, insert_lora])
@pytest.mark.parametrize("family", ["qwen2", "phi3"])  # with biases; with fused projections
def test_an_untrained_model_computes_with_the_compressed_weights(insert_layers: Insert, family: str) -> None:
    model = make_model(family)
    inits = rtn_inits(model)
    layers = insert_layers(model, inits, 0)
    assert list(layers) == list(inits)
    assert all(model.get_submodule(name) is layer for name, layer in layers.items())
    expected = make_model(family)
    if insert_layers is not insert_lora:
        for name, init in inits.items():
            expected.get_submodule(name).weight.data = init.quantized(SCHEME).dequantize()
    assert torch.equal(logits(model), logits(expected))


@pytest.mark.parametrize("insert_layers", [insert_fake_quant, insert_fixed_codes, insert_lora])
def test_random_parameters_depend_on_the_seed_only(insert_layers: Insert) -> None:
    def trained_parameters(seed: int) -> list[Tensor]:
        torch.rand(1)  # the global generator must not matter
        model = make_model("smollm", num_hidden_layers=1)
        layers = insert_layers(model, rtn_inits(model), seed).values()
        return [parameter for layer in layers for parameter in layer.parameters() if parameter.requires_grad]

    first, again, other = (trained_parameters(seed) for seed in (0, 0, 1))
    assert all(torch.equal(ours, same) for ours, same in zip(first, again, strict=True))
    assert not all(torch.equal(ours, different) for ours, different in zip(first, other, strict=True))


@pytest.mark.parametrize("insert_layers", [insert_fake_quant, insert_lora])
def test_the_weights_of_the_model_are_shared(insert_layers: Insert) -> None:
    model = make_model("smollm", num_hidden_layers=1)
    name = "model.layers.0.self_attn.q_proj"
    before = model.get_submodule(name).weight.data_ptr()
    assert insert_layers(model, rtn_inits(model), 0)[name].weight.data_ptr() == before


@pytest.mark.parametrize("insert_layers", [insert_fake_quant, insert_fixed_codes, insert_lora])
def test_layers_compute_in_the_dtype_of_the_model(insert_layers: Insert) -> None:
    model = make_model("smollm", dtype=torch.bfloat16, num_hidden_layers=1)
    layers = insert_layers(model, rtn_inits(model), 0)
    assert {layer.dtype for layer in layers.values()} == {torch.bfloat16}
    assert logits(model).dtype == torch.bfloat16


def test_an_embedding_is_rounded_to_8_bits_per_row() -> None:
    model = make_model("smollm", num_hidden_layers=1)
    weight = model.model.embed_tokens.weight
    expected = QuantizedInit(weight.clone(), *min_max_qparams(weight, INT8_PER_ROW)).quantized(INT8_PER_ROW)
    (quantized,) = insert.quantize_embeddings(model, dict.fromkeys(["model.embed_tokens"], INT8_PER_ROW)).values()
    assert torch.equal(quantized.codes_OI, expected.codes_OI)
    assert torch.equal(quantized.scale_OG, expected.scale_OG)
    assert quantized.zero_point_OG.dtype == torch.uint8
    assert (quantized.zero_point_OG == 128).all()
    assert quantized.scheme == INT8_PER_ROW
    assert torch.equal(weight, quantized.dequantize())
    assert model.lm_head.weight is weight, "a tied head must stay tied"


def test_an_untied_head_is_rounded_by_itself() -> None:
    model = make_model("llama", num_hidden_layers=1)
    names = select_layers(model).embeddings
    quantized = insert.quantize_embeddings(model, dict.fromkeys(names, INT8_PER_ROW))
    assert list(quantized) == list(names) == ["model.embed_tokens", "lm_head"]
    for name, weight in quantized.items():
        assert torch.equal(model.get_submodule(name).weight, weight.dequantize())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_in_chunks_equals_rounding_at_once(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    models = [make_model("smollm", dtype=dtype, num_hidden_layers=1) for _ in range(2)]
    (whole,) = insert.quantize_embeddings(models[0], dict.fromkeys(["model.embed_tokens"], INT8_PER_ROW)).values()
    monkeypatch.setattr(insert, "_ROWS_PER_CHUNK", 7)
    (chunks,) = insert.quantize_embeddings(models[1], dict.fromkeys(["model.embed_tokens"], INT8_PER_ROW)).values()
    assert torch.equal(chunks.codes_OI, whole.codes_OI)
    assert torch.equal(chunks.scale_OG, whole.scale_OG)
    assert torch.equal(chunks.zero_point_OG, whole.zero_point_OG)
    assert torch.equal(models[1].model.embed_tokens.weight, models[0].model.embed_tokens.weight)
