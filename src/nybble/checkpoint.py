"""The run folder: what is saved when. Every file appears whole or not at all, so that a run can be killed at any moment and resumed.

nybble-run.json      the marker: this folder is a run of nybble
config.toml          the options, resolved
log.txt              what the console said since the folder exists, with times
results.json         measurements and seconds per stage, growing; report.md is the same for people
teacher/             the teacher's hidden states (train states are deleted when training is done)
compress/            finished blocks of the compression (deleted when the 4-bit model is saved, unless adapters inside the rounding may be tried at other ranks)
last.safetensors     newest checkpoint: adapters, scales, optimizer; its header says the step
best.safetensors     adapters and scales with the lowest validation loss
scales-*.safetensors the same of nybble tune's second training, in 4 bits
quantized/           the 4-bit model: codes, scales, zeros, the untouched rest, tokenizer
openvino/            exports
and, where the run has them: self.safetensors (text that the model wrote), search.db (trials of nybble search), tensorboard/, report.html,
trial/ (a configuration that is being tested), merged/ and texts/ (16-bit LoRA of nybble tune --compare)
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import json
import logging
import os
import platform
import resource
import shlex
import shutil
import sys
import time
import tomllib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nybble.config import read_toml, to_toml
from nybble.errors import ExportError, RunError
from nybble.grid import Grid
from nybble.quantized import QuantizedWeight, pack_nibbles, unpack_nibbles

log = logging.getLogger("nybble")

CONFIG, RESULTS = "config.toml", "results.json"
# The file that makes a folder a run, and what it holds. Other programs have a config.toml too; none has this.
MARKER, _MARKER_FORMAT = "nybble-run.json", "nybble-run-1"
# What a run leaves in its folder before its configuration is whole.
_EMPTY = {".lock", MARKER, f"{MARKER}.tmp", f"{CONFIG}.tmp"}
# Everything that a run writes into its folder beside its exports. --overwrite deletes these names and no others; configuration and marker come last,
# so that the folder is known as a run as long as anything is left of it.
_OWN = (
    "log.txt", RESULTS, "report.md", "report.html", "teacher", "compress", "last.safetensors", "best.safetensors", "scales-last.safetensors",
    "scales-best.safetensors", "quantized", "self.safetensors", "search.db", "tensorboard", "trial", "merged", "texts", CONFIG, MARKER,
)  # fmt: skip
# Options that may change on resume. Another microbatch or cache gives the same gradients up to rounding: the last bits may differ.
_FREE = {"output_dir", "save_every", "tensorboard", "export", "eval_batch_size", "cache", "microbatch", "fast_eval", "custom_rank_config", "trust_remote_code"}


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def save_tensors(path: Path, tensors: dict[str, Tensor], note: dict[str, Any]) -> None:
    """Write tensors and a JSON-able note (kept in the header) to one safetensors file, atomically."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        save_file({name: t.detach().to("cpu").contiguous() for name, t in tensors.items()}, temporary, {"note": json.dumps(note)})
    except SafetensorError as error:
        temporary.unlink(missing_ok=True)
        raise RunError(f"{path} could not be written; {error}; free some space, then go on with --resume") from error
    os.replace(temporary, path)


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `save_tensors` wrote: tensors on the CPU, and the note."""
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads((file.metadata() or {}).get("note", "{}"))  # noqa: SIM118


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file; RunError where it is none, or damaged."""
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise RunError(f"{path} must be a readable safetensors file; {error}; delete it to start that stage again") from error


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that becomes `path` when all went well, and vanishes otherwise."""
    temporary = path.with_name(path.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        shutil.rmtree(path, ignore_errors=True)
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Delete a folder that is no longer needed, if it is there. Killed meanwhile, it is gone all the same."""
    leaving = path.with_name(path.name + ".tmp")
    shutil.rmtree(leaving, ignore_errors=True)
    with suppress(FileNotFoundError):
        path.rename(leaving)
    shutil.rmtree(leaving, ignore_errors=True)


class BlockStore:
    """Finished blocks of a compression (compress.Store), one safetensors file each. `identity` says of what; files of something else are ignored."""

    def __init__(self, path: Path, identity: str) -> None:
        self.path, self.identity = path, identity

    def _file(self, block: str) -> Path:
        return self.path / f"{block.strip('.')}.safetensors"

    def load(self, block: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        if not self._file(block).exists():
            return None
        tensors, note = load_tensors(self._file(block))
        return (tensors, note) if note.pop("identity", None) == self.identity else None

    def save(self, block: str, tensors: dict[str, Tensor], note: dict[str, Any]) -> None:
        self.path.mkdir(exist_ok=True)
        save_tensors(self._file(block), tensors, note | {"identity": self.identity})


def is_run(path: Path) -> bool:
    """Whether the folder has the marker of a run."""
    try:
        return json.loads((path / MARKER).read_text(encoding="utf-8"))["format"] == _MARKER_FORMAT  # type: ignore[no-any-return]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _check_deletable(path: Path) -> None:
    """Raise RunError where --overwrite would delete from a folder that is more than a run, even if it has a run's marker."""
    resolved, here, home = path.resolve(), Path.cwd().resolve(), Path.home().resolve()
    if resolved == here or resolved in here.parents:
        what = "the current folder or one above it"
    elif resolved == home or resolved in home.parents:
        what = "the home folder or one above it"
    elif (path / ".git").exists():
        what = "a git repository"
    else:
        return
    raise RunError(f"--overwrite must name the folder of a run alone; {path} is {what}; choose another --output_dir")


def _delete_run(path: Path) -> None:
    """Delete what a run wrote; other files in its folder stay, and are named."""
    exports: set[str] = set()
    with suppress(RunError):  # damaged results: the exports stay
        exports = set(read_results(path).get("exports", {}))
    for name in (*exports, *_OWN):
        for entry in (path / f"{name}.tmp", path / name):
            if entry.is_symlink() or entry.is_file():
                entry.unlink()
            elif entry.is_dir():
                shutil.rmtree(entry)
    if left := sorted(entry.name for entry in path.iterdir() if entry.name != ".lock"):
        log.info("%s: left in place, as no run wrote it: %s", path, ", ".join(left))


def _lock(path: Path) -> IO[str]:
    """Make the folder and lock it for this process; RunError if it cannot be written or another process has it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = (path / ".lock").open("a")
    except OSError as error:
        raise RunError(f"--output_dir {path} must be writable; {error.strerror}; choose another folder") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise RunError(f"--output_dir {path} is in use by another process; wait for it, or choose another folder") from error
    return lock


class Run:
    """An open run folder, locked against a second process.

    Use `Run.open`. `results` is what results.json holds; change it and call `save_results`.
    """

    def __init__(self, path: Path, lock: IO[str] | None, results: dict[str, Any]) -> None:
        self.path, self.results, self._lock = path, results, lock
        self.failed: list[ExportError] = []  # exports of this sitting
        self._stage: tuple[str, float] | None = None  # its name, and up to when its seconds are counted

    @staticmethod
    def check(path: Path, resume: bool, overwrite: bool) -> bool:
        """Whether there is a run already; RunError if it may not be touched, or if the folder holds something else."""
        used = path.exists() and (not path.is_dir() or any(entry.name not in _EMPTY for entry in path.iterdir()))
        if used and not is_run(path):
            raise RunError(f"--output_dir {path} must be a new folder or an earlier run; it holds other files; choose another folder")
        if used and not (resume or overwrite):
            raise RunError(f"--output_dir {path} already holds a run; add --resume to go on with it, or --overwrite to delete it")
        if overwrite:
            _check_deletable(path)
        return used

    @staticmethod
    def reopen(path: Path) -> Run:
        """Open a finished run to add to it."""
        return Run(path, _lock(path), read_results(path))

    @staticmethod
    def open(path: Path, options: Any, resume: bool, overwrite: bool) -> Run:
        """Start a run folder, or go on with one.

        Raises:
            RunError: in use, not empty, not writable, or made with other options (on resume; the option is named).
        """
        used = Run.check(path, resume, overwrite)
        lock = _lock(path)
        if used and overwrite:
            _delete_run(path)
        run = Run(path, lock, {"seconds": {}, "models": {}})
        if used and resume:
            check_same(path, options)
            run.results |= read_results(path)
        if not is_run(path):
            write_text(path / MARKER, json.dumps({"format": _MARKER_FORMAT}) + "\n")
        if not (used and getattr(options, "eval_only", False)):  # a trial of ranks leaves the run's options alone
            write_text(path / CONFIG, to_toml(options))
        command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
        if run.results.setdefault("command", command) != command:
            run.results.setdefault("resumed_by", []).append(command)
        return run

    def close(self) -> None:
        """Let go of the lock."""
        if self._lock is not None:
            self._lock.close()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the seconds of a stage, over all sittings. It begins without what earlier ones freed; none is inside another."""
        hand_back_freed_memory()
        self._stage = name, time.perf_counter()
        try:
            yield
        finally:
            self.save_results()
            self._stage = None

    def save_results(self) -> None:
        """Write results.json, with the seconds so far."""
        if self._stage is not None:
            (name, since), now, seconds = self._stage, time.perf_counter(), self.results["seconds"]
            seconds[name] = round(seconds.get(name, 0) + now - since, 3)
            self._stage = name, now
        memory = self.results.setdefault("peak_memory_bytes", {})
        for kind, value in peak_memory().items():
            memory[kind] = max(value, memory.get(kind, 0))
        write_text(self.path / RESULTS, json.dumps(self.results, indent=2) + "\n")


def read_results(path: Path) -> dict[str, Any]:
    """results.json of a run; {} where there is none, RunError where it is not what nybble wrote."""
    file = path / RESULTS
    if not file.is_file():
        return {}
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
        if "models" in results.keys():  # noqa: SIM118 (a list has no keys: AttributeError)
            return results  # type: ignore[no-any-return]
        problem = "it has no models"
    except (OSError, ValueError, AttributeError) as error:
        problem = f"it cannot be read ({error})"
    raise RunError(f"{file} must be the results of a run; {problem}; repair it, or make the run again")


def read_options(path: Path) -> dict[str, Any]:
    """Values in the config.toml of a run; RunError if this is not a run folder."""
    if not is_run(path):
        raise RunError(f"{path} must be a run folder; it has no {MARKER} of nybble's")
    if not (path / CONFIG).is_file():
        raise RunError(f"{path} must be a whole run; its {CONFIG} is missing; bring it back, or make the run again")
    return read_toml(path / CONFIG)


def check_same(path: Path, options: Any) -> None:
    """Raise RunError, naming the option, unless these are the options of the run, but for what may change on resume."""
    before, now = read_options(path), tomllib.loads(to_toml(options))
    for key in sorted((before.keys() | now.keys()) - _FREE):
        if before.get(key) != now.get(key):
            raise RunError(
                f"--resume must use the options of the run {path}: --{key} was {before.get(key)}, got {now.get(key)}; "
                "give it as it was, or choose another --output_dir"
            )


def peak_memory() -> dict[str, int]:
    """Largest memory of this process so far, in bytes: "cpu" resident, "cuda" allocated."""
    peak = {"cpu": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)}
    if torch.cuda.is_available():
        peak["cuda"] = torch.cuda.max_memory_allocated()
    return peak


def hand_back_freed_memory() -> None:
    """glibc: hand freed pages back to the system. Between tensors that live on, a stage leaves holes in which the next one's tensors, of other sizes, find no
    room: without this, distilling takes a sixth more memory (docs/log.md)."""
    with suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def machine() -> dict[str, Any]:
    """Versions and hardware, for results.json and `nybble env`."""
    packages = (
        "nybble",
        "torch",
        "transformers",
        "accelerate",
        "datasets",
        "safetensors",
        "openvino",
        "openvino-tokenizers",
        "openvino-genai",
        "lm-eval",
        "gguf",
    )
    versions = {}
    for name in packages:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": versions,
    }


def check_disk(path: Path, needed: int) -> None:
    """Raise RunError unless `needed` bytes are free where `path` is, counting what an earlier sitting already wrote there."""
    existing = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free + sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    if needed > free:
        raise RunError(
            f"--output_dir {path} needs {needed / 1e9:.1f} GB for teacher states and checkpoints; {free / 1e9:.1f} GB are free; "
            "free some, choose another disk, or use less text"
        )


# --- the 4-bit model on disk ---------------------------------------------------------------------------------------------


WEIGHTS, FORMAT = "weights.safetensors", "nybble-1"


def other_tensors(model: Any, quantized: Iterable[str]) -> dict[str, Tensor]:
    """The model's tensors that are no weight of the layers `quantized`; a tied head, which repeats its embedding, is one."""
    state = model.state_dict()
    weights = {state[f"{name}.weight"].data_ptr() for name in quantized}
    return {key: value for key, value in state.items() if value.data_ptr() not in weights}


def save_quantized(folder: Path, model: Any, tokenizer: Any, quantized: dict[str, QuantizedWeight]) -> None:
    """Write a self-contained folder: codes (4-bit ones packed), scales, zeros, all other tensors as they are, configuration, tokenizer.

    Keys: NAME.weight.codes uint8, NAME.weight.scale float16 [O, G], NAME.weight.zero uint8 [O, G]; the header's note holds the grid by NAME.
    """
    from transformers.dynamic_module_utils import custom_object_save

    tensors = other_tensors(model, quantized)
    for name, weight in quantized.items():
        four = weight.grid.bits == 4
        tensors[f"{name}.weight.codes"] = pack_nibbles(weight.codes_OI) if four else weight.codes_OI
        tensors[f"{name}.weight.scale"] = weight.scale_OG.half()
        tensors[f"{name}.weight.zero"] = weight.zero_OG
    note = {"format": FORMAT, "grids": {name: asdict(weight.grid) for name, weight in quantized.items()}}
    with whole_folder(folder) as temporary:
        save_tensors(temporary / WEIGHTS, tensors, note)
        if model._auto_class is not None:  # Python code that came with the model
            custom_object_save(model, temporary, config=model.config)
        model.config.save_pretrained(temporary)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


def load_weights(folder: Path) -> tuple[dict[str, QuantizedWeight], dict[str, Tensor]]:
    """The tensors that `save_quantized` wrote: name -> codes, and all others."""
    tensors, note = load_tensors(folder / WEIGHTS)
    if note.get("format") != FORMAT:
        raise RunError(f"{folder / WEIGHTS} must be a 4-bit model that nybble wrote ({FORMAT}); it is something else")
    quantized = {}
    for name, fields in note["grids"].items():
        grid = Grid(**fields)
        codes, scale, zero = (tensors.pop(f"{name}.weight.{leaf}") for leaf in ("codes", "scale", "zero"))
        quantized[name] = QuantizedWeight(unpack_nibbles(codes) if grid.bits == 4 else codes, scale.float(), zero, grid)
    return quantized, tensors


def weights_fingerprint(folder: Path) -> str:
    """Short hash of the weights file of a 4-bit model."""
    with (folder / WEIGHTS).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def scale_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shape [O, G] of the scales of every layer that `save_quantized` wrote; reads no weights."""
    end = ".weight.scale"
    with _opened(folder / WEIGHTS) as file:
        return {key.removesuffix(end): tuple(file.get_slice(key).get_shape()) for key in file.keys() if key.endswith(end)}  # noqa: SIM118


def plain_tensors(folder: Path) -> set[str]:
    """Names of the tensors that `save_quantized` wrote as they were; reads no weights."""
    with _opened(folder / WEIGHTS) as file:
        return {key for key in file.keys() if not key.endswith((".weight.codes", ".weight.scale", ".weight.zero"))}  # noqa: SIM118


def load_config(folder: Path, trust_remote_code: bool) -> Any:
    """The configuration of a model that nybble wrote; RunError where it needs Python code that comes with it, and nobody allowed that."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise RunError(f"{folder} needs Python code that comes with the model; if you trust it, add --trust_remote_code") from error


def load_quantized(folder: Path, dtype: torch.dtype, trust_remote_code: bool = False) -> tuple[Any, Any, dict[str, QuantizedWeight]]:
    """What `save_quantized` wrote: (model with dequantized weights in `dtype`, tokenizer, name -> codes)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.initialization import no_init_weights

    config = load_config(folder, trust_remote_code)
    quantized, tensors = load_weights(folder)
    tensors = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    tensors |= {f"{name}.weight": weight.dequantize().to(dtype) for name, weight in quantized.items()}
    with no_init_weights():  # every weight is loaded; random starts would be made for nothing
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    missing, unknown = model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    embedding = model.get_input_embeddings().weight
    tied = {name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter is embedding and config.tie_word_embeddings}
    if set(missing) - tied or unknown:
        raise RunError(f"{folder} does not fit its config.json: missing {sorted(set(missing) - tied)[:3]}, unknown {list(unknown)[:3]}")
    return model.requires_grad_(False).eval(), AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code), quantized
