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


@pytest.mark.parametrize("axis", [0, 2], ids=["Gemma 3n", "DeepSeek V4"])
def test_several_streams_of_a_token_stand_side_by_side(axis: int) -> None:
    """DeepSeek V4 has one in the last layer."""
    states_TSD = torch.randn(5, 4, 8)

    def forward(input_ids: torch.Tensor, **_: object) -> SimpleNamespace:
        streams = states_TSD[None].movedim(2, axis)
        return SimpleNamespace(hidden_states=(streams, streams, states_TSD[None, :, 0]))

    outputs = decoder_outputs(SimpleNamespace(base_model=forward, device="cpu"), torch.arange(5))
    assert torch.equal(outputs[0], states_TSD.reshape(5, 32))
    assert torch.equal(outputs[1], torch.cat([states_TSD[:, 0], torch.zeros(5, 24)], dim=1))
