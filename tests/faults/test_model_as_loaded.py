"""What the files hold decides which model is compressed: all of it is used, or the error says what is not."""

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from nybble.errors import ModelError
from nybble.models.loading import load
from nybble.models.weights import check_finite
from tests.faults.config_mutations import mutate
from tests.helpers.tiny import make_model, make_tokenizer, save_model

CPU = torch.device("cpu")
WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_model(tmp_path / "model", "qwen2", tie_word_embeddings=False, use_sliding_window=False)


def change(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors in the weights of a folder."""
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def load_float32(folder: Path) -> Any:
    return load(str(folder), torch.float32, CPU).model


NAMES = list(make_model("qwen2", tie_word_embeddings=False).state_dict())
NOT_FINITE = [
    pytest.param(
        name,
        value,
        marks=[pytest.mark.slow] if (math.isinf(value) and name != "model.norm.weight") or "layers.1" in name else [],
    )
    for name in NAMES
    for value in (float("nan"), float("inf"), -float("inf"))
]


@pytest.mark.parametrize(("name", "value"), NOT_FINITE)
def test_a_weight_that_is_not_finite_is_named(name: str, value: float, folder: Path) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors[name][-1:] = value

    change(folder, edit)
    row = len(make_model("qwen2", tie_word_embeddings=False).state_dict()[name]) - 1
    message = (
        rf"finite weights; {name} has NaN or infinity in 1 of {row + 1} rows \(first: row {row}\); the weights are"
    )
    with pytest.raises(ModelError, match=message):
        load_float32(folder)


def test_the_first_row_that_is_not_finite_is_named(folder: Path) -> None:
    """Opposite infinities, and rows in the middle of the embedding that no text uses."""

    def edit(tensors: dict[str, Tensor]) -> None:
        tensors["model.embed_tokens.weight"][255:258, 3] = torch.tensor([float("inf"), -float("inf"), float("nan")])

    change(folder, edit)
    with pytest.raises(
        ModelError, match=r"embed_tokens.weight has NaN or infinity in 3 of 260 rows \(first: row 255\)"
    ):
        load_float32(folder)


def test_weights_too_large_for_float16_name_the_dtype(folder: Path) -> None:
    change(folder, lambda tensors: tensors["model.norm.weight"].mul_(1e6))
    with pytest.raises(ModelError, match="model.norm.weight .*too large for float16; use --dtype float32 or bfloat16"):
        load(str(folder), torch.float16, CPU)
    assert load_float32(folder).model.norm.weight.abs().max() > 1e5


def test_buffers_of_the_files_are_checked() -> None:
    model = make_model("llama")
    model.register_buffer("counts", torch.tensor([1.0, float("nan")]))
    with pytest.raises(ModelError, match=r"m must have finite weights; counts has NaN or infinity in 1 of 2 rows"):
        check_finite(model, "m")


def test_large_weights_are_finite() -> None:
    """Their sum overflows."""
    model = make_model("llama")
    with torch.no_grad():
        model.lm_head.weight.fill_(3e38)
    check_finite(model, "m")


def test_fewer_layers_than_in_the_files_are_refused(folder: Path) -> None:
    mutate(folder, {"num_hidden_layers": 1, "layer_types": ["full_attention"], "max_window_layers": 1})
    with pytest.raises(
        ModelError, match=r"no place for 12 \(first: model.layers.1.input_layernorm.weight\); use the con"
    ):
        load_float32(folder)


@pytest.mark.parametrize(
    ("name", "is_used"),
    [
        ("v_head.summary.weight", False),
        ("score.weight", False),
        ("model.layers.0.self_attn.q_proj.weight_scale", False),
        ("model.layers.0.mlp.down_proj.bias", False),
        ("vision_tower.layers.0.weight", False),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", True),
        ("transformer.h.0.attn.masked_bias", True),
        ("embeddings.position_ids", True),
    ],
)
def test_a_tensor_without_a_place_is_named_unless_models_compute_it(name: str, is_used: bool, folder: Path) -> None:
    change(folder, lambda tensors: tensors.update({name: torch.ones(8)}))
    if is_used:
        load_float32(folder)
        return
    with pytest.raises(
        ModelError, match=rf"Qwen2ForCausalLM of config.json must use all .*no place for 1 \(first: {name}"
    ):
        load_float32(folder)


def test_a_shape_of_its_own_is_named(folder: Path) -> None:
    change(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(63)}))
    with pytest.raises(
        ModelError, match=r"must fit the weights; model.norm.weight is \[63\] in model.safetensors and \[64"
    ):
        load_float32(folder)


def split(folder: Path, kind: str) -> Path:
    """Replace the weights by three shards and an index; returns the index."""
    whole = {"safetensors": WEIGHTS, "bin": "pytorch_model.bin"}[kind]
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    stem, weight_map = whole.rsplit(".", 1)[0], {}
    for i in range(3):
        part = {name: tensors[name] for name in sorted(tensors)[i::3]}
        file = f"{stem}-0000{i + 1}-of-00003.{kind}"
        if kind == "bin":
            torch.save(part, folder / file)
        else:
            save_file(part, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = folder / f"{whole}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_shards_are_read_or_named(kind: str, folder: Path) -> None:
    expected = load_float32(folder).state_dict()
    index = split(folder, kind)
    loaded = load_float32(folder).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())
    content = json.loads(index.read_text())
    last = max(content["weight_map"].values())
    content["weight_map"] = {name: file for name, file in content["weight_map"].items() if file != last}
    index.write_text(json.dumps(content))
    with pytest.raises(ModelError, match=rf"index.json must name all weights of the folder; it does not name {last}"):
        load_float32(folder)
    (folder / last).unlink()
    with pytest.raises(ModelError, match="must have all weights of a Qwen2ForCausalLM; "):
        load_float32(folder)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_shard_that_is_not_there_is_named(kind: str, folder: Path) -> None:
    split(folder, kind)
    missing = min(folder.glob("*-00002-*"))
    missing.unlink()
    with pytest.raises(ModelError, match=rf"names 3 files of weights; 1 are not there \(first: {missing.name}\)"):
        load_float32(folder)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_layers_that_the_configuration_leaves_out_of_shards_are_named(kind: str, folder: Path) -> None:
    split(folder, kind)
    mutate(folder, {"num_hidden_layers": 1, "layer_types": ["full_attention"], "max_window_layers": 1})
    with pytest.raises(ModelError, match=r"no place for 12 \(first: model.layers.1.input_layernorm.weight\)"):
        load_float32(folder)


def test_weights_that_are_there_twice_are_refused(folder: Path) -> None:
    whole = (folder / WEIGHTS).read_bytes()
    split(folder, "safetensors")
    (folder / WEIGHTS).write_bytes(whole)
    with pytest.raises(
        ModelError, match="must hold the weights once; it holds model.safetensors and also model-00001-of"
    ):
        load_float32(folder)


TEXT = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 260,
    "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
VISION = {
    "depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64,
    "num_position_embeddings": 16,
}  # fmt: skip


def composite(folder: Path, **text: object) -> Path:
    tokens = {"image_token_id": 3, "video_token_id": 4, "vision_start_token_id": 5, "vision_end_token_id": 6}
    config = transformers.Qwen3_5Config(text_config=TEXT | text, vision_config=VISION, **tokens)
    transformers.Qwen3_5ForConditionalGeneration(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def test_parts_that_are_left_out_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "nybble")
    folder = composite(tmp_path / "composite")
    mutate(folder, {"architectures": ["Qwen3_5ForCausalLM"]})
    model = load_float32(folder)
    assert type(model).__name__ == "Qwen3_5ForCausalLM"
    said = [record.getMessage() for record in caplog.records if record.name == "nybble"]
    assert len(said) == 1
    assert "(Qwen3_5ForCausalLM); its other parts (vision or audio) are left out of the result" in said[0]


def test_a_model_without_other_parts_says_nothing(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    load_float32(folder)
    assert not [record for record in caplog.records if record.name == "nybble"]


def test_layers_of_a_text_model_with_other_parts_are_not_left_out(tmp_path: Path) -> None:
    folder = composite(tmp_path / "composite")
    text = json.loads((folder / "config.json").read_text())["text_config"]
    mutate(folder, {"text_config": text | {"num_hidden_layers": 1, "layer_types": ["linear_attention"]}})
    with pytest.raises(ModelError, match=r"Qwen3_5For\w+ of config.json must use all weights .*layers.1\."):
        load_float32(folder)
