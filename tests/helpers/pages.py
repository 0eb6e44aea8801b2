"""The pages of the documentation, and what is written in them."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
DOCS = ROOT / "docs"
PAGES = sorted([README, ROOT / "CONTRIBUTING.md", *DOCS.rglob("*.md")])
RECIPES = sorted((ROOT / "recipes").glob("*.toml"))

_FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"(?:^    .*\n)+", re.MULTILINE)


def code_blocks(page: Path, language: str) -> list[str]:
    """The fenced code blocks of a language."""
    return [text for name, text in _FENCED.findall(page.read_text(encoding="utf-8")) if name == language]


def shell_lines(page: Path) -> list[str]:
    """Lines of shell code: in fenced blocks marked bash, and in indented blocks."""
    unfenced = _FENCED.sub("", page.read_text(encoding="utf-8"))
    blocks = [*code_blocks(page, "bash"), *_INDENTED.findall(unfenced)]
    return [line.strip() for block in blocks for line in block.splitlines()]


def nybble_commands(page: Path) -> list[list[str]]:
    """Arguments of every `nybble ...` command in a page."""
    return [shlex.split(line, comments=True)[1:] for line in shell_lines(page) if line.startswith("nybble ")]


def flags(page: Path) -> set[str]:
    """Names of all flags of nybble that a page mentions: `--seq_len` -> seq_len."""
    text = page.read_text(encoding="utf-8")
    other = (
        "pip install", "accelerate launch", "torchrun", "sbatch", "docker run", "--rest_port", "llama-", "vllm serve",
        "vllm-env/bin/", "mlx_lm.",
    )  # fmt: skip
    lines = [line for line in text.splitlines() if not line.strip().startswith(other)]
    return set(re.findall(r"(?<![\w-])--([a-z][a-z_]+)", "\n".join(lines).replace("pip install --no-deps", "")))


def links(page: Path) -> list[str]:
    """Targets of Markdown links and images."""
    text = _FENCED.sub("", page.read_text(encoding="utf-8"))
    return re.findall(r"\]\(([^)\s]+)\)", text)


def heading_ids(page: Path) -> set[str]:
    """Ids of the headings of a page: given by { #id }, or made of the words."""
    ids = set()
    for heading in re.findall(r"^#+ (.*)$", _FENCED.sub("", page.read_text(encoding="utf-8")), re.MULTILINE):
        given = re.search(r"\{ #([\w-]+) \}", heading)
        ids.add(given.group(1) if given else re.sub(r"[^\w\s-]", "", heading).strip().lower().replace(" ", "-"))
    return ids
