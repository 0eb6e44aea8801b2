"""docs/scale.md: every figure is that of the estimate that nybble prints."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from nybble.models.selection import select_layers
from nybble.training import memory
from nybble.training.losses import chunk_tokens
from nybble.training.memory import ModelShapes, TrainingSetup
from nybble.training.memory_from_disk import BlockShapes, CompressionSetup, offloaded_memory

PAGE = Path(__file__).parents[2] / "docs" / "scale.md"
LENGTH, SEQUENCES, METHOD = 1024, 128, "awq+se+gptq"
# Layers, width, inner width, vocabulary, tied, heads, key-value heads, width of a head.
MODELS = {
    "Llama-3.2-1B": (16, 2048, 8192, 128256, True, 32, 8, 64),
    "Llama-3.2-3B": (28, 3072, 8192, 128256, True, 24, 8, 128),
    "Llama-3.1-8B": (32, 4096, 14336, 128256, False, 32, 8, 128),
    "Qwen3-14B": (40, 5120, 17408, 151936, False, 40, 8, 128),
    "Qwen2.5-32B": (64, 5120, 27648, 152064, False, 40, 8, 128),
    "Llama-3.1-70B": (80, 8192, 28672, 128256, False, 64, 8, 128),
}


def rows() -> list[list[str]]:
    """Device, model, command and GB of each row of the table."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip() for cell in line[1:-1].split("|")] for line in lines if line.startswith("|")]
    return [row for row in cells if len(row) == 4 and row[1] in MODELS]


@cache
def empty_model(name: str) -> Any:
    """The model without memory."""
    layers, width, inner, vocabulary, tied, heads, groups, head = MODELS[name]
    config = LlamaConfig(
        hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=groups, vocab_size=vocabulary, tie_word_embeddings=tied, head_dim=head,
    )  # fmt: skip
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def estimate(name: str, command: str, gpus: int) -> float:
    """GB of the command's peak in the memory of one GPU, or of a CPU: while it compresses, trains or measures."""
    on_gpu = gpus > 0
    model = empty_model(name)
    names, vocabulary = select_layers(model).linears, model.config.vocab_size
    shapes, logits = ModelShapes.of(model, names), LENGTH * vocabulary * 2
    kept, device = memory.positions_bytes(shapes, "fixed"), torch.device("cuda" if on_gpu else "cpu")
    words = [word for word in command.strip("`").split() if word != "--shard"]
    flags = dict(zip(words[1::2], words[2::2], strict=True))
    setup = CompressionSetup(tuple(flags.get("--method", METHOD).split("+")), SEQUENCES, LENGTH, logits, on_gpu)
    from_disk = offloaded_memory(shapes, BlockShapes.of(model, "model.layers", names), setup)
    if words[0] == "compress":
        return from_disk / 1e9
    rank, sequences = int(flags["--lora_rank"]), int(flags.get("--microbatch_size", 1))
    training = TrainingSetup(
        shapes, rank, shapes.linear_weights // 64, chunk_tokens(device, vocabulary),
        weight_copies=2 if flags["--weight_cache"] == "step" else 0, logits_bytes=logits,
        positions_bytes=kept, checkpointing=flags["--gradient_checkpointing"] == "on",
        fixed_point_weights=shapes.linear_weights if flags.get("--base_weights") == "fixed" else 0, on_gpu=on_gpu,
        on_disk=flags.get("--offload") == "disk", shards=gpus if "--shard" in command else 1,
    )  # fmt: skip
    in_memory = memory.compression_memory(shapes, SEQUENCES, LENGTH, on_gpu), memory.measuring_memory(shapes, logits)
    before = from_disk if flags.get("--offload") == "disk" else max(in_memory)
    return max(memory.training_memory(training, sequences * LENGTH), before) / 1e9


@pytest.mark.parametrize("row", rows(), ids=lambda row: f"{row[1]} {row[2]}")
def test_the_page_on_scale_has_the_estimates_of_the_formula(row: list[str]) -> None:
    device, name, command, figure = row
    number = device.split()[0]
    found = estimate(name, command, int(number) if number.isdecimal() else int("GPU" in device))
    assert figure == f"{found:.1f}"
    size = float(device.rpartition(", ")[2].removesuffix(" each").removesuffix(" GiB"))
    assert found * 1e9 < size * 2**30, "it must fit"


def test_the_page_on_scale_has_rows() -> None:
    assert len(rows()) >= 9
