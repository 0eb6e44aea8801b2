"""LlamaCppModel: an exported model in llama.cpp, with the interface of a transformers model.

llama.cpp multiplies 4-bit blocks with activations that it rounds to 8 bits, in all of its kernels. A strict model is
therefore a copy of the file whose weights are float32, in a temporary file without a name: the same graph, fields and
norms, computed as torch does in float32. That the weights are those of the blocks is checked by reading them.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nybble.errors import ExportError, describe_error
from nybble.export.gguf.file import GGUFContent, write_floats
from nybble.export.gguf.llama_cpp import LlamaContext, LlamaModel
from nybble.export.gguf.rope import SHORTEST_CONTEXT
from nybble.export.runtime_model import RuntimeModel


class LlamaCppModel(RuntimeModel):
    """An exported model on the CPU: forward returns logits, generate generates.

    Sequences of a batch are computed one after the other, as llama.cpp pads nothing.

    Args:
        path: the .gguf file.
        config: transformers configuration of the model.
        strict: compute in float32, from a temporary copy of 4 bytes a weight in the same folder.

    Raises:
        ExportError: llama.cpp cannot load the file, or the copy does not fit on the disk.
    """

    def __init__(self, path: Path, config: Any, strict: bool) -> None:
        super().__init__(path.parent, config)
        self._strict, self._long_rope = strict, config.rope_parameters.get("rope_type") == "longrope"
        self._context: LlamaContext | None = None
        if strict:
            # Gone as soon as it is closed, also after kill -9. llama.cpp has mapped it by then.
            with tempfile.TemporaryFile(dir=path.parent) as copy:
                self._llama = LlamaModel(_float32_copy(path, Path(f"/dev/fd/{copy.fileno()}")))
        else:
            self._llama = LlamaModel(path, repack=True)

    def reset(self) -> None:
        """Forget all tokens."""
        if self._context is not None:
            self._context.clear()

    def compute(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        """Compute logits of new tokens; those of padding are 0. See `RuntimeModel.compute`."""
        length, past = attention_mask.shape[1], attention_mask.shape[1] - input_ids.shape[1]
        size = max(SHORTEST_CONTEXT, 1 << (length - 1).bit_length())
        if not self._fits(len(input_ids), size, past):
            self._context = None  # its memory is needed for the next one, which computes all tokens again
            self._context, past = LlamaContext(self._llama, len(input_ids), size, self._strict), 0
        context = self._context
        assert context is not None
        positions = (attention_mask.cumsum(-1) - 1)[:, past:]
        mask, ids = attention_mask[:, past:].bool(), self._state_ids[:, past:]
        logits = torch.zeros(len(input_ids), length - past, self._llama.vocab_size)
        for i in range(len(input_ids)):
            if mask[i].any():
                rows = context.decode(i, ids[i, mask[i]].tolist(), positions[i, mask[i]].tolist())
                logits[i, mask[i]] = torch.from_numpy(rows)
        return logits[:, -input_ids.shape[1] :]

    def _fits(self, num_sequences: int, size: int, past: int) -> bool:
        """Whether the context can be used. Contexts cannot grow; sizes are powers of 2, so that few are made.

        longrope has frequencies for long contexts, which llama.cpp takes by the size of the context, and torch by the
        length of the text. A text that begins (`past` is 0) must therefore not get the long context of another one.
        """
        context = self._context
        if context is None or num_sequences > context.num_sequences or size > context.length:
            return False
        return size == context.length or past > 0 or not self._long_rope


def _float32_copy(path: Path, copy: Path) -> Path:
    """Write the model with float32 weights to `copy`, which is returned."""
    try:
        write_floats(GGUFContent(path), copy)
    except OSError as error:
        raise ExportError(
            f"--strict needs room for the weights of {path} in float32 in the same folder; it cannot be written "
            f"({describe_error(error)}); free some disk space, or measure without --strict"
        ) from error
    return copy
