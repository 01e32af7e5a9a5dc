"""What must be reached, and whether it was: arithmetic on the outcomes of one run. Nothing is timed here."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qnative.bench import OURS, Outcome

#: Share of the vpdpbusd limit by the least number of rows, largest first.
LIMIT_SHARES = ((128, 0.92), (32, 0.88), (8, 0.80))
#: The one-row layer whose weights lie in the L2 cache: seconds, or times one read of the weights.
SMALL, SMALL_SECONDS, SMALL_READS = (1, 384, 384), 2.5e-6, 1.85
#: The least operations of a call that two threads must make faster.
LARGE = 2 * 128 * 768 * 3072
#: "Not slower", as far as two medians of one run can tell.
NOT_SLOWER = 0.98


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
            "ratio": f"{self.ratio:.3f}",
            "met": "yes" if self.met else "NO",
        }


def label(outcome: Outcome) -> str:
    """Name a case, with its threads if they are several."""
    return outcome.case.name + (f", {outcome.case.threads} threads" if outcome.case.threads > 1 else "")


def rows_of(outcome: Outcome) -> int:
    """Return M of a layer's case."""
    assert outcome.case.shape is not None
    return outcome.case.shape[0]


def against_peers(outcomes: Sequence[Outcome]) -> Iterator[Verdict]:
    """S1: the best dynamic peer at every row, 1.2 times it in the geometric mean, 0.97 of the best integer product."""
    ratios = []
    for outcome in outcomes:
        best = outcome.best("dynamic")
        if best is not None:
            ratios.append(outcome.ratio(OURS, best))
            yield Verdict("S1", f"{label(outcome)}: times the speed of {best}", 1.0, ratios[-1])
    if ratios:
        yield Verdict("S1", "geometric mean of these", 1.2, statistics.geometric_mean(ratios))
    for outcome in outcomes:
        best = outcome.best("integer")
        if best is not None and rows_of(outcome) >= 8:
            yield Verdict("S1", f"{label(outcome)}: times the speed of {best}", 0.97, outcome.ratio(OURS, best))


def against_float32(outcomes: Sequence[Outcome], weights: str) -> Iterator[Verdict]:
    """S4: weights multiplied with floats against NumPy's product of float32, for one row and from 128 rows on."""
    for outcome in outcomes:
        best, rows = outcome.best("float32"), rows_of(outcome)
        if best is not None and (rows == 1 or rows >= 128) and outcome.case.shape != SMALL:
            what = f"{label(outcome)}, {weights} weights, float activations: times the speed of {best}"
            yield Verdict("S4", what, 2.0 if rows == 1 else 0.95, outcome.ratio(OURS, best))


def against_compute_limit(outcomes: Sequence[Outcome]) -> Iterator[Verdict]:
    """S2: shares of the vpdpbusd limit, on a machine that has the instruction."""
    for outcome in outcomes:
        limit = outcome.best("limit")
        shares = [share for least, share in LIMIT_SHARES if rows_of(outcome) >= least]
        if limit is not None and limit.startswith("vpdpbusd") and shares:
            yield Verdict("S2", f"{label(outcome)}: share of {limit}", shares[0], outcome.ratio(OURS, limit))


def against_bandwidth(outcomes: Sequence[Outcome]) -> Iterator[Verdict]:
    """S3: one row. Small weights take 2.5 us or 1.85 times a read of them; large ones 90% of the bandwidth."""
    for outcome in outcomes:
        read = outcome.best("read")
        if read is None:
            continue
        seconds = outcome.seconds(OURS)
        if outcome.case.shape == SMALL:
            reading = seconds * outcome.ratio(OURS, read)
            what = f"{label(outcome)}: microseconds (the larger of 2.5 and 1.85 times a read of the weights by {read})"
            wanted = max(SMALL_SECONDS, SMALL_READS * reading)
            yield Verdict("S3", what, wanted * 1e6, seconds * 1e6, at_most=True)
        else:
            yield Verdict("S3", f"{label(outcome)}: share of {read}", 0.9, outcome.ratio(OURS, read))


def against_avx2(outcomes: Sequence[Outcome]) -> Iterator[Verdict]:
    """S5: the AVX2 kernel and the faster of the exact AVX2 loops."""
    for outcome in outcomes:
        limit = outcome.best("limit")
        if limit is not None and "avx2" in outcome.timings:
            yield Verdict("S5", f"{label(outcome)}, AVX2 forced: share of {limit}", 0.85, outcome.ratio("avx2", limit))


def of_threads(outcomes: Sequence[Outcome]) -> Iterator[Verdict]:
    """S7: the first contender has one thread, the second more; never slower, and 1.9 times as fast on large calls."""
    for outcome in outcomes:
        one, several = (c.name for c in outcome.case.contenders)
        large = outcome.case.contenders[0].operations >= LARGE
        wanted = 1.9 if large else NOT_SLOWER
        yield Verdict("S7", f"{label(outcome)}: times the speed of {one}", wanted, outcome.ratio(several, one))


def of_callers(outcome: Outcome) -> Iterator[Verdict]:
    """S7: the first contender is few callers, the second many; no loss in total."""
    few, many = (c.name for c in outcome.case.contenders)
    yield Verdict("S7", f"{outcome.case.name}, {many}: times the total of {few}", NOT_SLOWER, outcome.ratio(many, few))


def of_size(outcome: Outcome, small: str, large: str) -> Iterator[Verdict]:
    """S8: the rate of a large cube within 5% of a small one's."""
    yield Verdict("S8", f"{large}: times the rate of {small}", 0.95, outcome.ratio(large, small))


def of_rows(outcome: Outcome) -> Iterator[Verdict]:
    """S8: time linear in M, so the rates of all M are within 5% of each other."""
    names = [c.name for c in outcome.case.contenders]
    slowest, fastest = min(names, key=outcome.rate), max(names, key=outcome.rate)
    what = f"rate of {slowest} to that of {fastest}, of all M tried"
    yield Verdict("S8", what, 0.95, outcome.ratio(slowest, fastest))


def of_import(outcome: Outcome) -> Iterator[Verdict]:
    """S9: how much longer numpy and qnative, the second contender, take to import than numpy, the first."""
    alone, both, *_ = (outcome.seconds(c.name) for c in outcome.case.contenders)
    longer = both - alone
    # What is not longer at all is met as well as a clock can tell: a tenth of a millisecond.
    yield Verdict("S9", "milliseconds that importing takes longer than numpy's", 15.0, max(longer * 1e3, 0.1), True)


def of_package(size: int) -> Iterator[Verdict]:
    """S9: the size of the built package."""
    yield Verdict("S9", "megabytes of the built package", 2.0, size / 1e6, True)


def of_elements(outcomes: Sequence[Outcome], times: Mapping[str, float]) -> Iterator[Verdict]:
    """S6: 90% of a plain loop that moves the same bytes; ahead of every peer, of some operations by as much as given."""
    for outcome in outcomes:
        loop, best = outcome.best("read"), outcome.best("dynamic")
        if loop is not None:
            yield Verdict("S6", f"{outcome.case.name}: share of {loop}", 0.9, outcome.ratio(OURS, loop))
        if best is not None:
            wanted = times[outcome.case.name]
            yield Verdict("S6", f"{outcome.case.name}: times the speed of {best}", wanted, outcome.ratio(OURS, best))


def of_counting(outcomes: Sequence[Outcome]) -> Iterator[Verdict]:
    """S6: a billion values a second."""
    for outcome in outcomes:
        yield Verdict("S6", f"{outcome.case.name}: 1e9 values a second", 1.0, outcome.rate(OURS) / 1e9)


def of_packing(outcome: Outcome) -> Iterator[Verdict]:
    """S10: quantize and pack, against reading."""
    plain, best = outcome.best("plain read"), outcome.best("read")
    assert plain is not None and best is not None
    what = f"{outcome.case.name}: times a read of the floats by a {plain}"
    yield Verdict("S10", what, 4.0, outcome.ratio(plain, OURS), True)
