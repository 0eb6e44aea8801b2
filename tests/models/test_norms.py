"""What a norm adds to its weight, compared with the norms of transformers."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated
from transformers.models.nemotron.modeling_nemotron import NemotronLayerNorm1P
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNorm, Qwen3NextRMSNormGated

from nybble.models.norms import norm_offset


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("kind", "offset"),
    [
        (LlamaRMSNorm, 0), (Gemma3RMSNorm, 1), (NemotronLayerNorm1P, 1), (CohereLayerNorm, 0), (nn.LayerNorm, 0),
        (nn.RMSNorm, 0), (Qwen3NextRMSNorm, 1), (Qwen3NextRMSNormGated, 0),
        (lambda size: MambaRMSNormGated(size, group_size=16), 0),
    ],
)  # fmt: skip
def test_norm_offset(kind: Callable[[int], nn.Module], offset: float, dtype: torch.dtype) -> None:
    norm = kind(48).to(dtype)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.normal_()
    weights = {name: parameter.clone() for name, parameter in norm.named_parameters()}
    assert norm_offset(norm) == offset
    assert all(torch.equal(weights[name], parameter) for name, parameter in norm.named_parameters())


def test_a_gated_norm_is_called_with_a_gate() -> None:
    class Gated(Gemma3RMSNorm):
        def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * gate.sigmoid()

    assert norm_offset(Gated(8)) == 1


def test_a_norm_that_needs_more_arguments_counts_as_one_without_an_offset() -> None:
    class Strange(nn.RMSNorm):
        def forward(self, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
            return super().forward(a + b + c)

    assert norm_offset(Strange(8)) == 0
