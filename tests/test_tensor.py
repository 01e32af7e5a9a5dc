"""QuantizedTensor and its making: codes, packing, scales, sizes, degenerate data, against the reference."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
import sys
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import reference as ref
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from test_elementwise import FLOATS, lay_out

import qnative as qn
from qnative.floats import as_float_array
from qnative.granularity import block_min_max

INTEGERS = ("int8", "uint8", "int4", "uint4")
FLOAT8 = ("float8_e4m3fn", "float8_e5m2")
MODES = ("symmetric", "asymmetric")
KINDS = [(d, m) for d in INTEGERS + FLOAT8 for m in MODES if not (d in FLOAT8 and m == "asymmetric")]
GRANULARITIES = {
    "per_tensor": (None, None), "channel 0": (0, None), "channel -1": (-1, None), "channel 1": (1, None),
    "group -1": (-1, 32), "group 0": (0, 5), "groups of 1": (1, 1), "one group": (-1, 1000),
}  # fmt: skip

THREE = (qn.QuantConfig.int8_per_channel(), qn.QuantConfig.int4_per_group(4).asymmetric(), qn.QuantConfig.fp8())


def make_config(dtype: str, mode: str, axis: int | None, group: int | None, scale_dtype: str = "float32") -> Any:
    granularity = "per_tensor" if axis is None else "per_channel" if group is None else "per_group"
    return qn.QuantConfig(dtype, mode, granularity, axis, group, scale_dtype)


def native(x: NDArray[Any]) -> NDArray[Any]:
    """Plain values for the reference."""
    return x if x.dtype == ml_dtypes.bfloat16 else x.astype(x.dtype.newbyteorder("="))


def check(x: NDArray[Any], config: Any) -> Any:
    """Quantize `x` and hold everything about the result against the reference."""
    q = qn.quantize_tensor(x, config)
    mode = str(config.mode)
    expected = ref.quantize_tensor(native(x), config.dtype, mode, config.axis, config.group_size, config.scale_dtype)
    ref.assert_same_bits(q.scale, expected.scale, "scale")
    ref.assert_same_bits(q.codes, expected.codes, "codes")
    assert np.array_equal(np.broadcast_to(q.zero_point, expected.scale.shape), expected.zero_point)
    assert q.zero_point.shape == (() if mode == "symmetric" else expected.scale.shape)
    if config.dtype in INTEGERS:
        assert q.zero_point.dtype == ref.STORAGE[config.dtype]
    assert (q.shape, q.dtype, q.config, q.numel) == (x.shape, native(x).dtype.name, config, x.size)
    # The packed form
    if config.bits == 4:
        words = (*x.shape[:-1], -(-x.shape[-1] // 8)) if x.ndim else (1,)
        assert q.data.dtype == np.dtype("<i4")
        assert q.data.shape == words
        if x.size:
            unpacked = ref.unpack4(q.data, config.dtype, x.shape[-1] if x.ndim else 1)
            ref.assert_same_bits(unpacked.reshape(x.shape), q.codes, "unpacked")
    else:
        ref.assert_same_bits(q.data, q.codes)
    # As stored
    assert q.scale_data.shape == q.scale.shape
    if config.scale_dtype == "bfloat16":
        assert q.scale_data.dtype == np.uint16
        ref.assert_same_bits(ref.decode(q.scale_data, "bfloat16"), q.scale)
    else:
        assert q.scale_data.dtype == np.dtype(config.scale_dtype)
        ref.assert_same_bits(q.scale_data.astype(np.float32), q.scale)
    # The one zero point of symmetric mode is the dtype's, not data.
    assert q.nbytes == q.data.nbytes + q.scale_data.nbytes + (q.zero_point.nbytes if mode == "asymmetric" else 0)
    # Decoding
    product = ref.dequantize(
        expected.codes, expected.scale, expected.zero_point, config.dtype, config.axis, config.group_size
    )
    with np.errstate(over="ignore"):
        ref.assert_same_bits(q.dequantize(), product.astype(native(x).dtype), "dequantize")
    ref.assert_same_bits(qn.dequantize_tensor(q), q.dequantize())
    return q


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize(("dtype", "mode"), KINDS)
def test_a_matrix(dtype: str, mode: str, granularity: str) -> None:
    rng = np.random.default_rng(11)
    x = (rng.standard_normal((37, 75)) * rng.uniform(0.01, 3, (37, 1)) + 0.3).astype(np.float32)
    q = check(x, make_config(dtype, mode, *GRANULARITIES[granularity]))
    assert np.unique(q.codes).size >= (2 if granularity == "groups of 1" else 12)


@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(("dtype", "mode"), KINDS)
def test_small_scales(dtype: str, mode: str, scale_dtype: str) -> None:
    """Codes come from the rounded scale: some of the codes differ from those of the exact one."""
    x = np.random.default_rng(12).standard_normal((64, 100)).astype(np.float32) * 3000
    config = make_config(dtype, mode, -1, 16, scale_dtype)
    q = check(x, config)
    exact = qn.quantize_tensor(x, config.with_scale_dtype("float32"))
    assert not np.array_equal(exact.scale, q.scale)
    assert not np.array_equal(exact.codes, q.codes)
    assert exact.nbytes - q.nbytes == 2 * q.scale.size
    low, high = ref.code_range(dtype, mode)
    if dtype in INTEGERS:
        assert low <= q.codes.min() <= q.codes.max() <= high


@st.composite
def arrays(draw: st.DrawFn) -> tuple[NDArray[Any], Any]:
    shape = tuple(draw(st.lists(st.integers(1, 9) | st.sampled_from([17, 33]), max_size=4)))
    dtype, mode = draw(st.sampled_from(KINDS))
    axis = group = None
    if shape and draw(st.booleans()):
        axis = draw(st.integers(-len(shape), len(shape) - 1))
        group = draw(st.none() | st.sampled_from([1, 2, 3, 5, 8, 16, 100]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    kind = draw(st.sampled_from(FLOATS))
    spread = 1 if kind == np.float16 else 20
    x = rng.standard_normal(shape) * 10.0 ** rng.uniform(-spread, spread, shape) + draw(st.sampled_from([0, 0, 3, -50]))
    x = np.asarray(x).astype(kind)
    layout = draw(st.sampled_from(["as is", "fortran", "strided", "reversed", "unaligned", "swapped", "read-only"]))
    return np.asarray(lay_out(x, layout)), make_config(dtype, mode, axis, group)


@given(arrays())
def test_any_array(case: tuple[NDArray[Any], Any]) -> None:
    check(*case)


@given(arrays(), st.data())
def test_take_decodes_only_those_rows(case: tuple[NDArray[Any], Any], data: st.DataObject) -> None:
    x, config = case
    q = qn.quantize_tensor(x, config)
    if not x.ndim:
        with pytest.raises((ValueError, IndexError)):
            q.take([0])
        return
    shape = tuple(data.draw(st.lists(st.integers(0, 4), max_size=2)))
    count = math.prod(shape)
    drawn = data.draw(st.lists(st.integers(-len(x), len(x) - 1), min_size=count, max_size=count))
    rows = np.array(drawn, np.int64).reshape(shape)
    ref.assert_same_bits(q.take(rows), q.dequantize()[rows], repr(config))


def test_numpy_sees_the_values() -> None:
    x = np.random.default_rng(6).standard_normal((4, 40), np.float32)
    for config in (qn.QuantConfig.int8_per_channel(), qn.QuantConfig.int4_per_group(32)):
        q = qn.quantize_tensor(x, config)
        ref.assert_same_bits(np.asarray(q), q.dequantize())
        ref.assert_same_bits(np.array(q, np.float64), q.dequantize().astype(np.float64))
        np.testing.assert_allclose(q, x, atol=0.5)
        with pytest.raises(ValueError, match="decoded"):
            np.asarray(q, copy=False)


def test_what_is_quantized_is_not_quantized_again() -> None:
    q = qn.quantize_tensor(np.ones((8, 32), np.float32), qn.QuantConfig.int4_per_group(32))
    with pytest.raises(TypeError, match=r"int4 is quantized already.*dequantize\(\)"):
        qn.quantize_tensor(q)
    with pytest.raises(TypeError, match=r"int4 is quantized already; from_tensor\(\)"):
        qn.QuantizedLinear.from_float(q)
    assert qn.quantize_tensor(q.dequantize()).config == qn.QuantConfig.int8()


def test_take_refuses_what_is_not_a_row() -> None:
    q = qn.quantize_tensor(np.ones((5, 3), np.float32), qn.QuantConfig.int8_per_channel())
    for rows in ([5], [0, 99], [-6]):
        with pytest.raises(IndexError, match="5"):
            q.take(rows)
    with pytest.raises((TypeError, IndexError, ValueError)):
        q.take([0.5])
    with pytest.raises((TypeError, IndexError, ValueError)):
        q.take([1.0])
    assert q.take([]).shape == (0, 3)


def test_negative_axes_are_the_positive_ones() -> None:
    x = np.random.default_rng(0).standard_normal((3, 4, 5)).astype(np.float32)
    for axis in range(3):
        for group in (None, 2):
            one = qn.quantize_tensor(x, make_config("int4", "asymmetric", axis, group))
            other = qn.quantize_tensor(x, make_config("int4", "asymmetric", axis - 3, group))
            ref.assert_same_bits(one.data, other.data)
            ref.assert_same_bits(one.scale, other.scale)
    for axis in (3, -4):
        for group in (None, 2):
            with pytest.raises(ValueError, match="axis"):
                qn.quantize_tensor(x, make_config("int8", "symmetric", axis, group))
    with pytest.raises(ValueError, match="axis"):
        qn.quantize_tensor(np.float32(1.0), qn.QuantConfig.int8_per_channel())


# ----------------------------------------------------------------------------------------------------------------------
# Packing


@pytest.mark.parametrize("dtype", ["int4", "uint4"])
def test_packed_bytes(dtype: str) -> None:
    """compressed-tensors' `pack-quantized`: code + 8, low nibble first, rows of whole words."""
    offset = 8 if dtype == "int4" else 0
    low, high = ref.RANGES[dtype]
    codes = np.array([[low, -1 + 8 - offset, 0, 1, 2, 3, 4, high, 5, low], [high] * 10]).astype(ref.STORAGE[dtype])
    x = (codes.astype(np.float32) - ref.middle(dtype)) * 0.5
    config = qn.QuantConfig(dtype).asymmetric()  # -8 too
    q = qn.quantize_tensor(x, config, qn.QParams(np.float32(0.5), ref.middle(dtype), dtype))
    assert np.array_equal(q.codes, codes)
    assert q.data.shape == (2, 2)
    nibbles = np.full((2, 16), ref.middle(dtype) + offset)
    nibbles[:, :10] = codes.astype(int) + offset
    raw = bytes(int(a) | int(b) << 4 for a, b in nibbles.reshape(-1, 2))
    assert q.data.tobytes() == raw
    ref.assert_same_bits(q.data, ref.pack4(codes, dtype))
    assert sys.byteorder == "big" or q.data[0, 0] == np.frombuffer(raw[:4], "<i4")[0]


@pytest.mark.parametrize("dtype", ["int4", "uint4"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("axis", "shape"),
    [(axis, shape) for axis in (None, 0) for shape in ((3, 1), (5, 7), (5, 8), (2, 9), (2, 3, 5), (4, 64), (3, 129))]
    + [(None, (3,)), (None, (8,))],
)
def test_rows_are_padded_with_the_zero_point(dtype: str, mode: str, axis: int | None, shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(4).uniform(-1, 3, shape).astype(np.float32)
    q = qn.quantize_tensor(x, make_config(dtype, mode, axis, None))
    zero = np.broadcast_to(q.zero_point.astype(int), shape[:1] if axis == 0 else ())
    padding = np.broadcast_to(zero.reshape(zero.shape + (1,) * (len(shape) - 1 - zero.ndim)), shape[:-1])
    ref.assert_same_bits(q.data, ref.pack4(q.codes, dtype, padding))


@pytest.mark.parametrize("k", [1, 7, 8, 13, 24])
def test_the_lowest_int4_code_is_found_wherever_it_is(k: int) -> None:
    """In a symmetric tensor, which has none: at any place of a row, and not in what pads it."""
    config = qn.QuantConfig.int4_per_channel()
    codes = np.random.default_rng(k).integers(-7, 8, (3, k)).astype(np.int8)
    for at in range(k):
        changed = codes.copy()
        changed[1, at] = -8
        words = ref.pack4(changed, "int4", -8)
        with pytest.raises(ValueError, match="code -8 is below quant_min -7"):
            qn.QuantizedTensor(words, np.ones(3, np.float32), np.array(0, np.int8), (3, k), "float32", config)
    words = ref.pack4(codes, "int4", -8)  # other programs' padding
    q = qn.QuantizedTensor(words, np.ones(3, np.float32), np.array(0, np.int8), (3, k), "float32", config)
    ref.assert_same_bits(q.codes, codes)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_scales_of_every_dtype_are_positive_and_finite(dtype: str) -> None:
    """The bits at both ends of what is allowed, and next to them."""
    config = qn.QuantConfig.int4_per_channel().with_scale_dtype(dtype)
    infinity = {"float32": 0x7F800000, "float16": 0x7C00, "bfloat16": 0x7F80}[dtype]
    bits = np.uint32 if dtype == "float32" else np.uint16
    sign = 1 << (8 * np.dtype(bits).itemsize - 1)
    data = ref.pack4(np.zeros((2, 8), np.int8), "int4")

    def make(pattern: int) -> None:
        stored = np.array([pattern, infinity // 2], bits)
        scale = stored if dtype == "bfloat16" else stored.view(dtype)
        qn.QuantizedTensor(data, scale, np.array(0, np.int8), (2, 8), "float32", config)

    for good in (1, infinity - 1):
        make(good)
    for bad in (0, infinity, infinity + 1, sign - 1, sign, sign + 1, sign + infinity, 2 * sign - 1):
        with pytest.raises(ValueError, match="finite and > 0"):
            make(bad)


def test_int4_takes_half_a_byte() -> None:
    x = np.random.default_rng(0).standard_normal((128, 256)).astype(np.float32)
    q = qn.quantize_tensor(x, qn.QuantConfig.int4_per_group(32))
    assert q.data.nbytes == 128 * 256 // 2
    assert q.scale.shape == (128, 8)
    assert q.nbytes == 128 * 256 // 2 + 128 * 8 * 4
    assert q.bits_per_weight == 5.0
    assert q.compression_ratio == pytest.approx(32 / q.bits_per_weight)


# ----------------------------------------------------------------------------------------------------------------------
# Sizes and the object


@pytest.mark.parametrize("kind", FLOATS)
def test_sizes(kind: Any) -> None:
    x = np.random.default_rng(0).standard_normal((16, 50)).astype(kind)
    for config in THREE:
        q = qn.quantize_tensor(x, config)
        assert q.numel == 800
        assert q.bits_per_weight == pytest.approx(8 * q.nbytes / 800)
        assert q.compression_ratio == pytest.approx(x.nbytes / q.nbytes)
        assert q.dtype == x.dtype.name
        assert q.dequantize().dtype == x.dtype


@pytest.mark.parametrize("power", [-1060, -600, -550, 550, 1000])
def test_sqnr_where_squares_leave_float64(power: int) -> None:
    """Lost data is not to be called kept: the square of 1e-170 is 0, and 0 / 0 would be no noise."""
    x = np.random.default_rng(0).standard_normal(500)
    y = np.rint(x * 64) / 64
    far = [np.ldexp(v, power) for v in (x, y)]
    assert qn.sqnr(*far) == pytest.approx(qn.sqnr(x, y), rel=0 if power > -1000 else 1e-3)
    assert qn.sqnr(far[0], np.zeros_like(x)) == 0.0
    assert qn.sqnr(far[0], far[0]) == qn.sqnr(np.zeros(3), np.zeros(3)) == math.inf
    assert qn.sqnr(np.zeros_like(x), far[1]) == -math.inf
    if power < 0:
        for shape in ((500,), (20, 25)):
            q = qn.quantize_tensor(far[0].reshape(shape), qn.QuantConfig.int8())
            assert not q.dequantize().any()
            assert q.sqnr(far[0].reshape(shape)) == 0.0
    assert math.isnan(qn.sqnr([np.nan, np.ldexp(1.0, power)], [0.0, 0.0]))


def test_sqnr() -> None:
    rng = np.random.default_rng(6)
    x = rng.standard_normal(5000).astype(np.float32)
    for config in (qn.QuantConfig.int8(), qn.QuantConfig.int4(), qn.QuantConfig.fp8()):
        q = qn.quantize_tensor(x, config)
        assert q.sqnr(x) == pytest.approx(ref.sqnr(x, q.dequantize()), rel=1e-12)
        assert qn.sqnr(x, q.dequantize()) == pytest.approx(q.sqnr(x), rel=1e-12)
    assert qn.sqnr(x, x) == math.inf
    assert qn.sqnr(np.zeros(3, np.float32), np.zeros(3, np.float32)) == math.inf
    assert qn.sqnr(x, np.zeros_like(x)) == pytest.approx(0.0, abs=1e-9)
    assert qn.sqnr(np.zeros(3, np.float32), np.ones(3, np.float32)) == -math.inf
    assert qn.sqnr(x * np.float32(1e30), x * np.float32(0.999e30)) == pytest.approx(60.0, abs=0.01)
    wide = rng.standard_normal(5000)
    assert qn.sqnr(wide, wide) == math.inf
    assert qn.sqnr(wide * 1e-100, wide * 0.999e-100) == pytest.approx(60.0, abs=0.01)
    assert qn.sqnr(wide, wide * (1 + 1e-12)) == pytest.approx(240.0, abs=0.1)
    with pytest.raises(ValueError, match="shape"):
        qn.sqnr(x, x[:-1])


def test_gaussian_known_answers() -> None:
    """Min-max is worse than the best threshold (40.5 dB), but by a known amount: 6.02 dB a bit, less the crest."""
    x = np.random.default_rng(1).standard_normal(1_000_000).astype(np.float32)
    for config, levels in ((qn.QuantConfig.int8(), 127), (qn.QuantConfig.int4(), 7)):
        step = float(np.abs(x).max()) / levels
        uniform_noise = 10 * math.log10(float(np.mean(x.astype(np.float64) ** 2)) / (step**2 / 12))
        assert qn.quantize_tensor(x, config).sqnr(x) == pytest.approx(uniform_noise, abs=0.1)


def test_frozen_and_portable() -> None:
    x = np.random.default_rng(0).standard_normal((4, 10)).astype(np.float32)
    q = qn.quantize_tensor(x, qn.QuantConfig.int4_per_group(4).asymmetric())
    with pytest.raises((dataclasses.FrozenInstanceError, AttributeError)):
        q.shape = (10, 4)
    for array in (q.data, q.scale, q.zero_point):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
    for again in (pickle.loads(pickle.dumps(q)), copy.deepcopy(q)):
        ref.assert_same_bits(again.data, q.data)
        ref.assert_same_bits(again.dequantize(), q.dequantize())
        assert again.config == q.config
        assert not again.data.flags.writeable
    assert "int4" in repr(q)
    assert len(repr(q)) < 300


def test_the_constructor_checks_its_parts() -> None:
    x = np.random.default_rng(0).standard_normal((4, 10)).astype(np.float32)
    for config in THREE:
        q = qn.quantize_tensor(x, config)
        good = {"data": q.data, "scale_data": q.scale_data, "zero_point": q.zero_point, "shape": q.shape,
                "dtype": q.dtype, "config": q.config}  # fmt: skip
        again = qn.QuantizedTensor(**good)
        ref.assert_same_bits(again.dequantize(), q.dequantize())
        bad = [{"shape": (4, 90)}, {"shape": (40,)}, {"shape": (-4, -10)}, {"data": q.data[:-1]}, {"dtype": "int8"},
               {"data": q.data.astype(np.float32)}, {"data": q.data.astype(np.int64)}, {"dtype": "float99"},
               {"scale_data": np.zeros_like(q.scale)}, {"scale_data": np.full_like(q.scale, np.nan)},
               {"scale_data": -q.scale}, {"scale_data": np.ones((2, 2, 2), np.float32)},
               {"zero_point": np.int32(1000)}, {"zero_point": np.zeros(7, np.int8)}, {"config": "int8"}]  # fmt: skip
        for wrong in bad:
            with pytest.raises((ValueError, TypeError)):
                print(config, wrong)  # which, if it is not refused
                qn.QuantizedTensor(**{**good, **wrong})


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_the_constructor_refuses_codes_beyond_the_config(dtype: str) -> None:
    """Kernels rely on symmetric codes having a negative counterpart."""
    low = ref.RANGES[dtype][0]
    codes = np.zeros((3, 20), np.int8)
    for at in (0, 7, 19, 59):
        bad = codes.copy()
        bad.flat[at] = low
        data = ref.pack4(bad, dtype) if dtype == "int4" else bad
        parts = {"scale_data": np.array(1, np.float32), "zero_point": np.zeros((), np.int8), "shape": (3, 20)}
        with pytest.raises(ValueError, match=str(low)):
            qn.QuantizedTensor(data, dtype="float32", config=qn.QuantConfig(dtype), **parts)
        kept = qn.QuantizedTensor(data, dtype="float32", config=qn.QuantConfig(dtype).asymmetric(), **parts)
        ref.assert_same_bits(kept.codes, bad)


@pytest.mark.parametrize(("dtype", "mode"), KINDS)
def test_qparams_give_the_same_codes_again(dtype: str, mode: str) -> None:
    x = np.random.default_rng(8).standard_normal((6, 20)).astype(np.float32)
    for axis, group in GRANULARITIES.values():
        config = make_config(dtype, mode, axis, group)
        q = qn.quantize_tensor(x, config)
        qp = q.qparams
        assert isinstance(qp, qn.QParams)
        assert (qp.dtype, qp.quant_min, qp.quant_max) == (dtype, config.quant_min, config.quant_max)
        again = qn.quantize_tensor(x, config, qparams=qp)
        ref.assert_same_bits(again.data, q.data)
        by_hand = qn.quantize(x, qp.scale, qp.zero_point, qp.dtype, qp.axis, group_size=qp.group_size,
                              quant_min=qp.quant_min, quant_max=qp.quant_max)  # fmt: skip
        ref.assert_same_bits(by_hand, q.codes)


def test_ones_own_qparams() -> None:
    x = np.float32([[-3.0, 0.2, 0.26, 100.0]])
    q = qn.quantize_tensor(x, qn.QuantConfig.int8(), qn.QParams(np.float32(0.1), quant_min=-127))
    assert q.codes.tolist() == [[-30, 2, 3, 127]]
    assert q.scale == np.float32(0.1)
    config = qn.QuantConfig.int8().asymmetric()
    q = qn.quantize_tensor(x, config, qn.QParams(np.float32(0.1), 5))
    assert q.codes.tolist() == [[-25, 7, 8, 127]]
    assert int(q.zero_point) == 5
    for bad in (
        qn.QParams(np.float32(0.1), dtype="uint8"),  # another dtype
        qn.QParams(np.float32([0.1]), axis=0),  # another granularity
    ):
        with pytest.raises(ValueError, match=r"qparams|QParams"):
            qn.quantize_tensor(x, qn.QuantConfig.int8(), bad)
    with pytest.raises(TypeError, match=r"not float; wrap a scale: QParams\(scale\)"):
        qn.quantize_tensor(x, qn.QuantConfig.int8(), 0.1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"such as QuantConfig.int8_per_channel\(\), not method"):
        qn.quantize_tensor(x, qn.QuantConfig.int8)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"min_max"):
        qn.quantize_tensor(x, qn.QuantConfig.int8(), method="median")
    square = np.ones((4, 4), np.float32)
    per_row = qn.QParams(np.float32([1, 2, 3, 4]), quant_min=-127, axis=0)
    assert qn.quantize_tensor(square, qn.QuantConfig.int8_per_channel(-2), per_row).scale.tolist() == [1, 2, 3, 4]
    for config in (qn.QuantConfig.int8_per_channel(1), qn.QuantConfig.int8_per_channel(-1)):
        with pytest.raises(ValueError, match="axis"):
            qn.quantize_tensor(square, config, per_row)
    per_group = qn.QParams(np.ones((4, 2), np.float32), quant_min=-127, axis=1, group_size=2)
    with pytest.raises(ValueError, match="group_size"):
        qn.quantize_tensor(square, qn.QuantConfig.int8().per_group(3), per_group)


@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16"])
def test_ones_own_scale_is_kept_or_refused(scale_dtype: str) -> None:
    """Never silently rounded to the stored precision."""
    config = qn.QuantConfig("int8", scale_dtype=scale_dtype)
    x = np.float32([1.0, 0.3])
    exact = qn.quantize_tensor(x, config, qn.QParams(np.float32(0.0078125), quant_min=-127))
    assert exact.scale == 0.0078125
    with pytest.raises(ValueError, match=scale_dtype):
        qn.quantize_tensor(x, config, qn.QParams(np.float32(1 / 127), quant_min=-127))


def test_zero_points_of_ones_own_in_symmetric_mode() -> None:
    """Symmetric means one fixed zero point, so another one is refused."""
    with pytest.raises(ValueError, match=r"zero.point"):
        qn.quantize_tensor(np.ones(3, np.float32), qn.QuantConfig.int8(), qn.QParams(np.float32(0.1), 5))


# ----------------------------------------------------------------------------------------------------------------------
# Degenerate data


@pytest.mark.parametrize(("dtype", "mode"), KINDS)
def test_constants_decode_within_one_ulp(dtype: str, mode: str) -> None:
    rng = np.random.default_rng(9)
    # 57344 * 2^-126 is about 2^-110: below it float8_e5m2 data cannot fill its range.
    lowest = -110 if dtype == "float8_e5m2" else -117
    magnitudes = np.concatenate([
        rng.uniform(1, 2, 3000) * 2.0 ** rng.integers(lowest, 127, 3000), [2.0**lowest, 2.0**127, 3.4028234e38, 1.0]
    ]).astype(np.float32)  # fmt: skip
    constants = np.concatenate([magnitudes, -magnitudes])
    x = np.repeat(constants[:, None], 3, axis=1)
    decoded = qn.quantize_tensor(x, make_config(dtype, mode, 0, None)).dequantize()
    one_ulp = np.ldexp(1.0, np.frexp(x.astype(np.float64))[1] - 24)
    ulps = np.abs(decoded.astype(np.float64) - x) / one_ulp
    assert ulps.max() <= 1.0, x[ulps.max(axis=1).argmax()]
    # An array of one element is a constant too.
    for c in constants[::601]:
        one = qn.quantize_tensor(np.array(c), make_config(dtype, mode, None, None)).dequantize()
        assert one.shape == ()
        assert abs(float(one) - float(c)) <= math.ldexp(1.0, math.frexp(c)[1] - 24)


@pytest.mark.parametrize(("dtype", "mode"), KINDS)
def test_tiny_data_keeps_its_sqnr(dtype: str, mode: str) -> None:
    x = np.random.default_rng(10).standard_normal((50, 64))
    for axis, group in ((None, None), (0, None), (-1, 16)):
        config = make_config(dtype, mode, axis, group)
        at_one = qn.quantize_tensor(x.astype(np.float32), config).sqnr(x.astype(np.float32))
        assert at_one > 10
        for magnitude in (1e-30, 1e-20, 1e-9, 1e20, 1e30):
            scaled = (x * magnitude).astype(np.float32)
            assert qn.quantize_tensor(scaled, config).sqnr(scaled) == pytest.approx(at_one, abs=0.1)


@pytest.mark.parametrize(("dtype", "mode"), KINDS)
def test_all_zero(dtype: str, mode: str) -> None:
    for axis, group in ((None, None), (0, None), (-1, 2)):
        x = np.zeros((3, 5), np.float32)
        x[1, 1] = -0.0
        q = qn.quantize_tensor(x, make_config(dtype, mode, axis, group))
        assert (q.scale == 1).all()
        assert (q.dequantize() == 0).all()
        mixed = x.copy()
        mixed[2] = 7.0
        assert (qn.quantize_tensor(mixed, make_config(dtype, mode, 0, None)).dequantize()[:2] == 0).all()


@pytest.mark.parametrize(("dtype", "mode"), KINDS)
def test_zero_is_exactly_representable(dtype: str, mode: str) -> None:
    rng = np.random.default_rng(13)
    x = rng.uniform(-1, 1, (400, 9)).astype(np.float32) + rng.uniform(-3, 3, (400, 1)).astype(np.float32)
    x[:, 4] = 0.0
    decoded = qn.quantize_tensor(x, make_config(dtype, mode, 0, None)).dequantize()
    assert (decoded[:, 4] == 0).all()


@pytest.mark.parametrize(("dtype", "mode"), KINDS)
def test_subnormal_data(dtype: str, mode: str) -> None:
    x = np.float32([1e-45, -1e-40, 1e-39, 0.0])
    q = check(x, make_config(dtype, mode, None, None))
    assert q.scale == ref.SMALLEST_NORMAL


@pytest.mark.parametrize(("dtype", "mode"), KINDS)
def test_huge_data(dtype: str, mode: str) -> None:
    top = np.finfo(np.float32).max
    x = np.float32([-top, top / 3, top, 0])
    for scale_dtype in ("float32", "bfloat16"):
        q = check(x, make_config(dtype, mode, None, None, scale_dtype))
        assert np.isfinite(q.scale)
        if mode == "symmetric":  # nothing finite becomes infinite
            assert np.isfinite(q.dequantize()).all()
        for one_sided in (np.abs(x), -np.abs(x)):
            q = check(one_sided, make_config(dtype, mode, None, None, scale_dtype))
            assert np.isfinite(q.dequantize()).all()
    with pytest.raises(ValueError, match="overflow"):
        qn.quantize_tensor(np.array([-1e305, 1e305]), make_config(dtype, mode, None, None))


@pytest.mark.parametrize(("dtype", "mode"), KINDS)
def test_empty_and_zero_dimensional(dtype: str, mode: str) -> None:
    for shape in ((0,), (0, 5), (5, 0), (2, 0, 3)):
        for axis, group in ((None, None), (0, None), (-1, None), (-1, 4)):
            q = qn.quantize_tensor(np.zeros(shape, np.float32), make_config(dtype, mode, axis, group))
            assert q.shape == q.codes.shape == q.dequantize().shape == shape
            assert q.numel == 0
            assert math.isfinite(q.nbytes)
            assert not math.isnan(q.bits_per_weight) or q.numel == 0
            assert q.compression_ratio >= 0 or math.isnan(q.compression_ratio)
            assert "QuantizedTensor" in repr(q)
    for value in (2.5, -2.5, 0.0):
        q = check(np.array(value, np.float32), make_config(dtype, mode, None, None))
        assert q.shape == ()


@pytest.mark.parametrize("kind", FLOATS)
@pytest.mark.parametrize(("axis", "group"), [(None, None), (0, None), (1, None), (1, 32)])
def test_nan_and_inf_are_counted(kind: Any, axis: int | None, group: int | None) -> None:
    x = np.random.default_rng(0).standard_normal((40, 70)).astype(np.float32)
    clean = x.copy()
    x[3, 5] = x[20, 69] = x[39, 0] = np.nan
    clean[3, 5] = clean[20, 69] = clean[39, 0] = 0
    config = make_config("int8", "asymmetric", axis, group)
    with pytest.raises(ValueError, match=r"\b3\b"):
        qn.quantize_tensor(x.astype(kind), config)
    with pytest.raises(ValueError, match=r"\b3\b"):
        block_min_max(x.astype(kind), config)
    zeroed = qn.quantize_tensor(x.astype(kind), config, nan="zero")
    expected = qn.quantize_tensor(clean.astype(kind), config)
    ref.assert_same_bits(zeroed.scale, expected.scale)
    ref.assert_same_bits(zeroed.codes, expected.codes)
    x[0, 0], x[1, 1] = np.inf, -np.inf
    with pytest.raises(ValueError, match=r"\b(2|5)\b"):
        qn.quantize_tensor(x.astype(kind), config)
    clean[0, 0] = clean[1, 1] = 0  # out of the range, into its ends
    zeroed = qn.quantize_tensor(x.astype(kind), config, nan="zero")
    ref.assert_same_bits(zeroed.scale, qn.quantize_tensor(clean.astype(kind), config).scale)
    assert (zeroed.codes[0, 0], zeroed.codes[1, 1]) == (127, -128)


# ----------------------------------------------------------------------------------------------------------------------
# block_min_max, as_float_array


@given(arrays())
def test_block_min_max(case: tuple[NDArray[Any], Any]) -> None:
    x, config = case
    low, high = block_min_max(x, config)
    expected = ref.block_min_max(native(x), config.axis, config.group_size)
    for got, want in zip((low, high), expected, strict=True):
        assert got.dtype == np.float64
        assert np.shape(got) == want.shape
        assert np.array_equal(got, want)


@pytest.mark.parametrize("kind", FLOATS)
@pytest.mark.parametrize(("axis", "group"), [(None, None), (0, None), (1, None), (2, None), (-1, 32), (0, 3), (1, 7)])
def test_block_min_max_of_many(kind: Any, axis: int | None, group: int | None) -> None:
    x = (np.random.default_rng(2).standard_normal((13, 37, 101)) * 50).astype(kind)
    low, high = block_min_max(x, make_config("int8", "asymmetric", axis, group))
    expected = ref.block_min_max(x, axis, group)
    assert np.array_equal(low, expected[0])
    assert np.array_equal(high, expected[1])
    # The extreme may stand anywhere, last and first included.
    for at in (0, 1, 15, 16, 17, x.size - 1, x.size - 2, x.size // 2):
        y = x.copy()
        y.flat[at] = 30000
        assert np.array_equal(block_min_max(y, make_config("int8", "asymmetric", axis, group))[1],
                              ref.block_min_max(y, axis, group)[1])  # fmt: skip


def test_as_float_array() -> None:
    base = np.random.default_rng(0).standard_normal((6, 8))
    for kind in FLOATS:
        for layout in ("as is", "fortran", "strided", "reversed", "broadcast", "unaligned", "swapped", "read-only"):
            x = np.asarray(lay_out(base.astype(kind), layout))
            y = as_float_array(x)
            assert y.dtype == (np.float64 if kind == np.float64 else np.float32)
            assert y.dtype.isnative
            assert y.flags.c_contiguous
            assert y.flags.aligned
            assert np.array_equal(y, native(x).astype(y.dtype))
    x = base.astype(np.float32)
    assert np.shares_memory(as_float_array(x), x)  # no copy where none is needed
    for bad in (np.arange(3), np.ones(2, complex), np.array([None]), np.array(["a"]), np.ones(2, bool)):
        with pytest.raises(TypeError, match="float"):
            as_float_array(bad)


def test_a_narrower_range_of_ones_own_is_kept() -> None:
    x = np.linspace(-1, 1, 64, dtype=np.float32)
    own = qn.QParams(0.01, 0, "int8", quant_min=-10, quant_max=12)
    codes = qn.quantize_tensor(x, qn.QuantConfig.int8(), own).codes
    assert (codes.min(), codes.max()) == (-10, 12)


def test_checked_codes_cannot_be_changed_from_outside() -> None:
    codes = np.ones((4, 8), np.int8)
    q = qn.QuantizedTensor(
        codes, np.array(0.5, np.float32), np.array(0, np.int8), (4, 8), "float32", qn.QuantConfig.int8()
    )
    codes[:] = -128
    assert (q.codes == 1).all()


@pytest.mark.parametrize("scale_dtype", ["float32", "float16", "bfloat16"])
def test_take_with_any_stored_scale(scale_dtype: str) -> None:
    x = np.random.default_rng(1).standard_normal((50, 64)).astype(np.float32)
    for config in (
        qn.QuantConfig.int4_per_group(16),
        qn.QuantConfig.int8_per_channel(),
        qn.QuantConfig.int8_per_channel(1),
    ):
        q = qn.quantize_tensor(x, config.with_scale_dtype(scale_dtype))
        ref.assert_same_bits(q.take([3, 49, 0]), q.dequantize()[[3, 49, 0]])
