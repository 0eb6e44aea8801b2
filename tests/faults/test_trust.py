"""Nothing that comes with a model, a data set or a run folder runs code unless a flag of this command allows it."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from nybble.cli.main import main
from nybble.models.quantized_model import load_quantized
from tests.helpers.compress import compress_command
from tests.helpers.copies import copy_run
from tests.helpers.tiny import make_tokenizer, save_model

SEQUENCES = ["--data", "python-docs", "--num_samples", "2", "--seq_len", "32"]


class Touch:
    """A pickle that makes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


def add_code(folder: Path, evidence: Path) -> None:
    """Python code that makes a file when it is imported, for configuration, model and tokenizer of a folder."""
    (folder / "evil.py").write_text(
        f"open({str(evidence)!r}, 'w').close()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n"
        "class Config(LlamaConfig): pass\n"
        "class Model(LlamaForCausalLM): config_class = Config\n"
        "class Tokenizer(PreTrainedTokenizerFast): pass\n"
    )
    classes = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    for name, auto_map in (
        ("config.json", classes),
        ("tokenizer_config.json", {"AutoTokenizer": [None, "evil.Tokenizer"]}),
    ):
        values = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(values | {"auto_map": auto_map}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and a finished run."""
    folder = tmp_path_factory.mktemp("finished")
    assert main(compress_command(save_model(folder / "model", "llama"), folder / "run")) == 0
    return folder


@pytest.fixture
def finished(folder: Path, tmp_path: Path) -> Path:
    """A finished run of this test alone."""
    return copy_run(folder, tmp_path) / "run"


@pytest.mark.parametrize(
    "command",
    [["export", "RUN"], ["eval", "RUN", *SEQUENCES], ["eval", "RUN/quantized", *SEQUENCES], ["inspect", "RUN"]],
)
def test_code_in_a_run_folder_does_not_run(command: list[str], finished: Path, tmp_path: Path) -> None:
    evidence = tmp_path / "evidence"
    add_code(finished / "quantized", evidence)
    with (finished / "config.toml").open("a") as file:
        file.write("trust_remote_code = true\n")
    main([word.replace("RUN", str(finished)) for word in command])
    assert not evidence.exists()


@pytest.mark.parametrize("unknown", [False, True])
def test_code_of_a_model_does_not_run(unknown: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, evidence = save_model(tmp_path / "model", "llama"), tmp_path / "evidence"
    add_code(model, evidence)
    if unknown:  # transformers would not know the model without its code
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | {"model_type": "evil"}))
    assert main(compress_command(model, tmp_path / "run")) in (0, 2)
    assert not evidence.exists()
    if unknown:
        assert "if you trust it, add --trust_remote_code" in capsys.readouterr().err


def test_code_of_a_model_runs_with_the_flag(tmp_path: Path) -> None:
    """So that the tests above cannot pass by accident."""
    model, evidence = save_model(tmp_path / "model", "llama"), tmp_path / "evidence"
    add_code(model, evidence)
    main([*compress_command(model, tmp_path / "run"), "--trust_remote_code"])
    assert evidence.exists()


def test_pickled_weights_do_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, evidence = save_model(tmp_path / "model", "llama"), tmp_path / "evidence"
    (model / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Touch(evidence)}, model / "pytorch_model.bin")
    assert main(compress_command(model, tmp_path / "run")) == 2
    assert capsys.readouterr().err.startswith("nybble: --pretrained")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(model / "pytorch_model.bin", weights_only=True)
    assert not evidence.exists()


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('touch EVIDENCE') }}",
        "{{ self.__init__.__globals__ }}",
        "{% set x = messages.append(messages) %}",
    ],
)
def test_a_template_stays_in_its_sandbox(template: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, evidence, data = save_model(tmp_path / "model", "llama"), tmp_path / "evidence", tmp_path / "chat.jsonl"
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template.replace("EVIDENCE", str(evidence))
    tokenizer.save_pretrained(model)
    row = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}
    data.write_text(f"{json.dumps(row)}\n" * 40)
    assert main(compress_command(model, tmp_path / "run", "--data", str(data))) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("nybble: ")
    assert not evidence.exists()


def test_a_pickle_among_the_files_of_a_run_is_not_read(finished: Path, tmp_path: Path) -> None:
    evidence = tmp_path / "evidence"
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt"):
        torch.save(Touch(evidence), finished / "quantized" / name)
    load_quantized(finished / "quantized", torch.float32)
    main(["export", str(finished)])
    assert not evidence.exists()
