"""Mixtures of experts for mlx-lm: stacks in the file, weights by mlx, logits, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nybble.errors import ExportError
from nybble.export.base import EXPORTERS
from nybble.models.checkpoint import QuantizedCheckpoint, open_checkpoint
from nybble.models.linearize import linearize
from nybble.models.loading import LoadedModel
from nybble.models.quantized_model import load_config, save_quantized
from nybble.models.schemes import assign_schemes
from nybble.models.selection import select_layers
from nybble.options.scheme import SchemeOptions
from tests.export.mlx.conftest import MIXTURES
from tests.export.mlx.test_exporter import slow_unpack
from tests.helpers.exports import Export, check_codes, export_checkpoint, slow_values
from tests.helpers.mixtures import EXPERTS, make_mixture
from tests.helpers.rounding import round_model_to_nearest
from tests.helpers.tiny import make_tokenizer

pytest.importorskip("mlx_lm", reason="the extra mlx")
MLX = EXPORTERS["mlx"]


def checkpoint_of(folder: Path, family: str, options: SchemeOptions) -> QuantizedCheckpoint:
    """A random mixture, rounded to nearest with the schemes of some options; its corrections of scores are random."""
    model = make_mixture(family, **MIXTURES[family])
    for name, tensor in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            tensor.uniform_(-0.5, 0.5)
    linearize(model)
    selection = assign_schemes(select_layers(model), model, options)
    quantized = round_model_to_nearest(model, schemes=selection.schemes)
    save_quantized(folder, LoadedModel(model, make_tokenizer(), "tiny"), quantized)
    return open_checkpoint(folder)


def export(folder: Path, family: str, **options: Any) -> Export:
    """Export a mixture to FOLDER/export."""
    checkpoint = checkpoint_of(folder / "quantized", family, SchemeOptions(group_size=32, **options))
    MLX.check(checkpoint.config, checkpoint.selection)
    return export_checkpoint("mlx", checkpoint, folder / "export")


def check_stacks(exported: Export) -> None:
    """Compare each row of the stacks with the expert's linear layer, whose first half of rows are gates."""
    tensors = load_file(exported.folder / "model.safetensors")
    assert not [name for name in tensors if ".experts.0." in name]
    for module, weight in exported.checkpoint.quantized.items():
        if ".experts." not in module:
            continue
        path, _, inner = module.partition(".experts.")
        expert, leaf = inner.split(".")
        if exported.checkpoint.config.model_type == "mixtral":
            path = path.replace(".mlp", ".block_sparse_moe")
        interleaved = exported.checkpoint.config.model_type == "gpt_oss"
        stack = f"{path}.{'experts' if interleaved else 'switch_mlp'}"
        leaves = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else (leaf,)
        pieces = []
        for name in leaves:
            words, scales, biases = (tensors[f"{stack}.{name}.{part}"] for part in ("weight", "scales", "biases"))
            assert len(words) == EXPERTS
            fields = slow_unpack(words[int(expert)], weight.scheme.bits)
            scale_OI, bias_OI = (part[int(expert)].double().repeat_interleave(32, 1) for part in (scales, biases))
            pieces.append(scale_OI * fields + bias_OI)
        joined = torch.stack(pieces, dim=1).flatten(0, 1) if interleaved else torch.cat(pieces)
        assert torch.equal(joined, slow_values(weight)), module


@pytest.mark.parametrize(
    "family", [name if name == "mixtral" else pytest.param(name, marks=pytest.mark.slow) for name in MIXTURES]
)
def test_a_family_is_exact_and_computed_by_mlx_lm(family: str, tmp_path: Path) -> None:
    exported = export(tmp_path, family)
    largest = 2e-5
    assert exported.result.logit_difference is not None
    assert exported.result.logit_difference <= largest
    assert exported.result.rounded == {}
    check_codes(MLX, exported)
    check_stacks(exported)
    weights = MLX.read_weights(exported.folder)
    for name, weight in exported.checkpoint.quantized.items():
        assert torch.equal(weights[name].double(), slow_values(weight))
    config = load_config(exported.folder, trust_remote_code=False)
    assert config.num_local_experts if hasattr(config, "num_local_experts") else config.num_experts == EXPERTS


@pytest.mark.slow
def test_schemes_and_layers_in_16_bits(tmp_path: Path) -> None:
    exported = export(tmp_path, "qwen2_moe", layer=("*.experts.*.down_proj:bits=8",), ignore=("*.gate_up_proj",))
    tensors = load_file(exported.folder / "model.safetensors")
    assert tensors["model.layers.1.mlp.switch_mlp.up_proj.weight"].is_floating_point()
    assert tensors["model.layers.1.mlp.switch_mlp.down_proj.weight"].dtype == torch.uint32


def test_experts_of_a_layer_have_one_scheme(tmp_path: Path) -> None:
    with pytest.raises(
        ExportError, match=r"needs the same quantization for all experts of a layer; this model has 3 of 4 quantized in"
    ):
        export(tmp_path, "mixtral", ignore=("*.experts.3.down_proj",))
