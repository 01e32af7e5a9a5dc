"""From what is kept of a stream to the range that codes should cover: one function a method.

Each takes the ends of the data, low and high, and gives the ends to use, all float64 arrays of one entry a channel.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qnative.config import SMALLEST_SCALE, QuantConfig, qparams_from_range
from qnative.floats import decode
from qnative.streams import F64, I64, SIDE, SIDE_BITS, Ends, Histogram, Moments
from qnative.tensor import fake_quantize

__all__ = ["kl_range", "mean_std_range", "mse_range", "mse_range_of_rows", "percentile_range"]

#: Terms computed at a time, so that temporaries stay in the cache.
BLOCK = 1 << 17
#: Channels whose thresholds are searched at a time.
ROWS = 32
#: Steps an octave of the threshold in the search for the least squared error: at first, with one threshold and with a
#: pair, and in the end (0.3% each).
COARSE_CELLS = {1: 16, 2: 2}
FINEST_STEP = 2.0**-8


def percentile_range(h: Histogram, low: F64, high: F64, config: QuantConfig, percentile: float) -> Ends:
    """Keep `percentile` of the values: of abs(x) for symmetric codes, half of the rest cut at each end otherwise."""
    out_low, out_high = low.copy(), high.copy()
    width = h.width
    line = h.signed()
    for c in range(len(low)):
        if config.is_symmetric:
            magnitudes = line[c, SIDE:] + line[c, SIDE - 1 :: -1]
            least = max(float(low[c]), float(-high[c]), 0.0)
            most = max(float(-low[c]), float(high[c]))
            out_high[c] = _quantile(magnitudes, 0, width[c], least, most, percentile)
            out_low[c] = -out_high[c]
        else:
            share = (100.0 + percentile) / 2
            out_high[c] = _quantile(line[c], SIDE, width[c], low[c], high[c], share)
            out_low[c] = -_quantile(line[c, ::-1], SIDE, width[c], -high[c], -low[c], share)
    return out_low, out_high


def _quantile(counts: I64, zero_bin: int, width: float, low: float, high: float, percentile: float) -> float:
    """Interpolate linearly between the two order statistics around the percentile, as numpy.percentile does.

    An order statistic is placed evenly among those of its bin, so it is off by less than a bin; the last is exact.
    """
    ends = np.cumsum(counts)
    last = int(ends[-1]) - 1
    rank = min(percentile / 100.0 * last, last)
    ranks = np.array([math.floor(rank), math.ceil(rank)])
    bins = np.searchsorted(ends, ranks, side="right")
    inside = (ranks - (ends[bins] - counts[bins]) + 0.5) / counts[bins]
    with np.errstate(over="ignore", under="ignore"):
        values = np.clip((bins - zero_bin + inside) * width, low, high)
    values[ranks == last] = high
    share = rank - math.floor(rank)
    return float(values[0] * (1.0 - share) + values[1] * share)


def mean_std_range(m: Moments, low: F64, high: F64, sigma: float) -> Ends:
    """Mean +- sigma standard deviations, never wider than the data."""
    with np.errstate(over="ignore", invalid="ignore"):
        deviation = sigma * np.sqrt(m.squares / np.maximum(m.numbers, 1))
        cut_low, cut_high = m.mean - deviation, m.mean + deviation
    usable = np.isfinite(cut_low) & np.isfinite(cut_high)
    return (
        np.where(usable, np.clip(cut_low, low, high), low),
        np.where(usable, np.clip(cut_high, low, high), high),
    )


def _levels(config: QuantConfig) -> F64:
    """Every value that a code stands for at scale 1 and zero point 0, ascending."""
    if config.info.is_float:
        values = decode(np.arange(256, dtype=np.uint8), config.dtype).astype(np.float64)
        return np.unique(values[np.isfinite(values)])
    return np.arange(config.quant_min, config.quant_max + 1, dtype=np.float64)


def kl_range(h: Histogram, low: F64, high: F64, config: QuantConfig) -> Ends:
    """TensorRT's entropy calibration (Migacz, 2017): the range whose quantized histogram diverges least."""
    levels = _levels(config)
    if config.is_symmetric:
        # The magnitudes: 128 for int8 and uint8, 8 for int4. Those of float8 are not evenly spaced: a level reaches
        # half way to its neighbours, as rounding does, in fractions of the largest.
        magnitudes = levels[levels >= config.symmetric_zero_point] - config.symmetric_zero_point
        starts = (magnitudes[1:] + magnitudes[:-1]) / (2 * magnitudes[-1])
        if not config.info.is_float:
            starts = np.arange(1, len(magnitudes)) / len(magnitudes)
    else:
        starts = np.arange(1, len(levels)) / len(levels)
    edges = np.concatenate([[0.0], starts, [1.0]])
    out_low, out_high = low.copy(), high.copy()
    width = h.width
    for c in range(len(low)):
        if low[c] == high[c] == 0.0:
            continue
        negative, positive = h.counts[c]
        if config.is_symmetric:
            divergence = _Divergence(negative + positive, edges)
            _, stop = divergence.search_high(0, 0)
            out_high[c] = min(stop * width[c], max(-low[c], high[c]))
            out_low[c] = -out_high[c]
        else:
            divergence = _Divergence(np.concatenate([negative[::-1], positive]), edges)
            first, stop = divergence.search_both(SIDE)
            # The ends of the data where nothing is cut, and where the last bin kept reaches beyond them.
            out_low[c] = max((first - SIDE) * width[c], low[c])
            out_high[c] = min((stop - SIDE) * width[c], high[c])
    return out_low, out_high


class _Divergence:
    """KL(P || Q) of a histogram clipped to bins [first, stop), for many such ranges at once.

    P is the clipped histogram with each tail folded into the bin at its end. Q is the clipped histogram *without* the
    tails, merged into the levels and spread evenly over each level's non-empty bins. Both are normalised. Within a
    level Q is one number, so with running sums of the counts h, of h log h and of the non-empty bins, a range costs one
    term a level instead of one a bin, and every threshold is tried: none is skipped.

    Parameters
    ----------
    counts : int64 array (bins,)
    edges : float64 array (levels + 1,)
        Where levels begin, as fractions of the range; from 0 to 1.
    """

    def __init__(self, counts: I64, edges: F64) -> None:
        self.edges = edges
        self.levels = len(edges) - 1
        occupied = np.flatnonzero(counts)
        self.first, self.stop = int(occupied[0]), int(occupied[-1]) + 1
        self.counts = counts.astype(np.float64)
        self.mass = _running(counts)
        self.filled = _running(counts > 0)
        self.entropy = _running(_x_log_x(self.counts))

    def __call__(self, first: I64, stop: I64) -> F64:
        """Divergences of the ranges [first, stop), (n,); inf where P has mass and Q has none."""
        bounds = first[:, None] + np.ceil(self.edges * (stop - first)[:, None]).astype(np.int64)
        at = self.mass[bounds]
        mass = np.diff(at, axis=1).astype(np.float64)
        filled = np.diff(self.filled[bounds], axis=1)
        log_q = np.log(np.where(mass > 0, mass, 1.0) / np.maximum(filled, 1))
        p_log_p = self.entropy[stop] - self.entropy[first]
        p_log_q = (mass * log_q).sum(axis=1)
        total = float(self.mass[-1])
        kept = (at[:, -1] - at[:, 0]).astype(np.float64)
        possible = kept > 0
        # With a bin or more to each level, the end bins lie in the end levels. (Those of float8 nearest to zero may
        # have none, but float8 is symmetric: nothing is folded in at that end.)
        for tail, end, level in (
            (at[:, 0].astype(np.float64), first, 0),
            (total - at[:, -1], stop - 1, -1),
        ):
            count = self.counts[end]
            p_log_p += _x_log_x(count + tail) - _x_log_x(count)
            p_log_q += tail * log_q[:, level]
            possible &= (tail == 0) | (count > 0)
        with np.errstate(divide="ignore"):
            divergence = (p_log_p - p_log_q) / total + np.log(kept) - math.log(total)
        return np.where(possible, divergence, np.inf)

    def _least(self, first: I64, stop: I64) -> tuple[float, int]:
        """Return the least divergence and the last index that has it: the widest range, as callers go outwards."""
        step = max(BLOCK // self.levels, 1)
        values = np.concatenate([self(first[i : i + step], stop[i : i + step]) for i in range(0, len(first), step)])
        best = len(values) - 1 - int(np.argmin(values[::-1]))
        return float(values[best]), best

    def search_high(self, first: int, zero: int) -> tuple[float, int]:
        """Least divergence over the upper end, and that end: at least a bin a level, and not below `zero`."""
        stop = np.arange(max(first + self.levels, zero), max(self.stop, zero) + 1)
        value, best = self._least(np.full(len(stop), first), stop)
        return value, int(stop[best])

    def search_low(self, stop: int, zero: int) -> tuple[float, int]:
        """Least divergence over the lower end, and that end: at least a bin a level, and not above `zero`."""
        first = np.arange(min(stop - self.levels, zero), min(self.first, zero) - 1, -1)
        value, best = self._least(first, np.full(len(first), stop))
        return value, int(first[best])

    def search_both(self, zero: int) -> tuple[int, int]:
        """Search the ends in turn until neither moves. Each move lowers the divergence, so this comes to an end."""
        first, stop = min(self.first, zero), max(self.stop, zero)
        least = math.inf
        while True:
            before = least
            value, end = self.search_high(first, zero)
            if value < least:
                least, stop = value, end
            value, end = self.search_low(stop, zero)
            if value < least:
                least, first = value, end
            if least == before:
                return first, stop


def _running(x: NDArray[Any]) -> NDArray[Any]:
    """Return the sums of the first 0, 1, 2 ... entries along the last axis."""
    sums = np.cumsum(x, axis=-1)
    return np.concatenate([np.zeros((*x.shape[:-1], 1), sums.dtype), sums], axis=-1)


def _x_log_x(x: F64) -> F64:
    return x * np.log(np.where(x > 0, x, 1.0))


def mse_range(h: Histogram, low: F64, high: F64, config: QuantConfig) -> Ends:
    """Choose the thresholds with the least expected squared error (Max, 1960; Banner et al., 2019), over the histogram.

    Thresholds are the ends of the data shrunk by factors 2**-u; u is searched over a grid down to the width of a bin,
    then around the best in finer and finer grids, to 0.3%: one u for symmetric codes and for data on one side of zero,
    else a pair. The ends themselves are always among the candidates.
    """
    return _least_error(low, high, config, ROWS, lambda some, a, b: _HistogramError(h, some, a, b, config))


def mse_range_of_rows(rows: NDArray[Any], low: F64, high: F64, config: QuantConfig) -> Ends:
    """Choose as `mse_range` does, for each of many short rows, by the error of the values themselves."""
    some = max(ROWS, ROWS * ROWS * 64 // rows.shape[1])
    return _least_error(low, high, config, some, lambda some, a, b: _RowError(rows[some], a, b, config))


def _least_error(
    low: F64,
    high: F64,
    config: QuantConfig,
    at_once: int,
    search_of: Callable[[NDArray[np.intp], F64, F64], _ErrorSearch],
) -> Ends:
    base_low, base_high = np.minimum(low, 0.0), np.maximum(high, 0.0)
    out_low, out_high = low.copy(), high.copy()
    # Nothing to search in a constant, nor where every candidate's scale would be the smallest there is.
    worth = (low < high) & (np.maximum(-low, high) > SMALLEST_SCALE * config.quant_max)
    paired = worth & (base_low < 0) & (base_high > 0) & (not config.is_symmetric)
    for rows, shrinks in ((np.flatnonzero(worth & ~paired), 1), (np.flatnonzero(paired), 2)):
        for i in range(0, len(rows), at_once):
            some = rows[i : i + at_once]
            u = search_of(some, base_low[some], base_high[some]).least(shrinks)
            if config.is_symmetric:
                out_high[some] = np.maximum(-base_low[some], base_high[some]) * np.exp2(-u[:, 0])
                out_low[some] = -out_high[some]
            else:
                out_low[some] = base_low[some] * np.exp2(-u[:, 0])
                out_high[some] = base_high[some] * np.exp2(-u[:, -1])
    return out_low, out_high


class _ErrorSearch(ABC):
    """The search for the thresholds, a row of data each, at which the squared quantization error is least.

    Parameters
    ----------
    low, high : float64 arrays (rows,)
        The ends of the data, extended to contain zero.
    config : QuantConfig
    number : float64 array (rows,)
        How many values there are.
    terms : int
        How many terms the error of one candidate is a sum of.
    """

    def __init__(self, low: F64, high: F64, config: QuantConfig, number: F64, terms: int) -> None:
        self.low, self.high = low, high
        self.config = config.per_channel(0).with_scale_dtype("float32")
        self.levels = _levels(config)
        self.values, self.terms = number, terms

    @abstractmethod
    def errors(self, scale: F64, zero: F64) -> F64:
        """Squared errors, up to a constant a row, with scales and zero points (rows, candidates); of their shape."""

    def _params(self, u: F64) -> tuple[F64, F64]:
        """Scales and zero points, (rows, candidates), of the ends shrunk by 2**-u: u is (rows, candidates, 1 or 2)."""
        low = self.low[:, None] * np.exp2(-u[:, :, 0])
        high = self.high[:, None] * np.exp2(-u[:, :, -1])
        params = qparams_from_range(low.ravel(), high.ravel(), self.config)
        zero = np.broadcast_to(params.zero_point, low.size).reshape(low.shape)
        return params.scale.reshape(low.shape).astype(np.float64), zero.astype(np.float64)

    def _depth(self, shrinks: int) -> float:
        """Octaves below which no threshold can win.

        With the ends of the data as thresholds no value is off by more than half the widest step, and cutting an end
        off costs at least the square of what is cut (less half a step, by which the zero point may shift the range).
        And an end below a quarter of a step is as good as zero.
        """
        scale = self._params(np.zeros((len(self.low), 1, shrinks)))[0][:, 0]
        slack = (np.sqrt(self.values) + 1.0) * (0.5 * np.diff(self.levels).max()) * scale
        if self.config.is_symmetric:
            ends = [np.maximum(self.high, -self.low)]
        else:
            ends = [end for end in (self.high, -self.low) if end.all()]
        left = min(float(np.min(np.maximum(end - slack, 0.25 * scale) / end)) for end in ends)
        return -math.log2(min(max(left, 1.0 / SIDE), 1.0))

    def _best_of(self, centre: F64, offsets: F64) -> F64:
        """Return the best of `centre` (rows, shrinks) + `offsets` (candidates, shrinks), the widest where equal."""
        u = np.maximum(centre[:, None, :] + offsets, 0.0)
        step = max(BLOCK // (len(u) * self.terms), 1)
        errors = [self.errors(*self._params(u[:, i : i + step])) for i in range(0, len(offsets), step)]
        best: F64 = u[np.arange(len(u)), np.argmin(np.concatenate(errors, axis=1), axis=1)]
        return best

    def least(self, shrinks: int) -> F64:
        """Return the best exponents, (rows, shrinks): of both ends together, or of each."""
        depth = self._depth(shrinks)
        cells = max(math.ceil(depth * COARSE_CELLS[shrinks]), 1)
        step = depth / cells
        best = np.zeros((len(self.low), shrinks))
        best = self._best_of(best, _grid(np.linspace(0.0, depth, cells + 1), shrinks))
        while step > FINEST_STEP:
            best = self._best_of(best, _grid(np.linspace(-step, step, 5), shrinks))
            step /= 2
        return best


class _HistogramError(_ErrorSearch):
    """Expected errors over histograms, whose values are taken as evenly spread within their bin.

    (Exact zeros cost nothing, whatever the scale.) Between two decision boundaries every value goes to one level v, at
    the cost ``sum(x*x) - 2 v sum(x) + v*v sum(1)``; the first term adds up to the same for all thresholds, and the
    other sums come from running sums: a candidate costs one term a code instead of one a bin.
    """

    def __init__(self, h: Histogram, rows: NDArray[np.intp], low: F64, high: F64, config: QuantConfig) -> None:
        # In units of bins, so that neither large nor tiny data can leave float64. Whole numbers and halves: exact.
        self.power = SIDE_BITS - h.exponent[rows]
        self.counts, self.number, self.sum = np.zeros((3, len(rows), 2 * SIDE + 1))
        self.counts[:, :SIDE] = h.counts[rows, 0, ::-1]
        self.counts[:, SIDE:-1] = h.counts[rows, 1]
        np.cumsum(self.counts[:, :-1], axis=1, out=self.number[:, 1:])
        middles = np.arange(-SIDE, SIDE) + 0.5
        np.cumsum(self.counts[:, :-1] * middles, axis=1, out=self.sum[:, 1:])
        super().__init__(low, high, config, self.number[:, -1], len(_levels(config)))

    def errors(self, scale: F64, zero: F64) -> F64:
        values = (self.levels - zero[:, :, None]) * np.ldexp(scale, self.power[:, None])[:, :, None]
        bounds = (values[:, :, 1:] + values[:, :, :-1]) * 0.5
        np.clip(bounds, -SIDE, SIDE, out=bounds)
        # Running sums at the bounds, interpolated within bins.
        whole = np.floor(bounds)
        index = whole.astype(np.intp)
        index += (np.arange(len(scale)) * (2 * SIDE + 1) + SIDE)[:, None, None]
        bounds -= whole
        part = self.counts.reshape(-1)[index] * bounds
        number = self.number.reshape(-1)[index] + part
        total = self.sum.reshape(-1)[index] + part * (whole + 0.5 * bounds)
        # sum over the levels of v*v * (their number) - 2*v * (their sum), summed by parts.
        squares = values * values
        error: F64 = squares[:, :, -1] * self.number[:, -1:] - 2.0 * values[:, :, -1] * self.sum[:, -1:]
        error -= (np.diff(squares, axis=2) * number).sum(axis=2)
        error += (2.0 * np.diff(values, axis=2) * total).sum(axis=2)
        return error


class _RowError(_ErrorSearch):
    """Errors of the values themselves, (rows, n)."""

    def __init__(self, rows: NDArray[Any], low: F64, high: F64, config: QuantConfig) -> None:
        self.rows = rows
        self.clamp = (None, None) if config.info.is_float else (config.quant_min, config.quant_max)
        super().__init__(low, high, config, np.full(len(rows), float(rows.shape[1])), rows.shape[1])

    def errors(self, scale: F64, zero: F64) -> F64:
        x = np.repeat(self.rows, scale.shape[1], axis=0)
        low, high = self.clamp
        wrong = fake_quantize(x, scale.ravel(), zero.ravel(), self.config.dtype, 0, quant_min=low, quant_max=high)
        wrong -= x
        errors: F64 = np.square(wrong, dtype=np.float64).sum(axis=1).reshape(scale.shape)
        return errors


def _grid(points: F64, dimensions: int) -> F64:
    """Return every combination of `points`, (combinations, dimensions)."""
    return np.stack(np.meshgrid(*[points] * dimensions, indexing="ij"), axis=-1).reshape(-1, dimensions)
