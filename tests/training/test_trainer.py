"""nybble.training.trainer: schedule, gradient accumulation, clipping, averaging, resume, several processes."""

import itertools
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nybble.errors import TrainingError
from nybble.training.trainer import LRSchedulerType, TrainerConfig, TrainingProgress, lr_multiplier
from tests.helpers.toy_training import DATA, ROWS, make_toy, make_trainer, trainer_config

AVERAGING = trainer_config(lr_scheduler_type="constant_with_averaging")


def test_cosine_schedule_rises_linearly_and_falls_to_zero() -> None:
    multipliers = [lr_multiplier(step, 100, 0.1, "cosine") for step in range(100)]
    assert multipliers[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert multipliers[9 + 45] == pytest.approx(0.5, abs=0.02)
    assert 0 < multipliers[-1] < 1e-3


@pytest.mark.parametrize("lr_scheduler_type", ["constant", "constant_with_averaging"])
def test_constant_schedule_stays_at_the_peak_after_warmup(lr_scheduler_type: LRSchedulerType) -> None:
    assert [lr_multiplier(step, 10, 0.2, lr_scheduler_type) for step in range(10)] == [0.5] + [1.0] * 9


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 200), st.floats(0, 1), st.sampled_from(["cosine", "constant"]))
def test_schedule_has_one_peak_of_one(steps: int, warmup_ratio: float, lr_scheduler_type: LRSchedulerType) -> None:
    multipliers = [lr_multiplier(step, steps, warmup_ratio, lr_scheduler_type) for step in range(steps)]
    peak = multipliers.index(max(multipliers))
    assert all(0 < multiplier <= 1 for multiplier in multipliers)
    assert multipliers[peak] == 1.0
    assert multipliers[: peak + 1] == sorted(multipliers[: peak + 1])
    assert multipliers[peak:] == sorted(multipliers[peak:], reverse=True)


def test_groups_have_their_own_learning_rates() -> None:
    trainer = make_trainer(make_toy())
    record = next(trainer.run())
    assert [group["lr"] for group in trainer.optimizer.param_groups] == pytest.approx([1e-2 / 3, 1e-2])
    assert record["lr"] == pytest.approx(1e-2 / 3)


def test_steps_equal_those_of_a_plain_loop() -> None:
    """A loop in float64 without microbatches, with torch's AdamW, clipping and the formula of the schedule."""
    toy, reference = make_toy(), make_toy()
    trainer = make_trainer(toy, trainer_config(steps=6))
    a, b = (parameter.detach().double().requires_grad_() for parameter in reference.parameters.values())
    optimizer = torch.optim.AdamW([{"params": [a], "weight_decay": 0.1}, {"params": [b], "weight_decay": 0.0}])
    for step, record in enumerate(trainer.run()):
        rows = DATA[torch.arange(step, step + 4) % ROWS].double()
        loss = ((rows @ a + b) ** 2).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_([a, b], 1.0)
        for group, peak in zip(optimizer.param_groups, (1e-2, 3e-2), strict=True):
            group["lr"] = peak * lr_multiplier(step, 6, 0.25, "cosine")
        optimizer.step()
        optimizer.zero_grad()
        assert record["loss"] == record["last_pass"] == pytest.approx(loss.item(), rel=1e-5)
        assert record["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
        assert record["grad_norm"] > 1.0, "the gradient must be clipped for this test to show it"
        torch.testing.assert_close(toy.parameters["a"].double(), a, rtol=1e-4, atol=1e-5)  # float32
        torch.testing.assert_close(toy.parameters["b"].double(), b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("microbatch_size", [1, 2, 3])
@pytest.mark.parametrize("equal_weights", [True, False])
def test_microbatches_add_up_to_the_batch(microbatch_size: int, equal_weights: bool) -> None:
    weights = None if equal_weights else torch.randint(1, 20, (ROWS,), generator=torch.Generator().manual_seed(3))
    whole, parts = make_toy(weights), make_toy(weights)
    expected = [record["loss"] for record in make_trainer(whole, trainer_config(microbatch_size=4)).run()]
    losses = [record["loss"] for record in make_trainer(parts, trainer_config(microbatch_size=microbatch_size)).run()]
    assert losses == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(parts.parameters["a"], whole.parameters["a"], rtol=1e-4, atol=1e-5)
    assert expected[-1] < expected[0]


def test_loss_of_a_step_is_the_mean_of_its_passes() -> None:
    prepared: list[tuple[int, int]] = []
    toy = make_toy()
    weight_of_pass = (1.0, 5.0)

    def loss(indices: Tensor) -> Tensor:
        return weight_of_pass[prepared[-1][1]] * (toy.parameters["b"] ** 2).mean()

    trainer = make_trainer(
        toy, loss=loss, passes_per_step=2, prepare_pass=lambda step, number: prepared.append((step, number))
    )
    before = (toy.parameters["b"].detach() ** 2).mean().item()
    records = list(itertools.islice(trainer.run(), 2))
    assert prepared == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert records[0]["loss"] == pytest.approx(3 * before)
    assert records[0]["last_pass"] == pytest.approx(5 * before)
    assert records[0]["grad_norm"] == pytest.approx(3 * 2 * before**0.5 / 8**0.5, rel=1e-5)


def test_averages_are_over_all_steps_but_the_first_third() -> None:
    toy = make_toy()
    trainer, history = make_trainer(toy, AVERAGING), []
    for _ in trainer.run():
        history.append(toy.parameters["a"].detach().double())
        averaged_steps = history[4:] or history[-1:]  # of 12 steps, all but the first 4
        with trainer.averaged_weights():
            # lerp in float32, over at most 8 steps
            torch.testing.assert_close(
                toy.parameters["a"].double(), torch.stack(averaged_steps).mean(0), rtol=0, atol=1e-6
            )
            assert toy.parameters["a"].requires_grad
        assert torch.equal(toy.parameters["a"].double(), history[-1]), "training continues from the last weights"
    assert not torch.allclose(history[-1], torch.stack(averaged_steps).mean(0), atol=1e-3)


def test_weights_are_not_averaged_with_other_schedules() -> None:
    toy = make_toy()
    trainer = make_trainer(toy)
    for _ in trainer.run():
        pass
    before = toy.parameters["a"].detach().clone()
    with trainer.averaged_weights():
        assert torch.equal(toy.parameters["a"], before)


@pytest.mark.parametrize("config", [trainer_config(), AVERAGING], ids=["cosine", "averaging"])
@pytest.mark.parametrize("stop", [0, 1, 5, 11])
def test_resumed_training_gives_the_same_bits(stop: int, config: TrainerConfig) -> None:
    undisturbed, resumed = make_toy(), make_toy()
    reference = make_trainer(undisturbed, config)
    losses = [record["loss"] for record in reference.run()]
    first = make_trainer(make_toy(), config)
    before = [record["loss"] for record in itertools.islice(first.run(), stop)]
    second = make_trainer(resumed, config)
    second.load_state({name: tensor.clone() for name, tensor in first.state().items()})
    second.progress = TrainingProgress(step=first.progress.step)
    after = [record["loss"] for record in second.run()]
    assert before + after == losses
    with reference.averaged_weights(), second.averaged_weights():
        for name, parameter in resumed.parameters.items():
            assert torch.equal(parameter, undisturbed.parameters[name])


@pytest.mark.parametrize(("nan_in", "numbers"), [("loss", "loss nan"), ("gradient", r"loss \d.* gradient norm nan")])
def test_nonfinite_numbers_name_step_and_remedy_and_leave_the_weights(
    nan_in: Literal["loss", "gradient"], numbers: str
) -> None:
    toy = make_toy(nan_at_step=3, nan_in=nan_in)
    records = make_trainer(toy).run()
    for _ in range(3):
        next(records)
    before = toy.parameters["a"].detach().clone()
    with pytest.raises(
        TrainingError,
        match=rf"step 4 gave {numbers}.*; start again with --overwrite and a tenth of the learning rates, or with",
    ):
        next(records)
    assert torch.equal(toy.parameters["a"], before)
