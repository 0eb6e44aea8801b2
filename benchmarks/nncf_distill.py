"""NNCF's published distillation (FQ_LORA), measured. Runs in NNCF's environment.

Its compressed model, then KL to the 16-bit model over given tokens, as published: all sequences in every epoch, each
time in another random order, AdamW with a constant rate (adapters lr, ranges lr / 10, weight decay = lr), no clipping,
KL on all logits, gradients of microbatches summed. It computes in bfloat16 where that is fast, as published. Elsewhere
in float32, and one thing is changed in its favour: its bfloat16 adapters are made float32, like the model, because CPUs
without bfloat16 arithmetic take ten times as long over them (dev/log.md). `--steps` stops early, for timing alone.
"""

import argparse
import json
import resource
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from compress_worker import GROUP_SIZE, calibration, evaluate
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from nybble.models.device import has_bfloat16
from nybble.models.head import LMHead


def load(folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """The 16-bit model."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=dtype)
    return model.to(device).eval().requires_grad_(False)


def start(model: Any, ids: torch.Tensor, rank: int) -> Any:
    """awq+se on ids, with adapters."""
    import nncf

    examples = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in ids]
    return nncf.compress_weights(
        model,
        mode=nncf.CompressWeightsMode.INT4_ASYM,
        group_size=GROUP_SIZE,
        ratio=1.0,
        awq=True,
        scale_estimation=True,
        dataset=nncf.Dataset(examples),
        subset_size=len(examples),
        compression_format=nncf.CompressionFormat.FQ_LORA,
        advanced_parameters=nncf.AdvancedCompressionParameters(lora_adapter_rank=rank),
    )


def trainable(model: Any, lr: float) -> list[dict[str, Any]]:
    """Adapters and ranges of the 4-bit layers, as parameter groups."""
    from nncf.torch.function_hook.wrapper import get_hook_storage

    model.requires_grad_(False)
    adapters: list[torch.Tensor] = []
    ranges: list[torch.Tensor] = []
    for _, quantizer in get_hook_storage(model).named_hooks():
        if getattr(quantizer, "num_bits", 0) == 4:
            quantizer.enable_gradients()
            own = quantizer.get_adapters()
            if model.dtype == torch.float32:
                for adapter in own.values():
                    adapter.data = adapter.data.float()
            adapters += own.values()
            ranges += [parameter for name, parameter in quantizer.get_trainable_params().items() if name not in own]
    return [{"params": adapters, "lr": lr}, {"params": ranges, "lr": lr / 10}]


def batches(count: int, size: int, epochs: int, seed: int) -> list[torch.Tensor]:
    """Which sequences each step is made of: all of them in every epoch, each time in another order."""
    generator = torch.Generator().manual_seed(seed)
    return [batch for _ in range(epochs) for batch in torch.randperm(count, generator=generator).split(size)]


def peak_gigabytes(device: torch.device) -> float:
    """Largest memory so far: allocated on the GPU, or resident of this process."""
    peak = (
        torch.cuda.max_memory_allocated()
        if device.type == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    return peak / 1e9


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--calibrate", type=int, nargs=2, default=(128, 128), help="sequences and their length")
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--microbatch", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--folder", type=Path, required=True, help="what compress_vs_nncf.py prepared")
    parser.add_argument("--texts", nargs="*", default=["wiki16", "wiki64", "docs16"])
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    options = parse()
    tokens, device = load_file(options.folder / "train.safetensors")["ids"], torch.device(options.device)
    fast = has_bfloat16(device)
    dtype = torch.bfloat16 if options.dtype == "bfloat16" or (options.dtype == "auto" and fast) else torch.float32
    model = load(options.folder, dtype, device)
    head = LMHead.of(model, copy=True)
    rows = calibration(tokens, options.seed, options.samples, options.length)
    began = time.perf_counter()
    with torch.no_grad():
        states = [model.base_model(row[None].to(device), use_cache=False).last_hidden_state[0].cpu() for row in rows]
    taught = time.perf_counter()
    model = start(model, calibration(tokens, options.seed, *options.calibrate).to(device), options.rank)
    compressed = time.perf_counter()
    optimizer = torch.optim.AdamW(trainable(model, options.lr), weight_decay=options.lr)
    seconds, losses = [], []
    for batch in batches(len(rows), options.batch, options.epochs, options.seed)[: options.steps]:
        stepped, total = time.perf_counter(), 0.0
        for micro in batch.split(options.microbatch):
            q = F.log_softmax(model(rows[micro].to(device), use_cache=False).logits.flatten(0, 1).float(), dim=-1)
            with torch.no_grad():
                p = F.log_softmax(head.logits(torch.stack([states[i] for i in micro]).to(device).flatten(0, 1)), dim=-1)
            loss = F.kl_div(q, p, log_target=True, reduction="batchmean") * len(micro) / len(batch)
            loss.backward()
            total += float(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - stepped)
        losses.append(total)
        print(f"step {len(losses)}: KL {total:.4f}, {seconds[-1]:.1f} s", flush=True)
    settings = ("seed", "samples", "length", "rank", "lr", "batch", "microbatch", "epochs", "steps", "device")
    result: dict[str, Any] = {key: getattr(options, key) for key in settings}
    result["dtype"] = str(dtype).removeprefix("torch.")
    result |= {
        "teacher_seconds": taught - began,
        "start_seconds": compressed - taught,
        "step_seconds": seconds,
        "losses": losses,
    }
    result["peak_gigabytes"] = peak_gigabytes(device)
    print(f"median of a step {statistics.median(seconds):.1f} s", flush=True)
    # Measured in float32, like all: bfloat16 would add its own rounding to the KL.
    head = LMHead.of(load(options.folder, torch.float32, device), copy=True)
    temporary = options.out.with_suffix(".tmp")
    temporary.write_text(json.dumps(result | evaluate(model.float(), head, options.folder, options.texts)))
    temporary.rename(options.out)


if __name__ == "__main__":
    main()
