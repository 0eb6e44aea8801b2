"""Several sources, mixed by share."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nybble.data.packing import TokenRows
from nybble.data.sampling import draw_order
from nybble.data.splits import Document
from nybble.errors import DataError, OptionError

log = logging.getLogger("nybble")


@dataclass(frozen=True)
class Mixture:
    """What `--data` names: sources, and their shares or None.

    Raises:
        OptionError: a share that is not a positive number, on some sources only, or a source named twice.
    """

    names: Sequence[str]
    shares: Sequence[float] | None = None

    @staticmethod
    def parse(entries: Sequence[str]) -> Mixture:
        """["wikitext2=0.7", "chat.jsonl=0.3"]."""
        if not entries:
            raise OptionError("--data must name at least one source")
        parts = [
            entry.rpartition("=") if "=" in entry and not Path(entry).exists() else (entry, "", "") for entry in entries
        ]
        names, shares = [part[0] for part in parts], [part[2] for part in parts]
        if not all(name.strip() for name in names):
            raise OptionError(f"--data must name every source; got {' '.join(entries) or 'an empty name'}")
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice:
            raise OptionError(f"--data must name every source once; got {twice[0]} more than once")
        if not any(shares):
            return Mixture(names)
        try:
            numbers = [float(share) for share in shares]
        except ValueError:
            numbers = []
        if not numbers or not all(0 < number < float("inf") for number in numbers):
            raise OptionError(
                f"--data must be NAME=SHARE for every source, with shares above 0, or no shares at all; got {' '.join(entries)}"
            )
        return Mixture(names, numbers)

    def most(self, parts: Sequence[TokenRows]) -> int:
        """As many rows as `mix` can draw without giving any twice."""
        if self.shares is None:
            return sum(map(len, parts))
        return int(min(len(part) * sum(self.shares) / share for part, share in zip(parts, self.shares, strict=True)))

    def first(self, parts: Sequence[TokenRows], count: int) -> TokenRows:
        """`count` rows to measure on (0 = all), none of them twice: the first ones of a single source, of several drawn at random, always the same ones."""
        return (
            parts[0][: count or None]
            if len(parts) == 1
            else self.mix(parts, min(count or self.most(parts), self.most(parts)), 0)
        )

    def mix(self, parts: Sequence[TokenRows], wanted: int, seed: int) -> TokenRows:
        """Draw `wanted` rows at random: by share (a part with too few gives some again), or without shares from all alike (never again)."""
        if self.shares is None:
            rows = TokenRows.cat(parts)
            return rows[draw_order(len(rows), min(len(rows), wanted), seed)]
        exact = [wanted * share / sum(self.shares) for share in self.shares]
        counts = [int(sum(exact[: i + 1]) + 0.5) - int(sum(exact[:i]) + 0.5) for i in range(len(exact))]
        for name, part, count in zip(self.names, parts, counts, strict=True):
            if count > len(part):
                log.warning(
                    "--data %s has %d sequences and its share asks for %d of them; some are used again",
                    name,
                    len(part),
                    count,
                )
        drawn = TokenRows.cat(
            [part[draw_order(len(part), count, seed)] for part, count in zip(parts, counts, strict=True) if count]
        )
        return drawn[draw_order(len(drawn), len(drawn), seed)]


def check_conversations(sources: Mapping[str, Sequence[Document]]) -> None:
    """Raise DataError for --loss_on assistant where no source has conversations."""
    if all(isinstance(document, str) for documents in sources.values() for document in documents):
        raise DataError(
            f"--loss_on assistant needs conversations (rows with messages, or another column named by --data_column); {' and '.join(sources)} "
            f"{'is' if len(sources) == 1 else 'are'} plain text; use --loss_on all"
        )
