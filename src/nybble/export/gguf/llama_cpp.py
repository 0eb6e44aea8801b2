"""llama.cpp by ctypes: load a file, tokenize, compute logits. While something is loaded, its messages are collected.

The wheel xllamacpp has one extension that exports the C functions of llama.cpp (llama.h), which its Python classes do
not give: its server returns the probabilities of generated tokens, and not the logits of a text. ctypes needs the
layout of the structs, and llama.cpp changes it between versions. The structs below are those of xllamacpp 2026.10.11549
(llama.cpp 0.6.0-dev). Another version is refused unless its default parameters, read with these structs, have the known
values: nearly every field that is added moves one of them.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int8, c_int32, c_size_t, c_uint32, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nybble.errors import ExportError

_VERSION = "2026.10.11549"
_LOG_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_int, c_char_p, c_void_p)
_ERROR_LEVEL = 4  # GGML_LOG_LEVEL_ERROR
_F32, _F16 = 0, 1  # of enum ggml_type
_LOGIT_BYTES = 64_000_000
"""Most bytes of the logits of one call."""


# `further` is room for fields of another version, so that reading its defaults is safe.
class _ModelParams(ctypes.Structure):
    _fields_ = [
        ("devices", c_void_p), ("tensor_buft_overrides", c_void_p), ("n_gpu_layers", c_int32), ("split_mode", c_int32),
        ("load_mode", c_int32), ("lazy_mode", c_int32), ("main_gpu", c_int32), ("tensor_split", c_void_p),
        ("progress_callback", c_void_p), ("progress_callback_user_data", c_void_p), ("kv_overrides", c_void_p),
        ("vocab_only", c_bool), ("check_tensors", c_bool), ("use_extra_bufts", c_bool), ("no_host", c_bool),
        ("no_alloc", c_bool), ("load_mtp", c_bool), ("further", c_void_p * 8),
    ]  # fmt: skip


class _ContextParams(ctypes.Structure):
    _fields_ = [
        ("n_ctx", c_uint32), ("n_batch", c_uint32), ("n_ubatch", c_uint32), ("n_seq_max", c_uint32),
        ("n_rs_seq", c_uint32), ("n_outputs_max", c_uint32), ("n_outputs_max_per_seq", c_uint32),
        ("n_threads", c_int32), ("n_threads_batch", c_int32), ("ctx_type", c_int32), ("rope_scaling_type", c_int32),
        ("pooling_type", c_int32), ("attention_type", c_int32), ("flash_attn_type", c_int32),
        ("rope_freq_base", c_float), ("rope_freq_scale", c_float), ("yarn_ext_factor", c_float),
        ("yarn_attn_factor", c_float), ("yarn_beta_fast", c_float), ("yarn_beta_slow", c_float),
        ("yarn_orig_ctx", c_uint32), ("defrag_thold", c_float), ("cb_eval", c_void_p), ("cb_eval_user_data", c_void_p),
        ("type_k", c_int32), ("type_v", c_int32), ("pointers", c_void_p * 3), ("embeddings", c_bool),
        ("offload_kqv", c_bool), ("no_perf", c_bool), ("op_offload", c_bool), ("swa_full", c_bool),
        ("kv_unified", c_bool), ("samplers", c_void_p), ("n_samplers", c_size_t), ("ctx_other", c_void_p),
        ("further", c_void_p * 8),
    ]  # fmt: skip


class _Batch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", c_int32), ("token", POINTER(c_int32)), ("embd", c_void_p), ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)), ("seq_id", POINTER(POINTER(c_int32))), ("logits", POINTER(c_int8)),
    ]  # fmt: skip


_MODEL_DEFAULTS = {
    "n_gpu_layers": -1, "split_mode": 1, "load_mode": -1, "lazy_mode": 1, "main_gpu": 0, "vocab_only": False,
    "check_tensors": False, "use_extra_bufts": True, "no_host": False, "no_alloc": False, "load_mtp": False,
}  # fmt: skip
_CONTEXT_DEFAULTS = {
    "n_ctx": 512, "n_batch": 2048, "n_ubatch": 512, "n_seq_max": 1, "n_rs_seq": 0, "n_outputs_max": 0,
    "n_outputs_max_per_seq": 1, "n_threads": 4, "n_threads_batch": 4, "ctx_type": 0, "rope_scaling_type": -1,
    "pooling_type": -1, "attention_type": -1, "flash_attn_type": -1, "rope_freq_base": 0.0, "rope_freq_scale": 0.0,
    "yarn_ext_factor": -1.0, "yarn_attn_factor": -1.0, "yarn_beta_fast": -1.0, "yarn_beta_slow": -1.0,
    "yarn_orig_ctx": 0, "defrag_thold": -1.0, "type_k": _F16, "type_v": _F16, "embeddings": False,
    "offload_kqv": True, "no_perf": True, "op_offload": True, "swa_full": True, "kv_unified": False, "n_samplers": 0,
}  # fmt: skip

_FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "llama_backend_init": (None, ()),
    "llama_log_get": (None, (POINTER(c_void_p), POINTER(c_void_p))),
    "llama_log_set": (None, (c_void_p, c_void_p)),
    "llama_model_default_params": (_ModelParams, ()),
    "llama_context_default_params": (_ContextParams, ()),
    "llama_model_load_from_file": (c_void_p, (c_char_p, _ModelParams)),
    "llama_model_free": (None, (c_void_p,)),
    "llama_model_get_vocab": (c_void_p, (c_void_p,)),
    "llama_vocab_n_tokens": (c_int32, (c_void_p,)),
    "llama_tokenize": (c_int32, (c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool)),
    "llama_init_from_model": (c_void_p, (c_void_p, _ContextParams)),
    "llama_free": (None, (c_void_p,)),
    "llama_get_memory": (c_void_p, (c_void_p,)),
    "llama_memory_clear": (None, (c_void_p, c_bool)),
    "llama_decode": (c_int32, (c_void_p, _Batch)),
    "llama_get_logits": (POINTER(c_float), (c_void_p,)),
}
"""Name -> type of the result, types of the arguments."""


@functools.cache
def _library() -> Any:
    """The library with its functions declared.

    Raises:
        ExportError: it is another version of llama.cpp.
    """
    from xllamacpp import __version__

    spec = importlib.util.find_spec("xllamacpp.xllamacpp")
    assert spec is not None
    assert spec.origin is not None
    library = ctypes.CDLL(spec.origin)
    for name, (result, arguments) in _FUNCTIONS.items():
        if not hasattr(library, name):
            raise _other_version(__version__)
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    for params, known in (
        (library.llama_model_default_params(), _MODEL_DEFAULTS),
        (library.llama_context_default_params(), _CONTEXT_DEFAULTS),
    ):
        if any(getattr(params, name) != value for name, value in known.items()):
            raise _other_version(__version__)
    library.llama_backend_init()
    return library


def _other_version(found: str) -> ExportError:
    return ExportError(
        f"computing with a GGUF export needs the llama.cpp of xllamacpp {_VERSION}; xllamacpp {found} has another "
        "interface; install it with -c constraints.txt"
    )


@contextmanager
def _messages(library: Any) -> Iterator[list[str]]:
    """Collect the error messages of llama.cpp instead of printing all of its messages."""
    errors: list[str] = []

    def keep(level: int, text: bytes, _: Any) -> None:
        if level == _ERROR_LEVEL:
            errors.append(" ".join(text.decode(errors="replace").split()))

    callback = _LOG_CALLBACK(keep)  # must live as long as llama.cpp has it
    before, data = c_void_p(), c_void_p()
    library.llama_log_get(ctypes.byref(before), ctypes.byref(data))
    library.llama_log_set(ctypes.cast(callback, c_void_p), None)
    try:
        yield errors
    finally:
        library.llama_log_set(before, data)


def _free(function: Any, handle: int) -> None:
    with _messages(_library()):
        function(handle)


class LlamaModel:
    """A loaded file.

    Args:
        path: of the .gguf file.
        vocab_only: load no weights.
        repack: let llama.cpp store weights in memory as its fastest kernels read them. Otherwise they are read from
            the mapped file.

    Raises:
        ExportError: llama.cpp cannot load it.
    """

    def __init__(self, path: Path, vocab_only: bool = False, repack: bool = False) -> None:
        library = _library()
        params = library.llama_model_default_params()
        params.n_gpu_layers, params.vocab_only, params.use_extra_bufts = 0, vocab_only, repack
        with _messages(library) as errors:
            self.handle = library.llama_model_load_from_file(str(path).encode(), params)
        if not self.handle:
            raise ExportError(
                f"{path} must be a model that llama.cpp loads; it does not ({'; '.join(errors)[:300]}); please report "
                "this"
            )
        weakref.finalize(self, _free, library.llama_model_free, self.handle)
        self._vocab = library.llama_model_get_vocab(self.handle)
        self.vocab_size = int(library.llama_vocab_n_tokens(self._vocab))

    def tokenize(self, text: str) -> list[int]:
        """Return the ids of a text with special tokens, as transformers' `tokenizer(text).input_ids`."""
        content = text.encode()
        room = len(content) + 8  # a token has a byte at least; further ones are added at both ends
        ids = (c_int32 * room)()
        count = _library().llama_tokenize(self._vocab, content, len(content), ids, room, True, True)
        return list(ids[:count])


class LlamaContext:
    """Keys and values of sequences of a model.

    Args:
        model: the file.
        num_sequences: sequences that are kept at the same time.
        length: tokens of each.
        exact: keep keys and values in float32, and compute attention step by step, not fused.

    Raises:
        ExportError: llama.cpp cannot make it, usually for want of memory.
    """

    def __init__(self, model: LlamaModel, num_sequences: int, length: int, exact: bool) -> None:
        library = _library()
        params = library.llama_context_default_params()
        # 0 stands for one thread a core: those of torch are what the command line sets.
        params.n_threads = params.n_threads_batch = torch.get_num_threads()
        params.n_seq_max, params.n_ctx = num_sequences, num_sequences * length
        self._most = min(512, max(16, _LOGIT_BYTES // (4 * model.vocab_size)))
        params.n_batch = params.n_ubatch = self._most
        if exact:
            params.type_k = params.type_v = _F32
            params.flash_attn_type = 0
        self._model, self.num_sequences, self.length = model, num_sequences, length  # the model must live as long
        with _messages(library) as errors:
            self.handle = library.llama_init_from_model(model.handle, params)
        if not self.handle:
            raise ExportError(
                f"llama.cpp must have memory for {num_sequences} sequences of {length} tokens; it fails "
                f"({'; '.join(errors)[:300]}); use a smaller --eval_batch_size"
            )
        weakref.finalize(self, _free, library.llama_free, self.handle)

    def clear(self) -> None:
        """Forget all tokens."""
        library = _library()
        library.llama_memory_clear(library.llama_get_memory(self.handle), True)

    def decode(self, sequence: int, ids: Sequence[int], positions: Sequence[int]) -> NDArray[np.float32]:
        """Compute logits of the next tokens of a sequence.

        Args:
            sequence: which one.
            ids: tokens.
            positions: of the tokens in the sequence.

        Returns:
            float32 [T, V].

        Raises:
            ExportError: llama.cpp fails.
        """
        parts = [
            self._decode(sequence, ids[i : i + self._most], positions[i : i + self._most])
            for i in range(0, len(ids), self._most)
        ]
        return np.concatenate(parts)

    def _decode(self, sequence: int, ids: Sequence[int], positions: Sequence[int]) -> NDArray[np.float32]:
        count, library = len(ids), _library()
        numbers = c_int32 * count
        own = ctypes.pointer(c_int32(sequence))
        batch = _Batch(
            n_tokens=count,
            token=numbers(*ids),
            pos=numbers(*positions),
            n_seq_id=numbers(*[1] * count),
            seq_id=(POINTER(c_int32) * count)(*[own] * count),
            logits=(c_int8 * count)(*[1] * count),
        )
        with _messages(library) as errors:
            status = library.llama_decode(self.handle, batch)
        if status:
            raise ExportError(
                f"llama.cpp must compute {count} tokens; it fails with status {status} ({'; '.join(errors)[:300]}); "
                "please report this"
            )
        shape = (count, self._model.vocab_size)
        return np.ctypeslib.as_array(library.llama_get_logits(self.handle), shape).copy()
