"""nybble.data.excerpt: a part of a large source, and the rows that a run takes from it."""

import json
import logging
import re
from pathlib import Path

import pytest

from nybble.data import excerpt, packing
from nybble.data.chat import Conversation
from nybble.data.excerpt import count_characters, draw_documents, first_documents, share_for
from nybble.errors import DataError
from tests.data.test_prepare import prepare, write_lines
from tests.helpers.chat import CONVERSATION, make_chat_tokenizer

TEXTS = [chr(97 + i) * (i + 1) for i in range(20)]


@pytest.fixture
def small_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(excerpt, "_TAKEN_WHOLE", 4000)
    monkeypatch.setattr(excerpt, "_LEAST", 4000)


def test_characters_are_those_of_texts_and_messages() -> None:
    assert count_characters(TEXTS) == 210
    contents = sum(len(message["content"]) for message in CONVERSATION)
    assert count_characters([Conversation(CONVERSATION)]) == contents
    assert count_characters([Conversation(CONVERSATION, [{"name": "x" * 50}])]) > contents + 50
    assert count_characters([]) == 0


def test_small_sources_are_taken_whole() -> None:
    assert share_for(1 << 24, 10) == 1
    assert share_for(0, 0) == 1
    assert share_for(1 << 25, 10) == 1 / 32


def test_more_tokens_take_a_larger_share() -> None:
    assert share_for(1 << 30, 1 << 24) == 0.25
    assert share_for(1 << 30, 1 << 27) == 1


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_share_holds_as_many_characters_and_no_document_more(share: float) -> None:
    for chosen in (first_documents(TEXTS, share), draw_documents(TEXTS, share, 3)):
        assert count_characters(chosen) >= share * 210
        assert [text for text in TEXTS if text in chosen] == list(chosen), "in their order, none twice"
    assert first_documents(TEXTS, share) == TEXTS[: len(first_documents(TEXTS, share))]
    assert count_characters(first_documents(TEXTS, share)[:-1]) < share * 210


def test_the_whole_source_is_the_source_itself() -> None:
    assert draw_documents(TEXTS, 1.0, 0) is first_documents(TEXTS, 3.0) is TEXTS


def test_the_seed_decides_which_documents() -> None:
    assert draw_documents(TEXTS, 0.4, 1) == draw_documents(TEXTS, 0.4, 1) != draw_documents(TEXTS, 0.4, 2)


@pytest.mark.usefixtures("small_limit")
def test_a_large_source_is_tokenized_in_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source, seen = write_lines(tmp_path / "large.txt", 6_000), list[int]()
    tokenize = packing.tokenize

    def spy(tokenizer, documents, *args):  # type: ignore[no-untyped-def]
        seen.append(sum(map(len, documents)))
        return tokenize(tokenizer, documents, *args)

    monkeypatch.setattr(packing, "tokenize", spy)
    with caplog.at_level(logging.INFO, "nybble"):
        data = prepare(source)
    assert len(data.train) == 16
    assert len(data.calibration) == 8
    assert len(data.test) == 6
    assert sum(seen) < 0.2 * source.stat().st_size
    assert "of 48 training documents are used, drawn by the seed; the run needs no more" in caplog.text
    assert data.fingerprints == prepare(source).fingerprints
    assert data.fingerprints["training text"] != prepare(source, seed=1).fingerprints["training text"]
    assert data.fingerprints["test text"] == prepare(source, seed=1).fingerprints["test text"]


@pytest.mark.usefixtures("small_limit")
def test_the_first_sequences_of_a_part_are_those_of_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_lines(tmp_path / "large.txt", 6_000)
    part = prepare(source)
    monkeypatch.setattr(excerpt, "_TAKEN_WHOLE", 1 << 24)
    whole = prepare(source)
    assert part.test.ids.equal(whole.test.ids)
    assert part.validation.ids.equal(whole.validation.ids)
    assert not part.train.ids.equal(whole.train.ids)


@pytest.mark.usefixtures("small_limit")
def test_a_part_with_too_few_sequences_grows(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"  # nine of ten conversations are longer than a sequence
    long = [{"role": "user", "content": "word " * 40}, {"role": "assistant", "content": "x"}]
    short = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path.write_text("".join(json.dumps({"messages": long if i % 10 else short}) + "\n" for i in range(1000)))
    data = prepare(path, tokenizer=make_chat_tokenizer(), num_validation=0, num_test=2)
    assert len(data.train) == 16


@pytest.mark.usefixtures("small_limit")
def test_a_part_in_which_no_conversation_fits_grows(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    long = [{"role": "user", "content": "word " * 40}, {"role": "assistant", "content": "x"}]
    short = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path.write_text("".join(json.dumps({"messages": long if i < 900 else short}) + "\n" for i in range(1000)))
    data = prepare(path, tokenizer=make_chat_tokenizer(), num_validation=0, num_test=2)
    assert len(data.test) == 2
    path.write_text("".join(json.dumps({"messages": long}) + "\n" for _ in range(1000)))
    with pytest.raises(DataError, match="at least one conversation of the training data must fit into 32 tokens"):
        prepare(path, tokenizer=make_chat_tokenizer(), num_validation=0, num_test=2)


@pytest.mark.usefixtures("small_limit")
def test_sources_that_are_mixed_as_they_are_give_the_same_share(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    large, small = write_lines(tmp_path / "large.txt", 60_000), write_lines(tmp_path / "small.txt", 6_000)
    with caplog.at_level(logging.INFO, "nybble"):
        prepare(large, small, eval_data=(str(small),), num_train=64)
    found = [re.search(r"(\w+).txt: (\d+) of (\d+) training documents", record.message) for record in caplog.records]
    taken = {match[1]: int(match[2]) / int(match[3]) for match in found if match}
    assert set(taken) == {"large", "small"}
    assert taken["small"] == pytest.approx(taken["large"], abs=1 / 48), "to a document of the small one"
    assert taken["large"] < 0.1


@pytest.mark.usefixtures("small_limit")
def test_beginnings_to_continue_come_from_a_part(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = write_lines(tmp_path / "large.txt", 6_000)
    with caplog.at_level(logging.INFO, "nybble"):
        data = prepare(f"self:{source}")
    assert data.pending is not None
    assert data.pending.prefixes is not None
    assert 16 <= len(data.pending.prefixes) < 2000
    assert "are used, drawn by the seed" in caplog.text
