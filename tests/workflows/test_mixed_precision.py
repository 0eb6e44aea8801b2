"""--bits 4.5 from the command line to the run folder: the map of bits, resuming, every method, exports, bad input."""

from pathlib import Path

import pytest

from nybble.cli.main import main
from nybble.models.quantized_file import load_weights
from nybble.options.commands import CompressOptions
from nybble.options.toml import CONFIG, run_values
from nybble.run.results import LayerCounts, read_results
from nybble.workflows.distill import distill
from nybble.workflows.tune import tune
from tests.helpers.compress import compress_command
from tests.helpers.distill import distill_options, shipped_bytes
from tests.helpers.mixtures import save_mixture
from tests.helpers.tiny import save_model
from tests.helpers.tune import tune_options


def layers_of(run: Path) -> LayerCounts:
    layers = read_results(run).layers
    assert layers is not None
    return layers


def average(run: Path) -> float:
    """Bits a weight of the linear layers on disk, and that the map in results.json is theirs."""
    quantized, _ = load_weights(run / "quantized")
    bits = layers_of(run).bits
    assert bits == {name: quantized[name].scheme.bits for name in bits}
    counts = {name: quantized[name].codes_OI.numel() for name in bits}
    return sum(bits[name] * count for name, count in counts.items()) / sum(counts.values())


def test_bits_are_chosen_said_kept_and_taken_on_resume(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, run, recipe = save_model(tmp_path / "model", "llama"), tmp_path / "run", tmp_path / "recipe.toml"
    recipe.write_text("bits = 4.5\n")
    command = compress_command(model, run, "--config", str(recipe), "--layer", "lm_head:bits=4")
    assert main(command) == 0
    bits = layers_of(run).bits
    high = [name for name, width in bits.items() if width == 8]
    assert len(bits) == 14
    assert set(bits.values()) == {4, 8}
    assert 4.3 < average(run) <= 4.5
    assert f"{len(high)} of 14 linear layers get 8 bits, {14 - len(high)} get 4: {average(run):.2f} bits a weight" in (
        " ".join(capsys.readouterr().out.split())
    )
    report = (run / "report.md").read_text().replace("\\", "")
    assert f"{high[0]}|8|" in report.replace(" ", "")
    assert "INT4/INT8" in report
    assert run_values(CompressOptions, run)["bits"] == 4.5
    assert (run / CONFIG).is_file()

    def measured_again(*_: object) -> None:
        raise AssertionError("a resumed run has its bits")

    monkeypatch.setattr("nybble.workflows.mixed_precision.layer_gains", measured_again)
    (run / "quantized" / "weights.safetensors").rename(tmp_path / "first")
    results = (run / "results.json").read_text()
    (run / "results.json").write_text(results.replace('"phase": "finished"', '"phase": "opened"'))
    assert main([*command, "--resume"]) == 0
    assert shipped_bytes(run) == (tmp_path / "first").read_bytes()
    assert layers_of(run).bits == bits


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2.5, 3.5])
def test_every_method_takes_layers_of_two_widths(tmp_path: Path, bits: float) -> None:
    model, run = save_model(tmp_path / "model", "qwen3"), tmp_path / "run"
    flags = ("--bits", str(bits), "--method", "awq+se+gptq+blockwise", "--seq_len", "32", "--blockwise_epochs", "1")
    assert main(compress_command(model, run, *flags)) == 0
    assert set(layers_of(run).bits.values()) == {int(bits), int(bits) + 1}
    assert bits - 0.2 < average(run) <= bits


def test_layer_and_ignore_are_stronger(tmp_path: Path) -> None:
    model, run = save_model(tmp_path / "model", "llama"), tmp_path / "run"
    flags = ("--bits", "5", "--layer", "*.0.mlp.down_proj:bits=3", "--layer", "*.o_proj:group_size=64")
    assert main(compress_command(model, run, *flags, "--ignore", "*.1.mlp.up_proj")) == 0
    layers, (quantized, others) = layers_of(run), load_weights(run / "quantized")
    assert layers.bits["model.layers.0.mlp.down_proj"] == 3
    assert quantized["model.layers.1.self_attn.o_proj"].scheme.group_size == 64
    assert "model.layers.1.mlp.up_proj.weight" in others
    assert 4.6 < average(run) <= 5


@pytest.mark.slow
def test_what_is_fused_has_one_width_and_vllm_holds_it(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="the extra vllm")
    model, run = save_mixture(tmp_path / "model", "qwen3_moe"), tmp_path / "run"
    assert main(compress_command(model, run, "--bits", "4.5", "--symmetric", "--export", "vllm", "hf")) == 0
    bits = layers_of(run).bits
    for leaves in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("experts",)):
        for layer in (0, 1):
            found = {w for name, w in bits.items() if f".{layer}." in name and any(f".{x}" in name for x in leaves)}
            assert len(found) <= 1
    assert average(run) <= 4.5


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 4])
def test_distill_trains_layers_of_two_widths(tmp_path: Path, rank: int) -> None:
    model, run = save_model(tmp_path / "model", "llama"), tmp_path / "run"
    distill(distill_options(model, run, bits=3.5, group_size=32, lora_rank=rank))
    assert set(layers_of(run).bits.values()) == {3, 4}
    assert 3.3 < average(run) <= 3.5


@pytest.mark.slow
@pytest.mark.parametrize("quantize", ["during", "after"])
def test_tune_trains_layers_of_two_widths(tmp_path: Path, quantize: str) -> None:
    run = tmp_path / "run"
    model = save_model(tmp_path / "model", "llama")
    tune(tune_options(tmp_path, pretrained=str(model), output_dir=str(run), bits=2.5, quantize=quantize, group_size=32))
    assert set(layers_of(run).bits.values()) == {2, 3}
    assert 2.3 < average(run) <= 2.5


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--bits 9", "--bits must be 2, 3, 4 or 8, or an average from 2 to 8; got 9"),
        ("--bits 1.5", "--bits must be 2, 3, 4 or 8, or an average from 2 to 8; got 1.5"),
        ("--bits four", "--bits must be a number; got four"),
        ("--bits 4.5 --target npu --group_size 128", "--target npu needs the same --bits in all layers: 2, 3, 4 or 8"),
        ("--bits 4.5 --dtype float16", "--dtype must be bfloat16 or float32 for --bits 4.5; float16 gradients vanish"),
        ("--bits 4.5 --layer model.*:bits=4", "--bits 4.5 must leave layers to choose bits for; --layer gives all of"),
        ("--bits 4.5 --layer *.mlp.*:bits=8", "--bits 4.5 must be at least what --layer gives alone; with 4 bits in"),
        ("--bits 4.5 --data self", "--bits 4.5 chooses layers on calibration text before the run begins; the text of"),
        ("--bits 4.5 --export gguf --group_size 16", "an export to GGUF needs groups, or whole rows, of a multiple of"),
    ],
)
def test_bad_averages_are_one_line_before_there_is_a_run(
    flags: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if "gguf" in flags:
        pytest.importorskip("xllamacpp", reason="the extra gguf")
        monkeypatch.setattr("nybble.workflows.mixed_precision.layer_gains", lambda *_: pytest.fail("before the work"))
    model, run = save_model(tmp_path / "model", "llama"), tmp_path / "run"
    assert main(compress_command(model, run, *flags.split())) == 2
    error = capsys.readouterr().err.strip().split("nybble: ")[-1]
    assert words in error.replace("\n", " ")
    assert not run.exists()


def test_an_average_contradicts_a_finished_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["distill", "--pretrained", str(tmp_path), "--bits", "4.5", "--init_from", str(tmp_path)]
    assert main(command) == 2
    assert "--init_from takes the bits of a finished run; --bits 4.5 would choose them anew" in capsys.readouterr().err


@pytest.mark.slow
def test_a_whole_number_is_no_average(tmp_path: Path) -> None:
    model, first, second = save_model(tmp_path / "model", "llama"), tmp_path / "first", tmp_path / "second"
    assert main(compress_command(model, first, "--bits", "4.0")) == 0
    assert main(compress_command(model, second)) == 0
    assert shipped_bytes(first) == shipped_bytes(second)
    assert layers_of(first).bits == {}
