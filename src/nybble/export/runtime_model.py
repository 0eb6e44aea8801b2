"""RuntimeModel: a model that another runtime computes, with the interface of transformers."""

from __future__ import annotations

import copy
from abc import abstractmethod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from nybble.models.companions import load_generation_config


class RuntimeModel(GenerationMixin, PreTrainedModel):
    """An exported model on the CPU: forward returns logits, generate generates.

    The runtime keeps keys and values of the tokens that it has seen. A subclass implements `reset` and `compute`.

    Args:
        folder: the export.
        config: transformers configuration of the model.
    """

    main_input_name = "input_ids"

    def __init__(self, folder: Path, config: Any) -> None:
        # Not the constructor of PreTrainedModel, which chooses kernels for the layers of a torch model.
        nn.Module.__init__(self)
        self.config, self.generation_config = copy.deepcopy(config), GenerationConfig.from_model_config(config)
        load_generation_config(folder, self)
        self._state_ids = torch.empty(1, 0, dtype=torch.int64)  # [B, past] tokens whose keys and values the state holds
        self._generating = False

    @abstractmethod
    def reset(self) -> None:
        """Forget all tokens."""

    @abstractmethod
    def compute(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        """Compute logits of new tokens, and keep their keys and values.

        Args:
            input_ids: int64 [B, T].
            attention_mask: int64 [B, past + T], 0 for padding.
            position_ids: int64 [B, T]; number of tokens before each, without padding.

        Returns:
            Logits, float32 [B, T, V]. Those of padding may be anything finite.
        """

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
            self.reset()
            self._state_ids = input_ids
        else:
            self._state_ids = torch.cat([self._state_ids, input_ids], dim=1)
        batch, length = input_ids.shape
        mask = torch.ones(batch, past + length, dtype=torch.int64) if attention_mask is None else attention_mask
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, past:]
        return self.compute(input_ids, mask, positions)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Tensor | None = None,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Compute logits of all tokens; during generation, only of those that are new since the last call.

        Args:
            input_ids: int64 [B, T].
            attention_mask: int64 [B, past + T], 0 for padding.
            past_key_values: of the output of the last call: the new tokens follow those of that call. The runtime has
                one state, so an earlier output cannot be continued.

        Returns:
            Output whose logits are float32 [B, T, V], or [B, new tokens, V] during generation.
        """
        past = self._state_ids.shape[1]
        if self._generating:  # all tokens come each time, and past_key_values of the last output with them
            grown = 0 < past < input_ids.shape[1] and torch.equal(input_ids[:, :past], self._state_ids)
            logits = self.infer(input_ids[:, past:] if grown else input_ids, attention_mask, reset=not grown)
        elif past_key_values is not None:
            assert past_key_values is self._state_ids, "only the last call can be continued"
            logits = self.infer(input_ids, attention_mask, reset=False)
        else:
            logits = self.infer(input_ids, attention_mask, reset=True)
        return CausalLMOutputWithPast(logits=logits, past_key_values=self._state_ids)  # type: ignore[arg-type]

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as in transformers, with the same arguments. Keys and values are kept in the runtime's state."""
        self._generating, self._state_ids = True, self._state_ids[:, :0]
        try:
            return super().generate(*args, **kwargs | {"use_cache": False})  # type: ignore[misc]
        finally:
            self._generating = False
