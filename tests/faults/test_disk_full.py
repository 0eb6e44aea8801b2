"""A full disk, a quota or a limit of file sizes: one line, nothing half-written, and with space the same bits."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nybble import files
from nybble.cli.main import main
from nybble.console import log_to
from nybble.errors import RunError
from nybble.models.loading import LoadedModel
from nybble.models.quantized_model import save_quantized
from nybble.nls import study as studies
from nybble.nls.search import SearchConfig, search_ranks
from nybble.options.toml import to_toml
from nybble.training.teacher import teacher_hidden_states
from nybble.training.tensorboard import TensorBoardCallback
from tests.helpers.cases import slow_case
from tests.helpers.distill import distill_options, shipped_bytes
from tests.helpers.rounding import round_model_to_nearest
from tests.helpers.small_disk import SMALL_DISKS, grow, small_tmpfs
from tests.helpers.tiny import make_model, make_tokenizer, save_model
from tests.helpers.tune import tune_options, write_letters

BLOCK = 4096


def write_text(folder: Path) -> None:
    files.write_text(folder / "results.json", "x" * 100_000)


def write_tensors(folder: Path) -> None:
    files.save_tensors(folder / "last.safetensors", {"a": torch.arange(25_000)}, {})


def write_states(folder: Path) -> None:
    model, ids = make_model("llama", num_hidden_layers=1), torch.arange(16 * 32).view(16, 32) % 256
    teacher_hidden_states(folder / "teacher" / "train.bin", model, ids, 4, "x")


def write_model(folder: Path) -> None:
    model = make_model("llama", num_hidden_layers=1)
    save_quantized(folder / "quantized", LoadedModel(model, make_tokenizer(), "tiny"), round_model_to_nearest(model))


def write_trials(folder: Path) -> None:
    pytest.importorskip("optuna", reason="the extra search")

    class Scorer:
        def score(self, configuration: Any, rows: Any) -> Any:
            return type("Scores", (), {"scores": [float(sum(configuration))] * len(rows)})

    space = studies.SearchSpace((8, 4, 2), 2, ["row"] * 4, ())  # type: ignore[arg-type]
    search_ranks(space, Scorer(), SearchConfig("random", 2, False, 0, studies.storage_file(folder)))  # type: ignore[arg-type]


def write_curves(folder: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra tensorboard")
    callback = TensorBoardCallback(folder / "tensorboard")
    try:
        for step in range(3000):
            callback.on_step("train", step, 3000, {"loss": 1.0})
    finally:
        callback.on_stage_end("train", 1.0)


WRITERS = [write_text, write_tensors, write_states, write_model, write_trials, write_curves]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


CASES = [(write, size, disk) for write in WRITERS for size in (0, BLOCK, 8 * BLOCK) for disk in SMALL_DISKS]
SLOW_CASES = [case for case in CASES if (case[0] == write_trials and case[1:] != (BLOCK, "tmpfs")) or case[1] == 0]


@pytest.mark.parametrize(("write", "size", "disk"), [slow_case(case) if case in SLOW_CASES else case for case in CASES])
def test_a_full_disk_is_one_line(write: Callable[[Path], None], size: int, disk: str, tmp_path: Path) -> None:
    folder, whole = tmp_path / "small", tmp_path / "whole"
    folder.mkdir()
    whole.mkdir()
    write(whole)
    with SMALL_DISKS[disk](folder, max(size, 1)):
        with pytest.raises(
            RunError, match=r"(must fit on the disk; )?(it )?could not be written: .*; free some disk"
        ) as error:
            write(folder)
        assert "\n" not in str(error.value)
        assert not [name for name in contents(folder) if name.startswith(("quantized", "last", "results"))]
        if disk == "tmpfs":
            grow(folder)
            write(folder)
            if write in (write_text, write_tensors, write_states, write_model):
                assert contents(folder) == contents(whole)
    if disk == "limit":
        write(folder)


def test_what_was_written_before_stays_whole(tmp_path: Path) -> None:
    with small_tmpfs(tmp_path, 20 * BLOCK):
        files.write_text(tmp_path / "results.json", "old")
        files.save_tensors(tmp_path / "last.safetensors", {"a": torch.ones(3)}, {"step": 1})
        with files.atomic_folder(tmp_path / "quantized") as temporary:
            (temporary / "file").write_text("old")
        for write in (
            lambda: files.write_text(tmp_path / "results.json", "x" * 200_000),
            lambda: files.save_tensors(tmp_path / "last.safetensors", {"a": torch.ones(100_000)}, {}),
            lambda: write_model(tmp_path),
        ):
            with pytest.raises(RunError, match="could not be written"):
                write()
        assert files.load_tensors(tmp_path / "last.safetensors")[1] == {"step": 1}
        left = contents(tmp_path)
        assert left.keys() == {"results.json", "last.safetensors", "quantized/file"}
        assert left["results.json"] == left["quantized/file"] == b"old"


def test_a_disk_that_holds_the_weights_alone_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    write_model(tmp_path)
    weights = (tmp_path / "quantized" / "weights.safetensors").stat().st_size
    for blocks in (1, 2, 3):  # for the configuration, the generation settings, the tokenizer
        with small_tmpfs(tmp_path / "small", (weights // BLOCK + 1 + blocks) * BLOCK):
            with pytest.raises(RunError, match=r"quantized must fit on the disk; it could not be written: .*No space"):
                write_model(tmp_path / "small")
            assert contents(tmp_path / "small") == {}


def test_the_space_of_states_is_taken_before_the_first_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nybble.training.teacher.last_hidden_states", lambda *_: pytest.fail("computed"))
    with small_tmpfs(tmp_path, 16 * BLOCK), pytest.raises(RunError, match=r"train.bin must fit on the disk"):
        write_states(tmp_path)


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), True),
        (OSError(errno.EFBIG, "File too large"), True),
        (OSError(errno.EACCES, "Permission denied"), False),
        (Exception("No space left on device (os error 28)"), True),  # tokenizers
        (Exception("File too large (os error 27)"), True),
        (Exception("Permission denied (os error 13)"), False),
        (ValueError("anything else"), False),
    ],
)
def test_which_errors_are_a_full_disk(error: Exception, full: bool, tmp_path: Path) -> None:
    assert files.is_out_of_space(error) == full
    with pytest.raises(RunError if full else type(error)), files.reporting_full_disk(tmp_path):
        raise error


def test_a_log_file_that_is_full_does_not_end_the_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    log, said = logging.getLogger("nybble"), []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    log.addHandler(handler)
    try:
        with small_tmpfs(tmp_path, BLOCK), log_to(tmp_path / "log.txt"):
            for _ in range(10):
                log.info("x" * 1000)
    finally:
        log.removeHandler(handler)
    assert sum("log.txt ends here: No space left on device; free some disk space" in line for line in said) == 1
    assert sum(line.startswith("x") for line in said) == 10
    assert "Logging error" not in capfd.readouterr().err


@pytest.fixture(scope="module", params=["distill", "tune"])
def recipe(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A command, and a folder with its recipe and a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "tune":
        write_letters(folder / "letters.jsonl")
        options: Any = tune_options(folder, epochs=1, quantize="after", scale_epochs=1, method="gptq")
    else:
        options = distill_options(save_model(folder / "model", "smollm"), folder / "run", method="gptq")
    options = options.replace(report_to=("tensorboard",), num_calibration_samples=8)
    (folder / "recipe.toml").write_text(to_toml(options.replace(output_dir=None)))
    assert main([request.param, "--config", str(folder / "recipe.toml"), "--output_dir", str(folder / "whole")]) == 0
    return request.param, folder


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.02, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9])
def test_a_run_on_a_disk_of_any_size_ends_with_one_line_and_is_finished_with_space(
    share: float,
    recipe: tuple[str, Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command, folder = recipe
    arguments = [command, "--config", str(folder / "recipe.toml"), "--output_dir", str(tmp_path / "run")]
    used = sum(file.stat().st_size for file in (folder / "whole").rglob("*") if file.is_file())
    with small_tmpfs(tmp_path, int(share * used)):
        with monkeypatch.context() as patch:  # the estimate would refuse most of these disks before the work
            patch.setattr("nybble.workflows.execution.check_free_disk", lambda *_: None)
            code = main(arguments)
        said = capfd.readouterr().err
        assert code == 2, said
        assert "Traceback" not in said
        assert "Logging error" not in said
        assert said.splitlines()[-1].startswith("nybble: ")
        print(share, said.splitlines()[-1])
        grow(tmp_path)
        assert main([*arguments, "--resume"]) == 0
        assert shipped_bytes(tmp_path / "run") == shipped_bytes(folder / "whole")
