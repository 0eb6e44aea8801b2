"""nybble.data.generate: generated text is reproducible, follows the model's distribution, and survives interruption."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedConfig

from nybble import files
from nybble.data import generate
from nybble.data.generate import PendingGeneration
from nybble.errors import DataError, ModelError
from tests.helpers.tiny import VOCABULARY, make_model, make_tokenizer

pytestmark = pytest.mark.usefixtures("generation_imported")


def ignore(count: int) -> None:
    """A progress callback."""


PENDING = PendingGeneration(num_train=5, num_calibration=0, seq_len=24, seed=0)


def generate_text(
    path: Path,
    pending: PendingGeneration = PENDING,
    batch_size: int = 3,
    model: Any = None,
    tokenizer: Any = None,
    progress: Callable[[int], None] = ignore,
) -> torch.Tensor:
    model, tokenizer = model or make_model("smollm"), tokenizer or make_tokenizer()
    return generate.generate_pending(pending, model, tokenizer, path, batch_size, progress)


def standardized_chi_square(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    """Chi-square of the frequent outcomes, minus its mean, in standard deviations."""
    expected = probabilities * counts.sum()
    frequent = expected > 5
    chi_square = ((counts - expected) ** 2 / expected)[frequent].sum()
    freedom = int(frequent.sum()) - 1
    return float(chi_square - freedom) / (2 * freedom) ** 0.5


def test_text_depends_on_the_seed_alone(tmp_path: Path) -> None:
    ids_ST = generate_text(tmp_path / "one")
    torch.rand(7)
    assert torch.equal(ids_ST, generate_text(tmp_path / "two"))
    assert not torch.equal(ids_ST, generate_text(tmp_path / "three", replace(PENDING, seed=1)))
    assert ids_ST.shape == (5, 24)
    assert ids_ST.dtype == torch.int64
    assert len({tuple(row) for row in ids_ST.tolist()}) == 5


def test_as_many_sequences_are_generated_as_the_larger_use_needs() -> None:
    assert PendingGeneration(4, 8, 32, 0).count == 8
    assert PendingGeneration(16, 8, 32, 0).count == 16


def test_an_interrupted_generation_continues_with_the_same_text(tmp_path: Path) -> None:
    whole, added = generate_text(tmp_path / "whole"), []

    def interrupt(count: int) -> None:
        added.append(count)
        if len(added) == 3:  # nothing at first, then two batches, the second of which is not written yet
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate_text(tmp_path / "cut", progress=interrupt)
    assert files.load_tensors(tmp_path / "cut")[1]["batches"] == 1
    added.clear()
    assert torch.equal(generate_text(tmp_path / "cut", progress=added.append), whole)
    assert added == [3, 2], "what was there counts as progress"


def test_text_of_other_settings_is_not_continued(tmp_path: Path) -> None:
    plain, prefixes = replace(PENDING, num_train=2, seq_len=12), torch.tensor([[256, 70, 71]])
    generate_text(tmp_path / "ids", replace(plain, prefixes=prefixes))
    settings = [({"seed": 1}, 3), ({"seq_len": 10}, 3), ({}, 2), ({"prefixes": prefixes + 1}, 3), ({}, 3)]
    for changes, batch_size in settings:
        pending = replace(plain, **changes)  # type: ignore[arg-type]
        expected = generate_text(tmp_path / "new", pending, batch_size)
        assert torch.equal(generate_text(tmp_path / "ids", pending, batch_size), expected)
        (tmp_path / "new").unlink()


def test_tokens_follow_the_distribution_of_the_model(tmp_path: Path) -> None:
    """Cutting off the tail (top-k, top-p) or another temperature would be far off."""
    model, tokenizer = make_model("smollm"), make_tokenizer(begin=True)
    ids_ST = generate_text(tmp_path / "ids", PendingGeneration(2000, 0, 5, 0), 1000, model, tokenizer)
    assert (ids_ST[:, 0] == tokenizer.bos_token_id).all()
    probabilities = model(ids_ST[:1, :1]).logits[0, -1].double().softmax(-1)
    counts = torch.bincount(ids_ST[:, 1], minlength=VOCABULARY).double()
    assert abs(standardized_chi_square(counts, probabilities)) < 5
    assert counts[probabilities * 2000 <= 5].sum() > 0, "rare tokens occur too"


def test_prefixes_are_continued_equally_often(tmp_path: Path) -> None:
    model, prefixes = make_model("smollm"), torch.tensor([[256, 70, 71, 72], [256, 80, 81, 82]])
    ids_ST = generate_text(tmp_path / "ids", PendingGeneration(2000, 0, 9, 0, prefixes), 1000, model)
    assert ids_ST.shape == (2000, 9)
    for prefix in prefixes:
        continued = ids_ST[(ids_ST[:, :4] == prefix).all(1)]
        assert len(continued) == 1000
        probabilities = model(prefix[None]).logits[0, -1].double().softmax(-1)
        counts = torch.bincount(continued[:, 4], minlength=VOCABULARY).double()
        assert abs(standardized_chi_square(counts, probabilities)) < 5


def test_generation_continues_after_an_end_token_and_without_penalties(tmp_path: Path) -> None:
    model, end = make_model("smollm"), 65
    model.generation_config.eos_token_id, model.generation_config.repetition_penalty = end, 100.0
    model.get_input_embeddings().weight[end] *= 3  # the model generates this token often
    tokenizer = make_tokenizer(begin=True)
    ids_ST = generate_text(tmp_path / "ids", PendingGeneration(60, 0, 24, 0), 60, model, tokenizer)
    assert model.generation_config.eos_token_id == end, "the configuration of the model is put back"
    after_end = [row[row.index(end) + 1 :] for row in ids_ST.tolist() if end in row[:-4]]
    assert len(after_end) > 3
    assert all(any(token != 0 for token in rest) for rest in after_end)
    assert any(end in rest for rest in after_end), "a penalty of 100 would forbid the second one"


def test_first_tokens_are_random_ordinary_ones_without_a_begin_token() -> None:
    tokens = generate.first_tokens(VOCABULARY, make_tokenizer(), 500, torch.Generator().manual_seed(0))
    assert tokens.shape == (500, 1)
    assert not {256, 257} & set(tokens.flatten().tolist()), "no special tokens"
    assert len(tokens.unique()) > 150
    few = generate.first_tokens(50, make_tokenizer(), 500, torch.Generator().manual_seed(0))
    assert int(few.max()) < 50, "no tokens that the model does not know"


def test_a_tokenizer_without_ordinary_tokens_is_refused() -> None:
    class OnlySpecialTokens:
        all_special_ids = (256,)
        added_tokens_decoder = (256,)
        bos_token_id = None

        def __call__(self, text: str) -> Any:
            return make_tokenizer()(text)

        def get_vocab(self) -> dict[str, int]:
            return {"<s>": 256}

    with pytest.raises(ModelError, match="needs a token to start from"):
        generate.first_tokens(VOCABULARY, OnlySpecialTokens(), 1, torch.Generator())  # type: ignore[arg-type]


def test_distinct_ngram_ratio() -> None:
    rows = torch.stack([torch.arange(24), torch.tensor([1, 2] * 12), torch.tensor([7] * 24)])
    assert generate.distinct_ngram_ratio(rows).tolist() == pytest.approx([1.0, 2 / 21, 1 / 21])


def test_sequences_that_repeat_themselves_are_discarded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.stack([torch.arange(24), torch.tensor([1, 2] * 12), torch.tensor([7] * 24)])
    monkeypatch.setattr(generate, "_sample", lambda *arguments: rows)
    assert torch.equal(generate_text(tmp_path / "kept", replace(PENDING, num_train=2)), rows[[0, 0]])
    monkeypatch.setattr(generate, "_sample", lambda *arguments: rows[[1, 2, 2]])
    with pytest.raises(DataError, match="generates varied text; 24 of 24 sequences repeat themselves"):
        generate_text(tmp_path / "none")


def test_another_run_reads_generated_text(tmp_path: Path) -> None:
    path = tmp_path / generate.GENERATED_FILE
    ids_ST = generate_text(path)
    assert torch.equal(generate.read_generated(path, make_tokenizer(), 24)[:5], ids_ST)
    assert torch.equal(generate.read_generated(path, make_tokenizer(), 8)[:5], ids_ST[:, :8])
    assert generate.read_generated(path, make_tokenizer(), 8).dtype == torch.int64


def test_generated_text_that_does_not_suit_the_run_is_refused(tmp_path: Path) -> None:
    path, tokenizer, other = tmp_path / "self.safetensors", make_tokenizer(), make_tokenizer()
    other.add_tokens("new")
    generate_text(path)
    with pytest.raises(DataError, match="sequences of 24 tokens; --seq_len is 25; use --seq_len 24 or less"):
        generate.read_generated(path, tokenizer, 25)
    with pytest.raises(DataError, match="must have been generated by a model with the same tokenizer"):
        generate.read_generated(path, other, 24)
    with pytest.raises(DataError, match="there is no such file"):
        generate.read_generated(tmp_path / "nothing.safetensors", tokenizer, 24)
    tensors, note = files.load_tensors(path)
    files.save_tensors(path, {"ids": tensors["ids"][:0]}, note)
    with pytest.raises(DataError, match="must hold sequences; it has none"):
        generate.read_generated(path, tokenizer, 24)
    files.save_tensors(path, {"weights": tensors["ids"]}, note)
    with pytest.raises(DataError, match="must hold what --data self generated; ids is missing; use --data self"):
        generate.read_generated(path, tokenizer, 24)


def test_token_files_are_told_by_their_suffix() -> None:
    names = ("self.safetensors", "runs/a/self.safetensors", "notes.txt", "self")
    assert [generate.is_token_file(name) for name in names] == [True, True, False, False]


def test_as_many_sequences_at_a_time_as_fit_into_memory() -> None:
    config = PreTrainedConfig(
        num_hidden_layers=32, num_key_value_heads=8, num_attention_heads=32, head_dim=128, hidden_size=4096
    )
    bytes_per_token = 2 * 32 * 8 * 128 * 2  # keys and values of all layers in 16 bits
    assert generate.generation_batch(config, 1024, 2) == (1 << 30) // (1024 * bytes_per_token) == 8
    assert generate.generation_batch(config, 1 << 20, 2) == 1, "never none"
    assert generate.generation_batch(config, 8, 2) == 128, "at most 128 on a CPU"
    assert generate.generation_batch(config, 1024, 2, gpu_memory=80 << 30) == (20 << 30) // (1024 * bytes_per_token)
    assert generate.generation_batch(config, 8, 2, gpu_memory=80 << 30) == 1024, "at most 1024 on a GPU"
    plain = PreTrainedConfig(num_hidden_layers=2, num_attention_heads=4, hidden_size=64)
    bytes_per_token = 2 * 2 * 64 * 4  # 4 key-value heads of 16 numbers, in 2 layers and 32 bits
    assert generate.generation_batch(plain, 1 << 17, 4) == (1 << 30) // ((1 << 17) * bytes_per_token) == 8
