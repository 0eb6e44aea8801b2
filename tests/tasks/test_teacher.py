"""The model of --teacher."""

import json
from pathlib import Path

import pytest
import torch

from nybble.errors import ModelError
from nybble.models.loading import LoadedModel
from nybble.tasks.teacher import load_teacher
from tests.helpers.tiny import make_model, make_tokenizer, save_model

STUDENT = LoadedModel(make_model("smollm"), make_tokenizer(), "m")


def test_teacher_has_the_dtype_of_the_student_and_is_frozen(tmp_path: Path) -> None:
    student = LoadedModel(make_model("smollm", dtype=torch.bfloat16), make_tokenizer(), "m")
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
        load_teacher(str(path), STUDENT, False)


def test_a_teacher_of_other_tokens_is_refused_though_it_has_as_many(tmp_path: Path) -> None:
    path = save_model(tmp_path / "teacher", "smollm")
    tokenizer = json.loads((path / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    one, two = list(vocabulary)[:2]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ModelError, match="--teacher must have the vocabulary of --pretrained; .* has as many tokens"):
        load_teacher(str(path), STUDENT, False)


def test_errors_name_the_option(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"^--teacher {tmp_path}/nowhere must be a model folder"):
        load_teacher(f"{tmp_path}/nowhere", STUDENT, False)
