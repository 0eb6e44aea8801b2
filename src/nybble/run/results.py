"""RunResults: everything that a run measured and decided, and how far it is. results.json is its serialization.

A run goes through its phases in this order; what it does on --resume depends on the phase alone:

    opened      model and data are known; nothing is decided yet
    trained     adapters (distill: adapters, scales and norms) are trained; best.safetensors holds them
    replacing   nybble search --apply has chosen another rank configuration; what was made with the old one is to be
                deleted
    quantized   the folder quantized/ holds the 4-bit model
    finished    everything is measured and the report is written
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from nybble.compression.layer_error import LayerError
from nybble.errors import RunError
from nybble.files import write_text
from nybble.qat.absorb import WeightChanges
from nybble.schema import SchemaError, from_json, read_json, to_json

RESULTS = "results.json"
VERSION = 2

# What was measured of one model: metric -> value. Keys: token_perplexity, tokens, kl_to_teacher, word_perplexity,
# bytes, "task:NAME METRIC", "documents:NAME" and "right:NAME METRIC" (a 1 or a 0 for each document).
Metrics = dict[str, Any]
# One optimizer step or one validation: what was measured -> value.
Record = dict[str, float]


class Phase(StrEnum):
    """How far a run is; see the head of this file."""

    OPENED = "opened"
    TRAINED = "trained"
    REPLACING = "replacing"
    QUANTIZED = "quantized"
    FINISHED = "finished"

    def reached(self, other: Phase) -> bool:
        """Whether the run is at the phase `other` or beyond it."""
        order = list(Phase)
        return order.index(self) >= order.index(other)


@dataclass
class Training:
    """A training: its steps and validations.

    Attributes:
        name: of its checkpoints and of its stage: "" for the first training of a run, "scales" for a second one in 4
            bits.
        steps: step, loss, last_pass, grad_norm, lr and seconds of every optimizer step.
        validation: step and measures of every validation.
        best_step: the step with the lowest validation loss; 0 = before training.
    """

    name: str = ""
    steps: list[Record] = field(default_factory=list)
    validation: list[Record] = field(default_factory=list)
    best_step: int = -1


@dataclass
class LayerCounts:
    """Which layers are quantized, and how.

    Attributes:
        int4: number of linear layers.
        int8: number of embeddings and heads.
        tied: the head shares the embedding's weight.
        precision: of the linear layers, for headings: INT4, or INT3/INT4 where they differ.
        schemes: scheme in words -> number of layers.
        bits_per_weight: average over the quantized weights, with scales and zero points; None in older results.
        in_16_bits: number of layers that could be quantized and are not.
        bits: linear layer -> bits, where they differ.
        notes: sentences on layers that have another scheme than was asked for.
    """

    int4: int
    int8: int
    tied: bool
    precision: str = "INT4"
    schemes: dict[str, int] = field(default_factory=dict)
    bits_per_weight: float | None = None
    in_16_bits: int = 0
    bits: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass
class Candidate:
    """A rank configuration that was compared after training.

    Attributes:
        why: it was a candidate.
        score: mean over held-out rows (TaskResults.scored_by).
        behind, error: mean difference to the best candidate, row by row, and its standard error.
        test: score on the test rows, where these were chosen on.
    """

    why: str
    configuration: list[int]
    score: float
    accuracy: float | None
    test: float | None = None
    behind: float = 0.0
    error: float = 0.0


@dataclass
class Winner:
    """A configuration that nybble search compared.

    Attributes:
        by: what found it: a sampler, tune's heuristics, ...
        score, fresh: mean score on the rows searched, and on held-out rows that nothing was chosen by.
        behind, error: to the best winner, row by row, on fresh rows where there are some.
    """

    by: str
    configuration: list[int]
    rank_sum: int
    score: float
    accuracy: float | None
    fresh: float | None
    behind: float
    error: float


@dataclass
class FrontPoint:
    """A trial of nsga2 that no other beats in both score and sum of ranks."""

    configuration: list[int]
    score: float
    rank_sum: int


@dataclass
class SearchResults:
    """What nybble search found in the first `trials` trials of each sampler."""

    trials: int
    winners: list[Winner]
    front: list[FrontPoint]


@dataclass
class MeasuredRanks:
    """A configuration that --eval_only measured on the test rows. `fast_eval`: quantized once for all rows."""

    configuration: list[int]
    value: float
    fast_eval: bool


@dataclass
class TaskResults:
    """What a run of tune learned and decided about its task.

    Attributes:
        name, metric: the task, and the metric that it is reported by.
        rank_space: ranks to choose from, largest first.
        objective: what the loss is on: choices, answer or all.
        scored_by: "share" of the right choice, or "log-likelihood".
        selected_on: rows that the configuration was chosen by: held_out or test.
        chosen: the configuration that tune chose; None where it was given.
        configuration: the configuration that ships, or will ship when the run is finished.
        replaced_by_search: the configuration that ships was put in place by nybble search --apply.
        text_length: tokens per sequence of the rows as running text.
    """

    name: str
    metric: str
    rank_space: list[int]
    objective: str
    scored_by: str
    text_length: int
    selected_on: str = "held_out"
    candidates: list[Candidate] = field(default_factory=list)
    chosen: list[int] | None = None
    configuration: list[int] | None = None
    replaced_by_search: bool = False
    tested: list[MeasuredRanks] = field(default_factory=list)
    search: SearchResults | None = None

    @property
    def column(self) -> str:
        """Key of the task's figure in Metrics."""
        return f"task:{Path(self.name).stem} {self.metric}"

    @property
    def replaced(self) -> bool:
        """Whether another configuration ships than the one that tune chose."""
        return self.chosen is not None and self.configuration not in (None, self.chosen)

    @property
    def chosen_on_test(self) -> bool:
        """Whether the configuration that ships was chosen, among several, by its score on the test rows."""
        return self.selected_on == "test" and len(self.candidates) > 1 and not self.replaced


@dataclass
class RunResults:
    """What a run measured and decided.

    Attributes:
        command: compress, distill, tune or lora (16-bit LoRA of nybble compare).
        model: name of the 16-bit model.
        method: how the weights were compressed, such as awq+se.
        init_from: the finished run whose 4-bit weights the run started from.
        init_trained: that run's weights had been trained end to end.
        limit_blocks: number of decoder blocks that got the method; None: all.
        test_data, other_data: the text that models are measured on, and that of another domain, in words.
        seconds: stage -> seconds, over all sessions.
        models: row (16bit, lora16, tuned16, compressed, tuned, or an export format) -> what was measured of it.
        layer_errors: layer -> rtn, compressed, weight, clipped (compress.LayerError).
        block_losses: decoder block -> loss of block-wise reconstruction before and after.
        decoder_errors: row -> relative error of the hidden states after each decoder layer.
        exports: format -> what the exporter counted.
        files: folder of the run -> path of each file in it -> bytes, as the folder was written.
        improvement: row -> share of the compression damage that training recovered.
    """

    version: int = VERSION
    command: str = ""
    phase: Phase = Phase.OPENED
    model: str = ""
    method: str = "rtn"
    init_from: str | None = None
    init_trained: bool = False
    seed: int = 0
    dtype: str = ""
    test_data: str = ""
    other_data: str = ""
    limit: int | None = None
    limit_blocks: int | None = None
    lora_rank: int | None = None
    train: str = "lora"
    command_line: str = ""
    resumed_by: list[str] = field(default_factory=list)
    machine: dict[str, Any] = field(default_factory=dict)
    layers: LayerCounts | None = None
    fingerprints: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory_bytes: dict[str, int] = field(default_factory=dict)
    models: dict[str, Metrics] = field(default_factory=dict)
    layer_errors: dict[str, dict[str, float | None]] = field(default_factory=dict)
    block_losses: dict[str, list[float]] = field(default_factory=dict)
    decoder_errors: dict[str, list[float]] = field(default_factory=dict)
    trainings: list[Training] = field(default_factory=list)
    changes: WeightChanges | None = None
    task: TaskResults | None = None
    exports: dict[str, dict[str, Any]] = field(default_factory=dict)
    files: dict[str, dict[str, int]] = field(default_factory=dict)
    improvement: dict[str, float | None] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @property
    def precision(self) -> str:
        """Precision of the linear layers, for headings."""
        return "INT4" if self.layers is None else self.layers.precision

    @property
    def trains(self) -> bool:
        """Whether the run trains after compressing."""
        return self.command != "compress"

    @property
    def tuned_in_16_bit(self) -> bool:
        """Whether what the run compressed is a 16-bit model that it had tuned, with --quantize after."""
        return "tuned16" in self.models

    @property
    def finished(self) -> bool:
        """Whether the run has measured everything and written its report."""
        return self.phase == Phase.FINISHED

    @property
    def described_method(self) -> str:
        """The method; how many blocks have it, where that was limited; the finished run that it was taken from."""
        limited = self.limit_blocks is not None and self.method != "rtn" and self.init_from is None
        some = f" (decoder blocks with it: the first {self.limit_blocks}; the rest rtn)" if limited else ""
        return self.method + some if self.init_from is None else f"{self.method} from {self.init_from}"

    def training(self, name: str = "") -> Training | None:
        """The training with this name, if it is done."""
        return next((training for training in self.trainings if training.name == name), None)

    def save(self, folder: Path) -> None:
        """Write results.json, whole or not at all."""
        write_text(folder / RESULTS, to_json(dataclasses.asdict(self)) + "\n")


def has_results(folder: Path) -> bool:
    """Whether there is a results.json."""
    return (folder / RESULTS).is_file()


def read_results(folder: Path) -> RunResults:
    """results.json of a run; a fresh RunResults where there is none.

    Raises:
        RunError: it is damaged, or of another version of nybble.
    """
    file = folder / RESULTS
    if not file.is_file():
        return RunResults()
    try:
        values = from_json(dict[str, Any], read_json(file))
        if (version := values.get("version")) != VERSION:
            raise RunError(
                f"{file} must be of this version of nybble (results version {VERSION}); it has version {version}; make "
                "the run again"
            )
        results: RunResults = from_json(RunResults, values)
        _check_details(results)
    except SchemaError as error:
        raise RunError(f"{file} must be the results of a run; {error}; bring it back, or make the run again") from error
    return results


def _check_details(results: RunResults) -> None:
    """Check what types do not say, and read measures that are not finite; SchemaError for a wrong value."""
    for name in (*results.exports, *results.files):  # folders of the run, which are replaced and deleted
        if name in ("", "..") or Path(name).name != name:
            raise SchemaError(f"exports and files must name folders in the run; {name!r} is none")
    for row, metrics in results.models.items():
        rights = {key for key in metrics if key.startswith("right:")}
        for key, value in metrics.items():
            metrics[key] = from_json(str if key in rights else float, value, f"models.{row}.{key}")
    from_json(dict[str, LayerError], results.layer_errors, "layer_errors.")
    from_json(dict[str, str], results.machine.get("versions", {}), "machine.versions.")
    if wrong := [block for block, losses in results.block_losses.items() if len(losses) != 2]:
        raise SchemaError(f"block_losses.{wrong[0]} must be a loss before and one after")
    if any("step" not in record for training in results.trainings for record in training.steps + training.validation):
        raise SchemaError("trainings must have a step in every record; one has none")
    task = results.task
    if task is not None and len({candidate.test is None for candidate in task.candidates}) > 1:
        raise SchemaError("task.candidates must all have a score on test rows, or none; only some have")
    if task is not None and task.search is not None and not task.search.winners:
        raise SchemaError("task.search.winners must not be empty; it is")
