"""The Python interface: the commands as functions of keywords, and Run, what they return.

run = nybble.distill(pretrained="smollm2", data="python-docs", lora_rank=0)
run.table()
run.export("openvino")
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, Unpack

from nybble.keywords import CompareKeywords, CompressKeywords, DistillKeywords, TuneKeywords
from nybble.options.commands import CompareOptions, CompressOptions, DistillOptions, RunCommand, TuneOptions

if TYPE_CHECKING:
    from nybble.callbacks import Callback
    from nybble.run.results import RunResults

_Kind = TypeVar("_Kind", bound=RunCommand)


class Run:
    """A run folder.

    Attributes:
        path: the folder.
    """

    def __init__(self, path: str | Path) -> None:
        """Open a run folder.

        Raises:
            RunError: it is no run folder.
        """
        from nybble.run.resume import saved_options

        self.path = Path(path)
        saved_options(self.path)

    @property
    def results(self) -> RunResults:
        """What the run measured and decided, as it is on disk now."""
        from nybble.run.results import read_results

        return read_results(self.path)

    def table(self) -> str:
        """The table of results in Markdown: a row per model."""
        from nybble.report.run import result_rows
        from nybble.report.tables import as_markdown

        return as_markdown(*result_rows(self.results))

    def export(self, *formats: str, trust_remote_code: bool = False) -> list[Path]:
        """Export the 4-bit model; returns the folders.

        Raises:
            OptionError: an unknown format.
            ExportError: a format cannot hold the model.
        """
        from nybble.workflows.export import export_formats

        names = [name for entry in formats for name in ([entry] if isinstance(entry, str) else entry)]
        return export_formats(self.path, names, trust_remote_code)

    def report(self, out: str | Path | None = None) -> Path:
        """Write the HTML page about this run (the extra report); returns its path."""
        from nybble.report.command import write_report

        return write_report([self.path], None if out is None else Path(out))

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    def _repr_html_(self) -> str:
        from nybble.report.notebook import run_as_html

        return run_as_html(self.results, self.path)


class Comparison:
    """A folder of nybble compare.

    Attributes:
        path: the folder.
    """

    def __init__(self, path: str | Path) -> None:
        """Open a comparison.

        Raises:
            RunError: the folder has none.
        """
        from nybble.report.five_columns import read_comparison

        self.path = Path(path)
        read_comparison(self.path)

    @property
    def runs(self) -> dict[str, Run]:
        """The runs of all columns, by "TASK/COLUMN"."""
        from nybble.run.marker import is_run

        folders = sorted(folder for folder in self.path.glob("*/*") if is_run(folder))
        return {str(folder.relative_to(self.path)): Run(folder) for folder in folders}

    def table(self) -> str:
        """The tables in Markdown: figures by task, and what the last column is better by."""
        from nybble.report.combine import combine
        from nybble.report.five_columns import read_comparison

        return combine([read_comparison(self.path)]).markdown()

    def __repr__(self) -> str:
        return f"Comparison({str(self.path)!r})"


def compress(*, callbacks: Sequence[Callback] = (), **options: Unpack[CompressKeywords]) -> Run:
    """Compress a model to INT4 without training, export it, and measure it.

    Args:
        callbacks: are told of stages, steps and validations.
        options: those of `nybble compress --help-all`. With `resume` and a run's `output_dir`, what is not given is as
            the run has it.

    Raises:
        NybbleError: whatever a person can repair; the message says what was required, what came, and what to do.
    """
    from nybble.workflows import compress as workflow

    return Run(workflow.compress(_options(CompressOptions, options), callbacks))


def distill(*, callbacks: Sequence[Callback] = (), **options: Unpack[DistillKeywords]) -> Run:
    """Distill a 16-bit model into its own INT4 copy, export and measure it. Arguments and errors: see `compress`."""
    from nybble.workflows import distill as workflow

    return Run(workflow.distill(_options(DistillOptions, options), callbacks))


def tune(*, callbacks: Sequence[Callback] = (), **options: Unpack[TuneKeywords]) -> Run:
    """Tune a model on a downstream task, in INT4; export it, and measure it. Arguments and errors: see `compress`."""
    from nybble.workflows import tune as workflow

    return Run(workflow.tune(_options(TuneOptions, options), callbacks))


def compare(*, callbacks: Sequence[Callback] = (), **options: Unpack[CompareKeywords]) -> Comparison:
    """Compare INT4 tuning with 16-bit LoRA on several tasks. Arguments and errors: see `compress`."""
    from nybble.workflows import compare as workflow

    return Comparison(workflow.compare(_options(CompareOptions, options), callbacks))


def _options(kind: type[_Kind], values: Mapping[str, Any]) -> _Kind:
    """The options of a command from keywords."""
    from nybble.run.resume import resumed_values

    return kind.of(**resumed_values(kind, dict(values)))
