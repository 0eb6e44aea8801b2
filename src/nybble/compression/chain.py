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

from nybble.errors import ModelError
from nybble.models.layers_on_disk import layers_on_disk

# Largest difference between a block's output and the model's own hidden state, relative to the norm of the token's
# state. Rounding in 16 bits stays well below; a block that lacks an argument is far above.
_MAX_BLOCK_DIFFERENCE = 1e-2


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
def unchanged_weights(model: nn.Module) -> Iterator[None]:
    """Raise ModelError, at the end, where the model has changed its weights in the block: they are to be saved again.

    A model does so when it first computes (RWKV), so this has to be around the first forward.
    """
    versions = {name: parameter._version for name, parameter in model.named_parameters()}
    yield
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
    first, second = (record_blocks(model, modules, row[None].to(model.device)) for row in input_ids)
    for i, module in enumerate(modules):
        before, after = (torch.cat([first.hidden[j], second.hidden[j]]) for j in (i, i + 1))
        try:
            is_chain = _equal(first.arguments[i], second.arguments[i]) and reproduces_output(
                module, first.arguments[i], before, after
            )
        except (RuntimeError, ValueError):  # the arguments of one sequence do not fit a batch of two
            is_chain = False
        if not is_chain:
            raise no_chain_error(model, i)


@torch.no_grad()
def record_blocks(model: Any, modules: Sequence[nn.Module], input_ids: Tensor) -> BlockRecord:
    """Record what one forward of the whole model passes through its blocks, and check that the blocks reproduce it.

    Args:
        model: a transformers model.
        modules: its decoder blocks.
        input_ids: [B, T] token ids on the device of the model.

    Raises:
        NoChainError: the blocks are not called once each in their order, or one does not reproduce the model's own
            hidden states.
        ModelError: a block's outputs are not finite.
    """
    arguments: list[Arguments] = []
    hidden: list[Tensor] = []
    called: list[nn.Module] = []

    def record(module: nn.Module, args: Any, kwargs: Any) -> None:
        kwargs = dict(kwargs)
        hidden.append(args[0] if args else kwargs.pop("hidden_states", None))
        arguments.append((args[1:], kwargs))
        called.append(module)

    handles = [module.register_forward_pre_hook(record, with_kwargs=True) for module in modules]
    handles.append(modules[-1].register_forward_hook(lambda module, args, output: hidden.append(first_output(output))))
    try:
        model.base_model(input_ids=input_ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
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
        if not reproduces_output(modules[i], arguments[i], before, after):
            raise no_chain_error(model, i)
    return BlockRecord(arguments, hidden)


def reproduces_output(block: nn.Module, arguments: Arguments, before: Tensor, after: Tensor) -> bool:
    """Whether a block called by itself gives the hidden states that it gave in the model.

    Each token is compared by itself, because some have hidden states a thousand times larger than others.

    Args:
        block: the decoder block.
        arguments: its other arguments.
        before: hidden states [B, T, D] that it is called with.
        after: hidden states [B, T, D] that it gave in the model.
    """
    args, kwargs = arguments
    try:
        again = first_output(block(before, *args, **kwargs))
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError, LookupError):  # XLM, whose blocks keep what they have seen
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
