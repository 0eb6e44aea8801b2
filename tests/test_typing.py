"""The public names are typed for those who use them: mypy, as in a project of theirs."""

import subprocess
import sys
from pathlib import Path

import pytest

CONSUMER = """
import nybble

run = nybble.distill(pretrained="model", data="text.txt", lora_rank=4, callbacks=[nybble.Callback()])
reveal_type(run)
reveal_type(run.results.models)
reveal_type(nybble.compare(pretrained="model", output_dir="runs", tasks=("arc_easy",)))
nybble.distill(pretrained="model", lora_rnk=4)
nybble.distill(pretrained="model", lora_rank="four")
"""


@pytest.mark.slow
def test_a_program_that_uses_nybble_is_checked(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(CONSUMER)
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports", "silent", "program.py"]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False).stdout
    lines = [line.split(":", 2)[1:] for line in found.splitlines() if line.startswith("program.py:")]
    messages = {int(n): message.strip() for n, message in lines if "Revealed" in message or "error: " in message}
    assert messages[5] == 'note: Revealed type is "nybble.api.Run"'
    assert messages[6] == 'note: Revealed type is "dict[str, dict[str, Any]]"'
    assert messages[7] == 'note: Revealed type is "nybble.api.Comparison"'
    assert 'Unexpected keyword argument "lora_rnk"' in messages[8]
    assert 'incompatible type "str"; expected "int"' in messages[9]
    assert set(messages) == {5, 6, 7, 8, 9}, found
