"""Peak memory and time of compressing and exporting a random mixture of experts with 0.92 B parameters.

    python benchmarks/mixture.py [--methods rtn se+gptq] [--formats openvino hf] [--offload disk] [--work FOLDER]

Mixtral's architecture: 16 layers of 1024, 16 experts of 1024, two of them for a token; bfloat16 on disk. Target: 4 GB.
Every step runs in a process of its own, which reports the peak of its resident memory.
"""

from __future__ import annotations

import argparse
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
    """Write a random mixture, and a text to calibrate and measure on."""
    import inspect

    import torch
    from transformers import AutoModelForCausalLM, MixtralConfig

    from nybble.models.loading import load

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=49152, hidden_size=1024, intermediate_size=1024, num_hidden_layers=layers, num_attention_heads=16,
        num_key_value_heads=4, num_local_experts=16, num_experts_per_tok=2, max_position_embeddings=4096,
        tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model = model.to_empty(device="cpu")
    for name, parameter in model.named_parameters():
        torch.nn.init.ones_(parameter) if "norm" in name else torch.nn.init.normal_(parameter, 0, 0.02)
    model.tie_weights()
    model.save_pretrained(folder / "model")
    load("smollm2", torch.bfloat16, torch.device("cpu")).tokenizer.save_pretrained(folder / "model")
    (folder / "text.txt").write_text(inspect.getsource(argparse) * 8, encoding="utf-8")


def run(*arguments: str) -> None:
    """Run nybble; print its time and peak memory."""
    started = time.perf_counter()
    process = subprocess.run(
        [sys.executable, "-c", _PROGRAM, *arguments], stderr=subprocess.PIPE, text=True, check=False
    )
    seconds = time.perf_counter() - started
    lines = process.stderr.splitlines()
    peak = next((int(line.split()[1]) for line in lines if line.startswith("peak ")), 0)
    print(f"{' '.join(arguments[:1] + arguments[-2:]):40} {peak / GB:5.2f} GB  {seconds:5.0f} s", flush=True)
    if process.returncode:
        sys.exit("\n".join(lines[-5:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--methods", nargs="*", default=["rtn", "se+gptq"])
    parser.add_argument("--formats", nargs="*", default=["openvino", "hf"])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--offload", default="disk", choices=["disk", "none", "auto"])
    parser.add_argument(
        "--limit_blocks", type=int, default=16, help="calibrate this many blocks; all of them have the same peak"
    )
    parser.add_argument("--work", type=Path, default=None, help="folder for the model, the runs and the exports")
    options = parser.parse_args()
    work = options.work or Path(tempfile.mkdtemp(prefix="nybble-"))
    if not (work / "model").is_dir():
        work.mkdir(exist_ok=True)
        make_model(work, options.layers)
    common = [
        "--pretrained",
        str(work / "model"),
        "--data",
        str(work / "text.txt"),
        "--seq_len",
        "512",
        "--export",
        "none",
    ]
    common += ["--eval_tasks", "none", "--other_data", "none", "--overwrite"]
    common += ["--num_calibration_samples", "32", "--num_test_samples", "4"]
    for method in options.methods:
        arguments = [*common, "--output_dir", str(work / method), "--offload", options.offload]
        if method != "rtn":
            arguments += ["--limit_blocks", str(options.limit_blocks)]
        run("compress", *arguments, "--method", method)
    for name in options.formats:
        run("export", str(work / options.methods[0]), "--to", name)
    if options.work is None:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
