"""The chain of blocks is the model; statistics are those of the inputs; streams larger than memory."""

from pathlib import Path

import pytest
import torch

from nybble.compress import blocks as compress_blocks
from nybble.compress.blocks import DecoderBlocks
from nybble.compress.chain import check_chain
from nybble.errors import ModelError, RunError
from nybble.models import selection
from nybble.models.head import last_hidden_states
from tests.tiny import FAMILIES, make_model

IDS = torch.randint(0, 255, (5, 16), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_chain_is_the_model(family: str) -> None:
    model = make_model(family)
    blocks = DecoderBlocks(model, selection.select_layers(model).int4, IDS, 2)
    for i in range(2):
        blocks.advance_full(i)
        blocks.advance_quantized(i)
    assert torch.allclose(model.base_model.norm(blocks.full), last_hidden_states(model, IDS), atol=1e-5)
    assert torch.equal(blocks.full, blocks.quantized)


def test_statistics_are_means_over_tokens() -> None:
    model = make_model("llama", dtype=torch.float64)
    seen = {}
    layers = model.model.layers[1]
    for name, module in layers.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(
                lambda module, args, name=name: seen.update({name: args[0].flatten(0, -2)})
            )
    blocks = DecoderBlocks(model, selection.select_layers(model).int4, IDS, 2)
    blocks.advance_full(0)
    statistics = blocks.observe(1)
    assert [s.layers for s in statistics] == [
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",), ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",),
    ]  # fmt: skip
    model(IDS)
    for shared in statistics:
        x = seen[shared.layers[0]]
        assert torch.allclose(shared.gram_II, x.T @ x / len(x))


def test_large_streams_live_on_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = make_model("gemma2")
    small = DecoderBlocks(model, selection.select_layers(model).int4, IDS, 2)
    files = []
    original = torch.from_file
    monkeypatch.setattr(torch, "from_file", lambda name, **rest: files.append(Path(name)) or original(name, **rest))
    monkeypatch.setattr(compress_blocks, "IN_MEMORY", 0)
    large = DecoderBlocks(model, selection.select_layers(model).int4, IDS, 2, folder=tmp_path)
    assert [file.parent for file in files] == [tmp_path, tmp_path]
    assert list(tmp_path.iterdir()) == [], "deleted at once, the mapping lives on"
    for blocks in (small, large):
        blocks.advance_full(0)
    assert torch.equal(small.full, large.full)
    assert not torch.equal(large.full, large.quantized)


def test_a_full_disk_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    model = make_model("llama")
    monkeypatch.setattr(compress_blocks, "IN_MEMORY", 0)
    monkeypatch.setattr(compress_blocks.os, "posix_fallocate", full)
    with pytest.raises(
        RunError,
        match=r"must have room for 0\.0 GB of calibration; No space left on device; free some, or use fewer --calib_samples",
    ):
        DecoderBlocks(model, selection.select_layers(model).int4, IDS, 2, folder=tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_a_chain(family: str) -> None:
    model = make_model(family)
    check_chain(model, selection.select_layers(model).int4, IDS[:2])


def test_blocks_that_take_something_of_the_tokens_are_refused() -> None:
    model = make_model("llama")
    original = model.model.layers[1].forward
    model.model.layers[1].forward = lambda hidden_states, **rest: (
        original(hidden_states, **rest) + rest["of_tokens"].mean()
    )
    handle = model.model.layers[1].register_forward_pre_hook(
        lambda module, args, kwargs: (args, {"of_tokens": seen[0]} | kwargs), with_kwargs=True
    )
    seen = [torch.zeros(1)]
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.insert(0, kwargs["input_ids"].float()), with_kwargs=True
    )
    with pytest.raises(
        ModelError, match=r"the blocks of llama must be a chain, .*; block 1 is not; use the method rtn"
    ):
        check_chain(model, selection.select_layers(model).int4, IDS[:2])
    handle.remove()


def test_one_large_token_does_not_hide_wrong_ones() -> None:
    model = make_model("llama")
    calls = [0]

    def noise(module: torch.nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        changed = output + torch.randn_like(output) * (calls[0] > 1)
        changed[:, 0] = 1e5
        return changed

    model.model.layers[1].register_forward_hook(noise)
    with pytest.raises(ModelError, match="block 1 is not"):
        check_chain(model, selection.select_layers(model).int4, IDS[:2])


def test_inputs_that_are_not_finite_name_the_layer() -> None:
    model = make_model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[255, 3] = torch.inf
    ids = torch.cat([IDS, torch.full((1, 16), 255)])  # the first sequence, which all blocks are tried on, is fine
    blocks = DecoderBlocks(model, selection.select_layers(model).int4, ids, 2)
    with pytest.raises(
        ModelError,
        match=r"the inputs of model\.layers\.0\.self_attn\.q_proj must be finite; they are not on this text; the model's weights or this text are broken",
    ):
        blocks.observe(0)


def test_blocks_that_are_no_chain_are_refused() -> None:
    model = make_model("llama")
    calls = [0]

    def drift(module: torch.nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        return output * calls[0]

    model.model.layers[1].register_forward_hook(drift)
    with pytest.raises(
        ModelError, match=r"the blocks of llama must be a chain, .*; block 1 is not; use the method rtn"
    ):
        DecoderBlocks(model, selection.select_layers(model).int4, IDS, 2)


def test_a_model_without_a_list_of_blocks_is_refused() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    with pytest.raises(ModelError, match=r"Sequential must keep its decoder blocks in one nn\.ModuleList"):
        compress_blocks.find_block_list(model, ["0"])


def test_blocks_that_need_the_size_of_the_batch_are_refused() -> None:
    from transformers import BloomConfig, BloomForCausalLM

    model = BloomForCausalLM(BloomConfig(vocab_size=256, hidden_size=64, n_layer=2, n_head=4)).eval()
    with pytest.raises(
        ModelError, match=r"the blocks of bloom must be a chain, .*; block 0 is not; use the method rtn"
    ):
        check_chain(model, selection.select_layers(model).int4, IDS[:2])


def test_outputs_of_a_block_that_are_not_finite_are_named() -> None:
    model = make_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(
        ModelError,
        match=r"the outputs of block 1 \(mlp\.down_proj\) must be finite; they are not on this text; .* are broken",
    ):
        check_chain(model, selection.select_layers(model).int4, IDS[:2])
