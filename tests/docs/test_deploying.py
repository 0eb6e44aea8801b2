"""What docs/deploying.md shows in Python runs on the real model."""

from pathlib import Path

import pytest

from nybble.cli.main import main
from nybble.export.base import EXPORTERS
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
    assert main(["export", run, "--to", "openvino", "onnx", "vllm", "hf"]) == 0
    blocks = code_blocks(DOCS / "deploying.md", "python")
    assert len(blocks) == 4
    for block in blocks:
        capfd.readouterr()
        names: dict[str, object] = {"__name__": "deploying"}
        exec(compile(block, "deploying.md", "exec"), names)
        printed = capfd.readouterr().out
        assert "print(" not in block or "Python" in printed, printed
