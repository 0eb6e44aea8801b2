"""One server for all tests forks the processes."""

from collections.abc import Iterator

import pytest

from tests.helpers.several import Launcher


@pytest.fixture(scope="session")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    made = Launcher(tmp_path_factory.mktemp("several"))
    try:
        yield made
    finally:
        made.close()
