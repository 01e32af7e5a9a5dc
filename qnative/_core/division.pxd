"""Division by multiplication, with the bits of the true one where the quotient is then rounded to a code.

With r = fl(1 / s), t = fl(x r) and e = fl(x - t s), the quotient fl(t + e r) is on the same side of every tie between two
codes as fl(x / s), for the scales that `divides_by_multiplying` names; csrc/qn_tile.h has the proof for ties H / 2, H
odd and below 2^9. Powers of two change no mantissa, so it holds for the ties of float8 as well (H 2^k, H below 2^5), as long
as e is exact: it is a multiple of the last places of t and s, and t is 2^-18 or more where there is a tie. With s a power of
two, t is the quotient itself. Of the zeros only +0 comes out.
"""

from libc.math cimport fmaf
from libc.stdint cimport uint32_t
from libc.string cimport memcpy

from qnative._core.levels cimport inlined


cdef inline bint divides_by_multiplying(float scale) noexcept nogil:
    cdef uint32_t bits
    memcpy(&bits, &scale, 4)
    return 2.0**-70 <= scale <= 2.0**100 and ((bits + 64) % 0x10000 >= 128 or bits % 0x800000 == 0)


cdef inline inlined divided(float x, float scale, float reciprocal, bint by_multiplying, float *quotient) noexcept nogil:
    """x / scale; `by_multiplying`, a constant, only where there are fused multiply-adds and the scale allows it."""
    cdef float t
    if by_multiplying:
        t = x * reciprocal
        quotient[0] = fmaf(fmaf(-t, scale, x), reciprocal, t)
    else:
        quotient[0] = x / scale
