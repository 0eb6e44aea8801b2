"""Every causal type of transformers, tiny, through every command: it works, or is refused before there is a run folder.

tests/golden/model_types.json says what is expected of each type. `python -m tests.models.test_every_type` writes it.
"""

import io
import json
import logging
import re
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from nybble.errors import NybbleError
from nybble.export.base import EXPORTERS, Exporter
from nybble.models.checkpoint import open_checkpoint
from nybble.options.commands import CompressOptions
from nybble.run.complete import QUANTIZED
from nybble.workflows.compress import compress
from nybble.workflows.distill import distill
from nybble.workflows.tune import tune
from tests.helpers.causal_types import NOT_MADE, TYPES, save_tiny
from tests.helpers.distill import distill_options
from tests.helpers.tune import tune_options

GOLDEN = Path(__file__).parents[1] / "golden" / "model_types.json"
WORKS = "works"

Outcomes = dict[str, dict[str, str]]
"""Type -> command or export -> WORKS, or the kind of the error."""


def run_compress(model: Path, run: Path, export: tuple[str, ...] = (), method: str = "rtn") -> None:
    options = CompressOptions.of(
        pretrained=str(model), output_dir=str(run), data=("python-docs",), method=method, group_size=32, seq_len=32,
        num_calibration_samples=8, num_test_samples=2, eval_tasks=(), export=export,
    )  # fmt: skip
    compress(options)


def run_distill(model: Path, run: Path) -> None:
    few = {"num_train_samples": 4, "num_validation_samples": 2, "num_test_samples": 2}
    distill(distill_options(model, run, group_size=32, lora_rank=2, epochs=1, **few))


def run_tune(model: Path, run: Path) -> None:
    changes = {"pretrained": str(model), "output_dir": str(run), "group_size": 32, "epochs": 1, "seq_len": 64}
    tune(tune_options(model.parent, num_min_loss_configs=1, **changes))


COMMANDS: dict[str, Callable[[Path, Path], None]] = {
    "compress rtn": run_compress,
    "distill": run_distill,
    "tune": run_tune,
    "compress auto": lambda model, run: run_compress(model, run, method="auto"),
}
RUNS = ("compress rtn", "exports", "distill", "tune", "compress auto")


def kind(error: object, model_type: str) -> str:
    """The requirement that an error message names, without paths, numbers and names of classes and types."""
    text = re.sub(r"\S*/\S*", "PATH", str(error)).split(";")[0]
    name, text = (re.sub(r"\d[\d,.]*", "N", " ".join(words.split()))[:120] for words in (model_type, text))
    text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", "MODEL", text)
    return re.sub(r"\b[A-Z]\w*(?:For|LM|Model|Decoder)\w*", "CLASS", text)


def outcome(command: Callable[[Path, Path], None], model: Path, run: Path) -> str:
    """What came of a command."""
    try:
        command(model, run)
    except NybbleError as error:
        return ("late: " if run.exists() else "") + kind(error, model.name)
    except Exception as error:
        return f"traceback: {type(error).__name__}: {kind(error, model.name)}"
    return WORKS


def export_outcomes(model: Path, run: Path) -> dict[str, str]:
    """What comes of each export of a type that rounding to nearest works for."""
    if not run.exists():
        run_compress(model, run)
    checkpoint, found = open_checkpoint(run / QUANTIZED), {}
    for name in EXPORTERS:

        def export(model: Path, folder: Path, exporter: Exporter = EXPORTERS[name]) -> None:
            exporter.check(exporter.exported_config(checkpoint.config, checkpoint.selection), checkpoint.selection)
            folder.mkdir()
            exporter.export(checkpoint, folder)

        # A run tries the export on a small twin before there is a folder, so nothing of this is late.
        found[f"export {name}"] = outcome(export, model, run / name).removeprefix("late: ")
    return found


def outcomes(command: str, folder: Path, expected: Outcomes) -> Outcomes:
    """Outcome of a command, or of "exports", for every type; types are saved in `folder` once."""
    found: Outcomes = {}
    for model_type in TYPES:
        if model_type in NOT_MADE:
            continue
        model, run = folder / model_type, folder / f"{model_type} {command.replace('exports', 'compress rtn')}"
        if not model.exists():
            save_tiny(model, model_type)
        if command != "exports":
            found[model_type] = {command: outcome(COMMANDS[command], model, run)}
        elif expected.get(model_type, {}).get("compress rtn", WORKS) == WORKS:
            found[model_type] = export_outcomes(model, run)
    return found


def counts(found: Outcomes) -> str:
    """How many types have which outcome; the types of the rare ones."""
    lines = []
    for command in dict.fromkeys(command for row in found.values() for command in row):
        by_outcome = Counter(row[command] for row in found.values() if command in row)
        lines += [f"{command}: {by_outcome[WORKS]} of {by_outcome.total()} types work"]
        lines += [f"    {count:3} {what}" for what, count in by_outcome.most_common() if what != WORKS]
    return "\n".join(lines)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of all types, made when the first command needs them."""
    return tmp_path_factory.mktemp("types")


@pytest.mark.slow
@pytest.mark.parametrize("command", RUNS)
def test_every_type_works_or_is_refused(command: str, folder: Path) -> None:
    expected: Outcomes = json.loads(GOLDEN.read_text())
    found = outcomes(command, folder, expected)
    print(f"\n{counts(found)}")
    wrong = {
        f"{model_type}, {name}": (what, expected.get(model_type, {}).get(name, "none"))
        for model_type, row in found.items()
        for name, what in row.items()
        if what != expected.get(model_type, {}).get(name)
    }
    assert not wrong, "\n".join(f"{where}: {what!r}; expected {wanted!r}" for where, (what, wanted) in wrong.items())


def test_no_type_is_expected_to_end_in_a_traceback() -> None:
    expected: Outcomes = json.loads(GOLDEN.read_text())
    assert expected.keys() == set(TYPES) - set(NOT_MADE)
    assert not [row for row in expected.values() if any(what.startswith("traceback") for what in row.values())]
    assert sum(row["compress rtn"] == WORKS for row in expected.values()) >= 90


def main() -> None:
    """Write the golden file, and print the counts."""
    logging.getLogger("nybble").setLevel("WARNING")
    expected: Outcomes = {}
    with tempfile.TemporaryDirectory() as scratch, pytest.MonkeyPatch.context() as patch:
        patch.setattr("nybble.models.device.has_bfloat16", lambda device: False)
        for command in RUNS:
            with redirect_stdout(io.StringIO()):
                found = outcomes(command, Path(scratch), expected)
            print(counts(found), flush=True)
            for model_type, row in found.items():
                expected.setdefault(model_type, {}).update(row)
            rows = (f"{json.dumps(model_type)}: {json.dumps(row)}" for model_type, row in expected.items())
            GOLDEN.write_text("{\n" + ",\n".join(rows) + "\n}\n")


if __name__ == "__main__":
    main()
