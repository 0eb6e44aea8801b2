"""The loop: schedule, accumulation, resume to the last bit, refusal of non-finite losses, several processes."""

import itertools
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from nybble.errors import TrainingError
from nybble.training.trainer import Trainer, TrainerConfig, TrainingProgress, lr_multiplier

DATA = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))


def make(
    steps: int = 12, microbatch: int = 2, poison_at: int = -1, weights: Tensor | None = None, schedule: str = "cosine"
) -> tuple[Trainer, dict[str, nn.Parameter]]:
    generator = torch.Generator().manual_seed(1)
    parameters = {
        "a": nn.Parameter(torch.randn(8, 8, generator=generator)),
        "b": nn.Parameter(torch.randn(8, generator=generator)),
    }

    def loss(indices: Tensor) -> Tensor:
        each = ((DATA[indices] @ parameters["a"] + parameters["b"]) ** 2).mean(1)
        value = each.mean() if weights is None else (each * weights[indices]).sum() / weights[indices].sum()
        return value * math.nan if trainer.progress.step == poison_at else value

    groups = [
        {"params": {"a": parameters["a"]}, "lr": 1e-2, "weight_decay": 0.1},
        {"params": {"b": parameters["b"]}, "lr": 3e-2, "weight_decay": 0.0},
    ]
    trainer = Trainer(
        groups,
        TrainerConfig(steps, microbatch, 0.25, 1.0, schedule),
        loss,
        lambda step: torch.arange(step, step + 4) % 32,
    )
    if weights is not None:
        trainer.tokens = lambda indices: int(weights[indices].sum())
    return trainer, parameters


def test_schedule_rises_then_falls_to_zero() -> None:
    rates = [lr_multiplier(step, 100, 0.1) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[9:]))
    assert 0 < rates[-1] < 1e-3
    assert lr_multiplier(0, 1, 0.0) == 1.0
    for schedule in ("constant", "mean"):
        assert [lr_multiplier(step, 10, 0.2, schedule) for step in range(10)] == [0.5] + [1.0] * 9


def test_means_are_over_all_steps_but_the_first_third() -> None:
    trainer, parameters = make(steps=12, schedule="mean")
    seen = []
    for record in trainer.run():
        seen.append(parameters["a"].detach().double())
        loss_mask = seen[4:] or seen[-1:]  # of 12 steps, all but the first 4
        with trainer.averaged():
            torch.testing.assert_close(parameters["a"].double(), torch.stack(loss_mask).mean(0), rtol=0, atol=1e-6)
            assert parameters["a"].requires_grad
        assert torch.equal(parameters["a"].double(), seen[-1]), record["step"]
    assert not torch.allclose(seen[-1], torch.stack(loss_mask).mean(0), atol=1e-3)
    plain, parameters = make()
    for _ in plain.run():
        pass
    before = parameters["a"].detach().clone()
    with plain.averaged():
        assert torch.equal(parameters["a"], before)


def test_groups_have_their_own_rates() -> None:
    trainer, _ = make()
    next(trainer.run())
    assert [group["lr"] for group in trainer.optimizer.param_groups] == pytest.approx([1e-2 / 3, 1e-2])


def test_microbatches_add_up_to_the_batch() -> None:
    results = []
    for microbatch in (1, 2, 3, 4):
        trainer, parameters = make(microbatch=microbatch)
        losses = [record["loss"] for record in trainer.run()]
        results.append((losses, parameters["a"].detach()))
    for losses, a in results[1:]:
        assert losses == pytest.approx(results[0][0], rel=1e-5)
        torch.testing.assert_close(a, results[0][1], rtol=1e-4, atol=1e-5)
    assert results[0][0][-1] < results[0][0][0]


def test_sequences_with_unequal_numbers_of_tokens_add_up_too() -> None:
    weights = torch.randint(1, 20, (32,), generator=torch.Generator().manual_seed(3))
    whole, _ = make(microbatch=4, weights=weights)
    for microbatch in (1, 3):
        trainer, _ = make(microbatch=microbatch, weights=weights)
        for one, other in zip(trainer.run(), whole.run(), strict=False):
            assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
            break
        assert torch.allclose(trainer.parameters["a"], whole.parameters["a"], atol=1e-6)
        whole, _ = make(microbatch=4, weights=weights)


@pytest.mark.parametrize("schedule", ["cosine", "mean"])
@pytest.mark.parametrize("stop", [0, 1, 5, 11])
def test_resumed_training_gives_the_same_bits(stop: int, schedule: str) -> None:
    trainer, expected = make(schedule=schedule)
    losses = [record["loss"] for record in trainer.run()]
    first, _ = make(schedule=schedule)
    before = [record["loss"] for record in itertools.islice(first.run(), stop)]
    state = {name: tensor.clone() for name, tensor in first.state().items()}
    second, parameters = make(schedule=schedule)
    second.load_state(state)
    second.progress = TrainingProgress(step=first.progress.step)
    after = [record["loss"] for record in second.run()]
    assert before + after == losses
    with trainer.averaged(), second.averaged():
        for name, parameter in parameters.items():
            assert torch.equal(parameter, expected[name])


def test_non_finite_loss_names_step_and_remedy_and_leaves_the_weights() -> None:
    trainer, parameters = make(poison_at=3)
    run = trainer.run()
    for _ in range(3):
        next(run)
    before = parameters["a"].detach().clone()
    with pytest.raises(
        TrainingError,
        match=r"step 4 gave loss nan, .* start again \(--overwrite\) with learning rates of a tenth, or with --dtype float32",
    ):
        next(run)
    assert torch.equal(parameters["a"], before)


_PROCESSES = """
import sys
import torch
sys.path.insert(0, sys.argv[1])
from tests.test_train import make
trainer, parameters = make(microbatch=1)
losses = [record["loss"] for record in trainer.run()]
if trainer.accelerator.is_main_process:
    torch.save({"losses": losses, "a": parameters["a"].detach(), "processes": trainer.accelerator.num_processes}, sys.argv[2])
"""


@pytest.mark.slow
def test_two_processes_give_what_one_gives(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(_PROCESSES)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    root = Path(__file__).parents[1]
    subprocess.run([*launch, str(root), str(tmp_path / "out.pt")], check=True, capture_output=True, timeout=120)
    both = torch.load(tmp_path / "out.pt", weights_only=True)
    trainer, parameters = make()
    assert both["processes"] == 2
    assert both["losses"] == pytest.approx([record["loss"] for record in trainer.run()], rel=1e-5)
    torch.testing.assert_close(both["a"], parameters["a"].detach(), rtol=1e-4, atol=1e-5)
