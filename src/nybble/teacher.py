"""The teacher's last hidden states: computed once, kept on disk, read through a memory map.

They are exact (the logits are made from them again) and cost D numbers a token instead of V. One raw file [S, T, D] in the dtype of the
model, and beside it a JSON file that says how many sequences are done and of what; both grow together, so a killed run goes on.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nybble.losses import last_hidden


def fingerprint(input_ids: Tensor, identity: str) -> str:
    """Short hash of what the states depend on: the tokens and the model."""
    return hashlib.sha256(input_ids.numpy().tobytes() + identity.encode()).hexdigest()[:16]


@torch.no_grad()
def hidden_states(
    path: Path,
    model: Any,
    input_ids: Tensor,
    batch: int,
    identity: str,
    advance: Callable[[int], None] = lambda sequences: None,
) -> Tensor:
    """Last hidden states of all sequences.

    Args:
        path: of the raw file; path.json lies beside it.
        model: the 16-bit model.
        input_ids: [S, T].
        batch: sequences in one forward.
        identity: what else the states depend on; a file made of something else is made anew.
        advance: called with the number of sequences that were just done.

    Returns: [S, T, D], memory-mapped, in the dtype of the model, on the CPU.
    """
    (count, length), width = input_ids.shape, model.config.hidden_size
    dtype = next(model.parameters()).dtype
    sign = {"tokens": fingerprint(input_ids, identity), "shape": [count, length, width], "dtype": str(dtype)}
    note = path.with_suffix(".json")
    done = 0
    if note.exists() and path.exists():
        known = json.loads(note.read_text())
        done = known.pop("done")
        if known != sign:
            done = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    states = torch.from_file(str(path), shared=True, size=count * length * width, dtype=dtype).view(count, length, width)
    advance(done)
    device = next(model.parameters()).device
    for start in range(done, count, batch):
        part = input_ids[start : start + batch]
        states[start : start + batch] = last_hidden(model, part.to(device)).to("cpu")
        temporary = note.with_suffix(".tmp")
        temporary.write_text(json.dumps(sign | {"done": start + len(part)}))
        os.replace(temporary, note)
        advance(len(part))
    return states
