"""docs/troubleshooting.md explains every error message."""

import ast
import re
from collections.abc import Iterator

import pytest

from tests.helpers.pages import DOCS, ROOT

SOURCE = ROOT / "src" / "nybble"
KINDS = {
    "OptionError",
    "ModelError",
    "DataError",
    "HubUnreachableError",
    "RunError",
    "TrainingError",
    "ExportError",
    "NoChainError",
}
# Patterns and messages with fewer letters say nothing about which message is meant.
MIN_LETTERS = 12


def template(node: ast.expr) -> str:
    """The text of a message with … for what is filled in."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(template(value) if isinstance(value, ast.Constant) else "…" for value in node.values)
    if isinstance(node, ast.BinOp):
        return template(node.left) + template(node.right)
    return "…"


def letters(text: str) -> int:
    """Number of letters."""
    return sum(character.isalpha() for character in text)


def requirement(message: str) -> str:
    """The part of a message before the first semicolon."""
    return message.split(";")[0]


def patterns() -> list[re.Pattern[str]]:
    """The messages in the first columns of the page's tables, as patterns of the beginning of a requirement."""
    rows = re.findall(r"^\| (.*?) \|", (DOCS / "troubleshooting.md").read_text(encoding="utf-8"), re.MULTILINE)
    texts = [text.strip() for row in rows for text in row.replace("`", "").split(";")]
    return [re.compile(".*".join(map(re.escape, text.split("…")))) for text in texts if letters(text) >= MIN_LETTERS]


def messages() -> Iterator[tuple[str, str]]:
    """(place, message) of every error that nybble raises with text of its own."""
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in KINDS and node.args:
                message = template(node.args[0])
                if letters(requirement(message)) >= MIN_LETTERS:
                    yield f"{path.relative_to(SOURCE)}:{node.lineno}", message


def test_every_error_message_is_explained() -> None:
    found, known = list(messages()), patterns()
    assert len(found) > 100
    missing = [
        f"{place}: {message}"
        for place, message in found
        if not any(pattern.match(requirement(message)) for pattern in known)
    ]
    if missing:
        pytest.fail("docs/troubleshooting.md has no row for\n" + "\n".join(missing))
