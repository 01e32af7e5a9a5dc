"""Division by multiplication, with the bits of the true one.

With r = fl(1 / s), t = fl(x r) and e = fl(x - t s), fl(t + e r) is fl(x / s): tests/division.c says why, and has looked at
every s (csrc/qn_quantize.h divides so too). It holds while nothing is subnormal or overflows, which is what
`divides_by_multiplying` asks of s; where the quotient is below 2^-18, e may be subnormal, and the result is the quotient but
for its last places, on which no code (a whole number, or a float8) depends. Of the zeros only +0 comes out.
"""

from libc.math cimport fmaf
from libc.stdint cimport uint32_t
from libc.string cimport memcpy

from qnative._core.levels cimport inlined

cdef enum:
    LEAST = 57 << 23          # 2^-70 and 2^100, as bits
    RANGE = (227 << 23) - LEAST


cdef inline inlined divide_by_multiplying(const float *scale, Py_ssize_t n, bint *yes) noexcept nogil:
    """Whether all of n scales do; compared as integers, which is vectorized."""
    cdef uint32_t bits, beyond = 0
    cdef Py_ssize_t i
    for i in range(n):
        memcpy(&bits, &scale[i], 4)
        beyond |= (bits - <uint32_t>LEAST) > <uint32_t>RANGE
    yes[0] = not beyond


cdef inline bint divides_by_multiplying(float scale) noexcept nogil:
    cdef bint yes
    divide_by_multiplying(&scale, 1, &yes)
    return yes


cdef inline inlined divided(float x, float scale, float reciprocal, bint by_multiplying, float *quotient) noexcept nogil:
    """x / scale; `by_multiplying`, a constant, only where there are fused multiply-adds and the scale allows it."""
    cdef float t
    if by_multiplying:
        t = x * reciprocal
        quotient[0] = fmaf(fmaf(-t, scale, x), reciprocal, t)
    else:
        quotient[0] = x / scale
