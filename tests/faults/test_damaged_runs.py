"""Files of a run that were emptied, cut or edited by hand: that stage is made again, or one line says what to do."""

from __future__ import annotations

import copy
import json
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nybble import files
from nybble.callbacks import Callback
from nybble.cli.main import main
from nybble.compression.store import BlockStore
from nybble.data import generate
from nybble.errors import DataError, NybbleError, RunError
from nybble.nls import study as studies
from nybble.nls.search import SearchConfig, search_ranks
from nybble.options.commands import DistillOptions
from nybble.options.toml import CONFIG, to_toml
from nybble.report.markdown import run_markdown
from nybble.report.run import result_rows, summary
from nybble.run.marker import MARKER, is_run, write_marker
from nybble.run.results import read_results
from nybble.run.resume import check_same_options, saved_options
from nybble.training.fit import FitConfig, checkpoint_names, fit
from nybble.training.teacher import teacher_hidden_states
from tests.compression.test_block_compression import compressor
from tests.helpers.cases import every_second, fast_cases, first_fast
from tests.helpers.runs import candidate, searched, task_results, tuned, with_everything
from tests.helpers.tiny import make_model, make_tokenizer
from tests.helpers.toy_training import Toy, make_toy, trainer_config

DAMAGED_JSON = ["", "null", "[]", "3", '"x"', "{}", '{"a":', "\x00\x00", "[" * 100_000]


def in_one_line(error: BaseException, name: str) -> None:
    """The message names the file and is one line."""
    assert name in str(error)
    assert "\n" not in str(error)


# ---- teacher states: computed again


def states_of(folder: Path) -> Tensor:
    model, ids = make_model("llama", num_hidden_layers=1), torch.arange(6 * 8).view(6, 8)
    return teacher_hidden_states(folder / "train.bin", model, ids, 2, "x")[:]


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    folder = tmp_path_factory.mktemp("teacher")
    return folder, states_of(folder)


@pytest.mark.parametrize("content", DAMAGED_JSON, ids=lambda content: repr(content)[:20])
def test_states_with_a_damaged_note_are_computed_again(
    content: str, taught: tuple[Path, Tensor], tmp_path: Path
) -> None:
    shutil.copytree(taught[0], tmp_path, dirs_exist_ok=True)
    (tmp_path / "train.json").write_text(content)
    assert torch.equal(states_of(tmp_path), taught[1])


@pytest.mark.parametrize("value", first_fast(4, [None, -1, True, ..., "x", 7, 1.5, [], {}]), ids=repr)
@pytest.mark.parametrize("key", ["done", "crc32", "shape", "tokens", "dtype"])
def test_states_with_an_edited_note_are_computed_again(
    key: str, value: Any, taught: tuple[Path, Tensor], tmp_path: Path
) -> None:
    shutil.copytree(taught[0], tmp_path, dirs_exist_ok=True)
    note = json.loads((tmp_path / "train.json").read_text())
    if value is ...:
        del note[key]
    else:
        note[key] = value
    (tmp_path / "train.json").write_text(json.dumps(note))
    assert torch.equal(states_of(tmp_path), taught[1])


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:-1],
        lambda content: content[: len(content) // 2],
        lambda content: content + b"x",
        lambda content: bytes(len(content)),
        lambda content: content[:100] + bytes(8) + content[108:],
        lambda content: content[:-8] + bytes(8),
        None,
    ],
)
@pytest.mark.parametrize("done", first_fast(1, [4, 6]))
def test_states_that_are_not_those_that_were_written_are_computed_again(
    done: int, damage: Callable[[bytes], bytes] | None, taught: tuple[Path, Tensor], tmp_path: Path
) -> None:
    if done == 4:  # killed after two of three batches

        def kill(sequences: int) -> None:
            note = tmp_path / "train.json"
            if note.exists() and json.loads(note.read_text())["done"] == 4:
                raise KeyboardInterrupt

        model, ids = make_model("llama", num_hidden_layers=1), torch.arange(6 * 8).view(6, 8)
        with pytest.raises(KeyboardInterrupt):
            teacher_hidden_states(tmp_path / "train.bin", model, ids, 2, "x", kill)
    else:
        shutil.copytree(taught[0], tmp_path, dirs_exist_ok=True)
    if damage is None:
        (tmp_path / "train.bin").unlink()
    else:
        (tmp_path / "train.bin").write_bytes(damage((tmp_path / "train.bin").read_bytes()))
    assert torch.equal(states_of(tmp_path), taught[1])


# ---- results.json: refused, or harmless


def everything() -> dict[str, Any]:
    """The values of two runs, one with a value for every field."""
    task = task_results(
        candidates=[candidate("median", [4, 4]), candidate("largest", [8, 8])], chosen=[4, 4], configuration=[8, 4],
        replaced_by_search=True, search=searched(),
    )  # fmt: skip
    results = with_everything(command="tune", task=task, improvement={"tuned": 0.5})
    results.models["tuned"]["task:arc acc"] = 0.5
    results.models["16bit"]["right:arc acc"] = "0110"
    return json.loads(json.dumps(results, default=vars))  # type: ignore[no-any-return]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to all values inside a JSON value; of a list only to the first."""
    children = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    for key, child in children:
        yield (*path, key)
        yield from places(child, (*path, key))


EVERYTHING = everything()


@pytest.mark.parametrize("value", first_fast(2, [None, ..., -3, [], {}, "x", 1e400, [None]]), ids=repr)
def test_edited_results_are_refused_or_harmless(value: Any, tmp_path: Path) -> None:
    refused, failed = 0, []
    for path in places(EVERYTHING):
        edited = copy.deepcopy(EVERYTHING)
        parent = edited
        for key in path[:-1]:
            parent = parent[key]
        if value is ...:
            del parent[path[-1]]
        else:
            parent[path[-1]] = value
        (tmp_path / "results.json").write_text(json.dumps(edited))
        try:
            results = read_results(tmp_path)
        except RunError as error:
            in_one_line(error, "results.json")
            refused += 1
            continue
        try:
            run_markdown(results)
            result_rows(results)
            summary(results)
        except NybbleError as error:
            in_one_line(error, "")
        except Exception as error:
            failed.append((path, error))
    assert not failed
    assert refused > 5


@pytest.mark.parametrize("content", fast_cases(DAMAGED_JSON, DAMAGED_JSON[::2]), ids=lambda content: repr(content)[:20])
@pytest.mark.parametrize("name", ["results.json", MARKER])
def test_a_damaged_note_of_a_run_is_one_line(
    name: str, content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_marker(tmp_path)
    (tmp_path / CONFIG).write_text(to_toml(DistillOptions.of(pretrained="m")))
    tuned({"16bit": 0.5}).save(tmp_path)
    (tmp_path / name).write_text(content)
    assert is_run(tmp_path) == (name != MARKER)
    for command in (
        ["export", str(tmp_path), "--to", "openvino"],
        ["search", str(tmp_path)],
        ["report", str(tmp_path)],
    ):
        if name == MARKER and command[0] == "report":
            continue  # a report needs results alone
        capsys.readouterr()
        assert main(command) == 2
        in_one_line(Exception(capsys.readouterr().err.strip()), str(tmp_path))


# ---- config.toml: one line


@pytest.mark.parametrize(
    "content",
    [
        b"", b"\xff\xfe", b"lr =", b"lr = 1\nlr = 2", b"\x00", b'lr = "x"', b"lr = nan", b"lr = [1]", b"epochs = 1.5",
        b"pretrained = 3", b"export = 3", b"custom_rank_config = 3", b'custom_rank_config = ["x"]', b"what = 1",
        b"[lr]\nx = 1", b"method = []", b"weight_cache = 5", b"a = " + b"[" * 100_000,
    ],
)  # fmt: skip
def test_a_damaged_configuration_is_one_line(content: bytes, tmp_path: Path) -> None:
    write_marker(tmp_path)
    (tmp_path / CONFIG).write_bytes(content)
    with pytest.raises(RunError) as error:
        saved_options(tmp_path)
        check_same_options(tmp_path, DistillOptions.of(pretrained="m"))
    in_one_line(error.value, str(tmp_path))


# ---- checkpoints: one line, or trained again with the same bits


TRAINING = FitConfig(trainer_config(steps=6), save_steps=2)


def trained(folder: Path) -> Toy:
    toy = make_toy()
    fit(toy.groups, toy.objective, TRAINING, folder, Callback())
    return toy


Change = Callable[[dict[str, Tensor], dict[str, Any]], object]
CHECKPOINTS: list[Change] = [
    lambda tensors, note: note.clear(),
    lambda tensors, note: note.pop("curve"),
    lambda tensors, note: note.update(more=1),
    *(
        (lambda tensors, note, key=key, value=value: note.update({key: value}))
        for key in ("step", "best_loss", "best_step", "history", "curve")
        for value in (None, "x", {}, [None], [{"step": None}])
    ),
    lambda tensors, note: note.update(step=-1),
    lambda tensors, note: note.update(step=100),
    lambda tensors, note: note.update(step=2.5),
    lambda tensors, note: note.update(step=True),
    lambda tensors, note: note.update(history=[]),
    lambda tensors, note: note.update(curve=note["curve"][:-1]),
    lambda tensors, note: tensors.pop("a"),
    lambda tensors, note: tensors.pop("exp_avg:b"),
    lambda tensors, note: tensors.update(more=torch.ones(2)),
    lambda tensors, note: tensors.update(a=tensors["a"][:1].clone()),
    lambda tensors, note: tensors.update(a=tensors["a"].double()),
    lambda tensors, note: tensors.update(b=tensors["b"][:1].clone()),
    lambda tensors, note: tensors.update({"exp_avg_sq:a": torch.ones(3)}),
    lambda tensors, note: tensors.update({"step:a": torch.ones(3)}),
    lambda tensors, note: tensors.clear(),
]


@pytest.mark.parametrize("change", fast_cases(CHECKPOINTS, CHECKPOINTS[::3]), ids=range(len(CHECKPOINTS)))
def test_an_edited_checkpoint_is_one_line(change: Change, tmp_path: Path) -> None:
    trained(tmp_path)
    last = tmp_path / checkpoint_names()[0]
    tensors, note = files.load_tensors(last)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    change(tensors, note)
    files.save_tensors(last, tensors, note)
    with pytest.raises(RunError, match="delete it to repeat the stage that wrote it") as error:
        trained(tmp_path)
    in_one_line(error.value, last.name)


def test_an_edited_best_checkpoint_is_one_line(tmp_path: Path) -> None:
    trained(tmp_path)
    best = tmp_path / checkpoint_names()[1]
    for edit in (
        lambda tensors: tensors.pop("a"),
        lambda tensors: tensors.update(more=torch.ones(2)),
        lambda tensors: tensors.update(a=tensors["a"][:1].clone()),
        lambda tensors: tensors.update(a=tensors["a"].half()),
        lambda tensors: tensors.clear(),
    ):
        tensors, note = files.load_tensors(best)
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        whole = dict(tensors)
        edit(tensors)
        files.save_tensors(best, tensors, note)
        with pytest.raises(RunError, match="delete it to repeat the stage that wrote it") as error:
            trained(tmp_path)
        in_one_line(error.value, best.name)
        files.save_tensors(best, whole, note)


@pytest.mark.parametrize("names", [(0,), (1,), (0, 1)])
def test_a_deleted_checkpoint_is_trained_again(names: tuple[int, ...], tmp_path: Path) -> None:
    expected = trained(tmp_path)
    for i in names:
        (tmp_path / checkpoint_names()[i]).unlink()
    again = trained(tmp_path)
    assert all(torch.equal(again.parameters[name], value) for name, value in expected.parameters.items())


@pytest.mark.parametrize("size", [0, 8, 100, -1])
@pytest.mark.parametrize("i", [0, 1])
def test_a_cut_checkpoint_is_one_line(i: int, size: int, tmp_path: Path) -> None:
    trained(tmp_path)
    file = tmp_path / checkpoint_names()[i]
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(RunError, match="delete it to repeat the stage that wrote it") as error:
        trained(tmp_path)
    in_one_line(error.value, file.name)


# ---- blocks of the compression: one line


@pytest.fixture(scope="module")
def block(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compress")
    compressor(store=BlockStore(folder, "x")).compress_block(0)
    return next(folder.iterdir())


@pytest.mark.parametrize(
    "change",
    every_second(
        [
            lambda tensors, note: note.pop("errors"),
            lambda tensors, note: note.pop("losses"),
            lambda tensors, note: note.update(errors=None),
            lambda tensors, note: note.update(errors={"mlp.up_proj": {}}),
            lambda tensors, note: note.update(errors={"mlp.up_proj": None}),
            lambda tensors, note: note.update(losses=3),
            lambda tensors, note: note.update(losses=["x"]),
            lambda tensors, note: tensors.clear(),
            lambda tensors, note: tensors.pop("mlp.up_proj:scale_OG"),
            lambda tensors, note: tensors.pop("input_layernorm.weight"),
            lambda tensors, note: tensors.update({"mlp.up_proj:scale_OG": torch.ones(3)}),
            lambda tensors, note: tensors.update({"mlp.up_proj:weight_OI": torch.ones(3, 3)}),
            lambda tensors, note: tensors.update({"mlp.up_proj:zero_point_OG": torch.ones(128, 2).byte()}),
            lambda tensors, note: tensors.update({"input_layernorm.weight": torch.ones(3)}),
            lambda tensors, note: tensors.update({"more": torch.ones(3)}),
        ]
    ),
)
def test_an_edited_block_is_one_line(change: Change, block: Path, tmp_path: Path) -> None:
    tensors, note = files.load_tensors(block)
    tensors = dict(tensors)
    change(tensors, note)
    files.save_tensors(tmp_path / block.name, tensors, note)
    with pytest.raises(RunError, match="delete it to repeat the stage that wrote it") as error:
        compressor(store=BlockStore(tmp_path, "x")).compress_block(0)
    in_one_line(error.value, block.name)


# ---- self.safetensors: one line


PENDING = generate.PendingGeneration(num_train=2, num_calibration=0, seq_len=12, seed=0)


@pytest.mark.parametrize(
    "change",
    every_second(
        [
            lambda tensors, note: tensors.clear(),
            lambda tensors, note: tensors.update(ids=tensors["ids"].long()),
            lambda tensors, note: tensors.update(ids=tensors["ids"].float()),
            lambda tensors, note: tensors.update(ids=tensors["ids"].flatten()),
            lambda tensors, note: tensors.update(ids=tensors["ids"] - 1000),
            lambda tensors, note: tensors.update(more=torch.ones(2)),
        ]
    ),
)
def test_edited_text_of_the_model_is_one_line(change: Change, tmp_path: Path) -> None:
    path, model, tokenizer = tmp_path / "self.safetensors", make_model("smollm", num_hidden_layers=1), make_tokenizer()

    def generated() -> Tensor:
        return generate.generate_pending(PENDING, model, tokenizer, path, 2, lambda count: None)

    generated()
    tensors, note = files.load_tensors(path)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    change(tensors, note)
    files.save_tensors(path, tensors, note)
    with pytest.raises(RunError, match="delete it to repeat the stage that wrote it") as error:
        generated()
    in_one_line(error.value, path.name)
    with pytest.raises(DataError) as refused:
        generate.read_generated(path, tokenizer, 12)
    in_one_line(refused.value, path.name)
    for batches in (None, "x", 1.5, []):
        files.save_tensors(path, {"ids": torch.ones(0, 12).int()}, note | {"batches": batches})
        with pytest.raises(RunError, match="batches must be int"):
            generated()
    path.unlink()
    for other in ({}, {"length": "x"}, note | {"length": 5}, note | {"tokenizer": None}):  # another source: made again
        files.save_tensors(path, {"ids": torch.zeros(3, 12).int()}, other)
        assert not torch.equal(generated()[0], torch.zeros(12).long())


# ---- search.db: one line


SPACE = studies.SearchSpace((8, 4, 2), 2, ["row"] * 4, ())  # type: ignore[arg-type]


class Scorer:
    """Scores a configuration by its sum of ranks."""

    def score(self, configuration: Any, rows: Any) -> Any:
        return type("Scores", (), {"scores": [float(sum(configuration))] * len(rows)})


def search_in(folder: Path, sampler: studies.SearchSampler = "random", trials: int = 3) -> Any:
    return search_ranks(SPACE, Scorer(), SearchConfig(sampler, trials, False, 0, studies.storage_file(folder)))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("optuna", reason="the extra search")
    folder = tmp_path_factory.mktemp("search")
    search_in(folder)
    return folder / "search.db"


@pytest.mark.parametrize(
    ("size", "fill"),
    first_fast(2, [(100, b""), (5000, b"x" * 20_000), (50, b""), (5000, b""), (20_000, b""),
                   *((size, b"x" * 20_000) for size in (50, 100, 20_000))]),
)  # fmt: skip
def test_damaged_trials_are_one_line(size: int, fill: bytes, trials: Path, tmp_path: Path) -> None:
    (tmp_path / "search.db").write_bytes(trials.read_bytes()[:size] + fill)
    with pytest.raises(RunError, match="delete it to search anew") as error:
        search_in(tmp_path, trials=5)
    in_one_line(error.value, "search.db")


# What may change without an effect.
HARMLESS = ("DROP TABLE trials", "DROP TABLE version_info", "UPDATE version_info SET schema_version = 3")


@pytest.mark.slow
@pytest.mark.parametrize(
    "statement",
    [
        *HARMLESS, "DROP TABLE studies", "DELETE FROM trial_params", "DELETE FROM trial_values",
        "UPDATE trial_params SET param_value = 7", "UPDATE trial_params SET param_value = 'x'",
        "UPDATE trial_params SET param_name = 'y' || param_id", "UPDATE trial_params SET distribution_json = '{'",
        "UPDATE trial_params SET distribution_json = 'null'", "UPDATE trial_values SET value = NULL",
        "UPDATE trial_values SET value = 'x'", "UPDATE trial_values SET value_type = 'what'",
        "UPDATE trials SET state = 'what'", "UPDATE trials SET number = NULL", "DELETE FROM study_directions",
        "UPDATE study_directions SET direction = 'MINIMIZE'",
    ],
)  # fmt: skip
def test_edited_trials_are_one_line_or_harmless(statement: str, trials: Path, tmp_path: Path) -> None:
    shutil.copy(trials, tmp_path / "search.db")
    with sqlite3.connect(tmp_path / "search.db") as database:
        database.execute(statement)
    database.close()
    try:
        search_in(tmp_path, trials=5)
    except RunError as error:
        in_one_line(error, "search.db")
    else:
        assert statement in HARMLESS


def test_an_empty_file_of_trials_is_a_new_one(trials: Path, tmp_path: Path) -> None:
    (tmp_path / "search.db").write_bytes(b"")
    assert search_in(tmp_path).num_trials == 3
