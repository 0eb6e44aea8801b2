"""`--data self`: the model generates its own training text, for users who have none.

This is data-free distillation as in LLM-QAT (https://arxiv.org/abs/2305.17888). Sequences are sampled from the model's
own distribution: temperature 1, no top-k and no top-p. A sequence starts with the begin-of-text token; if the tokenizer
has none, with a random ordinary token; with `--data self:SOURCE`, with a piece of another text (a prefix). Sequences
that repeat themselves are discarded.

A batch depends on the seed and its number alone. Finished batches are kept in one file (`self.safetensors` in the run
folder), so an interrupted run continues, and other runs can train on them (`--data RUN/self.safetensors`).

Dimensions: S sequences, T tokens per sequence, P tokens of a prompt or prefix, V vocabulary, N prefixes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nybble import files
from nybble.data.packing import begin_tokens, token_fingerprint
from nybble.data.sampling import draw_order
from nybble.errors import DataError, ModelError, NybbleError, describe_error
from nybble.models.composite import text_config
from nybble.models.configuration import config_value
from nybble.schema import SchemaError, check_tensors, from_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GENERATED_FILE = "self.safetensors"
# A sequence is discarded if fewer of its 4-grams are distinct. Ordinary prose has nearly 1; a loop over one sentence,
# far less.
MIN_DISTINCT_NGRAMS = 0.5
_NGRAM = 4
# Give up after this many times the number of sequences wanted: a model that repeats itself in most of them is broken.
_MAX_ATTEMPTS = 4
# Batch n of a run draws its random numbers from seed * _SEED_STRIDE + n. A prime, so that runs with neighbouring seeds
# share no batch.
_SEED_STRIDE = 1_000_003


@dataclass(frozen=True)
class PendingGeneration:
    """Training sequences that the model has still to generate.

    Attributes:
        num_train: sequences to train on.
        num_calibration: sequences to calibrate with; they are the first ones of the same sequences.
        seq_len: tokens per sequence, the prefix included.
        seed: of all sampling.
        prefixes: [N, P] token ids with P < seq_len, which sequences start with, each as often as the others; or None.
    """

    num_train: int
    num_calibration: int
    seq_len: int
    seed: int
    prefixes: Tensor | None = None

    @property
    def count(self) -> int:
        """Sequences to generate."""
        return max(self.num_train, self.num_calibration)


def generate_pending(
    pending: PendingGeneration,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    batch_size: int,
    progress: Callable[[int], None],
) -> Tensor:
    """Let the model generate its training sequences, or the rest of them if `path` holds a part.

    Args:
        pending: what to generate.
        model: the 16-bit model (transformers).
        tokenizer: of the model.
        path: the file for finished batches.
        batch_size: sequences generated at a time; the text depends on it.
        progress: called with the number of sequences that were just added.

    Returns: [pending.count, pending.seq_len], int64.

    Raises:
        DataError: most sequences repeat themselves.
        ModelError: there is no token to start from.
    """
    count, seed, num_embeddings = pending.count, pending.seed, model.get_input_embeddings().num_embeddings
    identity = _identity(pending, tokenizer, batch_size)
    kept_ST, batches = torch.empty(0, pending.seq_len, dtype=torch.int32), 0
    if path.exists():
        tensors, note = files.load_tensors(path)
        if note == identity | {"batches": note.get("batches")}:
            try:
                kept_ST = _checked_ids(tensors, pending.seq_len, num_embeddings)
                batches = from_json(int, note.get("batches"), "batches")
            except SchemaError as error:
                raise files.damaged(path, error) from error
    progress(min(len(kept_ST), count))
    while len(kept_ST) < count:
        if batches * batch_size >= _MAX_ATTEMPTS * count + batch_size:
            attempts = batches * batch_size
            raise DataError(
                f"--data self needs a model that generates varied text; {attempts - len(kept_ST)} of {attempts} "
                "sequences repeat themselves; name a text with --data"
            )
        batch_seed = seed * _SEED_STRIDE + batches
        if pending.prefixes is None:
            generator = torch.Generator().manual_seed(batch_seed)
            prompt_SP = first_tokens(num_embeddings, tokenizer, batch_size, generator)
        else:
            order = draw_order(len(pending.prefixes), (batches + 1) * batch_size, seed)
            prompt_SP = pending.prefixes[order[batches * batch_size :]]
        ids_ST = _sample(model, prompt_SP, pending.seq_len, batch_seed)
        ids_ST = ids_ST[distinct_ngram_ratio(ids_ST) >= MIN_DISTINCT_NGRAMS].to(torch.int32)
        batches += 1
        progress(min(len(ids_ST), count - len(kept_ST)))
        kept_ST = torch.cat([kept_ST, ids_ST])
        files.save_tensors(path, {"ids": kept_ST}, identity | {"batches": batches})
    return kept_ST[:count].long()


def _identity(pending: PendingGeneration, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> dict[str, Any]:
    """What generated text depends on beside the model. A file with another identity is overwritten."""
    identity = {
        "length": pending.seq_len,
        "seed": pending.seed,
        "batch": batch_size,
        "tokenizer": vocabulary_fingerprint(tokenizer),
    }
    if pending.prefixes is not None:
        identity["prefixes"] = token_fingerprint(pending.prefixes, "")
    return identity


def first_tokens(
    num_embeddings: int, tokenizer: PreTrainedTokenizerBase, count: int, generator: torch.Generator
) -> Tensor:
    """The token that each of `count` sequences starts with.

    Args:
        num_embeddings: tokens that the model knows.
        tokenizer: of the model.
        count: number of sequences.
        generator: draws ordinary tokens where the tokenizer has no begin-of-text token.

    Returns: [count, 1], int64.

    Raises:
        ModelError: the tokenizer has no begin-of-text token and no ordinary one.
    """
    begin = [i for i in begin_tokens(tokenizer) if i < num_embeddings]
    if begin:
        return torch.tensor([begin[:1]]).expand(count, 1)
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    ordinary = [i for i in sorted(tokenizer.get_vocab().values()) if i < num_embeddings and i not in special]
    if not ordinary:
        raise ModelError(
            "--data self needs a token to start from; the tokenizer has no begin-of-text token and no ordinary token; "
            "name a text with --data"
        )
    return torch.tensor(ordinary)[torch.randint(len(ordinary), (count, 1), generator=generator)]


def distinct_ngram_ratio(ids_ST: Tensor) -> Tensor:
    """Distinct 4-grams of each sequence divided by all its 4-grams: 1 means that nothing repeats. [S, T] -> [S]."""
    ngrams = ids_ST.unfold(1, _NGRAM, 1)
    return torch.tensor([len(row.unique(dim=0)) / len(row) for row in ngrams])


def vocabulary_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Short hash of the vocabulary. Token ids are comparable only between tokenizers with the same one."""
    return hashlib.sha256(repr(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()[:16]


def is_token_file(name: str) -> bool:
    """Whether a source of --data is a file of generated tokens (by its suffix; the file need not exist)."""
    return Path(name).suffix == Path(GENERATED_FILE).suffix


def read_generated(path: Path, tokenizer: PreTrainedTokenizerBase, length: int) -> Tensor:
    """Read the sequences that `generate_pending` kept in another run.

    Args:
        path: a `self.safetensors`.
        tokenizer: of the model to train.
        length: tokens per sequence; longer sequences are cut to it.

    Returns: [S, length], int64, S > 0.

    Raises:
        DataError: there is no such file; it was generated with another vocabulary; its sequences are shorter, or none.
        RunError: the file is damaged.
    """
    if not path.is_file():
        raise DataError(f"--data {path} must be a file of tokens that --data self generated; there is no such file")
    tensors, note = files.load_tensors(path)
    if note.get("tokenizer") != vocabulary_fingerprint(tokenizer):
        raise DataError(
            f"--data {path} must have been generated by a model with the same tokenizer; it was not; use --data self"
        )
    try:
        ids_ST = _checked_ids(tensors, None)
    except SchemaError as error:
        raise DataError(f"--data {path} must hold what --data self generated; {error}; use --data self") from error
    if ids_ST.shape[1] < length:
        raise DataError(
            f"--data {path} holds sequences of {ids_ST.shape[1]} tokens; --seq_len is {length}; "
            f"use --seq_len {ids_ST.shape[1]} or less"
        )
    if not len(ids_ST):
        raise DataError(f"--data {path} must hold sequences; it has none; use --data self")
    return ids_ST[:, :length].long()


def _checked_ids(tensors: dict[str, Tensor], length: int | None, num_embeddings: int = 1 << 31) -> Tensor:
    """The ids [S, T] of a file of generated tokens. SchemaError unless they are ids of a model of this size."""
    check_tensors(tensors, {"ids": (torch.int32, (None, length))})
    ids_ST = tensors["ids"]
    low, high = (int(end) for end in ids_ST.aminmax()) if ids_ST.numel() else (0, 0)
    if low < 0 or high >= num_embeddings:
        raise SchemaError(f"token ids must be from 0 to {num_embeddings - 1}; they are from {low} to {high}")
    return ids_ST


def sample_token(input_ids: Tensor, scores_SV: Tensor) -> Tensor:
    """Logits processor for `generate`: give one token drawn from softmax(scores) the score 0, all others -inf.

    The token is drawn from one uniform number by the cumulated probabilities. `generate` itself would use
    torch.multinomial, which draws a random number for every token of the vocabulary; on a CPU that is a third of the
    time of generation.
    """
    cumulated_SV = scores_SV.float().softmax(-1).cumsum_(-1)
    threshold_S1 = torch.rand(len(scores_SV), 1, device=scores_SV.device) * cumulated_SV[:, -1:]
    token_S1 = torch.searchsorted(cumulated_SV, threshold_S1)
    return torch.full_like(scores_SV, -torch.inf).scatter_(1, token_S1, 0.0)


@torch.no_grad()
def _sample(model: Any, prompt_SP: Tensor, length: int, seed: int) -> Tensor:
    """Continue prompts to `length` tokens: [S, P] -> [S, length]. Depends on the seed, not on earlier random draws."""
    from transformers import GenerationConfig

    prompt_SP = prompt_SP.to(model.device)
    # No end token: after an end-of-text token the model continues with another text, as in packed training text.
    config = GenerationConfig(
        do_sample=False, max_new_tokens=length - prompt_SP.shape[1], eos_token_id=None, pad_token_id=0
    )
    # `generate` takes what is None above from the model's own configuration (its end token, its penalties).
    own_config, model.generation_config = model.generation_config, GenerationConfig()
    try:
        with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
            torch.manual_seed(seed)
            # The keys and values of all prompt tokens but the last are computed here, without logits: `generate` would
            # copy the weight of the head for every sequence. Recurrent models have another cache, and some have none.
            cached = model.base_model(prompt_SP[:, :-1], use_cache=True) if prompt_SP.shape[1] > 1 else None
            cache = getattr(cached, "past_key_values", None)
            ids = model.generate(
                prompt_SP,
                generation_config=config,
                attention_mask=torch.ones_like(prompt_SP),
                **({} if cache is None else {"past_key_values": cache}),
                logits_processor=[sample_token],
            )
    except (NybbleError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the model's own code raises whatever a step of it leads to
        raise ModelError(
            f"--data self needs a model that generates text with transformers; {type(model).__name__} does not "
            f"({describe_error(error)}); name a text with --data"
        ) from error
    finally:
        model.generation_config = own_config
    ids_ST = torch.as_tensor(ids).cpu()
    assert ids_ST.shape == (len(prompt_SP), length), f"{len(prompt_SP)} x {length} tokens, got {tuple(ids_ST.shape)}"
    return ids_ST


def generation_batch(config: Any, length: int, itemsize: int, gpu_memory: int = 0) -> int:
    """Sequences to generate at a time.

    On a CPU, as many as fit into 1 GiB of keys and values, at most 128. On a GPU, as many as fit into a quarter of its
    memory, at most 1024: a pass over the model takes as long for one sequence as for hundreds.

    Args:
        config: the transformers configuration of the model.
        length: tokens per sequence.
        itemsize: bytes of a number in the cache.
        gpu_memory: bytes of memory of the GPU, in total; 0 for a CPU. Not its free memory: the text depends on the
            batch size.
    """
    config = text_config(config)
    queries = config_value(config, "num_attention_heads") or 1  # none: a recurrent model, whose state is small
    heads = config_value(config, "num_key_value_heads") or queries
    head_dim = config_value(config, "head_dim") or config.hidden_size // queries
    bytes_per_sequence = 2 * config.num_hidden_layers * heads * head_dim * length * itemsize
    available, largest = (gpu_memory // 4, 1024) if gpu_memory else (1 << 30, 128)
    return max(1, min(largest, int(available // bytes_per_sequence)))
