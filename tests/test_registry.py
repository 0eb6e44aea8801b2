"""Registry: extensions of other packages, by entry points, and what does not work about them."""

from types import SimpleNamespace
from typing import Any

import pytest

from nybble.errors import OptionError
from nybble.registry import Registry


class Point:
    """An entry point whose module does `load`."""

    def __init__(self, name: str, load: Any) -> None:
        self.name, self.load, self.module = name, load, "their.module"
        self.dist = SimpleNamespace(name="their-package")


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Registry[object]:
    """A registry with two entry points: one that registers itself when it is imported, and one that fails."""
    made: Registry[object] = Registry("colour", "nybble.test")
    made.register("own", 1)

    def fail() -> object:
        raise ModuleNotFoundError("No module named 'missing'")

    points = [Point("blue", lambda: made.register("blue", 2)), Point("broken", fail)]
    monkeypatch.setattr("nybble.registry.metadata.entry_points", lambda group: points)
    return made


def test_a_module_may_register_what_its_entry_point_names(registry: Registry[object]) -> None:
    assert registry.get("blue", "--colour") == 2
    assert list(registry) == ["own", "blue", "broken"]
    with pytest.raises(ValueError, match="colour blue is registered already"):
        registry.register("blue", 3)


def test_a_package_that_cannot_be_imported_is_named(registry: Registry[object]) -> None:
    words = "the colour broken of the package their-package must be importable; it is not .*missing.*; repair"
    with pytest.raises(OptionError, match=words):
        registry.get("broken", "--colour")


def test_it_does_not_stand_in_the_way_of_others(registry: Registry[object], caplog: pytest.LogCaptureFixture) -> None:
    assert registry.usable() == registry.usable() == {"own": 1, "blue": 2}
    assert caplog.text.count("the colour broken of the package their-package must be importable") == 1
