# cython: boundscheck=False
"""Quantize and dequantize: one element rule each, one walk over the scales, at several instruction levels.

a) Every granularity is one walk (`walk.pxd`), which a long array is given in pieces (`pieces.pxd`).
b) Python has checked and coerced; these functions check again every size that guards a pointer.
c) A batch is what is done in one loop (`next_batch`): runs of whole vectors, or other elements with their parameters laid
   out, an entry for each.
d) The loops are over 64 elements (or 32), known to the compiler, which needs neither a beginning nor an end; what is left
   over is done as 64 of which some are not wanted.
e) The rules clamp in floating point, so that no conversion overflows. float64 input has plain loops of its own.
"""

from libc.float cimport DBL_MAX
from libc.math cimport fabs, fmaf, rint, rintf
from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t
from libc.string cimport memcpy, memset

from qnative._core.division cimport divide_by_multiplying, divided
from qnative._core.floats cimport (
    Decoder, Encoder, Format, decode_code, decoder_of, encode_float, encoder_of, format_of, to_odd,
)
from qnative._core.levels cimport (
    AHEAD, AVX2, AVX512, ask, at_avx2, at_avx512, at_baseline, chosen_level, inlined, own_bytes, own_floats,
)
from qnative._core.pieces cimport PIECE, in_pieces, qn_atomic, qn_atomic_add, qn_atomic_get
from qnative._core.walk cimport Walk, by_columns, check_sizes, new_walk, next_run, next_start, part, rows_share, skip_runs

ctypedef fused real:
    float
    double

cdef enum:
    WIDE = 64     # elements of a step: a vector of codes, at least
    HALF = 32     # or of a step within groups of such a size, the usual one
    LONG = 256    # a run of so many elements is worth a loop of its own, what is left over another
    BATCH = 1024  # elements whose parameters are laid out: they stay in the L1 cache
    CHUNK = 16    # entries that are laid out at a time, some of them perhaps beyond what is asked for
    ROWS = 16     # of a piece, for which the parameters of columns are laid out once
    PICOSECONDS = 300  # an element takes, roughly


cdef enum Pass:
    QUANTIZE
    QUANTIZE8
    DEQUANTIZE
    DEQUANTIZE8


cdef struct Task:
    Pass which
    Walk walk
    const float *x
    const double *x_wide  # else NULL
    const uint8_t *codes
    const float *scale
    const int32_t *zero
    int32_t low, high
    int32_t flip  # 0x80 where codes are int8: (code ^ 0x80) - 0x80 reads a byte as one
    Encoder encoder
    Decoder decoder
    uint8_t *codes_out
    float *out
    qn_atomic nonfinite
    qn_atomic beyond


cdef struct Parameters:  # an entry for each element of a batch, or for each of its runs
    float scale[BATCH + WIDE]
    float reciprocal[BATCH + WIDE]
    float least[BATCH + WIDE]  # x is clamped to these before it is divided by multiplying, else its quotient is
    float most[BATCH + WIDE]
    uint8_t zero_byte[BATCH + WIDE]
    int32_t zero[BATCH + WIDE]  # of these two, what the rule needs


cdef struct Batch:
    Walk walk
    # what of the walk is in no batch yet: so many runs of one size, of scales that follow each other
    Py_ssize_t start, runs, size, scale
    # the batch
    Py_ssize_t begin, count
    Py_ssize_t span     # elements of an entry of parameters: 1, or a multiple of WIDE, or `halves`, of HALF
    bint halves
    Py_ssize_t ahead    # how far ahead lies what is worked on next, in elements
    Py_ssize_t columns  # the first scale of the parameters that are laid out, in a walk by columns, else -1
    bint by_multiplying


# Element rules: of WIDE elements, or `width`, the parameters being p's entry `at` or (`each`) an entry each, from there. What is not
# finite makes a NaN of a lane of `tracks`.

cdef inlined track(float x, bint fused, float *lane) noexcept nogil:
    if fused:
        lane[0] = fmaf(x, 0, lane[0])
    else:
        lane[0] += x * <float>0


cdef inlined to_codes(
    const float *x, own_bytes out, const Parameters *p, Py_ssize_t at, Py_ssize_t width, bint by_multiplying, bint each,
    bint fused, own_floats tracks
) noexcept nogil:
    """clamp(rint(x / s) + z, low, high); NaN becomes the zero point."""
    cdef Py_ssize_t i
    cdef float scale = p.scale[at], reciprocal = p.reciprocal[at], least = p.least[at], most = p.most[at], v, q
    cdef uint8_t zero = p.zero_byte[at]
    cdef uint32_t bits
    for i in range(width):
        if each:
            scale, reciprocal, zero = p.scale[at + i], p.reciprocal[at + i], p.zero_byte[at + i]
            least, most = p.least[at + i], p.most[at + i]
        v = x[i]
        track(v, fused, &tracks[i])
        v = v if v == v else 0
        if by_multiplying:  # clamped before, which is the same: the ends are codes, and divide to within half of one
            v = least if v < least else v
            v = most if v > most else v
            divided(v, scale, reciprocal, True, &q)
        else:
            q = rintf(v / scale)
            q = least if q < least else q
            q = most if q > most else q
        q += <float>12582912  # 1.5 * 2^23, whose last place is 1 and whose last byte 0: rounds to even
        memcpy(&bits, &q, 4)
        out[i] = <uint8_t>(<uint8_t>bits + zero)


cdef inlined to_codes8(
    const float *x, own_bytes out, const Parameters *p, Py_ssize_t at, Encoder e, bint each, bint fused,
    own_floats tracks
) noexcept nogil:
    """encode(x / s), saturating; NaN becomes 0. Dividing takes less long than what multiplying instead would need besides."""
    cdef Py_ssize_t i
    cdef float scale = p.scale[at], v
    cdef uint32_t bits
    for i in range(WIDE):
        if each:
            scale = p.scale[at + i]
        v = x[i]
        track(v, fused, &tracks[i])
        v = v if v == v else 0
        encode_float(v / scale, e, False, False, False, False, &bits)
        out[i] = <uint8_t>bits


cdef inlined from_codes(
    const uint8_t *codes, own_floats out, const Parameters *p, Py_ssize_t at, int32_t flip, int32_t low, bint each,
    own_bytes largest
) noexcept nogil:
    """(code - z) * s; a lane of `largest` gets the largest code, less the lowest that there may be."""
    cdef Py_ssize_t i
    cdef uint8_t above
    cdef float scale = p.scale[at]
    cdef int32_t zero = p.zero[at] + flip
    for i in range(WIDE):
        if each:
            scale, zero = p.scale[at + i], p.zero[at + i] + flip
        out[i] = <float>((codes[i] ^ flip) - zero) * scale
        above = <uint8_t>(codes[i] - low)
        largest[i] = above if above > largest[i] else largest[i]


cdef inlined from_codes8(
    const uint8_t *codes, own_floats out, const Parameters *p, Py_ssize_t at, Decoder d, bint each
) noexcept nogil:
    cdef Py_ssize_t i
    cdef float scale = p.scale[at], v
    for i in range(WIDE):
        if each:
            scale = p.scale[at + i]
        decode_code(codes[i], d, False, False, False, &v)
        out[i] = v * scale


# Batches

cdef inlined parameters_of(
    const Task *t, const float *s, const int32_t *z, bint encoding, bint by_multiplying, float *scale, float *reciprocal,
    float *least, float *most
) noexcept nogil:
    cdef float unit = s[0] if by_multiplying else <float>1
    scale[0] = s[0]
    if encoding:
        reciprocal[0] = <float>1 / s[0]
        least[0], most[0] = <float>(t.low - z[0]) * unit, <float>(t.high - z[0]) * unit


cdef inlined lay_each(
    const Task *t, Parameters *p, Py_ssize_t at, Py_ssize_t n, const float *s, const int32_t *z, bint encoding,
    bint by_multiplying
) noexcept nogil:
    """Lay out n sets of parameters as entries at .. at + n - 1."""
    cdef Py_ssize_t i
    for i in range(n):
        parameters_of(
            t, s + i, z + i, encoding, by_multiplying, &p.scale[at + i], &p.reciprocal[at + i], &p.least[at + i],
            &p.most[at + i],
        )
        if encoding:
            p.zero_byte[at + i] = <uint8_t>z[i]
        else:
            p.zero[at + i] = z[i]


cdef inlined lay_groups(
    const Task *t, Parameters *p, Py_ssize_t at, Py_ssize_t n, Py_ssize_t size, const float *s, const int32_t *z,
    bint encoding, bint by_multiplying
) noexcept nogil:
    """The same, each of them for so many elements, an entry an element."""
    cdef Py_ssize_t g, i, j
    cdef float scale, reciprocal = 0, least = 0, most = 0
    for g in range(n):
        parameters_of(t, s + g, z + g, encoding, by_multiplying, &scale, &reciprocal, &least, &most)
        i = at + g * size
        while i < at + (g + 1) * size:
            for j in range(CHUNK):
                p.scale[i + j] = scale
                if encoding:
                    p.reciprocal[i + j], p.least[i + j], p.most[i + j] = reciprocal, least, most
                    p.zero_byte[i + j] = <uint8_t>z[g]
                else:
                    p.zero[i + j] = z[g]
            i += CHUNK


cdef inlined lay_rest(Parameters *p, Py_ssize_t at) noexcept nogil:
    """Entries beyond a batch, for elements that nobody asked for: a whole vector is worked on."""
    cdef Py_ssize_t i
    for i in range(at, at + WIDE):
        p.scale[i], p.reciprocal[i], p.least[i], p.most[i], p.zero_byte[i], p.zero[i] = 1, 1, 0, 0, 0, 0


cdef inlined next_batch(const Task *t, Batch *b, Parameters *p, bint encoding, bint fused, bint *found) noexcept nogil:
    """Find what can be done in one loop, and lay out its parameters; `found` is False when all is done.

    encoding : to integers. fused : whether there are fused multiply-adds.
    """
    cdef Walk *w = &b.walk
    cdef Py_ssize_t n, taken
    cdef const float *s
    cdef const int32_t *z
    cdef bint apart, fast = False
    b.count, b.ahead, found[0] = 0, AHEAD // 4, True
    while True:
        if not b.runs:
            if not next_run(w):
                found[0] = b.count > 0
                return
            b.start, b.scale, b.runs, b.size = w.start, w.scale, 1, w.count
            if w.step:
                b.runs, b.size = w.count, 1
            elif w.count < LONG or w.count % WIDE == 0:
                b.runs += skip_runs(w, BATCH)
        if w.tile and w.scale == b.columns:  # whose parameters are there
            b.begin, b.count, b.runs, b.ahead = w.start, w.count, 0, next_start(w) - w.start
            return
        # a loop with an entry for each run
        b.halves = encoding and b.size < LONG and b.size % WIDE != 0 and b.size % HALF == 0
        apart = b.size >= LONG or b.size % WIDE == 0 or b.halves
        n = min(b.runs, <Py_ssize_t>BATCH if apart else (BATCH - b.count) // b.size)
        if b.count and (apart or n == 0 or b.start != b.begin + b.count):
            return
        s, z = &t.scale[b.scale], &t.zero[b.scale]
        if fused and encoding:
            divide_by_multiplying(s, n, &fast)
        if b.count and fast != b.by_multiplying:
            return
        if not b.count:
            b.begin, b.by_multiplying, b.columns = b.start, fast, -1
        if apart or b.size == 1:
            lay_each(t, p, b.count, n, s, z, encoding, fast)
        else:
            lay_groups(t, p, b.count, n, b.size, s, z, encoding, fast)
        b.span = 1 if not apart else b.size if b.halves else b.size // WIDE * WIDE
        taken = n * (b.span if apart else b.size)
        b.count += taken
        b.start += taken
        if apart and b.span < b.size:
            b.size -= b.span
        else:
            b.runs -= n
            b.scale += n
        if w.tile:
            b.columns, b.ahead = w.scale, next_start(w) - w.start
        if w.tile or apart:
            return


cdef inlined encode_step(
    const Task *t, const float *x, uint8_t *out, const Parameters *p, Py_ssize_t at, Py_ssize_t width, bint is8,
    bint by_multiplying, bint each, bint fused, float *tracks
) noexcept nogil:
    if is8:
        to_codes8(x, out, p, at, t.encoder, each, fused, tracks)
    else:
        to_codes(x, out, p, at, width, by_multiplying, each, fused, tracks)


cdef inlined encode_batch(
    const Task *t, const Batch *b, Parameters *p, Py_ssize_t width, bint is8, bint by_multiplying, bint each, bint fused,
    float *tracks
) noexcept nogil:
    cdef const float *x = t.x + b.begin
    cdef uint8_t *out = t.codes_out + b.begin
    cdef Py_ssize_t i = 0, entry = 0, end, rest
    cdef float values[WIDE]
    cdef uint8_t codes[WIDE]
    cdef const float *x_at
    cdef uint8_t *out_at
    while i < b.count:
        end = b.count if each else i + b.span
        while i < end:
            ask(x + i, b.ahead * 4, width * 4)
            ask(out + i, b.ahead, width)
            rest, x_at, out_at = b.count - i, x + i, out + i
            if each and rest < WIDE:
                memset(values, 0, sizeof(values))
                memcpy(values, x_at, rest * 4)
                lay_rest(p, b.count)
                x_at, out_at = values, codes
            encode_step(t, x_at, out_at, p, i if each else entry, width, is8, by_multiplying, each, fused, tracks)
            if each and rest < WIDE:
                memcpy(out + i, codes, rest)
            i += width
        entry += 1


cdef inlined decode_step(
    const Task *t, const uint8_t *codes, float *out, const Parameters *p, Py_ssize_t at, bint is8, bint each,
    uint8_t *largest
) noexcept nogil:
    if is8:
        from_codes8(codes, out, p, at, t.decoder, each)
    else:
        from_codes(codes, out, p, at, t.flip, t.low, each, largest)


cdef inlined decode_batch(
    const Task *t, const Batch *b, Parameters *p, bint is8, bint each, uint8_t *largest
) noexcept nogil:
    cdef const uint8_t *codes = t.codes + b.begin
    cdef float *out = t.out + b.begin
    cdef Py_ssize_t i = 0, entry = 0, end, rest
    cdef float values[WIDE]
    cdef uint8_t some[WIDE]
    cdef const uint8_t *codes_at
    cdef float *out_at
    while i < b.count:
        end = b.count if each else i + b.span
        while i < end:
            ask(codes + i, b.ahead, WIDE)
            ask(out + i, b.ahead * 4, WIDE * 4)
            rest, codes_at, out_at = b.count - i, codes + i, out + i
            if each and rest < WIDE:
                memset(some, 0, sizeof(some))
                memcpy(some, codes_at, rest)
                lay_rest(p, b.count)
                codes_at, out_at = some, values
            decode_step(t, codes_at, out_at, p, i if each else entry, is8, each, largest)
            if each and rest < WIDE:
                memcpy(out + i, values, rest * 4)
            i += WIDE
        entry += 1


# Passes: a batch after the other

cdef inlined note(Task *t, float *tracks) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(1, WIDE):
        tracks[0] += tracks[i]
    if tracks[0] != 0:
        qn_atomic_add(&t.nonfinite, 1)


cdef inlined note_codes(Task *t, uint8_t *largest) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(1, WIDE):
        largest[0] = max(largest[0], largest[i])
    if largest[0] > t.high - t.low:
        qn_atomic_add(&t.beyond, 1)


cdef inlined quantize_pass(Task *t, Batch *b, Parameters *p, bint fused) noexcept nogil:
    cdef float tracks[WIDE]
    cdef bint found
    memset(tracks, 0, sizeof(tracks))
    while True:
        next_batch(t, b, p, True, fused, &found)
        if not found:
            break
        if fused and b.by_multiplying:
            if b.span == 1:
                encode_batch(t, b, p, WIDE, False, True, True, fused, tracks)
            elif b.halves:
                encode_batch(t, b, p, HALF, False, True, False, fused, tracks)
            else:
                encode_batch(t, b, p, WIDE, False, True, False, fused, tracks)
        elif b.span == 1:
            encode_batch(t, b, p, WIDE, False, False, True, fused, tracks)
        elif b.halves:
            encode_batch(t, b, p, HALF, False, False, False, fused, tracks)
        else:
            encode_batch(t, b, p, WIDE, False, False, False, fused, tracks)
    note(t, tracks)


cdef inlined other_pass(Task *t, Batch *b, Parameters *p, bint fused) noexcept nogil:
    """Those that need scales and zero points alone."""
    cdef float tracks[WIDE]
    cdef uint8_t largest[WIDE]
    cdef bint found
    memset(tracks, 0, sizeof(tracks))
    memset(largest, 0, sizeof(largest))
    while True:
        next_batch(t, b, p, False, False, &found)
        if not found:
            break
        if t.which == QUANTIZE8:
            if b.span == 1:
                encode_batch(t, b, p, WIDE, True, False, True, fused, tracks)
            else:
                encode_batch(t, b, p, WIDE, True, False, False, fused, tracks)
        elif t.which == DEQUANTIZE:
            if b.span == 1:
                decode_batch(t, b, p, False, True, largest)
            else:
                decode_batch(t, b, p, False, False, largest)
        elif b.span == 1:
            decode_batch(t, b, p, True, True, largest)
        else:
            decode_batch(t, b, p, True, False, largest)
    note(t, tracks)
    note_codes(t, largest)


cdef inlined work(Task *t, Walk w, bint fused) noexcept nogil:
    """`fused`: whether there are fused multiply-adds."""
    cdef Batch b
    cdef Parameters p
    memset(&b, 0, sizeof(b))
    b.walk, b.columns = w, -1
    if t.which == QUANTIZE:
        quantize_pass(t, &b, &p, fused)
    else:
        other_pass(t, &b, &p, fused)


cdef at_baseline work_baseline(Task *t, Walk w) noexcept nogil:
    work(t, w, False)


cdef at_avx2 work_avx2(Task *t, Walk w) noexcept nogil:
    work(t, w, True)


cdef at_avx512 work_avx512(Task *t, Walk w) noexcept nogil:
    work(t, w, True)


cdef void work_wide(Task *t, Py_ssize_t begin, Py_ssize_t end) noexcept nogil:
    """From float64: the quotient is one, and rounded to a code once."""
    cdef Walk w = part(&t.walk, begin, end)
    cdef Py_ssize_t i, k
    cdef double x, lo, hi
    cdef float quotient
    cdef uint32_t code
    cdef bint nonfinite = False
    while next_run(&w):
        for i in range(w.count):
            k = w.scale + i * w.step
            x = t.x_wide[w.start + i]
            nonfinite |= not (fabs(x) <= DBL_MAX)
            x = x / <double>t.scale[k]
            x = x if x == x else 0
            if t.which == QUANTIZE8:
                to_odd(x, &quotient)
                encode_float(quotient, t.encoder, False, False, False, False, &code)
                t.codes_out[w.start + i] = <uint8_t>code
            else:
                lo, hi = <double>(t.low - t.zero[k]), <double>(t.high - t.zero[k])
                x = rint(x)
                x = lo if x < lo else x
                x = hi if x > hi else x
                t.codes_out[w.start + i] = <uint8_t>(<int32_t>x + t.zero[k])
    if nonfinite:
        qn_atomic_add(&t.nonfinite, 1)


cdef void piece(void *task, Py_ssize_t begin, Py_ssize_t end, int thread) noexcept nogil:
    cdef Task *t = <Task *>task
    cdef int level = chosen_level()
    if t.x_wide is not NULL:
        work_wide(t, begin, end)
    elif level == AVX512:
        work_avx512(t, walk_over(&t.walk, begin, end))
    elif level == AVX2:
        work_avx2(t, walk_over(&t.walk, begin, end))
    else:
        work_baseline(t, walk_over(&t.walk, begin, end))


cdef Walk walk_over(const Walk *w, Py_ssize_t begin, Py_ssize_t end) noexcept nogil:
    return by_columns(w, begin, end, BATCH) if rows_share(w) else part(w, begin, end)


cdef int run_pieces(Task *t) except -1:
    cdef Py_ssize_t inner = t.walk.inner, step = PIECE
    if rows_share(&t.walk):  # whole rows
        step = max(PIECE // inner, min(<Py_ssize_t>ROWS, ROWS * PIECE // inner), 1) * inner
    return in_pieces(piece, t, t.walk.size, PICOSECONDS, 1 << 10, step)


# What Python calls

def quantize(
    const real[::1] x not None, const float[::1] scale not None, const int32_t[::1] zero not None, tuple layout,
    int32_t low, int32_t high, uint8_t[::1] out not None,
):
    """Write clamp(rint(x / scale) + zero, low, high) as one byte each: out : uint8[size], int8's bytes where signed.

    NaN becomes the zero point. Returns whether x has a NaN or an infinity. out shares no memory with x.
    """
    cdef Task t
    memset(&t, 0, sizeof(t))
    t.walk = new_walk(layout)
    check_sizes(&t.walk, x.shape[0], out.shape[0], scale.shape[0], zero.shape[0])
    if t.walk.size == 0:
        return False
    if real is float:
        t.x = &x[0]
    else:
        t.x_wide = &x[0]
    t.which, t.scale, t.zero, t.low, t.high, t.codes_out = QUANTIZE, &scale[0], &zero[0], low, high, &out[0]
    run_pieces(&t)
    return qn_atomic_get(&t.nonfinite) != 0


def quantize_float8(
    const real[::1] x not None, const float[::1] scale not None, tuple layout, str dtype, uint8_t[::1] out not None,
):
    """Write encode(x / scale), saturating; NaN becomes 0. The quotient is of x's own precision.

    dtype : a format with a negative zero. Returns whether x has a NaN or an infinity. out shares no memory with x.
    """
    cdef const Format *f = format_of(dtype)
    cdef Task t
    memset(&t, 0, sizeof(t))
    if f.sign_bit != 0x80 or f.unsigned_zero:
        raise ValueError(f"{dtype} is not a float8 format with a negative zero")
    t.walk = new_walk(layout)
    check_sizes(&t.walk, x.shape[0], out.shape[0], scale.shape[0], scale.shape[0])
    if t.walk.size == 0:
        return False
    if real is float:
        t.x = &x[0]
    else:
        t.x_wide = &x[0]
    t.which, t.scale, t.zero, t.codes_out = QUANTIZE8, &scale[0], <const int32_t *>&scale[0], &out[0]  # no zeros are read
    t.encoder = encoder_of(f, True)
    run_pieces(&t)
    return qn_atomic_get(&t.nonfinite) != 0


def dequantize(
    const uint8_t[::1] codes not None, bint is_signed, const float[::1] scale not None,
    const int32_t[::1] zero not None, tuple layout, int32_t low, int32_t high, float[::1] out not None,
):
    """Write (code - zero) * scale in float32; codes : uint8[size], read as int8 where `is_signed`.

    Returns whether a code is outside of low .. high.
    """
    cdef Task t
    memset(&t, 0, sizeof(t))
    t.walk = new_walk(layout)
    check_sizes(&t.walk, codes.shape[0], out.shape[0], scale.shape[0], zero.shape[0])
    if t.walk.size:
        t.which, t.codes, t.flip, t.scale, t.zero = DEQUANTIZE, &codes[0], 0x80 if is_signed else 0, &scale[0], &zero[0]
        t.low, t.high, t.out = low, high, &out[0]
        run_pieces(&t)
    return qn_atomic_get(&t.beyond) != 0


def dequantize_float8(
    const uint8_t[::1] codes not None, const float[::1] scale not None, tuple layout, str dtype,
    float[::1] out not None,
):
    """Write decode(code) * scale in float32; dtype as for `quantize_float8`."""
    cdef const Format *f = format_of(dtype)
    cdef Task t
    memset(&t, 0, sizeof(t))
    if f.sign_bit != 0x80 or f.unsigned_zero:
        raise ValueError(f"{dtype} is not a float8 format with a negative zero")
    t.walk = new_walk(layout)
    check_sizes(&t.walk, codes.shape[0], out.shape[0], scale.shape[0], scale.shape[0])
    if t.walk.size:
        t.which, t.codes, t.scale, t.zero = DEQUANTIZE8, &codes[0], &scale[0], <const int32_t *>&scale[0]
        t.decoder, t.out = decoder_of(f), &out[0]
        run_pieces(&t)


# int4: two codes a byte, the first in the low nibble; each row padded to whole 32-bit words (8 codes)

cdef struct Nibbles:
    const uint8_t *source
    uint8_t *target
    const uint8_t *pad  # a row's
    Py_ssize_t n, width  # codes and bytes of a row
    int offset


cdef inlined pack_pairs(const uint8_t *codes, own_bytes out, Py_ssize_t n, uint32_t flip) noexcept nogil:
    """n bytes; (code + offset) & 15 is (code ^ offset) & 15."""
    cdef Py_ssize_t i
    for i in range(n):
        out[i] = <uint8_t>(((codes[2 * i] ^ flip) & 15) | ((codes[2 * i + 1] ^ flip) << 4))


cdef inlined unpack_pairs(const uint8_t *packed, own_bytes out, Py_ssize_t n, uint32_t offset) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n):
        out[2 * i] = <uint8_t>((packed[i] & 15) - offset)
        out[2 * i + 1] = <uint8_t>((packed[i] >> 4) - offset)


cdef inlined pack_rows(const Nibbles *t, Py_ssize_t begin, Py_ssize_t end) noexcept nogil:
    cdef Py_ssize_t r, i
    cdef const uint8_t *codes
    cdef uint8_t *out
    cdef uint32_t pad
    for r in range(begin, end):
        codes, out = t.source + r * t.n, t.target + r * t.width
        pack_pairs(codes, out, t.n // 2, t.offset)
        if t.n % 8 == 0:
            continue
        pad = t.pad[r] & 15
        for i in range(t.n // 2, t.width):
            out[i] = <uint8_t>(pad << 4 | pad)
        if t.n % 2:
            out[t.n // 2] = <uint8_t>(pad << 4 | ((codes[t.n - 1] ^ <uint32_t>t.offset) & 15))


cdef inlined unpack_rows(const Nibbles *t, Py_ssize_t begin, Py_ssize_t end) noexcept nogil:
    cdef Py_ssize_t r
    for r in range(begin, end):
        unpack_pairs(t.source + r * t.width, t.target + r * t.n, t.n // 2, t.offset)
        if t.n % 2:
            t.target[r * t.n + t.n - 1] = <uint8_t>((t.source[r * t.width + t.n // 2] & 15) - t.offset)


cdef inlined nibbles(const Nibbles *t, Py_ssize_t begin, Py_ssize_t end) noexcept nogil:
    if t.pad is not NULL:
        pack_rows(t, begin, end)
    else:
        unpack_rows(t, begin, end)


cdef at_baseline nibbles_baseline(const Nibbles *t, Py_ssize_t begin, Py_ssize_t end) noexcept nogil:
    nibbles(t, begin, end)


cdef at_avx2 nibbles_avx2(const Nibbles *t, Py_ssize_t begin, Py_ssize_t end) noexcept nogil:
    nibbles(t, begin, end)


cdef at_avx512 nibbles_avx512(const Nibbles *t, Py_ssize_t begin, Py_ssize_t end) noexcept nogil:
    nibbles(t, begin, end)


cdef void nibbles_piece(void *task, Py_ssize_t begin, Py_ssize_t end, int thread) noexcept nogil:
    cdef int level = chosen_level()
    if level == AVX512:
        nibbles_avx512(<const Nibbles *>task, begin, end)
    elif level == AVX2:
        nibbles_avx2(<const Nibbles *>task, begin, end)
    else:
        nibbles_baseline(<const Nibbles *>task, begin, end)


cdef int run_nibbles(Nibbles *t, Py_ssize_t rows) except -1:
    if t.n % 8 == 0 and rows * t.n % PIECE == 0:  # no padding: where rows end does not matter
        rows = rows * t.n // PIECE
        t.n, t.width = PIECE, PIECE // 2
    if t.n:
        in_pieces(nibbles_piece, t, rows, t.n * PICOSECONDS, 1 << 10, max(PIECE // t.n, 1))
    return 0


def pack_nibbles(
    const uint8_t[:, ::1] codes not None, int offset, const uint8_t[::1] pad not None, uint8_t[:, ::1] out not None,
):
    """Pack codes : uint8[rows, n] (int8's bytes where signed) into out : uint8[rows, 4 * ceil(n / 8)].

    A nibble is code + offset (8 for int4, 0 for uint4); a row's padding is the nibble pad : uint8[rows].
    """
    cdef Nibbles t
    cdef Py_ssize_t rows = codes.shape[0]
    t.n, t.width, t.offset = codes.shape[1], out.shape[1], offset
    if rows != out.shape[0] or rows != pad.shape[0] or t.width != 4 * ((t.n + 7) // 8):
        raise ValueError("pack_nibbles: sizes differ")
    if offset not in (0, 8):
        raise ValueError(f"pack_nibbles: the offset is 0 or 8, not {offset}")
    if rows and t.n:
        t.source, t.target, t.pad = &codes[0, 0], &out[0, 0], &pad[0]
        run_nibbles(&t, rows)


def unpack_nibbles(const uint8_t[:, ::1] packed not None, int offset, uint8_t[:, ::1] out not None):
    """Undo `pack_nibbles`: packed : uint8[rows, 4 * ceil(n / 8)] into out : uint8[rows, n]."""
    cdef Nibbles t
    cdef Py_ssize_t rows = out.shape[0]
    t.n, t.width, t.offset = out.shape[1], packed.shape[1], offset
    if packed.shape[0] != rows or t.width != 4 * ((t.n + 7) // 8):
        raise ValueError("unpack_nibbles: sizes differ")
    if rows and t.n:
        t.source, t.target, t.pad = &packed[0, 0], &out[0, 0], NULL
        run_nibbles(&t, rows)
