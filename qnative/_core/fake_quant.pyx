# cython: boundscheck=False
"""Fake-quantize, forward and backward: one pass over the data each, at every granularity, at several instruction levels.

a) What a pass does to an element is a few lines at the top; the loops below them walk (`walk.pxd`); each pass is one
   `Task`, compiled once a level (`levels.pxd`).
b) Forward. Integers: ``(clamp(rint(x / s), low - z, high - z) + 0) * s``, the rounded quotient being a whole number that
   needs no conversion to an integer and back; the sum with 0 turns a negative zero into the zero that the code 0
   decodes to. Float8: x / s rounded to the format by adding and subtracting a power of two (`round8`), times s.
   x and s are of any precision; the product is float32. NaN becomes 0 (float8: stays NaN); the caller is told.
c) Backward. Gradients of scales are sums of products ``dy * d``, which are exact in float64, in one order: element i of
   a run is added to lane i mod 16, the lanes of a run are added in ascending order, and the runs of a scale in the order
   of memory. Where every element of a run has a scale of its own, its sum has one lane.
"""

from libc.math cimport fabs, fabsf, rint, rintf
from libc.stdint cimport int32_t, uint32_t, uint64_t
from libc.string cimport memcpy

from qnative._core.floats cimport Format, decode_table, format_of
from qnative._core.levels cimport AVX2, AVX512, at_avx2, at_avx512, at_baseline, chosen_level, inlined
from qnative._core.walk cimport Walk, check_sizes, new_walk, next_run

ctypedef fused real:
    float
    double

cdef enum:
    LANES = 16

cdef enum Pass:
    FORWARD
    FORWARD_WIDE     # x in float64
    FORWARD8
    FORWARD8_WIDE
    BACKWARD         # dx alone
    BACKWARD_SCALE   # and ds
    BACKWARD_SCALE_ZERO  # and dz
    BACKWARD8
    BACKWARD8_SCALE


cdef struct Float8:
    float max
    int mantissa_bits
    int min_exponent  # of the smallest normal value


cdef struct Task:
    Pass what
    Walk walk
    const float *x
    const double *x_wide
    const float *dy
    const float *scale
    const int32_t *zero
    int32_t low, high
    Float8 format
    float *out
    double *ds  # sum of dy * d of each scale
    double *dz  # sum of dy of what lies outside
    bint nonfinite


# Element rules

cdef inlined round8(float t, Float8 f, float *result) noexcept nogil:
    """Round to the float8 format, saturating: magnitude + M has the unit in the last place that t's code has."""
    cdef uint32_t bits, exponent, least = <uint32_t>(f.min_exponent + 127) << 23
    cdef float magnitude = fabsf(t), big
    magnitude = f.max if magnitude > f.max else magnitude
    memcpy(&bits, &magnitude, 4)
    exponent = bits & 0x7F800000u
    exponent = (least if exponent < least else exponent) + (<uint32_t>(23 - f.mantissa_bits) << 23)
    memcpy(&big, &exponent, 4)
    magnitude = (magnitude + big) - big
    memcpy(&bits, &magnitude, 4)
    memcpy(&exponent, &t, 4)
    bits |= exponent & 0x80000000u  # the sign, of zero too
    memcpy(result, &bits, 4)


cdef inlined round8_wide(double t, Float8 f, double *result) noexcept nogil:
    """The same from float64, rounded once."""
    cdef uint64_t bits, exponent, least = <uint64_t>(f.min_exponent + 1023) << 52
    cdef double magnitude = fabs(t), big
    magnitude = f.max if magnitude > f.max else magnitude
    memcpy(&bits, &magnitude, 8)
    exponent = bits & (<uint64_t>0x7FF << 52)
    exponent = (least if exponent < least else exponent) + (<uint64_t>(52 - f.mantissa_bits) << 52)
    memcpy(&big, &exponent, 8)
    magnitude = (magnitude + big) - big
    memcpy(&bits, &magnitude, 8)
    memcpy(&exponent, &t, 8)
    bits |= exponent & (<uint64_t>1 << 63)
    memcpy(result, &bits, 8)


cdef inlined decoded(float x, float s, float low, float high, float *result) noexcept nogil:
    cdef float t = rintf(x / s)
    t = t if t == t else 0
    t = low if t < low else t
    t = high if t > high else t
    result[0] = (t + <float>0) * s


cdef inlined decoded_wide(double x, double s, double low, double high, float *result) noexcept nogil:
    cdef double t = rint(x / s)
    t = t if t == t else 0
    t = low if t < low else t
    t = high if t > high else t
    result[0] = <float>(t + <double>0) * <float>s


cdef inlined keep(float v, bint condition, float *result) noexcept nogil:
    """v where the condition holds, else 0: a mask, since compilers turn a choice into two copies of what follows."""
    cdef uint32_t bits
    memcpy(&bits, &v, 4)
    bits &= 0u - <uint32_t>condition
    memcpy(result, &bits, 4)


cdef inlined slope(
    float x, float dy, float s, float low, float high, float *dx, float *d, float *beyond
) noexcept nogil:
    """Of one element: dx, how its result moves with the scale (LSQ), and dy if it lies outside the range."""
    cdef float t = x / s
    cdef float r = rintf(t), c = r
    c = low if c < low else c
    c = high if c > high else c
    keep(t, c == r, &t)
    d[0] = c - t
    keep(dy, c == r, dx)
    keep(dy, c != r, beyond)


cdef inlined slope8(float x, float dy, float s, Float8 f, float *dx, float *d, float *beyond) noexcept nogil:
    cdef float t = x / s, c
    cdef bint inside = fabsf(t) <= f.max
    round8(t, f, &c)
    keep(t, inside, &t)
    d[0] = c - t
    keep(dy, inside, dx)
    beyond[0] = 0


# Runs

cdef inlined forward_run(
    const float *x, float *out, Py_ssize_t n, const float *s, const int32_t *z, Py_ssize_t step, int32_t low,
    int32_t high, uint32_t *top
) noexcept nogil:
    cdef Py_ssize_t i
    cdef float s0 = s[0], lo = <float>(low - z[0]), hi = <float>(high - z[0])
    cdef uint32_t bits, largest = top[0]
    if step == 0:
        for i in range(n):
            memcpy(&bits, &x[i], 4)
            bits &= 0x7FFFFFFFu
            largest = bits if bits > largest else largest
            decoded(x[i], s0, lo, hi, &out[i])
    else:
        for i in range(n):
            memcpy(&bits, &x[i], 4)
            bits &= 0x7FFFFFFFu
            largest = bits if bits > largest else largest
            decoded(x[i], s[i], <float>(low - z[i]), <float>(high - z[i]), &out[i])
    top[0] = largest


cdef inlined forward8_run(
    const float *x, float *out, Py_ssize_t n, const float *s, Py_ssize_t step, Float8 f, uint32_t *top
) noexcept nogil:
    cdef Py_ssize_t i
    cdef float s0 = s[0], y
    cdef uint32_t bits, largest = top[0]
    if step == 0:
        for i in range(n):
            memcpy(&bits, &x[i], 4)
            bits &= 0x7FFFFFFFu
            largest = bits if bits > largest else largest
            round8(x[i] / s0, f, &y)
            out[i] = y * s0
    else:
        for i in range(n):
            memcpy(&bits, &x[i], 4)
            bits &= 0x7FFFFFFFu
            largest = bits if bits > largest else largest
            round8(x[i] / s[i], f, &y)
            out[i] = y * s[i]
    top[0] = largest


cdef inlined backward_run(
    const float *x, const float *dy, float *dx, Py_ssize_t n, const float *s, const int32_t *z, Py_ssize_t step,
    int32_t low, int32_t high
) noexcept nogil:
    cdef Py_ssize_t i
    cdef float s0 = s[0], lo = <float>(low - z[0]), hi = <float>(high - z[0]), t
    if step == 0:
        for i in range(n):
            t = rintf(x[i] / s0)
            keep(dy[i], (lo <= t) & (t <= hi), &dx[i])
    else:
        for i in range(n):
            t = rintf(x[i] / s[i])
            keep(dy[i], (<float>(low - z[i]) <= t) & (t <= <float>(high - z[i])), &dx[i])


cdef inlined backward8_run(
    const float *x, const float *dy, float *dx, Py_ssize_t n, const float *s, Py_ssize_t step, Float8 f
) noexcept nogil:
    cdef Py_ssize_t i
    cdef float s0 = s[0]
    if step == 0:
        for i in range(n):
            keep(dy[i], fabsf(x[i] / s0) <= f.max, &dx[i])
    else:
        for i in range(n):
            keep(dy[i], fabsf(x[i] / s[i]) <= f.max, &dx[i])


cdef inlined lanes(
    const float *x, const float *dy, float *dx, Py_ssize_t n, float s, float lo, float hi, Float8 f, bint is8,
    bint with_zero, double *ds, double *dz
) noexcept nogil:
    """Up to 16 elements of one scale: dx, and their part of each lane's sums."""
    cdef Py_ssize_t j
    cdef float d, beyond
    for j in range(n):
        if is8:
            slope8(x[j], dy[j], s, f, &dx[j], &d, &beyond)
        else:
            slope(x[j], dy[j], s, lo, hi, &dx[j], &d, &beyond)
        ds[j] += <double>dy[j] * <double>d
        if with_zero:
            dz[j] += <double>beyond


cdef inlined backward_scale_run(
    const float *x, const float *dy, float *dx, Py_ssize_t n, const float *s, const int32_t *z, Py_ssize_t step,
    int32_t low, int32_t high, Float8 f, bint is8, bint with_zero, double *ds, double *dz
) noexcept nogil:
    cdef Py_ssize_t i = 0, j
    cdef float s0 = s[0], lo = <float>(low - z[0]), hi = <float>(high - z[0]), d, beyond
    cdef double sums[LANES]
    cdef double outside[LANES]
    cdef double total_s = 0, total_z = 0
    if step == 0:
        for j in range(LANES):
            sums[j] = outside[j] = 0
        while i + LANES <= n:
            lanes(x + i, dy + i, dx + i, LANES, s0, lo, hi, f, is8, with_zero, sums, outside)
            i += LANES
        lanes(x + i, dy + i, dx + i, n - i, s0, lo, hi, f, is8, with_zero, sums, outside)
        for j in range(LANES):
            total_s += sums[j]
            total_z += outside[j]
        ds[0] += total_s
        if with_zero:
            dz[0] += total_z
    else:
        for i in range(n):
            if is8:
                slope8(x[i], dy[i], s[i], f, &dx[i], &d, &beyond)
            else:
                slope(x[i], dy[i], s[i], <float>(low - z[i]), <float>(high - z[i]), &dx[i], &d, &beyond)
            ds[i] += <double>dy[i] * <double>d
            if with_zero:
                dz[i] += <double>beyond


# Passes: the walk over the runs, once a level

cdef inlined work(Task *t) noexcept nogil:
    cdef Walk w = t.walk
    cdef Float8 f = t.format
    cdef Py_ssize_t i
    cdef const float *s
    cdef const int32_t *z
    cdef float *out
    cdef uint32_t top = 0
    cdef double wide
    cdef bint unordered = False
    if t.what == FORWARD:
        while next_run(&w):
            forward_run(&t.x[w.start], &t.out[w.start], w.count, &t.scale[w.scale], &t.zero[w.scale], w.step, t.low,
                        t.high, &top)
    elif t.what == FORWARD8:
        while next_run(&w):
            forward8_run(&t.x[w.start], &t.out[w.start], w.count, &t.scale[w.scale], w.step, f, &top)
    elif t.what == FORWARD_WIDE or t.what == FORWARD8_WIDE:
        while next_run(&w):
            s, z, out = &t.scale[w.scale], &t.zero[w.scale], &t.out[w.start]
            for i in range(w.count):
                wide = t.x_wide[w.start + i]
                unordered |= not (fabs(wide) <= 1.7976931348623157e308)
                if t.what == FORWARD_WIDE:
                    decoded_wide(wide, s[i * w.step], <double>(t.low - z[i * w.step]),
                                 <double>(t.high - z[i * w.step]), &out[i])
                else:
                    round8_wide(wide / <double>s[i * w.step], f, &wide)
                    out[i] = <float>wide * s[i * w.step]
    elif t.what == BACKWARD:
        while next_run(&w):
            backward_run(&t.x[w.start], &t.dy[w.start], &t.out[w.start], w.count, &t.scale[w.scale], &t.zero[w.scale],
                         w.step, t.low, t.high)
    elif t.what == BACKWARD8:
        while next_run(&w):
            backward8_run(&t.x[w.start], &t.dy[w.start], &t.out[w.start], w.count, &t.scale[w.scale], w.step, f)
    elif t.what == BACKWARD_SCALE:
        while next_run(&w):
            backward_scale_run(&t.x[w.start], &t.dy[w.start], &t.out[w.start], w.count, &t.scale[w.scale],
                               &t.zero[w.scale], w.step, t.low, t.high, f, False, False, &t.ds[w.scale], NULL)
    elif t.what == BACKWARD_SCALE_ZERO:
        while next_run(&w):
            backward_scale_run(&t.x[w.start], &t.dy[w.start], &t.out[w.start], w.count, &t.scale[w.scale],
                               &t.zero[w.scale], w.step, t.low, t.high, f, False, True, &t.ds[w.scale], &t.dz[w.scale])
    else:
        while next_run(&w):
            backward_scale_run(&t.x[w.start], &t.dy[w.start], &t.out[w.start], w.count, &t.scale[w.scale],
                               &t.zero[w.scale], w.step, t.low, t.high, f, True, False, &t.ds[w.scale], NULL)
    t.nonfinite = top >= 0x7F800000u or unordered


cdef at_baseline work_baseline(Task *t) noexcept nogil:
    work(t)


cdef at_avx2 work_avx2(Task *t) noexcept nogil:
    work(t)


cdef at_avx512 work_avx512(Task *t) noexcept nogil:
    work(t)


cdef void run(Task *t) noexcept nogil:
    cdef int level = chosen_level()
    if level == AVX512:
        work_avx512(t)
    elif level == AVX2:
        work_avx2(t)
    else:
        work_baseline(t)


# What Python calls

cdef Float8 float8_of(str dtype) except *:
    cdef const Format *format = format_of(dtype)
    cdef Float8 f
    if format.sign_bit != 0x80 or format.unsigned_zero:
        raise ValueError(f"{dtype} is not a float8 format with a negative zero")
    f.max = decode_table(dtype)[format.max_code]
    f.mantissa_bits, f.min_exponent = format.mantissa_bits, 1 - format.bias
    return f



def fake_quantize(
    const real[::1] x not None, const float[::1] scale not None, const int32_t[::1] zero not None, tuple layout,
    int32_t low, int32_t high, str float8, float[::1] out not None,
):
    """Write what x decodes to after quantization, in float32; returns whether x has a NaN or an infinity.

    float8 : the name of a format, or None for integer codes low..high. out may be x itself.
    """
    cdef Task t
    t.walk = new_walk(layout)
    check_sizes(&t.walk, x.shape[0], out.shape[0], scale.shape[0], zero.shape[0])
    if float8 is not None:
        t.format = float8_of(float8)
    if t.walk.size == 0:
        return False
    if real is float:
        t.what, t.x = FORWARD if float8 is None else FORWARD8, &x[0]
    else:
        t.what, t.x_wide = FORWARD_WIDE if float8 is None else FORWARD8_WIDE, &x[0]
    t.scale, t.zero, t.low, t.high, t.out = &scale[0], &zero[0], low, high, &out[0]
    with nogil:
        run(&t)
    return t.nonfinite


def fake_quantize_backward(
    const float[::1] x not None, const float[::1] dy not None, const float[::1] scale not None,
    const int32_t[::1] zero not None, tuple layout, int32_t low, int32_t high, str float8, float[::1] dx not None,
    double[::1] ds=None, double[::1] dz=None,
):
    """Write dx = dy where x is inside the range, else 0; add to ds the sums of dy * d and to dz those of dy outside.

    x, dy, dx : float32[size]; ds, dz : float64[scales], or None for what is not wanted. float8 as in `fake_quantize`. dx may be dy.
    """
    cdef Task t
    t.walk = new_walk(layout)
    check_sizes(&t.walk, x.shape[0], dx.shape[0], scale.shape[0], zero.shape[0])
    if dy.shape[0] != t.walk.size:
        raise ValueError(f"layout of {t.walk.size} elements, dy of {dy.shape[0]}")
    if (ds is not None and ds.shape[0] != t.walk.scales) or (dz is not None and dz.shape[0] != t.walk.scales):
        raise ValueError(f"layout of {t.walk.scales} scales; ds and dz need as many entries")
    if dz is not None and (ds is None or float8 is not None):
        raise ValueError("dz comes with ds, and float8 has no zero point")
    if float8 is not None:
        t.format = float8_of(float8)
    if t.walk.size == 0:
        return
    t.x, t.dy, t.out, t.scale, t.zero, t.low, t.high = &x[0], &dy[0], &dx[0], &scale[0], &zero[0], low, high
    if ds is None:
        t.what = BACKWARD if float8 is None else BACKWARD8
    else:
        t.what, t.ds = BACKWARD_SCALE if float8 is None else BACKWARD8_SCALE, &ds[0]
    if dz is not None:
        t.what, t.dz = BACKWARD_SCALE_ZERO, &dz[0]
    with nogil:
        run(&t)
