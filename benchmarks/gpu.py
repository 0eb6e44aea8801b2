"""Speed and memory of training and compression on one GPU: random Llamas of 0.1, 1, 3 and 8 B parameters.

    python benchmarks/gpu.py [OUT.jsonl] [--sizes 0.1 1 3 8] [--minutes 12]
    python benchmarks/gpu.py --sizes tiny          # a rehearsal on a CPU

Needs torch, transformers and nybble (PYTHONPATH=src). Each line is printed, and written to OUT, when it is measured;
nothing is begun after --minutes. The most telling measurements come first.

- matrix rate: bfloat16 products of 8192 x 8192, the limit that MFU refers to.
- train: one optimizer step of distillation, two microbatches; tokens/s, MFU, peak memory.

      operations per token = 6 P4 + 6 V D + 6 L T D     P4 weights of linear layers; forward, both backward products

  The head is used three times (teacher, student, gradient); attention is causal. Operations that are done twice, as
  --weight_cache recompute does, are not counted.
- compress: seconds of one decoder block, the mean of the first two, with 32 x 1024 tokens.
- quantizer: forward and backward of the rounding alone, as bytes that have to be moved over time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from nybble.compression import pipeline
from nybble.compression.calibration import Calibration
from nybble.models.head import LMHead, last_hidden_states
from nybble.models.selection import select_layers
from nybble.qat.base import CachedWeightLinear, cached_weights
from nybble.qat.insert import insert_fake_quant_layers, insert_fixed_codes_layers
from nybble.quant.fake_quant import fake_quantize
from nybble.quant.grid import min_max_qparams
from nybble.quant.scheme import QuantScheme
from nybble.training.losses import kl_to_teacher

SIZES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4},
    "0.1": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9},
    "1": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    "3": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24},
    "8": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
}
KEY_VALUE_HEADS = {"tiny": 2, "0.1": 3, "1": 8, "3": 8, "8": 8}
SEQUENCES = {"tiny": 1, "0.1": 16, "1": 8, "3": 4, "8": 2}
"""Of 1024 tokens in a microbatch (64 in a rehearsal)."""

SCHEME = QuantScheme(group_size=64)
METHODS = ("awq+se", "awq+se+gptq", "awq+se+blockwise")
TRAININGS = [
    (rank, cache, compiled) for compiled in (False, True) for cache in ("step", "recompute") for rank in (64, 0, 256)
]


class Bench:
    """Where lines go, and when to stop."""

    def __init__(self, out: Path | None, minutes: float) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.out, self.end = out, time.perf_counter() + 60 * minutes

    def measure(self, label: str, function: Callable[[], dict[str, Any]]) -> None:
        """Call a function unless the time is over; print and write what it found, or why it failed."""
        if time.perf_counter() > self.end:
            return
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            found = function()
        except Exception as error:
            found = {"failed": f"{type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}"}
        if self.device.type == "cuda":
            found["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        print(f"{label:44} {', '.join(f'{name} {value}' for name, value in found.items())}", flush=True)
        if self.out:
            with self.out.open("a") as file:
                file.write(json.dumps({"what": label} | found) + "\n")

    def seconds(self, function: Callable[[], object], repeats: int = 3) -> float:
        """Median seconds of a function after one call that is not counted."""
        times = []
        for _ in range(repeats + 1):
            self.wait()
            started = time.perf_counter()
            function()
            self.wait()
            times.append(time.perf_counter() - started)
        return statistics.median(times[1:])

    def wait(self) -> None:
        """Let the GPU finish."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def make_model(size: str, device: torch.device) -> Any:
    """A random Llama in bfloat16."""
    config = LlamaConfig(
        **SIZES[size], num_key_value_heads=KEY_VALUE_HEADS[size], vocab_size=512 if size == "tiny" else 49152,
        max_position_embeddings=4096, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).requires_grad_(False).eval()


def schemes_of(model: Any) -> dict[str, QuantScheme]:
    """All linear layers in groups of 64."""
    return dict.fromkeys(select_layers(model).linears, SCHEME)


def operations_per_token(model: Any, tokens: int) -> float:
    """See the module's text."""
    config = model.config
    weights = sum(model.get_submodule(name).weight.numel() for name in schemes_of(model))
    head, attention = config.vocab_size * config.hidden_size, config.num_hidden_layers * tokens * config.hidden_size
    return 6.0 * (weights + head + attention)


def trained_layers(model: Any, rank: int) -> dict[str, CachedWeightLinear]:
    """Replace the linear layers as distill does after rounding to nearest."""
    schemes = schemes_of(model)
    inits = pipeline.compress(model, schemes).inits
    layers: dict[str, CachedWeightLinear] = {}
    if rank:
        layers |= insert_fake_quant_layers(model, inits, schemes, rank, 0)
    else:
        codes = {name: init.quantized(schemes[name]) for name, init in inits.items()}
        layers |= insert_fixed_codes_layers(model, codes, 0)
    return layers


def train(bench: Bench, size: str, setup: tuple[int, str, bool], rate: float) -> dict[str, Any]:
    """One way of training."""
    rank, cache, compiled = setup
    model = make_model(size, bench.device)
    length, rows = (64 if size == "tiny" else 1024), SEQUENCES[size]
    operations, head = operations_per_token(model, length), LMHead.of(model)
    layers = trained_layers(model, rank)
    if compiled:
        for block in model.model.layers:
            block.compile()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    ids = torch.randint(0, model.config.vocab_size, (2, rows, length), device=bench.device)
    taught = torch.randn(rows * length, model.config.hidden_size, device=bench.device, dtype=model.dtype)

    def passes() -> None:
        for microbatch in ids:
            hidden_ND = last_hidden_states(model, microbatch).flatten(0, 1)
            (kl_to_teacher(hidden_ND, taught, head, head) / len(ids)).backward()  # type: ignore[no-untyped-call]

    def step() -> None:
        if cache == "step":
            with cached_weights(layers.values()):
                passes()
        else:
            passes()
        optimizer.step()
        optimizer.zero_grad()

    seconds, tokens = bench.seconds(step), ids.numel()
    return {
        "tokens_per_s": round(tokens / seconds),
        "mfu": round(tokens * operations / seconds / rate, 3),
        "step_s": round(seconds, 4),
    }


def compress(bench: Bench, size: str, method: str) -> dict[str, Any]:
    """Seconds for one decoder block."""
    model = make_model(size, bench.device)
    length, rows = (64, 4) if size == "tiny" else (1024, 32)
    ids = torch.randint(0, model.config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(0))
    names = {name: SCHEME for name in schemes_of(model) if int(name.split(".")[2]) < 2}
    bench.wait()
    started = time.perf_counter()
    pipeline.compress(model, names, method, Calibration(ids, limit_blocks=2))
    bench.wait()
    seconds, blocks = (time.perf_counter() - started) / 2, model.config.num_hidden_layers
    return {"block_s": round(seconds, 2), "model_s_if_all_alike": round(seconds * blocks)}


def matrix_rate(bench: Bench, width: int) -> float:
    """Operations per second of bfloat16 products."""
    a, b = (torch.randn(width, width, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
    return float(2 * width**3 / bench.seconds(lambda: a @ b, repeats=10))


def quantizer(bench: Bench, shape: tuple[int, int], compiled: bool) -> dict[str, Any]:
    """Forward and backward of the rounding: 4 bytes read, written, the gradient read and written; 16 a weight.

    Compiled, each is one kernel, which torch writes. `equal`: its weights and their gradients are those of the plain
    one to the bit; the gradients of the scales are sums in another order.
    """
    weight = nn.Parameter(torch.randn(shape, device=bench.device))
    scale, zero_point = (values.float() for values in min_max_qparams(weight.detach(), SCHEME))
    function: Callable[..., Tensor] = torch.compile(fake_quantize) if compiled else fake_quantize
    grad = torch.randn(shape, device=bench.device)
    results = []
    for either in (fake_quantize, function):
        weight.grad = None
        rounded = either(weight, scale, zero_point, SCHEME)
        rounded.backward(grad)
        results.append((rounded.detach(), weight.grad))
    equal = all(torch.equal(plain, other) for plain, other in zip(*results, strict=True))
    seconds = bench.seconds(lambda: function(weight, scale, zero_point, SCHEME).backward(grad), repeats=10)
    return {"gb_per_s": round(16 * weight.numel() / seconds / 1e9), "ms": round(1e3 * seconds, 3), "equal": equal}


def main() -> None:
    """Measure in the order of what tells most."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["1", "8", "0.1", "3"])
    parser.add_argument("--minutes", type=float, default=12)
    options = parser.parse_args()
    bench, rehearsal = Bench(options.out, options.minutes), options.sizes == ["tiny"]
    rate = matrix_rate(bench, 512 if rehearsal else 8192)
    name = torch.cuda.get_device_name() if bench.device.type == "cuda" else "CPU"
    bench.measure(f"{name}: matrix rate", lambda: {"tflops": round(rate / 1e12, 3)})
    plain = [setup for setup in TRAININGS if setup[1] == "step" and not setup[2]]
    for setups in (plain, [setup for setup in TRAININGS if setup not in plain]):
        for size in options.sizes:
            for setup in setups:
                label = f"train {size} B, rank {setup[0]}, {setup[1]}{', compiled' if setup[2] else ''}"
                bench.measure(label, lambda size=size, setup=setup: train(bench, size, setup, rate))  # type: ignore[misc]
            for method in METHODS if setups is plain else ():
                bench.measure(
                    f"compress {size} B, {method}",
                    lambda size=size, method=method: compress(bench, size, method),  # type: ignore[misc]
                )
        for compiled in (False, True) if setups is plain else ():
            shape = (256, 512) if rehearsal else (4096, 14336)
            bench.measure(
                f"quantizer{', compiled' if compiled else ''}",
                lambda shape=shape, compiled=compiled: quantizer(bench, shape, compiled),  # type: ignore[misc]
            )


if __name__ == "__main__":
    main()
