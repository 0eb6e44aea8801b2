"""nybble.training.teacher: states equal those of the model, are computed once, and survive an interruption."""

import json
from pathlib import Path

import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM

from nybble.models.head import last_hidden_states
from nybble.training import teacher
from nybble.training.teacher import teacher_hidden_states
from tests.helpers.tiny import make_model


@pytest.fixture
def forward_sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of sequences in each forward of the teacher."""
    sizes: list[int] = []

    def record(model: object, ids: torch.Tensor) -> torch.Tensor:
        sizes.append(len(ids))
        return last_hidden_states(model, ids)

    monkeypatch.setattr(teacher, "last_hidden_states", record)
    return sizes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_equal_those_of_the_model(dtype: torch.dtype, tmp_path: Path) -> None:
    model, ids = make_model("llama").to(dtype), torch.randint(0, 256, (5, 8))
    states = teacher_hidden_states(tmp_path / "states.bin", model, ids, 2, "x")
    assert (len(states), states.shape, states.dtype) == (5, (5, 8, 64), dtype)
    with torch.no_grad():
        assert torch.equal(states[2:4], last_hidden_states(model, ids[2:4]))


def test_states_are_indexed_by_number_slice_and_tensor(tmp_path: Path) -> None:
    states = teacher_hidden_states(tmp_path / "states.bin", make_model("llama"), torch.randint(0, 256, (5, 8)), 5, "x")
    assert torch.equal(states[3], states[2:][1])
    assert torch.equal(states[torch.tensor([4, 0])], torch.stack([states[4], states[0]]))


def test_states_on_disk_are_not_computed_again(tmp_path: Path, forward_sizes: list[int]) -> None:
    model, ids, path = make_model("llama"), torch.randint(0, 256, (5, 8)), tmp_path / "states.bin"
    first = teacher_hidden_states(path, model, ids, 2, "x")[:]
    advanced: list[int] = []
    assert torch.equal(teacher_hidden_states(path, model, ids, 2, "x", advanced.append)[:], first)
    assert forward_sizes == [2, 2, 1]
    assert advanced == [5], "what is on disk counts as progress"


def test_interrupted_computation_continues(tmp_path: Path, forward_sizes: list[int]) -> None:
    model, ids, path = make_model("llama"), torch.randint(0, 256, (6, 8)), tmp_path / "states.bin"
    expected = teacher_hidden_states(tmp_path / "undisturbed.bin", model, ids, 2, "x")[:]
    forward_sizes.clear()

    def interrupt(sequences: int) -> None:
        if len(forward_sizes) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        teacher_hidden_states(path, model, ids, 2, "x", interrupt)
    assert json.loads(path.with_suffix(".json").read_text())["done"] == 4
    assert torch.equal(teacher_hidden_states(path, model, ids, 2, "x")[:], expected)
    assert forward_sizes == [2, 2, 2]


@pytest.mark.parametrize("change", ["tokens", "identity", "dtype", "raw file deleted"])
def test_states_of_another_source_are_computed_again(change: str, tmp_path: Path, forward_sizes: list[int]) -> None:
    model, ids, path = make_model("llama"), torch.randint(0, 256, (2, 8)), tmp_path / "states.bin"
    teacher_hidden_states(path, model, ids, 2, "x")
    if change == "tokens":
        ids[0, 0] += 1
    elif change == "dtype":
        model = model.to(torch.bfloat16)
    elif change == "raw file deleted":
        path.unlink()
    states = teacher_hidden_states(path, model, ids, 2, "y" if change == "identity" else "x")
    assert forward_sizes == [2, 2]
    with torch.no_grad():
        assert torch.equal(states[:], last_hidden_states(model, ids))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux lists the mapped files")
def test_file_is_not_mapped_between_accesses(tmp_path: Path) -> None:
    states = teacher_hidden_states(tmp_path / "states.bin", make_model("llama"), torch.randint(0, 256, (2, 8)), 2, "x")
    selected, one = states[torch.tensor([1, 0])], states[0]
    assert torch.equal(selected[1], one)
    assert "states.bin" not in Path("/proc/self/maps").read_text()


def test_width_is_that_of_the_head(tmp_path: Path) -> None:
    """OPT projects its hidden states to the width of the embedding before the head."""
    config = OPTConfig(
        vocab_size=260, hidden_size=64, word_embed_proj_dim=32, num_hidden_layers=1, num_attention_heads=2, ffn_dim=64,
        max_position_embeddings=64,
    )  # fmt: skip
    model, ids = OPTForCausalLM(config).eval(), torch.zeros(2, 8, dtype=torch.int64)
    assert teacher_hidden_states(tmp_path / "states.bin", model, ids, 1, "x")[:].shape == (2, 8, 32)
