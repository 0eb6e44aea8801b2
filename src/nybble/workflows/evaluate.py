"""`nybble eval`: perplexity, KL divergence to a teacher, and lm-eval tasks of anything that can be opened."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from rich.table import Table

from nybble.console import bar, console
from nybble.data.generate import vocabulary_fingerprint
from nybble.data.mixture import Mixture, require_conversations
from nybble.data.packing import TokenRows, pack_documents
from nybble.data.sources import load_documents
from nybble.errors import ModelError, OptionError, RunError
from nybble.evaluation.lm_eval import LmEvalConfig, check_tasks, check_tokenizer, result_columns, run_tasks
from nybble.evaluation.perplexity import measure_sequences, model_logits
from nybble.export.base import check_formats, exporter_of
from nybble.models import quantized_file, quantized_model
from nybble.models.loading import LoadedModel, load
from nybble.options.commands import EvalOptions
from nybble.run.folder import QUANTIZED, check_complete
from nybble.run.marker import is_run
from nybble.workflows.plan import pick_place


def evaluate(options: EvalOptions) -> dict[str, float]:
    """Measure one model; prints the results as a table and as JSON, and returns them.

    Raises:
        NybbleError: whatever a person can repair.
    """
    options.check()
    asked, text = options.evaluation, options.text
    check_tasks(asked.eval_tasks, text.data_dir)
    opened = open_target(options, asked.target)
    check_tokenizer(asked.eval_tasks, opened.tokenizer)
    results: dict[str, float] = {}
    with torch.no_grad():
        if text.data:
            results |= _measure_text(options, opened)
        if asked.eval_tasks:
            config = LmEvalConfig(asked.eval_tasks, asked.eval_batch_size, asked.limit, text.data_dir)
            columns = result_columns(run_tasks(opened.model, opened.tokenizer, config))
            results |= {key: value for key, value in columns.items() if not key.startswith("right:")}
    table = Table("measure", "value", title=opened.name)
    for key, value in results.items():
        table.add_row(key.removeprefix("task:"), f"{value:.4f}" if isinstance(value, float) else str(value))
    console.print(table)
    console.print_json(json.dumps(results))
    return results


def _measure_text(options: EvalOptions, opened: LoadedModel) -> dict[str, float]:
    rows, teacher = sequences_to_measure(options, opened), None
    if options.evaluation.teacher is not None:
        teacher = model_logits(_open_teacher(options, options.evaluation.teacher, opened).model, rows.ids)
    with bar(f"{options.evaluation.split} of {' + '.join(options.text.data)}", len(rows)) as advance:
        return measure_sequences(model_logits(opened.model, rows.ids), rows.ids, teacher, advance, rows.loss_mask)


def open_target(options: EvalOptions, target: str) -> LoadedModel:
    """Whatever can be measured: a run (its 4-bit model), a folder that a run made, or anything that --pretrained takes.

    Raises:
        RunError: a run that is not finished.
        ModelError: nothing that can be opened.
    """
    path, trust = Path(target), options.model.trust_remote_code
    if is_run(path):
        path = path / QUANTIZED
        if not (path / quantized_file.WEIGHTS_FILE).is_file():
            raise RunError(f"{target} must be a finished run; it has no 4-bit model; finish it with --resume")
    device, dtype = pick_place(options.model)
    check_complete(path)
    if (path / quantized_file.WEIGHTS_FILE).is_file():
        model, tokenizer, _ = quantized_model.load_quantized(path, dtype, trust)
        return LoadedModel(model.to(device), tokenizer, str(path))
    exporter = exporter_of(path)
    if exporter is not None:
        check_formats([exporter.name], "MODEL_OR_RUN")
        config = quantized_model.load_config(path, trust)
        tokenizer = quantized_model.load_tokenizer(path, trust)
        return LoadedModel(exporter.open_model(path, config, options.evaluation.strict), tokenizer, str(path))
    try:
        return load(target, dtype, device, trust)
    except ModelError as error:
        named = "--teacher" if target == options.evaluation.teacher else "MODEL_OR_RUN"
        raise ModelError(str(error).replace("--pretrained", named)) from error


def _open_teacher(options: EvalOptions, target: str, opened: LoadedModel) -> LoadedModel:
    """The model to compare with; OptionError where its predictions are of other tokens."""
    teacher = open_target(options, target)
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
    documents = {name: load_documents(name, text.text_column, text.data_dir, (split,))[split] for name in mixture.names}
    if assistant:
        require_conversations(documents)
    parts = [
        pack_documents(opened.tokenizer, found, text.seq_len, split, assistant_only=assistant)
        for found in documents.values()
    ]
    return mixture.evaluation_rows(parts, options.evaluation.num_samples)
