"""Exports: one file a format, listed in FORMATS. Each writes QuantizedWeights and the untouched rest of the model, and reads its own output back."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from types import ModuleType

from nybble.errors import MissingExtraError, OptionError

# format -> modules that its extra brings
FORMATS: dict[str, tuple[str, ...]] = {"openvino": ("openvino", "openvino_tokenizers")}


def check_formats(formats: Iterable[str], flag: str = "--export") -> None:
    """Raise before the expensive part: OptionError for an unknown format, MissingExtraError for one that is not installed."""
    for name in formats:
        if name not in FORMATS:
            raise OptionError(f"{flag} must name known formats ({', '.join(FORMATS)}); got {name}")
        if any(importlib.util.find_spec(module) is None for module in FORMATS[name]):
            raise MissingExtraError(name, f"exporting to {name}")


def _openvino() -> ModuleType:
    from nybble.export import openvino

    return openvino


# Modules with export(model, tokenizer, quantized, folder) -> counts, open_model(folder, config, strict), read_weights(folder), MODEL_XML.
EXPORTERS: dict[str, Callable[[], ModuleType]] = {"openvino": _openvino}
