"""The model's own text: the same for a seed, whole after an interruption, filtered, and read only where it fits."""

from pathlib import Path
from typing import Any

import pytest
import torch

from nybble import files
from nybble.data import generate
from nybble.errors import DataError, ModelError

from .tiny import make_model, make_tokenizer


def write(path: Path, count: int = 5, seed: int = 0, tokenizer: Any = None, **options: Any) -> torch.Tensor:
    return generate.generate_sequences(
        path, make_model("smollm"), tokenizer or make_tokenizer(), count, 24, seed, 3, **options
    )


def test_text_depends_on_the_seed_alone(tmp_path: Path) -> None:
    one = write(tmp_path / "one")
    torch.rand(7)
    assert torch.equal(one, write(tmp_path / "two"))
    assert not torch.equal(one, write(tmp_path / "three", seed=1))
    assert one.shape == (5, 24)
    assert one.dtype == torch.int64
    assert len({tuple(row) for row in one.tolist()}) == 5


def test_interrupted_writing_goes_on_with_the_same_text(tmp_path: Path) -> None:
    whole, seen = write(tmp_path / "whole"), []

    def stop(sequences: int) -> None:
        seen.append(sequences)
        if len(seen) == 3:  # 0 kept before, then two batches
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "cut", advance=stop)
    _, note = files.load_tensors(tmp_path / "cut")
    assert note["batches"] == 1
    assert torch.equal(write(tmp_path / "cut"), whole)


def test_samples_follow_the_models_distribution(tmp_path: Path) -> None:
    """The second token against the first's next-token probabilities: a sampler that cut off the tail or ran hot would be far off."""
    model, tokenizer = make_model("smollm"), make_tokenizer(begin=True)
    ids = generate.generate_sequences(tmp_path / "ids", model, tokenizer, 2000, 5, 0, 1000)
    assert (ids[:, 0] == tokenizer.bos_token_id).all()
    p = model(ids[:1, :1]).logits[0, -1].double().softmax(-1)
    counts = torch.bincount(ids[:, 1], minlength=len(p)).double()
    often = p * len(ids) > 5
    chi_square = ((counts - p * len(ids)) ** 2 / (p * len(ids)))[often].sum()
    freedom = int(often.sum()) - 1
    assert abs(float(chi_square) - freedom) < 5 * (2 * freedom) ** 0.5  # five standard deviations
    assert counts[~often].sum() > 0  # the tail is there


def test_the_model_goes_on_from_beginnings(tmp_path: Path) -> None:
    """Each beginning as often as the others; and what comes next follows the model's distribution after the whole of it."""
    model, tokenizer = make_model("smollm"), make_tokenizer(begin=True)
    beginnings = torch.tensor([[256, 70, 71, 72], [256, 80, 81, 82]])
    ids = generate.generate_sequences(tmp_path / "ids", model, tokenizer, 2000, 9, 0, 1000, beginnings=beginnings)
    assert ids.shape == (2000, 9)
    for beginning in beginnings:
        own = ids[(ids[:, :4] == beginning).all(1)]
        assert len(own) == 1000
        p = model(beginning[None]).logits[0, -1].double().softmax(-1)
        often = p * len(own) > 5
        counts = torch.bincount(own[:, 4], minlength=len(p)).double()
        chi_square = ((counts - p * len(own)) ** 2 / (p * len(own)))[often].sum()
        freedom = int(often.sum()) - 1
        assert abs(float(chi_square) - freedom) < 5 * (2 * freedom) ** 0.5
    other = generate.generate_sequences(tmp_path / "ids", model, tokenizer, 100, 9, 0, 1000, beginnings=beginnings[:1])
    assert (other[:, :4] == beginnings[0]).all(), "what was written from other beginnings is not gone on with"


def test_writing_goes_on_after_an_end_of_text(tmp_path: Path) -> None:
    model, tokenizer = make_model("smollm"), make_tokenizer(begin=True)
    end = model.generation_config.eos_token_id = 65  # one that this model writes often
    model.generation_config.repetition_penalty = 100.0
    with torch.no_grad():
        model.get_input_embeddings().weight[end] *= 3
    ids = generate.generate_sequences(tmp_path / "ids", model, tokenizer, 60, 24, 0, 60)
    assert model.generation_config.eos_token_id == 65
    after = [row[row.index(end) + 1 :] for row in ids.tolist() if end in row[:-4]]
    assert len(after) > 3, "otherwise nothing is tested"
    assert all(any(token != 0 for token in rest) for rest in after)
    assert any(end in rest for rest in after), "a penalty of 100 would forbid it"


def test_first_tokens_are_random_ordinary_ones_where_nothing_begins_a_text() -> None:
    first = generate.first_tokens(make_model("smollm"), make_tokenizer(), 500, torch.Generator().manual_seed(0))
    assert not {256, 257} & set(first.flatten().tolist())  # <s> and </s>
    assert len(first.unique()) > 150

    class OnlySpecial:
        all_special_ids = (256,)
        added_tokens_decoder = (256,)

        def __call__(self, text: str) -> Any:
            return make_tokenizer()(text)

        def get_vocab(self) -> dict[str, int]:
            return {"<s>": 256}

        bos_token_id = None

    with pytest.raises(ModelError, match="needs a token to start from"):
        generate.first_tokens(make_model("smollm"), OnlySpecial(), 1, torch.Generator())


def test_repetition_is_thrown_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.stack([torch.arange(24), torch.tensor([1, 2] * 12), torch.tensor([7] * 24)])
    assert generate.distinct_ngram_ratio(rows).tolist() == pytest.approx([1.0, 2 / 21, 1 / 21])
    monkeypatch.setattr(generate, "_sample", lambda *arguments: rows)
    assert torch.equal(write(tmp_path / "kept", 2), rows[[0, 0]])
    monkeypatch.setattr(generate, "_sample", lambda *arguments: rows[[1, 2, 2]])
    with pytest.raises(DataError, match="of 24 sequences, 24 repeat themselves"):
        write(tmp_path / "none")


def test_another_run_reads_it_only_where_it_fits(tmp_path: Path) -> None:
    ids = write(tmp_path / "self.safetensors")
    assert torch.equal(generate.read_generated(tmp_path / "self.safetensors", make_tokenizer(), 24)[:5], ids)
    assert torch.equal(generate.read_generated(tmp_path / "self.safetensors", make_tokenizer(), 8)[:5], ids[:, :8])
    with pytest.raises(DataError, match="sequences of 24 tokens; --seq_len must not be more, got 25"):
        generate.read_generated(tmp_path / "self.safetensors", make_tokenizer(), 25)
    other = make_tokenizer()
    other.add_tokens("new")
    with pytest.raises(DataError, match="the same tokenizer"):
        generate.read_generated(tmp_path / "self.safetensors", other, 24)
    with pytest.raises(DataError, match="there is none"):
        generate.read_generated(tmp_path / "nothing.safetensors", make_tokenizer(), 24)
