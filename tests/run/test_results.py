"""results.json: what is written is read again; what is damaged is named."""

import dataclasses
import json
import math
from pathlib import Path

import pytest

from nybble.errors import RunError
from nybble.run.results import (
    Candidate,
    FrontPoint,
    LayerCounts,
    MeasuredRanks,
    Phase,
    RunResults,
    SearchResults,
    TaskResults,
    Training,
    WeightChanges,
    Winner,
    has_results,
    read_results,
)


def full_results() -> RunResults:
    """Results with a value in every field."""
    return RunResults(
        command="tune",
        phase=Phase.TRAINED,
        model="m",
        method="awq+se",
        train="full",
        init_from="runs/a",
        init_trained=True,
        seed=3,
        dtype="float32",
        test_data="rows",
        other_data="docs",
        limit=2,
        limit_blocks=3,
        lora_rank=8,
        command_line="nybble tune",
        resumed_by=["nybble tune --resume"],
        machine={"cpu": "AVX2", "versions": {"torch": "2"}},
        layers=LayerCounts(14, 1, True),
        fingerprints={"model": "ab"},
        seconds={"train": 1.5},
        peak_memory_bytes={"cpu": 10},
        models={"16bit": {"token_perplexity": 3.0, "right:t acc": "101"}},
        layer_errors={"l": {"rtn": None, "compressed": 0.1, "weight": 0.2, "clipped": 0.0}},
        block_losses={"b": [0.2, 0.1]},
        decoder_errors={"tuned": [0.1]},
        trainings=[Training("scales", [{"step": 1, "loss": 2.0}], [{"step": 0, "loss": 2.0}], 1)],
        changes=WeightChanges(0.1, 0.2, {"l": 0.1}, {"l": 0.2}),
        task=TaskResults(
            name="t",
            metric="acc",
            rank_space=[8, 4],
            objective="choices",
            scored_by="share",
            text_length=64,
            candidates=[Candidate("median", [4, 4], 0.5, 0.6, 0.7, 0.1, 0.2)],
            chosen=[4, 4],
            configuration=[8, 4],
            replaced_by_search=True,
            tested=[MeasuredRanks([8, 8], 0.5, True)],
            search=SearchResults(
                5, [Winner("tpe", [8, 4], 12, 0.5, None, 0.4, 0.0, 0.0)], [FrontPoint([4, 4], 1.0, 8)]
            ),
        ),
        exports={"toy": {"bytes": 3}},
        files={"quantized": {"config.json": 3}},
        improvement={"tuned": None},
        warnings=["w"],
    )


def test_every_field_is_read_as_it_was_written(tmp_path: Path) -> None:
    results = full_results()
    for field in dataclasses.fields(results):
        if field.name != "version":
            assert getattr(results, field.name) != getattr(RunResults(), field.name), f"{field.name} has a value"
    results.save(tmp_path)
    assert read_results(tmp_path) == results
    before = (tmp_path / "results.json").read_text()
    read_results(tmp_path).save(tmp_path)
    assert (tmp_path / "results.json").read_text() == before


def test_numbers_that_are_not_finite_are_json_for_every_reader(tmp_path: Path) -> None:
    results = RunResults(
        models={"compressed": {"token_perplexity": math.inf, "right:x acc": "01"}},
        block_losses={"0": [math.nan, -math.inf]},
        exports={"toy": {"logit_difference": math.inf}},
    )
    results.save(tmp_path)

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    json.loads((tmp_path / "results.json").read_text(), parse_constant=refuse)
    again = read_results(tmp_path)
    assert again.models == results.models
    assert again.exports == results.exports
    first, second = again.block_losses["0"]
    assert math.isnan(first)
    assert second == -math.inf


def test_a_folder_without_results_has_fresh_ones(tmp_path: Path) -> None:
    assert read_results(tmp_path) == RunResults()
    assert not has_results(tmp_path)


def test_phases_are_reached_in_their_order() -> None:
    assert Phase.QUANTIZED.reached(Phase.TRAINED)
    assert Phase.TRAINED.reached(Phase.TRAINED)
    assert not Phase.OPENED.reached(Phase.TRAINED)
    assert not Phase.REPLACING.reached(Phase.QUANTIZED)


@pytest.mark.parametrize("text", [b'{"models": {}', b"[]", b"\xff\xfe", b"3"])
def test_damaged_results_are_named(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_bytes(text)
    with pytest.raises(RunError, match=r"results.json must be the results of a run; it .*; bring it back"):
        read_results(tmp_path)


def test_results_of_another_version_are_refused(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text('{"models": {}}')
    with pytest.raises(RunError, match=r"of this version of nybble \(results version 2\); it has version None"):
        read_results(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("phase", "sleeping", "phase must be Phase; it is sleeping"),
        ("models", 3, "models must be dict"),
        ("models", {"tuned": {"bytes": None}}, "models.tuned.bytes must be float; it is None"),
        ("trainings", [3], "trainings.0 must be an object; it is 3"),
        ("trainings", [{"name": "x", "what": 1}], "trainings.0.what is unknown"),
        ("task", {"name": "x"}, "task.metric is missing"),
        ("seed", "x", "seed must be int; it is x"),
        ("surprise", 1, "surprise is unknown"),
    ],
)
def test_values_that_do_not_fit_are_named(key: str, value: object, words: str, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps(dataclasses.asdict(RunResults()) | {key: value}))
    with pytest.raises(RunError) as error:
        read_results(tmp_path)
    assert words in str(error.value)
