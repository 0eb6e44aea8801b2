"""`nybble distill --offload disk`: the bits of the path in memory, in every way to train, and after a kill."""

import json
import logging
from pathlib import Path

import pytest
import torch

from nybble.errors import OptionError
from nybble.models.layers_on_disk import layers_on_disk
from nybble.options.commands import CompressOptions, DistillOptions
from nybble.options.training import DistillTrainingOptions
from nybble.workflows import distill as distill_module
from nybble.workflows import placement, train
from nybble.workflows.compress import compress
from nybble.workflows.distill import distill
from nybble.workflows.steps import RunContext
from tests.helpers.distill import distill_options
from tests.workflows.test_offload import SAVED, Killed, assert_equal_runs


def options(model: Path, run: Path, **changes: object) -> DistillOptions:
    base: dict[str, object] = {"num_calibration_samples": 16, "group_size": 32, "offload": "disk"}
    return distill_options(model, run, **base | changes)


WITHOUT_ADAPTERS = {"lora_rank": DistillTrainingOptions.lora_rank}  # as if it were not given
WAYS: dict[str, dict[str, object]] = {
    "adapters": {},
    "one byte": {"base_weights": "fixed", "weight_cache": "recompute"},
    "scales": {"lora_rank": 0},
    "full": {"train": "full", **WITHOUT_ADAPTERS},
    "rounding": {"train": "rounding", **WITHOUT_ADAPTERS},
    "exact positions": {"lora_rank": 0, "keep_positions": "exact"},
}
FAST = [("smollm", "adapters", "rtn")]
SLOW = [
    ("smollm", "scales", "se"),
    *(("smollm", way, "se") for way in WAYS if way != "scales"),
    *(("gemma3", way, "awq+se+gptq") for way in ("adapters", "scales")),
    *(("mixtral", way, "se+gptq") for way in ("adapters", "one byte", "scales")),
]
CASES = [*FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]


@pytest.mark.parametrize(("name", "way", "method"), CASES)
def test_a_model_on_disk_ends_with_the_bits_of_one_in_memory(name: str, way: str, method: str, tmp_path: Path) -> None:
    model, changes = SAVED[name](tmp_path / name, name), WAYS[way] | {"method": method}
    distill(options(model, tmp_path / "memory", offload="none", **changes))
    distill(options(model, tmp_path / "disk", **changes))
    assert_equal_runs(tmp_path / "memory", tmp_path / "disk")


@pytest.mark.parametrize(
    ("way", "keep"),
    [
        pytest.param("adapters", "fixed", marks=pytest.mark.slow),
        *(pytest.param(way, "exact", marks=pytest.mark.slow) for way in WAYS if way != "exact positions"),
        *(pytest.param(way, "none", marks=pytest.mark.slow) for way in ("adapters", "scales")),
    ],
)
def test_training_starts_from_a_finished_run_without_the_model_in_memory(way: str, keep: str, tmp_path: Path) -> None:
    model, start = SAVED["smollm"](tmp_path / "model", "smollm"), tmp_path / "start"
    given: dict[str, object] = {"pretrained": str(model), "output_dir": str(start), "group_size": 32, "export": ()}
    text = {"data": ("python-docs",), "seq_len": 32, "num_test_samples": 4, "num_calibration_samples": 16}
    compress(CompressOptions.of(**given, **text, method="awq+se", keep_positions=keep, eval_tasks=()))
    changes = WAYS[way] | {"init_from": str(start)}
    distill(options(model, tmp_path / "memory", offload="none", **changes))
    distill(options(model, tmp_path / "disk", **changes))
    assert_equal_runs(tmp_path / "memory", tmp_path / "disk")


def test_only_what_is_trained_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the training no 16-bit weight of a quantized layer is in memory, and the model is no longer on disk."""
    model, seen = SAVED["smollm"](tmp_path / "model", "smollm"), list[str]()
    original = train.train_layers

    def look(context: RunContext, *given: object, **named: object) -> None:
        trained = context.loaded.model
        assert layers_on_disk(trained) is None
        assert context.loaded.on_disk
        tensors = dict((*trained.named_parameters(), *trained.named_buffers()))
        assert not [name for name, tensor in tensors.items() if tensor.is_meta]
        for name in context.selection.linears:
            seen.append(name)
            assert tensors[f"{name}.weight"].dtype == torch.uint8, name
        hooks = [h for b in trained.model.layers for h in (*b._forward_hooks.values(), *b._forward_pre_hooks.values())]
        assert not [hook for hook in hooks if hook.__module__ == layers_on_disk.__module__]
        original(context, *given, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(train, "train_layers", look)
    distill(options(model, tmp_path / "run", base_weights="fixed"))
    assert len(seen) > 7


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["train_layers", "save_quantized"])
@pytest.mark.parametrize("offload", ["disk", "none"])
def test_killed_it_ends_with_the_same_bits_from_disk_or_memory(
    stage: str, offload: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, run = SAVED["smollm"](tmp_path / "model", "smollm"), tmp_path / "run"
    distill(options(model, tmp_path / "undisturbed", method="se", offload="none"))

    def fail(*_: object, **__: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(train if stage == "train_layers" else distill_module, stage, fail)
        with pytest.raises(Killed):
            distill(options(model, run, method="se"))
    distill(options(model, run, method="se", offload=offload, resume=True))
    assert_equal_runs(tmp_path / "undisturbed", run)


def test_it_is_chosen_where_the_model_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = SAVED["llama"](tmp_path / "model", "llama")
    monkeypatch.setattr(placement, "free_memory", lambda device: 600_000_000)
    monkeypatch.setattr(placement, "_SMALL", 0.0)
    with caplog.at_level(logging.INFO, "nybble"):
        run = distill(options(model, tmp_path / "run", offload="auto"))
    assert "decoder blocks wait on disk: it does not fit into memory (in memory it needs 0.8 GB)" in caplog.text
    assert json.loads((run / "results.json").read_text())["phase"]


def test_text_of_the_models_own_is_refused(tmp_path: Path) -> None:
    model = SAVED["llama"](tmp_path / "model", "llama")
    with pytest.raises(OptionError, match="--data self needs the model in memory"):
        distill(options(model, tmp_path / "run", data=("self:python-docs",)))
    assert not (tmp_path / "run").exists()
