"""Long streams: every value counted, in memory that does not grow. `make stream` sends each observer a billion."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from qnative.config import ObserverMethod
from qnative.observers import Observer, make_observer
from qnative.streams import MOST, SLAB, Averages, Histogram, Moments, pieces, rows_of

METHODS = [m.value for m in ObserverMethod]
BATCHES = 16


def batches(size: int) -> Iterator[NDArray[np.float32]]:
    """Batches of different magnitudes, zeros among them."""
    rng = np.random.default_rng(0)
    for i in range(BATCHES):
        x = rng.standard_normal((size // 8, 8), np.float32) * np.float32(2.0 ** (i % 5 - 2))
        x[::17] = 0.0
        yield x


def resident() -> int:
    """Bytes of this process in memory now; 0 where nobody tells."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * mmap.PAGESIZE
    except OSError:
        return 0


def check_counted(observer: Observer, once: Observer, times: int) -> None:
    """A stream that came `times` times has the ends of one, and so many times its counts."""
    for a, b in zip(observer.range, once.range, strict=True):
        if observer.method != "moving_average":
            np.testing.assert_array_equal(a, b)
    assert observer.count == times * once.count
    for name, statistic in observer._statistics.items():
        other = once._statistics[name]
        if isinstance(statistic, Histogram):
            assert isinstance(other, Histogram)
            np.testing.assert_array_equal(statistic.counts, times * other.counts)
            np.testing.assert_array_equal(statistic.zeros, times * other.zeros)
            np.testing.assert_array_equal(statistic.exponent, other.exponent)
        elif isinstance(statistic, Moments):
            assert isinstance(other, Moments)
            np.testing.assert_array_equal(statistic.numbers, times * other.numbers)
            deviation = np.sqrt(other.squares / other.numbers)
            np.testing.assert_allclose(statistic.mean, other.mean, rtol=0, atol=1e-12 * float(deviation.max()))
            np.testing.assert_allclose(statistic.squares, times * other.squares, rtol=1e-12)
        else:
            assert isinstance(statistic, Averages)
            assert np.all(statistic.batches == times * BATCHES)


def stream(method: str, axis: int | None, size: int, times: int) -> None:
    cycle = list(batches(size))
    once, observer = make_observer(method, axis), make_observer(method, axis)
    for x in cycle:
        once.observe(x)
        observer.observe(x)
    low, high = observer.range
    before, start = resident(), time.perf_counter()
    most = 0
    for _ in range(times - 1):
        for x in cycle:
            observer.observe(x)
            if method == "moving_average":
                over = None if axis is None else 0
                low, high = low + 0.01 * (x.min(over) - low), high + 0.01 * (x.max(over) - high)
        most = max(most, resident() - before)
    seconds = time.perf_counter() - start
    check_counted(observer, once, times)
    if method == "moving_average":
        np.testing.assert_allclose(observer.range, (low, high), rtol=1e-12)
    channels = 1 if axis is None else 8
    assert most < (4 << 20) + 2 * channels * (128 << 10), f"resident memory grew by {most} bytes"
    print(
        f"{method}: {observer.count:,} values, {observer.count / seconds / 1e6:.0f} million a second, resident "
        f"{before / 1e6:.1f} MB, at most {most / 1e6:.2f} MB more"
    )


@pytest.mark.parametrize("shape", [(7, 3, 50, 50), (2, 400, 500), (3, 70_000), (70_000, 3), (1, 1), (300_000,)])
@pytest.mark.parametrize(("size", "each"), [(SLAB, 0), (2 * SLAB, 1 << 12)])
def test_an_array_is_cut_into_all_of_its_values(shape: tuple[int, ...], size: int, each: int) -> None:
    x = np.random.default_rng(0).permutation(np.arange(np.prod(shape), dtype=np.float32)).reshape(shape)
    for axis in (None, *range(x.ndim)):
        for array in (x, np.asfortranarray(x)):
            rows = list(rows_of(array, axis, size, each))
            channels = 1 if axis is None else shape[axis]
            assert all(r.ndim == 2 and len(r) == channels and r.flags.c_contiguous for r in rows)
            wanted, least = size if array.flags.c_contiguous else SLAB, 1
            if axis is not None:
                wanted = min(max(SLAB, channels * each), MOST)
                least = x.size // max(shape[:axis] + shape[axis + 1 :], default=1)  # one index of what can be cut
            assert max(r.size for r in rows) <= max(wanted, least)
            seen = np.sort(np.concatenate(rows, axis=1), axis=1)
            whole = x.reshape(1, -1) if axis is None else np.moveaxis(x, axis, 0).reshape(channels, -1)
            np.testing.assert_array_equal(seen, np.sort(whole, axis=1))


def test_the_first_dimension_is_cut_where_it_gives_pieces_small_enough() -> None:
    """They then lie in one piece in memory, and are not copied."""
    x = np.zeros((8, 64, 56, 56), np.float32)
    for size, shape in ((1 << 20, (5, 64, 56, 56)), (1 << 18, (1, 64, 56, 56)), (1 << 16, (8, 64, 2, 56))):
        first = next(pieces(x, (1,), size))
        assert first.shape == shape
        assert np.shares_memory(first, x) == (shape[0] < 8)


@pytest.mark.parametrize("axis", [None, 1])
@pytest.mark.parametrize("method", METHODS)
def test_a_stream_is_counted_whole_in_constant_memory(method: str, axis: int | None) -> None:
    stream(method, axis, 1 << 16, 3)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_billion_values_are_counted_in_constant_memory(method: str) -> None:
    stream(method, None, 1 << 20, int(os.environ.get("QNATIVE_STREAM_CYCLES", "60")))
