"""AWQ: folding keeps the function for every family, and the search lowers the error after rounding."""

import logging
from collections import defaultdict

import pytest
import torch

from nybble.compression import awq, awq_mappings
from nybble.compression.awq import AWQ
from nybble.compression.awq_mappings import find_mappings
from nybble.compression.block_trial import BlockTrial
from nybble.compression.blocks import InputStatistics
from nybble.errors import OptionError
from nybble.models.linearize import linearize
from nybble.models.selection import select_layers
from nybble.quant.scheme import QuantScheme
from tests.helpers.blocks import Chained, Experts
from tests.helpers.compression import decoder_blocks, round_to_nearest
from tests.helpers.dense import DENSE_CASES, make_dense
from tests.helpers.mixtures import make_mixture
from tests.helpers.tiny import make_model

SCHEME = QuantScheme(group_size=32)
EVERYWHERE: dict[str, QuantScheme] = defaultdict(lambda: SCHEME)


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 255, (4, 16))


@pytest.mark.parametrize("name", DENSE_CASES)
def test_folding_keeps_the_function_of_the_model(name: str, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_dense(name, dtype=torch.float64)
    found = find_mappings(model, select_layers(model).linears)
    # The norms of some models compute in float32 whatever the dtype of the model.
    to = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(
        torch.Tensor, "to", lambda x, *args, **rest: x.double() if args == (torch.float32,) else to(x, *args, **rest)
    )
    before = model(ids).logits
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    # Factors far from 1, whatever the search would find.
    monkeypatch.setattr(
        awq,
        "search",
        lambda parts, channel: awq.factors(parts[0][1] + torch.eye(len(parts[0][1])), 3.0, channel),
    )
    blocks = decoder_blocks(model, ids, batch=1)  # bloom's blocks take single sequences only
    for i, block in enumerate(blocks.modules):
        awq.fold(block, found[blocks.prefixes[i][:-1]], blocks.observe(i), EVERYWHERE)
    assert torch.allclose(model(ids).logits, before, rtol=0, atol=1e-11)
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, weights[name])}
    for path, mappings in found.items():
        for mapping in mappings:
            for module in (mapping.source, *mapping.layers):
                assert f"{path}.{module}.weight" in changed


def test_statistics_fit_the_folded_block(ids: torch.Tensor) -> None:
    model = make_model("qwen2", dtype=torch.float64)
    blocks = decoder_blocks(model, ids)
    statistics = blocks.observe(0)
    original = [shared.gram_II.clone() for shared in statistics]
    mappings = find_mappings(model, select_layers(model).linears)["model.layers.0"]
    assert len(mappings) == 4
    awq.fold(blocks.modules[0], mappings, statistics, EVERYWHERE)
    assert any(not torch.allclose(old, new.gram_II) for old, new in zip(original, statistics, strict=True))
    measured = decoder_blocks(model, ids).observe(0)
    for folded, again in zip(statistics, measured, strict=True):
        assert torch.allclose(folded.gram_II, again.gram_II)


def test_what_is_folded_is_said_once_for_each_kind_of_block(caplog: pytest.LogCaptureFixture) -> None:
    model = make_model("llama")
    with caplog.at_level(logging.INFO, "nybble"):
        AWQ().prepare(model, select_layers(model).linears)
    assert [record.getMessage() for record in caplog.records] == [
        "awq folds in 2 blocks like model.layers.0: input_layernorm -> q_proj + k_proj + v_proj, self_attn.v_proj -> "
        "o_proj, post_attention_layernorm -> gate_proj + up_proj, mlp.up_proj -> down_proj"
    ]


def test_experts_are_counted_and_not_listed(caplog: pytest.LogCaptureFixture) -> None:
    model = linearize(make_mixture("mixtral"))
    with caplog.at_level(logging.INFO, "nybble"):
        AWQ().prepare(model, select_layers(model).linears)
    experts = "post_attention_layernorm -> 4 gate_up_proj, mlp.experts.N.gate_up_proj -> down_proj (4 times)"
    assert caplog.records[0].getMessage().endswith(experts)


def test_search_returns_the_factors_with_the_least_weighed_error() -> None:
    weight = torch.randn(64, 64)
    gram = torch.diag(torch.logspace(-3, 3, 64)[torch.randperm(64)])

    def error(s: torch.Tensor) -> float:
        difference = (round_to_nearest(weight * s, SCHEME) - weight * s) / s
        return float((difference.square() * gram.diagonal()).sum())

    best = awq.search([awq.Part(weight, gram, SCHEME)])
    assert error(best) == min(error(awq.factors(gram, alpha)) for alpha in awq.ALPHAS)
    assert error(best) < 0.9 * error(torch.ones(64))
    assert float(best.log().mean()) == pytest.approx(0, abs=1e-5)


def test_equal_inputs_get_factors_of_one() -> None:
    assert torch.allclose(awq.search([awq.Part(torch.randn(16, 64), torch.eye(64), SCHEME)]), torch.ones(64))


def test_query_heads_that_share_values_get_equal_factors() -> None:
    gram = torch.diag(torch.rand(12) + 0.1)
    channel = torch.arange(6).view(2, 1, 3).expand(2, 2, 3).flatten()  # 4 query heads, 2 per value head
    factors = awq.factors(gram, 1.0, channel).view(2, 2, 3)
    assert torch.equal(factors[:, 0], factors[:, 1])
    assert not torch.allclose(factors[0, 0], factors[1, 0])


def test_an_unused_channel_gets_a_bounded_factor() -> None:
    factors = awq.factors(torch.diag(torch.tensor([1.0, 1.0, 0.0])), 1.0)
    assert float(factors.max() / factors.min()) == pytest.approx(1e4, rel=1e-3)


def test_factors_of_a_16_bit_norm_are_read_back_after_rounding() -> None:
    norm = torch.nn.RMSNorm(1)
    norm.weight = torch.nn.Parameter(torch.rand(64).bfloat16() + 0.5, requires_grad=False)
    before, s = norm.weight.float(), torch.rand(64) + 0.5
    used = awq.divide_source(norm, s, 0.0)
    assert torch.allclose(norm.weight.float() * used, before, rtol=1e-6)
    assert not torch.allclose(norm.weight.float() * s, before, rtol=1e-6)


def test_columns_are_multiplied_by_what_a_16_bit_norm_was_really_divided_by(ids: torch.Tensor) -> None:
    model, original = make_model("llama", dtype=torch.bfloat16), make_model("llama", dtype=torch.bfloat16)
    blocks = decoder_blocks(model, ids)
    statistics = blocks.observe(0)
    before = statistics[0].gram_II.clone()
    awq.fold(
        blocks.modules[0], find_mappings(model, select_layers(model).linears)["model.layers.0"], statistics, EVERYWHERE
    )
    block, original_block = model.model.layers[0], original.model.layers[0]
    used = original_block.input_layernorm.weight.float() / block.input_layernorm.weight.float()
    assert not torch.equal(used, torch.ones(64)), "the search must find factors, or this test shows nothing"
    columns = original_block.self_attn.q_proj.weight.float() * used
    assert torch.equal(block.self_attn.q_proj.weight, columns.bfloat16())
    assert torch.allclose(statistics[0].gram_II, before / used / used[:, None])


def test_a_norm_channel_that_is_off_or_would_be_rounded_off_keeps_its_weight() -> None:
    norm = torch.nn.RMSNorm(1)
    # With the offset 1 the third channel is off, and dividing the first by 60 would round its weight to -1.
    norm.weight = torch.nn.Parameter(torch.tensor([-0.9, 0.0, -1.0]).bfloat16(), requires_grad=False)
    used = awq.divide_source(norm, torch.tensor([60.0, 2.0, 2.0]), 1.0)
    assert norm.weight.tolist() == torch.tensor([-0.9, -0.5, -1.0]).bfloat16().tolist()
    assert used.tolist() == [1, 2, 1]


def test_rows_and_biases_of_a_linear_source_are_divided() -> None:
    source = torch.nn.Linear(2, 3).requires_grad_(False)
    weight, bias = source.weight.clone(), source.bias.clone()
    s = torch.tensor([1.0, 4.0, 8.0])
    assert torch.equal(awq.divide_source(source, s, 0.0), s)
    assert torch.equal(source.weight * s[:, None], weight)
    assert torch.equal(source.bias * s, bias)


def test_the_bias_of_a_norm_is_divided_by_the_factors_that_are_used() -> None:
    norm = torch.nn.LayerNorm(3).requires_grad_(False)
    norm.weight.copy_(torch.tensor([1.0, 0.0, 3.0]))
    norm.bias.copy_(torch.tensor([1.0, 5.0, 2.0]))
    assert awq.divide_source(norm, torch.tensor([2.0, 4.0, 8.0]), 0.0).tolist() == [2, 1, 8]
    assert norm.weight.tolist() == [0.5, 0, 0.375]
    assert norm.bias.tolist() == [0.5, 5, 0.25]


def test_experts_share_the_factors_of_their_norm() -> None:
    """The error of each expert counts with its own inputs. Alone, the first would choose larger factors."""
    weights = [torch.randn(16, 64), torch.randn(16, 64) * torch.logspace(-1, 1, 64)]
    grams = [torch.diag(torch.logspace(-3, 3, 64)), 2 * torch.eye(64)]
    parts = [awq.Part(weight, gram, SCHEME) for weight, gram in zip(weights, grams, strict=True)]

    def error(s: torch.Tensor) -> float:
        differences = ((round_to_nearest(weight * s, SCHEME) - weight * s) / s for weight in weights)
        return float(sum((d.square() * gram.diagonal()).sum() for d, gram in zip(differences, grams, strict=True)))

    trials = [awq.factors(sum(grams), alpha) for alpha in awq.ALPHAS]
    best = awq.search(parts)
    assert torch.equal(best, min(trials, key=error))
    first = min(trials, key=lambda s: awq._rounding_error(parts[0], s))
    assert not torch.equal(best, first)


def test_folding_into_experts_keeps_routing_and_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    block = Chained(lambda block, x: block.mlp(x), mlp=Experts(3, reached=3)).double().requires_grad_(False)
    inputs: dict[str, list[torch.Tensor]] = {}
    layers = tuple(f"mlp.experts.{i}.{name}" for i in range(3) for name in ("gate_up", "down"))
    handles = [
        block.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: inputs.setdefault(name, []).append(args[0])
        )
        for name in layers
    ]
    hidden = torch.randn(1, 64, 16, dtype=torch.float64)
    before = block(hidden)
    for handle in handles:
        handle.remove()
    statistics = [InputStatistics((name,), x.T @ x / 64, len(x)) for name, (x,) in inputs.items()]
    mappings = awq_mappings._Finder(BlockTrial(block, ((), {}), hidden), layers).find()
    assert [mapping.followers for mapping in mappings if mapping.source == "norm"] == [("mlp.gate",)]
    monkeypatch.setattr(awq, "search", lambda parts, channel: torch.linspace(0.2, 5, len(parts[0][1])).double())
    original = {name: parameter.clone() for name, parameter in block.named_parameters()}
    awq.fold(block, mappings, statistics, dict.fromkeys(layers, QuantScheme(group_size=8)))
    assert torch.allclose(block(hidden), before, rtol=0, atol=1e-12)
    assert sum(not torch.equal(original[name], parameter) for name, parameter in block.named_parameters()) == 11
    for shared in statistics:
        x = inputs[shared.layers[0]][0]
        s = block.get_submodule(shared.layers[0]).weight / original[f"{shared.layers[0]}.weight"]
        if shared.layers[0].endswith("gate_up"):
            assert torch.allclose(shared.gram_II.diagonal(), (x.square().mean(0) * len(x) / 64) / s[0] ** 2)


def test_a_model_with_nothing_to_fold_is_refused() -> None:
    model = make_dense("gpt_neo")
    names = [name for name in select_layers(model).linears if name.endswith("c_proj")]
    assert names
    AWQ().check(model, select_layers(model).linears)
    message = (
        "awq must have a norm or a linear layer in the decoder blocks whose outputs it can rescale; gpt_neo has none; "
        r"use a method without awq, for example se\+gptq"
    )
    with pytest.raises(OptionError, match=message):
        AWQ().check(model, names)
