"""No method is worse than round-to-nearest on the text that it calibrates on.

That holds for the output error of every layer, which se and gptq minimize, and for the KL divergence of the whole
model. It does not hold for awq alone: its search weighs the error by the diagonal of the second moments only, and in
random models, which have no channels that stand out, it gains nothing (the KL divergence was 0.83 to 1.21 times that
of rtn over 39 families and 3 seeds, mean 0.98). What it minimizes is tested in test_awq.py.
"""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nybble.compression.calibration import Calibration
from nybble.compression.pipeline import compress
from nybble.models.selection import select_layers
from nybble.quant.scheme import QuantScheme
from tests.helpers.cases import first_fast
from tests.helpers.dense import DENSE, make_dense

SCHEME = QuantScheme(group_size=32)
METHODS = ("se", "gptq", "awq+se", "se+gptq", "awq+se+gptq")


def compressed(model: Any, method: str, ids: Tensor) -> tuple[float, dict[str, float]]:
    """KL divergence on `ids`, and the error of each layer relative to that of rtn."""
    copied = copy.deepcopy(model)
    result = compress(copied, dict.fromkeys(select_layers(copied).linears, SCHEME), method, Calibration(ids))
    for name, init in result.inits.items():
        copied.get_submodule(name).weight.copy_(init.quantized(SCHEME).dequantize())
    logits, wanted = copied(ids).logits.log_softmax(-1), model(ids).logits.log_softmax(-1)
    divergence = F.kl_div(logits, wanted, log_target=True, reduction="none").sum(-1).mean()
    errors = {name: error.compressed / error.rtn for name, error in result.errors.items() if error.rtn}
    return float(divergence), errors


def check(name: str, method: str, seed: int, bound: float = 1.0) -> None:
    ids = torch.randint(0, 255, (32, 32), generator=torch.Generator().manual_seed(100 + seed))
    model = make_dense(name, seed)
    divergence, errors = compressed(model, method, ids)
    assert len(errors) == len(select_layers(model).linears)
    assert max(errors.values()) < 1, max(errors, key=errors.__getitem__)
    assert divergence < bound * compressed(model, "rtn", ids)[0]


@pytest.mark.parametrize("name", first_fast(1, ["gemma2", "llama", "olmo2"]))  # norms before, after, and on both sides
def test_se_gptq_is_better_than_rtn(name: str) -> None:
    check(name, "se+gptq", seed=0, bound=0.8)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", [name for name in DENSE if name != "bloom"])  # no chain
def test_no_method_is_worse_than_rtn(name: str, method: str, seed: int) -> None:
    check(name, method, seed)
