# cython: boundscheck=False
"""The backward pass of fake-quantize: one pass over the data, at every granularity, at several instruction levels.

a) What the pass does to an element is a few lines at the top; the loops below them walk (`walk.pxd`); each pass is one
   `Task`, compiled once a level (`levels.pxd`).
b) Gradients of scales are float64 sums of the float32 products ``dy * d``, in one order: element i of
   a run is added to lane i mod 32; the upper half of the lanes is added to the lower one until one is left; the runs of
   a scale are added in the order of memory. Where each element of a run has a scale of its own, so has its sum.
"""

from libc.math cimport rintf
from libc.stdint cimport int32_t, uint32_t
from libc.string cimport memcpy

from qnative._core.floats cimport Encoder, encoder_of, float8_of, round_float
from qnative._core.levels cimport AVX2, AVX512, at_avx2, at_avx512, at_baseline, chosen_level, inlined
from qnative._core.walk cimport Walk, check_sizes, new_walk, next_run

cdef enum:
    LANES = 32

cdef enum Pass:
    DX        # the gradient of x alone
    DX_DS     # and of the scale
    DX_DS_DZ  # and of the zero point


cdef struct Task:
    Pass kind
    bint is8
    Walk walk
    const float *x
    const float *dy
    const float *scale
    const int32_t *zero
    bint one_zero  # all zero points are the same
    int32_t low, high
    Encoder format
    float *out
    double *ds  # sum of dy * d of each scale
    double *dz  # sum of dy of what lies outside


# Element rules

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


cdef inlined slope8(float x, float dy, float s, Encoder f, float *dx, float *d, float *beyond) noexcept nogil:
    cdef float t = x / s, c
    cdef uint32_t bits
    cdef bint inside
    memcpy(&bits, &t, 4)
    inside = (bits & 0x7FFFFFFFu) <= f.most  # ordered as the magnitudes are; NaN on top
    round_float(t, t, f, &c)
    keep(t, inside, &t)
    d[0] = c - t
    keep(dy, inside, dx)
    beyond[0] = 0


# Runs. What is constant at the call (is8, each, zeros, kind) is gone once inlined.

cdef inlined backward_lanes(
    const float *x, const float *dy, float *dx, Py_ssize_t n, const float *s, const int32_t *z, const Task *t, bint is8,
    bint each, bint zeros, Pass kind, double *ds, double *dz
) noexcept nogil:
    """dx of n elements of one scale (or of a scale each), and their part of n sums."""
    cdef Py_ssize_t j
    cdef Encoder f = t.format
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

cdef inlined sweep(Task *t, bint is8, Pass kind) noexcept nogil:
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
    while next_run(&w):
        x, out, s, z = &t.x[w.start], &t.out[w.start], &t.scale[w.scale], &t.zero[w.scale]
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


cdef inlined work(Task *t) noexcept nogil:
    if t.kind == DX:
        if t.is8:
            sweep(t, True, DX)
        else:
            sweep(t, False, DX)
    elif t.kind == DX_DS:
        if t.is8:
            sweep(t, True, DX_DS)
        else:
            sweep(t, False, DX_DS)
    else:
        sweep(t, False, DX_DS_DZ)


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

cdef bint all_same(const int32_t[::1] zero) noexcept:
    cdef Py_ssize_t i
    for i in range(1, zero.shape[0]):
        if zero[i] != zero[0]:
            return False
    return True


def fake_quantize_backward(
    const float[::1] x not None, const float[::1] dy not None, const float[::1] scale not None,
    const int32_t[::1] zero not None, tuple layout, int32_t low, int32_t high, str float8, float[::1] dx not None,
    double[::1] ds=None, double[::1] dz=None,
):
    """Write dx = dy where x is inside the range, else 0; add to ds the sums of dy * d and to dz those of dy outside.

    x, dy, dx : float32[size]; ds, dz : float64[scales], or None for what is not wanted. float8 : the name of
    a format, or None for integer codes low..high. dx may be dy.
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
    if t.is8:
        t.format = encoder_of(float8_of(float8), True)
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
