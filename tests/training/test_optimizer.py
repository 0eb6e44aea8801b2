"""Moments in 8 bits: the same training up to their rounding, a state that resumes to the bit, and early refusals."""

import builtins
import itertools
import shutil
from typing import Any

import pytest
import torch

from nybble.errors import MissingExtraError, OptionError
from nybble.training.optimizer import check_optimizer
from nybble.training.trainer import TrainerConfig, TrainingProgress
from tests.helpers.toy_training import make_toy, make_trainer

SHORT = TrainerConfig(12, 2, 0.25, 1.0, "cosine", "adamw_8bit")


@pytest.mark.slow  # the step is compiled
def test_moments_in_8_bits_train_as_those_in_float32_do_and_resume_to_the_bit() -> None:
    pytest.importorskip("torchao")
    exact, toy, resumed = (make_toy(outputs=512) for _ in range(3))  # "a" has 4096 values, "b" has 512
    losses = [record["loss"] for record in make_trainer(exact, TrainerConfig(12, 2, 0.25, 1.0, "cosine")).run()]
    trainer = make_trainer(toy, SHORT)
    found = [record["loss"] for record in trainer.run()]
    assert found[0] == losses[0]
    assert found != losses
    assert max(abs(a - b) / a for a, b in zip(losses, found, strict=True)) < 0.01
    state = trainer.state()
    assert state["exp_avg.codes:a"].dtype == torch.uint8
    assert state["exp_avg.scale:a"].shape == (16,)
    assert state["exp_avg_sq:b"].dtype == torch.float32
    layout = trainer.state_layout(state)
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()} == layout

    first, second = make_trainer(make_toy(outputs=512), SHORT), make_trainer(resumed, SHORT)
    before = [record["loss"] for record in itertools.islice(first.run(), 5)]
    second.load_state({name: tensor.clone() for name, tensor in first.state().items()})
    second.progress = TrainingProgress(step=5)
    assert before + [record["loss"] for record in second.run()] == found
    assert all(torch.equal(tensor, second.state()[name]) for name, tensor in state.items())


def test_moments_in_8_bits_need_torchao_and_on_a_cpu_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    check_optimizer("adamw", torch.device("cpu"))
    real_import = builtins.__import__

    def without_torchao(name: str, *rest: Any) -> Any:
        if name == "torchao":
            raise ImportError(name)
        return real_import(name, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "__import__", without_torchao)
        with pytest.raises(MissingExtraError, match='the extra "8bit" is needed for --optim adamw_8bit'):
            check_optimizer("adamw_8bit", torch.device("cpu"))
    pytest.importorskip("torchao")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(OptionError, match=r"--optim adamw_8bit needs a C\+\+ compiler on a CPU; there is none"):
        check_optimizer("adamw_8bit", torch.device("cpu"))
