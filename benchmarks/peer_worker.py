"""One job of peers.py in the environment of one tool: compress or train, then measure. Appends a line of JSON.

It runs in nybble's environment and in those of the peers alike. Of nybble it uses what measures (PYTHONPATH=src), which
needs nothing but torch and transformers. Every tool gets the same float32 model (SmolLM2's own 16-bit values) and the
same sequences, and is asked for 4 bits in groups of 64, asymmetric where it can choose. What is measured is the weights
that ship: every group of a 4-bit layer must have at most 16 distinct values, which is counted. AWQ folds are part of
the model.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from nybble.evaluation.perplexity import logits_from_states, measure_sequences, model_logits
from nybble.models.head import LMHead

GROUP_SIZE = 64
CALIBRATION = 128
"""Sequences for methods that calibrate."""


class Job(NamedTuple):
    """What a tool is asked to do, with which sequences [S, T] of the common text."""

    method: str
    folder: Path
    ids: torch.Tensor
    seed: int
    minutes: float

    @property
    def steps(self) -> list[str]:
        """The methods that make up awq+se+gptq."""
        return self.method.split("+")

    def work(self) -> Path:
        """A folder for what the tool writes."""
        path = self.folder / "work" / f"{self.method}-{self.seed}"
        path.mkdir(parents=True, exist_ok=True)
        return path

    def load(self) -> Any:
        """The 16-bit model, in float32."""
        model: Any = AutoModelForCausalLM.from_pretrained(self.folder / "model", dtype=torch.float32)
        return model.eval().requires_grad_(False)


class Done(NamedTuple):
    """A model to measure, the seconds of its making, and what else is told."""

    model: Any
    seconds: float
    facts: dict[str, Any]


def by_nybble(job: Job) -> Done:
    """nybble's own commands on the sequences as a file of tokens."""
    from nybble import api
    from nybble.models.quantized_model import load_quantized

    common: dict[str, Any] = {
        "pretrained": str(job.folder / "model"), "data": (str(job.folder / f"train-{job.seed}.safetensors"),),
        "eval_data": (str(job.folder / "held-out"),), "other_data": (), "seq_len": job.ids.shape[1],
        "eval_tasks": (), "export": (), "num_test_samples": 4, "seed": job.seed, "dtype": "float32",
        "num_calibration_samples": CALIBRATION, "output_dir": str(job.work() / "run"), "overwrite": True,
    }  # fmt: skip
    if job.method == "quick":
        import tomllib

        recipe = tomllib.loads((Path(__file__).parents[1] / "recipes" / "quick.toml").read_text())
        run = api.distill(**recipe | common | {"num_train_samples": len(job.ids), "report_to": ()})
    else:
        run = api.compress(**common, method=job.method)
    results = run.results
    seconds = sum(results.seconds.get(stage, 0.0) for stage in ("teacher", "compress", "train", "absorb"))
    model, _, _ = load_quantized(run.path / "quantized", torch.float32)
    return Done(model, seconds, {"bits": results.layers and results.layers.bits_per_weight})


def by_nncf(job: Job) -> Done:
    """NNCF on torch; a method with gptq runs on OpenVINO, where alone NNCF has it (tracing is not counted)."""
    import nncf

    if job.method == "distill":
        from nncf_distill import distill

        return Done(*distill(job.load(), job.ids, CALIBRATION, job.minutes, job.seed))
    model, rows, names = job.load(), job.ids[:CALIBRATION], {"awq": "awq", "scale_estimation": "se", "gptq": "gptq"}
    wanted: dict[str, Any] = {option: step in job.steps or None for option, step in names.items()}
    examples: list[Any] = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in rows]
    if "gptq" in job.steps:
        model, examples = as_openvino(model, rows), [row[None].numpy() for row in rows]
    if job.method == "rtn":
        wanted, examples = {}, examples[:1]
    started = time.perf_counter()
    compressed = nncf.compress_weights(
        model, mode=nncf.CompressWeightsMode.INT4_ASYM, group_size=GROUP_SIZE, ratio=1.0,
        dataset=nncf.Dataset(examples), subset_size=len(examples), **wanted,
    )  # fmt: skip
    seconds = time.perf_counter() - started
    return Done(OpenVINO(compressed) if "gptq" in job.steps else compressed, seconds, {})


def as_openvino(model: Any, ids: torch.Tensor) -> Any:
    """The model in OpenVINO."""
    import numpy as np
    import openvino

    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            length = input_ids.shape[1]
            # What transformers would make cannot be traced.
            hidden = torch.triu(torch.full((length, length), torch.finfo(torch.float32).min), 1)[None, None]
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

        settings = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
        self.compiled = openvino.compile_model(model, "CPU", settings)

    def __call__(self, input_ids: torch.Tensor, use_cache: bool = False) -> Any:
        return argparse.Namespace(logits=torch.from_numpy(self.compiled([input_ids.numpy()])[0]))


def by_autoround(job: Job) -> Done:
    """AutoRound, W4G64 asymmetric, by the iterations of its recipes; embedding and head stay in 16 bits."""
    from auto_round import AutoRound

    iterations, rate = {"rtn": (0, None), "light": (50, 5e-3), "default": (200, None), "best": (1000, None)}[job.method]
    batches = [{"input_ids": rows, "attention_mask": torch.ones_like(rows)} for rows in job.ids[:CALIBRATION].split(8)]
    tokenizer = AutoTokenizer.from_pretrained(job.folder / "model")
    started = time.perf_counter()
    rounding = AutoRound(
        job.load(), tokenizer, scheme="W4A16", group_size=GROUP_SIZE, sym=False, iters=iterations, dataset=batches,
        nsamples=CALIBRATION, seqlen=job.ids.shape[1], batch_size=8, device_map="cpu", seed=job.seed,
        enable_torch_compile=False, **({} if rate is None else {"lr": rate}),
    )  # fmt: skip
    model, _ = rounding.quantize()
    return Done(model.float().eval(), time.perf_counter() - started, {})


def by_gptqmodel(job: Job) -> Done:
    """GPTQModel, asymmetric."""
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    options = QuantizeConfig(bits=4, group_size=GROUP_SIZE, sym=False)
    started = time.perf_counter()
    model = GPTQModel.load(str(job.folder / "model"), options)
    model.quantize([{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in job.ids[:CALIBRATION]])
    seconds = time.perf_counter() - started
    folder = job.work() / "model"
    model.save(str(folder))
    shipped = GPTQModel.load(str(folder), backend=BACKEND.TORCH, device="cpu")
    return Done(shipped.model.float().eval(), seconds, {})


def by_llmcompressor(job: Job) -> Done:
    """llm-compressor, W4A16_ASYM in groups of 64."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier

    weights = QuantizationArgs(num_bits=4, group_size=GROUP_SIZE, strategy="group", symmetric=False)
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
    modifiers = {"gptq": GPTQModifier, "rtn": QuantizationModifier}
    recipe = [modifiers[step](config_groups=groups, ignore=["lm_head"]) for step in job.steps if step in modifiers]
    if "awq" in job.steps:
        from llmcompressor.modifiers.awq import AWQModifier

        recipe.insert(0, AWQModifier(config_groups=groups, ignore=["lm_head"]))
    rows = job.ids[:CALIBRATION]
    data = Dataset.from_dict({"input_ids": rows.tolist(), "attention_mask": torch.ones_like(rows).tolist()})
    started = time.perf_counter()
    model = oneshot(
        model=job.load(), dataset=data, recipe=recipe, num_calibration_samples=CALIBRATION,
        max_seq_length=rows.shape[1],
    )  # fmt: skip
    return Done(model.eval(), time.perf_counter() - started, {})


def by_mlx(job: Job) -> Done:
    """mlx-lm: affine with 16-bit scales and biases, which dwq trains; the embedding too, in 8 bits by rtn8 and dwq8."""
    import mlx.core as mx
    import mlx.optimizers as optimizers
    from mlx_lm.quant.dwq import compute_dwq_targets, dwq_quantize
    from mlx_lm.utils import load, quantize_model

    mx.random.seed(job.seed)
    started = time.perf_counter()
    model, _, config = load(str(job.folder / "model"), return_config=True)
    data = [(row.tolist(), 0) for row in job.ids]
    valid, targets = data[-8:], job.work() / "targets"
    if job.method != "rtn":
        compute_dwq_targets(model, targets, data[:-8], valid, 4, job.ids.shape[1], job.seed)
    kept = {"rtn8", "dwq8"}  # these keep the embedding in 8 bits, as nybble and NNCF do
    predicate = (
        (lambda path, _: {"group_size": GROUP_SIZE, "bits": 8} if "embed" in path else True)
        if job.method in kept
        else None
    )
    model, _ = quantize_model(model, config, GROUP_SIZE, 4, quant_predicate=predicate)
    if "dwq" in job.method:

        def target(_: Any, i: int, split: str) -> tuple[Any, Any]:
            stored = mx.load(str(targets / split / f"{i:010d}.safetensors"))
            return stored["logits"], stored["indices"]

        optimizer = optimizers.Adam(learning_rate=1e-6, bias_correction=True)
        dwq_quantize(model, target, optimizer, data[:-8], valid, 4, job.ids.shape[1], job.seed)
    seconds = time.perf_counter() - started
    return Done(from_mlx(model, job.load()), seconds, {"mlx_peak_gigabytes": mx.get_peak_memory() / 1e9})


def from_mlx(source: Any, model: Any) -> Any:
    """The torch model with the weights that mlx dequantizes."""
    import mlx.core as mx
    import numpy as np

    state = dict(model.named_parameters())
    for name, module in source.named_modules():
        if hasattr(module, "scales"):
            values = mx.dequantize(
                module.weight, module.scales.astype(mx.float32), module.biases.astype(mx.float32), module.group_size,
                module.bits,
            )  # fmt: skip
            state[f"{name}.weight"].data.copy_(torch.from_numpy(np.array(values.astype(mx.float32))))
    return model


TOOLS: dict[str, Callable[[Job], Done]] = {
    "nybble": by_nybble,
    "nncf": by_nncf,
    "autoround": by_autoround,
    "gptqmodel": by_gptqmodel,
    "llmcompressor": by_llmcompressor,
    "mlx": by_mlx,
}


def levels(model: Any) -> dict[str, int]:
    """Linear layers of the decoder whose weights are numbers, not packed codes; those with 16 values in every group."""
    counts = {"linears": 0, "in_16_levels": 0}
    for name, module in model.named_modules() if isinstance(model, torch.nn.Module) else ():
        weight = getattr(module, "weight", None)
        if (
            ".layers." in name
            and isinstance(module, torch.nn.Linear)
            and weight is not None
            and weight.is_floating_point()
        ):
            counts["linears"] += 1
            groups = weight.detach().float().reshape(-1, GROUP_SIZE).sort(1).values
            counts["in_16_levels"] += int((groups.diff(dim=1) > 0).sum(1).max()) < 16
    return counts


def evaluate(model: Any, head: LMHead, folder: Path, texts: list[str]) -> dict[str, Any]:
    """Token perplexity and KL to the 16-bit model on each prepared text; model None = the 16-bit model itself."""
    result = {}
    for text in texts:
        tensors = load_file(folder / f"{text}.safetensors")
        teacher = logits_from_states(head, tensors["states"])
        with torch.no_grad():
            logits = teacher if model is None else model_logits(model, tensors["ids"])
            measured = measure_sequences(logits, tensors["ids"], teacher)
        result[text] = {"perplexity": measured["token_perplexity"], "kl": measured["kl_to_teacher"]}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--job", required=True, help="TOOL:METHOD")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--minutes", type=float, default=25, help="a training by NNCF ends after them")
    parser.add_argument("--folder", type=Path, required=True, help="what peers.py prepared")
    parser.add_argument("--texts", nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    tool, method = options.job.split(":")
    ids = load_file(options.folder / f"train-{options.seed}.safetensors")["ids"].long()[: options.samples]
    job = Job(method, options.folder, ids, options.seed, options.minutes)
    began = time.process_time()
    done = Done(None, 0.0, {}) if method == "16bit" else TOOLS[tool](job)
    row: dict[str, Any] = {key: getattr(options, key) for key in ("job", "seed", "samples")}
    row |= {"length": ids.shape[1], "seconds": done.seconds, "cpu_seconds": time.process_time() - began} | done.facts
    row["peak_gigabytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    device = getattr(done.model, "device", torch.device("cpu"))
    head = LMHead.of(job.load().to(device))
    row |= levels(done.model) | evaluate(done.model, head, options.folder, options.texts)
    with options.out.open("a") as file:
        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
