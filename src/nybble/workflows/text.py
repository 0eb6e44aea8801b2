"""From --data and --eval_data to token sequences: those to train on, to calibrate with, to validate and to measure on."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nybble import files
from nybble.console import bar
from nybble.data import generate, packing, sources
from nybble.data import mixture as data_mixture
from nybble.data import splits as data_splits
from nybble.data.packing import TokenRows
from nybble.errors import DataError, OptionError
from nybble.models import loading
from nybble.options.commands import LEAST_CALIBRATION, CompressOptions, DistillOptions, TextOptions, TuneOptions
from nybble.run.folder import Run
from nybble.workflows.starts import steps_of

log = logging.getLogger("nybble")


@dataclass(frozen=True)
class Sequences:
    """Token sequences of the three splits; of the training text as many, chosen at random, as the run will train on, and calibrate with.

    `test_source` says in words what the test sequences are; `others` are fingerprints of what else the run reads.
    With --data self, those of the training text are on the device "meta", without values, until the model has written them; from `beginnings`, if it is to
    go on from those of a text.
    """

    train: TokenRows
    calibration: Tensor
    validation: TokenRows
    test: TokenRows
    test_source: str
    others: Mapping[str, str] = field(default_factory=dict)
    beginnings: Tensor | None = None


NO_ROWS = TokenRows.of(torch.empty(0, 8, dtype=torch.int64))


def sequences_of(
    options: CompressOptions | DistillOptions,
    loaded: loading.LoadedModel,
    method: str,
    train: int,
    least: int,
    validation: int,
) -> Sequences:
    """Cut the text: `train` sequences of the training split (or all there are), and those to calibrate with; chosen at random by the seed, so that few
    see all parts of it. The first of the one are the first of the other.

    Raises:
        DataError: the training text gives fewer than `least`, or too few to calibrate with.
        OptionError: sources or shares that contradict each other.
    """
    mixture, tokenizer = data_mixture.Mixture.parse(options.data), loaded.tokenizer
    own = next((source for source in map(sources.written_from, mixture.names) if source is not None), None)
    to_train = mixture.names if not own else [own]
    evaluated = data_mixture.Mixture.parse(_evaluated(options))
    for name in mixture.names:  # also where nothing of them is used (rtn), and the text to measure on would be another
        if Path(name).suffix == Path(generate.GENERATED_FILE).suffix and not Path(name).is_file():
            raise DataError(
                f"--data {name} must be a file of tokens that --data self wrote; there is nothing at this path"
            )

    @functools.cache
    def texts_of(name: str) -> data_splits.Texts:
        held = ("validation", "test") if validation else ("test",)
        splits = ("train",) * (name in to_train and wanted > 0) + held * (name in evaluated.names)
        try:
            return sources.load_texts(name, options.data_column, options.data_dir, splits)
        except DataError as error:
            if name in to_train:
                raise
            raise DataError(str(error).replace("--data ", "--eval_data ", 1)) from error

    def rows_of(name: str, split: str, what: str, minimum: int = 1) -> TokenRows:
        """All sequences of a split of one source."""
        if Path(name).suffix == Path(generate.GENERATED_FILE).suffix:
            if split != "train":
                raise OptionError(f"--data {name} holds no {split} text; name a source of it by --eval_data")
            return TokenRows.of(generate.read_generated(Path(name), tokenizer, options.seq_len))
        try:
            return packing.pack_documents(
                tokenizer, texts_of(name)[split], options.seq_len, what, minimum, options.loss_on == "assistant"
            )
        except DataError as error:
            alone = len(mixture.names) == len(evaluated.names) == 1 or f"data {name} " in str(error)  # named already
            raise error if alone else DataError(f"{name}: {error}") from error

    def documents_of(name: str, split: str) -> Sequence[data_splits.Document]:
        """The texts of a split of one source; none where it holds tokens."""
        return () if Path(name).suffix == Path(generate.GENERATED_FILE).suffix else texts_of(name)[split]

    calibrate = options.calib_samples if steps_of(method) else 0
    wanted = max(train, calibrate)
    beginnings = None
    if own is not None:
        if f"{sources.SELF}:" in mixture.names:
            raise OptionError(
                "--data self:SOURCE must name a text to go on from; got self: with none; to write from nothing, use --data self"
            )
        if len(mixture.names) > 1:
            raise OptionError(
                "what the model writes must stand alone in --data; to mix, let one run write it, then name that run's self.safetensors"
            )
        if options.loss_on == "assistant":
            raise OptionError(
                "--loss_on assistant is for conversations, and what the model writes (--data self) is plain text; use --loss_on all"
            )
        beginnings = _beginnings(tokenizer, texts_of(own)["train"], options.seq_len) if own and wanted else None
        if beginnings is None:
            generate.first_tokens(loaded.model, tokenizer, 1, torch.Generator())
        train = min(train, getattr(options, "samples", 0))  # every epoch repeats these
        rows = TokenRows(
            *(
                torch.empty(max(getattr(options, "samples", 0), calibrate), options.seq_len, dtype=kind, device="meta")
                for kind in (torch.int64, torch.bool)
            )
        )
    else:
        if options.loss_on == "assistant":
            split, names = ("train", mixture.names) if wanted else ("test", evaluated.names)
            data_mixture.check_conversations({name: documents_of(name, split) for name in names})
        what, minimum = "training" if train else "calibration", max(least, LEAST_CALIBRATION if calibrate else 0)
        alone = minimum if len(mixture.names) == 1 else 1
        rows = (
            mixture.mix([rows_of(name, "train", what, alone) for name in mixture.names], wanted, options.seed)
            if wanted
            else NO_ROWS
        )
        if len(rows) < minimum:
            raise packing.too_few(what, minimum, options.seq_len, len(rows))

    def held(split: str, count: int) -> TokenRows:
        return evaluated.first([rows_of(name, split, split) for name in evaluated.names], count)

    validated = held("validation", validation) if validation else NO_ROWS
    source = f"the test split of {' + '.join(_evaluated(options))}"
    others = {} if beginnings is None else {"beginnings": packing.token_fingerprint(beginnings, "")}
    return Sequences(
        rows[:train], rows.ids[:calibrate], validated, held("test", options.test_samples), source, others, beginnings
    )


def _beginnings(tokenizer: Any, documents: Sequence[data_splits.Document], length: int) -> Tensor:
    """What the model goes on from: all pieces of a text of a quarter of a sequence's length."""
    if not all(isinstance(document, str) for document in documents):
        raise DataError("--data self:SOURCE needs plain text to go on from; it has conversations; use --data SOURCE")
    return packing.pack_documents(tokenizer, documents, max(2, length // 4), "training").ids


def _evaluated(options: TextOptions) -> tuple[str, ...]:
    """Sources of validation and test text."""
    names = data_mixture.Mixture.parse(options.data).names
    gone_on_from = tuple(filter(None, map(sources.written_from, names)))
    written = all(
        sources.written_from(name) is not None or Path(name).suffix == Path(generate.GENERATED_FILE).suffix
        for name in names
    )
    return options.eval_data or gone_on_from or ((sources.PYTHON_DOCS,) if written else options.data)


def written(
    run: Run, options: CompressOptions | DistillOptions | TuneOptions, loaded: loading.LoadedModel, sequences: Sequences
) -> Sequences:
    """With --data self: let the model write what it is trained on."""
    count = max(len(sequences.train), len(sequences.calibration))
    if not count or sequences.calibration.device.type != "meta":
        return sequences
    device = loaded.model.device
    gpu_memory = (
        torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
    )  # not what is free: the batch decides what is written
    batch = min(
        count, generate.generation_batch(loaded.model.config, options.seq_len, loaded.model.dtype.itemsize, gpu_memory)
    )
    try:
        with run.stage("write"), bar("write", count) as advance:
            path, seed, beginnings = run.path / generate.GENERATED_FILE, options.seed, sequences.beginnings
            ids = generate.generate_sequences(
                path, loaded.model, loaded.tokenizer, count, options.seq_len, seed, batch, advance, beginnings
            )
    except DataError:  # the model cannot write, so there is no run
        if not run.results["models"]:
            files.remove_folder(run.path)
        raise
    log.info(
        "the model wrote %d sequences of %d tokens: %s", count, options.seq_len, run.path / generate.GENERATED_FILE
    )
    return replace(
        sequences, train=TokenRows.of(ids[: len(sequences.train)]), calibration=ids[: len(sequences.calibration)]
    )
