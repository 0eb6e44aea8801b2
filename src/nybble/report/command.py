"""`nybble report`: runs, or comparisons of `nybble compare`, side by side, in the terminal and as a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nybble.console import console, say
from nybble.errors import OptionError, RunError
from nybble.files import is_out_of_space, write_text
from nybble.report.combine import CombinedComparison, combine
from nybble.report.comparison import Comparison, compare_runs, comparison_markdown, comparison_note, comparison_rows
from nybble.report.five_columns import is_comparison, read_comparison
from nybble.report.html import comparison_page
from nybble.report.published import PUBLISHED_NOTE, published_name, published_rows
from nybble.report.tables import MARKER, Cells, as_markdown, as_table
from nybble.run.marker import is_run
from nybble.run.results import RESULTS, RunResults, has_results, read_results
from nybble.run.resume import saved_options

# Characters at the head of a file that have the marker, if nybble report wrote the file.
_HEAD = 200


@dataclass(frozen=True)
class RunsReport:
    """Runs, grouped by what can be compared.

    Attributes:
        unfinished: folders of runs that have not measured everything.
    """

    comparisons: Sequence[Comparison]
    unfinished: Sequence[Path]

    def markdown(self) -> str:
        """All comparisons and runs in Markdown."""
        return comparison_markdown(self.comparisons)

    def html(self) -> str:
        """The page.

        Raises:
            MissingExtraError: matplotlib or Jinja is not installed.
        """
        return comparison_page(self.comparisons)


def make_report(runs: Sequence[Path], out: Path | None, table: bool) -> None:
    """Print the tables of runs or comparisons, and write a page and its Markdown.

    Args:
        runs: run folders, or folders of nybble compare.
        out: the page; see `write_report`.
        table: write nothing; of runs print the published kind of table.

    Raises:
        OptionError: no folder, runs and comparisons together, `table` with `out`, or a page that may not be written.
        RunError: a folder is neither a run nor a comparison, nothing is measured yet, or the page cannot be written.
        MissingExtraError: matplotlib or Jinja is not installed.
    """
    if table and out is not None:
        raise OptionError("--table prints and writes no page; --out names a page; give one of them")
    folders = _distinct(runs)
    report = _read(folders)
    written = "" if table else _written_text(*_write(report, folders, out))
    if isinstance(report, CombinedComparison):
        _print_combined(report, written)
        return
    if report.unfinished:
        names = ", ".join(map(str, report.unfinished))
        say(f"Not finished, and shown as far as measured: {names}. Continue with --resume.")
    if table:
        _print_published(report.comparisons)
    else:
        _print_comparisons(report.comparisons)
        say(written)


def write_report(runs: Sequence[Path], out: Path | None) -> Path:
    """Write a page about runs or comparisons, and the same in Markdown beside it; returns the page.

    Args:
        runs: run folders, or folders of nybble compare.
        out: the page. By default report.html, in the folder if there is only one, otherwise in the current folder.

    Raises:
        OptionError, RunError, MissingExtraError: see `make_report`.
    """
    folders = _distinct(runs)
    return _write(_read(folders), folders, out)[0]


def _distinct(runs: Sequence[Path]) -> list[Path]:
    """The folders, each once, however it is named."""
    if not runs:
        raise OptionError("nybble report needs one or more folders of runs or of nybble compare; got none")
    return list({folder.resolve(): folder for folder in runs}.values())


def _read(folders: Sequence[Path]) -> RunsReport | CombinedComparison:
    comparisons = [folder for folder in folders if is_comparison(folder)]
    if not comparisons:
        return _read_runs(folders)
    others = [folder for folder in folders if folder not in comparisons]
    if others:
        raise OptionError(
            f"nybble report takes either runs or folders of nybble compare; got {comparisons[0]}, which is a "
            f"comparison, and {others[0]}, which is none; name folders of one kind"
        )
    return combine([read_comparison(folder) for folder in comparisons])


def _read_runs(folders: Sequence[Path]) -> RunsReport:
    runs: dict[str, RunResults] = {}
    options: dict[str, dict[str, Any]] = {}
    unfinished = []
    for folder in folders:
        if not (is_run(folder) or has_results(folder)):
            raise RunError(f"{folder} must be a run folder; it has no {RESULTS}; name the folder of a run")
        results = read_results(folder)
        if "16bit" in results.models:
            name = folder.resolve().name
            name = next(n for n in (name, str(folder), str(folder.resolve())) if n not in runs)
            runs[name] = results
            if is_run(folder):
                options[name] = saved_options(folder)
        if not results.finished:
            unfinished.append(folder)
    if not runs:
        names = ", ".join(map(str, folders))
        raise RunError(f"{names} must have measured a model; nothing is measured yet; continue with --resume")
    return RunsReport(compare_runs(runs, options), unfinished)


def _write(report: RunsReport | CombinedComparison, folders: Sequence[Path], out: Path | None) -> tuple[Path, Path]:
    """Write the page and the Markdown beside it; returns both paths. A run's own report.md stays as it is."""
    if out is None:
        out = (folders[0] if len(folders) == 1 else Path()) / "report.html"
    if out.suffix != ".html":
        raise OptionError(f"--out must be a file name that ends with .html; got {out}")
    beside = out.with_suffix(".md")
    own = {(folder / "report.md").resolve() for folder in folders if has_results(folder)}
    replaced = [out] if beside.resolve() in own else [out, beside]
    try:
        for path in replaced:
            if path.is_file() and not _is_from_report(path):
                raise OptionError(
                    f"--out {out} must not replace a file that nybble report did not write; it would replace {path}; "
                    "choose another name"
                )
        write_text(out, report.html())
        if beside in replaced:
            write_text(beside, f"{MARKER}\n\n{report.markdown()}")
    except (OSError, RunError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        if not isinstance(cause, OSError) or is_out_of_space(cause):
            raise
        raise RunError(f"--out {out} must be writable; {cause.strerror}; choose another folder") from error
    return out, beside


def _is_from_report(path: Path) -> bool:
    with path.open(encoding="utf-8", errors="replace") as file:
        return MARKER in file.read(_HEAD)


def _written_text(page: Path, beside: Path) -> str:
    text = f"{page} ({page.stat().st_size / 1e3:.0f} kB, opens offline)"
    return f"{text} and {beside.name}" if beside.exists() else text


def _print_markdown(text: str) -> None:
    """Print what is to be copied: each line as it is."""
    console.print(text, highlight=False, soft_wrap=True)


def _print_combined(combined: CombinedComparison, written: str) -> None:
    for table in combined.tables:
        console.print(as_table(*table))
    if written:
        say(f"{combined.note}\n{written}")
    else:
        _print_markdown(combined.markdown())


def _print_comparisons(comparisons: Sequence[Comparison]) -> None:
    for comparison in comparisons:
        console.print(as_table(*comparison_rows(comparison), title=comparison.model))
        say(comparison_note(comparison))


def _print_published(comparisons: Sequence[Comparison]) -> None:
    cells: Cells = published_rows(comparisons)
    console.print(as_table(*cells))
    _print_markdown(as_markdown(*cells))
    say(PUBLISHED_NOTE)
    several = len({comparison.metric for comparison in comparisons}) > 1
    for comparison in comparisons:
        if any(results.limit is not None for results in comparison.runs.values()):
            say(f"{published_name(comparison, several)}: {comparison.measured_on}")
        if not comparison.baselines:
            say(
                f"{published_name(comparison, several)}: there is no improvement without a model that was compressed "
                "without training; "
                "name such a run too (nybble compress --method awq+se or awq+se+gptq, same text)"
            )
