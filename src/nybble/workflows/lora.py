"""16-bit LoRA by the peft library, for `nybble compare`, with layers, rows, batches and epoch chosen as in tune."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nybble.callbacks import Callback
from nybble.files import atomic_folder, write_text
from nybble.models.delinearize import delinearize
from nybble.models.loading import LoadedModel, load
from nybble.options.commands import TuneOptions
from nybble.run.complete import MERGED, TEXTS
from nybble.run.results import Phase
from nybble.tasks.attention import plain_attention
from nybble.tasks.dataset import Question
from nybble.training.trainer import ParameterGroup
from nybble.workflows import session, train
from nybble.workflows.measure import SIXTEEN_BIT, measure_row, size_in_16_bits
from nybble.workflows.plan import pick_place
from nybble.workflows.task_run import TaskRun, open_task_run

log = logging.getLogger("nybble")


def tune_16bit(
    options: TuneOptions, before: Mapping[str, Mapping[str, Any]], callbacks: Sequence[Callback] = ()
) -> Path:
    """Tune the 16-bit model; the merged model is written to the run's folder `merged`, its rows as text to `texts`.

    Args:
        before: the row of the untuned model if it was measured; empty otherwise.
        callbacks: are told of stages, steps and validations.

    Returns: the run folder.
    """
    with open_task_run(options, callbacks=callbacks, command="lora") as task_run:
        run, loaded = task_run.context.run, task_run.context.loaded
        run.results.models = {**{row: dict(metrics) for row, metrics in before.items()}, **run.results.models}
        measure_row(run, task_run.evaluator, SIXTEEN_BIT, loaded, size_in_16_bits(loaded.model))
        merged = run.path / MERGED
        if not run.results.phase.reached(Phase.TRAINED):
            _train(task_run)
            _write_texts(task_run, run.path / TEXTS)
            with atomic_folder(merged) as temporary:
                delinearize(loaded.model, options.model.trust_remote_code).save_pretrained(temporary)
                loaded.tokenizer.save_pretrained(temporary)
            for name in (MERGED, TEXTS):
                run.note_files(name)
            run.reach(Phase.TRAINED)
        dtype = loaded.model.dtype
        loaded.model.to("meta")  # frees the weights
        tuned = load(str(merged), dtype, pick_place(options.model)[0], options.model.trust_remote_code)
        named = LoadedModel(tuned.model, tuned.tokenizer, loaded.name)
        measure_row(run, task_run.evaluator, "lora16", named, size_in_16_bits(tuned.model))
        session.finish(run, [], [])
        return run.path


def peft_config(model: Any, layers: Sequence[str], rank: int) -> Any:
    """Adapters on the layers that nybble quantizes, scaled by 2 and clamped in narrower layers, as nybble's own."""
    import peft

    widths = {name: min(model.get_submodule(name).weight.shape) for name in layers}
    narrow = {name: width for name, width in widths.items() if width < rank}
    alphas = {name: 2 * width for name, width in narrow.items()}
    return peft.LoraConfig(
        r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=list(layers), bias="none",
        rank_pattern=narrow, alpha_pattern=alphas,
    )  # fmt: skip


def _train(task_run: TaskRun) -> None:
    """Train adapters on every layer that would get 4 bits, and merge them, in place."""
    import peft

    context, options = task_run.context, task_run.options
    rank, model = max(task_run.rank_space), context.loaded.model
    torch.manual_seed(context.seed)
    wrapped = peft.get_peft_model(model, peft_config(model, context.selection.linears, rank))  # changes `model` itself
    adapters: dict[str, nn.Parameter] = {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    log.info("16-bit LoRA by peft: %d adapters of rank %d, scaled by 2", len(adapters) // 2, rank)
    training = options.training
    groups = [ParameterGroup(adapters, training.lr, training.weight_decay)]
    with plain_attention(model, task_run.data.max_text_length):
        train.train_parameters(context, training, groups, task_run.objective({}, training))
    wrapped.merge_and_unload()


def _write_texts(task_run: TaskRun, folder: Path) -> None:
    """The rows with their right answers as text, for the compression of the merged model."""
    dataset = task_run.data.dataset
    splits = {"train": dataset.train, "validation": dataset.held_out, "test": dataset.held_out}
    with atomic_folder(folder) as temporary:
        for split, questions in splits.items():
            lines = [json.dumps({"text": _text(question)}) + "\n" for question in questions]
            write_text(temporary / f"{split}.jsonl", "".join(lines))


def _text(question: Question) -> str:
    return question.prompts[question.label] + question.choices[question.label]
