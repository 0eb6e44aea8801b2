"""The steps of an export to OpenVINO, and what it refuses."""

import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CONFIG_MAPPING, PreTrainedTokenizerFast

from nybble.errors import ExportError
from nybble.export.openvino import exporter as module
from nybble.export.openvino.exporter import OpenVINOExporter
from nybble.export.tokenizer_check import warn_of_other_tokens
from nybble.models.selection import LayerSelection
from nybble.quant.scheme import INT8_PER_ROW, QuantScheme
from tests.export.openvino.conftest import Exported
from tests.helpers.cases import first_fast
from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.tiny import FAMILIES, make_config, make_tokenizer

EXPORTER = OpenVINOExporter()
SELECTION = LayerSelection((), (), tied=True)


def test_an_export_holds_the_model_to_the_bit(exported: Exported) -> None:
    assert (exported.result.linear_weights, exported.result.embedding_weights) == (14, 1)
    assert exported.result.logit_difference <= 1e-3
    sizes = {file.name: file.stat().st_size for file in exported.folder.iterdir()}
    assert exported.result.bytes == sizes["openvino_model.xml"] + sizes["openvino_model.bin"]
    assert sizes.keys() >= {
        "openvino_tokenizer.xml",
        "openvino_detokenizer.xml",
        "config.json",
        "tokenizer.json",
    }
    assert exported.result.rounded == {}
    assert EXPORTER.compare_weights(EXPORTER.held(exported.checkpoint).quantized, exported.folder) == {}
    assert EXPORTER.recognizes(exported.folder)
    assert not EXPORTER.recognizes(exported.folder.parent)


def test_equal_models_have_equal_files(exported: Exported, tmp_path: Path) -> None:
    """OpenVINO numbers nodes per process; a resumed run must end with the same bytes."""
    EXPORTER.write(EXPORTER.held(exported.checkpoint), tmp_path)
    for name in ("openvino_model.xml", "openvino_model.bin"):
        assert (tmp_path / name).read_bytes() == (exported.folder / name).read_bytes(), name


def test_a_strict_model_computes_in_float32_and_a_deployed_one_as_openvino_decides(
    exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    properties: list[Any] = []
    core = SimpleNamespace(
        compile_model=lambda path, device, options: (
            properties.append((device, options)) or SimpleNamespace(create_infer_request=lambda: None)
        )
    )
    monkeypatch.setattr("nybble.export.openvino.runtime.core", lambda: core)
    for strict in (True, False):
        EXPORTER.open_model(exported.folder, exported.model.config, strict)
    float32 = {
        "INFERENCE_PRECISION_HINT": "f32",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
        "KV_CACHE_PRECISION": "f32",
    }
    assert properties == [("CPU", float32), ("CPU", {})]


def test_the_tokenizer_of_an_export_gives_the_same_tokens(exported: Exported) -> None:
    openvino = pytest.importorskip("openvino")
    pytest.importorskip("openvino_tokenizers")
    tokenizer = openvino.Core().compile_model(exported.folder / "openvino_tokenizer.xml", "CPU")
    ids = tokenizer(["ab ä1"])["input_ids"]
    assert ids.tolist() == [make_tokenizer()("ab ä1").input_ids]


@pytest.mark.parametrize("family", FAMILIES)
def test_check_accepts_the_tested_families(family: str) -> None:
    EXPORTER.check(make_config(family), SELECTION)


def test_check_refuses_layers_that_keep_something_else() -> None:
    config = CONFIG_MAPPING["llama"](num_hidden_layers=2, layer_types=["full_attention", "indexed_attention"])
    with pytest.raises(
        ExportError, match=r"convolution states or recurrent states; llama has DynamicIndexedLayer; rem"
    ):
        EXPORTER.check(config, SELECTION)


def test_check_refuses_models_without_a_cache() -> None:
    config = CONFIG_MAPPING["llama"]()
    config.layer_types = ["unknown"]
    with pytest.raises(
        ExportError, match=r"transformers makes none for llama \(KeyError: 'unknown'\); remove openvino"
    ):
        EXPORTER.check(config, SELECTION)


@pytest.mark.parametrize(
    ("scheme", "container"),
    [
        (QuantScheme(4, 33), None),
        (QuantScheme(4, 6), QuantScheme(4, 6)),
        (QuantScheme(4, None), QuantScheme(4, None)),
        (QuantScheme(3, 64), QuantScheme(4, 64, symmetric=True)),
        (QuantScheme(2, None), QuantScheme(4, None, symmetric=True)),
        (QuantScheme(8, 33, symmetric=True), QuantScheme(8, 33, symmetric=True)),
        (INT8_PER_ROW, INT8_PER_ROW),
    ],
    ids=str,
)
def test_codes_have_4_or_8_bits_and_4_bit_groups_are_even(scheme: QuantScheme, container: QuantScheme | None) -> None:
    assert EXPORTER.container(scheme, 66, embedding=False) == container


@pytest.mark.parametrize(
    ("parameters", "tokens"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, 512),
        ({"rope_type": "longrope", "original_max_position_embeddings": 64}, 64),
        ({"full_attention": {"rope_type": "dynamic"}, "sliding_attention": {"rope_type": "default"}}, 512),
        ({"rope_type": "llama3", "original_max_position_embeddings": 64}, None),
        ({"full_attention": {"rope_type": "yarn"}}, None),
        (None, None),
    ],
)
def test_limits_say_up_to_which_length_the_export_is_right(parameters: Any, tokens: int | None) -> None:
    limits = EXPORTER.limits(SimpleNamespace(max_position_embeddings=512, rope_parameters=parameters))
    assert [f"is right up to {tokens} tokens" in limit for limit in limits] == [True] * (tokens is not None)


@pytest.mark.parametrize(
    "name", first_fast(1, ["openvino_model.xml", "openvino_tokenizer.xml", "openvino_detokenizer.xml"])
)
def test_a_disk_that_fills_is_one_line(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    openvino = pytest.importorskip("openvino", reason="the extra openvino")
    original = openvino.save_model

    def save_model(graph: Any, path: Path, **options: Any) -> None:
        if path.name == name:
            raise RuntimeError("basic_ios::clear: iostream error")
        original(graph, path, **options)

    monkeypatch.setattr(openvino, "save_model", save_model)
    folder = tmp_path / "run" / "openvino.tmp"
    folder.mkdir(parents=True)
    with pytest.raises(
        ExportError,
        match=r"run must be written to disk; it cannot be \(RuntimeError: basic_ios.* free.* --to openvino$",
    ):
        EXPORTER.export(make_checkpoint(tmp_path / "quantized", "smollm", num_hidden_layers=1), folder)


def test_a_tokenizer_that_cannot_be_converted_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise TypeError("unknown\nnormalizer")

    monkeypatch.setitem(sys.modules, "openvino", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "openvino_tokenizers", SimpleNamespace(convert_tokenizer=fail))
    with pytest.raises(ExportError, match=r"cannot be converted \(TypeError: unknown normalizer\); remove openvino"):
        module._save_tokenizer(make_tokenizer(), tmp_path, 260)


def test_spaces_before_digits_are_read_as_in_transformers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """SmolLM2 splits digits off before the regular expression of byte-level BPE; OpenVINO has one expression."""
    ov = pytest.importorskip("openvino")
    bpe = models.BPE(
        vocab={c: i for i, c in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "ĠĠ", "<|end|>"])},
        merges=[("Ġ", "Ġ")],
    )
    backend = Tokenizer(bpe)
    digits, bytes_ = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_])
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")
    module._save_tokenizer(tokenizer, tmp_path, 300)
    assert not caplog.text
    compiled = ov.compile_model(tmp_path / "openvino_tokenizer.xml", "CPU")
    for text in ("x =  7", "[\n  1,\n  2\n]", "a  b", "  7  "):
        assert compiled({0: [text]})["input_ids"][0].tolist() == tokenizer(text).input_ids, text


def test_what_a_runtime_reads_otherwise_is_said(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = make_tokenizer()
    warn_of_other_tokens("R", lambda text: tokenizer(text).input_ids, tokenizer, 260)
    assert not caplog.text
    warn_of_other_tokens("R", lambda text: [0], tokenizer, 100)
    assert not caplog.text, "a small twin"
    warn_of_other_tokens("R", lambda text: [0], tokenizer, 260)
    assert re.search(r"R reads (\d+) of \1 test texts as other tokens .*give R token ids", caplog.text)
