"""`nybble inspect`: every quantized layer of a run or an export."""

from __future__ import annotations

import posixpath
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from nybble.console import console, say
from nybble.errors import RunError
from nybble.export.checks import check_formats, exporter_of
from nybble.models import quantized_file
from nybble.options.commands import InspectOptions
from nybble.quant.scheme import QuantScheme
from nybble.quant.weight import QuantizedWeight
from nybble.report.run import LAYER_NOTE, error_cells
from nybble.run.complete import QUANTIZED, check_complete
from nybble.run.results import RunResults, has_results, read_results

# report.run.LAYER_HEADINGS, in narrow columns.
_ERRORS = ("output\nerror,\nrtn", "output\nerror", "weight\nerror", "clipped")


def inspect(options: InspectOptions) -> None:
    """Print every quantized layer of a run, or of a folder in it, as a table.

    Raises:
        RunError: neither a finished run nor a folder inside one.
    """
    path = Path(options.inspect.target)
    run = next((folder for folder in (path, path.parent) if has_results(folder)), None)
    results = RunResults() if run is None else read_results(run)
    weights = _quantized_weights(path)
    prefix = _common_prefix([name for name in weights if "." in name])
    others = [name for name in weights if not name.startswith(prefix)]
    but = f" (not {' and '.join(others)})" if others else ""
    say(f"{path}: {len(weights)} quantized layers" + (f"; their names begin with {prefix}{but}" if prefix else ""))
    table = Table(box=None, padding=(0, 1, 0, 0))  # for names of usual length 80 columns wide
    table.add_column("layer", overflow="fold", vertical="bottom")
    for heading in ("shape", "scheme", *_ERRORS, "ends"):
        table.add_column(heading, justify="right", vertical="bottom", no_wrap=True)
    for name in _in_order(weights, results.layer_errors):
        weight = weights[name]
        cells = error_cells(results.layer_errors[name]) if name in results.layer_errors else ["-"] * 4
        ends = ((weight.codes_OI == 0) | (weight.codes_OI == weight.scheme.max_code)).float().mean()
        shape = "x".join(map(str, weight.codes_OI.shape))
        table.add_row(name.removeprefix(prefix), shape, _short(weight.scheme), *cells, f"{float(ends):.2%}")
    console.print(table)
    say(f"{LAYER_NOTE} Ends: share of the codes that are the lowest or the highest.")
    if results.layer_errors and results.trains and "tuned" in results.models:
        say(f"The errors are those of the compression ({results.method}), before training.")
    counts = Counter(weight.scheme for weight in weights.values())
    size = sum(weight.nbytes for weight in weights.values())
    summary = ", ".join(f"{count} x {scheme} ({_short(scheme)})" for scheme, count in counts.items())
    say(f"{summary}; {size / 1e6:.1f} MB of quantized weights.")


def _in_order(names: Iterable[str], known: Iterable[str]) -> list[str]:
    """Names in the order of the run, where there is one: an embedding before the layers, the head after them."""
    places = {name: i for i, name in enumerate(known)}

    def place(name: str) -> tuple[Any, ...]:
        outside = len(places) if name == "lm_head" else -1
        parts = [(not part.isdigit(), int(part) if part.isdigit() else part) for part in name.split(".")]
        return places.get(name, outside), parts

    return sorted(names, key=place)


def _common_prefix(names: Sequence[str]) -> str:
    """The path that all names begin with, with a dot at the end; "" if there is none."""
    return posixpath.commonprefix(names).rpartition(".")[0] + "." if "." in posixpath.commonprefix(names) else ""


def _short(scheme: QuantScheme) -> str:
    """A scheme in a few letters: bits, the group (r: whole rows), s if it is symmetric. Example: 4g64, 8rs."""
    group = "r" if scheme.group_size is None else f"g{scheme.group_size}"
    return f"{scheme.bits}{group}{'s' if scheme.symmetric else ''}"


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
