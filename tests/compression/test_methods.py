"""The registry of methods: names, combinations, and methods that other packages add."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nybble.compression import methods
from nybble.compression.awq import AWQ
from nybble.compression.base import ScaleMethod
from nybble.compression.blockwise import BlockwiseReconstruction
from nybble.compression.checks import check_model
from nybble.compression.gptq import GPTQ
from nybble.compression.methods import METHODS, automatic_method, combine, needs_calibration, parse_method
from nybble.compression.pipeline import compress
from nybble.compression.rtn import MinMaxScales, RoundToNearest
from nybble.compression.scale_estimation import ScaleEstimation
from nybble.errors import ModelError, OptionError
from nybble.models.selection import select_layers
from nybble.quant.grid import min_max_qparams
from nybble.quant.scheme import QuantScheme
from tests.helpers.causal_types import tiny_model
from tests.helpers.compression import IDS, ShrunkRange, break_chain
from tests.helpers.dense import make_dense
from tests.helpers.tiny import make_model

SCHEME = QuantScheme(group_size=32)
PACKAGE = """
from nybble.compression.base import ScaleMethod
from nybble.quant.grid import min_max_qparams

class HalvedRange(ScaleMethod):
    needs_calibration = False

    def search(self, weight_OI, importance_I, scheme):
        return min_max_qparams(0.5 * weight_OI, scheme)
"""


@pytest.fixture
def shrunk() -> Iterator[str]:
    """The name of a toy method, registered for one test."""
    METHODS.register("shrunk", ShrunkRange)
    yield "shrunk"
    METHODS.unregister("shrunk")


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("rtn", ()),
        ("se", ("se",)),
        ("awq+se", ("awq", "se")),
        ("awq+se+gptq+blockwise", ("awq", "se", "gptq", "blockwise")),
    ],
)
def test_names_are_joined_by_plus_in_the_order_of_the_stages(text: str, names: tuple[str, ...]) -> None:
    assert parse_method(text) == names


@pytest.mark.parametrize("text", ["", "gptq+awq", "se+se", "awq+best", "rtn+se", "se+", "auto"])
def test_any_other_text_is_an_error_that_lists_the_methods(text: str) -> None:
    with pytest.raises(OptionError) as error:
        parse_method(text, "--init")
    assert str(error.value) == (
        "--init must be auto, rtn, or one or more of awq, se, gptq, blockwise in this order, joined by +; "
        f"got {text}; awq+se+gptq, for example"
    )


def test_rtn_fills_the_stages_that_a_combination_leaves_empty() -> None:
    rtn, full = combine(()), combine(("awq", "se", "gptq", "blockwise"))
    assert (rtn.folding, rtn.refinement) == ((), ())
    assert isinstance(rtn.scales, MinMaxScales)
    assert isinstance(rtn.rounding, RoundToNearest)
    assert [type(method) for method in full.folding] == [AWQ]
    assert isinstance(full.scales, ScaleEstimation)
    assert isinstance(full.rounding, GPTQ)
    assert [type(method) for method in full.refinement] == [BlockwiseReconstruction]


def test_folding_and_refinement_always_get_text() -> None:
    class Careless(AWQ):
        needs_calibration = False

    class CarelessToo(BlockwiseReconstruction):
        needs_calibration = False

    assert replace(combine(()), folding=(Careless(),)).needs_calibration
    assert replace(combine(()), refinement=(CarelessToo(),)).needs_calibration


def test_every_method_but_rtn_needs_text() -> None:
    assert not needs_calibration(())
    assert all(needs_calibration((name,)) for name in ("awq", "se", "gptq", "blockwise"))


@pytest.mark.parametrize(
    ("folds", "trains_scales", "expected"),
    [
        (True, True, "awq+se+blockwise"),
        (True, False, "awq+se+gptq"),
        (False, True, "se+blockwise"),
        (False, False, "se+gptq"),
    ],
)
def test_the_automatic_method_depends_on_training_and_on_what_awq_finds(
    folds: bool, trains_scales: bool, expected: str
) -> None:
    model = make_dense("gpt_neo")
    names = [name for name in select_layers(model).linears if folds or name.endswith("c_proj")]  # behind a GELU
    assert automatic_method(model, names, trains_scales) == expected
    assert "+".join(parse_method(expected)) == expected


@pytest.mark.parametrize("trains_scales", [False, True])
def test_the_automatic_method_of_blocks_that_are_no_chain_is_rtn(
    trains_scales: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_model("llama")
    break_chain(model)
    with caplog.at_level("WARNING", "nybble"):
        assert automatic_method(model, select_layers(model).linears, trains_scales) == "rtn"
    (record,) = caplog.records
    assert record.getMessage() == (
        "--method auto is rtn: the decoder blocks of llama are no chain, which all other methods need"
    )


def test_the_automatic_method_sees_a_model_that_changes_its_weights() -> None:
    model = tiny_model("rwkv")
    with pytest.raises(ModelError, match="RwkvForCausalLM must leave its weights as they are when it computes"):
        automatic_method(model, select_layers(model).linears)


def test_numbers_that_are_not_finite_are_no_reason_for_another_method() -> None:
    model = make_model("llama")
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(ModelError, match="must be finite"):
        automatic_method(model, select_layers(model).linears)


def test_a_registered_method_compresses_a_model(shrunk: str) -> None:
    model = make_model("llama")
    names = select_layers(model).linears
    check_model(model, names, IDS[:2], parse_method(shrunk))
    weights = {name: model.get_submodule(name).weight.clone() for name in names}
    result = compress(model, dict.fromkeys(names, SCHEME), shrunk)
    for name, init in result.inits.items():
        scale, zero_point = min_max_qparams(0.9 * weights[name], SCHEME)
        assert torch.equal(init.weight_OI, weights[name])
        assert torch.equal(init.scale_OG, scale)
        assert torch.equal(init.zero_point_OG, zero_point)
        assert result.errors[name].clipped > 0


def test_a_registered_method_takes_part_in_combinations(shrunk: str) -> None:
    assert parse_method("awq+shrunk+gptq") == ("awq", "shrunk", "gptq")
    combination = combine(("shrunk", "gptq"))
    assert isinstance(combination.scales, ShrunkRange)
    assert isinstance(combination.rounding, GPTQ)
    assert not needs_calibration(("shrunk",))
    assert needs_calibration(("shrunk", "gptq"))
    with pytest.raises(
        OptionError, match="awq, se, shrunk, gptq, blockwise in this order, joined by .*got gptq.shrunk"
    ):
        parse_method("gptq+shrunk")
    with pytest.raises(
        OptionError, match="--method must have at most one method at the stage SCALE; got se, shrunk; keep one"
    ):
        parse_method("se+shrunk")


def test_a_method_from_an_installed_package_is_found_through_its_entry_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "other_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[nybble.methods]\nhalved = other_package_methods:HalvedRange\n")
    (tmp_path / "other_package_methods.py").write_text(PACKAGE)
    with pytest.raises(OptionError, match="got halved"):
        parse_method("halved")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(METHODS, "_entry_points", None)  # a new process would look them up anew
    monkeypatch.setattr(METHODS, "_known", dict(METHODS._known))
    assert parse_method("awq+halved") == ("awq", "halved")
    model = make_model("llama")
    weight = model.model.layers[0].mlp.up_proj.weight.clone()
    result = compress(model, dict.fromkeys(["model.layers.0.mlp.up_proj"], SCHEME), "halved")
    expected, _ = min_max_qparams(0.5 * weight, SCHEME)
    assert torch.equal(result.inits["model.layers.0.mlp.up_proj"].scale_OG, expected)


def test_an_object_that_is_no_method_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(METHODS, "_known", METHODS._known | {"strange": dict})
    with pytest.raises(
        OptionError, match=r"the compression method strange must be a subclass of a stage in nybble\.compression\.base"
    ):
        combine(("strange",))


def test_a_name_that_is_taken_is_refused() -> None:
    with pytest.raises(ValueError, match="compression method se is registered already"):
        METHODS.register("se", ShrunkRange)


def test_the_example_in_the_contract_works(monkeypatch: pytest.MonkeyPatch) -> None:
    from nybble.compression import base

    lines = (base.__doc__ or "").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("    class ShrunkRange"))
    code = "\n".join(line[4:] for line in lines[start:])
    monkeypatch.setattr(METHODS, "_known", dict(METHODS._known))
    exec(code, {"METHODS": METHODS, "ScaleMethod": ScaleMethod, "min_max_qparams": min_max_qparams})
    assert parse_method("awq+shrunk+gptq") == ("awq", "shrunk", "gptq")
    weight = torch.randn(4, 64)
    scale, _ = methods.combine(("shrunk",)).scales.search(weight, torch.ones(64), SCHEME)
    assert torch.equal(scale, min_max_qparams(0.9 * weight, SCHEME)[0])
