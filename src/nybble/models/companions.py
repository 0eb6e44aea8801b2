"""Files that come with a model and travel with it unchanged: tokenizer and processor, chat template, generation
settings, licence.

transformers reads and writes most of them, but what it writes is not what it read: its version is added, settings that
it finds contradictory are refused, and licences are left behind.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

GENERATION_CONFIG = "generation_config.json"
MODEL_CARD = "README.md"
_FRONT_MATTER = re.compile(r"---\r?\n(.*?)^---", re.MULTILINE | re.DOTALL)
_LICENSE = re.compile(r"^license:[ \t]*([\w.-]+)[ \t\r]*$", re.MULTILINE)
_NAMES = (
    GENERATION_CONFIG, "chat_template.jinja", "chat_template.json", "added_tokens.json", "special_tokens_map.json",
    "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json",
    "video_preprocessor_config.json", "LICENSE*", "LICENCE*", "COPYING*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip


def companion_files(source: str | Path, tokenizer: Any) -> tuple[Path, ...]:
    """The companion files of a model, sorted by name.

    Args:
        source: folder, or hub id of a model that is in the cache of the hub. A .gguf file has none.
        tokenizer: transformers tokenizer of the model; its class names the files of its vocabulary.
    """
    folder = Path(source)
    if folder.is_file():
        return ()
    patterns = (*_NAMES, *(getattr(tokenizer, "vocab_files_names", None) or {}).values())
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(str(source), allow_patterns=list(patterns)))
    found = {file for pattern in patterns for file in folder.glob(pattern) if file.is_file()}
    return tuple(sorted(found))


def stated_license(source: str | Path) -> str:
    """The license that the README.md of a model states to the hub; "" without one, or where no such file is at hand.

    Args:
        source: folder, or hub id.
    """
    readme = Path(source) / MODEL_CARD
    if not Path(source).exists():
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            cached = try_to_load_from_cache(str(source), MODEL_CARD)
        except HFValidationError:  # a folder that is gone
            return ""
        if not isinstance(cached, str):
            return ""
        readme = Path(cached)
    if not readme.is_file():
        return ""
    front = _FRONT_MATTER.match(readme.read_text(encoding="utf-8", errors="replace"))
    found = _LICENSE.search(front.group(1)) if front else None
    return found.group(1) if found else ""


def copy_companions(files: Iterable[Path], folder: Path) -> None:
    """Copy companion files into a folder; files of the same name are replaced."""
    for file in files:
        shutil.copyfile(file, folder / file.name)


def load_generation_config(folder: Path, model: Any) -> None:
    """Give a model the settings in generation_config.json of a folder; without the file it keeps its own."""
    from transformers import GenerationConfig

    if (folder / GENERATION_CONFIG).is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
