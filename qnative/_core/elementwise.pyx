# cython: boundscheck=False
"""Quantize, dequantize and fake-quantize: one element rule each, one walk over the scales, at several instruction levels.

a) Every granularity is one walk (`walk.pxd`), which a long array is given in pieces (`pieces.pxd`).
b) Python has checked and coerced; these functions check again every size that guards a pointer.
c) A batch is what is done in one loop (`next_batch`): runs of whole vectors, or other elements with their parameters laid
   out, an entry for each.
d) The loops are over 64 elements (or 32), known to the compiler, which needs neither a beginning nor an end; what is left
   over is done as 64 of which some are not wanted.
e) The rules clamp in floating point, so that no conversion overflows. float64 input has plain loops of its own.
f) Division is by multiplying (`division.pxd`) where that gives its bits. For NaN, infinities and what is too large for it,
   it does not; they are so rare that the loop only notices them, and the whole piece is then done once more, by dividing.
"""

from libc.float cimport DBL_MAX
from libc.math cimport fabs, fmaf, rint
from libc.stdint cimport int32_t, uint8_t, uint32_t, uintptr_t
from libc.string cimport memcpy, memset

from qnative._core.division cimport divide_by_multiplying, divided
from qnative._core.floats cimport (
    Decoder, Encoder, decode_code, decoder_of, encode_float, encoder_of, float8_of, round_float, to_odd,
)
from qnative._core.levels cimport (
    AHEAD, AVX2, AVX512, SPAN, ask, at_avx2, at_avx512, at_baseline, chosen_level, fetch, inlined, own_bytes, own_floats,
)
from qnative._core.pieces cimport PIECE, in_pieces, qn_atomic, qn_atomic_add, qn_atomic_get
from qnative._core.walk cimport Walk, by_columns, check_sizes, new_walk, next_run, part, rows_share, skip_runs

ctypedef fused real:
    float
    double

cdef enum:
    WIDE = 64     # elements of a step: a vector of codes, at least
    HALF = 32     # or of a step that is a group of such a size, the usual one
    LONG = 256    # a run of so many elements is worth a loop of its own, what is left over another
    BATCH = 1024  # elements whose parameters are laid out: they stay in the L1 cache
    COLUMNS = 4096  # the same for rows that share them: whole rows mostly, as memory is read best; they stay in L2
    CHUNK = 16    # entries that are laid out at a time, some of them perhaps beyond what is asked for
    ROWS = 16     # of a piece, for which the parameters of columns are laid out once
    PICOSECONDS = 300  # an element takes, roughly
    ROUNDER = 12582912  # 1.5 * 2^23, whose last place is 1 and whose last byte 0: a sum with it is rounded to even


cdef enum Pass:
    QUANTIZE      # float to codes
    QUANTIZE8     # the same to float8
    FAKE          # float to codes to float
    FAKE8
    DEQUANTIZE    # codes to float
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
    float scale[COLUMNS + WIDE]
    float zero[COLUMNS + WIDE]  # the zero point, and what `flip` adds to every code
    float reciprocal[BATCH + WIDE]  # not of columns, which are divided by: it is one more array to read
    float least[BATCH + WIDE]  # of runs alone, that are encoded: codes, plus ROUNDER, less the zero point
    float most[BATCH + WIDE]


cdef struct Entry:
    float scale, reciprocal, zero, least, most


cdef struct Room:  # for parameters at the beginning of a cache line: no vector of theirs then lies in two
    Parameters parameters
    char rest[63]


cdef struct Batch:
    Walk walk
    # what of the walk is in no batch yet: so many runs of one size, of scales that follow each other
    Py_ssize_t start, runs, size, scale
    # the batch
    Py_ssize_t begin, count
    Py_ssize_t span     # elements of an entry of parameters: 1, HALF, or a multiple of WIDE
    Py_ssize_t rows, stride  # so many times `count` elements, so far apart, with the same parameters
    Py_ssize_t ahead    # how far ahead lies what is worked on next, in elements
    bint may_multiply   # instead of dividing
    bint by_multiplying


# Element rules: of WIDE elements, or `width`, the parameters being `e` or (`each`) an entry of p each, from `at` on.

cdef inlined track(float x, bint fused, float *lane) noexcept nogil:
    """Make the lane NaN if x is not finite."""
    if fused:
        lane[0] = fmaf(x, 0, lane[0])
    else:
        lane[0] += x * <float>0


cdef inlined quotient(
    float x, float scale, float reciprocal, bint by_multiplying, bint fused, float *lane, float *result
) noexcept nogil:
    """x / scale, 0 for NaN. The lane becomes NaN if x is not finite, or too large to be divided by multiplying."""
    if by_multiplying:
        divided(x, scale, reciprocal, True, result)
        track(result[0], fused, lane)
    else:
        track(x, fused, lane)
        result[0] = (x if x == x else 0) / scale


cdef inlined encode_integers(
    const float *x, own_bytes codes, own_floats values, Entry e, const Parameters *p, Py_ssize_t at, Py_ssize_t width,
    bint fake, bint by_multiplying, bint each, bint fused, own_floats tracks
) noexcept nogil:
    """clamp(rint(x / s) + z, low, high), or what that decodes to."""
    cdef Py_ssize_t i
    cdef uint8_t zero = 0 if each else <uint8_t><int32_t>e.zero
    cdef float q
    cdef uint32_t bits
    for i in range(width):
        if each:
            e.scale, e.zero = p.scale[at + i], p.zero[at + i]
        if each and by_multiplying:
            e.reciprocal = p.reciprocal[at + i]
        quotient(x[i], e.scale, e.reciprocal, by_multiplying, fused, &tracks[i], &q)
        q += <float>ROUNDER
        if each:
            q += e.zero
        q = e.least if q < e.least else q
        q = e.most if q > e.most else q
        if fake:
            q -= <float>ROUNDER
            if each:
                q -= e.zero
            values[i] = q * e.scale
        else:
            memcpy(&bits, &q, 4)
            codes[i] = <uint8_t>(<uint8_t>bits + zero)


cdef inlined encode_float8(
    const float *x, own_bytes codes, own_floats values, Entry e, const Parameters *p, Py_ssize_t at, Py_ssize_t width,
    Encoder format, bint fake, bint by_multiplying, bint each, bint fused, own_floats tracks
) noexcept nogil:
    """encode(x / s), saturating, or what that decodes to. Multiplying makes no negative zero: the sign is x's."""
    cdef Py_ssize_t i
    cdef float q
    cdef uint32_t encoded[WIDE]
    for i in range(width):
        if each:
            e.scale = p.scale[at + i]
        if each and by_multiplying:
            e.reciprocal = p.reciprocal[at + i]
        quotient(x[i], e.scale, e.reciprocal, by_multiplying, fused, &tracks[i], &q)
        if fake:
            round_float(q, x[i] if by_multiplying else q, format, &q)
            values[i] = q * e.scale
        else:
            encode_float(q, x[i] if by_multiplying else q, format, False, False, False, True, &encoded[i])
    if not fake:  # a loop of its own, or compilers make bytes of each part of a code and put these together
        for i in range(width):
            codes[i] = <uint8_t>encoded[i]


cdef inlined decode_integers(
    const uint8_t *codes, own_floats out, Entry e, const Parameters *p, Py_ssize_t at, Py_ssize_t width, int32_t flip, int32_t low,
    bint each, own_bytes largest
) noexcept nogil:
    """(code - z) * s; a lane of `largest` gets the largest code, less the lowest that there may be."""
    cdef Py_ssize_t i
    cdef uint8_t above
    for i in range(width):
        if each:
            e.scale, e.zero = p.scale[at + i], p.zero[at + i]
        out[i] = (<float>(codes[i] ^ flip) - e.zero) * e.scale
        above = <uint8_t>(codes[i] - low)
        largest[i] = above if above > largest[i] else largest[i]


cdef inlined decode_float8(
    const uint8_t *codes, own_floats out, Entry e, const Parameters *p, Py_ssize_t at, Py_ssize_t width, Decoder format,
    bint each
) noexcept nogil:
    cdef Py_ssize_t i
    cdef float v
    for i in range(width):
        if each:
            e.scale = p.scale[at + i]
        decode_code(codes[i], format, False, False, False, &v)
        out[i] = v * e.scale


# Batches

cdef inlined lay_each(
    Parameters *p, Py_ssize_t at, Py_ssize_t n, const float *s, const int32_t *z, int32_t flip, bint reciprocals
) noexcept nogil:
    """Lay out n sets of parameters as entries at .. at + n - 1."""
    cdef Py_ssize_t i
    for i in range(n):
        p.scale[at + i], p.zero[at + i] = s[i], <float>(z[i] + flip)
        if reciprocals:
            p.reciprocal[at + i] = <float>1 / s[i]


cdef inlined lay_ends(Parameters *p, Py_ssize_t n, int32_t low, int32_t high) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n):
        p.least[i], p.most[i] = <float>(ROUNDER + low) - p.zero[i], <float>(ROUNDER + high) - p.zero[i]


cdef inlined lay_groups(
    Parameters *p, Py_ssize_t at, Py_ssize_t n, Py_ssize_t size, const float *s, const int32_t *z, int32_t flip,
    bint encoding
) noexcept nogil:
    """The same, each of them for so many elements, an entry an element."""
    cdef Py_ssize_t g, i, j
    cdef float scale, reciprocal, zero
    for g in range(n):
        scale, reciprocal, zero = s[g], <float>1 / s[g], <float>(z[g] + flip)
        i = at + g * size
        while i < at + (g + 1) * size:
            for j in range(CHUNK):
                p.scale[i + j], p.zero[i + j] = scale, zero
                if encoding:
                    p.reciprocal[i + j] = reciprocal
            i += CHUNK


cdef inlined lay_rest(Parameters *p, Py_ssize_t at, bint by_multiplying) noexcept nogil:
    """Entries beyond a batch, for elements that nobody asked for: a whole vector is worked on."""
    cdef Py_ssize_t i
    for i in range(at, at + WIDE):
        p.scale[i], p.zero[i] = 1, 0
        if by_multiplying:
            p.reciprocal[i] = 1


cdef inlined next_batch(const Task *t, Batch *b, Parameters *p, bint encoding, bint fused, bint *found) noexcept nogil:
    """Find what can be done in one loop, and lay out its parameters; `found` is False when all is done.

    fused : whether there are fused multiply-adds.
    """
    cdef Walk *w = &b.walk
    cdef Py_ssize_t n, taken
    cdef const float *s
    cdef const int32_t *z
    cdef bint apart, fast = False
    b.count, b.rows, b.stride, b.ahead, found[0] = 0, 1, 0, AHEAD // 4, True
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
        # a loop with an entry for each run
        apart = b.size >= LONG or b.size % WIDE == 0 or b.size == HALF
        n = min(b.runs, <Py_ssize_t>COLUMNS if w.tile else <Py_ssize_t>BATCH if apart else (BATCH - b.count) // b.size)
        if b.count and (apart or n == 0 or b.start != b.begin + b.count):
            return
        s, z = &t.scale[b.scale], &t.zero[b.scale]
        if fused and b.may_multiply and not w.tile:
            divide_by_multiplying(s, n, &fast)
        if b.count and fast != b.by_multiplying:
            return
        if not b.count:
            b.begin, b.by_multiplying = b.start, fast
        if apart or b.size == 1:
            lay_each(p, b.count, n, s, z, t.flip, encoding and not w.tile)
            if apart and encoding:
                lay_ends(p, n, t.low, t.high)
        else:
            lay_groups(p, b.count, n, b.size, s, z, t.flip, encoding)
        b.span = 1 if not apart else b.size if b.size == HALF else b.size // WIDE * WIDE
        taken = n * (b.span if apart else b.size)
        b.count += taken
        b.start += taken
        if apart and b.span < b.size:
            b.size -= b.span
        else:
            b.runs -= n
            b.scale += n
        if w.tile:
            b.rows, b.stride = (w.stop - w.at) // w.inner, w.inner
        if w.tile or apart:
            return


cdef inline bint is_float8(Pass which) noexcept nogil:
    return which == QUANTIZE8 or which == FAKE8 or which == DEQUANTIZE8


cdef inlined encode_row(
    const Task *t, const Batch *b, const float *x, uint8_t *codes, float *values, Parameters *p, Py_ssize_t width,
    Pass which, bint by_multiplying, bint each, bint fused, float *tracks
) noexcept nogil:
    cdef Py_ssize_t i = 0, entry = 0, end, rest, count = b.count, ahead = b.ahead
    cdef float some_x[WIDE]
    cdef float some_values[WIDE]
    cdef uint8_t some_codes[WIDE]
    cdef const float *from_x
    cdef uint8_t *to_codes
    cdef float *to_values
    cdef bint fake = which == FAKE or which == FAKE8
    cdef Encoder format = t.encoder
    cdef Entry e
    e.reciprocal = 1
    while i < count:
        end = count if each else i + (HALF if width == HALF else b.span)
        e.scale, e.zero = p.scale[entry], p.zero[entry]
        if each:
            e.least, e.most = <float>(ROUNDER + t.low), <float>(ROUNDER + t.high)
        else:
            e.reciprocal, e.least, e.most = p.reciprocal[entry], p.least[entry], p.most[entry]
        while i < end:
            ask(x + i, ahead * 4, width * 4)
            if fake:
                ask(values + i, ahead * 4, width * 4)
            else:
                ask(codes + i, ahead, width)
            rest, from_x, to_codes, to_values = count - i, x + i, codes + i, values + i
            if each and rest < WIDE:
                memset(some_x, 0, sizeof(some_x))
                memcpy(some_x, from_x, rest * 4)
                lay_rest(p, count, by_multiplying)
                from_x, to_codes, to_values = some_x, some_codes, some_values
            if is_float8(which):
                encode_float8(
                    from_x, to_codes, to_values, e, p, i, width, format, fake, by_multiplying, each, fused, tracks
                )
            else:
                encode_integers(
                    from_x, to_codes, to_values, e, p, i, width, fake, by_multiplying, each, fused, tracks
                )
            if each and rest < WIDE:
                if fake:
                    memcpy(values + i, some_values, rest * 4)
                else:
                    memcpy(codes + i, some_codes, rest)
            i += width
        entry += 1


cdef inlined encode_batch(
    const Task *t, const Batch *b, Parameters *p, Py_ssize_t width, Pass which, bint by_multiplying, bint each,
    bint fused, float *tracks
) noexcept nogil:
    cdef const float *x = t.x + b.begin
    cdef uint8_t *codes = t.codes_out
    cdef float *values = t.out
    cdef Py_ssize_t row
    if which == FAKE or which == FAKE8:
        values += b.begin
    else:
        codes += b.begin
    for row in range(b.rows if each else 1):
        encode_row(t, b, x, codes, values, p, width, which, by_multiplying, each, fused, tracks)
        x += b.stride
        if which == FAKE or which == FAKE8:
            values += b.stride
        else:
            codes += b.stride


cdef inlined decode_row(
    const Task *t, const Batch *b, const uint8_t *codes, float *out, Parameters *p, Py_ssize_t width, bint is8, bint each,
    uint8_t *largest
) noexcept nogil:
    cdef Py_ssize_t i = 0, entry = 0, end, rest, count = b.count, ahead = b.ahead
    cdef int32_t flip = t.flip, low = t.low
    cdef Decoder format = t.decoder
    cdef Entry e
    cdef float values[WIDE]
    cdef uint8_t some[WIDE]
    cdef const uint8_t *from_codes
    cdef float *to_values
    while i < count:
        end = count if each else i + (HALF if width == HALF else b.span)
        e.scale, e.zero = p.scale[entry], p.zero[entry]
        while i < end:
            ask(codes + i, ahead, width)
            ask(out + i, ahead * 4, width * 4)
            rest, from_codes, to_values = count - i, codes + i, out + i
            if each and rest < WIDE:
                memset(some, low & 0xFF, sizeof(some))
                memcpy(some, from_codes, rest)
                lay_rest(p, count, False)
                from_codes, to_values = some, values
            if is8:
                decode_float8(from_codes, to_values, e, p, i, width, format, each)
            else:
                decode_integers(from_codes, to_values, e, p, i, width, flip, low, each, largest)
            if each and rest < WIDE:
                memcpy(out + i, values, rest * 4)
            i += width
        entry += 1


cdef inlined decode_batch(
    const Task *t, const Batch *b, Parameters *p, Py_ssize_t width, bint is8, bint each, uint8_t *largest
) noexcept nogil:
    cdef const uint8_t *codes = t.codes + b.begin
    cdef float *out = t.out + b.begin
    cdef Py_ssize_t row
    for row in range(b.rows if each else 1):
        decode_row(t, b, codes, out, p, width, is8, each, largest)
        codes += b.stride
        out += b.stride


cdef inlined encode_spans(
    const Task *t, const Batch *b, Parameters *p, Pass which, bint by_multiplying, bint fused, float *tracks
) noexcept nogil:
    if b.span == 1:
        encode_batch(t, b, p, WIDE, which, by_multiplying, True, fused, tracks)
    elif b.span == HALF:
        encode_batch(t, b, p, HALF, which, by_multiplying, False, fused, tracks)
    else:
        encode_batch(t, b, p, WIDE, which, by_multiplying, False, fused, tracks)


cdef inlined encode(
    const Task *t, const Batch *b, Parameters *p, Pass which, bint fused, float *tracks
) noexcept nogil:
    if fused and b.by_multiplying:
        encode_spans(t, b, p, which, True, fused, tracks)
    else:
        encode_spans(t, b, p, which, False, fused, tracks)


cdef inlined decode(
    const Task *t, const Batch *b, Parameters *p, bint is8, uint8_t *largest
) noexcept nogil:
    if b.span == 1:
        decode_batch(t, b, p, WIDE, is8, True, largest)
    elif b.span == HALF:
        decode_batch(t, b, p, HALF, is8, False, largest)
    else:
        decode_batch(t, b, p, WIDE, is8, False, largest)


cdef inlined work_once(
    Task *t, const Walk *w, bint may_multiply, bint fused, bint *odd, uint8_t *greatest
) noexcept nogil:
    """A batch after the other. `odd`: whether a lane of `tracks` became NaN."""
    cdef Batch b
    cdef Room room
    cdef Parameters *p = <Parameters *>((<uintptr_t>&room + 63) & ~<uintptr_t>63)
    cdef float tracks[WIDE]
    cdef uint8_t largest[WIDE]
    cdef bint found
    cdef Py_ssize_t i
    memset(&b, 0, sizeof(b))
    memset(tracks, 0, sizeof(tracks))
    memset(largest, 0, sizeof(largest))
    b.walk, b.may_multiply = w[0], may_multiply
    while True:
        next_batch(t, &b, p, t.which < DEQUANTIZE, fused, &found)
        if not found:
            break
        if t.which == QUANTIZE:
            encode(t, &b, p, QUANTIZE, fused, tracks)
        elif t.which == QUANTIZE8:
            encode(t, &b, p, QUANTIZE8, fused, tracks)
        elif t.which == FAKE:
            encode(t, &b, p, FAKE, fused, tracks)
        elif t.which == FAKE8:
            encode(t, &b, p, FAKE8, fused, tracks)
        elif t.which == DEQUANTIZE:
            decode(t, &b, p, False, largest)
        else:
            decode(t, &b, p, True, largest)
    for i in range(1, WIDE):
        tracks[0] += tracks[i]
        largest[0] = max(largest[0], largest[i])
    odd[0], greatest[0] = tracks[0] != 0, largest[0]


cdef inlined work(Task *t, Walk w, bint fused) noexcept nogil:
    """`fused`: whether there are fused multiply-adds."""
    cdef bint odd, may_multiply = fused and t.which < DEQUANTIZE
    cdef uint8_t greatest
    while True:
        work_once(t, &w, may_multiply, fused, &odd, &greatest)
        if not (odd and may_multiply):
            break
        may_multiply = False  # once more: what is not finite has a code too, and what multiplying cannot divide
    if odd:
        qn_atomic_add(&t.nonfinite, 1)
    if greatest > t.high - t.low:
        qn_atomic_add(&t.beyond, 1)


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
    cdef float value
    cdef uint32_t code
    cdef bint nonfinite = False
    while next_run(&w):
        for i in range(w.count):
            k = w.scale + i * w.step
            x = t.x_wide[w.start + i]
            nonfinite |= not (fabs(x) <= DBL_MAX)
            x = x / <double>t.scale[k]
            x = x if x == x else 0
            if is_float8(t.which):
                to_odd(x, &value)
                if t.which == FAKE8:
                    round_float(value, value, t.encoder, &value)
                    t.out[w.start + i] = value * t.scale[k]
                else:
                    encode_float(value, value, t.encoder, False, False, False, True, &code)
                    t.codes_out[w.start + i] = <uint8_t>code
                continue
            lo, hi = <double>(t.low - t.zero[k]), <double>(t.high - t.zero[k])
            x = rint(x)
            x = lo if x < lo else x
            x = hi if x > hi else x
            if t.which == FAKE:
                t.out[w.start + i] = <float>(<int32_t>x) * t.scale[k]
            else:
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
    return by_columns(w, begin, end, COLUMNS) if rows_share(w) else part(w, begin, end)


cdef int run_pieces(Task *t) except -1:
    cdef Py_ssize_t inner = t.walk.inner, step = PIECE
    if rows_share(&t.walk):  # whole rows
        step = max(PIECE // inner, min(<Py_ssize_t>ROWS, ROWS * PIECE // inner), 1) * inner
    return in_pieces(piece, t, t.walk.size, PICOSECONDS, 1 << 10, step)


cdef Task new_task(
    Pass which, const float[::1] scale, tuple layout, Py_ssize_t size, Py_ssize_t out_size, Py_ssize_t zeros
) except *:
    """A task whose sizes fit each other; of no elements, its walk's size is 0 and it has no scales."""
    cdef Task t
    memset(&t, 0, sizeof(t))
    t.which, t.walk = which, new_walk(layout)
    check_sizes(&t.walk, size, out_size, scale.shape[0], zeros)
    if t.walk.size:
        t.scale = &scale[0]
        t.zero = <const int32_t *>t.scale  # of float8 there are none, and those that are laid out are not looked at
    return t


# What Python calls

def quantize(
    const real[::1] x not None, const float[::1] scale not None, const int32_t[::1] zero not None, tuple layout,
    int32_t low, int32_t high, uint8_t[::1] out not None,
):
    """Write clamp(rint(x / scale) + zero, low, high) as one byte each: out : uint8[size], int8's bytes where signed.

    NaN becomes the zero point. Returns whether x has a NaN or an infinity. out shares no memory with x.
    """
    cdef Task t = new_task(QUANTIZE, scale, layout, x.shape[0], out.shape[0], zero.shape[0])
    if t.walk.size == 0:
        return False
    if real is float:
        t.x = &x[0]
    else:
        t.x_wide = &x[0]
    t.zero, t.low, t.high, t.codes_out = &zero[0], low, high, &out[0]
    run_pieces(&t)
    return qn_atomic_get(&t.nonfinite) != 0


def quantize_float8(
    const real[::1] x not None, const float[::1] scale not None, tuple layout, str dtype, uint8_t[::1] out not None,
):
    """Write encode(x / scale), saturating; NaN becomes 0. The quotient is of x's own precision.

    dtype : a format with a negative zero. Returns whether x has a NaN or an infinity. out shares no memory with x.
    """
    cdef Task t = new_task(QUANTIZE8, scale, layout, x.shape[0], out.shape[0], scale.shape[0])
    t.encoder = encoder_of(float8_of(dtype), True)
    if t.walk.size == 0:
        return False
    if real is float:
        t.x = &x[0]
    else:
        t.x_wide = &x[0]
    t.codes_out = &out[0]
    run_pieces(&t)
    return qn_atomic_get(&t.nonfinite) != 0


def fake_quantize(
    const real[::1] x not None, const float[::1] scale not None, const int32_t[::1] zero not None, tuple layout,
    int32_t low, int32_t high, str float8, float[::1] out not None,
):
    """Write what x decodes to after quantization, in float32; NaN becomes 0. Returns whether x has a NaN or an infinity.

    float8 : the name of a format, or None for integer codes low..high. out shares no memory with x.
    """
    cdef Task t = new_task(FAKE if float8 is None else FAKE8, scale, layout, x.shape[0], out.shape[0], zero.shape[0])
    if float8 is not None:
        t.encoder = encoder_of(float8_of(float8), True)
    if t.walk.size == 0:
        return False
    if real is float:
        t.x = &x[0]
    else:
        t.x_wide = &x[0]
    t.zero, t.low, t.high, t.out = &zero[0], low, high, &out[0]
    run_pieces(&t)
    return qn_atomic_get(&t.nonfinite) != 0


def dequantize(
    const uint8_t[::1] codes not None, bint is_signed, const float[::1] scale not None,
    const int32_t[::1] zero not None, tuple layout, int32_t low, int32_t high, float[::1] out not None,
):
    """Write (code - zero) * scale in float32; codes : uint8[size], read as int8 where `is_signed`.

    Returns whether a code is outside of low .. high.
    """
    cdef Task t = new_task(DEQUANTIZE, scale, layout, codes.shape[0], out.shape[0], zero.shape[0])
    if t.walk.size:
        t.codes, t.flip, t.zero, t.low, t.high, t.out = &codes[0], 0x80 if is_signed else 0, &zero[0], low, high, &out[0]
        run_pieces(&t)
    return qn_atomic_get(&t.beyond) != 0


def dequantize_float8(
    const uint8_t[::1] codes not None, const float[::1] scale not None, tuple layout, str dtype,
    float[::1] out not None,
):
    """Write decode(code) * scale in float32; dtype as for `quantize_float8`."""
    cdef Task t = new_task(DEQUANTIZE8, scale, layout, codes.shape[0], out.shape[0], scale.shape[0])
    t.decoder = decoder_of(float8_of(dtype))
    if t.walk.size:
        t.codes, t.out = &codes[0], &out[0]
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
    cdef Py_ssize_t i, begin = 0
    while begin < n:
        fetch(codes + 2 * begin, 2 * SPAN)
        for i in range(begin, min(begin + <Py_ssize_t>SPAN, n)):
            out[i] = <uint8_t>(((codes[2 * i] ^ flip) & 15) | ((codes[2 * i + 1] ^ flip) << 4))
        begin += SPAN


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
