"""NNCF's published distillation (FQ_LORA) on given sequences, for peer_worker.py. Runs in NNCF's environment.

Its compressed model, then KL to the 16-bit model, as published: all sequences in every epoch, each time in another
random order, AdamW with a constant rate (adapters lr, ranges lr / 10, weight decay = lr), no clipping, KL on all
logits, gradients of microbatches summed. It computes in bfloat16 where that is fast, as published. Elsewhere in
float32, and one thing is changed in its favour: its bfloat16 adapters are made float32, like the model, because CPUs
without bfloat16 arithmetic take ten times as long over them (dev/log.md).
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
import torch.nn.functional as F

from nybble.models.device import has_bfloat16
from nybble.models.head import LMHead

RANK, LR = 128, 1e-4
BATCH, MICROBATCH = 16, 2


def start(model: Any, ids: torch.Tensor) -> Any:
    """awq+se on ids, with adapters."""
    import nncf

    examples = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in ids]
    return nncf.compress_weights(
        model,
        mode=nncf.CompressWeightsMode.INT4_ASYM,
        group_size=64,
        ratio=1.0,
        awq=True,
        scale_estimation=True,
        dataset=nncf.Dataset(examples),
        subset_size=len(examples),
        compression_format=nncf.CompressionFormat.FQ_LORA,
        advanced_parameters=nncf.AdvancedCompressionParameters(lora_adapter_rank=RANK),
    )


def trainable(model: Any) -> list[dict[str, Any]]:
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
    return [{"params": adapters, "lr": LR}, {"params": ranges, "lr": LR / 10}]


def distill(
    model: Any, rows: torch.Tensor, calibration: int, minutes: float, seed: int
) -> tuple[Any, float, dict[str, Any]]:
    """Compress on the first rows, then train on all of them, epoch after epoch (at most ten) until the time is over.

    Args:
        minutes: of the training; a step that began is finished.

    Returns: the trained model in float32, seconds in all, and facts about the training.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = model.to(device, torch.bfloat16 if has_bfloat16(device) else torch.float32)
    head, began = LMHead.of(model, copy=True), time.perf_counter()
    with torch.no_grad():
        states = [model.base_model(row[None].to(device), use_cache=False).last_hidden_state[0].cpu() for row in rows]
    model = start(model, rows[:calibration].to(device))
    optimizer = torch.optim.AdamW(trainable(model), weight_decay=LR)
    generator = torch.Generator().manual_seed(seed)
    seconds: list[float] = []
    losses: list[float] = []
    ended = time.perf_counter() + 60 * minutes
    for batch in (batch for _ in range(10) for batch in torch.randperm(len(rows), generator=generator).split(BATCH)):
        if time.perf_counter() > ended:
            break
        stepped, total = time.perf_counter(), 0.0
        for micro in batch.split(MICROBATCH if device.type == "cpu" else BATCH):
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
    facts: dict[str, Any] = {"steps": len(losses), "step_seconds": statistics.median(seconds), "losses": losses}
    # Measured in float32, like all: bfloat16 would add its own rounding to the KL.
    return model.float(), time.perf_counter() - began, facts
