"""Tensors as files hold them: dtypes by safetensors' codes, bytes, and tensors that are loaded when asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "STORAGE",
    "FormatError",
    "NamedTensor",
    "StorageDType",
    "TensorInfo",
    "dtype_code",
    "plain_array",
    "possible_shape",
    "printable",
    "to_storage",
]


def printable(text: str) -> str:
    """Return text that may hold a file's names, which are anybody's, without control characters for the terminal."""
    return text if text.isprintable() else text.encode("unicode_escape").decode("ascii")


class FormatError(ValueError):
    """A file is not what it claims to be; the message names the file, the tensor and the rule it breaks.

    What is not printable in it is written as an escape: tracebacks and logs show it as it is.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(printable(message))


@dataclass(frozen=True)
class StorageDType:
    """How safetensors stores one dtype: the NumPy dtype of the bytes, and the name of the values' dtype."""

    code: str
    numpy: np.dtype[Any]
    name: str


#: Every dtype that can be read and written, by safetensors' code. Where NumPy has no such dtype, the bits.
STORAGE: Mapping[str, StorageDType] = {
    code: StorageDType(code, np.dtype(numpy), name)
    for code, numpy, name in (
        ("BOOL", "?", "bool"),
        ("U8", "u1", "uint8"),
        ("I8", "i1", "int8"),
        ("F8_E4M3", "u1", "float8_e4m3fn"),
        ("F8_E5M2", "u1", "float8_e5m2"),
        ("F8_E4M3FNUZ", "u1", "float8_e4m3fnuz"),
        ("F8_E5M2FNUZ", "u1", "float8_e5m2fnuz"),
        ("U16", "<u2", "uint16"),
        ("I16", "<i2", "int16"),
        ("F16", "<f2", "float16"),
        ("BF16", "<u2", "bfloat16"),
        ("U32", "<u4", "uint32"),
        ("I32", "<i4", "int32"),
        ("F32", "<f4", "float32"),
        ("U64", "<u8", "uint64"),
        ("I64", "<i8", "int64"),
        ("F64", "<f8", "float64"),
        ("C64", "<c8", "complex64"),
    )
}

_CODE_OF = {s.name: s.code for s in STORAGE.values()}

#: Bits an element, for dtypes that are listed but not read.
OTHER_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E8M0": 8}


def possible_shape(shape: tuple[int, ...]) -> bool:
    """Tell whether an array can have a shape, in whatever dtype: NumPy counts bytes as if no size were 0."""
    return len(shape) <= 64 and math.prod(n for n in shape if n) < 1 << 59  # of 16 bytes each: complex128


def plain_array(x: ArrayLike) -> NDArray[Any]:
    """Return x as a `numpy.ndarray` itself, without a copy where it is one or a subclass of it (`numpy.memmap`, ...).

    Raises
    ------
    TypeError
        For masked arrays: nothing here would heed the mask.
    """
    if type(x) is np.ndarray:
        return x
    if isinstance(x, np.ndarray) and isinstance(x, np.ma.MaskedArray):
        raise TypeError("a masked array's mask would be ignored; pass x.filled(value), or x.data if that is meant")
    return np.asarray(x)


def dtype_code(dtype: np.dtype[Any]) -> str | None:
    """Return safetensors' code of a NumPy or ml_dtypes dtype, None where it has none."""
    return _CODE_OF.get(dtype.name)


def to_storage(x: Any) -> tuple[NDArray[Any], str]:
    """Return an array's little-endian, C-contiguous storage and safetensors' code of its dtype.

    Parameters
    ----------
    x : array_like
        Of any dtype in `STORAGE`, ml_dtypes' included; any byte order, any strides. Copied only where it must be.

    Returns
    -------
    array : numpy.ndarray
        The storage: bfloat16 as uint16 bits, float8 as uint8 codes.
    code : str
        Such as ``"F32"``.

    Raises
    ------
    TypeError
        For a dtype that has no place in a file: objects, strings, dates, long doubles. For masked arrays.
    """
    array = plain_array(x)
    code = dtype_code(array.dtype)
    if code is None:
        raise TypeError(f"dtype {array.dtype} cannot be stored; convert it to one of {', '.join(_CODE_OF)}")
    storage = STORAGE[code].numpy
    if array.dtype.name != storage.name:  # ml_dtypes: the bits as they are
        array = np.ascontiguousarray(array).reshape(array.shape).view(storage)
    return np.ascontiguousarray(array, dtype=storage).reshape(array.shape), code


@dataclass(frozen=True)
class TensorInfo:
    """What a file says of one tensor, checked against the file's size.

    Attributes
    ----------
    name, dtype : str
        The tensor's name, and safetensors' code of its dtype.
    shape : tuple of int
        The logical shape.
    nbytes : int
        Bytes of its data.
    offset : int
        Where its data begins, from the start of the file (-1 in JSON, where data is text).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    offset: int = -1


@dataclass(frozen=True)
class NamedTensor:
    """A tensor to be written; its bytes are asked for when their turn comes.

    Attributes
    ----------
    name, dtype : str
        The tensor's name, and safetensors' code of its dtype.
    shape : tuple of int
        The shape.
    load : callable
        Returns the array, in the dtype's storage (see `to_storage`).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    load: Callable[[], NDArray[Any]]

    @classmethod
    def of(cls, name: str, x: Any) -> NamedTensor:
        """Name an array that is already there."""
        return cls.of_storage(name, *to_storage(x))

    @classmethod
    def of_storage(cls, name: str, array: NDArray[Any], code: str) -> NamedTensor:
        """Name a storage array whose dtype's code is known."""
        return cls(name, code, array.shape, lambda: array)

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        return math.prod(self.shape) * STORAGE[self.dtype].numpy.itemsize

    def buffer(self) -> memoryview:
        """Return the bytes; ValueError when they are not as many as the dtype and shape say."""
        array = self.load()
        storage = STORAGE[self.dtype].numpy
        if array.shape != self.shape or array.dtype != storage:
            raise ValueError(f"{self.name}: {array.dtype} {array.shape} was to be {storage} {self.shape}")
        return bytes_of(np.ascontiguousarray(array))


def bytes_of(array: NDArray[Any]) -> memoryview:
    return memoryview(array.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
