"""Registry: names to objects that extend nybble. Other packages add their own through entry points.

    [project.entry-points."nybble.methods"]          in the pyproject.toml of another package
    my-method = "my_package.methods:MyMethod"

Entry points are looked up when a registry is first read, and imported when their name is asked for.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from importlib import metadata
from typing import Generic, TypeVar

from nybble.errors import OptionError, describe_error

log = logging.getLogger("nybble")

T = TypeVar("T")


class Registry(Generic[T]):
    """Name -> object, for one kind of extension.

    Args:
        kind: what the objects are, for error messages ("export format").
        group: entry point group that other packages use ("nybble.exporters").
    """

    def __init__(self, kind: str, group: str) -> None:
        self.kind, self.group = kind, group
        self._known: dict[str, T] = {}
        self._entry_points: dict[str, metadata.EntryPoint] | None = None
        self._warned: set[str] = set()

    def register(self, name: str, value: T) -> T:
        """Add an object under a name, in this process; returns the object.

        A module that an entry point names may register the same name.

        Raises:
            ValueError: the name is taken.
        """
        if name in self._known:
            raise ValueError(f"{self.kind} {name} is registered already")
        self._known[name] = value
        return value

    def unregister(self, name: str) -> None:
        """Remove what `register` added."""
        del self._known[name]

    def get(self, name: str, option: str) -> T:
        """The object with this name.

        Args:
            option: the option that asked for it, for the error message.

        Raises:
            OptionError: unknown; the known names are listed.
        """
        if name not in self:
            raise OptionError(f"{option} must name a known {self.kind} ({', '.join(self)}); got {name}")
        return self[name]

    def usable(self) -> dict[str, T]:
        """All objects by name. A warning names those whose package cannot be imported, once in a process."""
        found = {}
        for name in self:
            try:
                found[name] = self[name]
            except OptionError as error:
                if name not in self._warned:
                    log.warning("%s", error)
                self._warned.add(name)
        return found

    def __getitem__(self, name: str) -> T:
        if name not in self._known:
            point = self._external()[name]
            try:
                loaded = point.load()
            except Exception as error:  # the code of another package
                package = point.dist.name if point.dist is not None else point.module
                raise OptionError(
                    f"the {self.kind} {name} of the package {package} must be importable; it is not "
                    f"({describe_error(error)}); repair or uninstall the package"
                ) from error
            self._known[name] = loaded
        return self._known[name]

    def __contains__(self, name: object) -> bool:
        return name in self._known or name in self._external()

    def __iter__(self) -> Iterator[str]:
        yield from dict.fromkeys((*self._known, *self._external()))

    def _external(self) -> dict[str, metadata.EntryPoint]:
        if self._entry_points is None:
            self._entry_points = {point.name: point for point in metadata.entry_points(group=self.group)}
        return self._entry_points
