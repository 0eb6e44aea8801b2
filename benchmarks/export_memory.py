"""Peak memory and time of every export of a random Llama with 1.07 B parameters.

    python benchmarks/export_memory.py [--formats openvino gguf ...] [--layers 16] [--work FOLDER]

Each export runs in a process of its own, which reports the peak of its resident memory. Targets: OpenVINO 0.7 GB + 1.5
bytes a parameter, all others 0.7 GB + 3 times the largest tensor in 16 bits; 3 minutes each on two quiet cores.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

GB = 1e9


def make_model(folder: Path, layers: int) -> None:
    """Write a quantized/ folder with random codes."""
    import torch
    from transformers import LlamaConfig

    from nybble.models.checkpoint import empty_model
    from nybble.models.loading import load
    from nybble.models.quantized_file import save_weights
    from nybble.models.selection import select_layers
    from nybble.quant.scheme import INT8_PER_ROW, QuantScheme
    from nybble.quant.weight import QuantizedWeight

    config = LlamaConfig(
        vocab_size=49152, hidden_size=2048, intermediate_size=8192, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=4096, tie_word_embeddings=True, dtype=torch.bfloat16,
    )  # fmt: skip
    config.architectures = ["LlamaForCausalLM"]
    model, generator = empty_model(config, trust_remote_code=False), torch.Generator().manual_seed(0)
    selection, weights = select_layers(model), {}
    for name in (*selection.linears, *selection.embeddings):
        scheme = QuantScheme(group_size=64) if name in selection.linears else INT8_PER_ROW
        rows, columns = model.get_submodule(name).weight.shape
        codes_OI = torch.randint(0, scheme.max_code + 1, (rows, columns), dtype=torch.uint8, generator=generator)
        scale_OG = torch.full((rows, scheme.num_groups(columns)), 2**-8 if scheme.bits == 4 else 2**-12)
        zero_point_OG = torch.full_like(scale_OG, scheme.middle_code).byte()
        weights[name] = QuantizedWeight(codes_OI, scale_OG, zero_point_OG, scheme)
    others = {
        name: torch.ones(parameter.shape, dtype=torch.bfloat16)
        for name, parameter in model.named_parameters()
        if "norm" in name
    }
    folder.mkdir(parents=True)
    save_weights(folder, weights, others)
    config.save_pretrained(folder)
    load("smollm2", torch.bfloat16, "cpu").tokenizer.save_pretrained(folder)


def export_one(name: str, checkpoint: Path, folder: Path) -> None:
    """Export in this process, and print seconds, peak memory and result as JSON."""
    from nybble.export import EXPORTERS
    from nybble.models.checkpoint import open_checkpoint
    from nybble.run.machine import peak_memory
    from nybble.runtime import returning_freed_memory

    started = time.perf_counter()
    with returning_freed_memory():  # as `nybble export` does
        opened = open_checkpoint(checkpoint)
        result = EXPORTERS[name].export(opened, folder)
    facts = {"seconds": time.perf_counter() - started, "peak": peak_memory()["cpu"], "bytes": result.bytes}
    facts |= {"parameters": opened.num_parameters, "logit_difference": result.logit_difference}
    facts |= {"largest": max(rows * columns for rows, columns in opened.shapes.values())}
    print(json.dumps(facts))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--formats", nargs="+", default=["openvino", "gguf", "vllm", "onnx", "mlx", "hf"])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--work", type=Path, default=None, help="folder for the model and the exports")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--make", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        name, checkpoint, folder = options.worker
        export_one(name, Path(checkpoint), Path(folder))
        return
    work = options.work or Path(tempfile.mkdtemp(prefix="nybble-"))
    if options.make:
        make_model(work / "quantized", options.layers)
        return
    here = [sys.executable, __file__]
    if not (work / "quantized").is_dir():
        subprocess.run([*here, "--make", "--layers", str(options.layers), "--work", str(work)], check=True)
    for name in options.formats:
        folder = work / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        worker = [*here, "--worker", name, str(work / "quantized"), str(folder)]
        output = subprocess.run(worker, stdout=subprocess.PIPE, text=True, check=True).stdout
        facts = json.loads(output.splitlines()[-1])
        target = 1.5 * facts["parameters"] if name == "openvino" else 3 * 2 * facts["largest"]
        print(
            f"{name:10} {facts['peak'] / GB:5.2f} GB (target {0.7 + target / GB:.2f})  {facts['seconds']:5.0f} s  "
            f"{facts['bytes'] / 1e6:7.1f} MB  logits {facts['logit_difference']}",
            flush=True,
        )
        shutil.rmtree(folder)
    if options.work is None:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
