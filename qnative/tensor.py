"""Quantized tensors: an array as codes and scales."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import InitVar, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qnative import _core
from qnative.config import (
    CodeDType,
    ObserverMethod,
    QParams,
    QuantConfig,
    check_config,
    check_scale,
    qparams_from_range,
)
from qnative.elementwise import (
    cast_floats,
    check_nan,
    code_range,
    decibel,
    dequantize_walk,
    error_sums,
    quantize_walk,
    refuse_nonfinite,
)
from qnative.floats import as_float_array, decode, encode, float_dtype
from qnative.granularity import Granules, block_min_max
from qnative.storage import possible_shape

__all__ = ["QuantizedTensor", "dequantize_tensor", "error_measures", "quantize_tensor", "refuse_quantized"]

#: What a tensor may have been before.
ORIGINAL_DTYPES = ("float32", "float64", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")

#: Elements decoded at a time where a whole tensor is walked: bounds the temporary memory to a few megabytes.
_BLOCK = 1 << 20


def _words(count: int) -> int:
    """How many 32-bit words hold a row of int4 codes."""
    return -(-count // 8)


@dataclass(frozen=True, eq=False, repr=False)
class QuantizedTensor:
    """An array as codes and scales: frozen, and the form that is saved.

    Parameters
    ----------
    data : numpy.ndarray
        The codes as stored: int8 or uint8 of `shape` (uint8 for float8); for int4 and uint4 int32 words of shape
        ``(*shape[:-1], ceil(shape[-1] / 8))``, eight codes a word, the first in the lowest bits, int4 as code + 8, the
        rest of a row's last word filled with zero points (the bytes of compressed-tensors' ``pack-quantized``).
    scale_data : numpy.ndarray
        The scales as stored: float32, float16, or uint16 holding bfloat16's bits.
    zero_point : numpy.ndarray
        In the code dtype's storage; shape ``()`` when symmetric, else the scales' shape.
    shape : tuple of int
        Of the original.
    dtype : str
        The original's dtype.
    config : QuantConfig
        How it was quantized.
    check : bool
        Look at every scale and code. False: they are known to be right, as what `quantize_tensor` has made is.

    Raises
    ------
    ValueError
        If a buffer's shape or dtype does not fit, a scale is not finite and > 0, or a code is out of range.
    """

    data: NDArray[Any]
    scale_data: NDArray[Any]
    zero_point: NDArray[Any]
    shape: tuple[int, ...]
    dtype: str
    config: QuantConfig
    check: InitVar[bool] = True

    def __post_init__(self, check: bool) -> None:
        def put(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        check_config(self.config)
        if self.dtype not in ORIGINAL_DTYPES:
            raise ValueError(f"dtype={self.dtype!r} of the original is not one of {', '.join(ORIGINAL_DTYPES)}")
        put("shape", tuple(int(n) for n in self.shape))
        if not possible_shape(self.shape):
            raise ValueError(f"shape {self.shape} is beyond what an array can have")
        info, granules = self.config.info, Granules.of_config(self.shape, self.config)
        stored = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}[self.config.scale_dtype]
        packed_shape = (*self.shape[:-1], _words(self.shape[-1] if self.shape else 1))
        for name, dtype, shape in (
            ("data", np.int32 if info.bits == 4 else info.storage, packed_shape if info.bits == 4 else self.shape),
            ("scale_data", stored, granules.shape),
            (
                "zero_point",
                np.int8 if info.is_float else info.storage,
                () if self.config.is_symmetric else granules.shape,
            ),
        ):
            array = getattr(self, name)
            if not isinstance(array, np.ndarray) or array.dtype != dtype or array.shape != shape:
                found = (
                    f"{array.dtype} of shape {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
                )
                raise ValueError(
                    f"{name} is {found}; {self.config} of shape {self.shape} needs {np.dtype(dtype).name} "
                    f"of shape {shape}"
                )
            # What a caller may still write to is copied: a code that was checked stays as it was.
            if not (array.flags.c_contiguous and array.flags.aligned) or (check and array.flags.writeable):
                array = array.copy()
            array = array.view(np.ndarray)
            array.flags.writeable = False
            put(name, array)
        if check:
            if not self._has_valid_scales():
                check_scale(self.scale)  # says which is not
            self._check_codes(info)

    def _has_valid_scales(self) -> bool:
        """Whether every scale is finite and > 0, which is a range of bits."""
        stored, infinity = self.scale_data, {"float32": 0x7F800000, "float16": 0x7C00, "bfloat16": 0x7F80}
        bits: NDArray[Any] = stored.view(np.uint32 if stored.itemsize == 4 else np.uint16)
        one: Any = bits.dtype.type(1)  # 0 wraps around
        return bool(np.max(bits - one, initial=0) < infinity[self.config.scale_dtype] - 1)

    def _check_codes(self, info: CodeDType) -> None:
        low, high = self.config.quant_min, self.config.quant_max
        if self.config.is_symmetric:
            if int(self.zero_point) != self.config.symmetric_zero_point:
                raise ValueError(f"zero_point is {self.zero_point}; a symmetric {info.name} tensor has a fixed one")
        elif info.bits == 4 and self.zero_point.size and (self.zero_point.min() < low or self.zero_point.max() > high):
            raise ValueError(f"zero points {self.zero_point.min()}..{self.zero_point.max()} are outside {low}..{high}")
        if not info.is_float and low > info.min:  # elsewhere every stored code is in range
            for block in self._blocks():
                least = self._least_nibble(block) + info.min if info.bits == 4 else np.min(block, initial=info.max)
                if least < low:
                    raise ValueError(f"code {least} is below quant_min {low} of {self.config}")

    def _least_nibble(self, words: NDArray[Any]) -> int:
        """Return the least of packed codes, as they are packed, whatever pads their rows."""
        rest = (self.shape[-1] if self.shape else 1) % 8
        if rest:
            words = words.copy()
            words[..., -1] |= np.int32(-1 << 4 * rest)
        pairs = words.view(np.uint8)
        return int(min(np.min(pairs, initial=255) >> 4, np.min(pairs & np.uint8(15), initial=15)))

    def __reduce__(self) -> tuple[Any, ...]:
        parts = (self.data, self.scale_data, self.zero_point, self.shape, self.dtype, self.config, False)
        return QuantizedTensor, parts  # arrays read-only again

    def __repr__(self) -> str:
        return (
            f"QuantizedTensor(shape={self.shape}, dtype={self.dtype!r}, {self.config!r}, "
            f"{self.nbytes:,} bytes, {self.bits_per_weight:.2f} bits a weight)"
        )

    # Decoding

    @property
    def codes(self) -> NDArray[Any]:
        """The codes, one element each, of `shape`: int8 for int8 and int4, uint8 for the others."""
        return self._codes_of(self.data)

    def _codes_of(self, data: NDArray[Any]) -> NDArray[Any]:
        """Unpack rows of `data` (all of it, or some along axis 0)."""
        info = self.config.info
        if info.bits != 4:
            return data
        count = self.shape[-1] if self.shape else 1
        lead = data.shape[:-1]
        packed = (
            np.ascontiguousarray(data, "<i4").reshape(-1).view(np.uint8).reshape(math.prod(lead), 4 * _words(count))
        )
        codes = np.empty((packed.shape[0], count), np.uint8)
        _core.unpack_nibbles(packed, 8 if info.is_signed else 0, codes)
        return codes.view(info.storage).reshape((*lead, count) if self.shape else ())

    @property
    def scale(self) -> NDArray[np.float32]:
        """The scales as float32: shape ``()``, ``(channels,)`` or the grouped shape."""
        return _load_scale(self.scale_data, self.config)

    @property
    def qparams(self) -> QParams:
        """The scales and zero points as `QParams`."""
        c = self.config
        return QParams(self.scale, self.zero_point, c.dtype, c.quant_min, c.quant_max, c.axis, c.group_size)

    def _rows(self, rows: Any) -> NDArray[np.float32]:
        """Decode rows (a slice or an index array along axis 0) to float32."""
        config, stored, zero = self.config, self.scale_data, self.zero_point
        # The rows of an int4 vector lie within words, so it is unpacked whole.
        codes = self.codes[rows] if len(self.shape) == 1 else self._codes_of(self.data[rows])
        axis = None if config.axis is None else config.axis % len(self.shape)
        granules = Granules.of(codes.shape, axis, config.group_size)
        chosen = rows
        if axis == 0 and config.group_size is not None:  # a group spans rows: each row is given a scale of its own
            numbers = np.arange(*rows.indices(self.shape[0])) if isinstance(rows, slice) else rows % self.shape[0]
            chosen = numbers // config.group_size
            granules = Granules.of(codes.shape, 0, 1)
        if axis == 0 or config.group_size is not None:
            stored = stored[chosen]
            zero = zero if zero.ndim == 0 else zero[chosen]
        return _decode(codes, config.info, _load_scale(stored, config), zero, granules)

    def _row_slices(self) -> Iterator[slice]:
        if self.numel == 0:  # rows of nothing cost nothing to claim: a file may have 2^60 of them
            return
        rows = max(1, _BLOCK // math.prod(self.shape[1:]))
        for start in range(0, self.shape[0], rows):
            yield slice(start, min(start + rows, self.shape[0]))

    def _blocks(self) -> Iterator[NDArray[Any]]:
        """Yield the stored codes a few rows at a time."""
        if len(self.shape) < 2:
            yield self.data
        else:
            for rows in self._row_slices():
                yield self.data[rows]

    def dequantize(self) -> NDArray[Any]:
        """Decode everything, to the original dtype (rounded once from float32)."""
        granules = Granules.of_config(self.shape, self.config)
        values = _decode(self.codes, self.config.info, self.scale, self.zero_point, granules)
        return cast_floats(values, float_dtype(self.dtype))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        """Decode, where NumPy is given the tensor as it is: ``numpy.asarray(q)`` has its values."""
        if copy is False:
            raise ValueError("the values of a QuantizedTensor are decoded, which makes an array; leave out copy=False")
        values = self.dequantize()
        return values if dtype is None else values.astype(dtype, copy=False)

    def take(self, rows: ArrayLike) -> NDArray[Any]:
        """Decode only some rows: an embedding look-up.

        Parameters
        ----------
        rows : array_like of int
            Indices along axis 0, of any shape; negative ones count from the end.

        Returns
        -------
        numpy.ndarray
            ``dequantize()[rows]``, of shape ``(*rows.shape, *shape[1:])`` and the original dtype.
        """
        index = np.asarray(rows)
        if index.size == 0 and index.dtype.kind == "f":
            index = index.astype(np.intp)
        if index.dtype.kind not in "iu":
            raise TypeError(f"rows must be integers, not {index.dtype}")
        if not self.shape:
            raise ValueError("a tensor of shape () has no rows to take")
        if index.size and (index.min() < -self.shape[0] or index.max() >= self.shape[0]):
            bad = index.min() if index.min() < -self.shape[0] else index.max()
            raise IndexError(f"row {bad} does not exist; the tensor has {self.shape[0]} rows")
        values = self._rows(index.reshape(-1).astype(np.intp, copy=False))
        return cast_floats(values.reshape((*index.shape, *self.shape[1:])), float_dtype(self.dtype))

    # Size and quality

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of every buffer: codes, scales and (asymmetric) zero points."""
        return self.data.nbytes + self.scale_data.nbytes + (0 if self.config.is_symmetric else self.zero_point.nbytes)

    @property
    def bits_per_weight(self) -> float:
        """`nbytes` in bits, over the number of elements."""
        return 8 * self.nbytes / self.numel if self.numel else 0.0

    @property
    def compression_ratio(self) -> float:
        """The original's bytes over `nbytes`."""
        return _itemsize(self.dtype) * self.numel / self.nbytes if self.numel else 1.0

    def sqnr(self, x: ArrayLike) -> float:
        """Signal-to-quantization-noise ratio in decibels against the original `x`, of this shape."""
        return error_measures(x, self)["sqnr"]


def _itemsize(dtype: str) -> int:
    return 2 if dtype == "bfloat16" else 1 if dtype.startswith("float8") else np.dtype(dtype).itemsize


def _decode(
    codes: NDArray[Any], info: CodeDType, scale: NDArray[Any], zero: NDArray[Any], granules: Granules
) -> NDArray[np.float32]:
    scales, zeros = granules.spread(scale, np.float32), granules.spread(zero, np.int32)
    return dequantize_walk(np.array(codes, order="C", copy=None), info, granules, scales, zeros)


def error_measures(x: ArrayLike, q: QuantizedTensor) -> dict[str, float]:
    """Compare a tensor with its original a few rows at a time: ``sqnr`` (dB), ``cosine`` and ``max_error``."""
    original = x if isinstance(x, np.ndarray) else np.asarray(x)
    if original.shape != q.shape:
        raise ValueError(f"x has shape {original.shape}; the tensor has {q.shape}")

    def pairs() -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
        if len(q.shape) == 0:
            yield as_float_array(original), _decode(q.codes, q.config.info, q.scale, q.zero_point, Granules.of(()))
            return
        for rows in q._row_slices():
            yield as_float_array(original[rows]), q._rows(rows)

    xx, dd, yy, xy, worst = error_sums(pairs)
    cosine = xy / math.sqrt(xx * yy) if xx and yy else float(xx == yy)
    return {"sqnr": decibel(xx, dd), "cosine": cosine, "max_error": worst}


def store_codes(codes: NDArray[Any], zero_point: NDArray[Any], config: QuantConfig) -> NDArray[Any]:
    """Return codes of one element each as they are stored: int4 packed, each row padded with its zero point."""
    if config.bits != 4:
        return codes
    count = codes.shape[-1] if codes.ndim else 1
    rows = codes.reshape(math.prod(codes.shape[:-1]), count)
    offset = 8 if config.info.is_signed else 0
    pad = np.empty(rows.shape[0], np.uint8)
    if zero_point.ndim and zero_point.shape[:-1] == codes.shape[:-1] and zero_point.shape[-1]:
        last = np.ascontiguousarray(zero_point[..., -1]).reshape(-1)  # groups along the row: those of its last group
    elif zero_point.ndim == 1 and config.axis is not None and config.axis % codes.ndim < codes.ndim - 1:
        per_row = zero_point.reshape([-1 if i == config.axis % codes.ndim else 1 for i in range(codes.ndim - 1)])
        last = np.ascontiguousarray(np.broadcast_to(per_row, codes.shape[:-1])).reshape(-1)
    else:  # one for all, or running along the row itself: that of the row's last element
        last = np.broadcast_to(zero_point.reshape(-1)[-1:] if zero_point.size else np.zeros(1, np.int8), pad.shape)
    pad[...] = (last.astype(np.int16) + offset).astype(np.uint8)
    packed = np.empty((rows.shape[0], 4 * _words(count)), np.uint8)
    _core.pack_nibbles(np.ascontiguousarray(rows).view(np.uint8), offset, pad, packed)
    return packed.reshape(-1).view("<i4").astype(np.int32, copy=False).reshape((*codes.shape[:-1], _words(count)))


def refuse_quantized(x: object, instead: str = "") -> None:
    """TypeError for what NumPy would decode, so that it would be quantized twice without a word."""
    if isinstance(x, QuantizedTensor):
        raise TypeError(
            f"a QuantizedTensor of {x.config.dtype} is quantized already; {instead}give the floats it was made from, "
            "or its dequantize() if a second error on top of the first is meant"
        )


def quantize_tensor(
    x: ArrayLike,
    config: QuantConfig | None = None,
    qparams: QParams | None = None,
    method: ObserverMethod | str = ObserverMethod.MIN_MAX,
    nan: str = "raise",
) -> QuantizedTensor:
    """Quantize an array.

    Parameters
    ----------
    x : array_like of float
        Any shape, 0-d and empty ones too; float16, bfloat16, float32 or float64.
    config : QuantConfig, optional
        How; `QuantConfig.int8` by default.
    qparams : QParams, optional
        One's own scales and zero points instead of ones found from the data.
    method : ObserverMethod or str
        How the range of each scale is found: ``"min_max"`` or any observer's method.
    nan : {"raise", "zero"}
        Raise at NaN and infinities, or quantize NaN as 0 and infinities as the ends of the range.

    Returns
    -------
    QuantizedTensor

    Raises
    ------
    ValueError
        For NaN or infinities, a scale that cannot be stored, or qparams that do not fit.
    TypeError
        If x is not of floats, or quantized already, config no `QuantConfig` or qparams no `QParams`.

    Examples
    --------
    >>> q = quantize_tensor(np.float32([[0.5, -1.0], [2.0, 0.25]]), QuantConfig.int8_per_channel())
    >>> q.codes
    array([[  64, -127],
           [ 127,   16]], dtype=int8)
    """
    config = QuantConfig.int8() if config is None else check_config(config)
    refuse_quantized(x)
    values = as_float_array(x)
    info, granules = config.info, Granules.of_config(values.shape, config)
    check_nan(nan)
    if qparams is None:
        if nan == "raise" and ObserverMethod(method) is not ObserverMethod.MIN_MAX:  # which looks for itself
            refuse_nonfinite(values)
        qparams = _find_qparams(values, config, ObserverMethod(method), nan)
    else:
        qparams = _own_qparams(qparams, config, granules, values.ndim)
    scales, zeros = granules.spread(qparams.scale, np.float32), granules.spread(qparams.zero_point, np.int32)
    low, high = code_range(info, config.quant_min, config.quant_max)
    if not info.is_float:  # one's own range may be narrower
        low, high = max(low, int(qparams.quant_min or 0)), min(high, int(qparams.quant_max or 0))
    codes = quantize_walk(values, info, granules, scales, zeros, low, high, nan)
    scale = np.broadcast_to(qparams.scale, granules.shape)
    zero = store_zero_point(qparams.zero_point, granules.shape, config)
    data = store_codes(codes, zero, config)
    dtype = x.dtype.name if isinstance(x, np.ndarray) else values.dtype.name
    return QuantizedTensor(data, store_scale(scale, config), zero, values.shape, dtype, config, check=False)


def _find_qparams(values: NDArray[Any], config: QuantConfig, method: ObserverMethod, nan: str) -> QParams:
    if nan == "zero":  # the range is that of the finite values
        values = np.where(np.isfinite(values), values, values.dtype.type(0))
    if method is ObserverMethod.MIN_MAX:
        return qparams_from_range(*block_min_max(values, config), config)
    from qnative.observers import observe_once

    return observe_once(values, config, method)


def _own_qparams(qparams: QParams, config: QuantConfig, granules: Granules, ndim: int) -> QParams:
    if not isinstance(qparams, QParams):
        raise TypeError(f"qparams must be a QParams, not {type(qparams).__name__}; wrap a scale: QParams(scale)")
    if qparams.dtype != config.dtype:
        raise ValueError(f"qparams are of {qparams.dtype}, the config of {config.dtype}; they must agree")

    def cut(axis: int | None, group_size: int | None) -> tuple[int | None, int | None]:
        return axis if axis is None else axis % max(ndim, 1), group_size

    one = qparams.axis is None and qparams.scale.ndim == 0
    if not one and (
        qparams.scale.shape != granules.shape
        or cut(qparams.axis, qparams.group_size) != cut(config.axis, config.group_size)
    ):
        raise ValueError(
            f"qparams have a scale of shape {qparams.scale.shape}, axis={qparams.axis}, "
            f"group_size={qparams.group_size}; {config} needs shape {granules.shape}"
        )
    fixed = config.symmetric_zero_point
    if config.is_symmetric and np.any(qparams.zero_point != fixed):
        raise ValueError(f"a symmetric config has zero point {fixed}; make it asymmetric to use other zero points")
    if not np.array_equal(_load_scale(store_scale(qparams.scale, config), config), qparams.scale):
        raise ValueError(
            f"qparams' scale is not exact in {config.scale_dtype}; round it first, or use scale_dtype='float32'"
        )
    return qparams


def store_zero_point(zero_point: NDArray[Any], shape: tuple[int, ...], config: QuantConfig) -> NDArray[Any]:
    """Return zero points as they are stored: the fixed one of symmetric codes, or one each scale."""
    storage = np.dtype(np.int8) if config.info.is_float else config.info.storage
    if config.is_symmetric:
        return np.array(config.symmetric_zero_point, storage)
    return np.array(np.broadcast_to(zero_point, shape), storage)


def store_scale(scale: NDArray[np.float32], config: QuantConfig) -> NDArray[Any]:
    """Return scales as they are stored: float32, float16, or bfloat16's bits."""
    if config.scale_dtype == "bfloat16":
        return encode(scale, "bfloat16")
    with np.errstate(over="ignore"):
        return np.array(scale, np.float32 if config.scale_dtype == "float32" else np.float16)


def _load_scale(stored: NDArray[Any], config: QuantConfig) -> NDArray[np.float32]:
    if config.scale_dtype == "bfloat16":
        return decode(stored, "bfloat16")
    return stored.astype(np.float32, copy=False)


def dequantize_tensor(q: QuantizedTensor) -> NDArray[Any]:
    """Decode a `QuantizedTensor` to its original dtype: ``q.dequantize()``."""
    return q.dequantize()
