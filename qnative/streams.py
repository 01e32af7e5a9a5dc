"""What is kept of a stream of arrays, in memory that does not grow with it: a histogram, moments, averages of the ends.

A statistic takes values, merges with its like, and is a few arrays, whose first axis is the channels. `Histogram` is
the one under percentile, KL and MSE. Its bins are a power of two wide and anchored at zero, the width follows from the
largest magnitude seen, and growing merges whole pairs of bins. So the counts are a function of the *set* of values: no
cutting into batches, no order and no merging of shards can change one of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar, TypeAlias

import numpy as np
from numpy.typing import NDArray

from qnative import _core
from qnative.floats import as_float_array
from qnative.granularity import Granules

__all__ = [
    "F64",
    "I64",
    "SIDE",
    "SIDE_BITS",
    "Averages",
    "Ends",
    "Histogram",
    "Moments",
    "Statistic",
    "find_ends",
    "pieces",
    "rows_of",
]

F64: TypeAlias = NDArray[np.float64]
I64: TypeAlias = NDArray[np.int64]
#: The ends of a range: two float64 arrays of one entry a channel.
Ends: TypeAlias = tuple[F64, F64]

#: Bins on each side of zero. The largest magnitude lies in the upper half of its side, so at least half of these (4096)
#: cover [0, amax].
SIDE_BITS = 13
SIDE = 1 << SIDE_BITS
#: The exponent of a histogram that has seen nothing but zeros: no other float64 has a smaller one.
LEAST_EXPONENT = -1073
#: Elements worked on at a time, so that temporaries stay in the cache whatever the batch.
SLAB = 1 << 16
#: And never more, whatever a statistic would like.
MOST = 1 << 20


# Walking over an array


def pieces(x: NDArray[Any], whole: tuple[int, ...], size: int) -> Iterator[NDArray[Any]]:
    """Cut `x` along one dimension, the axes in `whole` excepted, into float arrays of about `size` elements.

    The first dimension that gives pieces so small, as these lie in one piece in memory; else the longest.
    """
    if not whole and x.flags.c_contiguous:
        x = x.reshape(-1)
    kept = {axis % x.ndim for axis in whole}
    lengths = [0 if d in kept else n for d, n in enumerate(x.shape)]
    if not any(lengths):  # 0-d, or nothing to cut
        yield as_float_array(x)
        return
    cut = next((d for d, n in enumerate(lengths) if n * size >= x.size), int(np.argmax(lengths)))
    step = max(size * lengths[cut] // x.size, 1)
    for i in range(0, lengths[cut], step):
        yield as_float_array(x[(slice(None),) * cut + (slice(i, i + step),)])


def rows_of(x: NDArray[Any], axis: int | None, size: int, each: int) -> Iterator[NDArray[Any]]:
    """Cut `x` into float arrays of shape (channels, n), (1, n) when `axis` is None, of about `size` elements.

    Of `SLAB` elements at most where that takes a copy; of more where there are so many channels that n would else be
    less than `each`.
    """
    if axis is not None:
        size = min(max(SLAB, each * x.shape[axis]), MOST)
    elif not (x.flags.c_contiguous and x.flags.aligned) or x.dtype not in (np.float32, np.float64):
        size = min(size, SLAB)
    for piece in pieces(x, () if axis is None else (axis,), size):
        if axis is None:
            yield piece.reshape(1, -1)
        else:
            yield np.ascontiguousarray(np.moveaxis(piece, axis, 0)).reshape(piece.shape[axis], -1)


def find_ends(x: NDArray[Any], axis: int | None, channels: int) -> tuple[F64, F64, I64]:
    """Smallest and largest finite value and number of finite values of each channel (inf, -inf and 0 without any)."""
    low, high = np.full(channels, np.inf), np.full(channels, -np.inf)
    count = np.zeros(channels, np.int64)
    for piece in pieces(x, () if axis is None else (axis,), 16 * SLAB):
        part_low, part_high = np.empty(channels, piece.dtype), np.empty(channels, piece.dtype)
        walk = Granules.of(piece.shape, axis).walk
        if _core.min_max(piece.reshape(-1), walk, part_low, part_high):
            rows = piece.reshape(1, -1) if axis is None else np.moveaxis(piece, axis, 0).reshape(channels, -1)
            finite = np.isfinite(rows)
            part_low = np.min(rows, axis=1, where=finite, initial=np.inf)
            part_high = np.max(rows, axis=1, where=finite, initial=-np.inf)
            count += np.count_nonzero(finite, axis=1)
        else:
            count += piece.size // channels
        np.minimum(low, part_low, out=low)
        np.maximum(high, part_high, out=high)
    return low + 0.0, high + 0.0, count  # -0.0 becomes 0.0: which of the two came first must not show


def _exponent_of(amax: F64) -> I64:
    """Return the k of 2**(k-1) <= amax < 2**k; `LEAST_EXPONENT` for zero (and for -inf: a channel without data)."""
    mantissa, exponent = np.frexp(np.maximum(amax, 0.0))
    return np.where(mantissa > 0.0, exponent, LEAST_EXPONENT).astype(np.int64)


# Statistics


class Statistic(ABC):
    """What is kept of a stream for each of `channels` channels: arrays named in `fields`, first axis the channels."""

    fields: ClassVar[tuple[str, ...]]
    #: Whether `add` is to be called; the ends of a batch alone suffice otherwise.
    reads_values: ClassVar[bool] = True
    #: Elements that `add` is best given.
    slab: ClassVar[int] = SLAB
    #: Values of a channel that `add` wants at a time, so that what is kept of a channel stays in the cache meanwhile.
    each: ClassVar[int] = 0

    @abstractmethod
    def start(self, low: F64, high: F64) -> None:
        """Prepare for a batch with these finite ends (inf, -inf for a channel without a finite value)."""

    def add(self, rows: NDArray[Any], clean: bool) -> None:
        """Take float values (channels, n), of which NaN and infinities do not count; `clean`: there are none."""
        raise AssertionError(f"{type(self).__name__} reads no values")

    def finish(self) -> None:  # noqa: B027 (most have nothing to do)
        """Conclude a batch, all of whose values have been added."""

    @abstractmethod
    def merge(self, other: Any) -> None:
        """Become what one statistic of both streams would be."""

    @abstractmethod
    def agrees(self, low: F64, high: F64, count: I64) -> bool:
        """Whether the arrays, just loaded, can be of a stream with these ends and this many values."""


class Histogram(Statistic):
    """Counts of values in bins of power-of-two width anchored at zero.

    With amax the largest magnitude seen and 2**(k-1) <= amax < 2**k, bin i of a side counts the values with
    ``i <= abs(x) / 2**(k-13) < i + 1``. ``floor(floor(m / w) / 2) == floor(m / (2 w))``, so doubling the width is
    merging pairs of bins, exactly, and it does not matter when the width was doubled: the counts are those that the
    final width gives. Sides are told apart by the sign and not by the bin, so that a negative value too small to be
    told from zero by its bin is still negative, and so that abs(x) has a histogram of the same bins: the sum of the
    sides. Exact zeros are counted apart: zero always has a code of its own, so no range can serve it better or worse.

    Attributes
    ----------
    counts : int64 array of shape (channels, 2, 8192)
        Of the negative values, and of the positive ones, by magnitude. 128 KiB a channel.
    zeros : int64 array of shape (channels,)
    exponent : int64 array of shape (channels,)
        k, from which the width follows: each channel has its own.
    """

    fields = ("counts", "zeros", "exponent")
    slab = 16 * SLAB  # it makes no temporaries
    each = 1 << 12

    def __init__(self, channels: int) -> None:
        self.counts = np.zeros((channels, 2, SIDE), np.int64)
        self.zeros = np.zeros(channels, np.int64)
        self.exponent = np.full(channels, LEAST_EXPONENT, np.int64)

    @property
    def width(self) -> F64:
        """The width of each channel's bins (0 where it underflows, far below any scale)."""
        return np.ldexp(1.0, self.exponent - SIDE_BITS)

    def signed(self, channel: int) -> I64:
        """Return a channel's counts over the signed line, zeros too: entry SIDE + i is of [i * width, (i + 1) * width).

        (A negative value on an edge belongs to the bin below it.)
        """
        negative, positive = self.counts[channel]
        line = np.concatenate([negative[::-1], positive])
        line[SIDE] += self.zeros[channel]
        return line

    def start(self, low: F64, high: F64) -> None:
        """Grow to hold these ends."""
        self._grow(_exponent_of(np.maximum(-low, high)))

    def _grow(self, exponent: I64) -> None:
        for row in np.flatnonzero(exponent > self.exponent):
            shift = min(int(exponent[row] - self.exponent[row]), SIDE_BITS)
            kept = SIDE >> shift
            self.counts[row, :, :kept] = self.counts[row].reshape(2, kept, 1 << shift).sum(axis=2)
            self.counts[row, :, kept:] = 0
            self.exponent[row] = exponent[row]

    def add(self, rows: NDArray[Any], clean: bool) -> None:
        """Count values."""
        _core.histogram(rows, SIDE_BITS - self.exponent, self.counts, self.zeros)

    def read(self, x: NDArray[Any]) -> tuple[float, float, int]:
        """Count the values of the one channel that there is, (n,), reading them once: it grows on the way.

        Returns the ends of what is finite, inf and -inf if nothing is, and how many values are.
        """
        ends = np.array([np.inf, -np.inf])
        done = bad = 0
        while done < len(x):
            power = SIDE_BITS - int(self.exponent[0])
            taken, skipped = _core.histogram_while_it_fits(x[done:], power, self.counts[0], self.zeros, ends)
            done, bad = done + taken, bad + skipped
            self.start(ends[:1], ends[1:])
        return float(ends[0]) + 0.0, float(ends[1]) + 0.0, len(x) - bad

    def agrees(self, low: F64, high: F64, count: I64) -> bool:
        """Whether the widths are those of the ends, and the counts add up."""
        return bool(
            np.all(self.exponent == _exponent_of(np.maximum(-low, high)))
            and min(self.counts.min(), self.zeros.min()) >= 0
            and np.all(self.counts.sum(axis=(1, 2)) + self.zeros == count)
        )

    def merge(self, other: Histogram) -> None:
        """Add the counts, at the wider of both widths."""
        self._grow(other.exponent)
        theirs = Histogram(len(other.zeros))
        theirs.counts[...], theirs.exponent[...] = other.counts, other.exponent
        theirs._grow(self.exponent)
        self.counts += theirs.counts
        self.zeros += other.zeros


class Moments(Statistic):
    """Count, mean and sum of squared deviations, combined as Chan, Golub and LeVeque (1983) do.

    Those of a batch come together by themselves and are then combined with the rest in one step, as merging does: so a
    batch observed here, or observed elsewhere and merged, gives the same bits.
    """

    fields = ("numbers", "mean", "squares")

    def __init__(self, channels: int) -> None:
        self.numbers = np.zeros(channels, np.int64)
        self.mean = np.zeros(channels)
        self.squares = np.zeros(channels)
        self._batch: Moments | None = None

    def start(self, low: F64, high: F64) -> None:
        """Begin the batch's own."""
        self._batch = Moments(len(low))

    def add(self, rows: NDArray[Any], clean: bool) -> None:
        """Combine the batch's with those of these values."""
        assert self._batch is not None
        values = rows.astype(np.float64)
        with np.errstate(over="ignore", invalid="ignore"):  # near the end of float64: the rule falls back to the ends
            if clean:
                number = np.full(len(rows), rows.shape[1], np.int64)
                mean = values.mean(axis=1)
                values -= mean[:, None]
            else:
                finite = np.isfinite(rows)
                number = np.count_nonzero(finite, axis=1).astype(np.int64)
                mean = values.sum(axis=1, where=finite) / np.maximum(number, 1)
                values = np.where(finite, values - mean[:, None], 0.0)
            self._batch._combine(number, mean, np.square(values, out=values).sum(axis=1))

    def finish(self) -> None:
        """Combine with the batch's."""
        assert self._batch is not None
        self.merge(self._batch)
        self._batch = None

    def _combine(self, number: I64, mean: F64, squares: F64) -> None:
        total = np.maximum(self.numbers + number, 1)
        delta = mean - self.mean
        self.mean += delta * (number / total)
        self.squares += squares + delta * delta * (self.numbers * (number / total))
        self.numbers += number

    def agrees(self, low: F64, high: F64, count: I64) -> bool:
        """Whether the numbers are those of the stream."""
        return bool(np.all(self.numbers == count) and not np.any(self.squares < 0))

    def merge(self, other: Moments) -> None:
        """Combine both moments."""
        with np.errstate(over="ignore", invalid="ignore"):
            self._combine(other.numbers, other.mean, other.squares)


class Averages(Statistic):
    """The ends of the first batch, then moved by a constant fraction towards each batch's (Jacob et al., 2018).

    The first batch's ends and the number of batches are kept too, so that merging can do what going on would have done:
    with d = (1 - c)**batches of the other, ``m = theirs + d * (mine - their first)``. One batch is taken as observing
    it takes it, to the same bits.
    """

    fields = ("batches", "first_low", "first_high", "average_low", "average_high")
    reads_values = False

    def __init__(self, channels: int, constant: float) -> None:
        self.constant = constant
        self.batches = np.zeros(channels, np.int64)
        self.first_low, self.first_high = np.zeros(channels), np.zeros(channels)
        self.average_low, self.average_high = np.zeros(channels), np.zeros(channels)

    def start(self, low: F64, high: F64) -> None:
        """Move towards the ends of a batch, in the channels that have any."""
        seen = low <= high
        new = seen & (self.batches == 0)
        for first, average, batch in (
            (self.first_low, self.average_low, low),
            (self.first_high, self.average_high, high),
        ):
            first[new] = average[new] = batch[new]
            average[seen] += self.constant * (batch[seen] - average[seen])
        self.batches += seen

    def agrees(self, low: F64, high: F64, count: I64) -> bool:
        """Whether there are averages where there is data."""
        return bool(np.all((self.batches > 0) == (count > 0)) and np.all(self.average_low <= self.average_high))

    def merge(self, other: Averages) -> None:
        """Go on from here with the batches of the other."""
        mine, theirs = self.batches > 0, other.batches > 0
        new, both = theirs & ~mine, theirs & mine
        decay = (1.0 - self.constant) ** other.batches[both]
        for name in ("low", "high"):
            first, their_first = getattr(self, f"first_{name}"), getattr(other, f"first_{name}")
            average, their_average = getattr(self, f"average_{name}"), getattr(other, f"average_{name}")
            first[new], average[new] = their_first[new], their_average[new]
            mine_, theirs_ = average[both], their_average[both]
            average[both] = np.where(
                other.batches[both] == 1,
                mine_ + self.constant * (theirs_ - mine_),
                theirs_ + decay * (mine_ - their_first[both]),
            )
        self.batches += other.batches
