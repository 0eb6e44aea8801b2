"""Families whose blocks, positions or weights differ from Llama's: each works, or is refused for its true reason."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from transformers import AutoModelForCausalLM

from nybble.compression.chain import check_chain
from nybble.compression.checks import check_length
from nybble.errors import ModelError, OptionError
from nybble.evaluation.decoder_error import decoder_errors, decoder_outputs
from nybble.models.checkpoint import empty_model
from nybble.models.head import LMHead, last_hidden_states
from nybble.models.loading import load
from nybble.models.selection import select_layers
from nybble.options.commands import CompressOptions
from nybble.workflows.compress import compress
from tests.faults.test_model_as_loaded import TEXT
from tests.helpers.causal_types import tiny_model
from tests.helpers.compression import IDS
from tests.helpers.tiny import make_config, make_tokenizer

V = {"vocab_size": 260}
_HEADS = {"num_attention_heads": 4, "intermediate_size": 128}
_WIDE = {"hidden_size": 64, "num_hidden_layers": 2} | _HEADS
_GPT = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 32}
_ROTARY = {"rotary_dim": 8, "bos_token_id": 256, "eos_token_id": 257}
_OPT = {
    "hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": 32,
    "max_position_embeddings": 64, "pad_token_id": 257,
}  # fmt: skip
_ZAMBA2 = {
    "hidden_size": 64, "num_hidden_layers": 4, "mamba_headdim": 16, "n_mamba_heads": 8, "mamba_d_state": 16,
    "mamba_ngroups": 1, "hybrid_layer_ids": [1, 3], "layers_block_type": ["mamba", "hybrid"] * 2, "num_mem_blocks": 1,
    "adapter_rank": 8,
} | _HEADS  # fmt: skip

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "opt": ("OPTConfig", _OPT),
    "xglm": ("XGLMConfig", {"d_model": 64, "ffn_dim": 128, "num_layers": 2, "attention_heads": 4}),
    "hrm_text": ("HrmTextConfig", {"hidden_size": 64, "num_key_value_heads": 4} | _HEADS),
    "gptj": ("GPTJConfig", _GPT | _ROTARY),
    "codegen": ("CodeGenConfig", _GPT | _ROTARY | {"n_ctx": 32}),
    "ctrl": ("CTRLConfig", _GPT | {"dff": 128}),
    "mpt": ("MptConfig", {"d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 32}),
    "biogpt": ("BioGptConfig", _WIDE | {"max_position_embeddings": 32}),
    "phi": ("PhiConfig", _WIDE | {"max_position_embeddings": 32}),
    "bloom": ("BloomConfig", {"hidden_size": 64, "n_layer": 2, "n_head": 4}),
    "rwkv": ("RwkvConfig", {"hidden_size": 64, "num_hidden_layers": 2, "attention_hidden_size": 64}),
    "recurrent_gemma": ("RecurrentGemmaConfig", _WIDE | {"num_hidden_layers": 3, "lru_width": 64}),
    "xlnet": ("XLNetConfig", {"d_model": 64, "n_layer": 2, "n_head": 4, "d_inner": 128}),
    "zamba2": ("Zamba2Config", _ZAMBA2),
    "xlm": ("XLMConfig", {"emb_dim": 64, "n_layers": 2, "n_heads": 4, "causal": True, "asm": False}),
}


def make(name: str, **changes: object) -> Any:
    kind, options = CONFIGS[name]
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(getattr(t, kind)(**V | options | changes)).eval().requires_grad_(False)


def save(folder: Path, model: Any) -> Path:
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def test_decoder_outputs_may_differ_in_width() -> None:
    model = make("opt")
    outputs = decoder_outputs(model, IDS[0])
    assert outputs.shape == (2, IDS.shape[1], 64)
    assert torch.equal(outputs[-1, :, :32], model.model(IDS[:1]).last_hidden_state[0])
    assert not outputs[-1, :, 32:].any()
    assert decoder_errors(model, IDS[0], outputs) == [0.0, 0.0]


@pytest.mark.parametrize("method", [pytest.param("rtn", marks=pytest.mark.slow), "se+gptq"])
def test_a_narrow_embedding_is_compressed(method: str, tmp_path: Path) -> None:
    options = CompressOptions.of(
        pretrained=str(save(tmp_path / "model", make("opt"))), output_dir=str(tmp_path / "run"), data=("python-docs",),
        method=method, group_size=16, dtype="float32", seq_len=32, num_calibration_samples=8, num_test_samples=2,
        eval_tasks=(), export=(),
    )  # fmt: skip
    assert (compress(options) / "report.md").is_file()


@pytest.mark.parametrize("name", ["xglm", "hrm_text", "bloom", "xlm"])
def test_blocks_that_are_no_chain_name_the_method_that_works(name: str) -> None:
    model = make(name)
    message = rf"the blocks of {name} must be a chain, .*; block \d+ is not; use the method rtn"
    with pytest.raises(ModelError, match=message):
        check_chain(model, select_layers(model).linears, IDS[:2])


@pytest.mark.parametrize("name", ["gptj", "codegen", "ctrl", "mpt", "biogpt"])
def test_sequences_longer_than_the_positions_are_refused(name: str) -> None:
    with pytest.raises(OptionError, match=r"--seq_len must be at most 32, the .*positions of m; got 33"):
        check_length(make(name), "m", 33)
    check_length(make(name), "m", 32)


def test_of_an_empty_model_only_learned_positions_are_known(caplog: pytest.LogCaptureFixture) -> None:
    """An export is measured in its runtime, and its class has no weights."""
    check_length(empty_model(make_config("llama"), trust_remote_code=False), "m", 300)
    assert "--seq_len 300 is more than the 256 positions that m was trained for" in caplog.text
    with pytest.raises(OptionError, match="--seq_len must be at most 256, the learned positions of m; got 300"):
        check_length(empty_model(tiny_model("gpt2").config, trust_remote_code=False), "m", 300)


@pytest.mark.parametrize("name", ["phi", "bloom", "xglm"])
def test_sequences_may_be_longer_where_positions_are_computed(name: str, caplog: pytest.LogCaptureFixture) -> None:
    check_length(make(name), "m", 64)
    assert ("--seq_len 64 is more than the 32 positions" in caplog.text) == (name == "phi")


@pytest.mark.parametrize(
    ("name", "parameter"), [("recurrent_gemma", "rg_lru.input_gate_weight"), ("rwkv", "time_mix_key")]
)
def test_parameters_with_three_axes_stay_in_16_bits(
    name: str, parameter: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "nybble")
    load(str(save(tmp_path / "model", make(name))), torch.float32, torch.device("cpu"))
    assert re.search(rf"3-D parameters \(first: .*{parameter}\) are no linear layers and stay in 16 bits", caplog.text)


def test_layers_that_share_a_weight_are_refused_before_the_work(tmp_path: Path) -> None:
    message = r"Zamba2ForCausalLM uses one weight as model.layers.1.shared_\S+ and as model.layers.3.shared_\S+, which"
    with pytest.raises(ModelError, match=message):
        load(str(save(tmp_path / "model", make("zamba2"))), torch.float32, torch.device("cpu"))


def emu3_text() -> Any:
    return t.Emu3ForCausalLM(t.Emu3TextConfig(**TEXT, max_position_embeddings=64))


def mllama_text() -> Any:
    return t.MllamaForCausalLM(t.MllamaTextConfig(**TEXT, cross_attention_layers=[1]))


def emu3() -> Any:
    codebook = {
        "codebook_size": 16, "embed_dim": 8, "latent_channels": 8, "base_channels": 32, "channel_multiplier": [1],
        "num_res_blocks": 1, "attn_resolutions": [1], "hidden_size": 32, "num_attention_heads": 2,
        "temporal_downsample_factor": 1,
    }  # fmt: skip
    text = TEXT | {"max_position_embeddings": 64}
    config = t.Emu3Config(text_config=text, vq_config=codebook, vocabulary_map={"<image>": 3})
    return t.Emu3ForConditionalGeneration(config)


@pytest.mark.parametrize(
    ("make_model", "message"),
    [
        (emu3_text, r"model type that AutoModelForCausalLM of transformers loads; emu3_text_model \(Emu3ForCausalLM\)"),
        (mllama_text, r"AutoModelForCausalLM of transformers loads; mllama_text_model \(MllamaForCausalLM\) is none"),
        (emu3, r"must be a language model alone; transformers cannot take the Emu3ForCausalLM out of it \(21 weights"),
    ],
)
def test_the_reason_is_the_true_one(make_model: Callable[[], Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message) as error:
        folder = save(tmp_path / "model", make_model())
        if make_model is emu3:  # a model with parts whose configuration names the class of the text model
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(config | {"architectures": ["Emu3ForCausalLM"]}))
        load(str(folder), torch.float32, torch.device("cpu"))
    assert "ends with ForCausalLM" not in str(error.value)


def test_layers_between_the_decoder_and_the_head_are_part_of_the_model() -> None:
    config = t.ElectraConfig(
        vocab_size=260, embedding_size=32, hidden_size=64, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=64, is_decoder=True,
    )  # fmt: skip
    model, ids = t.ElectraForCausalLM(config).eval(), torch.zeros(1, 4, dtype=torch.int64)
    LMHead.of(model).verify(model, ids)
    assert last_hidden_states(model, ids).shape == (1, 4, 32)
