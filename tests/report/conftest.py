"""An export format that only these tests know, and pages without the time that drawing takes."""

from types import SimpleNamespace

import pytest

from nybble.report import charts, labels


@pytest.fixture(autouse=True)
def _toy_exporter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labels, "EXPORTERS", {"toy": SimpleNamespace(label="Toy"), "plain": SimpleNamespace()})


@pytest.fixture
def _no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty charts, for tests of what stands around them."""
    monkeypatch.setattr(charts, "draw", lambda chart: "")
