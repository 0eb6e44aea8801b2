"""Peak memory of a training or a compression in a process of its own, and nybble's estimate of it.

    python -m tests.helpers.peak_memory train RANK WEIGHT_COPIES SEQUENCES LENGTH
    python -m tests.helpers.peak_memory compress METHOD SEQUENCES LENGTH

prints a line of JSON: "peak" resident memory of the process and "estimate", in bytes.
"""

import json
import sys
from contextlib import nullcontext
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nybble.compression.calibration import Calibration
from nybble.compression.init import QuantizedInit
from nybble.compression.pipeline import compress
from nybble.models.head import LMHead, last_hidden_states
from nybble.models.selection import select_layers
from nybble.qat.base import cached_weights
from nybble.qat.insert import insert_fake_quant_layers, insert_fixed_codes_layers
from nybble.quant.grid import min_max_qparams
from nybble.quant.scheme import QuantScheme
from nybble.run.machine import peak_memory
from nybble.training import memory
from nybble.training.losses import chunk_tokens, kl_to_teacher
from nybble.training.objective import TrainingObjective
from nybble.training.trainer import ParameterGroup, Trainer, TrainerConfig

SCHEME = QuantScheme(group_size=64)
VOCABULARY, HIDDEN = 8192, 512


def make_llama() -> Any:
    """40 million random float32 parameters, frozen: 159 MB."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=1536, num_hidden_layers=10, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=2048,
    )  # fmt: skip
    return LlamaForCausalLM(config).requires_grad_(False).eval()


def train(model: Any, rank: int, weight_copies: int, sequences: int, length: int) -> int:
    """Take two steps of distillation with one microbatch each; returns the estimate.

    `weight_copies` says what the step keeps, as for memory.TrainingSetup; above 0 the weights are cached.
    """
    names, teacher_head = select_layers(model).linears, LMHead.of(model, copy=True)
    shapes, chunk = memory.ModelShapes.of(model, names), chunk_tokens(torch.device("cpu"), VOCABULARY)
    inits = {}
    for name in names:
        weight_OI = model.get_submodule(name).weight.detach()
        inits[name] = QuantizedInit(weight_OI, *min_max_qparams(weight_OI, SCHEME))
    layers: dict[str, Any] = {}
    if rank:
        layers |= insert_fake_quant_layers(model, inits, dict.fromkeys(inits, SCHEME), rank, 0)
    else:
        layers |= insert_fixed_codes_layers(model, {name: init.quantized(SCHEME) for name, init in inits.items()}, 0)
    del inits, weight_OI
    leaves = ("log_scale_shift", "lora_a", "lora_b") if rank else ("log_scale_shift",)
    parameters = {f"{name}.{leaf}": getattr(layer, leaf) for name, layer in layers.items() for leaf in leaves}
    ids, states = torch.randint(0, VOCABULARY, (sequences, length)), torch.randn(sequences, length, HIDDEN)

    def loss(indices: torch.Tensor) -> torch.Tensor:
        hidden, target = last_hidden_states(model, ids[indices]), states[indices]
        return kl_to_teacher(hidden.flatten(0, 1), target.flatten(0, 1), LMHead.of(model), teacher_head)

    objective = TrainingObjective(
        steps_per_epoch=2, draw=lambda step: torch.arange(sequences), loss=loss, weight=len, validate=dict,
        criterion="", describe=str, throughput=lambda step, seconds: "",
    )  # fmt: skip
    context = (lambda: cached_weights(list(layers.values()))) if weight_copies else nullcontext
    config = TrainerConfig(2, sequences, 0.0, 1.0, "constant_with_averaging")
    for _ in Trainer([ParameterGroup(parameters, 1e-3, 0.0)], objective, config, context).run():
        pass
    return memory.training_memory(
        memory.TrainingSetup(
            shapes, rank, shapes.linear_weights // 64, chunk, weight_copies, logits_bytes=0, averages=True, on_gpu=True
        ),
        sequences * length,
    )


def compress_blocks(model: Any, method: str, sequences: int, length: int) -> int:
    """Compress the whole model; returns the estimate."""
    names = select_layers(model).linears
    shapes = memory.ModelShapes.of(model, names)
    compress(
        model, dict.fromkeys(names, SCHEME), method, Calibration(torch.randint(0, VOCABULARY, (sequences, length)))
    )
    return memory.compression_memory(shapes, sequences, length, on_gpu=False)


def main() -> None:
    """See the head of this file."""
    torch.manual_seed(0)
    kind, *arguments = sys.argv[1:]
    if kind == "train":
        rank, weight_copies, sequences, length = map(int, arguments)
        estimate = train(make_llama(), rank, weight_copies, sequences, length)
    else:
        estimate = compress_blocks(make_llama(), arguments[0], int(arguments[1]), int(arguments[2]))
    print(json.dumps({"peak": peak_memory()["cpu"], "estimate": estimate}))


if __name__ == "__main__":
    main()
