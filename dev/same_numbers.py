"""Prove that a change changes no number: run small workflows with two revisions and compare everything that they make.

    python dev/same_numbers.py BASE_REVISION [--only NAME ...] [--keep]

Both revisions run in the same environment, on the same tiny random models and texts, in float32, one thread. Compared
are the bytes of every tensor in quantized/, of every export file, and all numbers in results.json except times and
memory. The scenarios cover every compression method, distillation with adapters and without, in bfloat16 too, resumed
after kill -9, text that the model generates, conversations, mixtures, tuning on choices and answers, before and during
quantization, and the search for ranks. Exit code 1 if anything differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "same-numbers"
TEXT = "--seq_len 64 --num_test_samples 4 --eval_tasks none"
DISTILL = (
    f"{TEXT} --data {{inputs}}/text --num_train_samples 32 --batch_size 4 --microbatch_size 2 "
    "--num_validation_samples 4 "
    "--num_calibration_samples 16 --epochs 1 --report_to none"
)
TUNE = (
    "--num_calibration_samples 8 --batch_size 8 --microbatch_size 4 --lr 1e-3 --num_selection_samples 8 "
    "--report_to none "
    "--lora_rank_space 8 6 4"
)
METHODS = ("rtn", "awq", "se", "gptq", "blockwise", "awq+se", "se+gptq", "awq+se+gptq", "awq+se+gptq+blockwise")


def tiny(model: str, dtype: str = "float32") -> str:
    """Options of a tiny model."""
    return f"--pretrained {{inputs}}/{model} --group_size 16 --dtype {dtype} --device cpu"


SCENARIOS: dict[str, list[str]] = {
    f"compress-{method}": [
        f"compress {tiny('llama')} {TEXT} --data {{inputs}}/text --method {method} --num_calibration_samples 16"
    ]
    for method in METHODS
} | {
    "compress-gemma2": [
        f"compress {tiny('gemma2')} {TEXT} --data {{inputs}}/text --method awq+se+gptq --num_calibration_samples 16"
    ],
    "distill-adapters": [f"distill {tiny('llama')} {DISTILL} --lora_rank 8 --weight_cache step"],
    "distill-resumed": [f"distill {tiny('llama')} {DISTILL} --lora_rank 8 --save_steps 3"],
    "distill-recompute": [
        f"distill {tiny('llama')} {DISTILL} --lora_rank 8 --weight_cache recompute --method rtn --export none"
    ],
    "distill-scales": [f"distill {tiny('smollm')} {DISTILL} --lora_rank 0"],
    "distill-averaged": [
        f"distill {tiny('qwen2')} {DISTILL} --lora_rank 4 --lr_scheduler_type constant_with_averaging --epochs 2 "
        "--same_samples --scale_lr 0 --export none"
    ],
    "distill-bf16": [f"distill {tiny('gemma2', 'bfloat16')} {DISTILL} --lora_rank 4 --method awq+se --export none"],
    "distill-mixture": [
        f"distill {tiny('smollm')} {DISTILL} --data {{inputs}}/text=0.5 {{inputs}}/rows.jsonl=0.5 --lora_rank 4 "
        "--export none"
    ],
    "distill-chat": [
        f"distill {tiny('chat')} {DISTILL} --data {{inputs}}/chats.jsonl --assistant_only_loss --lora_rank 4 "
        "--export none"
    ],
    "distill-self": [f"distill {tiny('smollm')} {DISTILL} --data self:{{inputs}}/text --lora_rank 4 --export none"],
    "tune-after": [f"tune {tiny('smollm')} --task {{inputs}}/choices.jsonl {TUNE} --epochs 2 --export none"],
    "tune-during": [
        f"tune {tiny('llama')} --task {{inputs}}/choices.jsonl {TUNE} --epochs 2 --quantize during",
        "tune --resume --eval_only --custom_rank_config 4 8 --output_dir {run}",
    ],
    "tune-answers": [
        f"tune {tiny('smollm')} --task {{inputs}}/answers.jsonl {TUNE} --epochs 1 --rank_sampling random --export none"
    ],
    "tune-sandwich": [
        f"tune {tiny('smollm')} --task {{inputs}}/choices.jsonl {TUNE} --epochs 1 --quantize during --rank_sampling "
        "sandwich --method rtn --objective all --fast_eval --export none"
    ],
    "tune-teacher": [
        f"tune {tiny('smollm')} --task {{inputs}}/choices.jsonl {TUNE} --epochs 1 --teacher {{inputs}}/teacher "
        "--select_on test --export none"
    ],
    "tune-searched": [
        f"tune {tiny('smollm')} --task {{inputs}}/choices.jsonl {TUNE} --epochs 1 --export none",
        "search {run} --num_trials 6 --sampler hill",
        "search {run} --num_trials 6 --sampler tpe --apply",
    ],
}
# Scenario -> the file at whose n-th replacement the first command is killed; it is then resumed.
KILLED = {"distill-resumed": ("last.safetensors", 2)}
# What differs from run to run, or says only where and when.
IGNORED = {
    "seconds", "peak_memory_bytes", "command_line", "resumed_by", "machine", "logit_difference", "init_from", "bytes",
    "files",
}  # fmt: skip


def make_inputs(folder: Path) -> None:
    """Tiny models, texts and task rows; made by the current revision for both."""
    sys.path[:0] = [str(ROOT), str(ROOT / "src")]
    from tests.helpers.chat import TEMPLATE
    from tests.helpers.tiny import make_tokenizer, save_model

    shutil.rmtree(folder, ignore_errors=True)
    for name, family, seed in (
        ("llama", "llama", 0), ("smollm", "smollm", 0), ("gemma2", "gemma2", 0), ("qwen2", "qwen2", 0),
        ("chat", "smollm", 0), ("teacher", "smollm", 3),
    ):  # fmt: skip
        save_model(folder / name, family, seed=seed)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "chat")
    words = [
        "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"
    ]  # fmt: skip
    lines = [f"{words[i % 12]} {words[i * 7 % 12]} and {i} of {words[i * i % 12]}\n" for i in range(6000)]
    (folder / "text").mkdir()
    for split, part in (("train", lines[:2400]), ("valid", lines[2400:2700]), ("test", lines[2700:3000])):
        (folder / "text" / f"{split}.txt").write_text("".join(part))

    def write_rows(name: str, rows: Sequence[dict[str, Any]]) -> None:
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    write_rows("rows.jsonl", [{"text": "".join(lines[3000 + 10 * i : 3010 + 10 * i])} for i in range(60)])
    turns = [("user", "assistant", line.split()) for line in lines[4000:4120]]
    write_rows(
        "chats.jsonl",
        [
            {"messages": [{"role": a, "content": " ".join(w[:3])}, {"role": b, "content": " ".join(w[3:])}]}
            for a, b, w in turns
        ],
    )
    sums = [(i % 10, i * 3 % 10) for i in range(120)]
    asked = [f"What is {a} plus {b}?" for a, b in sums]
    write_rows(
        "choices.jsonl",
        [
            {"prompt": question, "choices": [str(a + b), str(a + b + 1), "none of them"], "answer": 0 if i % 3 else 2}
            for i, ((a, b), question) in enumerate(zip(sums, asked, strict=True))
        ],
    )
    write_rows(
        "answers.jsonl",
        [{"prompt": question, "completion": f"{a + b} it is"} for (a, b), question in zip(sums, asked, strict=True)],
    )


def run_scenario(tree: Path, name: str, folder: Path, inputs: Path) -> dict[str, str]:
    """Run a scenario with the code in `tree`; returns what it made: place -> value or hash."""
    run = folder / name
    shutil.rmtree(run, ignore_errors=True)
    environment = os.environ | {"PYTHONPATH": str(tree / "src"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    log = folder / f"{name}.log"
    with log.open("w") as output:

        def call(arguments: Sequence[str]) -> int:
            return subprocess.run(
                [sys.executable, *arguments], env=environment, stdout=output, stderr=output, check=False
            ).returncode

        for i, command in enumerate(SCENARIOS[name]):
            words = command.format(inputs=inputs, run=run).split() + (["--output_dir", str(run)] if i == 0 else [])
            if i == 0 and name in KILLED:
                from tests.helpers.distill import KILLED_PROGRAM  # make_inputs has put the tests on the path

                place, count = KILLED[name]
                if call(["-c", KILLED_PROGRAM, place, str(count), *words]) != -signal.SIGKILL:
                    sys.exit(f"{name}: the run was not killed; see {log}")
                words.append("--resume")
            if call(["-m", "nybble", *words]):
                sys.exit(f"{name} failed; see {log}")
    return dict(facts(run))


def facts(run: Path) -> Iterator[tuple[str, str]]:
    """Everything that counts in a run folder."""
    import torch
    from safetensors import safe_open

    for path in sorted(run.rglob("*")):
        place = str(path.relative_to(run))
        if path.name == "weights.safetensors" or path.name == "self.safetensors":
            with safe_open(path, "pt") as file:
                for key in sorted(file.keys()):
                    tensor = file.get_tensor(key)
                    data = tensor.contiguous().flatten().view(torch.uint8).numpy()  # numpy has no bfloat16
                    digest = hashlib.sha256(data.tobytes()).hexdigest()[:16]
                    yield f"{place}: {key}", f"{digest} {tensor.dtype} {tuple(tensor.shape)}"
        elif path.suffix == ".bin" and "teacher" not in path.parts:
            yield place, hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        elif path.name == "results.json":
            yield from flattened(json.loads(path.read_text()), place)


def flattened(value: Any, place: str) -> Iterator[tuple[str, str]]:
    """The leaves of JSON with their places."""
    if isinstance(value, dict):
        for key, item in value.items():
            if key not in IGNORED:
                yield from flattened(item, f"{place}: {key}")
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from flattened(item, f"{place}[{i}]")
    else:
        yield place, repr(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("base", help="revision to compare with")
    parser.add_argument("--only", nargs="+", choices=list(SCENARIOS), default=list(SCENARIOS), metavar="NAME")
    parser.add_argument("--keep", action="store_true", help="keep the runs in build/same-numbers")
    options = parser.parse_args()
    base = WORK / "base"
    subprocess.run(["git", "worktree", "remove", "--force", str(base)], cwd=ROOT, capture_output=True, check=False)
    subprocess.run(["git", "worktree", "add", "--detach", str(base), options.base], cwd=ROOT, check=True)
    inputs, differing = WORK / "inputs", 0
    make_inputs(inputs)
    for name in options.only:
        made = []
        for side, tree in (("base", base), ("this", ROOT)):
            folder = WORK / f"runs-{side}"
            folder.mkdir(parents=True, exist_ok=True)
            made.append(run_scenario(tree, name, folder, inputs))
        before, after = made
        different = [place for place in sorted(before.keys() | after.keys()) if before.get(place) != after.get(place)]
        print(f"{name}: {len(after)} values, {len(different)} differ", flush=True)
        for place in different[:10]:
            print(f"    {place}: {before.get(place)} -> {after.get(place)}")
        differing += len(different)
    subprocess.run(["git", "worktree", "remove", "--force", str(base)], cwd=ROOT, check=True)
    if not options.keep:
        shutil.rmtree(WORK, ignore_errors=True)
    sys.exit(1 if differing else 0)


if __name__ == "__main__":
    main()
