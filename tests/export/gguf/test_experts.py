"""Mixtures of experts: what other readers find in the file, the logits of llama.cpp, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nybble.errors import ExportError
from nybble.export.gguf import architectures
from nybble.export.gguf.exporter import GGUFExporter
from nybble.models.checkpoint import open_checkpoint
from nybble.models.linearize import linearize
from nybble.models.loading import LoadedModel
from nybble.models.quantized_model import save_quantized
from nybble.models.schemes import assign_schemes
from nybble.models.selection import LayerSelection, select_layers
from nybble.options.scheme import SchemeOptions
from nybble.quant.scheme import QuantScheme
from tests.helpers.checkpoints import save_checkpoint
from tests.helpers.mixtures import EXPERTS, make_config, make_mixture, model_type
from tests.helpers.rounding import round_model_to_nearest
from tests.helpers.tiny import make_tokenizer

pytestmark = pytest.mark.usefixtures("needs_llama_cpp")

EXPORTER = GGUFExporter()
DENSE = {"llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3"}
GRANITE = {
    "embedding_multiplier": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.5, "logits_scaling": 2.0,
    "attention_bias": True,
}  # fmt: skip
GLM = {"routed_scaling_factor": 2.5, "use_qk_norm": True, "attention_bias": True, "num_hidden_layers": 3}
# As it is published, for a shorter context.
GPT_OSS_ROPE = {
    "rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 64,
}  # fmt: skip
LATENT_YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 40.0, "mscale": 0.707, "mscale_all_dim": 0.707,
    "original_max_position_embeddings": 64,
}  # fmt: skip

# What llama.cpp computes of each family.
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "qwen2_moe": {},
    "qwen3_moe": {"mlp_only_layers": [], "norm_topk_prob": True},
    "olmoe": {"num_key_value_heads": 4},
    "granitemoe": GRANITE,
    "glm4_moe": GLM,
    "ernie4_5_moe": {"num_hidden_layers": 3},
    "gpt_oss": {"rope_parameters": GPT_OSS_ROPE},
    "deepseek_v2": {"topk_method": "greedy", "n_group": 1},
    "deepseek_v3": {"num_hidden_layers": 3},
}
FAST = {"mixtral", "gpt_oss"}

# Written out, to compare with the table of the package gguf.
NAMES = {
    "mlp.gate.weight": "ffn_gate_inp.weight", "mlp.router.weight": "ffn_gate_inp.weight",
    "mlp.router.bias": "ffn_gate_inp.bias", "block_sparse_moe.router.weight": "ffn_gate_inp.weight",
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    "mlp.gate.moe_statics.e_score_correction_bias": "exp_probs_b.bias",
    "mlp.shared_expert_gate.weight": "ffn_gate_inp_shexp.weight", "self_attn.sinks": "attn_sinks.weight",
}  # fmt: skip


def make_model(family: str, **changes: Any) -> Any:
    """A random model; its corrections of routing scores are random too."""
    model = make_mixture(family, **FAMILIES[family] | changes)
    for name, tensor in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            tensor.uniform_(-0.5, 0.5)
    return linearize(model)


def export(folder: Path, model: Any, scheme: QuantScheme | None = None) -> tuple[Any, Any]:
    """The checkpoint of a model, and what the exporter says of it; the file is in folder / "gguf"."""
    checkpoint = save_checkpoint(folder / "quantized", model, scheme)
    EXPORTER.check(checkpoint.config, checkpoint.selection)
    (folder / "gguf").mkdir()
    return checkpoint, EXPORTER.export(checkpoint, folder / "gguf")


def read_file(folder: Path) -> dict[str, Any]:
    """Name of a tensor -> its numbers, by the reader of the package gguf."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    tensors = GGUFReader(folder / "gguf" / "model.gguf").tensors
    return {tensor.name: dequantize(tensor.data, tensor.tensor_type) for tensor in tensors}


def numbers_of(checkpoint: Any) -> dict[str, np.ndarray]:
    """Name of a parameter in memory -> its numbers."""
    weights = {f"{name}.weight": weight.dequantize() for name, weight in checkpoint.quantized.items()}
    return {name: tensor.float().numpy() for name, tensor in (weights | dict(checkpoint.others.items())).items()}


def slow_stacks(parameters: dict[str, np.ndarray], interleaved: bool) -> dict[str, np.ndarray]:
    """Name of a stack in the file -> numbers, row by row."""
    stacks: dict[str, np.ndarray] = {}
    for parameter, numbers in parameters.items():
        if ".experts." not in parameter:
            continue
        _, _, layer, _, _, expert, leaf, kind = parameter.split(".")
        for row, values in enumerate(numbers):
            name, place = "ffn_down_exps", row
            if leaf == "gate_up_proj":
                half = len(numbers) // 2
                is_gate = row % 2 == 0 if interleaved else row < half
                name, place = ("ffn_gate_exps" if is_gate else "ffn_up_exps"), row // 2 if interleaved else row % half
            rows = len(numbers) // 2 if leaf == "gate_up_proj" else len(numbers)
            stack = stacks.setdefault(
                f"blk.{layer}.{name}.{kind}", np.full((EXPERTS, rows, *np.shape(values)), np.nan, np.float32)
            )
            stack[int(expert), place] = values
    return stacks


@pytest.mark.parametrize(
    "family", [family if family in FAST else pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES]
)
def test_a_family_is_exact_for_other_readers_and_computed_by_llama_cpp(family: str, tmp_path: Path) -> None:
    checkpoint, result = export(tmp_path, make_model(family))
    assert result.logit_difference is not None
    assert result.logit_difference <= 2e-5
    assert result.rounded == {}
    found, parameters = read_file(tmp_path), numbers_of(checkpoint)
    stacks = slow_stacks(parameters, interleaved=family == "gpt_oss")
    assert {name for name in found if "_exps." in name} == stacks.keys()
    for name, numbers in stacks.items():
        assert np.array_equal(found[name], numbers), name
    singles = [name for name in parameters if ".experts." not in name]
    split = [name for name in singles if name.endswith("kv_b_proj.weight")]
    assert len(found) == len(stacks) + len(singles) + len(split)
    for name in split:
        check_heads(parameters[name], found, name.split(".")[2], checkpoint.config)
    for parameter in singles:
        _, _, layer, inner = parameter.split(".", 3) if parameter.startswith("model.layers.") else ("", "", "", "")
        if inner in NAMES:
            assert np.array_equal(found[f"blk.{layer}.{NAMES[inner]}"], parameters[parameter]), parameter


def check_heads(numbers: np.ndarray, found: dict[str, np.ndarray], layer: str, config: Any) -> None:
    """Rows of the projection to keys and values, one by one: keys are columns of a matrix for each head."""
    keys, values, row = found[f"blk.{layer}.attn_k_b.weight"], found[f"blk.{layer}.attn_v_b.weight"], 0
    for head in range(config.num_attention_heads):
        for i in range(config.qk_nope_head_dim):
            assert np.array_equal(keys[head][:, i], numbers[row])
            row += 1
        for i in range(config.v_head_dim):
            assert np.array_equal(values[head][i], numbers[row])
            row += 1
    assert row == len(numbers)


def test_the_half_of_latent_attention_whose_rows_hold_no_groups_is_in_16_bits(tmp_path: Path) -> None:
    from gguf import GGUFReader

    checkpoint, _ = export(tmp_path, make_model("deepseek_v3"))
    kinds = {t.name: t.tensor_type.name for t in GGUFReader(tmp_path / "gguf" / "model.gguf").tensors}
    assert kinds["blk.0.attn_k_b.weight"] == "F16"
    assert kinds["blk.0.attn_v_b.weight"] == "Q4_1"
    codes = EXPORTER.read_codes(tmp_path / "gguf")
    assert checkpoint.quantized.keys() - codes.keys() == {f"model.layers.{i}.self_attn.kv_b_proj" for i in range(3)}


def test_rotary_angles_that_llama_cpp_rounds_are_said() -> None:
    config = make_mixture("gpt_oss", rope_parameters=GPT_OSS_ROPE | {"original_max_position_embeddings": 4096}).config
    config.head_dim = 64
    assert EXPORTER.limits(config) == (
        "llama.cpp rounds the ends of the ramp of yarn to whole dimensions, and this model does not (truncate False): "
        "in the GGUF export, rotary angles differ by up to 0.22 radians after 1000 tokens",
    )
    config.rope_parameters["truncate"] = True
    assert EXPORTER.limits(config) == ()


def test_the_tested_families_are_those_of_these_tests() -> None:
    assert EXPORTER.tested_families == DENSE | {model_type(family) for family in FAMILIES}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "changes", "scheme", "kind"),
    [
        ("qwen3_moe", {}, QuantScheme(4, 32, symmetric=True), "Q4_0"),
        ("gpt_oss", {}, QuantScheme(8, 32, symmetric=True), "Q8_0"),
        ("glm4_moe", {"norm_topk_prob": False, "first_k_dense_replace": 2}, None, "Q4_1"),
        ("ernie4_5_moe", {"moe_num_shared_experts": 2, "moe_layer_start_index": 0}, None, "Q4_1"),
        ("deepseek_v2", {"q_lora_rank": None, "routed_scaling_factor": 2.0, "n_shared_experts": 2}, None, "Q4_1"),
        ("deepseek_v2", {"rope_parameters": LATENT_YARN, "norm_topk_prob": True}, None, "Q4_1"),
        ("deepseek_v3", {"rope_parameters": LATENT_YARN, "n_group": 1}, None, "Q4_1"),
        ("deepseek_v3", {"norm_topk_prob": False}, QuantScheme(8, 32, symmetric=True), "Q8_0"),
        ("qwen2_moe", {"num_experts": 12}, None, "Q4_1"),  # experts 10 and 11 stay behind expert 9
    ],
    ids=str,
)
def test_variants_of_families(
    family: str, changes: dict[str, Any], scheme: QuantScheme | None, kind: str, tmp_path: Path
) -> None:
    from gguf import GGUFReader

    _, result = export(tmp_path, make_model(family, **changes), scheme)
    assert result.logit_difference is not None
    assert result.logit_difference <= 2e-5
    tensors = GGUFReader(tmp_path / "gguf" / "model.gguf").tensors
    assert {tensor.tensor_type.name for tensor in tensors if tensor.name.endswith("exps.weight")} == {kind}


def export_mixed(folder: Path, options: SchemeOptions) -> Any:
    """Export a Qwen3 mixture with the schemes of some options."""
    model = make_model("qwen3_moe")
    selection = assign_schemes(select_layers(model), model, options)
    quantized = round_model_to_nearest(model, schemes=selection.schemes)
    save_quantized(folder / "quantized", LoadedModel(model, make_tokenizer(), "tiny"), quantized)
    checkpoint = open_checkpoint(folder / "quantized")
    EXPORTER.check(checkpoint.config, checkpoint.selection)
    (folder / "gguf").mkdir()
    return EXPORTER.export(checkpoint, folder / "gguf")


def test_experts_that_are_not_quantized_are_float32(tmp_path: Path) -> None:
    from gguf import GGUFReader

    result = export_mixed(tmp_path, SchemeOptions(group_size=32, ignore=("*.experts.*.down_proj",)))
    assert result.linear_weights == 16
    tensors = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "gguf" / "model.gguf").tensors}
    assert tensors["blk.1.ffn_down_exps.weight"].tensor_type.name == "F32"
    assert tensors["blk.1.ffn_up_exps.weight"].tensor_type.name == "Q4_1"


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"ignore": ("*.experts.3.down_proj",)}, "3 of 4 quantized in model.layers.0.mlp.experts.*.down_proj"),
        ({"layer": ("*.1.mlp.experts.2.gate_up_proj:bits=8",)}, "in model.layers.1.mlp.experts.*.gate_up_proj"),
    ],
)
def test_experts_of_a_layer_have_one_type_of_blocks(options: dict[str, Any], found: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="needs the same quantization for all experts of a layer; this m") as error:
        export_mixed(tmp_path, SchemeOptions(group_size=32, **options))
    assert found in str(error.value)
    assert str(error.value).endswith("; change --layer or --ignore, or remove gguf from --export")


def _other_field(key: str, value: Any) -> Callable[..., Any]:
    return lambda config: architectures.metadata(config) | {key: value}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        ("mixtral", "expert_used_count", 1),
        ("qwen2_moe", "expert_used_count", 3),
        ("granitemoe", "residual_scale", 1.0),
        ("granitemoe", "embedding_scale", 1.0),
        ("granitemoe", "attention.scale", 0.25),
        ("granitemoe", "logit_scale", 1.0),
        ("glm4_moe", "expert_weights_scale", 1.0),
        ("glm4_moe", "expert_weights_norm", False),
        ("glm4_moe", "expert_gating_func", 1),
        ("glm4_moe", "rope.dimension_count", 32),
        ("gpt_oss", "attention.sliding_window", 9),
        ("gpt_oss", "rope.scaling.factor", 31.0),
        ("deepseek_v3", "expert_group_count", 1),
        ("deepseek_v3", "expert_weights_scale", 1.0),
        ("deepseek_v3", "expert_weights_norm", False),
        ("deepseek_v2", "expert_gating_func", 2),
    ],
)
def test_the_comparison_of_logits_finds_faults(
    family: str, key: str, value: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nybble.export.gguf.exporter.metadata", _other_field(key, value))
    with pytest.raises(ExportError, match=r"gguf must give the logits of torch within"):
        export(tmp_path, make_model(family))


@pytest.mark.parametrize(
    ("family", "changes", "found"),
    [
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob False"),
        ("qwen2_moe", {"norm_topk_prob": True}, "norm_topk_prob True"),
        ("qwen2_moe", {"qkv_bias": False}, "qkv_bias False"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, "layers without experts where llama.cpp has experts"),
        ("qwen2_moe", {"decoder_sparse_step": 2}, "layers without experts where llama.cpp has experts"),
        ("ernie4_5_moe", {"moe_layer_interval": 2, "moe_layer_start_index": 0}, "layers without experts where"),
        ("ernie4_5_moe", {"moe_layer_end_index": 1}, "layers without experts where llama.cpp has experts"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv 8.0"),
        ("olmoe", {"num_key_value_heads": 2}, "2 heads of keys and values for 4 of queries"),
        ("glm4_moe", {"n_group": 2}, "n_group 2"),
        ("gpt_oss", {"swiglu_limit": 6.0}, "swiglu_limit 6.0"),
        ("gpt_oss", {"rope_parameters": GPT_OSS_ROPE | {"beta_fast": 16.0}}, "of the type yarn with beta_fast 16.0"),
        ("deepseek_v2", {"topk_method": "group_limited_greedy", "n_group": 2}, "by their best expert (n_group 2)"),
        ("deepseek_v2", {"num_hidden_layers": 27}, "q_lora_rank 32 in 27 layers"),
        ("deepseek_v3", {"rope_interleave": False}, "rope_interleave False"),
        ("deepseek_v3", {"rope_parameters": LATENT_YARN | {"mscale": 1.0}}, "of the type yarn with mscale 1.0"),
        ("deepseek_v3", {"rope_parameters": LATENT_YARN | {"mscale_all_dim": 0.0}}, "yarn with mscale 0.707"),
        ("mixtral", {"sliding_window": 8}, "a sliding window of 8 tokens"),
    ],
)  # fmt: skip
def test_check_refuses_what_llama_cpp_does_not_compute(family: str, changes: dict[str, Any], found: str) -> None:
    config = make_config(family, **FAMILIES[family] | changes)
    with pytest.raises(ExportError, match="needs a model whose parts llama.cpp computes") as error:
        EXPORTER.check(config, LayerSelection((), (), tied=False))
    assert found in str(error.value)
