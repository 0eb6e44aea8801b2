"""compare.json: what `nybble compare` measured, in the five columns in which INT4 tuning is published.

    BF16                  the 16-bit model
    BF16 + LoRA           the 16-bit model tuned by LoRA
    INT4, LoRA + PTWC     that model, merged, then compressed without training
    INT4, QAT + LoRA      nybble tune with the largest rank alone
    INT4, QAT + NLS       nybble tune with the whole rank space

A comparison is a folder with compare.json, and one run folder per column in TASK/. compare.json holds

    model, seed, setting  the options; setting has those that all seeds of a comparison share
    dtype                 of the first two columns
    ptwc                  the method of the third column
    objectives            task -> what the loss was on
    figures               task -> column -> value, error, documents, right ("0110": a 1 for each row that was right)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nybble.errors import RunError
from nybble.files import write_text
from nybble.options.commands import CompareOptions
from nybble.report.figures import Figure, Figures
from nybble.run.marker import is_run
from nybble.run.results import has_results, read_results
from nybble.schema import SchemaError, read_json, restored, to_json

FILE = "compare.json"
# The options, before there is a task to write about.
_BEGUN = ".begun.json"
COLUMNS = ("BF16", "BF16 + LoRA", "INT4, LoRA + PTWC", "INT4, QAT + LoRA", "INT4, QAT + NLS")
# Run folders of the last column and those before it.
NLS_RUN, LORA_RUN, PTWC_RUN, LORA16_RUN = "qat-nls", "qat-lora", "ptwc", "lora"
# Options that name places or change speed, and those that are no part of what was compared.
NO_SETTING = (
    "pretrained", "seed", "tasks", "output_dir", "data_dir", "resume", "overwrite", "report_to", "save_steps",
    "eval_tasks", "num_test_samples", "fast_eval", "eval_batch_size", "microbatch_size", "weight_cache", "device",
    "trust_remote_code", "gradient_checkpointing",
)  # fmt: skip


@dataclass(frozen=True)
class ColumnComparison:
    """One comparison, as compare.json holds it.

    Attributes:
        folder: its folder.
        setting: the options that its seeds have in common.
        dtype: compute dtype of the first two columns.
        ptwc: method of the third column.
        objectives: task -> what the loss was on.
    """

    folder: Path
    model: str
    seed: int
    setting: dict[str, Any]
    dtype: str
    ptwc: str
    objectives: Mapping[str, str]
    figures: Figures


def setting_of(options: CompareOptions) -> dict[str, Any]:
    """The options that all seeds of a comparison have in common, as compare.json holds them."""
    setting = {key: value for key, value in options.flat().items() if key not in NO_SETTING}
    as_json: dict[str, Any] = restored(json.loads(to_json(setting)))
    return as_json


def check_same_setting(folder: Path, options: CompareOptions) -> None:
    """Refuse to replace a comparison that was made with other options.

    Raises:
        RunError: the folder has such a comparison; the option is named.
    """
    before, now, whose = _begun(folder), _whole_setting(options), "one that was begun"
    with suppress(RunError):  # None yet, or one of another version, which is made again.
        earlier = read_comparison(folder)
        before = {"pretrained": earlier.model, "seed": earlier.seed} | earlier.setting
        whose = f"one of {', '.join(earlier.figures)}"
    for key in now:
        if before and before.get(key) != now[key]:
            raise RunError(
                f"--output_dir {folder} must be new or hold a comparison with the same options; it holds {whose} with "
                f"--{key} {setting_text(before.get(key))}, got {setting_text(now[key])}; choose another folder, or add "
                "--overwrite"
            )


def note_setting(folder: Path, options: CompareOptions) -> None:
    """Note with which options a comparison begins, for processes that make the same one before it has a task.

    A comparison with others, which --overwrite gives up, is deleted.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        check_same_setting(folder, options)
    except RunError:
        (folder / FILE).unlink(missing_ok=True)
    write_text(folder / _BEGUN, to_json(_whole_setting(options)) + "\n")


def _whole_setting(options: CompareOptions) -> dict[str, Any]:
    return {"pretrained": options.model.pretrained, "seed": options.run.seed} | setting_of(options)


def _begun(folder: Path) -> dict[str, Any]:
    """What `note_setting` noted; empty where that cannot be read, or where no run was made since."""
    if not any(is_run(path) for path in folder.glob("*/*")):
        return {}
    with suppress(SchemaError):
        found = restored(read_json(folder / _BEGUN))
        return found if isinstance(found, dict) else {}
    return {}


def write_comparison(folder: Path, options: CompareOptions, figures: Figures) -> ColumnComparison:
    """Write compare.json. Tasks that were compared there before with the same options stay in it.

    Args:
        folder: has the run folders of every task in `figures`.

    Returns: what was written.

    Raises:
        RunError: results of a run are missing or damaged.
    """
    model, seed, setting = options.model.pretrained, options.run.seed, setting_of(options)
    with suppress(RunError):  # None yet, or one of another version.
        earlier = read_comparison(folder)
        if (earlier.model, earlier.seed, earlier.setting) == (model, seed, setting):
            kept = {task: row for task, row in earlier.figures.items() if has_results(folder / task / NLS_RUN)}
            figures = kept | dict(figures)
    runs = {task: read_results(folder / task / NLS_RUN) for task in figures}
    first = next(iter(figures))
    content = {
        "model": model,
        "seed": seed,
        "dtype": runs[first].dtype,
        "ptwc": read_results(folder / first / PTWC_RUN).method,
        "setting": setting,
        "objectives": {task: run.task.objective for task, run in runs.items() if run.task is not None},
        "figures": {
            task: {column: _figure_to_json(figure) for column, figure in row.items()} for task, row in figures.items()
        },
    }
    write_text(folder / FILE, to_json(content) + "\n")
    return read_comparison(folder)


def is_comparison(folder: Path) -> bool:
    """Whether there is a compare.json."""
    return (folder / FILE).is_file()


def read_comparison(folder: Path) -> ColumnComparison:
    """The comparison in a folder.

    Raises:
        RunError: there is none, or it cannot be read.
    """
    try:
        content = restored(json.loads((folder / FILE).read_text(encoding="utf-8")))
        figures = {
            task: {column: _figure_from_json(row[column]) for column in COLUMNS}
            for task, row in content["figures"].items()
        }
        names = ("model", "seed", "setting", "dtype", "ptwc", "objectives")
        return ColumnComparison(folder, figures=figures, **{name: content[name] for name in names})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(
            f"{folder / FILE} must be a comparison written by this version of nybble compare; it cannot be read "
            f"({type(error).__name__}: {error}); repeat the command, which writes the file and repeats no finished run"
        ) from error


def setting_text(value: Any) -> str:
    """A value of an option, as it is given on the command line."""
    return (" ".join(map(str, value)) or "none") if isinstance(value, list) else str(value)


def _figure_to_json(figure: Figure) -> dict[str, Any]:
    return {
        "value": figure.value,
        "error": figure.error,
        "documents": figure.documents,
        "right": "".join(f"{row:.0f}" for row in figure.right),
    }


def _figure_from_json(values: Mapping[str, Any]) -> Figure:
    return Figure(values["value"], values["documents"], tuple(map(float, values["right"])))
