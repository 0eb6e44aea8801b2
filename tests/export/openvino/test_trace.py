"""Graphs with past keys and values as state: ports, rotary embeddings."""

from pathlib import Path

import pytest
import torch

from nybble.errors import ExportError
from nybble.export.openvino import trace
from nybble.export.openvino.runtime import core
from nybble.export.openvino.states import find_states
from tests.export.openvino.conftest import Exported
from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.tiny import make_model


def test_inputs_outputs_and_state_have_the_names_of_optimum_intel(exported: Exported) -> None:
    graph = core().read_model(exported.folder / "openvino_model.xml")
    inputs = {port.any_name: (str(port.partial_shape), port.element_type.get_type_name()) for port in graph.inputs}
    assert inputs == {
        "input_ids": ("[?,?]", "i64"),
        "attention_mask": ("[?,?]", "i64"),
        "position_ids": ("[?,?]", "i64"),
        "beam_idx": ("[?]", "i32"),
    }
    assert [port.any_name for port in graph.outputs] == ["logits"]
    states = {
        name: (sink.get_element_type().get_type_name(), str(sink.input(0).get_partial_shape()))
        for sink in graph.get_sinks()
        for name in [sink.get_variable_id()]
    }
    assert states == {
        f"past_key_values.{i}.{leaf}present.{i}.{leaf}": ("f32", "[?,2,?,32]")
        for i in (0, 1)
        for leaf in ("key", "value")
    }


@pytest.mark.usefixtures("needs_openvino")
def test_attention_gets_float_masks(tmp_path: Path) -> None:
    """OpenVINO is slow with boolean masks."""
    graph, weights, _ = trace.trace_model(make_checkpoint(tmp_path / "quantized", "llama", num_hidden_layers=1))
    assert len(weights) == 9
    assert all(node.output(0).get_target_inputs() for node in weights.values())
    masks = [
        node.input(3).get_element_type().get_type_name()
        for node in graph.get_ops()
        if node.get_type_name() == "ScaledDotProductAttention"
    ]
    assert masks == ["f32"]


def test_the_wrapped_model_continues_from_past_keys_and_values() -> None:
    model = make_model("llama", num_hidden_layers=1)
    wrapped, ids = trace._ModelWithPast(model.config, ()), torch.randint(0, 256, (2, 7))
    wrapped.model, wrapped.states = model, find_states(model, "past_key_values")
    empty = [torch.zeros(2, 2, 0, 16)] * 2
    beam = torch.arange(2)
    with torch.no_grad():
        expected = model(ids).logits
        first, *past = wrapped.forward(ids[:, :4], torch.ones(2, 4), torch.arange(4).expand(2, -1), beam, *empty)
        second, *past = wrapped.forward(ids[:, 4:], torch.ones(2, 7), torch.arange(4, 7).expand(2, -1), beam, *past)
        torch.testing.assert_close(torch.cat([first, second], dim=1), expected, rtol=0, atol=1e-5)
        # beam_idx reorders the past: the sequences change places.
        token, position = torch.tensor([[5], [6]]), torch.full((2, 1), 7)
        swapped, *_ = wrapped.forward(token, torch.ones(2, 8), position, beam.flip(0), *past)
        reordered = model(torch.cat([ids.flip(0), token], dim=1)).logits[:, -1:]
        torch.testing.assert_close(swapped, reordered, rtol=0, atol=1e-5)
    assert [tensor.shape for tensor in past] == [(2, 2, 7, 16)] * 2


@pytest.mark.usefixtures("needs_openvino")
def test_a_model_that_cannot_be_traced_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyError("mamba " * 100)

    monkeypatch.setattr("openvino.convert_model", fail)
    checkpoint = make_checkpoint(tmp_path / "quantized", "llama", num_hidden_layers=1)
    with pytest.raises(
        ExportError, match=r"LlamaForCausalLM cannot be traced \(KeyError: 'mamba .*\); remove"
    ) as error:
        trace._convert(checkpoint)
    assert len(str(error.value)) < 450


def test_rope_that_depends_on_the_length_is_fixed_while_tracing() -> None:
    model = make_model("phi3")
    rope = model.model.rotary_emb
    assert rope.rope_type == "longrope"
    with pytest.raises(RuntimeError, match="inside"), trace._fixed_rope(model):
        assert rope.rope_type == "default"
        raise RuntimeError("inside")
    assert rope.rope_type == "longrope"


def test_other_rope_is_left_alone() -> None:
    model = make_model("llama")
    with trace._fixed_rope(model):
        assert model.model.rotary_emb.rope_type == "llama3"
