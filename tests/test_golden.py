"""The bytes of the formats do not change unnoticed: tests/golden holds what version nybble-2 writes for a given model.

    python -m tests.test_golden

writes the folder again, after a change of the format that is meant (its name and docs/reference/formats.md change too).
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nybble.compression.init import QuantizedInit
from nybble.export.base import EXPORTERS
from nybble.models import quantized_file, quantized_model
from nybble.models.checkpoint import open_checkpoint
from nybble.models.loading import LoadedModel
from nybble.models.selection import select_layers
from nybble.qat.insert import quantize_embeddings
from nybble.quant.grid import min_max_qparams
from nybble.quant.scheme import INT8_PER_ROW, QuantScheme
from nybble.quant.weight import QuantizedWeight
from tests.helpers.tiny import make_model, make_tokenizer

GOLDEN = Path(__file__).parent / "golden"
SCHEME = QuantScheme(group_size=32)


def integer_model() -> Any:
    """Weights are small integers divided by 1024: the same in every version of torch, on every machine."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = make_model("smollm", num_hidden_layers=1, **sizes)
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            numbers = torch.arange(parameter.numel(), dtype=torch.int64).view(parameter.shape)
            parameter.copy_(((numbers * (2 * i + 7919) + 104729 * i) % 257 - 128) / 1024)
    return model


def quantized(model: Any) -> dict[str, QuantizedWeight]:
    """Round-to-nearest in every 4-bit layer, 8 bits per row in the embedding."""
    selection = select_layers(model)
    weights = quantize_embeddings(model, dict.fromkeys(selection.embeddings, INT8_PER_ROW))
    for name in selection.linears:
        weight_OI = model.get_submodule(name).weight.detach()
        weights[name] = QuantizedInit(weight_OI, *min_max_qparams(weight_OI, SCHEME)).quantized(SCHEME)
    return weights


def write(folder: Path) -> None:
    model = integer_model()
    quantized_model.save_quantized(folder, LoadedModel(model, make_tokenizer(), "tiny"), quantized(model))


def test_the_weights_file_is_the_golden_one(tmp_path: Path) -> None:
    write(tmp_path / "quantized")
    name = quantized_file.WEIGHTS_FILE
    assert (tmp_path / "quantized" / name).read_bytes() == (GOLDEN / name).read_bytes()


def test_the_golden_file_is_read_as_documented(tmp_path: Path) -> None:
    """docs/reference/formats.md in plain arithmetic, in float64."""
    write(tmp_path / "quantized")
    shutil.copy(GOLDEN / quantized_file.WEIGHTS_FILE, tmp_path / "quantized")
    model = quantized_model.load_quantized(tmp_path / "quantized", torch.float32).model
    tensors = load_file(GOLDEN / quantized_file.WEIGHTS_FILE)
    for key in [key for key in tensors if key.endswith(".codes")]:
        name = key.removesuffix(".weight.codes")
        scale = tensors[f"{name}.weight.scale"].tolist()
        zero_point = tensors[f"{name}.weight.zero_point"].tolist()
        rows = [
            [code for byte in row for code in ((byte & 15, byte >> 4) if "layers" in name else (byte,))]
            for row in tensors[key].tolist()
        ]
        expected = [
            [scale[o][i * len(scale[o]) // len(row)] * (code - zero_point[o][i * len(scale[o]) // len(row)])
             for i, code in enumerate(row)]
            for o, row in enumerate(rows)
        ]  # fmt: skip
        assert torch.equal(model.get_submodule(name).weight.double(), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.usefixtures("needs_openvino")
def test_openvino_constants_are_the_golden_codes(tmp_path: Path) -> None:
    write(tmp_path / "quantized")
    exporter = EXPORTERS["openvino"]
    (tmp_path / "openvino").mkdir()
    exporter.export(open_checkpoint(tmp_path / "quantized"), tmp_path / "openvino")
    read, golden = exporter.read_codes(tmp_path / "openvino"), quantized_file.load_weights(GOLDEN)[0]
    assert read.keys() == golden.keys()
    for name, weight in golden.items():
        assert torch.equal(read[name].codes_OI, weight.codes_OI)
        assert torch.equal(read[name].scale_OG, weight.scale_OG)
        assert torch.equal(read[name].zero_point_OG, weight.zero_point_OG)


def test_the_golden_folder_is_small_and_says_its_format() -> None:
    size = (GOLDEN / quantized_file.WEIGHTS_FILE).stat().st_size
    assert size < 40_000
    header = (GOLDEN / quantized_file.WEIGHTS_FILE).read_bytes()[8:]
    length = int.from_bytes((GOLDEN / quantized_file.WEIGHTS_FILE).read_bytes()[:8], "little")
    note = json.loads(json.loads(header[:length])["__metadata__"]["note"])
    assert note["format"] == quantized_file.WEIGHTS_FORMAT


if __name__ == "__main__":
    write(GOLDEN / "quantized")
    shutil.move(GOLDEN / "quantized" / quantized_file.WEIGHTS_FILE, GOLDEN / quantized_file.WEIGHTS_FILE)
    shutil.rmtree(GOLDEN / "quantized")
