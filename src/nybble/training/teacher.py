"""The teacher's last hidden states: computed once, stored on disk, read in each training step.

Hidden states take D numbers per token where logits would take V, and the teacher's head turns them into exactly the
same logits. The states are one raw file [S, T, D] in the dtype of the model. A JSON file next to it says what they
were computed from and how many sequences are done. An interrupted computation continues after the last sequence that
the JSON file names.
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
    """Hidden states [S, T, D] in a raw file.

    Every access maps the file and unmaps it again. The pages of a mapping that stays open count as memory of the
    process, and after one epoch that would be the whole file.

    Attributes:
        path: the raw file.
        shape: (S, T, D).
        dtype: dtype of the numbers in the file.
    """

    path: Path
    shape: tuple[int, int, int]
    dtype: torch.dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, sequences: int | slice | Tensor) -> Tensor:
        """Return a copy on the CPU of the states of one sequence [T, D] or of several [N, T, D]."""
        selected = self._map_file()[sequences]
        return selected if isinstance(sequences, Tensor) else selected.clone()  # indexing by a tensor copies already

    def __setitem__(self, sequences: slice, states_NTD: Tensor) -> None:
        self._map_file()[sequences] = states_NTD

    def _map_file(self) -> Tensor:
        size = math.prod(self.shape)
        return torch.from_file(str(self.path), shared=True, size=size, dtype=self.dtype).view(self.shape)


@torch.no_grad()
def teacher_hidden_states(
    path: Path,
    model: Any,
    input_ids: Tensor,
    batch_size: int,
    identity: str,
    advance: Callable[[int], None] = lambda sequences: None,
) -> HiddenStates:
    """Compute the last hidden states of all sequences, or continue an earlier computation.

    Args:
        path: raw file to write. The JSON file has the same name with the suffix .json.
        model: 16-bit transformers model with a base_model and output embeddings.
        input_ids: token ids [S, T], int64.
        batch_size: sequences per forward.
        identity: everything else that the states depend on, such as the fingerprint of the model. States that were
            computed from another identity, other tokens, another shape or another dtype are computed again.
        advance: called with the number of sequences that were just finished, and first with those that were on disk.

    Returns:
        The states [S, T, D] in the dtype of the model, where D is the input width of the head.
    """
    (num_sequences, length), width = input_ids.shape, model.get_output_embeddings().weight.shape[1]
    parameter = next(model.parameters())
    source = {
        "tokens": token_fingerprint(input_ids, identity),
        "shape": [num_sequences, length, width],
        "dtype": str(parameter.dtype),
    }
    progress_file = path.with_suffix(".json")
    done = _sequences_on_disk(path, progress_file, source)
    path.parent.mkdir(parents=True, exist_ok=True)
    states = HiddenStates(path, (num_sequences, length, width), parameter.dtype)
    advance(done)
    for start in range(done, num_sequences, batch_size):
        ids = input_ids[start : start + batch_size]
        states[start : start + batch_size] = last_hidden_states(model, ids.to(parameter.device)).to("cpu")
        temporary = progress_file.with_suffix(".tmp")
        temporary.write_text(json.dumps(source | {"done": start + len(ids)}))
        os.replace(temporary, progress_file)
        advance(len(ids))
    return states


def _sequences_on_disk(path: Path, progress_file: Path, source: dict[str, Any]) -> int:
    """Return how many sequences of this source an earlier computation finished."""
    if not (progress_file.exists() and path.exists()):
        return 0
    saved = json.loads(progress_file.read_text())
    done: int = saved.pop("done")
    return done if saved == source else 0
