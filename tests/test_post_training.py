"""`nybble compress` and `nybble inspect` as commands; interrupted and resumed; the compressed weights as a start for distillation."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import BioGptConfig, BioGptForCausalLM, MambaConfig, MambaForCausalLM

from nybble.cli import main
from nybble.compress import blockwise, pipeline
from nybble.compress import store as compress_store
from nybble.compress.calibration import Calibration
from nybble.models import quantized_model, selection
from nybble.options.commands import CompressOptions
from nybble.quant.scheme import QuantScheme
from nybble.run import results as run_results
from nybble.run import resume
from nybble.workflows.compress import compress as compress_flow
from nybble.workflows.distill import distill
from tests import test_families
from tests.tiny import make_model, make_tokenizer, save_model

METHODS = ("awq", "se", "gptq", "blockwise", "awq+se", "awq+se+gptq", "se+gptq+blockwise")


def options(model: Path, run: Path, **changes: object) -> CompressOptions:
    base = CompressOptions(
        pretrained=str(model), output_dir=str(run), method="awq+se+gptq+blockwise", data=("python-docs",), seq_len=32, calib_samples=16, group_size=32,
        test_samples=4, tasks=(), export=(),
    )  # fmt: skip
    return dataclasses.replace(base, **changes)


def codes(run: Path) -> dict[str, torch.Tensor]:
    return {name: weight.codes_OI for name, weight in quantized_model.load_weights(run / "quantized")[0].items()}


def saved(run: Path) -> bytes:
    return (run / "quantized" / quantized_model.WEIGHTS_FILE).read_bytes()


@pytest.mark.usefixtures("needs_openvino")
def test_compress_measures_exports_and_reports(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, run = save_model(tmp_path / "model", "qwen2"), tmp_path / "run"
    flags = "--data python-docs --seq_len 32 --calib_samples 16 --group_size 32 --test_samples 4 --tasks"
    assert (
        main.main(
            [
                "compress",
                "--pretrained",
                str(model),
                "--output_dir",
                str(run),
                "--method",
                "awq+se+gptq",
                *flags.split(),
            ]
        )
        == 0
    )
    said = capsys.readouterr().out
    results = json.loads((run / "results.json").read_text())
    assert results["models"].keys() == {"16bit", "compressed", "openvino"}
    assert results["models"]["openvino"]["kl_to_teacher"] == pytest.approx(
        results["models"]["compressed"]["kl_to_teacher"], rel=3e-2
    )  # deployed with 8-bit activations
    assert (results["kind"], results["method"]) == ("compress", "awq+se+gptq")
    assert set(results["seconds"]) == {"load", "teacher", "measure", "compress", "export openvino"}
    errors = results["layer_errors"]
    assert len(errors) == 14
    assert all(error["compressed"] < error["rtn"] for error in errors.values())
    assert all(0 <= error["clipped"] < 0.2 for error in errors.values())
    assert "calibration: 16 x 32 tokens of the training text" in said
    assert "mean output error of a layer" in said
    assert "4 bit, compressed (OpenVINO)" in said
    assert "repaired" not in said
    assert "in 4 bits by awq+se+gptq (OpenVINO): token perplexity" in said
    assert not (run / "compress").exists(), "the finished blocks are deleted when the 4-bit model is saved"
    text = (run / "report.md").read_text()
    assert "| model.layers.1.mlp.down_proj |" in text

    for target in (run, run / "quantized", run / "openvino"):
        assert main.main(["inspect", str(target)]) == 0
        table = capsys.readouterr().out
        assert "16 quantized layers" not in table
        assert "15 quantized layers" in table  # the head is tied
        row = next(line for line in table.splitlines() if "model.layers.0.mlp.down_proj" in line)
        error = errors["model.layers.0.mlp.down_proj"]
        cells = [cell.strip() for cell in row.strip("│ ").split("│")]
        assert cells[1:3] == ["64 x 128", "uint4 asymmetric group 32"]
        assert cells[3:7] == [
            f"{error['rtn']:.3%}",
            f"{error['compressed']:.3%}",
            f"{error['weight']:.2%}",
            f"{error['clipped']:.3%}",
        ]
        assert (
            "14 x uint4 asymmetric group 32, 1 x uint8 symmetric per row" in table
            or "1 x uint8 symmetric per row, 14 x uint4 asymmetric group 32" in table
        )
    assert main.main(["inspect", str(tmp_path)]) == 2
    assert (
        "must be a finished run, or a folder quantized or openvino inside one; it is neither" in capsys.readouterr().err
    )
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)
        assert main.main(["inspect", str(run / "openvino")]) == 2
    assert 'pip install -c constraints.txt -e ".[openvino]"' in capsys.readouterr().err
    save_file({"a": torch.zeros(2)}, run / "quantized" / quantized_model.WEIGHTS_FILE)
    assert main.main(["inspect", str(run)]) == 2
    assert "must be a 4-bit model that nybble wrote (nybble-2); it is something else" in capsys.readouterr().err
    (run / "quantized" / quantized_model.WEIGHTS_FILE).write_bytes(b"cut")
    assert (
        main.main(
            [
                "distill",
                "--pretrained",
                str(model),
                "--output_dir",
                str(tmp_path / "third"),
                *flags.split(),
                "--start",
                str(run),
            ]
        )
        == 2
    )
    assert "must be a readable safetensors file" in capsys.readouterr().err


def test_a_model_that_is_broken_is_refused_before_there_is_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    model.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    flags = "--data python-docs --seq_len 32 --calib_samples 16 --group_size 32 --test_samples 4 --tasks --export"
    for method, words in (
        ("rtn", "the logits of llama must be finite numbers"),
        ("se", "the outputs of block 1 (mlp.down_proj) must be finite"),
    ):
        assert (
            main.main(
                [
                    "compress",
                    "--pretrained",
                    str(tmp_path / "model"),
                    "--output_dir",
                    str(tmp_path / "run"),
                    "--method",
                    method,
                    *flags.split(),
                ]
            )
            == 2
        )
        assert words in capsys.readouterr().err
        assert not (tmp_path / "run").exists()


def test_errors_of_layers_that_folding_divides_are_those_of_their_own_outputs() -> None:
    model = make_model("llama")
    ids = torch.randint(0, 255, (16, 32), generator=torch.Generator().manual_seed(0))
    values = model.model.layers[0].self_attn.v_proj
    with torch.no_grad():
        values.weight[:4] *= 30
    seen: list[torch.Tensor] = []
    handle = values.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, -2)))
    model(ids)
    handle.remove()
    before = values.weight.detach().clone()
    result = pipeline.compress(
        model, selection.select_layers(model).int4, QuantScheme(group_size=32), "awq", Calibration(ids)
    )
    name = "model.layers.0.self_attn.v_proj"
    factors = (
        (before / values.weight).median(1).values[:, None]
    )  # rows were divided; columns multiplied by what the norm was divided by
    norm = (values.weight * factors / before).median(0).values
    made = result.starts[name].quantized(QuantScheme(group_size=32)).dequantize() * factors / norm
    wanted = ((made - before) @ seen[0].T).square().mean() / (before @ seen[0].T).square().mean()
    assert result.errors[name].compressed == pytest.approx(float(wanted), rel=1e-3)


def test_options_for_steps_that_are_not_done_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = save_model(tmp_path / "model", "llama")
    with caplog.at_level("WARNING", "nybble"):
        compress_flow(options(model, tmp_path / "run", method="se", gptq_damping=0.5, blockwise_epochs=9.0))
    assert "--gptq_damping has no effect: the method has no step gptq" in caplog.text
    assert "--blockwise_epochs has no effect: the method has no step blockwise" in caplog.text
    assert "--gptq_act_order" not in caplog.text


class Killed(Exception):
    pass


def test_interrupted_anywhere_and_resumed_ends_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_model(tmp_path / "model", "gemma2", begin=True)
    compress_flow(options(model, tmp_path / "undisturbed"))
    original = blockwise.train

    for block in (0, 1):
        run = tmp_path / f"run{block}"

        def train(blocks, i, *rest, block=block):  # type: ignore[no-untyped-def]
            if i == block:
                raise Killed
            return original(blocks, i, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(blockwise, "train", train)
            with pytest.raises(Killed):
                compress_flow(options(model, run))
        assert len(list((run / "compress").glob("*.safetensors")) if block else []) == block
        trained: list[int] = []
        with monkeypatch.context() as patch:
            patch.setattr(
                blockwise,
                "train",
                lambda blocks, i, *rest, trained=trained: trained.append(i) or original(blocks, i, *rest),
            )
            compress_flow(options(model, run, resume=True))
        assert trained == list(range(block, 2)), "finished blocks are not trained again"
        assert saved(run) == saved(tmp_path / "undisturbed")
        before, after = (
            json.loads((tmp_path / name / "results.json").read_text()) for name in ("undisturbed", run.name)
        )
        assert before["layer_errors"] == after["layer_errors"]
        assert before["block_losses"] == after["block_losses"]
        assert before["models"] == after["models"]


def test_blocks_of_another_text_or_model_are_not_taken(tmp_path: Path) -> None:
    store = compress_store.BlockStore(tmp_path / "blocks", "one")
    assert store.load("model.layers.0.") is None
    store.save("model.layers.0.", {"x": torch.ones(2)}, {"errors": 1})
    assert store.load("model.layers.1.") is None
    tensors, note = store.load("model.layers.0.")  # type: ignore[misc]
    assert (tensors["x"].tolist(), note) == ([1, 1], {"errors": 1})
    assert compress_store.BlockStore(tmp_path / "blocks", "two").load("model.layers.0.") is None


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_closer_than_rounding_to_nearest(method: str) -> None:
    """The compressed model is closer to the original than round-to-nearest is, on text that it has not seen."""
    model = make_model("llama", dtype=torch.float32)
    names = selection.select_layers(model).int4
    generator = torch.Generator().manual_seed(0)
    # calibration text with a few strong channels, as real models have
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight[:4] *= 8
            layer.post_attention_layernorm.weight[:4] *= 8
    ids = torch.randint(0, 255, (96, 32), generator=generator)
    original = model(ids[64:]).logits

    def distance(method: str) -> float:
        compressed = make_model("llama", dtype=torch.float32)
        compressed.load_state_dict(model.state_dict())
        result = pipeline.compress(
            compressed,
            names,
            QuantScheme(group_size=32),
            method,
            Calibration(ids[:64], recipe=blockwise.BlockwiseConfig(epochs=8)),
        )
        for name, start in result.starts.items():
            compressed.get_submodule(name).weight = torch.nn.Parameter(
                start.quantized(QuantScheme(group_size=32)).dequantize(), requires_grad=False
            )
        return float((compressed(ids[64:]).logits - original).square().mean())

    assert distance(method) < 0.97 * distance("rtn")


def test_limit_blocks_leaves_the_rest_to_rtn() -> None:
    ids = torch.randint(0, 255, (16, 16))
    results = {}
    for limit in (None, 1, 0):
        model = make_model("llama")
        names = selection.select_layers(model).int4
        results[limit] = pipeline.compress(
            model, names, QuantScheme(group_size=32), "se", Calibration(ids, limit_blocks=limit)
        )
        assert tuple(results[limit].starts) == names
    plain = pipeline.compress(make_model("llama"), names, QuantScheme(group_size=32), "rtn")
    for name in names:
        same = {
            limit: torch.equal(result.starts[name].scale_OG, plain.starts[name].scale_OG)
            for limit, result in results.items()
        }
        assert same == {None: False, 1: ".1." in name, 0: True}
    assert results[1].errors["model.layers.1.mlp.up_proj"].compressed is None
    assert results[1].errors["model.layers.0.mlp.up_proj"].compressed is not None


def test_a_block_without_4_bit_layers_is_passed_through() -> None:
    model = make_model("llama")
    names = [name for name in selection.select_layers(model).int4 if ".1." in name]
    result = pipeline.compress(
        model, names, QuantScheme(group_size=32), "blockwise", Calibration(torch.randint(0, 255, (16, 16)))
    )
    assert list(result.starts) == names
    assert list(result.blocks) == ["model.layers.1"]


def test_the_model_holds_the_weights_of_the_starts_without_a_copy() -> None:
    model = make_model("llama", dtype=torch.bfloat16)
    names = selection.select_layers(model).int4
    result = pipeline.compress(
        model, names, QuantScheme(group_size=32), "se+gptq", Calibration(torch.randint(0, 255, (16, 16)))
    )
    for name, start in result.starts.items():
        assert start.weight_OI.data_ptr() == model.get_submodule(name).weight.data_ptr()
        assert start.weight_OI.dtype == torch.bfloat16


def test_starts_follow_a_model_that_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU every .to() gives the parameters new memory."""
    original = torch.nn.Module.to

    def to(module: torch.nn.Module, *arguments: object) -> torch.nn.Module:
        moved = original(module, *arguments)
        for parameter in moved.parameters():
            parameter.data = parameter.data.clone()
        return moved

    monkeypatch.setattr(torch.nn.Module, "to", to)
    model = make_model("smollm")
    result = pipeline.compress(
        model,
        selection.select_layers(model).int4,
        QuantScheme(group_size=32),
        "awq+se+blockwise",
        Calibration(torch.randint(0, 255, (16, 16))),
    )
    for name, start in result.starts.items():
        assert start.weight_OI.data_ptr() == model.get_submodule(name).weight.data_ptr()
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_awq_alone_is_measured_against_rounding_the_weights_as_they_were() -> None:
    model = make_model("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight[:4] *= 8
    result = pipeline.compress(
        model,
        selection.select_layers(model).int4,
        QuantScheme(group_size=32),
        "awq",
        Calibration(torch.randint(0, 255, (32, 16))),
    )
    for name, error in result.errors.items():
        if "q_proj" in name or "k_proj" in name:
            assert error.compressed < 0.95 * error.rtn


@pytest.mark.slow
def test_distillation_starts_from_the_compressed_codes(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", "llama")
    start = "awq+se+gptq+blockwise"
    shared = {"start": start, "calib_samples": 8, "group_size": 32}
    distill(test_families.options(model, tmp_path / "untrained", lr=1e-12, scale_lr=0.0, norm_lr=0.0, **shared))
    compress_flow(options(model, tmp_path / "compressed", calib_samples=8, seed=0, method=start))
    untrained, compressed = (
        json.loads((tmp_path / name / "results.json").read_text()) for name in ("untrained", "compressed")
    )
    assert untrained["codes_changed"] == 0
    assert untrained["layer_errors"].keys() == compressed["layer_errors"].keys()
    assert untrained["models"]["tuned"]["kl_to_teacher"] == pytest.approx(
        untrained["models"]["compressed"]["kl_to_teacher"], rel=1e-5
    )

    for name, expected in codes(tmp_path / "compressed").items():
        assert torch.equal(codes(tmp_path / "untrained")[name], expected), (
            "the same seed takes the same calibration text"
        )
    assert untrained["method"] == start
    plain = distill(
        test_families.options(model, tmp_path / "plain", lr=1e-12, scale_lr=0.0, norm_lr=0.0, group_size=32)
    )
    before = json.loads((plain / "results.json").read_text())["models"]["compressed"]["kl_to_teacher"]
    assert untrained["models"]["compressed"]["kl_to_teacher"] < before


def test_a_folder_called_like_a_method_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    compress_flow(options(save_model(tmp_path / "model", "llama"), Path("se"), method="se"))
    assert run_results.read_results(Path("se"))["method"] == "se"


@pytest.mark.parametrize(
    ("known", "rank", "expected"),
    [(True, 0, "awq+se+blockwise"), (False, 0, "se+blockwise"), (True, 4, "awq+se+gptq"), (False, 4, "se+gptq")],
)
def test_the_automatic_start_needs_no_row_of_the_family(
    known: bool, rank: int, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nybble.models import families

    model, run = save_model(tmp_path / "model", "llama"), tmp_path / "run"
    if not known:
        monkeypatch.setitem(families.FAMILIES, "llama", families.ModelFamily())
    settings = {"start": "auto", "calib_samples": 8, "group_size": 32, "lora_rank": rank}
    distill(test_families.options(model, run, **settings))
    assert resume.read_options(run)["start"] == run_results.read_results(run)["method"] == expected
    assert len(run_results.read_results(run)["block_losses"]) == (0 if rank else 2)
    distill(test_families.options(model, run, resume=True, **settings))


@pytest.mark.parametrize(
    ("start", "rank", "warned"), [("RUN", 4, True), ("RUN", 0, False), ("se+blockwise", 4, True), ("se", 4, False)]
)
def test_adapters_over_codes_that_they_hardly_move_are_said(
    start: str, rank: int, warned: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = save_model(tmp_path / "model", "llama")
    compress_flow(options(model, tmp_path / "first", method="rtn"))
    caplog.clear()
    start = start.replace("RUN", str(tmp_path / "first"))
    distill(test_families.options(model, tmp_path / "run", start=start, calib_samples=8, group_size=32, lora_rank=rank))
    assert ("adapters hardly move the codes" in caplog.text) == warned


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_finished_run_is_a_start(dtype: str, tmp_path: Path) -> None:
    """Codes, scales, zeros and folded norms are those of the run; the teacher is the 16-bit model."""
    model, first, second = save_model(tmp_path / "model", "qwen2"), tmp_path / "first", tmp_path / "second"
    compress_flow(options(model, first, method="awq+se", dtype=dtype))
    distill(
        test_families.options(
            model, second, start=str(first), group_size=32, lora_rank=0, scale_lr=0.0, norm_lr=1e-9, dtype=dtype
        )
    )
    made, started = (json.loads((run / "results.json").read_text()) for run in (first, second))
    assert started["models"]["compressed"]["kl_to_teacher"] == pytest.approx(
        made["models"]["compressed"]["kl_to_teacher"], rel=1e-5
    )
    assert (started["method"], started["layer_errors"]) == (f"awq+se ({first})", made["layer_errors"])
    assert started["codes_changed"] == 0.0
    (before, rest), (after, others) = (quantized_model.load_weights(run / "quantized") for run in (first, second))
    for name, weight in before.items():
        assert torch.equal(after[name].codes_OI, weight.codes_OI)
        assert torch.equal(after[name].scale_OG, weight.scale_OG)
        assert torch.equal(after[name].zero_point_OG, weight.zero_point_OG)
    assert all(torch.allclose(others[key], tensor, rtol=1e-2) for key, tensor in rest.items())


def test_a_run_that_cannot_be_a_start_is_refused_before_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, start, run = save_model(tmp_path / "model", "llama"), tmp_path / "start", tmp_path / "run"
    compress_flow(options(model, start, method="rtn"))
    other = save_model(tmp_path / "other", "llama", num_hidden_layers=1)
    flags = [
        "--data",
        "python-docs",
        "--seq_len",
        "32",
        "--samples",
        "8",
        "--batch_size",
        "4",
        "--tasks",
        "--export",
        "--output_dir",
        str(run),
    ]

    def refused(model: Path, *more: str) -> str:
        assert main.main(["distill", "--pretrained", str(model), *flags, *more]) == 2
        assert not run.exists()
        return " ".join(capsys.readouterr().err.split())

    assert f"--start {start} must have groups of 64 weights; it has groups of 32; add --group_size 32" in refused(
        model, "--start", str(start)
    )
    assert "must be of a model like other; it is of model, whose layers are others" in refused(
        other, "--start", str(start), "--group_size", "32"
    )
    biased = save_model(tmp_path / "biased", "llama", attention_bias=True)
    told = refused(biased, "--start", str(start), "--group_size", "32")
    assert (
        f"--start {start} must be of a model like biased; only one of it and model has model.layers.0.self_attn.k_proj.bias"
        in told
    )
    shutil.rmtree(start / "quantized")
    assert f"--start {start} must be a finished run; it has no folder quantized" in refused(
        model, "--start", str(start), "--group_size", "32"
    )
    assert (
        "--start, where it is not the folder of a run, must be rtn, or one or more of awq, se, gptq, blockwise"
        in refused(model, "--start", "runs/none")
    )
    assert main.main(["compress", "--pretrained", str(model), "--output_dir", str(run), "--method", str(start)]) == 2
    assert "--method must be rtn, or one or more of" in capsys.readouterr().err


@pytest.mark.slow
def test_distillation_resumes_on_the_finished_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_model(tmp_path / "model", "llama")
    shared = {"start": "awq+se+blockwise", "calib_samples": 8, "group_size": 32}
    distill(test_families.options(model, tmp_path / "undisturbed", **shared))
    with monkeypatch.context() as patch:
        test_families.interrupt_after(2, patch)
        with pytest.raises(KeyboardInterrupt):
            distill(test_families.options(model, tmp_path / "run", **shared))
    trained = []
    monkeypatch.setattr(blockwise, "train", lambda *arguments: trained.append(arguments))
    distill(test_families.options(model, tmp_path / "run", resume=True, **shared))
    assert trained == []
    assert saved(tmp_path / "run") == saved(tmp_path / "undisturbed")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--seq_len", "60000"], "the calibration text must give at least 8 sequences of 60000 tokens; it has"),
        (
            ["--dtype", "float16", "--method", "blockwise"],
            "--dtype must be bfloat16 or float32 for blockwise; float16 gradients vanish",
        ),
        (
            ["--group_size", "48"],
            "in_features must be a multiple of group_size: layer model.layers.0.self_attn.q_proj has in_features=64, got group_size=48",
        ),
    ],
)
def test_bad_input_leaves_nothing_behind(
    flags: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_model(tmp_path / "model", "llama")
    run = tmp_path / "run"
    arguments = [
        "compress",
        "--pretrained",
        str(model),
        "--output_dir",
        str(run),
        "--data",
        "python-docs",
        "--tasks",
        "--export",
        *flags,
    ]
    assert main.main(arguments) == 2
    assert words in capsys.readouterr().err
    assert not run.exists()


def test_awq_on_an_unknown_family_is_refused_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from nybble.models import families

    model = save_model(tmp_path / "model", "llama")
    monkeypatch.setitem(families.FAMILIES, "llama", families.ModelFamily())
    flags = [
        "--output_dir",
        str(tmp_path / "run"),
        "--data",
        "python-docs",
        "--seq_len",
        "32",
        "--tasks",
        "--export",
        "--group_size",
        "32",
    ]
    flags += ["--test_samples", "4", "--calib_samples", "8"]
    assert main.main(["compress", "--pretrained", str(model), "--method", "awq+se", *flags]) == 2
    assert "families.py has no such row for llama" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert main.main(["compress", "--pretrained", str(model), "--method", "se", *flags]) == 0


def test_less_calibration_text_than_wanted_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_model(tmp_path / "model", "llama")
    (tmp_path / "text.txt").write_text("".join(f"line {i} of a short text\n" for i in range(400)))
    flags = [
        "--output_dir",
        str(tmp_path / "run"),
        "--data",
        str(tmp_path / "text.txt"),
        "--seq_len",
        "64",
        "--tasks",
        "--export",
        "--group_size",
        "32",
    ]
    assert main.main(["compress", "--pretrained", str(model), "--method", "se", *flags]) == 0
    assert "tokens of the training text (all there is; --calib_samples is 128)" in " ".join(
        capsys.readouterr().out.split()
    )


def test_rtn_needs_no_text_to_learn_from(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", "llama")
    compress_flow(options(model, tmp_path / "run", method="rtn"))
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert all(error["rtn"] is None and error["weight"] > 0 for error in results["layer_errors"].values())
    shutil.rmtree(tmp_path / "run" / "quantized")
    assert main.main(["inspect", str(tmp_path / "run")]) == 2


@pytest.mark.parametrize(
    ("function", "words"),
    [("convert_model", "LlamaForCausalLM cannot be traced"), ("tokenizer", "cannot be converted")],
)
def test_an_export_that_fails_is_said_after_all_else_is_reported(
    function: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    openvino, tokenizers = pytest.importorskip("openvino"), pytest.importorskip("openvino_tokenizers")

    def fail(*_: object, **__: object) -> None:
        raise TypeError("not this one")

    model, run = save_model(tmp_path / "model", "llama"), tmp_path / "run"
    flags = f"--pretrained {model} --output_dir {run} --method rtn --data python-docs --seq_len 32 --group_size 32 --test_samples 4 --tasks"
    with monkeypatch.context() as patch:
        patch.setattr(
            *((openvino, "convert_model") if function == "convert_model" else (tokenizers, "convert_tokenizer")), fail
        )
        assert main.main(["compress", *flags.split(), "--export", "openvino"]) == 2
    said = capsys.readouterr()
    assert words in said.err.splitlines()[-1]
    assert "TypeError: not this one" in said.err.splitlines()[-1]
    assert "**Warning:** not exported: " in (run / "report.md").read_text()
    assert not (run / "openvino").exists()
    assert main.main(["compress", *flags.split(), "--export", "openvino", "--resume"]) == 0
    assert "Warning" not in (run / "report.md").read_text()
    assert (run / "openvino").is_dir()


def test_a_tied_head_may_have_any_name(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    torch.manual_seed(0)
    config = BioGptConfig(
        vocab_size=260,
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    BioGptForCausalLM(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    compress_flow(options(folder, tmp_path / "run", method="rtn"))
    loaded, _, _ = quantized_model.load_quantized(tmp_path / "run" / "quantized", torch.float32)
    assert loaded.output_projection.weight is loaded.get_input_embeddings().weight


def test_options_that_nothing_follows_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    compress_flow(options(save_model(tmp_path / "model", "llama"), tmp_path / "run", method="rtn", limit_blocks=1))
    assert "--limit_blocks has no effect: nothing is calibrated" in caplog.text


def test_layers_whose_weights_are_read_past_them_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    MambaForCausalLM(
        MambaConfig(vocab_size=260, hidden_size=64, num_hidden_layers=1, state_size=16, time_step_rank=32)
    ).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    flags = "--method rtn --data python-docs --seq_len 32 --group_size 32 --test_samples 4 --tasks --export"
    assert (
        main.main(
            ["compress", "--pretrained", str(tmp_path / "model"), "--output_dir", str(tmp_path / "run"), *flags.split()]
        )
        == 2
    )
    assert (
        "MambaForCausalLM reads the weight of backbone.layers.0.mixer.dt_proj without calling the layer (1 such)"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "run").exists()


def test_code_that_came_with_a_model_goes_along(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "llama")
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "mine",
        "auto_map": {"AutoConfig": "configuration_mine.Config", "AutoModelForCausalLM": "modeling_mine.Model"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "configuration_mine.py").write_text(
        "from transformers import LlamaConfig\n\nclass Config(LlamaConfig):\n    model_type = 'mine'\n"
    )
    (folder / "modeling_mine.py").write_text(
        "from transformers import LlamaForCausalLM\nfrom .configuration_mine import Config\n\nclass Model(LlamaForCausalLM):\n    config_class = Config\n"
    )
    compress_flow(options(folder, tmp_path / "run", method="rtn", trust_remote_code=True))
    loaded, _, _ = quantized_model.load_quantized(tmp_path / "run" / "quantized", torch.float32, trust_remote_code=True)
    assert type(loaded).__name__ == "Model"


def test_code_in_a_run_of_someone_else_runs_only_where_it_is_allowed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder asks for it in its config.toml and brings code in quantized/; nobody at the keyboard allowed it."""
    run = tmp_path / "run"
    compress_flow(options(save_model(tmp_path / "model", "llama"), run, method="rtn"))
    with (run / "config.toml").open("a") as file:
        file.write("trust_remote_code = true\n")
    config = json.loads((run / "quantized" / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}}
    (run / "quantized" / "config.json").write_text(json.dumps(config))
    (run / "quantized" / "mine.py").write_text("raise SystemExit('foreign code ran')")
    for command in (["export", str(run)], ["eval", str(run), "--data", "python-docs"]):
        assert main.main(command) == 2
        words = (
            f"{run / 'quantized'} needs Python code that comes with the model; if you trust it, add --trust_remote_code"
        )
        assert words in capsys.readouterr().err
    with pytest.raises(SystemExit, match="foreign code ran"):
        main.main(["export", str(run), "--trust_remote_code"])


def test_a_head_of_its_own_ships_whatever_the_configuration_says(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """config.json says tied embeddings, the checkpoint has a trained head (a merged LoRA with modules_to_save)."""
    folder = save_model(tmp_path / "model", "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    with caplog.at_level("WARNING", "nybble"):
        compress_flow(options(folder, tmp_path / "run", method="rtn"))
    assert "the checkpoint has a head of its own, which is used" in caplog.text
    original = make_model("llama")
    shipped, _, quantized = quantized_model.load_quantized(tmp_path / "run" / "quantized", torch.float32)
    assert shipped.config.tie_word_embeddings is False
    assert {"lm_head", "model.embed_tokens"} <= quantized.keys()
    for ours, theirs in (
        (shipped.lm_head, original.lm_head),
        (shipped.model.embed_tokens, original.model.embed_tokens),
    ):
        assert (ours.weight - theirs.weight).abs().max() < 0.01
