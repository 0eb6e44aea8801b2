"""The graph of a model, made by the model builder of onnxruntime-genai.

The builder walks over a transformers model and writes a node for every layer. It expects float weights and quantizes
them, or weights that another tool has quantized. It gets the latter here, with initializers that are read only when
they are written, so no float weight exists.

What differs from the builder's own graph, because the builder is wrong or inexact there:

- Embedding and head have 8-bit codes. A tied head shares them with the embedding.
- Tables of rotary embeddings are those of transformers' own module. The builder ignores some types of scaling.
- The factor of Gemma's embedding is exact. The builder rounds it to two decimals.
- Mistral's and Phi-3's sliding windows are in all layers. The builder ignores them.
- Only Gemma 2 caps the logits of attention. The builder caps those of Gemma 3 as well, which transformers does not.
- Keys and values of layers with a sliding window are kept for all tokens, as the runtime without shared buffers needs.

Side effects: importing the builder adds two folders to sys.path, which `_import_builders` takes away again, and what
the builder prints is dropped.
"""

from __future__ import annotations

import contextlib
import io
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from nybble.errors import ExportError, describe_error
from nybble.export.containers import exact_dtype
from nybble.export.onnx.codes import CODES, SCALES, ZERO_POINTS, Part, lazy_initializers, module_of
from nybble.export.onnx.experts import experts_of_layers, mixture_builder
from nybble.export.places import take_rows
from nybble.models.checkpoint import QuantizedCheckpoint

BUILDERS = {
    "llama": "LlamaModel",
    "mistral": "MistralModel",
    "qwen2": "QwenModel",
    "qwen3": "Qwen3Model",
    "gemma2": "Gemma2Model",
    "gemma3_text": "Gemma3Model",
    "phi3": "Phi3MiniModel",
    "mixtral": "MistralModel",
    "qwen2_moe": "QwenModel",
    "qwen3_moe": "Qwen3Model",
}
"""Model type -> builder class."""

_GENAI_TYPES = {"mixtral": "mistral", "qwen2_moe": "qwen2", "qwen3_moe": "qwen3"}
"""Model type -> type in genai_config.json, where that is another one: with the same inputs and outputs."""

_LONG_ROPE_BUILDER = "Phi3MiniLongRoPEModel"
_WINDOW_IN_ALL_LAYERS = frozenset({"mistral", "phi3", "mixtral", "qwen3_moe"})
"""Model types whose sliding window is in all layers, which the configuration does not say layer by layer."""

_FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
"""Fused projection -> the projections that its rows hold, in this order."""

ACCURACY_LEVEL = 4
"""Of deployed models: activations are quantized to 8 bits, as the builder has it by default for CPUs."""


def write_graph(checkpoint: QuantizedCheckpoint, model_file: Path) -> None:
    """Write the graph, its external data and genai_config.json.

    Args:
        checkpoint: the model.
        model_file: the graph; the external data gets the same name with .data.

    Raises:
        ExportError: the builder does not accept the model, its graph does not use a quantized layer, or the disk is
            full.
    """
    import onnx_ir as ir

    used: set[str] = set()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            builder = _make_builder(checkpoint, used)
            builder.make_model("")
            builder.make_genai_config(builder.builder_config, {}, str(model_file.parent))
    except (AttributeError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        raise ExportError(
            f"an export to ONNX needs a model that the builder of onnxruntime-genai accepts; "
            f"{checkpoint.config.model_type} is not accepted ({describe_error(error)}); remove onnx from --export"
        ) from error
    if unused := [name for name in checkpoint.shapes if name not in used]:
        raise ExportError(
            f"the ONNX graph must use the codes of every quantized layer; it does not use {len(unused)} of "
            f"{len(checkpoint.shapes)} (first: {unused[0]}); remove onnx from --export"
        )
    _shrink_initializers(builder)
    builder.model.graph.sort()
    for value in list(builder.model.graph.initializers.values()):
        value.name = value.const_value.name
    try:
        ir.save(builder.model, model_file, external_data=f"{model_file.name}.data", size_threshold_bytes=0)
    except OSError as error:
        if error.errno is not None:
            raise
        # numpy does not say why it wrote less than it should
        run, free = model_file.parent.parent, shutil.disk_usage(model_file.parent).free
        raise ExportError(
            f"the export to {run} must be written to disk; it cannot be ({describe_error(error)}); {free / 1e6:.0f} MB "
            f"are free; free some disk space, then run: nybble export {run} --to onnx"
        ) from error


def _shrink_initializers(builder: Any) -> None:
    """Hold the weights of layers that stay in 16 bits in float16 or bfloat16, whichever has the same values, in place.

    A Cast makes them float32, which onnxruntime does once, when it loads the graph.
    """
    import onnx_ir as ir

    kinds = {torch.float16: ir.DataType.FLOAT16, torch.bfloat16: ir.DataType.BFLOAT16}
    for name, value in list(builder.model.graph.initializers.items()):
        tensor, users = value.const_value, list(value.uses())
        if tensor.dtype != ir.DataType.FLOAT or not any(use.node.op_type == "MatMul" for use in users):
            continue
        values = torch.tensor(tensor.numpy())
        if (dtype := exact_dtype([values])) not in kinds:
            continue
        small = f"{name}.{kinds[dtype].name.lower()}"
        builder.make_initializer(values.to(dtype), small)
        builder.make_node(
            "Cast", inputs=[small], outputs=[f"{small}/output_0"], name=f"{small}/Cast", to=ir.DataType.FLOAT
        )
        builder.make_value(f"{small}/output_0", ir.DataType.FLOAT, shape=list(values.shape))
        for use in users:
            use.node.replace_input_with(use.idx, builder.values[f"{small}/output_0"])
        del builder.model.graph.initializers[name]


def _import_builders() -> Any:
    """Import the builders, and take the folders that they add to sys.path away again."""
    before = list(sys.path)
    try:
        from onnxruntime_genai.models import builders
    finally:
        sys.path[:] = before
    return builders


def _make_builder(checkpoint: QuantizedCheckpoint, used: set[str]) -> Any:
    """Return a builder for the model; names of quantized modules that its graph uses are added to `used`."""
    import onnx_ir as ir

    config = _builder_config(checkpoint)
    long_rope = config.rope_type == "longrope" and config.original_max_position_embeddings < config.context_length
    kind = _LONG_ROPE_BUILDER if long_rope else BUILDERS[config.model_type]
    model, schemes = _stand_in(checkpoint), checkpoint.selection.schemes
    scheme = schemes[checkpoint.selection.linears[0]]  # what the builder would quantize with; it gets codes instead
    options = {
        "fuse_qkv": False,
        "windowed_kv_cache": False,
        "is_symmetric": scheme.symmetric,
        "block_size": scheme.group_size,
        "accuracy_level": ACCURACY_LEVEL,
        "hf_token": False,
        "hf_remote": checkpoint.trust_remote_code,
    }
    builder_class = _builder_class(
        mixture_builder(getattr(_import_builders(), kind), checkpoint, used), checkpoint, model, used
    )
    dtype = ir.DataType.INT4 if scheme.symmetric else ir.DataType.UINT4
    builder = builder_class(config, ir.DataType.FLOAT, dtype, "cpu", "", options)
    builder.model_type, builder.stand_in = _GENAI_TYPES.get(config.model_type, config.model_type), model
    builder.builder_config = config
    builder.embed_attrs["scale"] = float(getattr(model.get_input_embeddings(), "embed_scale", 1))
    return builder


def _builder_config(checkpoint: QuantizedCheckpoint) -> SimpleNamespace:
    """Return the configuration as the builder reads it: no nested rotary parameters, a type for every layer."""
    config, layers = SimpleNamespace(**checkpoint.config.to_dict()), checkpoint.config.num_hidden_layers
    config.architectures, config._name_or_path = [config.model_type], str(checkpoint.folder)
    config.context_length = config.max_position_embeddings
    # The builder's own mixtures have other routers, and it takes the width of experts for that of dense layers.
    for name in ("num_experts", "num_local_experts", "moe_intermediate_size"):
        vars(config).pop(name, None)
    if config.model_type in _WINDOW_IN_ALL_LAYERS:
        config.layer_types = [f"{'full' if config.sliding_window is None else 'sliding'}_attention"] * layers
    elif config.model_type == "llama":
        config.layer_types = ["full_attention"] * layers
    if config.model_type != "gemma2":
        config.attn_logit_softcapping = None
    rope = dict(config.rope_parameters)
    if "rope_type" not in rope:  # one entry for each type of layer
        # The builder uses these values only in the function that `_builder_class` replaces.
        config.rope_theta, config.rope_local_base_freq = "full_attention", "sliding_attention"
        rope = {"rope_type": "default"}
    config.rope_parameters, config.rope_type = rope | {"type": rope["rope_type"]}, rope["rope_type"]
    config.original_max_position_embeddings = (
        rope.get("original_max_position_embeddings") or config.max_position_embeddings
    )
    return config


class _Projection(nn.Module):
    """Codes of a linear layer with the attributes that the builder reads from quantized layers.

    Args:
        initializers: CODES, SCALES and perhaps ZERO_POINTS -> onnx_ir.LazyTensor.
        shape: (O, I).
        bits: 4 or 8.
        block: weights in a block.
        bias: float32 [O], or None.
    """

    def __init__(
        self, initializers: Mapping[str, Any], shape: tuple[int, int], bits: int, block: int, bias: Tensor | None
    ) -> None:
        super().__init__()
        self.qweight, self.scales = initializers[CODES], initializers[SCALES]
        self.qzeros = initializers.get(ZERO_POINTS)
        self.out_features, self.in_features = shape
        self.bits, self.group_size, self.bias = bits, block, bias


def _stand_in(checkpoint: QuantizedCheckpoint) -> Any:
    """Return the model with a _Projection for every quantized linear layer, and one for every part of a fused one."""
    model = checkpoint.build(lambda name: torch.zeros(1).expand(checkpoint.shapes[name]))
    linears = checkpoint.selection.linears
    experts = {name for names in experts_of_layers(linears).values() for name in names}
    for name in (name for name in linears if name not in experts):
        parent, _, leaf = name.rpartition(".")
        module, bias = model.get_submodule(parent), model.get_submodule(name).bias
        if leaf not in _FUSED:
            setattr(module, leaf, _projection(checkpoint, Part(name, 0, checkpoint.shapes[name][0]), bias))
            continue
        delattr(module, leaf)
        begin = 0
        for projection, rows in zip(_FUSED[leaf], _fused_rows(checkpoint.config, leaf), strict=True):
            part = Part(name, begin, begin + rows, whole=False)
            setattr(module, projection, _projection(checkpoint, part, None if bias is None else bias[begin : part.end]))
            begin = part.end
    head = checkpoint.selection.embeddings[-1]  # the embedding, if they are tied
    model.set_output_embeddings(_projection(checkpoint, Part(head, 0, checkpoint.shapes[head][0]), None))
    return model


def _fused_rows(config: Any, leaf: str) -> tuple[int, ...]:
    """Return the numbers of rows of the projections in a fused projection."""
    if leaf == "gate_up_proj":
        return (config.intermediate_size, config.intermediate_size)
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    keys = config.num_key_value_heads * head_size
    return (config.num_attention_heads * head_size, keys, keys)


def _projection(checkpoint: QuantizedCheckpoint, part: Part, bias: Tensor | None) -> _Projection:
    """Return the stand-in for rows of a linear layer."""
    columns, scheme = checkpoint.shapes[part.name][1], checkpoint.selection.schemes[part.name]
    rows = slice(part.begin, part.end)
    shape = (part.end - part.begin, columns)
    initializers = lazy_initializers(
        part.prefix, shape[:1], columns, scheme, lambda: take_rows(checkpoint.quantized[part.name], rows)
    )
    return _Projection(initializers, shape, scheme.bits, columns // scheme.num_groups(columns), bias)


def _builder_class(base: Any, checkpoint: QuantizedCheckpoint, model: Any, used: set[str]) -> Any:
    """Return a builder class that takes its weights from the stand-in `model`; see the top of this file."""
    import onnx_ir as ir

    class Builder(base):  # type: ignore[misc]
        def load_weights(self, input_path: str) -> Any:
            return model

        def make_rope_init(self, config: Any) -> None:
            if config.rope_type == "longrope":
                super().make_rope_init(config)  # two tables, and a node that chooses one of them

        def make_rotary_embedding_caches_from_scratch(self) -> tuple[Tensor, Tensor]:
            positions = torch.arange(self.rope_attrs["cache_length"])[None]
            theta = self.rope_attrs["theta"]
            rotary, layer_type = model.model.rotary_emb, []
            if isinstance(theta, str):  # the type of layer; a table for a type that no layer has is not used
                layer_type = [theta if theta in rotary.layer_types else rotary.layer_types[0]]
            cos_1TR, sin_1TR = rotary(torch.zeros(1), positions, *layer_type)
            return cos_1TR[0], sin_1TR[0]

        def make_initializer(self, tensor: Any, /, name: str, **options: Any) -> None:
            if isinstance(tensor, ir.LazyTensor):
                used.add(module_of(str(tensor.name)))
                options = {}  # it has the right type
            super().make_initializer(tensor, name, **options)

        def make_embedding_lookup(self, embedding: Tensor, basename: str, lm_head: _Projection) -> str:
            return _make_lookup(self, basename, checkpoint, lm_head)

    return Builder


def _make_lookup(builder: Any, basename: str, checkpoint: QuantizedCheckpoint, lm_head: _Projection) -> str:
    """Add the lookup of embeddings to the graph; returns the name of its output [B, T, D].

    Codes keep the three axes that MatMulNBits wants, so that a tied head can share them:

        codes [V, G, K], input_ids [B, T], scales [V, G, 1] -> embeddings [B, T, G, K] -> [B, T, D]
    """
    import onnx_ir as ir

    table, codes, scales = lm_head, "lm_head.MatMulNBits.qweight", "lm_head.MatMulNBits.scales"  # builder's names
    if not checkpoint.selection.tied:
        name = checkpoint.selection.embeddings[0]
        table, codes, scales = _projection(checkpoint, Part(name, 0, checkpoint.shapes[name][0]), None), *_names(name)
        builder.make_initializer(table.qweight, codes)
        builder.make_initializer(table.scales, scales)
    rows, columns, blocks = table.out_features, table.in_features, table.in_features // table.group_size
    unsqueeze, lookup, reshape = (f"{basename}/{op}" for op in ("Unsqueeze", "GatherBlockQuantized", "Reshape"))
    builder.make_unsqueeze(
        unsqueeze, [scales, "/model/constants/INT64/[2]"], dtype=ir.DataType.FLOAT, shape=[rows, blocks, 1]
    )
    builder.make_node(
        "GatherBlockQuantized",
        inputs=[codes, builder.input_names["input_ids"], f"{unsqueeze}/output_0"],
        outputs=[f"{lookup}/output_0"],
        name=lookup,
        domain="com.microsoft",
        bits=table.bits,
        block_size=table.group_size,
        gather_axis=0,
        quantize_axis=2,
    )
    shape = ["batch_size", "sequence_length", blocks, table.group_size]
    builder.make_value(f"{lookup}/output_0", ir.DataType.FLOAT, shape=shape)
    builder.make_reshape(
        reshape,
        [f"{lookup}/output_0", f"/model/constants/INT64/[0, 0, {columns}]"],
        dtype=ir.DataType.FLOAT,
        shape=["batch_size", "sequence_length", columns],
    )
    return f"{reshape}/output_0"


def _names(name: str) -> tuple[str, str]:
    return name + CODES, name + SCALES
