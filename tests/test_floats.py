"""Small float formats, both ways, against ml_dtypes and NumPy, and the reference itself against them."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import reference as ref
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

import qnative as qn

FLOAT8 = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
FORMATS = (*FLOAT8, "float16", "bfloat16")
MAXIMUM = {
    "float8_e4m3fn": 448.0, "float8_e5m2": 57344.0, "float8_e4m3fnuz": 240.0, "float8_e5m2fnuz": 57344.0,
    "float16": 65504.0, "bfloat16": float.fromhex("0x1.fep127"),
}  # fmt: skip


def oracle(dtype: str) -> Any:
    return np.dtype(np.float16 if dtype == "float16" else getattr(ml_dtypes, dtype))


def storage(dtype: str) -> Any:
    return np.dtype(np.uint8 if dtype in FLOAT8 else np.uint16)


def cast(x: NDArray[Any], dtype: str, saturate: bool) -> NDArray[Any]:
    """The oracle's codes: a cast, after a clip if saturating."""
    with np.errstate(all="ignore"):
        if saturate:
            x = np.clip(x, x.dtype.type(-MAXIMUM[dtype]), x.dtype.type(MAXIMUM[dtype]))
        return x.astype(oracle(dtype)).view(storage(dtype))


def assert_same_codes(actual: Any, expected: NDArray[Any], dtype: str, x: NDArray[Any]) -> None:
    """Equal codes; a NaN must be a NaN of the same sign (payloads are free in the 16-bit formats)."""
    assert actual.dtype == storage(dtype)
    assert actual.shape == expected.shape
    wrong = actual != expected
    if dtype not in FLOAT8:
        both = np.isnan(actual.view(oracle(dtype))) & np.isnan(expected.view(oracle(dtype)))
        wrong &= ~both | ((actual ^ expected) & 0x8000 != 0)
    if wrong.any():
        i = int(np.flatnonzero(wrong.ravel())[0])
        got, want = int(actual.ravel()[i]), int(expected.ravel()[i])
        raise AssertionError(f"{dtype}: {int(wrong.sum())} differ, {x.ravel()[i]!r} -> {got:#x}, expected {want:#x}")


def every_16_bits(kind: Any) -> NDArray[Any]:
    return np.arange(1 << 16, dtype=np.uint16).view(kind)


def hard_floats(dtype: str, kind: Any) -> NDArray[Any]:
    """Every value, every tie and both neighbours of each in float32 or float64, overflow's edges, and random bits."""
    table = ref.magnitudes(dtype)
    table = table if len(table) < 1000 else table[:: len(table) // 997]
    table = np.append(table, [2 * ref.magnitudes(dtype)[-1] - ref.magnitudes(dtype)[-2]])
    with np.errstate(over="ignore"):
        exact = np.concatenate([table, (table[1:] + table[:-1]) / 2, [0.0, np.inf, np.nan]]).astype(kind)
    near = np.concatenate([exact, np.nextafter(exact, kind(np.inf)), np.nextafter(exact, kind(-np.inf))])
    limits = np.finfo(kind)
    edges = np.array([limits.max, limits.tiny, limits.smallest_subnormal], kind)
    word = {4: np.uint32, 8: np.uint64}[np.dtype(kind).itemsize]
    noise = np.random.default_rng(7).integers(0, np.iinfo(word).max, 100_000, word, endpoint=True).view(kind)
    near = np.concatenate([near, edges])
    return np.concatenate([near, -near, noise])


INPUTS = {
    "every float16": lambda dtype: every_16_bits(np.float16),
    "every bfloat16": lambda dtype: every_16_bits(ml_dtypes.bfloat16),
    "hard float32": lambda dtype: hard_floats(dtype, np.float32),
    "hard float64": lambda dtype: hard_floats(dtype, np.float64),
    # Every sign, exponent and leading mantissa bit, with the trailing ones that decide rounding.
    "swept float32": lambda dtype: (
        (np.arange(1 << 20, dtype=np.uint32) << 12)[:, None] | np.array([0, 1, 0x7FF, 0x800, 0x801, 0xFFF], np.uint32)
    ).view(np.float32),
    # 2^24 in even steps through all of them, the steps odd, so that the last bits take every value too.
    "strided float32": lambda dtype: (np.arange(1 << 24, dtype=np.uint32) * np.uint32(257)).view(np.float32),
}  # fmt: skip


def widened(x: NDArray[Any]) -> NDArray[Any]:
    with np.errstate(invalid="ignore"):
        return x.astype(np.float32) if x.dtype.itemsize == 2 else x


@pytest.mark.parametrize("dtype", FORMATS)
def test_decode_every_code(dtype: str) -> None:
    codes = np.arange(1 << (8 * storage(dtype).itemsize), dtype=storage(dtype))
    with np.errstate(invalid="ignore"):
        expected = codes.view(oracle(dtype)).astype(np.float32)
    ref.assert_same_bits(ref.decode(codes, dtype), expected, "the reference")
    ref.assert_same_bits(qn.decode(codes, dtype), expected, dtype)
    assert np.nanmax(expected[np.isfinite(expected)]) == MAXIMUM[dtype] == ref.largest(dtype)


@pytest.mark.parametrize("saturate", [False, True])
@pytest.mark.parametrize("source", INPUTS)
@pytest.mark.parametrize("dtype", FORMATS)
def test_encode_agrees_with_the_oracle(dtype: str, source: str, saturate: bool) -> None:
    x = INPUTS[source](dtype)
    expected = cast(widened(x), dtype, saturate)
    assert np.unique(expected[:: len(expected) >> 18 or 1]).size > 100
    if "swept" not in source and "strided" not in source:  # the table search is slow
        again = ref.encode(widened(x), dtype, saturate)
        if x.dtype == np.float64:  # ml_dtypes rounds float64 twice, through float32
            with np.errstate(all="ignore"):
                once = np.isnan(x) | (x.astype(np.float32) == x)
            assert_same_codes(again[once], expected[once], dtype, x[once])
            expected = again
        assert_same_codes(again, expected, dtype, x)
    assert_same_codes(qn.encode(x, dtype, saturate=saturate), expected, dtype, x)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", FORMATS)
def test_encode_every_float32(dtype: str) -> None:
    for block in range(64):
        x = (np.arange(1 << 26, dtype=np.uint32) + np.uint32(block << 26)).view(np.float32)
        for saturate in (False, True):
            assert_same_codes(qn.encode(x, dtype, saturate=saturate), cast(x, dtype, saturate), dtype, x)


@pytest.mark.parametrize("dtype", FORMATS)
def test_every_code_round_trips(dtype: str) -> None:
    codes = np.arange(1 << (8 * storage(dtype).itemsize), dtype=storage(dtype))
    values = qn.decode(codes, dtype)
    kept = ~np.isnan(values)
    for saturate in (False, True):
        again = qn.encode(values, dtype, saturate=saturate)
        keep = kept & (np.isfinite(values) if saturate else True)
        assert np.array_equal(again[keep], codes[keep])
        assert np.isnan(qn.decode(again[~kept], dtype)).all()


@pytest.mark.parametrize(
    ("dtype", "value", "saturated", "unsaturated"),
    [
        ("float8_e4m3fn", 448.0, 448.0, 448.0),
        ("float8_e4m3fn", 464.0, 448.0, 448.0),
        ("float8_e4m3fn", np.nextafter(464.0, 500.0), 448.0, np.nan),
        ("float8_e4m3fn", np.inf, 448.0, np.nan),
        ("float8_e5m2", np.nextafter(61440.0, 0.0), 57344.0, 57344.0),
        ("float8_e5m2", 61440.0, 57344.0, np.inf),
        ("float8_e5m2", np.inf, 57344.0, np.inf),
        ("float8_e4m3fnuz", np.nextafter(248.0, 0.0), 240.0, 240.0),
        ("float8_e4m3fnuz", 248.0, 240.0, np.nan),
        ("float8_e4m3fnuz", np.inf, 240.0, np.nan),
        ("float8_e5m2fnuz", 61440.0, 57344.0, np.nan),
        ("float8_e5m2fnuz", np.inf, 57344.0, np.nan),
        ("float16", np.nextafter(65520.0, 0.0), 65504.0, 65504.0),
        ("float16", 65520.0, 65504.0, np.inf),
        ("float16", np.inf, 65504.0, np.inf),
        ("bfloat16", 3.4e38, MAXIMUM["bfloat16"], np.inf),
        ("bfloat16", 1e300, MAXIMUM["bfloat16"], np.inf),
    ],
)
def test_overflow_rules(dtype: str, value: float, saturated: float, unsaturated: float) -> None:
    for sign in (1.0, -1.0):
        x = np.array([sign * value])
        for saturate, expected in ((True, saturated), (False, unsaturated), (None, saturated if dtype in FLOAT8 else
                                                                             unsaturated)):  # fmt: skip
            got = qn.decode(qn.encode(x, dtype, saturate=saturate), dtype)
            assert np.array_equal(got, np.float32([sign * expected]), equal_nan=True), (saturate, got)
    assert np.isnan(qn.decode(qn.encode(np.array([np.nan, -np.nan]), dtype, saturate=True), dtype)).all()


@pytest.mark.parametrize("dtype", FORMATS)
def test_the_sign_of_zero(dtype: str) -> None:
    zeros = qn.decode(qn.encode(np.float32([-0.0, -1e-45, 0.0, 1e-45]), dtype), dtype)
    assert (zeros[2:] == 0).all()
    assert not np.signbit(zeros[2:]).any()
    assert (np.abs(zeros) < 1e-40).all()
    assert np.signbit(zeros[:2]).all() == (not dtype.endswith("fnuz"))


@pytest.mark.parametrize("dtype", FLOAT8)
def test_float64_is_not_rounded_through_float32(dtype: str) -> None:
    """A float64 just beside a tie is on the tie once it has been a float32."""
    table = ref.magnitudes(dtype)
    ties = (table[1:] + table[:-1]) / 2
    lower, upper = np.nextafter(ties, 0.0), np.nextafter(ties, np.inf)
    assert np.array_equal(lower.astype(np.float32), upper.astype(np.float32))
    assert np.array_equal(qn.encode(lower, dtype), np.arange(len(ties)))
    assert np.array_equal(qn.encode(upper, dtype), np.arange(len(ties)) + 1)
    assert not np.array_equal(qn.encode(lower.astype(np.float32), dtype), qn.encode(lower, dtype))


@given(
    x=hnp.arrays(
        st.sampled_from([np.float16, np.float32, np.float64, ">f4", ">f8", ">f2"]),
        hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5),
    ),
    dtype=st.sampled_from(FORMATS),
    flip=st.booleans(),
    reverse=st.booleans(),
)
def test_any_shape_and_layout(x: NDArray[Any], dtype: str, flip: bool, reverse: bool) -> None:
    x = x.T if flip else x
    x = x[::-1] if reverse and x.ndim else x
    x.flags.writeable = False
    codes = qn.encode(x, dtype)
    expected = cast(np.ascontiguousarray(widened(x.astype(x.dtype.newbyteorder("=")))).reshape(x.shape), dtype,
                    dtype in FLOAT8)  # fmt: skip
    assert codes.shape == x.shape
    assert_same_codes(np.asarray(codes), expected, dtype, np.asarray(x))
    assert qn.decode(codes, dtype).shape == x.shape


def test_codes_in_any_layout() -> None:
    codes = np.arange(256, dtype=np.uint8)
    flat = qn.decode(codes, "float8_e4m3fn")
    wide = np.zeros((256, 3), np.uint8)
    wide[:, 1] = codes
    read_only = codes.copy()
    read_only.flags.writeable = False
    unaligned = np.zeros(2 * 256 + 1, np.uint8)[1:].view(np.uint16)
    unaligned[:] = np.arange(256) << 8
    ref.assert_same_bits(qn.decode(wide[:, 1], "float8_e4m3fn"), flat)
    ref.assert_same_bits(qn.decode(codes[::-1], "float8_e4m3fn"), flat[::-1])
    ref.assert_same_bits(qn.decode(read_only, "float8_e4m3fn"), flat)
    ref.assert_same_bits(qn.decode(unaligned, "float16"), ref.decode(unaligned.copy(), "float16"))
    ref.assert_same_bits(qn.decode(unaligned.astype(">u2"), "bfloat16"), ref.decode(unaligned.copy(), "bfloat16"))
    assert qn.decode(np.zeros((0, 3), np.uint8), "float8_e5m2").shape == (0, 3)


@pytest.mark.parametrize("bad", ["float8", "int8", "float32", None, 8])
def test_unknown_formats_are_refused(bad: Any) -> None:
    with pytest.raises(ValueError, match="float8_e4m3fn"):
        qn.encode(np.ones(3, np.float32), bad)
    with pytest.raises(ValueError, match="float8_e4m3fn"):
        qn.decode(np.ones(3, np.uint8), bad)


def test_wrong_arrays_are_refused() -> None:
    for x in (np.arange(3), np.ones(3, complex), np.array(["a"]), np.array([None])):
        with pytest.raises(TypeError, match="float"):
            qn.encode(x, "float8_e4m3fn")
    for codes, dtype in ((np.ones(3, np.float32), "float8_e4m3fn"), (np.ones(3, complex), "float16"),
                         (np.array(["a"]), "bfloat16"), (np.array([None]), "float8_e5m2")):  # fmt: skip
        with pytest.raises(TypeError, match="uint"):
            qn.decode(codes, dtype)
    for value in (-1, 256, 1 << 40):
        with pytest.raises(ValueError, match="255"):
            qn.decode([value], "float8_e4m3fn")
    with pytest.raises(ValueError, match="65535"):
        qn.decode([65536], "float16")
    assert qn.decode([0x38, 0xB8], "float8_e4m3fn").tolist() == [1.0, -1.0]
