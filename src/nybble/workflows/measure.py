"""What every model of a run is measured on, and the row of results that it gives."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nybble.console import bar
from nybble.data.packing import TokenRows
from nybble.data.prepare import TextData
from nybble.evaluation.decoder_error import decoder_errors
from nybble.evaluation.lm_eval import LmEvalConfig, result_columns, run_tasks
from nybble.evaluation.perplexity import Logits, logits_from_states, measure_sequences, model_logits
from nybble.models.head import LMHead
from nybble.models.loading import LoadedModel
from nybble.quant.weight import QuantizedWeight
from nybble.report.labels import row_label
from nybble.run.folder import RunFolder
from nybble.run.results import Metrics
from nybble.tasks.dataset import TaskDataset
from nybble.tasks.scoring import measure_task
from nybble.training.teacher import HiddenStates

log = logging.getLogger("nybble")

# Tokens of the test text on which the errors of decoder layers are measured.
DECODER_ERROR_TOKENS = 256
SIXTEEN_BIT = "16bit"


@dataclass(frozen=True)
class TaskScorer:
    """Scores models on the rows of a task that lm-eval does not know."""

    dataset: TaskDataset
    limit: int | None
    seq_len: int

    def measure(self, model: Any, tokenizer: Any) -> dict[str, float]:
        """Columns of results; none for a task that lm-eval scores."""
        return measure_task(model, tokenizer, self.dataset, self.limit, self.seq_len)


@dataclass(frozen=True)
class Evaluator:
    """What models of a run are measured on.

    Attributes:
        test: sequences for token perplexity and KL divergence.
        reference: the 16-bit model's logits on them.
        lm_eval: tasks for lm-eval.
        task: the run's own task.
        other: sequences of another domain, and the 16-bit model's logits on them; None where there are none.
        decoder_outputs: hidden states after each decoder layer of the 16-bit model [L, T, D] on the first tokens of the
            test text; None where the model is trained to do something else.
    """

    test: TokenRows
    reference: Logits
    lm_eval: LmEvalConfig
    task: TaskScorer | None = None
    other: tuple[TokenRows, Logits] | None = None
    decoder_outputs: Tensor | None = None

    def metrics(self, row: str, label: str, loaded: LoadedModel, reuse: Mapping[str, Any] | None) -> Metrics:
        """Measure one model.

        Args:
            row: key in RunResults.models; the logits of the 16-bit model are the reference.
            reuse: figures of the tasks that another run has measured for this model.
        """
        ids_ST = self.test.ids
        with bar(f"measure {label}", len(self.test)) as advance:
            logits = self.reference if row == SIXTEEN_BIT else model_logits(loaded.model, ids_ST)
            found: Metrics = dict(measure_sequences(logits, ids_ST, self.reference, advance, self.test.loss_mask))
        if self.other is not None:
            rows, reference = self.other
            logits = reference if row == SIXTEEN_BIT else model_logits(loaded.model, rows.ids)
            measured = measure_sequences(logits, rows.ids, reference, _unseen, rows.loss_mask)
            found |= {f"other_{key}": value for key, value in measured.items()}
        if reuse is not None:
            return found | dict(reuse)
        if self.lm_eval.tasks:
            log.info("lm-eval on %s: %s", label, ", ".join(self.lm_eval.tasks))
            found |= result_columns(run_tasks(loaded.model, loaded.tokenizer, self.lm_eval))
        if self.task is not None:
            found |= self.task.measure(loaded.model, loaded.tokenizer)
        return found


def other_domain(head: LMHead, text: TextData, states: Mapping[str, HiddenStates]) -> tuple[TokenRows, Logits] | None:
    """The sequences of another domain with the 16-bit model's logits; None where there are none."""
    return (text.other, logits_from_states(head, states["other"])) if len(text.other) else None


def _unseen(_: int) -> None:
    """Progress of a measurement that takes seconds."""


def measure_row(
    run: RunFolder,
    evaluator: Evaluator,
    row: str,
    loaded: LoadedModel,
    size: int,
    reuse: Mapping[str, Any] | None = None,
) -> None:
    """Fill one row of the results, unless an earlier session did.

    Args:
        row: key in RunResults.models.
        size: bytes of the model as shipped.
        reuse: see Evaluator.metrics.
    """
    results = run.results
    if row in results.models:
        return
    label = row_label(results, row)
    with run.stage("measure"):
        metrics = evaluator.metrics(row, label, loaded, reuse)
        outputs = evaluator.decoder_outputs
        if outputs is not None and row in ("compressed", "tuned"):
            ids_T = evaluator.test.ids[0, : outputs.shape[1]]
            results.decoder_errors[row] = decoder_errors(loaded.model, ids_T, outputs)
    results.models[row] = metrics | {"bytes": size}
    run.save()
    log.info(
        "%s: token perplexity %.3f, KL divergence to 16-bit %.4f, %.1f MB",
        label, metrics["token_perplexity"], metrics["kl_to_teacher"], size / 1e6,
    )  # fmt: skip
    if not math.isfinite(metrics["token_perplexity"]) or not math.isfinite(metrics["kl_to_teacher"]):
        log.warning("the outputs of this model are not finite on the test text; use --dtype float32, or more --bits")


def size_in_16_bits(model: torch.nn.Module) -> int:
    """Bytes of a model with two bytes per parameter."""
    return 2 * sum(parameter.numel() for parameter in model.parameters())


def size_when_shipped(model: torch.nn.Module, quantized: Mapping[str, QuantizedWeight]) -> int:
    """Bytes of a quantized model: quantized weights packed, everything else in 16 bits."""
    weights = sum(weight.nbytes for weight in quantized.values())
    # Of a quantized layer only the bias is left, whatever it has while it is trained.
    counted = {
        id(parameter)
        for name in quantized
        for leaf, parameter in model.get_submodule(name).named_parameters()
        if leaf != "bias"
    }
    return weights + sum(2 * parameter.numel() for parameter in model.parameters() if id(parameter) not in counted)
