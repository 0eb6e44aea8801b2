"""LayersOnDisk: a model whose decoder blocks are in memory one at a time; all else is there all the time.

The parameters of the blocks are on the meta device. `loaded(i)` reads those of one block, and lets them go at the end:

    layers = layers_of(model)
    with layers.loaded(i):          # the block has its weights; within it, forwards of the block read nothing
        ...

A forward of the model, or of a block, outside of such a context reads each block when it is called and lets it go
afterwards. So whatever runs the model works, and is slow where it runs the model often: `streamed.py` passes many
sequences through one block after the other.

`into_memory` reads the blocks one after the other for good, while smaller layers take the place of theirs.

In a model that is in memory, `loaded` moves the block to the device of the model, and back to the CPU. So code that
works block by block is the same for both kinds of model.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from nybble.errors import ModelError


class Layers(ABC):
    """The decoder blocks of a model.

    Args:
        model: transformers.PreTrainedModel.
        path: of the list of its decoder blocks.

    Attributes:
        path: the same.
        modules: the blocks.
        device: where the model computes.
    """

    def __init__(self, model: Any, path: str) -> None:
        self.path = path
        self.modules: list[nn.Module] = list(model.get_submodule(path))
        self.device: torch.device = model.device

    def prefix(self, i: int) -> str:
        """Path of block i, with a dot at the end."""
        return f"{self.path}.{i}."

    @abstractmethod
    def loaded(self, i: int) -> AbstractContextManager[nn.Module]:
        """Keep block i on the device, with its weights, inside the context."""

    @abstractmethod
    def release(self, model: Any) -> None:
        """Leave the device to single blocks."""

    @abstractmethod
    def restore(self, model: Any) -> None:
        """Undo `release`."""


class LayersInMemory(Layers):
    """Blocks that are all in memory."""

    @contextmanager
    def loaded(self, i: int) -> Iterator[nn.Module]:
        """See Layers.loaded; afterwards the block is on the CPU."""
        try:
            yield self.modules[i].to(self.device)
        finally:
            self.modules[i].to("cpu")

    def release(self, model: Any) -> None:
        """Move the whole model to the CPU."""
        model.to("cpu")

    def restore(self, model: Any) -> None:
        """Move the whole model to the device."""
        model.to(self.device)


class LayersOnDisk(Layers):
    """Blocks that are read when they are needed. The parameters of the blocks must be on the meta device.

    Args:
        model, path: see Layers. A forward of a block that is not loaded will load it.
        read: number of a block -> name within the block -> its parameters and buffers, on the device.

    Attributes:
        changed: names of parameters that a forward has changed, which is lost.
        fingerprint: place for a hash of all weights, which takes a pass over the disk.
    """

    def __init__(self, model: Any, path: str, read: Callable[[int], Mapping[str, Tensor]]) -> None:
        super().__init__(model, path)
        self.changed: set[str] = set()
        self.fingerprint: str | None = None
        self._empty = [dict(block.named_parameters()) for block in self.modules]
        self._read: list[Callable[[], Mapping[str, Tensor]]] = [partial(read, i) for i in range(len(self.modules))]
        self._depth: Counter[int] = Counter()
        self._running: dict[int, list[AbstractContextManager[nn.Module]]] = {}
        self._versions: dict[str, int] = {}
        self._bypassed = 0
        self._hooks: dict[int, list[RemovableHandle]] = {}
        _LAYERS[model] = self
        for i, block in enumerate(self.modules):
            _OWNERS[block] = (weakref.ref(self), i)
            before = block.register_forward_pre_hook(_before_forward)
            self._hooks[i] = [before, block.register_forward_hook(_after_forward, always_call=True)]
            block.requires_grad_(False)

    def read(self, i: int) -> Mapping[str, Tensor]:
        """Read the parameters and buffers of block i, by names within the block."""
        return self._read[i]()

    def replace(self, i: int, read: Callable[[], Mapping[str, Tensor]]) -> Callable[[], Mapping[str, Tensor]]:
        """Let `read` give the weights of block i when it is loaded next. Returns what did before."""
        before, self._read[i] = self._read[i], read
        return before

    @contextmanager
    def loaded(self, i: int) -> Iterator[nn.Module]:
        """See Layers.loaded. Contexts may be nested."""
        if not self._depth[i]:
            self._load(i)
        self._depth[i] += 1
        try:
            yield self.modules[i]
        finally:
            self._depth[i] -= 1
            if not self._depth[i]:
                for name, parameter in self._empty[i].items():
                    self._assign(i, name, parameter)

    def keep(self, i: int) -> None:
        """Read block i a last time, and leave it in memory; it becomes a block like any other."""
        assert not self._depth[i], "a block is kept outside of the contexts that load it"
        if i not in self._hooks:
            return
        self._load(i)
        for handle in self._hooks.pop(i):
            handle.remove()
        self._empty[i].clear()
        del _OWNERS[self.modules[i]]

    def release(self, model: Any) -> None:
        """Nothing to do."""

    def restore(self, model: Any) -> None:
        """Nothing to do."""

    @contextmanager
    def bypassed(self, count: int) -> Iterator[None]:
        """Let forwards of the first `count` blocks load nothing inside the context."""
        before, self._bypassed = self._bypassed, count
        try:
            yield
        finally:
            self._bypassed = before

    def begin_forward(self, i: int) -> None:
        """Load block i for a forward."""
        if i < self._bypassed:
            return
        context = self.loaded(i)
        context.__enter__()
        self._running.setdefault(i, []).append(context)  # a hook of the forward may run the block again
        self._versions = {name: parameter._version for name, parameter in self.modules[i].named_parameters()}

    def end_forward(self, i: int) -> None:
        """Let block i go, if `begin_forward` has loaded it."""
        if not self._running.get(i):  # another hook ended the forward before
            return
        now = dict(self.modules[i].named_parameters())
        self.changed |= {f"{self.prefix(i)}{n}" for n, version in self._versions.items() if now[n]._version != version}
        self._running[i].pop().__exit__(None, None, None)

    def _load(self, i: int) -> None:
        """Give block i the tensors that are read."""
        for name, tensor in self.read(i).items():
            empty = self._empty[i].get(name)
            if empty is not None and empty.dtype != tensor.dtype:  # kept in float32 (transformers)
                self._empty[i][name] = nn.Parameter(torch.empty_like(tensor, device="meta"), requires_grad=False)
            self._assign(i, name, tensor)

    def _assign(self, i: int, name: str, tensor: Tensor) -> None:
        owner, _, leaf = name.rpartition(".")
        module = self.modules[i].get_submodule(owner)
        if leaf in module._buffers:
            module._buffers[leaf] = tensor
        else:
            own = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
            module._parameters[leaf] = own


# A model lives longer than its layers, and the layers longer than what belongs to a block.
_LAYERS: weakref.WeakKeyDictionary[nn.Module, LayersOnDisk] = weakref.WeakKeyDictionary()
_OWNERS: weakref.WeakKeyDictionary[nn.Module, tuple[weakref.ref[LayersOnDisk], int]] = weakref.WeakKeyDictionary()


def layers_on_disk(model: Any) -> LayersOnDisk | None:
    """Return the layers of a model whose decoder blocks are on disk; None for a model in memory."""
    return _LAYERS.get(model)


def layers_of(model: Any, path: str) -> Layers:
    """Return the decoder blocks of a model.

    Args:
        model: transformers.PreTrainedModel.
        path: of the list of its decoder blocks.

    Raises:
        ModelError: other blocks of the model are on disk.
    """
    layers = layers_on_disk(model)
    if layers is None:
        return LayersInMemory(model, path)
    if layers.path != path:
        raise ModelError(
            f"--offload disk needs decoder blocks in one list; {type(model).__name__} has {layers.path} and {path}; "
            "use --offload none"
        )
    return layers


@contextmanager
def loaded_block(block: nn.Module) -> Iterator[None]:
    """Keep the weights of a block in memory inside the context; nothing to do where they are there anyway."""
    reference, i = _OWNERS.get(block, (None, 0))
    layers = reference() if reference is not None else None
    if layers is None:
        yield
        return
    with layers.loaded(i):
        yield


def into_memory(model: Any, names: Iterable[str]) -> Iterator[str]:
    """Yield names of layers, whose block is in memory from then on. At the end all are, and the model is like one that
    never was on disk. A caller that replaces the layers as they come holds one block of them at a time.

    Args:
        model: transformers.PreTrainedModel, on disk or not.
        names: of the layers, those of a block side by side.
    """
    layers = layers_on_disk(model)
    for name in names:
        i = None if layers is None else block_number(layers, name)
        if layers is not None and i is not None:
            layers.keep(i)
        yield name
    if layers is not None:
        for i in range(len(layers.modules)):
            layers.keep(i)
        del _LAYERS[model]


def tensors_of(model: Any, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters and buffers of a model. A block that is on disk is loaded while its tensors are yielded.

    Args:
        model: transformers.PreTrainedModel.
        names: of the tensors, those of a block side by side.
    """
    for i, group in by_block(model, names):
        with block_on_disk(model, i):
            for name in group:
                owner, _, leaf = name.rpartition(".")
                yield name, getattr(model.get_submodule(owner), leaf)


def by_block(model: Any, names: Iterable[str]) -> Iterator[tuple[int | None, list[str]]]:
    """Yield names that stand side by side and are in the same block on disk, with its number; None for all others.

    Args:
        model: transformers.PreTrainedModel.
        names: of modules or of tensors.
    """
    layers = layers_on_disk(model)
    group: list[str] = []
    current: int | None = None
    for name in names:
        number = None if layers is None else block_number(layers, name)
        if number != current and group:
            yield current, group
            group = []
        current = number
        group.append(name)
    if group:
        yield current, group


def read_tensor(layers: LayersOnDisk, name: str) -> Tensor:
    """Read one parameter or buffer of a block that is on disk.

    Args:
        layers: of the model.
        name: of the tensor in the model.
    """
    i = block_number(layers, name)
    assert i is not None, f"{name} is in no block"
    return layers.read(i)[name.removeprefix(layers.prefix(i))]


def block_number(layers: Layers, name: str) -> int | None:
    """Return the number of the block that a module or a tensor is in; None if it is in none."""
    number = name.removeprefix(f"{layers.path}.").partition(".")[0]
    return int(number) if name.startswith(f"{layers.path}.") and number.isdigit() else None


@contextmanager
def block_on_disk(model: Any, i: int | None) -> Iterator[None]:
    """Keep a block that is on disk in memory inside the context.

    Args:
        model: transformers.PreTrainedModel.
        i: number of the block, as `by_block` has it; None needs nothing.
    """
    layers = layers_on_disk(model)
    if layers is None or i is None:
        yield
        return
    with layers.loaded(i):
        yield


# Functions, not methods: a copy of a block has the same hooks, and must not copy the layers with them.
def _before_forward(block: nn.Module, inputs: Any) -> None:
    reference, i = _OWNERS.get(block, (None, 0))
    layers = reference() if reference is not None else None
    if layers is not None:
        layers.begin_forward(i)


def _after_forward(block: nn.Module, inputs: Any, output: Any) -> None:
    reference, i = _OWNERS.get(block, (None, 0))
    layers = reference() if reference is not None else None
    if layers is not None:
        layers.end_forward(i)
