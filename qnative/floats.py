"""Floating-point data: what arrays are taken, and small formats (float8, float16, bfloat16) to codes and back."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qnative import _core
from qnative.storage import plain_array

__all__ = ["as_float_array", "check_array", "decode", "deliver", "encode", "float_dtype", "out_target", "plain_array"]

_FLOAT8 = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
_FLOAT16 = ("float16", "bfloat16")
_NAMES = _FLOAT8 + _FLOAT16
_AS_THEY_ARE = (np.dtype(np.float32), np.dtype(np.float64))  # in native byte order


def _name_of(dtype: object) -> str:
    name = dtype if isinstance(dtype, str) else getattr(dtype, "name", None) or getattr(dtype, "__name__", None)
    if name not in _NAMES:
        raise ValueError(f"{dtype!r} is not a format that can be encoded; choose one of {', '.join(_NAMES)}")
    return str(name)


def as_float_array(x: ArrayLike) -> NDArray[Any]:
    """Return x as a C-contiguous, aligned array of native float32 or float64, copied only where it must be.

    float16, bfloat16 and float8 (ml_dtypes) are widened to float32, exactly. Views, read-only and memory-mapped arrays,
    big-endian data and Python floats (nested lists of them too) are taken.

    Raises
    ------
    TypeError
        For integers, booleans, complex numbers and objects: say what they mean with ``.astype(np.float32)`` first. For
        masked arrays.
    """
    array = plain_array(x)
    if array.dtype in _AS_THEY_ARE and array.flags.c_contiguous and array.flags.aligned:
        return array
    if isinstance(x, int) and not isinstance(x, bool):
        array = np.asarray(float(x))
    if array.dtype.name in _NAMES:
        return decode(array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("=")), array.dtype.name)
    if array.dtype.kind != "f" or array.dtype.itemsize > 8:
        raise TypeError(
            f"expected an array of float16, bfloat16, float32 or float64, not {array.dtype}; "
            "convert it with .astype(np.float32) if its values are meant as real numbers"
        )
    return np.array(array, dtype=array.dtype.newbyteorder("="), order="C")


def float_dtype(name: object) -> np.dtype[Any]:
    """Return the NumPy dtype of a float's name; bfloat16 and float8 come from ml_dtypes, imported when asked for."""
    if isinstance(name, str) and (name == "bfloat16" or name in _FLOAT8):
        try:
            import ml_dtypes
        except ImportError:
            raise ImportError(f"an array of {name} needs the package ml_dtypes: pip install ml_dtypes") from None
        found: np.dtype[Any] = np.dtype(getattr(ml_dtypes, name))
        return found
    dtype: np.dtype[Any] = np.dtype(name)  # type: ignore[call-overload]
    if dtype.kind != "f" and dtype.name not in _NAMES:
        raise ValueError(f"{name!r} is not a floating-point dtype")
    return dtype


def check_array(out: object, name: str) -> NDArray[Any]:
    """Return what a result is to be written to; TypeError where it is no array, or one whose mask would hide it."""
    if not isinstance(out, np.ndarray):
        raise TypeError(f"{name} must be a numpy.ndarray, not {type(out).__name__}")
    if isinstance(out, np.ma.MaskedArray):
        raise TypeError(f"{name} is a masked array, whose mask would hide results; pass {name}.data")
    return out


def out_target(
    out: NDArray[Any] | None, shape: tuple[int, ...], dtype: Any, *sources: NDArray[Any]
) -> NDArray[Any] | None:
    """Check a caller's `out`; return it if the native loops can write to it while they read `sources`, else None."""
    if out is None:
        return None
    check_array(out, "out")
    if out.shape != shape or out.dtype != dtype:
        raise ValueError(f"out is {out.dtype} of shape {out.shape}; it must be {np.dtype(dtype)} of shape {shape}")
    if not out.flags.writeable:
        raise ValueError("out is read-only; pass an array that can be written to")
    shared = any(np.may_share_memory(out, source) for source in sources)
    direct = out.flags.c_contiguous and out.flags.aligned and not shared
    return np.asarray(out) if direct else None  # a subclass (numpy.matrix, ...) may have a reshape of its own


def deliver(result: NDArray[Any], out: NDArray[Any] | None) -> NDArray[Any]:
    """Put a result where the caller wants it, unless it was computed there."""
    if out is None:
        return result
    if not np.may_share_memory(result, out):
        out[...] = result
    return out


def encode(
    x: ArrayLike, dtype: object, saturate: bool | None = None, *, out: NDArray[Any] | None = None
) -> NDArray[Any]:
    """Encode values as the codes (bit patterns) of a small floating-point format.

    Rounds once, to nearest, ties to even, from the input's own precision (float64 too). NaN stays NaN; the sign of
    zero is kept except in the ``fnuz`` formats, which have one zero.

    Parameters
    ----------
    x : array_like of float
        Any shape; float16, bfloat16, float32 or float64.
    dtype : str
        ``"float8_e4m3fn"``, ``"float8_e5m2"``, ``"float8_e4m3fnuz"``, ``"float8_e5m2fnuz"``, ``"float16"`` or
        ``"bfloat16"``.
    saturate : bool, optional
        True: everything beyond the largest finite value, infinities too, becomes that value (448, 57344, 240, 57344,
        65504, 3.39e38). False: it becomes Inf, or NaN in the formats that have no Inf. Default: True for float8,
        False for float16 and bfloat16, as each is customarily used.
    out : numpy.ndarray, optional
        Where to write the codes; of the result's shape and dtype.

    Returns
    -------
    numpy.ndarray
        uint8 for float8, uint16 for float16 and bfloat16, of x's shape.

    References
    ----------
    OCP 8-bit Floating Point Specification (OFP8), 2023; the ``fnuz`` formats as in ONNX and ml_dtypes.
    """
    name = _name_of(dtype)
    values = as_float_array(x)
    eight = name in _FLOAT8
    kind = np.uint8 if eight else np.uint16
    into = out_target(out, values.shape, kind, values)
    codes = np.empty(values.shape, kind) if into is None else into
    loop = _core.encode8 if eight else _core.encode
    loop(values.reshape(-1), name, eight if saturate is None else bool(saturate), codes.reshape(-1))
    return deliver(codes, out)


def decode(codes: ArrayLike, dtype: object, *, out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
    """Decode the codes of a small floating-point format to float32; every value is exact.

    Parameters
    ----------
    codes : array_like of uint8 or uint16
        As `encode` returns them, or an ml_dtypes / float16 array of that format.
    dtype : str
        As for `encode`.
    out : numpy.ndarray, optional
        Where to write the values; float32, of the codes' shape.

    Returns
    -------
    numpy.ndarray
        float32, of the codes' shape.
    """
    name = _name_of(dtype)
    wanted: np.dtype[Any] = np.dtype(np.uint8 if name in _FLOAT8 else np.uint16)
    largest = 0xFF if name in _FLOAT8 else 0xFFFF
    array = plain_array(codes)
    shape = array.shape
    if not (array.dtype == wanted and array.flags.c_contiguous and array.flags.aligned):  # as most are
        if array.dtype.name == name:
            array = np.ascontiguousarray(array).reshape(array.shape).view(wanted)
        if array.dtype.kind not in "iu":
            raise TypeError(f"codes of {name} are {wanted.name}, not {array.dtype}; encode() gives them")
        if array.dtype != wanted:
            if array.size and (array.min() < 0 or array.max() > largest):
                raise ValueError(f"codes of {name} lie in 0..{largest}, not {array.min()}..{array.max()}")
            array = array.astype(wanted)
        array = np.require(array, wanted, ["C_CONTIGUOUS", "ALIGNED"])
    into = out_target(out, shape, np.float32, array)
    values = np.empty(shape, np.float32) if into is None else into
    (_core.decode8 if name in _FLOAT8 else _core.decode)(array.reshape(-1), name, values.reshape(-1))
    return deliver(values, out)
