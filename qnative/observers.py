"""Observers: find the range of a stream of arrays, and from it a scale and a zero point.

An observer is a method: the statistics it keeps (`qnative.streams`) and the rule that reads a range off them
(`qnative.ranges`), behind one protocol.
"""

from __future__ import annotations

import copy
import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qnative.config import ObserverMethod, QParams, QuantConfig, QuantGranularity, qparams_from_range
from qnative.floats import as_float_array, plain_array
from qnative.granularity import Granules, block_min_max
from qnative.ranges import kl_range, mean_std_range, mse_range, mse_range_of_rows, percentile_range
from qnative.streams import F64, I64, Averages, Ends, Histogram, Moments, Statistic, find_ends, rows_of

__all__ = [
    "CalibrationCollector",
    "KLObserver",
    "MSEObserver",
    "MeanStdObserver",
    "MinMaxObserver",
    "MovingAverageObserver",
    "Observer",
    "PercentileObserver",
    "make_observer",
    "observe_once",
]

#: Values from which on a batch is counted by itself and then merged: that takes as long as counting half a million.
ONCE = 1 << 21
DEFAULT_PERCENTILE = 99.99
DEFAULT_SIGMA = 3.0
DEFAULT_AVERAGING_CONSTANT = 0.01


class Observer(ABC):
    """What every observer does: takes arrays, and answers with a range, or with a scale and a zero point.

    Every value counts: there is no sampling and no cap. Memory does not grow with the stream. Except where a class says
    otherwise, the result depends neither on how the stream was cut into batches nor on their order, and `merge` gives
    the bits that observing both streams gives, in whatever order and grouping shards are merged.

    An observer is for one thread; give each thread its own, and merge.

    Parameters
    ----------
    axis : int, optional
        The axis whose indices are channels, each with a range of its own; None for one range per tensor. Batches may
        differ in every other dimension.
    nonfinite : {"raise", "skip"}
        What NaN and infinities do: raise ValueError and leave the observer as it was, or be skipped and counted.

    Attributes
    ----------
    axis : int or None
    nonfinite : str
    """

    method: ClassVar[ObserverMethod | None] = None
    #: Constructor arguments beyond axis.
    options: ClassVar[tuple[str, ...]] = ("nonfinite",)

    def __init__(self, axis: int | None = None, *, nonfinite: str = "raise") -> None:
        if axis is not None and (isinstance(axis, bool) or not isinstance(axis, (int, np.integer))):
            raise TypeError(f"axis={axis!r} must be an int, or None for one range per tensor")
        if nonfinite not in ("raise", "skip"):
            raise ValueError(f"nonfinite={nonfinite!r} must be 'raise' or 'skip'")
        self.axis = None if axis is None else int(axis)
        self.nonfinite = nonfinite
        self.reset()

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={getattr(self, name)!r}" for name in ("axis", *self.options))
        return f"{type(self).__name__}({options})"

    # What a method defines

    def _new_statistics(self, channels: int) -> dict[str, Statistic]:
        return {}

    @abstractmethod
    def _choose(self, config: QuantConfig) -> Ends:
        """Apply the rule: ends, (channels,), from the statistics."""

    # Taking data

    def reset(self) -> None:
        """Forget everything seen."""
        self._torn = False
        self._channels: int | None = None
        self._dimensions: set[int] = set()
        self._statistics: dict[str, Statistic] = {}

    def _allocate(self, channels: int) -> None:
        self._channels = channels
        self._low, self._high = np.full(channels, np.inf), np.full(channels, -np.inf)
        self._count, self._skipped = np.zeros(channels, np.int64), np.zeros(channels, np.int64)
        self._statistics = self._new_statistics(channels)

    def observe(self, x: ArrayLike) -> None:
        """Take a batch into account.

        Parameters
        ----------
        x : array_like
            float16, bfloat16, float32 or float64, of any shape and memory layout; an empty one changes nothing. A large
            (or memory-mapped) array is read piece by piece.

        Raises
        ------
        TypeError
            If `x` is not of a float dtype.
        ValueError
            If `x` has NaNs or infinities and they are not skipped, lacks `axis`, or has another number of channels than
            earlier batches. The observer is then as it was before.
        RuntimeError
            If an earlier call was broken off, by Ctrl-C say: only part of its batch was counted. `reset()` helps.
        """
        self._check_torn()
        x = plain_array(x)
        channels = 1
        if self.axis is not None:
            if not -x.ndim <= self.axis < x.ndim:
                raise ValueError(f"axis={self.axis} is not an axis of a batch of shape {x.shape}")
            channels = x.shape[self.axis]
            if self._channels not in (None, channels):
                raise ValueError(
                    f"axis {self.axis} of shape {x.shape} has {channels} channels and earlier batches had "
                    f"{self._channels}; use one observer a layer, or reset()"
                )
        if x.size == 0:
            as_float_array(x)  # for its judgement of the dtype
            return
        if self.axis is None and x.size >= ONCE and self._histogram_alone:
            self.merge(self._of_one_reading(x))
            return
        low, high, count = find_ends(x, self.axis, channels)
        skipped = x.size // channels - count
        self._judge(skipped, x.size)
        self._torn = True  # until all of the batch is counted
        if self._channels is None:
            self._allocate(channels)
        if self.axis is not None:
            self._dimensions.add(x.ndim)
        np.minimum(self._low, low, out=self._low)
        np.maximum(self._high, high, out=self._high)
        self._count += count
        self._skipped += skipped
        readers = []
        for statistic in self._statistics.values():
            statistic.start(low, high)
            if statistic.reads_values:
                readers.append(statistic)
        if readers:
            clean = not skipped.any()
            size, each = min(statistic.slab for statistic in readers), max(statistic.each for statistic in readers)
            for rows in rows_of(x, self.axis, size, each):
                for statistic in readers:
                    statistic.add(rows, clean)
        for statistic in self._statistics.values():
            statistic.finish()
        self._torn = False

    def _judge(self, skipped: I64, size: int) -> None:
        if self.nonfinite == "raise" and skipped.any():
            raise ValueError(
                f"{skipped.sum()} of {size} values are NaN or infinite and have no place in a range; clean the data, "
                "or make the observer with nonfinite='skip' to skip and count them"
            )

    @property
    def _histogram_alone(self) -> bool:
        """Whether a histogram is all that the method keeps."""
        statistics = list(self._new_statistics(1).values())
        return len(statistics) == 1 and isinstance(statistics[0], Histogram)

    def _of_one_reading(self, x: NDArray[Any]) -> Self:
        """Return an observer of a batch alone, which may still be refused, so that one reading is enough."""
        batch = copy.copy(self)  # a derived class may have an __init__ of its own
        batch.reset()
        batch._allocate(1)
        (histogram,) = batch._statistics.values()
        assert isinstance(histogram, Histogram)
        for rows in rows_of(x, None, x.size, 0):
            low, high, count = histogram.read(rows[0])
            batch._low[0], batch._high[0] = min(low, batch._low[0]), max(high, batch._high[0])
            batch._count += count
            batch._skipped += rows.size - count
        self._judge(batch._skipped, x.size)
        return batch

    def _check_torn(self) -> None:
        if self._torn:
            raise RuntimeError(
                f"{self!r} was broken off (Ctrl-C, or an error) when only part of a batch was counted, and has no "
                "right answer; reset() it and observe again"
            )

    def merge(self, other: Observer) -> Self:
        """Take everything into account that `other` has seen, and return self; `other` stays as it is.

        Raises
        ------
        TypeError
            If `other` is an observer of another class.
        ValueError
            If it has another axis, another number of channels or other options that shape its statistics.
        """
        if type(other) is not type(self):
            raise TypeError(f"cannot merge {other!r} into {self!r}; both must be of one class")
        self._check_torn()
        other._check_torn()
        for name in ("axis", *self.options):
            if name != "nonfinite" and getattr(self, name) != getattr(other, name):
                raise ValueError(f"cannot merge {other!r} into {self!r}: {name} differs")
        if other._channels is None:
            return self
        if self._channels not in (None, other._channels):
            raise ValueError(f"cannot merge an observer of {other._channels} channels into one of {self._channels}")
        self._torn = True
        if self._channels is None:
            self._allocate(other._channels)
        np.minimum(self._low, other._low, out=self._low)
        np.maximum(self._high, other._high, out=self._high)
        self._count += other._count
        self._skipped += other._skipped
        self._dimensions |= other._dimensions
        for name, statistic in self._statistics.items():
            statistic.merge(other._statistics[name])
        self._torn = False
        return self

    # Answers

    def _shaped(self, x: NDArray[Any]) -> NDArray[Any]:
        return (x.reshape(()) if self.axis is None else x).copy()

    def _seen(self) -> None:
        self._check_torn()
        if self._channels is None or not self._count.all():
            what = "data"
            if self._channels is not None and self.axis is not None:
                what = f"finite value in {np.count_nonzero(self._count == 0)} of its {self._channels} channels"
            raise RuntimeError(f"{self!r} has seen no {what} yet; call observe(x) with some first")

    @property
    def count(self) -> int:
        """How many values were taken into account, over all channels."""
        return 0 if self._channels is None else int(self._count.sum())

    @property
    def skipped(self) -> int:
        """How many NaNs and infinities were skipped, over all channels."""
        return 0 if self._channels is None else int(self._skipped.sum())

    @property
    def min_val(self) -> F64:
        """The smallest value seen, float64 of shape () or (channels,); RuntimeError before any data."""
        return self.range[0]

    @property
    def max_val(self) -> F64:
        """The largest value seen, float64 of shape () or (channels,); RuntimeError before any data."""
        return self.range[1]

    @property
    def range(self) -> Ends:
        """``(min_val, max_val)``: of the data, before any clipping (see `calibrated_range`)."""
        self._seen()
        low, high = self._data_range()
        return self._shaped(low), self._shaped(high)

    def _data_range(self) -> Ends:
        return self._low, self._high

    def calibrated_range(self, config: QuantConfig) -> Ends:
        """Return the range that the method chooses for codes of `config`; `qparams` makes its answer of this.

        Parameters
        ----------
        config : QuantConfig
            Per tensor, or per channel along the observer's axis.

        Returns
        -------
        low, high : float64 arrays of shape () or (channels,)

        Raises
        ------
        RuntimeError
            Before any data.
        ValueError
            If `config` has another granularity or axis.
        """
        return self._answer(config, {})

    def _answer(self, config: QuantConfig, options: Mapping[str, Any]) -> Ends:
        self._check(config)
        self._seen()
        low, high = self._choose(config, **options)
        return self._shaped(low), self._shaped(high)

    def qparams(self, config: QuantConfig) -> QParams:
        """Return the scale and zero point for codes of `config`.

        Parameters
        ----------
        config : QuantConfig
            Per tensor, or per channel along the observer's axis.

        Returns
        -------
        QParams
            Of shape () or (channels,).

        Raises
        ------
        RuntimeError
            Before any data.
        ValueError
            If `config` has another granularity or axis, or the scale cannot be stored in its `scale_dtype`.
        """
        return qparams_from_range(*self.calibrated_range(config), config)

    def _check(self, config: QuantConfig) -> None:
        if not isinstance(config, QuantConfig):
            raise TypeError(f"config must be a QuantConfig, not {type(config).__name__}")
        if config.granularity is QuantGranularity.PER_GROUP:
            raise ValueError(
                "an observer keeps one range a tensor or a channel, not a group; groups are those of one array: "
                "quantize_tensor(x, config, method=...)"
            )
        if config.axis == self.axis:
            return
        if config.axis is None:
            raise ValueError(f"{config!r} is per tensor and the observer per channel; make it with axis=None")
        if self.axis is None:
            raise ValueError(f"{config!r} is per channel and the observer per tensor; make it with axis={config.axis}")
        if not self._dimensions or any((config.axis - self.axis) % n for n in self._dimensions):
            raise ValueError(f"{config!r} has axis {config.axis} and the observer {self.axis}; they must be the same")

    # State

    def state_dict(self) -> dict[str, Any]:
        """Return everything the observer knows as plain arrays (copies), numbers, strings and None."""
        self._check_torn()
        state: dict[str, Any] = {"class": type(self).__name__, "axis": self.axis}
        state.update((name, getattr(self, name)) for name in self.options)
        state["channels"] = self._channels
        if self._channels is not None:
            state["dimensions"] = sorted(self._dimensions)
            state.update((name, array.copy()) for name, array in self._arrays().items())
        return state

    def _arrays(self) -> dict[str, NDArray[Any]]:
        arrays = {"low": self._low, "high": self._high, "count": self._count, "skipped": self._skipped}
        for name, statistic in self._statistics.items():
            arrays.update((f"{name}.{field}", getattr(statistic, field)) for field in statistic.fields)
        return arrays

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Become the observer that `state` came from, its axis and options included.

        Raises
        ------
        ValueError
            If `state` is another class's, has unknown or missing entries, or arrays that do not fit together. The
            observer is then as it was before.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"the state must be what state_dict() gives, not {type(state).__name__}")
        if state.get("class") != type(self).__name__:
            raise ValueError(f"the state is one of {state.get('class')!r}, not of {type(self).__name__!r}")
        expected = {"class", "axis", *self.options, "channels"}
        _check_keys(expected - set(state), set())
        new = type(self)(state["axis"], **{name: state[name] for name in self.options})
        channels = state["channels"]
        if channels is not None:
            if not isinstance(channels, int) or channels < 1 or (new.axis is None and channels != 1):
                raise ValueError(f"the state's channels={channels!r} must be a positive int (1 per tensor)")
            # What is there tells how much to allocate, not the number beside it.
            there = np.asarray(state.get("low")).shape
            if there != (channels,):
                raise ValueError(f"the state's 'low' has shape {there}; channels={channels} needs ({channels},)")
            new._allocate(channels)
            dimensions = state.get("dimensions", ())
            try:
                new._dimensions = {operator.index(n) for n in dimensions}
            except TypeError:
                raise ValueError(f"the state's dimensions={dimensions!r} must be whole numbers") from None
            if min(new._dimensions, default=1) < 1:
                raise ValueError(f"the state's dimensions={dimensions!r} must be 1 or more")
            arrays = new._arrays()
            expected |= {"dimensions", *arrays}
            _check_keys(expected - set(state), set(state) - expected)
            for name, array in arrays.items():
                given = np.asarray(state[name])
                if given.shape != array.shape or given.dtype.kind != array.dtype.kind:
                    raise ValueError(
                        f"the state's {name!r} is {given.dtype} of shape {given.shape}; it must be {array.dtype} of "
                        f"shape {array.shape}"
                    )
                array[...] = given
            if np.any((new._low <= new._high) != (new._count > 0)) or min(new._count.min(), new._skipped.min()) < 0:
                raise ValueError("the state's low, high, count and skipped do not belong together")
            for name, statistic in new._statistics.items():
                if not statistic.agrees(new._low, new._high, new._count):
                    raise ValueError(f"the state's {name} does not belong to its low, high and count")
        else:
            _check_keys(set(), set(state) - expected)
        self.__dict__.update(new.__dict__)


def _check_keys(missing: set[str], unknown: set[str]) -> None:
    if missing or unknown:
        raise ValueError(f"the state misses {sorted(missing)} and has the unknown {sorted(unknown)}")


class MinMaxObserver(Observer):
    """The smallest and the largest value of everything seen. Nothing is ever clipped.

    Parameters
    ----------
    axis, nonfinite
        See `Observer`.

    Examples
    --------
    >>> import numpy as np
    >>> observer = MinMaxObserver()
    >>> observer.observe(np.array([-1.0, 3.0]))
    >>> observer.observe(np.array([2.0, -2.0]))
    >>> float(observer.min_val), float(observer.max_val)
    (-2.0, 3.0)
    """

    method = ObserverMethod.MIN_MAX

    def _choose(self, config: QuantConfig) -> Ends:
        return self._low, self._high


class _AveragingObserver(Observer):
    """What the moving average and the collector share: averages of the batches' ends, and their constant."""

    options = ("nonfinite", "averaging_constant")

    def __init__(
        self,
        axis: int | None = None,
        *,
        nonfinite: str = "raise",
        averaging_constant: float = DEFAULT_AVERAGING_CONSTANT,
    ) -> None:
        self.averaging_constant = _check_constant(averaging_constant)
        super().__init__(axis, nonfinite=nonfinite)

    def _new_statistics(self, channels: int) -> dict[str, Statistic]:
        self._averages = Averages(channels, self.averaging_constant)
        return {"averages": self._averages}


class MovingAverageObserver(_AveragingObserver):
    """A moving average of the batches' ends (Jacob et al., CVPR 2018): ``m += c * (batch - m)``.

    It depends on how the stream is cut into batches, and on their order, by definition: a batch is what one `observe`
    takes. Merging is to go on where this observer stopped with the batches of the other, in this order: to float64
    rounding, and bit for bit where the other has seen one batch. `min_val` and `max_val` are the averages.

    Parameters
    ----------
    axis, nonfinite
        See `Observer`.
    averaging_constant : float
        c, between 0 and 1.
    """

    method = ObserverMethod.MOVING_AVERAGE

    def _data_range(self) -> Ends:
        return self._averages.average_low, self._averages.average_high

    def _choose(self, config: QuantConfig) -> Ends:
        return self._data_range()


class _HistogramObserver(Observer):
    """What percentile, KL and MSE share: a histogram."""

    def _new_statistics(self, channels: int) -> dict[str, Statistic]:
        self._histogram = Histogram(channels)
        return {"histogram": self._histogram, **super()._new_statistics(channels)}


class PercentileObserver(_HistogramObserver):
    """The range that keeps a given percentage of the values (Wu et al., arXiv:2004.09602), of the whole stream.

    Asymmetric codes get [(100 - p)/2, 100 - (100 - p)/2] of the values, symmetric ones the p-th percentile of abs(x),
    both interpolated linearly, and read off a histogram: within one bin (at most 1/4096 of the largest magnitude) of
    the exact percentile. 128 KiB a channel.

    Parameters
    ----------
    axis, nonfinite
        See `Observer`.
    percentile : float
        p, above 0 and at most 100.
    """

    method = ObserverMethod.PERCENTILE
    options = ("nonfinite", "percentile")

    def __init__(
        self, axis: int | None = None, *, nonfinite: str = "raise", percentile: float = DEFAULT_PERCENTILE
    ) -> None:
        self.percentile = _check_percentile(percentile)
        super().__init__(axis, nonfinite=nonfinite)

    def _choose(self, config: QuantConfig) -> Ends:
        return percentile_range(self._histogram, self._low, self._high, config, self.percentile)


class MeanStdObserver(Observer):
    """The mean +- some standard deviations of the whole stream, never wider than the data.

    Moments are combined in float64 (Chan, Golub and LeVeque, 1983); another batching or another order of merging agrees
    to 1e-12 relative, not bit for bit. (Batches observed one by one elsewhere and merged in the same order do.)

    Parameters
    ----------
    axis, nonfinite
        See `Observer`.
    sigma : float
        How many standard deviations (those of the values themselves: ddof 0) to keep on each side.
    """

    method = ObserverMethod.MEAN_STD
    options = ("nonfinite", "sigma")

    def __init__(self, axis: int | None = None, *, nonfinite: str = "raise", sigma: float = DEFAULT_SIGMA) -> None:
        self.sigma = _check_sigma(sigma)
        super().__init__(axis, nonfinite=nonfinite)

    def _new_statistics(self, channels: int) -> dict[str, Statistic]:
        self._moments = Moments(channels)
        return {"moments": self._moments}

    def _choose(self, config: QuantConfig) -> Ends:
        return mean_std_range(self._moments, self._low, self._high, self.sigma)


class KLObserver(_HistogramObserver):
    """Entropy calibration as TensorRT's (Migacz, "8-bit Inference with TensorRT", GTC 2017).

    A threshold clips the histogram; P is what is left with the tail folded into its last bin, Q what is left without
    the tail, merged into as many levels as there are codes (128 of abs(x) for symmetric int8, 8 for int4) and spread
    over each level's non-empty bins. The threshold with the least KL(P || Q) is taken, the widest where several have
    it; every edge of a bin is tried. Asymmetric codes (256 or 16 levels) have two thresholds, searched in
    turn until neither moves. The levels of float8 are as wide as its codes are apart.

    Exact zeros, which a ReLU makes in numbers that would drown the rest, have a code of their own whatever the scale
    and take no part. A clipped histogram with fewer non-empty bins than levels, which Q always equals, is no candidate.
    The method wants many values: with a few hundred (a channel of a weight) the histogram is mostly holes, and MSE or
    min-max serve better. 128 KiB a channel.

    Parameters
    ----------
    axis, nonfinite
        See `Observer`.
    """

    method = ObserverMethod.KL

    def _choose(self, config: QuantConfig) -> Ends:
        return kl_range(self._histogram, self._low, self._high, config)


class MSEObserver(_HistogramObserver):
    """The thresholds with the least expected squared quantization error (Max, 1960; Banner et al., NeurIPS 2019).

    The error is that of the codes with the very scale and zero point that `config` would get, expected over a histogram
    whose values lie evenly within their bins. 128 KiB a channel.

    Parameters
    ----------
    axis, nonfinite
        See `Observer`.
    """

    method = ObserverMethod.MSE

    def _choose(self, config: QuantConfig) -> Ends:
        return mse_range(self._histogram, self._low, self._high, config)


class CalibrationCollector(_HistogramObserver, _AveragingObserver):
    """Observes once, and answers for every method.

    It keeps what the single observers keep, and gives the answers that they give, bit for bit (with equal options).
    128 KiB a channel.

    Parameters
    ----------
    axis, nonfinite
        See `Observer`.
    averaging_constant : float
        Of the moving average, which is the one answer that depends on the batches.

    Examples
    --------
    >>> import numpy as np
    >>> collector = CalibrationCollector()
    >>> collector.observe(np.linspace(-1.0, 2.0, 1001))
    >>> wide = collector.qparams(QuantConfig.int8(), "min_max")
    >>> narrow = collector.qparams(QuantConfig.int8(), "percentile", percentile=90.0)
    >>> bool(narrow.scale < wide.scale)
    True
    """

    def _new_statistics(self, channels: int) -> dict[str, Statistic]:
        self._moments = Moments(channels)
        return {**super()._new_statistics(channels), "moments": self._moments}

    def _choose(
        self,
        config: QuantConfig,
        method: ObserverMethod | str = ObserverMethod.KL,
        percentile: float = DEFAULT_PERCENTILE,
        sigma: float = DEFAULT_SIGMA,
    ) -> Ends:
        low, high = self._low, self._high
        rules: dict[ObserverMethod, Callable[[], Ends]] = {
            ObserverMethod.MIN_MAX: lambda: (low, high),
            ObserverMethod.MOVING_AVERAGE: lambda: (self._averages.average_low, self._averages.average_high),
            ObserverMethod.PERCENTILE: lambda: percentile_range(
                self._histogram, low, high, config, _check_percentile(percentile)
            ),
            ObserverMethod.MEAN_STD: lambda: mean_std_range(self._moments, low, high, _check_sigma(sigma)),
            ObserverMethod.KL: lambda: kl_range(self._histogram, low, high, config),
            ObserverMethod.MSE: lambda: mse_range(self._histogram, low, high, config),
        }
        return rules[ObserverMethod(method)]()

    def calibrated_range(
        self,
        config: QuantConfig,
        method: ObserverMethod | str = ObserverMethod.KL,
        *,
        percentile: float = DEFAULT_PERCENTILE,
        sigma: float = DEFAULT_SIGMA,
    ) -> Ends:
        """Return the range that `method` chooses; parameters as for `qparams`."""
        return self._answer(config, {"method": method, "percentile": percentile, "sigma": sigma})

    def qparams(
        self,
        config: QuantConfig,
        method: ObserverMethod | str = ObserverMethod.KL,
        *,
        percentile: float = DEFAULT_PERCENTILE,
        sigma: float = DEFAULT_SIGMA,
    ) -> QParams:
        """Return the scale and zero point that `method` gives.

        Parameters
        ----------
        config : QuantConfig
            Per tensor, or per channel along the collector's axis.
        method : ObserverMethod or str
        percentile, sigma : float, optional
            Those of `PercentileObserver` and `MeanStdObserver`; the other methods do not look at them.

        Returns
        -------
        QParams

        Raises
        ------
        RuntimeError
            Before any data.
        ValueError
            For an unknown method, an option out of range, or a config of another granularity or axis.
        """
        ends = self.calibrated_range(config, method, percentile=percentile, sigma=sigma)
        return qparams_from_range(*ends, config)

    def min_max_scale(self, config: QuantConfig | None = None) -> NDArray[np.float32]:
        """Return the scale of the whole range; symmetric int8 (per channel with an axis) unless `config` says else."""
        return self.qparams(self._default(config), "min_max").scale

    def percentile_scale(
        self, percentile: float = DEFAULT_PERCENTILE, config: QuantConfig | None = None
    ) -> NDArray[np.float32]:
        """Return the scale of the range that keeps `percentile` percent of the values; `config` as above."""
        return self.qparams(self._default(config), "percentile", percentile=percentile).scale

    def kl_divergence_scale(self, config: QuantConfig | None = None) -> NDArray[np.float32]:
        """Return the scale of entropy calibration; `config` as above."""
        return self.qparams(self._default(config), "kl").scale

    def _default(self, config: QuantConfig | None) -> QuantConfig:
        if config is not None:
            return config
        return QuantConfig.int8() if self.axis is None else QuantConfig.int8_per_channel(self.axis)


def _check_constant(c: float) -> float:
    if not 0.0 < c <= 1.0:
        raise ValueError(f"averaging_constant={c} must be above 0 and at most 1")
    return float(c)


def _check_percentile(p: float) -> float:
    if not 0.0 < p <= 100.0:
        raise ValueError(f"percentile={p} must be above 0 and at most 100 (99.99 drops one value in ten thousand)")
    return float(p)


def _check_sigma(k: float) -> float:
    if not 0.0 < k < math.inf:
        raise ValueError(f"sigma={k} must be a positive number of standard deviations")
    return float(k)


_OBSERVERS: dict[ObserverMethod, type[Observer]] = {
    ObserverMethod.MIN_MAX: MinMaxObserver,
    ObserverMethod.MOVING_AVERAGE: MovingAverageObserver,
    ObserverMethod.PERCENTILE: PercentileObserver,
    ObserverMethod.MEAN_STD: MeanStdObserver,
    ObserverMethod.KL: KLObserver,
    ObserverMethod.MSE: MSEObserver,
}


def make_observer(method: ObserverMethod | str, axis: int | None = None, **options: Any) -> Observer:
    """Make the observer of a method.

    Parameters
    ----------
    method : ObserverMethod or str
        ``"min_max"``, ``"moving_average"``, ``"percentile"``, ``"mean_std"``, ``"kl"`` or ``"mse"``.
    axis : int, optional
        The axis of the channels; None for one range per tensor.
    **options
        ``nonfinite``, and the method's own: ``averaging_constant`` (0.01), ``percentile`` (99.99), ``sigma`` (3.0).

    Returns
    -------
    Observer

    Raises
    ------
    ValueError
        For an unknown method or an option out of range.
    TypeError
        For an option that the method does not have.

    Examples
    --------
    >>> make_observer("percentile", percentile=99.9)
    PercentileObserver(axis=None, nonfinite='raise', percentile=99.9)
    """
    kind = _OBSERVERS[ObserverMethod(method)]
    unknown = sorted(set(options) - set(kind.options))
    if unknown:
        raise TypeError(f"{kind.method!r} has no option {unknown[0]!r}; it has {', '.join(kind.options)}")
    return kind(axis, **options)


#: Channels or groups observed at a time by `observe_once`, so that their histograms take a few megabytes.
_ROWS_AT_ONCE = 32


def observe_once(
    x: ArrayLike, config: QuantConfig, method: ObserverMethod | str = ObserverMethod.MIN_MAX, **options: Any
) -> QParams:
    """Find the scale and zero point of one whole array (a weight), of every granularity, groups too.

    Parameters
    ----------
    x : array_like of float
        Any shape.
    config : QuantConfig
        The target.
    method : ObserverMethod or str
        How; any observer's method.
    **options
        Those of `make_observer`.

    Returns
    -------
    QParams
        Of the scales' shape that `config` gives x.
    """
    x = plain_array(x)
    method = ObserverMethod(method)
    if x.size == 0:
        return qparams_from_range(*block_min_max(x, config), config)
    if config.axis is None:
        observer = make_observer(method, **options)
        observer.observe(x)
        return observer.qparams(config)
    shape = Granules.of_config(x.shape, config).shape
    moved = np.moveaxis(x, config.axis, -1) if config.group_size else np.moveaxis(x, config.axis, 0)
    per_row = config.per_channel(0)

    def ends_of(rows: NDArray[Any]) -> NDArray[np.float64]:
        ends = np.empty((2, len(rows)))
        for i in range(0, len(rows), _ROWS_AT_ONCE):
            observer = make_observer(method, 0, **options)
            observer.observe(rows[i : i + _ROWS_AT_ONCE])
            ends[:, i : i + _ROWS_AT_ONCE] = observer.calibrated_range(per_row)
        return ends

    def least_error_of(groups: NDArray[Any]) -> NDArray[np.float64]:
        observer = make_observer(ObserverMethod.MIN_MAX, 0, **options)
        observer.observe(groups)
        values = as_float_array(groups)
        if observer.skipped:
            values = np.where(np.isfinite(values), values, values.dtype.type(0))
        return np.stack(mse_range_of_rows(values, *observer.range, per_row))

    if config.group_size is None:
        low, high = ends_of(moved.reshape(len(moved), -1))
        return qparams_from_range(low, high, config)
    # Groups are short: a histogram of each would be larger than the group itself.
    search = least_error_of if method is ObserverMethod.MSE else ends_of
    size = config.group_size
    whole = moved.shape[-1] // size * size
    parts = []
    for groups, length in ((moved[..., :whole], size), (moved[..., whole:], moved.shape[-1] - whole)):
        if groups.size:
            ends = search(groups.reshape(-1, length))
            parts.append(ends.reshape(2, *moved.shape[:-1], -1))
    low, high = np.moveaxis(np.concatenate(parts, axis=-1), -1, config.axis % x.ndim + 1).reshape(2, *shape)
    return qparams_from_range(low, high, config)
