"""The model of --teacher, whose predictions are trained instead of the labels."""

from __future__ import annotations

from typing import Any

from nybble.data.generate import vocabulary_fingerprint
from nybble.errors import ModelError
from nybble.models import loading
from nybble.models.loading import LoadedModel


def load_teacher(teacher: str, student: LoadedModel, trust_remote_code: bool) -> Any:
    """Load a teacher in the dtype and on the device of its student.

    Args:
        teacher: value of --teacher: whatever --pretrained takes.
        student: the model of --pretrained.
        trust_remote_code: run Python code that comes with the teacher.

    Returns: a frozen transformers model in evaluation mode.

    Raises:
        ModelError: it cannot be loaded, or has another vocabulary.
        MissingExtraError: it is a GGUF file, and the extra `gguf` is not installed.
    """
    try:
        loaded = loading.load(teacher, student.model.dtype, student.model.device, trust_remote_code)
    except ModelError as error:
        raise ModelError(str(error).replace("--pretrained", "--teacher")) from error
    teacher_size, student_size = (len(each.model.get_output_embeddings().weight) for each in (loaded, student))
    if teacher_size != student_size:
        raise ModelError(
            f"--teacher must have the vocabulary of --pretrained, {student_size} tokens; {teacher} has {teacher_size}; "
            "use a model that was tuned from --pretrained"
        )
    if vocabulary_fingerprint(loaded.tokenizer) != vocabulary_fingerprint(student.tokenizer):
        raise ModelError(
            f"--teacher must have the vocabulary of --pretrained; {teacher} has as many tokens, but others; "
            "use a model that was tuned from --pretrained"
        )
    return loaded.model
