# cython: boundscheck=False
"""Quantize and dequantize: one element rule each, one walk over the scales, at several instruction levels.

a) Every granularity is one walk (`walk.pxd`), which a long array is given in pieces (`pieces.pxd`).
b) Python has checked and coerced; these functions check again every size that guards a pointer.
c) A run of the walk is worked off by loops over multiples of 64 elements, by 32, and the rest as 32 of which some are not
   wanted: loops for which a compiler needs neither a beginning nor an end.
d) The rules clamp in floating point, so that no conversion overflows. float64 input has plain loops of its own.
"""

from cpython.mem cimport PyMem_RawFree, PyMem_RawMalloc
from libc.float cimport DBL_MAX
from libc.math cimport fabs, rint, rintf
from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t
from libc.string cimport memcpy, memset

from qnative._core.division cimport divided, divides_by_multiplying
from qnative._core.floats cimport (
    Decoder, Encoder, Format, decode_code, decoder_of, encode_float, encoder_of, format_of, to_odd,
)
from qnative._core.levels cimport (
    AVX2, AVX512, BASELINE, SPAN, at_avx2, at_avx512, at_baseline, chosen_level, fetch, inlined, own_bytes, own_floats,
    own_lanes,
)
from qnative._core.pieces cimport PIECE, in_pieces, qn_atomic, qn_atomic_add, qn_atomic_get
from qnative._core.walk cimport Walk, by_columns, check_sizes, new_walk, next_run, part, rows_share

ctypedef fused real:
    float
    double

cdef enum:
    WIDE = 64    # a vector of codes, at least
    NARROW = 32  # a small group, and half such a vector
    TILE = 1024  # columns whose scales, reciprocals and zero points stay in the L1 cache
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
    const float *reciprocal  # of every scale, where all of them divide by multiplying, else NULL
    const int32_t *zero
    int32_t low, high
    int32_t flip  # 0x80 where codes are int8: (code ^ 0x80) - 0x80 reads a byte as one
    Encoder encoder
    Decoder decoder
    uint8_t *codes_out
    float *out
    qn_atomic nonfinite


# Element rules: of n elements, of one scale or (`each`) of one each. The largest magnitude, as bits, goes to top: to top[0],
# or, where n is the constant NARROW, to top[i], since finding the largest of a vector would take longer than all the rest.

cdef inlined to_codes(
    const float *x, own_bytes out, Py_ssize_t n, const float *s, const float *r, const int32_t *z, int32_t low,
    int32_t high, bint by_multiplying, bint each, bint narrow, own_lanes top
) noexcept nogil:
    """clamp(rint(x / s) + z, low, high); NaN becomes the zero point."""
    cdef Py_ssize_t i
    cdef float scale = s[0], reciprocal = r[0], lo = <float>(low - z[0]), hi = <float>(high - z[0]), least, most, v, q
    cdef int32_t zero = z[0]
    cdef uint32_t bits, largest = 0
    least, most = lo * scale, hi * scale
    for i in range(n):
        if each:
            scale, reciprocal, zero = s[i], r[i], z[i]
            lo, hi = <float>(low - zero), <float>(high - zero)
            least, most = lo * scale, hi * scale
        v = x[i]
        memcpy(&bits, &v, 4)
        bits &= 0x7FFFFFFFu  # ordered as the magnitudes are; NaN and Inf on top
        if narrow:
            top[i] = bits if bits > top[i] else top[i]
        else:
            largest = bits if bits > largest else largest
        v = v if v == v else 0
        if by_multiplying:  # clamped before, which is the same: the ends are codes, and divide to within half of one
            v = least if v < least else v
            v = most if v > most else v
            divided(v, scale, reciprocal, True, &q)
        else:
            q = rintf(v / scale)
            q = lo if q < lo else q
            q = hi if q > hi else q
        q += <float>12582912  # 1.5 * 2^23, whose last place is 1 and whose last byte 0: rounds to even
        memcpy(&bits, &q, 4)
        out[i] = <uint8_t>(bits + <uint32_t>zero)
    if not narrow:
        top[0] = largest if largest > top[0] else top[0]


cdef inlined to_codes8(
    const float *x, own_bytes out, Py_ssize_t n, const float *s, const float *r, Encoder e, bint by_multiplying,
    bint each, bint narrow, own_lanes top
) noexcept nogil:
    """encode(x / s), saturating; NaN becomes 0."""
    cdef Py_ssize_t i
    cdef float scale = s[0], reciprocal = r[0], largest_value, most, v
    cdef uint32_t bits, sign, largest = 0
    memcpy(&largest_value, &e.most, 4)
    most = largest_value * scale
    for i in range(n):
        if each:
            scale, reciprocal = s[i], r[i]
            most = largest_value * scale
        v = x[i]
        memcpy(&bits, &v, 4)
        bits &= 0x7FFFFFFFu
        if narrow:
            top[i] = bits if bits > top[i] else top[i]
        else:
            largest = bits if bits > largest else largest
        v = v if v == v else 0
        if by_multiplying:
            v = -most if v < -most else v
            v = most if v > most else v
        memcpy(&sign, &v, 4)
        divided(v, scale, reciprocal, by_multiplying, &v)
        if by_multiplying:  # which makes +0 of -0
            memcpy(&bits, &v, 4)
            bits |= sign & 0x80000000u
            memcpy(&v, &bits, 4)
        encode_float(v, e, False, False, False, by_multiplying, &bits)
        out[i] = <uint8_t>bits
    if not narrow:
        top[0] = largest if largest > top[0] else top[0]


cdef inlined from_codes(
    const uint8_t *codes, own_floats out, Py_ssize_t n, const float *s, const int32_t *z, int32_t flip, bint each
) noexcept nogil:
    cdef Py_ssize_t i
    cdef float scale = s[0]
    cdef int32_t zero = z[0] + flip
    for i in range(n):
        if each:
            scale, zero = s[i], z[i] + flip
        out[i] = <float>((codes[i] ^ flip) - zero) * scale


cdef inlined from_codes8(
    const uint8_t *codes, own_floats out, Py_ssize_t n, const float *s, Decoder d, bint each
) noexcept nogil:
    cdef Py_ssize_t i
    cdef float scale = s[0], v
    for i in range(n):
        if each:
            scale = s[i]
        decode_code(codes[i], d, False, False, False, &v)
        out[i] = v * scale


# Runs: what an element rule is given by so many

cdef inlined encode_some(
    const float *x, uint8_t *out, Py_ssize_t n, const float *s, const float *r, const int32_t *z, const Task *t,
    bint is8, bint by_multiplying, bint each, bint narrow, uint32_t *top
) noexcept nogil:
    if is8:
        to_codes8(x, out, n, s, r, t.encoder, by_multiplying, each, narrow, top)
    else:
        to_codes(x, out, n, s, r, z, t.low, t.high, by_multiplying, each, narrow, top)


cdef inlined encode_run(
    const float *x, uint8_t *out, Py_ssize_t n, const float *s, const float *r, const int32_t *z, const Task *t,
    bint is8, bint by_multiplying, bint each, uint32_t *top
) noexcept nogil:
    cdef Py_ssize_t i = 0, j = 0, wide = n // WIDE * WIDE, rest
    cdef float values[NARROW]
    cdef float scales[NARROW]
    cdef float reciprocals[NARROW]
    cdef int32_t zeros[NARROW]
    cdef uint8_t codes[NARROW]
    cdef const float *x_at
    cdef uint8_t *out_at
    while i < wide:
        rest = min(wide - i, <Py_ssize_t>SPAN) // WIDE * WIDE  # as a compiler is to see
        fetch(x + i, rest * 4)
        encode_some(x + i, out + i, rest, s + j, r + j, z + j, t, is8, by_multiplying, each, False, top)
        i += rest
        j = i if each else 0
    while i < n:
        rest = n - i
        fetch(x + i, NARROW * 4)
        x_at, out_at = x + i, out + i
        if rest < NARROW:
            memset(values, 0, sizeof(values))
            memcpy(values, x_at, rest * 4)
            x_at, out_at = values, codes
            if each:
                memset(scales, 0, sizeof(scales))
                memset(reciprocals, 0, sizeof(reciprocals))
                memset(zeros, 0, sizeof(zeros))
                memcpy(scales, s + i, rest * 4)
                memcpy(reciprocals, r + i, rest * 4)
                memcpy(zeros, z + i, rest * 4)
                s, r, z, j = scales, reciprocals, zeros, 0
        encode_some(x_at, out_at, NARROW, s + j, r + j, z + j, t, is8, by_multiplying, each, True, top)
        if rest < NARROW:
            memcpy(out + i, codes, rest)
        i += NARROW
        j = i if each else 0


cdef inlined decode_some(
    const uint8_t *codes, float *out, Py_ssize_t n, const float *s, const int32_t *z, const Task *t, bint is8, bint each
) noexcept nogil:
    if is8:
        from_codes8(codes, out, n, s, t.decoder, each)
    else:
        from_codes(codes, out, n, s, z, t.flip, each)


cdef inlined decode_run(
    const uint8_t *codes, float *out, Py_ssize_t n, const float *s, const int32_t *z, const Task *t, bint is8, bint each
) noexcept nogil:
    cdef Py_ssize_t i = 0, j = 0, wide = n // WIDE * WIDE, rest
    cdef float values[NARROW]
    cdef float scales[NARROW]
    cdef int32_t zeros[NARROW]
    cdef uint8_t some[NARROW]
    cdef const uint8_t *codes_at
    cdef float *out_at
    while i < wide:
        rest = min(wide - i, <Py_ssize_t>SPAN) // WIDE * WIDE  # as a compiler is to see
        fetch(codes + i, rest)
        fetch(out + i, rest * 4)
        decode_some(codes + i, out + i, rest, s + j, z + j, t, is8, each)
        i += rest
        j = i if each else 0
    while i < n:
        rest = n - i
        fetch(out + i, NARROW * 4)
        codes_at, out_at = codes + i, out + i
        if rest < NARROW:
            memset(some, 0, sizeof(some))
            memcpy(some, codes_at, rest)
            codes_at, out_at = some, values
            if each:
                memset(scales, 0, sizeof(scales))
                memset(zeros, 0, sizeof(zeros))
                memcpy(scales, s + i, rest * 4)
                memcpy(zeros, z + i, rest * 4)
                s, z, j = scales, zeros, 0
        decode_some(codes_at, out_at, NARROW, s + j, z + j, t, is8, each)
        if rest < NARROW:
            memcpy(out + i, values, rest * 4)
        i += NARROW
        j = i if each else 0


# Passes: the walk over the runs

cdef inlined quantize_pass(Task *t, Walk w, bint is8, bint fused) noexcept nogil:
    """`fused`: whether there are fused multiply-adds."""
    cdef const float *s
    cdef const float *r
    cdef const int32_t *z
    cdef float reciprocal
    cdef uint32_t top[NARROW]
    cdef Py_ssize_t i
    memset(top, 0, sizeof(top))
    while next_run(&w):
        s, z = &t.scale[w.scale], &t.zero[w.scale]
        if w.step and fused and t.reciprocal is not NULL:
            r = &t.reciprocal[w.scale]
            encode_run(t.x + w.start, t.codes_out + w.start, w.count, s, r, z, t, is8, True, True, top)
        elif w.step:
            encode_run(t.x + w.start, t.codes_out + w.start, w.count, s, s, z, t, is8, False, True, top)
        elif fused and divides_by_multiplying(s[0]):
            reciprocal = <float>1 / s[0]
            encode_run(t.x + w.start, t.codes_out + w.start, w.count, s, &reciprocal, z, t, is8, True, False, top)
        else:
            encode_run(t.x + w.start, t.codes_out + w.start, w.count, s, s, z, t, is8, False, False, top)
    for i in range(1, NARROW):
        top[0] = top[i] if top[i] > top[0] else top[0]
    if top[0] >= 0x7F800000u:
        qn_atomic_add(&t.nonfinite, 1)


cdef inlined dequantize_pass(Task *t, Walk w, bint is8) noexcept nogil:
    while next_run(&w):
        if w.step:
            decode_run(
                t.codes + w.start, t.out + w.start, w.count, &t.scale[w.scale], &t.zero[w.scale], t, is8, True
            )
        else:
            decode_run(
                t.codes + w.start, t.out + w.start, w.count, &t.scale[w.scale], &t.zero[w.scale], t, is8, False
            )


cdef inlined work(Task *t, Walk w, bint fused) noexcept nogil:
    if t.which == QUANTIZE:
        quantize_pass(t, w, False, fused)
    elif t.which == QUANTIZE8:
        quantize_pass(t, w, True, fused)
    elif t.which == DEQUANTIZE:
        dequantize_pass(t, w, False)
    else:
        dequantize_pass(t, w, True)


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
    return by_columns(w, begin, end, TILE) if rows_share(w) else part(w, begin, end)


cdef int run_pieces(Task *t) except -1:
    cdef Py_ssize_t inner = t.walk.inner
    cdef Py_ssize_t step = max(PIECE // inner, 1) * inner if rows_share(&t.walk) else PIECE  # whole rows
    return in_pieces(piece, t, t.walk.size, PICOSECONDS, 1 << 10, step)


# What Python calls

cdef float *reciprocals_of(const float[::1] scale, Py_ssize_t size) noexcept:
    """1 / scale of all scales, to be freed; NULL where that does not pay or not all of them divide by multiplying."""
    cdef Py_ssize_t i, n = scale.shape[0]
    cdef float *found
    if n > size // 4 or chosen_level() == BASELINE:
        return NULL
    for i in range(n):
        if not divides_by_multiplying(scale[i]):
            return NULL
    found = <float *>PyMem_RawMalloc(n * sizeof(float))
    if found is not NULL:
        for i in range(n):
            found[i] = <float>1 / scale[i]
    return found


cdef bint run_quantize(Task *t, const float[::1] scale) except -1:
    """Run a task; whether x has a NaN or an infinity."""
    cdef float *reciprocals = NULL
    if t.walk.step and t.x_wide is NULL:
        reciprocals = reciprocals_of(scale, t.walk.size)
    t.reciprocal = reciprocals
    try:
        run_pieces(t)
    finally:
        PyMem_RawFree(reciprocals)
    return qn_atomic_get(&t.nonfinite) != 0


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
    return run_quantize(&t, scale)


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
    return run_quantize(&t, scale)


def dequantize(
    const uint8_t[::1] codes not None, bint is_signed, const float[::1] scale not None,
    const int32_t[::1] zero not None, tuple layout, float[::1] out not None,
):
    """Write (code - zero) * scale in float32; codes : uint8[size], read as int8 where `is_signed`."""
    cdef Task t
    memset(&t, 0, sizeof(t))
    t.walk = new_walk(layout)
    check_sizes(&t.walk, codes.shape[0], out.shape[0], scale.shape[0], zero.shape[0])
    if t.walk.size:
        t.which, t.codes, t.flip, t.scale, t.zero = DEQUANTIZE, &codes[0], 0x80 if is_signed else 0, &scale[0], &zero[0]
        t.out = &out[0]
        run_pieces(&t)


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
