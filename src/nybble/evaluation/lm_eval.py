"""Measure a model: token perplexity, KL divergence to the teacher, lm-eval tasks. The same calls for a torch model and for every export.

    token perplexity = exp(mean over tokens of -log q(token | those before it in its sequence))
    KL to teacher    = mean over the same positions of sum_v p_v (log p_v - log q_v)             p teacher, q model; nats

Word perplexity is lm-eval's task `wikitext` (whole articles, per word), with windows of at most `MAX_LENGTH` tokens.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from nybble.console import bar
from nybble.errors import DataError, MissingExtraError, NybbleError, OptionError
from nybble.evaluation.local_tasks import data_place, is_group, local_tasks, task_manager

# Longest window in lm-eval: that of the published tables we compare with (EVIDENCE: NNCF's evaluation length).
MAX_LENGTH = 2048
# Bytes that the logits of one forward in lm-eval may take, with the copy that log_softmax makes.
_LOGIT_BYTES = 2 << 30
# Requests in a forward; more gain nothing (docs/log.md).
_MOST_REQUESTS = 32


@contextmanager
def _explained(tasks: Sequence[str], remedy: str = ", or leave them out") -> Iterator[None]:
    """Data that cannot be had becomes a DataError, which says where it is looked for."""
    try:
        yield
    except NybbleError:
        raise
    except Exception as error:  # the hub's errors have no common base
        if any(
            word in repr(error)
            for word in (
                "Connection",
                "LocalEntryNotFound",
                "Offline",
                "couldn't be reached",
                "couldn't find",
                "Couldn't",
            )
        ):
            places = (
                ", ".join(str(Path("FOLDER", *filter(None, data_place(task)))) for task in tasks if not is_group(task))
                or "FOLDER/NAME"
            )
            raise DataError(
                f"the data of {', '.join(tasks)} is not on this machine and the Hugging Face hub cannot be reached; "
                f"put train.jsonl, validation.jsonl, test.jsonl into {places} and give --data_dir FOLDER{remedy}"
            ) from error
        raise


def result_columns(tasks: dict[str, dict[str, Any]]) -> dict[str, Any]:
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
        local_tasks(tasks, Path(data_dir), flag)
    else:
        with _explained(tasks, ", or leave them out" if flag == "--tasks" else ""):
            from lm_eval.tasks import get_task_dict

            get_task_dict(list(tasks), task_manager())


def _check_known(tasks: Sequence[str], flag: str) -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise MissingExtraError(
            "eval",
            f"measuring {', '.join(tasks)}" + (" (or leave the tasks out: --tasks)" if flag == "--tasks" else ""),
        )
    known = task_manager().all_tasks
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
    if is_group(name):
        raise OptionError(f"{flag} must name a single task; {name} is a group of tasks; name one of its parts")
    from lm_eval.tasks import get_task_dict

    chosen: list[Any] = [name] if data_dir is None else local_tasks([name], Path(data_dir), flag, train=True)
    with _explained([name], ""):
        return get_task_dict(chosen, task_manager())[name]


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
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    batch_size: int = 0,
    limit: int | None = None,
    data_dir: str | None = None,
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

    evaluator.get_git_commit_hash = lambda: (
        None
    )  # of the working folder; where that is no repository, git says so on the terminal

    longest = longest_window(model.config)

    def fitting(length: int) -> int:
        return requests_at_once(model.config, min(length, longest))

    class Sized(HFLM):  # type: ignore[misc]
        """lm-eval's own "auto" tries sizes until the memory is full; this one computes."""

        def _loglikelihood_tokens(self, requests: Any, *rest: Any, **named: Any) -> Any:
            self.batch_size_per_gpu = batch_size or fitting(
                max((len(context) + len(answer) for _, context, answer in requests), default=1)
            )
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

    wrapped = Sized(
        pretrained=model, tokenizer=tokenizer, batch_size=batch_size or fitting(longest), max_length=longest
    )
    chosen: list[Any] = list(tasks) if data_dir is None else local_tasks(tasks, Path(data_dir))
    with _explained(tasks):
        output = lm_eval.simple_evaluate(
            wrapped, tasks=chosen, limit=limit, bootstrap_iters=0, log_samples=True, task_manager=task_manager()
        )
    assert output is not None  # None on other processes than the first only
    found: dict[str, dict[str, Any]] = {}
    for task, metrics in output["results"].items():
        numbers = {
            metric.removesuffix(",none"): value for metric, value in metrics.items() if isinstance(value, int | float)
        }
        rights = {f"right:{metric}": _right(output["samples"].get(task, []), metric) for metric in numbers}
        found[task] = numbers | {name: right for name, right in rights.items() if right}
    return found


def _right(samples: list[dict[str, Any]], metric: str) -> str:
    """Which of lm-eval's documents were right by a metric: a 1 or a 0 each; nothing if it is of another kind."""
    name, _, chosen = metric.partition(",")
    values: dict[int, Any] = {
        sample["doc_id"]: sample.get(name) for sample in samples if sample["filter"] == (chosen or "none")
    }
    return (
        "".join(str(int(values[i])) for i in sorted(values))
        if all(value in (0, 1) for value in values.values())
        else ""
    )
