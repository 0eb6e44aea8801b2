"""nybble.data.prepare: what a run trains on, calibrates with, validates and measures on."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from nybble import files
from nybble.data import generate, packing, sources
from nybble.data.mixture import Mixture
from nybble.data.packing import TokenRows, token_fingerprint
from nybble.data.prepare import TextData, no_rows, prepare_text
from nybble.data.request import TextRequest, evaluation_sources
from nybble.data.sampling import draw_order
from nybble.errors import DataError, ModelError, OptionError
from nybble.workflows.text import check_token_ids
from tests.helpers.chat import CONVERSATION, make_chat_tokenizer
from tests.helpers.tiny import make_model, make_tokenizer

REQUEST = TextRequest(
    data=("self",),
    eval_data=(),
    other_data=(),
    text_column="text",
    data_dir=None,
    seq_len=32,
    assistant_only=False,
    num_train=16,
    num_generated=8,
    num_calibration=8,
    num_validation=4,
    num_test=6,
    min_train=4,
    min_calibration=8,
    seed=0,
)


def prepare(*data: str | Path, tokenizer: Any = None, **changes: Any) -> TextData:
    request = dataclasses.replace(REQUEST, data=tuple(map(str, data)), **changes)
    return prepare_text(request, tokenizer or make_tokenizer())


def write_lines(path: Path, count: int = 2000) -> Path:
    path.write_text("".join(f"line {i} of {path.name}\n" for i in range(count)))
    return path


def write_chats(path: Path, count: int = 120) -> Path:
    path.write_text("".join(json.dumps({"messages": CONVERSATION}) + "\n" for _ in range(count)))
    return path


def write_tokens(path: Path, count: int = 40, seq_len: int = 48) -> torch.Tensor:
    """A file of generated tokens; returns them."""
    ids_ST = torch.randint(0, 256, (count, seq_len), generator=torch.Generator().manual_seed(0))
    note = {"length": seq_len, "tokenizer": generate.vocabulary_fingerprint(make_tokenizer())}
    files.save_tensors(path, {"ids": ids_ST.to(torch.int32)}, note)
    return ids_ST


def all_rows(path: Path, split: str, seq_len: int = 32) -> TokenRows:
    documents = sources.load_documents(str(path), "text", None, [split])[split]
    return packing.pack_documents(make_tokenizer(), documents, seq_len, split)


# --- plain text ---


def test_training_sequences_are_drawn_and_evaluation_sequences_are_the_first(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.txt")
    data = prepare(path, seed=3)
    train = all_rows(path, "train").ids
    assert torch.equal(data.train.ids, train[draw_order(len(train), 16, 3)])
    assert torch.equal(data.calibration, data.train.ids[:8])
    assert torch.equal(data.validation.ids, all_rows(path, "validation").ids[:4])
    assert torch.equal(data.test.ids, all_rows(path, "test").ids[:6])
    assert data.train.loss_mask.all()
    assert data.test_source == f"the test split of {path}"
    assert data.pending is None


def test_more_calibration_than_training_sequences(tmp_path: Path) -> None:
    data = prepare(write_lines(tmp_path / "a.txt"), num_train=4, num_calibration=20)
    assert (len(data.train), data.calibration_shape) == (4, (20, 32))
    assert torch.equal(data.train.ids, data.calibration[:4])


def test_all_test_sequences_are_used_by_default(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.txt")
    assert len(prepare(path, num_test=0).test) == len(all_rows(path, "test")) > 6


def test_training_text_is_not_needed_where_nothing_is_trained_or_calibrated(tmp_path: Path) -> None:
    (tmp_path / "test.txt").write_text("text to measure on " * 50)
    data = prepare(tmp_path, num_train=0, num_calibration=0, num_validation=0, min_train=0)
    assert (len(data.train), len(data.calibration), len(data.validation)) == (0, 0, 0)
    assert len(data.test) == 6
    with pytest.raises(DataError, match="must hold a file with the word train"):
        prepare(tmp_path, num_train=0, num_validation=0, min_train=0)


def test_validation_text_is_not_needed_where_nothing_is_validated(tmp_path: Path) -> None:
    write_lines(tmp_path / "train.txt")
    (tmp_path / "test.txt").write_text("text to measure on " * 50)
    (tmp_path / "validation.txt").write_text("")
    assert len(prepare(tmp_path, num_validation=0).validation) == 0
    with pytest.raises(DataError, match="must have text in its validation split"):
        prepare(tmp_path)


def test_too_little_text_is_refused(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.txt", 300)
    count = len(all_rows(path, "train"))
    with pytest.raises(DataError, match=f"^the training text must give at least {count + 1} sequences of 32 tokens"):
        prepare(path, min_train=count + 1)
    with pytest.raises(DataError, match=f"the calibration text must give at least {count + 1} sequences"):
        prepare(path, num_train=0, min_train=0, min_calibration=count + 1)
    assert len(prepare(path, num_train=10**6, min_train=count).train) == count
    assert len(prepare(path, num_calibration=0, min_calibration=10**6).calibration) == 0


# --- several sources ---


def test_shares_hold_and_evaluation_text_is_the_same_for_every_seed(tmp_path: Path) -> None:
    paths = [write_lines(tmp_path / name) for name in ("a.txt", "b.txt")]
    one, two = (prepare(f"{paths[0]}=3", f"{paths[1]}=1", seed=seed) for seed in (0, 1))
    parts = [all_rows(path, "train") for path in paths]
    drawn = Mixture(["a", "b"], [3.0, 1.0]).draw(parts, 16, 0)
    assert torch.equal(one.train.ids, drawn.ids)
    assert torch.equal(one.test.ids, two.test.ids)
    assert torch.equal(one.validation.ids, two.validation.ids)
    assert not torch.equal(one.train.ids, two.train.ids)
    assert one.test_source == f"the test split of {paths[0]}=3 + {paths[1]}=1"


def test_errors_name_the_source_among_several(tmp_path: Path) -> None:
    path, short = write_lines(tmp_path / "a.txt"), tmp_path / "short.jsonl"
    short.write_text("".join(json.dumps({"text": "x"}) + "\n" for _ in range(10)))
    with pytest.raises(DataError, match=rf"^{short}: the training text must give at least 1 sequences"):
        prepare(path, short)
    with pytest.raises(DataError, match=r"^--data ./nowhere.txt must be an existing file"):
        prepare(f"{path}=0.7", "./nowhere.txt=0.3")


def test_too_few_sequences_of_all_sources_are_refused(tmp_path: Path) -> None:
    paths = [write_lines(tmp_path / name, 300) for name in ("a.txt", "b.txt")]
    count = sum(len(all_rows(path, "train")) for path in paths)
    with pytest.raises(DataError, match=f"at least {count + 1} sequences of 32 tokens; it gives {count} sequences"):
        prepare(*paths, num_train=10**6, min_train=count + 1)


def test_repeated_sequences_count_once_as_distinct(tmp_path: Path) -> None:
    few = tmp_path / "few.safetensors"
    write_tokens(few, 2)
    data = prepare(f"{few}=0.5", f"{write_lines(tmp_path / 'a.txt')}=0.5", eval_data=("python-docs",))
    assert (data.num_train, data.num_distinct_train) == (16, 10)


# --- --eval_data ---


def test_eval_data_gives_validation_and_test_text(tmp_path: Path) -> None:
    path, other = write_lines(tmp_path / "a.txt"), write_lines(tmp_path / "b.txt")
    data, own = prepare(path, eval_data=(str(other),)), prepare(path)
    assert torch.equal(data.train.ids, own.train.ids)
    assert torch.equal(data.test.ids, all_rows(other, "test").ids[:6])
    assert torch.equal(data.validation.ids, all_rows(other, "validation").ids[:4])
    assert data.test_source == f"the test split of {other}"


def test_errors_of_eval_data_name_the_option(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.txt")
    with pytest.raises(DataError, match="^--eval_data ./nowhere.txt must be an existing file"):
        prepare(path, eval_data=("./nowhere.txt",))
    with pytest.raises(DataError, match="^--eval_data self is text that the model generates"):
        prepare(path, eval_data=("self",))
    with pytest.raises(OptionError, match="^--eval_data must be NAME=SHARE"):
        prepare(path, eval_data=("a=x",))
    write_tokens(tmp_path / "self.safetensors")
    with pytest.raises(OptionError, match="self.safetensors holds generated tokens and no validation text"):
        prepare(path, eval_data=(str(tmp_path / "self.safetensors"),))


def test_the_default_of_eval_data() -> None:
    assert evaluation_sources(["a=1", "b=2"], ()) == ("a=1", "b=2")
    assert evaluation_sources(["a"], ["c"]) == ("c",)
    assert evaluation_sources(["self"], ()) == ("python-docs",)
    assert evaluation_sources(["self:notes.txt"], ()) == ("notes.txt",)
    assert evaluation_sources(["x/self.safetensors"], ()) == ("python-docs",)
    assert evaluation_sources(["x/self.safetensors", "a"], ()) == ("x/self.safetensors", "a")


# --- conversations ---


def test_assistant_only_loss_masks_conversations_and_trains_plain_text_whole(tmp_path: Path) -> None:
    chats, text = write_chats(tmp_path / "chat.jsonl"), write_lines(tmp_path / "a.txt")
    tokenizer = make_chat_tokenizer()
    data = prepare(f"{chats}=1", f"{text}=1", assistant_only=True, tokenizer=tokenizer)
    whole = data.train.loss_mask.all(1)
    assert int(whole.sum()) == 8
    masked = data.train[~whole]
    labels = [tokenizer.decode(row[1:][mask[:-1]]) for row, mask in zip(masked.ids, masked.loss_mask, strict=True)]
    assert set(labels) == {"yes</s>a</s>"}
    assert not prepare(chats, assistant_only=True, tokenizer=tokenizer).test.loss_mask.all()


def test_assistant_only_loss_without_conversations_is_refused(tmp_path: Path) -> None:
    text, chats = write_lines(tmp_path / "a.txt"), write_chats(tmp_path / "chat.jsonl")
    with pytest.raises(DataError, match="needs conversations .*a.txt is plain text"):
        prepare(text, eval_data=(str(chats),), assistant_only=True, tokenizer=make_chat_tokenizer())
    untrained = {"num_train": 0, "num_calibration": 0, "num_validation": 0, "min_train": 0}
    with pytest.raises(DataError, match="needs conversations .*a.txt is plain text"):
        prepare(chats, eval_data=(str(text),), assistant_only=True, tokenizer=make_chat_tokenizer(), **untrained)
    write_tokens(tmp_path / "self.safetensors")
    with pytest.raises(DataError, match="needs conversations"):
        prepare(tmp_path / "self.safetensors", assistant_only=True)


# --- generated text ---


def test_generated_text_of_another_run(tmp_path: Path) -> None:
    ids_ST = write_tokens(tmp_path / "self.safetensors")[:, :32]
    data = prepare(tmp_path / "self.safetensors")
    assert torch.equal(data.train.ids, ids_ST[draw_order(40, 16, 0)])
    assert data.train.loss_mask.all()
    assert data.test_source == "the test split of python-docs"
    assert data.pending is None


def test_a_missing_token_file_is_refused_even_if_it_is_not_read() -> None:
    with pytest.raises(DataError, match="--data x.safetensors must be a file of tokens that --data self generated"):
        prepare("x.safetensors", num_train=0, num_calibration=0, min_train=0)


@pytest.mark.parametrize(
    ("num_train", "num_calibration", "pending"), [(16, 8, (8, 8)), (4, 8, (4, 8)), (16, 0, (8, 0)), (0, 8, (0, 8))]
)
def test_text_of_the_model_itself_is_pending(num_train: int, num_calibration: int, pending: tuple[int, int]) -> None:
    """Every epoch repeats the generated sequences, so that there are num_generated of them for 16 draws."""
    data = prepare("self", num_train=num_train, num_calibration=num_calibration, seed=5)
    assert data.pending == generate.PendingGeneration(*pending, 32, 5, None)
    assert (data.num_train, data.num_distinct_train, data.calibration_shape) == (
        pending[0],
        pending[0],
        (pending[1], 32),
    )
    assert len(data.train) == len(data.calibration) == 0
    assert len(data.test) == 6
    assert data.test_source == "the test split of python-docs"


def test_nothing_is_pending_where_nothing_is_trained_or_calibrated() -> None:
    data = prepare("self", num_train=0, num_calibration=0, num_generated=0, min_train=0)
    assert data.pending is None
    assert (data.num_train, data.calibration_shape[0]) == (0, 0)
    assert "training text" not in data.fingerprints


def test_prefixes_are_all_pieces_of_the_training_text(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.txt")
    data = prepare(f"self:{path}")
    assert data.pending is not None
    assert data.pending.prefixes is not None
    assert torch.equal(data.pending.prefixes, all_rows(path, "train", seq_len=8).ids)
    assert torch.equal(data.test.ids, all_rows(path, "test").ids[:6])
    assert data.fingerprints["prefixes"] == token_fingerprint(data.pending.prefixes, "")
    assert data.test_source == f"the test split of {path}"


def test_generated_sequences_take_the_place_of_pending_ones() -> None:
    data = prepare("self", num_train=4)
    ids_ST = torch.arange(8 * 32).view(8, 32)
    filled = data.with_generated(ids_ST)
    assert torch.equal(filled.train.ids, ids_ST[:4])
    assert filled.train.loss_mask.all()
    assert torch.equal(filled.calibration, ids_ST)
    assert filled.pending is None
    assert (filled.num_train, filled.num_distinct_train, filled.calibration_shape) == (4, 4, (8, 32))
    assert filled.test is data.test


@pytest.mark.usefixtures("generation_imported")
def test_pending_sequences_are_generated_by_the_model(tmp_path: Path) -> None:
    data = prepare(f"self:{write_lines(tmp_path / 'a.txt')}", seq_len=16, num_train=4)
    assert data.pending is not None
    assert data.pending.prefixes is not None
    ids_ST = generate.generate_pending(
        data.pending, make_model("smollm"), make_tokenizer(), tmp_path / "ids", 8, lambda count: None
    )
    prefixes = {tuple(row) for row in data.pending.prefixes.tolist()}
    assert {tuple(row) for row in data.with_generated(ids_ST).train.ids[:, :4].tolist()} <= prefixes


def test_text_of_the_model_cannot_be_combined(tmp_path: Path) -> None:
    path, chats = write_lines(tmp_path / "a.txt"), write_chats(tmp_path / "chat.jsonl")
    with pytest.raises(OptionError, match="--data self must be the only source; got self .*a.txt; to mix, generate"):
        prepare("self", path)
    with pytest.raises(OptionError, match="self:SOURCE must name the text that the model continues; got self: without"):
        prepare("self:")
    with pytest.raises(OptionError, match="--data self generates is plain text; leave out --assistant_only_loss"):
        prepare("self", assistant_only=True)
    with pytest.raises(DataError, match="must name plain text for the model to continue; .*chat.jsonl has conversat"):
        prepare(f"self:{chats}", eval_data=("python-docs",))
    with pytest.raises(DataError, match="^--data ./nowhere.txt must be an existing file"):
        prepare("self:./nowhere.txt")


def test_a_tokenizer_without_a_first_token_is_refused_before_anything_is_generated() -> None:
    only_special = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"<pad>": 0})), pad_token="<pad>")
    with pytest.raises(ModelError, match="needs a token to start from"):
        prepare_text(REQUEST, only_special)


# --- fingerprints and tokens ---


def test_fingerprints_change_with_the_text_they_name(tmp_path: Path) -> None:
    path, other = write_lines(tmp_path / "a.txt"), write_lines(tmp_path / "b.txt")
    before = prepare(path, eval_data=(str(other),)).fingerprints
    assert list(before) == ["training text", "calibration text", "validation text", "test text"]
    assert before == prepare(path, eval_data=(str(other),)).fingerprints
    other.write_text(other.read_text().replace("line", "LINE"))
    changed = prepare(path, eval_data=(str(other),)).fingerprints
    assert [what for what in before if before[what] != changed[what]] == ["validation text", "test text"]


def test_a_little_text_of_another_domain_is_measured_too(tmp_path: Path) -> None:
    path, other = write_lines(tmp_path / "a.txt"), write_lines(tmp_path / "b.txt")
    data = prepare(path, other_data=(str(other),))
    assert 0 < len(data.other) <= 8
    assert data.measured().keys() == {"test", "other"}
    assert data.other_source == str(other)
    assert data.fingerprints.keys() - prepare(path).fingerprints.keys() == {"text of another domain"}
    assert len(prepare(path, other_data=(str(other),), num_test=1).other) == 1
    third = write_lines(tmp_path / "c.txt")
    three = prepare(path, other_data=(str(other), str(third)))
    first, second = (prepare(path, other_data=(str(name),)).other.ids[:3] for name in (other, third))
    assert torch.equal(three.other.ids, torch.cat([first, second]))


def test_text_that_is_measured_anyway_is_no_other_domain(tmp_path: Path) -> None:
    path, other = write_lines(tmp_path / "a.txt"), write_lines(tmp_path / "b.txt")
    for data in (prepare(path, other_data=(str(path),)), prepare(path, other_data=())):
        assert len(data.other) == 0
        assert data.measured().keys() == {"test"}
    both = prepare(path, eval_data=(str(other),), other_data=(str(path), str(other)))
    assert len(both.other) == 0


def test_another_domain_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--other_data"):
        prepare(write_lines(tmp_path / "a.txt"), other_data=(str(tmp_path / "none.txt"),))


def test_the_default_of_another_domain_is_left_out_where_it_has_no_sequence_of_this_length(tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("".join(f"line {i} of many that are all alike\n" for i in range(40_000)))
    (tmp_path / "short.txt").write_text("".join(f"line {i}\n" for i in range(1000)))
    long: dict[str, Any] = {
        "seq_len": 90_000, "num_train": 1, "num_validation": 1, "num_test": 1, "num_calibration": 1,
        "min_train": 1, "min_calibration": 1,
    }  # fmt: skip
    data = prepare(tmp_path / "long.txt", other_data=("python-docs",), **long)
    assert (len(data.other), data.other_source) == (0, "")
    with pytest.raises(DataError, match=r"the test \(--other_data .*short.txt\) text must give at least 1 sequences"):
        prepare(tmp_path / "long.txt", other_data=(str(tmp_path / "short.txt"),), **long)


def test_generated_text_has_no_fingerprint_before_it_exists() -> None:
    assert list(prepare("self").fingerprints) == ["validation text", "test text"]


@pytest.mark.parametrize("field", ["train", "calibration", "validation", "test", "other"])
def test_tokens_that_the_model_does_not_know_are_refused(field: str) -> None:
    rows = TokenRows.of(torch.full((1, 4), 4))
    data = TextData(rows, rows.ids, no_rows(), rows, "", {}, rows)
    check_token_ids(data, 5, "m")
    unknown = rows.ids + 1 if field == "calibration" else TokenRows.of(rows.ids + 1)
    with pytest.raises(DataError, match="m knows the tokens 0 to 4; its tokenizer gives 5; use the tokenizer"):
        check_token_ids(dataclasses.replace(data, **{field: unknown}), 5, "m")
