"""Which model, where it computes, and in what precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from nybble.options.base import Group, option

Dtype = Literal["auto", "bfloat16", "float16", "float32"]


@dataclass(frozen=True, kw_only=True)
class DeviceOptions(Group):
    """Where and how a model computes."""

    TITLE: ClassVar[str] = "Model"

    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps, ...", basic=True)
    dtype: Dtype = option(
        "auto", "Compute dtype of the 16-bit model. auto: bfloat16 where it is fast, otherwise float32."
    )
    trust_remote_code: bool = option(False, "Run Python code that comes with the model.")


@dataclass(frozen=True, kw_only=True)
class ModelOptions(DeviceOptions):
    """The model, and where and how it computes."""

    pretrained: str = option(
        "", "Hub id, local folder, .gguf file, or smollm2 (SmolLM2-135M-Instruct, built in).", required=True
    )
