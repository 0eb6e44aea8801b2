"""`--data self`: the 16-bit model writes its own training text, for when there is none at hand. (LLM-QAT, arXiv 2305.17888.)

Sampled from the model's own distribution (temperature 1, nothing cut off), many sequences at a time, each from the begin-of-text token or, where the
tokenizer has none, from a random ordinary token; or from the beginnings of a text that there is too little of. Sequences that repeat themselves are thrown
away. What a batch gives depends on the seed and its number alone; finished batches are kept in one file (`self.safetensors` in the run folder), so an
interrupted run goes on, and other runs can use it (`--data RUN/self.safetensors`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nybble import files
from nybble.data import packing
from nybble.data.packing import begin_tokens
from nybble.data.sampling import draw_order
from nybble.errors import DataError, ModelError

GENERATED_FILE = "self.safetensors"
# A sequence is thrown away if fewer of its runs of 4 tokens are different ones.
MIN_DISTINCT_NGRAMS = 0.5
# Give up when more than this many times the sequences wanted have been written.
_MOST_TRIES = 4
_RUN = 4


def distinct_ngram_ratio(ids_ST: Tensor) -> Tensor:
    """Of all runs of 4 tokens in a sequence, the share that are different ones: 1 = no repetition. [S, T] -> [S]."""
    runs = ids_ST.unfold(1, _RUN, 1)
    return torch.tensor([len(row.unique(dim=0)) / len(row) for row in runs])


def vocabulary_fingerprint(tokenizer: Any) -> str:
    """Short hash of the vocabulary: token ids mean nothing with another."""
    return hashlib.sha256(repr(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()[:16]


def first_tokens(model: Any, tokenizer: Any, count: int, generator: torch.Generator) -> Tensor:
    """What `count` sequences start from: [count, 1].

    Raises:
        ModelError: no begin-of-text token and no ordinary one.
    """
    known = model.get_input_embeddings().num_embeddings
    begin = [i for i in begin_tokens(tokenizer) if i < known]
    if begin:
        return torch.tensor([begin[:1]]).expand(count, 1)
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    ordinary = [i for i in sorted(tokenizer.get_vocab().values()) if i < known and i not in special]
    if not ordinary:
        raise ModelError(
            "--data self needs a token to start from; the tokenizer has no begin-of-text token and no ordinary one; use --data with a text"
        )
    return torch.tensor(ordinary)[torch.randint(len(ordinary), (count, 1), generator=generator)]


def generate_sequences(
    path: Path,
    model: Any,
    tokenizer: Any,
    count: int,
    length: int,
    seed: int,
    batch: int,
    advance: Callable[[int], None] = lambda sequences: None,
    beginnings: Tensor | None = None,
) -> Tensor:
    """Token sequences [count, length] of the model's own; written to `path`, and gone on with if they are there in part.

    Args:
        model: the 16-bit model.
        batch: sequences written at a time.
        advance: called with the number of sequences just kept.
        beginnings: tokens [N, P], P < length, that sequences go on from, each as often as the others; they are part of the sequences. None: see above.

    Raises:
        DataError: the model repeats itself all the time.
        ModelError: there is no token to start from.
    """
    identity = {"length": length, "seed": seed, "batch": batch, "tokenizer": vocabulary_fingerprint(tokenizer)}
    if beginnings is not None:
        identity["beginnings"] = packing.token_fingerprint(beginnings, "")
    kept, number = torch.empty(0, length, dtype=torch.int32), 0
    if path.exists():
        tensors, note = files.load_tensors(path)
        if {key: note.get(key) for key in identity} == identity:
            kept, number = tensors["ids"], note["batches"]
    advance(min(len(kept), count))
    while len(kept) < count:
        if number * batch >= _MOST_TRIES * count + batch:
            raise DataError(
                f"--data self needs a model that writes text: of {number * batch} sequences, {number * batch - len(kept)} repeat themselves; "
                "use --data with a text"
            )
        if beginnings is None:
            first = first_tokens(model, tokenizer, batch, torch.Generator().manual_seed(seed * 1_000_003 + number))
        else:
            first = beginnings[draw_order(len(beginnings), (number + 1) * batch, seed)[number * batch :]]
        made = _sample(model, first, length, seed * 1_000_003 + number)
        made = made[distinct_ngram_ratio(made) >= MIN_DISTINCT_NGRAMS].to(torch.int32)
        number += 1
        advance(min(len(made), count - len(kept)))
        kept = torch.cat([kept, made])
        files.save_tensors(path, {"ids": kept}, identity | {"batches": number})
    return kept[:count].long()


def read_generated(path: Path, tokenizer: Any, length: int) -> Tensor:
    """Sequences that `write` wrote in another run, cut to [S, length].

    Raises:
        DataError: no such file, of another tokenizer, or shorter sequences.
    """
    if not path.is_file():
        raise DataError(f"--data {path} must be a file that --data self wrote; there is none")
    tensors, note = files.load_tensors(path)
    if "ids" not in tensors or note.get("tokenizer") != vocabulary_fingerprint(tokenizer):
        raise DataError(
            f"--data {path} must have been written by a model with the same tokenizer; it was not; use --data self"
        )
    if note["length"] < length:
        raise DataError(
            f"--data {path} holds sequences of {note['length']} tokens; --seq_len must not be more, got {length}"
        )
    return tensors["ids"][:, :length].long()


def sample_token(input_ids: Tensor, scores_SV: Tensor) -> Tensor:
    """For `generate` as a logits processor: a token drawn from each distribution gets 0, all others -inf.

    By one uniform number each and the cumulated probabilities. What `generate` does itself, torch.multinomial, takes a random number of every token of the
    vocabulary, which on a CPU is a third of the time of writing (docs/log.md).
    """
    cumulated_SV = scores_SV.float().softmax(-1).cumsum_(-1)
    places_S1 = torch.rand(len(scores_SV), 1, device=scores_SV.device) * cumulated_SV[:, -1:]
    drawn_S1 = torch.searchsorted(cumulated_SV, places_S1)
    return torch.full_like(scores_SV, -torch.inf).scatter_(1, drawn_S1, 0.0)


@torch.no_grad()
def _sample(model: Any, first: Tensor, length: int, seed: int) -> Tensor:
    """[S, length], going on from `first` [S, P]; the same for the same seed, whatever was drawn before."""
    from transformers import GenerationConfig

    first = first.to(model.device)
    # After an end-of-text token the model goes on with another text, as in packed training text.
    config = GenerationConfig(
        do_sample=False, max_new_tokens=length - first.shape[1], eos_token_id=None, pad_token_id=0
    )
    its_own, model.generation_config = (
        model.generation_config,
        GenerationConfig(),
    )  # what is None above would be taken from there: end token, penalties
    try:
        with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
            torch.manual_seed(seed)
            # All but the last token here: `generate` would multiply a copy of the head for every sequence (7 GB of SmolLM's for 128).
            known = model.base_model(first[:, :-1], use_cache=True).past_key_values if first.shape[1] > 1 else None
            given = {
                "attention_mask": torch.ones_like(first),
                "past_key_values": known,
                "logits_processor": [sample_token],
            }
            ids = torch.as_tensor(model.generate(first, generation_config=config, **given)).cpu()
    finally:
        model.generation_config = its_own
    assert ids.shape == (len(first), length), f"asked for {len(first)} x {length} tokens, got {tuple(ids.shape)}"
    return ids


def generation_batch(config: Any, length: int, itemsize: int, gpu_memory: int = 0) -> int:
    """Sequences that the model writes at a time: what fits into 1 GiB of keys and values, at most 128; on a GPU into a quarter of its memory, at most 1024.

    Each token takes one pass over the whole model, and on a GPU that pass takes as long for one sequence as for hundreds.
    """
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    row = 2 * config.num_hidden_layers * heads * width * length * itemsize
    bytes_, most = (gpu_memory // 4, 1024) if gpu_memory else (1 << 30, 128)
    return max(1, min(most, int(bytes_ // row)))
