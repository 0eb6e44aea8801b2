"""One model, all formats: the weights that each runtime reads are equal to the last bit."""

from pathlib import Path

import pytest
import torch

from nybble.export.base import EXPORTERS, Exporter
from nybble.models.checkpoint import QuantizedCheckpoint
from tests.helpers import mixtures
from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.exports import slow_values
from tests.helpers.tiny import FAMILIES, make_config

BUILT_IN = ("openvino", "gguf", "onnx", "vllm", "mlx", "hf")
# In float16, which has 11 significant bits; an 8-bit code times its scale has up to 15.
ROUNDS_8_BITS = {"vllm", "hf"}


def written(exporter: Exporter, checkpoint: QuantizedCheckpoint, folder: Path) -> Path:
    """Export without the comparisons that every export makes; the folder."""
    folder.mkdir()
    checkpoint.config.save_pretrained(folder)
    checkpoint.tokenizer.save_pretrained(folder)
    exporter.write(checkpoint, folder)
    return folder


def check_all_formats(family: str, path: Path) -> None:
    """Export a random model and read it back with every runtime's own reader; the values by a slow loop."""
    changes = {}
    if family == "phi3":  # llama.cpp makes no contexts below 256 tokens
        longer = make_config(family).rope_parameters | {"original_max_position_embeddings": 256}
        changes = {"rope_parameters": longer, "original_max_position_embeddings": 256, "max_position_embeddings": 1024}
    checkpoint = make_checkpoint(path / "quantized", family, **changes)
    expected = {name: slow_values(weight) for name, weight in checkpoint.quantized.items()}
    for name in BUILT_IN:
        exporter = EXPORTERS[name]
        exporter.check_installed()
        read = exporter.read_weights(written(exporter, checkpoint, path / name))
        assert read.keys() == expected.keys(), name
        for module, values in expected.items():
            weight = read[module].double()
            if module in checkpoint.selection.int8 and name in ROUNDS_8_BITS:
                assert not torch.equal(weight, values), f"{name} holds {module} exactly; say so"
                assert (weight - values).abs().max() <= 2**-11 * values.abs().max()
            else:
                assert torch.equal(weight, values), f"{name}: {module}"


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_every_format_holds_the_same_weights(family: str, tmp_path: Path) -> None:
    for name in BUILT_IN:
        for module in EXPORTERS[name].modules:
            pytest.importorskip(module, reason=f"the extra {EXPORTERS[name].extra}")
    check_all_formats(family, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in ("llama", "gemma2")])
def test_every_format_holds_the_same_weights_of_other_families(family: str, tmp_path: Path) -> None:
    check_all_formats(family, tmp_path)


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_tested_families_are_those_of_these_tests(name: str) -> None:
    """The tables of support are made from this. Mixtures are exported in tests/export/NAME/test_experts.py."""
    dense = {make_config(family).model_type for family in FAMILIES}
    assert EXPORTERS[name].tested_families >= dense
    assert EXPORTERS[name].tested_families - dense <= {mixtures.model_type(family) for family in mixtures.FAMILIES}


def test_there_is_no_other_built_in_format() -> None:
    assert tuple(EXPORTERS)[: len(BUILT_IN)] == BUILT_IN
