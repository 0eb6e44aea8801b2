"""The flow as a process: kill -9 anywhere and resume to the same bits; what the results say."""

import dataclasses
import json
import math
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GPTNeoConfig, GPTNeoForCausalLM, OPTConfig, OPTForCausalLM

from nybble import files
from nybble.cli import main
from nybble.data import splits
from nybble.data.packing import TokenRows
from nybble.errors import DataError, OptionError, RunError
from nybble.models import loading, quantized_model
from nybble.options.commands import CompressOptions, DistillOptions, to_toml
from nybble.qat import insert
from nybble.qat.layers import FakeQuantizedLoRALinear
from nybble.training import memory
from nybble.training.losses import kl_to_teacher
from nybble.training.teacher import teacher_hidden_states
from nybble.workflows import stages
from nybble.workflows import text as workflows_text
from nybble.workflows.compress import compress
from nybble.workflows.distill import _judge, distill
from nybble.workflows.text import Sequences
from tests.test_chat import TEMPLATE
from tests.test_families import options
from tests.tiny import make_model, make_tokenizer, save_model


def command(model: Path, run: Path, *more: str) -> list[str]:
    """The options of the families' test as a person would give them, with enough steps to be killed in."""
    recipe = run.with_suffix(".toml")
    recipe.write_text(to_toml(options(model, run, epochs=10, save_every=3, dtype="float32")))
    return [sys.executable, "-m", "nybble", "distill", "--config", str(recipe), *more]


def codes(run: Path) -> bytes:
    return (run / "quantized" / quantized_model.WEIGHTS_FILE).read_bytes()


# A nybble that kill -9 ends just before the argv[2]-th time that a file named argv[1] would be put in its place.
KILLED = """
import os, signal, sys
name, left, place = sys.argv[1], int(sys.argv[2]), os.replace

def replace(source, target):
    global left
    left -= os.path.basename(target) == name
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    place(source, target)

os.replace = replace
sys.argv[:3] = ["nybble"]
from nybble.cli.main import main
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "time", "resumed"),
    [("train.json", 2, 0), ("last.safetensors", 2, 2), ("last.safetensors", 10, 14)],
    ids=["teacher", "early", "late"],
)
def test_kill_9_and_resume_end_with_the_same_bits(name: str, time: int, resumed: int, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", "smollm")
    undisturbed = dataclasses.replace(
        options(model, tmp_path / "undisturbed"), epochs=10, save_every=3, dtype="float32"
    )
    distill(undisturbed)

    run = tmp_path / "run"
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, name, str(time), *command(model, run)[3:]], capture_output=True, timeout=120
    )
    assert killed.returncode == -signal.SIGKILL
    assert not (run / "quantized").exists()
    subprocess.run(command(model, run, "--resume"), check=True, capture_output=True, timeout=120)
    assert codes(run) == codes(tmp_path / "undisturbed")
    assert (f"resumed at step {resumed} of 20" in (run / "log.txt").read_text()) == (resumed > 0), (
        "gone on with, not begun again"
    )
    assert json.loads((run / "results.json").read_text())["command"].startswith("nybble distill --config")


# Runs argv[1] with torch, transformers, accelerate and what these need; everything else that is installed cannot be imported.
BARE = """
import re, sys
from importlib import metadata
from packaging.requirements import Requirement

def plain(name): return re.sub("[-_.]+", "-", name).lower()
wanted, there = ["torch", "transformers", "accelerate"], set()
while wanted:
    name = plain(wanted.pop())
    if name not in there:
        there.add(name)
        try:
            needs = [Requirement(text) for text in metadata.requires(name) or []]
        except metadata.PackageNotFoundError:
            continue
        wanted += [need.name for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
for module, owners in metadata.packages_distributions().items():
    if "nybble" not in module and not there & {plain(owner) for owner in owners}:
        sys.modules[module] = None
exec(sys.argv[1])
"""


@pytest.mark.slow
@pytest.mark.parametrize("text", ["notes.txt", "python-docs"])
def test_training_needs_torch_transformers_and_accelerate_only(text: str, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(2000)))
    data = text if text == "python-docs" else str(tmp_path / text)
    chosen = options(save_model(tmp_path / "model", "llama"), tmp_path / "run", data=(data,), start="awq+se+blockwise")
    run = f"from nybble.config import DistillOptions; from nybble.distill import distill; distill({chosen!r}); import datasets"
    ended = subprocess.run([sys.executable, "-c", BARE, run], capture_output=True, text=True, timeout=300)
    assert ended.stderr.strip().endswith("import of datasets halted; None in sys.modules"), (
        ended.stderr
    )  # so something was taken away
    assert "tuned" in json.loads((tmp_path / "run" / "results.json").read_text())["models"]


def test_a_second_resume_of_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", "llama")
    distill(options(model, tmp_path / "run"))
    before, results = codes(tmp_path / "run"), json.loads((tmp_path / "run" / "results.json").read_text())
    distill(options(model, tmp_path / "run", resume=True))
    after = json.loads((tmp_path / "run" / "results.json").read_text())
    assert codes(tmp_path / "run") == before
    assert after["models"] == results["models"]


@pytest.mark.parametrize(("family", "dtype"), [("gemma2", "float32"), ("llama", "bfloat16")])
def test_without_adapters_the_codes_stay_and_scales_and_norms_are_trained(
    family: str, dtype: str, tmp_path: Path
) -> None:
    model = save_model(tmp_path / "model", family)
    changes = {"lora_rank": 0, "dtype": dtype, "norm_lr": 3e-2, "scale_lr": 1e-2, "epochs": 8, "tensorboard": False}
    distill(options(model, tmp_path / "run", **changes))
    distill(options(model, tmp_path / "start", **(changes | {"norm_lr": 0.0, "scale_lr": 1e-9, "epochs": 1})))
    (tuned, others), (start, before) = (
        quantized_model.load_weights(tmp_path / name / "quantized") for name in ("run", "start")
    )
    for name, weight in tuned.items():
        assert torch.equal(weight.codes_OI, start[name].codes_OI)
        assert torch.equal(weight.scale_OG, start[name].scale_OG) == (weight.scheme.bits == 8)
    assert others.keys() == before.keys()
    norms = [key for key in others if "norm" in key]
    assert norms
    for key, tensor in others.items():
        assert tensor.dtype == before[key].dtype
        assert torch.equal(tensor, before[key]) == (key not in norms), key
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["codes_changed"] == 0
    assert results["models"]["tuned"]["kl_to_teacher"] < 0.95 * results["models"]["compressed"]["kl_to_teacher"]


def test_norms_learn_at_a_relative_rate() -> None:
    model = make_model("gemma2")  # its norms multiply with 1 + weight
    trained = insert.train_norms(model)
    assert len(trained) == 2 * 4 + 1
    norm = model.model.norm
    before = norm.weight.clone()
    with torch.no_grad():
        trained["model.norm.shift"].fill_(0.01)
    torch.testing.assert_close(norm.weight, before + 0.01 * (1 + before).abs().mean())
    expected = norm.weight.clone()
    insert.settle_norms(model)
    assert torch.equal(norm.weight, expected)
    assert "model.norm.weight" in model.state_dict()


@pytest.mark.usefixtures("needs_openvino")
def test_a_finished_run_is_exported_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_model(tmp_path / "model", "llama")
    distill(options(model, tmp_path / "run"))
    before = codes(tmp_path / "run")
    assert main.main(["export", str(tmp_path / "run"), "--to", "openvino"]) == 0
    assert (tmp_path / "run" / "openvino" / "openvino_model.bin").stat().st_size > 0
    counts = json.loads((tmp_path / "run" / "results.json").read_text())["exports"]["openvino"]
    assert (counts["weights_u4"], counts["weights_u8"]) == (14, 2)
    assert codes(tmp_path / "run") == before
    distill(options(model, tmp_path / "run", resume=True))
    assert "openvino" in json.loads((tmp_path / "run" / "results.json").read_text())["models"]
    shutil.rmtree(tmp_path / "run" / "openvino")
    distill(options(model, tmp_path / "run", resume=True))
    assert (tmp_path / "run" / "openvino" / "openvino_model.bin").stat().st_size > 0
    (tmp_path / "run" / "quantized").rename(tmp_path / "elsewhere")
    assert main.main(["export", str(tmp_path / "run")]) == 2
    assert "must be a finished run; it has no folder quantized; finish it with --resume" in capsys.readouterr().err


def test_cache_and_recompute_tune_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_model(tmp_path / "model", "qwen2")
    losses, filled, original = [], [0], FakeQuantizedLoRALinear.fill_weight_cache

    def count(layer: FakeQuantizedLoRALinear) -> None:
        filled[0] += 1
        original(layer)

    monkeypatch.setattr(FakeQuantizedLoRALinear, "fill_weight_cache", count)
    for cache, fills in (
        ("step", 14 * (4 + 3 + 1)),
        ("recompute", 0),
    ):  # 14 layers; 4 steps, 3 validations, 1 measurement
        filled[0] = 0
        distill(options(model, tmp_path / cache, cache=cache))
        assert filled[0] == fills
        history = json.loads((tmp_path / cache / "results.json").read_text())["validation"]
        losses.append([entry["kl_to_teacher"] for entry in history])
    # a code at a rounding boundary may flip: float32 sums in another order
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)
    assert losses[0][0] == losses[1][0]


def test_results_say_what_happened(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", "llama")
    distill(options(model, tmp_path / "run"))
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["models"].keys() == {"16bit", "compressed", "tuned"}
    for row in results["models"].values():
        assert row.keys() == {"token_perplexity", "tokens", "kl_to_teacher", "bytes"}
    assert results["models"]["16bit"]["kl_to_teacher"] == pytest.approx(0, abs=1e-6)
    full, compressed, tuned = (results["models"][row]["token_perplexity"] for row in ("16bit", "compressed", "tuned"))
    assert results["improvement"]["tuned"] == pytest.approx((compressed - tuned) / (compressed - full))
    assert set(results["seconds"]) == {"load", "teacher", "measure", "compress", "train", "absorb"}
    assert results["layers"] == {"int4": 14, "int8": 2, "tied": False}
    assert results["seed"] == 0
    assert results["machine"]["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert "peak_memory_bytes" in results
    text = (tmp_path / "run" / "report.md").read_text()
    assert results["command"] in text
    assert f"{tuned:.3f}" in text
    assert (tmp_path / "run" / "log.txt").read_text().count(
        "validation KL"
    ) == 3  # before training and after each epoch
    assert not list((tmp_path / "run" / "teacher").glob("train.*")), "the large file is deleted when training is done"


def test_test_text_chooses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another test split leaves the weights alone, to the last bit."""
    from nybble.data import sources

    model = save_model(tmp_path / "model", "llama")
    distill(options(model, tmp_path / "one"))
    original = sources.load_texts

    def other_test(*arguments: object) -> splits.Texts:
        return dataclasses.replace(original(*arguments), test=["something else entirely " * 50])

    monkeypatch.setattr(sources, "load_texts", other_test)
    distill(options(model, tmp_path / "two"))
    assert codes(tmp_path / "one") == codes(tmp_path / "two")


def test_the_model_writes_its_own_text_and_another_run_reads_it(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", "smollm")
    distill(options(model, tmp_path / "run", data=("self",)))
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["test"] == "the test split of python-docs (4 x 32 tokens)"
    assert results["seconds"]["write"] > 0
    written, _ = files.load_tensors(tmp_path / "run" / "self.safetensors")
    assert len(written["ids"]) >= 8  # --samples
    distill(options(model, tmp_path / "other", data=(str(tmp_path / "run" / "self.safetensors"),)))
    validation = json.loads((tmp_path / "other" / "results.json").read_text())["validation"]
    assert validation[0] == results["validation"][0]
    assert validation[-1] != results["validation"][-1], "the same sequences in another order"


def test_the_model_goes_on_from_the_beginnings_of_a_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, path, run = save_model(tmp_path / "model", "smollm"), tmp_path / "lines.txt", tmp_path / "run"
    path.write_text("".join(f"line {i} of few\n" for i in range(400)))
    flags = [*command(model, run)[3:], "--data", f"self:{path}"]
    assert main.main(flags) == 0
    results = json.loads((run / "results.json").read_text())
    assert results["test"].startswith(f"the test split of {path} (")
    written, _ = files.load_tensors(run / "self.safetensors")
    pieces = {make_tokenizer().decode(row[:8]) for row in written["ids"]}  # a token a letter, and a quarter of 32
    assert len(pieces) > 4
    assert all(piece in path.read_text() for piece in pieces)
    path.write_text("another text\n" * 400)
    assert main.main([*flags, "--resume"]) == 2
    assert "the beginnings changed" in capsys.readouterr().err
    assert main.main([*flags[:-1], "self:./nowhere.txt", "--overwrite"]) == 2
    assert "./nowhere.txt must be an existing file" in capsys.readouterr().err
    assert main.main([*flags[:-1], "self:", "--overwrite"]) == 2
    assert "--data self:SOURCE must name a text to go on from; got self:" in capsys.readouterr().err
    rows = [
        {"messages": [{"role": "user", "content": f"question {i}"}, {"role": "assistant", "content": "answer " * 20}]}
        for i in range(60)
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main.main([*flags[:-1], f"self:{tmp_path / 'chats.jsonl'}", "--overwrite"]) == 2
    assert "self:SOURCE needs plain text to go on from; it has conversations" in capsys.readouterr().err


def test_conversations_count_only_what_the_assistant_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_model(tmp_path / "model", "smollm")
    tokenizer = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"chat_template": TEMPLATE}))
    talk = [
        {"role": "user", "content": "say it"},
        {"role": "assistant", "content": "it"},
    ]  # [u]say it</s>[a]it</s>: "it</s>" is 3 tokens
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for _ in range(60)))
    distill(options(model, tmp_path / "run", data=(str(tmp_path / "chat.jsonl"),), loss_on="assistant"))
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["models"]["tuned"]["tokens"] == 6 * 3  # a tenth of the conversations
    assert (
        main.main(
            [
                "eval",
                str(tmp_path / "run"),
                "--data",
                str(tmp_path / "chat.jsonl"),
                "--loss_on",
                "assistant",
                "--seq_len",
                "32",
            ]
        )
        == 0
    )
    assert '"tokens": 18' in capsys.readouterr().out


def test_a_small_source_is_taught_once_and_text_beside_conversations_counts_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_model(tmp_path / "model", "smollm")
    tokenizer = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"chat_template": TEMPLATE}))
    talks = [
        [{"role": "user", "content": "say it"}, {"role": "assistant", "content": letter * 8}] for letter in "abcdefghij"
    ]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    chat, taught = str(tmp_path / "chat.jsonl"), []

    def spied(path: Path, model: Any, ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        taught.append((path.stem, ids))
        return teacher_hidden_states(path, model, ids, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nybble.training.teacher.teacher_hidden_states", spied)
        distill(
            options(
                model,
                tmp_path / "run",
                data=(f"{chat}=0.5", "python-docs=0.5"),
                eval_data=("python-docs",),
                loss_on="assistant",
                samples=32,
            )
        )
    (train,) = (ids for split, ids in taught if split == "train")
    assert len(train) == 8 + 32  # the training tenths of 10 conversations; half of 64 sequences
    assert len(train.unique(dim=0)) == len(train)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["models"]["tuned"]["tokens"] == 4 * 31, "plain text counts whole"
    assert results["best_step"] > 0
    assert main.main([*command(model, tmp_path / "no")[3:], "--loss_on", "assistant"]) == 2
    assert "needs conversations" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_tuning_that_makes_it_worse_is_said_and_undone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_model(tmp_path / "model", "llama")
    distill(options(model, tmp_path / "run", lr=10.0, scale_lr=1.0))
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["best_step"] == 0
    assert (
        "no step of tuning was better on the validation text than the compressed start, so the start was kept"
        in results["warnings"][0]
    )
    assert results["codes_changed"] == 0
    assert results["models"]["tuned"]["kl_to_teacher"] == pytest.approx(
        results["models"]["compressed"]["kl_to_teacher"], rel=1e-6
    )


def test_the_same_sequences_in_every_epoch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_model(tmp_path / "model", "smollm")
    arguments = [*command(model, tmp_path / "run")[3:], "--epochs", "2"]
    assert main.main(arguments) == 0
    assert "4 steps of 4 x 32 tokens = 0.00 M tokens, 1.00 times the 16 training sequences" in capsys.readouterr().out
    assert main.main([*arguments, "--same_samples", "--overwrite"]) == 0
    assert "4 steps of 4 x 32 tokens = 0.00 M tokens, 2.00 times the 8 training sequences" in capsys.readouterr().out


def test_training_stops_early_where_that_is_wanted(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", "llama")
    distill(options(model, tmp_path / "run", lr=10.0, scale_lr=1.0, epochs=5, patience=2))
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert [validation["step"] for validation in results["validation"]] == [0, 2, 4]
    assert len(results["training"]) == 4


def test_means_of_weights_are_what_is_measured_and_kept(tmp_path: Path) -> None:
    model, run = save_model(tmp_path / "model", "llama"), tmp_path / "run"
    distill(options(model, run, schedule="mean", lr=1e-3, scale_lr=2e-3, norm_lr=1e-3))
    best, note = files.load_tensors(run / "best.safetensors")
    last, _ = files.load_tensors(run / "last.safetensors")
    assert note["best_step"] == 4
    for name, tensor in best.items():
        assert torch.equal(tensor, last[f"mean:{name}"])
        assert not torch.equal(tensor, last[name])


def test_a_loss_that_is_not_finite_stops_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_model(tmp_path / "model", "llama")

    def broken(*arguments: object, **keywords: object) -> torch.Tensor:
        return kl_to_teacher(*arguments, **keywords) * float("nan")

    monkeypatch.setattr(sys.modules["nybble.workflows.distill"], "kl_to_teacher", broken)
    arguments = command(model, tmp_path / "run")[3:]
    assert main.main(arguments) == 2
    assert "the loss must stay finite: step 1 gave loss nan" in capsys.readouterr().err

    monkeypatch.setattr(
        "nybble.evaluation.perplexity.measure_sequences",
        lambda *_, **__: {"kl_to_teacher": math.nan, "token_perplexity": math.nan, "tokens": 1},
    )
    for dtype, remedy in (("float32", "another --start"), ("bfloat16", "--dtype float32")):
        assert main.main([*arguments, "--overwrite", "--dtype", dtype]) == 2
        assert f"before this training it is none; use {remedy}" in capsys.readouterr().err


def test_a_used_folder_is_refused_before_the_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "other").write_text("x")
    assert main.main(command(Path("./no-such-model"), tmp_path / "run")[3:]) == 2
    assert "it holds other files; choose another folder" in capsys.readouterr().err


def test_overwrite_spares_what_the_run_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, run = save_model(tmp_path / "model", "smollm"), tmp_path / "run"
    distill(options(model, run))
    before = codes(run)
    for flags in (["--start", str(run)], ["--data", str(run / "self.safetensors"), "--eval_data", "python-docs"]):
        (run / "self.safetensors").touch()
        assert main.main([*command(model, run)[3:], "--overwrite", *flags]) == 2
        assert f"--overwrite would delete {flags[0]} {flags[1]}, which this run is to read" in capsys.readouterr().err
    assert codes(run) == before


def test_resume_refuses_text_that_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, notes = save_model(tmp_path / "model", "smollm"), tmp_path / "notes.txt"
    notes.write_text("".join(f"line {i} of the first text\n" for i in range(3000)))
    arguments = [*command(model, tmp_path / "run")[3:], "--data", str(notes)]
    assert main.main(arguments) == 0
    before = codes(tmp_path / "run")
    notes.write_text("".join(f"line {i} of another text\n" for i in range(3000)))
    assert main.main([*arguments, "--resume"]) == 2
    assert (
        "the training text and the validation text and the test text changed; bring them back, or start again (--overwrite)"
        in capsys.readouterr().err
    )
    assert codes(tmp_path / "run") == before


def test_resume_refuses_another_validation_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, texts = save_model(tmp_path / "model", "smollm"), tmp_path / "texts"
    texts.mkdir()
    for split in ("train", "validation", "test"):
        (texts / f"{split}.txt").write_text("".join(f"line {i} of the {split} text\n" for i in range(600)))
    arguments = [*command(model, tmp_path / "run")[3:], "--data", str(texts)]
    assert main.main(arguments) == 0
    (texts / "validation.txt").write_text("something else " * 600)
    assert main.main([*arguments, "--resume"]) == 2
    assert "the validation text changed; bring it back, or start again (--overwrite)" in capsys.readouterr().err


def test_resume_refuses_another_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, start = save_model(tmp_path / "model", "smollm"), tmp_path / "start"
    compressing = [
        "compress",
        "--pretrained",
        str(model),
        "--output_dir",
        str(start),
        "--data",
        "python-docs",
        "--seq_len",
        "32",
        "--test_samples",
        "2",
    ]
    compressing += ["--calib_samples", "8", "--tasks", "--export"]
    assert main.main([*compressing, "--method", "se"]) == 0
    arguments = [*command(model, tmp_path / "run")[3:], "--start", str(start)]
    assert main.main(arguments) == 0
    assert main.main([*compressing, "--method", "rtn", "--overwrite"]) == 0
    assert main.main([*arguments, "--resume"]) == 2
    assert "the 4-bit model of --start changed; bring it back, or start again (--overwrite)" in capsys.readouterr().err


def test_what_became_worse_is_said_in_words() -> None:
    def said(**rows: tuple[float, float, float]) -> list[str]:
        metrics = ("kl_to_teacher", "token_perplexity", "word_perplexity")
        results = {
            "models": {"16bit": dict(zip(metrics, (0.0, 20.0, 25.0), strict=True))}
            | {k: dict(zip(metrics, v, strict=True)) for k, v in rows.items()}
        }
        return _judge(SimpleNamespace(results=results))  # type: ignore[arg-type]

    assert said(compressed=(0.1, 24.0, 30.0), tuned=(0.05, 22.0, 27.0)) == []
    assert said(compressed=(0.1, 24.0, 30.0), tuned=(0.05, 22.0, 31.0)) == [
        "tuning made the word perplexity of the test text worse: 30.0000 before, 31.0000 after"
    ]
    assert said(compressed=(0.1, 24.0, 30.0), tuned=(0.2, 22.0, 27.0)) == [
        "tuning made the KL to 16 bit of the test text worse: 0.1000 before, 0.2000 after"
    ]
    in_openvino = said(compressed=(0.1, 24.0, 30.0), tuned=(0.05, 22.0, 27.0), openvino=(0.05, 25.0, 29.0))
    assert in_openvino == [
        "in OpenVINO the tuned model's token perplexity is worse than the compressed one's in torch: 25.0000, against 24.0000"
    ]


def test_a_model_that_cannot_write_leaves_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("nybble.data.generate.MIN_DISTINCT_NGRAMS", 1.1)
    model, run = save_model(tmp_path / "model", "smollm"), tmp_path / "run"
    assert main.main([*command(model, run)[3:], "--data", "self"]) == 2
    assert "needs a model that writes text" in capsys.readouterr().err
    assert not run.exists()
    assert main.main([*command(model, run)[3:], "--data", "self", "--loss_on", "assistant"]) == 2
    assert "plain text; use --loss_on all" in capsys.readouterr().err


def test_a_small_disk_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_model(tmp_path / "model", "llama")
    monkeypatch.setattr("nybble.files.shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    assert main.main(command(model, tmp_path / "run")[3:]) == 2
    assert "GB for teacher states and checkpoints" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_finished_run_needs_no_disk_for_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = options(save_model(tmp_path / "model", "llama"), tmp_path / "run")
    distill(given)
    capsys.readouterr()
    monkeypatch.setattr("nybble.files.shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    distill(dataclasses.replace(given, resume=True))
    assert "of disk" not in capsys.readouterr().err


def test_memory_for_the_export_at_the_end_is_missed_at_the_beginning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    loaded = loading.LoadedModel(make_model("llama"), None, "tiny")
    parameters = sum(p.numel() for p in loaded.model.parameters())
    for free, warned in (
        (memory.export_memory(parameters) - 4 * parameters, False),
        (memory.export_memory(parameters) - 4 * parameters - 1, True),
    ):
        monkeypatch.setattr(
            "nybble.workflows.stages.psutil.virtual_memory", lambda free=free: SimpleNamespace(available=free)
        )
        caplog.clear()
        stages._check_export_memory(loaded, Path("run"))
        assert ("nybble export writes it on a larger machine" in caplog.text) == warned


def test_what_another_command_began_is_refused(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", "llama")
    shared = {
        "pretrained": str(model),
        "output_dir": str(tmp_path / "run"),
        "data": ("python-docs",),
        "seq_len": 32,
        "test_samples": 2,
        "tasks": (),
        "export": (),
    }
    compress(CompressOptions(**shared, method="rtn"))  # type: ignore[arg-type]
    with pytest.raises(RunError, match="run was begun by nybble compress; choose another --output_dir"):
        distill(DistillOptions(**shared, resume=True))  # type: ignore[arg-type]


def test_calibration_text_must_suit_the_model() -> None:
    known = SimpleNamespace(
        get_input_embeddings=lambda: torch.nn.Embedding(5, 2), config=SimpleNamespace(max_position_embeddings=8)
    )
    rows = TokenRows.of(torch.zeros(1, 4, dtype=torch.int64))
    loaded = SimpleNamespace(model=known, name="m")
    stages._check_tokens(loaded, Sequences(rows, rows.ids, rows, rows, ""))
    with pytest.raises(DataError, match="m knows the tokens 0 to 4; its tokenizer gives 5"):
        stages._check_tokens(loaded, Sequences(rows, rows.ids + 5, rows, rows, ""))


def test_sequences_longer_than_positions_that_were_learnt_are_refused(caplog: pytest.LogCaptureFixture) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 16}
    opt = OPTForCausalLM(OPTConfig(vocab_size=260, ffn_dim=32, word_embed_proj_dim=32, **sizes))
    rotary = make_model("llama", max_position_embeddings=16)

    def check(model: Any, length: int) -> None:
        rows = TokenRows.of(torch.zeros(1, length, dtype=torch.int64))
        stages._check_tokens(loading.LoadedModel(model, None, "m"), Sequences(rows, rows.ids, rows, rows, ""))

    neo = {
        "hidden_size": 32,
        "num_layers": 1,
        "num_heads": 2,
        "max_position_embeddings": 16,
        "attention_types": [[["global"], 1]],
    }
    for learnt in (opt, GPTNeoForCausalLM(GPTNeoConfig(vocab_size=260, **neo))):
        check(learnt, 16)
        with pytest.raises(
            OptionError, match="--seq_len must be at most 16, for m has learnt so many positions; got 17"
        ):
            check(learnt, 17)
    assert "more than" not in caplog.text
    check(rotary, 17)  # computes positions: a warning
    assert "--seq_len 17 is more than the 16 positions that m was made for" in caplog.text


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(
        OptionError, match="--scale_lr, --norm_lr, or --lora_rank and --lr must be above 0, else nothing is trained"
    ):
        DistillOptions(pretrained="m", lora_rank=8, lr=0, scale_lr=0, norm_lr=0).check()


def test_epochs_of_what_the_model_writes_repeat_as_many_sequences_as_asked_for(tmp_path: Path) -> None:
    loaded = loading.load(str(save_model(tmp_path / "model", "llama")), torch.float32, torch.device("cpu"))
    given = DistillOptions(
        pretrained="m", data=("self",), samples=4, calib_samples=8, batch_size=2, epochs=2, seq_len=32
    )
    found = workflows_text.sequences_of(given, loaded, "se", train=8, least=1, validation=8)
    assert (len(found.train), len(found.calibration)) == (4, 8)


def test_held_out_text_of_a_mixture_is_the_same_for_every_seed(tmp_path: Path) -> None:
    loaded = loading.load(str(save_model(tmp_path / "model", "llama")), torch.float32, torch.device("cpu"))
    (tmp_path / "b.txt").write_text("".join(f"line {i} of the other text\n" for i in range(2000)))
    found = []
    for seed in (0, 1):
        given = DistillOptions(
            pretrained="m",
            data=("python-docs=0.7", f"{tmp_path / 'b.txt'}=0.3"),
            seq_len=32,
            test_samples=20,
            seed=seed,
        )
        found.append(workflows_text.sequences_of(given, loaded, "rtn", train=8, least=1, validation=8))
    assert torch.equal(found[0].test.ids, found[1].test.ids)
    assert torch.equal(found[0].validation.ids, found[1].validation.ids)
    assert not torch.equal(found[0].train.ids, found[1].train.ids)


def test_a_source_of_a_mixture_that_is_not_there_is_named_once(tmp_path: Path) -> None:
    loaded = loading.load(str(save_model(tmp_path / "model", "llama")), torch.float32, torch.device("cpu"))
    given = DistillOptions(pretrained="m", data=("python-docs=0.7", "./nowhere.txt=0.3"), seq_len=32)
    with pytest.raises(DataError) as refused:
        workflows_text.sequences_of(given, loaded, "rtn", train=8, least=1, validation=8)
    assert str(refused.value).startswith("--data ./nowhere.txt must be an existing file")


def test_malformed_shares_are_refused_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def never(*given: object) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(loading, "load", never)
    model = save_model(tmp_path / "model", "llama")
    for flag in ("--data", "--eval_data"):
        assert main.main([*command(model, tmp_path / "run")[3:], flag, "python-docs=x"]) == 2
        assert "must be NAME=SHARE for every source" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
