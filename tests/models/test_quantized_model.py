"""The folder quantized/: what is written, that it is read back, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from nybble.errors import RunError
from nybble.models import quantized_file, quantized_model
from nybble.models.checkpoint import open_checkpoint
from nybble.models.loading import LoadedModel
from nybble.models.selection import select_layers
from nybble.quant.scheme import INT8_PER_ROW
from nybble.quant.weight import QuantizedWeight
from tests.helpers.cases import fast_cases
from tests.helpers.rounding import GROUPS_OF_32, round_model_to_nearest
from tests.helpers.tiny import FAMILIES, FAST_FAMILIES, make_model, make_tokenizer


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Any, dict[str, QuantizedWeight]]:
    """A folder with a tiny model, the model, and its quantized weights."""
    model = make_model("llama", num_hidden_layers=1)
    quantized = round_model_to_nearest(model)
    quantized_model.save_quantized(tmp_path / "quantized", LoadedModel(model, make_tokenizer(), "tiny"), quantized)
    return tmp_path / "quantized", model, quantized


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", fast_cases(FAMILIES, FAST_FAMILIES))
def test_a_saved_model_is_loaded_to_the_bit(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = make_model(family, dtype=dtype)
    quantized = round_model_to_nearest(model)
    quantized_model.save_quantized(tmp_path / "quantized", LoadedModel(model, make_tokenizer(), "tiny"), quantized)
    loaded, tokenizer, read = quantized_model.load_quantized(tmp_path / "quantized", dtype)
    assert read.keys() == quantized.keys()
    for name, weight in quantized.items():
        assert torch.equal(weight.codes_OI, read[name].codes_OI)
        assert torch.equal(weight.scale_OG, read[name].scale_OG)
        assert torch.equal(weight.zero_point_OG, read[name].zero_point_OG)
        assert weight.scheme == read[name].scheme
    ids = torch.arange(16).view(1, 16)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    tied = loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert tied == model.config.tie_word_embeddings
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert tokenizer("abc").input_ids == make_tokenizer()("abc").input_ids


@pytest.mark.parametrize("family", ["smollm", "llama"])
@pytest.mark.parametrize("kept", ["model.embed_tokens", "q_proj"])
def test_layers_that_stay_in_16_bits_are_saved_once(family: str, kept: str, tmp_path: Path) -> None:
    """A tied head that is not quantized shares its weight with the embedding."""
    model = make_model(family, num_hidden_layers=1)
    selection = select_layers(model)
    schemes = dict.fromkeys(selection.embeddings, INT8_PER_ROW) | dict.fromkeys(selection.linears, GROUPS_OF_32)
    schemes = {name: scheme for name, scheme in schemes.items() if not name.endswith(kept)}
    quantized = round_model_to_nearest(model, schemes=schemes)
    quantized_model.save_quantized(tmp_path / "quantized", LoadedModel(model, make_tokenizer(), "tiny"), quantized)
    loaded, ids = quantized_model.load_quantized(tmp_path / "quantized", torch.float32).model, torch.arange(16)[None]
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    checkpoint = open_checkpoint(tmp_path / "quantized")
    assert dict(checkpoint.selection.schemes) == schemes
    assert torch.allclose(checkpoint.build()(ids).logits, model(ids).logits, atol=1e-5)


def test_the_dtype_of_loading_need_not_be_that_of_saving(saved: tuple[Path, Any, dict[str, QuantizedWeight]]) -> None:
    model = quantized_model.load_quantized(saved[0], torch.bfloat16).model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_the_weights_file_has_the_documented_layout(saved: tuple[Path, Any, dict[str, QuantizedWeight]]) -> None:
    folder, model, quantized = saved
    tensors = load_file(folder / "weights.safetensors")
    for name, weight in quantized.items():
        rows, columns = weight.codes_OI.shape
        codes = tensors.pop(f"{name}.weight.codes")
        assert codes.dtype == torch.uint8
        if weight.scheme.bits == 4:  # the even position is in the low nibble
            assert codes.shape == (rows, columns // 2)
            assert torch.equal(codes & 15, weight.codes_OI[:, 0::2])
            assert torch.equal(codes >> 4, weight.codes_OI[:, 1::2])
        else:
            assert torch.equal(codes, weight.codes_OI)
        scale, zero_point = tensors.pop(f"{name}.weight.scale"), tensors.pop(f"{name}.weight.zero_point")
        assert (scale.dtype, zero_point.dtype) == (torch.float16, torch.uint8)
        assert torch.equal(scale.float(), weight.scale_OG)
        assert torch.equal(zero_point, weight.zero_point_OG)
    norms = {name: tensor for name, tensor in model.state_dict().items() if "norm" in name}
    assert tensors.keys() == norms.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in norms.items())
    with safe_open(folder / "weights.safetensors", "pt") as file:
        note = json.loads(file.metadata()["note"])
    assert note["format"] == "nybble-2"
    assert note["schemes"]["lm_head"] == {"bits": 8, "group_size": None, "symmetric": True}
    assert note["schemes"]["model.layers.0.mlp.up_proj"] == {"bits": 4, "group_size": 32, "symmetric": False}


def test_names_and_shapes_are_read_from_the_header(saved: tuple[Path, Any, dict[str, QuantizedWeight]]) -> None:
    folder, model, quantized = saved
    layout = quantized_file.read_layout(folder)
    assert layout.quantized == {name: (weight.codes_OI.shape, weight.scheme) for name, weight in quantized.items()}
    names = {"model.norm.weight"} | {f"model.layers.0.{name}_layernorm.weight" for name in ("input", "post_attention")}
    assert layout.others == dict.fromkeys(names, (64,))
    assert quantized_model.unquantized_tensors(model, quantized).keys() == names


def test_a_tied_head_is_left_out_of_the_unquantized_tensors() -> None:
    model = make_model("smollm", num_hidden_layers=1)
    assert "lm_head.weight" in model.state_dict()
    names = quantized_model.unquantized_tensors(model, ["model.embed_tokens"])
    assert "lm_head.weight" not in names
    assert "model.layers.0.mlp.up_proj.weight" in names


def test_fingerprint_follows_the_weights_file(saved: tuple[Path, Any, dict[str, QuantizedWeight]]) -> None:
    folder, _, _ = saved
    before = quantized_file.weights_fingerprint(folder)
    assert len(before) == 16
    assert quantized_file.weights_fingerprint(folder) == before
    with (folder / "weights.safetensors").open("ab") as file:
        file.write(b"x")
    assert quantized_file.weights_fingerprint(folder) != before


def test_a_file_of_another_program_is_refused(saved: tuple[Path, Any, dict[str, QuantizedWeight]]) -> None:
    save_file({"a": torch.zeros(2)}, saved[0] / "weights.safetensors")
    with pytest.raises(RunError, match=r"must be a 4-bit model that nybble wrote \(nybble-2\); it is something else"):
        quantized_file.load_weights(saved[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 2}, "missing: model.layers.1.input_layernorm.weight, .*, unknown: none"),
        ({"num_hidden_layers": 0}, "missing: none, unknown: model.layers.0.input_layernorm.weight, "),
    ],
)
def test_weights_that_do_not_fit_the_configuration_are_refused(
    changes: dict[str, int], message: str, saved: tuple[Path, Any, dict[str, QuantizedWeight]]
) -> None:
    config = json.loads((saved[0] / "config.json").read_text())
    (saved[0] / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(RunError, match=f"must hold the tensors of the model in its config.json; {message}"):
        quantized_model.load_quantized(saved[0], torch.float32)


def test_remote_code_of_a_saved_model_needs_trust(saved: tuple[Path, Any, dict[str, QuantizedWeight]]) -> None:
    config = json.loads((saved[0] / "config.json").read_text())
    auto_map = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}
    (saved[0] / "config.json").write_text(json.dumps(config | {"model_type": "mine", "auto_map": auto_map}))
    with pytest.raises(RunError, match="needs Python code that comes with the model; if you trust it, add --trust"):
        quantized_model.load_config(saved[0], trust_remote_code=False)
