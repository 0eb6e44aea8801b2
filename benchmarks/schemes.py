"""What bits, groups and symmetry cost: size, perplexity and KL divergence to the 16-bit model, one row per scheme.

    python benchmarks/schemes.py OUT --pretrained smollm2 --recipes rtn awq+se+gptq distill [--bits 2 3 4 8]
                                 [--group_size 32 64 128 -1] [--symmetric both] [--export gguf] [any option of compress]

A row is a run in OUT: nybble compress with a method, or nybble distill with recipes/quick.toml, which starts from the
run of its method in OUT where there is one: the same bits, and the seconds of both are added. Rows that OUT has are not
made again, so an interrupted table continues. OUT/schemes.jsonl has a line per row as it is finished; the table is
printed in Markdown. A row in which a group size does not divide all rows of the model says so (NNCF calls it ADJUST).
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nybble.cli.main import main as nybble
from nybble.report.tables import as_markdown
from nybble.run.results import RunResults, read_results

QUICK = Path(__file__).parents[1] / "recipes" / "quick.toml"
SYMMETRIES = {"no": (False,), "yes": (True,), "both": (False, True)}
_SIGNALS = 128
HEADINGS = [
    "bits", "group", "symmetric", "recipe", "model", "bits a weight", "MB", "token perplexity", "KL to 16 bit",
    "seconds", "remark",
]  # fmt: skip


def command_of(recipe: str, scheme: Sequence[str], more: Sequence[str], start: Path | None) -> list[str]:
    """The command that makes a row, without its output folder.

    Args:
        start: a finished run with the compression that a distillation starts from.
    """
    common = [*scheme, "--eval_tasks", "none", *more]
    if recipe == "distill":
        taken = [] if start is None else ["--method", "auto", "--init_from", str(start)]
        return ["distill", "--config", str(QUICK), *common, *taken]
    return ["compress", "--method", recipe, *common]


def rows_of(results: RunResults, key: dict[str, Any], before: float) -> list[dict[str, Any]]:
    """The 4-bit model as torch computes it, and each export as deployed.

    Args:
        before: seconds of the compression in the run that this one started from.
    """
    layers = results.layers
    assert layers is not None
    assert layers.bits_per_weight is not None
    seconds = before + sum(results.seconds.get(stage, 0.0) for stage in ("compress", "train"))
    rows = []
    for model in (
        name for name in results.models if name not in ("16bit", *(["compressed"] if results.trains else []))
    ):
        metrics = results.models[model]
        remark = "other groups in some layers" if layers.notes else ""
        rows.append(
            key
            | {
                "model": "torch" if model in ("compressed", "tuned") else model,
                "bits_per_weight": round(layers.bits_per_weight, 3),
                "megabytes": round(metrics["bytes"] / 1e6, 1),
                "perplexity": round(metrics["token_perplexity"], 3),
                "kl": round(metrics["kl_to_teacher"], 4),
                "seconds": round(seconds),
                "remark": remark,
            }
        )
    return rows


def make_rows(out: Path, key: dict[str, Any], more: Sequence[str]) -> list[dict[str, Any]]:
    """Make a run unless it is finished; its rows."""
    group = key["group_size"]
    name = f"{key['bits']}-g{group if group > 0 else 'row'}-{'sym' if key['symmetric'] else 'asym'}"
    folder, start, before = out / f"{name}-{key['recipe']}", None, 0.0
    compressed = out / f"{name}-{tomllib.loads(QUICK.read_text())['method']}"
    if key["recipe"] == "distill" and read_results(compressed).finished:
        start, before = compressed, read_results(compressed).seconds["compress"]
    scheme = ["--bits", str(key["bits"]), "--group_size", str(group), *(["--symmetric"] if key["symmetric"] else [])]
    if not read_results(folder).finished:
        command = [*command_of(key["recipe"], scheme, more, start), "--output_dir", str(folder), "--resume"]
        if code := nybble(command):
            if code > _SIGNALS:  # interrupted: the table continues where it is started again
                sys.exit(code)
            return []
        for leftover in ("teacher", "checkpoints"):
            shutil.rmtree(folder / leftover, ignore_errors=True)
    return rows_of(read_results(folder), key, before)


def parse() -> tuple[argparse.Namespace, list[str]]:
    """Options of this script, and those for nybble."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--recipes", nargs="+", default=["rtn", "awq+se+gptq", "distill"])
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4, 8])
    parser.add_argument("--group_size", type=int, nargs="+", default=[32, 64, 128, -1])
    parser.add_argument("--symmetric", choices=SYMMETRIES, default="both")
    return parser.parse_known_args()


def main() -> None:
    """Make all rows, print the table."""
    options, more = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    lines, table = options.out / "schemes.jsonl", []
    known = set(lines.read_text().splitlines()) if lines.exists() else set()
    for bits, group_size, symmetric, recipe in itertools.product(
        options.bits, options.group_size, SYMMETRIES[options.symmetric], options.recipes
    ):
        if bits == 8 and not symmetric and options.symmetric == "both":
            continue  # 8 bits are symmetric
        key = {"bits": bits, "group_size": group_size, "symmetric": symmetric or bits == 8, "recipe": recipe}
        for row in make_rows(options.out, key, more):
            table.append(row)
            line = json.dumps(row)
            if line not in known:
                with lines.open("a") as file:
                    file.write(line + "\n")
    cells = [[str(value) for value in row.values()] for row in table]
    print(as_markdown(HEADINGS, cells))


if __name__ == "__main__":
    main()
