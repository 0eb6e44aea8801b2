"""`nybble eval`: perplexity, KL divergence to a teacher, and lm-eval tasks of anything that can be opened.

A table is for people, a JSON object for programs. Where stdout is no terminal, it gets the object alone
(`nybble eval RUN | jq .token_perplexity`), and the table goes to stderr.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from rich.table import Table

from nybble.compression.checks import check_length
from nybble.console import bar, console, say
from nybble.data.generate import vocabulary_fingerprint
from nybble.data.mixture import Mixture, require_conversations
from nybble.data.packing import TokenRows, pack_documents
from nybble.data.sources import load_documents
from nybble.errors import OptionError
from nybble.evaluation.lm_eval import LmEvalConfig, check_tasks, check_tokenizer, result_columns, run_tasks
from nybble.evaluation.perplexity import measure_sequences, model_logits
from nybble.models.checkpoint import empty_model
from nybble.models.loading import LoadedModel
from nybble.options.commands import EvalOptions
from nybble.report.labels import metric_label
from nybble.schema import to_json
from nybble.tasks.dataset import TaskDataset, TaskRequest
from nybble.tasks.scoring import measure_task
from nybble.tasks.sources import check_place, is_scored_by_lm_eval, load_task
from nybble.workflows.target import open_target


def evaluate(options: EvalOptions) -> dict[str, float]:
    """Measure one model, print what was measured, on what, and return the numbers.

    A terminal gets a table; where stdout is a file or a pipe it gets JSON, and the table goes to stderr.

    Raises:
        NybbleError: whatever a person can repair.
    """
    options.check()
    asked, text = options.evaluation, options.text
    check_tasks(asked.eval_tasks, text.data_dir)
    task = None if asked.task is None else _load_task(asked.task, text.data_dir)
    opened = open_target(asked.target, options.model, "TARGET", asked.strict)
    check_tokenizer(asked.eval_tasks, opened.tokenizer)
    results: dict[str, float] = {}
    measured: dict[str, Any] = {"model": opened.name, "strict": asked.strict}
    with torch.no_grad():
        if text.data:
            _check_length(opened, text.seq_len)
            rows = sequences_to_measure(options, opened)
            measured |= {"data": list(text.data), "split": asked.split, "teacher": asked.teacher}
            measured |= {"num_samples": len(rows), "seq_len": rows.ids.shape[1]}
            measured |= {"assistant_only_loss": text.assistant_only_loss}
            results |= _measure_text(options, opened, rows)
        if asked.eval_tasks:
            config = LmEvalConfig(asked.eval_tasks, asked.eval_batch_size, asked.limit, text.data_dir)
            columns = result_columns(run_tasks(opened.model, opened.tokenizer, config))
            results |= columns
            measured |= {"limit": asked.limit}
        if task is not None:
            results |= measure_task(opened.model, opened.tokenizer, task, asked.limit, text.seq_len)
            measured |= {"task": asked.task, "limit": asked.limit}
    results = {key: value for key, value in results.items() if not key.startswith("right:")}
    say(_title(measured))
    table = Table("measure", "value")
    for key, value in results.items():
        table.add_row(metric_label(key), f"{value:.4f}" if isinstance(value, float) else str(value))
    console.print(table)
    if not sys.stdout.isatty():
        print(to_json(measured | results))
    return results


def _load_task(name: str, data_dir: str | None) -> TaskDataset:
    """The rows of a task that nybble scores itself.

    Raises:
        OptionError: lm-eval scores it.
        DataError: there is no such file, or it cannot be read.
    """
    check_place(name)
    if is_scored_by_lm_eval(name):
        raise OptionError(f"--task must be a file of rows; {name} is a task of lm-eval; name it with --eval_tasks")
    return load_task(TaskRequest(name, data_dir, 0, 0))


def _title(measured: Mapping[str, Any]) -> str:
    """What was measured, and on what, in words."""
    if "data" not in measured:
        return str(measured["model"])
    only = ", what the assistant says" if measured["assistant_only_loss"] else ""
    compared = f", compared with {measured['teacher']}" if measured["teacher"] else ""
    return (
        f"{measured['model']} on the {measured['split']} split of {' + '.join(measured['data'])} "
        f"({measured['num_samples']} sequences of {measured['seq_len']} tokens{only}){compared}"
    )


def _measure_text(options: EvalOptions, opened: LoadedModel, rows: TokenRows) -> dict[str, float]:
    teacher = None
    if options.evaluation.teacher is not None:
        teacher = model_logits(_open_teacher(options, options.evaluation.teacher, opened).model, rows.ids)
    with bar(f"{options.evaluation.split} of {' + '.join(options.text.data)}", len(rows)) as advance:
        return measure_sequences(model_logits(opened.model, rows.ids), rows.ids, teacher, advance, rows.loss_mask)


def _check_length(opened: LoadedModel, seq_len: int) -> None:
    """Refuse sequences that are longer than the positions of a model; of an export, those that its class has."""
    model = opened.model
    if not isinstance(model, torch.nn.Module):
        model = empty_model(model.config, trust_remote_code=False)
    check_length(model, opened.name, seq_len)


def _open_teacher(options: EvalOptions, target: str, opened: LoadedModel) -> LoadedModel:
    """The model to compare with; OptionError where its predictions are of other tokens."""
    teacher = open_target(target, options.model, "--teacher", options.evaluation.strict)
    _check_length(teacher, options.text.seq_len)
    sizes = [model.config.get_text_config().vocab_size for model in (teacher.model, opened.model)]
    vocabularies = [vocabulary_fingerprint(loaded.tokenizer) for loaded in (teacher, opened)]
    if vocabularies[0] != vocabularies[1] or sizes[0] != sizes[1]:
        raise OptionError(f"--teacher must have the vocabulary of {opened.name}; {teacher.name} has another")
    return teacher


def sequences_to_measure(options: EvalOptions, opened: LoadedModel) -> TokenRows:
    """The sequences of --split of --data.

    Raises:
        DataError: a source cannot be read or is too short, or has no conversations for --assistant_only_loss.
    """
    text, split = options.text, options.evaluation.split
    mixture, assistant = Mixture.parse(text.data), text.assistant_only_loss
    documents = {
        name: load_documents(name, text.text_column, text.data_dir, (split,), "--data", "--data")[split]
        for name in mixture.names
    }
    if assistant:
        require_conversations(documents)
    parts = [
        pack_documents(opened.tokenizer, found, text.seq_len, split, assistant_only=assistant)
        for found in documents.values()
    ]
    return mixture.evaluation_rows(parts, options.evaluation.num_samples)
