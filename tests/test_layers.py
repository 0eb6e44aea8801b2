"""The layer: absorption bit for bit, gradients against float64, both ways of computing a step."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nybble.qat import insert
from nybble.qat.absorb import assert_absorbs_exactly, changes, merge, plain_linear
from nybble.qat.insert import weight_cache
from nybble.qat.layers import FakeQuantizedLoRALinear, FixedCodesLinear, LoRALinear, QuantizedLinear
from nybble.quant.grid import min_max_qparams
from nybble.quant.scheme import QuantScheme
from nybble.quant.weight import QuantizedWeight
from tests.reference import quantizer as slow
from tests.tiny import make_model

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(
    outputs: int = 24,
    inputs: int = 64,
    rank: int = 8,
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
    tuned: bool = True,
) -> FakeQuantizedLoRALinear:
    """A layer with adapters and scales as after training."""
    generator = torch.Generator().manual_seed(0)
    scheme = QuantScheme(group_size=16)
    weight = (torch.randn(outputs, inputs, generator=generator) * 0.1).to(dtype)
    layer = FakeQuantizedLoRALinear(
        weight,
        *min_max_qparams(weight, scheme),
        scheme,
        torch.randn(outputs, generator=generator).to(dtype) if bias else None,
        rank,
        dtype,
        generator,
    )
    if tuned:
        with torch.no_grad():
            layer.lora_b.normal_(0, 0.1, generator=generator)
            layer.log_scale_shift.normal_(0, 0.1, generator=generator)
    return layer


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_absorb_is_the_forward_at_every_rank(dtype: torch.dtype, bias: bool) -> None:
    layer = make(dtype=dtype, bias=bias)
    inputs = torch.randn(5, 3, 64).to(dtype)
    seen = set()
    for rank in range(layer.rank + 1):
        layer.active_rank = rank
        absorbed = layer.absorb()
        plain = F.linear(inputs, absorbed.dequantize().to(dtype), layer.bias)
        assert torch.equal(layer(inputs), plain)
        with weight_cache([layer], push=False):
            assert torch.equal(layer(inputs), plain)
        assert torch.equal(plain_linear(absorbed.dequantize().to(dtype), layer.bias)(inputs), plain)
        seen.add(absorbed.codes_OI.numpy().tobytes())
    assert len(seen) > 1, "the adapters must change codes for this test to say anything"


def test_a_wrong_absorption_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make()
    absorb = layer.absorb

    def wrong() -> object:
        quantized = absorb()
        quantized.codes_OI[0, 0] ^= 1
        return quantized

    monkeypatch.setattr(layer, "absorb", wrong)
    with pytest.raises(AssertionError, match="absorbed codes differ from the forward"):
        assert_absorbs_exactly("layer", layer)


@pytest.mark.parametrize(("outputs", "inputs", "rank"), [(8, 64, 8), (200, 16, 16), (1, 64, 1), (48, 64, 32)])
def test_rank_is_clamped_to_narrow_layers(outputs: int, inputs: int, rank: int) -> None:
    assert make(outputs, inputs, 32).rank == rank


def test_untrained_layer_is_the_compressed_weight() -> None:
    layer = make(tuned=False)
    weight = layer.weight.double()
    scale, zero = min_max_qparams(layer.weight, layer.scheme)
    expected = slow.fake_quantize(weight, scale.double(), zero.double(), 4)
    assert torch.equal(layer.quantized_OI().double(), expected)
    assert layer.lora_a.abs().sum() > 0


def reference_gradients(layer: FakeQuantizedLoRALinear, inputs: Tensor, upstream: Tensor) -> dict[str, Tensor]:
    """float64 autograd of the formula at the head of layers.py."""
    a, b, shift = (p.detach().double().requires_grad_() for p in (layer.lora_a, layer.lora_b, layer.log_scale_shift))
    start = layer.init_scale.double()
    exact = start * shift.exp()
    scale = exact + (layer.scale_OG().detach().double() - exact).detach()
    rounded = slow.fake_quantize(
        layer.weight.double() + b[:, : layer.active_rank] @ a[: layer.active_rank], start, layer.zero_point.double(), 4
    )
    weight = (rounded.unflatten(1, (start.shape[1], -1)) * (scale / start)[..., None]).flatten(1)
    (F.linear(inputs.double(), weight) * upstream.double()).sum().backward()
    return {"lora_a": a.grad, "lora_b": b.grad, "log_scale_shift": shift.grad}


@pytest.mark.parametrize("active", [8, 3, 0])
@pytest.mark.parametrize("cached", [True, False])
def test_gradients_equal_the_float64_reference(active: int, cached: bool) -> None:
    layer = make()
    layer.active_rank = active
    inputs, upstream = torch.randn(7, 64), torch.randn(7, 24)
    if cached:
        with weight_cache([layer]):
            for part in (slice(0, 2), slice(2, 7)):  # two microbatches
                (layer(inputs[part]) * upstream[part]).sum().backward()
    else:
        (layer(inputs) * upstream).sum().backward()
    for name, expected in reference_gradients(layer, inputs, upstream).items():
        grad = getattr(layer, name).grad
        grad = torch.zeros_like(expected) if grad is None else grad.double()
        # float32 sums of 7 * 64 products
        torch.testing.assert_close(
            grad, torch.zeros_like(expected) if expected is None else expected, rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("active", [8, 3, 0])
@pytest.mark.parametrize("cached", [True, False])
def test_thin_gradients_are_those_of_the_unrounded_weight(active: int, cached: bool) -> None:
    layer = make()
    layer.active_rank = active
    layer.log_scale_shift.requires_grad_(False)
    inputs, upstream = torch.randn(2, 7, 64, requires_grad=True), torch.randn(2, 7, 24)
    with weight_cache([layer]) if cached else contextlib.nullcontext():
        for part in range(2):  # two microbatches
            (layer(inputs[part]) * upstream[part]).sum().backward()
    a, b = (p.detach().double().requires_grad_() for p in (layer.lora_a, layer.lora_b))
    weight = layer.weight.double() + b[:, :active] @ a[:active]
    (F.linear(inputs.detach().double(), weight) * upstream.double()).sum().backward()
    for parameter, expected in ((layer.lora_a, a.grad), (layer.lora_b, b.grad)):
        torch.testing.assert_close(parameter.grad.double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(inputs.grad, upstream @ layer.quantized_OI().detach())


def test_thin_gradients_are_the_full_ones_where_no_code_is_clipped() -> None:
    full, thin = make(rank=8, tuned=False), make(rank=8, tuned=False)
    inputs, upstream = torch.randn(7, 64), torch.randn(7, 24)
    thin.log_scale_shift.requires_grad_(False)
    for layer in (full, thin):
        with torch.no_grad():
            layer.init_scale.mul_(2)  # every code is far within its range
            layer.lora_b.normal_(0, 1e-4, generator=torch.Generator().manual_seed(1))
        with weight_cache([layer]):
            (layer(inputs) * upstream).sum().backward()
    torch.testing.assert_close(thin.lora_a.grad, full.lora_a.grad, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(thin.lora_b.grad, full.lora_b.grad, rtol=1e-4, atol=1e-5)


def saved_for_backward(layer: QuantizedLinear, inputs: Tensor) -> list[int]:
    """Sizes of the tensors that a forward keeps."""
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: (sizes.append(tensor.numel()), tensor)[1], lambda tensor: tensor
    ):  # type: ignore[func-returns-value]
        layer(inputs)
    return sizes


def test_thin_gradients_keep_nothing_of_the_size_of_a_weight() -> None:
    layer = make(64, 128)
    layer.log_scale_shift.requires_grad_(False)
    inputs = torch.randn(2, 128, requires_grad=True)
    assert max(saved_for_backward(layer, inputs)) <= layer.rank * 128
    with weight_cache([layer]):
        layer(inputs).sum().backward()
        assert layer.cached_weight is not None
        assert layer.cached_weight.grad is None


def test_a_trained_scale_moves_no_code() -> None:
    layer = make()
    before = layer.absorb()
    with torch.no_grad():
        layer.log_scale_shift.add_(0.3)
    after = layer.absorb()
    assert torch.equal(after.codes_OI, before.codes_OI)
    assert (after.scale_OG > before.scale_OG).all()
    assert torch.equal(layer.quantized_OI(), after.dequantize())


def test_sliced_ranks_get_no_gradient() -> None:
    layer = make()
    layer.active_rank = 3
    layer(torch.randn(2, 64)).sum().backward()
    assert layer.lora_a.grad[3:].abs().sum() == 0
    assert layer.lora_a.grad[:3].abs().sum() > 0


def test_input_gradient_is_that_of_the_quantized_weight() -> None:
    layer = make()
    inputs, upstream = torch.randn(3, 64, requires_grad=True), torch.randn(3, 24)
    (layer(inputs) * upstream).sum().backward()
    torch.testing.assert_close(inputs.grad, upstream @ layer.quantized_OI().detach())


def test_recompute_keeps_no_weight_for_backward() -> None:
    """Between forward and backward nothing of the size of the weight may be saved."""
    layer = make(64, 128)
    inputs = torch.randn(2, 128, requires_grad=True)
    assert max(saved_for_backward(layer, inputs), default=0) <= inputs.numel()


def test_adapters_and_scales_stay_in_float32_whatever_the_weights_are() -> None:
    layer = make(dtype=torch.bfloat16)
    trained = {name: p.dtype for name, p in layer.named_parameters() if p.requires_grad}
    assert trained == dict.fromkeys(("log_scale_shift", "lora_a", "lora_b"), torch.float32)
    assert layer.weight.dtype == torch.bfloat16


# --- codes that stay ----------------------------------------------------------------------------------------------------------


def make_scaled(dtype: torch.dtype = torch.float32, outputs: int = 24, inputs: int = 64) -> FixedCodesLinear:
    """A layer with scales as after training."""
    plain = make(outputs, inputs, rank=0, dtype=dtype, tuned=False)
    layer = FixedCodesLinear(plain.absorb(), plain.bias, dtype, torch.Generator().manual_seed(0))
    with torch.no_grad():
        layer.log_scale_shift.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    return layer


@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_that_stay_compute_what_is_absorbed(dtype: torch.dtype) -> None:
    layer = make_scaled(dtype)
    inputs = torch.randn(5, 3, 64).to(dtype)
    plain = F.linear(inputs, layer.absorb().dequantize().to(dtype), layer.bias)
    assert torch.equal(layer(inputs), plain)
    with weight_cache([layer], push=False):
        assert torch.equal(layer(inputs), plain)
    with torch.no_grad():
        assert torch.equal(layer(inputs), plain)
    assert_absorbs_exactly("layer", layer)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_made_in_16_bits_are_the_cast_ones(dtype: torch.dtype) -> None:
    """Every code and zero with scales of all mantissas and of the whole range."""
    mantissas = torch.arange(64, 128) / 128
    scales = torch.cat([mantissas * 2.0**exponent for exponent in (-13, -8, -5, 0, 11)])
    scale, zero = (scheme.flatten()[:, None] for scheme in torch.meshgrid(scales, torch.arange(16.0), indexing="ij"))
    codes = torch.arange(16, dtype=torch.uint8).repeat(len(scale), 1)
    layer = FixedCodesLinear(
        QuantizedWeight(codes, scale, zero.to(torch.uint8), QuantScheme(group_size=16)), None, dtype
    )
    assert torch.equal(layer.compute_weight(), layer.absorb().dequantize().to(dtype))


def scale_gradient(layer: FixedCodesLinear, inputs: Tensor, upstream: Tensor) -> Tensor:
    """float64 autograd of the formula."""
    shift, start = layer.log_scale_shift.detach().double().requires_grad_(), layer.init_scale.double()
    exact = start * shift.exp()
    scale = exact + (layer.scale_OG().detach().double() - exact).detach()
    steps = layer.codes.double().unflatten(1, (start.shape[1], -1)) - layer.zero_point.double()[..., None]
    (F.linear(inputs.double(), (steps * scale[..., None]).flatten(1)) * upstream.double()).sum().backward()
    return shift.grad


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize(
    ("dtype", "size", "tolerance"),
    [(torch.float32, 1.0, 1e-5), (torch.bfloat16, 1.0, 2e-2), (torch.float16, 1e-6, 3e-2)],
)
def test_gradient_of_scales_equals_the_float64_reference(
    dtype: torch.dtype, size: float, tolerance: float, cached: bool
) -> None:
    """In float16 also where gradients are small: it has no room for their products with weights."""
    layer = make_scaled(dtype)
    inputs, upstream = torch.randn(2, 7, 64).to(dtype), (size * torch.randn(2, 7, 24)).to(dtype)
    inputs.requires_grad_()
    with weight_cache([layer]) if cached else contextlib.nullcontext():
        for part in range(2):  # two microbatches
            (layer(inputs[part]) * upstream[part]).sum().backward()
    expected = scale_gradient(layer, inputs.detach().flatten(0, 1), upstream.flatten(0, 1))
    assert (layer.log_scale_shift.grad.double() - expected).norm() < tolerance * expected.norm()
    assert torch.equal(inputs.grad, upstream @ layer.compute_weight())
    assert layer.cached_weight is None


def test_codes_that_stay_keep_no_gradient_of_the_size_of_a_weight() -> None:
    layer = make_scaled(outputs=64, inputs=128)
    inputs = torch.randn(2, 128, requires_grad=True)
    assert max(saved_for_backward(layer, inputs)) < 64 * 128
    with weight_cache([layer]):
        layer(inputs).sum().backward()
        assert layer.cached_weight is not None
        assert layer.cached_weight.grad is None
    assert max((p.numel() for p in layer.parameters()), default=0) < 64 * 128


def test_scales_that_are_not_trained_cost_no_product() -> None:
    layer = make_scaled()
    layer.log_scale_shift.requires_grad_(False)
    inputs = torch.randn(2, 64, requires_grad=True)
    layer(inputs).sum().backward()
    assert layer.log_scale_shift.grad is None
    assert inputs.grad is not None


def test_an_embedding_is_rounded_piece_by_piece_as_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    models = [make_model("smollm") for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    (whole,) = insert.quantize_rows(models[0], ["model.embed_tokens"]).values()
    monkeypatch.setattr(insert, "_ROWS", 7)
    (pieces,) = insert.quantize_rows(models[1], ["model.embed_tokens"]).values()
    assert torch.equal(pieces.codes_OI, whole.codes_OI)
    assert torch.equal(pieces.scale_OG, whole.scale_OG)
    assert torch.equal(models[1].model.embed_tokens.weight, models[0].model.embed_tokens.weight)
    assert torch.equal(whole.dequantize(), models[0].model.embed_tokens.weight.detach())


def adapted(dtype: torch.dtype = torch.float32, tuned: bool = True) -> LoRALinear:
    generator = torch.Generator().manual_seed(0)
    weight, bias = (
        (torch.randn(24, 64, generator=generator) * 0.1).to(dtype),
        torch.randn(24, generator=generator).to(dtype),
    )
    layer = LoRALinear(weight, bias, 8, dtype, generator)
    if tuned:
        with torch.no_grad():
            layer.lora_b.normal_(0, 0.1, generator=generator)
    return layer


@pytest.mark.parametrize("active", [8, 3, 0])
@pytest.mark.parametrize("cached", [True, False])
def test_gradients_of_adapters_on_16_bit_weights_equal_float64(active: int, cached: bool) -> None:
    layer = adapted()
    layer.active_rank = active
    inputs = torch.randn(5, 64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    upstream = torch.randn(5, 24, generator=torch.Generator().manual_seed(2))
    with weight_cache([layer]) if cached else contextlib.nullcontext():
        (layer(inputs) * upstream).sum().backward()
    a, b, x = (tensor.detach().double().requires_grad_() for tensor in (layer.lora_a, layer.lora_b, inputs))
    weight, bias = layer.weight.double(), layer.bias.double()
    (F.linear(x, weight + 2 * b[:, :active] @ a[:active], bias) * upstream.double()).sum().backward()
    expected = (a.grad, b.grad, x.grad)
    for found, wanted in zip((layer.lora_a.grad, layer.lora_b.grad, inputs.grad), expected, strict=True):
        torch.testing.assert_close(
            found.double(), torch.zeros_like(found).double() if wanted is None else wanted, rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_merged_is_what_was_trained(dtype: torch.dtype) -> None:
    layer, inputs = adapted(dtype), torch.randn(5, 3, 64).to(dtype)
    before = F.linear(inputs, layer.weight, layer.bias)
    layer.active_rank = 3
    computed = layer(inputs)
    exact = layer.weight.double() + 2 * layer.lora_b[:, :3].double() @ layer.lora_a[:3].double()
    model = torch.nn.Sequential(layer)
    merge(model, {"0": layer})
    assert type(model[0]) is torch.nn.Linear
    assert torch.equal(model(inputs), computed)
    assert not torch.equal(computed, before)
    torch.testing.assert_close(
        model[0].weight, exact.to(dtype), rtol=1e-6 if dtype == torch.float32 else 2**-7, atol=1e-6
    )
    untrained = adapted(dtype, tuned=False)
    assert torch.equal(untrained(inputs), F.linear(inputs, untrained.weight, untrained.bias))


def test_adapters_on_16_bit_weights_start_and_count_as_those_of_peft() -> None:
    peft = pytest.importorskip("peft")
    layer = LoRALinear(torch.zeros(96, 256), None, 64, torch.float32, torch.Generator().manual_seed(0))
    model = torch.nn.Sequential(torch.nn.Linear(256, 96))
    other = peft.get_peft_model(model, peft.LoraConfig(r=64, lora_alpha=128, target_modules=["0"])).base_model.model[0]
    assert other.scaling["default"] == layer.SCALING
    assert float(layer.lora_a.detach().std()) == pytest.approx(
        float(other.lora_A["default"].weight.detach().std()), rel=0.05
    )
    assert float(layer.lora_a.detach().abs().max()) <= 1 / 16


def test_changes_are_counted_by_layer_and_in_all() -> None:
    scheme = QuantScheme(group_size=2)
    ones = torch.ones(1, 2, dtype=torch.uint8)

    def weight(codes: list[int], scales: list[float]) -> QuantizedWeight:
        return QuantizedWeight(torch.tensor([codes], dtype=torch.uint8), torch.tensor([scales]), ones, scheme)

    before = {"a": weight([1, 2, 3, 4], [1.0, 2.0]), "b": weight([5, 6, 7, 8], [1.0, 1.0])}
    after = {"a": weight([1, 2, 3, 9], [1.5, 2.0]), "b": weight([5, 6, 7, 8], [1.0, 1.0])}
    found = changes(before, after)
    assert (found["codes_changed"], found["layer_codes_changed"]) == (1 / 8, {"a": 1 / 4, "b": 0.0})
    assert found["scales_moved"] == pytest.approx((0.25 / 4) ** 0.5)
    assert found["layer_scales_moved"] == {"a": pytest.approx((0.25 / 2) ** 0.5), "b": 0.0}
