"""Distillation of the built-in model beside NNCF's: the same tokens, passes and batch; each in a process of its own, one after the other.

python benchmarks/distill_vs_nncf.py --text ../shared/data/wikitext [--seeds 0 1 2] [--samples 1024] [--length 256]

NNCF: its published recipe from its own awq+se (nncf_distill.py). nybble: the command line, `nybble distill`, on the same sequences, as it comes;
everything after -- is given to it. nybble-half: the same on the first half of the sequences. nybble-lora: the same kind of training as NNCF's, from awq+se,
adapters of the same rank. Measured afterwards by the same code: token perplexity and KL on the texts of compress_vs_nncf.py. Seconds: start and training,
without loading and measuring. Finished jobs are not run again.
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
from compress_vs_nncf import HERE, arguments, cell, prepare
from compress_worker import calibration, evaluate
from rich.table import Table
from safetensors.torch import load_file

from nybble import checkpoint, models, writing
from nybble.console import console
from nybble.losses import Head


def by_nncf(seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Start and training by NNCF, in its environment."""
    out = options.folder / f"nncf-distill-{options.samples}x{options.length}-{seed}.json"
    if not out.exists():
        command = [options.nncf, HERE / "nncf_distill.py", "--seed", seed, "--samples", options.samples, "--length", options.length, "--rank", options.rank]
        command += ["--batch", options.batch, "--microbatch", options.microbatch, "--folder", options.folder, "--out", out, "--texts", *options.texts]
        call(command, out.with_suffix(".log"), {"PYTHONPATH": str(HERE.parent / "src")})
    found = json.loads(out.read_text())
    return found | {"seconds": found["teacher_seconds"] + found["start_seconds"] + sum(found["step_seconds"])}


def by_nybble(seed: int, options: argparse.Namespace, peer: str) -> dict[str, Any]:
    """The command line on the same sequences; then its 4-bit model is measured."""
    flags = ["--start", "awq+se", "--lora_rank", str(options.rank), "--norm_lr", "0"] if peer == "nybble-lora" else options.flags
    samples = options.samples // 2 if peer == "nybble-half" else options.samples
    name = f"nybble-distill-{samples}x{options.length}-{'_'.join(flag.strip('-') for flag in flags) or 'default'}-{seed}"
    out, run = options.folder / f"{name}.json", options.folder / name
    if not out.exists():
        loaded = models.load(str(options.folder / "model"), torch.float32, torch.device("cpu"))
        tokens = options.folder / f"train-{samples}x{options.length}-{seed}.safetensors"
        ids = calibration(load_file(options.folder / "train.safetensors")["ids"], seed, options.samples, options.length)[:samples]
        checkpoint.save_tensors(tokens, {"ids": ids}, {"length": options.length, "tokenizer": writing.fingerprint(loaded.tokenizer)})
        command = [sys.executable, "-m", "nybble", "distill", "--pretrained", options.folder / "model", "--data", tokens, "--seq_len", options.length]
        command += ["--samples", samples, "--epochs", 1, "--batch_size", options.batch, "--seed", seed]
        command += ["--eval_data", options.folder / "held-out", "--test_samples", 4, "--valid_samples", 16, "--tasks", "--export", "--output_dir", run]
        command += ["--resume"] if (run / "config.toml").exists() else []
        call([*command, *flags], out.with_suffix(".log"), {})
        results = json.loads((run / "results.json").read_text())
        head = Head.of(loaded.model, copy=True)
        model, _, _ = checkpoint.load_quantized(run / "quantized", torch.float32)
        found = {"step_seconds": [row["seconds"] for row in results["training"]], "losses": [row["loss"] for row in results["training"]]}
        found |= {"seconds": sum(results["seconds"][stage] for stage in ("teacher", "compress", "train", "absorb"))}
        found |= {"start_seconds": results["seconds"]["compress"], "peak_gigabytes": results["peak_memory_bytes"]["cpu"] / 1e9}
        out.write_text(json.dumps(found | evaluate(model, head, options.folder, options.texts)))
    return json.loads(out.read_text())  # type: ignore[no-any-return]


def call(command: list[Any], log: Path, environment: dict[str, str]) -> None:
    console.print(f"running; see {log}", highlight=False)
    with log.open("w") as file:
        subprocess.run([str(part) for part in command], stdout=file, stderr=file, env=os.environ | environment, check=True)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--microbatch", type=int, default=2, help="of NNCF; nybble chooses its own")
    parser.add_argument("--peers", nargs="+", choices=("nncf", "nybble", "nybble-half", "nybble-lora"), default=["nncf", "nybble"])
    parser.add_argument("flags", nargs="*", help="for nybble distill")
    options = parser.parse_args()
    prepare(options.folder, options.text, options.texts)
    results: dict[str, list[dict[str, Any]]] = {}
    for seed in options.seeds:
        for peer in options.peers:
            result = by_nncf(seed, options) if peer == "nncf" else by_nybble(seed, options, peer)
            results.setdefault(peer, []).append(result)
    table = Table("peer", "seconds", "of that start", "step", "peak GB", *(f"{text} {what}" for text in options.texts for what in ("ppl", "KL")))
    for peer, rows in results.items():
        numbers = [cell([row[text][key] for row in rows], digits) for text in options.texts for key, digits in (("perplexity", 2), ("kl", 4))]
        steps = [statistics.median(row["step_seconds"]) for row in rows]
        times = [cell([row[key] for row in rows], 0) for key in ("seconds", "start_seconds")]
        table.add_row(peer, *times, cell(steps, 1), cell([row["peak_gigabytes"] for row in rows], 2), *numbers)
    console.print(table)


if __name__ == "__main__":
    main()
