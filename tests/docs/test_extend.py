"""The guides in docs/extend.md work: each block is executed, and what it registers is used."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from nybble.compression.methods import METHODS, combine, parse_method
from nybble.export.base import EXPORTERS
from nybble.export.checks import exporter_of
from nybble.quant.grid import round_scale
from nybble.quant.scheme import QuantScheme
from nybble.tasks.dataset import TaskRequest
from nybble.tasks.sources import TASK_SOURCES, load_task
from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.pages import DOCS, code_blocks

REGISTERED = {"shrunk": METHODS, "plain": EXPORTERS, "sums": TASK_SOURCES}


@pytest.fixture(autouse=True)
def _guides() -> Iterator[None]:
    blocks = code_blocks(DOCS / "extend.md", "python")
    assert len(blocks) == len(REGISTERED)
    try:
        for block in blocks:
            exec(compile(block, "extend.md", "exec"), {"__name__": "extend"})
        yield
    finally:
        for name, registry in REGISTERED.items():
            if name in registry:
                registry.unregister(name)


def test_the_method_chooses_scales() -> None:
    assert parse_method("awq+shrunk+gptq") == ("awq", "shrunk", "gptq")
    weight_OI = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    scheme = QuantScheme(4, 8)
    scale_OG, _ = combine(("shrunk",)).scales.search(weight_OI, torch.ones(16), scheme)
    full_OG, _ = combine(()).scales.search(weight_OI, torch.ones(16), scheme)
    assert (scale_OG < full_OG).all()
    assert torch.equal(scale_OG, round_scale(scale_OG))


def test_the_exporter_is_known_by_its_file(tmp_path: Path) -> None:
    assert exporter_of(tmp_path) is None
    (tmp_path / EXPORTERS["plain"].model_file).touch()
    exporter = exporter_of(tmp_path)
    assert exporter is not None
    assert exporter.name == "plain"


def test_the_exporter_writes_what_it_reads(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    result = EXPORTERS["plain"].export(make_checkpoint(tmp_path / "quantized", "smollm"), tmp_path / "plain")
    assert (result.linear_weights, result.embedding_weights, result.rounded) == (14, 1, {})
    assert result.logit_difference is not None
    assert result.logit_difference <= 1e-4  # torch decodes the last tokens one by one


def test_the_task_has_right_labels() -> None:
    task = load_task(TaskRequest("sums", None, 0, 0))
    for question in (*task.train, *task.held_out, *task.scored):
        left, right = question.prompts[0].removesuffix(" =").split(" + ")
        assert int(question.choices[question.label]) == int(left) + int(right)
        assert len(set(question.choices)) == len(question.choices)


def test_entry_points_in_the_page_name_the_groups_of_the_registries() -> None:
    (toml,) = code_blocks(DOCS / "extend.md", "toml")
    for registry in REGISTERED.values():
        assert f'[project.entry-points."{registry.group}"]' in toml
