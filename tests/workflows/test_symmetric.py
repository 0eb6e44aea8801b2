"""Symmetric layers with adapters, trained scales and elastic ranks, from distill and tune to exports, to the bit."""

from pathlib import Path

import pytest
import torch

from nybble.export.base import EXPORTERS
from nybble.models.quantized_file import load_weights
from nybble.run.results import read_results
from nybble.workflows.distill import distill
from nybble.workflows.tune import tune
from tests.helpers.distill import distill_options
from tests.helpers.tiny import save_model
from tests.helpers.tune import tune_options

RUNTIMES = {"openvino": "openvino", "gguf": "xllamacpp", "onnx": "onnxruntime_genai", "vllm": "compressed_tensors"}


def check_run(run: Path, formats: tuple[str, ...]) -> None:
    """Codes and scales of both signs were trained, zero points are 8, and exports hold the same codes and scales."""
    quantized, _ = load_weights(run / "quantized")
    linears = {name: weight for name, weight in quantized.items() if weight.scheme.bits == 4}
    assert len(linears) == 14
    for weight in linears.values():
        assert weight.scheme.symmetric
        assert set(weight.zero_point_OG.flatten().tolist()) == {8}
        assert set(weight.scale_OG.sign().flatten().tolist()) == {-1, 1}
    changes = read_results(run).changes
    assert changes is not None
    assert changes.codes_changed > 0
    assert changes.scales_moved > 0
    for name in formats:
        codes = EXPORTERS[name].read_codes(run / name)
        for layer, weight in linears.items():
            held = codes[layer]
            assert torch.equal(held.dequantize(), weight.dequantize()), f"{name} {layer}"
            assert torch.equal(held.codes_OI, weight.codes_OI), f"{name} {layer}"
            assert torch.equal(held.scale_OG, weight.scale_OG), f"{name} {layer}"


@pytest.mark.slow
def test_distilled_symmetric_layers_are_exported_to_the_bit(tmp_path: Path) -> None:
    for module in RUNTIMES.values():
        pytest.importorskip(module)
    model, run, formats = save_model(tmp_path / "model", "llama"), tmp_path / "run", tuple(RUNTIMES)
    distill(distill_options(model, run, symmetric=True, group_size=32, num_train_samples=64, export=formats))
    check_run(run, formats)


@pytest.mark.slow
def test_tuned_symmetric_layers_have_elastic_ranks(tmp_path: Path) -> None:
    export = ("gguf", "openvino")
    for name in export:
        pytest.importorskip(RUNTIMES[name])
    changes = {"symmetric": True, "group_size": 32, "scale_lr": 5e-3, "epochs": 1, "export": export}
    tune(tune_options(tmp_path, **changes))
    run = tmp_path / "run"
    task = read_results(run).task
    assert task is not None
    assert task.rank_space == [8, 4, 2]
    assert len(task.candidates) > 1
    check_run(run, export)
