"""nybble beside other tools: the same model, the same text, the same measures; every tool in its own environment.

    make peers                                                # the environments: .venv-nncf, .venv-mlx, ...
    python benchmarks/peers.py --data_dir ../shared/data [--jobs nybble:quick nncf:awq+se ...]

A job is TOOL:METHOD and runs in a process of its own (peer_worker.py). All of them get the first --samples sequences of
--length tokens of wikitext2-plain in an order of the seed: compression calibrates on the first 128, trainings use all.
Measured: token perplexity and KL divergence to the 16-bit model on the first 64 x 512 tokens of wikitext-2's test split
as published, and on a quarter as much of CPython's documentation and of GSM8K's questions. A line of JSON per
finished job is appended to peers.jsonl in the folder; jobs that have one are not run again. The table is printed in
Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from nybble import files
from nybble.data import generate, packing, sources
from nybble.data.sampling import draw_order
from nybble.models import loading
from nybble.models.head import last_hidden_states
from nybble.report.tables import as_markdown

HERE = Path(__file__).resolve().parent
TEST_LENGTH = 512
TEXTS = ("wiki", "docs", "gsm8k")

JOBS = [
    "nybble:16bit", "nybble:rtn", "nybble:awq+se", "nybble:awq+se+gptq", "nybble:awq+se+blockwise", "nybble:quick",
    "nncf:rtn", "nncf:awq+se", "nncf:awq+se+gptq", "nncf:distill", "autoround:rtn", "autoround:light",
    "autoround:default", "llmcompressor:gptq", "llmcompressor:awq", "gptqmodel:gptq", "mlx:rtn", "mlx:rtn8", "mlx:dwq",
    "mlx:dwq8",
]  # fmt: skip


def prepare(options: argparse.Namespace) -> None:
    """Write what is missing of the 16-bit model, the text to measure on and the training sequences of the seed."""
    if not (options.folder / f"{TEXTS[-1]}.safetensors").exists():
        prepare_model(options)
    train = options.folder / f"train-{options.seed}.safetensors"
    if not train.exists():
        tokenizer = loading.load_tokenizer(str(options.folder / "model"))
        plain = sources.load_documents(sources.WIKITEXT2_PLAIN, "text", options.data_dir, ("train",))
        rows = packing.pack_documents(tokenizer, plain.train, options.length, "training").ids
        ids = rows[draw_order(len(rows), len(rows), options.seed)].to(torch.int32)
        note = {"length": options.length, "tokenizer": generate.vocabulary_fingerprint(tokenizer)}
        files.save_tensors(train, {"ids": ids}, note)


def prepare_model(options: argparse.Namespace) -> None:
    """Write the 16-bit model, held-out text and, per text to measure, tokens and states."""
    folder, data_dir = options.folder, options.data_dir
    folder.mkdir(parents=True, exist_ok=True)
    loaded = loading.load(options.pretrained, torch.float32, torch.device("cpu"))
    loaded.model.save_pretrained(folder / "model")
    loaded.tokenizer.save_pretrained(folder / "model")
    plain = sources.load_documents(sources.WIKITEXT2_PLAIN, "text", data_dir, ("validation",))
    held_out = folder / "held-out"  # for who validates while it trains
    held_out.mkdir(exist_ok=True)
    half = len(plain.validation) // 2
    for split, documents in {"validation": plain.validation[:half], "test": plain.validation[half:]}.items():
        (held_out / f"{split}.txt").write_text("\n".join(map(str, documents)), encoding="utf-8")
    texts = {
        "wiki": sources.load_documents(sources.WIKITEXT2, "text", data_dir, ("test",)).test,
        "docs": sources.load_documents(sources.PYTHON_DOCS, "text", None, ("test",)).train,
        "gsm8k": sources.load_documents("gsm8k", "question", data_dir, ("test",)).test,
    }
    for name, documents in texts.items():
        count = options.num_test if name == "wiki" else options.num_test // 4
        ids = packing.pack_documents(loaded.tokenizer, documents, TEST_LENGTH, "test").ids[:count]
        with torch.no_grad():
            states = torch.cat([last_hidden_states(loaded.model, part) for part in ids.split(4)])
        save_file({"ids": ids.contiguous(), "states": states}, folder / f"{name}.safetensors")


def run(job: str, options: argparse.Namespace) -> None:
    """Run one job in its tool's environment; its output goes to a file in the folder."""
    tool = job.split(":")[0]
    python = sys.executable if tool == "nybble" else str(options.environments / f".venv-{tool}" / "bin" / "python")
    name = f"{job.replace(':', '-')}-{options.samples}-{options.seed}"
    print(f"{job}; see {options.folder / name}.log", file=sys.stderr, flush=True)
    command: list[Any] = [python, HERE / "peer_worker.py", "--job", job, "--seed", options.seed]
    command += ["--samples", options.samples, "--minutes", options.minutes, "--folder", options.folder]
    command += ["--out", options.folder / "peers.jsonl", "--texts", *TEXTS]
    # GPTQModel refuses to start with fewer workers, and NNCF builds an extension in its first training.
    settings = {"GPTQMODEL_CPU_WORKERS": "2", "NNCF_EXTENSION_LOAD_TIMEOUT": "0", "HF_HUB_OFFLINE": "1"}
    settings = os.environ | settings | {"PYTHONPATH": str(HERE.parent / "src")}
    with (options.folder / f"{name}.log").open("w") as log:
        subprocess.run([str(part) for part in command], stdout=log, stderr=log, env=settings, cwd=options.folder)


def finished(folder: Path) -> list[dict[str, Any]]:
    """The rows so far."""
    lines = folder / "peers.jsonl"
    return [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []


def table(rows: list[dict[str, Any]]) -> str:
    """A row per job in Markdown, in the order of JOBS."""
    order = {job: i for i, job in enumerate(JOBS)}
    measures = [f"{text}, {what}" for text in TEXTS for what in ("perplexity", "KL")]
    cells = [
        [
            row["job"].replace(":", " "), str(row["samples"]), f"{row['seconds'] / 60:.1f}",
            f"{row['cpu_seconds'] / 60:.1f}", f"{row['peak_gigabytes']:.2f}", *(
                f"{row[text][key]:.{digits}f}" for text in TEXTS for key, digits in (("perplexity", 2), ("kl", 4))
            ),
        ]
        for row in sorted(rows, key=lambda row: (order.get(row["job"], len(order)), row["samples"]))
    ]  # fmt: skip
    return as_markdown(["", "sequences", "minutes", "of CPU", "peak GB", *measures], cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", required=True, help="folder with wikitext and gsm8k")
    parser.add_argument("--pretrained", default=loading.SMOLLM2, help="hub id, folder or .gguf file")
    parser.add_argument("--folder", type=Path, default=Path("build/peers"), help="for text and results of one model")
    parser.add_argument("--environments", type=Path, default=HERE.parent, help="folder of the .venv-TOOL")
    parser.add_argument("--jobs", nargs="*", default=JOBS)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--num_test", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=25, help="a training by NNCF ends after them")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the text, and of trainings")
    options = parser.parse_args()
    options.folder = options.folder.resolve()
    prepare(options)
    for job in options.jobs:
        key = (job, options.seed, options.samples)
        if key not in [(row["job"], row["seed"], row["samples"]) for row in finished(options.folder)]:
            run(job, options)
    print(table(finished(options.folder)))


if __name__ == "__main__":
    main()
