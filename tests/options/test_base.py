"""Options by flat names: types, defaults, errors."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from nybble.errors import OptionError
from nybble.options.base import Group
from nybble.options.commands import (
    COMMANDS,
    ChatOptions,
    CompressOptions,
    DistillOptions,
    EvalOptions,
    ExportOptions,
    InspectOptions,
    ReportOptions,
    RunCommand,
    TuneOptions,
)


@pytest.mark.parametrize("kind", COMMANDS.values(), ids=COMMANDS)
def test_names_are_unique_within_a_command(kind: type[RunCommand]) -> None:
    assert len(kind.fields()) == sum(len(dataclasses.fields(group)) for group in kind.groups().values())
    assert all(issubclass(group, Group) for group in kind.groups().values())


@pytest.mark.parametrize("kind", COMMANDS.values(), ids=COMMANDS)
def test_every_option_has_a_help_text_that_is_a_sentence(kind: type[RunCommand]) -> None:
    for name, field in kind.fields().items():
        assert field.metadata["help"].endswith((".", "...")), name


def test_values_of_python_are_taken_for_what_they_are() -> None:
    options = DistillOptions.of(
        pretrained=Path("m"), init_from=Path("r"), lr=np.float64(1e-3), epochs=np.int64(2), data=[Path("a.txt")],
        export=None,
    )  # fmt: skip
    found = options.flat()
    assert [found[name] for name in ("pretrained", "init_from", "lr", "epochs", "data", "export")] == [
        "m", "r", 1e-3, 2, ("a.txt",), (),
    ]  # fmt: skip
    assert [type(found[name]) for name in ("pretrained", "lr", "epochs")] == [str, float, int]


def test_flat_values_go_to_their_groups_and_back() -> None:
    options = DistillOptions.of(pretrained="m", lr=1, data="a.txt", eval_tasks=["arc_easy", "wikitext"], limit=None)
    assert (options.training.lr, options.text.data, options.evaluation.eval_tasks) == (
        1.0,
        ("a.txt",),
        ("arc_easy", "wikitext"),
    )
    assert type(options.training.lr) is float
    assert DistillOptions.of(**options.flat()) == options
    changed = options.replace(lora_rank=0)
    assert (changed.training.lora_rank, changed.training.lr) == (0, 1.0)


@pytest.mark.parametrize("none", ["none", ["none"], [], ()])
def test_none_is_an_empty_list(none: object) -> None:
    assert CompressOptions.of(pretrained="m", export=none).evaluation.export == ()


NO_FILE_NAME = "must be text that a file name can hold; '{}' has a zero byte or half of a character in it"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"lr": "abc"}, "--lr must be a number; got 'abc'"),
        ({"lr": float("nan")}, "--lr must be a number; got nan"),
        ({"epochs": 1.5}, "--epochs must be a whole number; got 1.5"),
        ({"epochs": True}, "--epochs must be a whole number; got True"),
        ({"weight_cache": "bogus"}, "--weight_cache must be one of auto, step, recompute; got 'bogus'"),
        ({"eval_tasks": 3}, "--eval_tasks must be a list of texts; got (3,)"),
        ({"limit": 1.5}, "--limit must be a whole number; got 1.5"),
        ({"resume": 1}, "--resume must be true or false; got 1"),
        ({"data_dir": 1}, "--data_dir must be text; got 1"),
        ({"batchsize": 1}, "batchsize is no option of nybble distill; did you mean batch_size?"),
        ({"pretrained": "\ud800"}, rf"--pretrained {NO_FILE_NAME.format(chr(92) + 'ud800')}"),
        ({"data": ("a", "b\0c")}, rf"--data {NO_FILE_NAME.format('b' + chr(92) + 'x00c')}"),
    ],
)
def test_wrong_values_are_named(values: dict[str, object], words: str) -> None:
    with pytest.raises(OptionError) as error:
        DistillOptions.of(**{"pretrained": "m"} | values)
    assert str(error.value) == words


@pytest.mark.parametrize(
    ("kind", "values", "words"),
    [
        (DistillOptions, {"pretrained": ""}, "--pretrained is required: Hub id, local folder, .gguf file, or smollm2"),
        (ExportOptions, {}, "RUN is required: "),
        (InspectOptions, {}, "TARGET is required: "),
        (ReportOptions, {}, "RUNS is required: "),
        (ChatOptions, {"target": "m", "prompt": " "}, "--prompt must be a message, not an empty one; got"),
        (TuneOptions, {}, "--task is required: gsm8k, hellaswag"),
        (DistillOptions, {"lora_rank": -1}, "--lora_rank must be 0 (no adapters) or more; got -1"),
        (
            DistillOptions,
            {"lora_rank": 0, "scale_lr": 0.0, "norm_lr": 0.0},
            "--scale_lr, --norm_lr, or --lora_rank and --lr must be above 0",
        ),
        (
            TuneOptions,
            {"task": "t", "lr": 0.0, "scale_lr": 0.0, "norm_lr": 0.0},
            "--lr, --scale_lr or --norm_lr must be above 0",
        ),
        (DistillOptions, {"train": "full", "lora_rank": 8}, "--train full has no adapters and takes no --lora_rank"),
        (DistillOptions, {"train": "rounding", "lora_rank": 0}, "--train rounding has no adapters and takes no"),
        (DistillOptions, {"cage_lambda": 1.0}, "--cage_lambda needs --train full"),
        (DistillOptions, {"cage_lambda": -1.0}, "--cage_lambda must be 0 or more; got -1"),
        (DistillOptions, {"kl_temperature": 0.0}, "--kl_temperature must be more than 0; got 0"),
        (DistillOptions, {"cross_entropy_share": 1.5}, "--cross_entropy_share must be from 0 to 1; got 1.5"),
        (DistillOptions, {"norm_lr": -1.0}, "--norm_lr must be 0 or more; got -1.0"),
        (DistillOptions, {"lr": float("inf")}, "--lr must be 0 or more; got inf"),
        (
            DistillOptions,
            {"batch_size": 64, "num_train_samples": 32},
            "--batch_size must not be larger than --num_train_samples; got 64 and 32",
        ),
        (DistillOptions, {"warmup_ratio": 2.0}, "--warmup_ratio must be from 0 to 1; got 2.0"),
        (DistillOptions, {"seq_len": 0}, "--seq_len must be at least 8; got 0"),
        (DistillOptions, {"report_to": "wandb"}, "--report_to must be tensorboard or none; got wandb"),
        (CompressOptions, {"gptq_damping": 0.0}, "--gptq_damping must be more than 0 and at most 1; got 0"),
        (
            CompressOptions,
            {"num_calibration_samples": 0},
            "--num_calibration_samples must be at least 8; got 0",
        ),
        (CompressOptions, {"blockwise_epochs": float("inf")}, "--blockwise_epochs must be more than 0; got inf"),
        (CompressOptions, {"limit": -3}, "--limit must be at least 1; got -3"),
        (CompressOptions, {"seed": -1}, "--seed must be from 0 to 2^32 - 1; got -1"),
        (
            DistillOptions,
            {"dtype": "float16"},
            "--dtype must be bfloat16 or float32 for training; float16 gradients vanish",
        ),
        (
            CompressOptions,
            {"dtype": "float16", "method": "se+blockwise"},
            "--dtype must be bfloat16 or float32 for blockwise",
        ),
        (DistillOptions, {"resume": True, "overwrite": True}, "--resume and --overwrite contradict each other"),
        (
            DistillOptions,
            {"method": "se", "init_from": "r"},
            "--method se and --init_from contradict each other; give one of them, or --method auto where a recipe",
        ),
        (TuneOptions, {"task": "t", "init_from": "r"}, "adapters are trained before that with --quantize after"),
        (TuneOptions, {"task": "t", "eval_only": True}, "--eval_only needs --resume and the folder of a run"),
        (EvalOptions, {"target": "m", "data": "none"}, "--data none leaves nothing to measure; name a text"),
        (
            EvalOptions,
            {"target": "m", "data": "none", "teacher": "t", "eval_tasks": "a"},
            "--teacher is for the KL divergence, which --data none leaves out",
        ),
    ],
)
def test_impossible_values_are_refused(kind: type[RunCommand], values: dict[str, object], words: str) -> None:
    given = ({"pretrained": "m"} if "pretrained" in kind.fields() else {}) | values
    with pytest.raises(OptionError, match="^(--|[A-Z]+ is required)") as error:
        kind.of(**given).check()
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("options", "folder"),
    [
        (CompressOptions.of(pretrained="org/Model-1.5B"), "runs/Model-1.5B-compress"),
        (CompressOptions.of(pretrained="org/Model-1.5B", method="awq+se"), "runs/Model-1.5B-awq+se"),
        (DistillOptions.of(pretrained="models/a.gguf"), "runs/a-distill"),
        (TuneOptions.of(pretrained="m", task="data/mine.jsonl"), "runs/m-mine"),
        (TuneOptions.of(pretrained="m", task="arc_easy", output_dir="x"), "x"),
    ],
    ids=str,
)
def test_run_folders_have_names(options: RunCommand, folder: str) -> None:
    assert str(options.folder) == folder
