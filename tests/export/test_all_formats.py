"""One model, all formats: the weights that each runtime reads are equal to the last bit."""

from pathlib import Path

import pytest
import torch

from nybble.errors import OptionError
from nybble.export.base import EXPORTERS, Exporter
from nybble.export.result import ExportResult
from nybble.models.checkpoint import QuantizedCheckpoint, open_checkpoint
from nybble.models.loading import LoadedModel
from nybble.models.quantized_model import save_quantized
from nybble.models.schemes import assign_schemes
from nybble.models.selection import select_layers
from nybble.options.scheme import SchemeOptions
from tests.export.openvino.test_hybrids import KINDS
from tests.helpers import mixtures
from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.exports import slow_values
from tests.helpers.rounding import round_model_to_nearest
from tests.helpers.tiny import FAMILIES, make_config, make_model, make_tokenizer

BUILT_IN = ("openvino", "gguf", "onnx", "vllm", "mlx", "hf")
# In float16, which has 11 significant bits; an 8-bit code times its scale has up to 15.
ROUNDS_8_BITS = {"vllm", "hf"}


def written(exporter: Exporter, checkpoint: QuantizedCheckpoint, folder: Path) -> Path:
    """Export without the comparisons that every export makes; the folder."""
    folder.mkdir()
    checkpoint.config.save_pretrained(folder)
    checkpoint.tokenizer.save_pretrained(folder)
    exporter.write(exporter.held(checkpoint), folder)
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
            if module in checkpoint.selection.embeddings and name in ROUNDS_8_BITS:
                assert not torch.equal(weight, values), f"{name} holds {module} exactly; say so"
                assert (weight - values).abs().max() <= 2**-11 * values.abs().max()
            else:
                assert torch.equal(weight, values), f"{name}: {module}"


@pytest.mark.slow
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


MIXED = SchemeOptions(
    bits=3,
    group_size=32,
    layer=(
        "*.self_attn.*:bits=8", "*.gate_proj:group_size=-1", "*.up_proj:group_size=-1",
        "*.down_proj:bits=2,group_size=64", "*.embed_tokens:bits=4",
    ),
    ignore=("*.o_proj",),
)  # fmt: skip


def mixed_checkpoint(folder: Path, options: SchemeOptions) -> QuantizedCheckpoint:
    """A model of one layer with a scheme for each layer."""
    model = make_model("llama", num_hidden_layers=1, dtype=torch.bfloat16).float()
    selection = assign_schemes(select_layers(model), model, options)
    quantized = round_model_to_nearest(model, schemes=selection.schemes)
    save_quantized(folder, LoadedModel(model, make_tokenizer(), "tiny"), quantized)
    checkpoint = open_checkpoint(folder)
    assert dict(checkpoint.selection.schemes) == dict(selection.schemes)
    return checkpoint


def check_every_format(checkpoint: QuantizedCheckpoint, path: Path) -> dict[str, ExportResult]:
    """Export, which compares codes, values and logits; and compare the values with a slow loop."""
    results = {}
    for name in BUILT_IN:
        exporter = EXPORTERS[name]
        for module in exporter.modules:
            pytest.importorskip(module, reason=f"the extra {exporter.extra}")
        exporter.check(checkpoint.config, checkpoint.selection)
        (path / name).mkdir()
        results[name] = exporter.export(checkpoint, path / name)
        assert results[name].logit_difference is not None
        read = exporter.read_weights(path / name)
        for module, weight in checkpoint.quantized.items():
            found, values = read[module].double(), slow_values(weight)
            if weight.scheme.bits == 8 and module not in exporter.read_codes(path / name):
                assert (found - values).abs().max() <= 2**-11 * values.abs().max()
            else:
                assert torch.equal(found, values), f"{name}: {module}"
    return results


def test_every_format_holds_a_model_of_many_schemes(tmp_path: Path) -> None:
    """Codes of 2, 3, 4 and 8 bits in groups and whole rows, an embedding of 4 bits, and layers in 16 bits."""
    checkpoint = mixed_checkpoint(tmp_path / "quantized", MIXED)
    assert len(set(checkpoint.selection.schemes.values())) == 5
    assert "model.layers.0.self_attn.o_proj.weight" in checkpoint.others
    results = check_every_format(checkpoint, tmp_path)
    wider = {"2 bits in 4": 1, "3 bits in 4": 2}
    assert {name: result.widened for name, result in results.items()} == {
        "openvino": wider, "gguf": wider, "onnx": wider | {"4 bits in 8": 1}, "vllm": wider, "mlx": {}, "hf": {},
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [32, 64, -1])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_format_holds_every_scheme(bits: int, group_size: int, symmetric: bool, tmp_path: Path) -> None:
    options = SchemeOptions(bits=bits, group_size=group_size, symmetric=symmetric)
    check_every_format(mixed_checkpoint(tmp_path / "quantized", options), tmp_path)


def test_layers_that_vllm_fuses_have_one_scheme(tmp_path: Path) -> None:
    for i, options in enumerate(({"layer": ("*.q_proj:bits=8",)}, {"ignore": ("*.up_proj",)})):
        checkpoint = mixed_checkpoint(tmp_path / str(i), SchemeOptions(group_size=32, **options))
        with pytest.raises(
            OptionError, match="needs one scheme for layers that it fuses; got model.layers.0.*; change"
        ):
            EXPORTERS["vllm"].check(checkpoint.config, checkpoint.selection)


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_tested_families_are_those_of_these_tests(name: str) -> None:
    """The tables of support are made from this. Mixtures are exported in tests/export/NAME/test_experts.py."""
    dense = {make_config(family).model_type for family in FAMILIES}
    assert EXPORTERS[name].tested_families >= dense
    mixed = {mixtures.model_type(family) for family in mixtures.FAMILIES}
    assert EXPORTERS[name].tested_families - dense - KINDS.keys() <= mixed


def test_there_is_no_other_built_in_format() -> None:
    assert tuple(EXPORTERS)[: len(BUILT_IN)] == BUILT_IN
