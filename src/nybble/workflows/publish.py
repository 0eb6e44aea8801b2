"""Model cards of exports, and their upload to the Hugging Face hub."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nybble.console import say
from nybble.errors import ExportError, OptionError, describe_error
from nybble.export.checks import ALL
from nybble.files import write_text
from nybble.models.companions import stated_license
from nybble.report.card import CARD, model_card
from nybble.run.folder import RunFolder
from nybble.run.resume import saved_options
from nybble.schema import read_json

if TYPE_CHECKING:
    from huggingface_hub import HfApi

log = logging.getLogger("nybble")


def write_cards(run: RunFolder) -> None:
    """Write the model card of every export of a run, from what the run knows now. Saves the results."""
    options = saved_options(run.path)
    license_name = stated_license(str(options["pretrained"])) if options.get("pretrained") else ""
    for name in run.results.exports:
        folder = run.path / name
        if folder.is_dir():
            config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
            card = model_card(run.results, name, options, config, license_name, _has_template(folder))
            write_text(folder / CARD, card)
            run.note_file(name, CARD)
    run.save()


def _has_template(folder: Path) -> bool:
    """Whether the tokenizer in a folder has a chat template; True where there is none to look at (GGUF)."""
    settings = folder / "tokenizer_config.json"
    if not settings.is_file():
        return True
    return (folder / "chat_template.jinja").is_file() or bool(read_json(settings).get("chat_template"))


def check_repository(repository: str | None, formats: Sequence[str]) -> None:
    """Check --push_to_hub before any work.

    Raises:
        OptionError: the name is no name of a repository, or there are several exports for one repository.
    """
    if repository is None:
        return
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise OptionError(
            f"--push_to_hub must be a repository such as me/model-int4; {describe_error(error)}"
        ) from error
    if len(formats) != 1 or formats[0] == ALL:
        raise OptionError(
            f"--push_to_hub uploads one format to one repository; got {', '.join(formats)}; run nybble export once for "
            "each"
        )


@dataclass(frozen=True)
class Upload:
    """Where an export goes.

    Attributes:
        repository: NAME or ORGANIZATION/NAME; made where it does not exist.
        private: the repository must be private; it is made so if it does not exist.
    """

    repository: str
    private: bool


def make_repository(upload: Upload) -> None:
    """Make the repository where it does not exist. An export does so before its work.

    Raises:
        ExportError: the hub cannot be reached, or does not let this person write to the repository.
    """
    with _hub_errors(upload.repository, ""):
        made = _hub().create_repo(upload.repository, private=upload.private, exist_ok=True)
        is_private = not upload.private or _hub().repo_info(made.repo_id).private
    if not is_private:
        raise ExportError(
            f"--private needs a private repository; {upload.repository} exists and is public; change that on the hub, "
            "name another one, or leave --private out"
        )


def push_to_hub(folder: Path, upload: Upload) -> str:
    """Upload an export; returns its address.

    Args:
        folder: the export.
        upload: where it goes.

    Raises:
        ExportError: the hub cannot be reached or refuses. The export stays where it is.
    """
    log.info("uploading %s to %s", folder, upload.repository)
    with _hub_errors(upload.repository, f"; the export is in {folder}"):
        made = _hub().create_repo(upload.repository, private=upload.private, exist_ok=True)
        _hub().upload_folder(repo_id=made.repo_id, folder_path=folder, commit_message=f"nybble export to {folder.name}")
    say(f"Uploaded to {made}.")
    return str(made)


def _hub() -> HfApi:
    from huggingface_hub import HfApi

    return HfApi(library_name="nybble")


@contextmanager
def _hub_errors(repository: str, and_then: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of HTTP, of the network, of the hub's checks
        raise ExportError(
            f"--push_to_hub must be able to write to {repository}; it is not ({describe_error(error)}); log in with hf "
            f"auth login or set HF_TOKEN, and name a repository of yours (OWNER/NAME){and_then}"
        ) from error
