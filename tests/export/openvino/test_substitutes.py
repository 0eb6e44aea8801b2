"""What stands for functions of transformers while a model is traced: masks, scans, attention."""

import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.models.kimi_linear.modeling_kimi_linear import chunk_kimi_delta_attention
from transformers.models.mamba.modeling_mamba import mamba_selective_scan
from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

from nybble.errors import ExportError
from nybble.export.openvino.substitutes import LOWEST, _plain_attention, attention_mask, substituted
from tests.helpers.tiny import make_model

MASK = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1]])


def slow_mask(mask_BS: Tensor, queries: int, window: int | None = None, chunk: int | None = None) -> Tensor:
    """A token attends to tokens that are not padding, not later, in its window and chunk, and always to itself."""
    batch, keys = mask_BS.shape
    mask = torch.full((batch, 1, queries, keys), LOWEST)
    for b in range(batch):
        padding = next(s for s in range(keys) if mask_BS[b, s])
        for t in range(queries):
            position = keys - queries + t
            for s in range(position + 1):
                near = window is None or s > position - window
                together = chunk is None or (s - padding) // chunk == (position - padding) // chunk
                if s == position or (mask_BS[b, s] and near and together):
                    mask[b, 0, t, s] = 0.0
    return mask


@pytest.mark.parametrize("queries", [1, 3, 7])
@pytest.mark.parametrize("limits", [{}, {"window": 3}, {"chunk": 2}], ids=["full", "window", "chunk"])
def test_masks_are_those_of_a_slow_loop(queries: int, limits: dict[str, int]) -> None:
    assert torch.equal(attention_mask(MASK, queries, **limits), slow_mask(MASK, queries, **limits))


def test_functions_are_replaced_in_the_modules_of_a_model_and_come_back() -> None:
    model = make_model("mistral", num_hidden_layers=1)
    module: Any = sys.modules[type(model).__module__]
    original, attention = module.create_causal_mask, F.scaled_dot_product_attention
    with pytest.raises(KeyError), substituted(model, lambda: MASK) as names:
        assert names == {"create_causal_mask", "create_sliding_window_causal_mask"}
        hidden = torch.zeros(2, 3, 64)
        made = module.create_causal_mask(config=model.config, inputs_embeds=hidden, attention_mask=MASK)
        assert torch.equal(made, slow_mask(MASK, 3))
        made = module.create_sliding_window_causal_mask(model.config, hidden, MASK, past_key_values=None)
        assert torch.equal(made, slow_mask(MASK, 3, window=8))
        assert module.create_causal_mask(model.config, hidden, made) is made
        with pytest.raises(ExportError, match=r"its attention has a mask of its own \(or_mask_function\)"):
            module.create_causal_mask(model.config, hidden, MASK, or_mask_function=print)
        assert F.scaled_dot_product_attention is attention
        raise KeyError
    assert module.create_causal_mask is original


def test_attention_with_biases_is_not_fused() -> None:
    model = make_model("llama", num_hidden_layers=1)
    model.config.alibi = True
    original = F.scaled_dot_product_attention
    with substituted(model, lambda: MASK):
        assert F.scaled_dot_product_attention is _plain_attention
    assert F.scaled_dot_product_attention is original


@pytest.mark.parametrize("options", [{}, {"scale": 0.3}, {"enable_gqa": True}])
def test_plain_attention_is_that_of_torch(options: dict[str, Any]) -> None:
    query, key, value = torch.randn(2, 4, 3, 8), *(torch.randn(2, 2, 7, 8) for _ in range(2))
    if not options.get("enable_gqa"):
        key, value = (x.repeat_interleave(2, dim=1) for x in (key, value))
    mask = attention_mask(MASK, 3)
    torch.testing.assert_close(
        _plain_attention(query, key, value, mask, **options),
        F.scaled_dot_product_attention(query, key, value, mask, **options),
    )


def scan_inputs() -> dict[str, Any]:
    """mamba2: batch 2, 5 tokens, 4 heads of 8 channels, 2 groups of 6 states."""
    return {
        "hidden_states": torch.randn(2, 5, 4, 8), "dt": torch.randn(2, 5, 4), "A": -torch.rand(4),
        "B": torch.randn(2, 5, 2, 6), "C": torch.randn(2, 5, 2, 6), "D": torch.randn(4), "dt_bias": torch.randn(4),
        "dt_softplus": True, "initial_states": torch.randn(2, 4, 8, 6),
    }  # fmt: skip


@pytest.mark.usefixtures("needs_openvino")
@pytest.mark.parametrize("limit", [(0.0, float("inf")), (0.2, 0.9)])
def test_the_scan_of_mamba2(limit: tuple[float, float]) -> None:
    inputs = scan_inputs() | {"dt_limit": limit}
    with substituted(mamba_like("mamba2"), lambda: MASK):
        made = module_of("mamba2").mamba2_chunk_scan(**inputs)
    expected = mamba2_chunk_scan(**inputs, chunk_size=4, return_final_states=True)
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("needs_openvino")
def test_the_scan_of_mamba_continues_the_state() -> None:
    """transformers starts it from zeros: one scan of all tokens is two scans of parts."""
    inputs = {
        "hidden_states": torch.randn(2, 8, 5), "dt": torch.randn(2, 8, 5), "B": torch.randn(2, 6, 5),
        "C": torch.randn(2, 6, 5), "z": torch.randn(2, 8, 5),
    }  # fmt: skip
    fixed = {"A": -torch.rand(8, 6), "D": torch.randn(8), "delta_bias": torch.randn(8), "delta_softplus": True}
    state, parts = torch.zeros(2, 8, 6), []
    with substituted(mamba_like("mamba"), lambda: state):
        for part in (slice(0, 2), slice(2, 5)):
            sliced = {name: tensor[..., part] for name, tensor in inputs.items()}
            output, state = module_of("mamba").mamba_selective_scan(**sliced, **fixed)
            parts.append(output)
    expected = mamba_selective_scan(**inputs, **fixed, return_last_state=True)
    torch.testing.assert_close((torch.cat(parts, dim=-1), state), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("needs_openvino")
@pytest.mark.parametrize(
    ("original", "kind", "decay"),
    [(torch_chunk_gated_delta_rule, "qwen3_next", (4,)), (chunk_kimi_delta_attention, "kimi_linear", (4, 8))],
)
def test_the_gated_delta_rule(original: Any, kind: str, decay: tuple[int, ...]) -> None:
    heads = 4 if kind == "kimi_linear" else 2
    inputs = {
        "query": torch.randn(2, 5, heads, 8), "key": torch.randn(2, 5, heads, 8), "value": torch.randn(2, 5, 4, 6),
        "g": -torch.rand(2, 5, *decay), "beta": torch.rand(2, 5, 4), "initial_state": torch.randn(2, 4, 8, 6),
        "use_qk_l2norm_in_kernel": True,
    }  # fmt: skip
    with substituted(mamba_like(kind), lambda: MASK):
        made = getattr(module_of(kind), original.__name__)(**inputs)
    torch.testing.assert_close(made, original(**inputs, output_final_state=True), rtol=1e-4, atol=1e-5)


def module_of(kind: str) -> Any:
    return sys.modules[f"transformers.models.{kind}.modeling_{kind}"]


def mamba_like(kind: str) -> torch.nn.Module:
    """A model whose layers are defined where those of the family are."""
    layer: Any = type("Layer", (torch.nn.Module,), {"__module__": module_of(kind).__name__})()
    layer.config = None
    return layer
