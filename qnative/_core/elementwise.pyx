# cython: boundscheck=False
"""Quantize, dequantize and find ranges: one element rule each, and one walk over the scales.

a) Every granularity is one walk (see `walk.pxd`).
b) Python has checked and coerced; these functions check again every size that guards a pointer.
c) The element rules clamp in floating point, before the conversion to an integer, so that no conversion overflows.
"""

from libc.math cimport rint, rintf
from libc.stdint cimport int8_t, int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy

from qnative._core.floats cimport Format, decode_table, encode_one, format_of
from qnative._core.walk cimport Walk, check_sizes, new_walk, next_run

ctypedef fused real:
    float
    double


# Element rules

cdef inline real round_half_even(real x) noexcept nogil:
    if real is float:
        return rintf(x)
    else:
        return rint(x)


cdef inline int32_t quantize_one(real x, float scale, int32_t zero, int32_t low, int32_t high) noexcept nogil:
    cdef real t = round_half_even(x / <real>scale)
    cdef real lo = <real>(low - zero), hi = <real>(high - zero)
    t = t if t == t else 0  # NaN becomes the zero point
    t = lo if t < lo else t
    t = hi if t > hi else t
    return <int32_t>t + zero


cdef inline bint is_nonfinite(real x) noexcept nogil:
    cdef uint32_t bits
    cdef uint64_t wide
    if real is float:
        memcpy(&bits, &x, 4)
        return (bits >> 23 & 0xFF) == 0xFF
    else:
        memcpy(&wide, &x, 8)
        return (wide >> 52 & 0x7FF) == 0x7FF


# Loops

def count_nonfinite(const real[::1] x not None):
    """Count the NaNs and infinities in x : real[n]."""
    cdef Py_ssize_t i, bad = 0
    with nogil:
        for i in range(x.shape[0]):
            bad += is_nonfinite(x[i])
    return bad


cdef enum:
    LANES = 16


cdef Py_ssize_t range_of_run(const real *x, Py_ssize_t n, real *low, real *high) noexcept nogil:
    # Independent lanes, so that the compiler can keep them in registers; min and max do not depend on the order.
    cdef real lo[LANES]
    cdef real hi[LANES]
    cdef uint32_t bad[LANES]
    cdef Py_ssize_t i = 0, j, stop, total = 0
    for j in range(LANES):
        lo[j] = hi[j] = x[0]
        bad[j] = 0
    while i + LANES <= n:
        stop = min(n - n % LANES, i + (1 << 30))
        while i < stop:
            for j in range(LANES):
                lo[j] = x[i + j] if x[i + j] < lo[j] else lo[j]
                hi[j] = x[i + j] if x[i + j] > hi[j] else hi[j]
                bad[j] += is_nonfinite(x[i + j])
            i += LANES
        for j in range(LANES):
            total += bad[j]
            bad[j] = 0
    while i < n:
        lo[0] = x[i] if x[i] < lo[0] else lo[0]
        hi[0] = x[i] if x[i] > hi[0] else hi[0]
        total += is_nonfinite(x[i])
        i += 1
    low[0], high[0] = lo[0], hi[0]
    for j in range(1, LANES):
        low[0] = min(low[0], lo[j])
        high[0] = max(high[0], hi[j])
    return total


def min_max(const real[::1] x not None, tuple layout, real[::1] low not None, real[::1] high not None):
    """Find the range of each scale's elements.

    x : real[size]; low, high : real[scales], to be given as +inf and -inf; a scale without elements keeps them.
    Returns how many elements are NaN or infinite; the ranges mean nothing unless that is 0.
    """
    cdef Walk w = new_walk(layout)
    cdef Py_ssize_t i, bad = 0
    cdef real lo, hi
    cdef real *low_at
    cdef real *high_at
    cdef const real *run
    check_sizes(&w, x.shape[0], x.shape[0], low.shape[0], high.shape[0])
    with nogil:
        while next_run(&w):
            run = &x[w.start]
            low_at, high_at = &low[w.scale], &high[w.scale]
            if w.step == 0:
                bad += range_of_run(run, w.count, &lo, &hi)
                low_at[0] = min(low_at[0], lo)
                high_at[0] = max(high_at[0], hi)
            else:
                for i in range(w.count):
                    low_at[i] = run[i] if run[i] < low_at[i] else low_at[i]
                    high_at[i] = run[i] if run[i] > high_at[i] else high_at[i]
                    bad += is_nonfinite(run[i])
    return bad


def quantize(
    const real[::1] x not None, const float[::1] scale not None, const int32_t[::1] zero not None, tuple layout,
    int32_t low, int32_t high, uint8_t[::1] out not None,
):
    """Write clamp(rint(x / scale) + zero, low, high) as one byte each: out : uint8[size], int8's bytes where signed."""
    cdef Walk w = new_walk(layout)
    cdef Py_ssize_t i
    cdef const real *run
    cdef uint8_t *to
    cdef const float *s
    cdef const int32_t *z
    cdef float s0
    cdef int32_t z0
    check_sizes(&w, x.shape[0], out.shape[0], scale.shape[0], zero.shape[0])
    with nogil:
        while next_run(&w):
            run, to, s, z = &x[w.start], &out[w.start], &scale[w.scale], &zero[w.scale]
            if w.step == 0:
                s0, z0 = s[0], z[0]
                for i in range(w.count):
                    to[i] = <uint8_t>quantize_one(run[i], s0, z0, low, high)
            else:
                for i in range(w.count):
                    to[i] = <uint8_t>quantize_one(run[i], s[i], z[i], low, high)


def dequantize(
    const uint8_t[::1] codes not None, bint is_signed, const float[::1] scale not None,
    const int32_t[::1] zero not None, tuple layout, float[::1] out not None,
):
    """Write (code - zero) * scale in float32; codes : uint8[size], read as int8 where `is_signed`."""
    cdef Walk w = new_walk(layout)
    cdef Py_ssize_t i
    cdef const uint8_t *run
    cdef float *to
    cdef const float *s
    cdef const int32_t *z
    cdef int32_t flip = 0x80 if is_signed else 0  # (code ^ 0x80) - 0x80 reads a byte as int8
    cdef float s0
    cdef int32_t z0
    check_sizes(&w, codes.shape[0], out.shape[0], scale.shape[0], zero.shape[0])
    with nogil:
        while next_run(&w):
            run, to, s, z = &codes[w.start], &out[w.start], &scale[w.scale], &zero[w.scale]
            if w.step == 0:
                s0, z0 = s[0], z[0] + flip
                for i in range(w.count):
                    to[i] = <float>((run[i] ^ flip) - z0) * s0
            else:
                for i in range(w.count):
                    to[i] = <float>((run[i] ^ flip) - flip - z[i]) * s[i]


def quantize_float8(
    const real[::1] x not None, const float[::1] scale not None, tuple layout, str dtype, uint8_t[::1] out not None,
):
    """Write encode(x / scale), saturating; NaN stays NaN. The quotient is of x's own precision."""
    cdef Walk w = new_walk(layout)
    cdef const Format *f = format_of(dtype)
    cdef Py_ssize_t i
    cdef const real *run
    cdef uint8_t *to
    cdef const float *s
    check_sizes(&w, x.shape[0], out.shape[0], scale.shape[0], scale.shape[0])
    with nogil:
        while next_run(&w):
            run, to, s = &x[w.start], &out[w.start], &scale[w.scale]
            for i in range(w.count):
                to[i] = <uint8_t>encode_one(run[i] / <real>s[i * w.step], f, True)


def dequantize_float8(
    const uint8_t[::1] codes not None, const float[::1] scale not None, tuple layout, str dtype,
    float[::1] out not None,
):
    """Write decode(code) * scale in float32."""
    cdef Walk w = new_walk(layout)
    cdef const float *table = decode_table(dtype)
    cdef Py_ssize_t i
    cdef const uint8_t *run
    cdef float *to
    cdef const float *s
    check_sizes(&w, codes.shape[0], out.shape[0], scale.shape[0], scale.shape[0])
    with nogil:
        while next_run(&w):
            run, to, s = &codes[w.start], &out[w.start], &scale[w.scale]
            for i in range(w.count):
                to[i] = table[run[i]] * s[i * w.step]


# int4: two codes a byte, the first in the low nibble; each row padded to whole 32-bit words (8 codes)

def pack_nibbles(
    const uint8_t[:, ::1] codes not None, int offset, const uint8_t[::1] pad not None, uint8_t[:, ::1] out not None,
):
    """Pack codes : uint8[rows, n] (int8's bytes where signed) into out : uint8[rows, 4 * ceil(n / 8)].

    A nibble is code + offset (8 for int4, 0 for uint4); a row's padding is the nibble pad : uint8[rows].
    """
    cdef Py_ssize_t r, i, n = codes.shape[1], width = out.shape[1]
    cdef uint8_t a, b
    if codes.shape[0] != out.shape[0] or codes.shape[0] != pad.shape[0] or width != 4 * ((n + 7) // 8):
        raise ValueError("pack_nibbles: sizes differ")
    with nogil:
        for r in range(codes.shape[0]):
            for i in range(n // 2):
                a, b = codes[r, 2 * i] + offset, codes[r, 2 * i + 1] + offset
                out[r, i] = (a & 15) | (b << 4)
            for i in range(n // 2, width):
                a = codes[r, 2 * i] + offset if 2 * i < n else pad[r]
                out[r, i] = (a & 15) | (pad[r] << 4)


def unpack_nibbles(const uint8_t[:, ::1] packed not None, int offset, uint8_t[:, ::1] out not None):
    """Undo `pack_nibbles`: packed : uint8[rows, 4 * ceil(n / 8)] into out : uint8[rows, n]."""
    cdef Py_ssize_t r, i, n = out.shape[1]
    if packed.shape[0] != out.shape[0] or packed.shape[1] != 4 * ((n + 7) // 8):
        raise ValueError("unpack_nibbles: sizes differ")
    with nogil:
        for r in range(out.shape[0]):
            for i in range(n // 2):
                out[r, 2 * i] = (packed[r, i] & 15) - offset
                out[r, 2 * i + 1] = (packed[r, i] >> 4) - offset
            if n % 2:
                out[r, n - 1] = (packed[r, n // 2] & 15) - offset


# Error measures: float64 sums, no temporary arrays

def squared_sums(const real[::1] x not None, const real[::1] y not None):
    """Return (sum of x^2, sum of (x - y)^2, sum of y^2, sum of x*y, max |x - y|) over x, y : [n], in float64."""
    cdef Py_ssize_t i, j, n = x.shape[0]
    cdef double xx = 0, dd = 0, yy = 0, xy = 0, worst = 0, a, b, d
    if y.shape[0] != n:
        raise ValueError("squared_sums: sizes differ")
    with nogil:
        for i in range(n):
            a, b = x[i], y[i]
            d = a - b
            xx += a * a
            yy += b * b
            xy += a * b
            dd += d * d
            d = d if d >= 0 else -d
            worst = d if d > worst else worst
    return xx, dd, yy, xy, worst


def histogram_of_codes(const uint8_t[::1] codes not None, int64_t[::1] out not None):
    """Add the count of each byte of codes : uint8[n] to out : int64[256]."""
    cdef Py_ssize_t i
    if out.shape[0] != 256:
        raise ValueError("histogram_of_codes: out must have 256 entries")
    with nogil:
        for i in range(codes.shape[0]):
            out[codes[i]] += 1
