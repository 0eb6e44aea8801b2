"""How much of the compression damage training repairs with millions of tokens, on one GPU: runs, in order of need.

    python benchmarks/gpu_accuracy.py OUT --data_dir FOLDER [--minutes 9] [--stages text start combinations winner nncf]
    python benchmarks/gpu_accuracy.py OUT --data_dir FOLDER --budget tiny --minutes 1       # a rehearsal on a CPU
    python benchmarks/gpu_accuracy.py OUT --data_dir FOLDER --stages                        # the tables so far

Needs torch, transformers and nybble (PYTHONPATH=src), and with --nncf the Python of an environment with NNCF; nothing
is downloaded. Every row is a run of `nybble` in OUT. A call ends after --minutes: it stops what is running, and the
next call with the same OUT continues from the run's last checkpoint, so OUT must be kept. After a run that fails the
others go on; delete OUT/NAME.failed to try it again. OUT/accuracy.jsonl has a line per finished run; the tables are
printed in Markdown at the end of every call.

    text           awq+se+gptq and adapters of rank 256, the defaults of nybble distill. The model writes the text of
                   all runs first (--data self:wikitext2-plain); every sequence is seen once
    start          awq+se+blockwise on that text, with the exact positions of weights in their cells
    combinations   from that start: scales and norms; rank 64; rank 256; all weights; rank 256 at temperature 2
    winner         the combination with the lowest validation KL, or --winner: three times as many tokens, three seeds
    nncf           NNCF's published recipe for as many minutes as the winning combination trained
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from nybble.cli.main import main as nybble
from nybble.report.tables import as_markdown
from nybble.run.results import RunResults, read_results

STAGES = ("text", "start", "combinations", "winner", "nncf")
TEXT, START = "text", "start-blockwise"
SOURCE = "wikitext2-plain"
BUDGETS: dict[str, dict[str, Any]] = {
    # 10240 sequences are 10.5 M tokens. A checkpoint of rank 256 is 1.3 GB, so one is written every half minute or so.
    "full": {
        "sequences": 10240, "seq_len": 1024, "calibration": 256, "batch_size": 16, "validation": 64, "test": 0,
        "save_steps": 200, "parts": 8,
    },
    "tiny": {
        "sequences": 16, "seq_len": 32, "calibration": 16, "batch_size": 4, "validation": 4, "test": 4,
        "save_steps": 1, "parts": 2,
    },
}  # fmt: skip
"""parts: validations per pass over the text."""

COMBINATIONS: dict[str, dict[str, Any]] = {
    "scales": {"lora_rank": 0},
    "rank64": {"lora_rank": 64},
    "rank256": {"lora_rank": 256},
    "full": {"train": "full"},
    "rank256-t2": {"lora_rank": 256, "kl_temperature": 2},
}
SEEDS = (0, 1, 2)
WINNER_PASSES = 3
# Putting work away takes less: a step, or a checkpoint.
_GRACE_SECONDS = 10.0
# Nothing is started that would not even load the model.
_LEAST_SECONDS = 15.0
_SIGNALS = 128
HEADINGS = [
    "run", "tokens, M", "codes changed, %", "validation KL: start, best", "test perplexity: 16 bit, start, trained",
    "test KL: start, trained", "other text KL: start, trained", "minutes: text, teacher, compress, train", "GB",
]  # fmt: skip


@dataclass(frozen=True)
class Experiment:
    """A run of nybble.

    Attributes:
        name: of its folder.
        command: compress or distill.
        options: of the command.
    """

    name: str
    command: str
    options: dict[str, Any]

    def arguments(self, out: Path) -> list[str]:
        """The command line that begins or continues the run."""
        values = self.options | {"output_dir": out / self.name}
        flags = [part for key, value in values.items() for part in (f"--{key}", str(value))]
        return [self.command, *flags, "--resume"]


class Plan:
    """The runs, from the options of the script."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.out, self.budget = options, options.out, BUDGETS[options.budget]

    def common(self) -> dict[str, Any]:
        """Options of every run."""
        measures = {"num_test_samples": self.budget["test"], "eval_tasks": "none", "export": "none"}
        return {
            "pretrained": self.options.pretrained, "eval_data": SOURCE, "data_dir": self.options.data_dir,
            "seq_len": self.budget["seq_len"], **measures,
        }  # fmt: skip

    def distill(self, name: str, passes: int, **changes: Any) -> Experiment:
        """A training on `passes` times the text."""
        budget = self.budget
        training = {
            "data": self.out / TEXT / "self.safetensors",
            "num_train_samples": budget["sequences"] // budget["parts"],
            "epochs": passes * budget["parts"],
            "batch_size": budget["batch_size"],
            "num_validation_samples": budget["validation"],
            "save_steps": budget["save_steps"],
            "report_to": "none",
        }
        return Experiment(name, "distill", self.common() | training | changes)

    def experiments(self, stage: str) -> list[Experiment]:
        """The runs of a stage, or none if what they follow from is missing."""
        calibration = {"num_calibration_samples": self.budget["calibration"]}
        if stage == "text":
            # Generated text is as long as an epoch, so this run is one epoch of all of it.
            whole = {"data": f"self:{SOURCE}", "num_train_samples": self.budget["sequences"], "epochs": 1}
            return [self.distill(TEXT, 1, method="awq+se+gptq", **calibration, **whole)]
        if not (self.out / TEXT / "self.safetensors").is_file():
            return []
        if stage == "start":
            options = self.common() | {"data": self.out / TEXT / "self.safetensors", "keep_positions": "exact"}
            return [Experiment(START, "compress", options | {"method": "awq+se+blockwise", **calibration})]
        if not read_results(self.out / START).finished:
            return []
        start: dict[str, Any] = {"init_from": self.out / START}
        if stage == "combinations":
            return [self.distill(name, 1, **start, **changes) for name, changes in COMBINATIONS.items()]
        winner = self.winner()
        if winner is None:
            return []
        return [
            self.distill(
                f"{winner}-x{WINNER_PASSES}-seed{seed}", WINNER_PASSES, **start, **COMBINATIONS[winner], seed=seed
            )
            for seed in SEEDS
        ]

    def winner(self) -> str | None:
        """The combination that was named, or that has the lowest validation KL once all are finished."""
        if self.options.winner:
            return str(self.options.winner)
        results = {name: read_results(self.out / name) for name in COMBINATIONS if not failed(self.out / name)}
        if not results or not all(result.finished for result in results.values()):
            return None
        return min(results, key=lambda name: validation_kl(results[name])[1])


def failed(run: Path) -> bool:
    """Whether the run ended with an error."""
    return run.with_suffix(".failed").exists()


def validation_kl(results: RunResults) -> tuple[float, float]:
    """Validation KL before training, and the lowest."""
    training = results.training()
    values = [row["kl_to_teacher"] for row in training.validation] if training else [float("nan")]
    return values[0], min(values)


def execute(experiment: Experiment, out: Path, deadline: float) -> bool:
    """Run or continue a run until the deadline. Returns whether there is time for another one."""
    run = out / experiment.name
    if read_results(run).finished or failed(run):
        return True
    left = deadline - time.perf_counter()
    if left < _LEAST_SECONDS:
        return False
    print(f"{experiment.name}: {left:.0f} s are left", file=sys.stderr, flush=True)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with interrupting_after(left):
        code = nybble(experiment.arguments(out))
    if code > _SIGNALS:
        return False
    if code:
        run.with_suffix(".failed").write_text(f"exit code {code} of nybble {' '.join(experiment.arguments(out))}\n")
    return True


@contextmanager
def interrupting_after(seconds: float) -> Iterator[None]:
    """Send this process SIGTERM, on which nybble puts its work away; again if it was too early or has no effect."""

    def end(number: int, frame: object) -> None:
        if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:  # nybble is there to take it
            signal.raise_signal(signal.SIGTERM)

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds, _GRACE_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def write_lines(out: Path) -> None:
    """accuracy.jsonl: a line per finished run, with everything that it measured."""
    lines = []
    for path in sorted(out.glob("*/results.json")):
        results = read_results(path.parent)
        if results.finished:
            lines.append(json.dumps({"run": path.parent.name} | asdict(results)) + "\n")
    (out / "accuracy.jsonl").write_text("".join(lines))


def cells(run: Path, budget: dict[str, Any]) -> list[str]:
    """A row of the table."""
    results = read_results(run)
    training, models = results.training(), results.models
    steps = len(training.steps) if training else 0
    rows = [models.get(name, {}) for name in ("16bit", "compressed", "tuned")]

    def several(key: str, of: list[dict[str, Any]], digits: int) -> str:
        return ", ".join(f"{row[key]:.{digits}f}" for row in of if key in row)

    minutes = [results.seconds.get(stage, 0.0) / 60 for stage in ("generate", "teacher", "compress", "train")]
    memory = results.peak_memory_bytes
    return [
        run.name,
        f"{steps * budget['batch_size'] * budget['seq_len'] / 1e6:.2f}",
        f"{100 * results.changes.codes_changed:.2f}" if results.changes else "",
        ", ".join(f"{value:.4f}" for value in validation_kl(results)) if training else "",
        several("token_perplexity", rows, 2),
        several("kl_to_teacher", rows[1:], 4),
        several("other_kl_to_teacher", rows[1:], 4),
        ", ".join(f"{value:.1f}" for value in minutes),
        f"{memory.get('cuda', memory.get('cpu', 0)) / 1e9:.1f}",
    ]


def by_nncf(plan: Plan, deadline: float) -> None:
    """NNCF's recipe for the minutes of the winner, where its environment is given; it cannot be continued."""
    options, winner, out = plan.options, plan.winner(), plan.out
    if not options.nncf or winner is None or (out / "nncf.jsonl").exists():
        return
    minutes = read_results(out / winner).seconds.get("train", 0.0) / 60
    left = (deadline - time.perf_counter()) / 60
    if not 0 < minutes < left:
        print(f"nncf: trains as long as {winner} did, {minutes:.1f} minutes; {left:.1f} are left", file=sys.stderr)
        return
    from peers import prepare

    folder = out / "peers"
    prepare(
        argparse.Namespace(
            folder=folder, pretrained=options.pretrained, data_dir=options.data_dir, num_test=64,
            length=plan.budget["seq_len"],
        )
    )  # fmt: skip
    worker = [options.nncf, Path(__file__).with_name("peer_worker.py"), "--job", "nncf:distill", "--folder", folder]
    worker += ["--samples", 1024, "--minutes", minutes, "--texts", "wiki", "docs", "gsm8k", "--out", out / "nncf.jsonl"]
    with (out / "nncf.log").open("a") as log, suppress(subprocess.TimeoutExpired):
        left = max(1.0, deadline - time.perf_counter())
        subprocess.run([str(part) for part in worker], stdout=log, stderr=log, check=False, timeout=left)


def tables(plan: Plan) -> str:
    """All runs of OUT that are finished, and those that failed."""
    made = sorted(path.parent for path in plan.out.glob("*/results.json"))
    rows = [cells(run, plan.budget) for run in made if read_results(run).finished]
    unfinished = [run.name for run in made if not read_results(run).finished and not failed(run)]
    broken = [f"{path.stem}: {path.read_text().strip()}" for path in sorted(plan.out.glob("*.failed"))]
    lines = [as_markdown(HEADINGS, rows)]
    lines += [f"to be continued: {', '.join(unfinished)}"] if unfinished else []
    return "\n".join([*lines, *(f"failed: {line}" for line in broken)])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data_dir", required=True, help="folder with wikitext")
    parser.add_argument("--pretrained", default="smollm2")
    parser.add_argument("--minutes", type=float, default=9, help="of this call")
    parser.add_argument("--stages", nargs="*", choices=STAGES, default=STAGES)
    parser.add_argument("--winner", choices=COMBINATIONS, help="instead of that with the lowest validation KL")
    parser.add_argument("--budget", choices=BUDGETS, default="full")
    parser.add_argument("--nncf", help="Python of an environment with NNCF")
    return parser.parse_args()


def main() -> None:
    """Continue where the last call stopped, until the time is over."""
    options = parse()
    deadline = time.perf_counter() + 60 * options.minutes
    options.out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    plan = Plan(options)
    try:
        for stage in options.stages:
            if stage == "nncf":
                by_nncf(plan, deadline)
            elif not all(execute(experiment, plan.out, deadline) for experiment in plan.experiments(stage)):
                break
    finally:
        write_lines(plan.out)
        print(tables(plan))


if __name__ == "__main__":
    main()
