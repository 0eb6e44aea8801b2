"""StoredBlock: a finished decoder block in the BlockStore, from which a compression resumes, and which stands for the
block of a model on disk (layers_on_disk.py) from then on.

For every compressed layer NAME of the block the file has NAME:weight_OI, NAME:scale_OG and NAME:zero_point_OG; and all
other parameters and buffers of the block, which folding may have changed, under their own names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor, nn

from nybble.compression.init import QuantizedInit
from nybble.compression.layer_error import LayerError
from nybble.compression.store import BlockStore
from nybble.models.quantized_file import LazyMapping
from nybble.quant.scheme import QuantScheme

_INIT_TENSORS = ("weight_OI", "scale_OG", "zero_point_OG")


@dataclass
class CompressedBlock:
    """One block after compression; names are those within the block.

    Attributes:
        inits: layer name -> the compressed layer.
        errors: layer name -> its errors.
        losses: loss before and after refinement; None without refinement.
    """

    inits: dict[str, QuantizedInit] = field(default_factory=dict)
    errors: dict[str, LayerError] = field(default_factory=dict)
    losses: tuple[float, float] | None = None


@dataclass(frozen=True)
class _Note:
    """The note of a stored block."""

    errors: dict[str, LayerError]
    losses: list[float] | None


@dataclass(frozen=True)
class StoredBlock:
    """The place of one block in a store.

    Attributes:
        store: the store.
        prefix: path of the block in the model, with a dot at the end.
        schemes: name within the block of each layer that is compressed -> scheme.
        device: where tensors are read to.
    """

    store: BlockStore
    prefix: str
    schemes: Mapping[str, QuantScheme]
    device: torch.device

    def save(self, block: nn.Module, result: CompressedBlock) -> None:
        """Write a block that was compressed.

        Raises:
            RunError: the disk is full.
        """
        tensors = {
            f"{name}:{leaf}": getattr(init, leaf) for name, init in result.inits.items() for leaf in _INIT_TENSORS
        }
        others = {
            key: value for key, value in block.state_dict().items() if key.removesuffix(".weight") not in result.inits
        }
        errors = {name: asdict(error) for name, error in result.errors.items()}
        self.store.save(self.prefix, tensors | others, {"errors": errors, "losses": result.losses})

    def read(self, block: nn.Module) -> tuple[dict[str, Tensor], _Note] | None:
        """Read what `restore` needs; None if the block is not in the store.

        Args:
            block: the 16-bit block, which is not changed.

        Raises:
            RunError: the file is damaged.
        """
        return self.store.load(self.prefix, self._expected(block), _Note)

    def restore(self, block: nn.Module, tensors: dict[str, Tensor], note: _Note) -> CompressedBlock:
        """Return the compressed block, and put its other parameters into the 16-bit block, in place.

        Args:
            block: the 16-bit block.
            tensors, note: of `read`.
        """
        inits = {
            name: QuantizedInit(*(tensors.pop(f"{name}:{leaf}").to(self.device) for leaf in _INIT_TENSORS))
            for name in self.schemes
        }
        block.load_state_dict(tensors, strict=False)  # the weights of compressed layers are not among them
        losses = note.losses
        return CompressedBlock(inits, note.errors, (losses[0], losses[-1]) if losses else None)

    def init(self, name: str) -> QuantizedInit:
        """Read one compressed layer."""
        tensors = self.store.read(self.prefix, [f"{name}:{leaf}" for leaf in _INIT_TENSORS])
        return QuantizedInit(*(tensor.to(self.device) for tensor in tensors))

    def weights(self) -> Mapping[str, Tensor]:
        """All parameters and buffers of the block by their names in it, read at each access; weights are those before
        rounding.
        """
        leaves = tuple(f":{leaf}" for leaf in _INIT_TENSORS[1:])
        stored = {
            name.replace(f":{_INIT_TENSORS[0]}", ".weight"): name
            for name in self.store.names(self.prefix)
            if not name.endswith(leaves)
        }
        return LazyMapping(stored, lambda name: self.store.read(self.prefix, [stored[name]])[0].to(self.device))

    def _expected(self, block: nn.Module) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Name -> dtype and shape of what `save` writes."""
        expected: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for key, value in block.state_dict().items():
            name, shape = key.removesuffix(".weight"), tuple(value.shape)
            if name not in self.schemes:
                expected[key] = value.dtype, shape
                continue
            groups = (shape[0], self.schemes[name].num_groups(shape[1]))
            specs = ((value.dtype, shape), (torch.float32, groups), (torch.float32, groups))
            expected |= {f"{name}:{leaf}": spec for leaf, spec in zip(_INIT_TENSORS, specs, strict=True)}
        return expected
