# cython: boundscheck=False
"""Fake-quantize, forward and backward: one pass over the data each, at every granularity, at several instruction levels.

a) What a pass does to an element is a few lines at the top; the loops below them walk (`walk.pxd`); each pass is one
   `Task`, compiled once a level (`levels.pxd`).
b) Forward. Integers: ``(clamp(rint(x / s), low - z, high - z) + 0) * s``, the rounded quotient being a whole number that
   needs no conversion to an integer and back; the sum with 0 turns a negative zero into the zero that the code 0
   decodes to. Float8: x / s rounded to the format by adding and subtracting a power of two (`round8`), times s.
   x and s are of any precision; the product is float32. A run of one scale may divide by multiplying (`division.pxd`).
   NaN becomes 0 (float8: stays NaN); the caller is told.
c) Backward. Gradients of scales are float64 sums of the float32 products ``dy * d``, in one order: element i of
   a run is added to lane i mod 32; the upper half of the lanes is added to the lower one until one is left; the runs of
   a scale are added in the order of memory. Where each element of a run has a scale of its own, so has its sum.
"""

from libc.float cimport DBL_MAX
from libc.math cimport fabs, fabsf, rint, rintf
from libc.stdint cimport int32_t, uint32_t, uint64_t
from libc.string cimport memcpy

from qnative._core.division cimport divided, divides_by_multiplying
from qnative._core.floats cimport Format, decode_table, format_of
from qnative._core.levels cimport (
    AVX2, AVX512, SPAN, at_avx2, at_avx512, at_baseline, chosen_level, fetch, inlined, own_floats,
)
from qnative._core.walk cimport Walk, check_sizes, new_walk, next_run

ctypedef fused real:
    float
    double

cdef enum:
    LANES = 32

cdef enum Pass:
    FORWARD
    FORWARD_WIDE  # x in float64
    DX            # backward: the gradient of x alone
    DX_DS         # and of the scale
    DX_DS_DZ      # and of the zero point


cdef struct Float8:
    float max
    int mantissa_bits
    int min_exponent  # of the smallest normal value


cdef struct Task:
    Pass kind
    bint is8
    Walk walk
    const float *x
    const double *x_wide
    const float *dy
    const float *scale
    const int32_t *zero
    bint one_zero  # all zero points are the same
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


cdef inlined decoded_fused(float x, float s, float reciprocal, float least, float most, float *result) noexcept nogil:
    """The same for a scale that divides by multiplying: clamped before, to what the ends decode to."""
    cdef float t
    x = x if x == x else 0
    x = least if x < least else x
    x = most if x > most else x
    divided(x, s, reciprocal, True, &t)
    result[0] = (rintf(t) + <float>0) * s


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


# Runs. What is constant at the call (is8, each, zeros, kind) is gone once inlined.

cdef inlined forward_run(
    const float *x, own_floats out, Py_ssize_t n, const float *s, const int32_t *z, const Task *t, bint is8, bint each,
    bint zeros, bint by_multiplying, uint32_t *top
) noexcept nogil:
    cdef Py_ssize_t i
    cdef float reciprocal = <float>1 / s[0]
    cdef Float8 f = t.format
    cdef int32_t low = t.low, high = t.high
    cdef float scale = s[0], lo = <float>(low - z[0]), hi = <float>(high - z[0]), y
    cdef uint32_t bits, largest = top[0]
    for i in range(n):
        memcpy(&bits, &x[i], 4)
        bits &= 0x7FFFFFFFu  # ordered as the magnitudes are; NaN and Inf on top
        largest = bits if bits > largest else largest
        if each:
            scale = s[i]
        if each and zeros:
            lo, hi = <float>(low - z[i]), <float>(high - z[i])
        if is8:
            round8(x[i] / scale, f, &y)
            out[i] = y * scale
        elif by_multiplying:
            decoded_fused(x[i], scale, reciprocal, lo * scale, hi * scale, &out[i])
        else:
            decoded(x[i], scale, lo, hi, &out[i])
    top[0] = largest


cdef inlined backward_lanes(
    const float *x, const float *dy, float *dx, Py_ssize_t n, const float *s, const int32_t *z, const Task *t, bint is8,
    bint each, bint zeros, Pass kind, double *ds, double *dz
) noexcept nogil:
    """dx of n elements of one scale (or of a scale each), and their part of n sums."""
    cdef Py_ssize_t j
    cdef Float8 f = t.format
    cdef int32_t low = t.low, high = t.high
    cdef float scale = s[0], lo = <float>(low - z[0]), hi = <float>(high - z[0]), d, beyond
    for j in range(n):
        if each:
            scale = s[j]
        if each and zeros:
            lo, hi = <float>(low - z[j]), <float>(high - z[j])
        if is8:
            slope8(x[j], dy[j], scale, f, &dx[j], &d, &beyond)
        else:
            slope(x[j], dy[j], scale, lo, hi, &dx[j], &d, &beyond)
        if kind != DX:
            ds[j] += <double>(dy[j] * d)
        if kind == DX_DS_DZ:
            dz[j] += <double>beyond


cdef inlined backward_run(
    const float *x, const float *dy, float *dx, Py_ssize_t n, const float *s, const int32_t *z, const Task *t, bint is8,
    Pass kind, double *sums, double *outside
) noexcept nogil:
    cdef Py_ssize_t i = 0
    while i + LANES <= n:
        backward_lanes(x + i, dy + i, dx + i, LANES, s, z, t, is8, False, False, kind, sums, outside)
        i += LANES
    backward_lanes(x + i, dy + i, dx + i, n - i, s, z, t, is8, False, False, kind, sums, outside)


cdef inline double total(double *lanes) noexcept nogil:
    cdef Py_ssize_t half = LANES // 2, j
    while half:
        for j in range(half):
            lanes[j] += lanes[j + half]
        half //= 2
    return lanes[0]


# A pass: the walk over the runs

cdef inlined forward_spans(
    const float *x, float *out, Py_ssize_t n, const float *s, const int32_t *z, const Task *t, bint is8, bint each,
    bint zeros, bint by_multiplying, uint32_t *top
) noexcept nogil:
    cdef Py_ssize_t i = 0, j, count
    while i < n:
        j, count = i if each else 0, min(n - i, <Py_ssize_t>SPAN)
        fetch(x + i, count * 4)
        forward_run(x + i, out + i, count, s + j, z + j, t, is8, each, zeros, by_multiplying, top)
        i += count


cdef inlined sweep(Task *t, bint is8, Pass kind, bint fused) noexcept nogil:
    """`fused`: whether there are fused multiply-adds."""
    cdef Walk w = t.walk
    cdef Py_ssize_t j
    cdef double sums[LANES]
    cdef double outside[LANES]
    cdef double *ds
    cdef double *dz
    cdef const float *x
    cdef const float *dy
    cdef const float *s
    cdef const int32_t *z
    cdef float *out
    cdef uint32_t top = 0
    while next_run(&w):
        x, out, s, z = &t.x[w.start], &t.out[w.start], &t.scale[w.scale], &t.zero[w.scale]
        if kind == FORWARD:
            if not w.step and fused and not is8 and divides_by_multiplying(s[0]):
                forward_spans(x, out, w.count, s, z, t, is8, False, False, True, &top)
            elif not w.step:
                forward_spans(x, out, w.count, s, z, t, is8, False, False, False, &top)
            elif is8 or t.one_zero:  # float8 has none
                forward_spans(x, out, w.count, s, z, t, is8, True, False, False, &top)
            else:
                forward_spans(x, out, w.count, s, z, t, is8, True, True, False, &top)
            continue
        dy = &t.dy[w.start]
        ds = dz = NULL
        if kind != DX:
            ds = &t.ds[w.scale]
        if kind == DX_DS_DZ:
            dz = &t.dz[w.scale]
        if w.step and (is8 or t.one_zero):
            backward_lanes(x, dy, out, w.count, s, z, t, is8, True, False, kind, ds, dz)
        elif w.step:
            backward_lanes(x, dy, out, w.count, s, z, t, is8, True, True, kind, ds, dz)
        elif kind == DX:
            backward_lanes(x, dy, out, w.count, s, z, t, is8, False, False, kind, NULL, NULL)
        else:
            for j in range(LANES):
                sums[j] = 0
                if kind == DX_DS_DZ:
                    outside[j] = 0
            backward_run(x, dy, out, w.count, s, z, t, is8, kind, sums, outside)
            ds[0] += total(sums)
            if kind == DX_DS_DZ:
                dz[0] += total(outside)
    t.nonfinite = top >= 0x7F800000u


cdef inlined sweep_wide(Task *t) noexcept nogil:
    """Forward from float64."""
    cdef Walk w = t.walk
    cdef Py_ssize_t i
    cdef const float *s
    cdef const int32_t *z
    cdef float *out
    cdef double x
    cdef bint nonfinite = False
    while next_run(&w):
        s, z, out = &t.scale[w.scale], &t.zero[w.scale], &t.out[w.start]
        for i in range(w.count):
            x = t.x_wide[w.start + i]
            nonfinite |= not (fabs(x) <= DBL_MAX)
            if t.is8:
                round8_wide(x / <double>s[i * w.step], t.format, &x)
                out[i] = <float>x * s[i * w.step]
            else:
                decoded_wide(x, s[i * w.step], <double>(t.low - z[i * w.step]), <double>(t.high - z[i * w.step]), &out[i])
    t.nonfinite = nonfinite


cdef inlined work(Task *t, bint fused) noexcept nogil:
    if t.kind == FORWARD_WIDE:
        sweep_wide(t)
    elif t.kind == FORWARD:
        if t.is8:
            sweep(t, True, FORWARD, fused)
        else:
            sweep(t, False, FORWARD, fused)
    elif t.kind == DX:
        if t.is8:
            sweep(t, True, DX, fused)
        else:
            sweep(t, False, DX, fused)
    elif t.kind == DX_DS:
        if t.is8:
            sweep(t, True, DX_DS, fused)
        else:
            sweep(t, False, DX_DS, fused)
    else:
        sweep(t, False, DX_DS_DZ, fused)


cdef at_baseline work_baseline(Task *t) noexcept nogil:
    work(t, False)


cdef at_avx2 work_avx2(Task *t) noexcept nogil:
    work(t, True)


cdef at_avx512 work_avx512(Task *t) noexcept nogil:
    work(t, True)


cdef void run(Task *t) noexcept nogil:
    cdef int level = chosen_level()
    if level == AVX512:
        work_avx512(t)
    elif level == AVX2:
        work_avx2(t)
    else:
        work_baseline(t)


# What Python calls

cdef bint all_same(const int32_t[::1] zero) noexcept:
    cdef Py_ssize_t i
    for i in range(1, zero.shape[0]):
        if zero[i] != zero[0]:
            return False
    return True


cdef Float8 NOT_FLOAT8 = Float8(0, 0, 0)


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

    float8 : the name of a format, or None for integer codes low..high. out shares no memory with x.
    """
    cdef Task t
    t.walk = new_walk(layout)
    check_sizes(&t.walk, x.shape[0], out.shape[0], scale.shape[0], zero.shape[0])
    t.is8 = float8 is not None
    t.format = float8_of(float8) if t.is8 else NOT_FLOAT8
    if t.walk.size == 0:
        return False
    if real is float:
        t.kind, t.x = FORWARD, &x[0]
    else:
        t.kind, t.x_wide = FORWARD_WIDE, &x[0]
    t.scale, t.zero, t.low, t.high, t.out = &scale[0], &zero[0], low, high, &out[0]
    t.one_zero = all_same(zero)
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
    t.is8 = float8 is not None
    t.format = float8_of(float8) if t.is8 else NOT_FLOAT8
    if t.walk.size == 0:
        return
    t.x, t.dy, t.out, t.scale, t.zero, t.low, t.high = &x[0], &dy[0], &dx[0], &scale[0], &zero[0], low, high
    t.one_zero = all_same(zero)
    t.kind, t.ds, t.dz = DX, NULL, NULL
    if ds is not None:
        t.kind, t.ds = DX_DS, &ds[0]
    if dz is not None:
        t.kind, t.dz = DX_DS_DZ, &dz[0]
    with nogil:
        run(&t)
