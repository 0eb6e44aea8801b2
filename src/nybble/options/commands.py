"""The commands, as compositions of groups, and what contradicts across groups."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from nybble.errors import OptionError
from nybble.options.base import Command, Group, option
from nybble.options.compression import AUTO, CompressionOptions, InitialCompressionOptions, TuneCompressionOptions
from nybble.options.data import DataOptions, TextOptions
from nybble.options.evaluation import CompareEvaluationOptions, EvaluationOptions, TaskEvaluationOptions
from nybble.options.model import DeviceOptions, ModelOptions, OffloadOptions
from nybble.options.run import RunOptions
from nybble.options.scheme import CompareSchemeOptions, SchemeOptions
from nybble.options.task import CompareTaskOptions, RankOptions, TaskOptions, TuneRankOptions
from nybble.options.training import DistillTrainingOptions, TuneTrainingOptions

_FLOAT16 = "--dtype must be bfloat16 or float32 for {}; float16 gradients vanish (they are below its smallest number)"


@dataclass(frozen=True, kw_only=True)
class RunCommand(Command):
    """A command that makes a run folder from a 16-bit model."""

    model: ModelOptions = field(default_factory=ModelOptions)
    scheme: SchemeOptions = field(default_factory=SchemeOptions)
    run: RunOptions = field(default_factory=RunOptions)

    @property
    def folder_suffix(self) -> str:
        """What the default folder is called by, after the model's name."""
        return self.NAME

    @property
    def folder(self) -> Path:
        """The run folder."""
        name = Path(self.model.pretrained).name.removesuffix(".gguf")
        return Path(self.run.output_dir or f"runs/{name}-{self.folder_suffix}")


@dataclass(frozen=True, kw_only=True)
class CompressOptions(RunCommand):
    """Compress a model to INT4 without training, export it, and measure it."""

    NAME: ClassVar[str] = "compress"

    model: OffloadOptions = field(default_factory=OffloadOptions)
    text: TextOptions = field(default_factory=TextOptions)
    compression: CompressionOptions = field(default_factory=CompressionOptions)
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)

    @property
    def folder_suffix(self) -> str:
        """The method, if one is named."""
        return self.NAME if self.compression.method == AUTO else self.compression.method

    def check(self) -> None:
        """Raise OptionError for values that are impossible, alone or together."""
        super().check()
        if self.model.dtype == "float16" and "blockwise" in self.compression.method:
            raise OptionError(_FLOAT16.format("blockwise"))
        if self.model.dtype == "float16" and self.scheme.is_average:
            raise OptionError(_FLOAT16.format(f"--bits {self.scheme.bits:g}"))


@dataclass(frozen=True, kw_only=True)
class TrainCommand(RunCommand):
    """A command that trains."""

    compression: InitialCompressionOptions = field(default_factory=InitialCompressionOptions)

    def check(self) -> None:
        """Raise OptionError for values that are impossible, alone or together."""
        super().check()
        if self.model.dtype == "float16":
            raise OptionError(_FLOAT16.format("training"))
        default = type(self.compression).method
        if self.compression.init_from is not None and self.compression.method != default:
            raise OptionError(
                f"--method {self.compression.method} and --init_from contradict each other; give one of them, or "
                f"--method {default} where a recipe has the other"
            )
        if self.compression.init_from is not None and self.scheme.is_average:
            raise OptionError(
                f"--init_from takes the bits of a finished run; --bits {self.scheme.bits:g} would choose them anew; "
                "give --bits 2, 3, 4 or 8, and --layer for layers that have others in that run"
            )


@dataclass(frozen=True, kw_only=True)
class DistillOptions(TrainCommand):
    """Distill a 16-bit model into its own INT4 copy, export it, and measure it."""

    NAME: ClassVar[str] = "distill"

    model: OffloadOptions = field(default_factory=OffloadOptions)
    text: TextOptions = field(default_factory=TextOptions)
    training: DistillTrainingOptions = field(default_factory=DistillTrainingOptions)
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)


@dataclass(frozen=True, kw_only=True)
class TuneOptions(TrainCommand):
    """Tune a model on a downstream task with adapters of elastic rank, in INT4; export it, and measure it."""

    NAME: ClassVar[str] = "tune"

    task: TaskOptions = field(default_factory=TaskOptions)
    compression: TuneCompressionOptions = field(default_factory=TuneCompressionOptions)
    training: TuneTrainingOptions = field(default_factory=TuneTrainingOptions)
    ranks: TuneRankOptions = field(default_factory=TuneRankOptions)
    evaluation: TaskEvaluationOptions = field(default_factory=TaskEvaluationOptions)

    @property
    def folder_suffix(self) -> str:
        """The task."""
        return Path(self.task.task).stem

    def check(self) -> None:
        """Raise OptionError for values that are impossible, alone or together."""
        super().check()
        if self.ranks.eval_only and not self.run.resume:
            raise OptionError("--eval_only needs --resume and the folder of a run that was trained")
        if self.training.quantize == "after" and self.compression.init_from is not None:
            raise OptionError(
                "--init_from names a model that has 4 bits already; adapters are trained before that with --quantize "
                "after; use --quantize during"
            )


@dataclass(frozen=True, kw_only=True)
class CompareOptions(TrainCommand):
    """Compare tuning in INT4 with 16-bit LoRA on several tasks: the five columns of published tables."""

    NAME: ClassVar[str] = "compare"

    task: CompareTaskOptions = field(default_factory=CompareTaskOptions)
    scheme: CompareSchemeOptions = field(default_factory=CompareSchemeOptions)
    compression: TuneCompressionOptions = field(default_factory=TuneCompressionOptions)
    training: TuneTrainingOptions = field(default_factory=TuneTrainingOptions)
    ranks: RankOptions = field(default_factory=RankOptions)
    evaluation: CompareEvaluationOptions = field(default_factory=CompareEvaluationOptions)

    def check(self) -> None:
        """Raise OptionError for values that are impossible, alone or together."""
        super().check()
        if self.scheme.bits != 4 or self.scheme.layer:
            raise OptionError(
                "nybble compare must compare models in 4 bits, as the tables that it follows do; it got --bits or "
                "--layer; use nybble tune for other schemes"
            )


@dataclass(frozen=True, kw_only=True)
class _SearchGroup(Group):
    TITLE: ClassVar[str] = "Search"

    run: str = option("", "Folder of a finished run of nybble tune.", required=True)
    num_trials: int = option(50, "Configurations to try, including those of earlier sessions.", basic=True)
    sampler: Literal["nsga2", "tpe", "hill", "random"] = option(
        "tpe", "How the next configuration is proposed.", basic=True
    )
    random_baseline: bool = option(True, "Do not score as many random configurations for comparison.", basic=True)
    seed: int = option(0, "Seed of the search.", basic=True)
    apply: bool = option(
        False,
        "Ship the best configuration instead of the one that tune chose: quantize, save, export, measure.",
        basic=True,
    )
    trust_remote_code: bool = option(False, "Run Python code that comes with the model.")

    def check(self) -> None:
        """Raise OptionError for values outside of their range."""
        self.require("num_trials", lambda value: value >= 1, "at least 1")
        self.require("seed", lambda value: 0 <= value < 2**32, "from 0 to 2^32 - 1")


@dataclass(frozen=True, kw_only=True)
class SearchOptions(Command):
    """Search for better ranks after nybble tune, and compare them with tune's choice and random configurations."""

    NAME: ClassVar[str] = "search"

    search: _SearchGroup = field(default_factory=_SearchGroup)


@dataclass(frozen=True, kw_only=True)
class _ExportGroup(Group):
    TITLE: ClassVar[str] = "Export"

    run: str = option("", "Folder of a finished run.", required=True)
    to: tuple[str, ...] = option(("openvino",), "Formats: openvino, gguf, onnx, vllm, mlx, hf, or all.", basic=True)
    compare_logits: bool = option(
        False,
        "Compare logits with torch for models of more than 150 M parameters too, in 4 bytes of memory a parameter. "
        "Weights are always compared; openvino always compares logits.",
        basic=True,
    )
    push_to_hub: str | None = option(None, "Upload the export to this repository of the Hugging Face hub.", basic=True)
    private: bool = option(False, "Make the repository private.", basic=True)
    trust_remote_code: bool = option(False, "Run Python code that comes with the model.", basic=True)


@dataclass(frozen=True, kw_only=True)
class ExportOptions(Command):
    """Export a finished run to other runtimes."""

    NAME: ClassVar[str] = "export"

    export: _ExportGroup = field(default_factory=_ExportGroup)


@dataclass(frozen=True, kw_only=True)
class _InspectGroup(Group):
    TITLE: ClassVar[str] = "Inspect"

    target: str = option("", "Run folder, or a folder inside one: quantized or an export.", required=True)


@dataclass(frozen=True, kw_only=True)
class InspectOptions(Command):
    """Show every quantized layer of a run or an export: shape, scheme, errors, clipped share."""

    NAME: ClassVar[str] = "inspect"

    inspect: _InspectGroup = field(default_factory=_InspectGroup)


@dataclass(frozen=True, kw_only=True)
class _ReportGroup(Group):
    TITLE: ClassVar[str] = "Report"

    runs: tuple[str, ...] = option((), "Run folders, or folders of nybble compare.", required=True)
    out: str | None = option(
        None,
        "Page to write, with the Markdown beside it. Default: report.html in the run folder; for several, in this one.",
        basic=True,
    )
    table: bool = option(
        False,
        "Only print the table in the published form: 16 bit, best compression without training, tuned, improvement.",
        basic=True,
    )


@dataclass(frozen=True, kw_only=True)
class ReportOptions(Command):
    """Write one HTML page, and the same in Markdown, about one run or several side by side."""

    NAME: ClassVar[str] = "report"

    report: _ReportGroup = field(default_factory=_ReportGroup)


@dataclass(frozen=True, kw_only=True)
class _EvalGroup(Group):
    TITLE: ClassVar[str] = "Evaluation"

    target: str = option(
        "", "Model (as for --pretrained), run folder, or a folder inside one: quantized or an export.", required=True
    )
    eval_tasks: tuple[str, ...] = option((), "lm-eval tasks; needs the extra eval.", basic=True)
    task: str | None = option(None, "Your own rows, as for tune --task: the score on its test rows.", basic=True)
    teacher: str | None = option(None, "Model to compare with: adds the KL divergence to it.", basic=True)
    split: Literal["train", "validation", "test"] = option("test", "Split of --data for token perplexity.", basic=True)
    num_samples: int = option(0, "Sequences of the split; 0: all.", basic=True)
    limit: int | None = option(None, "Use only this many documents per task.", basic=True)
    eval_batch_size: int = option(0, "Requests per forward pass in lm-eval tasks; 0: automatic.")
    strict: bool = option(
        False, "Exports: compute as torch does in float32, not as deployed (dynamic 8-bit activations)."
    )

    def check(self) -> None:
        """Raise OptionError for values outside of their range."""
        self.require("num_samples eval_batch_size", lambda value: value >= 0, "0 (all, automatic) or more")
        self.require("limit", lambda value: value is None or value >= 1, "at least 1")


@dataclass(frozen=True, kw_only=True)
class EvalOptions(Command):
    """Measure a model, a finished run or an export: perplexity, KL divergence to a teacher, lm-eval tasks."""

    NAME: ClassVar[str] = "eval"

    evaluation: _EvalGroup = field(default_factory=_EvalGroup)
    text: DataOptions = field(default_factory=DataOptions)
    model: DeviceOptions = field(default_factory=DeviceOptions)

    def check(self) -> None:
        """Raise OptionError for values that are impossible, alone or together."""
        super().check()
        asked = self.evaluation
        if not (asked.eval_tasks or asked.task or self.text.data):
            raise OptionError("--data none leaves nothing to measure; name a text, --eval_tasks or --task")
        if self.evaluation.teacher is not None and not self.text.data:
            raise OptionError("--teacher is for the KL divergence, which --data none leaves out; give one of them")


def _is_text(value: str | None) -> bool:
    """Whether a text holds characters alone; other bytes of a command line come as halves of characters."""
    return value is None or not any("\ud800" <= character <= "\udfff" for character in value)


@dataclass(frozen=True, kw_only=True)
class ChatGroup(Group):
    """What is talked to, and how it answers."""

    TITLE: ClassVar[str] = "Chat"

    target: str = option(
        "", "Run folder (its first export), a folder inside one, or a model as for --pretrained.", required=True
    )
    prompt: str | None = option(None, "Answer this message and end.", basic=True)
    system: str | None = option(None, "System message.", basic=True)
    max_new_tokens: int = option(512, "Longest answer in tokens.", basic=True)
    temperature: float | None = option(
        None, "0: always the most likely token. Default: as generation_config.json of the model says.", basic=True
    )

    def check(self) -> None:
        """Raise OptionError for values outside of their range."""
        self.require("prompt system", _is_text, "UTF-8 text")
        self.require("prompt", lambda value: value is None or value.strip(), "a message, not an empty one")
        self.require("max_new_tokens", lambda value: value >= 1, "at least 1")
        self.require("temperature", lambda value: value is None or 0 <= value < math.inf, "0 or more")


@dataclass(frozen=True, kw_only=True)
class ChatOptions(Command):
    """Talk to a finished run, an export or a model in the terminal, in its own runtime."""

    NAME: ClassVar[str] = "chat"

    chat: ChatGroup = field(default_factory=ChatGroup)
    model: DeviceOptions = field(default_factory=DeviceOptions)


COMMANDS: dict[str, type[Command]] = {
    kind.NAME: kind
    for kind in (
        CompressOptions, DistillOptions, TuneOptions, CompareOptions, SearchOptions, ExportOptions, EvalOptions,
        InspectOptions, ReportOptions, ChatOptions,
    )
}  # fmt: skip
