"""What models keep of earlier tokens, as their caches say, and caches of given tensors."""

from typing import Any

import torch

from nybble.export.openvino.states import TracedCache, find_states
from tests.export.openvino.test_hybrids import make
from tests.helpers.tiny import make_model


def names_and_shapes(kind: str) -> dict[str, tuple[int, ...]]:
    return {state.past: state.shape for state in find_states(make(kind), "past_key_values")}


def test_attention_keeps_keys_and_values() -> None:
    model = make_model("mistral")
    states = find_states(model, "past_key_values")
    assert [state.past for state in states] == [
        f"past_key_values.{i}.{leaf}" for i in (0, 1) for leaf in ("key", "value")
    ]
    assert states[2].present == "present.1.key"
    assert {state.shape for state in states} == {(-1, 2, -1, 32)}


def test_keys_and_values_may_differ_in_width() -> None:
    """Latent attention keeps one head: the latent and the rotated key."""
    assert names_and_shapes("youtu")["past_key_values.0.key"] == (-1, 1, -1, 32)
    assert names_and_shapes("youtu")["past_key_values.0.value"] == (-1, 1, -1, 8)


def test_layers_may_keep_states_of_several_kinds() -> None:
    assert names_and_shapes("falcon_h1") == {
        name.format(i): shape
        for i in (0, 1)
        for name, shape in {
            "cache_params.past.conv.{}": (-1, 160, 4),
            "cache_params.past.ssm.{}": (-1, 8, 16, 16),
            "cache_params.past.key.{}": (-1, 2, -1, 16),
            "cache_params.past.value.{}": (-1, 2, -1, 16),
        }.items()
    }
    assert list(names_and_shapes("lfm2")) == [f"cache_params.past.{name}" for name in ("conv.0", "key.0", "value.0")]


def test_a_traced_cache_replaces_its_tensors() -> None:
    """A model continues from the tensors of a cache, which it does not change."""
    model: Any = make("falcon_h1")
    states, ids = find_states(model, "past_key_values"), torch.randint(0, 256, (2, 9))
    tensors = [state.zeros(2, 0) for state in states]
    parts = []
    with torch.no_grad():
        for part in (ids[:, :5], ids[:, 5:]):
            cache = TracedCache(model.config, states, tensors)
            before = [tensor.clone() for tensor in tensors]
            parts.append(model(part, past_key_values=cache, use_cache=True).logits)
            assert all(torch.equal(tensor, copy) for tensor, copy in zip(tensors, before, strict=True))
            tensors = cache.tensors()
        torch.testing.assert_close(torch.cat(parts, dim=1), model(ids).logits, rtol=0, atol=1e-4)
