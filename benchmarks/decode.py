"""Speed and size of the exports of a run, in their own runtimes, against torch: interleaved, medians.

    python benchmarks/decode.py RUN [--tokens 32] [--prompt 256] [--repeats 5]

Prefill is the time until the first token after a prompt, decoding the time of the tokens after it, greedily. Formats
that the run has no folder of are left out, and so is mlx where it has no Apple GPU.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.table import Table

from nybble.console import console
from nybble.export import EXPORTERS
from nybble.models import quantized_model
from nybble.models.quantized_model import load_config, load_tokenizer

# Seconds until the first token, and of the others.
Timed = Callable[[], tuple[float, float]]
TEXT = "The nybble is half a byte. It was named by engineers who needed a word for four bits. "


def in_torch(run: Path, dtype: torch.dtype, ids: torch.Tensor, tokens: int) -> Timed:
    model, _, _ = quantized_model.load_quantized(run / "quantized", dtype)

    @torch.no_grad()
    def decode() -> tuple[float, float]:
        started = time.perf_counter()
        output = model(input_ids=ids, use_cache=True, logits_to_keep=1)
        first = time.perf_counter()
        for _ in range(tokens):
            token = output.logits[:, -1:].argmax(-1)
            output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
        return first - started, time.perf_counter() - first

    return decode


def in_openvino(folder: Path, ids: torch.Tensor, tokens: int) -> Timed:
    import openvino
    import openvino_genai

    pipeline = openvino_genai.LLMPipeline(str(folder), "CPU", ATTENTION_BACKEND="SDPA")  # the other keeps prefixes
    config = openvino_genai.GenerationConfig(
        max_new_tokens=tokens + 1, min_new_tokens=tokens + 1, do_sample=False, apply_chat_template=False
    )

    def decode() -> tuple[float, float]:
        result = pipeline.generate(openvino.Tensor(ids.numpy()), config)
        metrics = result.perf_metrics
        first = metrics.get_ttft().mean / 1e3
        return first, metrics.get_tpot().mean / 1e3 * tokens

    return decode


def in_onnx(folder: Path, ids: torch.Tensor, tokens: int) -> Timed:
    import onnxruntime_genai as og

    model = og.Model(str(folder))

    def decode() -> tuple[float, float]:
        parameters = og.GeneratorParams(model)
        parameters.set_search_options(max_length=ids.shape[1] + tokens + 1, do_sample=False)
        generator = og.Generator(model, parameters)
        started = time.perf_counter()
        generator.append_tokens(ids.numpy())
        generator.generate_next_token()
        first = time.perf_counter()
        for _ in range(tokens):
            generator.generate_next_token()
        return first - started, time.perf_counter() - first

    return decode


def in_runtime(folder: Path, name: str, ids: torch.Tensor, tokens: int) -> Timed:
    """Through nybble's model of the runtime, which returns the logits of all tokens."""
    model = EXPORTERS[name].open_model(folder, load_config(folder, False))

    def decode() -> tuple[float, float]:
        started = time.perf_counter()
        logits = model.infer(ids, reset=True)
        first = time.perf_counter()
        for _ in range(tokens):
            logits = model.infer(logits[:, -1:].argmax(-1), reset=False)
        return first - started, time.perf_counter() - first

    return decode


def decoders(run: Path, ids: torch.Tensor, tokens: int) -> dict[str, Timed]:
    """Runtime -> how long it takes."""
    found = {
        f"torch {name}": in_torch(run, dtype, ids, tokens)
        for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16))
    }
    if (run / "openvino").is_dir():
        found["openvino-genai"] = in_openvino(run / "openvino", ids, tokens)
    if (run / "onnx").is_dir():
        found["onnxruntime-genai"] = in_onnx(run / "onnx", ids, tokens)
    for name, label in (("gguf", "llama.cpp"), ("mlx", "mlx-lm")):
        if (run / name).is_dir() and not EXPORTERS[name].too_slow():
            found[label] = in_runtime(run / name, name, ids, tokens)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    run, tokens = options.run, options.tokens
    tokenizer = load_tokenizer(run / "quantized", False)
    ids = tokenizer(TEXT * options.prompt, return_tensors="pt").input_ids[:, : options.prompt]
    timed = decoders(run, ids, tokens)
    seconds: dict[str, list[tuple[float, float]]] = {label: [] for label in timed}
    for repeat in range(options.repeats + 1):
        for label, decode in timed.items():
            found = decode()
            if repeat:  # the first one warms up
                seconds[label].append(found)
    table = Table("runtime", "prefill, tokens/s", "decode, tokens/s", "slowest to fastest decode")
    for label, found in seconds.items():
        prefill = ids.shape[1] / statistics.median(first for first, _ in found)
        speeds = sorted(tokens / rest for _, rest in found)
        table.add_row(
            label, f"{prefill:.0f}", f"{statistics.median(speeds):.1f}", f"{speeds[0]:.1f} to {speeds[-1]:.1f}"
        )
    console.print(table)
    for folder in sorted(path for path in run.iterdir() if path.name in EXPORTERS):
        size = sum(file.stat().st_size for pattern in EXPORTERS[folder.name].weight_files
                   for file in folder.glob(pattern))  # fmt: skip
        console.print(f"{folder.name}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
