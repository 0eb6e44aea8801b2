"""Peak memory and time of compressing, training and measuring a random Llama with 1.07 B parameters.

    python benchmarks/memory.py [--methods rtn awq+se+gptq] [--offload disk] [--layers 16] [--work FOLDER]
    python benchmarks/memory.py --methods --train "--lora_rank 64 --base_weights fixed" "--lora_rank 0"

bfloat16 on disk, vocabulary 49152, 16 layers of 2048 and 8192. Compression: 16 x 256 tokens of calibration, block by
block from disk; target 3 GB. Training: two steps of distillation with 1 x 1024 tokens, without a weight cache and with
gradient checkpointing. Every run is a process of its own, which reports the peak of its resident memory; beside it
stands the estimate that nybble prints. benchmarks/mixture.py does the same for a mixture of experts.
"""

from __future__ import annotations

import argparse
import inspect
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

GB = 1e9
_PROGRAM = """
import sys
from nybble.cli.main import main
from nybble.run.machine import peak_memory
code = main(sys.argv[1:])
print("peak", peak_memory()["cpu"], file=sys.stderr)
sys.exit(code)
"""


def make_model(folder: Path, layers: int) -> None:
    """Write the model tensor by tensor, and a text to calibrate and measure on."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from nybble.models.loading import load
    from nybble.models.tensor_writer import TensorLayout, safetensors_writer

    config = LlamaConfig(
        vocab_size=49152, hidden_size=2048, intermediate_size=8192, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=4096, tie_word_embeddings=True, dtype=torch.bfloat16,
    )  # fmt: skip
    config.architectures = ["LlamaForCausalLM"]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    folder.mkdir(parents=True)
    layouts = {name: TensorLayout.of(parameter) for name, parameter in model.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    with safetensors_writer(folder / "model.safetensors", layouts, {"format": "pt"}) as writer:
        for name, layout in layouts.items():
            random = torch.empty(layout.shape).normal_(0, 0.02, generator=generator)
            writer.write(name, (torch.ones(layout.shape) if "norm" in name else random).bfloat16())
    config.save_pretrained(folder)
    load("smollm2", torch.bfloat16, torch.device("cpu")).tokenizer.save_pretrained(folder)


def run(*arguments: str) -> str:
    """Run nybble; print its time and peak memory. Returns what it printed."""
    started = time.perf_counter()
    process = subprocess.run([sys.executable, "-c", _PROGRAM, *arguments], capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - started
    lines = process.stderr.splitlines()
    peak = next((int(line.split()[1]) for line in lines if line.startswith("peak ")), 0)
    estimate = re.search(r"estimate: ([\d.]+) GB", process.stdout)
    print(
        f"{' '.join(arguments[:1] + arguments[-4:]):80} {peak / GB:5.2f} GB (estimate "
        f"{estimate[1] if estimate else 'none'})  {seconds:5.0f} s",
        flush=True,
    )
    if process.returncode:
        sys.exit("\n".join(lines[-5:]))
    return process.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--methods", nargs="*", default=["rtn", "awq+se+gptq"])
    parser.add_argument("--offload", default="disk", choices=["disk", "none", "auto"])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument(
        "--limit_blocks", type=int, default=16, help="calibrate this many blocks; all of them have the same peak"
    )
    parser.add_argument("--train", nargs="*", default=[], help="options of a distillation, quoted, one for each run")
    parser.add_argument("--work", type=Path, default=None, help="folder for the model and the runs")
    options = parser.parse_args()
    work = options.work or Path(tempfile.mkdtemp(prefix="nybble-"))
    if not (work / "model").is_dir():
        make_model(work / "model", options.layers)
        (work / "text.txt").write_text(inspect.getsource(argparse) * 8, encoding="utf-8")
    common = ["--pretrained", str(work / "model"), "--data", str(work / "text.txt"), "--dtype", "bfloat16"]
    common += ["--export", "none", "--eval_tasks", "none", "--other_data", "none", "--overwrite"]
    for method in options.methods:
        folder = str(work / f"{method}-{options.offload}")
        arguments = [*common, "--output_dir", folder, "--seq_len", "256", "--num_test_samples", "4"]
        arguments += ["--num_calibration_samples", "16"]
        if method != "rtn":
            arguments += ["--limit_blocks", str(options.limit_blocks)]
        run("compress", *arguments, "--method", method, "--offload", options.offload)
    for number, choices in enumerate(options.train):
        arguments = [*common, "--output_dir", str(work / f"train-{number}"), "--seq_len", "1024", "--method", "rtn"]
        arguments += ["--num_train_samples", "2", "--num_validation_samples", "1", "--num_test_samples", "1"]
        arguments += ["--batch_size", "1", "--epochs", "1", "--weight_cache", "recompute"]
        run("distill", *arguments, "--gradient_checkpointing", "on", *choices.split())
    if options.work is None:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
