"""However a process ends, all end: one line of nybble, one exit code, and the run resumes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nybble.run.results import read_results
from tests.helpers.distill import shipped_bytes
from tests.helpers.several import ROOT, Launcher, lines_of
from tests.helpers.tiny import save_model
from tests.processes.test_workflows import distill_command

pytestmark = pytest.mark.slow  # every process imports transformers

RAISE_IN_TRAINING = """
from nybble.errors import DataError
from nybble.training.trainer import Trainer
def run(self):
    raise {error}
    yield
Trainer.run = run
"""
KILL_IN_STEP_3 = """
import os, signal
from nybble.training.trainer import Trainer
original = Trainer._accumulate_gradients
def accumulate(self, step):
    if step == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, step)
Trainer._accumulate_gradients = accumulate
"""
OTHER_VERSION = """
from nybble.workflows import launch
launch._code = lambda: "deadbeef"
"""


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    return distill_command(save_model(tmp_path / "model", "llama"), tmp_path / "run", "--save_steps", "1")


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        ("DataError('the text must be blue; it is red; paint it')", 2, "the text must be blue; it is red; paint it"),
        ("ZeroDivisionError('oh')", 70, "this is a fault of nybble (ZeroDivisionError: oh)"),
    ],
)
def test_an_error_in_one_process(
    number: int, error: str, code: int, text: str, command: list[str], launcher: Launcher
) -> None:
    ended = launcher.run(command, 2, RAISE_IN_TRAINING.format(error=error), number)
    assert [process.code for process in ended] == [code, code], ended
    (line,) = lines_of(ended)
    assert text in line
    assert not any("Traceback" in process.err for process in ended)


@pytest.mark.parametrize("number", [0, 1])
def test_a_killed_process(number: int, command: list[str], tmp_path: Path, launcher: Launcher) -> None:
    assert [process.code for process in launcher.run([*command, "--output_dir", str(tmp_path / "undisturbed")])] == [
        0,
        0,
    ]
    ended = launcher.run(command, 2, KILL_IN_STEP_3, number)
    assert ended[number].code == -signal.SIGKILL
    assert ended[1 - number].code == 2
    (line,) = lines_of(ended)
    assert "all processes must live until the end; one was killed or cannot be reached" in line
    assert [process.code for process in launcher.run([*command, "--resume"])] == [0, 0]
    assert "resumed at step 2 of 20" in (tmp_path / "run" / "log.txt").read_text()
    assert shipped_bytes(tmp_path / "run") == shipped_bytes(tmp_path / "undisturbed")


def wait_for_training(run: Path) -> None:
    until = time.monotonic() + 120
    while not (run / "last.safetensors").exists():
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("number", "text"), [(signal.SIGINT, "interrupted; the same"), (signal.SIGTERM, "interrupted by SIGTERM; the same")]
)
@pytest.mark.parametrize("repeated", [1, 2])
def test_a_signal_to_all(
    number: signal.Signals, text: str, repeated: int, command: list[str], tmp_path: Path, launcher: Launcher
) -> None:
    """A launcher repeats the signal that the terminal sent."""
    started = launcher.start([[*command, "--epochs", "400"]] * 2)
    wait_for_training(tmp_path / "run")
    for _ in range(repeated):
        for process in started:
            os.kill(process, number)
    ended = launcher.wait(started, 30)
    assert [process.code for process in ended] == [128 + number] * 2, ended
    (line,) = lines_of(ended)
    assert line.startswith(f"nybble: {text}")
    assert not read_results(tmp_path / "run").finished


def test_processes_that_differ_are_refused(command: list[str], tmp_path: Path, launcher: Launcher) -> None:
    ended = launcher.wait(launcher.start([command, [*command, "--scale_lr", "1e-5"]]))
    assert [process.code for process in ended] == [2, 2]
    (line,) = lines_of(ended)
    assert "all processes must have the same --scale_lr; process 0 has" in line
    ended = launcher.run(command, 2, OTHER_VERSION, 1)
    (line,) = lines_of(ended)
    assert "all processes must have the same code of nybble" in line
    assert not (tmp_path / "run").exists()


OTHER_TEXT = """
from nybble.workflows import session
original = session._fingerprints
session._fingerprints = lambda planned: original(planned) | {"training text": "deadbeef"}
"""
BLIND = """
from pathlib import Path
original = Path.exists
Path.exists = lambda self, **more: self.name != ".lock" and original(self, **more)
"""


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (OTHER_TEXT, "all processes must have the same training text; process 0 has"),
        (BLIND, "must be a folder that all processes see; process 1 does not see it"),
    ],
)
def test_what_only_one_process_sees_deletes_no_run(
    code: str, text: str, command: list[str], tmp_path: Path, launcher: Launcher
) -> None:
    ended = launcher.run(command, 2, code, 1)
    assert [process.code for process in ended] == [2, 2], ended
    (line,) = lines_of(ended)
    assert text in line
    assert not (tmp_path / "run").exists()
    assert [process.code for process in launcher.run(command)] == [0, 0]
    before = shipped_bytes(tmp_path / "run")
    assert [process.code for process in launcher.run([*command, "--overwrite"], 2, code, 1)] == [2, 2]
    assert shipped_bytes(tmp_path / "run") == before
    assert read_results(tmp_path / "run").finished


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_process_that_waits_for_others_can_be_ended(
    number: signal.Signals, command: list[str], launcher: Launcher
) -> None:
    alone = "import os; os.environ['WORLD_SIZE'] = '2'"
    (process,) = launcher.start([command], alone, apart=True)
    time.sleep(3)
    os.kill(process, number)
    (ended,) = launcher.wait([process], 30)
    assert ended.code == 128 + number
    assert lines_of([ended])[0].startswith("nybble: interrupted")


STOP_ONCE = """
import os, signal
from nybble.training.trainer import Trainer
original = Trainer._accumulate_gradients
def accumulate(self, step):
    if step == 2 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, step)
Trainer._accumulate_gradients = accumulate
"""


def test_processes_that_torchrun_starts_again_resume(command: list[str], tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(f"{STOP_ONCE}\nimport sys\nfrom nybble.cli.main import main\nsys.exit(main())\n")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    ended = subprocess.run(
        [sys.executable, *torchrun, str(program), *command, "--resume"],
        capture_output=True, text=True, timeout=240, cwd=ROOT, check=False,
        env=os.environ | {"PYTHONPATH": f"{ROOT / 'src'}", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert "resumed at step 2 of 20" in (tmp_path / "run" / "log.txt").read_text()


def test_more_processes_than_a_batch_has_sequences(command: list[str], tmp_path: Path, launcher: Launcher) -> None:
    ended = launcher.run([*command, "--batch_size", "2"], 3)
    assert {process.code for process in ended} == {2}
    (line,) = lines_of(ended)
    assert "--batch_size must be at least the number of processes; it is 2, with 3 processes" in line
    assert not (tmp_path / "run").exists()


def test_commands_for_one_process(tmp_path: Path, launcher: Launcher) -> None:
    ended = launcher.run(["report", str(tmp_path)])
    assert {process.code for process in ended} == {2}
    (line,) = lines_of(ended)
    assert "only compress, distill, tune, search run in several processes; nybble report was started in 2" in line
    (line,) = lines_of(launcher.run(["compare"]))
    assert "start it without torchrun and accelerate launch, once for each GPU" in line
