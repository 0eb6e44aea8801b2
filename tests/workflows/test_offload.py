"""`nybble compress --offload disk`: the bits of the path in memory, resuming, the automatic choice, and its words."""

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nybble.cli.main import main
from nybble.compression.stored_block import StoredBlock
from nybble.models import quantized_model
from nybble.models.layers_on_disk import LayersOnDisk, layers_on_disk
from nybble.options.commands import CompressOptions
from nybble.run.results import read_results
from nybble.workflows import compress as compress_module
from nybble.workflows import estimate, placement
from nybble.workflows.compress import compress
from tests.helpers.compress import compress_command
from tests.helpers.mixtures import save_mixture
from tests.helpers.small_disk import small_tmpfs
from tests.helpers.tiny import save_model


def options(model: Path, run: Path, **changes: object) -> CompressOptions:
    base: dict[str, object] = {
        "pretrained": str(model), "output_dir": str(run), "method": "rtn", "data": ("python-docs",), "seq_len": 32,
        "num_calibration_samples": 16, "group_size": 32, "num_test_samples": 4, "eval_tasks": (), "export": (),
        "offload": "disk",
    }  # fmt: skip
    return CompressOptions.of(**base | changes)


def assert_equal_runs(one: Path, two: Path) -> None:
    """The same tensors, metrics and errors, to the last bit, and the same files."""
    files = [sorted(path.name for path in (run / "quantized").glob("*.safetensors")) for run in (one, two)]
    assert files[0] == files[1]
    for file in files[0]:
        first, second = (load_file(run / "quantized" / file) for run in (one, two))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) and first[name].dtype == second[name].dtype for name in first)
    before, after = read_results(one), read_results(two)
    for leaf in ("models", "layer_errors", "block_losses", "decoder_errors", "layers", "fingerprints"):
        assert getattr(before, leaf) == getattr(after, leaf), leaf
    names = [sorted(str(path.relative_to(run)) for path in run.rglob("*")) for run in (one, two)]
    assert names[0] == names[1]


SAVED: dict[str, Callable[[Path, str], Path]] = {
    **dict.fromkeys(["llama", "smollm", "qwen2", "gemma3", "phi3"], save_model),
    **dict.fromkeys(["mixtral", "gpt_oss", "qwen3_moe"], save_mixture),
}
METHODS = ("rtn", "awq+se", "se+gptq", "awq+se+gptq", "awq+se+blockwise")
FAST = {("smollm", "rtn")}
CASES = [
    (name, method) if (name, method) in FAST else pytest.param(name, method, marks=pytest.mark.slow)
    for name in SAVED
    for method in METHODS
]


@pytest.mark.parametrize(("name", "method"), CASES)
def test_a_model_on_disk_ends_with_the_bits_of_one_in_memory(name: str, method: str, tmp_path: Path) -> None:
    model = SAVED[name](tmp_path / name, name)
    compress(options(model, tmp_path / "memory", method=method, offload="none"))
    compress(options(model, tmp_path / "disk", method=method))
    assert_equal_runs(tmp_path / "memory", tmp_path / "disk")


def test_the_first_block_may_be_left_in_16_bits(tmp_path: Path) -> None:
    model, changes = save_model(tmp_path / "model", "smollm"), {"ignore": ("model.layers.0.*",)}
    compress(options(model, tmp_path / "memory", offload="none", **changes))
    compress(options(model, tmp_path / "disk", **changes))
    assert_equal_runs(tmp_path / "memory", tmp_path / "disk")


@pytest.mark.parametrize(("method", "reads"), [("rtn", 11), ("awq+se+gptq", 16)])
def test_the_checkpoint_is_read_as_often_as_the_docs_say(
    method: str, reads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: Counter[int] = Counter()
    load = LayersOnDisk._load

    def count(self: LayersOnDisk, i: int) -> None:
        loads[i] += 1
        load(self, i)

    monkeypatch.setattr(LayersOnDisk, "_load", count)
    compress(options(save_model(tmp_path / "model", "smollm"), tmp_path / "run", method=method))
    assert loads[1] == reads  # awq reads the first block of a kind twice more


@pytest.mark.slow
def test_single_layers_may_have_other_schemes_and_blocks_other_methods(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", "llama")
    changes = {
        "method": "awq+se", "limit_blocks": 1, "layer": ("lm_head:bits=4", "*.down_proj:bits=8"),
        "ignore": ("model.layers.1.self_attn.*",), "keep_positions": "exact",
    }  # fmt: skip
    compress(options(model, tmp_path / "memory", offload="none", **changes))
    compress(options(model, tmp_path / "disk", **changes))
    assert_equal_runs(tmp_path / "memory", tmp_path / "disk")


class Killed(Exception):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("method", ["rtn", "awq+se+blockwise"])
def test_killed_between_blocks_it_ends_with_the_same_bits(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, run = save_model(tmp_path / "model", "smollm"), tmp_path / "run"
    compress(options(model, tmp_path / "undisturbed", method=method, offload="none"))
    original, saved = StoredBlock.save, list[str]()

    def save(self: StoredBlock, *given: object) -> None:
        if len(saved) == 1:
            raise Killed
        saved.append(self.prefix)
        original(self, *given)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(StoredBlock, "save", save)
        with pytest.raises(Killed):
            compress(options(model, run, method=method))
    assert [path.name for path in (run / "compress").iterdir()] == ["model.layers.0.safetensors"]
    saved.clear()
    with monkeypatch.context() as patch:
        patch.setattr(StoredBlock, "save", save)
        compress(options(model, run, method=method, resume=True))
    assert saved == ["model.layers.1."], "the finished block is not compressed again"
    assert_equal_runs(tmp_path / "undisturbed", run)


def test_a_run_may_be_resumed_in_the_other_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, run = save_model(tmp_path / "model", "smollm"), tmp_path / "run"
    compress(options(model, tmp_path / "undisturbed"))

    def fail(*_: object, **__: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(compress_module, "save_quantized", fail)
        with pytest.raises(Killed):
            compress(options(model, run))
    compress(options(model, run, offload="none", resume=True))
    assert_equal_runs(tmp_path / "undisturbed", run)


def test_blocks_wait_on_disk_where_the_model_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = save_model(tmp_path / "model", "llama")
    automatic = options(model, tmp_path / "run", method="se", offload="auto", eval_tasks=())
    assert not placement.stays_on_disk(automatic)
    monkeypatch.setattr(placement, "free_memory", lambda device: 600_000_000)
    assert not placement.stays_on_disk(automatic), "weights of a quarter of the memory are not estimated"
    monkeypatch.setattr(placement, "_SMALL", 0.0)
    assert placement.stays_on_disk(automatic)
    assert not placement.stays_on_disk(options(model, tmp_path / "run", offload="none"))
    for module in (placement, estimate):
        monkeypatch.setattr(module, "available_memory", lambda loaded: 600_000_000)
    with caplog.at_level(logging.INFO, "nybble"):
        compress(automatic)
    words = (
        "free), 0.0 GB of disk; decoder blocks wait on disk: it does not fit into memory (in memory it needs 0.9 GB)"
    )
    assert words in caplog.text
    assert "the estimate is above the free memory (0.6 GB)" in caplog.text


@pytest.mark.slow
def test_what_is_freed_goes_back_to_the_system_where_the_model_is_on_disk_or_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, entered = save_model(tmp_path / "model", "smollm"), list[int]()

    @contextmanager
    def returning() -> Iterator[None]:
        entered.append(1)
        yield

    monkeypatch.setattr(placement, "returning_freed_memory", returning)
    for offload, large, expected in (("none", 1 << 30, 0), ("none", 1 << 10, 1), ("disk", 1 << 30, 1)):
        entered.clear()
        monkeypatch.setattr(placement, "_LARGE_MODEL", large)
        compress(options(model, tmp_path / f"{offload}-{large}", offload=offload))
        assert len(entered) == expected


@pytest.mark.parametrize("pretrained", ["smollm2", "model.gguf", "nobody/has-this-model"])
def test_nothing_is_chosen_for_a_model_without_safetensors(pretrained: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "free_memory", lambda device: 0)
    assert not placement.stays_on_disk(CompressOptions.of(pretrained=pretrained))


@pytest.mark.slow
def test_a_model_that_is_measured_is_read_block_by_block(tmp_path: Path) -> None:
    run = tmp_path / "run"
    compress(options(save_mixture(tmp_path / "model", "mixtral"), run))
    cpu = torch.device("cpu")
    whole = quantized_model.load_quantized(run / "quantized", torch.float32).model
    model = quantized_model.load_quantized_on_disk(run / "quantized", torch.float32, cpu).model
    layers, ids = layers_on_disk(model), torch.arange(16)[None]
    assert layers is not None
    assert all(p.is_meta for block in layers.modules for p in block.parameters())
    assert torch.equal(model(input_ids=ids).logits, whole(input_ids=ids).logits)


def test_bad_input_is_refused_before_there_is_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, run = save_model(tmp_path / "model", "llama"), tmp_path / "run"

    def refused(*given: str) -> str:
        capsys.readouterr()
        assert main([*given]) == 2
        assert not run.exists()
        return " ".join(capsys.readouterr().err.split())

    disk = compress_command(model, run, "--offload", "disk")
    assert "--device nothing is not usable on this machine" in refused(*disk, "--device", "nothing")
    assert "smollm2 is a GGUF file, which is read as a whole; use --offload none" in refused(
        *disk, "--pretrained", "smollm2"
    )
    assert "--data self needs the model in memory" in refused(*disk, "--data", "self", "--method", "se")
    assert "offload" in refused(*compress_command(model, run, "--offload", "tape"))


def test_a_disk_that_fills_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, folder = save_model(tmp_path / "model", "smollm"), tmp_path / "small"
    folder.mkdir()
    with small_tmpfs(folder, 300_000):
        code = main(compress_command(model, folder / "run", "--offload", "disk"))
        printed = " ".join(capsys.readouterr().err.split())
    assert code == 2
    assert "GB are free; free some disk space, choose another disk" in printed or "must fit on the disk" in printed
