"""One compression by one tool: seconds, peak memory, perplexity and KL to the 16-bit model. See compress_vs_nncf.py.

It runs in nybble's environment and in NNCF's alike (there with PYTHONPATH=src: of nybble only what measures is used,
which needs nothing but torch). Both tools get the same float32 model, the same tokens, the same grid: 4 bits asymmetric
in groups of 64, embedding and head 8 bits.
"""

import argparse
import contextlib
import json
import resource
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from nybble.compression import calibration as compress_calibration
from nybble.evaluation.perplexity import logits_from_states, measure_sequences, model_logits
from nybble.models import selection
from nybble.models.head import LMHead

GROUP_SIZE = 64


def calibration(tokens: torch.Tensor, seed: int, samples: int, length: int) -> torch.Tensor:
    """Sequences [samples, length] chosen at random from the training text."""
    rows = tokens[: len(tokens) // length * length].view(-1, length)
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:samples]]


def by_nybble(model: Any, ids: torch.Tensor, method: str, seed: int) -> tuple[Any, float]:
    from nybble.compression import pipeline
    from nybble.qat import insert
    from nybble.quant.scheme import INT8_PER_ROW, QuantScheme
    from nybble.runtime import keep_freed_memory

    keep_freed_memory()  # as the command line does
    started = time.perf_counter()
    plan, scheme = selection.select_layers(model), QuantScheme(group_size=GROUP_SIZE)
    result = pipeline.compress(
        model, dict.fromkeys(plan.linears, scheme), method, compress_calibration.Calibration(ids, seed)
    )
    insert.quantize_embeddings(model, dict.fromkeys(plan.embeddings, INT8_PER_ROW))
    with torch.no_grad():
        for name, init in result.inits.items():
            model.get_submodule(name).weight.copy_(init.quantized(scheme).dequantize())
    return model, time.perf_counter() - started


def by_nncf(model: Any, ids: torch.Tensor, method: str, seed: int) -> tuple[Any, float]:
    """NNCF on torch; a method with gptq runs on OpenVINO, where alone NNCF has it (tracing is not counted)."""
    import nncf

    steps = method.split("+")
    wanted = {"awq": "awq" in steps or None, "scale_estimation": "se" in steps or None, "gptq": "gptq" in steps or None}
    examples: list[Any] = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in ids]
    if "gptq" in steps:
        model, examples = as_openvino(model, ids), [row[None].numpy() for row in ids]
    started = time.perf_counter()
    if method == "rtn":
        wanted, examples = {}, examples[:1]
    compressed = nncf.compress_weights(
        model,
        mode=nncf.CompressWeightsMode.INT4_ASYM,
        group_size=GROUP_SIZE,
        ratio=1.0,
        dataset=nncf.Dataset(examples),
        subset_size=len(examples),
        **wanted,
    )
    seconds = time.perf_counter() - started
    return (OpenVINO(compressed) if "gptq" in steps else compressed), seconds


def as_openvino(model: Any, ids: torch.Tensor) -> Any:
    import numpy as np
    import openvino

    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            length = input_ids.shape[1]
            hidden = torch.triu(torch.full((length, length), torch.finfo(torch.float32).min), 1)[
                None, None
            ]  # what transformers would make cannot be traced
            return self.model(
                input_ids=input_ids, attention_mask=hidden, position_ids=torch.arange(length)[None], use_cache=False
            ).logits

    model.set_attn_implementation("eager")
    with torch.no_grad(), contextlib.redirect_stdout(None):
        return openvino.convert_model(Plain(), example_input=ids[:1], input=[("input_ids", [-1, -1], np.int64)])


class OpenVINO:
    """A compiled model that answers like a transformers one, in float32."""

    device = torch.device("cpu")

    def __init__(self, model: Any) -> None:
        import openvino

        self.compiled = openvino.compile_model(
            model, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
        )

    def __call__(self, input_ids: torch.Tensor, use_cache: bool = False) -> Any:
        return argparse.Namespace(logits=torch.from_numpy(self.compiled([input_ids.numpy()])[0]))


def evaluate(model: Any, head: LMHead, folder: Path, texts: list[str]) -> dict[str, Any]:
    """Token perplexity and KL to the 16-bit model on each prepared text; model None = the 16-bit model itself."""
    result = {}
    for text in texts:
        tensors = load_file(folder / f"{text}.safetensors")
        teacher = logits_from_states(head, tensors["states"])
        measured = measure_sequences(
            model_logits(model, tensors["ids"]) if model is not None else teacher, tensors["ids"], teacher
        )
        result[text] = {"perplexity": measured["token_perplexity"], "kl": measured["kl_to_teacher"]}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--peer", choices=("nybble", "nncf"), required=True)
    parser.add_argument("--method", required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--folder", type=Path, required=True, help="what compress_vs_nncf.py prepared")
    parser.add_argument("--texts", nargs="+", default=["wiki16", "wiki64", "docs16"])
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()

    model: Any = (
        AutoModelForCausalLM.from_pretrained(options.folder / "model", dtype=torch.float32).eval().requires_grad_(False)
    )
    head = LMHead.of(model, copy=True)
    ids = calibration(
        load_file(options.folder / "train.safetensors")["ids"], options.seed, options.samples, options.length
    )
    result: dict[str, Any] = {key: getattr(options, key) for key in ("peer", "method", "seed", "samples", "length")}
    result["seconds"] = 0.0
    if options.method == "16bit":
        model = None
    else:
        model, result["seconds"] = (by_nybble if options.peer == "nybble" else by_nncf)(
            model, ids, options.method, options.seed
        )
    result["peak_gigabytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    result |= evaluate(model, head, options.folder, options.texts)
    temporary = options.out.with_suffix(".tmp")
    temporary.write_text(json.dumps(result))
    temporary.rename(options.out)


if __name__ == "__main__":
    main()
