"""Decoding speed and size of an export against torch, on this machine: interleaved, medians.

python benchmarks/decode.py RUN [--tokens 64] [--repeats 5]
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import openvino_genai
import torch
from rich.table import Table

from nybble.console import console
from nybble.models import quantized_model

PROMPT = "The nybble is half a byte. It was named"


def torch_decoder(run: Path, dtype: torch.dtype, tokens: int) -> Callable[[], float]:
    """Seconds for `tokens` greedy tokens after the prompt."""
    model, tokenizer, _ = quantized_model.load_quantized(run / "quantized", dtype)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids

    def decode() -> float:
        started = time.perf_counter()
        made = model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
        assert made.shape[1] == ids.shape[1] + tokens
        return time.perf_counter() - started

    return decode


def openvino_decoder(run: Path, tokens: int) -> Callable[[], float]:
    pipeline = openvino_genai.LLMPipeline(str(run / "openvino"), "CPU")
    config = openvino_genai.GenerationConfig(
        max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, apply_chat_template=False
    )

    def decode() -> float:
        started = time.perf_counter()
        result = pipeline.generate([PROMPT], config)
        seconds = time.perf_counter() - started
        assert result.perf_metrics.get_num_generated_tokens() == tokens
        return seconds

    return decode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    run, tokens = arguments.run, arguments.tokens
    decoders = {
        "torch float32": torch_decoder(run, torch.float32, tokens),
        "torch bfloat16": torch_decoder(run, torch.bfloat16, tokens),
        "OpenVINO 4 bit": openvino_decoder(run, tokens),
    }
    seconds: dict[str, list[float]] = {name: [] for name in decoders}
    for repeat in range(arguments.repeats + 1):
        for name, decode in decoders.items():
            taken = decode()
            if repeat:  # the first is a warm-up
                seconds[name].append(taken)
    table = Table("decoder", "tokens/s (median)", "slowest", "fastest")
    for name, values in seconds.items():
        table.add_row(
            name, *(f"{tokens / value:.1f}" for value in (statistics.median(values), max(values), min(values)))
        )
    console.print(table)
    parameters = sum(
        p.numel() for p in quantized_model.load_quantized(run / "quantized", torch.float32)[0].parameters()
    )
    for part in ("openvino_model.bin", "openvino_model.xml"):
        size = (run / "openvino" / part).stat().st_size
        console.print(
            f"{part}: {size / 1e6:.2f} MB = {size / parameters:.3f} bytes per parameter "
            f"({parameters / 1e6:.1f} M parameters)"
        )


if __name__ == "__main__":
    main()
