"""distill --shard in several processes: the curve and the codes of one process, a share of the weights, few bytes."""

import json
import re
from pathlib import Path

import pytest

from nybble.cli.main import main
from nybble.run.results import read_results
from tests.helpers.several import Launcher, lines_of
from tests.helpers.tiny import save_model
from tests.processes.test_workflows import (
    STOP_AFTER,
    assert_same_curves,
    changed_codes,
    distill_command,
    files_of,
    write_tasks,
)

pytestmark = pytest.mark.slow  # every process imports transformers


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["--scale_lr", "0"],
        ["--lora_rank", "0"],
        ["--gradient_checkpointing", "on", "--bits", "3"],
        ["--base_weights", "fixed"],
    ],
)
def test_distill_with_shards(more: list[str], tmp_path: Path, launcher: Launcher) -> None:
    command = distill_command(save_model(tmp_path / "model", "llama"), tmp_path, *more)
    assert main([*command, "--output_dir", str(tmp_path / "one")]) == 0
    ended = launcher.run([*command, "--output_dir", str(tmp_path / "two"), "--shard"])
    assert [process.code for process in ended] == [0, 0], ended
    assert (ended[1].out, ended[1].err) == ("", "")
    one, two = read_results(tmp_path / "one"), read_results(tmp_path / "two")
    assert len(one.trainings[0].steps) == 20
    assert_same_curves(one, two)
    assert changed_codes(tmp_path) < 1e-4
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    log = (tmp_path / "two" / "log.txt").read_text()
    found = re.search(r"2 processes keep [\d.]+ MB of the layers each, and gather ([\d.]+) MB of codes", log)
    assert found is not None
    print(json.dumps({"log": found[0], "sent": two.machine["bytes_sent"]}))


@pytest.mark.parametrize("more", [[], ["--lora_rank", "0", "--method", "se"], ["--base_weights", "fixed"]])
def test_shards_of_a_model_that_no_process_holds(more: list[str], tmp_path: Path, launcher: Launcher) -> None:
    """Compressed from disk, measured from disk, and each layer divided before the next one is there: the same bits."""
    write_tasks(tmp_path / "data")
    command = distill_command(save_model(tmp_path / "model", "llama"), tmp_path, "--shard", *more)
    command += ["--eval_tasks", "arc_easy", "wikitext", "--data_dir", str(tmp_path / "data"), "--num_test_samples", "5"]
    for name, offload in (("one", "none"), ("two", "disk")):
        code = LAYERS_ARE_SMALL if offload == "disk" else ""
        ended = launcher.run([*command, "--output_dir", str(tmp_path / name), "--offload", offload], 2, code)
        assert [process.code for process in ended] == [0, 0], ended
    one, two = read_results(tmp_path / "one"), read_results(tmp_path / "two")
    curves = [[{**step, "seconds": 0} for step in run.trainings[0].steps] for run in (one, two)]
    assert curves[0] == curves[1]
    assert one.trainings[0].validation == two.trainings[0].validation
    assert one.models == two.models
    assert changed_codes(tmp_path) == 0
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


# While layers are put in place, at most one of them is whole in each process.
LAYERS_ARE_SMALL = """
import weakref
from nybble.qat.base import QuantizedLinear
from nybble.workflows import train
made, init, insert = weakref.WeakSet(), QuantizedLinear.__init__, train.insert_quantized_layers
def counted(layer, *given):
    assert all(other.shard is not None for other in made)
    init(layer, *given)
    made.add(layer)
def counting(*given):
    QuantizedLinear.__init__ = counted
    layers = insert(*given)
    QuantizedLinear.__init__ = init
    assert len(made) == len(layers) and all(layer.shard is not None for layer in layers.values())
    return layers
train.insert_quantized_layers = counting
"""


def test_shards_resume_in_other_numbers_of_processes(tmp_path: Path, launcher: Launcher) -> None:
    """Begun without shards, continued with them by two and by four processes, ended by one process."""
    command = distill_command(save_model(tmp_path / "model", "llama"), tmp_path, "--output_dir", str(tmp_path / "two"))
    assert main([*command, "--output_dir", str(tmp_path / "one")]) == 0
    for number, step, more in ((2, 6, []), (2, 10, ["--shard"]), (4, 14, ["--shard"])):
        ended = launcher.run([*command, *more, "--resume"], number, STOP_AFTER.format(step=step))
        assert {process.code for process in ended} == {130}, ended
    assert main([*command, "--resume"]) == 0
    assert_same_curves(read_results(tmp_path / "one"), read_results(tmp_path / "two"))
    assert changed_codes(tmp_path) < 1e-4
    log = (tmp_path / "two" / "log.txt").read_text()
    assert all(f"resumed at step {step} of 20" in log for step in (4, 10, 12))


def test_a_killed_process_ends_a_run_with_shards(tmp_path: Path, launcher: Launcher) -> None:
    command = distill_command(save_model(tmp_path / "model", "llama"), tmp_path, "--output_dir", str(tmp_path / "two"))
    killed = STOP_AFTER.format(step=5).replace("raise KeyboardInterrupt", "import os; os.kill(os.getpid(), 9)")
    ended = launcher.run([*command, "--shard"], 2, killed, 1)
    assert [process.code for process in ended] == [2, -9], ended
    assert len(lines_of(ended)) == 1
    assert "all processes must live until the end" in lines_of(ended)[0]
