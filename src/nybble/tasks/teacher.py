"""The model of --teacher, whose predictions are trained instead of the labels."""

from __future__ import annotations

from typing import Any

from nybble.errors import ModelError
from nybble.models import loading


def load_teacher(teacher: str, student: Any, trust_remote_code: bool) -> Any:
    """Load a teacher in the dtype and on the device of its student.

    Args:
        teacher: value of --teacher: whatever --pretrained takes.
        student: transformers model of --pretrained.
        trust_remote_code: run Python code that comes with the teacher.

    Returns: a frozen transformers model in evaluation mode.

    Raises:
        ModelError: it cannot be loaded, or its vocabulary has another size.
        MissingExtraError: it is a GGUF file, and the extra `gguf` is not installed.
    """
    try:
        model = loading.load(teacher, student.dtype, student.device, trust_remote_code).model
    except ModelError as error:
        raise ModelError(str(error).replace("--pretrained", "--teacher")) from error
    teacher_size, student_size = (model_.get_output_embeddings().weight.shape[0] for model_ in (model, student))
    if teacher_size != student_size:
        raise ModelError(
            f"--teacher must have the vocabulary of --pretrained, {student_size} tokens; {teacher} has {teacher_size}; "
            "use a model that was tuned from --pretrained"
        )
    return model
