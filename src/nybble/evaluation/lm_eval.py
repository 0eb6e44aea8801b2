"""lm-eval tasks: check them before a run, run them on torch models and on exported models, and name their results.

Word perplexity is lm-eval's task `wikitext`: whole articles, loss per word, windows of at most
`lm_eval_model.MAX_WINDOW` tokens. What nybble changes in lm-eval stands in lm_eval_model.py.
"""

from __future__ import annotations

import importlib.util
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nybble import processes
from nybble.data.files import ROW_SUFFIXES
from nybble.errors import (
    DataError,
    HubUnreachableError,
    MissingExtraError,
    ModelError,
    NybbleError,
    OptionError,
    describe_error,
)
from nybble.evaluation.lm_eval_model import disable_inquiries, wrap_model
from nybble.evaluation.local_tasks import data_location, has_own_code, is_group, local_task_configs, task_manager

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Words in the errors that datasets and huggingface_hub raise when data can neither be downloaded nor be found in the
# cache. These errors have no common base class.
_UNREACHABLE = ("Connection", "LocalEntryNotFound", "Offline", "couldn't be reached", "couldn't find", "Couldn't")
# Files of lm-eval that read rows.
_TASK_CODE = (str(Path("lm_eval", "api", "task.py")), str(Path("lm_eval", "api", "samplers.py")))
_LEAVE_OUT = ", or leave the tasks out with --eval_tasks none"


@dataclass(frozen=True)
class LmEvalConfig:
    """What to run.

    Attributes:
        tasks: names of lm-eval tasks.
        batch_size: requests per forward; 0 = computed from the vocabulary and the length of the requests.
        limit: run only this many documents of each task; None = all.
        data_dir: folder with local copies of the data sets; None = the Hugging Face hub.
    """

    tasks: tuple[str, ...]
    batch_size: int = 0
    limit: int | None = None
    data_dir: str | None = None


def check_tasks(tasks: Sequence[str], data_dir: str | None, option: str = "--eval_tasks") -> None:
    """Check before the expensive part of a run that tasks can be run.

    Args:
        tasks: names of lm-eval tasks; may be empty.
        data_dir: folder with local copies of the data sets; None = the Hugging Face hub.
        option: the option that named the tasks, for error messages.

    Raises:
        MissingExtraError: lm-eval is not installed.
        OptionError: a task is unknown, needs a package that is not installed, or is a group of tasks with `data_dir`.
        DataError: the data are neither in `data_dir` nor available from the hub, or files in `data_dir` cannot be read.
    """
    if not tasks:
        return
    _check_names(tasks, option)
    with _explain_missing_packages(tasks, option):
        _check_data(tasks, data_dir, option)


def _check_data(tasks: Sequence[str], data_dir: str | None, option: str) -> None:
    if data_dir is not None:
        for task, config in zip(tasks, local_task_configs(tasks, Path(data_dir), option), strict=True):
            _load_local(task, config)
        return
    with _explain_missing_data(tasks, _LEAVE_OUT if option == "--eval_tasks" else ""):
        task_manager().load(list(tasks))


def check_tokenizer(tasks: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> None:
    """Check before the expensive part of a run that lm-eval can score texts with this tokenizer.

    Raises:
        ModelError: the tokenizer has no token from which the first token of a text can be predicted.
    """
    if tasks and tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise ModelError(
            f"the tasks {' '.join(tasks)} need a tokenizer with a bos_token or an eos_token, to start texts with; the "
            "tokenizer of this model has neither; add one to tokenizer_config.json, or leave the tasks out with "
            "--eval_tasks none"
        )


def open_task(name: str, data_dir: str | None, option: str = "--task") -> Any:
    """Return lm-eval's object for a task, with its rows, among them those for training.

    Args:
        name: name of a single lm-eval task.
        data_dir: folder with local copies of the data sets; None = the Hugging Face hub.
        option: the option that named the task, for error messages.

    Raises:
        MissingExtraError: lm-eval is not installed.
        OptionError: the task is unknown, needs a package that is not installed, or is a group of tasks.
        DataError: the data are neither in `data_dir` nor available from the hub, or files in `data_dir` cannot be read.
    """
    _check_names([name], option)
    if is_group(name):
        raise OptionError(f"{option} must name a single task; {name} is a group of tasks; name one of its tasks")
    with _explain_missing_packages([name], option):
        if data_dir is not None:
            return _load_local(name, local_task_configs([name], Path(data_dir), option, needs_train=True)[0])
        with _explain_missing_data([name], ""):
            return task_manager().load([name])["tasks"][name]


def main_metric(task: Any) -> str:
    """Return the metric that a task is reported by, as `run_tasks` names it: acc_norm, else acc, else its first."""
    names = [entry["metric"] for entry in task.config.metric_list]
    name = next((preferred for preferred in ("acc_norm", "acc") if preferred in names), names[0])
    filters = [entry["name"] for entry in task.config.filter_list or []]
    return f"{name},{filters[0]}" if filters else str(name)


def run_tasks(model: Any, tokenizer: Any, config: LmEvalConfig) -> dict[str, dict[str, Any]]:
    """Run lm-eval tasks.

    Args:
        model: a transformers model, or an exported model with the same call.
        tokenizer: its tokenizer.
        config: the tasks.

    Returns:
        task -> metric -> value, with lm-eval's names: "word_perplexity", "acc", "exact_match,strict-match", ...
        A metric that is a share of right answers has also "right:METRIC", a string with a 1 (right) or a 0 for each
        document in the order of the data set. It allows to compare models document by document.

    Raises:
        OptionError: a group of tasks with `data_dir`.
        DataError: the data are neither in `data_dir` nor available from the hub.
    """
    import lm_eval

    disable_inquiries()
    tasks: list[Any] = list(config.tasks)
    if config.data_dir is not None:
        tasks = list(local_task_configs(config.tasks, Path(config.data_dir)))
    with _explain_missing_data(config.tasks, _LEAVE_OUT), _explain_bad_rows(config):
        output = lm_eval.simple_evaluate(
            wrap_model(model, tokenizer, config.batch_size),
            tasks=tasks,
            limit=config.limit,
            bootstrap_iters=0,
            log_samples=True,
            task_manager=task_manager(),
        )
    return processes.on_first(lambda: _metrics_by_task(output))  # others have no output


def _metrics_by_task(output: Any) -> dict[str, dict[str, Any]]:
    """What `run_tasks` returns, from what lm-eval does."""
    results: dict[str, dict[str, Any]] = {}
    for task, metrics in output["results"].items():
        numbers = {
            metric.removesuffix(",none"): value for metric, value in metrics.items() if isinstance(value, int | float)
        }
        samples = output["samples"].get(task, [])
        right = {f"right:{metric}": _right_documents(samples, metric) for metric in numbers}
        results[task] = numbers | {name: documents for name, documents in right.items() if documents}
    return results


def result_columns(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Turn the results of `run_tasks` into columns of a table.

    Returns:
        "word_perplexity" of wikitext, and for every other task "task:NAME METRIC" without standard errors,
        "right:NAME METRIC" (see `run_tasks`), and "documents:NAME", the number of documents.
    """
    columns: dict[str, Any] = {}
    for task, metrics in results.items():
        for metric, value in metrics.items():
            if task == "wikitext":
                if metric == "word_perplexity":
                    columns[metric] = value
            elif metric.startswith("right:"):
                columns[f"right:{task} {metric.removeprefix('right:')}"] = value
            elif metric == "sample_len":
                columns[f"documents:{task}"] = value
            elif "stderr" not in metric:
                columns[f"task:{task} {metric}"] = value
    return columns


def _load_local(name: str, config: dict[str, Any]) -> Any:
    """Return lm-eval's object for a task on local files, of which lm-eval renders the first row."""
    try:
        return task_manager().load([config])["tasks"][name]
    except NybbleError:
        raise
    except Exception as error:  # templates raise errors of any type
        raise DataError(
            f"the files in --data_dir must have rows that lm-eval's task {name} can read; it cannot "
            f"({type(error).__name__}: {' '.join(str(error).split())[:200]}); correct their columns"
        ) from error


def _check_names(tasks: Sequence[str], option: str) -> None:
    """Raise MissingExtraError without lm-eval, and OptionError for a task that it does not know."""
    if importlib.util.find_spec("lm_eval") is None:
        raise MissingExtraError("eval", f"{option} {' '.join(tasks)}")
    own = [task for task in tasks if task.lower().endswith(ROW_SUFFIXES)]
    known = [] if own else task_manager().all_tasks  # reading them takes seconds
    for task in own or tasks:
        if task not in known:
            similar = get_close_matches(task, known, 3)
            remedy = f"did you mean {', '.join(similar)}?" if similar else "list them with: lm-eval ls tasks"
            if task.lower().endswith(ROW_SUFFIXES):
                remedy = "rows of your own are a --task of nybble eval or nybble tune"
            raise OptionError(f"{option} must name tasks of lm-eval; got {task}; {remedy}")


@contextmanager
def _explain_missing_data(tasks: Sequence[str], alternative: str) -> Iterator[None]:
    """Turn the errors of data that cannot be downloaded into a DataError that says where local files go."""
    try:
        yield
    except NybbleError:
        raise
    except Exception as error:
        if not any(word in repr(error) for word in _UNREACHABLE):
            raise
        own = [task for task in tasks if not is_group(task) and has_own_code(task)]
        folders = [
            str(Path("FOLDER", *filter(None, data_location(task))))
            for task in tasks
            if not is_group(task) and task not in own
        ]
        remedy = (
            f"leave out {', '.join(own)}, which --data_dir cannot serve"
            if own
            else f"put train.jsonl, validation.jsonl and test.jsonl into {', '.join(folders) or 'FOLDER/NAME'} and add "
            f"--data_dir FOLDER{alternative}"
        )
        raise HubUnreachableError(
            f"the data of {', '.join(tasks)} must be on this machine, as the Hugging Face hub cannot be reached; "
            + remedy
        ) from error


@contextmanager
def _explain_missing_packages(tasks: Sequence[str], option: str) -> Iterator[None]:
    """Turn the error of a task's code that imports a package which is not installed into an OptionError."""
    try:
        yield
    except ImportError as error:
        raise OptionError(
            f"{option} must name tasks whose Python packages are installed; {' '.join(tasks)} needs one that is not "
            f"({describe_error(error)}); install it, or leave the task out"
        ) from error


@contextmanager
def _explain_bad_rows(config: LmEvalConfig) -> Iterator[None]:
    """Turn an error of a task's own code on rows of local files into a DataError."""
    try:
        yield
    except NybbleError:
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        if config.data_dir is None or not any(frame.filename.endswith(_TASK_CODE) for frame in frames):
            raise
        raise DataError(
            f"every row in --data_dir must be one that lm-eval's tasks {', '.join(config.tasks)} can read; one is not "
            f"({describe_error(error)}); correct the row, or remove it"
        ) from error


def _right_documents(samples: Sequence[dict[str, Any]], metric: str) -> str:
    """Return a 1 or a 0 for each document of lm-eval's samples; empty where the metric is no share of right answers."""
    name, _, metric_filter = metric.partition(",")
    values: dict[int, Any] = {
        sample["doc_id"]: sample.get(name) for sample in samples if sample["filter"] == (metric_filter or "none")
    }
    if not all(value in (0, 1) for value in values.values()):
        return ""
    return "".join(str(int(values[i])) for i in sorted(values))
