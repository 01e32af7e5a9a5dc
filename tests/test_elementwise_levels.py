"""Native loops over elements: the same bits at every instruction level, in every cut into pieces, on threads."""

from __future__ import annotations

import _thread
import itertools
import math
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import reference as ref
from conftest import Guarded
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import qnative as qn
from qnative import _core
from qnative.granularity import Granules

LEVELS = [name for name, usable in _core.usable_levels().items() if usable]
FLOAT8 = ("float8_e4m3fn", "float8_e5m2")
FORMATS = (*FLOAT8, "float8_e4m3fnuz", "float8_e5m2fnuz", "float16", "bfloat16")
#: Elements of a piece of work, and lengths around what the loops take at a time.
PIECE = 1 << 16
LENGTHS = (1, 2, 7, 8, 15, 16, 31, 32, 33, 47, 63, 64, 65, 95, 96, 97, 127, 128, 129, 191, 200, 257)

Array = NDArray[Any]


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each level that this CPU has, in turn."""
    before = _core.use_level(str(request.param))
    yield str(request.param)
    _core.use_level(before)


def at_every_level(run: Callable[[], Any]) -> Any:
    """Run at each level; the results must be the same bits."""
    before, found = _core.level(), []
    try:
        for name in LEVELS:
            _core.use_level(name)
            found.append(run())
    finally:
        _core.use_level(before)
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            ref.assert_same_bits(one, two)
    return found[0]


def hard_values(rng: np.random.Generator, n: int, scale: Array) -> Array:
    """Ties of codes and of float8, neighbours of ties, subnormals, the ends of float32, zeros, infinities, NaN."""
    ties = (rng.integers(-300, 300, n) + 0.5) * scale
    pick = rng.integers(0, 8, n)
    with np.errstate(all="ignore"):
        x = np.select(
            [pick == 0, pick == 1, pick == 2, pick == 3, pick == 4, pick == 5],
            [
                ties, np.nextafter(ties.astype(np.float32), np.float32(np.inf)), rng.standard_normal(n) * 60 * scale,
                rng.choice([0.0, -0.0, 1e-45, -1e-45, 1e-39, 3.4e38, -3.4e38, np.inf, -np.inf, np.nan], n),
                rng.integers(0, 1 << 32, n, np.uint32).view(np.float32),
                (rng.integers(-31, 31, n) + 0.5) * np.ldexp(1.0, rng.integers(-20, 15, n)) * scale,
            ],
            np.nextafter(ties.astype(np.float32), np.float32(-np.inf)),
        )  # fmt: skip
        return x.astype(np.float32)


def hard_scales(rng: np.random.Generator, n: int) -> Array:
    """Powers of two, their neighbours, mantissas that end in zeros, subnormals, the largest, and any."""
    pick = rng.integers(0, 6, n)
    power = np.ldexp(np.float32(1), rng.integers(-120, 120, n)).astype(np.float32)
    near = (power.view(np.uint32) + (rng.integers(0, 128, n) << 16) + rng.integers(-80, 80, n)).astype(np.uint32)
    small = rng.integers(1, 1 << 23, n, np.uint32).view(np.float32)
    plain = (10.0 ** rng.uniform(-3, 2, n)).astype(np.float32)
    return np.select([pick == 0, pick == 1, pick == 2], [power, near.view(np.float32), small], plain).astype(np.float32)


@st.composite
def granules(draw: st.DrawFn) -> tuple[tuple[int, ...], int | None, int | None]:
    """A shape, an axis and a group size."""
    shape = tuple(draw(st.lists(st.sampled_from(LENGTHS) | st.integers(1, 5), min_size=1, max_size=3)))
    while np.prod(shape) > 60_000:
        shape = shape[1:]
    axis = draw(st.none() | st.integers(0, len(shape) - 1))
    group = None if axis is None else draw(st.none() | st.sampled_from([1, 3, 16, 32, 64, 100]))
    return shape, axis, group


@given(where=granules(), seed=st.integers(0, 1 << 32), dtype=st.sampled_from(["int8", "uint8", "int4", *FLOAT8]))
def test_codes_are_those_of_the_reference_at_every_level(where: Any, seed: int, dtype: str) -> None:
    rng = np.random.default_rng(seed)
    shape, axis, group = where
    g = Granules.of(shape, axis, group)
    count = int(np.prod(g.shape))
    scale = hard_scales(rng, count)
    spread = ref.spread(scale.reshape(g.shape), shape, axis, group)
    x = hard_values(rng, int(np.prod(shape)), np.broadcast_to(spread, shape).reshape(-1).astype(np.float64))
    float8 = dtype in FLOAT8
    low, high = (0, 0) if float8 else ref.RANGES[dtype]
    zero = rng.integers(low, high, count, np.int32, endpoint=True)
    nonfinite = not np.isfinite(x).all()

    def run() -> tuple[Array, ...]:
        codes, wide, values = np.empty(x.size, np.uint8), np.empty(x.size, np.uint8), np.empty(x.size, np.float32)
        if float8:
            assert _core.quantize_float8(x, scale, g.walk, dtype, codes) == nonfinite
            assert _core.quantize_float8(x.astype(np.float64), scale, g.walk, dtype, wide) == nonfinite
            _core.dequantize_float8(codes, scale, g.walk, dtype, values)
        else:
            assert _core.quantize(x, scale, zero, g.walk, low, high, codes) == nonfinite
            assert _core.quantize(x.astype(np.float64), scale, zero, g.walk, low, high, wide) == nonfinite
            assert not _core.dequantize(codes, low < 0, scale, zero, g.walk, low, high, values)
        for source, found in ((x, codes), (x.astype(np.float64), wide)):
            fake, decoded = np.empty(x.size, np.float32), np.empty(x.size, np.float32)
            name = dtype if float8 else None
            assert _core.fake_quantize(source, scale, zero, g.walk, low, high, name, fake) == nonfinite
            if float8:
                _core.dequantize_float8(found, scale, g.walk, dtype, decoded)
            else:
                _core.dequantize(found, low < 0, scale, zero, g.walk, low, high, decoded)
            ref.assert_same_bits(fake, decoded)
        return codes, wide, values

    codes, wide, values = at_every_level(run)
    zeros = zero.reshape(g.shape) if not float8 else 0
    storage = np.uint8 if float8 else ref.STORAGE[dtype]
    scales = scale.reshape(g.shape)
    with np.errstate(all="ignore"):
        expected = ref.quantize(x.reshape(shape), scales, zeros, dtype, axis, group)
        ref.assert_same_bits(codes.view(storage).reshape(shape), expected)
        again = ref.quantize(x.astype(np.float64).reshape(shape), scales, zeros, dtype, axis, group)
        ref.assert_same_bits(wide.view(storage).reshape(shape), again)
        ref.assert_same_bits(values.reshape(shape), ref.dequantize(expected, scales, zeros, dtype, axis, group))


@pytest.mark.parametrize("mantissa", [0, 1, 0x3FFFFF, 0x400000, 0x55_5555, 0x2AAAAB, 0x7FFFFF, 0x010040, 0x01003F])
def test_every_tie_of_a_scale_and_its_neighbours(mantissa: int, level: str) -> None:
    """Division by multiplication: all quotients within a few last places of a tie between codes."""
    for exponent in (-69, -20, 0, 90):
        scale = np.uint32((exponent + 127 << 23) + mantissa).view(np.float32)
        ties = ((np.arange(-300, 300) + 0.5) * float(scale)).astype(np.float32)
        near = (ties.view(np.int32)[:, None] + np.arange(-16, 17, dtype=np.int32)).view(np.float32).reshape(-1)
        ref.assert_same_bits(qn.quantize(near, scale), ref.quantize(near, scale))
        for dtype in FLOAT8:
            table = ref.magnitudes(dtype)
            ties = ((table[1:] + table[:-1]) / 2 * float(scale)).astype(np.float32)
            near = (ties.view(np.int32)[:, None] + np.arange(-16, 17, dtype=np.int32)).view(np.float32).reshape(-1)
            near = np.concatenate([near, -near])
            ref.assert_same_bits(qn.quantize(near, scale, dtype=dtype), ref.quantize(near, scale, 0, dtype))


@pytest.mark.parametrize("dtype", FORMATS)
def test_small_formats_at_every_level(dtype: str) -> None:
    """Every code, every 16-bit prefix of a float32 with the bits below that decide rounding, and float64s between."""
    eight = dtype.startswith("float8")
    kind: Any = np.uint8 if eight else np.uint16
    codes = np.arange(256 if eight else 65536).astype(kind)
    low_bits = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    x = ((np.arange(1 << 16, dtype=np.uint32) << 16)[:, None] | low_bits).view(np.float32).reshape(-1)
    with np.errstate(invalid="ignore"):
        wide = x.astype(np.float64) * (1 + 2.0**-40)

    def run() -> list[Array]:
        values = np.empty(codes.size, np.float32)
        (_core.decode8 if eight else _core.decode)(codes, dtype, values)
        found = [values]
        for saturate, source in itertools.product((False, True), (x, wide)):
            out = np.empty(source.size, kind)
            (_core.encode8 if eight else _core.encode)(source, dtype, saturate, out)
            found.append(out)
        return found

    found = at_every_level(run)
    ref.assert_same_bits(found[0], ref.decode(codes, dtype))
    for got, (saturate, source) in zip(found[1:], itertools.product((False, True), (x, wide)), strict=True):
        expected = ref.encode(source, dtype, saturate)
        wrong = got != expected
        if dtype == "float16":  # keeps what it can of a NaN
            wrong &= ~np.isnan(source) | ((got ^ expected) & 0x8000 != 0) | ((got & 0x7C00) != 0x7C00)
        assert not wrong.any(), (saturate, source[wrong][:3], got[wrong][:3], expected[wrong][:3])


@given(rows=st.integers(0, 9), n=st.integers(0, 70) | st.sampled_from([128, 1000]), seed=st.integers(0, 1 << 32))
def test_nibbles_at_every_level(rows: int, n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    width = 4 * -(-n // 8)
    pad = rng.integers(0, 16, rows, np.uint8)
    for offset in (0, 8):
        codes = (rng.integers(0, 16, (rows, n)) - offset).astype(np.uint8)
        padded = np.repeat(pad[:, None], 2 * width, axis=1)
        padded[:, :n] = (codes + offset) & 15

        def run(codes: Array = codes, offset: int = offset) -> tuple[Array, Array]:
            packed, again = np.empty((rows, width), np.uint8), np.empty((rows, n), np.uint8)
            _core.pack_nibbles(codes, offset, pad, packed)
            _core.unpack_nibbles(packed, offset, again)
            return packed, again

        packed, again = at_every_level(run)
        ref.assert_same_bits(packed, padded[:, ::2] | padded[:, 1::2] << 4)
        ref.assert_same_bits(again, codes)
    with pytest.raises(ValueError, match="offset"):
        _core.pack_nibbles(codes, 3, pad, np.empty((rows, width), np.uint8))


def test_large_rows_of_nibbles_are_cut_anywhere(level: str) -> None:
    rng = np.random.default_rng(1)
    codes = rng.integers(0, 16, (4, PIECE), np.uint8)
    packed, again = np.empty((4, PIECE // 2), np.uint8), np.empty((4, PIECE), np.uint8)
    _core.pack_nibbles(codes, 0, np.zeros(4, np.uint8), packed)
    ref.assert_same_bits(packed, codes[:, ::2] | codes[:, 1::2] << 4)
    _core.unpack_nibbles(packed, 0, again)
    ref.assert_same_bits(again, codes)


# Ranges


@given(where=granules(), seed=st.integers(0, 1 << 32), wide=st.booleans(), clean=st.booleans())
def test_ranges_at_every_level(where: Any, seed: int, wide: bool, clean: bool) -> None:
    rng = np.random.default_rng(seed)
    shape, axis, group = where
    x = hard_values(rng, int(np.prod(shape)), np.float64(1))
    if clean:
        x = np.where(np.isfinite(x), x, np.float32(-0.0))
    x = x.astype(np.float64) if wide else x
    g = Granules.of(shape, axis, group)

    def run() -> tuple[Array, Array, Array]:
        low, high = np.empty((2, int(np.prod(g.shape))), x.dtype)
        bad = _core.min_max(x, g.walk, low, high)
        return np.array(bad), low, high

    bad, low, high = at_every_level(run)
    assert bad == np.count_nonzero(~np.isfinite(x)) == _core.count_nonfinite(x)
    if not bad:
        index = ref.spread(np.arange(low.size).reshape(g.shape), shape, axis, group)
        owner = np.broadcast_to(index, shape).reshape(-1)
        for scale in range(low.size):
            assert low[scale] == x[owner == scale].min() and high[scale] == x[owner == scale].max()


def test_a_range_tells_the_zeros_apart() -> None:
    """Whatever the order of the data: -0 is the lesser."""
    walk = Granules.of((64,)).walk
    for x in (np.float32([0.0, -0.0] * 32), np.float32([-0.0, 0.0] * 32)):
        low, high = np.empty((2, 1), np.float32)
        _core.min_max(x, walk, low, high)
        assert np.signbit(low[0]) and not np.signbit(high[0])


@pytest.mark.parametrize(
    ("shape", "axis", "group"), [((700,), None, None), ((40, 96), 1, 32), ((40, 97), 1, 33), ((40, 97), 1, None)]
)
def test_a_code_that_the_dtype_has_not_is_noticed(shape: tuple[int, ...], axis: int | None, group: int | None) -> None:
    rng = np.random.default_rng(7)
    g = Granules.of(shape, axis, group)
    scale, zero = np.ones(math.prod(g.shape), np.float32), np.zeros(math.prod(g.shape), np.int32)
    size = math.prod(shape)
    values = np.empty(size, np.float32)
    for dtype, wrong in (("int4", (8, -9, 127, -128)), ("uint4", (16, 255))):
        low, high = ref.RANGES[dtype]
        codes = rng.integers(low, high, size, ref.STORAGE[dtype], endpoint=True)
        for at in (0, 63, 64, size - 1, int(rng.integers(size))):
            for code in wrong:
                kept, codes[at] = codes[at], code

                def run(codes: Array = codes, low: int = low, high: int = high) -> tuple[Array]:
                    args = (codes.view(np.uint8), low < 0, scale, zero, g.walk, low, high, values)
                    return (np.array(_core.dequantize(*args)),)

                assert at_every_level(run)[0]
                with pytest.raises(ValueError, match=f"outside {dtype}'s {low}..{high}"):
                    qn.dequantize(codes.reshape(shape), 1.0, dtype=dtype)
                codes[at] = kept
        assert not at_every_level(run)[0]


def test_parameters_of_any_nature() -> None:
    """Unaligned, strided, big-endian, read-only; and those that share memory with the result."""
    rng = np.random.default_rng(8)
    x = rng.standard_normal((6, 64), np.float32)
    scale, zero = rng.uniform(0.01, 0.1, (6, 2)).astype(np.float32), rng.integers(-9, 9, (6, 2), np.int32)
    expected = qn.quantize(x, scale, zero, axis=1, group_size=32)
    decoded = qn.dequantize(expected, scale, zero, axis=1, group_size=32)
    for strange in (
        lambda a: np.frombuffer(b"." + a.tobytes(), a.dtype.newbyteorder("="), offset=1).reshape(a.shape),
        lambda a: np.repeat(a, 2, axis=0)[::2],
        lambda a: a.astype(a.dtype.newbyteorder(">")),
        lambda a: a[::-1].copy()[::-1],
    ):
        ref.assert_same_bits(qn.quantize(x, strange(scale), strange(zero), axis=1, group_size=32), expected)
        ref.assert_same_bits(qn.dequantize(expected, strange(scale), strange(zero), axis=1, group_size=32), decoded)
    memory = np.empty(6 * 64, np.float32)
    inside = memory[100:112].reshape(6, 2)
    inside[...] = scale
    out = qn.dequantize(expected, inside, zero, axis=1, group_size=32, out=memory.reshape(6, 64))
    ref.assert_same_bits(out, decoded)
    zeros = memory.view(np.int32)[7:19].reshape(6, 2)
    zeros[...] = zero
    codes = qn.quantize(x, scale, zeros, axis=1, group_size=32, out=memory.view(np.int8)[:384].reshape(6, 64))
    ref.assert_same_bits(codes, expected)
    for bad in (np.nan, np.inf, 0.0, -1.0, -np.inf):
        broken = scale.copy()
        broken[3, 1] = bad
        with pytest.raises(ValueError, match="every scale must be finite and > 0"):
            qn.quantize(x, broken, zero, axis=1, group_size=32)


# Histograms


@given(
    channels=st.integers(1, 3), n=st.sampled_from([0, 1, 5, 511, 512, 513, 4096, 4097, 70_001]),
    seed=st.integers(0, 1 << 32), wide=st.booleans(),
)  # fmt: skip
def test_histogram_at_every_level(channels: int, n: int, seed: int, wide: bool) -> None:
    rng = np.random.default_rng(seed)
    x = hard_values(rng, channels * n, np.float64(1)).reshape(channels, n)
    x[rng.random(x.shape) < 0.3] = 0.0
    x = x.astype(np.float64) if wide else x
    power = rng.integers(-120, 140, channels)

    def run() -> tuple[Array, Array]:
        counts, zeros = np.ones((channels, 2, 8192), np.int64), np.ones(channels, np.int64)
        _core.histogram(x, power, counts, zeros)
        return counts, zeros

    counts, zeros = at_every_level(run)
    expected = np.ones_like(counts)
    for c in range(channels):
        finite = x[c][np.isfinite(x[c])]
        assert zeros[c] == 1 + np.count_nonzero(finite == 0)
        finite = finite[finite != 0].astype(np.longdouble)
        index = np.minimum(np.floor(np.ldexp(np.abs(finite), int(power[c]))), 8191).astype(np.int64)
        np.add.at(expected[c], ((finite > 0).astype(np.int64), index), 1)
    ref.assert_same_bits(counts, expected)


@given(
    n=st.sampled_from([0, 1, 127, 128, 129, 2047, 2049, 4096, 70_001]),
    seed=st.integers(0, 1 << 32),
    wide=st.booleans(),
    power=st.integers(-120, 140),
)
def test_histogram_while_it_fits_at_every_level(n: int, seed: int, wide: bool, power: int) -> None:
    """It stops before what has no bin and no sooner than need be: a block, or a stretch of the rest."""
    rng = np.random.default_rng(seed)
    x = hard_values(rng, n, np.float64(1))
    x[rng.random(n) < 0.3] = 0.0
    limit = np.ldexp(np.longdouble(1), 13 - power)
    beyond = np.isfinite(x) & (np.abs(x.astype(np.longdouble)) >= limit)
    x[beyond & (np.arange(n) < n * rng.random())] = 0.0
    x = x.astype(np.float64) if wide else x
    beyond = np.isfinite(x) & (np.abs(x.astype(np.longdouble)) >= limit)

    def run() -> tuple[Array, ...]:
        counts, zeros, ends = np.ones((2, 8192), np.int64), np.ones(1, np.int64), np.array([np.inf, -np.inf])
        taken, bad = _core.histogram_while_it_fits(x, power, counts, zeros, ends)
        return counts, zeros, ends, np.array([taken, bad])

    counts, zeros, ends, (taken, bad) = at_every_level(run)
    first = int(np.argmax(beyond)) if beyond.any() else n
    assert first - 512 < taken <= first
    done = x[:taken]
    assert bad == np.count_nonzero(~np.isfinite(done))
    expected, expected_zeros = np.ones((1, 2, 8192), np.int64), np.ones(1, np.int64)
    _core.histogram(done[None], np.array([power]), expected, expected_zeros)
    ref.assert_same_bits(counts, expected[0])
    ref.assert_same_bits(zeros, expected_zeros)
    finite = done[np.isfinite(done)]
    least, most = min(finite, default=np.inf), max(finite, default=-np.inf)
    if taken == n:
        assert tuple(ends) == (least, most)
    else:
        assert ends[0] <= least and ends[1] >= most and max(-ends[0], ends[1]) >= limit


def test_histogram_counts_more_than_a_small_counter_holds() -> None:
    x = np.full((1, 300_000), 1.5, np.float32)
    x[0, ::3] = 0.0
    counts, zeros = np.zeros((1, 2, 8192), np.int64), np.zeros(1, np.int64)
    _core.histogram(x, np.array([3]), counts, zeros)
    assert (counts.sum(), counts[0, 1, 12], zeros[0]) == (200_000, 200_000, 100_000)


# Pieces, threads, Ctrl-C, the ends of memory


@pytest.mark.parametrize(("shape", "axis", "group"), [
    ((5 * PIECE + 77,), None, None), ((1000, 333), 0, None), ((1000, 333), 1, None), ((1000, 320), 1, 32),
    ((320, 1000), 0, 32), ((3, 50, 2000), 1, None), ((20, 9, 1000), 1, 4), ((2, 3 * PIECE), 0, None),
])  # fmt: skip
def test_pieces_and_threads_leave_no_trace(shape: tuple[int, ...], axis: int | None, group: int | None) -> None:
    rng = np.random.default_rng(5)
    x = rng.standard_normal(shape, np.float32).reshape(-1)
    g = Granules.of(shape, axis, group)
    scale = rng.uniform(0.01, 0.1, g.shape).astype(np.float32).reshape(-1)
    zero = rng.integers(-9, 9, scale.size, np.int32)
    before = _core.get_num_threads()
    found = []
    try:
        for threads in (1, 3):
            _core.set_num_threads(threads)
            codes, values = np.empty(x.size, np.uint8), np.empty(x.size, np.float32)
            low, high = np.empty((2, scale.size), np.float32)
            assert not _core.quantize(x, scale, zero, g.walk, -128, 127, codes)
            _core.dequantize(codes, True, scale, zero, g.walk, -128, 127, values)
            assert _core.min_max(x, g.walk, low, high) == 0
            found.append((codes, values, low, high))
    finally:
        _core.set_num_threads(before)
    for one, two in zip(*found, strict=True):
        ref.assert_same_bits(one, two)
    shaped = (scale.reshape(g.shape), zero.reshape(g.shape))
    expected = ref.quantize(x.reshape(shape), *shaped, "int8", axis, group)
    ref.assert_same_bits(found[0][0].view(np.int8).reshape(shape), expected)
    ref.assert_same_bits(found[0][1].reshape(shape), ref.dequantize(expected, *shaped, "int8", axis, group))
    one_nan = x.copy()
    one_nan[-1] = np.nan
    assert _core.quantize(one_nan, scale, zero, g.walk, -128, 127, np.empty(x.size, np.uint8))


@pytest.mark.skipif(threading.current_thread() is not threading.main_thread(), reason="signals go to the main thread")
def test_ctrl_c_is_answered_within_a_long_call() -> None:
    """An interrupt that comes while a call runs ends it, not only the code after it."""
    x = np.zeros(1 << 26, np.float32)
    codes = np.empty(x.size, np.uint8)
    walk = Granules.of(x.shape).walk
    scale, zero = np.ones(1, np.float32), np.zeros(1, np.int32)
    start = time.perf_counter()
    _core.quantize(x[: 1 << 24], scale, zero, Granules.of((1 << 24,)).walk, -128, 127, codes[: 1 << 24])
    quarter = time.perf_counter() - start
    finished = 0
    timer = threading.Timer(quarter / 2, _thread.interrupt_main)
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        for _ in range(200):
            _core.quantize(x, scale, zero, walk, -128, 127, codes)
            finished += 1
        time.sleep(5)
    timer.join()
    assert finished <= 1


@pytest.mark.parametrize("at", ["end", "begin"])
def test_nothing_outside_the_arrays_is_touched(at: str, guarded: Guarded, level: str) -> None:
    for n in (*LENGTHS, 4097):
        x, codes, values = guarded((n,), np.float32, at), guarded((n,), np.uint8, at), guarded((n,), np.float32, at)
        x[:] = np.linspace(-3, 3, n)
        for axis in (None, 0):
            g = Granules.of((n,), axis)
            scale, zero = (
                guarded((max(*g.shape, 1) if g.shape else 1,), np.float32, at),
                np.zeros(n if axis == 0 else 1, np.int32),
            )
            scale[:] = 0.03
            low, high = guarded(scale.shape, np.float32, at), guarded(scale.shape, np.float32, at)
            _core.quantize(x, scale, zero, g.walk, -128, 127, codes)
            _core.dequantize(codes, True, scale, zero, g.walk, -128, 127, values)
            _core.quantize_float8(x, scale, g.walk, "float8_e5m2", codes)
            _core.dequantize_float8(codes, scale, g.walk, "float8_e5m2", values)
            _core.min_max(x, g.walk, low, high)
        _core.encode8(x, "float8_e4m3fn", True, codes)
        _core.decode8(codes, "float8_e4m3fn", values)
        words = guarded((n,), np.uint16, at)
        _core.encode(x, "bfloat16", False, words)
        _core.decode(words, "bfloat16", values)
        _core.histogram(x.reshape(1, -1), np.array([9]), np.zeros((1, 2, 8192), np.int64), np.zeros(1, np.int64))
        ends = np.array([np.inf, -np.inf])
        _core.histogram_while_it_fits(x, 9, np.zeros((2, 8192), np.int64), np.zeros(1, np.int64), ends)


def test_out_of_encode_and_decode() -> None:
    x = np.random.default_rng(0).standard_normal((5, 40), np.float32)
    for dtype in FORMATS:
        expected = ref.encode(x, dtype)
        codes = np.zeros(x.shape, expected.dtype)
        assert qn.encode(x, dtype, out=codes) is codes
        ref.assert_same_bits(codes, expected)
        values = np.zeros((5, 80), np.float32)[:, ::2]
        assert qn.decode(codes, dtype, out=values) is values
        ref.assert_same_bits(values, ref.decode(expected, dtype))
        with pytest.raises(ValueError, match="out is"):
            qn.encode(x, dtype, out=codes[1:])
        with pytest.raises(ValueError, match="out is"):
            qn.decode(codes, dtype, out=np.zeros(x.shape))


def test_wrong_sizes_are_refused() -> None:
    x, walk = np.ones(8, np.float32), Granules.of((8,)).walk
    one, bytes8 = np.ones(1, np.float32), np.zeros(8, np.uint8)
    for call in (
        lambda: _core.quantize(x, one, np.zeros(2, np.int32), walk, 0, 9, bytes8),
        lambda: _core.quantize(x[1:], one, np.zeros(1, np.int32), walk, 0, 9, bytes8),
        lambda: _core.quantize_float8(x, one, walk, "float8_e4m3fnuz", bytes8),
        lambda: _core.dequantize_float8(bytes8, one, walk, "float8_e4m3fn", x[1:]),
        lambda: _core.dequantize_float8(bytes8, one, walk, "float8_e5m2fnuz", x),
        lambda: _core.encode8(x, "float16", True, bytes8),
        lambda: _core.decode(np.zeros(8, np.uint16), "float8_e5m2", x),
        lambda: _core.decode8(bytes8[1:], "float8_e5m2", x),
        lambda: _core.min_max(x, walk, np.ones(2, np.float32), one),
        lambda: _core.histogram(
            x[None], np.zeros(2, np.int64), np.zeros((1, 2, 8192), np.int64), np.zeros(1, np.int64)
        ),
        lambda: _core.histogram(
            x[None], np.zeros(1, np.int64), np.zeros((1, 2, 4096), np.int64), np.zeros(1, np.int64)
        ),
        lambda: _core.histogram_while_it_fits(x, 9, np.zeros((2, 4096), np.int64), np.zeros(1, np.int64), np.zeros(2)),
        lambda: _core.histogram_while_it_fits(x, 9, np.zeros((2, 8192), np.int64), np.zeros(2, np.int64), np.zeros(2)),
        lambda: _core.histogram_while_it_fits(x, 9, np.zeros((2, 8192), np.int64), np.zeros(1, np.int64), np.zeros(1)),
    ):
        with pytest.raises(ValueError):
            call()
