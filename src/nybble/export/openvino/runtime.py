"""OpenVINOModel: an exported model with the interface of a transformers model."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from nybble.models.companions import load_generation_config

FLOAT32_PROPERTIES = {
    "INFERENCE_PRECISION_HINT": "f32",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
    "KV_CACHE_PRECISION": "f32",
}
"""Properties under which the CPU plugin computes as torch does in float32. EXECUTION_MODE_HINT=ACCURACY would
decompress the weights."""


class OpenVINOModel(GenerationMixin, PreTrainedModel):
    """An exported model on the CPU: forward returns logits, generate generates.

    Args:
        model_xml: file of the graph.
        config: transformers configuration of the model.
        properties: of the CPU plugin. Empty means OpenVINO's own settings.
    """

    main_input_name = "input_ids"

    def __init__(self, model_xml: Path, config: Any, properties: Mapping[str, str]) -> None:
        import openvino as ov

        # Not the constructor of PreTrainedModel, which chooses kernels for the layers of a torch model.
        nn.Module.__init__(self)
        self.config, self.generation_config = copy.deepcopy(config), GenerationConfig.from_model_config(config)
        load_generation_config(model_xml.parent, self)
        self.request = ov.Core().compile_model(model_xml, "CPU", dict(properties)).create_infer_request()
        self._state_ids = torch.empty(1, 0, dtype=torch.int64)  # [B, past] tokens whose keys and values the state holds
        self._generating = False

    @property
    def device(self) -> torch.device:
        """The CPU."""
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """Type of the logits: float32."""
        return torch.float32

    def infer(self, input_ids: Tensor, attention_mask: Tensor | None = None, reset: bool = True) -> Tensor:
        """Compute logits of new tokens.

        Args:
            input_ids: int64 [B, T].
            attention_mask: int64 [B, past + T], 0 for padding; None means that there is no padding.
            reset: forget the state first. Otherwise the new tokens follow those of the state.

        Returns:
            Logits, float32 [B, T, V].
        """
        past = 0 if reset else self._state_ids.shape[1]
        if reset:
            self.request.reset_state()
            self._state_ids = input_ids
        else:
            self._state_ids = torch.cat([self._state_ids, input_ids], dim=1)
        batch, length = input_ids.shape
        mask = torch.ones(batch, past + length, dtype=torch.int64) if attention_mask is None else attention_mask
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, past:]
        inputs = {
            "input_ids": input_ids,
            "attention_mask": mask,
            "position_ids": positions,
            "beam_idx": torch.arange(batch, dtype=torch.int32),
        }
        output = self.request.infer({name: value.contiguous().numpy() for name, value in inputs.items()})
        return torch.from_numpy(output["logits"].copy())

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> CausalLMOutputWithPast:
        """Compute logits of all tokens; during generation, only of those that are new since the last call.

        Args:
            input_ids: int64 [B, T].
            attention_mask: int64 [B, T], 0 for padding.

        Returns:
            Output whose logits are float32 [B, T, V], or [B, new tokens, V] during generation.
        """
        past = self._state_ids.shape[1]
        extends_state = 0 < past < input_ids.shape[1] and torch.equal(input_ids[:, :past], self._state_ids)
        if self._generating and extends_state:
            logits = self.infer(input_ids[:, past:], attention_mask, reset=False)
        else:
            logits = self.infer(input_ids, attention_mask, reset=True)
        return CausalLMOutputWithPast(logits=logits)  # type: ignore[arg-type]

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as in transformers, with the same arguments. Keys and values are kept in OpenVINO's state."""
        self._generating, self._state_ids = True, self._state_ids[:, :0]
        try:
            return super().generate(*args, **kwargs | {"use_cache": False})  # type: ignore[misc]
        finally:
            self._generating = False
