"""Folders with float16 weights: values, files, logits and generation of every family, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from nybble.errors import ExportError
from nybble.export.base import EXPORTERS
from nybble.export.checks import exporter_of
from nybble.models.linearize import linearize
from nybble.quant.scheme import QuantScheme
from tests.helpers.cases import fast_cases, first_fast
from tests.helpers.causal_types import tiny_model
from tests.helpers.checkpoints import save_checkpoint
from tests.helpers.exports import (
    BFLOAT16_NORM,
    Export,
    check_logits_and_greedy_tokens,
    export_bfloat16,
    export_checkpoint,
    export_tiny,
    slow_values,
)
from tests.helpers.smollm2 import ANSWER, chat_ids, smollm2_checkpoint
from tests.helpers.tiny import FAMILIES, FAST_FAMILIES, save_model

HF = EXPORTERS["hf"]


@pytest.fixture(scope="module", params=fast_cases(FAMILIES, FAST_FAMILIES))
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Export:
    """A model of each family, exported once."""
    return export_tiny("hf", tmp_path_factory.mktemp(request.param), request.param)


def test_the_file_holds_the_weights(exported: Export) -> None:
    checkpoint, tensors = exported.checkpoint, load_file(exported.folder / "model.safetensors")
    for name, weight in checkpoint.quantized.items():
        stored = tensors.pop(f"{name}.weight")
        assert stored.dtype == torch.float16
        expected = slow_values(weight)
        if name in checkpoint.selection.linears:
            assert torch.equal(stored.double(), expected), name
        else:
            assert torch.equal(stored, expected.half())
            largest = float((stored.double() - expected).abs().max())
            assert exported.result.rounded[name] == pytest.approx(largest, rel=1e-6)
    assert tensors.keys() == checkpoint.others.keys(), "and all other tensors; no head that is tied"
    for name, tensor in checkpoint.others.items():
        assert torch.equal(tensor.float(), tensors[name].float())


@pytest.mark.parametrize(
    ("value", "stored", "dtype"),
    [(1.5, torch.float16, "float16"), (70000.0, torch.bfloat16, "float32"), (1e-9, torch.bfloat16, "float32")],
)
def test_a_model_in_bfloat16_has_one_dtype_where_that_is_exact(
    tmp_path: Path, value: float, stored: torch.dtype, dtype: str
) -> None:
    exported = export_bfloat16("hf", tmp_path, value)
    dtypes = {name: tensor.dtype for name, tensor in load_file(exported.folder / "model.safetensors").items()}
    assert dtypes.pop(BFLOAT16_NORM) == stored
    assert set(dtypes.values()) == {torch.float16}
    assert json.loads((exported.folder / "config.json").read_text())["dtype"] == dtype
    model = AutoModelForCausalLM.from_pretrained(exported.folder)
    for name, tensor in exported.checkpoint.others.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(model.get_parameter(name).float(), tensor.float())


def test_transformers_uses_every_tensor(exported: Export) -> None:
    _, info = AutoModelForCausalLM.from_pretrained(exported.folder, output_loading_info=True)
    assert not any(info.values()), info


def test_logits_and_greedy_tokens_are_those_of_torch(exported: Export) -> None:
    check_logits_and_greedy_tokens(HF, exported)


def test_config_names_the_class_and_a_dtype_that_holds_everything(exported: Export) -> None:
    config = exported.checkpoint.config
    gemma = config.model_type.startswith("gemma")
    model = HF.open_model(exported.folder, config)
    assert model.dtype == torch.float32, "the norms are random float32 numbers"
    for name, tensor in exported.checkpoint.others.items():
        assert torch.equal(model.get_parameter(name), tensor.float())
    limits = HF.limits(config)
    assert json.loads((exported.folder / "config.json").read_text())["architectures"] == [type(model).__name__]
    assert len(limits) == (1 if gemma else 0)
    assert all("exceed the range of float16" in limit and "from 11 to 8 bits" in limit for limit in limits)


@pytest.mark.parametrize(
    "scheme",
    first_fast(
        1, [QuantScheme(group_size=32, symmetric=True), QuantScheme(group_size=64), QuantScheme(group_size=128)]
    ),
)
def test_group_sizes_and_symmetric_schemes(tmp_path: Path, scheme: QuantScheme) -> None:
    exported = export_tiny("hf", tmp_path, "qwen2", scheme, hidden_size=128, intermediate_size=256)
    tensors = load_file(exported.folder / "model.safetensors")
    for name in exported.checkpoint.selection.linears:
        assert torch.equal(tensors[f"{name}.weight"].double(), slow_values(exported.checkpoint.quantized[name]))


def test_a_changed_weight_is_found(tmp_path: Path) -> None:
    exported = export_tiny("hf", tmp_path, "smollm", num_hidden_layers=1)
    path = exported.folder / "model.safetensors"
    tensors, name = load_file(path), exported.checkpoint.selection.linears[3]
    tensors[f"{name}.weight"][2, 5] += 0.5
    save_file(tensors, path, {"nybble": "hf", "nybble.quantized": " ".join(exported.checkpoint.shapes)})
    with pytest.raises(ExportError, match=f"the values of {name} read back differently"):
        HF.compare_weights(exported.checkpoint.quantized, exported.folder)


def test_only_nybbles_folders_are_recognized(tmp_path: Path) -> None:
    """A folder of a 16-bit model has files of the same names."""
    exported = export_tiny("hf", tmp_path, "smollm", num_hidden_layers=1)
    assert exporter_of(exported.folder) is HF
    assert exporter_of(save_model(tmp_path / "other", "smollm", num_hidden_layers=1)) is None


def test_conv1d_layers_are_written_as_transformers_has_them(tmp_path: Path) -> None:
    model = linearize(tiny_model("gpt2"))
    exported = export_checkpoint("hf", save_checkpoint(tmp_path / "quantized", model), tmp_path / "hf")
    reloaded, ids = AutoModelForCausalLM.from_pretrained(exported.folder, dtype=torch.float32), torch.arange(9)[None]
    for name in exported.checkpoint.selection.linears:
        expected = exported.checkpoint.quantized[name].dequantize()
        assert isinstance(reloaded.get_submodule(name), Conv1D)
        assert torch.equal(reloaded.get_submodule(name).weight.T, expected)
        assert torch.equal(HF.read_weights(exported.folder)[name], expected)
    torch.testing.assert_close(reloaded(ids).logits, model(ids).logits, rtol=1e-2, atol=1e-2)  # the head is rounded


def test_code_that_comes_with_a_model_is_refused(tmp_path: Path) -> None:
    exported = export_tiny("hf", tmp_path, "smollm", num_hidden_layers=1)
    config, selection = exported.checkpoint.config, exported.checkpoint.selection
    HF.check(config, selection)
    config.auto_map = {"AutoModelForCausalLM": "modeling.Model"}
    with pytest.raises(ExportError, match="hf needs a model whose code is in transformers; llama .*; remove hf from"):
        HF.check(config, selection)


@pytest.mark.slow
def test_the_real_model(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    exported = export_checkpoint("hf", smollm2_checkpoint(tmp_path_factory), tmp_path / "export")
    assert exported.result.logit_difference is not None
    assert list(exported.result.rounded) == ["model.embed_tokens"]
    assert json.loads((exported.folder / "config.json").read_text())["dtype"] == "float16"
    model, ids = HF.open_model(exported.folder, exported.checkpoint.config), chat_ids(exported.checkpoint.tokenizer)
    answer = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert ANSWER in exported.checkpoint.tokenizer.decode(answer)
