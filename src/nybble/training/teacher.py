"""The teacher's last hidden states: computed once, stored on disk, read in each training step.

Hidden states take D numbers per token where logits would take V, and the teacher's head turns them into exactly the
same logits. The states are one raw file [S, T, D] in the dtype of the model. A JSON file next to it says what they
were computed from, how many sequences are done, and the CRC-32 of these. An interrupted computation continues after the
last sequence that the JSON file names; states that do not have this size and checksum are computed again. Several
processes compute a batch each, and the first one writes them in the order of the sequences.

The file is written, not mapped, and its space is allocated first: a store to a mapped page for which the disk has no
space would end the process with SIGBUS.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from nybble import processes
from nybble.data.packing import token_fingerprint
from nybble.files import is_out_of_space, reporting_full_disk, write_text
from nybble.models.head import last_hidden_states
from nybble.models.streamed import forwards
from nybble.schema import SchemaError, from_json, read_json

_READ_BYTES = 1 << 24  # at a time, for the checksum


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
    source = _Source(token_fingerprint(input_ids, identity), [num_sequences, length, width], str(parameter.dtype))
    note_file = path.with_suffix(".json")
    row_bytes = length * width * parameter.dtype.itemsize
    progress = processes.on_first(lambda: _read_progress(path, note_file, source, row_bytes))
    advance(progress.done)
    batches = _computed_batches(model, input_ids[progress.done :], batch_size, path.parent)
    if not processes.is_first():
        for _ in batches:
            pass
    elif progress.done < num_sequences:
        path.parent.mkdir(parents=True, exist_ok=True)
        with reporting_full_disk(path), path.open("r+b" if progress.done else "wb") as file:
            _allocate(file, num_sequences * row_bytes)
            file.seek(progress.done * row_bytes)
            for states_NTD in batches:
                content = states_NTD.view(torch.uint8).numpy().tobytes()
                file.write(content)
                progress = _Progress(progress.done + len(states_NTD), zlib.crc32(content, progress.crc32))
                file.flush()
                if progress.done == num_sequences:
                    os.fsync(file.fileno())  # before the note: what it says has survived a power failure
                write_text(note_file, json.dumps(asdict(source) | asdict(progress)))
                advance(len(states_NTD))
    processes.wait()  # until the file is written
    return HiddenStates(path, (num_sequences, length, width), parameter.dtype)


def _computed_batches(model: Any, input_ids: Tensor, batch_size: int, folder: Path) -> Iterator[Tensor]:
    """States [N, T, D] of one batch after the other, on the CPU; several processes compute as many at a time.

    Args:
        folder: for temporary files.

    Yields: all batches in the first process, none in the others.
    """
    parameter, width = next(model.parameters()), model.get_output_embeddings().weight.shape[1]
    batches = input_ids.split(batch_size) if len(input_ids) else ()
    at = forwards(model, input_ids, batch_size, folder)
    for start in range(0, len(batches), processes.count()):
        together = batches[start : start + processes.count()]
        states_NTD = torch.zeros(*together[0].shape, width, dtype=parameter.dtype)  # the last round may lack some
        for i in processes.share(processes.count())[:1]:
            if i < len(together):
                with at((start + i) * batch_size):
                    states_NTD[: len(together[i])] = last_hidden_states(model, together[i].to(parameter.device)).cpu()
        for ids_NT, part_NTD in zip(together, processes.collect(states_NTD, "teacher states"), strict=False):
            yield part_NTD[: len(ids_NT)]


@dataclass(frozen=True)
class _Source:
    """What states were computed from."""

    tokens: str
    shape: list[int]
    dtype: str


@dataclass(frozen=True)
class _Progress:
    """The first sequences that are in the file, and their checksum."""

    done: int = 0
    crc32: int = 0


@dataclass(frozen=True)
class _Note(_Progress, _Source):
    """The JSON file."""


def _read_progress(path: Path, note_file: Path, source: _Source, row_bytes: int) -> _Progress:
    """What an earlier computation from the same source finished, as far as the file holds exactly that."""
    try:
        note = from_json(_Note, read_json(note_file))
    except SchemaError:
        return _Progress()
    progress = _Progress(note.done, note.crc32)
    same = (note.tokens, note.shape, note.dtype) == (source.tokens, source.shape, source.dtype)
    if not same or not 0 < progress.done <= source.shape[0] or not path.is_file():
        return _Progress()
    if path.stat().st_size != source.shape[0] * row_bytes:
        return _Progress()
    return progress if _checksum(path, progress.done * row_bytes) == progress.crc32 else _Progress()


def _checksum(path: Path, size: int) -> int:
    """CRC-32 of the first `size` bytes of a file."""
    crc = 0
    with path.open("rb") as file:
        while size and (content := file.read(min(size, _READ_BYTES))):
            crc, size = zlib.crc32(content, crc), size - len(content)
    return crc


def _allocate(file: BinaryIO, size: int) -> None:
    """Give a file its size, with space on the disk where the system can do that. OSError if there is too little."""
    if size and hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            if is_out_of_space(error):
                raise  # other errors: this file system cannot allocate
    file.truncate(size)
