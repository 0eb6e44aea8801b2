"""OpenVINO: a stateful KV-cache model (IR) with 4-bit weights, tokenizer and detokenizer, ready for openvino-genai.

Written without graph surgery on attention: a thin wrapper gives the model its past keys and values, a mask of its own and beam_idx;
openvino traces it once; then the float constants of the quantized layers are replaced by

    u4 codes [O,G,K] -> f16, minus u4 zero [O,G,1] -> f16, times f16 scale [O,G,1], reshaped to [O,I], -> f32
    u8 codes [V,D]   -> f32, minus u8 zero [V,1]   -> f32, times f32 scale [V,1]                     (embedding, head)

which the CPU plugin runs as compressed matrix products. scale * (code - zero) has at most 11 significant bits for 4-bit codes: f16 is exact.

Refused (ExportError): a weight that the traced graph does not hold as a constant, codes that read back differently, logits
further than 1e-3 from torch in strict float32.

Input names, partial shapes and state are those of optimum-intel's exports, so every tool that takes those takes these.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from nybble.errors import ExportError
from nybble.quant.scheme import INT8_PER_ROW, QuantScheme
from nybble.quant.weight import QuantizedWeight, pack_nibbles, unpack_nibbles

log = logging.getLogger("nybble")

MODEL_XML = "openvino_model.xml"
# Properties under which the CPU plugin computes as torch does in float32. EXECUTION_MODE_HINT=ACCURACY would undo the compression.
STRICT = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0", "KV_CACHE_PRECISION": "f32"}
LOGIT_TOLERANCE = 1e-3


class _WithPast(nn.Module):
    """The model with past keys and values as flat inputs and outputs."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        text = model.config
        self.layers = text.num_hidden_layers
        self.window = getattr(text, "sliding_window", None)
        self.layer_types = getattr(text, "layer_types", None)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, beam_idx: Tensor, *past: Tensor
    ) -> tuple[Tensor, ...]:
        cache = DynamicCache()
        cache.layers = []
        for i in range(self.layers):
            layer = DynamicLayer()
            layer.keys, layer.values = past[2 * i].index_select(0, beam_idx), past[2 * i + 1].index_select(0, beam_idx)
            layer.dtype, layer.device, layer.is_initialized = layer.keys.dtype, layer.keys.device, True
            cache.layers.append(layer)
        output = self.model(
            input_ids=input_ids,
            attention_mask=self._masks(input_ids, attention_mask),
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        presents = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]  # type: ignore[union-attr]
        return output.logits, *presents

    def _masks(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        """4-D masks: [B, 1, T, S], one for each kind of layer where the model has several. They are added: boolean ones, which OpenVINO takes too, make its
        attention three times as slow on a prompt of 1024 tokens (docs/log.md, 2026-11-28)."""
        keys, queries = attention_mask.shape[1], input_ids.shape[1]
        key_S = torch.arange(keys)
        query_T1 = (torch.arange(queries) + (keys - queries))[:, None]
        # A padded token may look at itself: a row without any key would be NaN, and NaN spreads through the values.
        itself_TS = key_S == query_T1
        seen_BTS = (key_S <= query_T1) & attention_mask.bool()[:, None, :]
        full = (seen_BTS | itself_TS)[:, None]
        sliding = full if self.window is None else full & (key_S > query_T1 - self.window)
        full, sliding = (
            torch.zeros_like(m, dtype=torch.float32).masked_fill(~m, torch.finfo(torch.float32).min)
            for m in (full, sliding)
        )
        if self.layer_types is not None:
            return {"full_attention": full, "sliding_attention": sliding}
        return sliding


def export(model: Any, tokenizer: Any, quantized: Mapping[str, QuantizedWeight], folder: Path) -> dict[str, Any]:
    """Write the IR, tokenizer and configuration; read back codes and compare logits.

    Args:
        model: float32 transformers model whose quantized layers hold the dequantized weights.
        tokenizer: goes along as openvino_tokenizer.xml and in transformers' own files.
        quantized: module name -> codes.
        folder: an existing empty folder.

    Returns: counts and sizes: weights_u4, weights_u8, bytes, logit_difference.
    """
    import openvino as ov

    irs = _trace(model)
    counts = _compress_constants(irs, quantized)
    ov.save_model(irs, folder / MODEL_XML, compress_to_fp16=False)
    del irs
    _save_tokenizer(tokenizer, folder)
    model.config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    _check_codes(folder, quantized)
    difference = _check_logits(folder, model)
    size = sum(file.stat().st_size for file in folder.glob("openvino_model.*"))
    return counts | {"bytes": size, "logit_difference": difference}


def _trace(model: Any) -> Any:
    import openvino as ov
    from openvino._offline_transformations import apply_make_stateful_transformation

    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    batch, queries, past = 2, 3, 2  # more than one of everything: the tracer takes a 1 for a constant
    example = {
        "input_ids": torch.ones(batch, queries, dtype=torch.int64),
        "attention_mask": torch.ones(batch, past + queries, dtype=torch.int64),
        "position_ids": torch.arange(past, past + queries).expand(batch, -1),
        "beam_idx": torch.arange(batch, dtype=torch.int32),
    }
    states = [torch.zeros(batch, heads, past, width) for _ in range(2 * config.num_hidden_layers)]
    with torch.no_grad(), warnings.catch_warnings(), _static_rope(model):
        warnings.simplefilter("ignore")  # the tracer warns of every branch on a shape; the check of logits is the judge
        try:
            irs = ov.convert_model(_WithPast(model).eval(), example_input=(*example.values(), *states))
        except Exception as error:  # the tracer's, OpenVINO's and the model's own errors
            raise ExportError(
                f"{type(model).__name__} cannot be traced for OpenVINO, with keys and values of past tokens ({_brief(error)})"
            ) from error

    stateful = {}
    shapes = {"input_ids": [-1, -1], "attention_mask": [-1, -1], "position_ids": [-1, -1], "beam_idx": [-1]}
    for port, (name, shape) in zip(irs.inputs, shapes.items(), strict=False):
        port.get_tensor().set_names({name})
        port.get_node().set_partial_shape(ov.PartialShape(shape))
        port.get_node().set_friendly_name(name)
    irs.outputs[0].get_tensor().set_names({"logits"})
    for i in range(2 * config.num_hidden_layers):
        leaf = f"{i // 2}.{'value' if i % 2 else 'key'}"
        source, sink = irs.inputs[len(shapes) + i], irs.outputs[1 + i]
        source.get_tensor().set_names({f"past_key_values.{leaf}"})
        source.get_node().set_partial_shape(ov.PartialShape([-1, heads, -1, width]))
        source.get_node().set_element_type(ov.Type.f32)
        source.get_node().set_friendly_name(f"past_key_values.{leaf}")
        sink.get_tensor().set_names({f"present.{leaf}"})
        stateful[f"past_key_values.{leaf}"] = f"present.{leaf}"
    irs.validate_nodes_and_infer_types()
    apply_make_stateful_transformation(irs, stateful)
    _start_states_empty(irs, heads, width)
    return irs


@contextmanager
def _static_rope(model: Any) -> Iterator[None]:
    """Rotary embeddings whose frequencies depend on the length of the context (Phi-3.5's longrope, dynamic NTK) stay at those of
    contexts up to `original_max_position_embeddings`: a branch on the length cannot be traced."""
    changing = [module for module in model.modules() if getattr(module, "rope_type", None) in ("longrope", "dynamic")]
    kinds = [module.rope_type for module in changing]
    try:
        for module in changing:
            module.rope_type = "default"  # asked only whether to update the frequencies
        if changing:
            log.info(
                "positions: the exported model is right for contexts up to %d tokens", _original_length(model.config)
            )
        yield
    finally:
        for module, kind in zip(changing, kinds, strict=True):
            module.rope_type = kind


def _original_length(config: Any) -> int:
    parameters = getattr(config, "rope_parameters", None) or {}
    return int(parameters.get("original_max_position_embeddings") or config.max_position_embeddings)


def _start_states_empty(irs: Any, heads: int, width: int) -> None:
    """Every state starts as [batch, heads, 0, width] for whatever batch comes in."""
    from openvino import opset13 as op

    input_ids = irs.input("input_ids")
    batch = op.gather(op.shape_of(input_ids, output_type="i64"), op.constant(np.array([0])), op.constant(0))
    shape = op.concat([batch, op.constant(np.array([heads, 0, width]))], axis=0)
    for node in irs.get_ops():
        if node.get_type_name() == "ReadValue":
            node.set_arguments([op.broadcast(op.constant(np.float32(0)), shape)])
    irs.validate_nodes_and_infer_types()


def _compress_constants(irs: Any, quantized: Mapping[str, QuantizedWeight]) -> dict[str, int]:
    """Replace the float constants of all quantized weights; returns how many of each width. ExportError if one is missing."""
    constants = {}
    for node in irs.get_ops():
        if node.get_type_name() == "Constant" and node.get_friendly_name().endswith(".weight"):
            constants[node.get_friendly_name().removeprefix("self.").removeprefix("model.").removesuffix(".weight")] = (
                node
            )
    missing = [name for name in quantized if name not in constants]
    if missing:
        raise ExportError(
            f"the traced graph must hold the weight of every quantized layer as a constant; {len(missing)} of {len(quantized)} are missing "
            f"(first: {missing[0]}); this architecture cannot be exported to OpenVINO yet"
        )
    for name, weight in quantized.items():
        node = constants[name]
        if tuple(node.shape) != tuple(weight.codes_OI.shape):
            raise ExportError(
                f"{name}: the traced weight has shape {tuple(node.shape)}, the codes {tuple(weight.codes_OI.shape)}"
            )
        replacement = _decompression(name, weight)
        for target in node.output(0).get_target_inputs():
            target.replace_source_output(replacement.output(0))
    bits = [weight.scheme.bits for weight in quantized.values()]
    return {"weights_u4": bits.count(4), "weights_u8": bits.count(8)}


def _decompression(name: str, weight: QuantizedWeight) -> Any:
    import openvino as ov
    from openvino import opset13 as op

    four = weight.scheme.bits == 4
    (rows, columns), groups = weight.codes_OI.shape, weight.scale_OG.shape[1]
    shape = [rows, groups, columns // groups] if four else [rows, columns]
    compute = "f16" if four else "f32"

    def constant(leaf: str, codes: Tensor, dims: list[int]) -> Any:
        array = _bytes(codes, four)
        tensor = ov.Tensor(array, ov.Shape(dims), ov.Type.u4 if four else ov.Type.u8)
        node = ov.op.Constant(tensor, shared_memory=False)  # the array is gone when this function returns
        node.set_friendly_name(f"{name}.{leaf}")
        return op.convert(node, compute)

    per_group = [*shape[:-1], 1]
    scale = op.constant(weight.scale_OG.cpu().numpy().astype(compute.replace("f", "float")).reshape(per_group))
    scale.set_friendly_name(f"{name}.scale")
    offset = op.subtract(
        constant("codes", weight.codes_OI, shape), constant("zero_point", weight.zero_point_OG, per_group)
    )
    product = op.multiply(offset, scale)
    if not four:
        return product
    return op.convert(op.reshape(product, op.constant(np.array([rows, columns])), special_zero=False), "f32")


def _bytes(codes: Tensor, four: bool) -> np.ndarray:
    """What an OpenVINO constant holds: bytes in row-major order; two 4-bit codes a byte, the first in the low nibble."""
    flat = codes.cpu().flatten()
    if four:
        flat = pack_nibbles(torch.cat([flat, flat.new_zeros(len(flat) % 2)]))
    return np.ascontiguousarray(flat.numpy())


def read_weights(folder: Path) -> dict[str, QuantizedWeight]:
    """Module name -> codes, scales and zeros of an exported model, read from its files."""
    import openvino as ov

    found: dict[str, dict[str, Any]] = {}
    for node in ov.Core().read_model(folder / MODEL_XML).get_ops():
        name, _, leaf = node.get_friendly_name().rpartition(".")
        if node.get_type_name() == "Constant" and leaf in ("codes", "zero_point", "scale"):
            found.setdefault(name, {})[leaf] = node
    weights = {}
    for name, parts in found.items():
        codes_OI, scale_OG, zero_point_OG = (_read(parts[leaf]) for leaf in ("codes", "scale", "zero_point"))
        four = parts["codes"].get_element_type().get_type_name() == "u4"
        scheme = QuantScheme(4, codes_OI.shape[1] // scale_OG.shape[1]) if four else INT8_PER_ROW
        weights[name] = QuantizedWeight(codes_OI, scale_OG.float(), zero_point_OG, scheme)
    return weights


def _read(node: Any) -> Tensor:
    """[O, ...] constant -> [O, the rest flattened]."""
    shape = list(node.shape)
    array = torch.from_numpy(np.array(node.data))
    if node.get_element_type().get_type_name() == "u4":
        array = unpack_nibbles(array.flatten().view(torch.uint8))[: int(np.prod(shape))]
    return array.reshape(shape[0], -1)


def _check_codes(folder: Path, quantized: Mapping[str, QuantizedWeight]) -> None:
    read = read_weights(folder)
    if read.keys() != quantized.keys():
        raise ExportError(f"{folder}: {len(quantized)} quantized weights were written, {len(read)} read back")
    for name, weight in quantized.items():
        for what, leaf in (("codes", "codes_OI"), ("scales", "scale_OG"), ("zero points", "zero_point_OG")):
            if not torch.equal(getattr(weight, leaf).cpu(), getattr(read[name], leaf)):
                raise ExportError(f"{folder}: the {what} of {name} read back differently; please report this")


def _check_logits(folder: Path, model: Any, length: int = 48) -> float:
    """Largest difference of the logits from torch in strict float32, on fixed pseudo-random tokens, prompt and decoding steps both."""
    ids = torch.randint(0, model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
    runtime = OpenVINOModel(folder, model.config, STRICT)
    prompt = length - 4
    parts = [runtime.run(ids[:, :prompt], reset=True)] + [
        runtime.run(ids[:, i : i + 1], reset=False) for i in range(prompt, length)
    ]
    difference = float((torch.cat(parts, dim=1) - expected).abs().max())
    if not difference <= LOGIT_TOLERANCE:
        raise ExportError(
            f"{folder}: logits must be within {LOGIT_TOLERANCE} of torch in strict float32; they differ by {difference:.3g}; please report this"
        )
    return difference


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    import openvino as ov
    from openvino_tokenizers import convert_tokenizer

    tokenizer.save_pretrained(folder)
    try:
        text_to_ids, ids_to_text = convert_tokenizer(tokenizer, with_detokenizer=True)
    except Exception as error:
        raise ExportError(f"{type(tokenizer).__name__} cannot be converted for OpenVINO ({_brief(error)})") from error
    ov.save_model(text_to_ids, folder / "openvino_tokenizer.xml")
    ov.save_model(ids_to_text, folder / "openvino_detokenizer.xml")


def open_model(folder: Path, config: Any, strict: bool = False) -> OpenVINOModel:
    """The exported model on the CPU, as deployed, or computing as torch does in float32."""
    return OpenVINOModel(folder, config, STRICT if strict else None)


class OpenVINOModel(GenerationMixin, PreTrainedModel):
    """An exported model that answers like a transformers model: forward gives logits, generate generates.

    Args:
        folder: with openvino_model.xml.
        config: transformers configuration of the model.
        properties: of the CPU plugin; the default is OpenVINO's own (dynamic int8 activations, bf16 or f32 by hardware), STRICT is torch's float32.
    """

    _supports_sdpa = True  # asked by transformers' constructor; attention itself is OpenVINO's
    main_input_name = "input_ids"

    def __init__(self, folder: Path, config: Any, properties: Mapping[str, str] | None = None) -> None:
        import openvino as ov

        super().__init__(copy.deepcopy(config))
        self.request = ov.Core().compile_model(folder / MODEL_XML, "CPU", dict(properties or {})).create_infer_request()
        self._seen = torch.empty(1, 0, dtype=torch.int64)  # tokens whose keys and values the state holds
        self._generating = False

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def run(self, input_ids: Tensor, attention_mask: Tensor | None = None, reset: bool = True) -> Tensor:
        """Logits [B, T, V] of new tokens [B, T], after what the state holds unless `reset`."""
        past = 0 if reset else self._seen.shape[1]
        if reset:
            self.request.reset_state()
            self._seen = input_ids
        else:
            self._seen = torch.cat([self._seen, input_ids], dim=1)
        batch, length = input_ids.shape
        mask = torch.ones(batch, past + length, dtype=torch.int64) if attention_mask is None else attention_mask
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, past:]
        inputs = {
            "input_ids": input_ids,
            "attention_mask": mask,
            "position_ids": positions,
            "beam_idx": torch.arange(batch, dtype=torch.int32),
        }
        output = self.request.infer({name: value.contiguous().numpy() for name, value in inputs.items()})
        return torch.from_numpy(output["logits"].copy())

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> CausalLMOutputWithPast:
        """Logits of all tokens; while generating, of those that are new since the last call."""
        past = self._seen.shape[1]
        if self._generating and 0 < past < input_ids.shape[1] and torch.equal(input_ids[:, :past], self._seen):
            return CausalLMOutputWithPast(logits=self.run(input_ids[:, past:], attention_mask, reset=False))  # type: ignore[arg-type]
        return CausalLMOutputWithPast(logits=self.run(input_ids, attention_mask, reset=True))  # type: ignore[arg-type]

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers' generate; the keys and values live in OpenVINO's state."""
        self._generating, self._seen = True, self._seen[:, :0]
        try:
            return super().generate(*args, **kwargs | {"use_cache": False})  # type: ignore[misc]
        finally:
            self._generating = False
