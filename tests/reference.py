"""The NumPy twin of every numeric rule: slow, plain, written from the rules and not from the library.

Nothing here imports qnative. Integers are int64, decisions that need more than float32 are float64, and wherever a
rule fixes an order of float32 operations the order is spelled out. Arrays of parameters (scales, zero points) have the
shapes that qnative gives them: ``()`` per tensor, ``(channels,)`` per channel, the data's shape with the axis divided
by the group size (rounded up) per group.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.floating[Any]]
F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
U8 = NDArray[np.uint8]

SMALLEST_NORMAL = np.float32(2.0**-126)
RANGES: dict[str, tuple[int, int]] = {"int8": (-128, 127), "uint8": (0, 255), "int4": (-8, 7), "uint4": (0, 15)}
STORAGE = {"int8": np.int8, "uint8": np.uint8, "int4": np.int8, "uint4": np.uint8}


# ----------------------------------------------------------------------------------------------------------------------
# Small float formats: one algorithm, a table of all codes


class Format(NamedTuple):
    """A binary float format of `1 + exponent + mantissa` bits."""

    exponent: int
    mantissa: int
    bias: int
    kind: str  # "ieee": Inf and NaNs on top; "fn": the last code is NaN, no Inf; "fnuz": only 0x80 is NaN, no -0

    @property
    def bits(self) -> int:
        return 1 + self.exponent + self.mantissa


FORMATS = {
    "float8_e4m3fn": Format(4, 3, 7, "fn"),
    "float8_e5m2": Format(5, 2, 15, "ieee"),
    "float8_e4m3fnuz": Format(4, 3, 8, "fnuz"),
    "float8_e5m2fnuz": Format(5, 2, 16, "fnuz"),
    "float16": Format(5, 10, 15, "ieee"),
    "bfloat16": Format(8, 7, 127, "ieee"),
}


def is_float8(dtype: str) -> bool:
    """True for the four float8 names."""
    return dtype.startswith("float8")


@cache
def magnitudes(dtype: str) -> F64:
    """Every finite magnitude of the format, ascending: entry `i` is what the code `i` means."""
    f = FORMATS[dtype]
    codes = np.arange(1 << (f.bits - 1))
    exponent, mantissa = codes >> f.mantissa, codes & ((1 << f.mantissa) - 1)
    fraction = mantissa / 2.0**f.mantissa
    values = np.where(
        exponent == 0, np.ldexp(fraction, 1 - f.bias), np.ldexp(1.0 + fraction, (exponent - f.bias).astype(np.int32))
    )
    if f.kind == "ieee":
        values = values[: ((1 << f.exponent) - 1) << f.mantissa]
    elif f.kind == "fn":
        values = values[:-1]
    return np.ascontiguousarray(values)


def largest(dtype: str) -> float:
    """The largest finite value of a float format."""
    return float(magnitudes(dtype)[-1])


def encode(x: ArrayLike, dtype: str, saturate: bool | None = None) -> NDArray[Any]:
    """Codes of the nearest values, ties to the even code; from float32 or float64 (or half) without a detour."""
    f, table = FORMATS[dtype], magnitudes(dtype)
    saturate = is_float8(dtype) if saturate is None else saturate
    with np.errstate(invalid="ignore"):  # signalling NaNs
        wide = np.asarray(x).astype(np.float64)
    nan, negative, size = np.isnan(wide), np.signbit(wide), np.abs(wide)
    # The value that would follow the largest: beyond halfway to it, a number overflows.
    following = 2.0 * table[-1] - table[-2]
    middles = (table + np.append(table[1:], following)) / 2.0
    down = np.searchsorted(middles, size, side="left")  # a tie goes to the lower code
    up = np.searchsorted(middles, size, side="right")  # a tie goes to the higher code
    code = np.where(down % 2 == 0, down, up)
    over = (code >= len(table)) & ~nan
    top = len(table)  # "ieee": the code of Inf; "fn" and "fnuz": one past the largest
    sign = negative.astype(np.int64) << (f.bits - 1)
    if f.kind == "fnuz":
        sign = np.where(code == 0, 0, sign)
    result = np.where(over, top - 1 if saturate else top, code) | sign
    if f.kind == "fnuz":
        result = np.where(nan | (over & (not saturate)), 1 << (f.bits - 1), result)
    elif f.kind == "fn":
        result = np.where(nan | (over & (not saturate)), top | (negative.astype(np.int64) << (f.bits - 1)), result)
    else:
        quiet = top | (1 << (f.mantissa - 1))
        result = np.where(nan, quiet | (negative.astype(np.int64) << (f.bits - 1)), result)
    return result.astype(np.uint8 if f.bits == 8 else np.uint16)


def decode(codes: ArrayLike, dtype: str) -> F32:
    """What codes mean, exactly, as float32."""
    f, table = FORMATS[dtype], magnitudes(dtype)
    bits = np.asarray(codes).astype(np.int64)
    sign, magnitude = bits >> (f.bits - 1), bits & ((1 << (f.bits - 1)) - 1)
    full = np.full(1 << (f.bits - 1), np.nan)
    full[: len(table)] = table
    if f.kind == "ieee":
        full[len(table)] = np.inf
    value = np.where(sign == 1, -full[magnitude], full[magnitude])
    if f.kind == "fnuz":
        value = np.where(bits == 1 << (f.bits - 1), np.nan, value)
    return np.asarray(value.astype(np.float32))


# ----------------------------------------------------------------------------------------------------------------------
# Ranges, scales, zero points


def code_range(dtype: str, mode: str = "asymmetric") -> tuple[float, float]:
    """`(quant_min, quant_max)` of a config."""
    if is_float8(dtype):
        return -largest(dtype), largest(dtype)
    low, high = RANGES[dtype]
    return (low + 1 if mode == "symmetric" and low < 0 else low), high


def middle(dtype: str) -> int:
    """The zero point of symmetric mode."""
    return {"uint8": 128, "uint4": 8}.get(dtype, 0)


def store_scale(scale: F64, scale_dtype: str) -> F32:
    """Round float64 scales once to what they are stored in."""
    if scale_dtype == "float16":
        return scale.astype(np.float16).astype(np.float32)
    scale = np.maximum(scale, float(SMALLEST_NORMAL))
    if scale_dtype == "bfloat16":
        return decode(encode(scale, "bfloat16"), "bfloat16")
    return scale.astype(np.float32)


def next_below(scale: F32, scale_dtype: str) -> F32:
    """The next smaller positive value of the dtype that scales are stored in."""
    if scale_dtype == "float32":
        return np.nextafter(scale, np.float32(0))
    return decode(encode(scale, scale_dtype) - 1, scale_dtype)


def qparams_from_range(
    min_val: ArrayLike, max_val: ArrayLike, dtype: str, mode: str, scale_dtype: str = "float32"
) -> tuple[F32, I64]:
    """Scale and zero point (of the scale's shape) of a range."""
    low = np.minimum(np.asarray(min_val, np.float64), 0.0)
    high = np.maximum(np.asarray(max_val, np.float64), 0.0)
    quant_min, quant_max = code_range(dtype, mode)
    if mode == "symmetric":
        levels = largest(dtype) if is_float8(dtype) else {8: 127, 4: 7}[8 if "8" in dtype else 4]
        scale = np.maximum(np.abs(low), np.abs(high)) / levels
    else:
        levels = quant_max - quant_min
        scale = (high - low) / levels
    scale = np.where((low == 0) & (high == 0), 1.0, scale)
    stored = np.asarray(store_scale(np.asarray(scale), scale_dtype))
    # At the end of float32 a scale that was rounded up would decode the end code of a finite range to Inf.
    with np.errstate(over="ignore"):
        overflows = np.isinf(stored * np.float32(levels)) & (scale * levels <= float(np.finfo(np.float32).max))
    stored = np.asarray(np.where(overflows, next_below(stored, scale_dtype), stored))
    if mode == "symmetric":
        return stored, np.full(stored.shape, middle(dtype), np.int64)
    zero = np.clip(np.rint(quant_min - low / stored.astype(np.float64)), quant_min, quant_max)
    return stored, np.asarray(zero).astype(np.int64)


def spread(parameter: ArrayLike, shape: tuple[int, ...], axis: int | None, group_size: int | None) -> NDArray[Any]:
    """A parameter an element: `parameter` repeated to `shape`."""
    p = np.asarray(parameter)
    if p.ndim == 0 or axis is None:
        return np.broadcast_to(p, shape)
    axis = axis % len(shape)
    if group_size is None:
        return np.broadcast_to(p.reshape([-1 if i == axis else 1 for i in range(len(shape))]), shape)
    every = np.repeat(p, group_size, axis=axis)
    return every[tuple(slice(0, n) if i == axis else slice(None) for i, n in enumerate(shape))]


def block_min_max(x: Floats, axis: int | None, group_size: int | None) -> tuple[F64, F64]:
    """Minimum and maximum of the elements that share a scale, as float64."""
    wide = np.asarray(x).astype(np.float64)
    if axis is None:
        return np.asarray(wide.min()), np.asarray(wide.max())
    moved = np.moveaxis(wide, axis, 0)
    if group_size is None:
        flat = moved.reshape(moved.shape[0], -1)
        return flat.min(axis=1), flat.max(axis=1)
    cuts = range(0, moved.shape[0], group_size)
    low = np.stack([moved[c : c + group_size].min(axis=0) for c in cuts])
    high = np.stack([moved[c : c + group_size].max(axis=0) for c in cuts])
    return np.moveaxis(low, 0, axis), np.moveaxis(high, 0, axis)


# ----------------------------------------------------------------------------------------------------------------------
# Elementwise


def widen(x: ArrayLike) -> Floats:
    """float64 stays, everything narrower becomes float32."""
    array = np.asarray(x)
    with np.errstate(invalid="ignore"):  # signalling NaNs
        return array.astype(np.float64 if array.dtype == np.float64 else np.float32)


def quantize(
    x: ArrayLike,
    scale: ArrayLike,
    zero_point: ArrayLike = 0,
    dtype: str = "int8",
    axis: int | None = None,
    group_size: int | None = None,
    quant_min: float | None = None,
    quant_max: float | None = None,
) -> NDArray[Any]:
    """Codes; NaN becomes the zero point's code and Inf the end of the range."""
    wide = widen(x)
    s = spread(np.asarray(scale, np.float32), wide.shape, axis, group_size).astype(wide.dtype)
    with np.errstate(all="ignore"):
        ratio = wide / s  # true division, float32 (float64 for float64 data)
    full = code_range(dtype)
    low = full[0] if quant_min is None else quant_min
    high = full[1] if quant_max is None else quant_max
    if is_float8(dtype):
        return encode(np.where(np.isnan(ratio), 0.0, np.clip(ratio, low, high)), dtype)
    z = spread(np.asarray(zero_point, np.int64), wide.shape, axis, group_size)
    with np.errstate(invalid="ignore"):
        q = np.clip(np.rint(ratio).astype(np.float64) + z, low, high)
    return np.where(np.isnan(wide), z, q).astype(STORAGE[dtype])


def dequantize(
    codes: ArrayLike,
    scale: ArrayLike,
    zero_point: ArrayLike = 0,
    dtype: str = "int8",
    axis: int | None = None,
    group_size: int | None = None,
) -> F32:
    """`(q - zero_point) * scale` in float32."""
    array = np.asarray(codes)
    s = spread(np.asarray(scale, np.float32), array.shape, axis, group_size)
    with np.errstate(all="ignore"):
        if is_float8(dtype):
            return np.asarray(decode(array, dtype) * s)
        z = spread(np.asarray(zero_point, np.int64), array.shape, axis, group_size)
        return np.asarray((array.astype(np.int64) - z).astype(np.float32) * s)


class Gradients(NamedTuple):
    """Of fake quantization: dx in float32; ds and dz in float64, with the size of what was summed for each."""

    dx: F32
    ds: F64
    dz: F64
    ds_size: F64
    dz_size: F64


def fake_quantize_backward(
    x: F32,
    dy: F32,
    scale: ArrayLike,
    zero_point: ArrayLike,
    dtype: str,
    mode: str,
    axis: int | None = None,
    group_size: int | None = None,
) -> Gradients:
    """Straight-through dx, and LSQ's gradients of scale and zero point, scaled by 1 / sqrt(N * quant_max).

    The quotient, its distance d to the code and the products dy * d are float32, the sums float64. `zero_point` is a
    float, used as clamp(rint(z)).
    """
    low, high = code_range(dtype, mode)
    scale = np.asarray(scale, np.float32)
    s = np.asarray(spread(scale, x.shape, axis, group_size), np.float32)
    z = np.asarray(spread(np.clip(np.rint(np.asarray(zero_point, np.float64)), low, high), x.shape, axis, group_size))
    with np.errstate(all="ignore"):
        ratio = x / s
        if is_float8(dtype):
            inside = np.abs(ratio) <= np.float32(high)
            value = decode(encode(np.clip(ratio, low, high), dtype), dtype)
            d = np.where(inside, value - ratio, np.where(ratio > 0, np.float32(high), np.float32(low)))
        else:
            q = np.rint(ratio).astype(np.float64) + z
            inside = (low <= q) & (q <= high)
            d = np.where(inside, (q - z).astype(np.float32) - ratio, np.where(q < low, low - z, high - z))
    assert not inside.any() or (value if is_float8(dtype) else ratio).dtype == np.float32
    place = spread(np.arange(scale.size).reshape(scale.shape), x.shape, axis, group_size).ravel()

    def sums(terms: NDArray[Any]) -> F64:
        return np.asarray(np.bincount(place, terms.ravel(), minlength=scale.size).reshape(scale.shape), np.float64)

    each = np.bincount(place, minlength=scale.size).reshape(scale.shape)
    factor = 1.0 / np.sqrt(np.maximum(each, 1) * float(high))
    slope = (dy * d.astype(np.float32)).astype(np.float64)
    shift = np.where(inside, 0.0, -s.astype(np.float64) * dy)
    return Gradients(
        np.where(inside, dy, np.float32(0)),
        sums(slope) * factor,
        sums(shift) * factor,
        sums(np.abs(slope)) * factor,
        sums(np.abs(shift)) * factor,
    )


class Quantized(NamedTuple):
    """What `quantize_tensor` makes."""

    codes: NDArray[Any]
    scale: F32
    zero_point: I64


def quantize_tensor(
    x: ArrayLike,
    dtype: str,
    mode: str = "symmetric",
    axis: int | None = None,
    group_size: int | None = None,
    scale_dtype: str = "float32",
) -> Quantized:
    """Min-max quantization of a whole array."""
    wide = widen(x)
    scale, zero = qparams_from_range(*block_min_max(wide, axis, group_size), dtype, mode, scale_dtype)
    return Quantized(quantize(wide, scale, zero, dtype, axis, group_size, *code_range(dtype, mode)), scale, zero)


def sqnr(x: ArrayLike, y: ArrayLike) -> float:
    """Signal over quantization noise, dB."""
    x, y = np.asarray(x).astype(np.float64), np.asarray(y).astype(np.float64)
    # Both sums are scaled alike, so that neither tiny nor huge data leaves the range of float64.
    peak = float(np.max(np.abs(x), initial=0.0)) or 1.0
    signal, noise = np.sum((x / peak) ** 2), np.sum(((x - y) / peak) ** 2)
    return math.inf if noise == 0 else 10.0 * math.log10(signal / noise)


# ----------------------------------------------------------------------------------------------------------------------
# int4 as compressed-tensors' pack-quantized lays it out


def pack4(codes: ArrayLike, dtype: str, padding: ArrayLike | None = None) -> NDArray[np.int32]:
    """Whole little-endian int32 words a row; nibble = code + 8 (int4) or code (uint4), the first in the low nibble.

    `padding` is the zero point (a code) that fills each row up, one for all or one a row.
    """
    array = np.atleast_1d(np.asarray(codes)).astype(np.int64)
    offset = 8 if dtype == "int4" else 0
    fill = np.full(array.shape[:-1], middle(dtype), np.int64) if padding is None else np.asarray(padding, np.int64)
    words = -(-array.shape[-1] // 8)
    rows = np.empty((*array.shape[:-1], words * 8), np.uint32)
    rows[...] = (np.broadcast_to(fill, array.shape[:-1])[..., None] + offset).astype(np.uint32)
    rows[..., : array.shape[-1]] = (array + offset).astype(np.uint32)
    rows = rows.reshape(*array.shape[:-1], words, 8)
    word = np.zeros(rows.shape[:-1], np.uint32)
    for i in range(8):
        word |= rows[..., i] << np.uint32(4 * i)
    return word.view(np.int32)


def unpack4(words: ArrayLike, dtype: str, length: int) -> NDArray[Any]:
    """The codes of packed rows, `length` a row."""
    w = np.asarray(words).astype(np.int64) & 0xFFFFFFFF
    nibbles = np.stack([(w >> (4 * i)) & 15 for i in range(8)], axis=-1)
    nibbles = nibbles.reshape(*w.shape[:-1], w.shape[-1] * 8)[..., :length]
    return (nibbles - (8 if dtype == "int4" else 0)).astype(STORAGE[dtype])


# ----------------------------------------------------------------------------------------------------------------------
# Linear layers


def dynamic_rows(x: F32, kind: str, dtype: str | None = None) -> tuple[NDArray[Any], F32, I64]:
    """Codes, scale and zero point of each row of `x`, all in float32.

    `kind` "dynamic": uint8 by ONNX's DynamicQuantizeLinear; "dynamic_symmetric": int8; with a float8 `dtype` both are
    scaled float8.
    """
    assert x.dtype == np.float32
    finite = np.where(np.isfinite(x), x, np.float32(0))
    low = finite.min(axis=1, initial=0.0).astype(np.float32)
    high = finite.max(axis=1, initial=0.0).astype(np.float32)
    largest_magnitude = np.maximum(-low, high)
    with np.errstate(all="ignore"):
        if dtype is not None and is_float8(dtype):
            scale = largest_magnitude / np.float32(largest(dtype))
        elif kind == "dynamic_symmetric":
            scale = largest_magnitude / np.float32(127)
        else:
            scale = (high - low) / np.float32(255)
            halves = high / np.float32(255) - low / np.float32(255)
            scale = np.where(np.isfinite(high - low), scale, halves)
        scale = np.where(largest_magnitude == 0, np.float32(1), np.maximum(scale, SMALLEST_NORMAL))
        scale = scale.astype(np.float32)
        column = scale[:, None]
        if dtype is not None and is_float8(dtype):
            ratio = np.where(np.isnan(x), np.float32(0), x / column)
            return encode(ratio, dtype), scale, np.zeros(len(x), np.int64)
        if kind == "dynamic_symmetric":
            q = np.clip(np.rint(x / column), -127, 127)
            return np.where(np.isnan(x), 0, q).astype(np.int8), scale, np.zeros(len(x), np.int64)
        zero = np.clip(np.rint(np.float32(0) - low / scale), 0, 255).astype(np.int64)
        q = np.clip(np.rint(x / column).astype(np.float64) + zero[:, None], 0, 255)
        return np.where(np.isnan(x), zero[:, None], q).astype(np.uint8), scale, zero


def fma(a: ArrayLike, b: ArrayLike, c: ArrayLike) -> F32:
    """float32 fused multiply-add, rounded once.

    A product of two float32 is exact in float64. The sum is rounded to odd there (Knuth's two-sum gives what was lost),
    after which rounding to float32 is as if from the exact value: 53 >= 24 + 2 bits.
    """
    with np.errstate(all="ignore"):
        p = np.asarray(a, np.float32).astype(np.float64) * np.asarray(b, np.float32).astype(np.float64)
        c64 = np.asarray(c, np.float32).astype(np.float64)
        total = np.asarray(p + c64)
        back = total - p
        lost = (p - (total - back)) + (c64 - back)
        bits = total.view(np.int64)
        away = np.where((lost > 0) == (total > 0), 1, -1)
        fix = np.isfinite(total) & (lost != 0) & ((bits & 1) == 0)
        odd = np.where(fix, bits + away, bits).view(np.float64)
        return np.asarray(odd.astype(np.float32))


def fma_chain(a: F32, w: F32) -> F32:
    """`(M, K) x (N, K) -> (M, N)`: one chain of fused multiply-adds an output, k ascending, from 0."""
    acc = np.zeros((a.shape[0], w.shape[0]), np.float32)
    for k in range(a.shape[1]):
        acc = fma(a[:, k, None], w[None, :, k], acc)
    return acc


@dataclass(frozen=True)
class Weights:
    """`(N, K)` codes with `(N, groups)` scales and zero points."""

    codes: NDArray[Any]
    scale: F32
    zero_point: I64
    dtype: str
    group_size: int | None = None

    @classmethod
    def build(
        cls, codes: NDArray[Any], scale: ArrayLike, zero_point: ArrayLike, dtype: str, group_size: int | None = None
    ) -> Weights:
        """From parameters of any shape that a tensor, a channel or a group has."""
        rows = codes.shape[0]

        def table(p: ArrayLike) -> NDArray[Any]:
            array = np.asarray(p)
            return np.array(array if array.ndim == 2 else np.broadcast_to(array, (rows,))[:, None])

        s = table(np.asarray(scale, np.float32))
        return cls(codes, s, np.broadcast_to(table(np.asarray(zero_point, np.int64)), s.shape), dtype, group_size)

    @property
    def groups(self) -> list[slice]:
        """The runs of k that share a scale."""
        k = self.codes.shape[1]
        size = self.group_size or max(k, 1)
        return [slice(start, min(start + size, k)) for start in range(0, k, size)] if k else [slice(0, 0)]

    def dequantized(self) -> F32:
        """The float32 weights."""
        if self.group_size is None:
            return dequantize(self.codes, self.scale[:, 0], self.zero_point[:, 0], self.dtype, 0)
        return dequantize(self.codes, self.scale, self.zero_point, self.dtype, 1, self.group_size)


def accumulators(codes: NDArray[Any], zero: ArrayLike, w: Weights) -> I64:
    """`(groups, M, N)` exact integer sums of `(a - z_a) * (w - z_w)`."""
    a = codes.astype(np.int64) - np.broadcast_to(np.asarray(zero, np.int64), codes.shape[0])[:, None]
    out = np.empty((len(w.groups), codes.shape[0], w.codes.shape[0]), np.int64)
    for g, run in enumerate(w.groups):
        out[g] = a[:, run] @ (w.codes[:, run].astype(np.int64) - w.zero_point[:, g, None]).T
    return out


def float_accumulators(codes: NDArray[Any], w: Weights, dtype: str) -> F32:
    """`(groups, M, N)` float32 sums over decoded float8 codes, a fused chain each."""
    a, b = decode(codes, dtype), decode(w.codes, w.dtype)
    return np.stack([fma_chain(a[:, run], b[:, run]) for run in w.groups])


def epilogue(acc: NDArray[Any], x_scale: ArrayLike, w: Weights, bias: NDArray[Any] | None) -> F32:
    """Float32 output of `(groups, M, N)` accumulators, in the written order."""
    x_scale = np.broadcast_to(np.asarray(x_scale, np.float32), acc.shape[1])
    with np.errstate(all="ignore"):
        if bias is not None and bias.dtype == np.int32:
            assert acc.shape[0] == 1
            acc, bias = acc + bias.astype(np.int64), None
        y = None
        for g in range(acc.shape[0]):
            product = acc[g].astype(np.float32) * (x_scale[:, None] * w.scale[None, :, g])
            y = product if y is None else y + product
        assert y is not None and y.dtype == np.float32
        return y if bias is None else np.asarray(y + bias[None, :].astype(np.float32))


def float_linear(x: F32, w: Weights, bias: NDArray[Any] | None) -> F32:
    """Float activations: the fused chain over dequantized weights, then the bias."""
    with np.errstate(all="ignore"):
        y = fma_chain(x, w.dequantized())
        return y if bias is None else np.asarray(y + bias[None, :])


# ----------------------------------------------------------------------------------------------------------------------
# Activation functions, float64 (bounds, not bits)


def activation(x: ArrayLike, name: str | None) -> F64:
    """The mathematical value in float64."""
    with np.errstate(all="ignore"):
        v = np.asarray(x, np.float64)
        if name is None:
            return v
        if name == "relu":
            return np.where(np.isnan(v), v, np.maximum(v, 0.0))
        if name == "gelu":
            half_erfc = np.array([0.5 * math.erfc(-t / math.sqrt(2.0)) for t in v.ravel().tolist()]).reshape(v.shape)
            return np.where(v == -np.inf, 0.0, v * half_erfc)
        if name == "gelu_tanh":
            # 0.5 * (1 + tanh(u)) is the logistic function of 2u, which keeps its digits where tanh is near -1.
            u = math.sqrt(2.0 / math.pi) * (v + 0.044715 * v * v * v)
            return np.where(v == -np.inf, 0.0, v / (1.0 + np.exp(-2.0 * u)))
        if name == "silu":
            return np.where(v == -np.inf, 0.0, v / (1.0 + np.exp(-v)))
    raise ValueError(name)


# ----------------------------------------------------------------------------------------------------------------------
# Comparing


def bits(x: ArrayLike) -> NDArray[Any]:
    """Bit patterns, every NaN as one."""
    array = np.array(x, order="C")
    if array.dtype.kind == "f":
        array = np.where(np.isnan(array), np.array(np.nan, array.dtype), array)
        return array.view(f"u{array.dtype.itemsize}")
    return array


def assert_same_bits(actual: Any, expected: Any, what: str = "") -> None:
    """Same dtype, shape and bits; the message shows the first element that differs."""
    a, e = np.asarray(actual), np.asarray(expected)
    assert a.dtype == e.dtype, f"{what}: dtype {a.dtype}, expected {e.dtype}"
    assert a.shape == e.shape, f"{what}: shape {a.shape}, expected {e.shape}"
    different = bits(a) != bits(e)
    if different.any():
        where = tuple(int(i) for i in np.argwhere(different)[0])
        raise AssertionError(
            f"{what}: {int(different.sum())} of {a.size} differ, first at {where}: {a[where]!r}, expected {e[where]!r}"
        )
