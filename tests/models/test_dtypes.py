"""Parameters that transformers keeps in float32: they stay so in the compressed model."""

from pathlib import Path
from typing import Any

import pytest
import torch

from nybble.models import quantized_model
from nybble.models.dtypes import kept_dtype
from nybble.models.loading import load
from tests.helpers.causal_types import save_tiny, tiny_model
from tests.helpers.rounding import round_model_to_nearest

CPU = torch.device("cpu")
SLOW = "axk1 dots1 ernie4_5_moe flint glm4_moe_lite hy_v3 hy_v4 kolibri1 nemotron_h solar_open"


def dtypes(model: Any) -> dict[str, torch.dtype]:
    return {name: tensor.dtype for name, tensor in (*model.named_parameters(), *model.named_buffers())}


@pytest.mark.parametrize(
    "model_type",
    ["deepseek_v3", "inkling2_text", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW.split())],
)
def test_a_compressed_model_has_the_dtypes_of_the_16_bit_one(model_type: str, tmp_path: Path) -> None:
    """The routers of many mixtures: rounded to bfloat16, they choose other experts."""
    loaded = load(str(save_tiny(tmp_path / "model", model_type)), torch.bfloat16, CPU)
    before = dtypes(loaded.model)
    assert set(before.values()) >= {torch.bfloat16, torch.float32}
    for name, tensor in (*loaded.model.named_parameters(), *loaded.model.named_buffers()):
        if kept_dtype(loaded.model, name, torch.bfloat16) == torch.float32:
            tensor.data.add_(0.001)  # no number that bfloat16 has
    quantized = round_model_to_nearest(loaded.model)
    quantized_model.save_quantized(tmp_path / "quantized", loaded, quantized)
    ids = torch.arange(16)[None]
    in_memory = quantized_model.load_quantized(tmp_path / "quantized", torch.bfloat16).model
    on_disk = quantized_model.load_quantized_on_disk(tmp_path / "quantized", torch.bfloat16, CPU).model
    assert dtypes(in_memory) == before
    for model in (in_memory, on_disk):
        assert torch.equal(model(input_ids=ids).logits, loaded.model(input_ids=ids).logits)


def test_what_is_kept_depends_on_the_dtype_of_the_others() -> None:
    model = tiny_model("deepseek_v3")
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert kept_dtype(model, bias, torch.bfloat16) == kept_dtype(model, bias, torch.float16) == torch.float32
    assert kept_dtype(model, "model.layers.1.mlp.gate.weight", torch.bfloat16) == torch.bfloat16
    model = tiny_model("gpt_oss")  # its norms overflow in float16 only
    assert kept_dtype(model, "model.norm.weight", torch.float16) == torch.float32
    assert kept_dtype(model, "model.norm.weight", torch.bfloat16) == torch.bfloat16
