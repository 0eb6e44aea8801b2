"""The decoder as a chain of blocks that run one at a time, and what goes through them.

    hidden_0 = embedding(tokens)        hidden_{i+1} = block_i(hidden_i)

Up to two streams are kept for all calibration sequences, as they stand before one block: `full`, made by the 16-bit blocks, and, where blocks are
trained on it, `quantized`, made by the blocks compressed so far. Memory: S x T x D numbers each on the CPU, in a temporary file above
`IN_MEMORY` bytes; inside a block, one microbatch. On a GPU only the block at hand is there; the rest of the model waits on the CPU.

What a block needs beside its hidden states (masks, rotary embeddings) is taken from one forward of the whole model. That the chain gives the
model's own numbers, and needs nothing else that depends on the tokens, is checked (`check_chain`), so a family whose blocks exchange
more than hidden states is an error and not a wrong result.

Statistics of a layer's input x in the 16-bit model:      gram = mean over all tokens of x x^T
(Inputs that have come through the compressed blocks are no better, and cost another pass: docs/log.md.)
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nybble.errors import ModelError, RunError
from nybble.quant.grid import at_least_float32

# Streams larger than this live in temporary files.
IN_MEMORY = 512 << 20


@dataclass(frozen=True)
class InputStatistics:
    """Second moments of the input that some layers share.

    Attributes:
        layers: names of the layers, within the block.
        gram_II: see the head of this file; float32 (float64 of a float64 model).
    """

    layers: tuple[str, ...]
    gram_II: Tensor


class DecoderBlocks:
    """The blocks of a model and both streams.

    Args:
        model: a transformers model.
        names: layers that get 4 bits.
        input_ids: [S, T], all sequences of one length.
        batch: sequences in one forward.
        with_quantized: keep the stream `quantized`.
        folder: for temporary files; None = the system's.

    Blocks are run on the device that the model is on now. If that is not the CPU, the model goes to the CPU; `at_hand` brings one block back.

    Raises:
        ModelError: there is no chain of blocks, or it does not give the model's own hidden states.
        RunError: the disk is full.
    """

    def __init__(
        self,
        model: Any,
        names: Sequence[str],
        input_ids: Tensor,
        batch: int,
        with_quantized: bool = True,
        folder: Path | None = None,
    ) -> None:
        self.model, self.batch, self._folder = model, batch, folder
        self.device, self.dtype = model.device, model.dtype
        path = find_block_list(model, names)
        self.modules: list[nn.Module] = list(model.get_submodule(path))
        self.prefixes = [f"{path}.{i}." for i in range(len(self.modules))]
        self.layers = [
            [name.removeprefix(prefix) for name in names if name.startswith(prefix)] for prefix in self.prefixes
        ]
        self._arguments, _ = record_blocks(model, self.modules, input_ids[:1].to(self.device))
        self.full = self._store(input_ids)
        for part in self.batches():
            self.full[part] = self._first_inputs(input_ids[part].to(self.device)).cpu()
        self.quantized = self._store(input_ids).copy_(self.full) if with_quantized else None
        model.to("cpu")

    @contextmanager
    def at_hand(self, i: int) -> Iterator[nn.Module]:
        """Block i on the device; afterwards it is back on the CPU."""
        try:
            yield self.modules[i].to(self.device)
        finally:
            self.modules[i].to("cpu")

    def _store(self, input_ids: Tensor) -> Tensor:
        shape = (*input_ids.shape, self.model.config.hidden_size)
        count = input_ids.numel() * shape[-1]
        if count * self.dtype.itemsize <= IN_MEMORY:
            return torch.empty(shape, dtype=self.dtype)
        with tempfile.NamedTemporaryFile(
            prefix="nybble-", dir=self._folder
        ) as file:  # deleted at once; the mapping lives on
            try:
                os.posix_fallocate(
                    file.fileno(), 0, count * self.dtype.itemsize
                )  # a full disk is an error now and not a crash later
            except OSError as error:
                raise RunError(
                    f"{self._folder or tempfile.gettempdir()} must have room for {count * self.dtype.itemsize / 1e9:.1f} GB of calibration; {error.strerror}; "
                    "free some, or use fewer --calib_samples"
                ) from error
            return torch.from_file(file.name, shared=True, size=count, dtype=self.dtype).view(shape)

    @torch.no_grad()
    def _first_inputs(self, input_ids: Tensor) -> Tensor:
        caught: list[Tensor] = []

        class Caught(Exception):
            pass

        def catch(module: nn.Module, args: Any, kwargs: Any) -> None:
            caught.append(args[0] if args else kwargs["hidden_states"])
            raise Caught

        handle = self.modules[0].register_forward_pre_hook(catch, with_kwargs=True)
        try:
            self.model.base_model(input_ids=input_ids, use_cache=False)
        except Caught:
            pass
        finally:
            handle.remove()
        return caught[0]

    def run(self, i: int, hidden_BTD: Tensor) -> Tensor:
        """Block i on a batch of hidden states on the device."""
        args, kwargs = self._arguments[i]
        return _first(self.modules[i](hidden_BTD, *args, **kwargs))

    def batches(self) -> Iterator[slice]:
        return (slice(start, start + self.batch) for start in range(0, len(self.full), self.batch))

    @torch.no_grad()
    def advance_full(self, i: int) -> None:
        """Send the full stream through block i, which must still be the 16-bit one."""
        for part in self.batches():
            self.full[part] = self.run(i, self.full[part].to(self.device)).cpu()

    @torch.no_grad()
    def advance_quantized(self, i: int) -> None:
        """Send the quantized stream through block i, as it now is."""
        assert self.quantized is not None
        for part in self.batches():
            self.quantized[part] = self.run(i, self.quantized[part].to(self.device)).cpu()

    @torch.no_grad()
    def observe(self, i: int) -> list[InputStatistics]:
        """`advance_full`, and statistics of the inputs of the layers of block i; layers called with the same tensor share them.

        Raises:
            ModelError: a layer's input is not finite (it is named).
        """
        grams: dict[tuple[str, ...], Tensor] = {}
        tokens = self.full.shape[0] * self.full.shape[1]
        for part in self.batches():
            with self._inputs(i) as inputs:
                self.full[part] = self.run(i, self.full[part].to(self.device)).cpu()
            for layers, x_NI in _grouped(inputs).items():
                x_NI = at_least_float32(x_NI)
                if layers not in grams:
                    grams[layers] = x_NI.new_zeros(x_NI.shape[-1], x_NI.shape[-1])
                _add_lower(grams[layers], x_NI, 1 / tokens)
        for layers, gram_II in grams.items():
            if not bool(gram_II.isfinite().all()):
                raise ModelError(
                    f"the inputs of {self.prefixes[i]}{layers[0]} must be finite; they are not on this text; {nonfinite_remedy(self.dtype)}"
                )
        return [InputStatistics(layers, gram_II.tril() + gram_II.tril(-1).T) for layers, gram_II in grams.items()]

    @contextmanager
    def _inputs(self, i: int) -> Iterator[dict[str, Tensor]]:
        """Layer -> its inputs [N, I] of what runs inside."""
        seen: dict[str, Tensor] = {}

        def see(name: str) -> Callable[[nn.Module, Any], None]:
            return lambda module, args: seen.update({name: args[0].flatten(0, -2)})

        handles = [self.modules[i].get_submodule(name).register_forward_pre_hook(see(name)) for name in self.layers[i]]
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()


def _add_lower(gram_II: Tensor, x_NI: Tensor, factor: float) -> None:
    """gram += factor * x^T x, in place, of which only the blocks on and below the diagonal are made: 5/8 of the work."""
    for start, end in pairwise(len(gram_II) * quarter // 4 for quarter in range(5)):
        gram_II[start:end, :end].addmm_(x_NI[:, start:end].T, x_NI[:, :end], alpha=factor)


@torch.no_grad()
def record_blocks(
    model: Any, modules: Sequence[nn.Module], input_ids: Tensor
) -> tuple[list[tuple[Any, Any]], list[Tensor]]:
    """Everything but the hidden states that each block is called with, and the hidden states before each and after the last, from one forward of the whole
    model; checks the chain."""
    arguments: list[tuple[Any, Any]] = []
    states: list[Tensor] = []

    def record(module: nn.Module, args: Any, kwargs: Any) -> None:
        kwargs = dict(kwargs)
        states.append(args[0] if args else kwargs.pop("hidden_states"))
        arguments.append((args[1:], kwargs))

    handles = [module.register_forward_pre_hook(record, with_kwargs=True) for module in modules]
    handles.append(modules[-1].register_forward_hook(lambda module, args, output: states.append(_first(output))))
    try:
        model.base_model(input_ids=input_ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    for i, (before, after) in enumerate(pairwise(states)):
        if not bool(after.isfinite().all()):
            where = _first_broken(modules[i], arguments[i], before) or "what it adds up"
            raise ModelError(
                f"the outputs of block {i} ({where}) must be finite; they are not on this text; {nonfinite_remedy(model.dtype)}"
            )
        if not block_gives(modules[i], arguments[i], before, after):
            raise no_chain_error(model, i)
    return arguments, states


def block_gives(block: nn.Module, arguments: tuple[Any, Any], before: Tensor, after: Tensor) -> bool:
    """Whether a block makes these hidden states of those: each token of them, since some are a thousand times larger than others."""
    args, kwargs = arguments
    difference = (_first(block(before, *args, **kwargs)) - after).float().norm(dim=-1)
    return bool((difference <= 1e-2 * after.float().norm(dim=-1)).all())


def _first_broken(block: nn.Module, arguments: tuple[Any, Any], before: Tensor) -> str | None:
    """The first module inside a block whose outputs are not finite."""
    found: list[str] = []

    def check(name: str) -> Callable[[nn.Module, Any, Any], None]:
        return lambda module, args, output: None if bool(_first(output).isfinite().all()) else found.append(name)

    handles = [
        module.register_forward_hook(check(name))
        for name, module in block.named_modules()
        if not list(module.children())
    ]
    try:
        block(before, *arguments[0], **arguments[1])
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def nonfinite_remedy(dtype: torch.dtype) -> str:
    """What to do about numbers that are not finite."""
    return "the model's weights or this text are broken" if dtype == torch.float32 else "use --dtype float32"


def get_linear(block: nn.Module, name: str) -> nn.Linear:
    """A linear layer of a block."""
    return block.get_submodule(name)  # type: ignore[return-value]


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output  # type: ignore[no-any-return]


def _grouped(inputs: dict[str, Tensor]) -> dict[tuple[str, ...], Tensor]:
    groups: dict[int, list[str]] = {}
    for name, x_NI in inputs.items():
        groups.setdefault(x_NI.data_ptr(), []).append(name)
    return {tuple(names): inputs[names[0]] for names in groups.values()}


def find_block_list(model: Any, names: Sequence[str]) -> str:
    """Path of the module list that holds most of the layers."""
    lists: dict[str, int] = {
        path: sum(name.startswith(path + ".") for name in names)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
    }
    if not lists or not max(lists.values()):
        raise ModelError(
            f"{type(model).__name__} must keep its decoder blocks in one nn.ModuleList; it does not; use the method rtn"
        )
    return max(lists, key=lambda path: (lists[path], -len(path)))


def no_chain_error(model: Any, i: int) -> ModelError:
    return ModelError(
        f"the blocks of {model.config.model_type} must be a chain, each taking nothing but the hidden states of the one before; "
        f"block {i} is not; use the method rtn"
    )
