"""nybble.data.wikitext: articles, and their text without tokenization marks."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from nybble.data.wikitext import split_articles, undo_tokenization

TEXT = " \n = One = \n\n a\n = = Part = = \n b\n = Two ( 2 ) = \n\n x = y = z \n"


@pytest.fixture(scope="module")
def lm_eval_detokenizer() -> Callable[[dict[str, str]], str]:
    return pytest.importorskip("lm_eval.tasks.wikitext.preprocess_wikitext").wikitext_detokenizer


def test_an_article_starts_at_a_heading_of_the_first_level() -> None:
    assert split_articles(TEXT) == [" = One = \n\n a\n = = Part = = \n b\n", " = Two ( 2 ) = \n\n x = y = z \n"]


def test_text_before_the_first_heading_is_an_article() -> None:
    assert split_articles("before\n" + TEXT)[0] == "before\n \n"
    assert split_articles("no heading") == ["no heading"]
    assert split_articles("  \n") == []


def test_tokenization_marks_are_removed() -> None:
    assert undo_tokenization(" = Two ( 2 ) = \n\n x = y = z \n") == " = Two (2) =\n\nx = y = z\n"
    assert undo_tokenization('a 12 @-@ inch , 3 @.@ 5 " quoted " one \'s') == 'a 12-inch, 3.5 "quoted" one\'s'


def test_articles_are_those_that_lm_eval_reads(
    shared_data: Path, lm_eval_detokenizer: Callable[[dict[str, str]], str]
) -> None:
    folder = shared_data / "wikitext"
    articles = split_articles((folder / "wikitext-2-raw" / "wiki.valid.raw").read_text())
    rows = [json.loads(line) for line in (folder / "document_level" / "validation.jsonl").read_text().splitlines()]
    assert len(rows) > 10
    expected = [lm_eval_detokenizer(row).strip() for row in rows]
    assert [undo_tokenization(article).strip() for article in articles] == expected
