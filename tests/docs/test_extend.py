"""The guides in docs/extend.md work: each block is executed, and what it registers is used."""

import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from nybble.compression.methods import METHODS, combine, parse_method
from nybble.export.base import EXPORTERS
from nybble.export.checks import exporter_of
from nybble.quant.grid import round_scale
from nybble.quant.scheme import QuantScheme
from nybble.run.results import read_results
from nybble.tasks.dataset import TaskRequest
from nybble.tasks.sources import TASK_SOURCES, load_task
from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.pages import DOCS, ROOT, code_blocks
from tests.helpers.tiny import save_model

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


@pytest.mark.slow
def test_a_package_with_these_modules_and_entry_points_is_found_by_the_command_line(tmp_path: Path) -> None:
    """As pip would install it: modules, and the entry points in a .dist-info beside them."""
    (toml,) = code_blocks(DOCS / "extend.md", "toml")
    groups = tomllib.loads(toml)["project"]["entry-points"]
    package, info = tmp_path / "my_package", tmp_path / "my_package-1.0.dist-info"
    package.mkdir()
    info.mkdir()
    for module, block in zip(("methods", "exporters", "tasks"), code_blocks(DOCS / "extend.md", "python"), strict=True):
        (package / f"{module}.py").write_text(block)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
    lines = [f"[{group}]\n{name} = {place}\n" for group, names in groups.items() for name, place in names.items()]
    (info / "entry_points.txt").write_text("".join(lines))
    model, run = save_model(tmp_path / "model", "llama"), tmp_path / "run"
    common = f"--pretrained {model} --seq_len 64 --num_calibration_samples 8 --num_test_samples 2 --eval_tasks none"
    common += " --group_size 32 --dtype float32 --output_dir"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT / "src")])}

    def nybble(arguments: str) -> None:
        command = [sys.executable, "-m", "nybble", *arguments.split()]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert ended.returncode == 0, ended.stderr

    nybble(f"compress {common} {run} --data python-docs --other_data none --method awq+shrunk+gptq --export plain")
    assert read_results(run).method == "awq+shrunk+gptq"
    assert list(read_results(run).exports) == ["plain"]
    nybble(f"inspect {run}/plain")
    tuned = tmp_path / "tuned"
    nybble(f"tune {common} {tuned} --task sums --method rtn --export none --num_train_samples 16 --epochs 1")
    task = read_results(tuned).task
    assert task is not None
    assert task.name == "sums"
