"""Plain attention for short texts."""

import pytest
import torch

from nybble.tasks.attention import MAX_PLAIN_LENGTH, plain_attention
from tests.helpers.tiny import make_model


@pytest.mark.parametrize(("length", "expected"), [(MAX_PLAIN_LENGTH, "eager"), (MAX_PLAIN_LENGTH + 1, "sdpa")])
def test_short_texts_use_plain_attention_on_a_cpu(length: int, expected: str) -> None:
    model = make_model("smollm")
    with plain_attention(model, length):
        assert model.config._attn_implementation == expected
        with plain_attention(model, length):
            pass
        assert model.config._attn_implementation == expected
    assert model.config._attn_implementation == "sdpa"


def test_other_devices_keep_their_attention() -> None:
    model = make_model("smollm").to("meta")
    with plain_attention(model, 1):
        assert model.config._attn_implementation == "sdpa"


def test_attention_is_restored_after_an_error() -> None:
    model = make_model("smollm")
    with pytest.raises(KeyboardInterrupt), plain_attention(model, 1):
        raise KeyboardInterrupt
    assert model.config._attn_implementation == "sdpa"


def test_both_implementations_compute_the_same() -> None:
    model, ids = make_model("smollm"), torch.randint(256, (2, 12))
    fused = model(ids).logits
    with plain_attention(model, 12):
        torch.testing.assert_close(model(ids).logits, fused, rtol=1e-4, atol=1e-4)
