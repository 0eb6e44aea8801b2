"""Measure a model: token perplexity, KL divergence to the teacher, lm-eval tasks. The same calls for a torch model and for every export.

    token perplexity = exp(mean over tokens of -log q(token | those before it in its sequence))
    KL to teacher    = mean over the same positions of sum_v p_v (log p_v - log q_v)             p teacher, q model; nats

Word perplexity is lm-eval's task `wikitext` (whole articles, per word), with windows of at most `MAX_LENGTH` tokens.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nybble.console import bar
from nybble.data import SPLITS, splits_of
from nybble.errors import DataError, MissingExtraError, NybbleError, OptionError
from nybble.losses import Head
from nybble.rows import read_rows
from nybble.teacher import States

# Longest window in lm-eval: that of the published tables we compare with (EVIDENCE: NNCF's evaluation length).
MAX_LENGTH = 2048
# Bytes that the logits of one forward in lm-eval may take, with the copy that log_softmax makes.
_LOGIT_BYTES = 2 << 30
# Requests in a forward; more gain nothing (docs/log.md).
_MOST_REQUESTS = 32

# Positions whose float32 logits exist at a time.
_CHUNK = 128
# Index of a sequence -> positions in it [P] -> their logits [P, V], float32.
Logits = Callable[[int], Callable[[Tensor], Tensor]]


def logits_of(model: Any, input_ids: Tensor) -> Logits:
    """Logits of a transformers-like model (torch or exported) on rows of input_ids [S, T]."""
    device = getattr(model, "device", torch.device("cpu"))

    def of(i: int) -> Callable[[Tensor], Tensor]:
        z_TV = model(input_ids=input_ids[i : i + 1].to(device), use_cache=False).logits[0]
        return lambda positions: z_TV[positions].float()

    return of


def logits_from_states(head: Head, states: States | Tensor) -> Logits:
    """The teacher's logits from its hidden states [S, T, D]."""

    def of(i: int) -> Callable[[Tensor], Tensor]:
        hidden_TD = states[i].to(head.weight_VD.device)
        return lambda positions: head.logits(hidden_TD[positions])

    return of


@torch.no_grad()
def measure(
    logits: Logits,
    input_ids: Tensor,
    teacher: Logits | None = None,
    advance: Callable[[int], None] = lambda n: None,
    counted: Tensor | None = None,
) -> dict[str, float]:
    """Token perplexity on sequences [S, T], and KL to the teacher where there is one; of the predictions that are counted [S, T] (default: all).

    Returns: token_perplexity, tokens, and kl_to_teacher.
    """
    loss, divergence, tokens = 0.0, 0.0, 0
    for i, ids in enumerate(input_ids):
        which = (torch.ones_like(ids, dtype=torch.bool) if counted is None else counted[i])[:-1].nonzero()[:, 0]
        model_at, teacher_at = logits(i), teacher(i) if teacher is not None else None
        for positions in which.split(_CHUNK):
            log_q = F.log_softmax(model_at(positions), dim=-1)
            loss -= log_q.gather(1, ids[positions + 1, None].to(log_q.device)).sum().item()
            if teacher_at is not None:
                log_p = F.log_softmax(teacher_at(positions), dim=-1).to(log_q.device)
                divergence += torch.linalg.vecdot(log_p.exp(), log_p.sub_(log_q)).sum().item()
        tokens += len(which)
        advance(1)
    measured = {"token_perplexity": math.exp(min(loss / max(tokens, 1), 700.0)), "tokens": tokens}
    return measured if teacher is None else measured | {"kl_to_teacher": divergence / max(tokens, 1)}


@torch.no_grad()
def decoder_outputs(model: Any, ids_T: Tensor) -> Tensor:
    """What comes out of every decoder layer of a torch model (of the last one after the final norm), on the CPU: [L, T, D]."""
    found = model.base_model(input_ids=ids_T[None].to(model.device), use_cache=False, output_hidden_states=True).hidden_states
    return torch.cat(found[1:]).cpu()


def decoder_errors(model: Any, ids_T: Tensor, wanted_LTD: Tensor) -> list[float]:
    """By decoder layer the mean over tokens of |h - wanted|^2 / |wanted|^2, where h has come through the model's own layers before."""
    return [
        float(((ours.float() - theirs.float()).square().sum(-1) / theirs.float().square().sum(-1)).mean())
        for ours, theirs in zip(decoder_outputs(model, ids_T), wanted_LTD, strict=True)
    ]


# --- lm-eval ------------------------------------------------------------------------------------------------------------------

# Local folders for hub data sets whose name says something else.
_FOLDERS = {"ai2_arc": "arc", "wikitext_document_level": "wikitext/document_level"}


@functools.cache
def _task_manager() -> Any:
    """lm-eval's index of tasks; reading it takes seconds, so once."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


@contextmanager
def _explained(tasks: Sequence[str], remedy: str = ", or leave them out") -> Iterator[None]:
    """Data that cannot be had becomes a DataError, which says where it is looked for."""
    try:
        yield
    except NybbleError:
        raise
    except Exception as error:  # the hub's errors have no common base
        if any(word in repr(error) for word in ("Connection", "LocalEntryNotFound", "Offline", "couldn't be reached", "couldn't find", "Couldn't")):
            places = ", ".join(str(Path("FOLDER", *filter(None, _place(task)))) for task in tasks if not _is_group(task)) or "FOLDER/NAME"
            raise DataError(
                f"the data of {', '.join(tasks)} is not on this machine and the Hugging Face hub cannot be reached; "
                f"put train.jsonl, validation.jsonl, test.jsonl into {places} and give --data_dir FOLDER{remedy}"
            ) from error
        raise


def columns(tasks: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """lm-eval's results as columns of a table: word_perplexity of wikitext, and "task:NAME METRIC" for all else but standard errors; beside them
    "documents:NAME", the number of documents, and "right:NAME METRIC", which of them were right."""
    found: dict[str, Any] = {}
    for task, metrics in tasks.items():
        for metric, value in metrics.items():
            if task == "wikitext":
                if metric == "word_perplexity":
                    found[metric] = value
            elif metric.startswith("right:"):
                found[f"right:{task} {metric.removeprefix('right:')}"] = value
            elif metric == "sample_len":
                found[f"documents:{task}"] = value
            elif "stderr" not in metric:
                found[f"task:{task} {metric}"] = value
    return found


def check_tasks(tasks: Sequence[str], data_dir: str | None, flag: str = "--tasks") -> None:
    """Raise before the expensive part: MissingExtraError without lm-eval, OptionError for unknown tasks, DataError for missing local data.

    Args:
        flag: that named them, for errors.
    """
    if not tasks:
        return
    _check_known(tasks, flag)
    if data_dir is not None:
        _local_tasks(tasks, Path(data_dir), flag)
    else:
        with _explained(tasks, ", or leave them out" if flag == "--tasks" else ""):
            from lm_eval.tasks import get_task_dict

            get_task_dict(list(tasks), _task_manager())


def _check_known(tasks: Sequence[str], flag: str) -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise MissingExtraError("eval", f"measuring {', '.join(tasks)}" + (" (or leave the tasks out: --tasks)" if flag == "--tasks" else ""))
    known = _task_manager().all_tasks
    for task in tasks:
        if task not in known:
            near = get_close_matches(task, known, 3)
            remedy = f"did you mean {', '.join(near)}?" if near else "lm-eval ls tasks shows them"
            raise OptionError(f"{flag} must be ones that lm-eval knows; got {task}; {remedy}")


def open_task(name: str, data_dir: str | None, flag: str = "--task") -> Any:
    """lm-eval's own object for a task, with its rows.

    Args:
        flag: that named it, for errors.

    Raises:
        OptionError: unknown. DataError: no data.
    """
    _check_known([name], flag)
    if _is_group(name):
        raise OptionError(f"{flag} must name a single task; {name} is a group of tasks; name one of its parts")
    from lm_eval.tasks import get_task_dict

    chosen: list[Any] = [name] if data_dir is None else _local_tasks([name], Path(data_dir), flag, train=True)
    with _explained([name], ""):
        return get_task_dict(chosen, _task_manager())[name]


def metric_of(task: Any) -> str:
    """What a task is reported by, as `run_tasks` names it: acc_norm, else acc, else its first."""
    names = [entry["metric"] for entry in task.config.metric_list]
    name = next((known for known in ("acc_norm", "acc") if known in names), names[0])
    filters = [entry["name"] for entry in task.config.filter_list or []]
    return f"{name},{filters[0]}" if filters else str(name)


def longest_window(config: Any) -> int:
    """Tokens of the longest window in lm-eval."""
    return min(MAX_LENGTH, getattr(config, "max_position_embeddings", None) or MAX_LENGTH)


def requests_at_once(config: Any, length: int) -> int:
    """Requests of `length` tokens in one forward in lm-eval."""
    return int(max(1, min(_MOST_REQUESTS, _LOGIT_BYTES // (2 * 4 * length * config.vocab_size))))


def run_tasks(
    model: Any, tokenizer: Any, tasks: Sequence[str], batch_size: int = 0, limit: int | None = None, data_dir: str | None = None
) -> dict[str, dict[str, Any]]:
    """lm-eval tasks on a transformers-like model.

    Args:
        batch_size: requests in one forward; 0 = as many of the longest one of the task as `_LOGIT_BYTES` and `_MOST_REQUESTS` allow, at least 1.
        data_dir: folder with local copies of the data sets in the hub's field names, instead of the hub.

    Returns: task -> metric -> value, with lm-eval's names: "word_perplexity", "acc", "acc_norm", "exact_match,strict-match", ...; and for metrics that are a
        share of right answers "right:METRIC", a 1 or a 0 for each document, in the order of the data set, so that models can be compared document by document.
    """
    import lm_eval
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM

    evaluator.get_git_commit_hash = lambda: None  # of the working folder; where that is no repository, git says so on the terminal

    longest = longest_window(model.config)

    def fitting(length: int) -> int:
        return requests_at_once(model.config, min(length, longest))

    class Sized(HFLM):  # type: ignore[misc]
        """lm-eval's own "auto" tries sizes until the memory is full; this one computes."""

        def _loglikelihood_tokens(self, requests: Any, *rest: Any, **named: Any) -> Any:
            self.batch_size_per_gpu = batch_size or fitting(max((len(context) + len(answer) for _, context, answer in requests), default=1))
            if "override_bs" in named:  # called below, where there is a bar already
                named["disable_tqdm"] = True
            return super()._loglikelihood_tokens(requests, *rest, **named)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            """Whole documents, one at a time under one bar; lm-eval would draw a bar for every forward."""
            found: list[float] = []
            with bar(f"{requests[0].task_name}, documents", len(requests)) as advance:
                for request in requests:
                    found += super().loglikelihood_rolling([request], disable_tqdm=True)
                    advance(1)
            return found

    wrapped = Sized(pretrained=model, tokenizer=tokenizer, batch_size=batch_size or fitting(longest), max_length=longest)
    chosen: list[Any] = list(tasks) if data_dir is None else _local_tasks(tasks, Path(data_dir))
    with _explained(tasks):
        output = lm_eval.simple_evaluate(wrapped, tasks=chosen, limit=limit, bootstrap_iters=0, log_samples=True, task_manager=_task_manager())
    assert output is not None  # None on other processes than the first only
    found: dict[str, dict[str, Any]] = {}
    for task, metrics in output["results"].items():
        numbers = {metric.removesuffix(",none"): value for metric, value in metrics.items() if isinstance(value, int | float)}
        rights = {f"right:{metric}": _right(output["samples"].get(task, []), metric) for metric in numbers}
        found[task] = numbers | {name: right for name, right in rights.items() if right}
    return found


def _right(samples: list[dict[str, Any]], metric: str) -> str:
    """Which of lm-eval's documents were right by a metric: a 1 or a 0 each; nothing if it is of another kind."""
    name, _, chosen = metric.partition(",")
    values: dict[int, Any] = {sample["doc_id"]: sample.get(name) for sample in samples if sample["filter"] == (chosen or "none")}
    return "".join(str(int(values[i])) for i in sorted(values)) if all(value in (0, 1) for value in values.values()) else ""


def _is_group(name: str) -> bool:
    entry = _task_manager().task_index[name]
    return entry.yaml_path is None or str(entry.kind).lower().endswith(("group", "tag"))


def _place(task: str) -> tuple[str, str | None]:
    """Folder of a task's data in --data_dir, and a folder in it."""
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(_task_manager().task_index[task].yaml_path)
    name = config.get("dataset_path", task).split("/")[-1]
    return _FOLDERS.get(name, name), config.get("dataset_name")


def _local_tasks(tasks: Sequence[str], data_dir: Path, flag: str = "--tasks", train: bool = False) -> list[dict[str, Any]]:
    """lm-eval's own configurations with the data source replaced by local files, of which those that are scored must be there; with `train` those to train
    on too."""
    from lm_eval.tasks._yaml_loader import load_yaml

    index, configs = _task_manager().task_index, []
    for task in tasks:
        if _is_group(task):
            raise OptionError(f"{flag} with --data_dir must name single tasks; {task} is a group of tasks; name its parts")
        config = load_yaml(index[task].yaml_path)
        for key in ("dataset_path", "dataset_name", "dataset_kwargs"):
            config.pop(key, None)
        splits = [config[key] for key in ("training_split", "validation_split", "test_split", "fewshot_split") if config.get(key)]
        folder = _local_folder(data_dir, task, splits)
        files = _split_files(folder, splits)
        needed = {"scored": "test_split" if config.get("test_split") else "validation_split"} | ({"trained": "training_split"} if train else {})
        for what, key in needed.items():
            if config.get(key) and config[key] not in files:
                raise DataError(f"--data_dir: {task} is {what} on the split {config[key]}; put {config[key]}.jsonl into {folder}, which has none")
        for key in ("training_split", "validation_split", "fewshot_split"):
            if config.get(key) and config[key] not in files:
                config[key] = None
        config["custom_dataset"] = lambda _files=files, **_: _dataset(_files)
        configs.append(config)
    return configs


def _local_folder(data_dir: Path, task: str, splits: Sequence[str]) -> Path:
    name, subset = _place(task)
    tried = ([data_dir / name / subset] if subset else []) + [data_dir / name, data_dir / task]
    for folder in tried:
        if folder.is_dir() and _split_files(folder, splits):
            return folder
    named = ", ".join(dict.fromkeys(splits))
    raise DataError(f"--data_dir must hold the data of {task} in {tried[0]} (files named {named}; .jsonl or .parquet); found none")


def _split_files(folder: Path, splits: Sequence[str]) -> dict[str, list[str]]:
    """The files of those splits that a folder holds, all of one kind: .jsonl, or where a split has none of those .parquet."""
    files: dict[str, list[str]] = {}
    for split in dict.fromkeys(splits):
        for suffix in ("jsonl", "parquet"):
            of_that_name = re.compile(rf"{re.escape(split)}(-\d+-of-\d+)?\.{suffix}")  # anli's train_r1; dev_r1 is no "validation"
            candidates = sorted(folder.glob(f"*.{suffix}"))
            found = [str(file) for file in candidates if of_that_name.fullmatch(file.name) or (split in SPLITS and split in splits_of(file))]
            if found:
                files.setdefault(split, found)
    return files


def _dataset(files: dict[str, list[str]]) -> Any:
    import datasets

    found = datasets.DatasetDict()
    for split, names in files.items():
        read = [row for name in names for row in read_rows(Path(name), "--data_dir:")]
        if not read:
            raise DataError(f"--data_dir: {', '.join(names)} must have rows; it has none")
        try:
            columns = dict.fromkeys(name for row in read for name in row)
            found[split] = datasets.Dataset.from_dict({name: [row.get(name) for row in read] for name in columns})
        except (ValueError, TypeError) as error:  # pyarrow's: values of one column that are of several types
            raise DataError(f"--data_dir: {', '.join(names)} must have values of one type in each column: {' '.join(str(error).split())[:200]}") from error
    return found
