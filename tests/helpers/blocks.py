"""Toy decoder blocks: a norm and what is made of its output; experts, each with its own tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Chained(nn.Module):
    """A block of a toy model: a norm and what `compute` makes of its output."""

    def __init__(self, compute: Callable[[Chained, Tensor], Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(16)
        self.compute = compute
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.compute(self, self.norm(hidden))


class Experts(nn.Module):
    """A router and experts, each of which is called with the tokens that are sent to it."""

    def __init__(self, count: int, reached: int) -> None:
        super().__init__()
        self.gate = nn.Linear(16, reached, bias=False)
        self.experts = nn.ModuleList(
            nn.ModuleDict({"gate_up": nn.Linear(16, 16), "down": nn.Linear(8, 16)}) for _ in range(count)
        )

    def forward(self, x: Tensor) -> Tensor:
        x_ND = x.flatten(0, -2)
        weight_NE = self.gate(x_ND).softmax(-1)
        chosen_N, out_ND = weight_NE.argmax(-1), torch.zeros_like(x_ND)
        for i, expert in enumerate(self.experts):
            rows = (chosen_N == i).nonzero()[:, 0]
            if len(rows):
                gate, up = expert["gate_up"](x_ND[rows]).chunk(2, -1)
                out_ND[rows] = expert["down"](F.silu(gate) * up) * weight_NE[rows, i, None]
        return out_ND.view_as(x)
