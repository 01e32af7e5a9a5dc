"""One small floating-point format, and one value encoded to it: shared by the loops of floats and elementwise."""

from libc.math cimport rint
from libc.stdint cimport int64_t, uint64_t
from libc.string cimport memcpy


cdef struct Format:
    int mantissa_bits
    int bias
    int max_code        # the code of the largest finite value
    int overflow_code   # what lies beyond it when not saturating: Inf, or NaN where the format has no Inf
    int nan_code
    int sign_bit
    bint unsigned_zero  # fnuz: no negative zero, NaN has no sign
    bint nan_payload    # float16 keeps the top bits of a NaN, as the hardware conversion does


cdef inline int encode_one(double x, const Format *f, bint saturate) noexcept nogil:
    # Divide by the quantum of x's binade, round once to even, and let a full mantissa carry into the exponent.
    # Subnormals are the lowest binade continued downwards, so they need no case of their own.
    cdef uint64_t bits, quantum_bits
    cdef int64_t exponent, emin = 1 - f.bias
    cdef double magnitude, quantum
    cdef int code, sign
    memcpy(&bits, &x, 8)
    sign = f.sign_bit if bits >> 63 else 0
    bits = bits << 1 >> 1
    if bits > <uint64_t>0x7FF << 52:
        if f.unsigned_zero:
            return f.nan_code
        if f.nan_payload:
            return sign | f.nan_code | <int>((bits >> 42) & 0x3FF)
        return sign | f.nan_code
    memcpy(&magnitude, &bits, 8)
    exponent = <int64_t>(bits >> 52) - 1023
    if exponent < emin:
        exponent = emin
    if exponent > f.bias + 1:  # beyond any exponent of the format, Inf too: surely an overflow
        code = f.max_code + 1
    else:
        quantum_bits = <uint64_t>(f.mantissa_bits - exponent + 1023) << 52
        memcpy(&quantum, &quantum_bits, 8)  # 1 / quantum: a power of two, so the product is exact
        code = (<int>(exponent - emin) << f.mantissa_bits) + <int>rint(magnitude * quantum)
    if code > f.max_code:
        code = f.max_code if saturate else f.overflow_code
    if f.unsigned_zero and (code == 0 or code == f.nan_code):
        return code
    return code | sign


cdef const Format *format_of(str name) except NULL
cdef const float *decode_table(str name) except NULL  # the 256 values of a float8 format
