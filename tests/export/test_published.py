"""The layout of models on the hub: every row of every weight has one place there, and exports in this layout load."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from nybble.errors import ExportError, OptionError
from nybble.export import EXPORTERS
from nybble.export.places import Place, by_name
from nybble.export.published import published_layout, read_rows
from nybble.files import TensorReader
from nybble.models.checkpoint import QuantizedCheckpoint, open_checkpoint
from nybble.models.linearize import linearize
from nybble.models.loading import LoadedModel
from nybble.models.quantized_model import save_quantized
from nybble.models.schemes import assign_schemes
from nybble.models.selection import select_layers
from nybble.options.scheme import SchemeOptions
from tests.helpers import mixtures
from tests.helpers.cases import fast_cases, first_fast
from tests.helpers.causal_types import tiny_model
from tests.helpers.checkpoints import make_checkpoint, save_checkpoint, save_uneven_mixture
from tests.helpers.rounding import round_model_to_nearest
from tests.helpers.tiny import FAMILIES, make_config, make_tokenizer

MIXTURES = sorted(set(mixtures.FAMILIES) - {"longcat_flash"})
STACKED = {"gpt_oss", "llama4", "granitemoe", "jetmoe"}  # also on the hub
ODD_ROWS = {"nemotron_h", "qwen3_5_moe", "kimi_linear"}  # rows that vLLM cannot split


DIFFERENT = {"mixtral", "gpt_oss", "llama4", "granitemoe", "nemotron_h"}  # together all that the layouts differ in


def mixture_checkpoint(folder: Path, family: str) -> QuantizedCheckpoint:
    model = mixtures.make_mixture(family)
    linearize(model)
    return save_checkpoint(folder, model)


@pytest.mark.parametrize("family", fast_cases([*FAMILIES, *MIXTURES], DIFFERENT | {"smollm", "phi3"}))
def test_every_row_has_one_place(family: str, tmp_path: Path) -> None:
    in_tiny = family in FAMILIES
    checkpoint = (make_checkpoint if in_tiny else mixture_checkpoint)(tmp_path / "quantized", family)
    layout = published_layout(checkpoint.config, checkpoint.shapes)
    rows = Counter(
        (place.name, row)
        for places in layout.values()
        for place in places
        for row in range(place.rows.start, place.rows.stop)
    )
    expected = {(name, row) for name, shape in checkpoint.shapes.items() for row in range(shape[0])}
    whole = {name: range(len(t) if t.ndim == 3 else 1) for name, t in checkpoint.others.items()}  # 3: convolutions
    expected |= {(name, row) for name, rows_of_other in whole.items() for row in rows_of_other}
    assert rows.keys() == expected
    assert set(rows.values()) == {1}


def test_experts_of_mixtral_have_the_names_of_the_hub(tmp_path: Path) -> None:
    checkpoint = mixture_checkpoint(tmp_path / "quantized", "mixtral")
    layout = published_layout(checkpoint.config, checkpoint.shapes)
    expert = "model.layers.1.block_sparse_moe.experts.2"
    for leaf, module, rows in (
        ("w1", "gate_up_proj", slice(0, 96)),
        ("w3", "gate_up_proj", slice(96, 192)),
        ("w2", "down_proj", slice(0, 64)),
    ):
        name = f"{expert}.{leaf}.weight"
        assert layout[name] == [Place(name, f"model.layers.1.mlp.experts.2.{module}", rows)]
    gate = "model.layers.1.block_sparse_moe.gate.weight"
    assert layout[gate] == [Place(gate, "model.layers.1.mlp.gate.weight", slice(0, 1))]


def export(name: str, checkpoint: QuantizedCheckpoint, folder: Path) -> Any:
    folder.mkdir()
    EXPORTERS[name].check(checkpoint.config, checkpoint.selection)
    return EXPORTERS[name].export(checkpoint, folder)


@pytest.mark.parametrize("family", fast_cases(MIXTURES, ["mixtral", "gpt_oss", "nemotron_h"]))
def test_the_hf_export_of_a_mixture_is_what_transformers_would_save(family: str, tmp_path: Path) -> None:
    checkpoint = mixture_checkpoint(tmp_path / "quantized", family)
    result = export("hf", checkpoint, tmp_path / "hf")
    assert result.linear_weights == len(checkpoint.selection.linears)
    assert result.logit_difference < 1e-4
    AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).save_pretrained(tmp_path / "again")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "again"))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.shape == theirs[name].shape, name
        assert torch.equal(tensor.float(), theirs[name].float()), name


PACKED = sorted(set(MIXTURES) - STACKED - ODD_ROWS)


@pytest.mark.parametrize("family", fast_cases(PACKED, ["mixtral"]))
def test_the_vllm_export_of_a_mixture_has_a_packed_matrix_for_each_expert(family: str, tmp_path: Path) -> None:
    checkpoint = mixture_checkpoint(tmp_path / "quantized", family)
    result = export("vllm", checkpoint, tmp_path / "vllm")
    assert result.logit_difference < 1e-4
    names = load_file(tmp_path / "vllm" / "model.safetensors").keys()
    experts = {name for name in names if ".experts.0." in name and name.endswith("weight_packed")}
    assert len(experts) % 3 == 0 or family == "nemotron_h"
    assert experts
    config = EXPORTERS["vllm"].open_model(tmp_path / "vllm", checkpoint.config).config
    assert not hasattr(config, "quantization_config")


@pytest.mark.parametrize("family", first_fast(2, ["gpt_oss", "granitemoe", "llama4", "mixtral"]))
def test_experts_in_16_bits_are_exported_with_the_others(family: str, tmp_path: Path) -> None:
    model = mixtures.make_mixture(family)
    linearize(model)
    checkpoint = save_uneven_mixture(tmp_path / "quantized", model)
    folder = tmp_path / "hf"
    folder.mkdir()
    assert EXPORTERS["hf"].export(checkpoint, folder).logit_difference is not None  # compares weights and logits
    for name in [name for name in model.state_dict() if ".experts.0." in name]:
        assert torch.equal(checkpoint.others[name], model.state_dict()[name])


def test_a_conv1d_in_16_bits_is_exported_as_gpt2_has_it(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    linearize(model)
    schemes = assign_schemes(select_layers(model), model, SchemeOptions(group_size=32, ignore=("*.1.*c_attn",))).schemes
    quantized = round_model_to_nearest(model, schemes=schemes)
    save_quantized(tmp_path / "quantized", LoadedModel(model, make_tokenizer(), "tiny"), quantized)
    checkpoint = open_checkpoint(tmp_path / "quantized")
    (tmp_path / "hf").mkdir()
    assert EXPORTERS["hf"].export(checkpoint, tmp_path / "hf").logit_difference is not None
    stored = load_file(tmp_path / "hf" / "model.safetensors")["transformer.h.1.attn.c_attn.weight"]
    assert torch.equal(stored, checkpoint.others["transformer.h.1.attn.c_attn.weight"].T)


def test_experts_of_different_schemes_are_refused_for_vllm(tmp_path: Path) -> None:
    model = mixtures.make_mixture("mixtral")
    linearize(model)
    checkpoint = save_uneven_mixture(tmp_path / "quantized", model)
    message = (
        "an export to vLLM needs one scheme for layers that it fuses; got model.layers.0.mlp.experts.0.gate_up_proj in "
        "16 bits, model.layers.0.mlp.experts.1.gate_up_proj uint8 symmetric group 32, "
        "model.layers.0.mlp.experts.2.gate_up_proj uint4 asymmetric group 32; change --layer or --ignore"
    )
    with pytest.raises(OptionError, match=message):
        EXPORTERS["vllm"].check(checkpoint.config, checkpoint.selection)


def test_layers_in_16_bits_are_named_for_vllm(tmp_path: Path) -> None:
    from nybble.schema import read_json

    checkpoint = mixture_checkpoint(tmp_path / "quantized", "qwen2_moe")
    export("vllm", checkpoint, tmp_path / "vllm")
    ignored = read_json(tmp_path / "vllm" / "config.json")["quantization_config"]["ignore"]
    assert {"lm_head", "model.layers.0.mlp.gate", "model.layers.0.mlp.shared_expert_gate"} <= set(ignored)
    assert not any("experts." in name or "self_attn" in name for name in ignored)


@pytest.mark.parametrize("family", fast_cases(sorted(STACKED), ["gpt_oss"]))
def test_stacks_are_refused_for_vllm(family: str, tmp_path: Path) -> None:
    checkpoint = mixture_checkpoint(tmp_path / "quantized", family)
    with pytest.raises(ExportError, match="published with one matrix for each layer and expert"):
        export("vllm", checkpoint, tmp_path / "vllm")


def test_unused_experts_are_refused(tmp_path: Path) -> None:
    checkpoint = mixture_checkpoint(tmp_path / "quantized", "longcat_flash")
    with pytest.raises(ExportError, match="has entries that belong to no expert"):
        export("hf", checkpoint, tmp_path / "hf")


def test_the_tested_families_are_those_of_these_tests() -> None:
    """Dense ones are tested in tests/export/hf and tests/export/vllm."""
    dense = {make_config(family).model_type for family in FAMILIES}
    for name, others in (("hf", set(MIXTURES)), ("vllm", set(MIXTURES) - STACKED - ODD_ROWS)):
        assert EXPORTERS[name].tested_families == dense | {mixtures.model_type(family) for family in others}


def test_a_tensor_may_hold_rows_of_several_weights(tmp_path: Path) -> None:
    """No model of transformers 5.23 is published so."""
    weights = {"a": torch.randn(6, 8), "b": torch.randn(6, 8)}
    parts = [("a", slice(4, 6)), ("b", slice(0, 6)), ("a", slice(0, 4))]
    places, first_row = [], 0
    for name, rows in parts:
        places.append(Place("x", name, rows, first_row=first_row))
        first_row += places[-1].count(6)
    save_file({"x": torch.cat([weights[name][rows] for name, rows in parts])}, tmp_path / "x.safetensors")
    for name, own in by_name(places).items():
        assert torch.equal(read_rows(TensorReader(tmp_path / "x.safetensors"), own), weights[name])
