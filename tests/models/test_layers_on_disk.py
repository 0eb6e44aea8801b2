"""Decoder blocks on disk: they have the bits of the loaded model, are there only while they are needed, and are read
with all conversions of transformers. What cannot be read like this is refused."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from nybble.errors import ModelError, RunError
from nybble.models import streamed
from nybble.models.head import last_hidden_states
from nybble.models.layers_on_disk import LayersOnDisk, block_on_disk, layers_on_disk, tensors_of
from nybble.models.loading import LoadedModel, load, model_fingerprint
from nybble.models.streamed import BlockwiseForward, forwards, new_stream
from tests.helpers.causal_types import save_tiny
from tests.helpers.mixtures import save_mixture
from tests.helpers.tiny import FAMILIES, save_model

CPU = torch.device("cpu")
IDS = torch.arange(48).view(3, 16) * 5 % 251


def both(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """The model in memory and on disk."""
    return (load(str(folder), dtype, CPU, offload=offload).model for offload in (False, True))  # type: ignore[return-value]


def on_disk(folder: Path) -> Any:
    return load(str(folder), torch.float32, CPU, offload=True).model


def layers(model: Any) -> LayersOnDisk:
    found = layers_on_disk(model)
    assert found is not None
    return found


def in_memory(model: Any) -> int:
    """Numbers in the parameters of the blocks that are in memory."""
    return sum(p.numel() for block in layers(model).modules for p in block.parameters() if p.device.type != "meta")


SAVED: dict[str, Callable[[Path, str], Path]] = {
    **dict.fromkeys(FAMILIES, save_model),
    **dict.fromkeys(["mixtral", "gpt_oss", "llama4", "deepseek_v3"], save_mixture),
    **dict.fromkeys(["gpt2", "gptj", "openai-gpt", "opt"], save_tiny),
}
FAST = {"smollm", "mixtral"}


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in SAVED])
@torch.no_grad()
def test_all_weights_buffers_and_logits_have_the_bits_of_the_loaded_model(name: str, tmp_path: Path) -> None:
    folder = SAVED[name](tmp_path / name, name)
    for dtype in (torch.float32, torch.bfloat16):
        loaded, other = both(folder, dtype)
        expected = loaded.state_dict() | dict(loaded.named_buffers())
        found = {key: tensor.clone() for key, tensor in tensors_of(other, expected)}
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
        assert all(found[key].dtype == tensor.dtype for key, tensor in expected.items())
        assert model_fingerprint(other) == model_fingerprint(loaded)
        logits = loaded(input_ids=IDS[:1], use_cache=False).logits
        assert torch.equal(other(input_ids=IDS[:1], use_cache=False).logits, logits)
        assert in_memory(other) == 0
        with forwards(other, IDS, 1)(1):
            streamed_logits = other(input_ids=IDS[1:2], use_cache=False).logits
        assert torch.equal(streamed_logits, loaded(input_ids=IDS[1:2], use_cache=False).logits)


def test_a_block_is_in_memory_while_it_is_needed(tmp_path: Path) -> None:
    model = on_disk(save_model(tmp_path / "model", "llama"))
    own, size = layers(model), sum(p.numel() for p in layers(model).modules[0].parameters())
    assert in_memory(model) == 0
    with own.loaded(0), own.loaded(0):
        assert in_memory(model) == size
        with block_on_disk(model, 1):
            assert in_memory(model) == 2 * size
        own.modules[0].mlp.up_proj.weight.zero_()  # type: ignore[union-attr,operator]
    assert in_memory(model) == 0
    with own.loaded(0) as block:
        assert bool(block.mlp.up_proj.weight.any()), "what was changed is lost"  # type: ignore[union-attr]
        sizes: list[int] = []
        block.register_forward_hook(lambda *_: sizes.append(in_memory(model)))
        model(input_ids=IDS)
        assert sizes == [size]
    own.replace(0, lambda: {key: torch.zeros_like(tensor) for key, tensor in own._read[1]().items()})
    assert not any(bool(tensor.any()) for key, tensor in tensors_of(model, ["model.layers.0.mlp.up_proj.weight"]))


def test_a_forward_that_fails_lets_its_block_go(tmp_path: Path) -> None:
    model = on_disk(save_model(tmp_path / "model", "llama"))

    def fail(*_: Any) -> None:
        raise KeyError

    handle = layers(model).modules[1].mlp.register_forward_hook(fail)  # type: ignore[union-attr,operator]
    with pytest.raises(KeyError):
        model(input_ids=IDS)
    handle.remove()
    assert in_memory(model) == 0
    model(input_ids=IDS)


def test_a_copy_of_a_block_is_a_block_in_memory(tmp_path: Path) -> None:
    model = on_disk(save_model(tmp_path / "model", "llama"))
    with layers(model).loaded(0) as block:
        twin = copy.deepcopy(block)
    assert not any(p.is_meta for p in twin.parameters())
    assert in_memory(model) == 0


@torch.no_grad()
def test_many_sequences_read_each_block_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, model = both(save_model(tmp_path / "model", "gemma2"))
    monkeypatch.setattr(streamed, "MAX_BYTES_IN_MEMORY", 0)
    read: list[int] = []
    for i in range(2):
        original = layers(model)._read[i]
        layers(model).replace(i, lambda i=i, original=original: read.append(i) or original())  # type: ignore[misc]
    batches = [IDS[:2], IDS[2:, :7]]
    calls = BlockwiseForward(model, dict(enumerate(batches)), tmp_path)
    for number, ids in enumerate(batches):
        with calls.at(number):
            assert torch.equal(last_hidden_states(model, ids), last_hidden_states(loaded, ids))
    assert read == [0, 1]
    assert [path.name for path in tmp_path.iterdir()] == ["model"], "the file of the stream has no name"


def test_a_model_in_memory_has_ordinary_forwards(tmp_path: Path) -> None:
    loaded, _ = both(save_model(tmp_path / "model", "llama"))
    with forwards(loaded, IDS, 1)(0):
        assert loaded(input_ids=IDS, use_cache=False).logits.shape[:2] == (3, 16)


def test_a_stream_that_does_not_fit_on_the_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(streamed, "MAX_BYTES_IN_MEMORY", 0)
    monkeypatch.setattr(streamed, "_reserve", full)
    with pytest.raises(RunError, match=r"must have room for 0\.0 GB of hidden states; No space left on device"):
        new_stream((2, 3), torch.float32, tmp_path)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "gemma3n_text",
            "needs decoder blocks that are a chain.*in gemma3n_text block 0 is not; use --offload",
        ),
        ("xlm", "needs decoder blocks that are a chain.*in xlm they are not; use --offload none"),
        ("cpmant", "uses the weights of a decoder block in the forward of this block only; CpmAntForCausalLM does not"),
    ],
)
def test_a_model_whose_blocks_are_no_chain_is_refused(name: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=words):
        on_disk(save_tiny(tmp_path / name, name))


def test_weights_that_a_forward_changes_are_noted(tmp_path: Path) -> None:
    assert layers(on_disk(save_tiny(tmp_path / "rwkv", "rwkv"))).changed
    model = on_disk(save_model(tmp_path / "model", "llama"))

    def change(module: nn.Module, *_: Any) -> None:
        with torch.no_grad():
            module.weight.mul_(2)  # type: ignore[operator,union-attr]

    layers(model).modules[0].mlp.up_proj.register_forward_hook(change)  # type: ignore[union-attr,operator]
    model(input_ids=IDS)
    assert layers(model).changed == {"model.layers.0.mlp.up_proj.weight"}


def sharded(folder: Path, family: str = "llama") -> Path:
    """A model in three files with an index."""
    save_model(folder, family)
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="200KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folder


def test_blocks_are_found_in_any_shard(tmp_path: Path) -> None:
    loaded, other = both(sharded(tmp_path / "model"))
    assert model_fingerprint(other) == model_fingerprint(loaded)


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


LAYER = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.pop(LAYER),
        lambda tensors: tensors.update({LAYER: torch.zeros(3, 3)}),
        lambda tensors: tensors.update({"model.layers.1.mlp.more.weight": torch.zeros(3, 3)}),
        lambda tensors: tensors[LAYER].fill_(torch.nan),
        lambda tensors: tensors.pop("model.embed_tokens.weight"),
    ],
    ids=["missing", "other shape", "unused", "not finite", "no embedding"],
)
def test_wrong_weights_are_refused_in_the_words_for_a_loaded_model(
    change: Callable[[dict[str, torch.Tensor]], None], tmp_path: Path
) -> None:
    folder = save_model(tmp_path / "model", "llama")
    edit(folder, change)
    messages = []
    for offload in (False, True):
        with pytest.raises(ModelError) as error:
            load(str(folder), torch.float32, CPU, offload=offload)
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def test_what_cannot_be_read_in_part_is_refused(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "model")
    next(iter(sorted(folder.glob("model-*.safetensors")))).unlink()
    with pytest.raises(ModelError, match="names 3 files of weights; 1 are not there"):
        on_disk(folder)
    folder = save_model(tmp_path / "bin", "llama")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="--offload disk needs weights in safetensors files.*use --offload none"):
        on_disk(folder)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match="model.gguf is a GGUF file, which is read as a whole; use --offload none"):
        on_disk(tmp_path / "model.gguf")


def test_files_that_vanish_during_a_run_are_one_line(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "llama")
    model = on_disk(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"must stay as it is while a run reads .*; block 0 cannot be read .*--resume"):
        model(input_ids=IDS)


def test_a_loaded_model_has_the_files_and_the_tokenizer_too(tmp_path: Path) -> None:
    loaded = load(str(save_model(tmp_path / "model", "llama")), torch.bfloat16, CPU, offload=True)
    assert isinstance(loaded, LoadedModel)
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())
    assert loaded.tokenizer("ab").input_ids
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}
