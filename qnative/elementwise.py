"""Elementwise quantize, dequantize and fake-quantize of plain arrays, and how much of an array survives."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qnative import _core
from qnative.config import CodeDType, check_code_range, check_int, check_scale, check_zero_point, code_dtype
from qnative.floats import as_float_array, deliver, encode, float_dtype, out_target, plain_array
from qnative.granularity import Granules, nonfinite_error

__all__ = ["dequantize", "fake_quantize", "quantize", "sqnr"]

#: Of the usual codes; NumPy takes microseconds to make up a dtype's name.
_NAMES: dict[np.dtype[Any], str] = {np.dtype(name): name for name in ("int8", "uint8")}


def _parameters(
    shape: tuple[int, ...],
    scale: ArrayLike,
    zero_point: ArrayLike | None,
    info: CodeDType,
    axis: int | None,
    group_size: int | None,
) -> tuple[Granules, NDArray[np.float32], NDArray[np.int32]]:
    """Check a scale and zero point against an array's shape; return the walk and both as flat arrays."""
    axis, group_size = check_int("axis", axis), check_int("group_size", group_size)
    scales = check_scale(scale, copy=None)
    zeros = check_zero_point(zero_point, info, scales.shape, np.dtype(np.int32), copy=None)
    if scales.ndim == 0 and axis is None and group_size is None:
        granules = Granules.of(shape)
    else:
        if axis is None and group_size is None:
            raise ValueError(f"scale has shape {scales.shape}; say which axis it runs along with axis=")
        granules = Granules.of(shape, axis, group_size)
        if scales.shape not in ((), granules.shape):
            how = f"axis={axis}" if group_size is None else f"axis={axis}, group_size={group_size}"
            raise ValueError(f"scale has shape {scales.shape}; data of shape {shape} with {how} needs {granules.shape}")
    return granules, granules.spread(scales, np.float32), granules.spread(zeros, np.int32)


def code_range(info: CodeDType, quant_min: float | None, quant_max: float | None) -> tuple[int, int]:
    if quant_min is None and quant_max is None:
        low, high = info.min, info.max
    else:
        low, high = check_code_range(info, quant_min, quant_max)
    return (0, 0) if info.is_float else (int(low), int(high))  # float8 is not clamped by code


def check_nan(nan: str) -> None:
    if nan not in ("raise", "zero"):
        raise ValueError(f'nan={nan!r} must be "raise" or "zero"')


def refuse_nonfinite(values: NDArray[Any]) -> None:
    """Raise ValueError if some are NaN or infinite, saying how many."""
    bad = _core.count_nonfinite(values.reshape(-1))
    if bad:
        raise nonfinite_error(bad, values.size)


def quantize_walk(
    values: NDArray[Any],
    info: CodeDType,
    granules: Granules,
    scales: Any,
    zeros: Any,
    low: int,
    high: int,
    nan: str,
    into: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """Quantize checked values, into an array that `out_target` gave or a new one."""
    codes = np.empty(values.shape, np.uint8) if into is None else into.view(np.uint8)
    if info.is_float:
        nonfinite = _core.quantize_float8(values.reshape(-1), scales, granules.walk, info.name, codes.reshape(-1))
    else:
        nonfinite = _core.quantize(values.reshape(-1), scales, zeros, granules.walk, low, high, codes.reshape(-1))
    if nonfinite and nan == "raise":
        refuse_nonfinite(values)
    return codes.view(info.storage)


def dequantize_walk(
    codes: NDArray[Any],
    info: CodeDType,
    granules: Granules,
    scales: Any,
    zeros: Any,
    into: NDArray[Any] | None = None,
) -> NDArray[np.float32]:
    """Dequantize checked codes to float32, into an array that `out_target` gave or a new one."""
    out = np.empty(codes.shape, np.float32) if into is None else into
    flat = codes.reshape(-1).view(np.uint8)
    if info.is_float:
        _core.dequantize_float8(flat, scales, granules.walk, info.name, out.reshape(-1))
    else:
        if _core.dequantize(
            flat, info.is_signed, scales, zeros, granules.walk, int(info.min), int(info.max), out.reshape(-1)
        ):
            _refuse_codes(codes, info)
    return out


def cast_floats(values: NDArray[np.float32], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Round float32 once to another float dtype; overflow becomes Inf, as a cast does."""
    if values.dtype == dtype:
        return values
    if dtype.name == "bfloat16":
        return encode(values, "bfloat16").view(dtype)
    with np.errstate(over="ignore"):
        return values.astype(dtype)


def quantize(
    x: ArrayLike,
    scale: ArrayLike,
    zero_point: ArrayLike | None = None,
    dtype: str = "int8",
    axis: int | None = None,
    *,
    group_size: int | None = None,
    quant_min: float | None = None,
    quant_max: float | None = None,
    nan: str = "raise",
    out: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """Turn values into codes: ``clamp(rint(x / scale) + zero_point, quant_min, quant_max)``.

    True division in float32 (float64 input: in float64, rounded once), ties to even, the zero point added after
    rounding, as ONNX QuantizeLinear has it. For float8: ``encode(x / scale)``, saturating.

    Parameters
    ----------
    x : array_like of float
        Any shape; float16, bfloat16, float32 or float64.
    scale : float or array_like
        Finite and > 0. A float per tensor; shape ``(x.shape[axis],)`` with `axis`; x's shape with the axis divided by
        the group size (rounded up) with `group_size`.
    zero_point : int or array_like, optional
        The code of 0.0, of `scale`'s shape; 0 by default.
    dtype : str
        The code dtype.
    axis : int, optional
        The axis of the channels, or along which groups run (then -1 by default).
    group_size : int, optional
        Elements that share a scale along `axis`; the last group may be shorter.
    quant_min, quant_max : int, optional
        The codes to clamp to; the dtype's full range by default.
    nan : {"raise", "zero"}
        Raise at NaN and infinities, or map NaN to the zero point, clamped as every code, and infinities to the ends of
        the range.
    out : numpy.ndarray, optional
        Where to write the codes; of the result's shape and dtype. After an error for NaN it may have been written to.

    Returns
    -------
    numpy.ndarray
        One element a code: int8 for int8 and int4, uint8 for the others.

    Raises
    ------
    ValueError
        For NaN or infinities (unless ``nan="zero"``), a bad scale, zero point, range or shape.
    TypeError
        If x is not of floats.
    """
    info = code_dtype(dtype)
    values = as_float_array(x)
    granules, scales, zeros = _parameters(values.shape, scale, zero_point, info, axis, group_size)
    low, high = code_range(info, quant_min, quant_max)
    check_nan(nan)
    into = out_target(out, values.shape, info.storage, values, scales, zeros)
    return deliver(quantize_walk(values, info, granules, scales, zeros, low, high, nan, into), out)


def dequantize(
    codes: ArrayLike,
    scale: ArrayLike,
    zero_point: ArrayLike | None = None,
    dtype: str | None = None,
    axis: int | None = None,
    *,
    group_size: int | None = None,
    out_dtype: Any = "float32",
    out: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """Turn codes into values: ``(code - zero_point) * scale`` in float32, then one rounding to `out_dtype`.

    Parameters
    ----------
    codes : array_like
        One element a code, as `quantize` returns them; ml_dtypes arrays (int4, float8 ...) too.
    scale, zero_point, axis, group_size
        As for `quantize`.
    dtype : str, optional
        The code dtype; that of the array by default. Needed for int4 codes in int8 arrays and float8 codes in uint8.
    out_dtype : str or dtype
        ``"float32"``, ``"float64"``, ``"float16"`` or ``"bfloat16"`` (which needs ml_dtypes).
    out : numpy.ndarray, optional
        Where to write the values; of the codes' shape and of `out_dtype`. After an error for a code that `dtype` has
        not it may have been written to.

    Returns
    -------
    numpy.ndarray
        Of `out_dtype` and the codes' shape.
    """
    array = plain_array(codes)
    info = code_dtype(_NAMES.get(array.dtype) or array.dtype.name if dtype is None else dtype)
    wanted = float_dtype(out_dtype)
    if wanted.itemsize < 2:
        raise ValueError(f"out_dtype={wanted.name} has no room for values; use float32, float64, float16 or bfloat16")
    array = _as_codes(array, info)
    granules, scales, zeros = _parameters(array.shape, scale, zero_point, info, axis, group_size)
    into = out_target(out, array.shape, wanted, array, scales, zeros)
    into = into if wanted == np.float32 else None
    return deliver(cast_floats(dequantize_walk(array, info, granules, scales, zeros, into), wanted), out)


def _as_codes(array: NDArray[Any], info: CodeDType) -> NDArray[Any]:
    """Return codes as a C-contiguous array of the dtype's storage; refuse what is not a code."""
    if array.dtype == info.storage and array.flags.c_contiguous:  # by far the most; a dtype's name takes NumPy a while
        return array
    if info.is_float and array.dtype.name == info.name:
        array = array.view(np.uint8) if array.flags.c_contiguous else np.ascontiguousarray(array).view(np.uint8)
    elif array.dtype.name == info.name and array.dtype != info.storage:
        array = array.astype(info.storage)  # ml_dtypes' int4 and uint4: a byte each
    if array.dtype.kind not in "iu":
        raise TypeError(f"codes of {info.name} are {info.storage.name}, not {array.dtype}; quantize() gives them")
    if array.size and array.dtype != info.storage:  # else they are looked at as they are decoded
        low, high = (0, 255) if info.is_float else (info.min, info.max)
        if array.min() < low or array.max() > high:
            _refuse_codes(array, info)
    return np.array(array, dtype=info.storage, order="C", copy=None)


def _refuse_codes(codes: NDArray[Any], info: CodeDType) -> NoReturn:
    low, high = (0, 255) if info.is_float else (info.min, info.max)
    raise ValueError(f"codes {codes.min()}..{codes.max()} are outside {info.name}'s {low}..{high}")


def fake_quantize(
    x: ArrayLike,
    scale: ArrayLike,
    zero_point: ArrayLike | None = None,
    dtype: str = "int8",
    axis: int | None = None,
    *,
    group_size: int | None = None,
    quant_min: float | None = None,
    quant_max: float | None = None,
    nan: str = "raise",
    out: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """Quantize and dequantize in one step: what of x survives its codes.

    Equals ``dequantize(quantize(x, ...), ...)`` bit for bit, in x's own dtype. Parameters are those of `quantize`.

    Returns
    -------
    numpy.ndarray
        Of x's shape and dtype (float32 for what is not NumPy's: Python numbers, lists).
    """
    info = code_dtype(dtype)
    values = as_float_array(x)
    granules, scales, zeros = _parameters(values.shape, scale, zero_point, info, axis, group_size)
    low, high = code_range(info, quant_min, quant_max)
    wanted = x.dtype.newbyteorder("=") if isinstance(x, (np.ndarray, np.generic)) else np.dtype(np.float32)
    into = out_target(out, values.shape, wanted, values, scales, zeros)
    into = into if wanted == np.float32 else None
    check_nan(nan)
    result = np.empty(values.shape, np.float32) if into is None else into
    float8 = info.name if info.is_float else None
    flat = values.reshape(-1)
    nonfinite = _core.fake_quantize(flat, scales, zeros, granules.walk, low, high, float8, result.reshape(-1))
    if nonfinite and nan == "raise":
        refuse_nonfinite(values)
    return deliver(cast_floats(result, wanted), out)


def sqnr(x: ArrayLike, y: ArrayLike) -> float:
    """Signal-to-quantization-noise ratio in decibels: ``10 log10(sum(x^2) / sum((x - y)^2))``, sums in float64.

    Parameters
    ----------
    x : array_like of float
        The original.
    y : array_like of float
        What became of it; of x's shape.

    Returns
    -------
    float
        Infinite where y equals x.
    """
    a, b = as_float_array(x), as_float_array(y)
    if a.shape != b.shape:
        raise ValueError(f"x has shape {a.shape} and y {b.shape}; they must be the same")
    signal, noise, *_ = error_sums(lambda: [(a, b)])
    return decibel(signal, noise)


#: Within these, sums of squares have lost nothing, nor have the products of two.
_LEAST_SUM, _MOST_SUM = 2.0**-500, 2.0**500


def error_sums(
    pairs: Callable[[], Iterable[tuple[NDArray[Any], NDArray[Any]]]],
) -> tuple[float, float, float, float, float]:
    """Return the sums of x^2, (x - y)^2, y^2 and x*y, and the largest |x - y|, in float64, over pairs of arrays.

    `pairs` is called again where squares leave float64: the sums are then those of the values times a power of two,
    which changes no ratio of them.
    """
    found = _error_sums(pairs(), 0)
    if found[0] >= _LEAST_SUM and max(found[:3]) <= _MOST_SUM:
        return found
    largest = max((float(np.abs(v).max(initial=0.0)) for pair in pairs() for v in pair), default=0.0)
    if largest == 0.0 or not math.isfinite(largest):
        return found
    return (*_error_sums(pairs(), -math.frexp(largest)[1])[:4], found[4])


def _error_sums(
    pairs: Iterable[tuple[NDArray[Any], NDArray[Any]]], power: int
) -> tuple[float, float, float, float, float]:
    xx = dd = yy = xy = worst = 0.0
    for x, y in pairs:
        common = np.result_type(x, y) if power == 0 else np.float64
        a, b = (v.reshape(-1).astype(common, copy=False) for v in (x, y))
        if power:
            a, b = np.ldexp(a, power), np.ldexp(b, power)
        sums = _core.squared_sums(a, b)
        xx, dd, yy, xy = xx + sums[0], dd + sums[1], yy + sums[2], xy + sums[3]
        worst = max(worst, sums[4])
    return xx, dd, yy, xy, worst


def decibel(signal: float, noise: float) -> float:
    if noise == 0.0:
        return math.inf
    ratio = signal / noise
    return 10.0 * math.log10(ratio) if ratio else -math.inf
