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
from transformers import AutoModelForCausalLM

from nybble.cli.main import main
from nybble.errors import ExportError, MissingExtraError, OptionError
from nybble.export import base
from nybble.export.base import EXPORTERS, Exporter, ExportResult
from nybble.models import quantized_file
from nybble.models.selection import LayerSelection
from nybble.quant.grid import quantize
from nybble.quant.scheme import INT8_PER_ROW, QuantScheme
from nybble.quant.weight import QuantizedWeight
from tests.helpers.tiny import make_config, save_model

SELECTION = LayerSelection(("model.layers.0.mlp.up_proj",), ("model.embed_tokens",), tied=True)


class ToyExporter(Exporter):
    """One safetensors file with dequantized weights, from which the codes are computed again."""

    name = "toy"
    label = "Toy"
    model_file = "toy.safetensors"
    tested_families = frozenset({"llama"})

    def check(self, config: Any, selection: LayerSelection, scheme: QuantScheme) -> None:
        if config.model_type == "gemma2":
            raise ExportError("the toy format cannot hold gemma2")

    def export(
        self, model: Any, tokenizer: Any, quantized: Mapping[str, QuantizedWeight], folder: Path
    ) -> ExportResult:
        tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        for name, weight in quantized.items():
            tensors[f"{name}.weight"] = weight.dequantize()
            tensors[f"{name}.weight.scale"] = weight.scale_OG.contiguous()
            tensors[f"{name}.weight.zero_point"] = weight.zero_point_OG.contiguous()
        save_file(tensors, folder / self.model_file)
        tokenizer.save_pretrained(folder)
        model.config.save_pretrained(folder)
        base.check_read_back(quantized, self.read_weights(folder), folder)
        ids = torch.arange(8).view(1, 8)
        with torch.no_grad():
            exported = self.open_model(folder, model.config, strict=True)(ids).logits
            difference = float((exported - model(ids).logits).abs().max())
        bits = [weight.scheme.bits for weight in quantized.values()]
        return ExportResult(bits.count(4), bits.count(8), (folder / self.model_file).stat().st_size, difference)

    def open_model(self, folder: Path, config: Any, strict: bool = False) -> Any:
        model = AutoModelForCausalLM.from_config(config)
        model.load_state_dict(load_file(folder / self.model_file), strict=False)
        return model.eval()

    def read_weights(self, folder: Path) -> dict[str, QuantizedWeight]:
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
    assert (export["int4_weights"], export["int8_weights"]) == (7, 1)
    assert export["bytes"] == (run / "toy" / "toy.safetensors").stat().st_size
    assert export["logit_difference"] == 0
    rows = results["models"]
    assert rows["toy"]["token_perplexity"] == pytest.approx(rows["compressed"]["token_perplexity"], rel=1e-5)
    written, _ = quantized_file.load_weights(run / "quantized")
    base.check_read_back(written, toy.read_weights(run / "toy"), run / "toy")
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
    with pytest.raises(OptionError, match=r"--to must name a known export format \(openvino, toy\); got tflite"):
        base.check_formats(["toy", "tflite"], "--to")


def test_a_format_whose_modules_are_missing_is_refused(toy: ToyExporter, monkeypatch: pytest.MonkeyPatch) -> None:
    base.check_formats(["toy"], "--export")
    monkeypatch.setattr(ToyExporter, "modules", ("json", "no_such_module"))
    monkeypatch.setattr(ToyExporter, "extra", "toys")
    with pytest.raises(MissingExtraError, match='the extra "toys" is needed for exporting to toy'):
        base.check_formats(["toy"], "--export")


def test_a_family_without_tests_causes_a_warning(toy: ToyExporter, caplog: pytest.LogCaptureFixture) -> None:
    base.check_exportable(["toy"], make_config("llama"), SELECTION, QuantScheme())
    assert caplog.text == ""
    base.check_exportable(["toy"], make_config("mistral"), SELECTION, QuantScheme())
    assert "export of mistral models to Toy is not tested" in caplog.text


def test_a_folder_is_recognized_by_its_model_file(toy: ToyExporter, tmp_path: Path) -> None:
    assert base.exporter_of(tmp_path) is None
    (tmp_path / "toy.safetensors").touch()
    assert base.exporter_of(tmp_path) is toy
    assert base.exporter_of(tmp_path / "toy.safetensors") is None


WEIGHT = QuantizedWeight(torch.ones(2, 4).byte(), torch.ones(2, 1), torch.ones(2, 1).byte(), QuantScheme(group_size=4))


@pytest.mark.parametrize(
    ("read", "message"),
    [
        ({}, "e must hold 1 quantized weights; 0 were read back"),
        ({"b": WEIGHT}, "e must hold 1 quantized weights; 1 were read back"),
        ({"a": replace(WEIGHT, codes_OI=WEIGHT.codes_OI + 1)}, "the codes of a read back differently"),
        ({"a": replace(WEIGHT, scale_OG=WEIGHT.scale_OG * 2)}, "the scales of a read back differently"),
        ({"a": replace(WEIGHT, zero_point_OG=WEIGHT.zero_point_OG * 2)}, "the zero points of a read back differently"),
    ],
)
def test_any_difference_of_what_was_read_back_is_an_error(read: dict[str, QuantizedWeight], message: str) -> None:
    base.check_read_back({"a": WEIGHT}, {"a": replace(WEIGHT)}, Path("e"))
    with pytest.raises(ExportError, match=message):
        base.check_read_back({"a": WEIGHT}, read, Path("e"))


def test_importing_the_package_imports_no_runtime() -> None:
    package = Path(base.__file__).parent
    for file in (package / "__init__.py", package / "base.py", *package.glob("*/exporter.py")):
        for node in ast.parse(file.read_text()).body:
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not {"openvino", "openvino_tokenizers", "transformers"} & {n.split(".")[0] for n in names}, file
