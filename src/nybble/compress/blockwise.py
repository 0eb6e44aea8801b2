"""Block-wise reconstruction: rounding and scales of a whole decoder block are trained so that the compressed block gives the 16-bit block's outputs; zeros
stay (nothing is gained by training them, docs/log.md). (EfficientQAT, arXiv 2407.11062; AutoRound, arXiv 2309.05516.)

    W_q  = fake_quantize(W + offset · start_scale, round7(start_scale · exp(shift)), zero)        offset: in code units, one a weight
    loss = mean (block_q(x') - block(x))^2 / mean block(x)^2

x' comes through the blocks compressed so far and x through the 16-bit ones, so each block also repairs what those before it broke. Adam, a rate that falls
linearly to 0, every sequence used once before any is repeated. Some sequences are held out; if their loss is not lower afterwards, the block keeps its start.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nybble.compress.blocks import DecoderBlocks, get_linear, nonfinite_remedy
from nybble.compress.init import QuantizedInit
from nybble.errors import ModelError
from nybble.quant import fake_quant
from nybble.quant import grid as quant_grid
from nybble.quant.scheme import QuantScheme


@dataclass(frozen=True)
class BlockwiseConfig:
    """How a block is trained.

    Attributes:
        epochs: times that the calibration sequences are gone through.
        tokens: in a step, as whole sequences.
        offset_lr: peak rate in code units.
        scale_lr: peak relative rate of the scales.
        held_out: at most so many sequences (and at most an eighth) judge start and end.
    """

    epochs: float = 2.0
    tokens: int = 2048
    offset_lr: float = 1e-2
    scale_lr: float = 2e-3
    held_out: int = 16


class OffsetLinear(nn.Module):
    """Stands for nn.Linear while its block is trained."""

    def __init__(self, start: QuantizedInit, bias: Tensor | None, scheme: QuantScheme, dtype: torch.dtype) -> None:
        super().__init__()
        self.start, self.scheme, self.dtype, self.bias = start, scheme, dtype, bias
        self.offset = nn.Parameter(torch.zeros_like(start.weight_OI, dtype=torch.float32))
        self.shift = nn.Parameter(torch.zeros_like(start.scale_OG))

    def scale_OG(self) -> Tensor:
        """As it ships, differentiable."""
        return fake_quant.round_scale_ste(self.start.scale_OG * self.shift.exp())

    def moved_OI(self) -> Tensor:
        """The weight before rounding; float32, differentiable."""
        scale_OG = self.start.scale_OG
        groups = scale_OG.shape[-1]
        offset_OGK = quant_grid.to_groups(self.offset, groups)
        return torch.addcmul(
            quant_grid.to_groups(self.start.weight_OI.float(), groups), offset_OGK, scale_OG[..., None]
        ).flatten(-2)

    def forward(self, inputs: Tensor) -> Tensor:
        return F.linear(
            inputs,
            fake_quant.fake_quantize(self.moved_OI(), self.scale_OG(), self.start.zero_point_OG, self.scheme).to(
                self.dtype
            ),
            self.bias,
        )

    @torch.no_grad()
    def result(self, dtype: torch.dtype) -> QuantizedInit:
        """The trained start, with exactly the codes of the forward."""
        scale_OG, zero_point_OG, moved_OI = self.scale_OG(), self.start.zero_point_OG, self.moved_OI()
        return QuantizedInit.keeping(
            quant_grid.quantize(moved_OI, scale_OG, zero_point_OG, self.scheme),
            moved_OI,
            scale_OG,
            zero_point_OG,
            self.scheme,
            dtype,
        )


def train(
    blocks: DecoderBlocks,
    i: int,
    starts: dict[str, QuantizedInit],
    scheme: QuantScheme,
    recipe: BlockwiseConfig,
    seed: int,
    advance: Callable[[str], None] = lambda text: None,
) -> tuple[dict[str, QuantizedInit], float, float]:
    """Train block i. blocks.full must hold the outputs of the 16-bit block, blocks.quantized the inputs of the compressed one.

    Args:
        starts: layer name within the block -> where it starts.
        seed: of the order of the sequences.
        advance: called after each step with a text that says the loss.

    Returns: the new starts, and the loss on held-out sequences before and after.

    Raises:
        ModelError: the loss is not finite.
    """
    block, full, quantized, count = blocks.modules[i], blocks.full, blocks.quantized, len(blocks.full)
    assert quantized is not None, "block-wise reconstruction needs the stream of the compressed blocks"
    plain = {name: get_linear(block, name) for name in starts}
    layers = {
        name: OffsetLinear(start, plain[name].bias, scheme, plain[name].weight.dtype) for name, start in starts.items()
    }
    held_out = torch.arange(count - min(recipe.held_out, count // 8), count)
    used = count - len(held_out)
    judged = held_out if len(held_out) else torch.arange(count)
    size = float(full[judged].float().square().mean()) or 1.0

    def loss(indices: Tensor) -> Tensor:
        made = blocks.run(i, quantized[indices].to(blocks.device))
        return F.mse_loss(made.float(), full[indices].to(blocks.device).float()) / size

    @torch.no_grad()
    def judge() -> float:
        parts = judged.split(blocks.batch)
        return sum(float(loss(part)) * len(part) for part in parts) / len(judged)

    batch = min(max(1, recipe.tokens // full.shape[1]), used)
    steps = max(1, round(recipe.epochs * used / batch))
    rates = {"offset": recipe.offset_lr, "shift": recipe.scale_lr}
    groups = [
        {"params": [getattr(layer, leaf) for layer in layers.values()], "lr": rate, "peak": rate}
        for leaf, rate in rates.items()
    ]
    # The gradients of a mean over a large block are far below the usual eps of 1e-8, which would take the place of their own size.
    optimizer = torch.optim.Adam(groups, fused=True, eps=1e-16)
    generator = torch.Generator().manual_seed(seed * 1000 + i)
    order = torch.cat([torch.randperm(used, generator=generator) for _ in range(-(-steps * batch // used))])
    try:
        for name, trained in layers.items():
            block.set_submodule(name, trained)
        before = judge()
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * (1 - step / steps)
            now = loss(order[step * batch : (step + 1) * batch])
            now.backward()
            optimizer.step()
            optimizer.zero_grad()
            advance(f"loss {float(now.detach()):.2e}")
        after = judge()
    finally:
        for name, original in plain.items():
            block.set_submodule(name, original)
    if not after < float("inf"):
        raise ModelError(f"the loss of block {i} must stay finite; it became {after}; {nonfinite_remedy(blocks.dtype)}")
    if after >= before:
        return starts, before, before
    return {name: layer.result(layer.dtype) for name, layer in layers.items()}, before, after
