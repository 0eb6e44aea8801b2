"""What is measured on every model of a run, and what it is exported to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from nybble.options.base import Group, option, with_default, with_help


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions(Group):
    """Evaluation and export."""

    TITLE: ClassVar[str] = "Evaluation and export"

    eval_tasks: tuple[str, ...] = option(
        ("wikitext",), "lm-eval tasks measured on all models of the run, or none; needs the extra eval.", basic=True
    )
    limit: int | None = option(None, "Use only this many documents per lm-eval task, for a trial.")
    num_test_samples: int = option(0, "Sequences of the test split for token perplexity and KL divergence; 0: all.")
    eval_batch_size: int = option(0, "Requests per forward pass in lm-eval tasks; 0: chosen by length and vocabulary.")
    export: tuple[str, ...] = option(
        ("openvino",),
        "openvino, gguf, onnx, vllm, mlx, hf, all, or none; each but hf needs the extra of its name.",
        basic=True,
    )

    def check(self) -> None:
        """Raise OptionError for values outside of their range."""
        self.require("num_test_samples eval_batch_size", lambda value: value >= 0, "0 (all, automatic) or more")
        self.require("limit", lambda value: value is None or value >= 1, "at least 1")


@dataclass(frozen=True, kw_only=True)
class TaskEvaluationOptions(EvaluationOptions):
    """Evaluation and export of a model that is tuned on a task, on which it is measured in any case."""

    eval_tasks: tuple[str, ...] = option(
        (), "More lm-eval tasks measured on all models of the run; needs the extra eval.", basic=True
    )
    num_test_samples: int = with_default(EvaluationOptions, "num_test_samples", 16)


@dataclass(frozen=True, kw_only=True)
class CompareEvaluationOptions(TaskEvaluationOptions):
    """Evaluation of models that are compared."""

    export: tuple[str, ...] = with_help(
        EvaluationOptions,
        "export",
        "Formats in which INT4 models are measured: openvino, gguf, onnx, vllm, hf, or none (in torch).",
    )
