"""--start (and --method): what training starts from. A compression to be done, named by its steps, or a finished run, whose 4-bit model is taken over."""

from __future__ import annotations

import logging
from pathlib import Path

from nybble.compress import methods
from nybble.errors import OptionError
from nybble.models import loading, quantized_model, selection
from nybble.report import run as report_run
from nybble.run import results as run_results

log = logging.getLogger("nybble")

# --start that is chosen when the model is known.
AUTO = "auto"


def start_run(start: str) -> Path | None:
    """The folder of the run that --start names; None where it names a method, also where a folder happens to be called like one."""
    named = all(part in ("rtn", *methods.METHODS) for part in start.split("+"))
    return Path(start) if not named and run_results.is_run(Path(start)) else None


def steps_of(start: str, flag: str = "--start") -> tuple[str, ...]:
    """Steps of the compression that is to be done; none where a finished run has done it (--start only)."""
    run = start_run(start) if flag == "--start" else None
    if run is None:
        return methods.parse_method(
            start, "--start, where it is not the folder of a run," if flag == "--start" else flag
        )
    if not (run / "quantized").exists():
        raise OptionError(f"--start {run} must be a finished run; it has no folder quantized; finish it with --resume")
    return ()


def check(run: Path, loaded: loading.LoadedModel, plan: selection.LayerSelection, group_size: int) -> None:
    """Raise OptionError unless the 4-bit weights of a finished run fit this model and have this group size."""
    sizes = quantized_model.scale_shapes(run / "quantized")
    layers = {name: loaded.model.get_submodule(name).weight.shape for name in (*plan.int4, *plan.int8)}
    other = run_results.read_results(run).get("model")
    if sizes.keys() != layers.keys() or any(sizes[name][0] != shape[0] for name, shape in layers.items()):
        raise OptionError(
            f"--start {run} must be of a model like {loaded.name}; it is of {other}, whose layers are others"
        )
    differing = sorted(
        quantized_model.plain_tensors(run / "quantized") ^ quantized_model.other_tensors(loaded.model, layers).keys()
    )
    if differing:
        raise OptionError(
            f"--start {run} must be of a model like {loaded.name}; only one of it and {other} has {', '.join(differing[:3])}"
        )
    for name in plan.int4:
        found = layers[name][1] // sizes[name][1]
        if found != group_size:
            raise OptionError(
                f"--start {run} must have groups of {group_size} weights; it has groups of {found}; add --group_size {found}"
            )
    if other != loaded.name:
        log.warning("--start %s was made of %s, and the 16-bit model is %s", run, other, loaded.name)


def tuned(start: str) -> bool:
    """Whether --start is a run that was trained end to end, itself or what it started from."""
    results = {} if (run := start_run(start)) is None else run_results.read_results(run)
    return bool(results) and (report_run.tunes(results) or report_run.starts_tuned(results))


def described(start: str) -> str:
    """ "awq+se", or "awq+se (runs/compressed)" for a run."""
    run = start_run(start)
    return start if run is None else f"{run_results.read_results(run).get('method', 'rtn')} ({run})"
