"""What docs/deploying.md shows in Python runs on the real model."""

from pathlib import Path

import pytest

from nybble.cli.main import main
from nybble.export.base import EXPORTERS
from nybble.report.card import CARD
from tests.helpers.pages import DOCS, code_blocks


@pytest.mark.slow
def test_the_python_blocks_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in EXPORTERS:
        for module in EXPORTERS[name].modules:
            pytest.importorskip(module, reason=f"the extra {EXPORTERS[name].extra}")
    monkeypatch.chdir(tmp_path)
    run = "runs/smollm2-distill"
    quick = ["--data", "python-docs", "--seq_len", "128", "--num_test_samples", "1", "--eval_tasks", "none"]
    command = ["compress", "--pretrained", "smollm2", "--method", "rtn", "--output_dir", run, *quick]
    assert main([*command, "--export", "none"]) == 0
    assert main(["export", run, "--to", "all"]) == 0
    blocks = code_blocks(DOCS / "deploying.md", "python")
    assert len(blocks) == 5
    run_blocks(blocks, "deploying.md", capfd)
    for name in EXPORTERS:  # and of each model card, from its folder
        (block,) = code_blocks(tmp_path / run / name / CARD, "python")
        monkeypatch.chdir(tmp_path / run / name)
        run_blocks([block], f"{name}/{CARD}", capfd)


def run_blocks(blocks: list[str], source: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Run Python that prints an answer with one of the words of its question."""
    for block in blocks:
        capfd.readouterr()
        names: dict[str, object] = {"__name__": "deploying"}
        exec(compile(block, source, "exec"), names)
        printed = capfd.readouterr().out
        assert "print(" not in block or any(word in printed for word in ("Python", "quantization", "Paris")), printed
