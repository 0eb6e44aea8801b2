"""Block-wise reconstruction: the block comes closer to the 16-bit one, what it computed with is what leaves it, and no block gets worse."""

import pytest
import torch
import torch.nn.functional as F

from nybble.compress import blockwise, rtn
from nybble.compress.blocks import DecoderBlocks
from nybble.compress.blockwise import BlockwiseConfig, OffsetLinear
from nybble.compress.init import QuantizedInit
from nybble.errors import ModelError
from nybble.models import selection
from nybble.quant.grid import min_max_qparams, quantize
from nybble.quant.scheme import QuantScheme
from tests.tiny import make_model

GRID = QuantScheme(group_size=32)
IDS = torch.randint(0, 255, (40, 16), generator=torch.Generator().manual_seed(0))


def ready(family: str = "llama", dtype: torch.dtype = torch.float32) -> tuple[DecoderBlocks, dict[str, QuantizedInit]]:
    model = make_model(family, dtype=dtype)
    blocks = DecoderBlocks(model, selection.select_layers(model).int4, IDS, 8)
    blocks.advance_full(0)
    starts = rtn.compress(model, [f"model.layers.0.{name}" for name in blocks.layers[0]], GRID)
    return blocks, {name.removeprefix("model.layers.0."): start for name, start in starts.items()}


def block_error(blocks: DecoderBlocks, starts: dict[str, QuantizedInit], part: slice) -> float:
    block = blocks.modules[0]
    original = {name: block.get_submodule(name).weight for name in starts}
    for name, start in starts.items():
        block.get_submodule(name).weight = torch.nn.Parameter(
            start.quantized(GRID).dequantize().to(blocks.dtype), requires_grad=False
        )
    with torch.no_grad():
        error = (
            F.mse_loss(blocks.run(0, blocks.quantized[part]).float(), blocks.full[part].float())
            / blocks.full[part].float().square().mean()
        )
    for name, weight in original.items():
        block.get_submodule(name).weight = weight
    return float(error)


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        pytest.param("llama", torch.float32, marks=pytest.mark.slow),
        ("gemma2", torch.float32),
        pytest.param("qwen2", torch.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_the_block_comes_closer_on_held_out_text(family: str, dtype: torch.dtype) -> None:
    blocks, starts = ready(family, dtype)
    recipe = BlockwiseConfig(epochs=20, tokens=64)
    trained, before, after = blockwise.train(blocks, 0, starts, GRID, recipe, seed=0)
    held_out = slice(35, 40)
    assert before == pytest.approx(block_error(blocks, starts, held_out), rel=1e-2 if dtype == torch.bfloat16 else 1e-4)
    assert after == pytest.approx(block_error(blocks, trained, held_out), rel=2e-2 if dtype == torch.bfloat16 else 1e-4)
    assert after < 0.93 * before
    assert all(start.weight_OI.dtype == dtype for start in trained.values())
    assert isinstance(blocks.modules[0].get_submodule("mlp.up_proj"), torch.nn.Linear)


def test_offset_layer_starts_as_the_start_and_ships_what_it_computed() -> None:
    weight = torch.randn(8, 64)
    start = QuantizedInit(weight, *min_max_qparams(weight, GRID))
    layer = OffsetLinear(start, None, GRID, torch.float32)
    x = torch.randn(3, 64)
    assert torch.equal(layer(x), F.linear(x, start.quantized(GRID).dequantize()))
    with torch.no_grad():
        layer.offset.normal_(std=0.4)
        layer.shift.normal_(std=0.05)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(layer(x), F.linear(x, layer.result(dtype).quantized(GRID).dequantize()))


def test_gradients_reach_offsets_and_scales() -> None:
    weight = torch.randn(8, 64)
    scale, zero = min_max_qparams(weight, GRID)
    layer = OffsetLinear(QuantizedInit(weight, scale * 0.8, zero), None, GRID, torch.float32)
    layer(torch.randn(3, 64)).square().sum().backward()
    for leaf in (layer.offset, layer.shift):
        assert leaf.grad is not None
        assert leaf.grad.abs().sum() > 0


def test_a_block_that_would_get_worse_keeps_its_start() -> None:
    blocks, starts = ready()
    trained, before, after = blockwise.train(
        blocks, 0, starts, GRID, BlockwiseConfig(epochs=1, offset_lr=50.0, scale_lr=3.0), seed=0
    )
    assert after == before
    assert trained is starts


def test_the_seed_decides() -> None:
    made = []
    for seed in (0, 0, 1):
        blocks, starts = ready()
        trained = blockwise.train(blocks, 0, starts, GRID, BlockwiseConfig(epochs=3, tokens=64), seed)[0]
        made.append(torch.cat([start.quantized(GRID).codes_OI.flatten() for start in trained.values()]))
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


def test_a_loss_that_is_not_finite_is_an_error() -> None:
    blocks, starts = ready()
    blocks.quantized[3] = torch.inf
    with pytest.raises(
        ModelError,
        match=r"the loss of block 0 must stay finite; it became nan; the model's weights or this text are broken",
    ):
        blockwise.train(blocks, 0, starts, GRID, BlockwiseConfig(), 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_starts_keep_their_codes(dtype: torch.dtype) -> None:
    weight = torch.randn(64, 64)
    scale, zero = min_max_qparams(weight, GRID)
    codes = quantize(weight, scale, zero, GRID)
    # weights pushed next to a rounding boundary, where methods leave them
    near = scale.repeat_interleave(32, 1) * (codes - zero.repeat_interleave(32, 1) + 0.4999)
    codes = quantize(near, scale, zero, GRID)
    assert not torch.equal(quantize(near.to(dtype).float(), scale, zero, GRID), codes), (
        "the plain cast must fail for this test to mean anything"
    )
    kept = QuantizedInit.keeping(codes, near, scale, zero, GRID, dtype)
    assert kept.weight_OI.dtype == dtype
    assert torch.equal(kept.quantized(GRID).codes_OI, codes)
