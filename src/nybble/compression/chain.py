"""The decoder as a chain of blocks, each of which takes only the hidden states of the one before.

A method that compresses block by block needs such a chain. `record_blocks` finds out with what else each block is
called, and `check_chain` refuses a model whose blocks exchange more than hidden states.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from nybble.errors import ModelError, first_line
from nybble.models.layers_on_disk import layers_on_disk

# Largest difference between a block's output and the model's own hidden state, relative to the norm of the token's
# state. Rounding in 16 bits stays well below; a block that lacks an argument is far above.
_MAX_BLOCK_DIFFERENCE = 1e-2
# What torch says of tensors of different dtypes, and of operations that a dtype does not have.
_DTYPE_ERRORS = ("dtype", "scalar type", "not implemented for")


class NoChainError(ModelError):
    """The decoder blocks are no chain, so that no method can compress one after the other."""


# Positional and keyword arguments of a block, without the hidden states.
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class BlockRecord:
    """What one forward of the model passes through its blocks.

    Attributes:
        arguments: of each block, without the hidden states.
        hidden: hidden states [B, T, D] before each block and after the last.
    """

    arguments: list[Arguments]
    hidden: list[Tensor]


@contextmanager
def first_forward(model: Any) -> Iterator[None]:
    """Compute with a model for the first time.

    Raises:
        ModelError: it cannot compute in its dtype (Reformer adds float32 positions to bfloat16); or it has changed its
            weights, which are to be saved again (RWKV does so when it first computes).
    """
    versions = {name: parameter._version for name, parameter in model.named_parameters()}
    try:
        yield
    except RuntimeError as error:
        if model.dtype == torch.float32 or not any(words in str(error) for words in _DTYPE_ERRORS):
            raise
        raise ModelError(
            f"{type(model).__name__} must compute in {str(model.dtype).removeprefix('torch.')}; it does not "
            f"({first_line(error)}); use --dtype float32"
        ) from error
    changed = [name for name, parameter in model.named_parameters() if parameter._version != versions[name]]
    layers = layers_on_disk(model)
    changed += [] if layers is None else sorted(layers.changed)
    if changed:
        raise ModelError(
            f"{type(model).__name__} must leave its weights as they are when it computes; it changes {len(changed)} of "
            f"them (first: {changed[0]}), and would change what is saved again; the model cannot be compressed"
        )


@torch.no_grad()
def check_chain(model: Any, names: Sequence[str], input_ids: Tensor) -> None:
    """Refuse a model whose blocks exchange more than hidden states. Two sequences go through the model.

    Everything else that a block is called with must be the same for both sequences, and must also fit a batch of both.

    Args:
        model: a transformers model.
        names: paths of the layers that get 4 bits.
        input_ids: [2, T] token ids, two different sequences.

    Raises:
        NoChainError: the blocks are no chain.
        ModelError: their outputs are not finite.
    """
    modules = list(model.get_submodule(find_block_list(model, names)))
    one, two = (row[None].to(model.device) for row in input_ids)
    first = record_blocks(model, modules, one)
    unlike: list[int] = []

    def try_both(i: int, arguments: Arguments, before: Tensor, after: Tensor) -> None:
        both = (torch.cat([first.hidden[j], tensor]) for j, tensor in ((i, before), (i + 1, after)))
        try:
            if not (_equal(first.arguments[i], arguments) and reproduces_output(modules[i], arguments, *both)):
                unlike.append(i)
        except (RuntimeError, ValueError):  # the arguments of one sequence do not fit a batch of two
            unlike.append(i)

    record_blocks(model, modules, two, try_both)
    if unlike:
        raise no_chain_error(model, min(unlike))


@torch.no_grad()
def record_blocks(
    model: Any,
    modules: Sequence[nn.Module],
    input_ids: Tensor,
    on_block: Callable[[int, Arguments, Tensor, Tensor], None] | None = None,
) -> BlockRecord:
    """Record what one forward of the whole model passes through its blocks, and check that the blocks reproduce it.

    Blocks are tried in the forward of the model, right after their own: those on disk are read once.

    Args:
        model: a transformers model.
        modules: its decoder blocks.
        input_ids: [B, T] token ids on the device of the model.
        on_block: called with the number of a block, its arguments, and the hidden states before and after it, if the
            block reproduces them.

    Raises:
        NoChainError: the blocks are not called once each in their order, or one does not reproduce the model's own
            hidden states.
        ModelError: a block's outputs are not finite.
    """
    recorder = _Recorder(modules, on_block)
    with recorder.attached():
        model.base_model(input_ids=input_ids, use_cache=False)
    arguments, hidden, called = recorder.arguments, recorder.hidden, recorder.called
    for i, module in enumerate(modules):  # HRM calls its blocks several times
        if called[i : i + 1] != [module] or not isinstance(hidden[i], Tensor):
            raise no_chain_error(model, i)
    if len(called) > len(modules) or not isinstance(hidden[-1], Tensor):
        raise no_chain_error(model, len(modules) - 1)
    for i, (before, after) in enumerate(pairwise(hidden)):
        if not bool(after.isfinite().all()):
            where = _first_nonfinite(modules[i], arguments[i], before) or "the sum with its inputs"
            raise ModelError(
                f"the outputs of block {i} ({where}) must be finite; they are not on this text; "
                f"{nonfinite_remedy(model.dtype)}"
            )
        if not recorder.reproduced[i]:
            raise no_chain_error(model, i)
    return BlockRecord(arguments, hidden)


class _Recorder:
    """Hooks that record how blocks are called, and run each a second time right after the model has.

    Args:
        modules, on_block: see record_blocks.

    Attributes:
        arguments, hidden: as in BlockRecord, in the order of the calls.
        called: the blocks, in the order of the calls.
        reproduced: for each call, whether the second run gives what the model passes on to the next block.
    """

    def __init__(
        self, modules: Sequence[nn.Module], on_block: Callable[[int, Arguments, Tensor, Tensor], None] | None
    ) -> None:
        self.modules, self.on_block = modules, on_block
        self.arguments: list[Arguments] = []
        self.hidden: list[Tensor] = []
        self.called: list[nn.Module] = []
        self.reproduced: list[bool] = []
        self._again: Tensor | None = None
        self._in_second_run = False

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Record the forwards inside the context."""
        handles = []
        for module in self.modules:
            handles.append(module.register_forward_pre_hook(self._before, with_kwargs=True))
            # Before the hook that lets a block on disk go.
            handles.append(module.register_forward_hook(self._after, prepend=True))
        handles.append(self.modules[-1].register_forward_hook(self._finish))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self._in_second_run:
            return
        kwargs = dict(kwargs)
        hidden = args[0] if args else kwargs.pop("hidden_states", None)
        if self.called:
            self._compare(hidden)
        self.hidden.append(hidden)
        self.arguments.append((args[1:], kwargs))
        self.called.append(module)

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._in_second_run:
            return
        i, before, after = len(self.called) - 1, self.hidden[-1], first_output(output)
        self._in_second_run = True
        try:
            self._again = _run_again(module, self.arguments[i], before) if isinstance(before, Tensor) else None
            if self.on_block is not None and _is_near(self._again, after):
                self.on_block(i, self.arguments[i], before, after)
        finally:
            self._in_second_run = False

    def _finish(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self._in_second_run:
            self._compare(first_output(output))
            self.hidden.append(first_output(output))

    def _compare(self, after: Any) -> None:
        """Note whether the second run gave what is passed on."""
        self.reproduced.append(_is_near(self._again, after))


def reproduces_output(block: nn.Module, arguments: Arguments, before: Tensor, after: Tensor) -> bool:
    """Whether a block called by itself gives the hidden states that it gave in the model.

    Args:
        block: the decoder block.
        arguments: its other arguments.
        before: hidden states [B, T, D] that it is called with.
        after: hidden states [B, T, D] that it gave in the model.
    """
    return _is_near(_run_again(block, arguments, before), after)


def _run_again(block: nn.Module, arguments: Arguments, before: Tensor) -> Tensor | None:
    """The hidden states of a block that is called by itself; None if it cannot be."""
    args, kwargs = arguments
    try:
        return first_output(block(before, *args, **kwargs))
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError, LookupError):  # XLM, whose blocks keep what they have seen
        return None


def _is_near(again: Tensor | None, after: Any) -> bool:
    """Whether hidden states are equal but for rounding.

    Each token is compared by itself, because some have hidden states a thousand times larger than others.
    """
    if not isinstance(again, Tensor) or not isinstance(after, Tensor) or again.shape != after.shape:
        return False
    difference_BT = (again - after).float().norm(dim=-1)
    return bool((difference_BT <= _MAX_BLOCK_DIFFERENCE * after.float().norm(dim=-1)).all())


def find_block_list(model: Any, names: Sequence[str]) -> str:
    """Path of the module list that holds most of the layers.

    Args:
        model: a transformers model.
        names: paths of the layers that get 4 bits.

    Raises:
        NoChainError: no module list holds any of them.
    """
    counts: dict[str, int] = {
        path: sum(name.startswith(path + ".") for name in names)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
    }
    if not counts or not max(counts.values()):
        raise NoChainError(
            f"{type(model).__name__} must keep its decoder blocks in one nn.ModuleList; it does not; use the method rtn"
        )
    return max(counts, key=lambda path: (counts[path], -len(path)))


def nonfinite_remedy(dtype: torch.dtype) -> str:
    """The remedy in an error message about numbers that are not finite.

    Args:
        dtype: dtype of the model.
    """
    return "the model's weights or this text are broken" if dtype == torch.float32 else "use --dtype float32"


def no_chain_error(model: Any, i: int) -> NoChainError:
    """The error for a model whose block i is not part of a chain."""
    return NoChainError(
        f"the blocks of {model.config.model_type} must be a chain, each taking nothing but the hidden states of the "
        f"one before; block {i} is not; use the method rtn"
    )


def first_output(output: Any) -> Tensor:
    """The hidden states in the output of a module, which may be a tuple."""
    return output[0] if isinstance(output, tuple) else output  # type: ignore[no-any-return]


def _equal(one: Any, two: Any) -> bool:
    """Whether two nests of tuples, lists and dictionaries hold equal tensors. Other values are not compared."""
    if isinstance(one, Tensor):
        return isinstance(two, Tensor) and torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(_equal(one[key], two[key]) for key in one)
    if isinstance(one, tuple | list):
        return len(one) == len(two) and all(_equal(a, b) for a, b in zip(one, two, strict=True))
    return True


def _first_nonfinite(block: nn.Module, arguments: Arguments, before: Tensor) -> str | None:
    """Name of the first leaf module in a block whose outputs are not finite."""
    names: list[str] = []

    def check(name: str) -> Callable[[nn.Module, Any, Any], None]:
        return lambda module, args, output: None if bool(first_output(output).isfinite().all()) else names.append(name)

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
    return names[0] if names else None
