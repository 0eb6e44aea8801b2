"""compress and inspect from options to the run folder: results, export, interruption; and what starts from a run."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import BioGptConfig, BioGptForCausalLM

from nybble.callbacks import Callback
from nybble.cli.main import main
from nybble.compression import awq, blockwise, methods
from nybble.export.base import EXPORTERS
from nybble.models import quantized_file, quantized_model
from nybble.options.commands import CompressOptions
from nybble.run.results import read_results
from nybble.run.resume import saved_options
from nybble.workflows.compress import compress
from nybble.workflows.distill import distill
from tests.helpers.compress import FLAGS, compress_command
from tests.helpers.copies import copy_run
from tests.helpers.distill import distill_options, interrupt_after, shipped_bytes
from tests.helpers.tiny import make_model, make_tokenizer, save_model


def command(name: str, model: Path, run: Path, *more: str) -> list[str]:
    return [name, "--pretrained", str(model), "--output_dir", str(run), *FLAGS, *more]


def options(model: Path, run: Path, **changes: object) -> CompressOptions:
    base: dict[str, object] = {
        "pretrained": str(model), "output_dir": str(run), "method": "awq+se+gptq+blockwise", "data": ("python-docs",),
        "seq_len": 32, "num_calibration_samples": 16, "group_size": 32, "num_test_samples": 4, "eval_tasks": (),
        "export": (),
    }  # fmt: skip
    return CompressOptions.of(**base | changes)


def codes(run: Path) -> dict[str, torch.Tensor]:
    return {name: weight.codes_OI for name, weight in quantized_file.load_weights(run / "quantized")[0].items()}


@pytest.mark.usefixtures("needs_openvino")
def test_compress_measures_exports_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, run = save_model(tmp_path / "model", "qwen2"), tmp_path / "run"
    assert main(command("compress", model, run, "--method", "awq+se+gptq", "--export", "openvino")) == 0
    printed = capsys.readouterr().out
    results = read_results(run)
    assert results.models.keys() == {"16bit", "compressed", "openvino"}
    kl = {row: metrics["kl_to_teacher"] for row, metrics in results.models.items()}
    assert kl["openvino"] == pytest.approx(kl["compressed"], rel=3e-2), "its activations have 8 bits"
    assert (results.command, results.method, results.finished) == ("compress", "awq+se+gptq", True)
    assert set(results.seconds) == {"load", "teacher", "measure", "compress", "export openvino"}
    errors = results.layer_errors
    assert len(errors) == 14
    assert all(error["compressed"] < error["rtn"] for error in errors.values())  # type: ignore[operator]
    assert all(0 <= error["clipped"] < 0.2 for error in errors.values())  # type: ignore[operator]
    assert "calibration: 16 x 32 tokens of the training text" in printed
    assert "mean output error of a layer" in printed
    assert "INT4, compressed (OpenVINO)" in printed
    assert "recovered" not in printed
    assert not (run / "compress").exists(), "the finished blocks are deleted when the 4-bit model is saved"
    assert "| model.layers.1.mlp.down_proj |" in (run / "report.md").read_text()

    for target in (run, run / "quantized", run / "openvino"):
        assert main(["inspect", str(target)]) == 0
        table = capsys.readouterr().out
        assert "15 quantized layers" in table, "the head is tied"
        assert "; their names begin with model." in table
        row = next(line for line in table.splitlines() if line.startswith("layers.0.mlp.down_proj "))
        error = errors["model.layers.0.mlp.down_proj"]
        cells = row.split()
        assert len(row) <= 80
        assert cells[1:3] == ["64x128", "4g32"]
        assert cells[3:7] == [
            f"{error['rtn']:.3%}", f"{error['compressed']:.3%}", f"{error['weight']:.2%}", f"{error['clipped']:.3%}",
        ]  # fmt: skip
        assert "14 x uint4 asymmetric group 32 (4g32)" in table
        assert "1 x uint8 symmetric per row (8rs)" in table


@pytest.mark.parametrize(("is_chain", "expected"), [(True, "awq+se+gptq"), (False, "rtn")])
def test_the_default_method_is_chosen_for_the_model(
    is_chain: bool, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The run notes what was chosen, and goes on with it."""
    model = save_model(tmp_path / "model", "llama")
    monkeypatch.setattr(methods, "_is_chain", lambda model, names: is_chain)
    given = {"pretrained": str(model), "data": ("python-docs",), "seq_len": 32, "num_calibration_samples": 16}
    chosen = CompressOptions.of(**given, group_size=32, num_test_samples=4, eval_tasks=(), export=())
    monkeypatch.chdir(tmp_path)
    with caplog.at_level("INFO", "nybble"):
        run = compress(chosen)
    assert run == Path("runs/model-compress")
    assert saved_options(run)["method"] == read_results(run).method == expected
    assert ("calibration: 16 x 32 tokens" in caplog.text) == is_chain
    shipped = shipped_bytes(run)
    monkeypatch.setattr(methods, "_is_chain", lambda model, names: not is_chain)
    assert compress(chosen.replace(resume=True)) == run
    assert shipped_bytes(run) == shipped
    assert saved_options(run)["method"] == expected
    config = run / "config.toml"
    config.write_text(config.read_text().replace(f'method = "{expected}"', 'method = "auto"'))
    assert compress(chosen.replace(resume=True)) == run, "as versions before noted it"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and a run that compressed it by rounding, for tests that change none of them."""
    folder = tmp_path_factory.mktemp("finished")
    compress(options(save_model(folder / "model", "llama"), folder / "run", method="rtn"))
    return folder


def test_inspect_refuses_what_is_no_quantized_model(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_run(finished, tmp_path)
    model, run = tmp_path / "model", tmp_path / "run"

    def refused(*given: str) -> str:
        capsys.readouterr()
        assert main([*given]) == 2
        return " ".join(capsys.readouterr().err.split())

    words = "must be a finished run, or a folder quantized or an export inside one; it is neither"
    assert words in refused("inspect", str(tmp_path))
    (run / "openvino").mkdir()
    (run / "openvino" / "openvino_model.xml").write_text("<net/>")
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)
        assert 'pip install -c constraints.txt -e ".[openvino]"' in refused("inspect", str(run / "openvino"))
    save_file({"a": torch.zeros(1 << 20)}, run / "quantized" / quantized_file.WEIGHTS_FILE)
    words = "must be a 4-bit model that nybble wrote (nybble-2); it is something else"
    assert words in refused("inspect", str(run))
    (run / "quantized" / quantized_file.WEIGHTS_FILE).write_bytes(b"cut")
    words = "quantized must have the files that it was written with; weights.safetensors is missing or cut"
    assert words in refused(*command("distill", model, tmp_path / "third", "--init_from", str(run)))


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("rtn", "the logits of llama must be finite numbers"),
        ("se", "the outputs of block 1 (mlp.down_proj) must be finite"),
    ],
)
def test_a_broken_model_is_refused_before_there_is_a_run(
    method: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(3e38)  # finite, and its products are not
    model.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    assert main(command("compress", tmp_path / "model", tmp_path / "run", "--method", method)) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_options_of_steps_that_the_method_has_not_are_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = save_model(tmp_path / "model", "llama")
    with caplog.at_level("WARNING", "nybble"):
        compress(
            options(
                model, tmp_path / "run", method="se", num_calibration_samples=8, gptq_damping=0.5, blockwise_epochs=9.0
            )
        )
        compress(options(model, tmp_path / "other", method="rtn", limit_blocks=1))
    assert "--gptq_damping has no effect: the method has no step gptq" in caplog.text
    assert "--blockwise_epochs has no effect: the method has no step blockwise" in caplog.text
    assert "--gptq_act_order" not in caplog.text
    assert "--limit_blocks has no effect: nothing is calibrated" in caplog.text


class Killed(Exception):
    pass


@pytest.mark.parametrize("block", [pytest.param(0, marks=pytest.mark.slow), 1])
@pytest.mark.slow
def test_interrupted_in_any_block_it_ends_with_the_same_bits(
    block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, run = save_model(tmp_path / "model", "gemma2", begin=True), tmp_path / "run"
    compress(options(model, tmp_path / "undisturbed"))
    original, trained = blockwise.train, list[int]()

    def killed(blocks, i, *rest):  # type: ignore[no-untyped-def]
        if i == block:
            raise Killed
        return original(blocks, i, *rest)

    def counted(blocks, i, *rest):  # type: ignore[no-untyped-def]
        trained.append(i)
        return original(blocks, i, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(blockwise, "train", killed)
        with pytest.raises(Killed):
            compress(options(model, run))
    assert len(list((run / "compress").glob("*.safetensors")) if block else []) == block
    with monkeypatch.context() as patch:
        patch.setattr(blockwise, "train", counted)
        compress(options(model, run, resume=True))
    assert trained == list(range(block, 2)), "finished blocks are not trained again"
    assert shipped_bytes(run) == shipped_bytes(tmp_path / "undisturbed")
    before, after = read_results(tmp_path / "undisturbed"), read_results(run)
    assert before.layer_errors == after.layer_errors
    assert before.block_losses == after.block_losses
    assert before.models == after.models


@pytest.mark.slow
def test_distillation_starts_from_the_codes_of_the_compression(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", "llama")
    shared = {"method": "awq+se+gptq+blockwise", "num_calibration_samples": 8, "group_size": 32}
    still = {"lr": 1e-12, "scale_lr": 0.0, "norm_lr": 0.0}
    distill(distill_options(model, tmp_path / "untrained", **still, **shared))
    compress(options(model, tmp_path / "compressed", seed=0, **shared))
    distill(distill_options(model, tmp_path / "plain", group_size=32, **still))
    untrained, compressed, plain = (read_results(tmp_path / name) for name in ("untrained", "compressed", "plain"))
    assert untrained.changes is not None
    assert untrained.changes.codes_changed == 0
    assert untrained.layer_errors.keys() == compressed.layer_errors.keys()
    kl = {row: metrics["kl_to_teacher"] for row, metrics in untrained.models.items()}
    assert kl["tuned"] == pytest.approx(kl["compressed"], rel=1e-5)
    for name, expected in codes(tmp_path / "compressed").items():
        assert torch.equal(codes(tmp_path / "untrained")[name], expected), "the same seed draws the same text"
    assert kl["compressed"] < plain.models["compressed"]["kl_to_teacher"]


def test_a_folder_named_like_a_method_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    compress(options(save_model(tmp_path / "model", "llama"), Path("se"), method="se", num_calibration_samples=8))
    assert read_results(Path("se")).method == "se"


@pytest.mark.parametrize(
    ("known", "rank", "expected"),
    [
        (True, 0, "awq+se+blockwise"),
        pytest.param(False, 0, "se+blockwise", marks=pytest.mark.slow),
        pytest.param(True, 4, "awq+se+gptq", marks=pytest.mark.slow),
        pytest.param(False, 4, "se+gptq", marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
def test_the_automatic_method_needs_no_facts_about_the_family(
    known: bool, rank: int, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, run = save_model(tmp_path / "model", "llama"), tmp_path / "run"
    if not known:
        monkeypatch.setattr(methods, "has_mapping", lambda model, names: False)
    settings = {"method": "auto", "num_calibration_samples": 8, "group_size": 32, "lora_rank": rank}
    distill(distill_options(model, run, **settings))
    assert saved_options(run)["method"] == read_results(run).method == expected
    assert len(read_results(run).block_losses) == (0 if rank else 2)
    distill(distill_options(model, run, resume=True, **settings))


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_distillation_continues_from_a_finished_run(dtype: str, tmp_path: Path) -> None:
    """Codes, scales, zero points and folded norms are those of the run; the teacher is the 16-bit model."""
    model, first, second = save_model(tmp_path / "model", "qwen2"), tmp_path / "first", tmp_path / "second"
    compress(options(model, first, method="awq+se", dtype=dtype))
    still = {"lora_rank": 0, "scale_lr": 0.0, "norm_lr": 1e-9}
    distill(distill_options(model, second, init_from=str(first), group_size=32, dtype=dtype, **still))
    made, continued = read_results(first), read_results(second)
    kl = [results.models["compressed"]["kl_to_teacher"] for results in (made, continued)]
    assert kl[1] == pytest.approx(kl[0], rel=1e-5)
    assert (continued.method, continued.init_from) == ("awq+se", str(first))
    assert continued.layer_errors == made.layer_errors
    assert continued.changes is not None
    assert continued.changes.codes_changed == 0.0
    (before, rest), (after, others) = (quantized_file.load_weights(run / "quantized") for run in (first, second))
    for name, weight in before.items():
        assert torch.equal(after[name].codes_OI, weight.codes_OI)
        assert torch.equal(after[name].scale_OG, weight.scale_OG)
        assert torch.equal(after[name].zero_point_OG, weight.zero_point_OG)
    assert all(torch.allclose(others[key], tensor, rtol=1e-2) for key, tensor in rest.items())


def test_a_run_that_does_not_fit_is_refused_before_there_is_a_run(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy_run(finished, tmp_path)
    model, first, run = tmp_path / "model", tmp_path / "run", tmp_path / "other-run"
    other = save_model(tmp_path / "other", "llama", num_hidden_layers=1)
    biased = save_model(tmp_path / "biased", "llama", attention_bias=True)

    def refused(model: Path, *more: str) -> str:
        assert main(command("distill", model, run, "--num_train_samples", "8", "--batch_size", "4", *more)) == 2
        assert not run.exists()
        return " ".join(capsys.readouterr().err.split())

    begin = ("--init_from", str(first))
    found = refused(model, *begin, "--group_size", "64")
    assert (
        f"--init_from {first} must have the schemes of this run; model.layers.0.self_attn.q_proj has uint4 asym"
        in found
    )
    assert "group 32, and this run has uint4 asymmetric group 64; add --bits 4 --group_size 32" in found
    assert "must be of a model like other; it is of model, which has other quantized layers" in refused(other, *begin)
    words = "must be of a model like biased; only one of it and model has model.layers.0.self_attn.k_proj.bias"
    assert words in refused(biased, *begin)
    shutil.rmtree(first / "quantized")
    assert f"--init_from {first} must be a finished run; it has no 4-bit model" in refused(model, *begin)
    assert "--init_from runs/none must be the folder of a finished run" in refused(model, "--init_from", "runs/none")
    assert "--method must be auto, rtn, or one or more of awq, se" in refused(model, "--method", "runs/none")


@pytest.mark.slow
def test_distillation_resumes_on_the_finished_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_model(tmp_path / "model", "llama")
    shared = {"method": "awq+se+blockwise", "num_calibration_samples": 8, "group_size": 32}
    distill(distill_options(model, tmp_path / "undisturbed", **shared))
    with monkeypatch.context() as patch:
        interrupt_after(2, patch)
        with pytest.raises(KeyboardInterrupt):
            distill(distill_options(model, tmp_path / "run", **shared))
    trained: list[object] = []
    monkeypatch.setattr(blockwise, "train", lambda *arguments: trained.append(arguments))
    distill(distill_options(model, tmp_path / "run", resume=True, **shared))
    assert trained == []
    assert shipped_bytes(tmp_path / "run") == shipped_bytes(tmp_path / "undisturbed")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--seq_len 60000", "the calibration text must give at least 8 sequences of 60000 tokens; it gives"),
        (
            "--dtype float16 --method blockwise",
            "--dtype must be bfloat16 or float32 for blockwise; float16 gradients vanish",
        ),
        (
            "--group_size 48 --strict_group_size",
            "in_features must be a multiple of group_size: layer model.layers.0.self_attn.q_proj has in_features=64, "
            "got group_size=48",
        ),
    ],
)
def test_bad_input_leaves_nothing_behind(
    flags: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, run = save_model(tmp_path / "model", "llama"), tmp_path / "run"
    assert main(command("compress", model, run, "--method", "se", *flags.split())) == 2
    assert words in " ".join(capsys.readouterr().err.split())
    assert not run.exists()


def test_awq_is_refused_before_there_is_a_run_where_it_can_fold_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, run = save_model(tmp_path / "model", "llama"), tmp_path / "run"
    monkeypatch.setattr(awq, "has_mapping", lambda model, names: False)
    assert main(command("compress", model, run, "--method", "awq+se")) == 2
    assert "whose outputs it can rescale; llama has none" in " ".join(capsys.readouterr().err.split())
    assert not run.exists()
    assert main(command("compress", model, run, "--method", "se")) == 0


def test_less_calibration_text_than_wanted_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_model(tmp_path / "model", "llama")
    (tmp_path / "text.txt").write_text("".join(f"line {i} of a short text\n" for i in range(400)))
    flags = ("--data", str(tmp_path / "text.txt"), "--seq_len", "64", "--num_calibration_samples", "128")
    assert main(command("compress", model, tmp_path / "run", "--method", "se", *flags)) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "tokens of the training text (all there is; --num_calibration_samples is 128)" in printed


def test_rtn_needs_no_calibration_text(finished: Path, tmp_path: Path) -> None:
    copy_run(finished, tmp_path)
    errors = read_results(tmp_path / "run").layer_errors.values()
    assert all(error["rtn"] is None and error["weight"] for error in errors)
    shutil.rmtree(tmp_path / "run" / "quantized")
    assert main(["inspect", str(tmp_path / "run")]) == 2


@pytest.mark.slow  # exports
@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("convert_model", "LlamaForCausalLM cannot be traced"),
        pytest.param("convert_tokenizer", "cannot be converted", marks=pytest.mark.slow),  # two exports
    ],
)
def test_an_export_that_fails_is_reported_after_everything_else(
    function: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    openvino, tokenizers = pytest.importorskip("openvino"), pytest.importorskip("openvino_tokenizers")

    module, calls = openvino if function == "convert_model" else tokenizers, []
    original = getattr(module, function)

    def fail(*arguments: object, **options: object) -> object:
        calls.append(1)
        if len(calls) == 1:  # of the twin that is tried beforehand
            return original(*arguments, **options)
        raise TypeError("not this one")

    model, run = save_model(tmp_path / "model", "llama"), tmp_path / "run"
    given = command("compress", model, run, "--method", "rtn", "--export", "openvino")
    with monkeypatch.context() as patch:
        patch.setattr(module, function, fail)
        assert main(given) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert words in last
    assert "TypeError: not this one" in last
    assert "**Warning:** not exported: " in (run / "report.md").read_text()
    assert not (run / "openvino").exists()
    assert main([*given, "--resume"]) == 0
    assert "Warning" not in (run / "report.md").read_text()
    assert (run / "openvino").is_dir()


def test_callbacks_are_told_of_the_layers(tmp_path: Path) -> None:
    events = []

    class Recorder(Callback):
        def on_stage_start(self, stage: str, total: int) -> None:
            events.append((stage, "start", total))

        def on_step(self, stage: str, step: int, total: int, metrics: Mapping[str, float]) -> None:
            events.append((stage, step, total))

        def on_stage_end(self, stage: str, seconds: float) -> None:
            events.append((stage, "end", 14))

    compress(options(save_model(tmp_path / "model", "smollm"), tmp_path / "run", method="se"), [Recorder()])
    assert events[0] == ("compress", "start", 14)
    assert events[1:-1] == [("compress", i, 14) for i in range(1, 15)]
    assert events[-1] == ("compress", "end", 14)


def test_a_tied_head_may_have_any_name(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    torch.manual_seed(0)
    config = BioGptConfig(
        vocab_size=260, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64,
    )  # fmt: skip
    BioGptForCausalLM(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    compress(options(folder, tmp_path / "run", method="rtn"))
    loaded = quantized_model.load_quantized(tmp_path / "run" / "quantized", torch.float32)[0]
    assert loaded.output_projection.weight is loaded.get_input_embeddings().weight


def test_layers_whose_weights_are_read_past_them_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(self: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        gated = self.act_fn(self.gate_proj(x)) * self.up_proj(x)  # type: ignore[operator]
        return torch.nn.functional.linear(gated, self.get_submodule("down_proj").get_parameter("weight"))

    folder = save_model(tmp_path / "model", "llama")
    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaMLP.forward", forward)
    rounded = command("compress", folder, tmp_path / "run", "--method", "rtn")
    assert main(rounded) == 2
    words = (
        "uses the weight of model.layers.0.mlp.down_proj without calling the layer (2 such layers); leave them in 16 "
        'bits with --ignore "*.down_proj"'
    )
    assert words in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()
    assert main([*rounded, "--ignore", "*.down_proj"]) == 0


def test_code_that_came_with_a_model_goes_along(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "llama")
    config = json.loads((folder / "config.json").read_text())
    own = {"AutoConfig": "configuration_mine.Config", "AutoModelForCausalLM": "modeling_mine.Model"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "mine", "auto_map": own}))
    (folder / "configuration_mine.py").write_text(
        "from transformers import LlamaConfig\n\nclass Config(LlamaConfig):\n    model_type = 'mine'\n"
    )
    (folder / "modeling_mine.py").write_text(
        "from transformers import LlamaForCausalLM\nfrom .configuration_mine import Config\n\n"
        "class Model(LlamaForCausalLM):\n    config_class = Config\n"
    )
    compress(options(folder, tmp_path / "run", method="rtn", trust_remote_code=True))
    loaded = quantized_model.load_quantized(tmp_path / "run" / "quantized", torch.float32, trust_remote_code=True)[0]
    assert type(loaded).__name__ == "Model"


def test_code_in_a_run_of_someone_else_runs_only_where_it_is_allowed(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder asks for it in its config.toml and brings code in quantized/; nobody at the keyboard allowed it."""
    run = copy_run(finished, tmp_path) / "run"
    with (run / "config.toml").open("a") as file:
        file.write("trust_remote_code = true\n")
    config = json.loads((run / "quantized" / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}}
    (run / "quantized" / "config.json").write_text(json.dumps(config))
    (run / "quantized" / "mine.py").write_text("raise SystemExit('foreign code ran')")
    for given in (["export", str(run)], ["eval", str(run), "--data", "python-docs"]):
        assert main(given) == 2
        words = (
            f"{run / 'quantized'} needs Python code that comes with the model; if you trust it, add --trust_remote_code"
        )
        assert words in capsys.readouterr().err
    with pytest.raises(SystemExit, match="foreign code ran"):
        main(["export", str(run), "--trust_remote_code"])


def test_a_head_of_its_own_ships_whatever_the_configuration_says(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """config.json says tied embeddings, the checkpoint has a trained head (a merged LoRA with modules_to_save)."""
    folder = save_model(tmp_path / "model", "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    with caplog.at_level("WARNING", "nybble"):
        compress(options(folder, tmp_path / "run", method="rtn"))
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


def test_text_of_another_domain_is_measured_on_every_model(tmp_path: Path) -> None:
    model, text = save_model(tmp_path / "model", "llama"), tmp_path / "other.txt"
    text.write_text("".join(f"line {i} of another text\n" for i in range(400)))
    command = compress_command(model, tmp_path / "run", "--other_data", str(text), "--dtype", "float32")
    assert main(command) == 0
    results = read_results(tmp_path / "run")
    assert results.other_data.startswith(f"{text} (")
    full, compressed = (results.models[row] for row in ("16bit", "compressed"))
    assert full["other_kl_to_teacher"] == pytest.approx(0, abs=1e-6)
    assert compressed["other_kl_to_teacher"] > 0
    assert compressed["other_kl_to_teacher"] != compressed["kl_to_teacher"]
    assert full["other_token_perplexity"] != compressed["other_token_perplexity"]
    report = (tmp_path / "run" / "report.md").read_text()
    assert f"| {compressed['other_token_perplexity']:.3f} | {compressed['other_kl_to_teacher']:.4f} |" in report
    assert "Another domain: " in report


def test_logits_of_a_large_export_are_compared_on_request(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EXPORTERS["hf"], "most_parameters_compared", 0)
    run = copy_run(finished, tmp_path) / "run"
    for words, difference in (([], None), (["--compare_logits"], 0.0)):
        assert main(["export", str(run), "--to", "hf", *words]) == 0
        assert read_results(run).exports["hf"]["logit_difference"] == difference
