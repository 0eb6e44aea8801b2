"""Compression of a whole model: what each combination gains, and which tensors the model holds afterwards."""

import pytest
import torch

from nybble.compression.base import Rounder, RoundingMethod
from nybble.compression.calibration import BlockwiseConfig, Calibration
from nybble.compression.init import RoundedWeight
from nybble.compression.methods import METHODS
from nybble.compression.pipeline import CompressionResult, compress
from nybble.errors import OptionError
from nybble.models.selection import select_layers
from nybble.quant.grid import dequantize, min_max_qparams, quantize, quantize_dequantize
from nybble.quant.scheme import QuantScheme
from tests.helpers.cases import first_fast
from tests.helpers.tiny import make_model

SCHEME = QuantScheme(group_size=32)
IDS = torch.randint(0, 255, (24, 16), generator=torch.Generator().manual_seed(0))


def compress_all(model: torch.nn.Module, method: str, ids: torch.Tensor = IDS, **settings: object) -> CompressionResult:
    calibration = None if method == "rtn" else Calibration(ids, **settings)  # type: ignore[arg-type]
    return compress(model, dict.fromkeys(select_layers(model).linears, SCHEME), method, calibration)


def with_strong_channels(model: torch.nn.Module) -> torch.nn.Module:
    """Give a tiny model a few strong input channels, as real models have."""
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight[:4] *= 8
            layer.post_attention_layernorm.weight[:4] *= 8
    return model


@pytest.mark.parametrize(
    "method", first_fast(2, ["awq+se+gptq", "blockwise", "awq", "se", "gptq", "awq+se", "se+gptq+blockwise"])
)
def test_every_method_is_closer_to_the_model_than_rtn_on_unseen_text(method: str) -> None:
    ids = torch.randint(0, 255, (64, 32), generator=torch.Generator().manual_seed(0))
    original = with_strong_channels(make_model("llama"))(ids[48:]).logits

    def error(method: str) -> float:
        model = with_strong_channels(make_model("llama"))
        result = compress_all(model, method, ids[:48], blockwise=BlockwiseConfig(epochs=6))
        for name, init in result.inits.items():
            model.get_submodule(name).weight = torch.nn.Parameter(
                init.quantized(SCHEME).dequantize(), requires_grad=False
            )
        return float((model(ids[48:]).logits - original).square().mean())

    assert error(method) < error("rtn")


def test_refinement_raises_the_loss_of_no_block_and_lowers_the_mean() -> None:
    result = compress_all(make_model("llama"), "blockwise", blockwise=BlockwiseConfig(epochs=6))
    assert list(result.blocks) == ["model.layers.0", "model.layers.1"]
    before, after = zip(*result.blocks.values(), strict=True)
    assert all(b <= a for a, b in zip(before, after, strict=True))
    assert sum(after) < sum(before)


def test_limit_blocks_leaves_the_other_blocks_to_rtn() -> None:
    plain = compress_all(make_model("llama"), "rtn")
    for limit, compressed in ((None, (".0.", ".1.")), (1, (".0.",)), (0, ())):
        result = compress_all(make_model("llama"), "se", limit_blocks=limit)
        for name, init in result.inits.items():
            by_method = any(part in name for part in compressed)
            assert torch.equal(init.scale_OG, plain.inits[name].scale_OG) != by_method
            assert (result.errors[name].compressed is None) != by_method


def test_results_are_in_the_order_of_the_names() -> None:
    model = make_model("llama")
    names = list(reversed(select_layers(model).linears))
    result = compress(model, dict.fromkeys(names, SCHEME), "se", Calibration(IDS))
    assert list(result.inits) == list(result.errors) == names


def test_a_block_without_4_bit_layers_is_passed_through() -> None:
    model = make_model("llama")
    names = [name for name in select_layers(model).linears if ".1." in name]
    result = compress(model, dict.fromkeys(names, SCHEME), "blockwise", Calibration(IDS))
    assert list(result.inits) == names
    assert list(result.blocks) == ["model.layers.1"]


@pytest.mark.parametrize("method", first_fast(2, ["rtn", "awq+se+blockwise", "se+gptq"]))
def test_the_model_holds_the_weights_of_the_result_without_a_copy(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = torch.nn.Module.to

    def to(module: torch.nn.Module, *arguments: object) -> torch.nn.Module:
        """On a GPU, parameters get new memory with every move."""
        moved = original(module, *arguments)
        for parameter in moved.parameters():
            parameter.data = parameter.data.clone()
        return moved

    monkeypatch.setattr(torch.nn.Module, "to", to)
    model = make_model("smollm", dtype=torch.bfloat16)
    result = compress_all(model, method)
    for name, init in result.inits.items():
        assert init.weight_OI.data_ptr() == model.get_submodule(name).weight.data_ptr()
        assert init.weight_OI.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_rtn_changes_no_weight_and_measures_no_output() -> None:
    model, original = make_model("llama", dtype=torch.bfloat16), make_model("llama", dtype=torch.bfloat16)
    result = compress_all(model, "rtn")
    for name, init in result.inits.items():
        weight = original.get_submodule(name).weight
        scale, zero_point = min_max_qparams(weight, SCHEME)
        assert torch.equal(init.weight_OI, weight)
        assert torch.equal(init.scale_OG, scale)
        assert torch.equal(init.zero_point_OG, zero_point)
        difference = quantize_dequantize(weight.float(), scale, zero_point, SCHEME) - weight.float()
        assert result.errors[name].weight == pytest.approx(float(difference.norm() / weight.float().norm()), rel=1e-5)
        assert result.errors[name].compressed is None


def test_awq_is_measured_against_the_outputs_that_the_layers_had_before() -> None:
    """Folding divides the rows of v_proj; its error must be that of its own outputs, not of the divided ones."""
    model = make_model("llama")
    values = model.model.layers[0].self_attn.v_proj
    with torch.no_grad():
        values.weight[:4] *= 30
    inputs: list[torch.Tensor] = []
    handle = values.register_forward_pre_hook(lambda module, args: inputs.append(args[0].flatten(0, -2)))
    model(IDS)
    handle.remove()
    before = values.weight.detach().clone()
    result = compress_all(model, "awq")
    name = "model.layers.0.self_attn.v_proj"
    # Rows were divided by factors, and columns multiplied by what the norm before was divided by.
    row_factors = (before / values.weight).median(1).values[:, None]
    column_factors = (values.weight * row_factors / before).median(0).values
    unfolded = result.inits[name].quantized(SCHEME).dequantize() * row_factors / column_factors
    expected = ((unfolded - before) @ inputs[0].T).square().mean() / (before @ inputs[0].T).square().mean()
    assert result.errors[name].compressed == pytest.approx(float(expected), rel=1e-3)


def test_awq_lowers_the_error_below_that_of_the_weights_as_they_were() -> None:
    result = compress_all(with_strong_channels(make_model("llama")), "awq")
    for name, error in result.errors.items():
        if "q_proj" in name or "k_proj" in name:
            assert error.compressed < error.rtn


@pytest.mark.parametrize("method", ["rtn", "se", "blockwise"])
def test_progress_counts_every_layer_once(method: str) -> None:
    model, counts = make_model("llama"), []
    names = select_layers(model).linears
    calibration = Calibration(IDS, blockwise=BlockwiseConfig(epochs=0.2))
    compress(model, dict.fromkeys(names, SCHEME), method, calibration, lambda layers, text: counts.append(layers))
    assert sum(counts) == len(names)


def test_a_method_that_needs_text_gets_none() -> None:
    model = make_model("llama")
    with pytest.raises(AssertionError, match="se needs calibration text"):
        compress(model, dict.fromkeys(select_layers(model).linears, SCHEME), "se")
    with pytest.raises(OptionError, match="got best"):
        compress(model, dict.fromkeys(select_layers(model).linears, SCHEME), "best")


class RoundDown(RoundingMethod):
    """A toy rounding method that needs no text: no weight is rounded up."""

    needs_calibration = False

    def make_rounder(self, name, gram_II, scales, scheme, calibration) -> Rounder:  # type: ignore[no-untyped-def]
        """Subtract half a step, and round to nearest."""

        def round_rows(weight_OI: torch.Tensor) -> RoundedWeight:
            scale_OG, zero_point_OG = scales.search(weight_OI, torch.ones_like(weight_OI[0]), scheme)
            moved_OI = weight_OI - scale_OG.repeat_interleave(scheme.group_size, 1) / 2
            return RoundedWeight(quantize(moved_OI, scale_OG, zero_point_OG, scheme), moved_OI, scale_OG, zero_point_OG)

        return round_rows


def test_a_registered_rounding_method_compresses_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(METHODS, "_known", METHODS._known | {"down": RoundDown})
    model, original = make_model("llama"), make_model("llama")
    result = compress(model, dict.fromkeys(select_layers(model).linears, SCHEME), "down")
    for name, init in result.inits.items():
        quantized = init.quantized(SCHEME)
        rounded = dequantize(quantized.codes_OI, quantized.scale_OG, quantized.zero_point_OG.float())
        weight = original.get_submodule(name).weight
        above_lowest_code = quantized.codes_OI > 0
        assert (rounded <= weight + 1e-5)[above_lowest_code].all()
        assert torch.equal(model.get_submodule(name).weight, init.weight_OI)
        assert not torch.equal(init.weight_OI, weight)


@pytest.mark.parametrize("method", first_fast(2, ["rtn", "awq+se+gptq", "se+blockwise"]))
def test_layers_of_other_schemes_are_rounded_by_their_own(method: str) -> None:
    """Query, key and value share their input but not their scheme; each scheme is rounded as if it were alone."""
    model = make_model("llama")
    names = select_layers(model).linears
    schemes = {name: QuantScheme(3, 32, symmetric=True) if "k_proj" in name else SCHEME for name in names}
    schemes |= {name: QuantScheme(2, None) for name in names if "down_proj" in name}
    result = compress(model, schemes, method, Calibration(IDS, blockwise=BlockwiseConfig(epochs=0.5)))
    assert list(result.inits) == list(names)
    for name, init in result.inits.items():
        quantized = init.quantized(schemes[name])
        assert int(quantized.codes_OI.max()) <= schemes[name].max_code
        assert quantized.scale_OG.shape[1] == schemes[name].num_groups(quantized.codes_OI.shape[1])
        assert (result.errors[name].compressed or 0) <= 1.05 * (result.errors[name].rtn or 1)
    if method == "rtn":
        for kind in set(schemes.values()):
            same = [name for name in names if schemes[name] == kind]
            alone = compress(make_model("llama"), dict.fromkeys(same, kind), method)
            for name in same:
                assert torch.equal(alone.inits[name].scale_OG, result.inits[name].scale_OG)
