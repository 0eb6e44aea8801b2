"""Base classes of the layers that replace nn.Linear during training, and the weight cache.

Every layer computes its weight from trained parameters. The parameters do not change within an optimizer step, so
there are two ways to compute, which give the same gradients:

- recompute: the weight is computed in every forward and again in every backward. Nothing is kept in between.
- weight cache: `fill_weight_cache` computes the weight once per optimizer step and all microbatches use it. If a
  layer needs the full gradient of its weight, the cached weight is an autograd leaf that accumulates the gradient of
  all microbatches. `flush_weight_cache` then propagates this gradient to the trained parameters once. The cache costs
  the memory of one weight per layer, and of one gradient more where it is a leaf.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nybble.qat.row_shard import RowShard
from nybble.quant import fake_quant
from nybble.quant import grid as quant_grid
from nybble.quant.scheme import QuantScheme
from nybble.quant.weight import QuantizedWeight


class CachedWeightLinear(nn.Module):
    """Linear layer whose weight is computed from trained parameters, in every forward or once per optimizer step.

    Subclasses define `compute_weight` and `forward`.

    Args:
        shape: [O, I], the shape of the weight.
        bias: [O] or None. The bias is not trained.
        dtype: dtype of inputs and outputs. The weight is cast to it just before the matrix product.

    Attributes:
        rank: rank of the LoRA adapters; 0 if the layer has none.
        active_rank: number of leading ranks that the forward uses, 0 .. rank.
        cached_weight: [O, I] in `dtype`, or None if the cache is empty.
        TRAINED: names of the parameters that move the weight, which are trained at --lr.
    """

    TRAINED: ClassVar[tuple[str, ...]] = ()
    rank: int = 0
    active_rank: int = 0

    def __init__(self, shape: torch.Size, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.dtype = dtype
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.cached_weight: Tensor | None = None

    def compute_weight(self) -> Tensor:
        """Compute the weight [O, I] of the forward, in `dtype`."""
        raise NotImplementedError

    @torch.no_grad()
    def current_weight(self) -> Tensor:
        """Return the cached weight if there is one, else compute it; [O, I] in `dtype`."""
        return self.compute_weight() if self.cached_weight is None else self.cached_weight

    @torch.no_grad()
    def apply_current_weight(self, inputs: Tensor) -> Tensor:
        """Compute [..., I] -> [..., O] with the current weight, for the forward of an autograd function.

        With a bias F.linear returns a view, and autograd refuses to change a view from such a forward in place, as
        RoCBert does with outputs. So the memory gets a tensor of its own.
        """
        output = F.linear(inputs, self.current_weight(), self.bias)
        if not output._is_view():
            return output
        return output.new_empty(0).set_(output)  # type: ignore[call-overload,no-any-return]

    @torch.no_grad()
    def fill_weight_cache(self) -> None:
        """Compute the weight once for all forwards and backwards until the cache is flushed or dropped."""
        self.cached_weight = self.compute_weight()

    def flush_weight_cache(self) -> None:
        """Propagate the accumulated gradient of the cached weight, if any, to the trained parameters; empty the cache.

        Raises:
            AssertionError: the cache is empty.
        """
        assert self.cached_weight is not None, "flush_weight_cache needs a filled cache; call fill_weight_cache first"
        self.cached_weight = None

    def drop_weight_cache(self) -> None:
        """Empty the cache and discard its gradient, for example after an evaluation."""
        self.cached_weight = None

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, rank {self.active_rank} of {self.rank}"


@contextmanager
def cached_weights(layers: Iterable[CachedWeightLinear], flush: bool = True) -> Iterator[None]:
    """Compute the weight of every layer once for everything that runs inside the context.

    Args:
        layers: layers whose cache is filled on entry and emptied on exit.
        flush: propagate the accumulated gradients to the trained parameters on exit. False is for evaluation. If the
            body raises, no gradient is propagated.
    """
    layers = list(layers)
    try:
        for layer in layers:
            layer.fill_weight_cache()
        yield
        if flush:
            for layer in layers:
                layer.flush_weight_cache()
    finally:
        for layer in layers:
            layer.drop_weight_cache()


class QuantizedLinear(CachedWeightLinear):
    """Base class of the quantized layers: a weight on a quantization grid whose scales are trained.

        scale = round_scale(init_scale * exp(log_scale_shift))

    The trained parameter is the logarithm of the factor by which a scale grows, so its learning rate is a relative
    one: with Adam, 1e-3 moves a scale by about 0.1 % per step. It starts at random values that leave the rounded
    scales unchanged (`grid.random_log_shift`).

    Args:
        shape, bias, dtype: see `CachedWeightLinear`.
        qparams: (scale_OG, zero_point_OG) from compression. The scales are float32 on the scale grid, the zero points
            are integral values of any dtype.
        scheme: quantization scheme of the codes.
        generator: CPU random generator for log_scale_shift. None uses the global one.

    Attributes:
        shard: the rows of the weight that this process keeps; None = it has all of them.
    """

    shard: RowShard | None = None

    def __init__(
        self,
        shape: torch.Size,
        qparams: tuple[Tensor, Tensor],
        scheme: QuantScheme,
        bias: Tensor | None,
        dtype: torch.dtype,
        generator: torch.Generator | None,
    ) -> None:
        super().__init__(shape, bias, dtype)
        scale_OG, zero_point_OG = qparams
        self.scheme = scheme
        self.init_scale: Tensor
        self.zero_point: Tensor
        self.register_buffer("init_scale", scale_OG.float())
        self.register_buffer("zero_point", zero_point_OG.float())
        self.log_scale_shift = nn.Parameter(quant_grid.random_log_shift(self.init_scale, generator))

    def scale_OG(self) -> Tensor:
        """Compute the current scales: float32 on the scale grid, differentiable."""
        return fake_quant.round_scale_ste(self.init_scale * self.log_scale_shift.exp())

    def divide_rows(self, number: int) -> None:
        """Keep the own rows of the weight alone, and free those that other processes keep; see row_shard.py.

        Args:
            number: of the layer, the same in all processes.
        """
        self.keep_own_rows(RowShard((self.out_features, self.in_features), self.scheme.bits, number))

    def keep_own_rows(self, shard: RowShard) -> None:
        """What `divide_rows` does to the layer."""
        raise NotImplementedError

    def bring_all_rows(self) -> None:
        """Undo `divide_rows` in the first process; the others keep the shard, and have no more use for the layer."""
        raise NotImplementedError

    def absorb(self) -> QuantizedWeight:
        """Return the weight of the forward, before the cast to `dtype`, as codes, scales and zero points."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.scheme}, rank {self.active_rank} of {self.rank}"
