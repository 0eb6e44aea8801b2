"""Estimates of memory and disk, computed from shapes before anything expensive starts. All sizes are in bytes.

    training     overhead + model + teacher's head + weight cache + temporaries of one layer + trained parameters
                 + max(activations, logits while measuring) + logits of one chunk of the loss
    compression  overhead + model or one block + hidden states of the calibration text + what one block needs

The estimates are meant as upper bounds. The constants below come from measured peaks, rounded up.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from nybble.compression.calibration import TOKENS_PER_FORWARD
from nybble.models.composite import text_config
from nybble.models.configuration import config_value
from nybble.models.experts import SplitExperts
from nybble.models.streamed import MAX_BYTES_IN_MEMORY

# Share of the free memory that automatic choices may fill. The rest is for fragmentation and for other processes.
USABLE_SHARE = 0.7

# Numbers per token and decoder layer that are kept for the backward, in multiples of hidden and intermediate size.
_HIDDEN_KEPT, _INTERMEDIATE_KEPT = 24, 6
# float32 tensors of the size of one chunk's logits that exist at once: logits, probabilities, temporaries.
CHUNK_COPIES = 5
# float32 temporaries of the size of a weight while one layer is fake-quantized and while its gradient is made.
_LAYER_TEMPORARIES = 6
FLOAT32 = 4
ADAM = 16  # float32 parameter, gradient and two moments
_SHORT_MOMENTS = 6  # what moments in 8 bits save of that, but for one scale for 256
_AVERAGES = 2 * FLOAT32  # averaged parameters, and the trained ones while the averages are measured
_INITIAL_SCALE = 2 * FLOAT32  # a scale and a zero point as the layers keep them
# Matrices of the size of second moments that gptq has: their damped estimate, and its factor. On a GPU the inverse is
# computed beside the factor.
MATRICES = 2
# float32 copies of the rows that share an input while they are rounded.
ROW_COPIES = 4
# Positions whose logits exist at once while a model is measured, see evaluation/perplexity.py.
MEASURED_POSITIONS = 128
OVERHEAD = 800 << 20  # Python interpreter and libraries


@dataclass(frozen=True)
class ModelShapes:
    """Sizes of a model.

    Attributes:
        parameters: numbers in all parameters.
        linear_weights: numbers in the weights of the layers that get 4 bits.
        int4_features: input plus output features, summed over these layers.
        largest_int4_weight: numbers in the largest of these weights.
        num_layers: decoder layers.
        hidden_size: width of the hidden states.
        intermediate_size: width inside the feed-forward part.
        vocab_size: rows of the head.
        itemsize: bytes of one number in the dtype that the model computes in.
        expert_moments: numbers in the second moments of the inputs of all experts of one decoder layer.
    """

    parameters: int
    linear_weights: int
    int4_features: int
    largest_int4_weight: int
    num_layers: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    itemsize: int
    expert_moments: int = 0

    @staticmethod
    def of(model: Any, names: tuple[str, ...]) -> ModelShapes:
        """Return the shapes of a transformers model in which the layers `names` get 4 bits."""
        weights = [model.get_submodule(name).weight for name in names]
        config = text_config(model.config)
        stated = config_value(config, "intermediate_size") or 4 * config.hidden_size
        return ModelShapes(
            parameters=sum(p.numel() for p in model.parameters()),
            linear_weights=sum(w.numel() for w in weights),
            int4_features=sum(sum(w.shape) for w in weights),
            largest_int4_weight=max(w.numel() for w in weights),
            num_layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            intermediate_size=max(stated) if isinstance(stated, list) else stated,
            vocab_size=config.vocab_size,
            itemsize=model.dtype.itemsize,
            expert_moments=_expert_moments(model, names),
        )

    @property
    def head_bytes(self) -> int:
        """Bytes of the head's weight."""
        return self.vocab_size * self.hidden_size * self.itemsize


@dataclass(frozen=True)
class TrainingSetup:
    """What the memory of a training depends on, besides the size of its microbatches.

    Attributes:
        shapes: sizes of the model.
        rank: rank of the adapters; 0 = no adapters, the layers hold codes of one byte instead of weights.
        train: as --train has it. full: the weights themselves are trained, in float32, and there are no others.
            rounding: one number for 8 weights is.
        positions_bytes: bytes of the positions of weights between their codes, as they are kept; in the memory of the
            CPU and on disk.
        num_scales: scales of the linear layers that are trained.
        chunk_tokens: tokens whose logits exist at the same time in the loss, see `losses.chunk_tokens`.
        weight_copies: additional copies of the 4-bit layers' weights: 0 = weights are recomputed in every forward and
            backward, 1 = they are cached for a step, 2 = their gradients are collected in a step as well.
        logits_bytes: bytes of the logits that exist at the same time while the model is measured.
        checkpointing: decoder blocks keep their inputs alone, and one at a time all activations.
        fixed_point_weights: numbers in frozen weights that take one byte each, see --base_weights.
        short_moments: the optimizer keeps moments in 8 bits.
        averages: the schedule averages what is trained.
        on_gpu: memory is that of a GPU. On a CPU, it holds the codes before the training and the positions as well,
        on_disk: unless they are read from the disk when the training has ended.
        shards: processes that divide the rows of the 4-bit layers; 1 = each has all of them.
    """

    shapes: ModelShapes
    rank: int
    num_scales: int
    chunk_tokens: int
    weight_copies: int
    logits_bytes: int
    train: str = "lora"
    positions_bytes: int = 0
    checkpointing: bool = False
    fixed_point_weights: int = 0
    short_moments: bool = False
    averages: bool = False
    on_gpu: bool = False
    on_disk: bool = False
    shards: int = 1

    @property
    def trains_many(self) -> bool:
        """Whether adapters or weights are trained, whose moments take memory; not scales and norms alone."""
        return self.train != "lora" or self.rank > 0

    @property
    def trained_parameters(self) -> int:
        """Numbers in adapters, weights or the scales that round them, and scales, at most."""
        shapes = self.shapes
        parts = {"full": shapes.linear_weights, "rounding": shapes.linear_weights // 8 + shapes.int4_features}
        return parts.get(self.train, shapes.int4_features * self.rank) + self.num_scales


@dataclass(frozen=True)
class MicrobatchLimits:
    """What limits the size of a microbatch.

    Attributes:
        length: tokens in the longest sequence.
        batch_size: sequences in an optimizer step.
        available_bytes: free memory of the device, including what the model already holds.
        max_tokens: tokens above which larger microbatches are no faster.
    """

    length: int
    batch_size: int
    available_bytes: int
    max_tokens: int


def fits(needed_bytes: int, available_bytes: int) -> bool:
    """Return whether an automatic choice that needs this much memory may be taken."""
    return needed_bytes < USABLE_SHARE * available_bytes


def training_memory(setup: TrainingSetup, microbatch_tokens: int) -> int:
    """Return the peak memory of a training, or of measuring during that training if it is larger.

    Args:
        setup: the training.
        microbatch_tokens: tokens in one forward and backward.
    """
    shapes = setup.shapes
    untouched = (shapes.parameters - shapes.linear_weights) * shapes.itemsize
    cache = setup.weight_copies * shapes.linear_weights * shapes.itemsize
    temporaries = _LAYER_TEMPORARIES * shapes.largest_int4_weight * FLOAT32
    trained = (ADAM - _SHORT_MOMENTS * setup.short_moments + _AVERAGES * setup.averages) * setup.trained_parameters
    of_one = activations(shapes, microbatch_tokens)
    kept = shapes.num_layers * of_one
    if setup.checkpointing:
        kept = of_one + shapes.num_layers * microbatch_tokens * shapes.hidden_size * shapes.itemsize
    loss = CHUNK_COPIES * setup.chunk_tokens * shapes.vocab_size * FLOAT32
    others = OVERHEAD + untouched + shapes.head_bytes  # the teacher's head is a copy
    steps = _linear_layers(setup) + cache + temporaries + trained + max(kept, setup.logits_bytes) + loss
    saving = 0 if setup.on_gpu else shapes.linear_weights * 3 // 2 + setup.positions_bytes  # codes, also packed
    return others + max(steps, saving)


def _linear_layers(setup: TrainingSetup) -> int:
    """Bytes of what the linear layers hold besides trained parameters, and on a CPU of what waits for the end."""
    shapes = setup.shapes
    keep_weights = setup.train == "rounding" or (setup.train == "lora" and setup.rank > 0)
    weights = 0 if setup.train == "full" else shapes.linear_weights
    if keep_weights:
        weights = setup.fixed_point_weights + (weights - setup.fixed_point_weights) * shapes.itemsize
    size = weights // setup.shards + _INITIAL_SCALE * setup.num_scales
    if setup.on_gpu or setup.on_disk:
        return size
    changing = setup.train != "lora" or setup.rank > 0
    return size + setup.positions_bytes + (shapes.linear_weights if changing else 0)


def measuring_memory(shapes: ModelShapes, logits_bytes: int) -> int:
    """Return the peak memory of measuring a model with this many bytes of logits: model, teacher's head and logits."""
    return OVERHEAD + shapes.parameters * shapes.itemsize + shapes.head_bytes + logits_bytes


def compression_memory(shapes: ModelShapes, num_sequences: int, length: int, on_gpu: bool) -> int:
    """Return the peak memory of block-by-block compression with calibration text.

    One block needs the larger of
        GPTQ: the Hessians of its layers with the copies that factoring the largest one makes, and float32 copies of the
            largest stack of rows, and
        block-wise reconstruction: offsets, their gradients and moments, and two float32 copies of the block's weights,
    plus the activations of one microbatch in that block.

    Args:
        shapes: sizes of the model.
        num_sequences: calibration sequences.
        length: tokens in each of them.
        on_gpu: return the peak of the GPU, which holds one block while the rest of the model waits in the CPU's memory.
    """
    block = shapes.linear_weights // shapes.num_layers
    hessians = (3 * shapes.hidden_size**2 + (1 + 3) * shapes.intermediate_size**2 + shapes.expert_moments) * FLOAT32
    rows = 6 * 2 * shapes.hidden_size * shapes.intermediate_size * FLOAT32
    reconstruction = (ADAM + 2 * FLOAT32) * block
    one_block = max(hessians + rows, reconstruction) + activations(shapes, max(length, TOKENS_PER_FORWARD))
    model = shapes.parameters * shapes.itemsize
    if on_gpu:  # the whole model is there before the first block moves, and the teacher's head all the time
        return OVERHEAD + shapes.head_bytes + max(model, block * shapes.itemsize + one_block)
    stream = num_sequences * length * shapes.hidden_size * shapes.itemsize
    # Two streams of hidden states: of the 16-bit model and of the compressed one. Larger streams are temporary files.
    return OVERHEAD + model + shapes.head_bytes + 2 * min(stream, MAX_BYTES_IN_MEMORY) + one_block


def compression_disk(shapes: ModelShapes, calibration_tokens: int) -> int:
    """Return the disk space of a compression: finished blocks, and both streams of hidden states; 0 without text."""
    if not calibration_tokens:
        return 0
    return (shapes.parameters + 2 * calibration_tokens * shapes.hidden_size) * shapes.itemsize


def training_disk(setup: TrainingSetup, teacher_tokens: int) -> int:
    """Return the disk space of a training.

    It has the teacher's hidden states, last.safetensors (parameters, two moments, averages) and best.safetensors
    (parameters), one of them twice, as a new version is written before the old one is deleted; and the quantized model
    with its exports.

    Args:
        setup: the training.
        teacher_tokens: tokens whose hidden states are stored.
    """
    shapes = setup.shapes
    states = teacher_tokens * shapes.hidden_size * shapes.itemsize
    moments = ADAM - 2 * FLOAT32 - (_SHORT_MOMENTS if setup.short_moments else 0)  # without parameter and gradient
    last, best = FLOAT32 + moments + (FLOAT32 if setup.averages else 0), FLOAT32
    checkpoints = (2 * last + best) * setup.trained_parameters
    return states + checkpoints + 3 * shapes.parameters + setup.positions_bytes


def positions_bytes(shapes: ModelShapes, keep: str) -> int:
    """Return the bytes of the positions of weights between their codes, in memory or on disk.

    Args:
        shapes: sizes of the model.
        keep: as --keep_positions has it.
    """
    weights = shapes.linear_weights
    return {"none": 0, "fixed": (weights + 1) // 2, "exact": weights * shapes.itemsize}[keep]


def pick_microbatch_size(setup: TrainingSetup, limits: MicrobatchLimits) -> int:
    """Return the largest power of two of sequences within the limits; at least 1.

    Logits of measuring do not limit the microbatch, as they exist at another time.
    """
    training_only = replace(setup, logits_bytes=0)

    def is_allowed(size: int) -> bool:
        tokens = size * limits.length
        return (
            size <= limits.batch_size
            and tokens <= limits.max_tokens
            and fits(training_memory(training_only, tokens), limits.available_bytes)
        )

    size = 1
    while is_allowed(size * 2):
        size *= 2
    return size


def _expert_moments(model: Any, names: Collection[str]) -> int:
    """See ModelShapes: each expert has inputs of its own."""
    mixtures = [f"{path}." for path, module in model.named_modules() if isinstance(module, SplitExperts)]
    counts: dict[str, int] = {}
    for name in names:
        for path in mixtures:
            if name.startswith(path):
                counts[path] = counts.get(path, 0) + model.get_submodule(name).weight.shape[1] ** 2
    return max(counts.values(), default=0)


def activations(shapes: ModelShapes, tokens: int) -> int:
    """Bytes that one decoder layer keeps for its backward."""
    return (
        tokens * (_HIDDEN_KEPT * shapes.hidden_size + _INTERMEDIATE_KEPT * shapes.intermediate_size) * shapes.itemsize
    )
