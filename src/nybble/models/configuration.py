"""The configuration of a model, read and checked.

`--pretrained FOLDER` reads FOLDER/config.json, which can hold anything. transformers checks some fields when it reads
the file, others when it builds the model, and some never.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from nybble.errors import ModelError, first_line
from nybble.models.composite import auto_class, text_config
from nybble.models.folder import read_object

_FIELD_TYPES = {
    "model_type": (str, "a text"),
    "architectures": (list, "a list of texts"),
    "auto_map": (dict, "an object of texts"),
    "quantization_config": (dict, "an object"),
}
"""Fields that decide how a model is loaded -> their type, and what it is called."""

_POSITIVE = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "max_position_embeddings", "query_pre_attn_scalar",
)  # fmt: skip

_MOST = {"layer": 1000, "layers": 1000, "experts": 10_000}
"""Last word of a field that counts modules -> the largest number. Published models have at most some hundred layers. A
million would be built for hours before a weight is read."""


def config_value(config: Any, name: str) -> Any:
    """Return a field of a configuration; None where it is missing or has other values in other layers (Gemma 4).

    Args:
        config: transformers.PreTrainedConfig, which raises an error for a field of the second kind.
        name: of the field.
    """
    try:
        return getattr(config, name, None)
    except RuntimeError:
        return None


def check_config_file(folder: Path) -> None:
    """Check the fields of config.json that transformers uses without a check.

    Args:
        folder: with config.json.

    Raises:
        ModelError: a field has another type, or a number is impossible.
    """
    fields = read_object(folder / "config.json")
    for name, (kind, what) in _FIELD_TYPES.items():
        value = fields.get(name)
        if value is not None and not (isinstance(value, kind) and _holds_texts(name, value)):
            raise _field_error(folder, name, value, what)
    _check_counts(folder, fields)


def _check_counts(folder: Path, fields: dict[str, Any]) -> None:
    """Check the fields that count modules, and those of the configurations inside, under any name."""
    for name, value in fields.items():
        most = _MOST.get(name.rpartition("_")[2])
        if most is not None and isinstance(value, int) and value > most:
            raise _field_error(folder, name, value, f"at most {most}")
        if isinstance(value, dict):
            _check_counts(folder, value)


def _holds_texts(name: str, value: Any) -> bool:
    if name not in ("architectures", "auto_map"):
        return True
    return all(isinstance(part, str | list) for part in (value.values() if isinstance(value, dict) else value))


def check_config(folder: Path | None, config: Any) -> None:
    """Check the numbers of a configuration that transformers has read.

    Args:
        folder: where config.json is; None for a model of the hub.
        config: transformers.PreTrainedConfig.

    Raises:
        ModelError: a number is impossible.
    """
    config = text_config(config)
    for name in _POSITIVE:
        value = config_value(config, name)
        stated = name in config.to_dict() or name in getattr(config, "attribute_map", {})
        if isinstance(value, int | float) and stated and not value > 0:
            raise _field_error(folder, name, value, "a positive number")
    layers, most = config_value(config, "num_hidden_layers"), _MOST["layers"]
    if isinstance(layers, int) and layers > most:
        raise _field_error(folder, "num_hidden_layers", layers, f"at most {most}")


def explain_folder(folder: Path, reason: str) -> str | None:
    """Explain why a folder cannot be loaded, if that is because of config.json or of damaged weights.

    Args:
        folder: with config.json and without Python code.
        reason: what the library said.

    Returns:
        The message for the user: the field without which the model can be built, or the file or tensor that does not
        fit. None if nothing of this kind is wrong.
    """
    fields = read_object(folder / "config.json")
    if "model_type" not in fields:
        return f"{folder / 'config.json'} must name the model_type; it does not; download the model again"
    model = _build(fields)
    if model is not None:
        return _explain_weights(folder, model)
    for name, value in fields.items():
        without = {key: fields[key] for key in fields if key != name}
        if name != "model_type" and _build(without) is not None:
            return str(_field_error(folder, name, value, f"a value that the model can be built with ({reason})"))
    return f"{folder / 'config.json'} must describe a model that transformers can build: {reason}"


def _build(fields: dict[str, Any]) -> Any:
    """Build the model of a configuration without memory for its weights; None if transformers cannot."""
    from transformers import CONFIG_MAPPING

    try:
        config = CONFIG_MAPPING[fields["model_type"]].from_dict(dict(fields))
        with torch.device("meta"):
            return auto_class(config).from_config(config)
    except Exception:  # anything can fail at values that nobody has checked; the caller says what did
        return None


def _explain_weights(folder: Path, model: Any) -> str | None:
    """Return the message about the first damaged file, or the first tensor with another shape than in the model."""
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - not a dict
        except (OSError, SafetensorError) as error:
            return f"{path} must be a readable safetensors file; it is not ({first_line(error)}); download it again"
        for name, shape in shapes.items():
            if shape != expected.get(name, shape):
                return (
                    f"{folder / 'config.json'} must fit the weights; {name} is {shape} in {path.name} and "
                    f"{expected[name]} by the configuration; use the config.json that belongs to the weights"
                )
    return None


def _field_error(folder: Path | None, name: str, value: Any, requirement: str) -> ModelError:
    where = "config.json" if folder is None else str(folder / "config.json")
    return ModelError(
        f"{where}: {name} must be {requirement}; it is {str(value)[:80]!r}; correct it, or download the model again"
    )
