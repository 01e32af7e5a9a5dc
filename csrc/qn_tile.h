/* SPDX-License-Identifier: BSD-3-Clause
 *
 * Everything around the products that is the same on every instruction set: quantizing rows, the epilogue with its
 * activation functions. An instruction set's file defines a vector of QN_W floats and the verbs
 * below, then includes this file once. The text is one, so the order of every operation is one, and so are the bits.
 *
 *   VF, VI, VU               vectors of QN_W floats, int32, uint32 (plain numbers where QN_W is 1); + - * / & | ^ << >> work
 *   vf_load vf_store vu_load vu_store vf_splat vu_splat
 *   vf_rint vf_abs           round half to even; absolute value
 *   vf_min vf_max            a < b ? a : b;  a > b ? a : b    (so the second operand where either is NaN)
 *   vu_max vi_max            the larger as unsigned, as signed integers; vu_largest vi_largest: of a vector's lanes
 *   vf_less(a, b, x, y)      a < b ? x : y
 *   vf_nan_to_zero           x == x ? x : 0
 *   vf_from_vu, vu_from_vf   convert int32 (its bits held as uint32) to float, and back (whole values only)
 *   vf_bits, vu_bits         the same bits, as float / as integer
 *   vu_from_rounded          convert to int32, rounding half to even
 *   QN_FMA; vf_fma(a, b, c) vf_fnma   defined where there are: a * b + c and c - a * b, rounded once
 *   vu_store_u8, vu_store_code   the low byte of each lane; an activation code in the kernel's width
 *   vu_store_codes(p, q, z)  four vectors, each plus z, as codes in the kernel's width, those beyond 0..255 as its ends; gives
 *                            their sums, QN_W of them, each of any four codes. The values fit 16 bits
 *   vu_store_bytes(p, q, z, b)   four vectors, each plus z (which gives 0..255), as bytes to which b is added
 *   vu_multiply              the low 32 bits of products
 *   vu_bytes_above(n, v, f, s)   is there a byte b in n vectors for which (2 b - f) modulo 256 is above s?
 *   VB                       vectors of bytes, as long as VF
 *   QN_LOOKUP; vf_of_nibble  defined where there are: the low four bits of each lane, as a float
 *   QN_X86_REGISTER          what inline assembly calls a vector register, on x86
 *   QN_SUMS_OF_8; sums_of_8(p, s)   defined where codes are bytes and it is quick: 4 * QN_W bytes into sums of 8 of them, uint64
 *   vu_load_u8 vu_load_u16   bytes, 16-bit words, zero-extended
 *   QN_A_BYTES               bytes an activation code takes
 */
#include "qn_decode.h"

#include <math.h>
#include <string.h>

/* ---- activation functions: fixed sequences of + - * /, within 2^-22 * max(1, |x|) of the true value ---- */

/* 2^y for -126 <= y <= 0: 2^n * 2^f with |f| <= 1/2, which is exact to take off, and 2^f by a polynomial fitted for its
 * relative error (7.5e-8). */
QN_INLINE VF exp2_of_negative(VF y) {
    VF n = vf_rint(y);
    VF f = y - n;
    VF e = vf_splat(1.32764713e-3f);
    e = e * f + vf_splat(9.67554189e-3f);
    e = e * f + vf_splat(5.55071309e-2f);
    e = e * f + vf_splat(2.40221202e-1f);
    e = e * f + vf_splat(6.93146944e-1f);
    e = e * f + vf_splat(1.00000012f);
    VU power = (vu_from_vf(n) + vu_splat(127)) << 23;
    return e * vf_bits(power);
}

/* All three are max(x, 0) - |x| * tail(|x|) with a tail that vanishes: nothing cancels, nothing overflows, and the
 * negative side keeps its relative precision. A NaN stays one through the max. */
QN_INLINE VF relu(VF x) { return vf_max(vf_splat(0.0f), x); }

/* x * Phi(x), the tail being erfc(a / sqrt 2) / 2 = e^(-a^2 / 2) * poly(1 / (1 + 0.4 a)): the form of Abramowitz and
 * Stegun 26.2.17 with six terms, refitted (weighted least squares) for the error of a * tail. */
QN_INLINE VF gelu(VF x) {
    VF a = vf_min(vf_abs(x), vf_splat(12.5f)); /* beyond, the tail is nothing; before, no step of it is subnormal */
    VF t = vf_splat(1.0f) / (vf_splat(1.0f) + vf_splat(0.4f) * a);
    VF p = vf_splat(0.0570474230f);
    p = p * t + vf_splat(-0.257022977f);
    p = p * t + vf_splat(0.342932403f);
    p = p * t + vf_splat(0.0109998528f);
    p = p * t + vf_splat(0.189431950f);
    p = p * t + vf_splat(0.156611666f);
    p = p * t;
    VF tail = exp2_of_negative(a * a * vf_splat(-0.721347511f)) * p; /* -log2(e) / 2 */
    return relu(x) - a * tail;
}

/* x * sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3) */
QN_INLINE VF gelu_tanh(VF x) {
    VF a = vf_min(vf_abs(x), vf_splat(9.5f));
    VF e = exp2_of_negative(a * (vf_splat(-2.30220819f) + vf_splat(-0.102943242f) * (a * a))); /* -2 u log2(e) */
    return relu(x) - a * (e / (vf_splat(1.0f) + e));
}

/* x * sigmoid(x) */
QN_INLINE VF silu(VF x) {
    VF a = vf_min(vf_abs(x), vf_splat(87.0f));
    VF e = exp2_of_negative(a * vf_splat(-1.44269502f)); /* -log2(e) */
    return relu(x) - a * (e / (vf_splat(1.0f) + e));
}

/* Those that are worth a call: once a kernel, not once for every way of writing y. */
QN_ONCE VF activate_smoothly(VF x, qn_activation activation) {
    if (activation == QN_GELU) return gelu(x);
    return activation == QN_GELU_TANH ? gelu_tanh(x) : silu(x);
}

QN_INLINE VF activate(VF x, qn_activation activation) {
    if (activation == QN_IDENTITY) return x;
    return activation == QN_RELU ? relu(x) : activate_smoothly(x, activation);
}

/* ---- quantizing a row ---- */

/* How many of n remaining elements the vector at hand takes. */
QN_INLINE size_t taken(int64_t n) { return n >= QN_W ? QN_W : (size_t)n & (QN_W - 1); }

/* A vector of the first n elements, then zeros. */
QN_INLINE VF load_some(const float *x, int64_t n) {
    float padded[QN_W] = {0};
    if (n >= QN_W) return vf_load(x);
    memcpy(padded, x, taken(n) * sizeof *x);
    return vf_load(padded);
}

/* clamp(rint(x / scale) + zero) as an unsigned code: clamped while it is a float, so that nothing overflows;
 * a NaN becomes the zero point, an infinity the end of the range. */
QN_INLINE VU quantize(VF x, VF scale, VF low, VF high, VU zero) {
    VF t = vf_rint(vf_nan_to_zero(x / scale));
    return vu_from_vf(vf_min(vf_max(t, low), high)) + zero;
}

/* The range of the finite entries of x[k], extended to contain 0: every entry is looked at. */
static void range_of_finite(const float *x, int64_t k, float *low, float *high) {
    *low = *high = 0.0f;
    for (int64_t i = 0; i < k; i++) {
        if (!(fabsf(x[i]) < INFINITY)) continue;
        *low = x[i] < *low ? x[i] : *low;
        *high = x[i] > *high ? x[i] : *high;
    }
}

/* The range of the finite entries of x[k], extended to contain 0. As integers, the bits of floats rise with a positive
 * number and, unsigned, with the size of a negative one, infinities and NaN above all numbers: two integer maxima, which
 * more of a core's units can do than float ones, find both ends and whether all is finite, as it nearly always is. Returns
 * that. */
static int finite_range(const float *x, int64_t k, float *low, float *high) {
    VU lo[4], hi[4]; /* four chains: a maximum takes longer than it takes to start the next */
    for (int j = 0; j < 4; j++) lo[j] = hi[j] = vu_splat(0);
    int64_t i = 0;
    for (; i + 4 * QN_W <= k; i += 4 * QN_W) {
        for (int j = 0; j < 4; j++) {
            VU v = vu_bits(vf_load(x + i + j * QN_W));
            lo[j] = vu_max(v, lo[j]);
            hi[j] = vi_max(v, hi[j]);
        }
    }
    for (; i < k; i += QN_W) {
        VU v = vu_bits(load_some(x + i, k - i));
        lo[0] = vu_max(v, lo[0]);
        hi[0] = vi_max(v, hi[0]);
    }
    uint32_t least = vu_largest(vu_max(vu_max(lo[0], lo[1]), vu_max(lo[2], lo[3])));
    uint32_t most = vi_largest(vi_max(vi_max(hi[0], hi[1]), vi_max(hi[2], hi[3])));
    if (least < 0x80000000u) least = 0; /* nothing is negative */
    if (least >= 0xFF800000u || most >= 0x7F800000u) {
        range_of_finite(x, k, low, high);
        return 0;
    }
    memcpy(low, &least, 4);
    memcpy(high, &most, 4);
    return 1;
}

/* 1 where there is nothing but zeros; never below the smallest normal float32. */
static float valid_scale(float scale, float largest) {
    if (largest == 0.0f) return 1.0f;
    return scale < 0x1p-126f ? 0x1p-126f : scale;
}

/* The scale, zero point and range of a row's codes, and whether entries of the row lie outside of that range. */
typedef struct { float scale; int32_t zero, low, high, beyond; } row_params;

/* Of a row whose range, with 0, is low..high; `finite`: all of it is. */
static row_params params_of_range(const qn_call *c, float low, float high, int finite) {
    row_params p = {c->in_scale, c->in_zero, c->in_min, c->in_max, 1};
    if (c->input == QN_INPUT_DYNAMIC) {
        float range = high - low;
        p.scale = valid_scale(range <= 0x1.fffffep127f ? range / 255.0f : high / 255.0f - low / 255.0f, high > -low ? high : -low);
        float zero = (0.0f - low) / p.scale;
        p = (row_params){p.scale, (int32_t)rintf(zero > 255.0f ? 255.0f : zero), 0, 255, !finite};
    } else if (c->input == QN_INPUT_DYNAMIC_SYMMETRIC) {
        float largest = high > -low ? high : -low;
        p = (row_params){valid_scale(largest / 127.0f, largest), 128, 1, 255, !finite};
    }
    return p;
}

/* Division by multiplication: with r = fl(1 / s), t = fl(x r) and e = fl(x - t s), fl(t + e r) is fl(x / s), as long as nothing
 * is subnormal or overflows; tests/division.c says why, and has tried every s. (That is Markstein's step, IBM Journal of
 * Research and Development 34, 1990, from a t that need not be one of the two nearest floats.) Where x / s is so small that e is
 * subnormal, the code is the zero point whatever the last places are. */
static int divides_by_multiplying(float scale) {
#ifdef QN_FMA
    return scale >= 0x1p-100f && scale <= 0x1p100f;
#else
    (void)scale;
    return 0;
#endif
}

/* clamp(rint(x / scale), low, high) where `scale` divides by multiplying. Unless `beyond`, x is finite and nothing lies
 * outside of low..high by more than the rounding of the zero point, and is left there. */
QN_INLINE VU quantize_by_reciprocal(VF x, VF scale, VF reciprocal, VF low, VF high, const int beyond) {
#ifdef QN_FMA
    if (beyond) { /* every code is within 512 of the zero point */
        VF most = scale * vf_splat(512.0f);
        x = vf_min(vf_max(vf_nan_to_zero(x), vf_splat(0.0f) - most), most);
    }
    VF t = x * reciprocal;
    VF q = vf_fma(vf_fnma(t, scale, x), reciprocal, t);
    return vu_from_rounded(beyond ? vf_min(vf_max(q, low), high) : q);
#else
    (void)reciprocal, (void)beyond;
    return quantize(x, scale, low, high, vu_splat(0));
#endif
}

QN_INLINE uint32_t total_of(VU sums) {
    uint32_t lanes[QN_W], total = 0;
    vu_store(lanes, sums);
    for (int j = 0; j < QN_W; j++) total += lanes[j];
    return total;
}

/* Quantize n floats into codes; returns the sum of the codes. */
QN_INLINE int32_t quantize_floats(const float *x, int64_t n, row_params p, const int beyond, uint8_t *a) {
    VF scale = vf_splat(p.scale), low = vf_splat((float)(p.low - p.zero)), high = vf_splat((float)(p.high - p.zero));
    VU zero = vu_splat((uint32_t)p.zero), sums = vu_splat(0);
    int64_t i = 0;
    if (divides_by_multiplying(p.scale)) {
        VF reciprocal = vf_splat(1.0f / p.scale);
        for (; i + 4 * QN_W <= n; i += 4 * QN_W) {
            VU q[4];
            for (int j = 0; j < 4; j++)
                q[j] = quantize_by_reciprocal(vf_load(x + i + j * QN_W), scale, reciprocal, low, high, beyond);
            sums += vu_store_codes(a + i * QN_A_BYTES, q, p.zero);
        }
    }
    for (; i + QN_W <= n; i += QN_W) {
        VU q = quantize(vf_load(x + i), scale, low, high, zero);
        sums += q;
        vu_store_code(a + i * QN_A_BYTES, q);
    }
    uint32_t lanes[QN_W], total = total_of(sums);
    if (i < n) {
        uint8_t codes[QN_W * QN_A_BYTES];
        VU q = quantize(load_some(x + i, n - i), scale, low, high, zero);
        vu_store_code(codes, q);
        memcpy(a + i * QN_A_BYTES, codes, taken(n - i) * QN_A_BYTES);
        vu_store(lanes, q);
        for (int64_t j = 0; j < n - i; j++) total += lanes[j];
    }
    return (int32_t)total;
}

/* Take n codes as they are (signed ones ^ 0x80); returns their sum. */
static int32_t take_codes(const uint8_t *x, int64_t n, uint8_t flip, uint8_t *a) {
    VU flips = vu_splat(flip), sums = vu_splat(0);
    int64_t i = 0;
    for (; i + QN_W <= n; i += QN_W) {
        VU codes = vu_load_u8(x + i) ^ flips;
        sums += codes;
        vu_store_code(a + i * QN_A_BYTES, codes);
    }
    uint32_t total = total_of(sums);
    for (; i < n; i++) {
        uint8_t code[QN_A_BYTES] = {x[i] ^ flip}; /* little-endian */
        memcpy(a + i * QN_A_BYTES, code, QN_A_BYTES);
        total += code[0];
    }
    return (int32_t)total;
}

/* n float8 codes as their values. */
static void take_float8(const uint8_t *x, int64_t n, qn_format format, float *a) {
    for (int64_t i = 0; i < n; i += QN_W) {
        uint8_t some[QN_W] = {0};
        float lanes[QN_W];
        memcpy(some, x + i, taken(n - i));
        vf_store(lanes, decode_float8(vu_load_u8(some), format));
        memcpy(a + i, lanes, taken(n - i) * sizeof *a);
    }
}

/* float8: quantize n floats and decode them again, for products in float32. A binade's quantum is a power of two, so
 * rounding is one rint; below the smallest normal the quantum stays. */
static void quantize_float8(const float *x, int64_t n, float scale, qn_format format, float *a) {
    int mantissa = format == QN_FLOAT8_E4M3FN ? 3 : 2;
    float largest = format == QN_FLOAT8_E4M3FN ? 448.0f : 57344.0f;
    VF quantum = vf_splat(format == QN_FLOAT8_E4M3FN ? 0x1p-9f : 0x1p-16f);
    VF per_quantum = vf_splat(format == QN_FLOAT8_E4M3FN ? 0x1p9f : 0x1p16f);
    VF smallest_normal = vf_splat(format == QN_FLOAT8_E4M3FN ? 0x1p-6f : 0x1p-14f);
    VU half = vu_splat((1u << (22 - mantissa)) - 1), mask = vu_splat(~((1u << (23 - mantissa)) - 1));
    for (int64_t i = 0; i < n; i += QN_W) {
        VF t = vf_nan_to_zero(load_some(x + i, n - i) / vf_splat(scale));
        VF size = vf_min(vf_abs(t), vf_splat(largest));
        VU sign = vu_bits(t) & vu_splat(0x80000000u);
        VU bits = vu_bits(size);
        VF normal = vf_bits((bits + half + ((bits >> (23 - mantissa)) & vu_splat(1))) & mask);
        VF subnormal = vf_rint(size * per_quantum) * quantum;
        VF rounded = vf_bits(vu_bits(vf_less(size, smallest_normal, subnormal, normal)) | sign);
        float lanes[QN_W];
        vf_store(lanes, rounded);
        memcpy(a + i, lanes, taken(n - i) * sizeof *a);
    }
}

static int takes_codes(const qn_call *c) { return c->input == QN_INPUT_INT8_CODES || c->input == QN_INPUT_UINT8_CODES; }

#ifdef QN_SUMS_OF_8
/* Sums of groups of codes, a byte each, that lie one after the other, the last one filled up; `group` is a multiple of 8. */
static void sum_codes_of_groups(const uint8_t *a, int64_t group, int64_t groups, int32_t *sum, int64_t stride) {
    uint64_t eights[QN_W / 2];
    int at = QN_W / 2;
    for (int64_t g = 0; g < groups; g++, sum += stride) {
        uint64_t total = 0;
        for (int64_t i = 0; i < group; i += 8) {
            if (at == QN_W / 2) {
                sums_of_8(a, eights); /* rows of codes end at a multiple of 64 bytes */
                a += QN_W * 4;
                at = 0;
            }
            total += eights[at++];
        }
        *sum = (int32_t)total;
    }
}
#endif

static void quantize_row_integer(const qn_call *c, qn_rows *rows, int64_t i, row_params p, const uint8_t *x, uint8_t *a) {
    const qn_weights *w = c->w;
    rows->scale[i] = p.scale;
    rows->zero[i] = p.zero;
#ifdef QN_SUMS_OF_8
    if (w->groups > 1 && w->group == w->group_k && !takes_codes(c)) { /* one run of codes, without gaps between groups */
        if (p.beyond)
            quantize_floats((const float *)x, w->k, p, 1, a);
        else
            quantize_floats((const float *)x, w->k, p, 0, a);
        memset(a + w->k, 0, (size_t)(w->groups * w->group_k - w->k));
        sum_codes_of_groups(a, w->group_k, w->groups, rows->sum + i * rows->sum_row, rows->sum_group);
        return;
    }
#endif
    for (int64_t g = 0; g < w->groups; g++) {
        int64_t start = g * w->group, n = w->k - start < w->group ? w->k - start : w->group;
        uint8_t *to = a + g * w->group_k * QN_A_BYTES;
        rows->sum[i * rows->sum_row + g * rows->sum_group] = takes_codes(c)
            ? take_codes(x + start, n, c->input == QN_INPUT_INT8_CODES ? 0x80 : 0, to)
            : p.beyond ? quantize_floats((const float *)x + start, n, p, 1, to)
                       : quantize_floats((const float *)x + start, n, p, 0, to);
        memset(to + n * QN_A_BYTES, 0, (size_t)(w->group_k - n) * QN_A_BYTES);
    }
}

static void quantize_row_float8(const qn_call *c, qn_rows *rows, int64_t i, const uint8_t *x, float *a) {
    const qn_weights *w = c->w;
    rows->scale[i] = c->in_scale;
    if (takes_codes(c)) {
        take_float8(x, w->k, w->format, a);
        return;
    }
    if (c->input != QN_INPUT_STATIC) {
        float low, high, largest = w->format == QN_FLOAT8_E4M3FN ? 448.0f : 57344.0f;
        finite_range((const float *)x, w->k, &low, &high);
        high = high > -low ? high : -low;
        rows->scale[i] = valid_scale(high / largest, high);
    }
    quantize_float8((const float *)x, w->k, rows->scale[i], w->format, a);
}

enum { BATCH_ROWS = 16, BATCH_BYTES = 24 << 10 };

/* Rows are looked at some at a time, as many as stay in the L1 cache: first the ranges of all of them, then their scales,
 * then their codes. A row by itself would wait at every step for the one before. */
static void quantize_rows(const qn_call *c, qn_rows *rows) {
    const uint8_t *x = (const uint8_t *)c->x + rows->first * c->x_stride;
    int float8 = c->w->format >= QN_FLOAT8_E4M3FN, dynamic = c->input == QN_INPUT_DYNAMIC || c->input == QN_INPUT_DYNAMIC_SYMMETRIC;
    int64_t batch = BATCH_BYTES / (c->w->k * 4 + 1);
    batch = batch < 1 ? 1 : batch > BATCH_ROWS ? BATCH_ROWS : batch;
    for (int64_t first = 0; first < rows->count; first += batch) {
        int64_t count = rows->count - first < batch ? rows->count - first : batch;
        float low[BATCH_ROWS], high[BATCH_ROWS];
        int finite[BATCH_ROWS];
        row_params p[BATCH_ROWS];
        for (int64_t i = 0; i < count && dynamic && !float8; i++)
            finite[i] = finite_range((const float *)(x + (first + i) * c->x_stride), c->w->k, low + i, high + i);
        for (int64_t i = 0; i < count && !float8; i++)
            p[i] = dynamic ? params_of_range(c, low[i], high[i], finite[i]) : params_of_range(c, 0, 0, 1);
        for (int64_t i = 0; i < count; i++) {
            int64_t row = first + i;
            uint8_t *a = rows->a + row * rows->a_stride;
            if (float8)
                quantize_row_float8(c, rows, row, x + row * c->x_stride, (float *)a);
            else
                quantize_row_integer(c, rows, row, p[i], x + row * c->x_stride, a);
        }
    }
}

/* ---- the epilogue ---- */

/* Give one row of finished sums to y as floats. */
QN_INLINE void emit_floats(const float *values, int64_t columns, float *y, const qn_activation activation) {
    int64_t n = 0;
    for (; n + QN_W <= columns; n += QN_W) vf_store(y + n, activate(vf_load(values + n), activation));
    if (n < columns) {
        float lanes[QN_W];
        vf_store(lanes, activate(vf_load(values + n), activation));
        memcpy(y + n, lanes, taken(columns - n) * 4);
    }
}

/* The same as codes: clamp(rint(activation(value) / scale) + zero, low, high), one byte each. */
QN_INLINE void emit_codes(const float *values, int64_t columns, float scale, int32_t zero, int32_t low, int32_t high, uint8_t *y,
                          const qn_activation activation) {
    VF s = vf_splat(scale), lowest = vf_splat((float)(low - zero)), highest = vf_splat((float)(high - zero));
    VU z = vu_splat((uint32_t)zero);
    int64_t n = 0;
    if (divides_by_multiplying(scale)) {
        VF reciprocal = vf_splat(1.0f / scale);
        for (; n + 4 * QN_W <= columns; n += 4 * QN_W) {
            VU q[4];
            for (int j = 0; j < 4; j++)
                q[j] = quantize_by_reciprocal(activate(vf_load(values + n + j * QN_W), activation), s, reciprocal, lowest,
                                              highest, 1);
            vu_store_bytes(y + n, q, zero - low, low);
        }
        for (; n + QN_W <= columns; n += QN_W)
            vu_store_u8(y + n, z + quantize_by_reciprocal(activate(vf_load(values + n), activation), s, reciprocal, lowest,
                                                          highest, 1));
    }
    for (; n < columns; n += QN_W) {
        uint8_t lanes[QN_W];
        vu_store_u8(lanes, quantize(activate(load_some(values + n, columns - n), activation), s, lowest, highest, z));
        memcpy(y + n, lanes, taken(columns - n));
    }
}

static void quantize_values(const float *x, int64_t n, float scale, int32_t zero, int32_t low, int32_t high, uint8_t *codes) {
    emit_codes(x, n, scale, zero, low, high, codes, QN_IDENTITY);
}

static inline int output_bytes(const qn_call *c) { /* of a value that an epilogue writes */
    return c->output == QN_OUTPUT_INT8 || c->output == QN_OUTPUT_UINT8 ? 1 : 4;
}

static inline uint8_t *output_at(const qn_call *c, const qn_rows *rows, int64_t row, int64_t column) {
    return (uint8_t *)c->y + (rows->first + row) * c->y_stride + column * output_bytes(c);
}

/* Ask for the lines of y that a tile of R rows will write, early enough that they are at hand when its sums are: a tile
 * goes down the rows, a few lines of each, which no hardware prefetcher takes for a stream. (x86: prefetchw, which every
 * 64-bit CPU executes, the oldest as a no-op.) */
QN_INLINE void ask_for_outputs(const int R, const int columns, const qn_call *c, const qn_rows *rows, int64_t row,
                               int64_t column) {
#ifdef __GNUC__
    const char *y = (const char *)output_at(c, rows, row, column);
    int64_t bytes = (int64_t)columns * output_bytes(c);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
        for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(y + r * c->y_stride + at, 1);
#endif
}

/* Give a tile of finished sums, float [count][stride] with bias and all, to y; from `column` on, as many as there are. */
QN_ONCE void emit(const qn_call *c, const qn_rows *rows, int64_t row, int count, int64_t column, int64_t columns,
                  const float *values, int64_t stride) {
    int codes = output_bytes(c) == 1;
    uint8_t *y = output_at(c, rows, row, column);
    if (columns > c->w->n - column) columns = c->w->n - column;
#define EMIT(ACTIVATION)                                                                                               \
    for (int r = 0; r < count; r++) {                                                                                  \
        if (codes)                                                                                                     \
            emit_codes(values + r * stride, columns, c->out_scale, c->out_zero, c->out_min, c->out_max,                \
                       y + r * c->y_stride, ACTIVATION);                                                               \
        else                                                                                                           \
            emit_floats(values + r * stride, columns, (float *)(y + r * c->y_stride), ACTIVATION);                     \
    }
    if (c->activation == QN_IDENTITY) {
        EMIT(QN_IDENTITY)
    } else if (c->activation == QN_RELU) {
        EMIT(QN_RELU)
    } else {
        EMIT(c->activation)
    }
#undef EMIT
}

/* The sums of codes of a vector of columns: stored, or those of int4, which are soon found. */
QN_INLINE VU sum_of_columns(const qn_weights *w, const uint8_t *panel, int n, int64_t g) {
    if (w->has_sums) return vu_load((const uint32_t *)(const void *)(panel + w->sum_at) + g * QN_NR + n);
    if (w->format != QN_INT4) return vu_splat(0);
    const uint8_t *b = panel + w->codes_at + g * w->group_k * QN_NR / 2 + n * QN_KR;
    VU sum = vu_splat(0), low = vu_splat(0x0F0F0F0Fu), even_bytes = vu_splat(0x00FF00FFu);
    for (int64_t k = 0; k < w->group_k; k += 2 * QN_KR, b += 64) {
        VU codes = vu_load((const uint32_t *)(const void *)b);
        VU pairs = (codes & low) + ((codes >> 4) & low);
        sum += (pairs & even_bytes) + ((pairs >> 8) & even_bytes); /* 16 bits: at most 60 for each 8 of k */
    }
    return (sum & vu_splat(0xFFFF)) + (sum >> 16);
}

/* What the columns of one vector have in common: terms of the epilogue that no row changes; sums and zero points only for
 * sums of products of integers. */
typedef struct { VF scale, bias; VU code_sum, zero, int_bias; } column_terms;

QN_INLINE column_terms terms_of_columns(const qn_weights *w, const uint8_t *panel, int n, int64_t g, const int integers) {
    column_terms t;
    t.scale = scale_of_columns(w, panel, n, g);
    t.bias = w->bias == QN_BIAS_FLOAT32 ? vf_load((const float *)(panel + w->bias_at) + n) : vf_splat(-0.0f); /* x + -0 is x */
    t.int_bias = w->bias == QN_BIAS_INT32 ? vu_load((const uint32_t *)(panel + w->bias_at) + n) : vu_splat(0);
    t.code_sum = integers ? sum_of_columns(w, panel, n, g) : vu_splat(0);
    t.zero = integers ? zero_of_columns(w, panel, n, g) : vu_splat(0);
    return t;
}

/* sum of (a - za) (w - zw), from the sum of a w; za and `a_sum`, the sum of a - za, are the row's. */
QN_INLINE VU correct(VU sum, const column_terms *t, int asymmetric, int32_t za, uint32_t a_sum) {
    VU v = sum - vu_multiply(vu_splat((uint32_t)za), t->code_sum);
    return asymmetric ? v - vu_multiply(t->zero, vu_splat(a_sum)) : v;
}

/* The row's sum of a - za in group g. */
QN_INLINE uint32_t corrected_sum(const qn_weights *w, const qn_rows *rows, int64_t i, int64_t g) {
    int64_t k = w->k - g * w->group < w->group ? w->k - g * w->group : w->group;
    return (uint32_t)rows->sum[i * rows->sum_row + g * rows->sum_group] - (uint32_t)k * (uint32_t)rows->zero[i];
}

enum { COLUMN_VECTORS = QN_TILE_VALUES / QN_W }; /* of a row of a tile, at most */

/* CALL(R) with a constant R for each number of rows that a tile of at most 6 has. */
#define QN_ROWS_TO_6(rows, CALL)  \
    switch (rows) {               \
    case 1: CALL(1); break;       \
    case 2: CALL(2); break;       \
    case 3: CALL(3); break;       \
    case 4: CALL(4); break;       \
    case 5: CALL(5); break;       \
    default: CALL(6); break;      \
    }

QN_ONCE void epilogue(const qn_call *c, const qn_rows *rows, int64_t row, int count, int64_t panel, int panels, int64_t g,
                      const int32_t *acc, const float *converted, float *sum);

/* Finish a tile, of whole panels, by way of memory. */
QN_INLINE void finish_stored_tile(const int R, const int V, const qn_call *c, const qn_rows *rows, int64_t row, int64_t panel,
                                  VU sum[][COLUMN_VECTORS]) {
    const int width = QN_NR / QN_W;
    int32_t acc[QN_TILE_ROWS * QN_TILE_COLS];
    float values[QN_TILE_ROWS * QN_TILE_COLS];
#pragma GCC unroll 8
    for (int first = 0; first < V; first += QN_TILE_PANELS * width) {
        const int some = V - first < QN_TILE_PANELS * width ? V - first : QN_TILE_PANELS * width;
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
#pragma GCC unroll 8
            for (int v = 0; v < some; v++) vu_store((uint32_t *)acc + r * QN_TILE_COLS + v * QN_W, sum[r][first + v]);
        epilogue(c, rows, row, R, panel + first / width, some / width, 0, acc, 0, values);
    }
}

/* Finish a tile of int8 products that has one group while it is in registers: R rows by V vectors of columns, from
 * `column` (the first of a panel or of a part of one) on. */
QN_INLINE void finish_tile(const int R, const int V, const qn_call *c, const qn_rows *rows, int64_t row, int64_t column,
                           VU sum[][COLUMN_VECTORS]) {
    const qn_weights *w = c->w;
    const int seldom = w->asymmetric || w->bias == QN_BIAS_INT32;
    if (V * QN_W % QN_NR == 0 && seldom) {
        finish_stored_tile(R, V, c, rows, row, column / QN_NR, sum);
        return;
    }
    const float *row_scale = rows->scale + row;
    const int32_t *row_zero = rows->zero + row;
    float values[QN_TILE_VALUES];
    int direct = c->output == QN_OUTPUT_FLOAT32 && c->activation == QN_IDENTITY && column + V * QN_W <= w->n;
    float *first = direct ? (float *)output_at(c, rows, row, column) : values;
    int64_t stride = direct ? c->y_stride / 4 : V * QN_W;
    const uint8_t *panel = w->data + column / QN_NR * w->panel_bytes;
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) {
        int n = (int)(column + v * QN_W) % QN_NR;
        column_terms t = terms_of_columns(w, panel, n, 0, 1);
        float *to = first + v * QN_W;
        if (V * QN_W % QN_NR != 0 && seldom) {
#pragma GCC unroll 8
            for (int r = 0; r < R; r++)
                sum[r][v] += t.int_bias - vu_multiply(t.zero, vu_splat(corrected_sum(w, rows, row + r, 0)));
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; r++, to += stride) {
            VF product = vf_from_vu(correct(sum[r][v], &t, 0, row_zero[r], 0));
            product = product * (vf_splat(row_scale[r]) * t.scale);
            vf_store(to, product + t.bias);
        }
        if (n + QN_W == QN_NR) panel += w->panel_bytes;
    }
    if (!direct) emit(c, rows, row, R, column, V * QN_W, values, V * QN_W);
}

/* What the epilogue of one group does is the same for every row of a tile, so it is decided once per vector of columns
 * and the rows are a loop without decisions: `kind` is a constant where this is inlined. */
typedef enum { GROUP, LAST, SUMS } epilogue_kind;

QN_INLINE void finish_columns(const qn_call *c, const qn_rows *rows, int64_t row, int count, const uint8_t *panel, int n,
                              int64_t columns, int64_t g, const int32_t *acc, const float *converted, float *sum, uint8_t *y,
                              const epilogue_kind kind) {
    const qn_weights *w = c->w;
    int float_input = c->input == QN_INPUT_FLOAT, summed = !acc && !converted, add_sum = g > 0 && !float_input && !summed;
    column_terms t = terms_of_columns(w, panel, n, g, acc != 0);
    for (int r = 0; r < count; r++, y += c->y_stride) {
        int64_t i = row + r, lane = (int64_t)r * QN_TILE_COLS + n;
        VF product;
        if (acc) {
            uint32_t a_sum = w->asymmetric ? corrected_sum(w, rows, i, g) : 0;
            VU v = correct(vu_load((const uint32_t *)acc + lane), &t, w->asymmetric, rows->zero[i], a_sum) + t.int_bias;
            if (kind == SUMS) {
                uint32_t lanes[QN_W];
                vu_store(lanes, v);
                memcpy(y, lanes, taken(columns) * 4);
                continue;
            }
            product = vf_from_vu(v);
        } else {
            product = vf_load((converted ? converted : sum) + lane);
        }
        if (!float_input && !summed) product = product * (vf_splat(rows->scale[i]) * t.scale);
        if (add_sum) product = vf_load(sum + lane) + product;
        if (kind == LAST) product = product + t.bias;
        vf_store(sum + lane, product);
    }
}

static void epilogue(const qn_call *c, const qn_rows *rows, int64_t row, int count, int64_t panel, int panels, int64_t g,
                     const int32_t *acc, const float *converted, float *sum) {
    const qn_weights *w = c->w;
    epilogue_kind kind = c->output == QN_OUTPUT_ACC32 ? SUMS
                         : g < w->groups - 1 && c->input != QN_INPUT_FLOAT ? GROUP : LAST;
#define FINISH(KIND)                                                                                                   \
    finish_columns(c, rows, row, count, from, n, columns, g, acc ? acc + p * QN_NR : 0,                                 \
                   converted ? converted + p * QN_NR : 0, sum + p * QN_NR, y, KIND)
    for (int p = 0; p < panels; p++) {
        const uint8_t *from = w->data + (panel + p) * w->panel_bytes;
        for (int n = 0; n < QN_NR; n += QN_W) {
            int64_t column = (panel + p) * QN_NR + n, columns = w->n - column;
            if (columns <= 0) break;
            /* Accumulators are kept apart group by group. */
            uint8_t *y = (uint8_t *)c->y + (rows->first + row) * c->y_stride + (g * w->n + column) * 4;
            switch (kind) {
            case GROUP: FINISH(GROUP); break;
            case SUMS: FINISH(SUMS); break;
            default: FINISH(LAST); break;
            }
        }
    }
    if (kind == LAST) emit(c, rows, row, count, panel * QN_NR, panels * QN_NR, sum, QN_TILE_COLS);
#undef FINISH
}
