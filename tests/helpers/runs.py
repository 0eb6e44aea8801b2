"""Small results of runs, as reports read them. "toy" is an export format; tests/report/conftest.py registers it."""

import copy
from pathlib import Path
from typing import Any

from nybble.files import write_text
from nybble.options.commands import CompareOptions, DistillOptions
from nybble.options.toml import CONFIG, to_toml
from nybble.qat.absorb import WeightChanges
from nybble.report.figures import Figure, Figures
from nybble.report.five_columns import LORA_RUN, NLS_RUN, PTWC_RUN, write_comparison
from nybble.run.marker import write_marker
from nybble.run.results import (
    Candidate,
    FrontPoint,
    LayerCounts,
    MeasuredRanks,
    Metrics,
    Phase,
    RunResults,
    SearchResults,
    TaskResults,
    Training,
    Winner,
)

LAYERS = [f"model.layers.{i}.{kind}" for i in range(2) for kind in ("self_attn.q_proj", "mlp.down_proj")]


def metrics(perplexity: float, kl: float, size: int, **more: Any) -> Metrics:
    """Metrics of one model."""
    return {"token_perplexity": perplexity, "kl_to_teacher": kl, "bytes": size} | more


def distilled(**fields: Any) -> RunResults:
    """A finished run of nybble distill, exported to "toy"; `fields` replace fields of the results."""
    models = {
        "16bit": metrics(10.0, 0.0, 400_000_000),
        "compressed": metrics(14.0, 0.5, 100_000_000),
        "tuned": metrics(11.0, 0.2, 100_000_000),
        "toy": metrics(12.0, 0.25, 110_000_000),
    }
    values: dict[str, Any] = {
        "command": "distill",
        "phase": Phase.FINISHED,
        "model": "Small",
        "lora_rank": 8,
        "command_line": "nybble distill --pretrained small",
        "machine": {"platform": "Linux", "cpu": "AVX2", "cuda": None, "versions": {"torch": "2.13.0"}},
        "layers": LayerCounts(7, 1, True),
        "seconds": {"load": 1.0, "train": 120.0},
        "peak_memory_bytes": {"cpu": 2_000_000_000},
        "models": models,
        "trainings": [Training(validation=[{"step": 0, "tokens": 8, "token_perplexity": 15.0, "kl_to_teacher": 0.5}])],
        "changes": WeightChanges(0.0625, 0.025, {}, {}),
        "exports": {"toy": {}},
    }
    return RunResults(**copy.deepcopy(values | fields))


def measured(results: RunResults, **rows: Metrics) -> RunResults:
    """The results with some metrics replaced; `full` stands for the row 16bit."""
    results = copy.deepcopy(results)
    for row, values in rows.items():
        results.models.setdefault("16bit" if row == "full" else row, {}).update(values)
    return results


def compressed(**fields: Any) -> RunResults:
    """A finished run of nybble compress without exports."""
    models = {"16bit": metrics(10.0, 0.0, 400_000_000), "compressed": metrics(12.5, 0.3, 100_000_000)}
    values = {"command": "compress", "method": "awq+se", "models": models, "lora_rank": None, "trainings": []}
    return distilled(**values | {"changes": None, "exports": {}, "seconds": {"load": 1.0, "compress": 5.0}} | fields)


def task_results(**fields: Any) -> TaskResults:
    """Results of the task arc with accuracies."""
    values: dict[str, Any] = {
        "name": "arc",
        "metric": "acc",
        "rank_space": [8, 4],
        "objective": "choices",
        "scored_by": "share",
        "text_length": 128,
    }
    return TaskResults(**copy.deepcopy(values | fields))


def tuned(scores: dict[str, float], task: TaskResults | None = None, **fields: Any) -> RunResults:
    """A finished run of nybble tune; row -> accuracy on the task arc."""
    models = {row: {"task:arc acc": score, "bytes": 1} for row, score in scores.items()}
    values = {"command": "tune", "method": "awq+se", "task": task or task_results(), "models": models, "trainings": []}
    return distilled(**values | {"changes": None, "exports": {}} | fields)


def candidate(why: str, configuration: list[int], **fields: Any) -> Candidate:
    """A candidate with a score of 0.3."""
    return Candidate(**{"why": why, "configuration": configuration, "score": 0.3, "accuracy": 0.5} | fields)


def searched() -> SearchResults:
    """What a search with nsga2 found."""
    winners = [
        Winner("heuristics", [4, 4], 8, 0.30, None, 0.25, 0.02, 0.01),
        Winner("nsga2", [8, 4], 12, 0.35, 0.5, 0.27, 0.0, 0.0),
    ]
    return SearchResults(6, winners, [FrontPoint([8, 4], 0.35, 12), FrontPoint([4, 4], 0.30, 8)])


def measured_ranks(configuration: list[int], value: float) -> MeasuredRanks:
    """A configuration that --eval_only measured."""
    return MeasuredRanks(configuration, value, fast_eval=False)


def with_everything(**fields: Any) -> RunResults:
    """A distilled run with values for every chart and table that has no task."""
    errors = {
        name: {"rtn": 0.01, "compressed": 0.005 * 0.1**i, "weight": 0.1, "clipped": 0.0}
        for i, name in enumerate(LAYERS)
    }
    validation = [{"step": step, "token_perplexity": 15.0 - step, "kl_to_teacher": 0.5} for step in (0, 3)]
    steps = [{"step": i, "loss": 1 / (i + 1)} for i in range(4)]
    values = {
        "method": "blockwise",
        "trainings": [Training(steps=steps, validation=validation, best_step=3)],
        "warnings": ["careful <b>now</b>"],
        "layer_errors": errors,
        "changes": WeightChanges(0.0625, 0.025, dict.fromkeys(LAYERS, 0.0123), dict.fromkeys(LAYERS, 0.0345)),
        "decoder_errors": {"compressed": [0.031, 0.042], "tuned": [0.021, 0.032]},
        "block_losses": {"model.layers.0": [0.02, 0.01], "model.layers.1": [0.03, 0.02]},
    }
    return distilled(**values | fields)


def write_run(folder: Path, results: RunResults, **options: Any) -> Path:
    """A run folder with results; with `options` also with their config.toml."""
    folder.mkdir(parents=True, exist_ok=True)
    write_marker(folder)
    write_text(folder / CONFIG, to_toml(DistillOptions.of(**{"pretrained": "m"} | options)))
    results.save(folder)
    return folder


def known(right: str) -> Figure:
    """A figure with known rows, such as "0110"."""
    return Figure(right.count("1") / len(right), len(right), tuple(map(float, right)))


def write_columns(folder: Path, figures: Figures, **options: Any) -> Path:
    """A folder as nybble compare leaves it."""
    for task in figures:
        run = tuned({"16bit": 0.5}, task_results(name=task), dtype="float32", seed=options.get("seed", 0))
        for name, method in ((NLS_RUN, "awq+se"), (LORA_RUN, "awq+se"), (PTWC_RUN, "awq+se+gptq")):
            run.method = method
            write_run(folder / task / name, run)
    write_comparison(folder, compare_options(folder, **options), figures)
    return folder


def compare_options(folder: Path, **options: Any) -> CompareOptions:
    """Options of nybble compare."""
    return CompareOptions.of(**{"pretrained": "m", "tasks": ("a",), "output_dir": str(folder)} | options)
