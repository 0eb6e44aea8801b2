"""Mixtures of experts in an ONNX graph, by the operator QMoE of onnxruntime.

The weights of all experts of a layer are two stacks in the layout of codes.py with one more axis in front:

    PATH.*.gate_up_proj    [E, 2 F, ...]    gates and ups take turns in the rows, the only order that its CPU kernel has
    PATH.*.down_proj       [E, D, ...]

QMoE computes the experts with the highest scores and adds their outputs, each times its weight. Scores and weights are
computed by other nodes, as transformers does:

    scores = softmax(router(x)) [N, E],   weights = scores, or scores / sum of the highest scores

Both stacks have one scheme of 4 bits: there is one block size, and the kernel for 8 bits rounds activations to 8 bits
at every accuracy level.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from nybble.errors import ExportError
from nybble.export.onnx.codes import ANY_EXPERT, CODES, GATE_UP, SCALES, ZERO_POINTS, lazy_initializers
from nybble.export.places import reorder_weight, stack_rows, to_neighbours
from nybble.models.checkpoint import QuantizedCheckpoint
from nybble.models.experts import SplitExperts
from nybble.quant.scheme import QuantScheme

PROJECTIONS = (GATE_UP, "down_proj")
"""Leaves of an expert, in the order of the inputs of QMoE."""


def experts_of_layers(modules: Iterable[str]) -> dict[str, list[str]]:
    """Return the linear layers of experts: path of a mixture -> names of its layers."""
    found: dict[str, list[str]] = {}
    for name in modules:
        path, is_expert, _ = name.partition(".experts.")
        if is_expert:
            found.setdefault(path, []).append(name)
    return found


def experts_problem(schemes: Sequence[QuantScheme | None]) -> str | None:
    """Return why QMoE cannot hold the experts of a layer, as the object of "this model has"; None if it can.

    Args:
        schemes: in which the format would hold each of their linear layers; None for one in 16 bits. Group sizes may
            differ: the smallest one is taken.
    """
    found = {scheme and replace(scheme, group_size=None) for scheme in schemes}
    if found <= {QuantScheme(4, None), QuantScheme(4, None, symmetric=True)} and len(found) == 1:
        return None
    return f"experts with {' and '.join(sorted(str(scheme or '16 bits') for scheme in set(schemes)))}"


def mixture_builder(base: Any, checkpoint: QuantizedCheckpoint, used: set[str]) -> Any:
    """Return a builder class that makes mixtures, too.

    Args:
        base: builder class of onnxruntime-genai. Its instances get the model as an attribute `stand_in`.
        checkpoint: the model.
        used: gets the names of the quantized modules of experts.
    """

    class MixtureBuilder(base):  # type: ignore[misc]
        def make_mlp(self, layer_id: int, mlp: Any, root_input: str) -> None:
            if isinstance(getattr(mlp, "experts", None), SplitExperts):
                used.update(_make_mixture(self, checkpoint, layer_id, mlp, root_input))
            else:
                super().make_mlp(layer_id, mlp, root_input)

    return MixtureBuilder


def _make_mixture(builder: Any, checkpoint: QuantizedCheckpoint, layer: int, mlp: Any, root_input: str) -> list[str]:
    """Add a mixture to the graph.

    Args:
        builder: of `mixture_builder`.
        checkpoint: the model.
        layer: index of the decoder layer.
        mlp: module of transformers with a router `gate`, `experts`, and perhaps `shared_expert`.
        root_input: name of its input [B, T, D].

    Returns:
        Names of the quantized modules of the experts.
    """
    path = next(name for name, module in builder.stand_in.named_modules() if module is mlp.experts)
    if f"{path}.0.{GATE_UP}" not in checkpoint.shapes:
        raise ExportError(
            f"an export to ONNX needs one scheme of 4 bits for all experts of a layer; {path} stays in 16 bits; change "
            "--ignore, or remove onnx from --export"
        )
    base, hidden = f"/model/layers.{layer}/mlp", builder.make_hidden_state_shape()
    weights = [""] * 15
    weights[0], weights[1], weights[14] = root_input, *_routing(builder, mlp, base, root_input)
    modules = []
    for leaf, first, zeros in zip(PROJECTIONS, (2, 5), (11, 12), strict=True):
        experts = [f"{path}.{i}.{leaf}" for i in range(mlp.experts.split_count)]
        modules += experts
        for kind, tensor in _stack(checkpoint, f"{path}{ANY_EXPERT}{leaf}", experts).items():
            builder.make_initializer(tensor, str(tensor.name))
            weights[{CODES: first, SCALES: first + 1, ZERO_POINTS: zeros}[kind]] = str(tensor.name)
    scheme = checkpoint.selection.schemes[modules[0]]
    builder.make_node(
        "QMoE",
        inputs=weights,
        outputs=[f"{base}/QMoE/output_0"],
        name=f"{base}/QMoE",
        domain="com.microsoft",
        k=checkpoint.config.num_experts_per_tok,
        activation_type="swiglu",
        activation_alpha=1.0,
        activation_beta=0.0,
        swiglu_fusion=1,
        block_size=scheme.group_size,
        expert_weight_bits=scheme.bits,
        accuracy_level=builder.quant_attrs["accuracy_level"],
    )
    builder.make_value(f"{base}/QMoE/output_0", builder.io_dtype, shape=hidden)
    builder.layernorm_attrs["skip_input"] = f"{base}/QMoE/output_0"
    if hasattr(mlp, "shared_expert"):
        _add_shared(builder, layer, mlp, root_input)
    return modules


def _stack(checkpoint: QuantizedCheckpoint, name: str, experts: Sequence[str]) -> dict[str, Any]:
    """The initializers of a projection of all experts."""
    (rows, columns), scheme = checkpoint.shapes[experts[0]], checkpoint.selection.schemes[experts[0]]
    halves = 1 if name.endswith(GATE_UP) else None

    def read() -> Any:
        return stack_rows([reorder_weight(checkpoint.quantized[module], halves, to_neighbours) for module in experts])

    return lazy_initializers(name, (len(experts), rows), columns, scheme, read)


def _routing(builder: Any, mlp: Any, base: str, root_input: str) -> tuple[str, str]:
    """Add the router; names of scores and weights [N, E]."""
    import onnx_ir as ir

    router, dtype = mlp.gate, builder.io_dtype
    count, shape = router.weight.shape[0], ["batch_size * sequence_length", router.weight.shape[0]]
    logits = f"{builder.make_matmul(router, f'{base}/router/MatMul', root_input)}/output_0"
    flat, softmax, top, total, weights = (f"{base}/router/{op}" for op in ("Reshape", "Softmax", "TopK", "Sum", "Div"))
    builder.make_reshape(flat, [logits, f"/model/constants/INT64/[-1, {count}]"], dtype=dtype, shape=shape)
    builder.make_softmax(softmax, f"{flat}/output_0", dtype=ir.DataType.FLOAT, shape=shape)
    scores = f"{softmax}/output_0"
    if not getattr(router, "norm_topk_prob", True):
        return scores, scores
    best = [shape[0], router.top_k]
    builder.make_topk(top, [scores, f"/model/constants/INT64/[{router.top_k}]"], dtype=dtype, shape=best)
    axes = "/model/constants/INT64/[-1]"
    builder.make_reduce_sum(total, [f"{top}/output_0", axes], dtype=dtype, shape=[shape[0], 1], keepdims=True)
    builder.make_div(weights, [scores, f"{total}/output_0"], dtype=dtype, shape=shape)
    return scores, f"{weights}/output_0"


def _add_shared(builder: Any, layer: int, mlp: Any, root_input: str) -> None:
    """Add the shared expert, times the sigmoid of its gate, to the output of the mixture."""
    mixture, base = builder.layernorm_attrs["skip_input"], f"/model/layers.{layer}/mlp/shared"
    dtype, hidden = builder.io_dtype, builder.make_hidden_state_shape()
    width, builder.intermediate_size = builder.intermediate_size, mlp.shared_expert.down_proj.in_features
    builder.make_mlp(layer, mlp.shared_expert, root_input)
    builder.intermediate_size = width
    gate = builder.make_matmul(mlp.shared_expert_gate, f"{base}/gate/MatMul", root_input)
    builder.make_sigmoid(
        f"{base}/Sigmoid", f"{gate}/output_0", dtype=dtype, shape=builder.make_hidden_state_shape(last_dim=1)
    )
    shared = [builder.layernorm_attrs["skip_input"], f"{base}/Sigmoid/output_0"]
    builder.make_mul(f"{base}/Mul", shared, dtype=dtype, shape=hidden)
    builder.make_add(f"{base}/Add", [mixture, f"{base}/Mul/output_0"], dtype=dtype, shape=hidden)
    builder.layernorm_attrs["skip_input"] = f"{base}/Add/output_0"
