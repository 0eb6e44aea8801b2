"""Families with convolutions, recurrences, ALiBi and latent attention in OpenVINO: prompts, decoding, left padding."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from nybble.export.base import EXPORTERS
from nybble.export.openvino.runtime import core
from tests.helpers.checkpoints import save_checkpoint
from tests.helpers.exports import check_padding_and_windows, logits_of
from tests.helpers.tiny import VOCABULARY, make_model

pytestmark = pytest.mark.usefixtures("needs_openvino")
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 256,
    "eos_token_id": 257, "pad_token_id": 257, "initializer_range": 0.15,
}  # fmt: skip
DELTA = {
    "head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
    "linear_value_head_dim": 16, "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
MAMBA = {
    "head_dim": 16, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_expand": 2,
}  # fmt: skip
LATENT = {
    "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "lfm2": {"head_dim": 16, "layer_types": ["conv", "full_attention"], "block_multiple_of": 32},
    "qwen3_5_text": DELTA,
    "qwen3_next": DELTA | {"mlp_only_layers": [0, 1]},
    "olmo_hybrid": DELTA,
    "mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 2, "expand": 2},
    "mamba": {"state_size": 16, "time_step_rank": 32},
    "falcon_mamba": {"state_size": 16, "time_step_rank": 32},
    "falcon_h1": MAMBA | {"mamba_d_ssm": 128},
    "bamba": MAMBA | {"attn_layer_indices": [1]},
    "granitemoehybrid": MAMBA | {
        "layer_types": ["mamba", "attention"], "num_local_experts": 0, "num_experts_per_tok": 0,
        "shared_intermediate_size": 128,
    },
    "nemotron_h": {
        "num_hidden_layers": 4, "hybrid_override_pattern": "M-M*", "head_dim": 16, "mamba_num_heads": 8,
        "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 2,
    },
    "jamba": {
        "num_experts": 1, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 16, "mamba_dt_rank": 32,
    },
    "falcon": {"alibi": True},
    "bloom": {"n_layer": 2, "n_head": 4},
    "mpt": {"d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 512},
    "gpt_bigcode": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512},
    "youtu": LATENT,
}  # fmt: skip
GENAI = """
import json, sys
import numpy as np, openvino as ov, openvino_genai as genai
float32 = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0, "KV_CACHE_PRECISION": "f32"}
pipeline = genai.LLMPipeline(sys.argv[1], "CPU", **float32)
config = genai.GenerationConfig(max_new_tokens=16, do_sample=False, apply_chat_template=False, ignore_eos=True)
prompts = [ov.Tensor(np.array(ids)) for ids in json.loads(sys.argv[2])]
print(json.dumps([list(pipeline.generate(prompt, config).tokens[0]) for prompt in prompts]))
"""
FAST = "falcon_h1"  # every kind of state


def make(kind: str) -> Any:
    """A frozen random model whose norms and biases are random too."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**COMMON | KINDS[kind]), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.requires_grad_(False).eval()


def export(model: Any, folder: Path) -> tuple[Any, Path]:
    """The model with quantized weights, and the folder of its export."""
    checkpoint = save_checkpoint(folder / "quantized", model)
    exporter = EXPORTERS["openvino"]
    exporter.check(checkpoint.config, checkpoint.selection)
    (folder / "openvino").mkdir()
    exporter.export(checkpoint, folder / "openvino")
    return checkpoint.build(), folder / "openvino"


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[] if kind == FAST else pytest.mark.slow) for kind in KINDS])
def test_an_export_computes_what_torch_does(kind: str, tmp_path: Path) -> None:
    model, folder = export(make(kind), tmp_path)
    runtime, ids = EXPORTERS["openvino"].open_model(folder, model.config, strict=True), torch.randint(0, 256, (1, 160))
    expected = logits_of(model, ids)
    torch.testing.assert_close(runtime(ids).logits, expected, rtol=0, atol=1e-3)
    output = runtime(ids[:, :100])
    parts = [output.logits]
    for part in (ids[:, 100:150], *ids[:, 150:].split(1, dim=1)):
        output = runtime(part, past_key_values=output.past_key_values)
        parts.append(output.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=0, atol=1e-3)
    check_padding_and_windows(model, runtime)


def check_genai(model: Any, folder: Path) -> None:
    """openvino-genai's pipeline, with the attention that it chooses, generates the tokens of torch.

    In a process of its own, because the pipeline has an openvino.Core of its own; see `core`.
    """
    pytest.importorskip("openvino_genai")
    prompts = [torch.randint(1, 256, (1, length)) for length in (37, 11)]
    arguments = [str(folder), json.dumps([ids.tolist() for ids in prompts])]
    answer = subprocess.run([sys.executable, "-c", GENAI, *arguments], check=True, capture_output=True, text=True)
    expected = [
        model.generate(ids, max_new_tokens=16, do_sample=False, eos_token_id=None, pad_token_id=0)[0, ids.shape[1] :]
        for ids in prompts
    ]
    assert json.loads(answer.stdout.splitlines()[-1]) == [tokens.tolist() for tokens in expected]


def sliding_windows(folder: Path) -> list[int]:
    """The windows that OpenVINO's paged attention finds in an export, one for each layer; 0 for none."""
    import openvino as ov
    from openvino._offline_transformations import paged_attention_transformation

    graph = core().read_model(folder / "openvino_model.xml")
    paged_attention_transformation(graph)
    nodes = [node for node in graph.get_ordered_ops() if node.get_type_name() == "PagedAttentionExtension"]
    windows = [ov.Model([node.input_value(10)], [], "window") for node in nodes]
    return [int(core().compile_model(window, "CPU")({})[0]) for window in windows]


@pytest.mark.slow
def test_paged_attention_has_the_sliding_windows(tmp_path: Path) -> None:
    """It takes no masks: it finds windows, of 8 tokens here, in the graph."""
    _, folder = export(make_model("gemma3"), tmp_path)
    assert sliding_windows(folder) == [8, 0]


@pytest.mark.slow  # an export each
@pytest.mark.parametrize("family", ["mistral", "gemma3", "qwen2", "phi3", "gemma2"])
def test_genai_has_the_sliding_windows(family: str, tmp_path: Path) -> None:
    check_genai(*export(make_model(family), tmp_path))


@pytest.mark.slow  # an export each
@pytest.mark.parametrize("kind", KINDS)
def test_genai_generates_the_tokens_of_torch(kind: str, tmp_path: Path) -> None:
    check_genai(*export(make(kind), tmp_path))
