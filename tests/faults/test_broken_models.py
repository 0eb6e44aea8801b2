"""A model folder with a fault in any of its files is refused in one line that names the file."""

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nybble.errors import ModelError
from nybble.models.head import LMHead
from nybble.models.loading import load
from tests.faults.config_mutations import HARMLESS, MUTATIONS, Change, mutate
from tests.helpers.cases import slow_case
from tests.helpers.tiny import save_model

CPU = torch.device("cpu")
IDS = torch.arange(32)[None]
FAMILIES = ("llama", "smollm", "qwen3", "gemma2")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {family: save_model(folder / family, family) for family in FAMILIES}


@pytest.fixture
def folder(models: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(models["smollm"], tmp_path / "model"))


def load_and_try(folder: Path) -> None:
    """What a run does with a model before it opens its folder."""
    model = load(str(folder), torch.float32, CPU).model
    LMHead.of(model).verify(model, IDS)


def refusal(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        load_and_try(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert "please report" not in message
    return message


def groups() -> Iterator[Any]:
    """The mutations by field, so that a group is a test; those of a field after the first two are slow tests."""
    by_field: dict[str, list[tuple[str, str, Change]]] = {}
    for mutation in MUTATIONS:
        by_field.setdefault(mutation[1].split("=")[0].split(" ")[0], []).append(mutation)
    for field, mutations in by_field.items():
        yield field, mutations[:2]
        if mutations[2:]:
            yield slow_case((field, mutations[2:]))


def test_there_are_a_hundred_mutations() -> None:
    assert len(MUTATIONS) >= 100
    assert len({(family, name) for family, name, _ in MUTATIONS}) == len(MUTATIONS)


@pytest.mark.parametrize(
    ("field", "mutations"), list(groups()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_an_impossible_configuration_is_refused_in_one_line(
    field: str, mutations: list[tuple[str, str, Change]], models: dict[str, Path], tmp_path: Path
) -> None:
    for i, (family, name, change) in enumerate(mutations):
        broken = Path(shutil.copytree(models[family], tmp_path / str(i)))
        mutate(broken, change)
        if name in HARMLESS:
            load_and_try(broken)
        else:
            message = refusal(broken)
            field_named = isinstance(change, dict) and len(change) == 1 and field in message
            assert field_named or "config.json" in message or str(broken) in message or family in message, message


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("hidden_act", "nothing", r"config.json: hidden_act must be .*KeyError: 'nothing'\); it is 'nothing'; correct"),
        ("pad_token_id", 10**6, "config.json: pad_token_id must be .*Padding_idx must be within num_embeddings"),
        ("tie_word_embeddings", "no", "config.json: tie_word_embeddings must be .*expected bool, got str"),
        ("auto_map", 5, "config.json: auto_map must be an object of texts; it is '5'; correct it, or download"),
        ("num_attention_heads", 0, "config.json: num_attention_heads must be .*ZeroDivisionError: integer modulo"),
        ("num_hidden_layers", 10**9, "config.json: num_hidden_layers must be at most 1000; it is '1000000000'"),
        ("intermediate_size", 96, r"config.json must fit the weights; model.layers.0.mlp.down_proj.weight is \[64"),
    ],
)  # fmt: skip
def test_the_field_is_named(name: str, value: object, message: str, folder: Path) -> None:
    mutate(folder, {name: value})
    with pytest.raises(ModelError, match=message):
        load_and_try(folder)


@pytest.mark.parametrize("changes", [
    {"num_hidden_layers": 2**63, "num_attention_heads": True}, {"text_config": {"n_layer": 10**6}},
    {"num_local_experts": 10**6, "hidden_act": "nothing"},
])  # fmt: skip
def test_modules_without_end_are_never_built(changes: dict[str, object], folder: Path) -> None:
    """Two faults: what fails first is explained by building the model without one field after the other."""
    mutate(folder, changes)
    with pytest.raises(ModelError, match=r"config.json: (num_hidden_layers|n_layer|num_local_experts) must be at most"):
        load_and_try(folder)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:ab12\nsize 700\n"


def writing(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


def remove_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def sentencepiece_alone(folder: Path) -> None:
    remove_tokenizer(folder)
    (folder / "tokenizer.model").write_bytes(b"\xff" * 100)


def directory_for_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").mkdir()


def cut_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


def cut_quantized(folder: Path) -> None:
    cut_weights(folder)
    mutate(folder, {"quantization_config": {"quant_method": "compressed-tensors"}})


def index(text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
        (folder / "model.safetensors.index.json").write_text(text)

    return write


NAMES_TOKENIZER = "copy tokenizer.json and tokenizer_config.json of the original model"
FILES: list[tuple[str, Callable[[Path], object], str]] = [
    ("no tokenizer", remove_tokenizer, r"must hold a tokenizer \(tokenizer.json\); the folder has none; copy"),
    ("tokenizer.model alone", sentencepiece_alone, f"tokenizer.json.*there is none, and the other.*{NAMES_TOKENIZER}"),
    ("no tokenizer.json", lambda folder: (folder / "tokenizer.json").unlink(), f"there is none, .*{NAMES_TOKENIZER}"),
    ("directory", directory_for_tokenizer, f"there is none, .*{NAMES_TOKENIZER}"),
    *(
        (f"pointer {name}", writing(name, POINTER), f"{name} must be the file itself; it is a pointer of Git LFS")
        for name in ("model.safetensors", "tokenizer.json", "config.json", "generation_config.json",
                     "tokenizer_config.json", "chat_template.jinja")
    ),
    *(
        (f"{name} {text!r}", writing(name, text), f"{name} must .*; download it again")
        for name in ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json",
                     "added_tokens.json", "model.safetensors.index.json")
        for text in ("{", "null", "[1]", "")
    ),
    *((f"tokenizer {text!r}", writing("tokenizer.json", text), NAMES_TOKENIZER) for text in ("{", "null", "{}", "")),
    ("tokenizer class", writing("tokenizer_config.json", '{"tokenizer_class": 5}'), NAMES_TOKENIZER),
    ("empty weights", writing("model.safetensors", ""), "model.safetensors must be a readable safetensors file"),
    ("page", writing("model.safetensors", "<html>404</html>"), "safetensors must be a readable safetensors file"),
    ("cut weights", cut_weights, "model.safetensors must be a readable safetensors file"),
    ("cut quantized", cut_quantized, "model.safetensors must be a readable safetensors file; .*copy or"),
    ("index of nothing", index("{}"), "index.json must hold the objects metadata and weight_map; it does not"),
    ("index of lists", index('{"metadata": {}, "weight_map": [1]}'), "must hold the objects metadata and weight"),
    ("index of others", index('{"metadata": {}, "weight_map": {"a": "b.safetensors"}}'), "are not there .first: b.s"),
    ("no index", lambda folder: (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors"),
     "no file named model.safetensors"),
    ("adapter", writing("adapter_config.json", "{}"), "must be a model without adapters; .*merge the adapter"),
    ("auto_map", writing("config.json", '{"model_type": "llama", "auto_map": {"AutoConfig": 3}}'),
     "config.json: auto_map must be an object of texts"),
]  # fmt: skip


@pytest.mark.parametrize(("fault", "message"), [case[1:] for case in FILES], ids=[case[0] for case in FILES])
def test_a_broken_file_is_named(fault: Callable[[Path], object], message: str, folder: Path) -> None:
    fault(folder)
    assert re.search(message, refusal(folder))


def test_a_pointer_for_gguf_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_text(POINTER)
    with pytest.raises(ModelError, match="model.gguf must be the file itself; it is a pointer of Git LFS"):
        load(str(tmp_path / "model.gguf"), torch.float32, CPU)


def test_pointers_that_are_not_read_do_not_matter(folder: Path) -> None:
    """git lfs pull --include "*.safetensors" leaves the pointers of other formats."""
    (folder / "pytorch_model.bin").write_text(POINTER)
    (folder / "consolidated.safetensors").write_text(POINTER)
    load_and_try(folder)
