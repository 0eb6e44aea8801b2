"""Facts about model families that a transformers configuration does not state, as a registry.

The key is the `model_type` of the configuration. Other code branches on these facts and never on names. A model type
that is not registered gets `DEFAULT`, and `LMHead.verify` compares real logits, so that a wrong fact about the head
raises an error before training starts. Another package adds its family through the entry point group "nybble.families"
(see registry.py), or in the same process:

    FAMILIES.register("my_model", ModelFamily(softcap="final_logit_softcapping"))

Formula of the logits, with the facts that are set:

    logits = cap * tanh(multiplier * head(hidden) / cap),        multiplier = logit_scale / logit_divisor
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nybble.registry import Registry


@dataclass(frozen=True)
class ModelFamily:
    """Facts about one family.

    Attributes:
        softcap: name of the configuration field that holds the soft cap of the logits; None if there is none.
        logit_scale: name of the configuration field that multiplies the logits; None if there is none.
        logit_divisor: name of the configuration field that divides the logits; None if there is none.
    """

    softcap: str | None = None
    logit_scale: str | None = None
    logit_divisor: str | None = None


DEFAULT = ModelFamily()
"""Facts of a model type that is not registered."""


FAMILIES: Registry[ModelFamily] = Registry("model family", "nybble.families")

for _name, _facts in {
    "gemma2": ModelFamily(softcap="final_logit_softcapping"),
    "gemma3_text": ModelFamily(softcap="final_logit_softcapping"),
    "granite": ModelFamily(logit_divisor="logits_scaling"),
    "cohere": ModelFamily(logit_scale="logit_scale"),
    "cohere2": ModelFamily(logit_scale="logit_scale"),
}.items():
    FAMILIES.register(_name, _facts)


def family_of(config: Any) -> ModelFamily:
    """Return the facts for a transformers configuration: those of its model_type, or DEFAULT."""
    name = config.model_type
    return FAMILIES[name] if name in FAMILIES else DEFAULT  # noqa: SIM401 - a registry has no get with a default


def logit_transform(config: Any) -> tuple[float, float | None]:
    """Return what happens to the logits after the head.

    Args:
        config: transformers configuration.

    Returns:
        The multiplier, and the soft cap or None; see the formula at the top of this file.
    """
    family = family_of(config)
    multiplier = 1.0
    if family.logit_scale is not None:
        multiplier *= getattr(config, family.logit_scale)
    if family.logit_divisor is not None:
        multiplier /= getattr(config, family.logit_divisor)
    return multiplier, getattr(config, family.softcap) if family.softcap is not None else None
