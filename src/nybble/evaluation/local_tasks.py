"""lm-eval tasks on local copies of their data sets (--data_dir), for machines without the Hugging Face hub.

A task keeps lm-eval's own configuration. Only its data source is replaced. Files are looked for in these folders:

    DATA_DIR/DATASET/SUBSET, DATA_DIR/DATASET, DATA_DIR/TASK
        DATASET is the last part of the hub's name, SUBSET its configuration

as SPLIT.jsonl, SPLIT-00000-of-00002.jsonl, or a name with the split as a word ("my-dev.jsonl" for validation), or the
same with the suffix .json or .parquet, in upper or lower case.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nybble.data.files import check_unicode, read_rows
from nybble.data.splits import SPLITS, splits_in_name
from nybble.errors import DataError, OptionError

# Folder names for data sets whose name on the hub does not say what they are.
_FOLDERS = {"ai2_arc": "arc", "wikitext_document_level": "wikitext/document_level"}
# Not .csv: all its values are text, where tasks compare numbers.
_SUFFIXES = (".jsonl", ".json", ".parquet")
_SPLIT_KEYS = ("training_split", "validation_split", "test_split", "fewshot_split")


@functools.cache
def task_manager() -> Any:
    """Return lm-eval's index of tasks. Building it takes seconds, so there is one for the process."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def is_group(name: str) -> bool:
    """Return whether a name that lm-eval knows stands for several tasks."""
    entry = task_manager().task_index[name]
    return entry.yaml_path is None or str(entry.kind).lower().endswith(("group", "tag"))


def has_own_code(task: str) -> bool:
    """Return whether a task is a Python class, which loads its data itself."""
    return "class" in _task_config(task)


def data_location(task: str) -> tuple[str, str | None]:
    """Return the folder of a task's data in --data_dir, and the subfolder of its subset if the data set has subsets."""
    config = _task_config(task)
    name = config.get("dataset_path", task).split("/")[-1]
    return _FOLDERS.get(name, name), config.get("dataset_name")


def local_task_configs(
    tasks: Sequence[str], data_dir: Path, option: str = "--eval_tasks", needs_train: bool = False
) -> list[dict[str, Any]]:
    """Return lm-eval's configurations of tasks with their data source replaced by local files.

    Args:
        tasks: names of single lm-eval tasks.
        data_dir: folder of the data sets.
        option: the option that named the tasks, for error messages.
        needs_train: whether the training split must be there too. The split that is scored must always be there.

    Raises:
        OptionError: a name stands for a group of tasks, or for a task that loads its data by code of its own.
        DataError: the files of a required split are missing, among them that of few-shot examples. Other missing splits
            are removed from the configuration.
    """
    configs = []
    for task in tasks:
        if is_group(task):
            raise OptionError(
                f"{option} must name single tasks with --data_dir; {task} is a group of tasks; name one of its tasks"
            )
        config = _task_config(task)
        if has_own_code(task):
            raise OptionError(
                f"{option} must name tasks whose data are in files with --data_dir; {task} loads its data by code of "
                "its own; leave out --data_dir for it, or name another task"
            )
        for key in ("dataset_path", "dataset_name", "dataset_kwargs"):
            config.pop(key, None)
        splits = [config[key] for key in _SPLIT_KEYS if config.get(key)]
        folder = _data_folder(data_dir, task, splits)
        files = _split_files(folder, splits)
        scored = "test_split" if config.get("test_split") else "validation_split"
        needed = [("scored on", scored), *([("trained on", "training_split")] if needs_train else [])]
        if config.get("num_fewshot"):  # lm-eval would take solved examples from the rows that it scores
            needed.append(("shown examples of", "fewshot_split"))
        for verb, key in needed:
            if config.get(key) and config[key] not in files:
                raise DataError(
                    f"--data_dir must hold the split that {task} is {verb}; {folder} has no {config[key]}; "
                    f"put {config[key]}.jsonl there"
                )
        for key in _SPLIT_KEYS:
            if key != "test_split" and config.get(key) and config[key] not in files:
                config[key] = None
        config["custom_dataset"] = _dataset_reader(files)
        configs.append(config)
    return configs


def read_dataset(files: dict[str, list[str]]) -> Any:
    """Read split -> files into a datasets.DatasetDict. Columns that a row does not have are None.

    Raises:
        DataError: a file cannot be read, a split has no rows, or a column has values of several types.
    """
    import datasets
    import pyarrow

    splits = datasets.DatasetDict()
    for split, paths in files.items():
        rows = [row for path in paths for row in read_rows(Path(path), "--data_dir")]
        if not rows:
            raise DataError(f"--data_dir must hold rows in {', '.join(paths)}; there are none; add rows, or delete it")
        names = dict.fromkeys(name for row in rows for name in row)
        check_unicode(list(names), f"the column names of {', '.join(paths)}")
        columns = {name: _arrow_column(name, [row.get(name) for row in rows], paths) for name in names}
        splits[split] = datasets.Dataset(pyarrow.table(columns))
    return splits


def _arrow_column(name: str, values: list[Any], paths: Sequence[str]) -> Any:
    import pyarrow

    try:
        return pyarrow.array(values)
    except (ValueError, TypeError, OverflowError) as error:
        raise DataError(
            f"--data_dir must hold values of one type in each column of {', '.join(paths)}; column {name[:80]}: "
            f"{' '.join(str(error).split())[:200]}; correct the column, or remove it if the task does not read it"
        ) from error


def _task_config(task: str) -> dict[str, Any]:
    """Return a new copy of lm-eval's configuration of a task."""
    from lm_eval.tasks._yaml_loader import load_yaml

    config: dict[str, Any] = load_yaml(task_manager().task_index[task].yaml_path)
    return config


def _dataset_reader(files: dict[str, list[str]]) -> Callable[..., Any]:
    """Return the function that lm-eval calls for the data set of a task; it passes arguments that are not needed."""
    return lambda **_: read_dataset(files)


def _data_folder(data_dir: Path, task: str, splits: Sequence[str]) -> Path:
    """Return the folder with files of a task's splits, or raise DataError."""
    name, subset = data_location(task)
    candidates = ([data_dir / name / subset] if subset else []) + [data_dir / name, data_dir / task]
    for folder in candidates:
        if folder.is_dir() and _split_files(folder, splits):
            return folder
    raise DataError(
        f"--data_dir must hold the data of {task} in {candidates[0]}; there are none; "
        f"put files there named {', '.join(dict.fromkeys(splits))} (.jsonl or .parquet)"
    )


def _split_files(folder: Path, splits: Sequence[str]) -> dict[str, list[str]]:
    """Return split -> its files in a folder, all of one suffix: the first one of _SUFFIXES that has any."""
    files: dict[str, list[str]] = {}
    for split in dict.fromkeys(splits):
        for suffix in _SUFFIXES:
            # Splits may have names of their own, such as train_r1 and dev_r1 of anli. These match by their whole name
            # only.
            exact = re.compile(rf"{re.escape(split)}(-\d+-of-\d+)?\{suffix}", re.IGNORECASE)
            matching = [
                str(file)
                for file in sorted(folder.iterdir())
                if file.suffix.lower() == suffix
                and (exact.fullmatch(file.name) or (split in SPLITS and split in splits_in_name(file)))
            ]
            if matching:
                files.setdefault(split, matching)
    return files
