"""Options of every command as frozen dataclasses: meaning, unit and range beside each field. TOML in and out.

The command line is made from these classes: the comment beside a field is its help text, fields without a default come without a flag. `config.toml` in a
run folder is one of them.
"""

from __future__ import annotations

import dataclasses
import json
import tomllib
import typing
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from nybble.errors import OptionError, RunError

Dtype = Literal["auto", "bfloat16", "float16", "float32"]


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model, where, and in what precision it computes."""

    pretrained: str = ""  # Required: hub id, local folder, .gguf file, or the built-in smollm2.
    trust_remote_code: bool = False  # Run Python code that comes with the model.
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    dtype: Dtype = "auto"  # Of the 16-bit model. auto: bfloat16 where it is fast, else float32.


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Which text."""

    # wikitext2-plain, wikitext2 (with the marks of its tokenization), python-docs, a text / jsonl / csv / parquet file, a folder with a file a split, a hub
    # data set; or several of them, NAME=SHARE each. Or self: the model writes it; self:SOURCE: it goes on from the beginnings of another source.
    data: tuple[str, ...] = ("wikitext2-plain",)
    data_column: str = "text"  # Column with the text, for row-wise data.
    data_dir: str | None = None  # Folder with local copies of data sets, for machines without the hub.
    seq_len: int = 1024  # Tokens in a sequence.
    loss_on: Literal["all", "assistant"] = (
        "all"  # Of conversations (rows with messages): all tokens, or only what the assistant says.
    )


@dataclass(frozen=True, kw_only=True)
class TextOptions(DataOptions):
    """Which text to learn from, and which to measure on."""

    eval_data: tuple[
        str, ...
    ] = ()  # Source of validation and test text. Default: --data; python-docs where the model writes --data itself.


# Fewer sequences than this are no calibration.
LEAST_CALIBRATION = 8


@dataclass(frozen=True, kw_only=True)
class CompressionOptions:
    """How weights are compressed before any tuning."""

    group_size: int = 64  # Weights that share a scale and a zero.
    calib_samples: int = 128  # Sequences of the training text that methods other than rtn learn from.
    gptq_damping: float = 0.01  # Of the Hessian, relative to its mean diagonal.
    gptq_act_order: bool = False  # Round columns with large inputs first.
    blockwise_epochs: float = 2.0  # Epochs of block-wise reconstruction, over the calibration sequences.
    limit_blocks: int | None = None  # Apply the method to so many decoder blocks, rtn to the others (for trying out).

    def check_compression(self) -> None:
        """Raise OptionError for impossible values."""
        _require(self, ("group_size",), lambda value: value >= 1, "at least 1")
        _require(self, ("calib_samples",), lambda value: value >= LEAST_CALIBRATION, f"at least {LEAST_CALIBRATION}")
        _require(self, ("gptq_damping",), lambda value: 0 < value <= 1, "more than 0 and at most 1")
        _require(self, ("blockwise_epochs",), lambda value: 0 < value < float("inf"), "more than 0")
        _require(self, ("limit_blocks",), lambda value: value is None or value >= 0, "0 or more")


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Where a run goes, and what is measured and written at its end."""

    output_dir: str | None = None  # Run folder. Default: runs/MODEL-WHAT, that is distill, the method or the task.
    seed: int = 0  # Of everything random: adapters, choice and order of the data.
    test_samples: int = 0  # Sequences of the test split for token perplexity and KL; 0 = all.
    tasks: tuple[str, ...] = ("wikitext",)  # lm-eval tasks measured on all models of the run; needs the extra eval.
    task_limit: int | None = None  # At most so many documents a task (for trying out).
    eval_batch_size: int = (
        0  # Requests a forward in lm-eval tasks; 0 = as many as their length and the vocabulary allow.
    )
    export: tuple[str, ...] = ("openvino",)  # Formats to export to; needs the extra of the same name.
    resume: bool = False  # Go on where the run in output_dir stopped.
    overwrite: bool = False  # Delete the run in output_dir first.

    def check_run(self) -> None:
        """Raise OptionError for impossible values."""
        _require(self, ("test_samples", "eval_batch_size"), lambda value: value >= 0, "0 (all, automatic) or more")
        _require(self, ("seed",), lambda value: 0 <= value < 2**32, "from 0 to 2^32 - 1")
        _require(self, ("task_limit",), lambda value: value is None or value >= 1, "at least 1")
        if self.resume and self.overwrite:
            raise OptionError("--resume and --overwrite contradict each other; give one of them")


def _folder(output_dir: str | None, pretrained: str, what: str) -> Path:
    return Path(output_dir or f"runs/{Path(pretrained).name.removesuffix('.gguf')}-{what}")


@dataclass(frozen=True, kw_only=True)
class CompressOptions(RunOptions, CompressionOptions, TextOptions, ModelOptions):
    """Compress a model to 4 bits without training it end to end, export it, and measure it."""

    KIND: ClassVar[str] = "compress"

    method: str = "awq+se"  # rtn, or any of awq, se, gptq, blockwise in this order, joined by +.

    def check(self) -> None:
        """Raise OptionError for impossible values."""
        _require_pretrained(self.pretrained)
        self.check_compression()
        self.check_run()
        _require(self, ("seq_len",), lambda value: value >= 8, "at least 8")
        if self.dtype == "float16" and "blockwise" in self.method:
            raise OptionError(
                "--dtype must be bfloat16 or float32 for blockwise; float16 gradients vanish (they are below its smallest number)"
            )

    @property
    def folder(self) -> Path:
        """The run folder."""
        return _folder(self.output_dir, self.pretrained, self.method)


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How adapters and scales are trained."""

    epochs: int = 10  # Epochs, each followed by a validation.
    batch_size: int = 32  # Sequences in an optimizer step.
    microbatch: int = 0  # Sequences in one forward; 0 = by the memory estimate.
    lr: float = 1e-4  # Peak learning rate of the adapters.
    scale_lr: float = 1e-3  # Peak relative learning rate of the scales: 1e-3 moves a scale by about 0.1 % a step.
    weight_decay: float = 0.0  # Of the adapters (decoupled).
    warmup: float = 0.05  # Share of the steps with a rising rate.
    # Of the rate after that: cosine: falling to zero; constant; mean: constant, and what counts are the weights' means over all steps but the first third.
    schedule: Literal["cosine", "constant", "mean"] = "cosine"
    max_grad_norm: float = 1.0  # Gradients are scaled down to this norm; inf = never.
    # Compression to start from: rtn, or any of awq, se, gptq, blockwise in this order, joined by +; or a finished run, whose 4-bit model it goes on with.
    # auto: awq+se+gptq, without adapters awq+se+blockwise; without awq for a family that it does not know.
    start: str = "auto"
    cache: Literal["auto", "step", "recompute"] = (
        "auto"  # Quantize once a step (fast) or in every forward and backward (small).
    )
    patience: int = 0  # Stop when so many validations in a row were no better; 0 = never.
    save_every: int = 10  # Optimizer steps between checkpoints.
    tensorboard: bool = True  # Write curves for TensorBoard into the run folder.

    def check_training(self) -> None:
        """Raise OptionError for impossible values."""
        _require(self, ("epochs", "batch_size", "save_every"), lambda value: value >= 1, "at least 1")
        _require(self, ("microbatch",), lambda value: value >= 0, "0 (automatic) or more")
        _require(self, ("patience",), lambda value: value >= 0, "0 (never stop early) or more")
        _require(self, ("lr", "scale_lr", "weight_decay"), lambda value: 0 <= value < float("inf"), "0 or more")
        _require(self, ("max_grad_norm",), lambda value: value > 0, "more than 0")
        _require(self, ("warmup",), lambda value: 0 <= value <= 1, "from 0 to 1")


_FLOAT16 = (
    "--dtype must be bfloat16 or float32 for training; float16 gradients vanish (they are below its smallest number)"
)


@dataclass(frozen=True, kw_only=True)
class DistillOptions(TrainingOptions, RunOptions, CompressionOptions, TextOptions, ModelOptions):
    """Distil a 16-bit model into its own 4-bit self, export it, and measure it."""

    KIND: ClassVar[str] = "distill"

    samples: int = 1024  # Sequences that make an epoch; all text is used before any is repeated. --data self: as many are written, once.
    same_samples: bool = False  # Train on the same sequences in every epoch instead.
    # Rank of the adapters, clamped in narrower layers; 0 = none: the codes of the start stay, scales (and norms) learn alone, which is quicker, and with little
    # text better.
    lora_rank: int = 256
    lr: float = 6e-4  # Peak learning rate of the adapters.
    batch_size: int = 16  # Sequences in an optimizer step.
    norm_lr: float = 5e-4  # Peak relative learning rate of the weights of norms; 0 = they stay.
    valid_samples: int = 64  # Sequences of the validation split measured after each epoch.

    def check(self) -> None:
        """Raise OptionError for impossible values."""
        _require_pretrained(self.pretrained)
        self.check_compression()
        self.check_run()
        _require(self, ("samples", "valid_samples"), lambda value: value >= 1, "at least 1")
        self.check_training()
        _require(self, ("lora_rank",), lambda value: value >= 0, "0 (no adapters) or more")
        _require(self, ("norm_lr",), lambda value: 0 <= value < float("inf"), "0 or more")
        if not ((self.lora_rank and self.lr) or self.scale_lr or self.norm_lr):
            raise OptionError(
                "--scale_lr, --norm_lr, or --lora_rank and --lr must be above 0, else nothing is trained; nybble compress makes a model without training"
            )
        _require(self, ("seq_len",), lambda value: value >= 8, "at least 8")
        if self.batch_size > self.samples:
            raise OptionError(
                f"--batch_size must not be larger than --samples; got {self.batch_size} and {self.samples}"
            )
        if self.dtype == "float16":
            raise OptionError(_FLOAT16)

    @property
    def steps_per_epoch(self) -> int:
        return self.samples // self.batch_size

    @property
    def moves_codes(self) -> bool:
        """Whether adapters are trained inside the rounding."""
        return self.lora_rank > 0 and self.lr > 0

    @property
    def folder(self) -> Path:
        """The run folder."""
        return _folder(self.output_dir, self.pretrained, self.KIND)


@dataclass(frozen=True, kw_only=True)
class TuneOptions(TrainingOptions, RunOptions, CompressionOptions, ModelOptions):
    """Tune a model on a downstream task, with adapters of elastic rank whose best ranks are then chosen, into a 4-bit model; export it, and measure it."""

    KIND: ClassVar[str] = "tune"

    task: str = ""  # gsm8k, hellaswag, openbookqa, winogrande, arc_challenge, arc_easy, any lm-eval task with a training split, or a .jsonl file of one's own.
    # Tasks: instead of one run, the five columns of published tables for each (BF16, BF16 + LoRA, LoRA + PTWC, QAT + LoRA, QAT + NLS).
    compare: tuple[str, ...] = ()
    data_dir: str | None = None  # Folder with local copies of data sets, for machines without the hub.
    train_rows: int = 0  # At most so many training rows, chosen at random; 0 = all.
    seq_len: int = 512  # At most so many tokens of a prompt and its answer.
    # What is learnt: to prefer the right one of a question's choices; the right answer's tokens; the prompt's too. auto: choices, where the task has them.
    loss_on: Literal["auto", "choices", "answer", "all"] = "auto"
    # 16-bit model tuned on the task, same vocabulary, whose predictions are learnt instead of the right answers (--compare leaves one in TASK/lora/merged).
    teacher: str | None = None
    # before: adapters learn on the 16-bit weights; then these are compressed, and scales and norms learn in 4 bits.
    # inside: adapters learn inside the rounding of a model that was compressed first.
    adapters: Literal["before", "inside"] = "before"
    lora_rank_space: tuple[int, ...] = (
        32,
        24,
        16,
    )  # Ranks to choose from for every decoder layer; a single one = plain LoRA.
    # What a step trains. half: the largest ranks, every other step, and a random configuration between; random: always a random one, as published; sandwich:
    # the largest, the smallest and a random one, all three in every step.
    sampling: Literal["half", "random", "sandwich"] = "half"
    num_min_loss_configs: int = 5  # Configurations with the least training loss that are candidates afterwards.
    select_rows: int = 200  # Held-out rows that epochs and configurations are chosen by; 0 = all.
    select_on: Literal["held_out", "test"] = (
        "held_out"  # test: choose configurations by the test score, as published results do.
    )
    custom_rank_config: tuple[int, ...] = ()  # One rank for each decoder layer, to be used instead of choosing.
    eval_only: bool = (
        False  # Train no adapters: measure those of the run, as chosen or with --custom_rank_config; needs --resume.
    )
    fast_eval: bool = False  # Measure on weights made once, also with --cache recompute (with the step cache it is always so): the same numbers.

    epochs: int = 3  # Passes over the training rows, each followed by a validation.
    batch_size: int = 16  # Rows in an optimizer step.
    scale_epochs: int = (
        1  # --adapters before: passes over the training rows with scales and norms in 4 bits, after the adapters' own.
    )
    lr: float = 1e-3  # Peak learning rate of the adapters.
    scale_lr: float = 2e-3  # Peak relative learning rate of the scales: 2e-3 moves one by about 0.2 % a step. With --adapters inside 1e-3 was measured.
    norm_lr: float = (
        1e-3  # --adapters before: peak relative learning rate of the weights of norms in 4 bits; 0 = they stay.
    )
    warmup: float = 0.1  # Share of the steps with a rising rate.
    # Compression: rtn, or any of awq, se, gptq, blockwise in this order, joined by +; with --adapters inside also a finished run, whose 4-bit model it goes on
    # with.
    start: str = "awq+se"
    tasks: tuple[str, ...] = ()  # More lm-eval tasks to measure; needs the extra eval.
    test_samples: int = 16  # Sequences of held-out rows for token perplexity and KL; 0 = all.

    def check(self) -> None:
        """Raise OptionError for impossible values."""
        _require_pretrained(self.pretrained)
        if self.task and self.compare:
            raise OptionError("--task and --compare contradict each other; give one of them")
        if self.compare and (self.custom_rank_config or self.eval_only or self.teacher):
            raise OptionError(
                "--compare makes all its runs itself; leave --custom_rank_config, --eval_only and --teacher out"
            )
        if not (self.task or self.compare):
            raise OptionError(
                "--task is required: gsm8k, hellaswag, openbookqa, winogrande, arc_challenge, arc_easy, another lm-eval task, or a .jsonl file"
            )
        self.check_compression()
        self.check_run()
        self.check_training()
        _require(self, ("norm_lr",), lambda value: 0 <= value < float("inf"), "0 or more")
        _require(
            self,
            ("train_rows", "select_rows", "num_min_loss_configs", "scale_epochs"),
            lambda value: value >= 0,
            "0 or more",
        )
        _require(self, ("seq_len",), lambda value: value >= 8, "at least 8")
        if self.dtype == "float16":
            raise OptionError(_FLOAT16)
        if not (self.lr or self.scale_passes or (self.scale_lr and self.adapters == "inside")):
            raise OptionError(
                "--lr, --scale_lr or --norm_lr must be above 0, else nothing is trained; nybble compress makes a model without training"
            )
        if self.eval_only and not self.resume:
            raise OptionError("--eval_only needs --resume and the folder of a run that was trained")

    @property
    def scale_passes(self) -> int:
        """Epochs of training in 4 bits after the adapters' own."""
        return self.scale_epochs if self.adapters == "before" and (self.scale_lr or self.norm_lr) else 0

    @property
    def moves_codes(self) -> bool:
        """Whether adapters are trained inside the rounding."""
        return self.adapters == "inside"

    @property
    def folder(self) -> Path:
        """The run folder."""
        return _folder(self.output_dir, self.pretrained, Path(self.task).stem)


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """Search for better ranks after nybble tune, and compare what is found with tune's own choice and with random draws."""

    run: str  # Folder of a finished run of nybble tune.
    trials: int = 50  # Configurations to try, counting those of earlier sittings.
    sampler: Literal["nsga2", "tpe", "hill", "random"] = "tpe"  # How the next one is proposed.
    random_draws: bool = True  # As many random draws besides, to compare with.
    seed: int = 0  # Of the search.
    apply: bool = False  # Put the best in place of tune's choice: into 4 bits as tune does, save, export, measure.
    trust_remote_code: bool = False  # Run Python code that comes with the model.

    def check(self) -> None:
        """Raise OptionError for impossible values."""
        _require(self, ("trials",), lambda value: value >= 1, "at least 1")
        _require(self, ("seed",), lambda value: 0 <= value < 2**32, "from 0 to 2^32 - 1")


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Export a finished run to other runtimes."""

    run: str  # Run folder.
    to: tuple[str, ...] = ("openvino",)  # Formats.
    trust_remote_code: bool = False  # Run Python code that comes with the model.


@dataclass(frozen=True, kw_only=True)
class InspectOptions:
    """Show every quantized layer of a run or an export: shape, grid, error, clipped share."""

    target: str  # Run folder, or a folder inside one: quantized or openvino.


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Put one run, or several side by side, on one HTML page, and the same in Markdown."""

    runs: tuple[str, ...]  # Run folders.
    out: str | None = (
        None  # Page to write; the Markdown goes beside it. Default: report.html in the run folder, of several in this one.
    )
    table: bool = False  # Only print the kind of table that is published: 16 bit, best compression without training, tuned; improvement and mean.


@dataclass(frozen=True, kw_only=True)
class EvalOptions(DataOptions):
    """Measure a model, a finished run or an export: perplexity, KL to a teacher, lm-eval tasks."""

    target: str  # Model (as for --pretrained), run folder, or a folder inside one: quantized or openvino.
    tasks: tuple[str, ...] = ()  # lm-eval tasks; needs the extra eval.
    task_limit: int | None = None  # At most so many documents a task.
    split: Literal["train", "validation", "test"] = "test"  # Split of the data for token perplexity.
    samples: int = 0  # Sequences of it; 0 = all.
    teacher: str | None = None  # Model to compare with: adds the KL divergence to it.
    eval_batch_size: int = (
        0  # Requests a forward in lm-eval tasks; 0 = as many as their length and the vocabulary allow.
    )
    trust_remote_code: bool = False  # Run Python code that comes with the model.
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    dtype: Dtype = "auto"  # auto: bfloat16 where it is fast, else float32.
    strict: bool = False  # OpenVINO: compute as torch does in float32, not as deployed (dynamic 8-bit activations).
    perplexity: bool = True  # Measure token perplexity on --data.

    def check(self) -> None:
        """Raise OptionError for impossible values."""
        _require(self, ("seq_len",), lambda value: value >= 8, "at least 8")
        _require(self, ("samples", "eval_batch_size"), lambda value: value >= 0, "0 (all, automatic) or more")
        _require(self, ("task_limit",), lambda value: value is None or value >= 1, "at least 1")
        if not (self.tasks or self.perplexity):
            raise OptionError("--no_perplexity leaves nothing to measure without --tasks; name tasks, or leave it out")
        if self.teacher is not None and not self.perplexity:
            raise OptionError("--teacher is for the KL divergence, which --no_perplexity leaves out; give one of them")


def _require_pretrained(pretrained: str) -> None:
    if not pretrained:
        raise OptionError("--pretrained is required: a hub id, a local folder, a .gguf file, or smollm2")


def _require(options: Any, names: tuple[str, ...], valid: Any, range_: str) -> None:
    for name in names:
        value = getattr(options, name)
        if not valid(value):
            raise OptionError(f"--{name} must be {range_}; got {value}")


Options = TypeVar("Options")
# Never written into a file, nor taken from one: only a flag makes nybble run code that comes with a model.
_TRUST = "trust_remote_code"


def check_kind(folder: Path, options: Any) -> None:
    """Raise RunError where another command than that of `options`, or of a class of them, began the run in `folder`."""
    kind = options.KIND
    try:
        began = json.loads((folder / "results.json").read_text(encoding="utf-8")).get("kind", kind)
    except (OSError, ValueError, AttributeError):
        return  # not there yet, or not what nybble wrote, which is said where it is read
    if began != kind:
        raise RunError(
            f"--resume must go on with a run of nybble {kind}; {folder} was begun by nybble {began}; choose another --output_dir"
        )


def read_toml(path: Path) -> dict[str, Any]:
    """Values of a TOML file; OptionError if it is missing or malformed."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise OptionError(f"--config {path} must be a TOML file; it cannot be read ({error.strerror})") from error
    except ValueError as error:  # not UTF-8, not TOML
        raise OptionError(f"--config {path} is not valid TOML: {error}") from error


def of_run(kind: type[Options], folder: Path) -> dict[str, Any]:
    """Field values of `kind` from the config.toml of a run, without leave to run code: whoever uses a run gives that anew."""
    values = {key: value for key, value in read_toml(folder / "config.toml").items() if key != _TRUST}
    return _checked(kind, folder / "config.toml", values)


def from_toml(kind: type[Options], path: Path) -> dict[str, Any]:
    """Field values of `kind` from a TOML file; OptionError for a key that it does not have (the nearest is named)."""
    values = {key.replace("-", "_"): value for key, value in read_toml(path).items()}
    if values.get(_TRUST):
        raise OptionError(
            f"--config {path} must not allow Python code that comes with a model; remove {_TRUST}, and give it as a flag if you trust the model"
        )
    return _checked(kind, path, values)


def _checked(kind: type[Options], path: Path, values: dict[str, Any]) -> dict[str, Any]:
    known = {f.name for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(kind)
    for key in values:
        if key not in known:
            near = get_close_matches(key, known, 1)
            raise OptionError(
                f"--config {path} has an unknown key {key}" + (f"; did you mean {near[0]}?" if near else "")
            )
        values[key] = _typed(path, key, values[key], hints[key])
    return values


def _typed(path: Path, key: str, value: Any, hint: Any) -> Any:
    """A TOML value as a field of type `hint`: lists become tuples, whole numbers floats; OptionError if it does not fit."""
    if isinstance(value, list) or (isinstance(value, str) and typing.get_origin(hint) is tuple):
        value = tuple(value) if isinstance(value, list) else (value,)
    if typing.get_origin(hint) is Literal:
        fits = value in typing.get_args(hint)
    elif typing.get_origin(hint) is tuple:
        fits = isinstance(value, tuple) and all(isinstance(item, typing.get_args(hint)[0]) for item in value)
    else:
        if hint is float and type(value) is int:
            value = float(value)
        kinds = typing.get_args(hint) or (hint,)
        fits = type(value) in kinds
    if not fits:
        raise OptionError(f"--config {path}: {key} must be {_words(hint)}; got {value!r}")
    return value


def _words(hint: Any) -> str:
    """A field's type, for people."""
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return {str: "a list of texts", int: "a list of whole numbers"}[typing.get_args(hint)[0]]
    kind = next(kind for kind in (*typing.get_args(hint), hint) if kind is not type(None))
    return {float: "a number", int: "a whole number", bool: "true or false", str: "text"}[kind]


def to_toml(options: Any) -> str:
    """TOML text of all fields that have a value (None is left out: TOML has no word for it), but for what one start was told to do. Texts, numbers, booleans
    and lists of them are written as in JSON, but for one character that JSON leaves bare, and for what is not finite."""
    fields = dataclasses.asdict(options)
    kept = {
        key: value
        for key, value in fields.items()
        if value is not None and key not in ("resume", "overwrite", "eval_only", _TRUST)
    }
    written = {
        key: str(value) if isinstance(value, float) else json.dumps(value, ensure_ascii=False)
        for key, value in kept.items()
    }
    return "".join(f"{key} = {text}\n" for key, text in written.items()).replace("\x7f", "\\u007f")
