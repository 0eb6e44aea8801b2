"""What is said while a command runs: how far it is, and how long it will take."""

import logging

import pytest

from nybble import console


def test_what_an_earlier_sitting_did_says_nothing_of_the_pace(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    caplog.set_level(logging.INFO, "nybble")
    with console.bar("train", 1000, "loss") as advance:
        advance(900)
        for step in range(10):
            now[0] += 6
            advance(1, loss=f"loss {step}")
    said = [record.getMessage() for record in caplog.records]
    assert said[-1].startswith("train 906 of 1000, about ")
    assert said[-1].endswith("s left, loss 5")
    assert float(said[-1].split("about ")[1].split()[0]) == pytest.approx(94 * 6, rel=0.25)
