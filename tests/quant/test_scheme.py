"""QuantScheme and the check of the group size."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble.errors import OptionError
from nybble.quant.scheme import INT8_PER_ROW, QuantScheme, check_scheme, fallback_group_size


def test_codes_of_a_scheme() -> None:
    assert (QuantScheme(bits=4).max_code, QuantScheme(bits=4).middle_code) == (15, 8)
    assert (INT8_PER_ROW.max_code, INT8_PER_ROW.middle_code) == (255, 128)


@pytest.mark.parametrize(
    ("scheme", "text"),
    [
        (QuantScheme(), "uint4 asymmetric group 64"),
        (QuantScheme(symmetric=True, group_size=32), "uint4 symmetric group 32"),
        (INT8_PER_ROW, "uint8 symmetric per row"),
    ],
)
def test_str_names_bits_symmetry_and_groups(scheme: QuantScheme, text: str) -> None:
    assert str(scheme) == text


@settings(max_examples=50, deadline=None)
@given(num_groups=st.integers(1, 50).map(lambda half: 2 * half), group_size=st.integers(1, 256))
def test_a_divisor_is_accepted_and_gives_the_number_of_groups(num_groups: int, group_size: int) -> None:
    check_scheme("layer", num_groups * group_size, QuantScheme(group_size=group_size))
    assert QuantScheme(group_size=group_size).num_groups(num_groups * group_size) == num_groups
    assert QuantScheme(group_size=None).num_groups(num_groups * group_size) == 1


@settings(max_examples=50, deadline=None)
@given(in_features=st.integers(1, 10_000).map(lambda half: 2 * half), group_size=st.integers(1, 300))
def test_every_suggested_group_size_is_accepted(in_features: int, group_size: int) -> None:
    if in_features % group_size == 0:
        check_scheme("layer", in_features, QuantScheme(group_size=group_size))
        return
    with pytest.raises(OptionError, match=f"got group_size={group_size}; choose ") as error:
        check_scheme("layer", in_features, QuantScheme(group_size=group_size))
    suggested = [int(size) for size in re.findall(r"\d+", str(error.value).split("choose")[1])]
    assert suggested
    assert all(size % 2 == 0 for size in suggested), "OpenVINO takes no odd groups"
    for size in suggested:
        check_scheme("layer", in_features, QuantScheme(group_size=size))


@pytest.mark.parametrize(
    ("in_features", "group_size", "choices"),
    [
        (576, 128, "16, 32, 64"),  # common sizes, where one of them divides
        (192, 80, "16, 32, 64"),
        (100, 48, "4, 10, 20, 50, 100"),  # else the five largest even divisors
        (4872, 64, "84, 116, 168, 174, 232"),
    ],
)
def test_error_names_the_layer_and_the_choices(in_features: int, group_size: int, choices: str) -> None:
    with pytest.raises(OptionError) as error:
        check_scheme("model.layers.0.mlp.up_proj", in_features, QuantScheme(group_size=group_size))
    assert str(error.value) == (
        "in_features must be a multiple of group_size: layer model.layers.0.mlp.up_proj has "
        f"in_features={in_features}, got group_size={group_size}; choose {choices}, or remove --strict_group_size"
    )


@pytest.mark.parametrize(("bits", "width", "unit"), [(4, 63, 2), (2, 66, 4), (3, 100, 8)])
def test_rows_whose_codes_do_not_fill_bytes_are_refused(bits: int, width: int, unit: int) -> None:
    message = (
        f"must be a multiple of {unit}, as {unit} codes of {bits} bits fill whole bytes: layer up has .*={width}; "
    )
    with pytest.raises(OptionError, match=message):
        check_scheme("up", width, QuantScheme(bits, None))


@pytest.mark.parametrize(
    ("in_features", "group_size", "expected"),
    [
        (576, 128, 64),  # a power of two, though 96 divides as well: runtimes have kernels for powers of two
        (1536, 1024, 512),
        (4872, 64, 56),  # no power of two from 16 on; a multiple of 8
        (80, 64, 16),
        (100, 64, None),
        (4, 64, None),
        (24, 7, None),
    ],
)
def test_a_group_size_that_does_not_divide_falls_back(in_features: int, group_size: int, expected: int | None) -> None:
    assert fallback_group_size(in_features, group_size) == expected


@settings(max_examples=50, deadline=None)
@given(eighth=st.integers(1, 2000), group_size=st.integers(8, 300))
def test_a_fallback_divides_and_is_no_larger(eighth: int, group_size: int) -> None:
    size = fallback_group_size(8 * eighth, group_size)
    assert size is not None
    assert size <= group_size
    assert 8 * eighth % size == 0
