"""Registry of task sources: where the questions of --task come from.

Built in are lm-eval tasks with a training split, and files of rows. Another package adds a source by an entry point:

    [project.entry-points."nybble.tasks"]
    my-tasks = "my_package.tasks:SOURCE"            SOURCE: an object with the members of TaskSource
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

from nybble.data.files import ROW_SUFFIXES
from nybble.errors import DataError, OptionError
from nybble.registry import Registry
from nybble.tasks.dataset import TaskDataset, TaskRequest
from nybble.tasks.jsonl_source import JsonlSource
from nybble.tasks.lm_eval_source import LmEvalSource


class TaskSource(Protocol):
    """Contract of a task source.

    Attributes:
        name: the name under which it is registered.
    """

    @property
    def name(self) -> str: ...

    def matches(self, task: str) -> bool:
        """Whether this source provides a task.

        It must be fast, must not read data, and must claim no task of another source.

        Args:
            task: value of --task.
        """
        ...

    def load(self, request: TaskRequest) -> TaskDataset:
        """Load the questions of a task.

        The result must depend on the request and on the data alone. `train`, `held_out` and `scored` must not be
        empty and must have no rows in common; `scored` is what nybble measures the task on. The metric must be acc or
        acc_norm where the questions have alternatives, and log_likelihood where they do not.

        Raises:
            OptionError, DataError: with the requirement, what came, and the remedy in one line.
        """
        ...


TASK_SOURCES: Registry[TaskSource] = Registry("task source", "nybble.tasks")
TASK_SOURCES.register(JsonlSource.name, JsonlSource())
# Asked last: it takes every name that no other source claims.
_LM_EVAL = TASK_SOURCES.register(LmEvalSource.name, LmEvalSource())


def check_place(task: str) -> None:
    """Check a task before anything is read.

    Raises:
        OptionError: no source provides it, or two do.
        DataError: it is a file that is not there.
    """
    if find_source(task) is not _LM_EVAL and Path(task).suffix.lower() in ROW_SUFFIXES and not Path(task).exists():
        raise DataError(f"--task {task} must be an existing file; there is nothing at this path; check the path")


def find_source(task: str) -> TaskSource:
    """The source that provides a task.

    Args:
        task: value of --task.

    Raises:
        OptionError: two sources claim the task, or it is a file that none can read.
    """
    sources = TASK_SOURCES.usable()
    claims = [name for name, source in sources.items() if source is not _LM_EVAL and source.matches(task)]
    if len(claims) > 1:
        raise OptionError(
            f"--task must belong to one task source; {task} is claimed by {' and '.join(claims)}; "
            "uninstall one of these extensions"
        )
    if not claims and (os.sep in task or Path(task).is_file()):  # lm-eval has no names with a slash
        raise OptionError(
            f"--task must be a file that ends with one of {' '.join(ROW_SUFFIXES)}, or a task of lm-eval; got {task}; "
            "name or convert a file"
        )
    return TASK_SOURCES[claims[0]] if claims else _LM_EVAL


def is_scored_by_lm_eval(task: str) -> bool:
    """Whether lm-eval scores the task; else nybble scores it, on `TaskDataset.scored`.

    Raises:
        OptionError: two sources claim the task.
    """
    return find_source(task) is _LM_EVAL


def load_task(request: TaskRequest) -> TaskDataset:
    """Load a task from the source that provides it.

    Raises:
        OptionError: two sources claim the task, or it is unknown or cannot be trained on.
        DataError: its data are missing, malformed or too few.
        MissingExtraError: an optional dependency is not installed.
    """
    dataset = find_source(request.task).load(request)
    if not (dataset.train and dataset.held_out):
        raise DataError(
            f"--task {request.task} must have training rows and held-out rows; it has {len(dataset.train)} and "
            f"{len(dataset.held_out)}; use a task with more rows"
        )
    return dataset
