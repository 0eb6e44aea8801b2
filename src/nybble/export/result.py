"""What an export wrote."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class ExportResult:
    """What was exported.

    Attributes:
        linear_weights: number of linear layers whose weights were written as codes.
        embedding_weights: number of embeddings and heads with codes; a format may hold their values in 16 bits.
        bytes: size of the model files, without the tokenizer.
        logit_difference: largest absolute difference between the logits of the exported model and those of torch in
            float32 with the weights that the export holds; None where they were not compared.
        rounded: weight that the format cannot hold exactly -> largest difference of one of its values.
        widened: "3 bits in 4" -> number of weights that the format holds in more bits than their codes have.
    """

    linear_weights: int
    embedding_weights: int
    bytes: int
    logit_difference: float | None
    rounded: dict[str, float] = field(default_factory=dict)
    widened: dict[str, int] = field(default_factory=dict)
