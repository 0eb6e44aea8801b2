"""Damaged files and random command lines: every end must be success or one line of a NybbleError.

    python -m tests.helpers.fuzz --minutes 60 --seed 0 [TARGET ...]

prints, for each target, how many inputs were read and how many were refused. An input that ends in any other exception,
or takes more than a gigabyte of memory, is printed at once and kept in build/fuzz, and the exit code is 1. Every minute
a line says how far it is.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import shutil
import string
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from nybble.cli.main import main as nybble
from nybble.cli.parse import parse
from nybble.data.prepare import prepare_text
from nybble.errors import NybbleError
from nybble.models.loading import load
from nybble.models.quantized_model import load_quantized
from nybble.options.commands import COMMANDS, DistillOptions
from nybble.options.toml import recipe_values
from nybble.run.machine import peak_memory
from nybble.run.results import read_results
from nybble.run.resume import saved_options
from nybble.workflows.text import distill_request
from tests.helpers.compress import compress_command
from tests.helpers.gguf_files import write_model
from tests.helpers.tiny import make_tokenizer, save_model

KEPT = Path("build/fuzz")
MOST_BYTES = 1_000_000_000
_ADDRESS_SPACE = 6 << 30
_VALUES: list[Any] = [
    None, True, -1, 0, 1e308, 2**63, -(2**70), "", "no", "\ud800", [], {}, [[]], {"a": 1}, float("nan"), "../../x",
]  # fmt: skip


@dataclass(frozen=True)
class Target:
    """What is damaged and what reads it.

    Attributes:
        make: returns the files that may be damaged, made in a folder.
        read: reads them; raises NybbleError for what it refuses.
    """

    make: Callable[[Path], list[Path]]
    read: Callable[[Path], object]


def damage_bytes(data: bytes, random_: random.Random) -> bytes:
    """Flip, cut, insert, repeat or overwrite some bytes."""
    damaged = bytearray(data)
    for _ in range(random_.choice((1, 1, 2, 8))):
        at = random_.randrange(len(damaged) + 1)
        kind = random_.randrange(6)
        if kind == 0 and damaged:
            damaged[at % len(damaged)] ^= 1 << random_.randrange(8)
        elif kind == 1:
            del damaged[at:]
        elif kind == 2:
            del damaged[at : at + random_.randrange(1, 64)]
        elif kind == 3:
            damaged[at:at] = random_.randbytes(random_.randrange(1, 16))
        elif kind == 4:
            damaged[at:at] = damaged[at : at + random_.randrange(1, 256)]
        else:
            damaged[at : at + 8] = random_.choice((b"\xff" * 8, bytes(8), b"\x00\x00\x00\x00\x00\x00\x00\x80"))
    return bytes(damaged)


def damage_json(data: bytes, random_: random.Random) -> bytes:
    """Replace, delete or rename a value somewhere in each of a few lines of JSON."""
    lines = data.decode().split("\n") if b"\n{" in data else [data.decode()]
    for _ in range(random_.choice((1, 1, 3))):
        i = random_.randrange(len(lines))
        try:
            lines[i] = json.dumps(_damaged_value(json.loads(lines[i]), random_))
        except ValueError:  # an empty line
            continue
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def _damaged_value(value: Any, random_: random.Random) -> Any:
    if isinstance(value, dict) and value and random_.random() < 0.9:
        key = random_.choice(sorted(value))
        kind = random_.randrange(8)
        rest = {name: item for name, item in value.items() if name != key}
        if kind == 0:
            return rest
        if kind == 1:
            return rest | {key + "x": value[key]}
        return rest | {key: _damaged_value(value[key], random_)}
    if isinstance(value, list) and value and random_.random() < 0.7:
        i = random_.randrange(len(value))
        return [*value[:i], *([] if random_.random() < 0.2 else [_damaged_value(value[i], random_)]), *value[i + 1 :]]
    return random_.choice(_VALUES)


def _damage(path: Path, random_: random.Random) -> None:
    data = path.read_bytes()
    is_json = path.suffix in (".json", ".jsonl") and random_.random() < 0.8
    path.write_bytes(damage_json(data, random_) if is_json else damage_bytes(data, random_))


def _model(folder: Path) -> list[Path]:
    save_model(folder, "llama", num_hidden_layers=1)
    return [path for path in folder.iterdir() if path.is_file()]


def _load_model(folder: Path) -> object:
    return load(str(folder), torch.float32, torch.device("cpu"))


def _run(folder: Path) -> list[Path]:
    with contextlib.redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as scratch:
        model = save_model(Path(scratch) / "model", "llama", num_hidden_layers=1)
        assert nybble(compress_command(model, folder)) == 0
    quantized = [path for path in (folder / "quantized").iterdir() if path.is_file()]
    return [*quantized, *(folder / name for name in ("config.toml", "results.json", "nybble-run.json"))]


def _read_run(folder: Path) -> object:
    return saved_options(folder), read_results(folder), load_quantized(folder / "quantized", torch.float32)


def _text(folder: Path) -> list[Path]:
    words = " ".join(string.ascii_lowercase)
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": f"{words} {i}"}) + "\n" for i in range(30)))
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    (folder / "chat.jsonl").write_text(f"{json.dumps({'messages': turns})}\n" * 30)
    (folder / "text.csv").write_text("text,other\n" + f'"{words}",1\n' * 30)
    (folder / "text.txt").write_text(f"{words}\n" * 300)
    return list(folder.iterdir())


@cache  # each one that encodes leaves most of a megabyte in native memory: gigabytes in an hour
def _tokenizer() -> Any:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    return tokenizer


def _read_text(folder: Path) -> object:
    read = []
    for path in sorted(folder.iterdir()):
        options = DistillOptions.of(
            pretrained="x", data=(str(path),), seq_len=32, num_train_samples=4, num_validation_samples=2,
            num_test_samples=2, batch_size=2,
        )  # fmt: skip
        read.append(prepare_text(distill_request(options, calibrates=False), _tokenizer()))
    return read


def _recipe(folder: Path) -> list[Path]:
    shutil.copy("recipes/quick.toml", folder / "recipe.toml")
    return [folder / "recipe.toml"]


def _gguf(folder: Path) -> list[Path]:
    write_model(folder / "model.gguf", "smollm")
    return [folder / "model.gguf"]


TARGETS = {
    "gguf": Target(_gguf, lambda folder: load(str(folder / "model.gguf"), torch.float32, torch.device("cpu"))),
    "model": Target(_model, _load_model),
    "run": Target(_run, _read_run),
    "text": Target(_text, _read_text),
    "recipe": Target(_recipe, lambda folder: recipe_values(DistillOptions, folder / "recipe.toml")),
}


def random_command(random_: random.Random) -> list[str]:
    """A command with some of its flags and values that may fit or not."""
    name = random_.choice(sorted(COMMANDS))
    flags = sorted(COMMANDS[name].fields())
    words = [name]
    for _ in range(random_.randrange(6)):
        words.append("--" + random_.choice(flags))
        words += [
            str(random_.choice((*_VALUES, 1, 8, "rtn", "openvino", "none", "x")))
            for _ in range(random_.choice((0, 1, 1, 2)))
        ]
    return words


def check(target: Target, name: str, seed: int, base: Path, scratch: Path) -> bool:
    """Damage one file of `base`, which holds what `target.make` made; whether it was read.

    Raises:
        Exception: anything but NybbleError, which is kept for a look.
    """
    random_ = random.Random(f"{name} {seed}")
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(base, scratch)
    files = sorted(path for path in scratch.rglob("*") if path.is_file())
    _damage(random_.choice(files), random_)
    before, read = peak_memory()["cpu"], True
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            target.read(scratch)
    except (NybbleError, OSError) as error:
        if "\n" in str(error):
            raise ValueError("an error must be one line") from error
        read = False
    if (grown := peak_memory()["cpu"] - before) > MOST_BYTES:
        raise MemoryError(f"an input must not take more than {MOST_BYTES} bytes; it took {grown}")
    return read


def run(names: list[str], seconds: float, seed: int) -> tuple[dict[str, Counter[str]], list[str]]:
    """Try random inputs for some time; returns counts for each target, and what failed."""
    counts: dict[str, Counter[str]] = {name: Counter() for name in (*names, "command line")}
    failed: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        bases = {}
        for name in names:
            bases[name] = Path(folder) / name
            if name != "run":
                bases[name].mkdir()
            TARGETS[name].make(bases[name])
        end = time.monotonic() + seconds
        told = time.monotonic()
        while time.monotonic() < end:
            seed += 1
            if time.monotonic() > told + 60:
                told = time.monotonic()
                print(f"seed {seed}: {sum(sum(count.values()) for count in counts.values())} inputs", flush=True)
            for name in names:
                scratch = Path(folder) / "scratch"
                try:
                    read = check(TARGETS[name], name, seed, bases[name], scratch)
                    counts[name]["read" if read else "refused"] += 1
                except Exception:
                    counts[name]["FAILED"] += 1
                    failed.append(f"{name} {seed}\n{traceback.format_exc()}")
                    print(failed[-1], flush=True)
                    shutil.copytree(scratch, KEPT / f"{name}-{seed}", dirs_exist_ok=True)
            for i in range(20):
                words = random_command(random.Random(f"{seed} {i}"))
                try:
                    parse(words).check()
                    counts["command line"]["read"] += 1
                except NybbleError:
                    counts["command line"]["refused"] += 1
                except Exception:
                    counts["command line"]["FAILED"] += 1
                    failed.append(f"{words}\n{traceback.format_exc()}")
                    print(failed[-1], flush=True)
    return counts, failed


def main() -> int:
    """See the head of this file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("targets", nargs="*", default=sorted(TARGETS))
    given = parser.parse_args()
    with contextlib.suppress(ImportError):  # Windows
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_ADDRESS_SPACE, _ADDRESS_SPACE))  # an input must not stop the machine
    counts, failed = run(given.targets, given.minutes * 60, given.seed)
    for name, count in counts.items():
        print(name, dict(count))
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main())
