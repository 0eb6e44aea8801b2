"""The contract of exporters, the registry, and an exporter that is registered from outside the package."""

import ast
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from nybble.cli.main import main
from nybble.errors import ExportError, MissingExtraError, OptionError
from nybble.export import checks
from nybble.export.base import EXPORTERS, Exporter
from nybble.export.read_back import runtime_errors
from nybble.models import quantized_file
from nybble.models.checkpoint import QuantizedCheckpoint
from nybble.models.selection import LayerSelection
from nybble.quant.grid import quantize
from nybble.quant.scheme import INT8_PER_ROW, QuantScheme
from nybble.quant.weight import QuantizedWeight
from nybble.workflows.target import open_exported
from tests.helpers.checkpoints import make_checkpoint, save_checkpoint
from tests.helpers.tiny import make_config, make_model, save_model

SELECTION = LayerSelection(("model.layers.0.mlp.up_proj",), ("model.embed_tokens",), tied=True)


class ToyExporter(Exporter):
    """One safetensors file with dequantized weights, from which the codes are computed again."""

    name = "toy"
    label = "Toy"
    model_file = "toy.safetensors"
    weight_files = ("toy.safetensors",)
    tested_families = frozenset({"llama"})

    def check(self, config: Any, selection: LayerSelection) -> None:
        if config.model_type == "gemma2":
            raise ExportError("the toy format cannot hold gemma2")

    def write(self, checkpoint: QuantizedCheckpoint, folder: Path) -> None:
        tensors = dict(checkpoint.others)
        for name, weight in checkpoint.quantized.items():
            tensors[f"{name}.weight"] = weight.dequantize()
            tensors[f"{name}.weight.scale"] = weight.scale_OG.contiguous()
            tensors[f"{name}.weight.zero_point"] = weight.zero_point_OG.contiguous()
        save_file(tensors, folder / self.model_file)

    def open_model(self, folder: Path, config: Any, strict: bool = False) -> Any:
        model = AutoModelForCausalLM.from_config(config)
        model.load_state_dict(load_file(folder / self.model_file), strict=False)
        return model.eval()

    def read_codes(self, folder: Path) -> dict[str, QuantizedWeight]:
        tensors, weights = load_file(folder / self.model_file), {}
        for key in [key for key in tensors if key.endswith(".scale")]:
            name = key.removesuffix(".weight.scale")
            weight_OI, scale_OG = tensors[f"{name}.weight"], tensors[key]
            zero_point_OG = tensors[f"{name}.weight.zero_point"]
            groups = scale_OG.shape[1]
            scheme = INT8_PER_ROW if groups == 1 else QuantScheme(group_size=weight_OI.shape[1] // groups)
            codes_OI = quantize(weight_OI, scale_OG, zero_point_OG, scheme)
            weights[name] = QuantizedWeight(codes_OI, scale_OG, zero_point_OG, scheme)
        return weights


FLAGS = [
    "--data", "python-docs", "--seq_len", "32", "--group_size", "32", "--num_test_samples", "2", "--eval_tasks", "none",
]  # fmt: skip


@pytest.fixture
def toy() -> Iterator[ToyExporter]:
    """The toy exporter, registered as another package would do it."""
    exporter = ToyExporter()
    EXPORTERS.register("toy", exporter)
    yield exporter
    EXPORTERS.unregister("toy")


def test_a_run_uses_an_exporter_from_outside_the_package(
    toy: ToyExporter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, run = save_model(tmp_path / "model", "smollm", num_hidden_layers=1), tmp_path / "run"
    command = ["compress", "--pretrained", str(model), "--output_dir", str(run), "--method", "rtn", *FLAGS]
    assert main([*command, "--export", "toy"]) == 0
    results = json.loads((run / "results.json").read_text())
    export = results["exports"]["toy"]
    assert (export["linear_weights"], export["embedding_weights"]) == (7, 1)
    assert export["bytes"] == (run / "toy" / "toy.safetensors").stat().st_size
    assert export["logit_difference"] <= 1e-5  # torch decodes the last tokens one by one
    rows = results["models"]
    assert rows["toy"]["token_perplexity"] == pytest.approx(rows["compressed"]["token_perplexity"], rel=1e-5)
    written, _ = quantized_file.load_weights(run / "quantized")
    assert toy.compare_weights(written, run / "toy") == {}
    capsys.readouterr()
    assert main(["inspect", str(run / "toy")]) == 0
    assert "8 quantized layers" in capsys.readouterr().out


def test_a_run_refuses_what_the_format_cannot_hold_before_it_starts(
    toy: ToyExporter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_model(tmp_path / "model", "gemma2", num_hidden_layers=1)
    command = ["compress", "--pretrained", str(model), "--output_dir", str(tmp_path / "run"), "--method", "rtn"]
    assert main([*command, *FLAGS, "--export", "toy"]) == 2
    assert "the toy format cannot hold gemma2" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_openvino_is_registered() -> None:
    assert EXPORTERS["openvino"].label == "OpenVINO"


def test_an_unknown_format_is_refused(toy: ToyExporter) -> None:
    with pytest.raises(OptionError, match=r"--to must name a known export format \(.*toy, all\); got tflite"):
        checks.check_formats(["toy", "tflite"], "--to")
    for given, meant in {
        "GGUF": "did you mean gguf\\?$",
        "ggfu": "did you mean gguf\\?$",
        "gguf,onnx": r"did you mean gguf onnx\? \(several are separated by spaces\)$",
        "x,gguf": "choose one of these$",
        ",": "choose one of these$",
    }.items():
        with pytest.raises(OptionError, match=rf"\(.*, all\); got {given}; {meant}"):
            checks.check_formats([given], "--to")


def test_a_format_whose_modules_are_missing_is_refused(toy: ToyExporter, monkeypatch: pytest.MonkeyPatch) -> None:
    checks.check_formats(["toy"], "--export")
    monkeypatch.setattr(ToyExporter, "modules", ("json", "no_such_module"))
    monkeypatch.setattr(ToyExporter, "extra", "toys")
    with pytest.raises(MissingExtraError, match='the extra "toys" is needed for exporting to toy'):
        checks.check_formats(["toy"], "--export")
    with pytest.raises(MissingExtraError, match='the extra "toys" is needed for opening run/toy; install it'):
        open_exported(Path("run/toy"), toy, trust_remote_code=False)


def test_a_family_without_tests_causes_a_warning(toy: ToyExporter, caplog: pytest.LogCaptureFixture) -> None:
    checks.check_exportable(["toy"], make_config("llama"), SELECTION, {})
    assert caplog.text == ""
    checks.check_exportable(["toy"], make_config("mistral"), SELECTION, {})
    assert "export of mistral models to Toy is not tested" in caplog.text


def test_a_folder_is_recognized_by_its_model_file(toy: ToyExporter, tmp_path: Path) -> None:
    assert checks.exporter_of(tmp_path) is None
    (tmp_path / "toy.safetensors").touch()
    assert checks.exporter_of(tmp_path) is toy
    assert checks.exporter_of(tmp_path / "toy.safetensors") is None


SCHEME = QuantScheme(group_size=4)
WEIGHT = QuantizedWeight(torch.ones(2, 4).byte(), torch.ones(2, 1), torch.ones(2, 1).byte() * 3, SCHEME)
ROWS = QuantizedWeight(torch.arange(8).byte().view(2, 4), torch.ones(2, 1), torch.ones(2, 1).byte() * 128, INT8_PER_ROW)


class ReadBack(ToyExporter):
    """Gives back codes and numbers that a test has prepared."""

    int8_tolerance = 2**-7

    def __init__(self, codes: dict[str, QuantizedWeight], weights: dict[str, Tensor] | None = None) -> None:
        self.codes, self.weights = codes, weights

    def read_codes(self, folder: Path) -> dict[str, QuantizedWeight]:
        return self.codes

    def read_weights(self, folder: Path) -> Mapping[str, Tensor]:
        return super().read_weights(folder) if self.weights is None else self.weights


@pytest.mark.parametrize(
    ("exporter", "message"),
    [
        (ReadBack({}), "e must hold 1 quantized weights; 0 were read back"),
        (ReadBack({"b": WEIGHT}), "e must hold 1 quantized weights; 1 were read back, and a only on one side"),
        (ReadBack({"a": replace(WEIGHT, codes_OI=WEIGHT.codes_OI + 1)}), "the codes of a read back differently"),
        (ReadBack({"a": replace(WEIGHT, scale_OG=WEIGHT.scale_OG * 2)}), "the scales of a read back differently"),
        (ReadBack({"a": replace(WEIGHT, zero_point_OG=WEIGHT.zero_point_OG * 2)}), "the zero points of a read back"),
        (ReadBack({"a": WEIGHT}, {"a": WEIGHT.dequantize() * (1 + 2**-20)}), "the values of a read back differently"),
        (ReadBack({}, {"a": WEIGHT.dequantize() * (1 + 2**-20)}), "the values of a read back differently"),
        (ReadBack({}, {"a": WEIGHT.dequantize()[:1]}), "the values of a read back differently"),
        (ReadBack({}, {"a": WEIGHT.dequantize() * torch.nan}), "the values of a read back differently"),
    ],
)
def test_any_difference_of_what_was_read_back_is_an_error(exporter: ReadBack, message: str) -> None:
    assert ReadBack({"a": replace(WEIGHT)}).compare_weights({"a": WEIGHT}, Path("e")) == {}
    assert ReadBack({}, {"a": WEIGHT.dequantize()}).compare_weights({"a": WEIGHT}, Path("e")) == {}
    with pytest.raises(ExportError, match=message):
        exporter.compare_weights({"a": WEIGHT}, Path("e"))


def test_an_8_bit_weight_may_be_rounded_within_the_tolerance_of_the_format() -> None:
    """Relative to the largest in the row: 128 here, and 124 in the second."""
    weight_OI = ROWS.dequantize()
    rounded = weight_OI + torch.tensor([[1.0], [0.5]])
    assert ReadBack({}, {"a": rounded}).compare_weights({"a": ROWS}, Path("e")) == {"a": 1.0}
    for wrong in (weight_OI + torch.tensor([[0.0], [1.0]]), weight_OI + 1.1):
        with pytest.raises(ExportError, match="the values of a read back differently"):
            ReadBack({}, {"a": wrong}).compare_weights({"a": ROWS}, Path("e"))


class Broken(ToyExporter):
    """A runtime with an error, relative to its largest logit, in the logits of the newest token."""

    error = 0.0

    def open_model(self, folder: Path, config: Any, strict: bool = False) -> Any:
        assert strict
        model = super().open_model(folder, config)
        original = model.forward

        def forward(*args: Any, **options: Any) -> Any:
            output = original(*args, **options)
            output.logits[..., -1, 7] += self.error * float(output.logits.abs().max())
            return output

        model.forward = forward
        return model


@pytest.mark.parametrize("scale", [1.0, 300.0])
@pytest.mark.parametrize(("error", "accepted"), [(0.0, True), (5e-5, True), (2e-4, False), (torch.nan, False)])
def test_logits_must_be_those_of_torch(error: float, accepted: bool, scale: float, tmp_path: Path) -> None:
    """The error is relative to the largest logit: a head times 300 makes every rounding error 300 times as large."""
    model = make_model("llama", num_hidden_layers=1)
    model.lm_head.weight.mul_(scale)
    checkpoint, exporter = save_checkpoint(tmp_path / "quantized", model), Broken()
    (tmp_path / "toy").mkdir()
    exporter.error = error
    if accepted:
        difference = exporter.export(checkpoint, tmp_path / "toy").logit_difference
        assert difference is not None
        assert error == 0 or 0.1 * scale < difference / error < 100 * scale
    else:
        with pytest.raises(ExportError, match="toy must give the logits of torch within 0.0001 of the largest in floa"):
            exporter.export(checkpoint, tmp_path / "toy")


def test_logits_of_large_models_are_compared_on_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, exporter = make_checkpoint(tmp_path / "quantized", "smollm"), Broken()
    (tmp_path / "toy").mkdir()
    exporter.error = 1.0
    monkeypatch.setattr(Broken, "most_parameters_compared", checkpoint.num_parameters - 1)
    assert exporter.export(checkpoint, tmp_path / "toy").logit_difference is None
    with pytest.raises(ExportError, match="must give the logits of torch"):
        exporter.export(checkpoint, tmp_path / "toy", compare_logits=True)
    monkeypatch.setattr(Broken, "most_parameters_compared", checkpoint.num_parameters)
    with pytest.raises(ExportError, match="must give the logits of torch"):
        exporter.export(checkpoint, tmp_path / "toy")


def test_importing_the_package_imports_no_runtime() -> None:
    package = Path(checks.__file__).parent
    for file in (package / "__init__.py", package / "base.py", *package.glob("*/exporter.py")):
        for node in ast.parse(file.read_text()).body:
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not {"openvino", "openvino_tokenizers", "transformers"} & {n.split(".")[0] for n in names}, file


@pytest.mark.parametrize("raised", [TypeError("no\nargument"), SystemExit(1), KeyError("layer")])
def test_what_a_runtime_raises_is_one_line(raised: BaseException) -> None:
    message = (
        r"the runtime of Toy must be able to compute with the model; it fails \(\w+: .*\); remove toy from --export"
    )
    with pytest.raises(ExportError, match=message) as error, runtime_errors("Toy", "toy"):
        raise raised
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("raised", [ExportError("a"), OSError("b"), AssertionError("c"), KeyboardInterrupt()])
def test_other_errors_stay(raised: BaseException) -> None:
    with pytest.raises(type(raised)) as error, runtime_errors("Toy", "toy"):
        raise raised
    assert error.value is raised
