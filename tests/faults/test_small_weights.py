"""Weights below the scale grid: accuracy is not lost without a word."""

from pathlib import Path

import pytest
import torch

from nybble.compression.checks import check_model, warn_of_small_weights
from nybble.compression.pipeline import compress
from nybble.models.selection import select_layers
from nybble.options.commands import CompressOptions
from nybble.quant.grid import SCALE_MIN, below_grid, dequantize, min_max_qparams, quantize
from nybble.quant.scheme import INT8_PER_ROW, QuantScheme
from nybble.workflows.compress import compress as run_compress
from tests.helpers.compression import IDS
from tests.helpers.tiny import make_model, make_tokenizer

SCHEME = QuantScheme(group_size=16)
WARNING = "are too small for scales of at least 2^-14 and lose most of their accuracy"


def relative_error(weight_OI: torch.Tensor, scheme: QuantScheme) -> float:
    scale_OG, zero_point_OG = min_max_qparams(weight_OI, scheme)
    rounded_OI = dequantize(quantize(weight_OI, scale_OG, zero_point_OG, scheme), scale_OG, zero_point_OG)
    return float((rounded_OI - weight_OI).norm() / weight_OI.norm())


@pytest.mark.parametrize("scheme", [SCHEME, QuantScheme(group_size=16, symmetric=True), INT8_PER_ROW], ids=str)
def test_groups_are_counted_where_the_floor_costs_accuracy(scheme: QuantScheme) -> None:
    """The error of a 4-bit group about doubles at the limit, and grows as fast as the weights shrink below it."""
    unit_OI = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    unit_OI /= unit_OI.abs().amax(-1, keepdim=True)
    for size, small in ((1.0, False), (16 * SCALE_MIN, False), (SCALE_MIN, True), (1e-6, True), (1e-12, False)):
        assert bool(below_grid(size * unit_OI, scheme).float().mean() > 0.5) == small, size
    healthy = relative_error(unit_OI, QuantScheme(group_size=16))
    assert relative_error(16 * SCALE_MIN * unit_OI, scheme) < 2 * healthy
    assert relative_error(SCALE_MIN * unit_OI, scheme) > 3 * healthy


def test_zeros_and_rows_for_unused_tokens_do_not_count() -> None:
    assert not below_grid(torch.zeros(4, 16), SCHEME).any()
    assert not below_grid(torch.full((4, 16), 1e-23), SCHEME).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("leaf", ["mlp.up_proj", "self_attn.q_proj"])
def test_small_layers_are_named_once(leaf: str, dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    model = make_model("llama", dtype=dtype)
    for layer in model.model.layers:
        layer.get_submodule(leaf).weight.data.mul_(2.0**-15)
    compress(model, dict.fromkeys(select_layers(model).linears, SCHEME))
    said = [record.getMessage() for record in caplog.records if record.name == "nybble"]
    assert len(said) == 1
    rows = model.model.layers[0].get_submodule(leaf).weight.shape[0]
    assert (
        f"{2 * rows * 4} groups of weights in 2 layers (first: model.layers.0.{leaf}, model.layers.1.{leaf})" in said[0]
    )


def test_small_rows_of_a_layer_are_named(caplog: pytest.LogCaptureFixture) -> None:
    model = make_model("llama")
    model.model.layers[1].mlp.up_proj.weight.data[:4].mul_(1e-4)
    compress(model, dict.fromkeys(select_layers(model).linears, SCHEME))
    assert "16 groups of weights in 1 layers (first: model.layers.1.mlp.up_proj)" in caplog.text


def test_a_small_embedding_is_named_before_the_work(caplog: pytest.LogCaptureFixture) -> None:
    model = make_model("smollm")
    model.model.embed_tokens.weight.data.mul_(1e-5)
    warn_of_small_weights(
        [("model.embed_tokens", model.model.embed_tokens.weight)], {"model.embed_tokens": INT8_PER_ROW}
    )
    assert "259 groups of weights in 1 layers (first: model.embed_tokens)" in caplog.text  # the padding row is zero


@pytest.mark.parametrize("family", ["llama", "smollm", "gemma2", "qwen2"])
def test_ordinary_models_are_silent(family: str, caplog: pytest.LogCaptureFixture) -> None:
    model = make_model(family)
    check_model(model, select_layers(model).linears, IDS[:2], ())
    compress(model, dict.fromkeys(select_layers(model).linears, SCHEME))
    assert WARNING not in caplog.text


def test_a_run_says_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Norms a million times larger, weights a million times smaller: the 16-bit model is nearly the same."""
    model = make_model("llama")
    for layer in model.model.layers:
        layer.post_attention_layernorm.weight.data.mul_(1e6)
        for name in ("gate_proj", "up_proj"):
            layer.mlp.get_submodule(name).weight.data.mul_(1e-6)
    model.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    options = CompressOptions.of(
        pretrained=str(tmp_path / "model"), output_dir=str(tmp_path / "run"), data=("python-docs",), method="rtn",
        group_size=16, dtype="float32", seq_len=32, num_test_samples=2, eval_tasks=(), export=(),
    )  # fmt: skip
    run_compress(options)
    assert caplog.text.count(WARNING) == 1
    assert WARNING in (tmp_path / "run" / "log.txt").read_text()
