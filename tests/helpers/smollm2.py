"""SmolLM2-135M-Instruct, rounded to nearest in groups of 64: made once a session, for slow tests of exports."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nybble.models.checkpoint import QuantizedCheckpoint, open_checkpoint
from nybble.models.loading import load
from nybble.models.quantized_model import save_quantized
from nybble.quant.scheme import QuantScheme
from tests.helpers.rounding import round_model_to_nearest

CHAT = [{"role": "user", "content": "What is the capital of France?"}]
ANSWER = "Paris"


def smollm2_checkpoint(factory: pytest.TempPathFactory) -> QuantizedCheckpoint:
    """The checkpoint in the folder of this session's temporary files."""
    folder = factory.getbasetemp() / "smollm2-quantized"
    if not folder.is_dir():
        loaded = load("smollm2", torch.float32, torch.device("cpu"), trust_remote_code=False)
        save_quantized(folder, loaded, round_model_to_nearest(loaded.model, QuantScheme(group_size=64)))
    return open_checkpoint(folder)


def chat_ids(tokenizer: Any) -> torch.Tensor:
    """The question as tokens, int64 [1, T]."""
    encoded = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    return encoded["input_ids"]
