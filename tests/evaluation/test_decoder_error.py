"""nybble.evaluation.decoder_error on a model with one wrong layer."""

from types import SimpleNamespace

import pytest
import torch

from nybble.evaluation.decoder_error import decoder_errors, decoder_outputs
from tests.helpers.tiny import make_model


def test_outputs_are_those_of_every_layer_and_of_the_final_norm() -> None:
    model, ids = make_model("smollm"), torch.randint(0, 256, (24,))
    outputs = decoder_outputs(model, ids)
    assert outputs.shape == (2, 24, model.config.hidden_size)
    assert torch.equal(outputs[-1], model.model(ids[None]).last_hidden_state[0])


def test_errors_start_at_the_layer_that_is_wrong() -> None:
    model, ids = make_model("smollm"), torch.randint(0, 256, (24,))
    reference = decoder_outputs(model, ids)
    assert decoder_errors(model, ids, reference) == [0.0, 0.0]
    model.model.layers[1].mlp.down_proj.weight.data.mul_(2)
    first, second = decoder_errors(model, ids, reference)
    h, h_reference = model.model(ids[None]).last_hidden_state[0].double(), reference[1].double()
    expected = ((h - h_reference).square().sum(-1) / h_reference.square().sum(-1)).mean().item()
    assert first == 0.0
    assert second == pytest.approx(expected, rel=1e-4)  # float32 sums of 64 squares


def test_several_streams_of_a_token_stand_side_by_side() -> None:
    """DeepSeek V4 has them in all layers but the last."""

    def forward(input_ids: torch.Tensor, **_: object) -> SimpleNamespace:
        streams = torch.ones(1, input_ids.shape[1], 4, 8)
        return SimpleNamespace(hidden_states=(streams, streams, torch.ones(1, input_ids.shape[1], 8)))

    outputs = decoder_outputs(SimpleNamespace(base_model=forward, device="cpu"), torch.arange(5))
    assert outputs.shape == (2, 5, 32)
    assert outputs.sum((1, 2)).tolist() == [5 * 32, 5 * 8]
