"""lm-eval tasks on local copies of their data."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nybble.data.files import read_rows
from nybble.data.splits import SPLITS, splits_of
from nybble.errors import DataError, OptionError

# --- lm-eval ------------------------------------------------------------------------------------------------------------------

# Local folders for hub data sets whose name says something else.
_FOLDERS = {"ai2_arc": "arc", "wikitext_document_level": "wikitext/document_level"}


@functools.cache
def task_manager() -> Any:
    """lm-eval's index of tasks; reading it takes seconds, so once."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def is_group(name: str) -> bool:
    entry = task_manager().task_index[name]
    return entry.yaml_path is None or str(entry.kind).lower().endswith(("group", "tag"))


def data_place(task: str) -> tuple[str, str | None]:
    """Folder of a task's data in --data_dir, and a folder in it."""
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(task_manager().task_index[task].yaml_path)
    name = config.get("dataset_path", task).split("/")[-1]
    return _FOLDERS.get(name, name), config.get("dataset_name")


def local_tasks(
    tasks: Sequence[str], data_dir: Path, flag: str = "--tasks", train: bool = False
) -> list[dict[str, Any]]:
    """lm-eval's own configurations with the data source replaced by local files, of which those that are scored must be there; with `train` those to train
    on too."""
    from lm_eval.tasks._yaml_loader import load_yaml

    index, configs = task_manager().task_index, []
    for task in tasks:
        if is_group(task):
            raise OptionError(
                f"{flag} with --data_dir must name single tasks; {task} is a group of tasks; name its parts"
            )
        config = load_yaml(index[task].yaml_path)
        for key in ("dataset_path", "dataset_name", "dataset_kwargs"):
            config.pop(key, None)
        splits = [
            config[key]
            for key in ("training_split", "validation_split", "test_split", "fewshot_split")
            if config.get(key)
        ]
        folder = _local_folder(data_dir, task, splits)
        files = _split_files(folder, splits)
        needed = {"scored": "test_split" if config.get("test_split") else "validation_split"} | (
            {"trained": "training_split"} if train else {}
        )
        for what, key in needed.items():
            if config.get(key) and config[key] not in files:
                raise DataError(
                    f"--data_dir: {task} is {what} on the split {config[key]}; put {config[key]}.jsonl into {folder}, which has none"
                )
        for key in ("training_split", "validation_split", "fewshot_split"):
            if config.get(key) and config[key] not in files:
                config[key] = None
        config["custom_dataset"] = lambda _files=files, **_: read_dataset(_files)
        configs.append(config)
    return configs


def _local_folder(data_dir: Path, task: str, splits: Sequence[str]) -> Path:
    name, subset = data_place(task)
    tried = ([data_dir / name / subset] if subset else []) + [data_dir / name, data_dir / task]
    for folder in tried:
        if folder.is_dir() and _split_files(folder, splits):
            return folder
    named = ", ".join(dict.fromkeys(splits))
    raise DataError(
        f"--data_dir must hold the data of {task} in {tried[0]} (files named {named}; .jsonl or .parquet); found none"
    )


def _split_files(folder: Path, splits: Sequence[str]) -> dict[str, list[str]]:
    """The files of those splits that a folder holds, all of one kind: .jsonl, or where a split has none of those .parquet."""
    files: dict[str, list[str]] = {}
    for split in dict.fromkeys(splits):
        for suffix in ("jsonl", "parquet"):
            of_that_name = re.compile(
                rf"{re.escape(split)}(-\d+-of-\d+)?\.{suffix}"
            )  # anli's train_r1; dev_r1 is no "validation"
            candidates = sorted(folder.glob(f"*.{suffix}"))
            found = [
                str(file)
                for file in candidates
                if of_that_name.fullmatch(file.name) or (split in SPLITS and split in splits_of(file))
            ]
            if found:
                files.setdefault(split, found)
    return files


def read_dataset(files: dict[str, list[str]]) -> Any:
    import datasets

    found = datasets.DatasetDict()
    for split, names in files.items():
        read = [row for name in names for row in read_rows(Path(name), "--data_dir:")]
        if not read:
            raise DataError(f"--data_dir: {', '.join(names)} must have rows; it has none")
        try:
            result_columns = dict.fromkeys(name for row in read for name in row)
            found[split] = datasets.Dataset.from_dict(
                {name: [row.get(name) for row in read] for name in result_columns}
            )
        except (ValueError, TypeError) as error:  # pyarrow's: values of one column that are of several types
            raise DataError(
                f"--data_dir: {', '.join(names)} must have values of one type in each column: {' '.join(str(error).split())[:200]}"
            ) from error
    return found
