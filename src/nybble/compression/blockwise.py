"""Block-wise reconstruction: train rounding and scales of a decoder block to reproduce the 16-bit block's outputs.

See EfficientQAT (https://arxiv.org/abs/2407.11062) and AutoRound (https://arxiv.org/abs/2309.05516).

    W_q  = fake_quantize(W + offset * init_scale, round_scale(init_scale * exp(shift)), zero_point)
    loss = mean (block_q(x') - block(x))^2 / mean block(x)^2

offset: one per weight, in code units. shift: one per scale. Both start at 0. Zero points stay: trained with small
learning rates they never reach the next whole number, and with large ones they gain nothing.

x' comes through the blocks compressed so far and x through the 16-bit ones, so each block also corrects errors of the
blocks before it. Adam with a learning rate that falls linearly to 0; every sequence is used once before any is used
again. Some sequences are held out. If their loss is not lower after training, the block keeps its initial state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nybble.compression.base import RefinedBlock, RefinementMethod
from nybble.compression.blocks import DecoderBlocks, get_linear
from nybble.compression.calibration import Calibration
from nybble.compression.chain import nonfinite_remedy
from nybble.compression.init import QuantizedInit, RoundedWeight
from nybble.errors import ModelError
from nybble.quant.fake_quant import fake_quantize, round_scale_ste
from nybble.quant.grid import quantize, to_groups
from nybble.quant.scheme import QuantScheme

# The gradients of a mean over a large block are far below Adam's usual eps of 1e-8, which would then set the step size.
_ADAM_EPS = 1e-16
# At most 16 sequences are held out, and at most an eighth of all.
_MAX_HELD_OUT, _HELD_OUT_DIVISOR = 16, 8


class BlockwiseReconstruction(RefinementMethod):
    """The method blockwise."""

    def refine_block(
        self,
        blocks: DecoderBlocks,
        i: int,
        inits: dict[str, QuantizedInit],
        schemes: Mapping[str, QuantScheme],
        calibration: Calibration,
        progress: Callable[[str], None],
    ) -> RefinedBlock:
        """See the function `train`."""
        return train(blocks, i, inits, schemes, calibration, progress)


class OffsetLinear(nn.Module):
    """Takes the place of nn.Linear while its block is trained.

    Args:
        init: initial state of the layer.
        linear: the layer whose place it takes; gives the bias and the dtype of the computation.
        scheme: bits and group size.
    """

    def __init__(self, init: QuantizedInit, linear: nn.Linear, scheme: QuantScheme) -> None:
        super().__init__()
        self.init, self.scheme, self.dtype, self.bias = init, scheme, linear.weight.dtype, linear.bias
        self.offset = nn.Parameter(torch.zeros_like(init.weight_OI, dtype=torch.float32))
        self.shift = nn.Parameter(torch.zeros_like(init.scale_OG))

    def scale_OG(self) -> Tensor:
        """The scales, on the scale grid; differentiable."""
        return round_scale_ste(self.init.scale_OG * self.shift.exp())

    @property
    def weight(self) -> Tensor:
        """The fake-quantized weight in the dtype of the layer, for models that read it (latent attention)."""
        weight_OI = fake_quantize(self.weight_OI(), self.scale_OG(), self.init.zero_point_OG, self.scheme)
        return weight_OI.to(self.dtype)

    def weight_OI(self) -> Tensor:
        """The weight before rounding, float32; differentiable."""
        groups = self.init.scale_OG.shape[-1]
        initial_OGK, offset_OGK = to_groups(self.init.weight_OI.float(), groups), to_groups(self.offset, groups)
        return torch.addcmul(initial_OGK, offset_OGK, self.init.scale_OG[..., None]).flatten(-2)

    def forward(self, inputs: Tensor) -> Tensor:
        """Compute with the fake-quantized weight; inputs [..., I] and outputs [..., O] in the dtype of the layer."""
        return F.linear(inputs, self.weight, self.bias)

    @torch.no_grad()
    def result(self) -> QuantizedInit:
        """The trained state, with exactly the codes of the forward."""
        scale_OG, zero_point_OG, weight_OI = self.scale_OG(), self.init.zero_point_OG, self.weight_OI()
        codes_OI = quantize(weight_OI, scale_OG, zero_point_OG, self.scheme)
        rounded = RoundedWeight(codes_OI, weight_OI, scale_OG, zero_point_OG)
        return QuantizedInit.from_rounded(rounded, self.scheme, self.dtype)


@dataclass(frozen=True)
class _BlockLoss:
    """The loss of block i, and the split of the sequences.

    Attributes:
        held_out: indices of the sequences that measure the loss before and after; all sequences if there are too few to
            hold any out.
        train_count: number of sequences that are trained on: 0 .. train_count - 1.
        mean_square: mean square of the 16-bit outputs on the held-out sequences.
    """

    blocks: DecoderBlocks
    i: int
    quantized: Tensor
    held_out: Tensor
    train_count: int
    mean_square: float

    @staticmethod
    def of(blocks: DecoderBlocks, i: int) -> _BlockLoss:
        assert blocks.quantized is not None, "block-wise reconstruction needs the stream of the compressed blocks"
        count = len(blocks.full)
        held_out = torch.arange(count - min(_MAX_HELD_OUT, count // _HELD_OUT_DIVISOR), count)
        train_count = count - len(held_out)
        if not len(held_out):
            held_out = torch.arange(count)
        mean_square = float(blocks.full[held_out].float().square().mean()) or 1.0
        return _BlockLoss(blocks, i, blocks.quantized, held_out, train_count, mean_square)

    def of_sequences(self, indices: Tensor) -> Tensor:
        """Loss of the block with its present layers; a scalar, differentiable."""
        blocks = self.blocks
        outputs = blocks.run(self.i, self.quantized[indices].to(blocks.device))
        return F.mse_loss(outputs.float(), blocks.full[indices].to(blocks.device).float()) / self.mean_square

    @torch.no_grad()
    def of_held_out(self) -> float:
        """Mean loss of the held-out sequences."""
        parts = self.held_out.split(self.blocks.batch)
        return sum(float(self.of_sequences(part)) * len(part) for part in parts) / len(self.held_out)


def train(
    blocks: DecoderBlocks,
    i: int,
    inits: dict[str, QuantizedInit],
    schemes: Mapping[str, QuantScheme],
    calibration: Calibration,
    progress: Callable[[str], None] = lambda text: None,
) -> RefinedBlock:
    """Train block i.

    Args:
        blocks: `blocks.full` holds the outputs of the 16-bit block, `blocks.quantized` the inputs of the compressed
            one.
        i: index of the block.
        inits: layer name within the block -> initial state.
        schemes: layer name within the block -> scheme.
        calibration: gives the training settings and the seed of the order of the sequences.
        progress: called with the loss after each step.

    Returns:
        New states, and the loss on held-out sequences before and after; the initial states if the loss is not lower.

    Raises:
        ModelError: the loss is not finite.
    """
    block, loss = blocks.modules[i], _BlockLoss.of(blocks, i)
    layers = {name: OffsetLinear(init, get_linear(block, name), schemes[name]) for name, init in inits.items()}
    with _replaced_layers(block, layers):
        before = loss.of_held_out()
        _optimize(layers, loss, calibration, progress)
        after = loss.of_held_out()
    if not after < float("inf"):
        raise ModelError(f"the loss of block {i} must stay finite; it became {after}; {nonfinite_remedy(blocks.dtype)}")
    if after >= before:
        return RefinedBlock(inits, before, before)
    return RefinedBlock({name: layer.result() for name, layer in layers.items()}, before, after)


@contextmanager
def _replaced_layers(block: nn.Module, layers: dict[str, OffsetLinear]) -> Iterator[None]:
    """Put layers into a block inside the context; afterwards it has its own layers again."""
    original = {name: get_linear(block, name) for name in layers}
    try:
        for name, layer in layers.items():
            block.set_submodule(name, layer)
        yield
    finally:
        for name, linear in original.items():
            block.set_submodule(name, linear)


def _optimize(
    layers: dict[str, OffsetLinear], loss: _BlockLoss, calibration: Calibration, progress: Callable[[str], None]
) -> None:
    """Train offsets and shifts of the layers in place."""
    config, count, length = calibration.blockwise, loss.train_count, loss.blocks.full.shape[1]
    batch = min(max(1, config.tokens // length), count)
    steps = max(1, round(config.epochs * count / batch))
    groups = [
        {"params": [layer.offset for layer in layers.values()], "lr": config.offset_lr, "peak": config.offset_lr},
        {"params": [layer.shift for layer in layers.values()], "lr": config.scale_lr, "peak": config.scale_lr},
    ]
    optimizer = torch.optim.Adam(groups, fused=True, eps=_ADAM_EPS)
    generator = torch.Generator().manual_seed(calibration.seed * 1000 + loss.i)
    order = torch.cat([torch.randperm(count, generator=generator) for _ in range(-(-steps * batch // count))])
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * (1 - step / steps)
        step_loss = loss.of_sequences(order[step * batch : (step + 1) * batch])
        step_loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        progress(f"loss {float(step_loss.detach()):.2e}")
