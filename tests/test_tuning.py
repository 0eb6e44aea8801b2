"""What is resolved before training; the rest of tuning.py is tested through distill and tune."""

import pytest
import torch

from nybble.tuning import most_tokens

CPU = torch.device("cpu")


@pytest.mark.parametrize(("amx", "in_bfloat16"), [(False, 1024), (True, 4096)])
def test_large_microbatches_only_where_they_gain(amx: bool, in_bfloat16: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: amx)
    assert most_tokens(CPU, torch.bfloat16) == in_bfloat16
    assert most_tokens(CPU, torch.float32) == 1024
    assert most_tokens(torch.device("cuda"), torch.float32) == 32768
