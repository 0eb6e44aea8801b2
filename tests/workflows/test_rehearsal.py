"""The twin of a model, and that what it cannot do is said before the work."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

from nybble.cli.main import main
from nybble.errors import ExportError, ModelError
from nybble.models.experts import SplitExperts
from nybble.models.linearize import linearize
from nybble.models.loading import LoadedModel
from nybble.options.scheme import SchemeOptions
from nybble.workflows import rehearsal
from nybble.workflows.rehearsal import make_twin, rehearse
from tests.helpers import mixtures
from tests.helpers.cases import fast_cases, first_fast
from tests.helpers.causal_types import tiny_model
from tests.helpers.compress import compress_command
from tests.helpers.tiny import FAMILIES, FAST_FAMILIES, make_model, make_tokenizer, save_model

SCHEME = SchemeOptions(group_size=16)
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def loaded(family: str, **changes: Any) -> LoadedModel:
    return LoadedModel(make_model(family, **changes), make_tokenizer(), family)


@pytest.mark.parametrize("family", fast_cases(FAMILIES, [*FAST_FAMILIES, "gemma3"]))
def test_a_twin_has_the_class_and_the_types_of_layers(family: str) -> None:
    model = loaded(family, num_hidden_layers=6, **({"layer_types": None} if family == "gemma3" else {}))
    twin = make_twin(model, SCHEME)
    assert twin is not None
    assert type(twin.model) is type(model.model)
    types = getattr(model.model.config, "layer_types", None) or []
    assert set(getattr(twin.model.config, "layer_types", None) or []) == set(types)
    assert 2 <= len(twin.model.model.layers) <= 6
    assert model.model.config.num_hidden_layers == 6, "the model itself is not changed"


def test_a_twin_of_a_large_model_is_small() -> None:
    changes = {"hidden_size": 256, "intermediate_size": 4096, "vocab_size": 30_000, "num_hidden_layers": 8}
    large = loaded("llama", **changes)
    twin = make_twin(large, SCHEME)
    assert twin is not None
    counts = [sum(p.numel() for p in model.parameters()) for model in (large.model, twin.model)]
    assert counts[0] > 50 * counts[1]
    assert twin.model.config.hidden_size == 256, "rows keep their width"


@pytest.mark.parametrize("family", fast_cases(mixtures.FAMILIES, ["mixtral", "gpt_oss", "deepseek_v3", "nemotron_h"]))
def test_a_twin_of_a_mixture_has_few_experts_and_layers_of_both_kinds(family: str) -> None:
    changes = {key: 32 for key in EXPERT_COUNTS if key in mixtures.FAMILIES[family][1]}
    if "first_k_dense_replace" in mixtures.FAMILIES[family][1]:
        changes |= {"first_k_dense_replace": 3, "num_hidden_layers": 6}
    model = mixtures.make_mixture(family, **changes)
    linearize(model)
    twin = make_twin(LoadedModel(model, make_tokenizer(), family), SCHEME)
    assert twin is not None
    experts = [module for module in twin.model.modules() if isinstance(module, SplitExperts)]
    assert experts
    assert all(module.split_count <= 8 for module in experts)


def test_layers_up_to_the_last_type_are_kept() -> None:
    config = Qwen3NextConfig(
        vocab_size=260, hidden_size=64, intermediate_size=128, num_hidden_layers=12, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=16,
        linear_value_head_dim=16, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
    )  # fmt: skip
    twin = make_twin(LoadedModel(Qwen3NextForCausalLM(config), make_tokenizer(), "next"), SCHEME)
    assert twin is not None
    assert twin.model.config.layer_types == ["linear_attention"] * 3 + ["full_attention"]


@pytest.mark.parametrize("trains", [False, True])
def test_nothing_of_the_run_changes(trains: bool) -> None:
    model, state = loaded("llama"), torch.get_rng_state()
    before = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    rehearse(model, SCHEME, [], trains, False)
    assert torch.equal(torch.get_rng_state(), state)
    after = model.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())


@pytest.mark.parametrize("step", ["quantize_embeddings", "absorb_layers", "save_quantized"])
def test_a_step_that_the_architecture_does_not_allow_is_one_line(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise TypeError("no such\nlayer")

    monkeypatch.setattr(rehearsal, step, fail)
    with pytest.raises(ModelError, match=r"llama must be a model that can be .* \(TypeError: no such layer\); choose"):
        rehearse(loaded("llama"), SCHEME, [], True, False)


def test_a_model_without_a_twin_is_not_tried(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "nybble")
    model = loaded("llama")
    monkeypatch.setattr(type(model.model), "forward", lambda *_, **__: 1 / 0)
    rehearse(model, SCHEME, ["openvino"], True, False)
    assert "llama has no small twin; training and export are not tried beforehand" in caplog.text


def test_an_optional_format_that_cannot_hold_the_model_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    gpt2 = LoadedModel(linearize(tiny_model("gpt2")), make_tokenizer(), "gpt2")
    groups_of_32 = SchemeOptions(group_size=32)
    assert rehearse(gpt2, groups_of_32, ["hf", "vllm"], False, False, ["vllm"]) == ("hf",)
    assert "there is no export to vLLM: an export to vLLM needs nn.Linear layers" in caplog.text
    with pytest.raises(ExportError, match="GPT2LMHeadModel has Conv1D layers; remove vllm from --export"):
        rehearse(gpt2, groups_of_32, ["hf", "vllm"], False, False, ["hf"])


@pytest.mark.usefixtures("needs_openvino")
@pytest.mark.parametrize("command", first_fast(1, ["compress", "distill"]))
def test_what_cannot_be_exported_is_refused_before_the_work(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import openvino

    def fail(*_: Any, **__: Any) -> None:
        raise ExportError("no")

    monkeypatch.setattr(openvino, "convert_model", fail)
    given = compress_command(save_model(tmp_path / "model", "llama"), tmp_path / "run", "--export", "openvino")
    assert main([command, *given[1:]]) == 2
    assert "LlamaForCausalLM cannot be traced (ExportError: no)" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
