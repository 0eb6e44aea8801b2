"""BlockwiseForward: many sequences go through a model one block at a time, so a model on disk is read once for all.

    for each block:                    outputs = block(what the model passes it after the outputs of the block before)
    for each batch, as often as asked: model(batch), in which the last block returns the outputs that are known

Every step is a forward of the model itself, in which the blocks before the current one return what they returned
before. Masks, rotary embeddings and whatever the model does between its blocks are therefore those of the model, and
results have the bits of an ordinary forward. It fails where blocks exchange more than hidden states: `check_streamed`
compares with an ordinary forward.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import accumulate
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from nybble import processes
from nybble.errors import ModelError, NybbleError, RunError, describe_error
from nybble.models.head import last_hidden_states, measure_transform
from nybble.models.layers_on_disk import layers_on_disk

MAX_BYTES_IN_MEMORY = 512 << 20
"""Larger streams of hidden states are kept in temporary files."""

# Forwards of the same numbers by the same kernels; what blocks exchange beside hidden states changes far more.
_MAX_DIFFERENCE = 1e-4
_TRIED_TOKENS = 16


class BlockwiseForward:
    """Forwards of a model with some batches, whose blocks compute all of them when the first is asked for.

    Args:
        model: a transformers model on disk.
        batches: number of a batch -> its token ids [B, T], int64.
        folder: for temporary files. None: the system's.
    """

    def __init__(self, model: Any, batches: Mapping[int, Tensor], folder: Path | None = None) -> None:
        layers = layers_on_disk(model)
        assert layers is not None, "a model in memory needs no other forward"
        self._model, self._layers, self._batches, self._folder = model, layers, batches, folder
        ends = accumulate(ids.numel() for ids in batches.values())
        self._places = {i: slice(end - ids.numel(), end) for end, (i, ids) in zip(ends, batches.items(), strict=True)}
        self._outputs_ND: Tensor | None = None
        self._returns: list[Callable[[Tensor | None], Any]] = []  # for each block: hidden states -> what it returns

    @contextmanager
    def at(self, number: int) -> Iterator[None]:
        """Let the last block of the model return its outputs for a batch, in the forward of this very batch.

        Args:
            number: of the batch.
        """
        if self._outputs_ND is None:
            self._outputs_ND = self._run_blocks()
        with self._returning(len(self._layers.modules), self._stored(self._outputs_ND, number)):
            yield

    def _stored(self, stream_ND: Tensor, number: int) -> Tensor:
        shape = (*self._batches[number].shape, stream_ND.shape[-1])
        return stream_ND[self._places[number]].view(shape).to(self._layers.device)

    @torch.no_grad()
    def _run_blocks(self) -> Tensor:
        stream_ND: Tensor | None = None
        for i in range(len(self._layers.modules)):
            with self._layers.loaded(i):
                for number, place in self._places.items():
                    before = None if stream_ND is None or not i else self._stored(stream_ND, number)
                    output_BTD = self._output_of(i, self._batches[number], before)
                    if stream_ND is None:
                        shape = (sum(ids.numel() for ids in self._batches.values()), output_BTD.shape[-1])
                        stream_ND = new_stream(shape, output_BTD.dtype, self._folder)
                    stream_ND[place] = output_BTD.flatten(0, 1).cpu()
        assert stream_ND is not None
        return stream_ND

    def _output_of(self, i: int, ids: Tensor, before: Tensor | None) -> Tensor:
        """Output of block i; `before` is that of the block before it."""
        caught: list[Any] = []

        def catch(module: nn.Module, args: Any, output: Any) -> None:
            caught.append(output)
            raise _BlockReached

        handle = self._layers.modules[i].register_forward_hook(catch)
        try:
            with self._returning(i, before):
                self._model(input_ids=ids.to(self._layers.device), use_cache=False)
        except _BlockReached:
            pass
        finally:
            handle.remove()
        output = caught[0] if caught else None
        hidden = output[0] if isinstance(output, tuple | list) else output
        if not isinstance(hidden, Tensor) or hidden.shape[:-1] != ids.shape:
            raise _no_chain(self._model, i)
        if len(self._returns) == i:
            self._returns.append(_returns(output))
        return hidden

    @contextmanager
    def _returning(self, count: int, hidden: Tensor | None) -> Iterator[None]:
        """Let the first `count` blocks return hidden states instead of computing them."""
        with ExitStack() as stack:
            stack.enter_context(self._layers.bypassed(count))
            for block, returns in zip(self._layers.modules[:count], self._returns, strict=False):
                block.forward = _constant(returns(hidden))
                stack.callback(delattr, block, "forward")
            yield


class _BlockReached(Exception):
    """Ends a forward after a block."""


def _returns(output: Any) -> Callable[[Tensor | None], Any]:
    """A function from hidden states to an output of the same form as `output`, without anything else in it."""
    if not isinstance(output, tuple | list):
        return lambda hidden: hidden
    kind, rest = type(output), [None] * (len(output) - 1)
    return lambda hidden: kind([hidden, *rest])


def _constant(output: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: output


def forwards(model: Any, input_ids: Tensor, batch: int, folder: Path | None = None) -> Callable[[int], Any]:
    """Return a function from the index of the first sequence of a batch to a context for the forward of this batch.

    For a model in memory the context changes nothing. For one on disk, the blocks compute all batches of this process
    (`processes.share`) when the first context is entered.

    Args:
        model: a transformers model, or an exported one.
        input_ids: token ids [S, T], int64.
        batch: sequences in one forward.
        folder: for temporary files. None: the system's.
    """
    if not isinstance(model, nn.Module) or layers_on_disk(model) is None:
        return lambda start: nullcontext()
    batches = dict(enumerate(input_ids.split(batch)))
    own = {i: batches[i] for i in processes.share(len(batches))}
    calls = BlockwiseForward(model, own, folder)
    return lambda start: calls.at(start // batch) if start // batch in own else nullcontext()


@torch.no_grad()
def check_streamed(model: Any) -> None:
    """Refuse a model on disk that does not run with its blocks there, or whose blocks exchange more than hidden states;
    note weights that it changes (LayersOnDisk.changed).

    Args:
        model: a transformers model on disk.

    Raises:
        ModelError: as above.
    """
    layers = layers_on_disk(model)
    assert layers is not None, "a model in memory runs in one way only"
    count = model.get_input_embeddings().num_embeddings
    input_ids = ((torch.arange(2 * _TRIED_TOKENS) % count).view(2, _TRIED_TOKENS)).to(model.device)
    versions = {name: parameter._version for name, parameter in model.named_parameters()}
    try:
        expected = last_hidden_states(model, input_ids).float()
    except (NybbleError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the model's own code meets parameters that are not there
        raise ModelError(
            f"--offload disk needs a model that uses the weights of a decoder block in the forward of this block only; "
            f"{type(model).__name__} does not ({describe_error(error)}); use --offload none"
        ) from error
    layers.changed |= {n for n, parameter in model.named_parameters() if parameter._version != versions[n]}
    forward = BlockwiseForward(model, {0: input_ids})
    with forward.at(0):
        streamed = last_hidden_states(model, input_ids).float()
    with forward.at(0):  # what the blocks compute makes no difference here, and need not be computed again
        measure_transform(model, input_ids)
    finite = expected.isfinite()  # a model that overflows is refused later, for that
    difference, norm = (torch.where(finite, tensor, 0.0).norm(dim=-1) for tensor in (streamed - expected, expected))
    if not bool((difference <= _MAX_DIFFERENCE * norm).all()):
        raise _no_chain(model, None)


def _no_chain(model: Any, i: int | None) -> ModelError:
    which = "they are not" if i is None else f"block {i} is not"
    return ModelError(
        f"--offload disk needs decoder blocks that are a chain, each taking nothing but the hidden states of the one "
        f"before; in {model.config.model_type} {which}; use --offload none"
    )


def new_stream(shape: Sequence[int], dtype: torch.dtype, folder: Path | None) -> Tensor:
    """Return an uninitialized tensor for hidden states, in memory or in a temporary file that vanishes with it.

    Args:
        shape: of the tensor.
        dtype: of the tensor.
        folder: for the file. None: the system's.

    Raises:
        RunError: the disk is full.
    """
    count = torch.Size(shape).numel()
    size = count * dtype.itemsize
    if size <= MAX_BYTES_IN_MEMORY:
        return torch.empty(tuple(shape), dtype=dtype)
    # The name is deleted at once; the memory mapping keeps the data.
    with tempfile.NamedTemporaryFile(prefix="nybble-", dir=folder) as file:
        try:
            _reserve(file, size)
        except OSError as error:
            raise RunError(
                f"{folder or tempfile.gettempdir()} must have room for {size / 1e9:.1f} GB of hidden states; "
                f"{error.strerror}; free some, or use less text (--num_calibration_samples, --seq_len, --limit)"
            ) from error
        return torch.from_file(file.name, shared=True, size=count, dtype=dtype).view(tuple(shape))


def _reserve(file: IO[bytes], size: int) -> None:
    """Give a file its size. Where the system can, the space is allocated, so a full disk is an error now."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
    else:  # macOS, Windows
        file.truncate(size)
