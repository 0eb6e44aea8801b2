"""The files of a model folder, checked before transformers reads them.

transformers skips some faults in silence (a generation_config.json that is no JSON, shards that the index does not
name) and reports others by an error from deep inside a library. Here the file is named.

Refused (ModelError): a folder without configuration, weights or tokenizer, pointers of Git LFS, JSON files that hold no
object, an index that does not name the shards of the folder, and adapters.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from nybble.errors import ModelError, first_line

_LFS_POINTER = b"version https://git-lfs"

_JSON_FILES = (
    "config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "model.safetensors.index.json", "pytorch_model.bin.index.json",
)  # fmt: skip
"""Files that must hold an object where they exist."""

_TOKENIZER_FILES = (
    "tokenizer*", "vocab*", "*.model", "*.tiktoken", "tekken.json", "merges.txt", "tokenization_*.py", "chars.txt",
)  # fmt: skip

_SHARDS = {"model.safetensors": "model-*-of-*.safetensors", "pytorch_model.bin": "pytorch_model-*-of-*.bin"}
"""File with all weights -> files with parts of them."""


def check_model_folder(folder: Path) -> None:
    """Check the files of a model folder.

    Args:
        folder: an existing folder.

    Raises:
        ModelError: a file is missing, is a pointer of Git LFS, or is not what its name says.
    """
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"--pretrained {folder} must hold a transformers model; the folder has no config.json; name another"
        )
    weights = [path for path in sorted(folder.glob("*.safetensors")) if not path.name.startswith("consolidated")]
    weights = weights or sorted(folder.glob("*.bin"))
    if not weights:
        raise ModelError(
            f"--pretrained {folder} must hold weights (*.safetensors); the folder has no weights; "
            "download them, or name another folder"
        )
    tokenizer = [path for pattern in _TOKENIZER_FILES for path in sorted(folder.glob(pattern))]
    if not tokenizer:
        raise ModelError(
            f"--pretrained {folder} must hold a tokenizer (tokenizer.json); the folder has none; "
            "copy the tokenizer files of the original model into it"
        )
    if (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"--pretrained {folder} must be a model without adapters; it has an adapter_config.json; merge the adapter "
            "(peft: merge_and_unload), and name the folder of the result"
        )
    check_no_pointers([*folder.glob("*.json"), *folder.glob("*.jinja"), *tokenizer, *weights])
    for name in _JSON_FILES:
        if (folder / name).exists():
            read_object(folder / name)
    _check_shards(folder)
    for path in weights:
        if path.suffix == ".safetensors":
            _check_complete(path)


def _check_complete(path: Path) -> None:
    """Raise ModelError unless a safetensors file is as long as its header says."""
    try:
        with safe_open(path, "pt"):
            pass
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"{path} must be a readable safetensors file; it is not ({first_line(error)}); copy or download it "
            "again, or, if nybble exported it, make it again with nybble export"
        ) from error


def check_no_pointers(paths: list[Path]) -> None:
    """Raise ModelError for the first file that is a pointer of Git LFS."""
    for path in sorted(set(paths)):
        if path.is_file():
            with path.open("rb") as file:
                start = file.read(len(_LFS_POINTER))
            if start == _LFS_POINTER:
                raise ModelError(
                    f"{path} must be the file itself; it is a pointer of Git LFS; run git lfs pull in its folder"
                )


def read_object(path: Path) -> dict[str, Any]:
    """Read the object in a JSON file.

    Raises:
        ModelError: the file cannot be read, is not JSON, or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(
            f"{path} must be a JSON file; it cannot be read ({first_line(error)}); download it again"
        ) from error
    if not isinstance(value, dict):
        raise ModelError(
            f"{path} must hold a JSON object {{...}}; it holds {json.dumps(value)[:40]}; download it again"
        )
    return value


def _check_shards(folder: Path) -> None:
    """Raise ModelError unless the weights that transformers will read are all that the folder has of their kind."""
    for whole, pattern in _SHARDS.items():
        shards = {path.name for path in folder.glob(pattern)}
        index = folder / f"{whole}.index.json"
        if (folder / whole).is_file():
            if shards:
                raise ModelError(
                    f"{folder} must hold the weights once; it holds {whole} and also {min(shards)}; delete one of them"
                )
            return
        if index.is_file():
            _check_index(index, shards)
            return


def _check_index(index: Path, shards: set[str]) -> None:
    """Raise ModelError unless an index names exactly these files."""
    content = read_object(index)
    files = content.get("weight_map")
    if not isinstance(content.get("metadata"), dict) or not isinstance(files, dict) or not files:
        raise ModelError(f"{index} must hold the objects metadata and weight_map; it does not; download it again")
    named = {str(name) for name in files.values()}
    absent = sorted(name for name in named if not (index.parent / name).is_file())
    if absent:
        raise ModelError(
            f"{index} names {len(named)} files of weights; {len(absent)} are not there (first: {absent[0]}); "
            "download the model again"
        )
    if shards - named:
        raise ModelError(
            f"{index} must name all weights of the folder; it does not name {min(shards - named)}; "
            "download the model again, or delete the files that do not belong to it"
        )
