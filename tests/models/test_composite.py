"""Models with vision or audio parts: the language model inside is quantized, and the rest comes through unchanged."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM

from nybble.errors import ExportError, ModelError
from nybble.export.base import EXPORTERS
from nybble.export.text_part import text_part
from nybble.models.checkpoint import open_checkpoint
from nybble.models.composite import auto_class, check_parts, decoder_path
from nybble.models.loading import load
from nybble.models.quantized_model import load_quantized
from nybble.models.selection import select_layers
from nybble.run.complete import QUANTIZED
from tests.helpers.cases import fast_cases
from tests.helpers.composites import FIELDS, IMAGE_SIZE, composite_model, save_composite
from tests.helpers.tiny import make_model
from tests.models.test_every_type import run_compress

TYPES = sorted(FIELDS)
IDS = torch.arange(24).view(1, 24) + 30


@pytest.fixture(scope="module")
def gemma3(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model folder with the settings of a processor, and a run that compresses and exports it."""
    folder = tmp_path_factory.mktemp("composite")
    model = save_composite(folder / "model", "gemma3")
    (model / "preprocessor_config.json").write_text('{"image_mean": [0.5]}')
    run_compress(model, folder / "run", ("hf", "vllm"))
    return model, folder / "run"


def other_tensors(model: Any) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if "vision" in name or "projector" in name}


def image_features(model: Any) -> Tensor:
    pixels = torch.linspace(-1, 1, 3 * IMAGE_SIZE**2).view(1, 3, IMAGE_SIZE, IMAGE_SIZE).to(model.dtype)
    features = model.get_image_features(pixel_values=pixels)
    return features if isinstance(features, Tensor) else features.pooler_output


@pytest.mark.parametrize("export", [QUANTIZED, "hf", "vllm"])
def test_vision_weights_are_equal_to_the_bit(gemma3: tuple[Path, Path], export: str) -> None:
    source, run = gemma3
    before = load(str(source), torch.bfloat16, torch.device("cpu")).model
    if export == QUANTIZED:
        after = load_quantized(run / QUANTIZED, torch.bfloat16).model
    else:
        after = AutoModelForImageTextToText.from_pretrained(run / export, dtype=torch.bfloat16)
    assert type(after) is type(before)
    expected, found = other_tensors(before), other_tensors(after)
    assert len(expected) > 10
    assert expected.keys() == found.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    assert torch.equal(image_features(before), image_features(after))


def test_an_image_with_text_gives_finite_logits(gemma3: tuple[Path, Path]) -> None:
    model = AutoModelForImageTextToText.from_pretrained(gemma3[1] / "hf", dtype=torch.float32)
    image = model.config.image_token_id
    ids = torch.tensor([[5, image, image, image, image, 7, 8]])
    pixels = torch.linspace(-1, 1, 3 * IMAGE_SIZE**2).view(1, 3, IMAGE_SIZE, IMAGE_SIZE)
    with torch.no_grad():
        one, two = (
            model(input_ids=ids, pixel_values=sign * pixels, token_type_ids=(ids == image).long()).logits
            for sign in (1, -1)
        )
    assert bool(one.isfinite().all())
    assert not torch.equal(one, two)


@pytest.mark.parametrize("folder", [QUANTIZED, "hf", "vllm"])
def test_the_processor_and_the_class_travel_with_the_model(gemma3: tuple[Path, Path], folder: str) -> None:
    source, run = gemma3
    name = "preprocessor_config.json"
    assert (run / folder / name).read_bytes() == (source / name).read_bytes()
    config = json.loads((run / folder / "config.json").read_text())
    assert config["architectures"] == ["Gemma3ForConditionalGeneration"]


def test_the_text_part_computes_what_the_whole_model_computes(gemma3: tuple[Path, Path]) -> None:
    checkpoint = open_checkpoint(gemma3[1] / QUANTIZED)
    text = text_part(checkpoint, "GGUF")
    assert type(text.build()).__name__ == "Gemma3ForCausalLM"
    assert text.num_parameters < checkpoint.num_parameters
    with torch.no_grad():
        whole, part = (kind.build()(input_ids=IDS).logits for kind in (checkpoint, text))
    assert torch.equal(whole, part)
    assert len(text.selection.linears) == len(checkpoint.selection.linears) == len(checkpoint.shapes) - 1


@pytest.mark.parametrize("model_type", fast_cases(TYPES, ["gemma3", "llama4", "mllama"]))
def test_only_linear_layers_of_the_text_decoder_are_selected(model_type: str) -> None:
    model = composite_model(model_type)
    path = decoder_path(model)
    selection = select_layers(model)
    assert path
    assert all(name.startswith(path + ".") for name in selection.linears)
    with torch.no_grad():
        called: set[str] = set()
        for name in selection.linears:
            model.get_submodule(name).register_forward_hook(lambda *_, name=name: called.add(name))
        model(input_ids=IDS, use_cache=False)
    assert {name for name in selection.linears if ".experts." not in name} <= called


@pytest.mark.slow
@pytest.mark.parametrize("model_type", TYPES)
def test_every_composite_is_compressed_and_exported(model_type: str, tmp_path: Path) -> None:
    model = save_composite(tmp_path / "model", model_type)
    run_compress(model, tmp_path / "run", ("hf",))
    before = load(str(model), torch.bfloat16, torch.device("cpu")).model
    after = AutoModelForMultimodalLM.from_pretrained(tmp_path / "run" / "hf", dtype=torch.bfloat16)
    assert type(after) is type(before)
    inside = decoder_path(before)
    for name, tensor in before.state_dict().items():
        if not name.startswith((inside, "lm_head")):
            assert torch.equal(tensor, after.state_dict()[name]), name


def test_the_class_is_that_of_the_text_model_where_the_configuration_names_it() -> None:
    config = composite_model("qwen3_5").config
    assert auto_class(config) is AutoModelForMultimodalLM
    config.architectures = ["Qwen3_5ForCausalLM"]
    assert auto_class(config) is AutoModelForCausalLM
    assert auto_class(make_model("gemma3").config) is AutoModelForCausalLM


def test_a_text_model_without_a_class_of_its_own_is_exported_with_everything_only() -> None:
    config = composite_model("mllama").config
    selection: Any = SimpleNamespace(tied=False)
    with pytest.raises(ExportError, match=r"holds the text model of mllama alone.*mllama_text_model has none"):
        EXPORTERS["gguf"].exported_config(config, selection)
    assert EXPORTERS["hf"].exported_config(config, selection) is config


def test_a_decoder_among_other_parts_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = composite_model("gemma3")
    monkeypatch.setattr(model, "get_decoder", lambda: model.base_model)
    with pytest.raises(ModelError, match="Gemma3ForConditionalGeneration must keep its language model in a module"):
        decoder_path(model)


def test_a_model_that_needs_an_image_is_refused() -> None:
    model = composite_model("gemma3")
    model.register_forward_pre_hook(lambda *_: {}["pixel_values"])
    with pytest.raises(ModelError, match=r"m must compute logits of text without an image .* \(KeyError: 'pixel_val"):
        check_parts(model, "m")


def test_a_model_that_adds_tokens_is_refused() -> None:
    model = composite_model("gemma3")

    def shorten(module: Any, inputs: Any, output: Any) -> Any:
        output.logits = output.logits[:, 1:]
        return output

    model.register_forward_hook(shorten)
    with pytest.raises(ModelError, match=r"one row of logits for each token .* computes \[1, 3\] for \[1, 4\]"):
        check_parts(model, "m")
