"""What an exact export is worth: the same trained weights, requantized by each runtime's own tool.

    nybble distill --pretrained smollm2 --config recipes/quick.toml --export all --output_dir RUN --data TEXT
    python benchmarks/requantized.py RUN --teacher smollm2 --data TEXT [--sequences 32] [--seq_len 512] [--nncf PYTHON]

KL divergence to the 16-bit model and token perplexity on the test split. openvino, gguf and onnx are measured in their
own runtime as deployed, vllm, mlx and hf in torch in float32 with the weights that the runtime's reader gives.
Requantized are the 16-bit weights of RUN/hf, which hold the trained INT4 weights to the last bit:

    llama.cpp   Q4_0 and Q4_1, by the package gguf, which rounds as llama-quantize does. Q4_K_M needs rows of 256
                weights; SmolLM2's have 576, for which llama-quantize takes other types
    mlx-lm      mlx_lm.convert, 4 bits, groups of 64
    ONNX        onnxruntime-genai's builder, int4
    NNCF        compress_weights, INT4_ASYM, groups of 64, data-free; needs --nncf, the Python of its environment
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from nybble.evaluation.perplexity import logits_from_states, measure_sequences, model_logits
from nybble.models.head import LMHead

GROUP_SIZE = 64
IN_TORCH = {"vllm", "mlx", "hf"}
LLAMA_TYPES = ("Q4_0", "Q4_1")


class Measure:
    """KL divergence and perplexity of a model on prepared sequences."""

    def __init__(self, prepared: Path) -> None:
        from safetensors.torch import load_file

        tensors = load_file(prepared)
        self.ids, head, states = tensors["ids"], tensors["head"], tensors["states"]
        self.teacher = logits_from_states(LMHead(head, None, 1.0, None), states)

    def __call__(self, model: Any) -> dict[str, float]:
        with torch.no_grad():
            found = measure_sequences(model_logits(model, self.ids), self.ids, self.teacher)
        return {"kl": found["kl_to_teacher"], "perplexity": found["token_perplexity"]}


def prepare(options: argparse.Namespace, path: Path) -> None:
    """Write the test sequences, and the 16-bit model's head and hidden states."""
    from safetensors.torch import save_file

    from nybble.data.packing import pack_documents
    from nybble.data.sources import load_documents
    from nybble.models.head import last_hidden_states
    from nybble.models.loading import load

    teacher = load(options.teacher, torch.float32, "cpu")
    documents = load_documents(options.data, "text", None, ("test",))
    ids = pack_documents(teacher.tokenizer, documents.test, options.seq_len, "test").ids[: options.sequences]
    with torch.no_grad():
        states = torch.cat([last_hidden_states(teacher.model, row[None]) for row in ids])
    head = teacher.model.get_output_embeddings().weight.detach().clone()
    save_file({"ids": ids.contiguous(), "states": states, "head": head}, path)


def llama_cpp(run: Path, work: Path, kind: str) -> Path:
    """Quantize linear layers as llama-quantize does to Q4_0 or Q4_1; the embedding stays Q8_0."""
    import gguf
    import numpy as np

    folder = shutil.copytree(run / "gguf", work / kind, ignore=lambda _, names: {"model.gguf"} & set(names))
    reader = gguf.GGUFReader(run / "gguf" / "model.gguf")
    writer = gguf.GGUFWriter(folder / "model.gguf", reader.fields["general.architecture"].contents())
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key not in ("general.architecture", "general.file_type"):
            sub = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(key, field.contents(), field.types[0], sub)
    wanted = gguf.GGMLQuantizationType[kind]
    for tensor in reader.tensors:
        if tensor.tensor_type == gguf.GGMLQuantizationType.Q4_1:
            half = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float16)  # exact
            writer.add_tensor(tensor.name, gguf.quantize(half.astype(np.float32), wanted), raw_dtype=wanted)
        else:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder


def mlx(run: Path, work: Path) -> Path:
    """Quantize with mlx_lm.convert."""
    import mlx_lm

    folder = work / "mlx"
    mlx_lm.convert(str(run / "hf"), str(folder), quantize=True, q_bits=4, q_group_size=GROUP_SIZE, dtype="float16")
    return folder


def mlx_values(folder: Path) -> Callable[[str], torch.Tensor]:
    """Module name -> weight that mlx dequantizes, whatever its bits."""
    import mlx.core as mx
    import numpy as np

    tensors: Any = mx.load(str(folder / "model.safetensors"))

    def read(name: str) -> torch.Tensor:
        codes, scales, biases = (tensors[f"{name}.{leaf}"] for leaf in ("weight", "scales", "biases"))
        columns = scales.shape[1] * GROUP_SIZE
        values = mx.dequantize(
            codes, scales.astype(mx.float32), biases.astype(mx.float32), GROUP_SIZE, codes.shape[1] * 32 // columns
        )
        return torch.from_numpy(np.array(values))

    return read


def onnx(run: Path, work: Path) -> Path:
    """Quantize with onnxruntime-genai's builder."""
    from onnxruntime_genai.models.builder import create_model, parse_extra_options

    folder = work / "onnx"
    arguments = (None, str(run / "hf"), str(folder), "int4", "cpu", str(work / "cache"))
    with contextlib.redirect_stdout(sys.stderr):
        create_model(*arguments, **parse_extra_options(*arguments, [f"int4_block_size={GROUP_SIZE}"]))
    return folder


def by_nncf(model_folder: Path, prepared: Path) -> None:
    """In NNCF's environment: compress data-free, measure in torch, print JSON."""
    import nncf
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval().requires_grad_(False)
    ids = torch.ones(1, 8, dtype=torch.int64)
    example = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    compressed = nncf.compress_weights(
        model,
        mode=nncf.CompressWeightsMode.INT4_ASYM,
        group_size=GROUP_SIZE,
        ratio=1.0,
        dataset=nncf.Dataset([example]),
    )
    print(json.dumps(Measure(prepared)(compressed)))


def exact_rows(run: Path) -> Iterator[tuple[str, Path, str]]:
    """Label, folder and format of the exports of the run."""
    for name in ("openvino", "gguf", "vllm", "onnx", "mlx", "hf"):
        if (run / name).is_dir():
            yield f"{name}, exact", run / name, name


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--teacher", default="smollm2")
    parser.add_argument("--data", default="python-docs")
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--seq_len", type=int, default=512)
    parser.add_argument("--nncf", help="Python of an environment with NNCF (make peers)")
    parser.add_argument("--requantized_only", action="store_true")
    parser.add_argument("--nncf-worker", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.nncf_worker:
        by_nncf(*options.nncf_worker)
        return

    from nybble.export import EXPORTERS
    from nybble.models.checkpoint import open_checkpoint
    from nybble.models.quantized_model import load_config

    with tempfile.TemporaryDirectory(prefix="nybble-") as scratch:
        work, prepared = Path(scratch), Path(scratch) / "prepared.safetensors"
        prepare(options, prepared)
        measure = Measure(prepared)

        def show(label: str, found: dict[str, float], folder: Path | None) -> None:
            size = 0 if folder is None else sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) / 1e6
            print(f"| {label:24} | {found['kl']:.4f} | {found['perplexity']:.3f} | {size:.1f} |", flush=True)

        def measured(label: str, folder: Path, name: str) -> None:
            exporter = EXPORTERS[name]
            if name == "mlx":
                model = open_checkpoint(options.run / "quantized").build(mlx_values(folder))
            elif name in IN_TORCH:
                model = open_checkpoint(options.run / "quantized").build(exporter.read_weights(folder).__getitem__)
            else:
                model = exporter.open_model(folder, load_config(options.run / name, False))
            show(label, measure(model), folder)

        print("| weights | KL to 16-bit | perplexity | MB |")
        for label, folder, name in () if options.requantized_only else exact_rows(options.run):
            measured(label, folder, name)
        requantized: list[tuple[str, Callable[[], Path], str]] = [
            *((f"llama.cpp {kind}", lambda k=kind: llama_cpp(options.run, work, k), "gguf") for kind in LLAMA_TYPES),
            ("mlx_lm.convert", lambda: mlx(options.run, work), "mlx"),
            ("onnxruntime-genai builder", lambda: onnx(options.run, work), "onnx"),
        ]
        for label, make, name in requantized:
            measured(label, make(), name)
        if options.nncf:
            worker = [options.nncf, __file__, str(options.run), "--nncf-worker", str(options.run / "hf"), str(prepared)]
            output = subprocess.run(worker, stdout=subprocess.PIPE, text=True, check=True).stdout
            show("NNCF INT4_ASYM", json.loads(output.splitlines()[-1]), None)


if __name__ == "__main__":
    main()
