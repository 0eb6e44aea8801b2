"""What commands ask of their text, before the run."""

from __future__ import annotations

from typing import Any

import pytest

from nybble.errors import HubUnreachableError, OptionError
from nybble.options.data import TextOptions
from nybble.workflows import text as module


def test_all_data_that_the_hub_alone_has_are_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
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
    options = TextOptions(data=("me/chats=0.5", "self:python-docs=0.5"), eval_data=("wikitext2-plain", "nosuch.txt"))
    with pytest.raises(HubUnreachableError) as error:
        module.check_sources(("wikitext",), options)
    assert str(error.value).startswith(
        "the data of wikitext must be on this machine; add --data_dir FOLDER; and --data me"
    )
    assert "; and --eval_data wikitext2-plain is not on this machine" in str(error.value)
    assert "nosuch" not in str(error.value)
    assert seen == [(True, True), (True, True)], "the hub is not waited for again"
    assert not datasets.config.HF_HUB_OFFLINE

    def unknown(*_: Any) -> None:
        raise OptionError("--eval_tasks must name tasks of lm-eval")

    monkeypatch.setattr(module, "check_tasks", unknown)
    with pytest.raises(OptionError, match="^--eval_tasks must name tasks of lm-eval$"):
        module.check_sources(("wikitex",), options)
