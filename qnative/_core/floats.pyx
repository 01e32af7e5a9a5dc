# cython: boundscheck=False
"""Encode and decode float8, float16 and bfloat16: thin loops around `encode_one` and a table of values.

The six formats differ only in numbers, so they are rows of one table and share one rounding routine. Everything is
computed in float64, where a float32 is exact, so float32 and float64 input are both rounded exactly once.
"""

from libc.math cimport INFINITY, NAN, ldexp
from libc.stdint cimport uint8_t, uint16_t, uint32_t
from libc.string cimport memcpy

ctypedef fused real:
    float
    double

cdef Format FORMATS[6]
cdef float TABLES[4][256]
cdef dict INDEX = {
    "float8_e4m3fn": 0, "float8_e5m2": 1, "float8_e4m3fnuz": 2, "float8_e5m2fnuz": 3, "float16": 4, "bfloat16": 5,
}
#                    mantissa bias  max     overflow  NaN    sign  fnuz  payload
FORMATS[0] = Format(3,  7,   0x7E,   0x7F,   0x7F,   0x80,   0, 0)
FORMATS[1] = Format(2,  15,  0x7B,   0x7C,   0x7E,   0x80,   0, 0)
FORMATS[2] = Format(3,  8,   0x7F,   0x80,   0x80,   0x80,   1, 0)
FORMATS[3] = Format(2,  16,  0x7F,   0x80,   0x80,   0x80,   1, 0)
FORMATS[4] = Format(10, 15,  0x7BFF, 0x7C00, 0x7E00, 0x8000, 0, 1)
FORMATS[5] = Format(7,  127, 0x7F7F, 0x7F80, 0x7FC0, 0x8000, 0, 0)


cdef float decode_one(int code, const Format *f) noexcept:
    cdef int magnitude = code & (f.sign_bit - 1)
    cdef double value
    cdef int exponent = magnitude >> f.mantissa_bits
    cdef int mantissa = magnitude & ((1 << f.mantissa_bits) - 1)
    if f.unsigned_zero and code == f.nan_code:
        return NAN
    if magnitude > f.max_code:
        value = INFINITY if (magnitude == f.overflow_code and f.overflow_code != f.nan_code) else NAN
    elif exponent == 0:
        value = ldexp(mantissa, 1 - f.bias - f.mantissa_bits)
    else:
        value = ldexp(mantissa + (1 << f.mantissa_bits), exponent - f.bias - f.mantissa_bits)
    return <float>(-value if code & f.sign_bit else value)


cdef void fill_tables() noexcept:
    cdef int i, code
    for i in range(4):
        for code in range(256):
            TABLES[i][code] = decode_one(code, &FORMATS[i])


fill_tables()


cdef const Format *format_of(str name) except NULL:
    return &FORMATS[<int>INDEX[name]]


cdef const float *decode_table(str name) except NULL:
    cdef int i = INDEX[name]
    if i > 3:
        raise ValueError(f"{name} has no table")
    return TABLES[i]


def encode(const real[::1] x not None, str dtype, bint saturate, uint16_t[::1] out not None):
    """Encode every element of x : real[n] into out : uint16[n]."""
    cdef const Format *f = format_of(dtype)
    cdef Py_ssize_t i, n = x.shape[0]
    if out.shape[0] != n:
        raise ValueError("encode: sizes differ")
    with nogil:
        for i in range(n):
            out[i] = <uint16_t>encode_one(x[i], f, saturate)


def encode8(const real[::1] x not None, str dtype, bint saturate, uint8_t[::1] out not None):
    """Encode every element of x : real[n] into out : uint8[n] (the float8 formats)."""
    cdef const Format *f = format_of(dtype)
    cdef Py_ssize_t i, n = x.shape[0]
    if out.shape[0] != n or f.sign_bit != 0x80:
        raise ValueError("encode8: sizes differ or not a float8 format")
    with nogil:
        for i in range(n):
            out[i] = <uint8_t>encode_one(x[i], f, saturate)


def decode8(const uint8_t[::1] codes not None, str dtype, float[::1] out not None):
    """Decode codes : uint8[n] of a float8 format into out : float32[n]."""
    cdef const float *table = decode_table(dtype)
    cdef Py_ssize_t i, n = codes.shape[0]
    if out.shape[0] != n:
        raise ValueError("decode8: sizes differ")
    with nogil:
        for i in range(n):
            out[i] = table[codes[i]]


def decode_bfloat16(const uint16_t[::1] codes not None, float[::1] out not None):
    """Widen codes : uint16[n], bfloat16's bits, into out : float32[n]."""
    cdef Py_ssize_t i, n = codes.shape[0]
    cdef uint32_t bits
    if out.shape[0] != n:
        raise ValueError("decode_bfloat16: sizes differ")
    with nogil:
        for i in range(n):
            bits = <uint32_t>codes[i] << 16
            memcpy(&out[i], &bits, 4)
