"""Post-training compression beside NNCF's: the same tokens, interleaved, each in a process of its own.

    make bench-nncf
    python benchmarks/compress_vs_nncf.py --text ../shared/data/wikitext [--seeds 0 1 2] [--jobs nncf:awq+se ...]

Calibration: sequences chosen at random from wiki.train* and the first three quarters of wiki.valid.raw. Measured: token
perplexity and KL on the first 16 and 64 x 512 tokens of wiki.test.raw (`wiki` alone: on all of it) and on 16 x 512
tokens of CPython's documentation. Finished jobs are not run again. A job is PEER:METHOD or PEER:METHOD:SAMPLESxLENGTH.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from safetensors.torch import save_file

from nybble.console import console
from nybble.data import packing, sources
from nybble.models import loading
from nybble.models.head import last_hidden_states

HERE = Path(__file__).resolve().parent
LENGTH = 512
JOBS = [
    "nybble:16bit",
    "nybble:rtn",
    "nncf:awq+se",
    "nybble:awq+se",
    "nybble:se",
    "nncf:awq+se+gptq",
    "nybble:awq+se+gptq",
    "nybble:se+gptq",
]


def prepare(options: argparse.Namespace) -> None:
    """Write the 16-bit model, the tokens to train on, held-out text and, per text to measure, tokens and states."""
    model = "" if options.pretrained == loading.SMOLLM2 else f"-{Path(options.pretrained).name}"
    options.folder = options.folder or Path(f"build/compress_vs_nncf{model}")
    folder, text, texts = options.folder, options.text, options.texts
    missing = [name for name in texts if not (folder / f"{name}.safetensors").exists()]
    if not missing and (folder / "train.safetensors").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    loaded = loading.load(options.pretrained, torch.float32, torch.device("cpu"))
    loaded.model.save_pretrained(folder / "model")
    loaded.tokenizer.save_pretrained(folder / "model")

    def tokens(*texts: str) -> torch.Tensor:
        return packing.tokenize(loaded.tokenizer, texts)

    def read(pattern: str) -> str:
        return next(iter(sorted(text.rglob(pattern)))).read_text(encoding="utf-8")

    for name in missing:
        console.print(f"the 16-bit model on {name}", highlight=False)
        found = (
            tokens(read("wiki.test.raw"))
            if name.startswith("wiki")
            else tokens(*sources.load_documents(sources.PYTHON_DOCS, "text", None, ("train",))["train"])
        )
        rows = found[: len(found) // LENGTH * LENGTH].view(-1, LENGTH)[: count(name)].clone()
        with torch.no_grad():
            states = torch.cat([last_hidden_states(loaded.model, part) for part in rows.split(4)])
        save({"ids": rows, "states": states}, folder / f"{name}.safetensors")
    valid = read("wiki.valid.raw")
    ends = [valid.rfind("\n", 0, len(valid) * eighths // 8) for eighths in (6, 7)]
    held_out = folder / "held-out"  # for who validates while it trains
    held_out.mkdir(exist_ok=True)
    (held_out / "validation.txt").write_text(valid[ends[0] : ends[1]], encoding="utf-8")
    (held_out / "test.txt").write_text(valid[ends[1] :], encoding="utf-8")
    save({"ids": tokens(read("wiki.train*.raw"), valid[: ends[0]])}, folder / "train.safetensors")


def count(text: str) -> int | None:
    """Sequences in "wiki64"; None = all, of "wiki"."""
    return int("".join(filter(str.isdigit, text)) or 0) or None


def save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    save_file(tensors, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").rename(path)


def run(job: str, seed: int, folder: Path, nncf: Path, texts: list[str]) -> dict[str, Any] | None:
    """One job in its own process; None if it failed (its output is in the folder)."""
    peer, method, *size = job.split(":")
    samples, length = (size or ["128x128"])[0].split("x")
    out = folder / f"{peer}-{method}-{samples}x{length}-{seed}.json"
    if not out.exists():
        console.print(f"{job}, seed {seed}", highlight=False)
        python, environment = (
            (sys.executable, {}) if peer == "nybble" else (str(nncf), {"PYTHONPATH": str(HERE.parent / "src")})
        )
        command = [
            python,
            str(HERE / "compress_worker.py"),
            "--peer",
            peer,
            "--method",
            method,
            "--seed",
            str(seed),
            "--samples",
            samples,
        ]
        command += ["--length", length, "--folder", str(folder), "--out", str(out), "--texts", *texts]
        with out.with_suffix(".log").open("w") as log:
            subprocess.run(command, stdout=log, stderr=log, env=os.environ | environment, check=False)
    return json.loads(out.read_text()) if out.exists() else None


def table(results: dict[str, list[dict[str, Any]]], texts: list[str]) -> Table:
    """Medians over seeds, and in brackets the smallest and the largest."""
    made = Table("job", "seeds", "seconds", "peak GB", *(f"{text} {what}" for text in texts for what in ("ppl", "KL")))

    for job, rows in results.items():
        numbers = [
            cell([row[text][key] for row in rows], digits)
            for text in texts
            for key, digits in (("perplexity", 2), ("kl", 4))
        ]
        made.add_row(
            job,
            str(len(rows)),
            cell([row["seconds"] for row in rows], 0),
            cell([row["peak_gigabytes"] for row in rows], 2),
            *numbers,
        )
    return made


def cell(values: list[float], digits: int) -> str:
    """Median over seeds, and in brackets the smallest and the largest."""
    middle = f"{statistics.median(values):.{digits}f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """What both comparisons take."""
    parser = argparse.ArgumentParser(description=(doc or "").split("\n")[0])
    parser.add_argument(
        "--text", type=Path, required=True, help="folder with wiki.train*.raw, wiki.valid.raw and wiki.test.raw"
    )
    parser.add_argument(
        "--pretrained", default=loading.SMOLLM2, help="hub id, folder or .gguf file (default: the built-in model)"
    )
    parser.add_argument("--folder", type=Path, help="for tokens and results of one model (default: in build)")
    parser.add_argument(
        "--nncf", type=Path, default=Path(".venv-nncf/bin/python"), help="python of NNCF's environment (make nncf)"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--texts", nargs="+", default=["wiki16", "wiki64", "docs16"])
    return parser


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--jobs", nargs="+", default=JOBS)
    options = parser.parse_args()
    prepare(options)
    results: dict[str, list[dict[str, Any]]] = {}
    for seed in options.seeds:
        for job in options.jobs:
            if seed != options.seeds[0] and job.split(":")[1] in ("16bit", "rtn"):  # nothing random in them
                continue
            result = run(job, seed, options.folder, options.nncf, options.texts)
            if result is None:
                console.print(f"{job}, seed {seed} failed; see its log in {options.folder}", highlight=False)
            else:
                results.setdefault(job, []).append(result)
    console.print(table({job: results[job] for job in options.jobs if job in results}, options.texts))


if __name__ == "__main__":
    main()
