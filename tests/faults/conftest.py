"""An export format for runs of these tests."""

from collections.abc import Iterator

import pytest

from nybble.export.base import EXPORTERS
from tests.helpers.plain_exporter import PlainExporter


@pytest.fixture
def _plain_exporter() -> Iterator[None]:
    EXPORTERS.register("plain", PlainExporter())
    yield
    EXPORTERS.unregister("plain")
