"""How adapters, scales and norms are trained."""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from typing import ClassVar, Literal

from nybble.errors import OptionError
from nybble.options.base import Group, option, with_default

WeightCache = Literal["auto", "step", "recompute"]
Checkpointing = Literal["auto", "on", "off"]
BaseWeights = Literal["auto", "exact", "fixed"]
TrainedPart = Literal["lora", "full", "rounding"]
Optim = Literal["adamw", "adamw_8bit"]
Schedule = Literal["cosine", "constant", "constant_with_averaging"]


@dataclass(frozen=True, kw_only=True)
class TrainingOptions(Group):
    """Training that distill and tune share."""

    TITLE: ClassVar[str] = "Training"

    lr: float = option(MISSING, "Peak learning rate of the adapters.", basic=True)
    epochs: int = option(MISSING, "Epochs; each is followed by a validation.", basic=True)
    batch_size: int = option(MISSING, "Sequences or rows per optimizer step.", basic=True)
    scale_lr: float = option(
        MISSING, "Peak relative learning rate of the scales: 1e-3 changes a scale by about 0.1 % per step."
    )
    norm_lr: float = option(MISSING, "Peak relative learning rate of the norm weights in 4 bits; 0: not trained.")
    warmup_ratio: float = option(MISSING, "Share of the steps with a rising learning rate.")
    microbatch_size: int = option(0, "Sequences per forward pass; 0: chosen by the memory estimate.")
    weight_decay: float = option(0.0, "Decoupled weight decay of what is trained at --lr.")
    lr_scheduler_type: Schedule = option(
        "cosine",
        "After the warmup: cosine decay to zero; constant; constant_with_averaging: constant, and the result is the "
        "mean of the weights over all steps after the first third.",
    )
    optim: Optim = option(
        "adamw",
        "adamw_8bit: moments in 8 bits, 6 bytes less for each trained parameter; needs the extra 8bit (torchao).",
    )
    max_grad_norm: float = option(1.0, "Gradients are clipped to this norm; inf: never.")
    weight_cache: WeightCache = option(
        "auto",
        "step: quantize once per optimizer step (fast); recompute: in every forward and backward pass (small); auto: "
        "step if memory allows.",
    )
    gradient_checkpointing: Checkpointing = option(
        "auto",
        "on: keep the activations of one decoder block at a time, and compute each block again in the backward pass; "
        "auto: on where memory asks for it.",
    )
    base_weights: BaseWeights = option(
        "auto",
        "Frozen weights to which adapters inside the rounding are added. exact: in the dtype of the model; fixed: one "
        "byte a weight, its code and 4 bits of its position in the cell; auto: fixed where memory asks for it.",
    )
    early_stopping_patience: int = option(0, "Stop after this many validations in a row without improvement; 0: never.")
    save_steps: int = option(10, "Optimizer steps between checkpoints.")
    report_to: tuple[str, ...] = option(("tensorboard",), "Where to log curves: tensorboard, or none.")

    @property
    def keeps_base_weights(self) -> bool:
        """Whether layers keep frozen weights inside the rounding."""
        raise NotImplementedError

    def check(self) -> None:
        """Raise OptionError for values outside of their range."""
        self.require("epochs batch_size save_steps", lambda value: value >= 1, "at least 1")
        self.require("microbatch_size", lambda value: value >= 0, "0 (automatic) or more")
        self.require("early_stopping_patience", lambda value: value >= 0, "0 (never stop early) or more")
        self.require("lr scale_lr norm_lr weight_decay", lambda value: 0 <= value < float("inf"), "0 or more")
        self.require("max_grad_norm", lambda value: value > 0, "more than 0")
        self.require("warmup_ratio", lambda value: 0 <= value <= 1, "from 0 to 1")
        unknown = [name for name in self.report_to if name != "tensorboard"]
        if unknown:
            raise OptionError(f"--report_to must be tensorboard or none; got {' '.join(unknown)}")


@dataclass(frozen=True, kw_only=True)
class DistillTrainingOptions(TrainingOptions):
    """Training on the KL divergence to the 16-bit model's predictions."""

    num_train_samples: int = option(
        1024,
        "Sequences per epoch; all text is used before any is repeated. With --data self this many are generated once "
        "and every epoch repeats them.",
        basic=True,
    )
    num_validation_samples: int = option(64, "Sequences of the validation split, measured after each epoch.")
    same_samples: bool = option(False, "Train on the same sequences in every epoch.")
    epochs: int = with_default(TrainingOptions, "epochs", 10)
    batch_size: int = with_default(TrainingOptions, "batch_size", 16)
    train: TrainedPart = option(
        "lora",
        "lora: adapters; full: the weights themselves, in 16 to 24 bytes a weight; rounding: the scale that rounds, "
        "one for 8 weights, which does not ship (FOCUS). Scales and norms in any case.",
    )
    lora_rank: int = option(
        256,
        "Rank of the adapters, clamped in narrower layers. 0: no adapters; codes stay, scales and norms are trained, "
        "which is faster and better with little text.",
        basic=True,
    )
    shard: bool = option(
        False,
        "Several processes: each keeps some rows of the weights in training, and gathers the codes of the others when "
        "a layer computes, as with --weight_cache recompute. For --train lora, and a --batch_size that they divide.",
    )
    lr: float = option(
        6e-4,
        "Peak learning rate of the adapters. With --train full in code units: 1e-3 moves a weight by about 0.1 % of "
        "the distance between two codes per step. With --train rounding relative to the scale.",
        basic=True,
    )
    scale_lr: float = with_default(TrainingOptions, "scale_lr", 1e-3)
    norm_lr: float = with_default(TrainingOptions, "norm_lr", 5e-4)
    warmup_ratio: float = with_default(TrainingOptions, "warmup_ratio", 0.05)
    cage_lambda: float = option(
        0.0,
        "With --train full, in the last fifth of the steps: pull weights to the values of their codes, per step by up "
        "to learning rate x lambda of the distance (CAGE). 0: never.",
    )
    kl_temperature: float = option(
        1.0, "Temperature of the KL divergence in training; above 1, unlikely tokens count more. Measured at 1."
    )
    cross_entropy_share: float = option(
        0.0, "Share of the cross-entropy of the text in the loss, the rest is KL; 0 to 1. It lowers perplexity there."
    )

    @property
    def codes_stay(self) -> bool:
        """Whether layers have fixed codes: neither adapters nor weights that could change them."""
        return self.train == "lora" and not self.lora_rank

    @property
    def trains_codes(self) -> bool:
        """Whether adapters or weights are trained inside the rounding, so that codes change."""
        return self.lr > 0 and not self.codes_stay

    @property
    def keeps_base_weights(self) -> bool:
        """Whether layers keep frozen weights inside the rounding."""
        return self.train == "rounding" or not (self.train == "full" or self.codes_stay)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per epoch."""
        return self.num_train_samples // self.batch_size

    def check(self) -> None:
        """Raise OptionError for values outside of their range, or with which nothing would be trained."""
        super().check()
        self.require("num_train_samples num_validation_samples", lambda value: value >= 1, "at least 1")
        self.require("cage_lambda", lambda value: 0 <= value < float("inf"), "0 or more")
        if self.cage_lambda and self.train != "full":
            raise OptionError("--cage_lambda needs --train full, as it pulls the trained weights; add it, or leave out")
        self.require("kl_temperature", lambda value: 0 < value < float("inf"), "more than 0")
        self.require("cross_entropy_share", lambda value: 0 <= value <= 1, "from 0 to 1")
        self.require("lora_rank", lambda value: value >= 0, "0 (no adapters) or more")
        if self.train != "lora" and self.lora_rank != type(self).lora_rank:
            raise OptionError(
                f"--train {self.train} has no adapters and takes no --lora_rank; got --lora_rank {self.lora_rank}; "
                "leave one of them out"
            )
        if self.shard and self.train != "lora":
            raise OptionError(
                f"--shard needs --train lora, as trained weights are not divided; got --train {self.train}; "
                "leave one of them out"
            )
        if not (self.trains_codes or self.scale_lr or self.norm_lr):
            raise OptionError(
                "--scale_lr, --norm_lr, or --lora_rank and --lr must be above 0, otherwise nothing is trained; nybble "
                "compress makes a model without training"
            )
        if self.batch_size > self.num_train_samples:
            raise OptionError(
                "--batch_size must not be larger than --num_train_samples; got "
                f"{self.batch_size} and {self.num_train_samples}"
            )


@dataclass(frozen=True, kw_only=True)
class TuneTrainingOptions(TrainingOptions):
    """Training on a downstream task."""

    quantize: Literal["after", "during"] = option(
        "after",
        "after: adapters are trained on 16-bit weights, which are then compressed, and scales and norms are trained in "
        "4 bits. during: adapters are trained inside the rounding of a compressed model.",
        basic=True,
    )
    epochs: int = with_default(TrainingOptions, "epochs", 3)
    batch_size: int = with_default(TrainingOptions, "batch_size", 16)
    lr: float = with_default(TrainingOptions, "lr", 1e-3)
    # With --quantize during, 1e-3 was measured to be better.
    scale_lr: float = with_default(TrainingOptions, "scale_lr", 2e-3)
    norm_lr: float = with_default(TrainingOptions, "norm_lr", 1e-3)
    warmup_ratio: float = with_default(TrainingOptions, "warmup_ratio", 0.1)
    scale_epochs: int = option(1, "With --quantize after: epochs of training scales and norms in 4 bits.")

    @property
    def trains_codes(self) -> bool:
        """Whether adapters are trained inside the rounding, so that codes change."""
        return self.quantize == "during"

    @property
    def keeps_base_weights(self) -> bool:
        """Whether layers keep frozen weights inside the rounding."""
        return self.quantize == "during"

    @property
    def scale_training_epochs(self) -> int:
        """Epochs of training in 4 bits that follow the training of the adapters."""
        return self.scale_epochs if self.quantize == "after" and (self.scale_lr or self.norm_lr) else 0

    def check(self) -> None:
        """Raise OptionError for values outside of their range, or with which nothing would be trained."""
        super().check()
        self.require("scale_epochs", lambda value: value >= 0, "0 or more")
        if not (self.lr or self.scale_training_epochs or (self.scale_lr and self.quantize == "during")):
            raise OptionError(
                "--lr, --scale_lr or --norm_lr must be above 0, otherwise nothing is trained; nybble compress makes a "
                "model without training"
            )
