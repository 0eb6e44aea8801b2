"""Experts are compressed with the tokens that the router sends to them."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from nybble.compression.blocks import MIN_TOKENS, InputStatistics
from nybble.compression.calibration import Calibration
from nybble.compression.checks import check_model
from nybble.compression.methods import combine
from nybble.compression.pipeline import CompressionResult, compress
from nybble.compression.store import BlockStore
from nybble.models.linearize import linearize
from nybble.models.selection import select_layers
from nybble.quant.grid import min_max_qparams, quantize_dequantize
from nybble.quant.scheme import QuantScheme
from tests.helpers.cases import first_fast
from tests.helpers.compression import decoder_blocks
from tests.helpers.mixtures import EXPERTS, FAMILIES, make_mixture

SCHEME = QuantScheme(group_size=32)
FAST = ("gpt_oss",)
EVERY_FAMILY = [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
IDS = torch.randint(0, 255, (16, 32), generator=torch.Generator().manual_seed(0))


def linear_mixture(family: str = "mixtral", **changes: Any) -> Any:
    model = make_mixture(family, **changes)
    linearize(model)
    return model


def with_idle_expert(model: Any) -> Any:
    """Let no token go to expert 3 of the first block, and four of the calibration tokens to expert 2."""
    gate = model.model.layers[0].mlp.gate
    forward = gate.forward

    def route(hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits, weights, index_NK = forward(hidden)
        index_NK = index_NK.clamp(max=1)
        index_NK[:4, 1] = 2
        return logits, weights, index_NK

    gate.forward = route
    return model


def compress_all(model: torch.nn.Module, method: str, **settings: object) -> CompressionResult:
    names = select_layers(model).linears
    return compress(model, dict.fromkeys(names, SCHEME), method, Calibration(IDS, **settings))  # type: ignore[arg-type]


def test_statistics_of_an_expert_are_those_of_its_tokens() -> None:
    model = linear_mixture(dtype=torch.float64).double()
    seen: dict[str, list[torch.Tensor]] = {}
    blocks = decoder_blocks(model, IDS)
    for name, module in model.model.layers[0].named_modules():
        if name.endswith("gate_up_proj"):
            module.register_forward_pre_hook(lambda _, args, name=name: seen.setdefault(name, []).append(args[0]))
    statistics = {shared.layers: shared for shared in blocks.observe(0)}
    tokens = 0
    for i in range(EXPERTS):
        name = f"mlp.experts.{i}.gate_up_proj"
        x = torch.cat(seen[name])
        torch.testing.assert_close(statistics[(name,)].gram_II, x.T @ x / IDS.numel())
        assert statistics[(name,)].tokens == len(x)
        tokens += len(x)
    assert tokens == 2 * IDS.numel()
    assert statistics[("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")].tokens == IDS.numel()


def test_shrinking_keeps_the_diagonal_and_weighs_the_rest_by_the_tokens() -> None:
    x = torch.randn(6, 10, dtype=torch.float64)
    gram = x.T @ x / 6
    shrunk = InputStatistics(("a",), gram, tokens=6).expected_II()
    diagonal = torch.diag(gram.diagonal())
    torch.testing.assert_close(shrunk, (6 * gram + 10 * diagonal) / 16)
    assert bool((torch.linalg.eigvalsh(shrunk) > 0).all())  # 6 tokens alone have rank 6
    assert int(torch.linalg.matrix_rank(gram)) == 6


def test_second_moments_of_many_tokens_are_taken_as_they_are() -> None:
    gram = torch.eye(10) + 0.5
    many = InputStatistics(("a",), gram, tokens=160).expected_II()
    assert torch.equal(many, gram)
    assert many.data_ptr() != gram.data_ptr()
    assert not torch.equal(InputStatistics(("a",), gram, tokens=159).expected_II(), gram)


@pytest.mark.parametrize("tokens", first_fast(1, [24, 48, 96]))
def test_few_tokens_do_not_make_other_text_worse_than_rounding_to_nearest(tokens: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    ratios = []
    for _ in range(5):
        mixing = torch.randn(96, 96, generator=generator, dtype=torch.float64) * torch.linspace(0.1, 1, 96)
        x = torch.randn(tokens + 4096, 96, generator=generator, dtype=torch.float64) @ mixing
        weight = torch.randn(64, 96, generator=generator, dtype=torch.float64)
        other = x[tokens:].T @ x[tokens:]
        statistics = InputStatistics(("a",), x[:tokens].T @ x[:tokens], tokens)
        ratios.append(error_on(weight, statistics, other) / rounding_error(weight, other))
    assert max(ratios) < 1


def error_on(weight: torch.Tensor, statistics: InputStatistics, other: torch.Tensor) -> float:
    methods = combine(("se", "gptq"))
    rounder = methods.rounding.make_rounder("a", statistics.expected_II(), methods.scales, SCHEME, Calibration(IDS))
    rounded = rounder(weight)
    scale, zero_point = rounded.scale_OG[..., None], rounded.zero_point_OG[..., None]
    values = ((rounded.codes_OI.view(64, 3, 32).double() - zero_point) * scale).view(64, 96) - weight
    return float(((values @ other) * values).sum())


def rounding_error(weight: torch.Tensor, other: torch.Tensor) -> float:
    values = quantize_dequantize(weight, *min_max_qparams(weight, SCHEME), SCHEME) - weight
    return float(((values @ other) * values).sum())


@pytest.mark.parametrize("method", ["se+gptq", "se+blockwise"])
def test_experts_with_too_few_tokens_are_rounded_to_nearest_and_counted(
    method: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "nybble"):
        result = compress_all(with_idle_expert(linear_mixture()), method)
    few = [name for name, error in result.errors.items() if error.compressed is None]
    assert few == [f"model.layers.0.mlp.experts.{i}.{leaf}" for i in (2, 3) for leaf in ("gate_up_proj", "down_proj")]
    assert f"4 of 24 layers are those of experts that got fewer than {MIN_TOKENS} calibration tokens" in caplog.text
    plain = compress_all(linear_mixture(), "rtn")
    if method == "se+gptq":
        for name in few:
            assert torch.equal(result.inits[name].scale_OG, plain.inits[name].scale_OG)


def test_a_mixture_in_which_few_tokens_reach_few_experts_is_not_refused() -> None:
    model = linear_mixture("mixtral", num_local_experts=64)
    check_model(model, select_layers(model).linears, IDS[:2, :8], ("se", "gptq"))


def test_blocks_with_idle_experts_are_restored(tmp_path: Path) -> None:
    first = compress_all(with_idle_expert(linear_mixture()), "se+gptq", store=BlockStore(tmp_path, "a"))
    again = compress_all(with_idle_expert(linear_mixture()), "se+gptq", store=BlockStore(tmp_path, "a"))
    assert again.errors == first.errors
    for name, init in first.inits.items():
        assert torch.equal(again.inits[name].weight_OI, init.weight_OI)


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_every_mixture_gets_closer_on_its_text_than_by_rounding_to_nearest(family: str) -> None:
    result = compress_all(linear_mixture(family), "awq+se+gptq")
    experts = [error for name, error in result.errors.items() if "expert" in name and error.compressed is not None]
    assert experts
    assert sum(error.compressed for error in experts) < sum(error.rtn for error in experts)


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_awq_folds_into_every_mixture_and_keeps_its_function(family: str) -> None:
    model = linear_mixture(family)
    ids = IDS[:2]
    before = model(input_ids=ids, use_cache=False).logits
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    compress_all(model, "awq")  # the layers then hold the folded weights, not rounded
    changed = [name for name, parameter in model.named_parameters() if not torch.equal(weights[name], parameter)]
    assert any(".experts." in name or "_linear." in name for name in changed)
    difference = (model(input_ids=ids, use_cache=False).logits - before).abs()
    assert float(difference.mean()) < 1e-4 * float(before.abs().max()), "routing may differ where two experts tie"
