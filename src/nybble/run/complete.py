"""Whether a run still has what it wrote, and from which phase it goes on."""

from __future__ import annotations

import logging
from pathlib import Path

from nybble.errors import RunError
from nybble.files import file_sizes
from nybble.run.marker import is_run
from nybble.run.results import Phase, RunResults, read_results
from nybble.schema import SchemaError, read_json

log = logging.getLogger("nybble")

QUANTIZED, MERGED, TEXTS = "quantized", "merged", "texts"
CHECKPOINTS = ("last.safetensors", "best.safetensors")


def missing_files(path: Path, results: RunResults, name: str) -> list[str]:
    """The files of a folder of a run that are missing, or cut: shorter than they were written, and no valid JSON.

    Of a run that an earlier version of nybble made it is known only that the folder has files.
    """
    found = file_sizes(path / name)
    if not found:
        return [name]
    shorter = [file for file, size in results.files.get(name, {}).items() if found.get(file, -1) < size]
    return [file for file in shorter if not _is_json(path / name / file)]


def _is_json(file: Path) -> bool:
    """Whether a file, which someone may have edited, is whole JSON."""
    try:
        read_json(file)
    except SchemaError:
        return False
    return file.suffix == ".json"


def no_model_error(run: Path) -> RunError:
    """The error for a run that has no 4-bit model."""
    if (run / MERGED).is_dir():  # 16-bit LoRA of nybble compare
        return RunError(f"{run} must be a run with a 4-bit model; it ends in 16 bits; its model is {run / MERGED}")
    return RunError(f"{run} must be a finished run; it has no 4-bit model; finish it with --resume")


def check_complete(path: Path) -> None:
    """Check the files of a folder of a run, such as RUN/quantized; folders elsewhere pass.

    Raises:
        RunError: files are missing or cut.
    """
    run, name = path.resolve().parent, path.resolve().name
    if not is_run(run):
        return
    results = read_results(run)
    wrong = missing_files(run, results, name) if name in results.files else []
    if wrong:
        again = "let the run make the folder again with --resume"
        if name in results.exports:
            again = f"make the folder again: nybble export {path.parent} --to {name}"
        raise RunError(
            f"{path} must have the files that it was written with; {', '.join(wrong[:3])} is missing or cut; bring it "
            f"back, or {again}"
        )


def is_quantized(path: Path) -> bool:
    """Whether the 4-bit model of a run is made and complete, so that --resume does not make it again."""
    results = read_results(path)
    go_back(path, results, logging.DEBUG)
    return results.phase.reached(Phase.QUANTIZED)


def go_back(path: Path, results: RunResults, level: int = logging.WARNING) -> None:
    """Where the model that a run made is not complete, return to the phase before, which makes the same one again.

    Where the trained parameters of a distillation are gone too, they are trained again.

    Args:
        path: run folder.
        results: of the run; their phase is changed.
        level: at which the reason is logged.
    """
    folders: tuple[str, ...]
    if results.command == "lora":
        folders, made, before = (MERGED, TEXTS), Phase.TRAINED, Phase.OPENED
    else:
        folders, made, before = (QUANTIZED,), Phase.QUANTIZED, Phase.TRAINED if results.trains else Phase.OPENED
    for name in folders if results.phase.reached(made) else ():
        if wrong := missing_files(path, results, name):
            log.log(level, "%s is not complete (%s); it is made again", path / name, ", ".join(wrong[:3]))
            results.phase = before
    gone = [name for name in CHECKPOINTS if not (path / name).is_file()]
    if results.command == "distill" and results.phase == Phase.TRAINED and gone:
        log.log(level, "%s has no %s; the training is repeated", path, " and no ".join(gone))
        results.phase = Phase.OPENED
