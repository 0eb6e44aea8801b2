"""The README is short and starts with something to try."""

from tests.helpers.pages import README, ROOT, shell_lines

MAX_WORDS, MAX_WORDS_BEFORE_COMMAND = 900, 100


def test_readme_has_at_most_900_words() -> None:
    assert len(README.read_text(encoding="utf-8").split()) <= MAX_WORDS


def test_first_command_comes_within_100_words() -> None:
    first = shell_lines(README)[0]
    before = README.read_text(encoding="utf-8").split(f"    {first}")[0]
    assert first == "make demo"
    assert len(before.split()) <= MAX_WORDS_BEFORE_COMMAND


def test_results_table_has_at_most_8_rows() -> None:
    table = README.read_text(encoding="utf-8").split("## Results")[1].split("\n\n")[2].splitlines()
    assert table[1].startswith("| ---")
    assert 1 <= len(table[2:]) <= 8


def test_continuous_integration_runs_the_tests_that_contributors_run() -> None:
    for file in (".ci/run", "CONTRIBUTING.md"):
        assert "make test" in (ROOT / file).read_text(encoding="utf-8")
