"""quantize, dequantize and fake_quantize on arrays and scalars, against the reference, bit for bit."""

from __future__ import annotations

from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest
import reference as ref
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import qnative as qn

INTEGERS = ("int8", "uint8", "int4", "uint4")
FLOAT8 = ("float8_e4m3fn", "float8_e5m2")
DTYPES = INTEGERS + FLOAT8
FLOATS = (np.float16, ml_dtypes.bfloat16, np.float32, np.float64)


def storage(dtype: str) -> Any:
    return np.dtype(np.uint8 if dtype in FLOAT8 else ref.STORAGE[dtype])


class Case(NamedTuple):
    """Arguments of one call."""

    x: NDArray[Any]
    scale: NDArray[np.float32]
    zero: NDArray[Any] | None
    dtype: str
    axis: int | None
    group: int | None

    @property
    def scales(self) -> dict[str, Any]:
        return {"axis": self.axis, "group_size": self.group}


def lay_out(x: NDArray[Any], layout: str) -> NDArray[Any]:
    """The same values, otherwise in memory."""
    if layout == "fortran":
        return np.asfortranarray(x)
    if layout == "strided" and x.ndim:
        big = np.zeros((*x.shape[:-1], 2 * x.shape[-1] + 1), x.dtype)
        big[..., 1::2] = x
        return big[..., 1::2]
    if layout == "reversed" and x.ndim:
        return np.ascontiguousarray(x[..., ::-1])[..., ::-1]
    if layout == "broadcast" and x.ndim > 1:
        return np.broadcast_to(x[:1], x.shape)
    if layout == "unaligned":
        raw = np.zeros(x.nbytes + 1, np.uint8)[1:]
        raw[:] = np.frombuffer(np.ascontiguousarray(x).tobytes(), np.uint8)
        return raw.view(x.dtype).reshape(x.shape)
    if layout == "swapped" and x.dtype != ml_dtypes.bfloat16:
        return x.astype(x.dtype.newbyteorder())
    if layout == "read-only":
        x = x.copy()
        x.flags.writeable = False
    return x


@st.composite
def cases(draw: st.DrawFn) -> Case:
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    dtype = draw(st.sampled_from(DTYPES))
    kind = draw(st.sampled_from(FLOATS))
    shape = tuple(draw(st.lists(st.integers(0, 9) | st.sampled_from([17, 33]), max_size=4)))
    granularity = draw(st.sampled_from(["tensor", "channel", "group"])) if shape else "tensor"
    axis = group = None
    parameters: tuple[int, ...] = ()
    if granularity != "tensor":
        axis = draw(st.integers(-len(shape), len(shape) - 1))
        parameters = (shape[axis],)
        if granularity == "group":
            group = draw(st.sampled_from([1, 2, 3, 5, 8, 16, 100]))
            parameters = tuple(-(-n // group) if i == axis % len(shape) else n for i, n in enumerate(shape))
    scale = (10.0 ** rng.uniform(-3, 1, parameters)).astype(np.float32)
    zero: NDArray[Any] | None = None
    if dtype in INTEGERS and draw(st.booleans()):
        low, high = ref.RANGES[dtype]
        zero = rng.integers(low, high, parameters, endpoint=True).astype(ref.STORAGE[dtype])
    spread = ref.spread(scale, shape, axis, group).astype(np.float64)
    steps = rng.uniform(-300, 300, shape)
    steps = np.where(rng.random(shape) < 0.3, np.rint(steps) + 0.5, steps)  # ties, where the scale lets them be
    x = np.asarray(steps * spread).astype(kind)
    x = np.asarray(lay_out(x, draw(st.sampled_from(
        ["as is", "fortran", "strided", "reversed", "broadcast", "unaligned", "swapped", "read-only"]))))  # fmt: skip
    return Case(x, scale, zero, dtype, axis, group)


def expected_codes(case: Case, **limits: Any) -> NDArray[Any]:
    x = case.x.astype(case.x.dtype.newbyteorder("=")) if case.x.dtype != ml_dtypes.bfloat16 else case.x
    zero = 0 if case.zero is None else case.zero
    return ref.quantize(x, case.scale, zero, case.dtype, case.axis, case.group, **limits)


@given(cases())
def test_quantize_any_array(case: Case) -> None:
    codes = qn.quantize(case.x, case.scale, case.zero, case.dtype, **case.scales)
    ref.assert_same_bits(codes, expected_codes(case), repr(case))


@given(cases())
def test_dequantize_any_array(case: Case) -> None:
    codes = expected_codes(case)
    zero = 0 if case.zero is None else case.zero
    expected = ref.dequantize(codes, case.scale, zero, case.dtype, case.axis, case.group)
    ref.assert_same_bits(qn.dequantize(codes, case.scale, case.zero, case.dtype, **case.scales), expected)
    if codes.ndim:
        ref.assert_same_bits(
            qn.dequantize(np.asfortranarray(codes), case.scale, case.zero, case.dtype, **case.scales), expected
        )


@given(cases())
def test_fake_quantize_is_quantize_then_dequantize(case: Case) -> None:
    codes = qn.quantize(case.x, case.scale, case.zero, case.dtype, **case.scales)
    decoded = qn.dequantize(codes, case.scale, case.zero, case.dtype, **case.scales)
    fake = qn.fake_quantize(case.x, case.scale, case.zero, case.dtype, **case.scales)
    assert fake.shape == case.x.shape
    assert fake.dtype == case.x.dtype.newbyteorder("=")
    with np.errstate(over="ignore"):
        ref.assert_same_bits(fake, decoded.astype(fake.dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", FLOATS)
@pytest.mark.parametrize(("axis", "group"), [(None, None), (0, None), (1, None), (-1, 32), (0, 7), (1, 1)])
def test_large_arrays(dtype: str, kind: Any, axis: int | None, group: int | None) -> None:
    """Large enough for every vector loop, its tails, and more than one block."""
    rng = np.random.default_rng(3)
    x = (rng.standard_normal((67, 1031)) * 40).astype(kind)
    parameters: tuple[int, ...] = () if axis is None else (x.shape[axis],)
    if group is not None:
        assert axis is not None
        parameters = tuple(-(-n // group) if i == axis % 2 else n for i, n in enumerate(x.shape))
    scale = rng.uniform(0.01, 2.0, parameters).astype(np.float32)
    zero = None
    if dtype in INTEGERS:
        zero = rng.integers(*ref.RANGES[dtype], parameters, endpoint=True).astype(ref.STORAGE[dtype])
    case = Case(x, scale, zero, dtype, axis, group)
    codes = qn.quantize(x, scale, zero, dtype, axis, group_size=group)
    assert np.unique(codes).size >= 15
    ref.assert_same_bits(codes, expected_codes(case))
    decoded = qn.dequantize(codes, scale, zero, dtype, axis, group_size=group)
    ref.assert_same_bits(decoded, ref.dequantize(codes, scale, 0 if zero is None else zero, dtype, axis, group))
    fake = qn.fake_quantize(x, scale, zero, dtype, axis, group_size=group)
    ref.assert_same_bits(fake, decoded.astype(kind))


# ----------------------------------------------------------------------------------------------------------------------
# Rounding


def test_onnx_ties_go_to_even_and_the_zero_point_is_added_after() -> None:
    x = np.float32([-3.5, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5])
    even = [-4, -2, -2, 0, 0, 2, 2, 4]
    assert qn.quantize(x, 1.0).tolist() == even
    # Were the zero point added before rounding, an odd one would turn the ties the other way.
    assert qn.quantize(x, 1.0, 1).tolist() == [e + 1 for e in even]
    assert qn.quantize(x, 1.0, 101, "uint8").tolist() == [e + 101 for e in even]
    assert qn.quantize(x * 2, 2.0, 1, "int4").tolist() == [e + 1 for e in even]


def test_onnx_quantize_linear_example() -> None:
    """The published example of QuantizeLinear."""
    x = np.float32([0, 2, 3, 1000, -254, -1000])
    assert qn.quantize(x, 2.0, 128, "uint8").tolist() == [128, 129, 130, 255, 1, 0]
    assert qn.dequantize(np.uint8([0, 3, 128, 255]), 2.0, 128).tolist() == [-256.0, -250.0, 0.0, 254.0]


def test_division_is_true_division() -> None:
    """Where multiplying by the reciprocal would round to another code."""
    rng = np.random.default_rng(0)
    scale = rng.uniform(0.001, 1.0, 200_000).astype(np.float32)
    steps = (rng.integers(-127, 127, scale.size) + 0.5).astype(np.float32)
    x = steps * scale
    truth = np.clip(np.rint(x / scale), -128, 127).astype(np.int8)
    by_reciprocal = np.clip(np.rint(x * (np.float32(1) / scale)), -128, 127).astype(np.int8)
    assert np.count_nonzero(truth != by_reciprocal) > 1000
    ref.assert_same_bits(qn.quantize(x, scale, None, "int8", 0), truth)
    for i in range(0, scale.size, 997):  # one scale for all takes another path
        part = x[i : i + 41] * (scale[i] / scale[i : i + 41])
        ref.assert_same_bits(qn.quantize(part, scale[i]), ref.quantize(part, scale[i]))


def test_float64_is_rounded_once() -> None:
    just_above = np.array([0.5 + 2.0**-40, 2.5 + 2.0**-40, -0.5 - 2.0**-40])
    assert qn.quantize(just_above, 1.0).tolist() == [1, 3, -1]
    assert qn.quantize(just_above.astype(np.float32), 1.0).tolist() == [0, 2, 0]
    third = np.float32(1 / 3)
    x = np.array([(k + 0.5) * float(third) * (1 + s * 2.0**-48) for k in range(20) for s in (-1, 1)])
    ref.assert_same_bits(qn.quantize(x, third), np.rint(x / float(third)).astype(np.int8))
    assert qn.fake_quantize(just_above, 1.0).dtype == np.float64


def test_half_precision_is_widened() -> None:
    for kind in (np.float16, ml_dtypes.bfloat16):
        x = np.arange(1 << 16, dtype=np.uint16).view(kind)
        with np.errstate(invalid="ignore"):
            x = x[np.isfinite(x.astype(np.float32))]
        for scale in (0.37, 1e-5, 7.0):
            expected = ref.quantize(x.astype(np.float32), np.float32(scale), 3)
            assert np.unique(expected).size > 20
            ref.assert_same_bits(qn.quantize(x, scale, 3), expected)


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_far_outside_the_range_clamps(dtype: str, kind: Any) -> None:
    """Quotients beyond int32, int64 and the float type itself."""
    low, high = ref.RANGES[dtype]
    limits = np.finfo(kind)
    big = np.array([300, 2.0**15, 2.0**16 + 3, 2.0**31, 2.0**32 + 5e3, 2.0**63, 2.0**64, 1e30, limits.max], kind)
    for scale in (1.0, 1e-30, 2.0**-149):
        for zero in (low, high, 0 if low < 0 else 7):
            assert (qn.quantize(big, scale, zero, dtype) == high).all()
            assert (qn.quantize(-big, scale, zero, dtype) == low).all()
    tiny = np.array([limits.tiny, limits.smallest_subnormal, 0.0, -0.0], kind)
    for zero in (low, high):
        assert (qn.quantize(np.repeat(tiny, 9), 3e38, zero, dtype) == zero).all()


@pytest.mark.parametrize("dtype", FLOAT8)
def test_scaled_float8_clamps(dtype: str) -> None:
    top = ref.largest(dtype)
    x = np.float32([1e30, -1e30, 3.4e38, -3.4e38])
    codes = qn.quantize(x, 1e-10, dtype=dtype)
    assert qn.decode(codes, dtype).tolist() == [top, -top, top, -top]


def test_the_clamp_range() -> None:
    x = np.float32([-1e9, -130, -128, -127.4, 0, 7, 8, 127.4, 130, 1e9])
    assert qn.quantize(x, 1.0).tolist() == [-128, -128, -128, -127, 0, 7, 8, 127, 127, 127]
    assert qn.quantize(x, 1.0, dtype="int4").tolist() == [-8, -8, -8, -8, 0, 7, 7, 7, 7, 7]
    assert qn.quantize(x, 1.0, quant_min=-127).tolist() == [-127, -127, -127, -127, 0, 7, 8, 127, 127, 127]
    assert qn.quantize(x, 1.0, 3, quant_min=-5, quant_max=9).tolist() == [-5, -5, -5, -5, 3, 9, 9, 9, 9, 9]
    assert qn.fake_quantize(x, 1.0, 3, quant_min=-5, quant_max=9).tolist() == [-8] * 4 + [0] + [6] * 5
    for limits in ({"quant_min": -129}, {"quant_max": 128}, {"quant_min": 3, "quant_max": 2}, {"quant_min": 0.5}):
        with pytest.raises(ValueError, match="quant_m"):
            qn.quantize(x, 1.0, **limits)


def test_dequantize_rounds_once_to_the_wanted_dtype() -> None:
    codes = np.arange(-128, 128, dtype=np.int8)
    for scale in (np.float32(1 / 3), np.float32(1e-7), np.float32(600.0)):
        product = ref.dequantize(codes, scale, 5)
        for kind in FLOATS:
            with np.errstate(over="ignore"):
                ref.assert_same_bits(qn.dequantize(codes, scale, 5, out_dtype=kind), product.astype(kind))
    assert qn.dequantize(codes, 1.0).dtype == np.float32
    assert qn.dequantize(codes, 1.0, out_dtype="bfloat16").dtype == ml_dtypes.bfloat16
    for bad in ("int8", "float8_e4m3fn", "complex64", "half-ish"):
        with pytest.raises((ValueError, TypeError)):
            qn.dequantize(codes, 1.0, out_dtype=bad)


@pytest.mark.parametrize("dtype", INTEGERS)
def test_zero_points_at_the_ends(dtype: str) -> None:
    """`q - zero_point` needs nine bits."""
    low, high = ref.RANGES[dtype]
    codes = np.arange(low, high + 1).astype(ref.STORAGE[dtype])
    for zero in (low, high):
        expected = (codes.astype(np.float64) - zero) * 0.5
        assert qn.dequantize(codes, 0.5, zero, dtype).tolist() == expected.tolist()
        assert np.array_equal(qn.quantize(expected.astype(np.float32), 0.5, zero, dtype), codes)


# ----------------------------------------------------------------------------------------------------------------------
# NaN, Inf, degenerate data


@pytest.mark.parametrize("kind", FLOATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_inf(dtype: str, kind: Any) -> None:
    x = np.array([1.0, np.nan, np.inf, -np.inf, np.nan, np.nan] * 9, np.float32).astype(kind)
    zero = None if dtype in FLOAT8 else (3 if dtype in ("int4", "uint4") else 77)
    with pytest.raises(ValueError, match=r"\b(27|45)\b"):
        qn.quantize(x, 0.5, zero, dtype)
    with pytest.raises(ValueError, match=r"\b18\b"):
        qn.quantize(x.reshape(9, 6)[:, :4][:, [0, 2, 3]], 0.5, zero, dtype)
    codes = qn.quantize(x, 0.5, zero, dtype, nan="zero")
    ref.assert_same_bits(codes, ref.quantize(x.astype(np.float32), 0.5, zero or 0, dtype))
    decoded = qn.dequantize(codes, 0.5, zero, dtype)
    assert (decoded[[1, 4, 5]] == 0).all()
    low, high = ref.code_range(dtype)
    assert (decoded[2::6] == (high - (zero or 0)) * 0.5).all()
    assert (decoded[3::6] == (low - (zero or 0)) * 0.5).all()
    fake = qn.fake_quantize(x, 0.5, zero, dtype, nan="zero")
    with np.errstate(over="ignore"):
        ref.assert_same_bits(fake, decoded.astype(kind))
    out = np.zeros_like(fake)
    assert qn.fake_quantize(x, 0.5, zero, dtype, nan="zero", out=out) is out
    ref.assert_same_bits(out, fake)
    for call in (qn.quantize, qn.fake_quantize):
        with pytest.raises(ValueError, match=r"\b45 of 54\b"):
            call(x, 0.5, zero, dtype)
    with pytest.raises(ValueError, match="nan="):
        qn.quantize(x, 0.5, zero, dtype, nan="ignore")


def test_one_nan_anywhere_is_found() -> None:
    x = np.ones((5, 333), np.float32)
    for at in (0, 1, 31, 332, 333, 5 * 333 - 1):
        for bad in (np.nan, np.inf, -np.inf):
            y = x.copy()
            y.flat[at] = bad
            for axis, group in ((None, None), (0, None), (1, None), (1, 32)):
                shape = {None: (), 32: (5, 11)}.get(group) if axis is None or group else (x.shape[axis],)
                with pytest.raises(ValueError, match="1"):
                    qn.quantize(y, np.ones(shape or ()), None, "int8", axis, group_size=group)


def test_fake_quantize_refuses_nan() -> None:
    with pytest.raises(ValueError, match=r"(?i)nan"):
        qn.fake_quantize(np.float32([1, np.nan]), 1.0)


@pytest.mark.parametrize("scale", [0.0, -1.0, np.nan, np.inf, 1e-60, 1e60])
def test_a_users_scale_must_be_finite_and_positive(scale: float) -> None:
    x = np.ones(3, np.float32)
    calls = (
        lambda s, **k: qn.quantize(x, s, **k),
        lambda s, **k: qn.dequantize(np.ones(3, np.int8), s, **k),
        lambda s, **k: qn.fake_quantize(x, s, **k),
    )
    for call in calls:
        with pytest.raises(ValueError, match="scale"):
            call(scale)
        with pytest.raises(ValueError, match="scale"):
            call(np.array([1.0, scale, 1.0]), axis=0)


def test_a_users_scale_is_used_as_it_is() -> None:
    """Even a subnormal one."""
    scale = np.float32(2.0**-140)
    x = np.float32([3, -2, 0]) * scale
    assert qn.quantize(x, scale).tolist() == [3, -2, 0]
    ref.assert_same_bits(qn.fake_quantize(x, scale), x)


def test_shapes_that_do_not_fit_are_refused() -> None:
    x = np.ones((4, 6), np.float32)
    with pytest.raises(ValueError, match=r"\(3,\)"):
        qn.quantize(x, np.ones(3), axis=0)
    with pytest.raises(ValueError, match=r"axis"):
        qn.quantize(x, np.ones(4))
    with pytest.raises(ValueError, match="axis"):
        qn.quantize(x, np.ones(4), axis=2)
    with pytest.raises(ValueError, match="axis"):
        qn.quantize(x, np.ones(4), axis=-3)
    with pytest.raises(ValueError, match=r"\(4, 3\)"):
        qn.quantize(x, np.ones((4, 2)), axis=1, group_size=2)
    with pytest.raises(ValueError, match="zero_point"):
        qn.quantize(x, np.ones(4), np.zeros(3, np.int8), axis=0)
    with pytest.raises(ValueError, match="zero_point"):
        qn.quantize(x, 1.0, 128)
    with pytest.raises(ValueError, match="zero_point"):
        qn.quantize(x, 1.0, 8, "int4")
    with pytest.raises(ValueError, match="group_size"):
        qn.quantize(x, np.ones((4, 6)), axis=1, group_size=0)
    for bad in ({"axis": 0.0}, {"axis": 1, "group_size": 2.0}):
        with pytest.raises(ValueError, match="must be an int"):
            qn.quantize(x, np.ones(4), **bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="axis"):
        qn.quantize(np.float32(1), 1.0, axis=0)


@pytest.mark.parametrize(
    "bad",
    [
        np.arange(4),
        np.ones(3, complex),
        np.array([None]),
        np.array(["1.0"]),
        np.ones(2, bool),
        *([np.ones(2, np.longdouble)] if np.finfo(np.longdouble).bits > 64 else []),
    ],
    ids=repr,
)
def test_only_floats_are_quantized(bad: Any) -> None:
    for call in (qn.quantize, qn.fake_quantize):
        with pytest.raises(TypeError, match="float"):
            call(bad, 1.0)


def test_groups_run_along_the_last_axis_by_default() -> None:
    x = np.random.default_rng(0).standard_normal((3, 10)).astype(np.float32)
    scale = np.random.default_rng(1).uniform(0.01, 0.1, (3, 3)).astype(np.float32)
    codes = qn.quantize(x, scale, group_size=4)
    ref.assert_same_bits(codes, ref.quantize(x, scale, axis=1, group_size=4))
    ref.assert_same_bits(qn.dequantize(codes, scale, group_size=4), ref.dequantize(codes, scale, axis=1, group_size=4))
    ref.assert_same_bits(qn.fake_quantize(x.tolist(), scale, group_size=4), qn.fake_quantize(x, scale, group_size=4))


def test_only_codes_are_dequantized() -> None:
    for codes, dtype in ((np.ones(3, np.float32), "int8"), (np.ones(3, complex), "uint8"), (np.array(["1"]), "int8"),
                         (np.ones(3, np.float16), "float8_e5m2")):  # fmt: skip
        with pytest.raises(TypeError, match="codes"):
            qn.dequantize(codes, 1.0, None, dtype)
    for codes in (np.ones(3, np.int64), np.ones(3, np.float32)):
        with pytest.raises(ValueError, match="int8"):
            qn.dequantize(codes, 1.0)
    for value, dtype in ((200, "int8"), (-1, "uint8"), (8, "int4"), (-9, "int4"), (16, "uint4"), (256, "float8_e5m2")):
        with pytest.raises(ValueError, match=str(value)):
            qn.dequantize(np.array([0, value]), 1.0, None, dtype)


def test_codes_of_ml_dtypes_know_their_dtype() -> None:
    for kind, dtype in ((ml_dtypes.int4, "int4"), (ml_dtypes.uint4, "uint4")):
        codes = np.arange(*ref.RANGES[dtype]).astype(kind)
        ref.assert_same_bits(qn.dequantize(codes, 0.5, 1), ref.dequantize(codes.astype(np.int64), 0.5, 1, dtype))
    for dtype in FLOAT8:
        codes = np.arange(0x78, dtype=np.uint8)
        floats = codes.view(getattr(ml_dtypes, dtype))
        for change in (lambda a: a, lambda a: a[::-1], lambda a: np.repeat(a, 2)[::2], lambda a: a.reshape(4, 30).T):
            ref.assert_same_bits(qn.dequantize(change(floats), 0.3), ref.dequantize(change(codes), 0.3, 0, dtype))


def test_scalars_and_empty_arrays() -> None:
    for x in (0.74, np.float32(0.74), np.array(0.74)):
        codes = qn.quantize(x, 0.5, 3)
        assert codes == 4
        assert np.shape(codes) == ()
        assert codes.dtype == np.int8
        assert np.shape(qn.dequantize(codes, 0.5, 3)) == ()
        assert qn.fake_quantize(x, 0.5, 3) == 0.5
    for shape in ((0,), (0, 5), (5, 0), (3, 0, 2)):
        empty = np.zeros(shape, np.float32)
        for axis, parameters in ((None, ()), (0, shape[:1]), (-1, shape[-1:])):
            for call in (qn.quantize, qn.fake_quantize):
                assert call(empty, np.ones(parameters), None, "int8", axis).shape == shape


# ----------------------------------------------------------------------------------------------------------------------
# out=


def test_out_is_filled_and_returned() -> None:
    x = np.random.default_rng(0).standard_normal((7, 33)).astype(np.float32)
    codes = np.full(x.shape, 99, np.int8)
    assert qn.quantize(x, 0.02, out=codes) is codes
    ref.assert_same_bits(codes, ref.quantize(x, np.float32(0.02)))
    y = np.full(x.shape, np.nan, np.float32)
    assert qn.dequantize(codes, 0.02, out=y) is y
    ref.assert_same_bits(y, ref.dequantize(codes, np.float32(0.02)))
    again = x.copy()
    assert qn.fake_quantize(again, 0.02, out=again) is again  # in place
    ref.assert_same_bits(again, y)
    large = np.full((7, 40), 99, np.int8)
    qn.quantize(x, 0.02, out=large[:, 3:36])
    ref.assert_same_bits(large[:, 3:36], codes)
    assert (large[:, :3] == 99).all()
    assert (large[:, 36:] == 99).all()


@pytest.mark.parametrize("layout", ["unaligned", "strided", "reversed", "fortran"])
def test_out_of_any_memory_layout(layout: str) -> None:
    x = np.random.default_rng(1).standard_normal((7, 33)).astype(np.float32)
    codes = qn.quantize(x, 0.02)
    halves = qn.encode(x, "float16")
    for call, expected in (
        (lambda out: qn.quantize(x, 0.02, out=out), codes),
        (lambda out: qn.dequantize(codes, 0.02, out=out), qn.dequantize(codes, 0.02)),
        (lambda out: qn.fake_quantize(x, 0.02, out=out), qn.fake_quantize(x, 0.02)),
        (lambda out: qn.encode(x, "float16", out=out), halves),
        (lambda out: qn.decode(halves, "float16", out=out), qn.decode(halves, "float16")),
    ):
        out = lay_out(np.zeros_like(expected), layout)
        assert call(out) is out
        ref.assert_same_bits(np.ascontiguousarray(out), expected)


def test_out_that_does_not_fit_is_refused() -> None:
    x = np.ones((4, 6), np.float32)
    read_only = np.zeros(x.shape, np.int8)
    read_only.flags.writeable = False
    for out in (np.zeros((6, 4), np.int8), np.zeros(24, np.int8), np.zeros((4, 6), np.uint8), read_only,
                np.zeros((1, 4, 6), np.int8)):  # fmt: skip
        before = out.copy()
        with pytest.raises((ValueError, TypeError), match="out"):
            qn.quantize(x, 1.0, out=out)
        assert np.array_equal(out, before)
    for out in (np.zeros((6, 4), np.float32), np.zeros((4, 6), np.int32)):
        with pytest.raises((ValueError, TypeError), match="out"):
            qn.dequantize(np.ones((4, 6), np.int8), 1.0, out=out)
        with pytest.raises((ValueError, TypeError), match="out"):
            qn.fake_quantize(x, 1.0, out=out)
    with pytest.raises((ValueError, TypeError), match="out"):
        qn.quantize(x, 1.0, out=[[0] * 6] * 4)


def test_out_that_overlaps_the_input() -> None:
    """The result is as if it did not, or it is refused."""
    memory = np.random.default_rng(1).standard_normal(200).astype(np.float32)
    x, out = memory[:100], memory[1:101]
    expected = ref.dequantize(ref.quantize(x, np.float32(0.1)), np.float32(0.1))
    try:
        qn.fake_quantize(x, 0.1, out=out)
    except ValueError as error:
        assert "overlap" in str(error)
    else:
        ref.assert_same_bits(out, expected)


@pytest.mark.parametrize("kind", FLOATS)
def test_a_numpy_scalar_keeps_its_dtype(kind: Any) -> None:
    x = np.dtype(kind).type(0.3)
    fake = qn.fake_quantize(x, 0.125)
    assert fake.dtype == np.dtype(kind)
    assert fake == 0.25
    assert qn.fake_quantize(0.3, 0.125).dtype == np.float32


def test_inputs_are_left_alone() -> None:
    x = np.random.default_rng(2).standard_normal((5, 9))
    before = x.copy()
    qn.quantize(x, 0.1)
    qn.fake_quantize(x, 0.1)
    assert np.array_equal(x, before)
