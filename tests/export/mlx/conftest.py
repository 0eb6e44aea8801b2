"""Tiny models whose attention windows mlx-lm can do, exported once."""

from typing import Any

import pytest

from tests.helpers.exports import Export, export_tiny
from tests.helpers.tiny import FAMILIES

WINDOWS: dict[str, dict[str, Any]] = {
    family: {"sliding_window": 1024} for family in ("mistral", "qwen2", "gemma2", "phi3")
}
"""Longer than the sequences of the tests. Gemma 3 keeps its windows of 8 tokens, which mlx-lm has."""


@pytest.fixture(scope="session", params=FAMILIES)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Export:
    """A model of each family."""
    pytest.importorskip("mlx_lm", reason="the extra mlx")
    family = request.param
    return export_tiny("mlx", tmp_path_factory.mktemp(family), family, **WINDOWS.get(family, {}))
