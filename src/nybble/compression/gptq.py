"""GPTQ (https://arxiv.org/abs/2210.17323): round column by column; the later columns compensate the rounding error.

    H = mean of x x^T + damping * mean of its diagonal * I        U = upper Cholesky factor of H^-1, so H^-1 = U^T U
    for each column j:    w'_j = fake_quantize(w_j)    e = (w_j - w'_j) / U_jj    w_k <- w_k - e U_jk for all k > j

Scale and zero point of a group are chosen for its running weights just before its first column is rounded. The error
of column j is weighed by 1 / U_jj^2, which is its effect on the output after all later columns have compensated it.
Columns are processed one group at a time; the effect of a group on all later columns is one matrix product.

If the scale method can fit scales to fixed codes (se can), the result is polished: fit all scales of a row, give each
code its best value in turn (`descend`), and fit the scales again. GPTQ compensates an error in later columns only, so
the earlier columns still have something to gain.

With `activation_order`, columns with large inputs are rounded first. Scale and zero point are then chosen for the
original weights, because the columns of a group are no longer neighbours.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from nybble.compression.base import Rounder, RoundingMethod, ScaleMethod
from nybble.compression.calibration import Calibration
from nybble.compression.init import RoundedWeight
from nybble.compression.output_error import RoundingTarget
from nybble.errors import ModelError
from nybble.quant.grid import dequantize, quantize, quantize_dequantize
from nybble.quant.scheme import QuantScheme

log = logging.getLogger("nybble")


class GPTQ(RoundingMethod):
    """The method gptq."""

    def make_rounder(
        self,
        name: str,
        gram_II: Tensor | None,
        scales: ScaleMethod,
        scheme: QuantScheme,
        calibration: Calibration | None,
    ) -> Rounder:
        """See RoundingMethod.make_rounder.

        Raises:
            ModelError: the Hessian is not positive definite at any damping.
        """
        assert gram_II is not None, "gptq needs calibration text"
        assert calibration is not None, "gptq needs calibration text"
        hessian = Hessian.of(gram_II, calibration.gptq_damping, name, calibration.gptq_activation_order)

        def round_rows(weight_OI: Tensor) -> RoundedWeight:
            running_OI, scale_OG, zero_point_OG = compensate(weight_OI, hessian, scheme, scales)
            codes_OI = quantize(running_OI, scale_OG, zero_point_OG, scheme)
            rounded = RoundedWeight(codes_OI, running_OI, scale_OG, zero_point_OG)
            return polish(rounded, RoundingTarget(weight_OI, hessian.matrix_II), scheme, scales)

        return round_rows


@dataclass(frozen=True)
class Hessian:
    """Damped Hessian of the output error of the layers that share an input.

    Attributes:
        matrix_II: gram + damping * mean of its diagonal * I.
        order_I: order in which the columns are rounded, int64; None: as they come.
        upper_II: Cholesky factor U of the inverse, in that order; see the head of this file.
    """

    matrix_II: Tensor
    order_I: Tensor | None
    upper_II: Tensor

    @staticmethod
    def of(gram_II: Tensor, damping: float, name: str = "", activation_order: bool = False) -> Hessian:
        """Damp and factor a matrix. If it is not positive definite, the damping is raised tenfold, up to 1.

        Args:
            gram_II: mean of x x^T over the inputs x; at least float32. It becomes matrix_II: for the widest inputs of
                large models, each copy takes gigabytes.
            damping: relative to the mean of the diagonal.
            name: layer name for messages.
            activation_order: sort the columns by the size of their inputs.

        Raises:
            ModelError: the matrix is not positive definite at any damping, because the inputs are not finite.
        """
        mean = float(gram_II.diagonal().mean()) or 1.0  # 1 for a layer whose inputs are all zero
        order_I = gram_II.diagonal().argsort(descending=True) if activation_order else None
        matrix_II, diagonal_I, requested = gram_II, gram_II.diagonal().clone(), damping
        while True:
            matrix_II.diagonal().copy_(diagonal_I + damping * mean)
            upper_II = _inverse_factor(matrix_II, order_I)
            if upper_II is not None:
                if damping > requested:
                    log.warning(
                        "%s: the Hessian is not positive definite with damping %g; used %g", name, requested, damping
                    )
                return Hessian(matrix_II, order_I, upper_II)
            if damping >= 1:
                raise ModelError(
                    f"the Hessian of {name} must be positive definite; it is not, even with damping 1; "
                    "check the calibration text, or leave gptq out"
                )
            damping = min(1.0, 10 * damping)


def _inverse_factor(matrix_II: Tensor, order_I: Tensor | None) -> Tensor | None:
    """Upper Cholesky factor of the inverse, in an order of the columns; None if either is not positive definite.

    All three steps compute in one matrix, which is column-major as LAPACK wants it.
    """
    ordered_II = matrix_II if order_I is None else matrix_II[order_I][:, order_I]
    work_II = torch.empty_like(matrix_II).mT.copy_(ordered_II)
    del ordered_II
    info = torch.zeros((), dtype=torch.int32, device=work_II.device)
    torch.linalg.cholesky_ex(work_II, out=(work_II, info))
    if info:
        return None
    torch.cholesky_inverse(work_II, out=work_II)
    torch.linalg.cholesky_ex(work_II, upper=True, out=(work_II, info))
    return None if info else work_II


def compensate(
    weight_OI: Tensor, hessian: Hessian, scheme: QuantScheme, scales: ScaleMethod
) -> tuple[Tensor, Tensor, Tensor]:
    """Round all columns in turn, with compensation in the later ones.

    Args:
        weight_OI: float32 (float64 in tests).
        hessian: of the inputs, in the same dtype.
        scheme: bits and group size.
        scales: chooses scale and zero point.

    Returns:
        running_OI, the weights as they were when each column was rounded; scale_OG; zero_point_OG. The codes are
        quantize(running_OI, scale_OG, zero_point_OG).
    """
    groups = scheme.num_groups(weight_OI.shape[-1])
    size = weight_OI.shape[-1] // groups
    one_group = QuantScheme(scheme.bits, None, scheme.symmetric)
    order_I = torch.arange(weight_OI.shape[-1], device=weight_OI.device) if hessian.order_I is None else hessian.order_I
    scale_columns: list[Tensor] = []
    zero_point_columns: list[Tensor] = []
    if hessian.order_I is not None:
        scale_OG, zero_point_OG = scales.search(weight_OI, hessian.matrix_II.diagonal(), scheme)
        scale_columns, zero_point_columns = list(scale_OG.unbind(1)), list(zero_point_OG.unbind(1))
    upper_II, order = hessian.upper_II, order_I.tolist()
    running_IO = weight_OI.T[order_I].contiguous()
    for start in range(0, len(running_IO), size):
        end = start + size
        if hessian.order_I is None:
            importance_K = upper_II.diagonal()[start:end] ** -2
            scale_O1, zero_point_O1 = scales.search(running_IO[start:end].T.contiguous(), importance_K, one_group)
            scale_columns.append(scale_O1[:, 0])
            zero_point_columns.append(zero_point_O1[:, 0])
        errors_KO = torch.empty_like(running_IO[start:end])
        for j in range(start, end):
            g = order[j] // size
            scale_O1, zero_point_O1 = scale_columns[g][:, None], zero_point_columns[g][:, None]
            column_O1 = running_IO[j][:, None]
            rounded_O1 = quantize_dequantize(column_O1, scale_O1, zero_point_O1, scheme)
            torch.div((column_O1 - rounded_O1)[:, 0], upper_II[j, j], out=errors_KO[j - start])
            running_IO[j + 1 : end].addr_(upper_II[j, j + 1 : end], errors_KO[j - start], alpha=-1)
        running_IO[end:].addmm_(upper_II[start:end, end:].T, errors_KO, alpha=-1)
    running_OI = torch.empty_like(weight_OI)
    running_OI[:, order_I] = running_IO.T
    return running_OI, torch.stack(scale_columns, 1), torch.stack(zero_point_columns, 1)


def polish(rounded: RoundedWeight, target: RoundingTarget, scheme: QuantScheme, scales: ScaleMethod) -> RoundedWeight:
    """Fit all scales of a row, then all codes, then all scales again. The error of no row rises.

    Args:
        rounded: the result of `compensate`.
        target: the original rows, with the damped Hessian.
        scheme: bits and group size.
        scales: fits the scales. If it cannot, `rounded` is returned.

    Returns:
        New codes and scales; zero points and weight_OI stay.
    """
    zero_point_OG = rounded.zero_point_OG
    scale_OG = scales.fit(target, rounded.codes_OI, rounded.scale_OG, zero_point_OG)
    if scale_OG is None:
        return rounded
    codes_OI = descend(rounded.codes_OI, scale_OG, zero_point_OG, target, scheme)
    fitted_OG = scales.fit(target, codes_OI, scale_OG, zero_point_OG)
    assert fitted_OG is not None, "a scale method either fits scales or does not"
    return RoundedWeight(codes_OI, rounded.weight_OI, fitted_OG, zero_point_OG)


def descend(
    codes_OI: Tensor, scale_OG: Tensor, zero_point_OG: Tensor, target: RoundingTarget, scheme: QuantScheme
) -> Tensor:
    """One pass of coordinate descent over all columns (QuantEase, https://arxiv.org/abs/2309.01885).

        w'_j <- fake_quantize(w'_j - (H (w' - w))_j / H_jj)

    Each code gets the value that is best with all others as they are, so the error of no row rises.

    Args:
        codes_OI: the present codes.
        scale_OG, zero_point_OG: they stay.
        target: rows to approximate. Its matrix must be damped, so that its diagonal is positive.
        scheme: bits and group size.

    Returns:
        codes [O, I], uint8.
    """
    hessian_II = target.gram_II
    size = codes_OI.shape[-1] // scale_OG.shape[-1]
    rounded_IO = dequantize(codes_OI, scale_OG, zero_point_OG).T.contiguous()
    slope_IO = hessian_II @ (rounded_IO - target.weight_OI.T)
    for start in range(0, len(rounded_IO), size):
        end = start + size
        scale_O1, zero_point_O1 = scale_OG[:, start // size, None], zero_point_OG[:, start // size, None]
        moves_KO = torch.empty_like(rounded_IO[start:end])
        for j in range(start, end):
            wanted_O1 = (rounded_IO[j] - slope_IO[j] / hessian_II[j, j])[:, None]
            best_O1 = quantize_dequantize(wanted_O1, scale_O1, zero_point_O1, scheme)
            torch.sub(best_O1[:, 0], rounded_IO[j], out=moves_KO[j - start])
            slope_IO[j + 1 : end].addr_(hessian_II[j, j + 1 : end], moves_KO[j - start])
        rounded_IO[start:end] += moves_KO
        slope_IO[end:].addmm_(hessian_II[start:end, end:].T, moves_KO)
    return quantize(rounded_IO.T.contiguous(), scale_OG, zero_point_OG, scheme)
