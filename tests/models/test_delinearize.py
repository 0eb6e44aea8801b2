"""A linearized model goes back to its own class: what is saved then is loaded with the same bits."""

from pathlib import Path

import pytest
import torch

from nybble.models.delinearize import delinearize
from nybble.models.loading import load
from tests.helpers.causal_types import save_tiny
from tests.helpers.mixtures import FAMILIES, save_mixture
from tests.helpers.tiny import make_tokenizer

DENSE = ["gpt2", "openai-gpt", "llama", "gemma3", "opt"]
FAST = {"mixtral", "gpt_oss", "llama4", "gpt2", "gemma3"}
CASES = [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in (*FAMILIES, *DENSE)]


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_what_it_saves_is_loaded_with_the_same_bits(name: str, tmp_path: Path) -> None:
    save = save_mixture if name in FAMILIES else save_tiny
    before = load(str(save(tmp_path / "model", name)), torch.bfloat16, torch.device("cpu")).model
    for parameter in before.parameters():
        if parameter.ndim == 2:
            parameter.mul_(1.5)
    delinearize(before).save_pretrained(tmp_path / "saved")
    make_tokenizer().save_pretrained(tmp_path / "saved")
    after = load(str(tmp_path / "saved"), torch.bfloat16, torch.device("cpu")).model
    expected, found = before.state_dict(), after.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
