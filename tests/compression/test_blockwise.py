"""Block-wise reconstruction: the block that is stored is the block that was trained, and no block gets worse."""

import pytest
import torch
import torch.nn.functional as F

from nybble.compression.blocks import DecoderBlocks, set_weight
from nybble.compression.blockwise import BlockwiseReconstruction, OffsetLinear, train
from nybble.compression.calibration import BlockwiseConfig, Calibration
from nybble.compression.init import QuantizedInit
from nybble.errors import ModelError
from nybble.quant.grid import min_max_qparams
from nybble.quant.scheme import QuantScheme
from tests.helpers.compression import decoder_blocks
from tests.helpers.tiny import make_model

SCHEME = QuantScheme(group_size=32)
IDS = torch.randint(0, 255, (40, 16), generator=torch.Generator().manual_seed(0))
HELD_OUT = slice(35, 40)  # an eighth


def rounded_block(
    family: str = "llama", dtype: torch.dtype = torch.float32
) -> tuple[DecoderBlocks, dict[str, QuantizedInit]]:
    """The blocks of a tiny model, ready for training block 0, and its layers rounded to nearest."""
    blocks = decoder_blocks(make_model(family, dtype=dtype), IDS, 8)
    blocks.advance_full(0)
    weights = {name: blocks.modules[0].get_submodule(name).weight.detach() for name in blocks.layers[0]}
    return blocks, {name: QuantizedInit(weight, *min_max_qparams(weight, SCHEME)) for name, weight in weights.items()}


def calibration(seed: int = 0, **config: float) -> Calibration:
    return Calibration(IDS, seed, blockwise=BlockwiseConfig(**config))


def block_error(blocks: DecoderBlocks, inits: dict[str, QuantizedInit]) -> float:
    """Relative square error of block 0 with 4-bit weights on the held-out sequences."""
    block = blocks.modules[0]
    original = {name: block.get_submodule(name).weight for name in inits}
    for name, init in inits.items():
        set_weight(block, name, init.quantized(SCHEME).dequantize().to(blocks.dtype))
    with torch.no_grad():
        outputs = blocks.run(0, blocks.quantized[HELD_OUT])
    for name, weight in original.items():
        block.get_submodule(name).weight = weight
    expected = blocks.full[HELD_OUT].float()
    return float(F.mse_loss(outputs.float(), expected) / expected.square().mean())


@pytest.mark.parametrize(
    ("family", "dtype"), [("gemma2", torch.float32), ("qwen2", torch.bfloat16)], ids=["gemma2", "qwen2-bfloat16"]
)
def test_the_losses_are_those_of_the_states_before_and_after(family: str, dtype: torch.dtype) -> None:
    blocks, inits = rounded_block(family, dtype)
    refined = train(blocks, 0, inits, dict.fromkeys(inits, SCHEME), calibration(epochs=4, tokens=64))
    # Batches of other sizes are summed in another order, which shows in bfloat16.
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-4
    assert refined.loss_before == pytest.approx(block_error(blocks, inits), rel=tolerance)
    assert refined.loss_after == pytest.approx(block_error(blocks, refined.inits), rel=tolerance)
    assert refined.loss_after < 0.99 * refined.loss_before
    assert all(init.weight_OI.dtype == dtype for init in refined.inits.values())


def test_the_block_gets_its_own_layers_back() -> None:
    blocks, inits = rounded_block()
    original = {name: blocks.modules[0].get_submodule(name) for name in inits}
    train(blocks, 0, inits, dict.fromkeys(inits, SCHEME), calibration(epochs=0.1))
    assert all(blocks.modules[0].get_submodule(name) is layer for name, layer in original.items())


def test_an_offset_layer_starts_at_the_init_and_its_result_is_what_it_computes() -> None:
    weight, x = torch.randn(8, 64), torch.randn(3, 64)
    init = QuantizedInit(weight, *min_max_qparams(weight, SCHEME))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        layer = OffsetLinear(init, torch.nn.Linear(64, 8, dtype=dtype), SCHEME)
        linear_in = x.to(dtype)
        assert torch.equal(
            layer(linear_in), F.linear(linear_in, init.quantized(SCHEME).dequantize().to(dtype), layer.bias)
        )
        with torch.no_grad():
            layer.offset.normal_(std=0.4)
            layer.shift.normal_(std=0.05)
        result = layer.result()
        assert result.weight_OI.dtype == dtype
        shipped = F.linear(linear_in, result.quantized(SCHEME).dequantize().to(dtype), layer.bias)
        assert torch.equal(layer(linear_in), shipped)
        assert not torch.equal(result.quantized(SCHEME).codes_OI, init.quantized(SCHEME).codes_OI)


def test_gradients_reach_offsets_and_scales() -> None:
    weight = torch.randn(8, 64)
    scale, zero_point = min_max_qparams(weight, SCHEME)
    layer = OffsetLinear(QuantizedInit(weight, scale * 0.8, zero_point), torch.nn.Linear(64, 8), SCHEME)
    layer(torch.randn(3, 64)).square().sum().backward()
    for parameter in (layer.offset, layer.shift):
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0


def test_a_block_that_would_get_worse_keeps_its_init() -> None:
    blocks, inits = rounded_block()
    refined = train(blocks, 0, inits, dict.fromkeys(inits, SCHEME), calibration(epochs=1, offset_lr=50.0, scale_lr=3.0))
    assert refined.loss_after == refined.loss_before
    assert refined.inits is inits


def test_few_sequences_are_all_trained_on_and_all_measured() -> None:
    blocks = decoder_blocks(make_model("llama"), IDS[:7], 8)
    blocks.advance_full(0)
    weight = blocks.modules[0].mlp.up_proj.weight.detach()
    inits = {"mlp.up_proj": QuantizedInit(weight, *min_max_qparams(weight, SCHEME))}
    texts: list[str] = []
    train(blocks, 0, inits, dict.fromkeys(inits, SCHEME), calibration(epochs=2, tokens=16), texts.append)
    assert len(texts) == 14
    assert all(text.startswith("loss ") for text in texts)


def test_the_seed_decides_the_order_of_the_sequences() -> None:
    codes = []
    for seed in (0, 0, 1):
        blocks, inits = rounded_block()
        refined = train(blocks, 0, inits, dict.fromkeys(inits, SCHEME), calibration(seed, epochs=2, tokens=64))
        codes.append(torch.cat([init.quantized(SCHEME).codes_OI.flatten() for init in refined.inits.values()]))
    assert torch.equal(codes[0], codes[1])
    assert not torch.equal(codes[0], codes[2])


def test_a_loss_that_is_not_finite_is_an_error_and_the_layers_come_back() -> None:
    blocks, inits = rounded_block()
    blocks.quantized[3] = torch.inf
    message = r"the loss of block 0 must stay finite; it became nan; the model's weights or this text are broken"
    with pytest.raises(ModelError, match=message):
        train(blocks, 0, inits, dict.fromkeys(inits, SCHEME), calibration(epochs=0.3))
    assert isinstance(blocks.modules[0].mlp.up_proj, torch.nn.Linear)


def test_the_method_trains_the_block() -> None:
    blocks, inits = rounded_block()
    settings = calibration(epochs=0.5, tokens=64)
    refined = BlockwiseReconstruction().refine_block(
        blocks, 0, inits, dict.fromkeys(inits, SCHEME), settings, lambda text: None
    )
    again, inits = rounded_block()
    expected = train(again, 0, inits, dict.fromkeys(inits, SCHEME), settings)
    assert (refined.loss_before, refined.loss_after) == (expected.loss_before, expected.loss_after)
