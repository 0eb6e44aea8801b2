"""OnnxModel: an exported model with the interface of a transformers model.

GroupQueryAttention counts the tokens of a sequence from its first, so padding at the left would be a part of it. The
rows of a batch are therefore computed one by one, without their padding.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nybble.errors import ExportError
from nybble.export.runtime_model import RuntimeModel

FLOAT32_LEVEL = 1
"""Accuracy level of MatMulNBits and QMoE under which they compute in float32."""

_PAST, _PRESENT = "past_key_values.", "present."


class OnnxModel(RuntimeModel):
    """An exported model on the CPU: forward returns logits, generate generates.

    Args:
        model_file: the graph.
        config: transformers configuration of the model.
        accuracy_level: of MatMulNBits and QMoE; None keeps that of the file.
    """

    def __init__(self, model_file: Path, config: Any, accuracy_level: int | None) -> None:
        super().__init__(model_file.parent, config)
        self.session = _open_session(model_file, accuracy_level)
        self._past_inputs = [port for port in self.session.get_inputs() if port.name.startswith(_PAST)]
        self._outputs = ["logits", *(_PRESENT + port.name.removeprefix(_PAST) for port in self._past_inputs)]
        self._head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self._pasts: list[list[Any]] = []  # row -> its keys and values, as OrtValues

    def reset(self) -> None:
        """Forget all tokens."""
        self._pasts = []

    def compute(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        """Compute logits of new tokens; see `RuntimeModel.compute`.

        Raises:
            ExportError: a sequence is longer than the table of rotary embeddings.
        """
        batch, length = input_ids.shape
        if (tokens := int(attention_mask.sum(1).max())) > self.config.max_position_embeddings:
            raise ExportError(
                f"a text for an ONNX export must have at most {self.config.max_position_embeddings} tokens, the "
                f"context of the model; got {tokens}; choose a shorter one"
            )
        logits_BTV = torch.zeros(batch, length, self.config.vocab_size)
        self._pasts = self._pasts or [self._empty_past() for _ in range(batch)]
        for row, is_token_T in enumerate(attention_mask[:, -length:].bool()):
            if bool(is_token_T.any()):
                logits_BTV[row, is_token_T], self._pasts[row] = self._run(input_ids[row, is_token_T], self._pasts[row])
        return logits_BTV

    def _empty_past(self) -> list[Any]:
        import onnxruntime as ort

        empty = torch.zeros(1, self.config.num_key_value_heads, 0, self._head_size)
        return [ort.OrtValue.ortvalue_from_numpy(empty.numpy()) for _ in self._past_inputs]

    def _run(self, ids_T: Tensor, past: list[Any]) -> tuple[Tensor, list[Any]]:
        """Compute logits [T, V] of new tokens of one sequence; returns them with the new keys and values."""
        import onnxruntime as ort

        mask = torch.ones(1, past[0].shape()[2] + len(ids_T), dtype=torch.int64)
        inputs = {
            "input_ids": ort.OrtValue.ortvalue_from_numpy(ids_T[None].numpy()),
            "attention_mask": ort.OrtValue.ortvalue_from_numpy(mask.numpy()),
        } | {port.name: value for port, value in zip(self._past_inputs, past, strict=True)}
        logits, *present = self.session.run_with_ort_values(self._outputs, inputs)
        return torch.from_numpy(logits.numpy()[0]), present


def _open_session(model_file: Path, accuracy_level: int | None) -> Any:
    """Open the graph with as many threads as torch has. Another accuracy level is set in memory, not in the file."""
    import onnx
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # what is wrong with a file is in the exception too
    if accuracy_level is None:
        return ort.InferenceSession(model_file, options, providers=["CPUExecutionProvider"])
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(model_file.parent.absolute())
    )
    model = onnx.load(model_file, load_external_data=False)
    for node in model.graph.node:
        if node.op_type in ("MatMulNBits", "QMoE"):
            next(attribute for attribute in node.attribute if attribute.name == "accuracy_level").i = accuracy_level
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
