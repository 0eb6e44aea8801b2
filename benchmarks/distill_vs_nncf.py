"""Distillation beside NNCF's: the same tokens, epochs, batch and microbatch; each in a process of its own, in turn.

    python benchmarks/distill_vs_nncf.py --text ../shared/data/wikitext [--pretrained MODEL] [--seeds 0 1 2]
        [--samples 1024] [--length 256] [--device cuda]

NNCF: its published recipe from its own awq+se (nncf_distill.py). nybble: the command line, `nybble distill --lora_rank
0`, on the same sequences (without TensorBoard, which NNCF does not write either); everything after -- is given to it.
nybble-half: the same on the first half of the sequences. nybble-lora: from awq+se, adapters of the same rank.
Measured afterwards by the same code: token perplexity and KL on the texts of compress_vs_nncf.py. Seconds: compression
and training, without loading and measuring. Finished jobs are not run again: everything that they depend on is in their
names, except folder, machine and versions.

Not alike:
- Calibration: NNCF on 128 sequences of 128 tokens; nybble on the first 128 (or --num_calibration_samples, after --) of
  those that it trains on, of --length tokens.
- What is trained: by NNCF adapters and ranges; by nybble scales and norms, without adapters, from awq+se+blockwise.
  nybble-lora is the like-for-like one: adapters and scales, from awq+se; only rates, schedule, weight decay and
  clipping are nybble's own.
- nybble validates before training and after each epoch, within its seconds and memory, and keeps the best; NNCF keeps
its
  last step.
- Sequences that do not fill a batch are a smaller step for NNCF; nybble leaves them out.
With --device cuda only NNCF's part was run so far.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from compress_vs_nncf import HERE, arguments, cell, prepare
from compress_worker import calibration, evaluate
from rich.table import Table
from safetensors.torch import load_file

from nybble import files
from nybble.console import console
from nybble.data import generate
from nybble.models import loading, quantized_model
from nybble.models.head import LMHead
from nybble.run.results import has_results, read_results


def shared(options: argparse.Namespace, samples: int) -> str:
    """The settings of both peers, as a part of a file name."""
    batches = f"batch_{options.batch}-microbatch_{options.microbatch}"
    return f"{samples}x{options.length}-epochs_{options.epochs}-{batches}-{options.device}"


def readable(flags: list[str]) -> str:
    """Flags as a part of a file name, another one for other flags."""
    name = quote("_".join(flag.removeprefix("--") for flag in flags), safe="+=,") or "default"
    return name if len(name) <= 120 else f"{name[:100]}_{sha256(name.encode()).hexdigest()[:12]}"


def texts_of(out: Path) -> list[str]:
    """Texts that a job was measured on; none before it is finished."""
    return (
        [key for key, value in json.loads(out.read_text()).items() if isinstance(value, dict)] if out.exists() else []
    )


def by_nncf(seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Start and training by NNCF, in its environment."""
    out = options.folder / f"nncf-distill-{shared(options, options.samples)}-rank_{options.rank}-{seed}.json"
    done = texts_of(out)
    if not set(options.texts) <= set(done):
        command = [
            options.nncf,
            HERE / "nncf_distill.py",
            "--seed",
            seed,
            "--samples",
            options.samples,
            "--length",
            options.length,
            "--rank",
            options.rank,
        ]
        command += [
            "--epochs",
            options.epochs,
            "--batch",
            options.batch,
            "--microbatch",
            options.microbatch,
            "--device",
            options.device,
        ]
        command += ["--folder", options.folder, "--out", out, "--texts", *dict.fromkeys([*done, *options.texts])]
        call(command, out.with_suffix(".log"), {"PYTHONPATH": str(HERE.parent / "src")})
    found: dict[str, Any] = json.loads(out.read_text())
    return found | {"seconds": found["teacher_seconds"] + found["start_seconds"] + sum(found["step_seconds"])}


def by_nybble(seed: int, options: argparse.Namespace, peer: str) -> dict[str, Any]:
    """The command line on the same sequences; then its 4-bit model is measured."""
    flags = (
        ["--method", "awq+se", "--lora_rank", str(options.rank), "--norm_lr", "0"]
        if peer == "nybble-lora"
        else ["--lora_rank", "0", *options.flags]
    )
    samples = options.samples // 2 if peer == "nybble-half" else options.samples
    name = f"nybble-distill-{shared(options, samples)}-{readable(flags)}-{seed}"
    out, run = options.folder / f"{name}.json", options.folder / name
    done = texts_of(out)
    if not set(options.texts) <= set(done):
        if not (has_results(run) and read_results(run).finished):
            train(run, flags, samples, seed, options)
        files.write_text(out, json.dumps(measured(run, options, list(dict.fromkeys([*done, *options.texts])))))
    return json.loads(out.read_text())  # type: ignore[no-any-return]


def train(run: Path, flags: list[str], samples: int, seed: int, options: argparse.Namespace) -> None:
    """Run the command line, or continue a run that was stopped."""
    command: list[Any] = [sys.executable, "-m", "nybble", "distill", "--pretrained", options.folder / "model"]
    command += ["--device", options.device, "--data", write_tokens(samples, seed, options), "--seq_len", options.length]
    command += ["--num_train_samples", samples, "--epochs", options.epochs, "--batch_size", options.batch]
    command += ["--microbatch_size", options.microbatch, "--seed", seed]
    command += ["--eval_data", options.folder / "held-out", "--num_test_samples", 4, "--num_validation_samples", 16]
    command += ["--eval_tasks", "none", "--export", "none", "--report_to", "none", "--output_dir", run]
    command += ["--resume"] if (run / "config.toml").exists() else []
    call([*command, *flags], run.with_name(f"{run.name}.log"), {})


def write_tokens(samples: int, seed: int, options: argparse.Namespace) -> Path:
    """The first of the sequences that NNCF gets, as a file for --data."""
    loaded = loading.load(str(options.folder / "model"), torch.float32, torch.device("cpu"))
    path: Path = options.folder / f"train-{samples}x{options.length}-{seed}.safetensors"
    ids = calibration(load_file(options.folder / "train.safetensors")["ids"], seed, samples, options.length)
    files.save_tensors(
        path, {"ids": ids}, {"length": options.length, "tokenizer": generate.vocabulary_fingerprint(loaded.tokenizer)}
    )
    return path


def measured(run: Path, options: argparse.Namespace, texts: list[str]) -> dict[str, Any]:
    """Seconds, memory and losses of a finished run, and its 4-bit model on the texts."""
    results, device = read_results(run), torch.device(options.device)
    training = results.training()
    assert training is not None, "a finished run of distill has a training"
    found = {
        "step_seconds": [row["seconds"] for row in training.steps],
        "losses": [row["loss"] for row in training.steps],
        "seconds": sum(results.seconds[stage] for stage in ("teacher", "compress", "train", "absorb")),
        "start_seconds": results.seconds["compress"],
        "peak_gigabytes": results.peak_memory_bytes[device.type] / 1e9,
    }
    head = LMHead.of(loading.load(str(options.folder / "model"), torch.float32, device).model, copy=True)
    model, _, _ = quantized_model.load_quantized(run / "quantized", torch.float32)
    return found | evaluate(model.to(device), head, options.folder, texts)


def eighths(losses: list[float]) -> list[float]:
    """Mean loss of each eighth of the training; a step longer than an eighth counts in each that it is part of."""
    ends = [len(losses) * i // 8 for i in range(9)]
    return [statistics.fmean(losses[begin : max(end, begin + 1)]) for begin, end in pairwise(ends)]


def call(command: list[Any], log: Path, environment: dict[str, str]) -> None:
    console.print(f"running; see {log}", highlight=False)
    with log.open("w") as file:
        subprocess.run(
            [str(part) for part in command], stdout=file, stderr=file, env=os.environ | environment, check=True
        )


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--microbatch", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--peers", nargs="+", choices=("nncf", "nybble", "nybble-half", "nybble-lora"), default=["nncf", "nybble"]
    )
    parser.add_argument("flags", nargs="*", help="for nybble distill")
    options = parser.parse_args()
    prepare(options)
    results: dict[str, list[dict[str, Any]]] = {}
    for seed in options.seeds:
        for peer in options.peers:
            result = by_nncf(seed, options) if peer == "nncf" else by_nybble(seed, options, peer)
            results.setdefault(peer, []).append(result)
    console.print(outcome(results, options.texts))
    console.print(curves(results))


def outcome(results: dict[str, list[dict[str, Any]]], texts: list[str]) -> Table:
    """Medians over seeds, and in brackets the smallest and the largest."""
    table = Table(
        "peer",
        "seconds",
        "of that start",
        "step",
        "peak GB",
        *(f"{text} {what}" for text in texts for what in ("ppl", "KL")),
    )
    for peer, rows in results.items():
        numbers = [
            cell([row[text][key] for row in rows], digits)
            for text in texts
            for key, digits in (("perplexity", 2), ("kl", 4))
        ]
        steps = [statistics.median(row["step_seconds"]) for row in rows]
        times = [cell([row[key] for row in rows], 0) for key in ("seconds", "start_seconds")]
        table.add_row(peer, *times, cell(steps, 1), cell([row["peak_gigabytes"] for row in rows], 2), *numbers)
    return table


def curves(results: dict[str, list[dict[str, Any]]]) -> Table:
    """Mean over seeds of the loss (KL of the batches) in each eighth of the training."""
    table = Table("peer", "steps", *(f"loss {i}/8" for i in range(1, 9)))
    for peer, rows in results.items():
        means = [statistics.fmean(part) for part in zip(*(eighths(row["losses"]) for row in rows), strict=True)]
        table.add_row(peer, str(len(rows[0]["losses"])), *(f"{mean:.4f}" for mean in means))
    return table


if __name__ == "__main__":
    main()
