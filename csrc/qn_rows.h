/* SPDX-License-Identifier: BSD-3-Clause
 *
 * Rows of activations: their ranges, scales, zero points, codes and sums of codes. Made of the verbs that qn_tile.h lists, after
 * which an instruction set's file includes this, and of the `finite_range` of qn_range.h.
 */
#include "qn_quantize.h"

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
        QN_AROUND(finite_range)((const float *)x, w->k, &low, &high);
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
            finite[i] = QN_AROUND(finite_range)((const float *)(x + (first + i) * c->x_stride), c->w->k, low + i, high + i);
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
