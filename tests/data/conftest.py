"""Fixtures of the data tests."""

import pytest
import torch

from tests.helpers.tiny import make_model


@pytest.fixture(scope="session")
def generation_imported() -> None:
    """transformers takes seconds to import what the first call of `generate` needs; no single test shall pay for it."""
    make_model("smollm").generate(torch.tensor([[70]]), max_new_tokens=1, do_sample=False)
