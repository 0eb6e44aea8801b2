"""Two processes that divide work, on gloo: sums, order, messages and gradients are those of one process."""

import json

import pytest
import torch

from nybble import processes, rendezvous
from tests.helpers.several import launch_program
from tests.helpers.toy_training import make_toy, make_trainer, trainer_config

_PROGRAM = """
import json, sys, torch
from nybble import processes, rendezvous
from tests.helpers.toy_training import make_toy, make_trainer, trainer_config

with processes.joined():
    own = processes.index()
    found = {"count": processes.count(), "index": own, "first": processes.is_first()}
    tensors = [torch.full((2, 3), own + 1.0), torch.arange(4, dtype=torch.float64) * (own + 1), torch.ones(5) * own]
    processes.add_up(tensors, "test")
    found["sums"] = [tensor.tolist() for tensor in tensors]
    found["bytes"] = processes.bytes_sent()["test"]
    found["alone"] = processes.on_first(lambda: [processes.count(), *processes.share(3), processes.gather("x")])
    found["second"] = processes.on_first(lambda: own)
    found["gathered"] = processes.gather(own * 10)
    found["share"] = list(processes.share(5))
    found["merged"] = processes.merge([i * i for i in processes.share(5)], 5)
    half = torch.full((3,), own + 0.5, dtype=torch.bfloat16)
    found["collected"] = [part.tolist() for part in processes.collect(half, "rows")]
    try:
        processes.check_same({"colour": "blue" if own else "red"})
    except Exception as error:
        found["error"] = str(error)
    trainer = make_trainer(make_toy(), trainer_config(microbatch_size=1))
    found["records"] = [(record["loss"], record["grad_norm"]) for record in trainer.run()]
    found["a"] = trainer.parameters["a"].tolist()
print(json.dumps(found))
"""


@pytest.mark.slow
def test_two_processes_divide_work_and_add_up_what_one_has() -> None:
    ended = launch_program(_PROGRAM)
    assert [process.code for process in ended] == [0, 0], ended
    first, second = (json.loads(process.out.splitlines()[-1]) for process in ended)
    assert (first["count"], first["index"], first["first"]) == (2, 0, True)
    assert (second["count"], second["index"], second["first"]) == (2, 1, False)
    for found in (first, second):
        assert found["sums"] == [[[3.0] * 3] * 2, [0.0, 3.0, 6.0, 9.0], [1.0] * 5]
        assert found["bytes"] == 4 * (6 + 5) + 8 * 4
        assert found["alone"] == [1, 0, 1, 2, ["x"]]
        assert found["second"] == 0
        assert found["gathered"] == [0, 10]
        assert found["merged"] == [0, 1, 4, 9, 16]
        assert "same colour; process 0 has red, process 1 has blue" in found["error"]
    assert (first["share"], second["share"]) == ([0, 2, 4], [1, 3])
    assert (first["collected"], second["collected"]) == ([[0.5] * 3, [1.5] * 3], [])
    assert (first["records"], first["a"]) == (second["records"], second["a"])
    toy = make_toy()
    # The norm as well, as neither clipping nor Adam would let the weights show gradients that are wrong by a factor.
    for measured, record in zip(
        first["records"], make_trainer(toy, trainer_config(microbatch_size=1)).run(), strict=True
    ):
        assert measured == pytest.approx((record["loss"], record["grad_norm"]), rel=1e-5)
    torch.testing.assert_close(torch.tensor(first["a"]), toy.parameters["a"].detach(), rtol=1e-4, atol=1e-5)


def test_one_process_sends_nothing() -> None:
    with processes.joined():
        tensor = torch.ones(3)
        processes.add_up([tensor], "test")
        assert (processes.count(), processes.index(), processes.bytes_sent()) == (1, 0, {})
        assert list(processes.share(3)) == [0, 1, 2]
        assert processes.merge([1, 2], 2) == [1, 2]
        assert processes.gather(4) == [4]
        assert processes.on_first(processes.count) == 1
        assert processes.claim_end(2) is None
    assert torch.equal(tensor, torch.ones(3))


@pytest.mark.parametrize(("size", "expected"), [("", 1), ("2", 2), ("0", 1), ("many", 1)])
def test_the_launcher_says_how_many(size: str, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", size)
    assert rendezvous.launched() == expected
