"""quantized/ that was changed by others than nybble: refused in one line when it is read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from nybble.cli.main import main
from nybble.errors import RunError
from nybble.models.checkpoint import open_checkpoint
from nybble.models.loading import LoadedModel
from nybble.models.quantized_model import load_quantized, save_quantized
from nybble.run.machine import peak_memory
from tests.helpers.cases import fast_cases, first_fast
from tests.helpers.compress import compress_command
from tests.helpers.rounding import round_model_to_nearest
from tests.helpers.tiny import make_model, make_tokenizer, save_model

LAYER, HEAD, NORM = "model.layers.0.mlp.up_proj", "lm_head", "model.norm.weight"
CODES, SCALE, ZERO = (f"{LAYER}.weight.{leaf}" for leaf in ("codes", "scale", "zero_point"))
HEAD_CODES, HEAD_SCALE, HEAD_ZERO = (f"{HEAD}.weight.{leaf}" for leaf in ("codes", "scale", "zero_point"))


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, model = tmp_path_factory.mktemp("model") / "quantized", make_model("llama", num_hidden_layers=1)
    save_quantized(folder, LoadedModel(model, make_tokenizer(), "tiny"), round_model_to_nearest(model))
    return folder


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "quantized"))


def first(value: float) -> Callable[[Tensor], Tensor]:
    """Put a value in the first place of a tensor."""

    def change(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[0] = value
        return tensor

    return change


# Tensor -> what becomes of it; None deletes it.
TENSORS: list[tuple[str, Callable[[Tensor], Tensor | None]]] = [
    *((name, lambda t: None) for name in (CODES, SCALE, ZERO, HEAD_CODES, HEAD_SCALE, HEAD_ZERO, NORM)),
    *((name, lambda t: t.float()) for name in (CODES, SCALE, ZERO, HEAD_CODES, HEAD_SCALE, HEAD_ZERO)),
    *((name, lambda t: t.to(torch.int8)) for name in (CODES, ZERO, HEAD_CODES, NORM)),
    *((name, lambda t: t.bool()) for name in (CODES, ZERO)),
    *((name, lambda t: t.bfloat16()) for name in (SCALE, HEAD_SCALE)),
    *((name, lambda t: t.flatten()) for name in (CODES, SCALE, ZERO, HEAD_CODES)),
    *((name, lambda t: t[:1].clone()) for name in (CODES, SCALE, ZERO, HEAD_CODES, HEAD_SCALE, NORM)),
    *((name, lambda t: t[:0].clone()) for name in (CODES, SCALE, ZERO, HEAD_CODES, NORM)),
    *((name, lambda t: t[:, :1].clone()) for name in (CODES, SCALE, ZERO, HEAD_CODES)),
    *((name, lambda t: t[:, :0].clone()) for name in (CODES, SCALE, ZERO)),
    *((name, lambda t: t.T.contiguous()) for name in (CODES, SCALE)),
    *((name, lambda t: torch.cat([t, t], dim=1)) for name in (CODES, SCALE, ZERO, HEAD_CODES, HEAD_SCALE)),
    *((SCALE, first(value)) for value in (0.0, -0.5, 1 + 2**-9, 2**-20, float("inf"), float("nan"))),
    *((HEAD_SCALE, first(value)) for value in (0.0, -0.5, float("nan"), 1 + 2**-9)),
    *((ZERO, first(value)) for value in (16, 255)),
    (HEAD_ZERO, first(127)),
]


@pytest.mark.parametrize(
    "index",
    fast_cases(range(len(TENSORS)), range(0, len(TENSORS), 3)),
    ids=lambda i: f"{TENSORS[i][0].rsplit('.', 1)[1]}-{i}",
)
def test_a_changed_tensor_is_refused(index: int, folder: Path) -> None:
    name, change = TENSORS[index]

    def write(tensors: dict[str, Tensor]) -> None:
        changed = change(tensors.pop(name))
        if changed is not None:
            tensors[name] = changed

    refused(folder, write)


@pytest.mark.parametrize(
    ("name", "scheme"), [(SCALE, "uint4 asymmetric group 32"), (HEAD_SCALE, "uint8 symmetric per row")]
)
def test_a_negative_scale_is_named(name: str, scheme: str, folder: Path) -> None:
    file = folder / "weights.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    save_file(tensors | {name: first(-0.5)(tensors[name])}, file, metadata)
    with pytest.raises(RunError, match=f"a scale is negative, which {scheme} does not have"):
        load_quantized(folder, torch.float32)


def test_codes_in_whole_bytes_and_additional_tensors_are_refused(folder: Path) -> None:
    refused(folder, lambda tensors: tensors.update({CODES: tensors[CODES].repeat_interleave(2, 1)}))
    refused(folder, lambda tensors: tensors.update({"more": torch.ones(2)}))
    refused(folder, lambda tensors: tensors.update({"more.weight.codes": torch.ones(2, 2).byte()}))
    refused(folder, lambda tensors: tensors.update({"lm_head.weight": torch.ones(260, 64)}))


def refused(folder: Path, write: Callable[[dict[str, Tensor]], object], note: Any = ...) -> None:
    """Change the weights file; loading it is an error in one line that names the folder."""
    file = folder / "weights.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    write(tensors)
    save_file(tensors, file, metadata if note is ... else {"note": note})
    is_refused(folder)


def is_refused(folder: Path) -> None:
    with pytest.raises(RunError) as error:
        load_quantized(folder, torch.float32)
    message = str(error.value)
    assert str(folder) in message
    assert "\n" not in message
    assert "; " in message, "the remedy"


def notes() -> Iterator[str]:
    yield from ("", "x", "null", "[]", "3", '{"format": "nybble-1"}', "[" * 100_000)
    for schemes in (None, [], {}, 3, "x", {LAYER: None}, {LAYER: []}):
        yield json.dumps({"format": "nybble-2", "schemes": schemes})


@pytest.mark.parametrize("note", notes(), ids=lambda note: note[:40])
def test_a_changed_note_is_refused(note: str, folder: Path) -> None:
    refused(folder, lambda tensors: None, note)


@pytest.mark.parametrize(
    "fields",
    [
        {"bits": 3}, {"bits": "4"}, {"bits": 8}, {"bits": None}, {"bits": 4.0}, {"bits": -4}, {"group_size": 0},
        {"group_size": -32}, {"group_size": 7}, {"group_size": 16}, {"group_size": "32"}, {"group_size": None},
        {"group_size": True}, {"symmetric": 1}, {"symmetric": True}, {"more": 1},
    ],
    ids=str,
)  # fmt: skip
def test_a_changed_scheme_is_refused(fields: dict[str, Any], folder: Path) -> None:
    with safe_open(folder / "weights.safetensors", "pt") as opened:
        note = json.loads(opened.metadata()["note"])
    note["schemes"][LAYER] |= fields
    refused(folder, lambda tensors: None, json.dumps(note))


@pytest.mark.parametrize("change", ["remove", "add", "rename"])
def test_schemes_of_other_layers_are_refused(change: str, folder: Path) -> None:
    with safe_open(folder / "weights.safetensors", "pt") as opened:
        note = json.loads(opened.metadata()["note"])
    scheme = note["schemes"][LAYER] if change == "add" else note["schemes"].pop(LAYER)
    if change != "remove":
        note["schemes"]["model.layers.7.mlp.up_proj"] = scheme
    refused(folder, lambda tensors: None, json.dumps(note))


@pytest.mark.parametrize("size", [0, 4, 8, 100, 2000, -1])
def test_a_cut_weights_file_is_refused(size: int, folder: Path) -> None:
    content = (folder / "weights.safetensors").read_bytes()
    (folder / "weights.safetensors").write_bytes(content[:size])
    is_refused(folder)


@pytest.mark.parametrize(
    "content", first_fast(4, [None, "{}", "null", '{"model_type": "llama"', "", "[]", "3", '"x"', "\x00"])
)
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_file_of_the_model_is_refused(name: str, content: str | None, folder: Path) -> None:
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(content)
    if (name, content) != ("tokenizer_config.json", "{}"):  # a tokenizer without settings is one
        is_refused(folder)


@pytest.mark.parametrize(
    "values",
    [
        {"hidden_size": 128}, {"hidden_size": 0}, {"hidden_size": -64}, {"hidden_size": "64"}, {"hidden_size": None},
        {"num_hidden_layers": 0}, {"num_hidden_layers": 2}, {"num_attention_heads": 0}, {"num_attention_heads": 3},
        {"intermediate_size": 64}, {"vocab_size": 100}, {"hidden_act": "no"}, {"hidden_act": None},
        {"model_type": "no"}, {"model_type": None}, {"model_type": "gpt2"}, {"rope_parameters": 5},
        {"rope_parameters": {"rope_type": "no"}}, {"tie_word_embeddings": "no"}, {"auto_map": 5},
        {"pad_token_id": 100_000}, {"layer_types": 3}, {"head_dim": 1},
    ],
    ids=str,
)  # fmt: skip
def test_an_impossible_configuration_is_refused(values: dict[str, Any], folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))
    is_refused(folder)


@pytest.mark.parametrize("content", ["", "[]", "null"])
def test_damaged_generation_settings_are_refused(content: str, folder: Path) -> None:
    (folder / "generation_config.json").write_text(content)
    is_refused(folder)


@pytest.mark.usefixtures("_plain_exporter")
def test_a_damaged_folder_is_refused_with_the_remedy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, run = save_model(tmp_path / "model", "smollm"), tmp_path / "run"
    assert main(compress_command(model, run, "--export", "plain", "--dtype", "float32")) == 0
    evaluate = ["--data", "python-docs", "--seq_len", "32", "--num_samples", "2", "--dtype", "float32"]
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        (run / "quantized" / name).rename(tmp_path / name)
        for command in (["eval", str(run), *evaluate], ["inspect", str(run)], ["export", str(run), "--to", "plain"]):
            capsys.readouterr()
            assert main(command) == 2, command
            said = capsys.readouterr().err.strip()
            assert f"must have the files that it was written with; {name} is missing or cut; bring it back" in said
            assert len(said.splitlines()) == 1
        # The same folder outside of a run, of which nothing else is known.
        alone = tmp_path / "alone"
        shutil.copytree(run / "quantized", alone, dirs_exist_ok=True)
        (alone / name).unlink(missing_ok=True)
        assert main(["eval", str(alone), *evaluate]) == 2
        assert "cannot be used" in capsys.readouterr().err
        (tmp_path / name).rename(run / "quantized" / name)
    (run / "plain" / "config.json").unlink()
    assert main(["eval", str(run / "plain"), *evaluate]) == 2
    assert "config.json is missing or cut" in capsys.readouterr().err
    assert main(["export", str(run), "--to", "plain"]) == 0
    assert main(["eval", str(run / "plain"), *evaluate]) == 0


@pytest.mark.slow
def test_a_tampered_run_is_no_start_of_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, run = save_model(tmp_path / "model", "smollm"), tmp_path / "run"
    assert main(compress_command(model, run, "--dtype", "float32")) == 0
    file = run / "quantized" / "weights.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    start = ["distill", "--pretrained", str(model), "--output_dir", str(tmp_path / "next"), "--init_from", str(run)]
    start += [
        "--data",
        "python-docs",
        "--seq_len",
        "32",
        "--group_size",
        "32",
        "--export",
        "none",
        "--dtype",
        "float32",
    ]
    for change in (
        {CODES: tensors[CODES][:, :8].clone()},
        {SCALE: tensors[SCALE].flatten()},
        {SCALE: tensors[SCALE][:, :0].clone()},
        {ZERO: tensors[ZERO].float()},
        {NORM: tensors[NORM][:3].clone()},
        {
            CODES: tensors[CODES][:, :16].clone(),
            SCALE: tensors[SCALE][:, :1].clone(),
            ZERO: tensors[ZERO][:, :1].clone(),
        },
    ):
        save_file(tensors | change, file, metadata)
        capsys.readouterr()
        # Sizes are compared with those of the run first; without them, the tensors are.
        for forgotten in (False, True):
            if forgotten:
                results = json.loads((run / "results.json").read_text())
                (run / "results.json").write_text(json.dumps(results | {"files": {}}))
            assert main(start) == 2
            said = capsys.readouterr().err.strip().splitlines()
            assert said[-1].startswith("nybble: ")
            assert "fault of nybble" not in said[-1]
    assert not (tmp_path / "next").exists()


@pytest.mark.parametrize(("field", "value"), [("num_hidden_layers", 2**40), ("head_dim", 2**33), ("vocab_size", 2**31)])
def test_a_configuration_of_a_huge_model_takes_no_memory(field: str, value: int, folder: Path) -> None:
    """It would be built before a tensor is missed: an input of the fuzzer took 22 GB."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {field: value}))
    before = peak_memory()["cpu"]
    for read in (lambda: load_quantized(folder, torch.float32), lambda: open_checkpoint(folder)):
        with pytest.raises(RunError, match="must hold the tensors of the model in its config.json"):
            read()
    assert peak_memory()["cpu"] - before < 300_000_000
