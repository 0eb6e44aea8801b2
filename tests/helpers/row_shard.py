"""A prototype of sharded training: fully_shard (FSDP2) gathers the codes of a weight instead of the weight.

    python -m tests.helpers.row_shard          under a launcher of two processes; prints what it found as JSON

Each process holds some rows of a weight, quantizes them (groups run along a row, so rows are independent), and sends
packed codes, scales and zero points. The weight that all of them compute with is the dequantized one. Its gradient
comes back as the mean over the processes for the own rows: the straight-through gradient of the weight before rounding.

What the hooks need, as torch 2.13 has them:

- Views of the shard must stay shards: FSDP takes a plain tensor for the storage of the shard, which a wrapper lacks.
- What is gathered has its rows divided evenly: a weight with an odd number of rows is refused by FSDP itself.
- From the second time on, the weight is written into the same memory, whose storage FSDP has freed and allocated again.
"""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils._pytree import tree_map

from nybble import processes
from nybble.quant import grid
from nybble.quant.scheme import QuantScheme
from nybble.quant.weight import pack_codes, unpack_codes

SCHEME = QuantScheme(bits=4, group_size=32, symmetric=False)
WIDTH, FEATURES, BLOCKS, ROWS = 64, 128, 2, 8


class RowShard(torch.Tensor):
    """Rows [O, I] of a weight, float32, that are gathered as codes.

    Attributes:
        rows: the rows.
        sent: bytes that this process gave to be gathered, over all weights.
    """

    rows: Tensor
    sent = 0

    @staticmethod
    def __new__(cls, rows: Tensor) -> RowShard:
        """A tensor of the shape of the rows without memory of its own."""
        made: RowShard = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, rows.shape, strides=rows.stride(), dtype=rows.dtype, device=rows.device
        )
        made.rows = rows
        return made

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        """Compute with the rows; tensors that come out are shards again."""
        given, given_named = tree_map(lambda x: x.rows if isinstance(x, RowShard) else x, (arguments, named or {}))
        result = function(*given, **given_named)
        if function is torch.ops.aten.copy_.default:
            return arguments[0]
        return tree_map(lambda x: RowShard(x) if isinstance(x, Tensor) else x, result)

    def fsdp_pre_all_gather(self, mesh: Any, size: Any, stride: Any, module: Any, policy: Any) -> Any:
        """Packed codes, scales and zero points of the own rows."""
        scale_OG, zero_point_OG = grid.min_max_qparams(self.rows, SCHEME)
        codes_OI = grid.quantize(self.rows, scale_OG, zero_point_OG, SCHEME)
        sent = pack_codes(codes_OI, 4), scale_OG.half(), zero_point_OG.to(torch.uint8)
        RowShard.sent += sum(tensor.nbytes for tensor in sent)
        return sent, None

    def fsdp_post_all_gather(self, gathered: Any, note: Any, dtype: torch.dtype, *, out: Tensor | None = None) -> Any:
        """The dequantized weight, from the rows of all processes; written into `out` from the second time on."""
        packed, scale_OG, zero_point_OG = gathered
        codes_OI = unpack_codes(packed, 4).view(len(packed), -1)
        weight_OI = grid.dequantize(codes_OI, scale_OG.float(), zero_point_OG.float()).to(dtype)
        if out is None:
            return weight_OI, (*gathered, weight_OI)
        with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(out):
            out.copy_(weight_OI)
        return None


def make_blocks() -> nn.Sequential:
    """Two blocks of two linear layers, the same in every process."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(
            nn.Sequential(nn.Linear(WIDTH, FEATURES, bias=False), nn.SiLU(), nn.Linear(FEATURES, WIDTH, bias=False))
            for _ in range(BLOCKS)
        )
    )


def loss_in_one_process(weights: list[Tensor], x_BD: Tensor) -> Tensor:
    """Mean square of the output with all weights quantized; gradients go straight through the rounding."""
    for up_OI, down_OI in zip(weights[::2], weights[1::2], strict=True):
        rounded = []
        for weight_OI in (up_OI, down_OI):
            whole_OI = weight_OI.detach()
            scale_OG, zero_point_OG = grid.min_max_qparams(whole_OI, SCHEME)
            error_OI = grid.quantize_dequantize(whole_OI, scale_OG, zero_point_OG, SCHEME) - whole_OI
            rounded.append(weight_OI + error_OI)
        x_BD = F.linear(F.silu(F.linear(x_BD, rounded[0])), rounded[1])
    return (x_BD**2).mean()


def _main() -> None:
    blocks, x_BD = make_blocks(), torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1))
    layers = [module for module in blocks.modules() if isinstance(module, nn.Linear)]
    weights = [layer.weight.detach().clone().requires_grad_() for layer in layers]
    expected = loss_in_one_process(weights, x_BD)
    expected.backward()  # type: ignore[no-untyped-call]
    with processes.joined():
        for layer in layers:
            layer.weight = nn.Parameter(RowShard(layer.weight.detach()))
        mesh = init_device_mesh("cpu", (processes.count(),))
        for block in blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(blocks, mesh=mesh)  # the root: only below it are weights freed between forward and backward
        losses, errors = [], []
        for _ in range(2):  # the second time the hooks write into memory that is there
            blocks.zero_grad()
            loss = (blocks(x_BD[processes.index() :: processes.count()]) ** 2).mean()
            loss.backward()
            losses.append(sum(processes.gather(float(loss.detach()))) / processes.count())
            for layer, weight in zip(layers, weights, strict=True):
                gradient: Any = layer.weight.grad
                assert weight.grad is not None
                own_OI = weight.grad.chunk(processes.count())[processes.index()]
                errors.append(float((gradient.to_local() - own_OI).norm() / own_OI.norm()))
        found = {"losses": losses, "expected": float(expected.detach()), "errors": errors, "sent": RowShard.sent}
    print(json.dumps(found | {"weights": sum(weight.numel() for weight in weights)}))


if __name__ == "__main__":
    _main()
