"""Which scheme each layer gets: patterns, fallbacks, --target npu, and what is refused."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from nybble.errors import OptionError
from nybble.models.schemes import assign_schemes, average_bits, check_patterns, describe, num_scales, weight_shapes
from nybble.models.selection import LayerSelection, select_layers
from nybble.options.scheme import SchemeOptions
from nybble.quant.grid import min_max_qparams, quantize
from nybble.quant.scheme import INT8_PER_ROW, QuantScheme
from nybble.quant.weight import QuantizedWeight
from tests.helpers.tiny import make_model

DEFAULT = QuantScheme(4, 64)


def assigned(model: Any, **options: Any) -> LayerSelection:
    given = SchemeOptions(**options)
    given.check()
    check_patterns(select_layers(model), model, given)
    return assign_schemes(select_layers(model), model, given)


def test_without_options_linear_layers_have_4_bits_and_embeddings_8() -> None:
    model = make_model("llama")
    selection = assigned(model)
    assert {selection.schemes[name] for name in selection.linears} == {DEFAULT}
    assert {selection.schemes[name] for name in selection.embeddings} == {INT8_PER_ROW}
    assert replace(selection, schemes={}) == select_layers(model)
    assert list(selection.schemes) == [*selection.linears, *selection.embeddings]


@pytest.mark.parametrize(
    ("options", "scheme"),
    [
        ({"bits": 3, "group_size": 32, "symmetric": True}, QuantScheme(3, 32, symmetric=True)),
        ({"bits": 2, "group_size": -1}, QuantScheme(2, None)),
        ({"bits": 8}, QuantScheme(8, 64, symmetric=True)),  # 8 bits are symmetric
        ({"target": "npu", "group_size": -1}, QuantScheme(4, None, symmetric=True)),
    ],
)
def test_options_give_the_scheme_of_linear_layers(options: dict[str, Any], scheme: QuantScheme) -> None:
    selection = assigned(make_model("llama"), **options)
    assert {selection.schemes[name] for name in selection.linears} == {scheme}
    assert {selection.schemes[name] for name in selection.embeddings} == {INT8_PER_ROW}


def test_the_last_pattern_that_matches_wins() -> None:
    rules = ("*.mlp.*:bits=3", "*.layers.1.mlp.down_proj:group_size=32,symmetric=true", "*.q_proj:bits=8")
    schemes = assigned(make_model("llama"), layer=rules).schemes
    assert schemes["model.layers.0.mlp.down_proj"] == QuantScheme(3, 64)
    assert schemes["model.layers.1.mlp.down_proj"] == QuantScheme(4, 32, symmetric=True)
    assert schemes["model.layers.1.self_attn.q_proj"] == QuantScheme(8, 64, symmetric=True)
    assert schemes["model.layers.1.self_attn.k_proj"] == DEFAULT
    assert schemes["lm_head"] == INT8_PER_ROW


@pytest.mark.parametrize(
    ("rule", "options", "scheme"),
    [
        ("lm_head:bits=4", {}, DEFAULT),  # one scale for a whole row of 4-bit codes would be too coarse
        ("lm_head:bits=4", {"bits": 8, "group_size": 32}, QuantScheme(4, 32)),
        ("lm_head:bits=4,group_size=-1,symmetric=true", {}, QuantScheme(4, None, symmetric=True)),
        ("lm_head:group_size=32", {}, QuantScheme(8, 32, symmetric=True)),
        ("lm_head:bits=8", {"bits": 3}, INT8_PER_ROW),
    ],
)
def test_the_head_has_a_scheme_by_pattern(rule: str, options: dict[str, Any], scheme: QuantScheme) -> None:
    assert assigned(make_model("llama"), layer=(rule,), **options).schemes["lm_head"] == scheme


def test_a_tied_head_is_the_embedding() -> None:
    for name in ("lm_head", "model.embed_tokens"):
        assert assigned(make_model("smollm"), layer=(f"{name}:bits=4",)).schemes["model.embed_tokens"] == DEFAULT


def test_ignored_layers_stay_in_16_bits() -> None:
    selection = assigned(make_model("llama"), ignore=("*.gate_proj", "lm_head"))
    assert not any("gate_proj" in name for name in (*selection.linears, *selection.schemes))
    assert selection.embeddings == ("model.embed_tokens",)
    assert "model.layers.0.mlp.up_proj" in selection.linears
    assert selection.notes == ()


def test_rows_that_groups_do_not_divide_have_smaller_groups_and_it_is_said() -> None:
    """Widths of 80 (hidden) and 100 (feed-forward): groups of 16, and whole rows."""
    model = make_model("llama", hidden_size=80, intermediate_size=100)
    selection = assigned(model)
    assert selection.schemes["model.layers.0.mlp.up_proj"] == QuantScheme(4, 16)
    assert selection.schemes["model.layers.0.mlp.down_proj"] == QuantScheme(4, None)
    (note,) = selection.notes
    assert note.startswith("the group size does not divide the rows of 14 layers (model.layers.0.self_attn.q_proj, ")
    assert "rows of 80 weights: uint4 asymmetric group 16; 100 weights: uint4 asymmetric per row" in note
    with pytest.raises(OptionError, match="must be a multiple of group_size: layer .*q_proj has in_features=80"):
        assigned(model, strict_group_size=True)


def test_layers_whose_rows_are_too_narrow_stay_in_16_bits_and_it_is_said() -> None:
    model = make_model("llama")
    model.model.layers[0].mlp.down_proj = torch.nn.Linear(4, 64, bias=False)
    model.model.layers[1].mlp.down_proj = torch.nn.Linear(63, 64, bias=False)
    selection = assigned(model, group_size=32)
    names = ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]
    assert not set(names) & set(selection.schemes)
    assert selection.notes == (
        f"2 layers ({', '.join(names)}) cannot be quantized, as the rows are too narrow; they stay in 16 bits",
    )
    assert names[0] in assigned(model, group_size=2).schemes, "a group size that divides is taken"
    with pytest.raises(OptionError, match="must be a multiple of"):
        assigned(model, group_size=32, strict_group_size=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ignore": ("*.router",)}, "--ignore must match the name of a layer; *.router matches none of 16; names are "),
        ({"layer": ("model.layer.*:bits=3",)}, "--layer must match the name of a layer; model.layer.* matches none of"),
        ({"ignore": ("*proj",)}, "--ignore must leave a linear layer to quantize; it matches all; give fewer pat"),
        (
            {"target": "npu", "layer": ("*.up_proj:symmetric=false",)},
            "--target npu needs symmetric groups of 128 or whole rows; model.layers.0.mlp.up_proj has uint4 asymmetric",
        ),
        ({"target": "npu", "layer": ("lm_head:bits=4",)}, "needs uint8 symmetric per row; lm_head has uint4 symmetric"),
    ],
)
def test_what_matches_nothing_or_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError) as error:
        assigned(make_model("llama"), **options)
    assert message in str(error.value)


def test_an_npu_has_symmetric_groups_of_128_or_whole_rows() -> None:
    selection = assigned(make_model("llama", hidden_size=128, intermediate_size=192), target="npu")
    assert selection.schemes["model.layers.0.mlp.up_proj"] == QuantScheme(4, 128, symmetric=True)
    assert selection.schemes["model.layers.0.mlp.down_proj"] == QuantScheme(4, None, symmetric=True)
    assert len(selection.notes) == 1


def test_average_bits_and_scales_are_those_of_the_weights() -> None:
    model = make_model("llama")
    selection = assigned(model, bits=3, layer=("*.down_proj:bits=2,group_size=32,symmetric=true", "lm_head:bits=8"))
    shapes, weights = weight_shapes(model, selection), {}
    for name, scheme in selection.schemes.items():
        weight_OI = model.get_submodule(name).weight
        scale_OG, zero_point_OG = min_max_qparams(weight_OI, scheme)
        codes_OI = quantize(weight_OI, scale_OG, zero_point_OG, scheme)
        weights[name] = QuantizedWeight(codes_OI, scale_OG, zero_point_OG.byte(), scheme)
    count = sum(weight.codes_OI.numel() for weight in weights.values())
    expected = 8 * sum(weight.nbytes for weight in weights.values()) / count
    assert average_bits(selection.schemes, shapes) == pytest.approx(expected, rel=1e-6)
    assert num_scales(model, selection) == sum(weights[name].scale_OG.numel() for name in selection.linears)
    assert describe(selection) == (
        "12 linear layers uint3 asymmetric group 64, 2 linear layers uint2 symmetric group 32, "
        "model.embed_tokens uint8 symmetric per row, lm_head uint8 symmetric per row"
    )
