"""What a run will need, before it starts: memory, disk, steps, tokens. Plain arithmetic on shapes; all sizes in bytes.

The constants were fitted to measured peaks (docs/log.md) and err on the high side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nybble.compress.blocks import IN_MEMORY
from nybble.compress.calibration import TOKENS

# Numbers kept for the backward per token and decoder layer, in multiples of hidden size and of intermediate size.
_HIDDEN_KEPT, _INTERMEDIATE_KEPT = 24, 6
# float32 logits, probabilities and temporaries of a chunk that exist together in the loss.
_CHUNK_COPIES = 5
_FLOAT32, _ADAM = 4, 16  # bytes; weight + gradient + two moments
_OVERHEAD = 800 << 20  # interpreter and libraries


@dataclass(frozen=True)
class ModelShapes:
    """Sizes of a model and a run.

    Attributes:
        parameters, int4: numbers in all parameters; in the layers that get 4 bits.
        features: inputs + outputs, summed over those layers.
        largest: numbers in the largest of them.
        layers, hidden, intermediate, vocabulary: as in the configuration.
        itemsize: bytes of a number in the compute dtype.
    """

    parameters: int
    int4: int
    features: int
    largest: int
    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    itemsize: int

    @staticmethod
    def of(model: Any, names: tuple[str, ...], itemsize: int) -> ModelShapes:
        """Shapes of a transformers model whose layers `names` get 4 bits."""
        weights = [model.get_submodule(name).weight for name in names]
        config = model.config
        return ModelShapes(
            parameters=sum(p.numel() for p in model.parameters()),
            int4=sum(w.numel() for w in weights),
            features=sum(sum(w.shape) for w in weights),
            largest=max(w.numel() for w in weights),
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            intermediate=getattr(config, "intermediate_size", 4 * config.hidden_size),
            vocabulary=config.vocab_size,
            itemsize=itemsize,
        )


def training_memory(
    shapes: ModelShapes, rank: int, group_size: int, tokens: int, chunk: int, copies: int, logits: int
) -> int:
    """Peak of training with `tokens` a microbatch, or of measuring with `logits` bytes of logits at once.

    `copies` of the 4-bit layers' weights are kept: the step cache one, and one for its gradient. At rank 0 the layers keep their codes, a byte each, instead.
    """
    frozen = (shapes.parameters - shapes.int4) * shapes.itemsize + shapes.int4 * (shapes.itemsize if rank else 1)
    model = frozen + shapes.vocabulary * shapes.hidden * shapes.itemsize  # and the teacher's head
    kept = copies * shapes.int4 * shapes.itemsize
    one_layer = 6 * shapes.largest * _FLOAT32
    trained = (_ADAM + 2 * _FLOAT32) * (
        shapes.features * rank + shapes.int4 // group_size
    )  # and means, and what stands aside while these are measured
    activations = (
        tokens
        * shapes.layers
        * (_HIDDEN_KEPT * shapes.hidden + _INTERMEDIATE_KEPT * shapes.intermediate)
        * shapes.itemsize
    )
    loss = _CHUNK_COPIES * chunk * shapes.vocabulary * _FLOAT32
    return _OVERHEAD + model + kept + one_layer + trained + max(activations, logits) + loss


def measuring_memory(shapes: ModelShapes, logits: int) -> int:
    """Peak of measuring a model with `logits` bytes of logits at once: the model, and the teacher's head."""
    return _OVERHEAD + (shapes.parameters + shapes.vocabulary * shapes.hidden) * shapes.itemsize + logits


def compression_memory(shapes: ModelShapes, sequences: int, length: int, gpu: bool) -> int:
    """Peak of compressing block by block with calibration text; with `gpu`, of the GPU, which holds the block at hand while the model waits on the CPU.

    model (or one block) + both streams (in temporary files above half a GiB each) + the larger of: Hessians of one block, with the copies that factoring
    the largest takes, and float32 copies of the largest stack of rows; offsets, their gradients and moments, and two float32 copies of a block's
    weights; + one microbatch through a block, with what its backward keeps.
    """
    block = shapes.int4 // shapes.layers
    hessians = (3 * shapes.hidden**2 + (1 + 3) * shapes.intermediate**2) * _FLOAT32
    rows = 6 * 2 * shapes.hidden * shapes.intermediate * _FLOAT32
    trained = (_ADAM + 2 * _FLOAT32) * block
    activations = (
        max(length, TOKENS)
        * (_HIDDEN_KEPT * shapes.hidden + _INTERMEDIATE_KEPT * shapes.intermediate)
        * shapes.itemsize
    )
    at_hand = max(hessians + rows, trained) + activations
    if gpu:
        # before the blocks, the whole model is there; the teacher's head all the time
        head = shapes.vocabulary * shapes.hidden * shapes.itemsize
        return _OVERHEAD + head + max(shapes.parameters * shapes.itemsize, block * shapes.itemsize + at_hand)
    stream = sequences * length * shapes.hidden * shapes.itemsize
    return (
        _OVERHEAD
        + (shapes.parameters + shapes.vocabulary * shapes.hidden) * shapes.itemsize
        + 2 * min(stream, IN_MEMORY)
        + at_hand
    )


def export_memory(parameters: int) -> int:
    """Peak of an export to OpenVINO, which traces a float32 copy: 9.7 bytes a parameter where they were measured (docs/log.md)."""
    return _OVERHEAD + 10 * parameters


def blocks_disk(shapes: ModelShapes, calibration: int) -> int:
    """Finished blocks and both streams of a compression with so many tokens of calibration; nothing without."""
    return (shapes.parameters + 2 * calibration * shapes.hidden) * shapes.itemsize if calibration else 0


def training_disk(shapes: ModelShapes, rank: int, group_size: int, tokens: int) -> int:
    """Teacher states of `tokens`, two checkpoints of weights, moments and means (one being written), best weights twice, and the results."""
    trained = shapes.features * rank + shapes.int4 // group_size
    return tokens * shapes.hidden * shapes.itemsize + (2 * 4 + 2) * trained * _FLOAT32 + 3 * shapes.parameters


def pick_microbatch(
    shapes: ModelShapes,
    rank: int,
    group_size: int,
    length: int,
    batch_size: int,
    chunk: int,
    copies: int,
    available: int,
    most: int,
) -> int:
    """Largest power of two of sequences that fits 70 % of `available` memory and at most `most` tokens; at least 1."""
    size = 1
    while (
        size * 2 <= batch_size
        and size * 2 * length <= most
        and training_memory(shapes, rank, group_size, size * 2 * length, chunk, copies, 0) < 0.7 * available
    ):
        size *= 2
    return size
