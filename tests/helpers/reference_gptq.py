"""GPTQ written as slowly and plainly as possible: no Cholesky factor, no blocks of columns, one row at a time, float64.

For each column the Hessian of the columns that are left is inverted anew.
"""

import torch
from torch import Tensor


def reference_gptq(
    weight_OI: Tensor, hessian_II: Tensor, scale_OG: Tensor, zero_point_OG: Tensor, max_code: int, order: list[int]
) -> Tensor:
    """Codes [O, I] for fixed scales and zero points, with the columns rounded in this order.

    Args:
        weight_OI: float64.
        hessian_II: damped, float64.
        scale_OG, zero_point_OG: float64.
        max_code: largest code.
        order: a permutation of the columns.
    """
    outputs, inputs = weight_OI.shape
    size = inputs // scale_OG.shape[1]
    codes_OI = torch.zeros(outputs, inputs, dtype=torch.uint8)
    for o in range(outputs):
        row = weight_OI[o].clone()
        for n, j in enumerate(order):
            left = order[n:]
            inverse = torch.linalg.inv(hessian_II[left][:, left])
            scale, zero_point = float(scale_OG[o, j // size]), float(zero_point_OG[o, j // size])
            code = min(max(round(float(row[j]) / scale) + zero_point, 0), max_code)
            codes_OI[o, j] = int(code)
            error = (float(row[j]) - scale * (code - zero_point)) / float(inverse[0, 0])
            for k, column in enumerate(left[1:], start=1):
                row[column] -= error * float(inverse[0, k])
    return codes_OI
