"""Checks of a model that has just been loaded: what its files hold and what the model is must be the same.

transformers fills missing weights with random numbers, and leaves out weights that the configuration has no place for.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from nybble.errors import ModelError
from nybble.models.layers_on_disk import tensors_of

log = logging.getLogger("nybble")

_DERIVED = re.compile(r"(inv_freq|masked_bias|position_ids|\.attn\.bias|num_batches_tracked)$")
"""Tensors of older checkpoints that models now compute: rotary frequencies, causal masks, positions, counters."""

_SAMPLES_PER_PARAMETER = 4096
"""Values of each parameter that enter the fingerprint: enough to notice training, few enough to take no time."""


class Fingerprint:
    """A short hash that tells models with the same name apart: SHA-256 of configuration, dtype and some weights.

    Args:
        model: transformers.PreTrainedModel, whose parameters are added in their order.
    """

    def __init__(self, model: Any) -> None:
        self._digest = hashlib.sha256(f"{model.config.to_json_string()} {model.dtype}".encode())

    def add(self, parameter: Tensor) -> None:
        """Add some thousand values of a parameter."""
        step = parameter.numel() // _SAMPLES_PER_PARAMETER + 1
        self._digest.update(parameter.detach().flatten()[::step].float().cpu().numpy().tobytes())

    @property
    def hexadecimal(self) -> str:
        """16 digits."""
        return self._digest.hexdigest()[:16]


def check_complete(model: Any, missing: Collection[str], unused: Collection[str], name: str, parts: bool) -> None:
    """Check that the files hold exactly the weights of the model.

    Args:
        model: transformers.PreTrainedModel.
        missing: parameters that are not in the files.
        unused: tensors in the files that the model has no parameter for.
        name: of the model, for messages.
        parts: the model is the text model of a checkpoint with further parts, whose tensors may be left out.

    Raises:
        ModelError: weights are missing, or would be left out.
    """
    if missing and parts:
        raise ModelError(
            f"{name} must be a language model alone; transformers cannot take the {type(model).__name__} out of it "
            f"({len(missing)} weights are not found, first: {min(missing)}); choose its text model"
        )
    if missing:
        raise ModelError(
            f"{name} must have all weights of a {type(model).__name__}; {len(missing)} are not in its files "
            f"(first: {min(missing)}); download the model again"
        )
    own = {_without_numbers(key) for key in model.state_dict()}
    unused = [key for key in unused if not _DERIVED.search(key)]
    lost = [key for key in unused if not parts or "language_model" in key or _without_numbers(key) in own]
    if lost:
        raise ModelError(
            f"the {type(model).__name__} of config.json must use all weights in the files of {name}; it has no place "
            f"for {len(lost)} (first: {min(lost)}); use the config.json that belongs to the weights"
        )
    if parts:
        log.warning(
            "only the text model of %s is used (%s); its other parts (vision or audio) are left out of the result",
            name, type(model).__name__,
        )  # fmt: skip


def check_finite(model: Any, name: str, fingerprint: Fingerprint | None = None) -> None:
    """Check that all weights are finite: parameters, buffers of the files, and rotary frequencies.

    Args:
        model: transformers.PreTrainedModel.
        name: of the model, for the error message.
        fingerprint: takes all parameters in the same pass, which reads a model on disk once.

    Raises:
        ModelError: a weight is NaN or infinite; the tensor and its first such row are named.
    """
    frequencies = {key for key, _ in model.named_buffers() if key.endswith("inv_freq")}
    parameters = {key for key, _ in model.named_parameters()}
    for key, tensor in tensors_of(model, dict.fromkeys((*model.state_dict(), *frequencies))):
        if fingerprint is not None and key in parameters:
            fingerprint.add(tensor)
        # The sum is finite only if all numbers are; it needs no second tensor. It can also overflow.
        if not tensor.is_floating_point() or bool(tensor.sum(dtype=torch.float32).isfinite()):
            continue
        if tensor.ndim == 0 and tensor.isinf():  # a bound of activations (Gemma 4)
            continue
        rows = _nonfinite_rows(tensor)
        if len(rows):
            if key in frequencies:
                cause = "the rope parameters in config.json are wrong; correct them"
            elif tensor.dtype == torch.float16:
                cause = "the weights are broken or too large for float16; use --dtype float32 or bfloat16"
            else:
                cause = "the weights are broken; download the model again"
            raise ModelError(
                f"{name} must have finite weights; {key} has NaN or infinity in {len(rows)} of {len(_rows(tensor))} "
                f"rows (first: row {int(rows[0])}); {cause}"
            )


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(len(tensor), -1) if tensor.ndim else tensor.reshape(1, 1)


def _nonfinite_rows(tensor: Tensor) -> Tensor:
    """Return the indices of the rows that hold NaN or infinity."""
    return (~_rows(tensor).isfinite().all(-1)).nonzero().flatten()


def _without_numbers(key: str) -> str:
    return re.sub(r"\.\d+(?=\.|$)", ".N", key)
