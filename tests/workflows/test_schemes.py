"""Schemes from the command line to the run folder, its exports, its report and its card."""

from pathlib import Path

import pytest
import torch

from nybble.cli.main import main
from nybble.models.quantized_file import load_weights
from nybble.quant.scheme import INT8_PER_ROW, QuantScheme
from nybble.run.results import read_results
from nybble.workflows.distill import distill
from tests.helpers.compress import compress_command
from tests.helpers.distill import distill_options
from tests.helpers.tiny import save_model

MIXED = (
    "--bits", "3", "--symmetric", "--layer", "*.mlp.down_proj:bits=2,group_size=64,symmetric=false", "--layer",
    "lm_head:bits=4", "--ignore", "*.o_proj",
)  # fmt: skip


def test_a_run_of_several_schemes_says_so_everywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, run = save_model(tmp_path / "model", "llama"), tmp_path / "run"
    assert main(compress_command(model, run, *MIXED, "--export", "hf")) == 0
    quantized, others = load_weights(run / "quantized")
    assert quantized["model.layers.0.mlp.up_proj"].scheme == QuantScheme(3, 32, symmetric=True)
    assert quantized["model.layers.1.mlp.down_proj"].scheme == QuantScheme(2, 64)
    assert quantized["lm_head"].scheme == QuantScheme(4, 32, symmetric=True)
    assert quantized["model.embed_tokens"].scheme == INT8_PER_ROW
    assert "model.layers.0.self_attn.o_proj.weight" in others
    layers = read_results(run).layers
    assert layers is not None
    counts = "10 x uint3 symmetric group 32, 2 x uint2 asymmetric group 64, 1 x uint8 symmetric per row"
    assert {f"{count} x {scheme}" for scheme, count in layers.schemes.items()} >= set(counts.split(", "))
    sizes = sum(weight.nbytes for weight in quantized.values()), sum(w.codes_OI.numel() for w in quantized.values())
    assert layers.bits_per_weight == pytest.approx(8 * sizes[0] / sizes[1])
    for text in ((run / "report.md").read_text(), (run / "hf" / "README.md").read_text()):
        assert counts.split(", ")[0] in text
        assert "INT2/INT3" in text
        assert f"{layers.bits_per_weight:.2f} bits a weight" in text
        assert "2 layers stay in 16 bits" in text
    capsys.readouterr()
    assert main(["eval", str(run), "--data", "python-docs", "--num_samples", "2", "--seq_len", "32"]) == 0


def test_smaller_groups_are_said_in_the_report(tmp_path: Path) -> None:
    model, run = save_model(tmp_path / "model", "llama"), tmp_path / "run"
    assert main(compress_command(model, run, "--group_size", "128")) == 0
    results = read_results(run)
    (warning,) = results.warnings
    assert warning.startswith("the group size does not divide the rows of 12 layers (model.layers.0.self_attn.q_proj, ")
    assert warning in (run / "report.md").read_text().replace("\\", "")


@pytest.mark.parametrize("rank", [4, pytest.param(0, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_3_bits_are_distilled_and_taken_over(tmp_path: Path, rank: int) -> None:
    """What a run ships in 3 and 8 bits, with a layer in 16, another run takes over to the bit."""
    model, first, second = save_model(tmp_path / "model", "llama"), tmp_path / "first", tmp_path / "second"
    scheme = {"bits": 3, "group_size": 32, "layer": ("*.v_proj:bits=8",), "ignore": ("*.0.mlp.up_proj",)}
    settings = scheme | {"lora_rank": rank, "num_calibration_samples": 8}
    distill(distill_options(model, first, **settings | {"method": "se+gptq"}))
    quantized, others = load_weights(first / "quantized")
    assert {weight.scheme.bits for weight in quantized.values()} == {3, 8}
    assert "model.layers.0.mlp.up_proj.weight" in others
    assert read_results(first).precision == "INT3/INT8"
    still = {"lr": 0.0, "scale_lr": 1e-30, "norm_lr": 0.0, "method": "auto", "init_from": str(first)}
    distill(distill_options(model, second, **settings | still))
    again, _ = load_weights(second / "quantized")
    for name, weight in quantized.items():
        assert torch.equal(weight.codes_OI, again[name].codes_OI), name
        assert torch.equal(weight.scale_OG, again[name].scale_OG), name
        assert torch.equal(weight.zero_point_OG, again[name].zero_point_OG), name


@pytest.mark.usefixtures("needs_openvino")
@pytest.mark.slow
def test_an_npu_gets_signed_codes_without_zero_points(tmp_path: Path) -> None:
    import openvino as ov

    model, run = save_model(tmp_path / "model", "llama", hidden_size=128, intermediate_size=192), tmp_path / "run"
    command = compress_command(model, run, "--target", "npu", "--export", "openvino")
    i = command.index("--group_size")
    assert main(command[:i] + command[i + 2 :]) == 0
    graph = ov.Core().read_model(run / "openvino" / "openvino_model.xml")
    nodes = {
        node.get_friendly_name(): (node.get_element_type().get_type_name(), list(node.shape))
        for node in graph.get_ops()
        if node.get_type_name() == "Constant"
    }
    assert nodes["model.layers.0.mlp.up_proj.codes"] == ("i4", [192, 128])
    assert nodes["model.layers.0.mlp.down_proj.codes"] == ("i4", [128, 192])
    assert not [name for name in nodes if name.endswith("proj.zero_point")]
    assert nodes["model.embed_tokens.codes"][0] == nodes["lm_head.zero_point"][0] == "u8"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--layer q_proj", "--layer must be PATTERN:KEY=VALUE with the keys bits"),
        (
            "--layer q_proj:bits=3",
            "--layer must match the name of a layer; q_proj matches none of 16; names are such as",
        ),
        ("--ignore *.gate", "--ignore must match the name of a layer; *.gate matches none of 16"),
        ("--target tpu", "--target must be one of any, npu; got 'tpu'"),
        ("--target npu --group_size 32", "--target npu needs --group_size 128 or -1; got 32"),
        (
            "--export gguf --group_size 16",
            "an export to GGUF needs groups, or whole rows, of a multiple of 32 weights; m",
        ),
    ],
)
def test_bad_schemes_are_one_line_before_there_is_a_run(
    flags: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "gguf" in flags:
        pytest.importorskip("xllamacpp", reason="the extra gguf")
    model, run = save_model(tmp_path / "model", "llama"), tmp_path / "run"
    assert main(compress_command(model, run, *flags.split())) == 2
    error = capsys.readouterr().err.strip().split("nybble: ")[-1]
    assert words in error.replace("\n", " ")
    assert not run.exists()
