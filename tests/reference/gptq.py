"""GPTQ without Cholesky factors, blocks or matrices of rows: one row at a time, what is left of the Hessian inverted anew for each column (float64)."""

import torch
from torch import Tensor


def gptq(
    weight_OI: Tensor,
    gram_II: Tensor,
    damping: float,
    scale_OG: Tensor,
    zero_point_OG: Tensor,
    max_code: int,
    order: list[int],
) -> Tensor:
    """Codes [O, I] for fixed scales and zeros, columns rounded in this order."""
    outputs, inputs = weight_OI.shape
    size = inputs // scale_OG.shape[1]
    hessian = gram_II + damping * gram_II.diagonal().mean() * torch.eye(inputs, dtype=torch.float64)
    codes = torch.zeros(outputs, inputs, dtype=torch.uint8)
    for o in range(outputs):
        row = weight_OI[o].clone()
        for n, j in enumerate(order):
            left = order[n:]
            inverse = torch.linalg.inv(hessian[left][:, left])
            scale, zero = float(scale_OG[o, j // size]), float(zero_point_OG[o, j // size])
            code = min(max(round(float(row[j]) / scale) + zero, 0), max_code)
            codes[o, j] = int(code)
            error = (float(row[j]) - scale * (code - zero)) / float(inverse[0, 0])
            for k, column in enumerate(left[1:], start=1):
                row[column] -= error * float(inverse[0, k])
    return codes
