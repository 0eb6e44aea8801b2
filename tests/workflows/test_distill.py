"""distill from options to the run folder: what it makes, what it says, and the same bits after kill -9 anywhere."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import nybble
from nybble import files
from nybble.cli.main import main
from nybble.data import sources, splits
from nybble.errors import RunError
from nybble.models import loading, quantized_file
from nybble.models.quantized_file import WEIGHTS_FILE
from nybble.options.commands import CompressOptions, DistillOptions
from nybble.options.toml import to_toml
from nybble.qat.fake_quant_lora import FakeQuantizedLoRALinear
from nybble.run.results import Phase, RunResults, read_results
from nybble.training.losses import kl_to_teacher
from nybble.training.teacher import teacher_hidden_states
from nybble.workflows import distill as distill_module
from nybble.workflows import placement, steps
from nybble.workflows.compress import compress
from nybble.workflows.distill import distill
from tests.helpers.chat import TEMPLATE
from tests.helpers.copies import copy_run
from tests.helpers.distill import distill_options, interrupt_after, kill_at, shipped_bytes
from tests.helpers.tiny import make_tokenizer, save_model


def arguments(model: Path, run: Path, *more: str) -> list[str]:
    """The options of `distill_options` as a person would give them, with enough steps to be killed in."""
    recipe = run.with_suffix(".toml")
    recipe.write_text(to_toml(distill_options(model, run, epochs=10, save_steps=3, dtype="float32")))
    return ["distill", "--config", str(recipe), *more]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and a run that distilled it, for tests that change none of them."""
    folder = tmp_path_factory.mktemp("finished")
    distill(distill_options(save_model(folder / "model", "llama"), folder / "run"))
    return folder


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose learning rates are too high, which stops after two epochs without progress of five; only read."""
    folder = tmp_path_factory.mktemp("spoiled")
    changes = {"lr": 10.0, "scale_lr": 1.0, "epochs": 5, "early_stopping_patience": 2}
    distill(distill_options(save_model(folder / "model", "llama"), folder / "run", **changes))
    return folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "count", "resumed"),
    [("train.json", 2, 0), ("last.safetensors", 2, 2), ("last.safetensors", 10, 14)],
    ids=["teacher", "early", "late"],
)
def test_kill_9_and_resume_end_with_the_same_bits(name: str, count: int, resumed: int, tmp_path: Path) -> None:
    model, run = save_model(tmp_path / "model", "smollm"), tmp_path / "run"
    distill(distill_options(model, tmp_path / "undisturbed", epochs=10, save_steps=3, dtype="float32"))
    kill_at(name, count, arguments(model, run))
    assert not (run / "quantized").exists()
    command = [sys.executable, "-m", "nybble", *arguments(model, run, "--resume")]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    assert shipped_bytes(run) == shipped_bytes(tmp_path / "undisturbed")
    resumes = f"resumed at step {resumed} of 20" in (run / "log.txt").read_text()
    assert resumes == (resumed > 0), "continued, and not begun again"
    assert read_results(run).command_line.startswith("nybble distill --config")


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2, 3])
def test_killed_after_training_it_ends_with_the_same_bits(count: int, tmp_path: Path) -> None:
    """Results are written at the end of stages: killed at each of the last writes, the phase decides what is left."""
    model, run = save_model(tmp_path / "model", "smollm"), tmp_path / "run"
    distill(distill_options(model, tmp_path / "undisturbed", dtype="float32"))
    written = sum(1 for _ in read_results(tmp_path / "undisturbed").seconds) + 4
    recipe = run.with_suffix(".toml")
    recipe.write_text(to_toml(distill_options(model, run, dtype="float32")))
    kill_at("results.json", written + count, ["distill", "--config", str(recipe)])
    assert main(["distill", "--config", str(recipe), "--resume"]) == 0
    assert shipped_bytes(run) == shipped_bytes(tmp_path / "undisturbed")
    assert read_results(run).models == read_results(tmp_path / "undisturbed").models


# Runs argv[1] with torch, transformers, accelerate and what these need; everything else that is installed cannot be
# imported.
BARE = """
import re, sys
from importlib import metadata
from packaging.requirements import Requirement

def plain(name): return re.sub("[-_.]+", "-", name).lower()
wanted, there = ["torch", "transformers", "accelerate", "filelock", "psutil", "rich"], set()
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
def test_distilling_from_python_needs_few_packages(text: str, tmp_path: Path) -> None:
    """A bare GPU machine has torch, transformers and accelerate; the rest is for those who use it."""
    (tmp_path / "notes.txt").write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(2000)))
    data = text if text == "python-docs" else str(tmp_path / text)
    model, run = save_model(tmp_path / "model", "llama"), tmp_path / "run"
    values = distill_options(model, run, data=(data,), method="awq+se+blockwise", num_calibration_samples=8).flat()
    code = f"import nybble; nybble.distill(**{values!r}); import datasets"
    ended = subprocess.run([sys.executable, "-c", BARE, code], capture_output=True, text=True, timeout=300, check=False)
    assert ended.stderr.strip().endswith("import of datasets halted; None in sys.modules"), ended.stderr
    assert read_results(run).finished


@pytest.mark.slow
def test_a_second_resume_of_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    model, run = save_model(tmp_path / "model", "llama"), tmp_path / "run"
    distill(distill_options(model, run))
    before, results = shipped_bytes(run), read_results(run)
    assert nybble.distill(output_dir=str(run), resume=True).path == run
    assert shipped_bytes(run) == before
    assert read_results(run).models == results.models


@pytest.mark.parametrize(
    ("family", "dtype"),
    [pytest.param("gemma2", "float32", marks=pytest.mark.slow), ("llama", "bfloat16")],
)
def test_without_adapters_codes_stay_and_scales_and_norms_are_trained(family: str, dtype: str, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", family)
    changes = {"lora_rank": 0, "dtype": dtype, "norm_lr": 3e-2, "scale_lr": 1e-2, "epochs": 8}
    distill(distill_options(model, tmp_path / "run", **changes))
    distill(distill_options(model, tmp_path / "start", **(changes | {"norm_lr": 0.0, "scale_lr": 1e-9, "epochs": 1})))
    (tuned, others), (start, before) = (
        quantized_file.load_weights(tmp_path / name / "quantized") for name in ("run", "start")
    )
    for name, weight in tuned.items():
        assert torch.equal(weight.codes_OI, start[name].codes_OI)
        assert torch.equal(weight.scale_OG, start[name].scale_OG) == (weight.scheme.bits == 8)
    norms = [key for key in others if "norm" in key]
    assert norms
    assert others.keys() == before.keys()
    for key, tensor in others.items():
        assert tensor.dtype == before[key].dtype
        assert torch.equal(tensor, before[key]) == (key not in norms), key
    results = read_results(tmp_path / "run")
    assert results.changes is not None
    assert results.changes.codes_changed == 0
    assert results.models["tuned"]["kl_to_teacher"] < 0.95 * results.models["compressed"]["kl_to_teacher"]


@pytest.mark.slow  # three exports
@pytest.mark.usefixtures("needs_openvino")
def test_a_finished_run_is_exported_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, run = save_model(tmp_path / "model", "llama"), tmp_path / "run"
    distill(distill_options(model, run))
    before = shipped_bytes(run)
    assert main(["export", str(run), "--to", "openvino"]) == 0
    exported = run / "openvino" / "openvino_model.bin"
    assert exported.stat().st_size > 0
    counts = read_results(run).exports["openvino"]
    assert (counts["linear_weights"], counts["embedding_weights"]) == (14, 2)
    assert shipped_bytes(run) == before
    distill(distill_options(model, run, resume=True))
    assert "openvino" in read_results(run).models, "measured on resume"
    shutil.rmtree(run / "openvino")
    distill(distill_options(model, run, resume=True))
    assert exported.stat().st_size > 0, "made again"
    (run / "quantized").rename(tmp_path / "elsewhere")
    assert main(["export", str(run)]) == 2
    assert "must be a finished run; it has no 4-bit model; finish it with --resume" in capsys.readouterr().err


@pytest.mark.slow
def test_weight_cache_and_recompute_train_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_model(tmp_path / "model", "qwen2")
    losses, filled, original = [], [0], FakeQuantizedLoRALinear.fill_weight_cache

    def count(layer: FakeQuantizedLoRALinear) -> None:
        filled[0] += 1
        original(layer)

    monkeypatch.setattr(FakeQuantizedLoRALinear, "fill_weight_cache", count)
    # 14 layers; 4 steps, 3 validations, 1 measurement
    for cache, fills in (("step", 14 * (4 + 3 + 1)), ("recompute", 0)):
        filled[0] = 0
        distill(distill_options(model, tmp_path / cache, weight_cache=cache))
        assert filled[0] == fills
        training = read_results(tmp_path / cache).training()
        assert training is not None
        losses.append([entry["kl_to_teacher"] for entry in training.validation])
    # A code at a rounding boundary may flip, because float32 sums in another order.
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)
    assert losses[0][0] == losses[1][0]


def test_results_say_what_happened(finished: Path) -> None:
    run = finished / "run"
    results = read_results(run)
    assert results.phase == Phase.FINISHED
    assert results.models.keys() == {"16bit", "compressed", "tuned"}
    for row in results.models.values():
        assert row.keys() == {"token_perplexity", "tokens", "kl_to_teacher", "bytes"}
    assert results.models["16bit"]["kl_to_teacher"] == pytest.approx(0, abs=1e-6)
    full, compressed, tuned = (results.models[row]["token_perplexity"] for row in ("16bit", "compressed", "tuned"))
    assert results.improvement["tuned"] == pytest.approx((compressed - tuned) / (compressed - full))
    assert set(results.seconds) == {"load", "teacher", "measure", "compress", "train", "absorb"}
    assert results.layers is not None
    layers = results.layers
    assert (layers.int4, layers.int8, layers.tied, layers.precision, layers.notes) == (
        14,
        2,
        False,
        "INT4",
        [],
    )
    assert layers.schemes == {"uint4 asymmetric group 64": 14, "uint8 symmetric per row": 2}
    assert layers.bits_per_weight == pytest.approx(5.537, abs=1e-3)
    assert results.machine["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert results.peak_memory_bytes["cpu"] > 0
    text = (run / "report.md").read_text()
    assert f"{tuned:.3f}" in text
    # before training, and after each of two epochs
    assert (run / "log.txt").read_text().count("validation KL divergence") == 3
    assert not list((run / "teacher").glob("train.*")), "the large file is deleted when training is done"
    assert len(results.decoder_errors["tuned"]) == 2


@pytest.mark.slow
def test_the_test_text_chooses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another test split leaves the weights alone, to the last bit."""
    model = save_model(tmp_path / "model", "llama")
    distill(distill_options(model, tmp_path / "one"))
    original = sources.load_documents

    def other_test(*given: Any) -> splits.DocumentSplits:
        return dataclasses.replace(original(*given), test=["something else entirely " * 50])

    monkeypatch.setattr(sources, "load_documents", other_test)
    distill(distill_options(model, tmp_path / "two"))
    assert shipped_bytes(tmp_path / "one") == shipped_bytes(tmp_path / "two")


@pytest.mark.slow
def test_the_model_generates_text_and_another_run_reads_it(tmp_path: Path) -> None:
    model, run = save_model(tmp_path / "model", "smollm"), tmp_path / "run"
    distill(distill_options(model, run, data=("self",)))
    results = read_results(run)
    assert results.test_data == "the test split of python-docs (4 x 32 tokens)"
    assert results.seconds["generate"] > 0
    generated, _ = files.load_tensors(run / "self.safetensors")
    assert len(generated["ids"]) >= 8  # --num_train_samples
    distill(distill_options(model, tmp_path / "other", data=(str(run / "self.safetensors"),)))
    one, other = (read_results(folder).trainings[0].validation for folder in (run, tmp_path / "other"))
    assert one[0] == other[0]
    assert one[-1] != other[-1], "the same sequences in another order"


@pytest.mark.slow
def test_the_model_continues_beginnings_of_a_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, path, run = save_model(tmp_path / "model", "smollm"), tmp_path / "lines.txt", tmp_path / "run"
    path.write_text("".join(f"line {i} of few\n" for i in range(400)))
    flags = arguments(model, run, "--epochs", "1", "--data")
    assert main([*flags, f"self:{path}"]) == 0
    assert read_results(run).test_data.startswith(f"the test split of {path} (")
    generated, _ = files.load_tensors(run / "self.safetensors")
    pieces = {make_tokenizer().decode(row[:8]) for row in generated["ids"]}  # a token per letter, a quarter of 32
    assert len(pieces) > 4
    assert all(piece in path.read_text() for piece in pieces)
    path.write_text("another text\n" * 400)
    assert main([*flags, f"self:{path}", "--resume"]) == 2
    assert "the prefixes changed" in capsys.readouterr().err.replace("test text and the ", "").replace(
        "validation text and the ", ""
    )


def test_only_what_the_assistant_says_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, chat = save_model(tmp_path / "model", "smollm"), tmp_path / "chat.jsonl"
    tokenizer = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"chat_template": TEMPLATE}))
    # [u]say it</s>[a]it</s>: "it</s>" is 3 tokens
    talk = [{"role": "user", "content": "say it"}, {"role": "assistant", "content": "it"}]
    chat.write_text("".join(json.dumps({"messages": talk}) + "\n" for _ in range(60)))
    distill(distill_options(model, tmp_path / "run", data=(str(chat),), assistant_only_loss=True))
    assert read_results(tmp_path / "run").models["tuned"]["tokens"] == 6 * 3  # a tenth of the conversations
    evaluation = ["eval", str(tmp_path / "run"), "--data", str(chat), "--assistant_only_loss", "--seq_len", "32"]
    assert main(evaluation) == 0
    assert '"tokens": 18' in capsys.readouterr().out
    assert main(arguments(model, tmp_path / "no", "--assistant_only_loss")) == 2
    assert "needs conversations" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_a_small_source_is_taught_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, chat = save_model(tmp_path / "model", "smollm"), tmp_path / "chat.jsonl"
    tokenizer = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"chat_template": TEMPLATE}))
    talks = [
        [{"role": "user", "content": "say it"}, {"role": "assistant", "content": letter * 8}] for letter in "abcdefghij"
    ]
    chat.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    taught = {}

    def spied(path: Path, model: Any, ids: torch.Tensor, *rest: Any) -> Any:
        taught[path.stem] = ids
        return teacher_hidden_states(path, model, ids, *rest)

    monkeypatch.setattr(steps, "teacher_hidden_states", spied)
    distill(
        distill_options(
            model,
            tmp_path / "run",
            data=(f"{chat}=0.5", "python-docs=0.5"),
            eval_data=("python-docs",),
            assistant_only_loss=True,
            num_train_samples=16,
        )
    )
    # the training tenths of 10 conversations; half of 32 sequences
    assert len(taught["train"]) == 8 + 16
    assert len(taught["train"].unique(dim=0)) == len(taught["train"])
    results = read_results(tmp_path / "run")
    assert results.models["tuned"]["tokens"] == 4 * 31, "plain text counts whole"
    assert results.trainings[0].best_step > 0


def test_training_that_makes_it_worse_is_said_and_undone(spoiled: Path) -> None:
    results = read_results(spoiled)
    assert results.trainings[0].best_step == 0
    assert "no step of the training was better on the validation text than the compressed model" in results.warnings[0]
    assert results.changes is not None
    assert results.changes.codes_changed == 0
    kls = [results.models[row]["kl_to_teacher"] for row in ("tuned", "compressed")]
    assert kls[0] == pytest.approx(kls[1], rel=1e-6)


@pytest.mark.slow
def test_the_same_sequences_in_every_epoch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = arguments(save_model(tmp_path / "model", "smollm"), tmp_path / "run", "--epochs", "2")
    assert main(given) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "4 steps of 4 x 32 tokens = 0.00 M tokens, 1.00 passes over the 16 training sequences" in said
    assert main([*given, "--same_samples", "--overwrite"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "4 steps of 4 x 32 tokens = 0.00 M tokens, 2.00 passes over the 8 training sequences" in said


def test_training_stops_early_where_that_is_wanted(spoiled: Path) -> None:
    training = read_results(spoiled).trainings[0]
    assert [validation["step"] for validation in training.validation] == [0, 2, 4]
    assert len(training.steps) == 4


def test_averaged_weights_are_what_is_measured_and_kept(tmp_path: Path) -> None:
    model, run = save_model(tmp_path / "model", "llama"), tmp_path / "run"
    changes = {"lr_scheduler_type": "constant_with_averaging", "lr": 1e-3, "scale_lr": 2e-3, "norm_lr": 1e-3}
    distill(distill_options(model, run, **changes))
    best, note = files.load_tensors(run / "best.safetensors")
    last, _ = files.load_tensors(run / "last.safetensors")
    assert note["best_step"] == 4
    for name, tensor in best.items():
        assert torch.equal(tensor, last[f"mean:{name}"])
        assert not torch.equal(tensor, last[name])


def test_a_loss_that_is_not_finite_stops_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*given: Any, **keywords: Any) -> torch.Tensor:
        return kl_to_teacher(*given, **keywords) * float("nan")

    monkeypatch.setattr(distill_module, "kl_to_teacher", broken)
    assert main(arguments(save_model(tmp_path / "model", "llama"), tmp_path / "run")) == 2
    said = capsys.readouterr().err
    assert "step 1" in said
    assert "learning rate" in said


def test_a_used_folder_is_refused_before_the_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "other").write_text("x")
    assert main(arguments(Path("no-such-model"), tmp_path / "run")) == 2
    assert "it holds other files; choose another folder" in capsys.readouterr().err


def test_overwrite_spares_what_the_run_reads(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy_run(finished, tmp_path)
    model, run = tmp_path / "model", tmp_path / "run"
    before = shipped_bytes(run)
    (run / "self.safetensors").touch()
    recipe = run.with_suffix(".toml")
    recipe.write_text(to_toml(distill_options(model, run, method="auto")))
    given = ["distill", "--config", str(recipe), "--overwrite"]
    for flags in (["--init_from", str(run)], ["--data", str(run / "self.safetensors"), "--eval_data", "python-docs"]):
        assert main([*given, *flags]) == 2
        assert f"--overwrite would delete {flags[0]} {flags[1]}, which this run reads" in capsys.readouterr().err
    assert shipped_bytes(run) == before


def test_resume_refuses_text_that_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, texts, run = save_model(tmp_path / "model", "smollm"), tmp_path / "texts", tmp_path / "run"
    texts.mkdir()
    for split in ("train", "validation", "test"):
        (texts / f"{split}.txt").write_text("".join(f"line {i} of the {split} text\n" for i in range(600)))
    given = arguments(model, run, "--data", str(texts), "--epochs", "1")
    assert main(given) == 0
    before = shipped_bytes(run)
    (texts / "validation.txt").write_text("something else " * 600)
    assert main([*given, "--resume"]) == 2
    assert "the validation text changed; bring it back, or start again (--overwrite)" in capsys.readouterr().err
    assert shipped_bytes(run) == before


@pytest.mark.slow
def test_resume_refuses_another_initial_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, start, run = save_model(tmp_path / "model", "smollm"), tmp_path / "start", tmp_path / "run"
    shared = {"pretrained": str(model), "output_dir": str(start), "data": "python-docs", "seq_len": 32,
              "num_test_samples": 2, "num_calibration_samples": 8, "eval_tasks": "none", "export": "none"}  # fmt: skip
    compress(CompressOptions.of(**shared, method="se"))
    options = distill_options(model, run, init_from=str(start), group_size=64)
    interrupted = options.replace(output_dir=str(tmp_path / "interrupted"))
    distill(options)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(2, patch)
        distill(interrupted)
    assert read_results(run).described_method == f"se from {start}"
    compress(CompressOptions.of(**shared, method="rtn", overwrite=True))
    with pytest.raises(RunError, match="the 4-bit model of --init_from changed; bring it back, or start again"):
        distill(interrupted.replace(resume=True))
    shutil.rmtree(start)
    distill(options.replace(resume=True, export=("hf",)))  # it has its own 4-bit model, and needs no other
    assert read_results(run).described_method == f"se from {start}"


def test_without_checkpoints_and_model_the_training_is_repeated(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = distill_options(save_model(tmp_path / "model", "smollm"), tmp_path / "run", dtype="float32")
    distill(options)
    before = shipped_bytes(tmp_path / "run")
    (tmp_path / "run" / "last.safetensors").unlink()
    (tmp_path / "run" / "quantized" / WEIGHTS_FILE).unlink()
    distill(options.replace(resume=True))
    assert shipped_bytes(tmp_path / "run") == before
    assert "run has no last.safetensors; the training is repeated" in caplog.text


def test_a_model_that_repeats_itself_leaves_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("nybble.data.generate.MIN_DISTINCT_NGRAMS", 1.1)
    model, run = save_model(tmp_path / "model", "smollm"), tmp_path / "run"
    assert main(arguments(model, run, "--data", "self")) == 2
    assert "needs a model that generates varied text" in capsys.readouterr().err
    assert not run.exists()


def test_a_small_disk_is_refused_before_anything_is_written(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copy_run(finished, tmp_path)
    model, run = tmp_path / "model", tmp_path / "other"
    monkeypatch.setattr("nybble.files.shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    assert main(arguments(model, run)) == 2
    assert "GB are free" in capsys.readouterr().err
    assert not run.exists()
    distill(distill_options(model, tmp_path / "run", resume=True))  # a finished run needs no disk for training


def test_what_another_command_began_is_refused(tmp_path: Path) -> None:
    shared = {"pretrained": str(save_model(tmp_path / "model", "llama")), "output_dir": str(tmp_path / "run"),
              "data": "python-docs", "seq_len": 32, "num_test_samples": 2, "eval_tasks": "none",
              "export": "none"}  # fmt: skip
    compress(CompressOptions.of(**shared, method="rtn"))
    with pytest.raises(RunError, match="run was begun by nybble compress; choose another --output_dir"):
        distill(DistillOptions.of(**shared, resume=True))


def test_malformed_shares_are_refused_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loading, "load_tokenizer", lambda *given: pytest.fail("loaded"))
    model = save_model(tmp_path / "model", "llama")
    for flag in ("--data", "--eval_data"):
        assert main(arguments(model, tmp_path / "run", flag, "python-docs=x")) == 2
        assert "must be NAME=SHARE for every source" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["compress", "distill"])
def test_text_is_read_before_the_model(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model can be a download of many gigabytes, and a wrong column a second's work to find."""
    monkeypatch.setattr(loading, "load", lambda *given: pytest.fail("the model was loaded"))
    monkeypatch.setattr(placement, "safetensors_files", lambda *given: pytest.fail("the weights were looked at"))
    model = save_model(tmp_path / "model", "llama")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"body": "a text"}\n' * 20)
    given = [command, "--pretrained", str(model), "--eval_tasks", "none", "--output_dir", str(tmp_path / "run")]
    assert main([*given, "--data", str(rows)]) == 2
    assert "must be a column of" in capsys.readouterr().err
    assert main([*given, "--data", str(rows), "--text_column", "body", "--method", "rtn"]) == 2
    assert "must give at least" in capsys.readouterr().err
    assert main([*given, "--data", str(rows), "--device", "abacus"]) == 2
    assert "--device abacus is not usable" in capsys.readouterr().err, "a device is looked at sooner still"
    assert main([*given, "--data", str(rows), "--offload", "disk", "--pretrained", "smollm2"]) == 2
    assert "smollm2 is a GGUF file" in capsys.readouterr().err
    (tmp_path / "three.txt").write_text("a short text " * 10)
    few = ["--data", str(tmp_path / "three.txt"), "--eval_data", "python-docs", "--seq_len", "32"]
    few += ["--num_train_samples", "2", "--num_validation_samples", "2", "--batch_size", "2"] * (command == "distill")
    assert main([*given, *few]) == 2
    assert "must give at least 8 sequences" in (printed := " ".join(capsys.readouterr().err.split()))
    assert printed.endswith("--method rtn needs no text to calibrate on"), "it might be rtn for this model"
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_that_compressed_can_be_trained(tmp_path: Path) -> None:
    """--init_from takes over the codes and scales of a finished run exactly."""
    model, first, second = save_model(tmp_path / "model", "llama"), tmp_path / "first", tmp_path / "second"
    begin = CompressOptions.of(
        pretrained=str(model), output_dir=str(first), data="python-docs", seq_len=32, num_test_samples=4,
        method="awq+se+gptq", num_calibration_samples=8, group_size=32, eval_tasks="none", export="none",
    )  # fmt: skip
    compress(begin)
    distill(
        distill_options(
            model, second, init_from=str(first), group_size=32, lora_rank=0, scale_lr=0.0, norm_lr=1e-9, epochs=1
        )
    )
    one, other = (read_results(folder) for folder in (first, second))
    assert other.models["compressed"]["kl_to_teacher"] == pytest.approx(
        one.models["compressed"]["kl_to_teacher"], rel=1e-5
    )
    assert other.layer_errors == one.layer_errors
    assert not RunResults().init_trained
    weights = [quantized_file.load_weights(folder / "quantized")[0] for folder in (first, second)]
    for name, weight in weights[0].items():
        assert torch.equal(weight.codes_OI, weights[1][name].codes_OI)
        assert torch.equal(weight.scale_OG, weights[1][name].scale_OG)
