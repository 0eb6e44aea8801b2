"""Open whatever a person names: a model, a finished run, or a folder inside one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from nybble.errors import ModelError, NybbleError, describe_error
from nybble.export.base import Exporter
from nybble.export.checks import damaged_export, exporter_of
from nybble.models import quantized_file, quantized_model
from nybble.models.loading import LoadedModel, load
from nybble.options.model import DeviceOptions
from nybble.run.complete import QUANTIZED, check_complete, no_model_error
from nybble.run.marker import is_run
from nybble.workflows.plan import pick_place


def open_target(target: str, place: DeviceOptions, named: str, strict: bool = False) -> LoadedModel:
    """Open a run (its 4-bit model), a folder that a run made, or anything that --pretrained takes.

    Args:
        target: what a person named.
        place: where and how a model computes in torch.
        named: the option that named it, for error messages.
        strict: compute in float32: exports as torch does and not as deployed, models in torch unless --dtype says
            another dtype.

    Raises:
        RunError: a run that is not finished.
        ModelError: nothing that can be opened.
    """
    path, trust = Path(target), place.trust_remote_code
    if is_run(path):
        path = path / QUANTIZED
        if not (path / quantized_file.WEIGHTS_FILE).is_file():
            raise no_model_error(Path(target))
    device, dtype = pick_place(replace(place, dtype="float32") if strict and place.dtype == "auto" else place)
    check_complete(path)
    if (path / quantized_file.WEIGHTS_FILE).is_file():
        model, tokenizer, _ = quantized_model.load_quantized(path, dtype, trust)
        return LoadedModel(model.to(device), tokenizer, str(path))
    exporter = exporter_of(path)
    if exporter is not None:
        return open_exported(path, exporter, trust, strict)
    try:
        return load(target, dtype, device, trust)
    except ModelError as error:
        raise ModelError(str(error).replace("--pretrained", named)) from error


def open_exported(path: Path, exporter: Exporter, trust_remote_code: bool, strict: bool = False) -> LoadedModel:
    """Open an export in its runtime; arguments and errors: see `open_target`."""
    exporter.check_installed(f"opening {path}")
    config = quantized_model.load_config(path, trust_remote_code)
    tokenizer = quantized_model.load_tokenizer(path, trust_remote_code)
    try:
        model = exporter.open_model(path, config, strict)
    except (NybbleError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a runtime raises whatever its code leads to
        raise damaged_export(
            path, exporter.name, f"must be an export that {exporter.label} opens; it does not ({describe_error(error)})"
        ) from error
    return LoadedModel(model, tokenizer, str(path))
