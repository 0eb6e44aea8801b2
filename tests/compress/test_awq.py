"""Folding: the same function in float64, for every family; the search lowers the error; what a 16-bit norm does."""

import pytest
import torch

from nybble.compress import awq
from nybble.compress.blocks import DecoderBlocks
from nybble.errors import OptionError
from nybble.models import selection
from nybble.models.families import family_of
from nybble.quant.grid import dequantize, min_max_qparams, quantize
from nybble.quant.scheme import QuantScheme
from tests.tiny import FAMILIES, make_config, make_model

GRID = QuantScheme(group_size=32)


@pytest.mark.parametrize("family", FAMILIES)
def test_folding_keeps_the_function(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        torch.Tensor, "float", torch.Tensor.double
    )  # Gemma's norms compute in float32 whatever the model's dtype
    model = make_model(family, dtype=torch.float64)
    ids = torch.randint(0, 255, (4, 16))
    before = model(ids).logits
    blocks = DecoderBlocks(model, selection.select_layers(model).int4, ids, 4)
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    # factors far from 1, whatever the search would say
    monkeypatch.setattr(
        awq, "search", lambda weight, gram, scheme, share: awq.factors(gram + torch.eye(len(gram)), 3.0, share)
    )
    for i, block in enumerate(blocks.modules):
        awq.fold(block, blocks.observe(i), model.config, GRID)
    assert torch.allclose(model(ids).logits, before, rtol=0, atol=1e-11)
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, weights[name])}
    for feed in family_of(model.config).feeds:
        for i in range(2):
            for name in (feed.source, *feed.layers):
                assert f"model.layers.{i}.{name}.weight" in changed


def test_statistics_follow_the_folding() -> None:
    model = make_model("qwen2", dtype=torch.float64)
    ids = torch.randint(0, 255, (4, 16))
    blocks = DecoderBlocks(model, selection.select_layers(model).int4, ids, 4)
    folded = blocks.observe(0)
    before_fold = [shared.gram_II.clone() for shared in folded]
    assert awq.fold(blocks.modules[0], folded, model.config, GRID) == 4
    assert any(not torch.allclose(old, shared.gram_II) for old, shared in zip(before_fold, folded, strict=True))
    again = DecoderBlocks(model, selection.select_layers(model).int4, ids, 4)
    for before, after in zip(folded, again.observe(0), strict=True):
        assert torch.allclose(before.gram_II, after.gram_II)


def test_search_lowers_the_weighed_error() -> None:
    weight = torch.randn(64, 64)
    gram = torch.diag(torch.logspace(-3, 3, 64)[torch.randperm(64)])

    def error(s: torch.Tensor) -> float:
        scaled = weight * s
        scale, zero = min_max_qparams(scaled, GRID)
        return float(
            (
                ((dequantize(quantize(scaled, scale, zero, GRID), scale, zero) - scaled) / s).square() * gram.diagonal()
            ).sum()
        )

    found = awq.search(weight, gram, GRID)
    assert error(found) < 0.9 * error(torch.ones(64))
    assert error(found) == min(error(awq.factors(gram, alpha)) for alpha in awq.ALPHAS)
    assert float(found.log().mean()) == pytest.approx(0, abs=1e-5)


def test_equal_inputs_need_no_factors() -> None:
    assert torch.allclose(awq.search(torch.randn(16, 64), torch.eye(64), GRID), torch.ones(64))


def test_heads_that_share_values_share_factors() -> None:
    factors = awq.factors(torch.diag(torch.rand(12) + 0.1), 1.0, share=(2, 3))  # 4 heads of 3, two to a key-value head
    heads = factors.view(2, 2, 3)
    assert torch.equal(heads[:, 0], heads[:, 1])
    assert not torch.allclose(heads[0, 0], heads[1, 0])


def test_rounding_of_a_16_bit_norm_is_made_up_for() -> None:
    norm = torch.nn.Linear(1, 1)
    norm.weight = torch.nn.Parameter(torch.rand(64).bfloat16() + 0.5, requires_grad=False)
    before, s = norm.weight.float(), torch.rand(64) + 0.5
    used = awq.divide(norm, s, 0.0, None)
    assert torch.allclose(norm.weight.float() * used, before, rtol=1e-6)
    assert not torch.allclose(norm.weight.float() * s, before, rtol=1e-6)


def test_a_channel_that_rounding_would_turn_off_stays() -> None:
    norm = torch.nn.Linear(1, 1)
    norm.weight = torch.nn.Parameter(
        torch.tensor([-0.9, 0.0, -1.0]).bfloat16(), requires_grad=False
    )  # Gemma: times 1 + weight
    used = awq.divide(norm, torch.tensor([60.0, 2.0, 2.0]), 1.0, None)
    assert norm.weight[0] == torch.tensor(-0.9).bfloat16()
    assert used[0] == 1
    assert used[1] == 2
    assert norm.weight[1] == -0.5
    assert (norm.weight[2], used[2]) == (-1, 1)  # off before, off after


def test_unknown_family_says_what_works() -> None:
    config = make_config("llama")
    config.model_type = "granite"
    with pytest.raises(
        OptionError,
        match=r"no such row for granite \(it has: llama, mistral, .*phi3\); use the method without awq: se, gptq, se\+gptq and blockwise need no such row",
    ):
        awq.check_family(config)
