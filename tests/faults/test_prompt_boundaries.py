"""Every answer has tokens of its own, whatever a tokenizer puts around a text: what is learnt and scored, decoded."""

import copy
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import Sequence, TemplateProcessing
from transformers import PreTrainedTokenizerFast

from nybble.cli.main import main
from nybble.data.boundaries import added_tokens
from nybble.data.packing import begin_tokens
from nybble.errors import DataError, ModelError
from nybble.evaluation.lm_eval import check_tokenizer
from nybble.evaluation.lm_eval_model import wrap_model
from nybble.tasks import encoding
from nybble.tasks.dataset import Question
from nybble.tasks.encoding import EncodedAnswer
from tests.helpers.questions import choice_question
from tests.helpers.tiny import make_model, make_tokenizer
from tests.helpers.tune import write_letters

_ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
_SPECIAL = {"<s>": 256, "</s>": 257, "<mask>": 258, "<sop>": 259}


def wrap(backend: Tokenizer, around: str = "$A", **named: str) -> Any:
    """A tokenizer that puts special tokens around every text."""
    backend.add_special_tokens(list(_SPECIAL))
    special = [(token, backend.token_to_id(token)) for token in _SPECIAL]
    template = TemplateProcessing(single=around, special_tokens=special)
    backend.post_processor = Sequence([backend.post_processor, template]) if backend.post_processor else template
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **named)


def byte_level(around: str = "$A", merges: tuple[tuple[str, str], ...] = (), split: bool = True, **named: str) -> Any:
    """One token a byte, and one for each merge. `split`: words are split before merging."""
    vocabulary = {character: i for i, character in enumerate(_ALPHABET)} | _SPECIAL
    vocabulary |= {"".join(pair): 260 + i for i, pair in enumerate(merges)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split)
    backend.decoder = decoders.ByteLevel()
    return wrap(backend, around, **named)


def prefix_space(around: str = "$A", **named: str) -> Any:
    """As SentencePiece: a space before every text, and one token a character."""
    characters = [*_SPECIAL, "\u2581", *map(chr, range(33, 127))]
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(characters)}, merges=[]))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse()])
    return wrap(backend, around, **named)


def words(around: str = "$A", **named: str) -> Any:
    """One token a word."""
    vocabulary = {word: i for i, word in enumerate([*_SPECIAL, "<unk>", "ask", ":", "yes", "no", "a", "the"])}
    backend = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.Fuse()
    return wrap(backend, around, **named)


BOTH = {"bos_token": "<s>", "eos_token": "</s>"}
ONE = {"bos_token": "</s>", "eos_token": "</s>"}
TOKENIZERS = {
    "plain": byte_level(**BOTH),
    "begin": byte_level("<s> $A", **BOTH),
    "end": byte_level("$A </s>", **BOTH),
    "begin and end": byte_level("<s> $A </s>", **BOTH),
    "end without bos": byte_level("$A </s>", eos_token="</s>"),
    "one token for both, at the end": byte_level("$A </s>", **ONE),
    "one token for both, around": byte_level("</s> $A </s>", **ONE),
    "begin without eos": byte_level("<s> $A", bos_token="<s>"),
    "neither": byte_level(),
    "two begin tokens": byte_level("<mask> <sop> $A", eos_token="</s>"),
    "two end tokens": byte_level("$A <sop> </s>", **BOTH),
    "prefix space": prefix_space(**BOTH),
    "prefix space, begin and end": prefix_space("<s> $A </s>", **BOTH),
    "words, begin and end": words("<s> $A </s>", **BOTH),
    "real merges": byte_level("<s> $A </s>", (("e", "s"), ("y", "es"), ("\u0120", "yes")), **BOTH),
}
EXPECTED = {"words, begin and end": ("yes", "no")}


@pytest.fixture(params=TOKENIZERS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def tokenizer(name: str) -> Any:
    return copy.deepcopy(TOKENIZERS[name])


def targets(text: EncodedAnswer) -> list[int]:
    """Tokens that the loss mask covers."""
    batch = encoding.pad_batch([text])
    return batch.ids.roll(-1, 1)[batch.loss_mask].tolist()  # type: ignore[no-any-return]


def answers(name: str) -> tuple[str, str]:
    return EXPECTED.get(name, (" yes", " no"))


def test_learnt_is_the_answer_and_one_end_token(name: str, tokenizer: Any) -> None:
    (text,) = encoding.encode_right_answers(tokenizer, [Question.with_completion("ask:", " yes")], 64)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    learnt = targets(text)
    assert learnt[len(learnt) - len(end) :] == end
    assert tokenizer.decode(learnt[: len(learnt) - len(end)]) == answers(name)[0]


def test_learnt_is_the_right_choice_without_an_end_token(name: str, tokenizer: Any) -> None:
    (text,) = encoding.encode_right_answers(tokenizer, [choice_question("ask:", "yes", "no", label=1)], 64)
    assert tokenizer.decode(targets(text)) == answers(name)[1]


def test_scored_are_the_choices(name: str, tokenizer: Any) -> None:
    ((yes, no),) = encoding.encode_choices(tokenizer, [choice_question("ask: ", "yes", "no")], 64)
    found = [tokenizer.decode(targets(text)) for text in (yes, no)]
    assert [text.strip() for text in found] == ["yes", "no"]
    assert targets(yes) != targets(no)


def test_prompt_begins_with_the_begin_tokens_of_the_tokenizer(tokenizer: Any) -> None:
    ((text, _),) = encoding.encode_choices(tokenizer, [choice_question("ask:", "yes", "no")], 64)
    whole = tokenizer("ask: yes").input_ids
    assert whole[: len(text.ids)] == text.ids, "all but the end tokens"
    assert tokenizer.decode(text.ids[: text.prompt_length], skip_special_tokens=True).strip() == "ask:"


def test_an_answer_without_prompt_starts_after_the_begin_tokens(tokenizer: Any) -> None:
    """Its first token is predicted from a begin token; without one, nothing predicts it."""
    ((text, _),) = encoding.encode_choices(tokenizer, [Question(("", ""), ("yes no", "no yes"), 0, (6, 6))], 64)
    begin = added_tokens(tokenizer).before
    assert text.ids[: text.prompt_length] == begin
    own = tokenizer("yes no", add_special_tokens=False).input_ids
    assert targets(text) == (own if begin else own[1:])


@pytest.mark.parametrize("around", ["$A", "<s> $A </s>"])
def test_a_token_across_the_boundary_belongs_to_the_answer(around: str) -> None:
    tokenizer = byte_level(around, (("a", "s"), ("as", "k"), ("i", "n"), ("in", "g"), ("ask", "ing")), False, **BOTH)
    merged = Question(("do ask", "do ask"), ("ing", "ed"), 0, (3, 2))
    for texts in (
        encoding.encode_choices(tokenizer, [merged], 64)[0],
        [*encoding.encode_right_answers(tokenizer, [merged], 64), None],
    ):
        assert texts[0] is not None
        assert tokenizer.decode(targets(texts[0])) == "asking"
        if texts[1] is not None:
            assert tokenizer.decode(targets(texts[1])) == "asked", "both choices are scored from the same place"


def test_an_answer_that_the_tokenizer_drops_is_refused() -> None:
    """The normalizer removes it, so only the end token would be learnt."""
    tokenizer = byte_level("<s> $A </s>", **BOTH)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("~", "")
    for question in (Question.with_completion("ask", "~"), Question(("ask", "ask"), ("~", "a"), 0, (1, 1))):
        for encode in (encoding.encode_right_answers, encoding.encode_choices):
            with pytest.raises(
                DataError, match="every answer must have a token that its prompt predicts; '~' after 'ask' has none"
            ):
                encode(tokenizer, [question], 64)


def test_begin_tokens_are_those_before_a_text() -> None:
    assert begin_tokens(TOKENIZERS["one token for both, at the end"]) == []
    assert begin_tokens(TOKENIZERS["one token for both, around"]) == [257]
    assert begin_tokens(make_tokenizer(begin=True)) == [256]
    assert begin_tokens(TOKENIZERS["two begin tokens"]) == [], "none of them is the bos token"


# --- lm-eval's own path ---


def lm_eval_model(tokenizer: Any) -> Any:
    return wrap_model(make_model("smollm", vocab_size=max(260, len(tokenizer))), tokenizer, 1)


@pytest.mark.slow  # importing lm-eval takes seconds
def test_lm_eval_scores_the_same_tokens(name: str, tokenizer: Any) -> None:
    reference = lm_eval_model(tokenizer)
    ((yes, no),) = encoding.encode_choices(tokenizer, [choice_question("ask:", "yes", "no")], 64)
    for text, answer in ((yes, " yes"), (no, " no")):
        context, continuation = reference._encode_pair("ask:", answer)
        assert [*context, *continuation] == text.ids
        assert len(context) == text.prompt_length


@pytest.mark.slow
def test_lm_eval_reads_documents_and_prompts_without_end_tokens(tokenizer: Any) -> None:
    reference = lm_eval_model(tokenizer)
    added = added_tokens(tokenizer)
    text = tokenizer("ask:", add_special_tokens=False).input_ids
    assert reference.tok_encode("ask:") == [*added.before, *text]
    assert reference.tok_encode("ask:", add_special_tokens=False) == text
    ids, mask = reference.tok_batch_encode(["ask:", "ask: yes"], left_truncate_len=64)
    assert ids[0][mask[0].bool()].tolist() == [*added.before, *text]
    assert ids.shape == mask.shape


@pytest.mark.slow
def test_lm_eval_scores_a_choice_that_shares_its_only_token_with_the_prompt() -> None:
    tokenizer = byte_level("<s> $A", (("a", "s"), ("as", "k"), ("i", "n"), ("in", "g"), ("ask", "ing")), False, **BOTH)
    context, continuation = lm_eval_model(tokenizer)._encode_pair("do ask", "ing")
    assert (tokenizer.decode(context), tokenizer.decode(continuation)) == ("<s>do ", "asking")


@pytest.mark.slow
def test_lm_eval_leaves_the_tokenizer_as_it_is() -> None:
    """lm-eval sets or adds a padding token where there is none, and the tokenizer is shipped with the model."""
    for name in ("neither", "begin without eos", "plain"):
        tokenizer = copy.deepcopy(TOKENIZERS[name])
        before = len(tokenizer), tokenizer.pad_token
        lm_eval_model(tokenizer)
        assert (len(tokenizer), tokenizer.pad_token) == before


@pytest.mark.parametrize("tasks", [("wikitext",), ("arc_easy", "wikitext")])
def test_a_tokenizer_without_bos_and_eos_is_refused_before_lm_eval_starts(tasks: tuple[str, ...]) -> None:
    message = f"the tasks {' '.join(tasks)} need a tokenizer with a bos_token or an eos_token, .* has neither; add one"
    with pytest.raises(ModelError, match=message):
        check_tokenizer(tasks, TOKENIZERS["neither"])
    check_tokenizer((), TOKENIZERS["neither"])
    for name in ("begin without eos", "end without bos", "plain"):
        check_tokenizer(tasks, TOKENIZERS[name])


@pytest.mark.parametrize("workflow", ["compress", "distill", "tune", "eval"])
def test_every_command_asks_before_it_measures(
    workflow: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_model("smollm").save_pretrained(tmp_path / "model")
    TOKENIZERS["neither"].save_pretrained(tmp_path / "model")
    model, out = ["--pretrained", str(tmp_path / "model")], ["--output_dir", str(tmp_path / "run"), "--export", "none"]
    arguments = {
        "compress": [*model, *out, "--data", "python-docs"],
        "distill": [*model, *out, "--data", "python-docs"],
        "tune": [*model, *out, "--task", str(write_letters(tmp_path / "letters.jsonl"))],
        "eval": [str(tmp_path / "model")],
    }
    for module in ("text", "task_run", "evaluate"):  # it takes seconds, and wants data
        monkeypatch.setattr(f"nybble.workflows.{module}.check_tasks", lambda *_: None)
    assert main([workflow, *arguments[workflow], "--eval_tasks", "wikitext"]) == 2
    assert "the tasks wikitext need a tokenizer with a bos_token or an eos_token" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
