"""TextRequest: what a run needs of its text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nybble.data import generate, sources
from nybble.data.mixture import Mixture


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
