"""SourceReader: the sources that a run names, read once, and cut into sequences."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from nybble.data import generate, packing, sources
from nybble.data.excerpt import count_characters, draw_documents, first_documents, share_for
from nybble.data.mixture import Mixture
from nybble.data.packing import TokenRows
from nybble.data.request import TextRequest, evaluation_sources
from nybble.data.splits import Document, DocumentSplits
from nybble.errors import DataError, OptionError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger("nybble")

# By how much the part of a source grows if it gives too few sequences.
_GROWTH = 4


class SourceReader:
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

    def training_rows(self, label: str, minimum: int = 1) -> list[TokenRows]:
        """Sequences of the training split of each source of --data. `label` names the split in error messages."""
        return self._mixed_rows(self.data, "train", label, self.num_training, minimum)

    def evaluation_rows(self, split: str, count: int) -> list[TokenRows]:
        """Sequences of a split of each source of --eval_data, enough to choose `count` from; 0 means all."""
        return self._mixed_rows(self.eval_data, split, split, count)

    def other_rows(self, name: str, count: int) -> TokenRows:
        """Test sequences of a source of --other_data, at least `count` if it has as many."""
        request, option = self.request, "--other_data"
        found = sources.load_documents(name, request.text_column, request.data_dir, ("test",), option, option).test

        def cut(share: float) -> list[TokenRows]:
            part, label = first_documents(found, share), f"test ({option} {name})"
            return [self._pack(part, request.seq_len, label, int(share >= 1))]

        return _enough(cut, share_for(count_characters(found), count * request.seq_len), count)[0]

    def prefixes(self, name: str, length: int) -> Tensor:
        """Pieces [N, length] of the training text of a source, for the model to continue; one for every sequence, if it
        has as many.
        """
        found, count = self.documents(name).train, self.num_training
        if not all(isinstance(document, str) for document in found):
            raise DataError(
                f"--data self:{name} must name plain text for the model to continue; {name} has conversations; "
                f"use --data {name}"
            )

        def cut(share: float) -> list[TokenRows]:
            return [self._pack(self._drawn(name, found, share, "training"), length, "training", int(share >= 1))]

        return _enough(cut, share_for(count_characters(found), count * length), count)[0].ids

    def _mixed_rows(self, mixture: Mixture, split: str, label: str, count: int, minimum: int = 1) -> list[TokenRows]:
        """Sequences of a split of each source of a mixture, enough to choose `count` from; 0 means all.

        Without shares all sequences have the same chance, so the same part is taken of each source.
        """
        together = [[name] for name in mixture.names] if mixture.shares else [list(mixture.names)]

        def cut(names: Sequence[str], share: float) -> list[TokenRows]:
            return [self._rows(name, split, label, share, minimum if share >= 1 else 0) for name in names]

        return [
            rows for names in together for rows in _enough(partial(cut, names), self._share(names, split, count), count)
        ]

    def _share(self, names: Sequence[str], split: str, count: int) -> float:
        """The share of some sources that is likely to give `count` sequences; 0 sequences mean all."""
        if not count or any(map(generate.is_token_file, names)):
            return 1.0
        characters = sum(count_characters(self.documents(name)[split]) for name in names)
        return share_for(characters, count * self.request.seq_len)

    def _rows(self, name: str, split: str, label: str, share: float, minimum: int) -> TokenRows:
        """Sequences of a share of a split: of documents drawn by the seed to train on, of the first ones to measure."""
        if generate.is_token_file(name):
            if split != "train":
                raise OptionError(
                    f"{name} holds generated tokens and no {split} text; name a source of it with --eval_data"
                )
            return TokenRows.of(generate.read_generated(Path(name), self.tokenizer, self.request.seq_len))
        found = self.documents(name)[split]
        taken = self._drawn(name, found, share, label) if split == "train" else first_documents(found, share)
        try:
            return self._pack(taken, self.request.seq_len, label, minimum)
        except DataError as error:
            if len(self.data.names) == len(self.eval_data.names) == 1:
                raise
            raise DataError(f"{name}: {error}") from error

    def _drawn(self, name: str, documents: Sequence[Document], share: float, label: str) -> Sequence[Document]:
        """A share of the training documents of a source, drawn by the seed; says so where it is not all of them."""
        chosen = draw_documents(documents, share, self.request.seed)
        if len(chosen) < len(documents):
            log.info(
                "%s: %d of %d %s documents are used, drawn by the seed; the run needs no more",
                name, len(chosen), len(documents), label,
            )  # fmt: skip
        return chosen

    def _pack(self, documents: Sequence[Document], length: int, label: str, minimum: int) -> TokenRows:
        assistant_only = self.request.assistant_only
        return packing.pack_documents(self.tokenizer, documents, length, label, minimum, assistant_only)


def _enough(cut: Callable[[float], list[TokenRows]], share: float, count: int) -> list[TokenRows]:
    """Sequences of a share of a text, or of a larger one if they are fewer than `count` together.

    Args:
        cut: share of the text -> sequences of each of its sources.
        share: at first; 1 means all.
        count: sequences that are needed.

    Raises:
        DataError: what `cut` raises for the whole text.
    """
    while True:
        try:
            parts = cut(share)
        except DataError:  # a part may lack what the whole has, such as conversations that are short enough
            if share >= 1:
                raise
            parts = []
        if share >= 1 or sum(map(len, parts)) >= count:
            return parts
        share *= _GROWTH
