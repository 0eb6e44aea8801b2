"""The teacher's last hidden states: computed once, kept on disk, read where they are needed.

They are exact (the logits are made from them again) and cost D numbers a token instead of V. One raw file [S, T, D] in the dtype of the
model, and beside it a JSON file that says how many sequences are done and of what; both grow together, so a killed run goes on.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nybble.data.packing import token_fingerprint
from nybble.models.head import last_hidden_states


@dataclass(frozen=True)
class HiddenStates:
    """Hidden states [S, T, D] in a file. What is taken of them is read at that moment, and the file is mapped no longer: pages of a mapping that lives on count
    as memory of the process, all of them once an epoch is over.

    Attributes:
        path: the raw file.
        shape, dtype: of the states.
    """

    path: Path
    shape: tuple[int, int, int]
    dtype: torch.dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, which: int | slice | Tensor) -> Tensor:
        """The states of one sequence [T, D] or of several [N, T, D], on the CPU."""
        taken = self._mapped()[which]
        return taken if isinstance(which, Tensor) else taken.clone()

    def __setitem__(self, which: slice, states: Tensor) -> None:
        self._mapped()[which] = states

    def _mapped(self) -> Tensor:
        return torch.from_file(str(self.path), shared=True, size=math.prod(self.shape), dtype=self.dtype).view(
            self.shape
        )


@torch.no_grad()
def teacher_hidden_states(
    path: Path,
    model: Any,
    input_ids: Tensor,
    batch: int,
    identity: str,
    advance: Callable[[int], None] = lambda sequences: None,
) -> HiddenStates:
    """Last hidden states of all sequences.

    Args:
        path: of the raw file; path.json lies beside it.
        model: the 16-bit model.
        input_ids: [S, T].
        batch: sequences in one forward.
        identity: what else the states depend on; a file made of something else is made anew.
        advance: called with the number of sequences that were just done.

    Returns: [S, T, D], in the dtype of the model.
    """
    (count, length), width = input_ids.shape, model.get_output_embeddings().weight.shape[1]
    dtype = next(model.parameters()).dtype
    sign = {"tokens": token_fingerprint(input_ids, identity), "shape": [count, length, width], "dtype": str(dtype)}
    note = path.with_suffix(".json")
    done = 0
    if note.exists() and path.exists():
        known = json.loads(note.read_text())
        done = known.pop("done")
        if known != sign:
            done = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    states = HiddenStates(path, (count, length, width), dtype)
    advance(done)
    device = next(model.parameters()).device
    for start in range(done, count, batch):
        part = input_ids[start : start + batch]
        states[start : start + batch] = last_hidden_states(model, part.to(device)).to("cpu")
        temporary = note.with_suffix(".tmp")
        temporary.write_text(json.dumps(sign | {"done": start + len(part)}))
        os.replace(temporary, note)
        advance(len(part))
    return states
