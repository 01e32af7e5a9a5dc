# cython: boundscheck=False
"""Encode and decode float8, float16 and bfloat16: loops around the two rules of `floats.pxd`, at several levels.

The six formats differ only in numbers, so they are rows of one table.
"""

from libc.math cimport ldexp
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t
from libc.string cimport memcpy

from qnative._core.levels cimport (
    AVX2, AVX512, SPAN, at_avx2, at_avx512, at_baseline, chosen_level, fetch, inlined, own_bytes, own_codes, own_floats,
    own_words,
)
from qnative._core.pieces cimport in_pieces

ctypedef fused real:
    float
    double

cdef Format FORMATS[6]
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


cdef double value_of(int magnitude, const Format *f) noexcept:
    """What a code stands for, as if all codes stood for numbers."""
    cdef int exponent = magnitude >> f.mantissa_bits
    cdef int mantissa = magnitude & ((1 << f.mantissa_bits) - 1)
    if exponent == 0:
        return ldexp(mantissa, 1 - f.bias - f.mantissa_bits)
    return ldexp(mantissa + (1 << f.mantissa_bits), exponent - f.bias - f.mantissa_bits)


cdef const Format *format_of(str name) except NULL:
    return &FORMATS[<int>INDEX[name]]


cdef const Format *float8_of(str name) except NULL:
    cdef const Format *f = format_of(name)
    if f.sign_bit != 0x80 or f.unsigned_zero:
        raise ValueError(f"{name} is not a float8 format with a negative zero")
    return f


cdef Encoder encoder_of(const Format *f, bint saturate) noexcept:
    cdef Encoder e
    cdef float most = <float>value_of(f.max_code if saturate else f.overflow_code, f)
    memcpy(&e.most, &most, 4)
    e.shift = 23 - f.mantissa_bits
    e.least = <uint32_t>(1 - f.bias + 127) << 23
    e.lift = <uint32_t>e.shift << 23
    e.base = e.least >> e.shift
    e.nan_code, e.sign_bit = f.nan_code, f.sign_bit
    e.sign_shift = 24 if f.sign_bit == 0x80 else 16
    return e


cdef Decoder decoder_of(const Format *f) noexcept:
    cdef Decoder d
    d.quantum = <float>ldexp(1, 1 - f.bias - f.mantissa_bits)
    d.shift = 23 - f.mantissa_bits
    d.lift = <uint32_t>(127 - f.bias) << 23
    d.max_code, d.nan_code, d.sign_bit = f.max_code, f.nan_code, f.sign_bit
    d.inf_code = f.overflow_code if f.overflow_code != f.nan_code else 0x10000  # none
    d.subnormals = 1 << f.mantissa_bits
    d.sign_shift = 24 if f.sign_bit == 0x80 else 16
    return d


# Loops

cdef enum Kind:  # the constants that the rules are compiled with
    SIGNED_ZERO
    UNSIGNED_ZERO
    FLOAT16
    BFLOAT16


cdef enum Pass:
    ENCODE8
    ENCODE16
    DECODE8
    DECODE16


cdef struct Task:
    Pass which
    Kind kind
    bint wide            # float64 in
    Encoder encoder
    Decoder decoder
    const float *x
    const double *x_wide
    const uint8_t *bytes_in
    const uint16_t *words_in
    uint8_t *bytes_out
    uint16_t *words_out
    float *floats_out


cdef Kind kind_of(const Format *f) noexcept:
    if f.sign_bit == 0x80:
        return UNSIGNED_ZERO if f.unsigned_zero else SIGNED_ZERO
    return FLOAT16 if f.nan_payload else BFLOAT16


# Encoding is two loops a span, or compilers make narrow integers of each part of a code and put these together.

cdef inlined encode_span(
    const real *x, own_codes codes, Py_ssize_t n, Encoder e, bint unsigned_zero, bint nan_payload, bint bfloat
) noexcept nogil:
    cdef Py_ssize_t i
    cdef float value
    fetch(x, n * sizeof(real))
    for i in range(n):
        if real is float:
            value = x[i]
        else:
            to_odd(x[i], &value)
        encode_float(value, value, e, unsigned_zero, nan_payload, bfloat, False, &codes[i])


cdef inlined encode_bytes(const real *x, own_bytes out, Py_ssize_t n, Encoder e, bint unsigned_zero) noexcept nogil:
    cdef Py_ssize_t i, begin = 0, count
    cdef uint32_t codes[SPAN]
    while begin < n:
        count = min(n - begin, <Py_ssize_t>SPAN)
        encode_span(x + begin, codes, count, e, unsigned_zero, False, False)
        for i in range(count):
            out[begin + i] = <uint8_t>codes[i]
        begin += SPAN


cdef inlined encode_words(const real *x, own_words out, Py_ssize_t n, Encoder e, bint bfloat) noexcept nogil:
    cdef Py_ssize_t i, begin = 0, count
    cdef uint32_t codes[SPAN]
    while begin < n:
        count = min(n - begin, <Py_ssize_t>SPAN)
        encode_span(x + begin, codes, count, e, False, not bfloat, bfloat)
        for i in range(count):
            out[begin + i] = <uint16_t>codes[i]
        begin += SPAN


cdef inlined decode_bytes(const uint8_t *codes, own_floats out, Py_ssize_t n, Decoder d, bint unsigned_zero) noexcept nogil:
    cdef Py_ssize_t i, begin = 0
    while begin < n:
        fetch(codes + begin, SPAN * sizeof(codes[0]))
        fetch(out + begin, SPAN * 4)
        for i in range(begin, min(begin + <Py_ssize_t>SPAN, n)):
            decode_code(codes[i], d, unsigned_zero, False, False, &out[i])
        begin += SPAN


cdef inlined decode_words(const uint16_t *codes, own_floats out, Py_ssize_t n, Decoder d, bint bfloat) noexcept nogil:
    cdef Py_ssize_t i, begin = 0
    while begin < n:
        fetch(codes + begin, SPAN * sizeof(codes[0]))
        fetch(out + begin, SPAN * 4)
        for i in range(begin, min(begin + <Py_ssize_t>SPAN, n)):
            decode_code(codes[i], d, False, not bfloat, bfloat, &out[i])
        begin += SPAN


cdef void work_wide(const Task *t, Py_ssize_t i, Py_ssize_t n) noexcept nogil:
    """From float64, at the baseline alone: rare, and not worth the room."""
    if t.kind == UNSIGNED_ZERO:
        encode_bytes(t.x_wide + i, t.bytes_out + i, n, t.encoder, True)
    elif t.kind == SIGNED_ZERO:
        encode_bytes(t.x_wide + i, t.bytes_out + i, n, t.encoder, False)
    elif t.kind == BFLOAT16:
        encode_words(t.x_wide + i, t.words_out + i, n, t.encoder, True)
    else:
        encode_words(t.x_wide + i, t.words_out + i, n, t.encoder, False)


cdef inlined work(const Task *t, Py_ssize_t i, Py_ssize_t n) noexcept nogil:
    if t.which == ENCODE8:
        if t.kind == UNSIGNED_ZERO:
            encode_bytes(t.x + i, t.bytes_out + i, n, t.encoder, True)
        else:
            encode_bytes(t.x + i, t.bytes_out + i, n, t.encoder, False)
    elif t.which == ENCODE16:
        if t.kind == BFLOAT16:
            encode_words(t.x + i, t.words_out + i, n, t.encoder, True)
        else:
            encode_words(t.x + i, t.words_out + i, n, t.encoder, False)
    elif t.which == DECODE8:
        if t.kind == UNSIGNED_ZERO:
            decode_bytes(t.bytes_in + i, t.floats_out + i, n, t.decoder, True)
        else:
            decode_bytes(t.bytes_in + i, t.floats_out + i, n, t.decoder, False)
    elif t.kind == BFLOAT16:
        decode_words(t.words_in + i, t.floats_out + i, n, t.decoder, True)
    else:
        decode_words(t.words_in + i, t.floats_out + i, n, t.decoder, False)


cdef at_baseline work_baseline(const Task *t, Py_ssize_t i, Py_ssize_t n) noexcept nogil:
    work(t, i, n)


cdef at_avx2 work_avx2(const Task *t, Py_ssize_t i, Py_ssize_t n) noexcept nogil:
    work(t, i, n)


cdef at_avx512 work_avx512(const Task *t, Py_ssize_t i, Py_ssize_t n) noexcept nogil:
    work(t, i, n)


cdef void piece(void *task, Py_ssize_t begin, Py_ssize_t end, int thread) noexcept nogil:
    cdef int level = chosen_level()
    if (<const Task *>task).wide:
        work_wide(<const Task *>task, begin, end - begin)
    elif level == AVX512:
        work_avx512(<const Task *>task, begin, end - begin)
    elif level == AVX2:
        work_avx2(<const Task *>task, begin, end - begin)
    else:
        work_baseline(<const Task *>task, begin, end - begin)


cdef enum:
    PICOSECONDS = 300  # an element takes, roughly


# What Python calls

cdef Task encoding(Pass which, str dtype, bint saturate) except *:
    cdef const Format *f = format_of(dtype)
    cdef Task t
    t.which, t.kind, t.wide, t.encoder = which, kind_of(f), False, encoder_of(f, saturate)
    if (f.sign_bit == 0x80) != (which == ENCODE8):
        raise ValueError(f"codes of {dtype} are of another size")
    return t


cdef Task decoding(Pass which, str dtype) except *:
    cdef const Format *f = format_of(dtype)
    cdef Task t
    t.which, t.kind, t.decoder = which, kind_of(f), decoder_of(f)
    if (f.sign_bit == 0x80) != (which == DECODE8):
        raise ValueError(f"codes of {dtype} are of another size")
    return t


def encode(const real[::1] x not None, str dtype, bint saturate, uint16_t[::1] out not None):
    """Encode every element of x : real[n] into out : uint16[n] (float16 and bfloat16), which shares no memory with x."""
    cdef Task t = encoding(ENCODE16, dtype, saturate)
    if out.shape[0] != x.shape[0]:
        raise ValueError("encode: sizes differ")
    if x.shape[0] == 0:
        return
    if real is float:
        t.x = &x[0]
    else:
        t.x_wide, t.wide = &x[0], True
    t.words_out = &out[0]
    in_pieces(piece, &t, x.shape[0], PICOSECONDS)


def encode8(const real[::1] x not None, str dtype, bint saturate, uint8_t[::1] out not None):
    """Encode every element of x : real[n] into out : uint8[n] (the float8 formats), which shares no memory with x."""
    cdef Task t = encoding(ENCODE8, dtype, saturate)
    if out.shape[0] != x.shape[0]:
        raise ValueError("encode8: sizes differ")
    if x.shape[0] == 0:
        return
    if real is float:
        t.x = &x[0]
    else:
        t.x_wide, t.wide = &x[0], True
    t.bytes_out = &out[0]
    in_pieces(piece, &t, x.shape[0], PICOSECONDS)


def decode(const uint16_t[::1] codes not None, str dtype, float[::1] out not None):
    """Decode codes : uint16[n] of float16 or bfloat16 into out : float32[n], which shares no memory with them."""
    cdef Task t = decoding(DECODE16, dtype)
    if out.shape[0] != codes.shape[0]:
        raise ValueError("decode: sizes differ")
    if codes.shape[0] == 0:
        return
    t.words_in, t.floats_out = &codes[0], &out[0]
    in_pieces(piece, &t, codes.shape[0], PICOSECONDS)


def decode8(const uint8_t[::1] codes not None, str dtype, float[::1] out not None):
    """Decode codes : uint8[n] of a float8 format into out : float32[n], which shares no memory with them."""
    cdef Task t = decoding(DECODE8, dtype)
    if out.shape[0] != codes.shape[0]:
        raise ValueError("decode8: sizes differ")
    if codes.shape[0] == 0:
        return
    t.bytes_in, t.floats_out = &codes[0], &out[0]
    in_pieces(piece, &t, codes.shape[0], PICOSECONDS)
