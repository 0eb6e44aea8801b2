"""What --data names: one source, or several that are mixed by share.

--data a=3 b=1      three quarters of the training sequences come from a, one quarter from b
--data a b          all sequences of both, each with the same chance
"""

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
    """Sources and their shares. Create it with `Mixture.parse`.

    Attributes:
        names: the sources.
        shares: a positive number for each source, of any sum; or None.
    """

    names: Sequence[str]
    shares: Sequence[float] | None = None

    @staticmethod
    def parse(entries: Sequence[str], option: str = "--data") -> Mixture:
        """Parse ["wikitext2=0.7", "chat.jsonl=0.3"].

        An entry with "=" that is the path of an existing file or folder is a name without a share.

        Args:
            entries: the values of the option.
            option: its name, for error messages.

        Raises:
            OptionError: there is no source, an empty name, or a source named twice; a share is not a positive number;
                some sources have a share and others have none.
        """
        if not entries:
            raise OptionError(f"{option} must name at least one source; got none; name a file, a folder or a data set")
        pairs = [entry.rpartition("=")[::2] if _has_share(entry) else (entry, "") for entry in entries]
        names, shares = [name for name, _ in pairs], [share for _, share in pairs]
        if not all(name.strip() for name in names):
            raise OptionError(
                f"{option} must name every source; got {' '.join(entries) or 'an empty name'}; write NAME or NAME=SHARE"
            )
        repeated = [name for name, count in Counter(names).items() if count > 1]
        if repeated:
            raise OptionError(f"{option} must name every source once; got {repeated[0]} more than once; name it once")
        if not any(shares):
            return Mixture(names)
        try:
            numbers = [float(share) for share in shares]
        except ValueError:
            numbers = []
        if not numbers or not all(0 < number < float("inf") for number in numbers):
            raise OptionError(
                f"{option} must be NAME=SHARE for every source, with shares above 0, or NAME for every source; "
                f"got {' '.join(entries)}; give every source a share, or none"
            )
        return Mixture(names, numbers)

    def max_distinct(self, parts: Sequence[TokenRows]) -> int:
        """The largest number of rows that can be drawn by share without drawing a row twice."""
        if self.shares is None:
            return sum(map(len, parts))
        return int(min(len(part) * sum(self.shares) / share for part, share in zip(parts, self.shares, strict=True)))

    def evaluation_rows(self, parts: Sequence[TokenRows], count: int) -> TokenRows:
        """Choose rows to measure on, none of them twice and always the same ones.

        Of one source, they are the first ones. Of several, they are drawn by share with a fixed seed.

        Args:
            parts: the rows of each source.
            count: number of rows; 0 means all. There are fewer if there are not enough rows.
        """
        if len(parts) == 1:
            return parts[0][: count or None]
        most = self.max_distinct(parts)
        wanted = min(count or sum(map(len, parts)), sum(map(len, parts)))
        if most < wanted / 2:
            fewest = min(range(len(parts)), key=lambda i: len(parts[i]) / (self.shares[i] if self.shares else 1))
            log.warning(
                "only %d of %d sequences are measured on: %s has %d, and none is used twice; --eval_data names others",
                most, wanted, self.names[fewest], len(parts[fewest]),
            )  # fmt: skip
        return self.draw(parts, min(count or most, most), 0)

    def draw(self, parts: Sequence[TokenRows], wanted: int, seed: int) -> TokenRows:
        """Draw rows to train on, in random order.

        With shares, each source gives its share, and a source with too few rows gives some of them again. Without
        shares, all rows have the same chance, and none is drawn twice.

        Args:
            parts: the rows of each source, at least one row each.
            wanted: number of rows, at least 1. Without shares there are fewer if there are not enough rows.
            seed: of the choice and the order.
        """
        if self.shares is None:
            rows = TokenRows.cat(parts)
            return rows[draw_order(len(rows), min(len(rows), wanted), seed)]
        # The rounded cumulated shares differ by the rounded shares, and they end at `wanted` exactly.
        exact = [wanted * share / sum(self.shares) for share in self.shares]
        counts = [int(sum(exact[: i + 1]) + 0.5) - int(sum(exact[:i]) + 0.5) for i in range(len(exact))]
        for name, part, count in zip(self.names, parts, counts, strict=True):
            if count > len(part):
                log.warning(
                    "--data %s has %d sequences and its share asks for %d; some are used more than once",
                    name, len(part), count,
                )  # fmt: skip
        drawn = TokenRows.cat(
            [part[draw_order(len(part), count, seed)] for part, count in zip(parts, counts, strict=True) if count]
        )
        return drawn[draw_order(len(drawn), len(drawn), seed)]


def _has_share(entry: str) -> bool:
    return "=" in entry and not Path(entry).exists()


def require_conversations(documents: Mapping[str, Sequence[Document]]) -> None:
    """Check that --assistant_only_loss has something to act on.

    Args:
        documents: the documents of each source, by its name.

    Raises:
        DataError: no source has conversations.
    """
    if all(isinstance(document, str) for part in documents.values() for document in part):
        raise DataError(
            "--assistant_only_loss needs conversations (rows with messages, or another column named by --text_column); "
            f"{' and '.join(documents)} {'is' if len(documents) == 1 else 'are'} plain text; "
            "leave out --assistant_only_loss"
        )
