# cython: boundscheck=False
"""What is found out about arrays: ranges, how much is not finite, histograms, sums of errors.

Least and greatest values are compared as integers (`ordered`), in which -0 lies below +0 and a NaN or an infinity beyond
every number: so that neither the order of comparing nor the instruction level shows, and that two compares tell both.
"""

from cpython.mem cimport PyMem_RawFree, PyMem_RawMalloc
from libc.float cimport FLT_MAX
from libc.math cimport INFINITY, ldexp
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from qnative._core.levels cimport (
    AHEAD, AVX2, AVX512, SPAN, ask, at_avx2, at_avx512, at_baseline, chosen_level, fetch, inlined,
)
from qnative._core.pieces cimport PIECE, PyErr_CheckSignals, in_pieces, pool_limit, qn_atomic, qn_atomic_add, qn_atomic_get
from qnative._core.walk cimport Walk, new_walk, next_run, part, rows_share

ctypedef fused real:
    float
    double

ctypedef fused key:
    int32_t
    int64_t

cdef enum:
    SIDE_BY_SIDE = 16  # ends of a run that are put together when it is over

cdef int32_t INF32 = 0x7F800000
cdef int64_t INF64 = <int64_t>0x7FF << 52


cdef inlined ordered(key bits, key *result) noexcept nogil:
    """A float's bits as an integer that compares as the float does; its own inverse."""
    if key is int32_t:
        result[0] = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    else:
        result[0] = bits ^ ((bits >> 63) & <int64_t>0x7FFFFFFFFFFFFFFF)


# Ranges

cdef struct Ranges:
    Walk walk
    const int32_t *x
    const int64_t *x_wide  # else NULL
    int32_t *low           # ordered, for each thread and scale
    int32_t *high
    int64_t *low_wide
    int64_t *high_wide
    bint rows_together     # every row has the same scales
    qn_atomic nonfinite


cdef inlined widen(key bits, key *low, key *high) noexcept nogil:
    cdef key v
    ordered(bits, &v)
    low[0] = v if v < low[0] else low[0]
    high[0] = v if v > high[0] else high[0]


cdef inlined range_of_run(const key *x, Py_ssize_t n, key *low, key *high) noexcept nogil:
    cdef key lows[SIDE_BY_SIDE]
    cdef key highs[SIDE_BY_SIDE]
    cdef key lo = low[0], hi = high[0], a, b
    cdef Py_ssize_t i = 0, j
    if n >= 4 * SIDE_BY_SIDE:
        for j in range(SIDE_BY_SIDE):
            lows[j], highs[j] = lo, hi
        while i + 4 * SIDE_BY_SIDE <= n:
            ask(x + i, 2 * AHEAD, 4 * SIDE_BY_SIDE * sizeof(key))  # farther than usual: it goes through memory faster
            for j in range(SIDE_BY_SIDE):
                a, b = lows[j], highs[j]
                widen(x[i + j], &a, &b)  # written out: see below
                widen(x[i + j + SIDE_BY_SIDE], &a, &b)
                widen(x[i + j + 2 * SIDE_BY_SIDE], &a, &b)
                widen(x[i + j + 3 * SIDE_BY_SIDE], &a, &b)
                lows[j], highs[j] = a, b
            i += 4 * SIDE_BY_SIDE
        for j in range(SIDE_BY_SIDE):
            lo, hi = min(lo, lows[j]), max(hi, highs[j])
    for j in range(i, n):
        widen(x[j], &lo, &hi)
    low[0], high[0] = lo, hi


cdef inlined ranges_of_rows(const key *x, Py_ssize_t n, Py_ssize_t stride, Py_ssize_t rows, key *low, key *high) noexcept nogil:
    """Of each column; `rows` is a constant, 1 or 4, so that a column's ends are read and written once for them all."""
    cdef Py_ssize_t i, r, begin = 0, end
    cdef key lo, hi
    while begin < n:
        end = min(begin + <Py_ssize_t>(SPAN // 2), n)
        for r in range(rows):
            fetch(x + r * stride + begin, (end - begin) * sizeof(key))
        for i in range(begin, end):
            lo, hi = low[i], high[i]
            widen(x[i], &lo, &hi)
            if rows == 4:  # written out: only -O3 would unroll a loop over them, without which nothing is vectorized
                widen(x[stride + i], &lo, &hi)
                widen(x[2 * stride + i], &lo, &hi)
                widen(x[3 * stride + i], &lo, &hi)
            low[i], high[i] = lo, hi
        begin = end


cdef inlined range_pass(
    Ranges *t, const key *x, key *low, key *high, Py_ssize_t begin, Py_ssize_t end
) noexcept nogil:
    cdef Walk w = part(&t.walk, begin, end)
    cdef Py_ssize_t rows = 0, inner = t.walk.inner
    if t.rows_together:
        while begin % inner == 0 and end - begin >= 4 * inner:
            ranges_of_rows(x + begin, inner, inner, 4, low, high)
            begin += 4 * inner
        if begin == end:
            return
        w = part(&t.walk, begin, end)
    while next_run(&w):
        if w.step:
            ranges_of_rows(x + w.start, w.count, 0, 1, low + w.scale, high + w.scale)
        else:
            range_of_run(x + w.start, w.count, low + w.scale, high + w.scale)


cdef at_baseline ranges_baseline(Ranges *t, int32_t *low, int32_t *high, Py_ssize_t begin, Py_ssize_t end) noexcept nogil:
    range_pass(t, t.x, low, high, begin, end)


cdef at_avx2 ranges_avx2(Ranges *t, int32_t *low, int32_t *high, Py_ssize_t begin, Py_ssize_t end) noexcept nogil:
    range_pass(t, t.x, low, high, begin, end)


cdef at_avx512 ranges_avx512(Ranges *t, int32_t *low, int32_t *high, Py_ssize_t begin, Py_ssize_t end) noexcept nogil:
    range_pass(t, t.x, low, high, begin, end)


cdef void ranges_wide(Ranges *t, int64_t *low, int64_t *high, Py_ssize_t begin, Py_ssize_t end) noexcept nogil:
    range_pass(t, t.x_wide, low, high, begin, end)


cdef void ranges_piece(void *task, Py_ssize_t begin, Py_ssize_t end, int thread) noexcept nogil:
    cdef Ranges *t = <Ranges *>task
    cdef int level = chosen_level()
    cdef Py_ssize_t own = t.walk.scales * thread
    if t.x_wide is not NULL:
        ranges_wide(t, t.low_wide + own, t.high_wide + own, begin, end)
    elif level == AVX512:
        ranges_avx512(t, t.low + own, t.high + own, begin, end)
    elif level == AVX2:
        ranges_avx2(t, t.low + own, t.high + own, begin, end)
    else:
        ranges_baseline(t, t.low + own, t.high + own, begin, end)


cdef inlined settle(key *low, key *high, Py_ssize_t scales, int threads, key inf, bint *nonfinite) noexcept nogil:
    """Put together what the threads have found, as bits of floats; whether something is not finite."""
    cdef Py_ssize_t i
    cdef int thread
    cdef key lo, hi
    cdef key bad = 0
    for thread in range(1, threads):
        for i in range(scales):
            low[i] = min(low[i], low[thread * scales + i])
            high[i] = max(high[i], high[thread * scales + i])
    for i in range(scales):
        lo, hi = low[i], high[i]
        # A scale without elements has inf and -inf still; with one, the ends are in order.
        bad |= <key>(lo <= hi) & (<key>(hi >= inf) | <key>(lo <= ~inf))
        ordered(lo, &low[i])
        ordered(hi, &high[i])
    nonfinite[0] = bad != 0


def min_max(const real[::1] x not None, tuple layout, real[::1] low not None, real[::1] high not None):
    """Find the range of each scale's elements.

    x : real[size]; low, high : real[scales], written in full: +inf and -inf for a scale without elements. -0 counts as
    less than +0. Returns how many elements are NaN or infinite; the ranges mean nothing unless that is 0.
    """
    cdef Ranges t
    cdef Py_ssize_t i, scales
    cdef int threads = 1
    cdef bint nonfinite = False
    cdef int32_t *found = NULL
    cdef int64_t *found_wide = NULL
    memset(&t, 0, sizeof(t))
    t.walk = new_walk(layout)
    scales = t.walk.scales
    if x.shape[0] != t.walk.size or low.shape[0] != scales or high.shape[0] != scales:
        raise ValueError(f"layout of {t.walk.size} elements and {scales} scales, got {x.shape[0]} and {low.shape[0]}")
    if scales == 0:
        return 0
    t.rows_together = rows_share(&t.walk)
    # Each thread has ends of its own; where they are as many as the data, that would cost more than it brings.
    if t.walk.size > PIECE and scales <= t.walk.size // 64:
        threads = min(pool_limit(), 64)
    if real is float:
        found = <int32_t *>PyMem_RawMalloc(2 * threads * scales * 4)
        if found is NULL:
            raise MemoryError(f"ends of {scales} scales for {threads} threads")
        t.low, t.high = found, found + threads * scales
        for i in range(threads * scales):
            t.low[i], t.high[i] = INF32, ~INF32
        if t.walk.size:
            t.x = <const int32_t *>&x[0]
    else:
        found_wide = <int64_t *>PyMem_RawMalloc(2 * threads * scales * 8)
        if found_wide is NULL:
            raise MemoryError(f"ends of {scales} scales for {threads} threads")
        t.low_wide, t.high_wide = found_wide, found_wide + threads * scales
        for i in range(threads * scales):
            t.low_wide[i], t.high_wide[i] = INF64, ~INF64
        if t.walk.size:
            t.x_wide = <const int64_t *>&x[0]
    try:
        in_pieces(ranges_piece, &t, t.walk.size, 100, threads, rows_of(&t.walk))
        if real is float:
            settle(t.low, t.high, scales, threads, INF32, &nonfinite)
            memcpy(&low[0], t.low, scales * 4)
            memcpy(&high[0], t.high, scales * 4)
        else:
            settle(t.low_wide, t.high_wide, scales, threads, INF64, &nonfinite)
            memcpy(&low[0], t.low_wide, scales * 8)
            memcpy(&high[0], t.high_wide, scales * 8)
    finally:
        PyMem_RawFree(found)
        PyMem_RawFree(found_wide)
    return count_nonfinite(x) if nonfinite else 0


cdef Py_ssize_t rows_of(const Walk *w) noexcept:
    """Elements of a piece: whole rows, four at a time, where rows are walked together."""
    cdef Py_ssize_t four = 4 * w.inner
    if w.per_inner and 0 < four:
        return max(PIECE // four, 1) * four
    return PIECE


cdef struct Count:
    const float *x
    const double *x_wide
    qn_atomic bad


cdef void count_piece(void *task, Py_ssize_t begin, Py_ssize_t end, int thread) noexcept nogil:
    cdef Count *t = <Count *>task
    cdef Py_ssize_t i, bad = 0
    cdef uint32_t bits
    cdef uint64_t wide
    if t.x is not NULL:
        for i in range(begin, end):
            memcpy(&bits, &t.x[i], 4)
            bad += (bits & 0x7FFFFFFFu) >= 0x7F800000u
    else:
        for i in range(begin, end):
            memcpy(&wide, &t.x_wide[i], 8)
            bad += (wide << 1) >= <uint64_t>0x7FF << 53
    qn_atomic_add(&t.bad, bad)


def count_nonfinite(const real[::1] x not None):
    """Count the NaNs and infinities in x : real[n]."""
    cdef Count t
    memset(&t, 0, sizeof(t))
    if x.shape[0]:
        if real is float:
            t.x = &x[0]
        else:
            t.x_wide = &x[0]
        in_pieces(count_piece, &t, x.shape[0], 200)
    return qn_atomic_get(&t.bad)


# Histograms

cdef enum:
    SIDE_BITS = 13
    SIDE = 1 << SIDE_BITS  # bins of a side
    SPARE = 2 * SIDE      # where zeros are counted, in turns, and then what is not finite
    ZEROS = 16
    SLOTS = SPARE + ZEROS + 1
    BLOCK = 128           # values whose bins are found while those of the ones before are counted
    WORDS = 8
    CHUNK = 4 * WORDS     # bins looked at together for whether they are empty
    FEW = 2048            # values for which counters of 16 bits do not pay
    MANY = 65535 // BLOCK * BLOCK  # values after which such a counter might be full


cdef struct Bins:
    float first, second   # the product of both is bins to a unit: a power of two, of which each is a root
    double first_wide, second_wide


cdef struct Ends:
    bint sought           # or it is known that all values have bins
    double low, high      # of what is finite so far; inf and -inf of nothing
    double limit          # magnitudes for which there are bins are less
    Py_ssize_t bad        # NaN, infinities


cdef bint widen_ends(const real *x, Py_ssize_t n, Ends *ends) noexcept nogil:
    """Return whether there are bins for all that is finite."""
    cdef double low = ends.low, high = ends.high, v
    cdef Py_ssize_t i
    for i in range(n):
        v = x[i]
        if -INFINITY < v < INFINITY:
            low, high = min(low, v), max(high, v)
    ends.low, ends.high = low, high
    return -low < ends.limit and high < ends.limit


cdef inlined slots_of(
    const float *x, Py_ssize_t n, Bins b, float low, float high, uint16_t *slots, uint32_t *beyond
) noexcept nogil:
    """Find the counters of values; whether one lies beyond low or high, or is a NaN, whose counter is not found."""
    cdef uint32_t i, bits, magnitude, out = 0
    cdef float size
    for i in range(<uint32_t>n):
        memcpy(&bits, &x[i], 4)
        magnitude = bits & 0x7FFFFFFFu
        memcpy(&size, &magnitude, 4)
        out |= <uint32_t>(not x[i] >= low) | <uint32_t>(not x[i] <= high)
        size = size * b.first * b.second
        size = size if size < <float>(SIDE - 1) else <float>(SIDE - 1)  # and NaN
        magnitude = <uint32_t><int32_t>size | (~bits >> 18 & SIDE)
        slots[i] = <uint16_t>magnitude if bits << 1 != 0 else <uint16_t>(<uint16_t>SPARE | (<uint16_t>i & <uint16_t>(ZEROS - 1)))
    beyond[0] = out


cdef void put_aside(const float *x, Py_ssize_t n, uint16_t *slots) noexcept nogil:
    """What is not finite."""
    cdef Py_ssize_t i
    for i in range(n):
        if not -FLT_MAX <= x[i] <= FLT_MAX:
            slots[i] = SPARE + ZEROS


cdef inlined count_slots(const uint16_t *slots, uint16_t *few) noexcept nogil:
    """Of a block."""
    cdef Py_ssize_t k
    cdef uint64_t four
    for k in range(BLOCK // 4):  # loads and stores are what there are few of
        memcpy(&four, &slots[4 * k], 8)
        few[four & 0xFFFF] += 1
        few[four >> 16 & 0xFFFF] += 1
        few[four >> 32 & 0xFFFF] += 1
        few[four >> 48] += 1


cdef inlined spill(uint16_t *few, int64_t *counts, int64_t *zeros, Ends *ends) noexcept nogil:
    """Add small counters to the counts and clear them. Most bins are empty, most of the time."""
    cdef Py_ssize_t i = 0, k
    cdef uint64_t some[WORDS]
    cdef uint64_t filled
    while i < SPARE:
        memcpy(some, few + i, sizeof(some))
        filled = 0
        for k in range(WORDS):
            filled |= some[k]
        if filled:
            for k in range(CHUNK):
                counts[i + k] += few[i + k]
            memset(few + i, 0, sizeof(some))
        i += CHUNK
    for i in range(SPARE, SPARE + ZEROS):
        zeros[0] += few[i]
    ends.bad += few[SPARE + ZEROS]
    memset(few + SPARE, 0, (SLOTS - SPARE) * sizeof(uint16_t))


cdef inlined tally(
    const float *x, Py_ssize_t n, Bins b, uint16_t *few, int64_t *counts, int64_t *zeros, Ends *ends, Py_ssize_t *done
) noexcept nogil:
    """Count whole blocks, MANY values at most, up to one for which there are no bins. The vectors of a block and the counters of the one
    before have little to do with each other."""
    cdef uint16_t slots[2][BLOCK]
    cdef float low = -FLT_MAX, high = FLT_MAX
    cdef uint32_t beyond
    cdef Py_ssize_t i = 0
    if ends.sought:
        low, high = <float>ends.low, <float>ends.high
    while i < n:
        fetch(x + i, BLOCK * sizeof(float))
        slots_of(x + i, BLOCK, b, low, high, slots[i // BLOCK & 1], &beyond)
        if beyond:
            if ends.sought:
                if not widen_ends(x + i, BLOCK, ends):
                    break
                low, high = <float>ends.low, <float>ends.high
            put_aside(x + i, BLOCK, slots[i // BLOCK & 1])
        if i:
            count_slots(slots[(i // BLOCK & 1) ^ 1], few)
        i += BLOCK
    done[0] = i
    if i:
        count_slots(slots[(i // BLOCK & 1) ^ 1], few)
        spill(few, counts, zeros, ends)


cdef at_baseline tally_baseline(
    const float *x, Py_ssize_t n, Bins b, uint16_t *few, int64_t *counts, int64_t *zeros, Ends *ends, Py_ssize_t *done
) noexcept nogil:
    tally(x, n, b, few, counts, zeros, ends, done)


cdef at_avx2 tally_avx2(
    const float *x, Py_ssize_t n, Bins b, uint16_t *few, int64_t *counts, int64_t *zeros, Ends *ends, Py_ssize_t *done
) noexcept nogil:
    tally(x, n, b, few, counts, zeros, ends, done)


cdef at_avx512 tally_avx512(
    const float *x, Py_ssize_t n, Bins b, uint16_t *few, int64_t *counts, int64_t *zeros, Ends *ends, Py_ssize_t *done
) noexcept nogil:
    tally(x, n, b, few, counts, zeros, ends, done)


cdef at_baseline slots_baseline(const float *x, Py_ssize_t n, Bins b, uint16_t *slots, uint32_t *bad) noexcept nogil:
    slots_of(x, n, b, -FLT_MAX, FLT_MAX, slots, bad)


cdef at_avx2 slots_avx2(const float *x, Py_ssize_t n, Bins b, uint16_t *slots, uint32_t *bad) noexcept nogil:
    slots_of(x, n, b, -FLT_MAX, FLT_MAX, slots, bad)


cdef at_avx512 slots_avx512(const float *x, Py_ssize_t n, Bins b, uint16_t *slots, uint32_t *bad) noexcept nogil:
    slots_of(x, n, b, -FLT_MAX, FLT_MAX, slots, bad)


cdef void slots_wide(const double *x, Py_ssize_t n, Bins b, uint16_t *slots) noexcept nogil:
    cdef Py_ssize_t i
    cdef double size
    cdef uint64_t bits
    cdef uint32_t slot
    for i in range(n):
        memcpy(&bits, &x[i], 8)
        size = (-x[i] if x[i] < 0 else x[i]) * b.first_wide * b.second_wide
        size = size if size < SIDE - 1 else SIDE - 1
        slot = <uint32_t><int32_t>size + (SIDE - (<uint32_t>(bits >> 63) << 13))
        slot = slot if bits << 1 != 0 else SPARE + <uint32_t>(i & (ZEROS - 1))
        slots[i] = <uint16_t>(slot if bits << 1 < <uint64_t>0x7FF << 53 else SPARE + ZEROS)


cdef void tally_wide(
    const double *x, Py_ssize_t n, Bins b, uint16_t *few, int64_t *counts, int64_t *zeros, Ends *ends, Py_ssize_t *done
) noexcept nogil:
    cdef uint16_t slots[BLOCK]
    cdef Py_ssize_t i = 0
    while i < n:
        if ends.sought and not widen_ends(x + i, BLOCK, ends):
            break
        slots_wide(x + i, BLOCK, b, slots)
        count_slots(slots, few)
        i += BLOCK
    done[0] = i
    spill(few, counts, zeros, ends)


cdef void find_slots(const real *x, Py_ssize_t n, Bins b, uint16_t *slots, int level) noexcept nogil:
    cdef uint32_t bad
    if real is double:
        slots_wide(x, n, b, slots)
    else:
        if level == AVX512:
            slots_avx512(x, n, b, slots, &bad)
        elif level == AVX2:
            slots_avx2(x, n, b, slots, &bad)
        else:
            slots_baseline(x, n, b, slots, &bad)
        if bad:
            put_aside(x, n, slots)


cdef Py_ssize_t count_each(
    const real *x, Py_ssize_t n, Bins b, int64_t *counts, int64_t *zeros, Ends *ends, int level
) noexcept nogil:
    """Without small counters."""
    cdef uint16_t slots[4 * BLOCK]
    cdef Py_ssize_t i = 0, k, size
    while i < n:
        size = min(n - i, <Py_ssize_t>(4 * BLOCK))
        if ends.sought and not widen_ends(x + i, size, ends):
            break
        find_slots(x + i, size, b, slots, level)
        for k in range(size):
            if slots[k] < SPARE:
                counts[slots[k]] += 1
            elif slots[k] < SPARE + ZEROS:
                zeros[0] += 1
            else:
                ends.bad += 1
        i += size
    return i


cdef Py_ssize_t count_values(
    const real *x, Py_ssize_t n, Bins b, uint16_t *few, int64_t *counts, int64_t *zeros, Ends *ends
) noexcept nogil:
    """Return how many were counted: not all if there are some for which there are no bins."""
    cdef Py_ssize_t i = 0, size, done, whole = n // BLOCK * BLOCK if n > FEW else 0
    cdef int level = chosen_level()
    while i < whole:
        size = min(whole - i, <Py_ssize_t>MANY)
        if real is double:
            tally_wide(x + i, size, b, few, counts, zeros, ends, &done)
        elif level == AVX512:
            tally_avx512(x + i, size, b, few, counts, zeros, ends, &done)
        elif level == AVX2:
            tally_avx2(x + i, size, b, few, counts, zeros, ends, &done)
        else:
            tally_baseline(x + i, size, b, few, counts, zeros, ends, &done)
        i += done
        if done < size:
            return i
    return i + count_each(x + i, n - i, b, counts, zeros, ends, level)


cdef double power_of_two(int64_t exponent) noexcept nogil:
    cdef uint64_t bits = <uint64_t>(exponent + 1023) << 52
    cdef double result
    memcpy(&result, &bits, 8)
    return result


cdef Bins bins_of(int64_t power, bint wide) noexcept nogil:
    """The power of two in two factors, which no float overflows by alone; beyond its range zeros are all that there is."""
    cdef Bins b
    cdef int64_t most = 1022 if wide else 126, half
    power = min(max(power, -2 * most), 2 * most)
    half = power >> 1
    b.first_wide, b.second_wide = power_of_two(half), power_of_two(power - half)
    b.first, b.second = <float>b.first_wide, <float>b.second_wide
    return b


cdef uint16_t *new_counters() except NULL:
    cdef uint16_t *few = <uint16_t *>PyMem_RawMalloc(SLOTS * sizeof(uint16_t))
    if few is NULL:
        raise MemoryError("histogram: 32 KiB of counters")
    memset(few, 0, SLOTS * sizeof(uint16_t))
    return few


def histogram(
    const real[:, ::1] x not None, const int64_t[::1] power not None, int64_t[:, :, ::1] counts not None,
    int64_t[::1] zeros not None,
):
    """Count values by sign and magnitude: bin i of a side is of i <= abs(x) * 2**power < i + 1.

    x : real[channels, n]; power : int64[channels]; counts : int64[channels, 2, 8192], the negative side first, is added to,
    as is zeros : int64[channels], which has the exact zeros. What lies beyond the last bin is counted in it; NaN and
    infinities are not counted.
    """
    cdef Py_ssize_t c, channels = x.shape[0], n = x.shape[1], i, step = 1 << 20
    cdef uint16_t *few
    cdef Ends ends
    ends.sought, ends.bad = False, 0
    if power.shape[0] != channels or zeros.shape[0] != channels or counts.shape[0] != channels:
        raise ValueError(f"histogram: {channels} channels in x, not so many elsewhere")
    if counts.shape[1] != 2 or counts.shape[2] != SIDE:
        raise ValueError(f"histogram: counts must be [{channels}, 2, {SIDE}]")
    if channels == 0 or n == 0:
        return
    few = new_counters()
    try:
        for i in range(0, n, step):
            with nogil:
                for c in range(channels):
                    count_values(
                        &x[c, i], min(n - i, step), bins_of(power[c], real is double), few, &counts[c, 0, 0], &zeros[c], &ends
                    )
            PyErr_CheckSignals()
    finally:
        PyMem_RawFree(few)


def histogram_while_it_fits(
    const real[::1] x not None, int64_t power, int64_t[:, ::1] counts not None, int64_t[::1] zeros not None,
    double[::1] ends not None,
):
    """Count values of one channel, x : real[n], as `histogram` does, up to those beyond the last bin.

    counts : int64[2, 8192] and zeros : int64[1] are added to. ends : float64[2], least and greatest, are widened to all finite
    values that were looked at, so also to those beyond the last bin. Returns how many values are done with, and how many of
    them are NaN or infinite.
    """
    cdef Py_ssize_t i = 0, done, size, n = x.shape[0], step = 1 << 20
    cdef Ends found
    cdef uint16_t *few
    if counts.shape[0] != 2 or counts.shape[1] != SIDE or zeros.shape[0] != 1 or ends.shape[0] != 2:
        raise ValueError(f"histogram: counts must be [2, {SIDE}], zeros [1] and ends [2]")
    found.sought, found.low, found.high, found.bad = True, ends[0], ends[1], 0
    found.limit = ldexp(1.0, <int>min(max(SIDE_BITS - power, <int64_t>-1100), <int64_t>1100))
    few = new_counters()
    try:
        while i < n:
            size = min(n - i, step)
            with nogil:
                done = count_values(&x[i], size, bins_of(power, real is double), few, &counts[0, 0], &zeros[0], &found)
            i += done
            if done < size:
                break
            PyErr_CheckSignals()
    finally:
        PyMem_RawFree(few)
    ends[0], ends[1] = found.low, found.high
    return i, found.bad


def histogram_of_codes(const uint8_t[::1] codes not None, int64_t[::1] out not None):
    """Add the count of each byte of codes : uint8[n] to out : int64[256]."""
    cdef Py_ssize_t i
    if out.shape[0] != 256:
        raise ValueError("histogram_of_codes: out must have 256 entries")
    with nogil:
        for i in range(codes.shape[0]):
            out[codes[i]] += 1


# Error measures: float64 sums, no temporary arrays

def squared_sums(const real[::1] x not None, const real[::1] y not None):
    """Return (sum of x^2, sum of (x - y)^2, sum of y^2, sum of x*y, max |x - y|) over x, y : [n], in float64."""
    cdef Py_ssize_t i, n = x.shape[0]
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
