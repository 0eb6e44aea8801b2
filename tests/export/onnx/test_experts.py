"""Mixtures of experts in ONNX: the initializers of QMoE, logits, generation in onnxruntime-genai, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nybble.errors import ExportError
from nybble.models.checkpoint import open_checkpoint
from nybble.models.linearize import linearize
from nybble.models.loading import LoadedModel
from nybble.models.quantized_model import save_quantized
from nybble.models.schemes import assign_schemes
from nybble.models.selection import select_layers
from nybble.options.scheme import SchemeOptions
from nybble.quant.scheme import QuantScheme
from tests.export.onnx.conftest import EXPORTER, Exported, attributes
from tests.export.onnx.test_genai import generate, in_float32, open_genai
from tests.helpers.checkpoints import save_checkpoint
from tests.helpers.exports import slow_values
from tests.helpers.mixtures import EXPERTS, make_mixture
from tests.helpers.rounding import round_model_to_nearest
from tests.helpers.tiny import make_tokenizer

pytestmark = pytest.mark.usefixtures("needs_onnx")

FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe")


def export(folder: Path, family: str, scheme: QuantScheme | None = None, **changes: Any) -> Exported:
    """Export a random mixture, rounded to nearest, to FOLDER/onnx."""
    checkpoint = save_checkpoint(folder / "quantized", linearize(make_mixture(family, **changes)), scheme)
    EXPORTER.check(checkpoint.config, checkpoint.selection)
    (folder / "onnx").mkdir()
    return Exported(checkpoint, folder / "onnx", EXPORTER.export(checkpoint, folder / "onnx"))


def export_mixed(folder: Path, **options: Any) -> Exported:
    """Export a Mixtral with the schemes of some options."""
    model = linearize(make_mixture("mixtral"))
    selection = assign_schemes(select_layers(model), model, SchemeOptions(group_size=32, **options))
    quantized = round_model_to_nearest(model, schemes=selection.schemes)
    save_quantized(folder / "quantized", LoadedModel(model, make_tokenizer(), "tiny"), quantized)
    checkpoint = open_checkpoint(folder / "quantized")
    EXPORTER.check(checkpoint.config, checkpoint.selection)
    (folder / "onnx").mkdir()
    return Exported(checkpoint, folder / "onnx", EXPORTER.export(checkpoint, folder / "onnx"))


def unpacked(packed: np.ndarray, count: int) -> torch.Tensor:
    """Two numbers of each byte, the low bits first; `count` of them in the last axis."""
    pairs = np.stack([packed & 0xF, packed >> 4], axis=-1)
    return torch.from_numpy(pairs.reshape(*packed.shape[:-1], -1)[..., :count]).double()


def check_stacks(exported: Exported) -> None:
    """Compare each row of the stacks, read by the package onnx, with the linear layer of an expert."""
    import onnx

    model = onnx.load(exported.folder / "model.onnx")
    arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    nodes = [node for node in model.graph.node if node.op_type == "QMoE"]
    for node in nodes:
        for leaf, first, zeros in (("gate_up_proj", 2, 11), ("down_proj", 5, 12)):
            path, _, found = node.input[first].partition(".*.")
            assert found == f"{leaf}.codes"
            scales = torch.tensor(arrays[node.input[first + 1]]).double()
            groups = scales.shape[-1]
            codes = unpacked(arrays[node.input[first]], 2 * arrays[node.input[first]].shape[-1])
            zero_points = unpacked(arrays[node.input[zeros]], groups) if node.input[zeros] else 8
            values = (
                (codes.unflatten(-1, (groups, -1)) - torch.as_tensor(zero_points)[..., None]) * scales[..., None]
            ).flatten(-2)  # type: ignore[no-untyped-call]
            for i in range(EXPERTS):
                expected = slow_values(exported.checkpoint.quantized[f"{path}.{i}.{leaf}"])
                half = len(expected) // 2
                for row, weights in enumerate(values[i]):
                    at = row if leaf == "down_proj" else (row // 2) + half * (row % 2)
                    assert torch.equal(weights, expected[at]), (path, i, leaf, row)
    mixed = {name.partition(".experts.")[0] for name in exported.checkpoint.shapes if ".experts." in name}
    assert len(nodes) == len(mixed)


@pytest.mark.parametrize(
    "family", [family if family == "qwen3_moe" else pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES]
)
def test_a_family_is_exact_and_computed_by_onnxruntime(family: str, tmp_path: Path) -> None:
    exported = export(tmp_path, family)
    assert exported.result.logit_difference is not None
    assert exported.result.logit_difference <= 2e-5
    assert exported.result.rounded == {}
    check_stacks(exported)
    for name, weight in EXPORTER.read_codes(exported.folder).items():
        assert torch.equal(weight.codes_OI, exported.checkpoint.quantized[name].codes_OI), name
    node = exported.nodes("QMoE")[0]
    found = attributes(node)
    assert (found["k"], found["expert_weight_bits"], found["block_size"], found["accuracy_level"]) == (2, 4, 32, 4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "scheme", "changes", "block"),
    [
        ("mixtral", QuantScheme(4, None), {}, 32),  # rows of 64 and 96 weights
        ("mixtral", QuantScheme(4, 32, symmetric=True), {"sliding_window": 8}, 32),
        ("qwen3_moe", QuantScheme(2, 32), {"norm_topk_prob": True, "mlp_only_layers": []}, 32),
        ("qwen2_moe", None, {"norm_topk_prob": True, "num_experts": 12}, 32),
    ],
    ids=str,
)
def test_variants(family: str, scheme: QuantScheme | None, changes: dict[str, Any], block: int, tmp_path: Path) -> None:
    exported = export(tmp_path, family, scheme, **changes)
    assert exported.result.logit_difference is not None
    assert exported.result.logit_difference <= 2e-5
    assert attributes(exported.nodes("QMoE")[0])["block_size"] == block


def test_genai_generates_the_tokens_of_torch(tmp_path: Path) -> None:
    exported = export(tmp_path, "qwen3_moe")
    genai = open_genai(in_float32(exported.folder, tmp_path / "float32"))
    ids = [1, 20, 33, 47, 59, 61]
    generated = generate(genai, ids, max_length=20, min_length=20)
    model = exported.checkpoint.build()
    expected = model.generate(torch.tensor([ids]), max_new_tokens=14, min_new_tokens=14, do_sample=False)
    assert generated == expected[0].tolist()


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"ignore": ("*.experts.3.down_proj",)}, "16 bits and uint4 asymmetric group 32 in model.layers.0.mlp"),
        ({"layer": ("*.1.mlp.experts.2.*:bits=8",)}, "uint8 symmetric group 32 in model.layers.1.mlp"),
        ({"bits": 8, "symmetric": True}, "experts with uint8 symmetric group 32 in model.layers.0.mlp"),
        ({"ignore": ("*.1.mlp.experts.*",)}, "model.layers.1.mlp.experts stays in 16 bits"),
    ],
)
def test_experts_that_qmoe_does_not_hold_are_refused(options: dict[str, Any], found: str, tmp_path: Path) -> None:
    with pytest.raises(
        ExportError, match="an export to ONNX needs one scheme of 4 bits for all experts of a l"
    ) as error:
        export_mixed(tmp_path, **options)
    assert found in str(error.value)
