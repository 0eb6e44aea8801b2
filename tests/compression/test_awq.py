"""AWQ: folding keeps the function for every family, and the search lowers the error after rounding."""

import logging

import pytest
import torch

from nybble.compression import awq
from nybble.compression.awq import AWQ, ValueHeads
from nybble.compression.blocks import DecoderBlocks
from nybble.errors import OptionError
from nybble.models.families import family_of
from nybble.quant.scheme import QuantScheme
from tests.helpers.compression import decoder_blocks, round_to_nearest
from tests.helpers.tiny import FAMILIES, make_config, make_model

SCHEME = QuantScheme(group_size=32)


def schemes(blocks: DecoderBlocks) -> dict[str, QuantScheme]:
    return dict.fromkeys(blocks.layers[0], SCHEME)


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 255, (4, 16))


@pytest.mark.parametrize("family", FAMILIES)
def test_folding_keeps_the_function_of_the_model(
    family: str, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Gemma's norms compute in float32 whatever the dtype of the model.
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    model = make_model(family, dtype=torch.float64)
    before = model(ids).logits
    blocks = decoder_blocks(model, ids)
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    # Factors far from 1, whatever the search would find.
    monkeypatch.setattr(
        awq, "search", lambda weights, gram, heads: awq.factors(gram + torch.eye(len(gram)), 3.0, heads)
    )
    for i, block in enumerate(blocks.modules):
        awq.fold(block, blocks.observe(i), model.config, schemes(blocks))
    assert torch.allclose(model(ids).logits, before, rtol=0, atol=1e-11)
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, weights[name])}
    for mapping in family_of(model.config).awq_mappings:
        for i in range(2):
            for name in (mapping.source, *mapping.layers):
                assert f"model.layers.{i}.{name}.weight" in changed


def test_statistics_fit_the_folded_block(ids: torch.Tensor) -> None:
    model = make_model("qwen2", dtype=torch.float64)
    blocks = decoder_blocks(model, ids)
    statistics = blocks.observe(0)
    original = [shared.gram_II.clone() for shared in statistics]
    assert awq.fold(blocks.modules[0], statistics, model.config, schemes(blocks)) == 4
    assert any(not torch.allclose(old, new.gram_II) for old, new in zip(original, statistics, strict=True))
    measured = decoder_blocks(model, ids).observe(0)
    for folded, again in zip(statistics, measured, strict=True):
        assert torch.allclose(folded.gram_II, again.gram_II)


def test_a_block_that_no_mapping_fits_is_reported(ids: torch.Tensor, caplog: pytest.LogCaptureFixture) -> None:
    model = make_model("llama")
    with caplog.at_level(logging.WARNING, "nybble"):
        AWQ().fold_block("model.layers.0", model.model.layers[0], [], model.config, {})
    assert "model.layers.0: awq folded nothing" in caplog.text
    caplog.clear()
    blocks = decoder_blocks(model, ids)
    with caplog.at_level(logging.WARNING, "nybble"):
        AWQ().fold_block("model.layers.0", blocks.modules[0], blocks.observe(0), model.config, schemes(blocks))
    assert not caplog.text


def test_search_returns_the_factors_with_the_least_weighed_error() -> None:
    weight = torch.randn(64, 64)
    gram = torch.diag(torch.logspace(-3, 3, 64)[torch.randperm(64)])

    def error(s: torch.Tensor) -> float:
        difference = (round_to_nearest(weight * s, SCHEME) - weight * s) / s
        return float((difference.square() * gram.diagonal()).sum())

    best = awq.search({SCHEME: weight}, gram)
    assert error(best) == min(error(awq.factors(gram, alpha)) for alpha in awq.ALPHAS)
    assert error(best) < 0.9 * error(torch.ones(64))
    assert float(best.log().mean()) == pytest.approx(0, abs=1e-5)


def test_equal_inputs_get_factors_of_one() -> None:
    assert torch.allclose(awq.search({SCHEME: torch.randn(16, 64)}, torch.eye(64)), torch.ones(64))


def test_query_heads_that_share_values_get_equal_factors() -> None:
    gram = torch.diag(torch.rand(12) + 0.1)
    factors = awq.factors(gram, 1.0, ValueHeads(count=2, size=3)).view(2, 2, 3)  # 4 query heads, 2 per value head
    assert torch.equal(factors[:, 0], factors[:, 1])
    assert not torch.allclose(factors[0, 0], factors[1, 0])


def test_an_unused_channel_gets_a_bounded_factor() -> None:
    factors = awq.factors(torch.diag(torch.tensor([1.0, 1.0, 0.0])), 1.0)
    assert float(factors.max() / factors.min()) == pytest.approx(1e4, rel=1e-3)


def test_factors_of_a_16_bit_norm_are_read_back_after_rounding() -> None:
    norm = torch.nn.Linear(1, 1)
    norm.weight = torch.nn.Parameter(torch.rand(64).bfloat16() + 0.5, requires_grad=False)
    before, s = norm.weight.float(), torch.rand(64) + 0.5
    used = awq.divide_source(norm, s, 0.0, None)
    assert torch.allclose(norm.weight.float() * used, before, rtol=1e-6)
    assert not torch.allclose(norm.weight.float() * s, before, rtol=1e-6)


def test_columns_are_multiplied_by_what_a_16_bit_norm_was_really_divided_by(ids: torch.Tensor) -> None:
    model, original = make_model("llama", dtype=torch.bfloat16), make_model("llama", dtype=torch.bfloat16)
    blocks = decoder_blocks(model, ids)
    statistics = blocks.observe(0)
    before = statistics[0].gram_II.clone()
    awq.fold(blocks.modules[0], statistics, model.config, schemes(blocks))
    block, original_block = model.model.layers[0], original.model.layers[0]
    used = original_block.input_layernorm.weight.float() / block.input_layernorm.weight.float()
    assert not torch.equal(used, torch.ones(64)), "the search must find factors, or this test shows nothing"
    columns = original_block.self_attn.q_proj.weight.float() * used
    assert torch.equal(block.self_attn.q_proj.weight, columns.bfloat16())
    assert torch.allclose(statistics[0].gram_II, before / used / used[:, None])


def test_a_norm_channel_that_is_off_or_would_be_rounded_off_keeps_its_weight() -> None:
    norm = torch.nn.Linear(1, 1)
    # With the offset 1 the third channel is off, and dividing the first by 60 would round its weight to -1.
    norm.weight = torch.nn.Parameter(torch.tensor([-0.9, 0.0, -1.0]).bfloat16(), requires_grad=False)
    used = awq.divide_source(norm, torch.tensor([60.0, 2.0, 2.0]), 1.0, None)
    assert norm.weight.tolist() == torch.tensor([-0.9, -0.5, -1.0]).bfloat16().tolist()
    assert used.tolist() == [1, 2, 1]


def test_the_last_rows_and_biases_of_a_linear_source_are_divided() -> None:
    source = torch.nn.Linear(2, 5).requires_grad_(False)
    weight, bias = source.weight.clone(), source.bias.clone()
    s = torch.tensor([2.0, 4.0, 8.0])
    assert torch.equal(awq.divide_source(source, s, 0.0, None), s)
    assert torch.equal(source.weight[:2], weight[:2])
    assert torch.equal(source.weight[2:] * s[:, None], weight[2:])
    assert torch.equal(source.bias[:2], bias[:2])
    assert torch.equal(source.bias[2:] * s, bias[2:])


def test_a_family_without_mappings_is_refused_with_the_families_that_have_some() -> None:
    AWQ().check(make_config("llama"))
    config = make_config("llama")
    config.model_type = "granite"
    message = (
        r"no AWQ mappings for granite \(it has them for llama, mistral, .*phi3\); use a method without awq, "
        r"for example se\+gptq"
    )
    with pytest.raises(OptionError, match=message):
        AWQ().check(config)
