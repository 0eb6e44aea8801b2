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

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nybble.data import generate, packing, sources
from nybble.data.generate import PendingGeneration
from nybble.data.mixture import require_conversations
from nybble.data.packing import TokenRows, token_fingerprint
from nybble.data.reader import SourceReader
from nybble.data.request import TextRequest, evaluation_sources
from nybble.data.sampling import distinct_rows
from nybble.errors import DataError, OptionError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger("nybble")

# Prefixes of --data self:SOURCE have seq_len / 4 tokens: the model continues a text, and writes most of it itself.
_PREFIXES_PER_SEQUENCE = 4
# Sequences of another domain: enough to see whether what training gained on its own text was lost elsewhere.
_OTHER_SEQUENCES = 8
# More tokens than any model knows.
_ANY_TOKEN = 1 << 31


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


def prepare_text(request: TextRequest, tokenizer: PreTrainedTokenizerBase) -> TextData:
    """Read, tokenize and choose the text of a run.

    Args:
        request: what the run needs.
        tokenizer: of the model.

    Raises:
        DataError: a source cannot be read or is too short; conversations do not suit the chat template or
            --assistant_only_loss; a file of generated tokens does not suit the tokenizer.
        OptionError: the sources of --data or --eval_data contradict each other or other options.
        ModelError: --data self, and the tokenizer has no token to start from.
    """
    reader = SourceReader(request, tokenizer)
    pending = _pending_generation(request, reader)
    rows = no_rows() if pending else _training_rows(request, reader)
    train, calibration = rows[: request.num_train], rows.ids[: request.num_calibration]
    validation = no_rows()
    if request.num_validation:
        validation = _evaluation_rows(reader, "validation", request.num_validation)
    test = _evaluation_rows(reader, "test", request.num_test)
    others = _other_sources(request, reader)
    count = min(_OTHER_SEQUENCES, request.num_test or _OTHER_SEQUENCES)
    other = _other_rows(request, reader, others, count)
    # The training text of --data self is no input of the run, but its prefixes are.
    fingerprints = {} if pending else {"training text": train.ids, "calibration text": calibration}
    fingerprints |= {"validation text": validation.ids, "test text": test.ids}
    if len(other):
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
        other_source=" + ".join(others) if len(other) else "",
        pending=pending if pending and pending.count else None,
    )


def _other_sources(request: TextRequest, reader: SourceReader) -> list[str]:
    """The sources of --other_data that are neither trained on nor measured anyway; none for conversations."""
    if request.assistant_only:
        if any(name != sources.PYTHON_DOCS for name in request.other_data):
            log.warning("--other_data has no effect: with --assistant_only_loss only conversations are measured")
        return []
    known = {*reader.data.names, *reader.eval_data.names, *map(sources.prefix_source, reader.data.names)}
    return [name for name in request.other_data if name not in known]


def _other_rows(request: TextRequest, reader: SourceReader, names: Sequence[str], count: int) -> TokenRows:
    """Sequences of another domain; without them where the default source has none of this length."""
    if not names:
        return no_rows()
    try:
        each = -(-count // len(names))
        return TokenRows.cat([reader.other_rows(name, each)[:each] for name in names])
    except DataError:
        if tuple(names) != (sources.PYTHON_DOCS,):
            raise
    log.info("%s has no sequence of %d tokens, so only the test text is measured", names[0], request.seq_len)
    return no_rows()


def _pending_generation(request: TextRequest, reader: SourceReader) -> PendingGeneration | None:
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
    length = max(2, request.seq_len // _PREFIXES_PER_SEQUENCE)
    prefixes = reader.prefixes(prefix, length) if prefix and reader.num_training else None
    if prefixes is None:  # raises now what would raise after hours
        generate.first_tokens(_ANY_TOKEN, reader.tokenizer, 1, torch.Generator())
    return PendingGeneration(num_train, request.num_calibration, request.seq_len, request.seed, prefixes)


def _training_rows(request: TextRequest, reader: SourceReader) -> TokenRows:
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
        rows = reader.data.draw(reader.training_rows(label, minimum_each), count, request.seed)
    if len(rows) < minimum:
        raise packing.too_few_sequences(label, minimum, request.seq_len, f"{len(rows)} sequences")
    return rows


def _evaluation_rows(reader: SourceReader, split: str, count: int) -> TokenRows:
    """`count` sequences of a split of --eval_data; 0 means all."""
    return reader.eval_data.evaluation_rows(reader.evaluation_rows(split, count), count)
