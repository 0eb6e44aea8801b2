"""MLXModel: an exported model with the interface of a transformers model, computed by mlx-lm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nybble.export.runtime_model import RuntimeModel


class MLXModel(RuntimeModel):
    """An exported model on MLX's default device: forward returns logits, generate generates.

    Sequences are computed one by one, each without its padding and with its own cache of keys and values. On a CPU, mlx
    takes seconds for a token in float16, so that everything is computed in float32 there.

    Args:
        folder: the export.
        config: transformers configuration of the model.
        strict: compute in float32 with the factor of the embeddings that torch has in float32, instead of the dtype in
            the file.
    """

    def __init__(self, folder: Path, config: Any, strict: bool) -> None:
        import mlx.core as mx
        from mlx_lm.utils import load_model

        super().__init__(folder, config)
        model, _ = load_model(folder)
        if strict or mx.default_device() == mx.Device(mx.cpu):
            model.set_dtype(mx.float32)
        self._embedding_correction = _embedding_correction(config) if strict else 1.0
        # Not an attribute that torch would look into for parameters.
        self._mlx: tuple[Any, ...] = (model,)
        self._caches: list[Any] = []

    def reset(self) -> None:
        """Forget all tokens."""
        self._caches = []

    def compute(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        """Compute logits of new tokens; see `RuntimeModel.compute`. Those of padding are 0."""
        from mlx_lm.models.cache import make_prompt_cache

        if not self._caches:
            self._caches = [make_prompt_cache(self._mlx[0]) for _ in input_ids]
        new_BT = attention_mask[:, -input_ids.shape[1] :].bool()
        logits_BTV = torch.zeros(*input_ids.shape, self.config.get_text_config().vocab_size)
        for b, cache in enumerate(self._caches):
            if bool(new_BT[b].any()):
                logits_BTV[b, new_BT[b]] = self._forward(input_ids[b, new_BT[b]], cache)
        return logits_BTV

    def _forward(self, ids_T: Tensor, cache: Any) -> Tensor:
        """Compute logits of the next tokens of one sequence, float32 [T, V]."""
        import mlx.core as mx

        model, ids_1T = self._mlx[0], mx.array(ids_T.numpy()[None])
        arguments = {}
        if self._embedding_correction != 1.0:
            arguments["input_embeddings"] = model.model.embed_tokens(ids_1T) * self._embedding_correction
        logits_1TV = model(ids_1T, cache=cache, **arguments)
        return torch.from_numpy(np.array(logits_1TV[0].astype(mx.float32)))


def _embedding_correction(config: Any) -> float:
    """Factor of the embeddings of Gemma 3 in float32, relative to that of mlx-lm, which rounds it to bfloat16.

    transformers rounds it to the dtype of the model.
    """
    if config.model_type != "gemma3_text":
        return 1.0
    factor: float = config.hidden_size**0.5
    return factor / float(torch.tensor(factor).bfloat16())
