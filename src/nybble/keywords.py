"""Keywords of nybble.compress, distill, tune and compare. Written by dev/make_keywords.py; do not edit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypedDict


class CompressKeywords(TypedDict, total=False):
    """Options of nybble compress."""

    device: str
    dtype: Literal["auto", "bfloat16", "float16", "float32"]
    trust_remote_code: bool
    pretrained: str
    offload: Literal["auto", "none", "disk"]
    data: str | Sequence[str]
    seq_len: int
    text_column: str
    data_dir: str | None
    assistant_only_loss: bool
    eval_data: str | Sequence[str]
    other_data: str | Sequence[str]
    bits: float
    group_size: int | None
    symmetric: bool
    layer: str | Sequence[str]
    ignore: str | Sequence[str]
    strict_group_size: bool
    target: Literal["any", "npu"]
    method: str
    num_calibration_samples: int
    gptq_damping: float
    gptq_act_order: bool
    blockwise_epochs: float
    limit_blocks: int | None
    keep_positions: Literal["fixed", "exact", "none"]
    eval_tasks: str | Sequence[str]
    limit: int | None
    num_test_samples: int
    eval_batch_size: int
    export: str | Sequence[str]
    output_dir: str | None
    seed: int
    resume: bool
    overwrite: bool


class DistillKeywords(TypedDict, total=False):
    """Options of nybble distill."""

    device: str
    dtype: Literal["auto", "bfloat16", "float16", "float32"]
    trust_remote_code: bool
    pretrained: str
    offload: Literal["auto", "none", "disk"]
    data: str | Sequence[str]
    seq_len: int
    text_column: str
    data_dir: str | None
    assistant_only_loss: bool
    eval_data: str | Sequence[str]
    other_data: str | Sequence[str]
    bits: float
    group_size: int | None
    symmetric: bool
    layer: str | Sequence[str]
    ignore: str | Sequence[str]
    strict_group_size: bool
    target: Literal["any", "npu"]
    method: str
    num_calibration_samples: int
    gptq_damping: float
    gptq_act_order: bool
    blockwise_epochs: float
    limit_blocks: int | None
    keep_positions: Literal["fixed", "exact", "none"]
    init_from: str | None
    lr: float
    epochs: int
    batch_size: int
    scale_lr: float
    norm_lr: float
    warmup_ratio: float
    microbatch_size: int
    weight_decay: float
    lr_scheduler_type: Literal["cosine", "constant", "constant_with_averaging"]
    optim: Literal["adamw", "adamw_8bit"]
    max_grad_norm: float
    weight_cache: Literal["auto", "step", "recompute"]
    gradient_checkpointing: Literal["auto", "on", "off"]
    base_weights: Literal["auto", "exact", "fixed"]
    early_stopping_patience: int
    save_steps: int
    report_to: str | Sequence[str]
    num_train_samples: int
    num_validation_samples: int
    same_samples: bool
    train: Literal["lora", "full", "rounding"]
    lora_rank: int
    shard: bool
    cage_lambda: float
    kl_temperature: float
    cross_entropy_share: float
    eval_tasks: str | Sequence[str]
    limit: int | None
    num_test_samples: int
    eval_batch_size: int
    export: str | Sequence[str]
    output_dir: str | None
    seed: int
    resume: bool
    overwrite: bool


class TuneKeywords(TypedDict, total=False):
    """Options of nybble tune."""

    device: str
    dtype: Literal["auto", "bfloat16", "float16", "float32"]
    trust_remote_code: bool
    pretrained: str
    data_dir: str | None
    seq_len: int
    num_train_samples: int
    objective: Literal["auto", "choices", "answer", "all"]
    task: str
    teacher: str | None
    bits: float
    group_size: int | None
    symmetric: bool
    layer: str | Sequence[str]
    ignore: str | Sequence[str]
    strict_group_size: bool
    target: Literal["any", "npu"]
    method: str
    num_calibration_samples: int
    gptq_damping: float
    gptq_act_order: bool
    blockwise_epochs: float
    limit_blocks: int | None
    keep_positions: Literal["fixed", "exact", "none"]
    init_from: str | None
    lr: float
    epochs: int
    batch_size: int
    scale_lr: float
    norm_lr: float
    warmup_ratio: float
    microbatch_size: int
    weight_decay: float
    lr_scheduler_type: Literal["cosine", "constant", "constant_with_averaging"]
    optim: Literal["adamw", "adamw_8bit"]
    max_grad_norm: float
    weight_cache: Literal["auto", "step", "recompute"]
    gradient_checkpointing: Literal["auto", "on", "off"]
    base_weights: Literal["auto", "exact", "fixed"]
    early_stopping_patience: int
    save_steps: int
    report_to: str | Sequence[str]
    quantize: Literal["after", "during"]
    scale_epochs: int
    lora_rank_space: int | Sequence[int]
    rank_sampling: Literal["half", "random", "sandwich"]
    num_min_loss_configs: int
    num_selection_samples: int
    select_on: Literal["held_out", "test"]
    fast_eval: bool
    custom_rank_config: int | Sequence[int]
    eval_only: bool
    eval_tasks: str | Sequence[str]
    limit: int | None
    num_test_samples: int
    eval_batch_size: int
    export: str | Sequence[str]
    output_dir: str | None
    seed: int
    resume: bool
    overwrite: bool


class CompareKeywords(TypedDict, total=False):
    """Options of nybble compare."""

    device: str
    dtype: Literal["auto", "bfloat16", "float16", "float32"]
    trust_remote_code: bool
    pretrained: str
    data_dir: str | None
    seq_len: int
    num_train_samples: int
    objective: Literal["auto", "choices", "answer", "all"]
    tasks: str | Sequence[str]
    bits: float
    group_size: int | None
    symmetric: bool
    layer: str | Sequence[str]
    ignore: str | Sequence[str]
    strict_group_size: bool
    target: Literal["any", "npu"]
    method: str
    num_calibration_samples: int
    gptq_damping: float
    gptq_act_order: bool
    blockwise_epochs: float
    limit_blocks: int | None
    keep_positions: Literal["fixed", "exact", "none"]
    init_from: str | None
    lr: float
    epochs: int
    batch_size: int
    scale_lr: float
    norm_lr: float
    warmup_ratio: float
    microbatch_size: int
    weight_decay: float
    lr_scheduler_type: Literal["cosine", "constant", "constant_with_averaging"]
    optim: Literal["adamw", "adamw_8bit"]
    max_grad_norm: float
    weight_cache: Literal["auto", "step", "recompute"]
    gradient_checkpointing: Literal["auto", "on", "off"]
    base_weights: Literal["auto", "exact", "fixed"]
    early_stopping_patience: int
    save_steps: int
    report_to: str | Sequence[str]
    quantize: Literal["after", "during"]
    scale_epochs: int
    lora_rank_space: int | Sequence[int]
    rank_sampling: Literal["half", "random", "sandwich"]
    num_min_loss_configs: int
    num_selection_samples: int
    select_on: Literal["held_out", "test"]
    fast_eval: bool
    eval_tasks: str | Sequence[str]
    limit: int | None
    num_test_samples: int
    eval_batch_size: int
    export: str | Sequence[str]
    output_dir: str | None
    seed: int
    resume: bool
    overwrite: bool
