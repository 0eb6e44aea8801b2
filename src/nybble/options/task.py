"""A downstream task, and neural low-rank adapter search (NLS) on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from nybble.options.base import Group, option
from nybble.options.data import MIN_SEQ_LEN

Objective = Literal["auto", "choices", "answer", "all"]
RankSampling = Literal["half", "random", "sandwich"]


@dataclass(frozen=True, kw_only=True)
class TaskDataOptions(Group):
    """Rows of a task and the loss on them."""

    TITLE: ClassVar[str] = "Data"

    data_dir: str | None = option(
        None, "Folder with local copies of datasets, for machines without the hub.", basic=True
    )
    seq_len: int = option(512, "Upper bound on the tokens of a prompt with its answer.")
    num_train_samples: int = option(0, "Upper bound on the training rows, chosen at random; 0: all.", basic=True)
    objective: Objective = option(
        "auto",
        "Loss: choices: -log of the right choice's share among the choices; answer: on the tokens of the right answer; "
        "all: on the prompt's tokens too; auto: choices if the task has them, otherwise answer.",
    )

    def check(self) -> None:
        """Raise OptionError for values outside of their range."""
        self.require("seq_len", lambda value: value >= MIN_SEQ_LEN, f"at least {MIN_SEQ_LEN}")
        self.require("num_train_samples", lambda value: value >= 0, "0 (all) or more")


@dataclass(frozen=True, kw_only=True)
class TaskOptions(TaskDataOptions):
    """One task to tune on."""

    task: str = option(
        "",
        "gsm8k, hellaswag, openbookqa, winogrande, arc_challenge, arc_easy, another lm-eval task with a training "
        "split, or a file of your own (.jsonl, .json, .csv, .parquet).",
        required=True,
    )
    teacher: str | None = option(
        None, "16-bit model tuned on the task, with the same vocabulary, whose predictions replace the right answers."
    )


@dataclass(frozen=True, kw_only=True)
class CompareTaskOptions(TaskDataOptions):
    """Several tasks to compare on."""

    tasks: tuple[str, ...] = option((), "lm-eval tasks with a training split.", required=True)


@dataclass(frozen=True, kw_only=True)
class RankOptions(Group):
    """Elastic ranks (NLS): how they are trained and chosen."""

    TITLE: ClassVar[str] = "Ranks"

    lora_rank_space: tuple[int, ...] = option(
        (32, 24, 16), "Ranks to choose from for every decoder layer; a single one is plain LoRA.", basic=True
    )
    rank_sampling: RankSampling = option(
        "half",
        "Ranks trained in a step. half: the largest in every other step, random ones between; random: always "
        "random, as "
        "published; sandwich: the largest, the smallest and random ones, all three in every step.",
    )
    num_min_loss_configs: int = option(5, "Configurations with the least training loss that become candidates.")
    num_selection_samples: int = option(200, "Held-out rows that epochs and configurations are chosen by; 0: all.")
    select_on: Literal["held_out", "test"] = option(
        "held_out", "Rows that configurations are chosen by. test: by the test score, as published results do."
    )
    fast_eval: bool = option(
        False, "Quantize once per evaluation, also with --weight_cache recompute; the results are the same."
    )

    def check(self) -> None:
        """Raise OptionError for values outside of their range."""
        self.require("num_min_loss_configs num_selection_samples", lambda value: value >= 0, "0 or more")


@dataclass(frozen=True, kw_only=True)
class TuneRankOptions(RankOptions):
    """Elastic ranks of one run, which can also be given."""

    custom_rank_config: tuple[int, ...] = option(
        (), "One rank for each decoder layer, used instead of choosing.", basic=True
    )
    eval_only: bool = option(
        False,
        "Do not train: measure the adapters of the run as chosen, or with --custom_rank_config; needs --resume.",
        basic=True,
    )
