"""`nybble inspect`: every quantized layer of a run or an export."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from rich.table import Table

from nybble.console import console, say
from nybble.errors import RunError
from nybble.export.checks import check_formats, exporter_of
from nybble.models import quantized_file
from nybble.options.commands import InspectOptions
from nybble.quant.weight import QuantizedWeight
from nybble.report.run import LAYER_HEADINGS, error_cells
from nybble.run.folder import QUANTIZED, check_complete
from nybble.run.results import RunResults, has_results, read_results


def inspect(options: InspectOptions) -> None:
    """Print every quantized layer of a run, or of a folder in it, as a table.

    Raises:
        RunError: neither a finished run nor a folder inside one.
    """
    path = Path(options.inspect.target)
    run = next((folder for folder in (path, path.parent) if has_results(folder)), None)
    results = RunResults() if run is None else read_results(run)
    weights = _quantized_weights(path)
    table = Table("layer", "shape", "scheme", title=f"{path}: {len(weights)} quantized layers")
    for heading in (*LAYER_HEADINGS[1:], "at the ends"):
        table.add_column(heading, justify="right")
    for name, weight in weights.items():
        cells = error_cells(results.layer_errors[name]) if name in results.layer_errors else ["-"] * 4
        ends = ((weight.codes_OI == 0) | (weight.codes_OI == weight.scheme.max_code)).float().mean()
        shape = " x ".join(map(str, weight.codes_OI.shape))
        table.add_row(name, shape, str(weight.scheme), *cells, f"{float(ends):.2%}")
    console.print(table)
    if results.layer_errors and results.trains and "tuned" in results.models:
        say(f"The errors are those of the compression ({results.method}), before training.")
    counts = Counter(str(weight.scheme) for weight in weights.values())
    size = sum(weight.nbytes for weight in weights.values())
    summary = ", ".join(f"{count} x {scheme}" for scheme, count in counts.items())
    say(f"{summary}; {size / 1e6:.1f} MB.")


def _quantized_weights(path: Path) -> Mapping[str, QuantizedWeight]:
    """Name -> codes of a run, its quantized folder, or an export."""
    folder = path / QUANTIZED if (path / QUANTIZED).is_dir() else path
    check_complete(folder)
    if (folder / quantized_file.WEIGHTS_FILE).is_file():
        return quantized_file.load_weights(folder)[0]
    exporter = exporter_of(path)
    if exporter is not None:
        check_formats([exporter.name], "TARGET")
        if exporter.holds_codes:
            return exporter.read_codes(path)
        raise RunError(f"{path} must hold codes; an export to {exporter.name} does not; name its run instead")
    raise RunError(f"{path} must be a finished run, or a folder quantized or an export inside one; it is neither")
