"""What must be reached, and whether it was: arithmetic on the outcomes of one run, nothing is timed here."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from qnative.bench import OURS, Outcome

#: Share of the vpdpbusd limit by the least number of rows, largest first.
LIMIT_SHARES = ((128, 0.92), (32, 0.88), (8, 0.80))


@dataclass(frozen=True)
class Verdict:
    """One target: what was wanted and what was seen.

    Attributes
    ----------
    target : str
        Its number, such as "S1".
    what : str
        What was measured.
    wanted, seen : float
        In the same unit.
    at_most : bool
        Whether `seen` must be at most `wanted`; at least, if not.
    """

    target: str
    what: str
    wanted: float
    seen: float
    at_most: bool = False

    @property
    def ratio(self) -> float:
        """How far it is: 1 or more is met, whichever way the target is meant."""
        return self.wanted / self.seen if self.at_most else self.seen / self.wanted

    @property
    def met(self) -> bool:
        """Whether the target is reached."""
        return self.ratio >= 1

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON can hold."""
        return {
            "target": self.target,
            "what": self.what,
            "wanted": self.wanted,
            "at_most": self.at_most,
            "seen": self.seen,
            "ratio": self.ratio,
            "met": self.met,
        }

    def row(self) -> dict[str, Any]:
        """Return a row of the table that people read."""
        return {
            "target": self.target,
            "what": self.what,
            "wanted": f"{'<=' if self.at_most else '>='} {self.wanted:.4g}",
            "seen": f"{self.seen:.4g}",
            "seen / wanted": f"{self.seen / self.wanted:.3f}",
            "met": "yes" if self.met else "NO",
        }


def rows_of(name: str) -> int:
    """Return M of a case's name, "M,K,N" and what may follow."""
    return int(name.split(",")[0])


def peers(outcomes: Sequence[Outcome]) -> Iterator[Verdict]:
    """S1: the best dynamic peer at every row, 1.2 times it in the mean, 0.97 of the best integer product."""
    ratios = []
    for outcome in outcomes:
        best = outcome.best("dynamic")
        if best is not None:
            ratios.append(outcome.ratio(OURS, best))
            yield Verdict("S1", f"{outcome.name}: times the speed of {best}", 1.0, ratios[-1])
    if ratios:
        yield Verdict("S1", "geometric mean of these", 1.2, statistics.geometric_mean(ratios))
    for outcome in outcomes:
        best = outcome.best("integer")
        if best is not None and rows_of(outcome.name) >= 8:
            yield Verdict("S1", f"{outcome.name}: times the speed of {best}", 0.97, outcome.ratio(OURS, best))


def compute(outcomes: Iterable[Outcome]) -> Iterator[Verdict]:
    """S2: shares of the vpdpbusd limit."""
    for outcome in outcomes:
        limit = outcome.best("limit")
        shares = [share for least, share in LIMIT_SHARES if rows_of(outcome.name) >= least]
        if limit is not None and shares:
            yield Verdict("S2", f"{outcome.name}: share of {limit}", shares[0], outcome.ratio(OURS, limit))
