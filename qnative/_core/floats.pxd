"""Small floating-point formats: their numbers, and one value encoded and decoded, for the loops that have to do with them.

A format is the numbers of `Format`; `Encoder` and `Decoder` are what the rules below make of them. Values are float32; a
float64 is first rounded to odd (`to_odd`), after which rounding again to any of these formats is rounding once, as each has
fewer digits than float32, by two or more.
"""

from libc.stdint cimport int32_t, uint32_t, uint64_t
from libc.string cimport memcpy

from qnative._core.levels cimport inlined


cdef struct Format:
    int mantissa_bits
    int bias
    int max_code        # the code of the largest finite value
    int overflow_code   # what lies beyond it when not saturating, max_code + 1: Inf, or NaN where the format has no Inf
    int nan_code
    int sign_bit
    bint unsigned_zero  # fnuz: no negative zero, NaN has no sign
    bint nan_payload    # float16 keeps the top bits of a NaN, as the hardware conversion does


cdef struct Encoder:
    uint32_t most        # magnitudes are clipped to this: bits of the largest value, or of the one that would follow
    uint32_t least       # the smallest normal value's exponent, as bits
    uint32_t lift        # to the exponent of a number whose last place is that of the format
    uint32_t base
    uint32_t nan_code, sign_bit
    int32_t shift        # 23 - mantissa_bits
    int32_t sign_shift


cdef struct Decoder:
    float quantum        # what the lowest mantissa bit is worth where the exponent is lowest
    uint32_t lift        # difference of the biases, as bits
    uint32_t max_code, nan_code, inf_code, sign_bit
    uint32_t subnormals  # codes below have the lowest exponent and no leading one
    int32_t shift, sign_shift


cdef inline inlined lifted(
    uint32_t magnitude, Encoder e, uint32_t *exponent, uint32_t *big_bits, float *big, float *total
) noexcept nogil:
    """A magnitude, clipped, plus a number `big` of the exponent at which the last place is worth what the code's is.

    The sum is rounded to it: what it has beyond `big` is the mantissa, leading one and all, which carries into the
    exponent by itself. Subnormals are the lowest exponent continued downwards.
    """
    cdef uint32_t clipped = magnitude if magnitude < e.most else e.most
    cdef float value
    memcpy(&value, &clipped, 4)
    clipped &= 0x7F800000u
    exponent[0] = clipped if clipped > e.least else e.least
    big_bits[0] = exponent[0] + e.lift
    memcpy(big, big_bits, 4)
    total[0] = value + big[0]


cdef inline inlined encode_float(
    float x, float signed_like, Encoder e, bint unsigned_zero, bint nan_payload, bint bfloat, bint number,
    uint32_t *result
) noexcept nogil:
    """Round to nearest, ties to even; NaN stays NaN.

    signed_like : what has the sign, x or a number that x was made of. The format has the constants unsigned_zero,
    nan_payload and bfloat; with `number`, a constant too, x is no NaN.
    """
    cdef uint32_t bits, magnitude, exponent, big_bits, code, sign, nan = e.nan_code
    cdef float big, total
    memcpy(&bits, &x, 4)
    magnitude = bits & 0x7FFFFFFFu
    memcpy(&sign, &signed_like, 4)
    sign = (sign >> e.sign_shift) & e.sign_bit
    if nan_payload:
        nan |= (bits >> 13) & 0x3FFu
    if bfloat:  # half of a float32, exponent and all
        exponent = magnitude if magnitude < e.most else e.most
        code = (exponent + 0x7FFFu + ((exponent >> 16) & 1)) >> 16
    else:
        lifted(magnitude, e, &exponent, &big_bits, &big, &total)
        memcpy(&code, &total, 4)
        code += (exponent >> e.shift) - big_bits - e.base
    if unsigned_zero:
        sign = sign if (code & 0x7Fu) != 0 else 0
        code |= sign
        result[0] = nan if magnitude > 0x7F800000u else code
    else:
        code = code if number or magnitude <= 0x7F800000u else nan
        result[0] = code | sign


cdef inline inlined round_float(float x, float signed_like, Encoder e, float *result) noexcept nogil:
    """What the code of x, a saturating one, decodes to; of NaN, something."""
    cdef uint32_t bits, exponent, big_bits
    cdef float big, total
    memcpy(&bits, &x, 4)
    lifted(bits & 0x7FFFFFFFu, e, &exponent, &big_bits, &big, &total)
    total -= big
    memcpy(&exponent, &total, 4)
    memcpy(&bits, &signed_like, 4)
    exponent |= bits & 0x80000000u  # the sign, of zero too
    memcpy(result, &exponent, 4)


cdef inline inlined to_odd(double x, float *result) noexcept nogil:
    """Round to float32 such that a result that is not exact has an odd last bit."""
    cdef float near = <float>x
    cdef double back = near, a = x if x >= 0 else -x, b = back if back >= 0 else -back
    cdef uint32_t bits, odd
    memcpy(&bits, &near, 4)
    odd = bits - 1 if b > a else bits + 1
    odd = bits if bits & 1 else odd
    bits = bits if back == x else odd
    memcpy(result, &bits, 4)
    result[0] = result[0] if x == x else near


cdef inline inlined decode_code(
    uint32_t code, Decoder d, bint unsigned_zero, bint nan_payload, bint bfloat, float *result
) noexcept nogil:
    cdef uint32_t magnitude = code & (d.sign_bit - 1), bits, small, special = 0x7FC00000u
    cdef float number
    if bfloat:
        bits = code << 16
        memcpy(result, &bits, 4)
        return
    number = <float><int32_t>magnitude * d.quantum
    memcpy(&small, &number, 4)
    bits = (magnitude << d.shift) + d.lift
    bits = small if magnitude < d.subnormals else bits
    if unsigned_zero:
        bits |= (code & d.sign_bit) << d.sign_shift
        bits = special if code == d.nan_code else bits
    else:
        if nan_payload:
            special |= magnitude << d.shift
        special = 0x7F800000u if magnitude == d.inf_code else special
        bits = special if magnitude > d.max_code else bits
        bits |= (code & d.sign_bit) << d.sign_shift
    memcpy(result, &bits, 4)


cdef const Format *format_of(str name) except NULL
cdef const Format *float8_of(str name) except NULL  # one with a negative zero; ValueError for another
cdef Encoder encoder_of(const Format *format, bint saturate) noexcept
cdef Decoder decoder_of(const Format *format) noexcept
