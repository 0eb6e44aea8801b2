"""Token sequences for one run: to train on, to calibrate with, to validate and to measure on.

    --data        training and calibration sequences, chosen at random by the seed. The calibration sequences are the
                  first ones of the same random choice.
    --eval_data   validation and test sequences, the same for every seed. Default: --data; for `--data self:SOURCE`
                  SOURCE; for `--data self` and files of generated tokens python-docs.

With `--data self` the training sequences do not exist before the run does. They are then pending: `TextData.pending`
says what to generate, and `TextData.with_generated` puts the result into its place.

Everything that can be wrong with the text raises here, before anything expensive starts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nybble.data import generate, packing, sources
from nybble.data.generate import PendingGeneration
from nybble.data.mixture import Mixture, require_conversations
from nybble.data.packing import TokenRows, token_fingerprint
from nybble.data.sampling import distinct_rows
from nybble.data.splits import DocumentSplits
from nybble.errors import DataError, OptionError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Prefixes of --data self:SOURCE have seq_len / 4 tokens: the model continues a text, and writes most of it itself.
_PREFIXES_PER_SEQUENCE = 4
# Sequences of another domain: enough to see whether what training gained on its own text was lost elsewhere.
_OTHER_SEQUENCES = 8


@dataclass(frozen=True, kw_only=True)
class TextRequest:
    """What a run needs of its text.

    Attributes:
        data: sources of training text, NAME or NAME=SHARE (--data).
        eval_data: sources of validation and test text; () means the default of the head of this file (--eval_data).
        other_data: sources of text of another domain (--other_data).
        text_column: column of row-wise data (--text_column).
        data_dir: folder with local copies of data sets, or None (--data_dir).
        seq_len: tokens per sequence, at least 8 (--seq_len).
        assistant_only: train on and measure the assistant messages of conversations only (--assistant_only_loss).
        num_train: training sequences to draw, over all epochs; 0 if nothing is trained.
        num_generated: training sequences to generate with --data self; every epoch uses the same ones.
        num_calibration: calibration sequences; 0 if the method needs none.
        num_validation: validation sequences; 0 if nothing is validated.
        num_test: test sequences; 0 means all.
        min_train: fewest training sequences.
        min_calibration: fewest calibration sequences, where any are needed.
        seed: of the choice and order of training sequences, and of generation.
    """

    data: tuple[str, ...]
    eval_data: tuple[str, ...]
    other_data: tuple[str, ...]
    text_column: str
    data_dir: str | None
    seq_len: int
    assistant_only: bool
    num_train: int
    num_generated: int
    num_calibration: int
    num_validation: int
    num_test: int
    min_train: int
    min_calibration: int
    seed: int


def no_rows() -> TokenRows:
    """No sequences, where a run has none of a kind."""
    return TokenRows.of(torch.empty(0, 8, dtype=torch.int64))


@dataclass(frozen=True)
class TextData:
    """Token sequences of a run.

    Attributes:
        train: sequences to train on; none while they are pending.
        calibration: [S, T], int64; none while they are pending.
        validation: sequences that choose the best step.
        test: sequences that are measured.
        test_source: what the test sequences are, in words.
        fingerprints: what -> short hash, of everything that was read; a resumed run must find the same.
        other: sequences of another domain, which are measured too; may be none.
        other_source: what these are, in words.
        pending: the training and calibration sequences that the model has still to generate, or None.
    """

    train: TokenRows
    calibration: Tensor
    validation: TokenRows
    test: TokenRows
    test_source: str
    fingerprints: Mapping[str, str]
    other: TokenRows = field(default_factory=no_rows)
    other_source: str = ""
    pending: PendingGeneration | None = None

    @property
    def num_train(self) -> int:
        """Training sequences, generated or pending."""
        return self.pending.num_train if self.pending else len(self.train)

    @property
    def num_distinct_train(self) -> int:
        """Distinct training sequences; a small source of a mixture gives some of them several times."""
        return self.pending.num_train if self.pending else len(distinct_rows(self.train.ids)[0])

    @property
    def calibration_shape(self) -> tuple[int, int]:
        """(S, T) of the calibration sequences, generated or pending."""
        if self.pending:
            return self.pending.num_calibration, self.pending.seq_len
        return len(self.calibration), self.calibration.shape[1]

    def measured(self) -> dict[str, TokenRows]:
        """Split -> the sequences that every model is measured on."""
        return {"test": self.test} | ({"other": self.other} if len(self.other) else {})

    def with_generated(self, ids: Tensor) -> TextData:
        """The same data with the pending sequences in their place.

        Args:
            ids: [pending.count, pending.seq_len], int64, of `generate.generate_pending`.
        """
        assert self.pending is not None, "nothing is pending"
        train, calibration = ids[: self.pending.num_train], ids[: self.pending.num_calibration]
        return replace(self, train=TokenRows.of(train), calibration=calibration, pending=None)


def prepare_text(request: TextRequest, tokenizer: PreTrainedTokenizerBase, num_embeddings: int) -> TextData:
    """Read, tokenize and choose the text of a run.

    Args:
        request: what the run needs.
        tokenizer: of the model.
        num_embeddings: tokens that the model knows.

    Raises:
        DataError: a source cannot be read or is too short; conversations do not suit the chat template or
            --assistant_only_loss; a file of generated tokens does not suit the tokenizer.
        OptionError: the sources of --data or --eval_data contradict each other or other options.
        ModelError: --data self, and the tokenizer has no token to start from.
    """
    reader = _SourceReader(request, tokenizer)
    pending = _pending_generation(request, reader, num_embeddings)
    rows = no_rows() if pending else _training_rows(request, reader)
    train, calibration = rows[: request.num_train], rows.ids[: request.num_calibration]
    validation = no_rows()
    if request.num_validation:
        validation = _evaluation_rows(reader, "validation", request.num_validation)
    test = _evaluation_rows(reader, "test", request.num_test)
    others = _other_sources(request, reader)
    other = TokenRows.cat([reader.other_rows(name) for name in others]) if others else no_rows()
    other = other[: min(_OTHER_SEQUENCES, request.num_test or _OTHER_SEQUENCES)]
    # The training text of --data self is no input of the run, but its prefixes are.
    fingerprints = {} if pending else {"training text": train.ids, "calibration text": calibration}
    fingerprints |= {"validation text": validation.ids, "test text": test.ids}
    if others:
        fingerprints["text of another domain"] = other.ids
    if pending and pending.prefixes is not None:
        fingerprints["prefixes"] = pending.prefixes
    return TextData(
        train=train,
        calibration=calibration,
        validation=validation,
        test=test,
        test_source=f"the test split of {' + '.join(evaluation_sources(request.data, request.eval_data))}",
        fingerprints={what: token_fingerprint(ids, "") for what, ids in fingerprints.items()},
        other=other,
        other_source=" + ".join(others),
        pending=pending if pending and pending.count else None,
    )


def evaluation_sources(data: Sequence[str], eval_data: Sequence[str]) -> tuple[str, ...]:
    """The sources of validation and test text, NAME or NAME=SHARE, with the default of --eval_data resolved.

    Raises:
        OptionError: see `Mixture.parse`.
    """
    if eval_data:
        return tuple(eval_data)
    names = Mixture.parse(data).names
    prefixed = tuple(source for source in map(sources.prefix_source, names) if source)
    if prefixed:
        return prefixed
    if all(sources.prefix_source(name) is not None or generate.is_token_file(name) for name in names):
        return (sources.PYTHON_DOCS,)
    return tuple(data)


def _other_sources(request: TextRequest, reader: _SourceReader) -> list[str]:
    """The sources of --other_data that are neither trained on nor measured anyway; none for conversations."""
    if request.assistant_only:
        return []
    known = {*reader.data.names, *reader.eval_data.names, *map(sources.prefix_source, reader.data.names)}
    return [name for name in request.other_data if name not in known]


class _SourceReader:
    """Reads the sources of a request, each once.

    Args:
        request: the request.
        tokenizer: of the model.

    Attributes:
        data: the sources of --data.
        eval_data: the sources of --eval_data.
    """

    def __init__(self, request: TextRequest, tokenizer: PreTrainedTokenizerBase) -> None:
        self.request, self.tokenizer = request, tokenizer
        self.data = Mixture.parse(request.data)
        self.eval_data = Mixture.parse(evaluation_sources(request.data, request.eval_data), "--eval_data")
        for name in self.data.names:  # checked even where no training text is read: it decides what is measured
            if generate.is_token_file(name) and not Path(name).is_file():
                raise DataError(
                    f"--data {name} must be a file of tokens that --data self generated; there is no such file"
                )
        # Where training text is read from; for self:SOURCE it is SOURCE.
        self._training = [sources.prefix_source(name) or name for name in self.data.names]
        self._loaded: dict[str, DocumentSplits] = {}

    @property
    def num_training(self) -> int:
        """Training sequences that are read, to train on and to calibrate with."""
        return max(self.request.num_train, self.request.num_calibration)

    def documents(self, name: str) -> DocumentSplits:
        """The documents of a source; no splits are required that the run does not use."""
        if name not in self._loaded:
            request = self.request
            wanted = ["train"] if name in self._training and self.num_training else []
            if name in self.eval_data.names:
                wanted += ["validation", "test"] if request.num_validation else ["test"]
            option = "--data" if name in self._training else "--eval_data"
            self._loaded[name] = sources.load_documents(name, request.text_column, request.data_dir, wanted, option)
        return self._loaded[name]

    def rows(self, name: str, split: str, label: str, minimum: int = 1) -> TokenRows:
        """All sequences of a split of a source. `label` names the split in error messages."""
        request = self.request
        if generate.is_token_file(name):
            if split != "train":
                raise OptionError(
                    f"{name} holds generated tokens and no {split} text; name a source of it with --eval_data"
                )
            return TokenRows.of(generate.read_generated(Path(name), self.tokenizer, request.seq_len))
        documents = self.documents(name)[split]
        try:
            return packing.pack_documents(
                self.tokenizer, documents, request.seq_len, label, minimum, request.assistant_only
            )
        except DataError as error:
            if len(self.data.names) == len(self.eval_data.names) == 1:
                raise
            raise DataError(f"{name}: {error}") from error

    def other_rows(self, name: str) -> TokenRows:
        """All test sequences of a source of --other_data."""
        request = self.request
        option = "--other_data"
        found = sources.load_documents(name, request.text_column, request.data_dir, ("test",), option, option)
        return packing.pack_documents(self.tokenizer, found.test, request.seq_len, f"test ({name})")


def _pending_generation(request: TextRequest, reader: _SourceReader, num_embeddings: int) -> PendingGeneration | None:
    """What the model has to generate; None if --data names existing text."""
    names = reader.data.names
    prefix = next((source for source in map(sources.prefix_source, names) if source is not None), None)
    if prefix is None:
        return None
    if f"{sources.SELF}:" in names:
        raise OptionError(
            "--data self:SOURCE must name the text that the model continues; got self: without one; "
            "to generate without a text, use --data self"
        )
    if len(names) > 1:
        raise OptionError(
            f"--data self must be the only source; got {' '.join(request.data)}; to mix, generate the text in one run "
            "and name its self.safetensors in another"
        )
    if request.assistant_only:
        raise OptionError(
            "--assistant_only_loss is for conversations; the text that --data self generates is plain text; "
            "leave out --assistant_only_loss"
        )
    num_train = min(request.num_train, request.num_generated)
    prefixes = _prefixes(reader, prefix) if prefix and reader.num_training else None
    if prefixes is None:  # raises now what would raise after hours
        generate.first_tokens(num_embeddings, reader.tokenizer, 1, torch.Generator())
    return PendingGeneration(num_train, request.num_calibration, request.seq_len, request.seed, prefixes)


def _prefixes(reader: _SourceReader, name: str) -> Tensor:
    """All pieces of the training text of a source: [N, P], int64, P = seq_len / 4."""
    documents = reader.documents(name).train
    if not all(isinstance(document, str) for document in documents):
        raise DataError(
            f"--data self:{name} must name plain text for the model to continue; {name} has conversations; "
            f"use --data {name}"
        )
    length = max(2, reader.request.seq_len // _PREFIXES_PER_SEQUENCE)
    return packing.pack_documents(reader.tokenizer, documents, length, "training").ids


def _training_rows(request: TextRequest, reader: _SourceReader) -> TokenRows:
    """The sequences to train on and to calibrate with, drawn from the sources of --data."""
    names, count = reader.data.names, reader.num_training
    if request.assistant_only:
        split, checked = ("train", names) if count else ("test", reader.eval_data.names)
        require_conversations(
            {name: () if generate.is_token_file(name) else reader.documents(name)[split] for name in checked}
        )
    label = "training" if request.num_train else "calibration"
    minimum = max(request.min_train, request.min_calibration if request.num_calibration else 0)
    minimum_each = minimum if len(names) == 1 else 1
    rows = no_rows()
    if count:
        parts = [reader.rows(name, "train", label, minimum_each) for name in names]
        rows = reader.data.draw(parts, count, request.seed)
    if len(rows) < minimum:
        raise packing.too_few_sequences(label, minimum, request.seq_len, f"{len(rows)} sequences")
    return rows


def _evaluation_rows(reader: _SourceReader, split: str, count: int) -> TokenRows:
    """`count` sequences of a split of --eval_data; 0 means all."""
    parts = [reader.rows(name, split, split) for name in reader.eval_data.names]
    return reader.eval_data.evaluation_rows(parts, count)
