"""Read back what an export holds: its weights, compared with those that were given to it, and its logits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nybble.errors import ExportError, NybbleError, describe_error
from nybble.quant.grid import dequantize
from nybble.quant.weight import QuantizedWeight

_VALUES_AT_ONCE = 1 << 22


def compare_weights(
    written: Mapping[str, QuantizedWeight],
    codes: Mapping[str, QuantizedWeight],
    values: Mapping[str, Tensor] | None,
    int8_tolerance: float,
    folder: Path,
) -> dict[str, float]:
    """Check that an export holds exactly the quantized weights that were given to it.

    Args:
        written: module name -> quantized weight, as given to the exporter.
        codes: the same, as read from the files; empty for a format without codes.
        values: module name -> weight, float32 [O, I], by the runtime's own reader; None where there is none.
        int8_tolerance: largest allowed difference of a value in an 8-bit weight, relative to the largest in its row.
        folder: the export, for the error message.

    Returns:
        8-bit weight that the format does not hold exactly -> largest difference of one of its values.

    Raises:
        ExportError: names, codes, scales, zero points or values differ.
    """
    read = codes.keys() if values is None else values.keys()
    if other := (read ^ written.keys()) | (codes.keys() - written.keys()):
        raise ExportError(
            f"{folder} must hold {len(written)} quantized weights; {len(read)} were read back, and {min(other)} only "
            "on one side; please report this"
        )
    rounded = {}
    for name, weight in written.items():
        if name in codes and (what := _differing(weight, codes[name])):
            raise _unequal(what, name, folder)
        if values is not None:
            difference = _difference(weight, values[name], int8_tolerance)
            if difference is None:
                raise _unequal("values", name, folder)
            if difference:
                rounded[name] = difference
    return rounded


def _unequal(what: str, name: str, folder: Path) -> ExportError:
    return ExportError(
        f"{folder} must hold the weights that were given to it; the {what} of {name} read back differently; "
        "please report this"
    )


def _differing(written: QuantizedWeight, read: QuantizedWeight) -> str:
    """What differs first; "" if nothing does."""
    for what, field in (("codes", "codes_OI"), ("scales", "scale_OG"), ("zero points", "zero_point_OG")):
        if not torch.equal(getattr(written, field), getattr(read, field)):
            return what
    return ""


def _difference(written: QuantizedWeight, read_OI: Tensor, int8_tolerance: float) -> float | None:
    """Largest absolute difference of a weight that was read back; None where it is too large."""
    if read_OI.shape != written.codes_OI.shape:
        return None
    allowed, largest = int8_tolerance if written.scheme.bits == 8 else 0.0, 0.0
    rows = max(1, _VALUES_AT_ONCE // read_OI.shape[1])
    for start in range(0, len(read_OI), rows):
        part = slice(start, start + rows)
        weight_OI = dequantize(written.codes_OI[part], written.scale_OG[part], written.zero_point_OG[part])
        difference_OI = (weight_OI - read_OI[part]).abs()
        if not bool((difference_OI <= allowed * weight_OI.abs().amax(1, keepdim=True)).all()):  # also true for NaN
            return None
        largest = max(largest, float(difference_OI.max()))
    return largest


def decode_logits(exported: Any, ids_1T: Tensor, prompt_length: int) -> Tensor:
    """Compute the logits [1, T, V] of a prompt at once, and then of one token after the other.

    Args:
        exported: an export with the interface of transformers.
        ids_1T: token ids, int64.
        prompt_length: tokens of the prompt.
    """
    output = exported(input_ids=ids_1T[:, :prompt_length], use_cache=True)
    parts = [output.logits]
    for i in range(prompt_length, ids_1T.shape[1]):
        output = exported(input_ids=ids_1T[:, i : i + 1], past_key_values=output.past_key_values, use_cache=True)
        parts.append(output.logits)
    return torch.cat(parts, dim=1)


def logit_difference(logits_1TV: Tensor, expected_1TV: Tensor, tolerance: float, folder: Path) -> float:
    """Return the largest absolute difference of logits.

    Args:
        logits_1TV: of an export.
        expected_1TV: of torch.
        tolerance: largest allowed difference, relative to the largest logit.
        folder: the export, for the error message.

    Raises:
        ExportError: the difference is larger.
    """
    difference, largest = float((logits_1TV.float() - expected_1TV).abs().max()), float(expected_1TV.abs().max())
    if not difference <= tolerance * largest:  # also true for NaN
        raise ExportError(
            f"{folder} must give the logits of torch within {tolerance} of the largest in float32; they "
            f"differ by {difference:.3g}, the largest is {largest:.3g}; please report this"
        )
    return difference


@contextmanager
def runtime_errors(label: str, name: str) -> Iterator[None]:
    """Turn what the code of a format or of its runtime raises in this block into one line.

    Args:
        label: of the format, for people.
        name: of the format, as --export has it.

    Raises:
        ExportError: anything was raised but errors of nybble, of files and of memory.
    """
    try:
        yield
    except (NybbleError, OSError, AssertionError, torch.OutOfMemoryError, MemoryError):
        raise
    except (Exception, SystemExit) as error:  # a runtime raises whatever its code leads to; mlx-lm calls exit
        raise ExportError(
            f"the runtime of {label} must be able to compute with the model; it fails ({describe_error(error)}); "
            f"remove {name} from --export"
        ) from error
