"""Observers: one stream, one answer, however it is cut, ordered and merged; and the answer is the right one."""

from __future__ import annotations

import itertools
import math
import pickle
import tracemalloc
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from qnative import observers
from qnative.config import ObserverMethod, QParams, QuantConfig, qparams_from_range
from qnative.elementwise import fake_quantize, sqnr
from qnative.observers import (
    CalibrationCollector,
    MinMaxObserver,
    Observer,
    PercentileObserver,
    make_observer,
    observe_once,
)
from qnative.ranges import _HistogramError
from qnative.streams import SIDE, Averages, Histogram, Moments
from qnative.tensor import quantize_tensor

METHODS = [m.value for m in ObserverMethod]
HISTOGRAMS = ["percentile", "kl", "mse"]
#: The methods whose state is the same bits however the stream comes.
EXACT = ["min_max", *HISTOGRAMS]
INT8, INT4 = QuantConfig.int8(), QuantConfig.int4()
UINT8 = QuantConfig("uint8", "asymmetric")
CONFIGS = [
    INT8,
    INT8.asymmetric(),
    UINT8,
    QuantConfig("uint8"),
    INT4,
    INT4.asymmetric(),
    QuantConfig("uint4", "asymmetric"),
]
FLOAT8 = [QuantConfig.fp8(), QuantConfig.fp8("float8_e5m2")]


def observed(method: str, *batches: Any, **options: Any) -> Observer:
    observer = make_observer(method, **options)
    for batch in batches:
        observer.observe(batch)
    return observer


def assert_same_state(a: Observer, b: Observer) -> None:
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys()
    for name, value in left.items():
        if isinstance(value, np.ndarray):
            reference.assert_same_bits(value, right[name], name)
        else:
            assert value == right[name], name


def histogram_of(observer: Observer) -> Histogram:
    return observer._statistics["histogram"]  # type: ignore[return-value]


def simulate(x: NDArray[Any], qparams: QParams) -> NDArray[Any]:
    float8 = qparams.dtype.startswith("float8")
    return fake_quantize(
        x, qparams.scale, qparams.zero_point, qparams.dtype, qparams.axis,
        quant_min=None if float8 else qparams.quant_min, quant_max=None if float8 else qparams.quant_max,
    )  # fmt: skip


def quality(x: NDArray[Any], qparams: QParams) -> float:
    return sqnr(x, simulate(x, qparams))


def gauss(n: int = 1_000_000, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(n).astype(np.float32)


# ----------------------------------------------------------------------------------------------------------------------
# One stream, one answer


def values_of(dtype: Any) -> Any:
    """Every magnitude that the dtype has, zeros and subnormals too, and often equal or nearly equal ones."""
    width = 8 * np.dtype(dtype).itemsize
    anything = st.floats(allow_nan=False, allow_infinity=False, width=width)
    ordinary = st.floats(-4, 4, width=width)
    edges = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, -2.0, 0.5, np.nextafter(dtype(1), dtype(0)), 1024.0, -4096.0])
    tiny = st.sampled_from([np.finfo(dtype).smallest_subnormal, -np.finfo(dtype).smallest_subnormal])
    return st.lists(st.one_of(anything, ordinary, edges, tiny), min_size=1, max_size=40)


@st.composite
def cut_streams(draw: Any) -> tuple[NDArray[Any], list[NDArray[Any]]]:
    """A stream, and the same values in another order, cut into batches."""
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    stream = np.array(draw(values_of(dtype)), dtype)
    order = draw(st.permutations(range(len(stream))))
    cuts = sorted(draw(st.lists(st.integers(0, len(stream)), max_size=5)))
    return stream, np.split(stream[order], cuts)


@pytest.mark.parametrize("method", EXACT)
@given(case=cut_streams())
def test_batches_and_their_order_do_not_change_one_bit(method: str, case: Any) -> None:
    stream, batches = case
    assert_same_state(observed(method, stream), observed(method, *batches))


@pytest.mark.parametrize("method", EXACT)
@given(case=cut_streams(), data=st.data())
def test_merging_shards_in_any_order_and_grouping_gives_the_bits_of_one_stream(
    method: str, case: Any, data: Any
) -> None:
    stream, batches = case
    shards = [observed(method, batch) for batch in batches]
    while len(shards) > 1:
        i = data.draw(st.integers(0, len(shards) - 1))
        one = shards.pop(i)
        other = shards.pop(data.draw(st.integers(0, len(shards) - 1)))
        before = pickle.dumps(other.state_dict())
        shards.append(one.merge(other))
        assert pickle.dumps(other.state_dict()) == before
    assert_same_state(observed(method, stream), shards[0])


@pytest.mark.parametrize("axis", [None, 1])
@pytest.mark.parametrize("method", [*METHODS, "collector"])
def test_64_shards_merged_in_10_orders_give_one_answer(method: str, axis: int | None) -> None:
    """Any two are merged next, so that every kind of tree comes about; and the state is compared, not only a range."""
    rng = np.random.default_rng(1)
    shards = [rng.standard_normal((250, 2)) * 10.0 ** rng.integers(-3, 3) for _ in range(64)]

    def fresh() -> Observer:
        return CalibrationCollector(axis) if method == "collector" else make_observer(method, axis)

    totals = []
    for _ in range(10):
        heap = []
        for shard in shards:
            heap.append(fresh())
            heap[-1].observe(shard)
        while len(heap) > 1:
            one = heap.pop(int(rng.integers(len(heap))))
            one.merge(heap.pop(int(rng.integers(len(heap)))))
            heap.append(one)
        totals.append(heap[0])
    states = [total.state_dict() for total in totals]
    exact = {name for name in states[0] if not name.startswith(("moments.mean", "moments.squares", "averages."))}
    assert {"low", "high", "count"} <= exact
    for state in states[1:]:
        for name in exact:
            np.testing.assert_array_equal(state[name], states[0][name], name)
    if method == "mean_std":
        config = INT8 if axis is None else INT8.per_channel(axis)
        for total in totals[1:]:
            np.testing.assert_allclose(
                total.calibrated_range(config), totals[0].calibrated_range(config), rtol=1e-12, atol=0.0
            )
    if method == "moving_average":  # by definition: it would otherwise be no moving average
        assert len({total.max_val.tobytes() for total in totals}) > 1


@pytest.mark.parametrize("axis", [None, 0])
@pytest.mark.parametrize("method", METHODS)
def test_batches_observed_apart_and_merged_in_order_give_the_very_bits(method: str, axis: int | None) -> None:
    rng = np.random.default_rng(20)
    # Longer than the working block, so that a batch's moments are themselves combined from parts.
    batches = [rng.standard_normal((2, n)) + 100.0 * rng.standard_normal() for n in (50_000, 3, 90_000, 1)]
    total = make_observer(method, axis)
    for batch in batches:
        total.merge(observed(method, batch, axis=axis))
    assert_same_state(total, observed(method, *batches, axis=axis))


class Broken(Exception):
    pass


@pytest.mark.parametrize("method", METHODS)
def test_an_observer_that_was_broken_off_says_so(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the middle of a batch leaves half of it counted; no answer is better than that of half a batch."""
    observer, whole = observed(method, [1.0, 2.0]), observed(method, [1.0, 2.0])

    def broken(self: Any, low: Any, high: Any) -> None:
        raise Broken

    for kind in (Histogram, Moments, Averages):
        monkeypatch.setattr(kind, "start", broken)
    if method == "min_max":  # whose batch is one step
        observer._torn = True
    else:
        with pytest.raises(Broken):
            observer.observe([3.0])
    monkeypatch.undo()
    for ask in (
        lambda: observer.observe([1.0]),
        lambda: observer.merge(whole),
        lambda: whole.merge(observer),
        lambda: observer.range,
        lambda: observer.qparams(INT8),
        observer.state_dict,
    ):
        with pytest.raises(RuntimeError, match="broken off"):
            ask()
    assert float(whole.max_val) == 2.0
    observer.reset()
    observer.observe([1.0, 2.0])
    assert_same_state(observer, whole)


@given(case=cut_streams())
def test_histogram_counts_are_those_of_exact_arithmetic(case: Any) -> None:
    stream, batches = case
    histogram = histogram_of(observed("kl", *batches))
    amax = max(abs(Fraction(float(v))) for v in stream)
    if not amax:
        assert histogram.zeros.tolist() == [len(stream)] and not histogram.counts.any()
        return
    exponent = int(histogram.exponent[0])
    assert Fraction(2) ** (exponent - 1) <= amax < Fraction(2) ** exponent
    width = Fraction(2) ** exponent / SIDE
    expected = np.zeros((2, SIDE), np.int64)
    for v in map(float, stream):
        if v:
            expected[int(v > 0), math.floor(abs(Fraction(v)) / width)] += 1
    np.testing.assert_array_equal(histogram.counts[0], expected)
    assert histogram.zeros[0] == np.count_nonzero(stream == 0)


@pytest.mark.parametrize(
    "batches",
    [
        ([1e-40, -1e-40], [3e38, -1.0]),
        ([0.0, 0.0], [1e-45, -1e-45], [1.0]),
        ([0.0], [0.0]),
        ([-1e-45], [1e-45]),
        ([1.0], [2.0], [4.0], [8.0], [1e30]),
        ([np.nextafter(np.float32(1), np.float32(0))], [1.0]),
    ],
    ids=["tiny then huge", "zeros, subnormals, one", "zeros", "subnormals", "doubling", "just below a power"],
)
@pytest.mark.parametrize("dtypes", [(np.float32,), (np.float64,), (np.float32, np.float64), (np.float64, np.float32)])
def test_growing_forgets_nothing(batches: Any, dtypes: Any) -> None:
    arrays = [np.array(b, np.float32).astype(d) for b, d in zip(batches, itertools.cycle(dtypes), strict=False)]
    grown = observed("percentile", *arrays)
    assert_same_state(grown, observed("percentile", *arrays[::-1]))
    histogram = histogram_of(grown)
    assert histogram.counts.sum() + histogram.zeros.sum() == sum(map(len, batches)) == grown.count
    negative = sum(np.count_nonzero(a < 0) for a in arrays)
    assert histogram.counts[0, 0].sum() == negative, "a value too small for its bin keeps its sign"


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("method", EXACT)
def test_which_zero_came_first_does_not_show(method: str, dtype: Any) -> None:
    one, other = (np.array([zero, 1.0], dtype) for zero in (0.0, -0.0))
    states = [observed(method, *batches) for batches in ((one, other), (other, one), (other,), (other, -other))]
    assert_same_state(states[0], states[1])
    assert_same_state(states[0], observed(method, other).merge(observed(method, one)))
    for state in states[:3]:
        low, high = state.range
        assert (float(low), float(high), bool(np.signbit(low))) == (0.0, 1.0, False)
    for batches in ((-one, -other), (-other, -one)):
        assert not np.signbit(observed(method, *batches).max_val)


def test_float64_beyond_float32_is_counted_exactly() -> None:
    wide = observed("kl", np.array([1e300, -1e-300, 5e-324, 0.0]), np.float32([1.0, -1e-45]))
    histogram = histogram_of(wide)
    assert histogram.counts[0].sum(axis=1).tolist() == [2, 3]
    assert histogram.zeros.tolist() == [1]
    assert_same_state(wide, observed("kl", np.float32([-1e-45, 1.0]), np.array([0.0, 5e-324, -1e-300, 1e300])))


@given(amax=st.floats(1e-30, 1e30), seed=st.integers(0, 99))
def test_at_least_4096_bins_over_the_range(amax: float, seed: int) -> None:
    histogram = histogram_of(observed("mse", np.array([amax])))
    assert 4096 <= amax / histogram.width[0] < 8192


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2])
@pytest.mark.parametrize("method", METHODS)
def test_a_channel_gets_what_it_would_get_alone(method: str, axis: int) -> None:
    rng = np.random.default_rng(2)
    batches = [rng.laplace(size=(3, 4, 2)) * np.exp2(rng.integers(-20, 20, (3, 1, 2))) for _ in range(3)]
    batches[1] = np.zeros_like(batches[1])
    together = observed(method, *batches, axis=axis)
    for c in range(batches[0].shape[axis]):
        alone = observed(method, *(b.take(c, axis) for b in batches))
        for config in (INT4, INT4.asymmetric()):
            np.testing.assert_allclose(
                np.array(together.calibrated_range(config.per_channel(axis)))[:, c],
                alone.calibrated_range(config),
                rtol=1e-12 if method == "mean_std" else 0.0,
                atol=0.0,
            )


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_an_array_larger_than_the_working_block_is_seen_whole(axis: int | None) -> None:
    rng = np.random.default_rng(3)
    x = rng.standard_normal((20, 9000) if axis == 0 else (9000, 20))
    x[-1, -1], x[-1, 0] = 50.0, -60.0
    for method in METHODS:
        if method == "moving_average":
            continue
        whole = observed(method, x, axis=axis)
        parts = observed(method, *np.split(x, [3, 100, 8999], axis=1 if axis == 0 else 0), axis=axis)
        if method == "mean_std":
            config = INT8 if axis is None else INT8.per_channel(axis)
            np.testing.assert_allclose(whole.calibrated_range(config), parts.calibrated_range(config), rtol=1e-12)
        else:
            assert_same_state(whole, parts)
    # A batch is one call, whatever its size.
    average = observed("moving_average", x, axis=axis)
    np.testing.assert_array_equal(average.max_val, x.max(axis=None if axis is None else 1 - axis))


def rising(n: int) -> NDArray[Any]:
    """Values whose histogram has to grow over and over, on both sides."""
    return np.exp2(np.linspace(-140, 120, n)) * np.where(np.arange(n) % 3, 1, -0.7)


@pytest.mark.parametrize("method", ["kl", "mse", "percentile"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
@pytest.mark.parametrize("kind", ["normal", "rising", "falling", "zeros", "negative", "strided"])
def test_a_large_batch_is_read_once_and_counted_the_same(
    method: str, dtype: type, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(4)
    n = 70_001
    x = {
        "normal": lambda: rng.standard_normal(n),
        "rising": lambda: rising(n),
        "falling": lambda: rising(n)[::-1].copy(),
        "zeros": lambda: np.where(rng.random(n) < 0.5, 0.0, -0.0),
        "negative": lambda: -1.0 - rng.random(n),
        "strided": lambda: rng.standard_normal((n, 2)).T[1],
    }[kind]()
    with np.errstate(over="ignore"):
        x = np.clip(x, -6e4, 6e4).astype(dtype) if dtype is np.float16 else x.astype(dtype)
    twice = observed(method, x[:10], x)
    with monkeypatch.context() as patch:
        patch.setattr(observers, "ONCE", n)
        patch.setattr(observers, "find_ends", None)
        once = observed(method, x)
    assert_same_state(once.merge(observed(method, x[:10])), twice)
    assert not np.signbit(once.min_val) or once.min_val < 0
    assert not np.signbit(once.max_val) or once.max_val < 0


@pytest.mark.parametrize("how", ["unaligned", "strided", "float16"])
def test_what_takes_a_copy_is_read_piece_by_piece(how: str) -> None:
    n = observers.ONCE
    x = {
        "unaligned": lambda: np.zeros(4 * n + 1, np.uint8)[1:].view(np.float32),  # a file mapped from an odd byte on
        "strided": lambda: np.zeros((n, 2), np.float32).T[1],
        "float16": lambda: np.zeros(n, np.float16),
    }[how]()
    tracemalloc.start()
    observed("kl", x)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 << 20, f"{x.nbytes >> 20} MiB"


def test_a_derived_observer_may_have_its_own_constructor(monkeypatch: pytest.MonkeyPatch) -> None:
    class Tails(PercentileObserver):
        def __init__(self) -> None:
            super().__init__(percentile=99.0)

    monkeypatch.setattr(observers, "ONCE", 1000)
    x = gauss(3000)
    ours, theirs = Tails(), observed("percentile", x, percentile=99.0)
    ours.observe(x)
    np.testing.assert_array_equal(ours.calibrated_range(INT8), theirs.calibrated_range(INT8))


def test_what_is_not_finite_in_a_large_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observers, "ONCE", 5000)
    rng = np.random.default_rng(5)
    for dtype in (np.float32, np.float64):
        x = rng.standard_normal(9001).astype(dtype)
        for at, value in ((0, np.nan), (63, -np.inf), (64, np.inf), (4000, np.nan), (9000, np.inf)):
            x[at] = value
        strict, lenient = observed("kl", x[1:9]), make_observer("kl", nonfinite="skip")
        before = strict.state_dict()
        with pytest.raises(ValueError, match="5 of 9001 values are NaN or infinite"):
            strict.observe(x)
        for name, value in before.items():
            np.testing.assert_array_equal(strict.state_dict()[name], value)
        lenient.observe(x)
        assert (lenient.count, lenient.skipped) == (8996, 5)
        assert (lenient.min_val, lenient.max_val) == (x[np.isfinite(x)].min(), x[np.isfinite(x)].max())
        clean = observed("kl", x[np.isfinite(x)])
        reference.assert_same_bits(histogram_of(lenient).counts, histogram_of(clean).counts)


@given(hnp.arrays(np.float32, hnp.array_shapes(max_dims=3, max_side=5), elements=st.floats(-8, 8, width=32)))
def test_memory_layout_does_not_matter(x: NDArray[np.float32]) -> None:
    plain = observed("kl", x)
    read_only = x.copy()
    read_only.flags.writeable = False
    for same in (
        x.reshape(-1),
        np.asfortranarray(x),
        x[..., ::-1],
        x.astype(">f4"),
        read_only,
        np.repeat(x, 2, axis=-1)[..., ::2],
    ):
        assert_same_state(plain, observed("kl", same))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_input_dtypes(dtype: Any) -> None:
    x = gauss(1000).astype(dtype)
    assert_same_state(observed("mse", x), observed("mse", x.astype(np.float32 if dtype != np.float64 else dtype)))


@pytest.mark.parametrize("x", [np.arange(3), np.ones(3, bool), np.ones(3, complex), np.array(["a"])])
@pytest.mark.parametrize("method", METHODS)
def test_what_is_not_a_float_is_refused(method: str, x: Any) -> None:
    observer = make_observer(method)
    with pytest.raises(TypeError):
        observer.observe(x)
    with pytest.raises(TypeError):
        observer.observe(x[:0])
    assert observer.count == 0


def test_answers_do_not_change_with_what_comes_later() -> None:
    observer = observed("min_max", [1.0, 2.0])
    low, high = observer.range
    asked = observer.calibrated_range(INT8)
    observer.observe([-5.0, 9.0])
    assert (low, high) == asked == (1.0, 2.0)
    asked[0][...] = 7.0
    assert observer.min_val == -5.0


def test_scalars_lists_and_empty_batches() -> None:
    observer = make_observer("min_max")
    observer.observe(np.zeros((0, 4), np.float32))
    assert observer.count == 0
    observer.observe(np.float32(2.0))
    observer.observe([[1.0, -3.0]])
    assert (float(observer.min_val), float(observer.max_val), observer.count) == (-3.0, 2.0, 3)
    channels = make_observer("kl", axis=-1)
    channels.observe(np.float32([1.0, -2.0]))  # channels of one value each
    channels.observe(np.float32([[[3.0, 4.0]]]))  # and another number of dimensions
    assert channels.max_val.tolist() == [3.0, 4.0]


def test_every_value_counts_however_many_there_are() -> None:
    """No cap and no subsampling: what comes late in a long stream weighs as much as what comes first."""
    observer = make_observer("percentile", percentile=60.0)
    for i in range(40):
        observer.observe(np.full(100_000, 1.0 if i < 20 else 9.0, np.float32))
    assert observer.count == 4_000_000
    low, high = observer.calibrated_range(UINT8)
    assert 1.0 <= low < 1.01 and 8.99 < high <= 9.0
    narrow = histogram_of(observer).counts[0, 1]
    assert sorted(narrow[narrow > 0].tolist()) == [2_000_000, 2_000_000]
    # an outlier channel that a stride would step over
    x = np.zeros((64, 1536), np.float32)
    x[:, 1] = 100.0
    assert observed("min_max", x).max_val == 100.0 and histogram_of(observed("kl", x)).counts.sum() == 64


def test_memory_does_not_grow_with_the_stream() -> None:
    collector = CalibrationCollector()
    x = gauss(1 << 20)
    collector.observe(x)
    tracemalloc.start()
    for _ in range(5):
        collector.observe(x)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 50_000, "kept after five million values more"
    assert peak < 8 << 20, "temporaries"
    assert len(pickle.dumps(collector)) < 200_000


# ----------------------------------------------------------------------------------------------------------------------
# Min-max, moving average, mean and deviation


@given(case=cut_streams())
def test_min_max_is_that_of_everything_seen(case: Any) -> None:
    stream, batches = case
    observer = observed("min_max", *batches)
    assert float(observer.min_val) == stream.min() and float(observer.max_val) == stream.max()
    assert observer.calibrated_range(UINT8) == observer.range


def test_moving_average_follows_its_formula() -> None:
    rng = np.random.default_rng(4)
    batches = [rng.standard_normal(50) for _ in range(7)]
    low, high = batches[0].min(), batches[0].max()
    for batch in batches[1:]:
        low += 0.01 * (batch.min() - low)
        high += 0.01 * (batch.max() - high)
    observer = observed("moving_average", *batches)
    assert (float(observer.min_val), float(observer.max_val)) == (low, high)
    quick = observed("moving_average", *batches, averaging_constant=1.0)
    assert float(quick.min_val) == batches[-1].min()


@given(st.lists(st.lists(st.floats(-100, 100), min_size=1, max_size=3), min_size=2, max_size=8), st.data())
def test_merging_moving_averages_is_going_on_with_the_other_stream(batches: Any, data: Any) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(batches)), min_size=1, max_size=3)))
    bounds = [0, *cuts, len(batches)]
    shards = [observed("moving_average", *batches[a:b], averaging_constant=0.3) for a, b in itertools.pairwise(bounds)]
    whole = observed("moving_average", *batches, averaging_constant=0.3)
    right = shards[-1]
    for shard in shards[-2::-1]:  # the last two first: grouping does not matter, order does
        right = shard.merge(right)
    np.testing.assert_allclose(right.range, whole.range, rtol=1e-12, atol=1e-11)


def test_mean_std_is_that_of_the_whole_stream() -> None:
    rng = np.random.default_rng(5)
    x = 1e4 + rng.standard_normal(100_000)
    x[:50_000] += 3.0
    shards = np.split(x, [10, 1000, 70_000])
    for observer in (
        observed("mean_std", x),
        observed("mean_std", *shards),
        observed("mean_std", shards[3]).merge(observed("mean_std", *shards[:3])),
    ):
        expected = x.mean() - 3 * x.std(), x.mean() + 3 * x.std()
        np.testing.assert_allclose(observer.calibrated_range(UINT8), expected, rtol=1e-12)
    narrow = observed("mean_std", x, sigma=1.5).calibrated_range(UINT8)
    np.testing.assert_allclose(narrow, (x.mean() - 1.5 * x.std(), x.mean() + 1.5 * x.std()), rtol=1e-12)


@given(case=cut_streams())
def test_mean_std_is_never_wider_than_the_data(case: Any) -> None:
    stream, batches = case
    low, high = observed("mean_std", *batches).calibrated_range(UINT8)
    assert stream.min() <= low <= high <= stream.max()


# ----------------------------------------------------------------------------------------------------------------------
# Percentile


@pytest.mark.parametrize("percentile", [99.99, 99.9, 97.0, 50.0, 100.0])
@given(seed=st.integers(0, 10_000), n=st.integers(1, 400))
def test_percentile_is_within_a_bin_of_exact(percentile: float, seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_t(2, n) * 10.0 ** rng.integers(-5, 5) + rng.integers(-2, 3)
    x[rng.random(n) < 0.2] = 0.0
    observer = observed("percentile", *np.array_split(x, 3), percentile=percentile)
    width = float(histogram_of(observer).width[0])
    tail = (100 - percentile) / 2
    for actual, exact in (
        (observer.calibrated_range(UINT8), np.percentile(x, [tail, 100 - tail])),
        (observer.calibrated_range(INT8), np.percentile(np.abs(x), percentile) * np.array([-1.0, 1.0])),
    ):
        np.testing.assert_allclose(actual, exact, rtol=1e-12, atol=width)


@pytest.mark.parametrize("seed", range(6))
def test_percentile_100_is_min_max(seed: int) -> None:
    x = gauss(1001, seed)
    observer = observed("percentile", x, percentile=100.0)
    assert observer.calibrated_range(UINT8) == (x.min(), x.max())
    assert observer.calibrated_range(INT8) == (-np.abs(x).max(), np.abs(x).max())


def test_percentile_is_of_the_stream_and_not_of_its_batches() -> None:
    """A mean of batch percentiles would answer 50."""
    observer = observed("percentile", *([np.zeros(1000)] * 99), np.full(1000, 100.0), percentile=98.0)
    assert observer.calibrated_range(INT8)[1] < 0.1


# ----------------------------------------------------------------------------------------------------------------------
# KL


def divergence(
    h: NDArray[np.int64],
    first: int,
    stop: int,
    levels: int,
    fold: bool = True,
    skip_empty: bool = True,
    starts: NDArray[np.float64] | None = None,
) -> float:
    """KL(P || Q), as it is defined, bin by bin; `starts`: where levels after the first begin, in fractions."""
    q_source = h[first:stop].astype(np.float64)
    p = q_source.copy()
    if fold:
        p[0] += h[:first].sum()
        p[-1] += h[stop:].sum()
    q = np.zeros_like(q_source)
    level = np.arange(stop - first) * levels // (stop - first)
    if starts is not None:
        level = np.searchsorted(starts * (stop - first), np.arange(stop - first), side="right")
    for v in range(levels):
        here = level == v
        takes = here & (q_source > 0) if skip_empty else here
        if takes.any():
            q[takes] = q_source[here].sum() / takes.sum()
    if not q.sum():
        return math.inf
    p, q = p / p.sum(), q / q.sum()
    if np.any((q == 0) & (p > 0)):
        return math.inf
    some = p > 0
    return float(np.sum(p[some] * np.log(p[some] / q[some])))


def magnitude_counts(x: NDArray[Any], width: float) -> NDArray[np.int64]:
    return np.bincount((np.abs(x[x != 0]) / width).astype(np.int64))


KL_DATA = {
    "gauss": lambda rng: rng.standard_normal(50_000),
    "outlier": lambda rng: np.append(rng.standard_normal(20_000), 30.0),
    "laplace": lambda rng: rng.laplace(size=5_000),
    "sparse": lambda rng: rng.standard_normal(300),
    "grid": lambda rng: np.round(rng.standard_normal(10_000) * 20) / 20,
}


@pytest.mark.parametrize("name", KL_DATA)
@pytest.mark.parametrize("config", [INT8, INT4], ids=["int8", "int4"])
def test_kl_threshold_is_the_best_of_all_by_the_definition(name: str, config: QuantConfig) -> None:
    x = KL_DATA[name](np.random.default_rng(6))
    observer = observed("kl", x)
    width = float(histogram_of(observer).width[0])
    levels = 128 if config is INT8 else 8
    h = magnitude_counts(x, width)
    threshold = float(observer.calibrated_range(config)[1])
    chosen = len(h) if threshold == np.abs(x).max() else round(threshold / width)
    assert threshold in (chosen * width, np.abs(x).max())
    stops = np.unique(np.append(np.arange(levels, len(h) + 1, 41), [levels, chosen - 1, chosen, len(h)]))
    values = {int(s): divergence(h, 0, int(s), levels) for s in stops if levels <= s <= len(h)}
    assert values[chosen] <= min(values.values()) + 1e-9


@pytest.mark.parametrize("name", ["gauss", "outlier", "laplace"])
@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_kl_of_float8_has_the_levels_that_rounding_to_its_codes_makes(name: str, dtype: str) -> None:
    x = KL_DATA[name](np.random.default_rng(6))
    observer = observed("kl", x)
    width = float(histogram_of(observer).width[0])
    codes = np.arange(128, dtype=np.uint8).view(getattr(ml_dtypes, dtype)).astype(np.float64)
    values = codes[np.isfinite(codes)]
    starts = (values[1:] + values[:-1]) / 2 / values[-1]
    h = magnitude_counts(x, width)
    threshold = float(observer.calibrated_range(QuantConfig.fp8(dtype))[1])
    chosen = len(h) if threshold == np.abs(x).max() else round(threshold / width)
    found = {
        int(stop): divergence(h, 0, int(stop), len(values), starts=starts)
        for stop in np.append(np.arange(len(values), len(h) + 1, 89), [chosen - 1, chosen, len(h)])
        if len(values) <= stop <= len(h) and (np.count_nonzero(h[:stop]) >= len(values) or stop == len(h))
    }
    assert found[chosen] <= min(found.values()) + 1e-9


@pytest.mark.parametrize("name", KL_DATA)
@pytest.mark.parametrize("config", [UINT8, INT4.asymmetric()], ids=["uint8", "int4"])
def test_kl_ends_cannot_be_improved_one_at_a_time(name: str, config: QuantConfig) -> None:
    x = KL_DATA[name](np.random.default_rng(7)) + 0.3
    observer = observed("kl", x)
    width = float(histogram_of(observer).width[0])
    levels = 256 if config is UINT8 else 16
    line = histogram_of(observer).signed(0)
    low, high = (float(v) for v in observer.calibrated_range(config))
    occupied = np.flatnonzero(line)
    first = int(occupied[0]) if low == x.min() else SIDE + round(low / width)
    stop = int(occupied[-1]) + 1 if high == x.max() else SIDE + round(high / width)
    assert first <= SIDE <= stop and stop - first >= levels
    here = divergence(line, first, stop, levels)
    assert here < math.inf
    for other in range(max(first + levels, SIDE), int(occupied[-1]) + 2, 97):
        assert divergence(line, first, other, levels) >= here - 1e-9
    for other in range(int(occupied[0]), min(stop - levels, SIDE) + 1, 97):
        assert divergence(line, other, stop, levels) >= here - 1e-9


@pytest.mark.parametrize("config", [INT8, INT8.asymmetric(), UINT8], ids=str)
@pytest.mark.parametrize("sign", [1, -1])
def test_kl_clips_an_outlier_of_a_million_gaussians(config: QuantConfig, sign: int) -> None:
    observer = observed("kl", gauss(), np.float32([30.0 * sign]))
    low, high = observer.calibrated_range(config)
    assert 4.0 < max(high, -low) < 8.0


def test_kl_mistake_as_many_bins_as_levels() -> None:
    """With 128 (256) bins Q is P, nothing is ever clipped, or always half."""
    x = gauss(200_000)
    for config in (INT8, UINT8, INT4):
        threshold = max(-float(e) * s for e, s in zip(observed("kl", x).calibrated_range(config), (1, -1), strict=True))
        amax = float(np.abs(x).max())
        assert 0.6 * amax < threshold
        assert config is not INT4 or threshold < 0.95 * amax


def _best(h: NDArray[np.int64], levels: int, **how: bool) -> int:
    stops = range(levels, len(h) + 1, 16)
    return min(stops, key=lambda s: (divergence(h, 0, s, levels, **how), -s))


def test_kl_mistake_tail_not_folded() -> None:
    """Without the tail in P a threshold costs nothing for what it cuts, and the smallest looks best."""
    x = np.random.default_rng(8).laplace(size=50_000)
    observer = observed("kl", x)
    width = float(histogram_of(observer).width[0])
    h = magnitude_counts(x, width)
    right = float(observer.calibrated_range(INT8)[1])
    wrong = _best(h, 128, fold=False) * width
    assert wrong < 0.1 * right
    assert divergence(h, 0, round(right / width), 128) <= divergence(h, 0, _best(h, 128), 128) + 1e-9


def test_kl_mistake_mass_spread_into_empty_bins() -> None:
    """Data on a grid leaves bins empty; spreading into them charges a threshold for what rounding does not lose."""
    x = np.round(np.random.default_rng(9).standard_normal(50_000) * 8) / 8
    observer = observed("kl", x)
    h = magnitude_counts(x, float(histogram_of(observer).width[0]))
    right = divergence(h, 0, len(h), 128)
    assert divergence(h, 0, len(h), 128, skip_empty=False) > right + 1.0
    assert float(observer.calibrated_range(INT8)[1]) == np.abs(x).max(), "31 values fit 127 codes: nothing to clip"


def test_kl_mistake_fewer_filled_bins_than_levels() -> None:
    """Of a few hundred values most bins are empty; a threshold that keeps a handful of bins loses nothing, by KL."""
    x = gauss(384)
    assert quality(x, observed("kl", x).qparams(INT4)) > 14.0
    assert quality(x, observed("kl", x).qparams(INT4.asymmetric())) > 14.0


def test_kl_mistake_only_the_top_is_searched() -> None:
    low, high = observed("kl", gauss(200_000), np.float32([-40.0])).calibrated_range(UINT8)
    assert -8.0 < low < -3.0 and 3.0 < high < 8.0


@pytest.mark.parametrize("config", [UINT8, INT8, QuantConfig("uint4", "asymmetric")], ids=str)
def test_kl_mistake_drowned_by_the_zeros_of_a_relu(config: QuantConfig) -> None:
    """Half of a ReLU's output is exact zeros; as a bin like others they make every wide range look bad."""
    x = np.maximum(gauss(300_000), 0)
    kl, best = (quality(x, observed(m, x).qparams(config)) for m in ("kl", "mse"))
    assert kl > best - 3.0
    alone = x[x > 0]
    assert observed("kl", x).calibrated_range(config)[1] == observed("kl", alone).calibrated_range(config)[1]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("config", [c for c in CONFIGS if not c.is_symmetric], ids=str)
@pytest.mark.parametrize("shift", [100.0, -100.0, 0.0])
def test_zero_has_a_code_and_zero_points_are_in_range(method: str, config: QuantConfig, shift: float) -> None:
    """Mistakes: a range without zero, and a zero point that its dtype does not have."""
    x = gauss(3000) * 0.5 + np.float32(shift)
    qparams = observed(method, x).qparams(config)
    assert config.quant_min <= qparams.zero_point <= config.quant_max
    assert qparams.zero_point.dtype == config.info.storage
    assert simulate(np.zeros(1, np.float32), qparams)[0] == 0.0
    if shift:
        assert quality(x, qparams) > (30 if config.bits == 8 else 10)


# ----------------------------------------------------------------------------------------------------------------------
# MSE


def test_known_answers_for_a_million_gaussians() -> None:
    """Max (1960): 40.57 dB for 8 bits; 18.90 dB on -7..7 and 19.26 dB on -8..7."""
    x = gauss()
    observer = observed("mse", x)
    for config, expected in ((INT8, 40.5), (UINT8, 40.5), (INT8.asymmetric(), 40.5)):
        assert abs(quality(x, observer.qparams(config)) - expected) <= 0.1
    for config, expected in ((INT4, 18.90), (INT4.asymmetric(), 19.26), (QuantConfig("uint4", "asymmetric"), 19.26)):
        assert abs(quality(x, observer.qparams(config)) - expected) <= 0.05
    for config, sigma in ((INT8, 3.92), (INT4, 0.3534 * 7)):
        assert abs(observer.calibrated_range(config)[1] - sigma) < 0.06


MSE_DATA = {
    "gauss": lambda rng: rng.standard_normal(20_000),
    "shifted": lambda rng: rng.standard_normal(20_000) + 2.0,
    "relu": lambda rng: np.maximum(rng.standard_normal(20_000), 0),
    "negative": lambda rng: -rng.exponential(size=20_000),
    "outliers": lambda rng: np.append(rng.standard_normal(20_000), [25.0, -11.0]),
    "lopsided": lambda rng: np.append(rng.exponential(size=20_000), [-0.01]),
    "heavy": lambda rng: rng.standard_t(3, 20_000),
    "few": lambda rng: rng.standard_normal(33),
}


@pytest.mark.parametrize("config", [*CONFIGS, *FLOAT8], ids=str)
@pytest.mark.parametrize("name", MSE_DATA)
def test_mse_is_as_good_as_a_brute_force_search_on_the_data(name: str, config: QuantConfig) -> None:
    x = MSE_DATA[name](np.random.default_rng(10)).astype(np.float32)
    found = quality(x, observed("mse", x).qparams(config))
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    steps = np.exp2(-np.arange(0, 6, 0.1))
    pairs = [(low * s, high * s) for s in steps]
    if not config.is_symmetric:
        pairs += [(low * s, high * t) for s in steps[::4] for t in steps[::4]]
    best = max(quality(x, qparams_from_range(*pair, config)) for pair in pairs)
    assert found > best - (0.1 if name != "few" else 0.5)
    assert found > quality(x, observed("min_max", x).qparams(config)) - 0.05


@pytest.mark.parametrize("config", [INT8, UINT8, INT4, *FLOAT8], ids=str)
def test_the_expected_error_is_that_of_values_spread_evenly_in_their_bins(config: QuantConfig) -> None:
    """An outlier makes the bins as wide as the steps, so that how values lie within them matters."""
    x = np.append(np.random.default_rng(19).standard_normal(3000) + 0.2, 300.0)
    histogram = histogram_of(observed("mse", x))
    line, width = histogram.signed(0), float(histogram.width[0])
    occupied = np.flatnonzero(line)
    points = ((occupied[:, None] - SIDE) + (np.arange(8192) + 0.5) / 8192) * width
    error_of = _HistogramError(histogram, np.array([0]), config)
    found, expected = [], []
    for high in (1.0, 2.5, 4.0, 30.0):
        q = qparams_from_range(-0.7 * high, high, config)
        scale, zero = np.array([[q.scale]], np.float64), np.array([[q.zero_point]], np.float64)
        found.append(float(error_of(scale, zero)[0, 0]) * width**2)
        expected.append(float(np.sum(line[occupied] * np.mean((simulate(points, q) - points) ** 2, axis=1))))
    np.testing.assert_allclose(np.diff(found), np.diff(expected), rtol=1e-4)


@pytest.mark.parametrize("config", [INT8, UINT8, INT4], ids=str)
def test_mse_agrees_with_the_expected_error_computed_bin_by_bin(config: QuantConfig) -> None:
    """Against fine quadrature of the evenly spread histogram: no other threshold is better."""
    x = np.random.default_rng(11).laplace(size=3000) + 0.5
    observer = observed("mse", x)
    histogram = histogram_of(observer)
    line, width = histogram.signed(0), float(histogram.width[0])
    occupied = np.flatnonzero(line)
    inside = (np.arange(64) + 0.5) / 64
    points = ((occupied[:, None] - SIDE) + inside) * width
    weight = line[occupied][:, None] / 64

    def error(low: float, high: float) -> float:
        wrong = simulate(points, qparams_from_range(low, high, config)) - points
        return float(np.sum(weight * wrong**2))

    low, high = (float(e) for e in observer.calibrated_range(config))
    least = error(low, high)
    for s, t in itertools.product((0.8, 0.95, 0.99, 1.0, 1.01, 1.05, 1.25), repeat=2):
        if not config.is_symmetric or s == t:
            assert error(max(low * s, float(x.min())), min(high * t, float(x.max()))) > 0.995 * least


# ----------------------------------------------------------------------------------------------------------------------
# Every method


@pytest.mark.parametrize("config", [*CONFIGS, *FLOAT8, INT8.per_channel(0), UINT8.per_channel(0)], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_serves_every_config(method: str, config: QuantConfig) -> None:
    x = np.random.default_rng(12).standard_normal((3, 4000)).astype(np.float32)
    qparams = observed(method, x, axis=config.axis).qparams(config)
    assert qparams.scale.shape == (() if config.axis is None else (3,))
    assert (qparams.dtype, qparams.quant_min, qparams.quant_max) == (config.dtype, config.quant_min, config.quant_max)
    assert quality(x, qparams) > {8: 24, 4: 12}[config.bits]


@pytest.mark.parametrize("config", [INT8, UINT8, INT4, QuantConfig.fp8()], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_degenerate_data(method: str, config: QuantConfig) -> None:
    assert observed(method, np.zeros(100)).qparams(config).scale == 1.0
    for c in (0.1, -7.3e20, 1e-30):
        x = np.full(1000, c, np.float32)
        np.testing.assert_array_max_ulp(simulate(x, observed(method, x).qparams(config)), x, maxulp=1)


@pytest.mark.parametrize("method", METHODS)
def test_the_scale_of_the_data_does_not_matter(method: str) -> None:
    """No absolute epsilon: the same data, 2**-90 or 2**90 times as large, gets scales as many times as large."""
    x = gauss(5000)
    for config in (INT8, UINT8, INT4):
        one = observed(method, x).qparams(config)
        for power in (-90, 90):
            other = observed(method, np.ldexp(x, power)).qparams(config)
            np.testing.assert_allclose(other.scale, np.ldexp(one.scale, power), rtol=1e-6)
            assert other.zero_point == one.zero_point


@pytest.mark.parametrize("method", METHODS)
def test_data_at_the_ends_of_float64(method: str) -> None:
    low, high = observed(method, np.array([1e-310, -2e-310, 0.0])).calibrated_range(UINT8)
    assert -2e-310 <= low <= high <= 1e-310
    if method != "mse":  # whose search is for a scale, which float32 cannot hold
        low, high = observed(method, np.array([1.5e308, -1e308, 1.0])).calibrated_range(UINT8)
        assert -1e308 <= low <= high <= 1.5e308
    with pytest.raises(ValueError, match="overflows float32"):
        observed(method, np.array([1.5e308, 1e308, 1.2e308])).qparams(UINT8)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("config", [UINT8, INT8, INT4.asymmetric(), QuantConfig.fp8()], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_a_range_is_one_where_bins_have_no_width_and_where_the_last_has_no_end(
    method: str, config: QuantConfig
) -> None:
    smallest, largest = np.finfo(np.float64).smallest_subnormal, np.finfo(np.float64).max
    for x in ([1.5617e-320], [-smallest], [smallest, -smallest, 1e-322], [1e-310, 3e-310]):
        observer = observed(method, np.array(x))
        low, high = observer.calibrated_range(config)
        assert -max(map(abs, x)) <= low <= high <= max(map(abs, x))
        assert observer.qparams(config).scale == np.finfo(np.float32).smallest_normal
    if method != "mse":  # whose search is for a scale, which float32 cannot hold
        for x in ([largest, -largest], [largest, 1.0], [-largest]):
            low, high = observed(method, np.array(x)).calibrated_range(config)
            assert -largest <= low <= high <= largest


@pytest.mark.parametrize("method", METHODS)
def test_unobserved_says_what_to_do(method: str) -> None:
    for observer in (make_observer(method), make_observer(method, axis=0), observed(method, [1.0])):
        observer.reset()
        config = INT8 if observer.axis is None else INT8.per_channel(0)
        for ask in (
            lambda o=observer, c=config: o.qparams(c),
            lambda o=observer: o.min_val,
            lambda o=observer: o.range,
        ):
            with pytest.raises(RuntimeError, match=r"call observe\(x\)"):
                ask()
        assert observer.count == observer.skipped == 0
    observer = observed(method, np.array([[1.0], [np.nan]]), axis=0, nonfinite="skip")
    with pytest.raises(RuntimeError, match="1 of its 2 channels"):
        observer.qparams(INT8.per_channel(0))


def test_configs_that_do_not_fit_the_observer_are_refused() -> None:
    tensor, channels = observed("min_max", np.ones((2, 3))), observed("min_max", np.ones((2, 3)), axis=-1)
    for observer, config, hint in (
        (tensor, INT8.per_channel(0), "axis=0"),
        (channels, INT8, "axis=None"),
        (channels, INT8.per_channel(0), "the same"),
        (tensor, INT4.per_group(2), "quantize_tensor"),
    ):
        with pytest.raises(ValueError, match=hint):
            observer.qparams(config)
    assert channels.qparams(INT8.per_channel(1)).axis == 1, "the last of two axes"
    channels.observe(np.ones((2, 2, 3)))
    with pytest.raises(ValueError, match="the same"):
        channels.qparams(INT8.per_channel(1))
    with pytest.raises(TypeError):
        tensor.qparams("int8")  # type: ignore[arg-type]


@pytest.mark.parametrize("way", ["observed", "merged", "merged into one that has none", "loaded"])
def test_an_axis_from_the_other_end_is_the_same_for_all_batches_or_refused(way: str) -> None:
    """The last of two axes is axis 1; the last of three is not, whichever came first, however it was learnt."""
    for shapes, fits in (((2, 3), (4, 3)), True), (((2, 2, 3), (4, 3)), False), (((4, 3), (2, 2, 3)), False):
        parts = [observed("min_max", np.ones(shape), axis=-1) for shape in shapes]
        observer = make_observer("min_max", -1)
        if way == "observed":
            for shape in shapes:
                observer.observe(np.ones(shape))
        elif way == "merged":
            observer = parts[0].merge(parts[1])
        elif way == "merged into one that has none":
            observer.merge(parts[0]).merge(parts[1])
        else:
            observer.load_state_dict(parts[0].merge(parts[1]).state_dict())
        if fits:
            assert observer.qparams(INT8.per_channel(1)).axis == 1
        else:
            with pytest.raises(ValueError, match="the same"):
                observer.qparams(INT8.per_channel(1))
    with pytest.raises(ValueError, match="the same"):
        make_observer("min_max", -1).qparams(INT8.per_channel(1))


@pytest.mark.parametrize("partial", [[[1.0], [np.nan]], [[np.inf], [1.0]], [[np.nan], [-np.inf]]])
@pytest.mark.parametrize("when", ["first", "last"])
@pytest.mark.parametrize("method", [*METHODS, "collector"])
def test_a_batch_without_a_finite_value_of_a_channel_is_none_for_that_channel(
    method: str, when: str, partial: Any
) -> None:
    def fresh() -> Observer:
        if method == "collector":
            return CalibrationCollector(0, nonfinite="skip")
        return make_observer(method, 0, nonfinite="skip")

    full = np.array([[3.0, 4.0, 0.0], [-5.0, 7.0, 1.0]])
    batches = [np.array(partial), full] if when == "first" else [full, np.array(partial)]
    apart, together = fresh(), fresh()
    for batch in batches:
        together.observe(batch)
        part = fresh()
        part.observe(batch)
        apart.merge(part)
    assert_same_state(apart, together)
    for channel in range(2):
        alone = fresh()
        for batch in batches:
            if np.isfinite(batch[channel]).any():
                alone.observe(batch[channel : channel + 1])
        config = INT4.asymmetric().per_channel(0)
        np.testing.assert_allclose(
            np.array(together.calibrated_range(config))[:, channel],
            np.array(alone.calibrated_range(config))[:, 0],
            rtol=1e-12,
        )


def test_what_was_skipped_is_counted_over_shards() -> None:
    one, other = (observed("min_max", [1.0, np.nan, bad], nonfinite="skip") for bad in (np.inf, 2.0))
    assert (one.skipped, other.skipped) == (2, 1)
    assert (one.merge(other).skipped, one.count) == (3, 3)
    again = make_observer("min_max")
    again.load_state_dict(one.state_dict())
    assert (again.skipped, again.count) == (3, 3)


def test_batches_that_do_not_fit_are_refused_and_change_nothing() -> None:
    observer = observed("kl", np.ones((4, 3)), axis=1)
    before = pickle.dumps(observer.state_dict())
    for bad, match in ((np.ones((4, 2)), "2 channels"), (np.ones(3), "axis=1"), (np.full((4, 3), np.inf), "12 of 12")):
        with pytest.raises(ValueError, match=match):
            observer.observe(bad)
    assert pickle.dumps(observer.state_dict()) == before


@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize("method", METHODS)
def test_nonfinite_values_raise_or_are_skipped_and_counted(method: str, axis: int | None) -> None:
    rng = np.random.default_rng(13)
    clean = rng.standard_normal((50_000, 6)).astype(np.float32)
    clean = clean.T.copy() if axis == 0 else clean
    clean[:10] = 0.0
    dirty = clean.copy()
    dirty[0, 5], dirty[2, 4], dirty[-1, -1] = np.nan, np.inf, -np.inf
    observer = observed(method, clean[:, :5] if axis == 0 else clean[:5], axis=axis)
    before = pickle.dumps(observer.state_dict())
    with pytest.raises(ValueError, match=r"3 of 300000 values are NaN or infinite.*nonfinite='skip'"):
        observer.observe(dirty)
    assert pickle.dumps(observer.state_dict()) == before
    skipping = observed(method, dirty, axis=axis, nonfinite="skip")
    assert (skipping.skipped, skipping.count) == (3, 299_997)
    if axis is None:
        alone = observed(method, dirty[np.isfinite(dirty)])
        for config in (INT8, UINT8):
            np.testing.assert_allclose(
                skipping.calibrated_range(config), alone.calibrated_range(config), rtol=1e-12, atol=0
            )
        if method in HISTOGRAMS:
            np.testing.assert_array_equal(histogram_of(skipping).counts, histogram_of(alone).counts)
            np.testing.assert_array_equal(histogram_of(skipping).zeros, histogram_of(alone).zeros)
    else:
        for c in range(6):
            one = dirty.take(c, axis)
            alone = observed(method, one[np.isfinite(one)])
            np.testing.assert_allclose(
                np.array(skipping.calibrated_range(INT4.per_channel(axis)))[:, c],
                alone.calibrated_range(INT4),
                rtol=1e-12,
            )


@pytest.mark.parametrize("axis", [None, -1])
@pytest.mark.parametrize("method", [*METHODS, "collector"])
def test_state_survives_pickle_and_state_dict(method: str, axis: int | None) -> None:
    def make(**options: Any) -> Observer:
        return (
            CalibrationCollector(axis, **options) if method == "collector" else make_observer(method, axis, **options)
        )

    rng = np.random.default_rng(14)
    first, second = rng.standard_normal((2, 40, 3))
    observer = make(nonfinite="skip")
    observer.observe(first)
    copies = [pickle.loads(pickle.dumps(observer)), make()]
    copies[1].load_state_dict(observer.state_dict())
    state = observer.state_dict()
    assert all(isinstance(v, (np.ndarray, str, int, float, list, type(None))) for v in state.values())
    observer.observe(second)
    for copy in copies:
        assert copy.nonfinite == "skip" and copy.count == 120
        copy.observe(second)
        assert_same_state(copy, observer)
    config = INT8 if axis is None else INT8.per_channel(-1)
    assert copies[0].qparams(config) == observer.qparams(config)
    assert {k: v for k, v in state.items() if k == "count"}["count"].sum() == 120, "a state is a copy"
    fresh = make()
    fresh.load_state_dict(make().state_dict())
    assert fresh.count == 0


@pytest.mark.parametrize(
    "spoil",
    [
        lambda s: s.pop("high"),
        lambda s: s.update(extra=1),
        lambda s: s.update({"class": "MinMaxObserver"}),
        lambda s: s.update(channels=10**12),
        lambda s: s.update(channels=-1),
        lambda s: s.update(nonfinite="ignore"),
        lambda s: s.update(count=np.array([7])),
        lambda s: s.update(low=np.array([9.0])),
        lambda s: s.update(low=np.array([np.nan])),
        lambda s: s.update({"histogram.counts": s["histogram.counts"][:, :, 1:]}),
        lambda s: s.update({"histogram.counts": s["histogram.counts"].astype(np.float64)}),
        lambda s: s.update({"histogram.counts": -s["histogram.counts"]}),
        lambda s: s.update({"histogram.exponent": s["histogram.exponent"] + 1}),
    ],
)
def test_a_spoilt_state_is_refused_and_changes_nothing(spoil: Any) -> None:
    observer = observed("kl", gauss(100))
    before = pickle.dumps(observer.state_dict())
    state = observer.state_dict()
    spoil(state)
    with pytest.raises(ValueError):
        observer.load_state_dict(state)
    assert pickle.dumps(observer.state_dict()) == before


@pytest.mark.parametrize(
    ("method", "field", "value"),
    [
        ("mean_std", "moments.numbers", np.array([99])),
        ("mean_std", "moments.squares", np.array([-1.0])),
        ("moving_average", "averages.batches", np.array([0])),
        ("moving_average", "averages.average_low", np.array([5.0])),
        ("moving_average", "averages.average_high", np.array([np.nan])),
        ("percentile", "histogram.zeros", np.array([-1])),
    ],
)
def test_statistics_that_do_not_belong_to_their_ends_and_count_are_not_loaded(
    method: str, field: str, value: NDArray[Any]
) -> None:
    state = observed(method, [-1.0, 2.0, 0.0]).state_dict()
    make_observer(method).load_state_dict(state)
    with pytest.raises(ValueError, match="does not belong"):
        make_observer(method).load_state_dict({**state, field: value})


def test_a_state_per_tensor_has_one_channel() -> None:
    state = observed("min_max", [[1.0, 2.0], [3.0, 4.0]], axis=0).state_dict()
    with pytest.raises(ValueError, match="1 per tensor"):
        make_observer("min_max").load_state_dict({**state, "axis": None})


def test_a_range_that_is_no_range_is_not_loaded() -> None:
    for low, high in ((np.nan, 1.0), (1.0, np.nan), (2.0, 1.0)):
        state = observed("min_max", [0.0, 1.0]).state_dict()
        state.update(low=np.array([low]), high=np.array([high]))
        with pytest.raises(ValueError, match="do not belong together"):
            make_observer("min_max").load_state_dict(state)


def test_merging_what_does_not_belong_together_is_refused() -> None:
    with pytest.raises(TypeError, match="one class"):
        make_observer("kl").merge(make_observer("mse"))
    for a, b, what in (
        (make_observer("kl"), make_observer("kl", axis=0), "axis"),
        (make_observer("percentile"), make_observer("percentile", percentile=90.0), "percentile"),
        (observed("kl", np.ones((2, 3)), axis=0), observed("kl", np.ones((3, 2)), axis=0), "channels"),
    ):
        with pytest.raises(ValueError, match=what):
            a.merge(b)
    empty = make_observer("min_max")
    assert empty.merge(make_observer("min_max")).count == 0
    assert empty.merge(observed("min_max", [1.0, 2.0])).count == 2


def test_make_observer_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="choose one of"):
        make_observer("entropy")
    with pytest.raises(TypeError, match="no option 'percentile'"):
        make_observer("kl", percentile=99.0)
    for options in ({"percentile": 0.0}, {"percentile": 100.5}):
        with pytest.raises(ValueError, match="percentile"):
            make_observer("percentile", **options)
    for method, options in (
        ("mean_std", {"sigma": -1.0}),
        ("mean_std", {"sigma": math.nan}),
        ("moving_average", {"averaging_constant": 0.0}),
        ("min_max", {"nonfinite": "ignore"}),
    ):
        with pytest.raises(ValueError):
            make_observer(method, **options)
    with pytest.raises(TypeError, match="axis"):
        make_observer("kl", axis=1.5)  # type: ignore[arg-type]
    assert isinstance(make_observer("MIN_MAX"), MinMaxObserver)


# ----------------------------------------------------------------------------------------------------------------------
# One collector for every method; one call for one array


@pytest.mark.parametrize("axis", [None, 1])
def test_the_collector_gives_the_answers_of_the_single_observers(axis: int | None) -> None:
    rng = np.random.default_rng(15)
    batches = [rng.laplace(size=(100, 3)) for _ in range(4)]
    collector = CalibrationCollector(axis)
    for batch in batches:
        collector.observe(batch)
    for method in METHODS:
        for config in (INT8, UINT8, INT4):
            config = config if axis is None else config.per_channel(axis)
            assert collector.qparams(config, method) == observed(method, *batches, axis=axis).qparams(config)
    config = INT8 if axis is None else INT8.per_channel(axis)
    for name, options in (("percentile", {"percentile": 90.0}), ("mean_std", {"sigma": 2.0})):
        assert collector.qparams(config, name, **options) == observed(name, *batches, axis=axis, **options).qparams(
            config
        )
    assert collector.qparams(config) == collector.qparams(config, "kl")
    np.testing.assert_array_equal(collector.min_max_scale(), collector.qparams(config, "min_max").scale)
    np.testing.assert_array_equal(collector.kl_divergence_scale(), collector.qparams(config, "kl").scale)
    np.testing.assert_array_equal(
        collector.percentile_scale(90.0), collector.qparams(config, "percentile", percentile=90.0).scale
    )
    assert collector.percentile_scale(90.0, config.asymmetric()).shape == (() if axis is None else (3,))
    with pytest.raises(ValueError, match="percentile"):
        collector.qparams(config, "percentile", percentile=101.0)


@pytest.mark.parametrize("method", METHODS)
def test_one_array_at_once_is_an_observer_that_sees_it(method: str) -> None:
    w = np.random.default_rng(16).standard_normal((70, 9)).astype(np.float32)
    for config in (INT8, INT4.per_channel(0), INT4.asymmetric().per_channel(1), INT4.per_channel(-1)):
        expected = observed(method, w, axis=config.axis).qparams(config)
        got = observe_once(w, config, method)
        assert got.scale.shape == expected.scale.shape
        if method == "mean_std":
            np.testing.assert_allclose(got.scale, expected.scale, rtol=1e-6)
        else:
            assert got == expected


@pytest.mark.parametrize(
    "config", [INT4.per_group(8), INT4.asymmetric().per_group(8), INT4.per_group(8, axis=1)], ids=str
)
@pytest.mark.parametrize("method", METHODS)
def test_groups_get_what_each_would_get_alone(method: str, config: QuantConfig) -> None:
    w = np.random.default_rng(17).standard_normal((3, 5 if method == "kl" else 21, 19)).astype(np.float32)
    w[0] = 0.0
    got = observe_once(w, config, method)
    moved = np.moveaxis(w, config.axis, -1)  # type: ignore[arg-type]
    shape = (*moved.shape[:-1], -(-moved.shape[-1] // 8))
    assert got.scale.shape == np.moveaxis(np.empty(shape), -1, config.axis).shape  # type: ignore[arg-type]
    scales = np.moveaxis(got.scale, config.axis, -1)  # type: ignore[arg-type]
    zeros = np.moveaxis(np.broadcast_to(got.zero_point, got.scale.shape), config.axis, -1)  # type: ignore[arg-type]
    for where in [(0, 0, 0), (1, 2, 0), (2, 3, 0), (2, -1, -1)]:
        group = moved[where[:-1]][where[-1] * 8 :][:8] if where[-1] >= 0 else moved[where[:-1]][(shape[-1] - 1) * 8 :]
        if method == "mse":
            mine = QParams(scales[where], zeros[where], config.dtype, config.quant_min, config.quant_max)
            plain = observed("min_max", group).qparams(config.per_tensor())
            assert quality(group, mine) >= quality(group, plain) - 1e-9
        else:
            expected = observed(method, group).qparams(config.per_tensor())
            np.testing.assert_allclose(scales[where], expected.scale, rtol=1e-6)
            assert zeros[where] == expected.zero_point


@pytest.mark.parametrize("method", ["min_max", "mse"])
def test_groups_of_values_that_are_skipped(method: str) -> None:
    """They count as nothing: neither do they have an error, nor a say in the ends."""
    config = INT4.per_group(8)
    w = np.random.default_rng(17).standard_normal((3, 24)).astype(np.float32)
    dirty = w.copy()
    w[0, 3] = w[2, 9] = 0.0
    dirty[0, 3], dirty[2, 9] = np.nan, -np.inf
    with pytest.raises(ValueError, match="2 of 72"):
        observe_once(dirty, config, method)
    assert observe_once(dirty, config, method, nonfinite="skip") == observe_once(w, config, method)


@pytest.mark.parametrize("config", [INT4.per_group(32), INT4.asymmetric().per_group(32), INT4.per_channel(0)], ids=str)
def test_mse_improves_a_quantized_weight(config: QuantConfig) -> None:
    w = np.random.default_rng(18).standard_normal((64, 256)).astype(np.float32) * 0.02
    plain, better = (quantize_tensor(w, config, method=m).sqnr(w) for m in ("min_max", "mse"))
    assert better > plain + 0.2
    assert quantize_tensor(w[:0], config, method="mse").numel == 0
