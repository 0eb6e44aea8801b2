"""--keep_positions: training that goes on from a finished run is training in one run."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from nybble.errors import RunError
from nybble.models import positions_file, quantized_file
from nybble.qat.fake_quant_lora import FakeQuantizedLoRALinear
from nybble.run.results import read_results
from nybble.workflows.compress import compress
from nybble.workflows.distill import distill
from nybble.workflows.tune import tune
from tests.helpers.compress import compress_options
from tests.helpers.distill import distill_options, interrupt_after, shipped_bytes
from tests.helpers.tiny import save_model
from tests.helpers.tune import tune_options


def losses(run: Path) -> list[float]:
    training = read_results(run).training()
    assert training is not None
    return [record["loss"] for record in training.steps]


def positions(run: Path) -> dict[str, Tensor]:
    return load_file(run / "quantized" / positions_file.POSITIONS_FILE)


@pytest.mark.parametrize(
    ("method", "dtype", "rank"),
    [
        ("se", "bfloat16", 4),
        pytest.param("se", "float32", 0, marks=pytest.mark.slow),
        pytest.param("awq+se+blockwise", "bfloat16", 4, marks=pytest.mark.slow),
        pytest.param("awq+se+blockwise", "float32", 4, marks=pytest.mark.slow),
        pytest.param("awq+se+gptq", "bfloat16", 4, marks=pytest.mark.slow),
        pytest.param("rtn", "bfloat16", 4, marks=pytest.mark.slow),
        pytest.param("awq+se+blockwise", "bfloat16", 0, marks=pytest.mark.slow),
    ],
)
def test_training_on_from_exact_positions_gives_the_bits_of_one_run(
    method: str, dtype: str, rank: int, tmp_path: Path
) -> None:
    model = save_model(tmp_path / "model", "llama")
    shared: dict[str, Any] = {"num_calibration_samples": 8, "group_size": 32, "dtype": dtype, "keep_positions": "exact"}
    compress(compress_options(model, tmp_path / "first", method=method, **shared))
    distill(distill_options(model, tmp_path / "second", init_from=str(tmp_path / "first"), lora_rank=rank, **shared))
    distill(distill_options(model, tmp_path / "one", method=method, lora_rank=rank, **shared))
    assert losses(tmp_path / "second") == losses(tmp_path / "one")
    assert shipped_bytes(tmp_path / "second") == shipped_bytes(tmp_path / "one")
    one, second = (positions(tmp_path / name) for name in ("one", "second"))
    assert all(torch.equal(tensor, second[name]) for name, tensor in one.items())


@pytest.mark.slow
@pytest.mark.parametrize("keep", ["fixed", "exact"])
def test_a_trained_run_keeps_where_its_adapters_brought_the_weights(
    keep: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a second training starts from, in units of its scales, is the sum of weight and adapters of the first."""
    model, first = save_model(tmp_path / "model", "llama"), tmp_path / "first"
    shared: dict[str, Any] = {"group_size": 32, "lora_rank": 4, "keep_positions": keep, "dtype": "float32"}
    ends: dict[str, Tensor] = {}
    absorb = FakeQuantizedLoRALinear.absorb

    def noting(layer: FakeQuantizedLoRALinear) -> Any:
        groups = layer.init_scale.shape[1]
        ends[str(tuple(layer.weight.shape))] = (
            layer.merged_OI().detach().unflatten(1, (groups, -1)) / layer.init_scale[..., None]
        )
        return absorb(layer)

    with monkeypatch.context() as patch:
        patch.setattr(FakeQuantizedLoRALinear, "absorb", noting)
        distill(distill_options(model, first, method="se", num_calibration_samples=8, **shared))
    starts: dict[str, Tensor] = {}
    create = FakeQuantizedLoRALinear.__init__

    def created(layer: FakeQuantizedLoRALinear, init: Any, *rest: Any) -> None:
        create(layer, init, *rest)
        groups = init.scale_OG.shape[1]
        starts[str(tuple(init.weight_OI.shape))] = init.weight_OI.unflatten(1, (groups, -1)) / init.scale_OG[..., None]

    monkeypatch.setattr(FakeQuantizedLoRALinear, "__init__", created)
    distill(distill_options(model, tmp_path / "second", init_from=str(first), **shared))
    assert starts.keys() == ends.keys()
    for shape, end in ends.items():  # the last layer of each shape
        apart = (starts[shape] - end).abs()
        assert apart.median() <= (1 / 32 if keep == "fixed" else 1e-5)
        assert (apart > 1 / 32 + 1e-4).float().mean() < 0.15, "more than the clipped weights lie elsewhere"


@pytest.mark.slow
def test_tuned_runs_keep_positions_as_well(tmp_path: Path) -> None:
    for name, changes in {"after": {"quantize": "after"}, "during": {"quantize": "during"}}.items():
        run = tune(tune_options(tmp_path, output_dir=str(tmp_path / name), epochs=1, **changes))
        quantized, _ = quantized_file.load_weights(run / "quantized")
        found = positions(run)
        assert {key.removesuffix(".weight.position") for key in found} < quantized.keys()
        assert all(len(tensor.unique()) > 100 for tensor in found.values()), "the positions differ"


@pytest.mark.slow
def test_without_positions_a_run_starts_in_the_middle_of_the_cells_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, first = save_model(tmp_path / "model", "llama"), tmp_path / "first"
    compress(compress_options(model, first, keep_positions="none"))
    assert not positions_file.has_positions(first / "quantized")
    begin: dict[str, Any] = {"init_from": str(first), "group_size": 32}
    second = distill(distill_options(model, tmp_path / "second", lr=1e-6, **begin))
    assert f"--init_from {first} keeps no positions of weights between their codes" in caplog.text
    changes = read_results(second).changes
    assert changes is not None
    assert changes.codes_changed == 0
    assert positions_file.has_positions(second / "quantized"), "those that were trained"


def test_trained_positions_are_kept_whatever_the_start_had(tmp_path: Path) -> None:
    model, group = save_model(tmp_path / "model", "smollm"), {"group_size": 32}
    compress(compress_options(model, tmp_path / "first", keep_positions="none"))
    changes = {"init_from": str(tmp_path / "first"), "epochs": 1, **group}
    distill(distill_options(model, tmp_path / "adapters", **changes))
    assert positions(tmp_path / "adapters")
    distill(distill_options(model, tmp_path / "scales", lora_rank=0, **changes))
    assert not (tmp_path / "scales" / "quantized" / positions_file.POSITIONS_FILE).exists(), "none are known"


@pytest.mark.slow
def test_positions_may_be_deleted_and_then_a_training_does_not_resume(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, first = save_model(tmp_path / "model", "llama"), tmp_path / "first"
    compress(compress_options(model, first))
    options = distill_options(model, tmp_path / "second", init_from=str(first), group_size=32)
    with caplog.at_level(logging.INFO, "nybble"), monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(2, patch)
        distill(options)
    assert "positions between the codes too" in caplog.text
    (first / "quantized" / positions_file.POSITIONS_FILE).unlink()
    with pytest.raises(RunError, match="the 4-bit model of --init_from changed; bring it back, or start again"):
        distill(options.replace(resume=True))
    caplog.clear()
    distill(options.replace(overwrite=True, lora_rank=0))
    assert "keeps no positions" not in caplog.text, "scales need none"
    compress(compress_options(model, first, resume=True))  # still complete
