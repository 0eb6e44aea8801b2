"""`nybble export`: export a finished run again, or to more runtimes."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from nybble.console import say
from nybble.errors import ExportError, OptionError, RunError
from nybble.export.base import EXPORTERS
from nybble.export.checks import ALL, check_exportable, check_formats
from nybble.files import check_folder_place, file_sizes, write_text
from nybble.models.checkpoint import QuantizedCheckpoint, open_checkpoint
from nybble.models.quantized_file import WEIGHTS_FILE
from nybble.options.commands import ExportOptions
from nybble.report.markdown import run_markdown
from nybble.run.complete import QUANTIZED, check_complete, no_model_error
from nybble.run.folder import reopen_run
from nybble.run.resume import saved_options
from nybble.runtime import raise_if_interrupted
from nybble.workflows.export_run import export_run
from nybble.workflows.publish import Upload, check_repository, make_repository, push_to_hub, write_cards

log = logging.getLogger("nybble")

_OTHER_REMEDY = re.compile(r"(?:change [^;]+ or )?remove (\w+(?: and \w+)?) from --export(?:, or the pattern)?")
"""What exporters advise in a run that compresses, where --export names the formats."""


def export(options: ExportOptions) -> None:
    """Export the 4-bit model of a run to every format named; upload it where that is asked for."""
    asked = options.export
    check_repository(asked.push_to_hub, asked.to)
    upload = None if asked.push_to_hub is None else Upload(asked.push_to_hub, asked.private)
    folders = export_formats(Path(asked.run), asked.to, asked.trust_remote_code, asked.compare_logits, upload)
    say(f"Exported to {' and '.join(map(str, folders))}.")
    if upload is not None:
        push_to_hub(folders[0], upload)


def export_formats(
    path: Path,
    formats: Sequence[str],
    trust_remote_code: bool,
    compare_logits: bool = False,
    upload: Upload | None = None,
) -> list[Path]:
    """Export the 4-bit model of the run in `path`; returns the folders.

    Args:
        compare_logits: compare logits whatever the size of the model.
        upload: where the export goes afterwards; that this is allowed is checked before the work.

    Raises:
        OptionError: no format, or an unknown one.
        RunError: `path` is no finished run.
        ExportError: a format cannot hold the model. Of --to all, the others are made before.
    """
    if not formats:
        raise OptionError(f"--to must name a format: {', '.join((*EXPORTERS, ALL))}")
    check_formats(formats, "--to")
    saved_options(path)
    if not (path / QUANTIZED / WEIGHTS_FILE).is_file():
        raise no_model_error(path)
    run = reopen_run(path)
    try:
        check_complete(run.quantized)
        checkpoint = open_checkpoint(run.quantized, trust_remote_code)
        columns = {name: shape[1] for name, shape in checkpoint.shapes.items()}
        with remedies_of_this_command(path):
            asked, failed = formats, list[ExportError | OptionError]()
            formats = check_exportable(formats, checkpoint.config, checkpoint.selection, columns)
            for name in formats:
                check_folder_place(path / name)
            _check_disk(path, formats, checkpoint)
            if upload is not None:
                make_repository(upload)
            for i, name in enumerate(formats):
                with _telling_what_is_left(path, formats, i):
                    try:
                        export_run(run, name, trust_remote_code, compare_logits)
                    except (ExportError, OptionError) as error:
                        if name in asked:
                            raise
                        log.warning("%s; the other formats of --to all follow", str(error).rpartition("; ")[0])
                        failed.append(error)
                        continue
                    write_cards(run)  # also of those before one that fails
                    if run.results.finished:
                        write_text(run.path / "report.md", run_markdown(run.results))
            if failed:
                raise failed[0]
    finally:
        run.close()
    return [path / name for name in formats]


def _check_disk(path: Path, formats: Sequence[str], checkpoint: QuantizedCheckpoint) -> None:
    """Raise RunError where the disk is too small for what will be written at least: codes, or values in 16 bits.

    A folder that is replaced is deleted when the new one is whole.
    """
    codes, needed, used = (checkpoint.folder / WEIGHTS_FILE).stat().st_size, 0, 0
    for name in formats:
        size = codes if EXPORTERS[name].holds_codes else 2 * checkpoint.num_parameters
        needed = max(needed, used + size)
        used += size - sum(file_sizes(path / name).values())
    free = shutil.disk_usage(path).free
    if needed > free:
        raise RunError(
            f"{path} needs at least {needed / 1e9:.2f} GB for exports to {', '.join(formats)}; {free / 1e9:.2f} GB are "
            "free; free some disk space, or name fewer formats"
        )


@contextmanager
def remedies_of_this_command(path: Path) -> Iterator[None]:
    """Name --to in the remedies of exporters, and what continues this command.

    The schemes of a finished run cannot be changed.
    """
    try:
        yield
    except (ExportError, OptionError) as error:
        raise type(error)(_OTHER_REMEDY.sub(r"remove \1 from --to", str(error))) from error
    except RunError as error:
        raise RunError(str(error).replace("then add --resume", f"then run nybble export {path} again")) from error


@contextmanager
def _telling_what_is_left(path: Path, formats: Sequence[str], done: int) -> Iterator[None]:
    """Add to an interruption how to go on: `done` formats are finished, and stay."""
    try:
        try:
            yield
        except Exception:
            raise_if_interrupted()  # the error may be what a library made of the interruption
            raise
    except KeyboardInterrupt as interruption:
        finished = f"; finished: {', '.join(formats[:done])}" if done else ""
        left = f"for the {'rest' if done else 'formats'}: nybble export {path} --to {' '.join(formats[done:])}"
        interruption.add_note(f"{finished}; {left}")
        raise
