"""Which model, where it computes, and in what precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from nybble.options.base import Group, option

Offload = Literal["auto", "none", "disk"]
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


@dataclass(frozen=True, kw_only=True)
class OffloadOptions(ModelOptions):
    """A model that may be larger than the memory."""

    offload: Offload = option(
        "auto",
        "Where decoder blocks wait. none: in memory. disk: in the safetensors files of the model, so that memory "
        "follows the largest block. auto: disk where the model does not fit.",
    )
