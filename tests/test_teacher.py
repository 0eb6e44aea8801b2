"""The teacher's states: exact, computed once, resumed, and never mistaken for another model's or text's."""

import json
from pathlib import Path

import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM

from nybble.models.head import last_hidden_states
from nybble.training import teacher
from tests.tiny import make_model


@pytest.fixture
def loss_mask(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of sequences in the forwards made."""
    calls: list[int] = []

    def spy(model: object, ids: torch.Tensor) -> torch.Tensor:
        calls.append(len(ids))
        return last_hidden_states(model, ids)

    monkeypatch.setattr(teacher, "last_hidden_states", spy)
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_are_those_of_the_model_and_are_kept(dtype: torch.dtype, tmp_path: Path, loss_mask: list[int]) -> None:
    model, ids = make_model("llama").to(dtype), torch.randint(0, 256, (5, 8))
    states = teacher.teacher_hidden_states(tmp_path / "states.bin", model, ids, 2, "x")
    assert states.dtype == dtype
    assert loss_mask == [2, 2, 1]
    with torch.no_grad():
        assert torch.equal(states[2:4], last_hidden_states(model, ids[2:4]))
    again = teacher.teacher_hidden_states(tmp_path / "states.bin", model, ids, 2, "x")
    assert torch.equal(again[:], states[:])
    assert torch.equal(again[3], states[2:][1])
    assert torch.equal(again[torch.tensor([4, 0])], torch.stack([states[4], states[0]]))
    assert loss_mask == [2, 2, 1], "nothing is computed twice"


def test_a_killed_run_goes_on(tmp_path: Path, loss_mask: list[int]) -> None:
    model, ids, path = make_model("llama"), torch.randint(0, 256, (6, 8)), tmp_path / "states.bin"
    whole = teacher.teacher_hidden_states(tmp_path / "whole.bin", model, ids, 2, "x")[:]
    loss_mask.clear()

    class Killed(Exception):
        pass

    def advance(done: int) -> None:
        if loss_mask and len(loss_mask) == 2:
            raise Killed

    with pytest.raises(Killed):
        teacher.teacher_hidden_states(path, model, ids, 2, "x", advance)
    assert json.loads(path.with_suffix(".json").read_text())["done"] == 4
    assert torch.equal(teacher.teacher_hidden_states(path, model, ids, 2, "x")[:], whole)
    assert loss_mask == [2, 2, 2]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux lists what is mapped")
def test_states_are_not_memory_of_the_process(tmp_path: Path) -> None:
    model, ids = make_model("llama"), torch.randint(0, 256, (2, 8))
    states = teacher.teacher_hidden_states(tmp_path / "states.bin", model, ids, 2, "x")
    taken = states[torch.tensor([1, 0])]
    assert taken.abs().sum() > 0
    assert "states.bin" not in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("change", ["tokens", "identity", "dtype"])
def test_states_of_something_else_are_made_anew(change: str, tmp_path: Path, loss_mask: list[int]) -> None:
    model, ids = make_model("llama"), torch.randint(0, 256, (2, 8))
    teacher.teacher_hidden_states(tmp_path / "states.bin", model, ids, 2, "x")
    if change == "tokens":
        ids[0, 0] += 1
    if change == "dtype":
        model = model.to(torch.bfloat16)
    states = teacher.teacher_hidden_states(tmp_path / "states.bin", model, ids, 2, "y" if change == "identity" else "x")
    assert loss_mask == [2, 2]
    with torch.no_grad():
        assert torch.equal(states[:], last_hidden_states(model, ids))


def test_states_are_as_wide_as_the_head_is(tmp_path: Path) -> None:
    config = OPTConfig(
        vocab_size=260,
        hidden_size=64,
        word_embed_proj_dim=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        ffn_dim=64,
        max_position_embeddings=64,
    )
    states = teacher.teacher_hidden_states(
        tmp_path / "states", OPTForCausalLM(config).eval(), torch.zeros(2, 8, dtype=torch.int64), 1, "x"
    )
    assert states[torch.tensor([0, 1])].shape == (2, 8, 32)
