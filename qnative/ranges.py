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
from qnative.elementwise import fake_quantize
from qnative.floats import decode
from qnative.streams import F64, I64, SIDE, SIDE_BITS, Ends, Histogram, Moments

__all__ = ["kl_range", "mean_std_range", "mse_range", "mse_range_of_rows", "percentile_range"]

#: Terms computed at a time, so that temporaries stay in the cache.
BLOCK = 1 << 17
#: Channels whose thresholds are searched at a time.
ROWS = 32
#: The search for the least squared error, with one threshold and with a pair: steps an octave at first, and how often
#: they are halved (to 0.3% of the threshold).
COARSE_CELLS = {1: 16, 2: 3}
HALVINGS = {1: 4, 2: 7}


def percentile_range(h: Histogram, low: F64, high: F64, config: QuantConfig, percentile: float) -> Ends:
    """Keep `percentile` of the values: of abs(x) for symmetric codes, half of the rest cut at each end otherwise."""
    out_low, out_high = low.copy(), high.copy()
    width = h.width
    for c in range(len(low)):
        line = h.signed(c)
        if config.is_symmetric:
            magnitudes = line[SIDE:] + line[SIDE - 1 :: -1]
            least = max(float(low[c]), float(-high[c]), 0.0)
            most = max(float(-low[c]), float(high[c]))
            out_high[c] = _quantile(magnitudes, 0, width[c], least, most, percentile)
            out_low[c] = -out_high[c]
        else:
            share = (100.0 + percentile) / 2
            out_high[c] = _quantile(line, SIDE, width[c], low[c], high[c], share)
            out_low[c] = -_quantile(line[::-1], SIDE, width[c], -high[c], -low[c], share)
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

    def edge(c: int, bins: int) -> float:
        """So many bins from zero. The width alone may underflow, and the end beyond the last bin overflow."""
        with np.errstate(over="ignore"):
            return float(np.ldexp(float(bins), h.exponent[c] - SIDE_BITS))

    for c in range(len(low)):
        if low[c] == high[c] == 0.0:
            continue
        negative, positive = h.counts[c]
        if config.is_symmetric:
            divergence = _Divergence(negative + positive, edges)
            _, stop = divergence.search_high(0, 0)
            out_high[c] = min(edge(c, stop), max(-low[c], high[c]))
            out_low[c] = -out_high[c]
        else:
            divergence = _Divergence(np.concatenate([negative[::-1], positive]), edges)
            first, stop = divergence.search_both(SIDE)
            # The ends of the data where nothing is cut, and where the last bin kept reaches beyond them.
            out_low[c] = max(edge(c, first - SIDE), low[c])
            out_high[c] = min(edge(c, stop - SIDE), high[c])
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
        # With fewer non-empty bins than levels Q is P, whatever was cut; only the whole may be that poor.
        whole = (first <= self.first) & (stop >= self.stop)
        possible = (self.filled[stop] - self.filled[first] >= self.levels) | whole
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
        divergence = (p_log_p - p_log_q) / total + np.log(np.maximum(kept, 1.0)) - math.log(total)
        return np.where(possible, divergence, np.inf)

    def _least(self, first: I64, stop: I64) -> tuple[float, int]:
        """Return the least divergence and the last index that has it: the widest range, as callers go outwards."""
        step = max(BLOCK // self.levels, 1)
        values = np.concatenate([self(first[i : i + step], stop[i : i + step]) for i in range(0, len(first), step)])
        best = len(values) - 1 - int(np.argmin(values[::-1]))
        return float(values[best]), best

    def search_high(self, first: int, zero: int) -> tuple[float, int]:
        """Return the least divergence over the upper end, and that end: a bin a level or more, not below `zero`."""
        stop = np.arange(max(first + self.levels, zero), max(self.stop, zero) + 1)
        value, best = self._least(np.full(len(stop), first), stop)
        return value, int(stop[best])

    def search_low(self, stop: int, zero: int) -> tuple[float, int]:
        """Return the least divergence over the lower end, and that end: a bin a level or more, not above `zero`."""
        first = np.arange(min(stop - self.levels, zero), min(self.first, zero) - 1, -1)
        value, best = self._least(first, np.full(len(first), stop))
        return value, int(first[best])

    def search_both(self, zero: int) -> tuple[int, int]:
        """Search the ends in turn until neither moves. Each move lowers the divergence, so this comes to an end."""
        first, stop = min(self.first, zero), max(self.stop, zero)
        least = math.inf
        high_searched = low_searched = -1  # for which other end; the same search again would find the same
        while (first, stop) != (high_searched, low_searched):
            if first != high_searched:
                high_searched = first
                value, end = self.search_high(first, zero)
                if value < least:
                    least, stop = value, end
            if stop != low_searched:
                low_searched = stop
                value, end = self.search_low(stop, zero)
                if value < least:
                    least, first = value, end
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
    number = h.counts.sum(axis=(1, 2))
    return _least_error(low, high, config, number, ROWS, lambda some: _HistogramError(h, some, config))


def mse_range_of_rows(rows: NDArray[Any], low: F64, high: F64, config: QuantConfig) -> Ends:
    """Choose as `mse_range` does, for each of many short rows, by the error of the values themselves."""
    number = np.full(len(rows), rows.shape[1])
    at_once = max(ROWS, BLOCK // (2 * rows.shape[1]))
    return _least_error(low, high, config, number, at_once, lambda some: _RowError(rows[some], config))


def _least_error(
    low: F64,
    high: F64,
    config: QuantConfig,
    number: I64,
    at_once: int,
    error_of: Callable[[NDArray[np.intp]], _SquaredError],
) -> Ends:
    """Search for the best thresholds of every row, rows with equal grids together: none depends on its neighbours."""
    ends = np.stack([np.maximum(-low, 0.0), np.maximum(high, 0.0)], axis=1)
    if config.is_symmetric:
        ends[...] = ends.max(axis=1, keepdims=True)
    # Nothing to search in a constant, nor where every candidate's scale would be the smallest there is.
    worth = (low < high) & (ends.max(axis=1) > SMALLEST_SCALE * config.quant_max)
    paired: NDArray[np.bool_] = ends.all(axis=1) & np.full(len(ends), not config.is_symmetric)
    config = config.per_channel(0).with_scale_dtype("float32")
    found = ends.copy()
    depth = np.zeros_like(ends)
    depth[worth] = _depths(ends[worth], number[worth], config)
    cells = np.where(paired, COARSE_CELLS[2], COARSE_CELLS[1]) * depth.max(axis=1)
    # A power of two of them, so that few different grids are enough for all rows.
    cells = np.exp2(np.ceil(np.log2(np.maximum(cells, 1.0)))).astype(np.int64)
    for shrinks, count in sorted(set(zip((1 + paired[worth]).tolist(), cells[worth].tolist(), strict=True))):
        rows = np.flatnonzero(worth & (paired == (shrinks == 2)) & (cells == count))
        for i in range(0, len(rows), at_once):
            some = rows[i : i + at_once]
            found[some] = _shrink(ends[some], depth[some], shrinks, count, error_of(some), config)
    out_low, out_high = low.copy(), high.copy()
    out_low[worth], out_high[worth] = -found[worth, 0] + 0.0, found[worth, 1]
    return out_low, out_high


def _depths(ends: F64, number: I64, config: QuantConfig) -> F64:
    """Octaves of each end, (rows, 2), below which no threshold can win.

    With the ends of the data as thresholds no value is off by more than half the widest step, and cutting an end off
    costs at least the square of what is cut (less half a step, by which the zero point may shift the range). And an end
    below a quarter of a step is as good as zero.
    """
    scale = qparams_from_range(-ends[:, 0], ends[:, 1], config).scale.astype(np.float64)
    slack = (np.sqrt(number) + 1.0) * (0.5 * np.diff(_levels(config)).max()) * scale
    whole = np.where(ends > 0, ends, 1.0)
    left = np.maximum(ends - slack[:, None], 0.25 * scale[:, None]) / whole
    return np.where(ends > 0, -np.log2(np.clip(left, 1.0 / SIDE, 1.0)), 0.0)


def _shrink(ends: F64, depth: F64, shrinks: int, cells: int, error: _SquaredError, config: QuantConfig) -> F64:
    """Return the ends, (rows, 2), with the least error: both shrunk alike, or each by itself.

    At first over a grid of `cells` steps from the ends down to their depths, then around the best, halving the steps.
    """
    if shrinks == 1:
        depth = np.broadcast_to(depth.max(axis=1, keepdims=True), depth.shape)

    def best_of(centre: F64, offsets: F64) -> F64:
        u = np.maximum(centre[:, None, :] + offsets[None, :, :] * depth[:, None, :], 0.0)
        errors = []
        step = max(BLOCK // (len(u) * error.terms), 1)
        for i in range(0, len(offsets), step):
            low, high = np.moveaxis(ends[:, None, :] * np.exp2(-u[:, i : i + step]), -1, 0)
            params = qparams_from_range(-low.ravel(), high.ravel(), config)
            zero = np.broadcast_to(params.zero_point, low.size).reshape(low.shape)
            errors.append(error(params.scale.reshape(low.shape).astype(np.float64), zero.astype(np.float64)))
        best: F64 = u[np.arange(len(u)), np.argmin(np.concatenate(errors, axis=1), axis=1)]
        return best

    best = best_of(np.zeros_like(ends), _grid(np.linspace(0.0, 1.0, cells + 1), shrinks))
    step = 1.0 / cells
    for _ in range(HALVINGS[shrinks]):
        best = best_of(best, _grid(np.linspace(-step, step, 5), shrinks))
        step /= 2
    return ends * np.exp2(-best)


def _grid(points: F64, dimensions: int) -> F64:
    """Return every pair of `points`, or each with itself: (pairs, 2)."""
    if dimensions == 1:
        return np.stack([points, points], axis=1)
    return np.stack(np.meshgrid(points, points, indexing="ij"), axis=-1).reshape(-1, 2)


class _SquaredError(ABC):
    """Squared quantization errors of rows of data, for many scales and zero points each.

    Attributes
    ----------
    terms : int
        How many terms the error of one candidate is a sum of.
    """

    terms: int

    @abstractmethod
    def __call__(self, scale: F64, zero: F64) -> F64:
        """Return errors, up to a constant a row; all of shape (rows, candidates)."""


class _HistogramError(_SquaredError):
    """Expected errors over histograms, whose values are taken as evenly spread within their bin.

    (Exact zeros cost nothing, whatever the scale.) Between two decision boundaries every value goes to one level v, at
    the cost ``sum(x*x) - 2 v sum(x) + v*v sum(1)``; the first term adds up to the same for all thresholds, and the
    other sums come from running sums: a candidate costs one term a code instead of one a bin.
    """

    def __init__(self, h: Histogram, rows: NDArray[np.intp], config: QuantConfig) -> None:
        self.levels = _levels(config)
        self.terms = len(self.levels)
        # In units of bins, so that neither large nor tiny data can leave float64. Whole numbers and halves: exact.
        self.power = SIDE_BITS - h.exponent[rows]
        self.counts, self.number, self.sum = np.zeros((3, len(rows), 2 * SIDE + 1))
        self.counts[:, :SIDE] = h.counts[rows, 0, ::-1]
        self.counts[:, SIDE:-1] = h.counts[rows, 1]
        np.cumsum(self.counts[:, :-1], axis=1, out=self.number[:, 1:])
        middles = np.arange(-SIDE, SIDE) + 0.5
        np.cumsum(self.counts[:, :-1] * middles, axis=1, out=self.sum[:, 1:])

    def __call__(self, scale: F64, zero: F64) -> F64:
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


class _RowError(_SquaredError):
    """Errors of the values themselves, (rows, n)."""

    def __init__(self, rows: NDArray[Any], config: QuantConfig) -> None:
        self.rows, self.terms, self.dtype = rows, rows.shape[1], config.dtype
        self.clamp = (None, None) if config.info.is_float else (config.quant_min, config.quant_max)

    def __call__(self, scale: F64, zero: F64) -> F64:
        x = np.repeat(self.rows, scale.shape[1], axis=0)
        low, high = self.clamp
        wrong = fake_quantize(x, scale.ravel(), zero.ravel(), self.dtype, 0, quant_min=low, quant_max=high)
        wrong -= x
        errors: F64 = np.square(wrong, dtype=np.float64).sum(axis=1).reshape(scale.shape)
        return errors
