"""nybble.callbacks: a subclass overrides what it needs, and CallbackList forwards every call in order."""

from collections.abc import Mapping

from nybble.callbacks import Callback, CallbackList


class Recorder(Callback):
    """Keeps the calls of all recorders that share a list."""

    def __init__(self, name: str, calls: list[tuple[object, ...]]) -> None:
        self.name, self.calls = name, calls

    def on_stage_start(self, stage: str, total: int) -> None:
        self.calls.append((self.name, "start", stage, total))

    def on_step(self, stage: str, step: int, total: int, metrics: Mapping[str, float]) -> None:
        self.calls.append((self.name, "step", stage, step, total, dict(metrics)))

    def on_validation(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        self.calls.append((self.name, "validation", stage, step, dict(metrics)))

    def on_checkpoint(self, stage: str, step: int) -> None:
        self.calls.append((self.name, "checkpoint", stage, step))

    def on_stage_end(self, stage: str, seconds: float) -> None:
        self.calls.append((self.name, "end", stage, seconds))


def call_everything(callback: Callback) -> None:
    callback.on_stage_start("train", 2)
    callback.on_step("train", 1, 2, {"loss": 3.0})
    callback.on_validation("train", 1, {"kl_to_teacher": 0.5})
    callback.on_checkpoint("train", 1)
    callback.on_stage_end("train", 4.0)


def test_a_list_forwards_every_call_to_every_callback_in_order() -> None:
    calls: list[tuple[object, ...]] = []
    call_everything(CallbackList([Recorder("one", calls), Recorder("two", calls)]))
    assert [name for name, *_ in calls] == ["one", "two"] * 5
    assert [call for name, *call in calls if name == "two"] == [
        ["start", "train", 2],
        ["step", "train", 1, 2, {"loss": 3.0}],
        ["validation", "train", 1, {"kl_to_teacher": 0.5}],
        ["checkpoint", "train", 1],
        ["end", "train", 4.0],
    ]


def test_methods_that_are_not_overridden_do_nothing() -> None:
    class CheckpointsOnly(Callback):
        steps = ()

        def on_checkpoint(self, stage: str, step: int) -> None:
            self.steps = (*self.steps, step)

    callback = CheckpointsOnly()
    call_everything(callback)
    assert callback.steps == (1,)
