"""What awq finds in each dense decoder of transformers, and in blocks with experts, clamps and second readers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nybble.compression import awq_mappings
from nybble.compression.awq_mappings import AWQMapping, find_mappings, has_mapping
from nybble.compression.block_trial import BlockTrial
from nybble.errors import ModelError
from nybble.models.selection import select_layers
from tests.helpers.blocks import Chained, Experts
from tests.helpers.compression import break_chain
from tests.helpers.dense import DENSE_CASES, make_dense
from tests.helpers.tiny import make_model

ATTENTION = "input_layernorm -> self_attn.q_proj self_attn.k_proj self_attn.v_proj"
VALUES = "self_attn.v_proj -> self_attn.o_proj"
GATED = "mlp.up_proj -> mlp.down_proj"
LLAMA = (ATTENTION, VALUES, "post_attention_layernorm -> mlp.gate_proj mlp.up_proj", GATED)
GEMMA = tuple(line.replace("layernorm ->", "layernorm+1 ->") for line in LLAMA)
GEMMA2 = tuple(line.replace("post_attention", "pre_feedforward") for line in GEMMA)
COHERE = (f"{ATTENTION} mlp.gate_proj mlp.up_proj", VALUES, GATED)
GLM = (
    ATTENTION, VALUES, "post_attention_layernorm -> mlp.gate_up_proj", "mlp.gate_up_proj -> mlp.down_proj",
)  # fmt: skip
POST_NORM = (VALUES, GATED)
NEOX = (
    "input_layernorm -> attention.query_key_value", "attention.query_key_value -> attention.dense",
    "post_attention_layernorm -> mlp.dense_h_to_4h",
)  # fmt: skip

EXPECTED: dict[str, tuple[str, ...]] = {
    "apertus": (
        "attention_layernorm -> self_attn.q_proj self_attn.k_proj self_attn.v_proj", VALUES,
        "feedforward_layernorm -> mlp.up_proj",
    ),
    "arcee": (ATTENTION, VALUES, "post_attention_layernorm -> mlp.up_proj"),
    "bitnet": (
        ATTENTION, "self_attn.attn_sub_norm -> self_attn.o_proj", LLAMA[2], "mlp.ffn_sub_norm -> mlp.down_proj",
    ),
    "bloom": tuple(line.replace("attention.", "self_attention.") for line in NEOX),
    "codegen": ("ln_1 -> attn.qkv_proj mlp.fc_in", "attn.qkv_proj -> attn.out_proj"),
    "cohere": COHERE,
    "cohere2": COHERE,
    "ernie4_5": LLAMA,
    "exaone4": POST_NORM,
    "falcon": (
        "input_layernorm -> self_attention.query_key_value mlp.dense_h_to_4h",
        "self_attention.query_key_value -> self_attention.dense",
    ),
    "falcon-40b": (
        "ln_attn -> self_attention.query_key_value", "self_attention.query_key_value -> self_attention.dense",
        "ln_mlp -> mlp.dense_h_to_4h",
    ),
    "gemma": GEMMA,
    "gemma2": GEMMA2,
    "gemma3": GEMMA2,
    "glm": GLM,
    "glm4": GLM,
    "gpt_bigcode": ("ln_1 -> attn.c_attn", "attn.c_attn -> attn.c_proj", "ln_2 -> mlp.c_fc"),
    "gpt_neo": (
        "ln_1 -> attn.attention.q_proj attn.attention.k_proj attn.attention.v_proj",
        "attn.attention.v_proj -> attn.attention.out_proj", "ln_2 -> mlp.c_fc",
    ),
    "gpt_neox": NEOX,
    "gptj": ("ln_1 -> attn.q_proj attn.k_proj attn.v_proj mlp.fc_in", "attn.v_proj -> attn.out_proj"),
    "granite": LLAMA,
    "helium": LLAMA,
    "llama": LLAMA,
    "mistral": LLAMA,
    "mpt": ("norm_1 -> attn.Wqkv", "attn.Wqkv -> attn.out_proj", "norm_2 -> ffn.up_proj"),
    "nemotron": (*GEMMA[:2], "post_attention_layernorm+1 -> mlp.up_proj"),
    "olmo": POST_NORM,  # its norms have no weights
    "olmo2": POST_NORM,
    "olmo3": POST_NORM,
    "opt": (
        "self_attn_layer_norm -> self_attn.q_proj self_attn.k_proj self_attn.v_proj",
        "self_attn.v_proj -> self_attn.out_proj", "final_layer_norm -> fc1", "fc1 -> fc2",  # through a ReLU
    ),
    "persimmon": (
        "input_layernorm -> self_attn.query_key_value", "self_attn.query_key_value -> self_attn.dense",
        "post_attention_layernorm -> mlp.dense_h_to_4h",
    ),
    "phi": (f"{ATTENTION} mlp.fc1", "self_attn.v_proj -> self_attn.dense"),
    "phi3": ("input_layernorm -> self_attn.qkv_proj", "self_attn.qkv_proj -> self_attn.o_proj", *GLM[2:]),
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "seed_oss": LLAMA,
    "smollm3": LLAMA,
    "stablelm": LLAMA,
    "stablelm-parallel": COHERE,
    "starcoder2": (ATTENTION, VALUES, "post_attention_layernorm -> mlp.c_fc"),
    "vaultgemma": GEMMA2,
}  # fmt: skip


def written(mapping: AWQMapping) -> str:
    """A mapping as one line; readers that stay in 16 bits stand in brackets. The order of layers has no meaning."""
    offset = f"+{mapping.norm_offset:g}" if mapping.norm_offset else ""
    followers = [f"({name})" for name in mapping.followers]
    return f"{mapping.source}{offset} -> {' '.join([*mapping.layers, *followers])}"


def in_order(line: str) -> tuple[str, list[str]]:
    source, _, layers = line.partition(" -> ")
    return source, sorted(layers.split())


@pytest.mark.parametrize("name", DENSE_CASES)
def test_mappings_of_dense_decoders(name: str) -> None:
    model = make_dense(name)
    weights = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    found = find_mappings(model, select_layers(model).linears)
    assert len(found) == 2
    for mappings in found.values():
        assert [in_order(written(mapping)) for mapping in mappings] == [in_order(line) for line in EXPECTED[name]]
    assert all(torch.equal(weights[key], tensor) for key, tensor in model.state_dict().items())
    assert has_mapping(model, select_layers(model).linears)


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3"])
def test_a_16_bit_model_gives_the_same_mappings(family: str) -> None:
    names = select_layers(make_model(family)).linears
    lines = [
        [written(mapping) for mapping in find_mappings(make_model(family, dtype=dtype), names)["model.layers.0"]]
        for dtype in (torch.float32, torch.bfloat16)
    ]
    assert lines[0] == lines[1]
    assert len(lines[0]) == 4


def channels(name: str, source: str, readers: tuple[str, ...]) -> list[int]:
    """Channel of the source for each input of the readers, in the first block."""
    model = make_dense(name)
    mappings = next(iter(find_mappings(model, select_layers(model).linears).values()))
    return next(m.channel_I.tolist() for m in mappings if m.source.endswith(source) and set(readers) == set(m.layers))


@pytest.mark.parametrize(
    ("name", "source", "reader", "expected"),
    [
        ("llama", "v_proj", "self_attn.o_proj", torch.arange(32).view(2, 1, 16).expand(2, 2, 16)),
        ("phi3", "qkv_proj", "self_attn.o_proj", 96 + torch.arange(32).view(2, 1, 16).expand(2, 2, 16)),
        ("phi3", "gate_up_proj", "mlp.down_proj", 128 + torch.arange(128)),
        ("gpt_neox", "query_key_value", "attention.dense", torch.arange(192).view(4, 3, 16)[:, 2]),
        ("falcon", "query_key_value", "self_attention.dense", 80 + torch.arange(16).expand(4, 16)),
        (
            "falcon-40b", "query_key_value", "self_attention.dense",
            torch.arange(128).view(2, 4, 16)[:, 3:].expand(2, 2, 16),
        ),
    ],
)  # fmt: skip
def test_channels_that_each_input_comes_from(name: str, source: str, reader: str, expected: Tensor) -> None:
    assert channels(name, source, (reader,)) == expected.flatten().tolist()


def mappings_of(block: nn.Module, layers: tuple[str, ...]) -> list[str]:
    trial = BlockTrial(block, ((), {}), torch.zeros(1, 32, 16))
    return [written(mapping) for mapping in awq_mappings._Finder(trial, layers).find()]


def linear(inputs: int = 16, outputs: int = 16) -> nn.Linear:
    return nn.Linear(inputs, outputs)


def mlp(activation: Callable[[Tensor], Tensor]) -> Callable[[Chained, Tensor], Tensor]:
    return lambda block, x: block.down(activation(block.up(x)))


@pytest.mark.parametrize(
    ("activation", "found"),
    [
        (torch.relu, True),
        (lambda x: F.leaky_relu(x, 0.1), True),
        (F.gelu, False),
        (lambda x: torch.relu(x).square(), False),  # homogeneous, but of degree 2
        (lambda x: x.clamp(-40, 40), False),  # linear for small numbers only
        (lambda x: F.rms_norm(x, (16,)), False),
        (lambda x: x + 1, False),
        (lambda x: x.cumsum(-1), False),
    ],
)
def test_an_activation_between_two_layers(activation: Callable[[Tensor], Tensor], found: bool) -> None:
    block = Chained(mlp(activation), up=linear(), down=linear())
    expected = ["norm -> up"] + (["up -> down"] if found else [])
    assert mappings_of(block, ("up", "down")) == expected


def test_a_second_reader_follows_where_it_is_a_layer_and_rules_the_mapping_out_where_not() -> None:
    gated = Chained(lambda block, x: block.up(x) * torch.sigmoid(block.gate(x)), up=linear(), gate=linear(16, 1))
    assert mappings_of(gated, ("up",)) == ["norm -> up (gate)"]
    assert mappings_of(gated, ("up", "gate")) == ["norm -> up gate"]
    direct = Chained(lambda block, x: block.up(x) * torch.sigmoid(x), up=linear())
    assert mappings_of(direct, ("up",)) == []
    reused = Chained(lambda block, x: block.up(x) + block.down(x), up=linear(), down=linear())
    assert mappings_of(reused, ("up",)) == ["norm -> up (down)"]


def test_of_two_sources_the_later_one_is_taken() -> None:
    block = Chained(lambda block, x: block.out(block.late(block.early(x))), early=linear(), late=nn.RMSNorm(16),
                    out=linear())  # fmt: skip
    assert mappings_of(block, ("early", "out")) == ["norm -> early", "late -> out"]
    product = Chained(lambda block, x: block.out(block.early(x) * block.late(x)), early=linear(), late=linear(),
                      out=linear())  # fmt: skip
    assert mappings_of(product, ("early", "late", "out")) == ["norm -> early late", "late -> out"]


def test_experts_read_rows_of_the_norm_and_the_router_follows() -> None:
    layers = tuple(f"mlp.experts.{i}.{name}" for i in range(4) for name in ("gate_up", "down"))
    block = Chained(lambda block, x: block.mlp(x), mlp=Experts(4, reached=3))
    norm, *pairs = mappings_of(block, layers)
    gate_up = [f"mlp.experts.{i}.gate_up" for i in range(4)]
    assert in_order(norm) == ("norm", sorted([*gate_up, "(mlp.gate)"]))
    assert sorted(pairs) == [f"mlp.experts.{i}.gate_up -> mlp.experts.{i}.down" for i in range(4)]


class Sharing(nn.Module):
    """A block that leaves its values to later blocks, which no mapping may change."""

    def __init__(self) -> None:
        super().__init__()
        self.values, self.out = linear(), linear()

    def forward(self, hidden: Tensor, shared: dict[str, Tensor]) -> Tensor:
        shared["values"] = self.values(hidden)
        return hidden + self.out(shared["values"])


def test_what_later_blocks_may_read_is_an_output_too() -> None:
    trial = BlockTrial(Sharing(), ((), {"shared": {}}), torch.zeros(1, 32, 16))
    assert awq_mappings._Finder(trial, ("values", "out")).find() == ()
    alone = Chained(lambda block, x: block.out(block.values(x)), values=linear(), out=linear())
    assert mappings_of(alone, ("values", "out")) == ["norm -> values", "values -> out"]


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """One item for each run of a block."""
    runs: list[object] = []
    run = BlockTrial.run
    monkeypatch.setattr(BlockTrial, "run", lambda *args, **rest: runs.append(args) or run(*args, **rest))
    return runs


@pytest.mark.parametrize(("name", "most"), [("llama", 25), ("gpt_neox", 90)])  # gpt_neox: 12 parts of 64 channels
def test_a_block_runs_a_few_times(name: str, most: int, runs: list[object]) -> None:
    model = make_dense(name, hidden_size=256)
    assert find_mappings(model, select_layers(model).linears)
    assert len(runs) <= most


def test_a_wide_source_that_nothing_reads_linearly_is_given_up_after_its_last_part(runs: list[object]) -> None:
    block = Chained(
        lambda block, x: block.down(F.gelu(block.up(x)).unflatten(-1, (2, 256)).sum(-2)),
        up=linear(16, 512),
        down=linear(256, 16),
    )
    assert mappings_of(block, ("up", "down")) == ["norm -> up"]
    assert len(runs) <= 75


def test_layers_of_a_sequence_are_not_alike() -> None:
    block = Chained(lambda block, x: block.mlp(x), mlp=nn.Sequential(linear(), nn.ReLU(), linear()))
    assert mappings_of(block, ("mlp.0", "mlp.2")) == ["norm -> mlp.0", "mlp.0 -> mlp.2"]


def test_blocks_whose_code_fails_in_float32_are_an_error() -> None:
    def refuse(module: nn.Module, args: Any) -> None:
        if args[0].dtype == torch.float32:
            raise RuntimeError("no kernel for float32")

    model = make_model("llama", dtype=torch.bfloat16)
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(refuse)
    message = (
        r"awq needs decoder blocks that run in float32 with other weights; those of llama do not \(.*no kernel for "
        r"float32\); use a method without awq, for example se\+gptq"
    )
    for find in (find_mappings, has_mapping):
        with pytest.raises(ModelError, match=message):
            find(model, select_layers(model).linears)


def test_a_model_whose_blocks_are_no_chain_is_an_error() -> None:
    model = make_dense("llama")
    break_chain(model)
    with pytest.raises(ModelError, match="must be a chain"):
        find_mappings(model, select_layers(model).linears)
