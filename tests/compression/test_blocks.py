"""DecoderBlocks: the blocks reproduce the model, statistics are those of the inputs, large streams live on disk."""

from pathlib import Path

import pytest
import torch

from nybble.compression.blocks import get_linear, set_weight
from nybble.errors import ModelError, RunError
from nybble.models import device, streamed
from nybble.models.head import last_hidden_states
from tests.helpers.compression import IDS, decoder_blocks
from tests.helpers.dense import DENSE_CASES, make_dense
from tests.helpers.tiny import FAMILIES, make_model


@pytest.mark.parametrize("family", FAMILIES)
def test_the_blocks_reproduce_the_model(family: str) -> None:
    model = make_model(family)
    blocks = decoder_blocks(model)
    for i in range(2):
        blocks.advance_full(i)
        blocks.advance_quantized(i)
    assert torch.allclose(model.base_model.norm(blocks.full), last_hidden_states(model, IDS), atol=1e-5)
    assert torch.equal(blocks.full, blocks.quantized)


@pytest.mark.parametrize(("dtype", "accuracy"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 2e-6)])
def test_statistics_are_means_over_all_tokens(
    dtype: torch.dtype, accuracy: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "has_bfloat16", lambda _: True)
    model = make_model("llama", dtype=dtype)
    inputs = {}
    for name, module in model.model.layers[1].named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(
                lambda module, args, name=name: inputs.update({name: args[0].flatten(0, -2)})
            )
    blocks = decoder_blocks(model)
    blocks.advance_full(0)
    statistics = blocks.observe(1)
    assert [shared.layers for shared in statistics] == [
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    ]
    model(IDS)
    for shared in statistics:
        x = inputs[shared.layers[0]]
        exact_II = x.double().T @ x.double() / len(x)
        assert (shared.gram_II - exact_II).norm() < accuracy * exact_II.norm()


@pytest.mark.parametrize("name", DENSE_CASES)
def test_statistics_are_those_of_the_inputs_in_the_model(name: str) -> None:
    # The layers of olmo2, olmo3 and exaone4 read the hidden states without a norm before them.
    model = make_dense(name)
    blocks = decoder_blocks(model, batch=1)  # bloom's blocks take single sequences only
    inputs = {}
    handles = [
        get_linear(blocks.modules[0], layer).register_forward_pre_hook(
            lambda module, args, layer=layer: inputs.update({layer: args[0].flatten(0, -2).clone()})
        )
        for layer in blocks.layers[0]
    ]
    model(IDS)
    for handle in handles:
        handle.remove()
    for shared in blocks.observe(0):
        for layer in shared.layers:
            x = inputs[layer]
            assert torch.allclose(shared.gram_II, x.T @ x / len(x), rtol=1e-4, atol=1e-5)


def test_observing_a_block_advances_the_full_stream_only() -> None:
    model = make_model("llama")
    observed, advanced = decoder_blocks(model), decoder_blocks(model)
    observed.observe(0)
    advanced.advance_full(0)
    assert torch.equal(observed.full, advanced.full)
    assert torch.equal(observed.quantized, decoder_blocks(model).quantized)


def test_the_quantized_stream_is_optional() -> None:
    blocks = decoder_blocks(make_model("llama"), with_quantized=False)
    assert blocks.quantized is None
    with pytest.raises(AssertionError, match="keep no quantized stream"):
        blocks.advance_quantized(0)


def test_large_streams_live_in_temporary_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = make_model("gemma2")
    small = decoder_blocks(model)
    files = []
    original = torch.from_file
    monkeypatch.setattr(torch, "from_file", lambda name, **rest: files.append(Path(name)) or original(name, **rest))
    monkeypatch.setattr(streamed, "MAX_BYTES_IN_MEMORY", 0)
    large = decoder_blocks(model, folder=tmp_path)
    assert [file.parent for file in files] == [tmp_path, tmp_path]
    assert list(tmp_path.iterdir()) == [], "the name of the file is deleted at once"
    for blocks in (small, large):
        blocks.advance_full(0)
    assert torch.equal(small.full, large.full)
    assert not torch.equal(large.full, large.quantized)


def test_large_streams_need_no_function_that_only_linux_has(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delattr("os.posix_fallocate", raising=False)
    monkeypatch.setattr(streamed, "MAX_BYTES_IN_MEMORY", 0)
    model = make_model("llama")
    large = decoder_blocks(model, folder=tmp_path)
    monkeypatch.undo()
    assert torch.equal(large.full, decoder_blocks(model).full)


def test_a_full_disk_is_an_error_with_the_size(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(streamed, "MAX_BYTES_IN_MEMORY", 0)
    monkeypatch.setattr(streamed, "_reserve", full)
    message = (
        r"must have room for 0\.0 GB of hidden states; No space left on device; free some, or use less text "
        r"\(--num_calibration_samples"
    )
    with pytest.raises(RunError, match=message):
        decoder_blocks(make_model("llama"), folder=tmp_path)


def test_inputs_that_are_not_finite_name_the_layer() -> None:
    model = make_model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[255, 3] = torch.inf
    # The first sequence, with which the blocks are recorded, has no such token.
    blocks = decoder_blocks(model, torch.cat([IDS, torch.full((1, 16), 255)]))
    message = (
        r"the inputs of model\.layers\.0\.self_attn\.q_proj must be finite; they are not on this text; "
        "the model's weights or this text are broken"
    )
    with pytest.raises(ModelError, match=message):
        blocks.observe(0)


def test_a_weight_is_set_without_a_copy() -> None:
    block = torch.nn.ModuleDict({"a": torch.nn.Linear(4, 2)})
    weight = torch.ones(2, 4)
    set_weight(block, "a", weight)
    assert get_linear(block, "a").weight.data_ptr() == weight.data_ptr()
    assert not get_linear(block, "a").weight.requires_grad
