"""OpenVINOModel: an exported model with the interface of a transformers model."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nybble.export.runtime_model import RuntimeModel

FLOAT32_PROPERTIES = {
    "INFERENCE_PRECISION_HINT": "f32",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
    "KV_CACHE_PRECISION": "f32",
}
"""Properties under which the CPU plugin computes as torch does in float32. EXECUTION_MODE_HINT=ACCURACY would
decompress the weights."""


@functools.cache
def core() -> Any:
    """Return the openvino.Core of this process, which lives as long as the process.

    OpenVINO's CPU plugin gives the thread a stack for signals when a Core loads it, and puts the former one back when
    that Core goes. Of two Cores whose lives overlap one leaves the thread with freed memory, and the next signal
    (Ctrl+C) ends the process with a segmentation fault.
    """
    import openvino as ov

    return ov.Core()


class OpenVINOModel(RuntimeModel):
    """An exported model on the CPU: forward returns logits, generate generates.

    Args:
        model_xml: file of the graph.
        config: transformers configuration of the model.
        properties: of the CPU plugin. Empty means OpenVINO's own settings.
    """

    def __init__(self, model_xml: Path, config: Any, properties: Mapping[str, str]) -> None:
        super().__init__(model_xml.parent, config)
        self.request = core().compile_model(model_xml, "CPU", dict(properties)).create_infer_request()

    def reset(self) -> None:
        """Forget all tokens."""
        self.request.reset_state()

    def compute(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        """Compute logits of new tokens; see `RuntimeModel.compute`."""
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "beam_idx": torch.arange(len(input_ids), dtype=torch.int32),
        }
        output = self.request.infer({name: value.contiguous().numpy() for name, value in inputs.items()})
        return torch.from_numpy(output["logits"].copy())
