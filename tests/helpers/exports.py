"""Tiny models exported to a format, the values that its files must hold, and logits to compare with."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nybble.errors import OptionError
from nybble.export.base import EXPORTERS, Exporter, check_schemes
from nybble.export.result import ExportResult
from nybble.models.checkpoint import QuantizedCheckpoint
from nybble.models.selection import LayerSelection
from nybble.quant.scheme import QuantScheme
from nybble.quant.weight import QuantizedWeight
from tests.helpers.checkpoints import make_checkpoint, save_checkpoint
from tests.helpers.tiny import make_model


@dataclass(frozen=True)
class Export:
    """A quantized model, and the folder to which it was exported."""

    checkpoint: QuantizedCheckpoint
    folder: Path
    result: ExportResult


def export_checkpoint(name: str, checkpoint: QuantizedCheckpoint, folder: Path) -> Export:
    """Export to `folder`, which does not exist."""
    folder.mkdir()
    return Export(checkpoint, folder, EXPORTERS[name].export(checkpoint, folder))


def export_tiny(name: str, folder: Path, family: str, scheme: QuantScheme | None = None, **changes: Any) -> Export:
    """Export a random model of a family of tiny.py to FOLDER/export."""
    return export_checkpoint(name, make_checkpoint(folder / "quantized", family, scheme, **changes), folder / "export")


BFLOAT16_NORM = "model.norm.weight"


def export_bfloat16(name: str, folder: Path, value: float) -> Export:
    """Export a random Llama of one layer in bfloat16, the first weight of whose last norm is `value`."""
    model = make_model("llama", num_hidden_layers=1, dtype=torch.bfloat16)
    model.get_parameter(BFLOAT16_NORM)[0] = value
    return export_checkpoint(name, save_checkpoint(folder / "quantized", model), folder / name)


def slow_values(weight: QuantizedWeight) -> Tensor:
    """scale * (code - zero point) of every weight by its own indices, float64 [O, I]."""
    rows, columns = weight.codes_OI.shape
    width = columns // weight.scale_OG.shape[1]
    values = torch.empty(rows, columns, dtype=torch.float64)
    for i in range(columns):
        scale_O, zero_O = weight.scale_OG[:, i // width].double(), weight.zero_point_OG[:, i // width].double()
        values[:, i] = scale_O * (weight.codes_OI[:, i].double() - zero_O)
    return values


def logits_of(model: Any, ids: Tensor, **arguments: Any) -> Tensor:
    """Logits of a model in float32."""
    with torch.no_grad():
        return model(input_ids=ids, **arguments).logits.float()


def record_lengths(runtime: Any) -> list[int]:
    """Numbers of tokens of all calls of `infer` of a RuntimeModel from now on."""
    lengths, original = [], runtime.infer

    def infer(input_ids: Tensor, *args: object, **kwargs: object) -> Tensor:
        lengths.append(input_ids.shape[1])
        return original(input_ids, *args, **kwargs)

    runtime.infer = infer
    return lengths


def check_generation(model: Any, runtime: Any) -> None:
    """Greedy tokens are those of torch, each is computed once, and a second call begins with an empty state."""
    lengths, prompt = record_lengths(runtime), torch.randint(0, 256, (1, 9))
    arguments = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    expected = model.generate(prompt, **arguments)
    for _ in range(2):
        assert torch.equal(runtime.generate(prompt, **arguments), expected)
        assert lengths == [9, *[1] * 7]
        lengths.clear()


def check_padding_and_windows(model: Any, runtime: Any, tolerance: float = 1e-3) -> Tensor:
    """Two left-padded sequences, longer than the sliding windows, are those that each one alone is in torch.

    Args:
        tolerance: float32 rounding through soft caps; a token too many or too few in a window changes logits by 0.1.

    Returns:
        The logits of the runtime. The first 7 of the second row are those of padding.
    """
    long, short = torch.randint(0, 256, (1, 20)), torch.randint(0, 256, (1, 13))
    ids = torch.cat([long, torch.cat([torch.full((1, 7), 257), short], dim=1)])
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    logits: Tensor = runtime(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(logits[:1], logits_of(model, long), rtol=0, atol=tolerance)
    torch.testing.assert_close(logits[1:, 7:], logits_of(model, short), rtol=0, atol=tolerance)
    return logits


def check_logits_and_greedy_tokens(exporter: Any, exported: Export) -> None:
    """An export that transformers opens computes, in float32, what torch computes with the weights that it holds."""
    ids, written = torch.randint(0, 256, (2, 20)), exporter.read_weights(exported.folder)
    reference = exported.checkpoint.build(lambda name: written[name])
    opened = exporter.open_model(exported.folder, exported.checkpoint.config, strict=True)
    assert opened.dtype == torch.float32
    expected = logits_of(reference, ids)
    torch.testing.assert_close(logits_of(opened, ids), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    arguments: Any = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(opened.generate(ids, **arguments), reference.generate(ids, **arguments))


def check_codes(exporter: Exporter, exported: Export) -> None:
    """The files hold the codes, scales and zero points of the model, in the schemes that the format has for them."""
    checkpoint, read = exported.checkpoint, exporter.read_codes(exported.folder)
    assert read.keys() == checkpoint.quantized.keys()
    for name, weight in checkpoint.quantized.items():
        embedding = name in checkpoint.selection.embeddings
        container = exporter.container(weight.scheme, weight.codes_OI.shape[1], embedding)
        expected = weight.recoded(container)
        assert read[name].scheme == container, name
        assert torch.equal(read[name].codes_OI, expected.codes_OI), name
        assert torch.equal(read[name].scale_OG, expected.scale_OG), name
        assert torch.equal(read[name].zero_point_OG, expected.zero_point_OG), name


def check_group_sizes(exporter: Exporter, name: str) -> None:
    """Groups of 32, 64 and 128 are taken as they are, multiples are split, others refused. `name`: in messages."""
    selection = LayerSelection(("a",), (), tied=True)

    def container(scheme: QuantScheme, columns: int = 1536) -> QuantScheme:
        return check_schemes(exporter, replace(selection, schemes={"a": scheme}), {"a": columns})["a"]

    for size in (32, 64, 128):
        assert container(QuantScheme(group_size=size)) == QuantScheme(group_size=size)
    for size, split in ((96, 32), (256, 128), (None, 128)):
        assert container(QuantScheme(group_size=size)) == QuantScheme(group_size=split)
    assert container(QuantScheme(8, 64, symmetric=True)) == QuantScheme(8, 64, symmetric=True)
    for size, columns in ((16, 64), (48, 96), (None, 80)):
        scheme = QuantScheme(group_size=size)
        message = re.escape(
            f"an export to {name} needs groups, or whole rows, of a multiple of 32 weights; a has {scheme} in rows of "
            f"{columns}; change --bits, --group_size or --layer, or remove {exporter.name} from --export"
        )
        with pytest.raises(OptionError, match=message):
            container(scheme, columns)
