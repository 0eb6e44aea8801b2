"""The command line: flags, files, help, and one line on stderr with exit code 2 for whatever a person can repair."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import nybble
from nybble.cli import main
from nybble.errors import MissingExtraError
from nybble.evaluation import lm_eval
from nybble.export import base
from nybble.options.commands import DistillOptions, EvalOptions, from_toml, to_toml
from tests.tiny import save_model


def error_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The line on stderr of a command that must fail with exit code 2."""
    assert main.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("nybble: ")
    assert captured.err.count("\n") == 1, "one line"
    return captured.err.removeprefix("nybble: ").strip()


def test_flags_take_underscores_and_dashes() -> None:
    options, _ = main.parse(
        [
            "distill",
            "--pretrained",
            "m",
            "--lora_rank",
            "7",
            "--batch-size=4",
            "--tasks",
            "arc_easy",
            "wikitext",
            "--no_tensorboard",
        ]
    )
    assert options == DistillOptions(
        pretrained="m", lora_rank=7, batch_size=4, tasks=("arc_easy", "wikitext"), tensorboard=False
    )


def test_flags_are_stronger_than_the_file(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text('pretrained = "m"\nlr = 0.5\nseed = 3\ntasks = []\n')
    options, _ = main.parse(["distill", "--config", str(tmp_path / "recipe.toml"), "--lr", "0.25"])
    assert options == DistillOptions(pretrained="m", lr=0.25, seed=3, tasks=())


def test_resume_starts_from_the_options_of_the_run(tmp_path: Path) -> None:
    saved = DistillOptions(pretrained="m", lr=0.125, samples=64, tasks=(), output_dir=str(tmp_path), overwrite=True)
    (tmp_path / "config.toml").write_text(to_toml(saved))
    options, _ = main.parse(["distill", "--resume", "--output_dir", str(tmp_path)])
    assert options == DistillOptions(**vars(saved) | {"resume": True, "overwrite": False})


def test_only_a_flag_allows_code_that_comes_with_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.toml").write_text('pretrained = "m"\nseed = 0\ntrust_remote_code = true\n')
    assert "remove trust_remote_code, and give it as a flag if you trust the model" in error_of(
        ["distill", "--config", str(tmp_path / "config.toml")], capsys
    )
    resumed = ["distill", "--resume", "--output_dir", str(tmp_path)]
    assert main.parse(resumed)[0].trust_remote_code is False
    assert main.parse([*resumed, "--trust_remote_code"])[0].trust_remote_code is True
    assert "trust_remote_code" not in to_toml(DistillOptions(pretrained="m", trust_remote_code=True))


def test_resume_finds_the_default_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    saved = DistillOptions(pretrained="org/Model-1.5B", lr=0.125)
    assert saved.folder == Path("runs/Model-1.5B-distill")
    saved.folder.mkdir(parents=True)
    (saved.folder / "config.toml").write_text(to_toml(saved))
    assert main.parse(["distill", "--pretrained", "org/Model-1.5B", "--resume"])[0].lr == 0.125


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["--version"]) == 0
    assert capsys.readouterr().out == f"nybble {nybble.__version__}\n"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('lr = "abc"', "lr must be a number; got 'abc'"),
        ("epochs = 1.5", "epochs must be a whole number; got 1.5"),
        ('cache = "bogus"', "cache must be one of auto, step, recompute; got 'bogus'"),
        ("tasks = 3", "tasks must be a list of texts; got 3"),
        ("task_limit = 1.5", "task_limit must be a whole number; got 1.5"),
        ("resume = 1", "resume must be true or false; got 1"),
        ("data_dir = 1", "data_dir must be text; got 1"),
    ],
)
def test_values_of_the_wrong_type_in_a_file(
    line: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "r.toml").write_text(line)
    assert words in error_of(["distill", "--config", str(tmp_path / "r.toml")], capsys)


def test_help_does_not_import_torch() -> None:
    code = "import sys; from nybble.cli.main import main; main([]); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize(
    "text",
    ["m", 'C:\\new "quoted"', "line\nbreak\ttab\x00\x1f\x7f\x80", "\u65e5\u672c \U0001f600", "a = 1 # no comment"],
)
def test_options_survive_toml(text: str, tmp_path: Path) -> None:
    options = DistillOptions(
        pretrained=text,
        tasks=("a", text),
        data=(),
        task_limit=None,
        seed=5,
        lr=1e-5,
        scale_lr=3.0,
        export=(),
        tensorboard=False,
    )
    (tmp_path / "config.toml").write_text(to_toml(options))
    assert DistillOptions(**from_toml(DistillOptions, tmp_path / "config.toml")) == options


def test_eval_takes_its_target_by_position() -> None:
    options, _ = main.parse(["eval", "runs/demo", "--tasks", "wikitext", "--data_dir", "data"])
    assert options == EvalOptions(target="runs/demo", tasks=("wikitext",), data_dir="data")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            "distil",
            "unknown command distil; did you mean distill?; the commands are distill, tune, search, compress, export, eval, inspect, report, env",
        ),
        (
            "distill --pretraind m",
            "unknown flag --pretraind of nybble distill; did you mean --pretrained?; see nybble distill --help",
        ),
        (
            "distill --batch_sizes 3",
            "unknown flag --batch_sizes of nybble distill; did you mean --batch_size?; see nybble distill --help",
        ),
        ("distill", "--pretrained is required: a hub id, a local folder, a .gguf file, or smollm2"),
        ("distill --pretrained m --lora_rank -1", "--lora_rank must be 0 (no adapters) or more; got -1"),
        (
            "distill --pretrained m --lora_rank 0 --scale_lr 0 --norm_lr 0",
            "--scale_lr, --norm_lr, or --lora_rank and --lr must be above 0",
        ),
        ("distill --pretrained m --norm_lr -1", "--norm_lr must be 0 or more; got -1"),
        (
            "distill --pretrained m --batch_size 64 --samples 32",
            "--batch_size must not be larger than --samples; got 64 and 32",
        ),
        ("distill --pretrained m --lr -1", "--lr must be 0 or more; got -1.0"),
        ("distill --pretrained m --warmup 2", "--warmup must be from 0 to 1; got 2.0"),
        ("distill --pretrained m --seq_len 0", "--seq_len must be at least 8; got 0"),
        (
            "distill --pretrained m --start best",
            "--start, where it is not the folder of a run, must be rtn, or one or more of awq, se, gptq, blockwise in this order",
        ),
        (
            "compress --pretrained m --method gptq+awq",
            "one or more of awq, se, gptq, blockwise in this order, joined by +; got gptq+awq; awq+se+gptq,",
        ),
        (
            "compress --pretrained m --method auto",
            "--method must be rtn, or one or more of awq, se, gptq, blockwise in this order, joined by +; got auto",
        ),
        (
            "compress --pretrained m --method se+se",
            "--method must be rtn, or one or more of awq, se, gptq, blockwise in this order, joined by +; got se+se",
        ),
        ("compress --pretrained m --gptq_damping 0", "--gptq_damping must be more than 0 and at most 1; got 0"),
        ("compress --pretrained m --calib_samples 0", "--calib_samples must be at least 8; got 0"),
        ("compress --pretrained m --blockwise_epochs inf", "--blockwise_epochs must be more than 0; got inf"),
        ("compress", "--pretrained is required: a hub id, a local folder, a .gguf file, or smollm2"),
        ("distill --pretrained m --export tflite", "--export must name known formats (openvino); got tflite"),
        (
            "distill --pretrained m --dtype float16",
            "--dtype must be bfloat16 or float32 for training; float16 gradients vanish",
        ),
        ("eval m --seq_len 0", "--seq_len must be at least 8; got 0"),
        (
            "distill --pretrained m --resume --overwrite",
            "--resume and --overwrite contradict each other; give one of them",
        ),
        (
            "distill --pretrained m --config nowhere.toml",
            "--config nowhere.toml must be a TOML file; it cannot be read (No such file or directory)",
        ),
        ("distill --config", "--config needs a value"),
        (
            "distill --pretrained ./nowhere --tasks",
            "--pretrained ./nowhere must be a model folder, a .gguf file or a hub id; there is no such folder",
        ),
        ("distill --pretrained m --seed -1", "--seed must be from 0 to 2^32 - 1; got -1"),
        (
            "distill --pretrained smollm2 --device meta --tasks",
            "--device meta is not usable on this machine (it has no memory)",
        ),
        (
            "eval m --teacher t --no_perplexity --tasks arc_easy",
            "--teacher is for the KL divergence, which --no_perplexity leaves out",
        ),
        ("eval m --no_perplexity", "--no_perplexity leaves nothing to measure without --tasks"),
        ("eval m --teacher ./nowhere", "MODEL_OR_RUN m"),
        ("eval m --task_limit 0", "--task_limit must be at least 1; got 0"),
        ("compress --pretrained m --task_limit -3", "--task_limit must be at least 1; got -3"),
        ("distill --pretrained m --lr inf", "--lr must be 0 or more; got inf"),
        ("env --foo", "nybble env takes no arguments; got --foo"),
        ("export ./nowhere --to gguf", "--to must name known formats (openvino); got gguf"),
        ("export ./nowhere --to", "--to must name a format: openvino"),
        ("export ./nowhere", "nowhere must be a run folder; it has no nybble-run.json"),
        (
            "eval ./nowhere",
            "MODEL_OR_RUN ./nowhere must be a model folder, a .gguf file or a hub id; there is no such folder",
        ),
    ],
)
def test_bad_input(
    arguments: str, words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert words in error_of(arguments.split(), capsys)
    assert list(tmp_path.iterdir()) == [], "nothing half-written"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--lora_rank x", "Error parsing --lora-rank: invalid literal for int"),
        ("--dtype int3", "invalid choice 'int3' for argument '--dtype'"),
    ],
)
def test_values_of_the_wrong_type(arguments: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert words in error_of(["distill", "--pretrained", "m", *arguments.split()], capsys)


def test_unknown_keys_in_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "r.toml").write_text("batchsize = 3\n")
    assert "has an unknown key batchsize; did you mean batch_size?" in error_of(
        ["distill", "--config", str(tmp_path / "r.toml")], capsys
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            "--group_size 48",
            "in_features must be a multiple of group_size: layer model.layers.0.self_attn.q_proj has in_features=64, got group_size=48",
        ),
        ("--data ./nowhere.txt", "--data ./nowhere.txt must be an existing file or folder"),
        (
            "--data python-docs --eval_data ./nowhere.txt",
            "--eval_data ./nowhere.txt must be an existing file or folder",
        ),
        (
            "--data ./nowhere.safetensors",
            "--data ./nowhere.safetensors must be a file of tokens that --data self wrote",
        ),
        ("--data python-docs --seq_len 100000", "the training text must give at least 16 sequences of 100000 tokens"),
        ("--data wikitext2-plain", "--data wikitext2-plain is not on this machine"),
        (
            "--data wikitext2",
            "hub cannot be reached; name a local file or folder, --data_dir for a folder of data sets, or --data python-docs",
        ),
    ],
)
def test_what_is_found_after_loading_leaves_no_run_behind(
    changes: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(tmp_path / "model", "smollm")
    monkeypatch.chdir(tmp_path)
    assert words in error_of(["distill", "--pretrained", "./model", "--tasks", "--export", *changes.split()], capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_text_that_is_not_there_is_missed_by_rtn_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(tmp_path / "model", "smollm")
    monkeypatch.chdir(tmp_path)
    flags = ["compress", "--pretrained", "./model", "--method", "rtn", "--tasks", "--export", "--data"]
    assert "must be a file of tokens that --data self wrote" in error_of([*flags, "./nowhere.safetensors"], capsys)
    (tmp_path / "short.txt").write_text("a line\n" * 200)
    assert (
        "must have text in its test split; it is empty (splits are taken from 10 rows or 3 conversations on, or 201 lines of fewer)"
        in error_of([*flags, "short.txt"], capsys)
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "short.txt"]


def test_a_missing_extra_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (base, lm_eval):
        monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError) as error:
        base.check_formats(["openvino"])
    assert (
        str(error.value)
        == 'the extra "openvino" is needed for exporting to openvino; install it, in the clone, with: pip install -c constraints.txt -e ".[openvino]"'
    )
    with pytest.raises(
        MissingExtraError,
        match=r'the extra "eval" is needed for measuring wikitext .*pip install -c constraints.txt -e "\.\[eval\]"',
    ):
        lm_eval.check_tasks(["wikitext"], None)


def test_help_speaks_of_every_command_and_flag(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main([]) == 0
    usage = capsys.readouterr().out
    assert all(f"nybble {command}" in usage for command in (*main.COMMANDS, "env"))
    with pytest.raises(SystemExit) as stop:
        main.main(["distill", "--help"])
    assert stop.value.code in (0, None)
    text = capsys.readouterr().out
    assert "--lora-rank INT" in text
    assert "hub id, local folder, .gguf" in text


def test_the_installed_command_shows_the_environment() -> None:
    done = subprocess.run([sys.executable, "-m", "nybble", "env"], capture_output=True, text=True, check=True)
    assert "torch" in done.stdout
    assert "transformers" in done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="GNU OpenMP is torch's on Linux only")
@pytest.mark.parametrize(
    ("chosen", "spins"), [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "passive"}, "0")]
)
def test_waiting_threads_spin_briefly_unless_told_otherwise(chosen: dict[str, str], spins: str) -> None:
    """As torch's OpenMP says when it is loaded: what is set later has no effect."""
    plain = {key: value for key, value in os.environ.items() if key not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run(
        [sys.executable, "-m", "nybble", "env"],
        env=plain | chosen | {"OMP_DISPLAY_ENV": "verbose"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"GOMP_SPINCOUNT = '{spins}'" in done.stderr


def test_a_device_without_memory_is_said_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    def full(options: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate ...")

    monkeypatch.setattr("nybble.cli.commands.inspect", full)
    assert main.main(["inspect", "runs/demo"]) == 2
    assert (
        capsys.readouterr().err
        == "nybble: the device must have memory for this; it ran out; use a smaller model, or --device cpu\n"
    )

    def wrong(options: object) -> None:
        raise RuntimeError("ours")

    monkeypatch.setattr("nybble.cli.commands.inspect", wrong)
    with pytest.raises(RuntimeError, match="ours"):
        main.main(["inspect", "runs/demo"])
