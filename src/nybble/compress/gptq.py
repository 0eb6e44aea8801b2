"""GPTQ (arXiv 2210.17323): round column by column, and let the columns still to come make up for the error.

    H = mean of x x^T + damping * mean of its diagonal * 1           U = upper Cholesky factor of H^-1, so that H^-1 = U^T U
    for each column j:    w'_j = fake_quantize(w_j)    e = (w_j - w'_j) / U_jj    w_k <- w_k - e U_jk  for all k > j

A group's scale and zero are found on its running weights just before its first column is rounded, each column weighed by 1 / U_jj^2, which is what an error
there costs after all later columns have made up for it. Columns are worked off a group at a time; the effect of a group on all
later columns is one matrix product.

With se, `descend` then goes over the columns once more and gives each code the value that is best with all others as they now are (coordinate
descent; QuantEase, arXiv 2309.01885): GPTQ makes up for an error in later columns only, so the earlier ones can still gain.

With `activation_order`, columns with large inputs come first; scales and zeros are then found on the weights as they were.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nybble.errors import ModelError
from nybble.quant.grid import dequantize, quantize, quantize_dequantize
from nybble.quant.scheme import QuantScheme

log = logging.getLogger("nybble")

DAMPING = 0.01
# Weights [O, I] and importance [I] -> scale and zero [O, G].
Find = Callable[[Tensor, Tensor, QuantScheme], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Hessian:
    """Of a layer's output error, damped.

    Attributes:
        matrix_II: gram + damping * mean of its diagonal * 1.
        order_I: in which columns are rounded; None = as they come.
        upper_II: Cholesky factor U of its inverse in that order, see the head of this file.
    """

    matrix_II: Tensor
    order_I: Tensor | None
    upper_II: Tensor

    @staticmethod
    def of(gram_II: Tensor, damping: float = DAMPING, name: str = "", activation_order: bool = False) -> Hessian:
        """Where it is not positive definite the damping is multiplied by 10, up to 1, and that is logged.

        Raises:
            ModelError: not positive definite at any damping (the inputs are not finite); the layer is named.
        """
        eye_II = torch.eye(gram_II.shape[-1], dtype=gram_II.dtype, device=gram_II.device)
        mean, wanted = float(gram_II.diagonal().mean()) or 1.0, damping  # 1: a layer whose inputs are all zero
        order_I = gram_II.diagonal().argsort(descending=True) if activation_order else None
        while True:
            matrix_II = gram_II + damping * mean * eye_II
            upper_II = _upper(matrix_II if order_I is None else matrix_II[order_I][:, order_I])
            if upper_II is not None:
                if damping > wanted:
                    log.warning(
                        "%s: the Hessian is not positive definite with damping %g; used %g", name, wanted, damping
                    )
                return Hessian(matrix_II, order_I, upper_II)
            if damping >= 1:
                raise ModelError(
                    f"the Hessian of {name} must be positive definite; it is not, even with damping 1; check the calibration text, or leave gptq out"
                )
            damping = min(1.0, 10 * damping)


def _upper(matrix_II: Tensor) -> Tensor | None:
    lower_II, bad = torch.linalg.cholesky_ex(matrix_II)
    if bad:
        return None
    upper_II, bad = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower_II), upper=True)
    return None if bad else upper_II


def compensate(weight_OI: Tensor, hessian: Hessian, scheme: QuantScheme, find: Find) -> tuple[Tensor, Tensor, Tensor]:
    """Round all rows.

    Args:
        weight_OI: float32 (float64 in tests).
        find: gives scale and zero of weights.

    Returns: the weights as they were when each column was rounded, scale, zero; quantize() of them gives the codes.
    """
    groups = scheme.groups(weight_OI.shape[-1])
    size = weight_OI.shape[-1] // groups
    one_group = QuantScheme(scheme.bits, None, scheme.symmetric)
    order_I = torch.arange(weight_OI.shape[-1], device=weight_OI.device) if hessian.order_I is None else hessian.order_I
    scales: list[Tensor] = []
    zero_points: list[Tensor] = []
    if hessian.order_I is not None:
        scale_OG, zero_point_OG = find(weight_OI, hessian.matrix_II.diagonal(), scheme)
        scales, zero_points = list(scale_OG.unbind(1)), list(zero_point_OG.unbind(1))
    upper_II, order = hessian.upper_II, order_I.tolist()
    running_IO = weight_OI.T[order_I].contiguous()
    for start in range(0, len(running_IO), size):
        end = start + size
        if hessian.order_I is None:
            scale_O1, zero_point_O1 = find(
                running_IO[start:end].T.contiguous(), upper_II.diagonal()[start:end] ** -2, one_group
            )
            scales.append(scale_O1[:, 0])
            zero_points.append(zero_point_O1[:, 0])
        errors_KO = torch.empty_like(running_IO[start:end])
        for j in range(start, end):
            g = order[j] // size
            scale_O1, zero_point_O1 = scales[g][:, None], zero_points[g][:, None]
            column_O1 = running_IO[j][:, None]
            rounded_O1 = quantize_dequantize(column_O1, scale_O1, zero_point_O1, scheme)
            torch.div((column_O1 - rounded_O1)[:, 0], upper_II[j, j], out=errors_KO[j - start])
            running_IO[j + 1 : end].addr_(upper_II[j, j + 1 : end], errors_KO[j - start], alpha=-1)
        running_IO[end:].addmm_(upper_II[start:end, end:].T, errors_KO, alpha=-1)
    running_OI = torch.empty_like(weight_OI)
    running_OI[:, order_I] = running_IO.T
    return running_OI, torch.stack(scales, 1), torch.stack(zero_points, 1)


def descend(
    codes_OI: Tensor,
    scale_OG: Tensor,
    zero_point_OG: Tensor,
    weight_OI: Tensor,
    hessian_II: Tensor,
    scheme: QuantScheme,
) -> Tensor:
    """One pass over all columns: w'_j = fake_quantize(w'_j - (H (w' - w))_j / H_jj). No row's error (w' - w)^T H (w' - w) rises.

    Args:
        codes_OI, scale_OG, zero_point_OG: where it starts; scales and zeros stay.
        weight_OI: the weight to come close to.
        hessian_II: damped, so that its diagonal is positive.

    Returns: codes [O, I].
    """
    size = weight_OI.shape[-1] // scale_OG.shape[-1]
    made_IO = dequantize(codes_OI, scale_OG, zero_point_OG).T.contiguous()
    slope_IO = hessian_II @ (made_IO - weight_OI.T)
    for start in range(0, len(made_IO), size):
        end = start + size
        scale_O1, zero_point_O1 = scale_OG[:, start // size, None], zero_point_OG[:, start // size, None]
        moves_KO = torch.empty_like(made_IO[start:end])
        for j in range(start, end):
            wanted_O1 = (made_IO[j] - slope_IO[j] / hessian_II[j, j])[:, None]
            best_O1 = quantize_dequantize(wanted_O1, scale_O1, zero_point_O1, scheme)
            torch.sub(best_O1[:, 0], made_IO[j], out=moves_KO[j - start])
            slope_IO[j + 1 : end].addr_(hessian_II[j, j + 1 : end], moves_KO[j - start])
        made_IO[start:end] += moves_KO
        slope_IO[end:].addmm_(hessian_II[start:end, end:].T, moves_KO)
    return quantize(made_IO.T.contiguous(), scale_OG, zero_point_OG, scheme)
