"""What a finished run warns of, in sentences."""

from __future__ import annotations

import math

from nybble.report.labels import before_and_after, metric_label, row_label
from nybble.report.run import kept_compressed, recovered_share
from nybble.run.results import RunResults
from nybble.workflows.quantize_tuned import SCALES


def judge_distillation(results: RunResults) -> list[str]:
    """Fill in what training recovered; returns warnings where it did not help, or did harm."""
    models = results.models
    shipped = [row for row in ("tuned", *results.exports) if row in models]
    kept = kept_compressed(results)
    results.improvement = {row: 0.0 if kept else recovered_share(models, row) for row in shipped}
    warnings = []
    if kept:
        warnings.append(
            "no step of the training was better on the validation text than the compressed model, which was kept; use "
            "more text or other learning rates"
        )
    compressed = models.get("compressed", {})
    for metric in ("kl_to_teacher", "token_perplexity", "word_perplexity"):
        before = compressed.get(metric, math.nan)
        # The compressed model was measured in torch; what a runtime adds is no harm that training did.
        worse = shipped[0] if shipped else "compressed"
        if models.get(worse, {}).get(metric, math.nan) > before:
            warnings.append(
                f"the {metric_label(metric)} on the test text is worse than that of the compressed model: {before:.4f} "
                f"before training, {models[worse][metric]:.4f} after ({row_label(results, worse)})"
            )
    return warnings


def judge_tuning(results: RunResults) -> list[str]:
    """Warnings where a training did not help, or did harm, and where ranks were chosen on test rows."""
    warnings, task, models = [], results.task, results.models
    assert task is not None, "a run of tune has results of its task"
    adapters, scales = results.training(), results.training(SCALES)
    if adapters is not None and adapters.best_step == 0:
        warnings.append(
            "no epoch of the training was better on held-out rows than the untrained model, which was kept; use more "
            "rows or another --lr"
        )
    if scales is not None and scales.best_step == 0:
        warnings.append(
            "no epoch of the training in 4 bits was better on held-out rows than the compressed model, which was kept; "
            "use another --scale_lr"
        )
    if task.chosen_on_test:
        warnings.append(
            "the ranks were chosen on the test rows, as published results do; the score on these rows is no longer one "
            "on unseen rows"
        )
    for row, later, what in (("16bit", "tuned16", "the adapters"), ("compressed", "tuned", "training in 4 bits")):
        before, after = models.get(row, {}), models.get(later, {})
        if task.column in before and task.column in after and after[task.column] < before[task.column]:
            warnings.append(
                f"{what} made {metric_label(task.column)} on the test rows worse: "
                f"{before_and_after(before, after, task.column)}"
            )
    return warnings
