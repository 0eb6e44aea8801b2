"""What commands ask of their text, before the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nybble.compression.methods import METHODS
from nybble.errors import DataError, HubUnreachableError, OptionError
from nybble.options.compression import CompressionOptions, InitialCompressionOptions
from nybble.options.data import TextOptions
from nybble.workflows import text as module
from tests.helpers.compression import ShrunkRange


def test_a_path_where_nothing_is_costs_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "check_tasks", lambda *_: pytest.fail("this takes seconds"))
    for option in ("data", "eval_data", "other_data"):
        with pytest.raises(DataError, match=rf"--{option} \./no/such must be an existing file or folder"):
            module.check_sources((), TextOptions(**{"data": ("wikitext2",), option: ("./no/such",)}))  # type: ignore[arg-type]


def test_all_data_that_the_hub_alone_has_are_named_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.jsonl"
    damaged.write_text("{")
    datasets = pytest.importorskip("datasets")
    from huggingface_hub import constants

    seen: list[tuple[bool, bool]] = []

    def load_dataset(*_: str) -> Any:
        seen.append((datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE))
        raise ConnectionError("Couldn't reach 'x' on the Hub (OfflineModeIsEnabled)")

    def unreachable(*_: Any) -> None:
        raise HubUnreachableError("the data of wikitext must be on this machine; add --data_dir FOLDER")

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(module, "check_tasks", unreachable)
    options = TextOptions(data=("me/chats=0.5", "self:python-docs=0.5"), eval_data=("wikitext2-plain", str(damaged)))
    with pytest.raises(HubUnreachableError) as error:
        module.check_sources(("wikitext",), options)
    assert str(error.value).startswith(
        "the data of wikitext must be on this machine; add --data_dir FOLDER; and --data me"
    )
    assert "; and --eval_data wikitext2-plain is not on this machine" in str(error.value)
    assert "damaged" not in str(error.value)
    assert seen == [(True, True), (True, True)], "the hub is not waited for again"
    assert not datasets.config.HF_HUB_OFFLINE

    def unknown(*_: Any) -> None:
        raise OptionError("--eval_tasks must name tasks of lm-eval")

    monkeypatch.setattr(module, "check_tasks", unknown)
    with pytest.raises(OptionError, match="^--eval_tasks must name tasks of lm-eval$"):
        module.check_sources(("wikitex",), options)


@pytest.mark.parametrize(
    ("options", "calibrates"),
    [
        (CompressionOptions(), True),
        (CompressionOptions(method="awq+se"), True),
        (CompressionOptions(method="rtn"), False),
        (CompressionOptions(method="shrunk"), False),
        (InitialCompressionOptions(init_from="runs/first"), False),
    ],
    ids=str,
)
def test_text_is_read_for_what_the_options_tell_of_the_method(
    options: CompressionOptions, calibrates: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A method of one's own may need no text either. It is read again only if the model decides otherwise."""
    METHODS.register("shrunk", ShrunkRange)
    asked: list[bool] = []
    monkeypatch.setattr(module, "prepare_text", lambda request, tokenizer: asked.append(request) or object())
    read = module.read_text(bool, options, None)
    METHODS.unregister("shrunk")
    assert asked == [calibrates]
    assert read.for_method(calibrates) is read.data
    assert asked == [calibrates]
    assert read.for_method(not calibrates) is not read.data
    assert asked == [calibrates, not calibrates]
