"""A task of letters that a tiny model learns in seconds, and options to tune on it."""

import json
from pathlib import Path
from typing import Any

import torch

from nybble.options.commands import TuneOptions
from nybble.run.results import TaskResults, read_results
from tests.helpers.tiny import save_model


def write_letters(path: Path, rows: int = 60) -> Path:
    """Which letter follows: three choices."""
    with path.open("w") as file:
        for i in range(rows):
            letters = [chr(97 + (i + k) % 6) for k in range(4)]
            row = {"prompt": " ".join(letters[:3]), "choices": [letters[3], "0", "#"], "answer": 0}
            file.write(json.dumps(row) + "\n")
    return path


def write_words(path: Path) -> Path:
    """Completions without alternatives, which are scored by their likelihood."""
    rows = [{"prompt": f"say {letter}", "completion": f"{letter} it is"} for letter in "abcdefghijklmnopqrst" * 2]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tune_options(folder: Path, **changes: Any) -> TuneOptions:
    """Options for a tiny model and the letters, in a folder that gets both."""
    model, task = folder / "model", folder / "letters.jsonl"
    if not model.exists():
        save_model(model, "smollm")
    if not task.exists():
        write_letters(task)
    base: dict[str, Any] = {
        "pretrained": str(model), "output_dir": str(folder / "run"), "task": str(task), "seq_len": 32, "epochs": 2,
        "batch_size": 8, "microbatch_size": 8, "lr": 1e-2, "lora_rank_space": (8, 4, 2), "num_min_loss_configs": 2,
        "export": (), "method": "rtn", "save_steps": 2, "report_to": (), "num_test_samples": 2, "quantize": "during",
    }  # fmt: skip
    return TuneOptions.of(**base | changes)


def task_of(run: Path) -> TaskResults:
    """Results of the task."""
    task = read_results(run).task
    assert task is not None
    return task


def save_taught_model(folder: Path) -> Path:
    """A 16-bit model that has learned the letters, in plain torch."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = tune_options(folder)
    model = AutoModelForCausalLM.from_pretrained(options.model.pretrained)
    tokenizer = AutoTokenizer.from_pretrained(options.model.pretrained)
    rows = [json.loads(line) for line in Path(options.task.task).read_text().splitlines()]
    # The letters come round after six.
    ids = torch.tensor([tokenizer(f"{row['prompt']} {row['choices'][0]}").input_ids for row in rows[:6]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(60):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder / "taught")
    tokenizer.save_pretrained(folder / "taught")
    return folder / "taught"
