"""The model of --teacher."""

from pathlib import Path

import pytest
import torch

from nybble.errors import ModelError
from nybble.tasks.teacher import load_teacher
from tests.helpers.tiny import make_model, save_model


def test_teacher_has_the_dtype_of_the_student_and_is_frozen(tmp_path: Path) -> None:
    student = make_model("smollm", dtype=torch.bfloat16)
    teacher = load_teacher(str(save_model(tmp_path / "teacher", "smollm", seed=1)), student, False)
    assert teacher.dtype == torch.bfloat16
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    name = "model.layers.0.mlp.up_proj.weight"
    expected = make_model("smollm", seed=1).get_parameter(name).bfloat16()
    assert torch.equal(teacher.get_parameter(name), expected)


def test_teacher_with_another_vocabulary_is_refused(tmp_path: Path) -> None:
    path = save_model(tmp_path / "wider", "smollm", vocab_size=300)
    with pytest.raises(ModelError, match="--teacher must have the vocabulary of --pretrained, 260 tokens; .* has 300"):
        load_teacher(str(path), make_model("smollm"), False)


def test_errors_name_the_option(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"^--teacher {tmp_path}/nowhere must be a model folder"):
        load_teacher(f"{tmp_path}/nowhere", make_model("smollm"), False)
