"""The prototype of sharded training (tests/helpers/row_shard.py): a quarter of the traffic, the same gradients."""

import json

import pytest

from tests.helpers.row_shard import SCHEME
from tests.helpers.several import launch_program


@pytest.mark.slow  # two processes import torch and FSDP
def test_codes_are_gathered_in_place_of_weights() -> None:
    ended = launch_program("from tests.helpers import row_shard\nrow_shard._main()")
    assert [process.code for process in ended] == [0, 0], ended
    found = json.loads(ended[0].out.splitlines()[-1])
    assert found["losses"] == pytest.approx([found["expected"]] * 2, rel=1e-6)
    assert max(found["errors"]) < 1e-6
    # Two processes, half of the rows each; gathered in the forward and again in the backward, in two steps.
    gathered = found["sent"] / 4 * 2
    group_size = SCHEME.group_size
    assert group_size is not None
    assert gathered == found["weights"] * (1 / 2 + (2 + 1) / group_size)
    assert gathered / (2 * found["weights"]) < 0.3  # 0.27 at group size 64; bfloat16 has 2 bytes a weight
