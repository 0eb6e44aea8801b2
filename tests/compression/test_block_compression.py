"""One block: the stages of a combination run in order, the streams advance, and a stored block is restored exactly."""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from nybble.compression.base import FoldingMethod, RefinedBlock, RefinementMethod
from nybble.compression.block_compression import BlockCompressor, share_model_memory
from nybble.compression.blocks import DecoderBlocks
from nybble.compression.calibration import BlockwiseConfig, Calibration
from nybble.compression.init import QuantizedInit
from nybble.compression.methods import MethodCombination, combine
from nybble.compression.store import BlockStore
from nybble.models.selection import select_layers
from nybble.quant.grid import min_max_qparams
from nybble.quant.scheme import QuantScheme
from tests.helpers.compression import decoder_blocks
from tests.helpers.tiny import make_model

SCHEME = QuantScheme(group_size=32)
IDS = torch.randint(0, 255, (16, 16), generator=torch.Generator().manual_seed(0))
ALL = ("awq", "se", "gptq", "blockwise")


def schemes(blocks: DecoderBlocks) -> dict[str, QuantScheme]:
    return {prefix + name: SCHEME for i, prefix in enumerate(blocks.prefixes) for name in blocks.layers[i]}


class Marker(FoldingMethod):
    """Changes nothing; records when it ran."""

    def __init__(self, events: list[str]) -> None:
        self.events = events

    def fold_block(self, name, block, statistics, schemes):  # type: ignore[no-untyped-def]
        """Record the call."""
        self.events.append(f"fold {name} {len(statistics)}")


class HalfLoss(RefinementMethod):
    """Keeps the states; says that it has halved the loss."""

    def __init__(self, events: list[str], loss: float) -> None:
        self.events, self.loss = events, loss

    def refine_block(  # type: ignore[no-untyped-def]
        self, blocks: DecoderBlocks, i: int, inits: dict[str, QuantizedInit], schemes, calibration, progress: Callable
    ) -> RefinedBlock:
        """Record the call."""
        self.events.append(f"refine {i} {len(inits)}")
        progress("working")
        return RefinedBlock(inits, self.loss, self.loss / 2)


def compressor(
    family: str = "llama", methods: MethodCombination | None = None, store: BlockStore | None = None, **options: object
) -> BlockCompressor:
    calibration = Calibration(IDS, blockwise=BlockwiseConfig(epochs=0.5), store=store)
    blocks = decoder_blocks(make_model(family), IDS, 8, **options)
    methods = methods or combine(ALL)
    for folding in methods.folding:
        folding.prepare(blocks.model, select_layers(blocks.model).linears)
    return BlockCompressor(blocks, methods, schemes(blocks), calibration, lambda layers, text: None)


def test_stages_run_in_order_and_report_their_progress() -> None:
    events: list[str] = []
    methods = replace(combine(()), folding=(Marker(events),), refinement=(HalfLoss(events, 8.0), HalfLoss(events, 4.0)))
    one = replace(compressor(methods=methods), progress=lambda layers, text: events.append(f"{layers} {text}"))
    result = one.compress_block(0)
    assert events[0] == "fold model.layers.0 4"
    assert [event.split(":")[0] for event in events[1:8]] == [
        f"1 model.layers.0.{name}" for name in one.blocks.layers[0]
    ]
    assert "output error" in events[1]
    assert events[8:] == ["refine 0 7", "0 model.layers.0: working"] * 2
    assert result.losses == (8.0, 2.0), "from before the first refinement to after the last"


def test_refined_states_are_measured_again() -> None:
    class Spoiler(RefinementMethod):
        def refine_block(self, blocks, i, inits, schemes, calibration, progress):  # type: ignore[no-untyped-def]
            return RefinedBlock({name: replace(init, scale_OG=2 * init.scale_OG) for name, init in inits.items()}, 1, 2)

    plain = compressor(methods=combine(())).compress_block(0)
    spoiled = compressor(methods=replace(combine(()), refinement=(Spoiler(),))).compress_block(0)
    for name, error in spoiled.errors.items():
        assert error.compressed > 1.5 * plain.errors[name].compressed
        assert error.rtn == plain.errors[name].rtn


def test_rtn_is_as_good_as_itself() -> None:
    for error in compressor(methods=combine(())).compress_block(0).errors.values():
        assert error.compressed == pytest.approx(error.rtn, rel=1e-5)


def test_the_quantized_stream_goes_through_the_4_bit_weights() -> None:
    one = compressor(methods=combine(()))
    inputs = one.blocks.quantized.clone()
    result = one.compress_block(0)
    block = one.blocks.modules[0]
    for name, init in result.inits.items():
        assert block.get_submodule(name).weight.data_ptr() == init.weight_OI.data_ptr()
        block.get_submodule(name).weight = torch.nn.Parameter(init.quantized(SCHEME).dequantize(), requires_grad=False)
    with torch.no_grad():
        expected = torch.cat([one.blocks.run(0, inputs[part]) for part in one.blocks.batches()])
    assert torch.equal(one.blocks.quantized, expected)
    assert not torch.equal(one.blocks.quantized, one.blocks.full)


@pytest.mark.parametrize("family", ["gemma2", "qwen2"])
def test_a_restored_block_is_the_block_that_was_stored(family: str, tmp_path: Path) -> None:
    first = compressor(family, store=BlockStore(tmp_path / "blocks", "same"))
    second = compressor(family, store=BlockStore(tmp_path / "blocks", "same"))
    texts: list[str] = []
    second = replace(second, progress=lambda layers, text: texts.append(f"{layers} {text}"))
    compressed, restored = first.compress_block(0), second.compress_block(0)
    assert texts == ["7 model.layers.0: restored"]
    assert restored.losses == compressed.losses
    assert restored.errors == compressed.errors
    for name, init in compressed.inits.items():
        for key, tensor in vars(init).items():
            assert torch.equal(getattr(restored.inits[name], key), tensor)
    state = second.blocks.modules[0].state_dict()
    for key, value in first.blocks.modules[0].state_dict().items():
        assert torch.equal(state[key], value), key
    assert torch.equal(second.blocks.full, first.blocks.full)
    assert torch.equal(second.blocks.quantized, first.blocks.quantized)


def test_a_block_stored_for_another_model_is_compressed_again(tmp_path: Path) -> None:
    compressor(store=BlockStore(tmp_path / "blocks", "one")).compress_block(0)
    texts: list[str] = []
    other = replace(
        compressor(store=BlockStore(tmp_path / "blocks", "two")), progress=lambda layers, text: texts.append(text)
    )
    other.compress_block(0)
    assert not any("restored" in text for text in texts)


def test_a_block_without_4_bit_layers_is_not_refined() -> None:
    model = make_model("llama")
    names = [f"model.layers.1.mlp.{part}_proj" for part in ("gate", "up", "down")]
    blocks = DecoderBlocks(model, names, IDS, 8)
    one = BlockCompressor(blocks, combine(ALL[1:]), schemes(blocks), Calibration(IDS), lambda layers, text: None)
    before = blocks.full.clone()
    result = one.compress_block(0)
    assert asdict(result) == {"inits": {}, "errors": {}, "losses": None}
    assert not torch.equal(blocks.full, before)
    assert torch.equal(blocks.full, blocks.quantized)


def test_inits_share_the_memory_of_the_model_after_it_has_moved() -> None:
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(32, 4), "b": torch.nn.Linear(32, 4)})
    inits = {
        name: QuantizedInit(layer.weight.clone(), *min_max_qparams(layer.weight, SCHEME))
        for name, layer in model.items()
    }
    share_model_memory(inits, model, ["a"])
    assert inits["a"].weight_OI.data_ptr() == model["a"].weight.data_ptr()
    assert not inits["a"].weight_OI.requires_grad
    assert inits["b"].weight_OI.data_ptr() != model["b"].weight.data_ptr()
