"""User errors: one line each: what was required, what came, what to do. The command line prints them and exits with 2.

`assert` is kept for our own mistakes; whatever a person can cause by input, files or machine raises one of these.
"""


class NybbleError(Exception):
    """Base of everything a user can cause and repair."""


class OptionError(NybbleError):
    """An option has an impossible value, or two options contradict each other."""


class ModelError(NybbleError):
    """The model cannot be found, read, or quantized."""


class DataError(NybbleError):
    """The text cannot be found or read, or there is too little of it."""


class HubUnreachableError(DataError):
    """Data are not on this machine, and the Hugging Face hub cannot be reached."""


class RunError(NybbleError):
    """The run folder is in use, foreign, damaged, or does not fit on the disk."""


class TrainingError(NybbleError):
    """Training cannot go on: the loss is not finite, for example."""


class ExportError(NybbleError):
    """A format cannot hold the model, or what was read back is not what was written."""


class MissingExtraError(NybbleError):
    """An optional dependency is not installed.

    Args:
        extra: name of the optional extra in pyproject.toml.
        purpose: what it is needed for, completing "... needed for".
    """

    def __init__(self, extra: str, purpose: str) -> None:
        super().__init__(
            f'the extra "{extra}" is needed for {purpose}; install it, in the clone, with: '
            f'pip install -c constraints.txt -e ".[{extra}]"'
        )


def without_remedy(error: NybbleError) -> str:
    """Return a message up to the last semicolon, behind which the remedy is."""
    return str(error).rpartition("; ")[0] or str(error)


def first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:200]


def describe_error(error: BaseException) -> str:
    """Return type and text of an error in one line of at most some 200 characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
