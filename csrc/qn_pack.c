/* SPDX-License-Identifier: BSD-3-Clause
 *
 * Weights into panels, and back.
 */
#include "qn_atomic.h"
#include "qn_float_mode.h"
#include "qn_gemm.h"
#include "qn_scratch.h"

#include <string.h>

void qn_weights_layout(qn_weights *w) {
    w->groups = w->k ? (w->k + w->group - 1) / w->group : 1;
    w->group_k = qn_round_up(w->group, QN_K_PAD);
    w->panels = (w->n + QN_NR - 1) / QN_NR;
    int64_t a_group = QN_NR * w->groups * 4;
    w->bias_at = 0;
    w->scale_at = w->bias == QN_NO_BIAS ? 0 : QN_NR * 4;
    w->sum_at = w->scale_at + (w->scale == QN_SCALE_FLOAT32 ? a_group : a_group / 2);
    w->zero_at = w->sum_at + (w->has_sums ? a_group : 0);
    int64_t zeros = w->format != QN_INT4 ? (w->asymmetric ? a_group : 0) : w->one_zero < 0 ? w->groups * QN_NR / 2 : 0;
    w->codes_at = qn_round_up(w->zero_at + zeros, 64);
    w->panel_bytes = w->codes_at + qn_round_up(w->groups * w->group_k * QN_NR / (w->format == QN_INT4 ? 2 : 1), 64);
}

/* Where the code of column n and (padded) k lies among a panel's codes; for int4 the byte that holds its nibble. */
static int64_t code_at(const qn_weights *w, int64_t n, int64_t k) {
    if (w->format == QN_INT4) return k / 8 * 64 + n * QN_KR + k % 4;
    return k / QN_KR * 64 + n * QN_KR + k % QN_KR;
}

/* How rows of codes lie before they are packed: int8 a byte each; int4 a byte each; int4 two a byte, the first in the low nibble. */
typedef enum { ROWS_INT8, ROWS_INT4, ROWS_NIBBLES } row_form;

static int64_t k_of_step(const row_form form) { return form == ROWS_INT8 ? QN_KR : 2 * QN_KR; }

/* Bytes of a row that go into a lane. */
static int64_t bytes_of_step(const row_form form) { return form == ROWS_INT4 ? 2 * QN_KR : QN_KR; }

/* Four bytes at `row`, of which only `count` are left. */
static uint32_t bytes_of_row(const uint8_t *row, int64_t count) {
    uint32_t bytes = 0;
    if (count >= QN_KR)
        memcpy(&bytes, row, QN_KR); /* of a constant size: one load */
    else
        memcpy(&bytes, row, (size_t)count);
    return bytes;
}

/* Eight nibbles in the order of a row, 01234567, to that of a lane, 04152637: halves of the whole are shuffled, then of each half.
 * X may be a vector. */
#define SHUFFLE_NIBBLES(X) \
    do { \
        (X) = ((X) & 0xFF0000FFu) | ((X) & 0x0000FF00u) << 8 | ((X) >> 8 & 0x0000FF00u); \
        (X) = ((X) & 0xF00FF00Fu) | ((X) & 0x00F000F0u) << 4 | ((X) >> 4 & 0x00F000F0u); \
    } while (0)

/* A lane of a panel: the codes at `row`, of which only `k` are left. */
static uint32_t lane_of_row(const row_form form, const uint8_t *row, int64_t k) {
    if (form == ROWS_INT8) return bytes_of_row(row, k);
    if (form == ROWS_INT4) {
        uint32_t even = bytes_of_row(row, k), odd = k > QN_KR ? bytes_of_row(row + QN_KR, k - QN_KR) : 0;
        return (even & 0x0F0F0F0Fu) | (odd & 0x0F0F0F0Fu) << 4;
    }
    uint32_t nibbles = bytes_of_row(row, (k + 1) / 2);
    if (k < 2 * QN_KR) nibbles &= ((uint32_t)1 << (4 * k)) - 1; /* what pads a row may be anything */
    SHUFFLE_NIBBLES(nibbles);
    return nibbles;
}

#ifdef __has_builtin
#if __has_builtin(__builtin_shufflevector)
#define VECTOR_STEPS 16
#endif
#endif

#ifdef VECTOR_STEPS
typedef uint32_t four __attribute__((vector_size(16)));

static four load_four(const uint8_t *row, const row_form form) {
    four x;
    memcpy(&x, row, sizeof x);
    if (form == ROWS_NIBBLES) SHUFFLE_NIBBLES(x);
    return x;
}

/* VECTOR_STEPS steps of sixteen rows: squares of four by four are transposed, a cache line of four rows before the next four, as
 * sixteen rows may all want the same few places of the cache. */
static void pack_steps(const row_form form, const uint8_t *rows, int64_t stride, uint8_t *to) {
    for (int n = 0; n < QN_NR; n += 4, rows += 4 * stride, to += 4 * QN_KR) {
        for (int step = 0; step < VECTOR_STEPS; step += 4) {
            four r[4];
            for (int i = 0; i < 4; i++) r[i] = load_four(rows + i * stride + step * QN_KR, form);
            four a = __builtin_shufflevector(r[0], r[1], 0, 4, 1, 5), b = __builtin_shufflevector(r[2], r[3], 0, 4, 1, 5);
            four c = __builtin_shufflevector(r[0], r[1], 2, 6, 3, 7), d = __builtin_shufflevector(r[2], r[3], 2, 6, 3, 7);
            r[0] = __builtin_shufflevector(a, b, 0, 1, 4, 5);
            r[1] = __builtin_shufflevector(a, b, 2, 3, 6, 7);
            r[2] = __builtin_shufflevector(c, d, 0, 1, 4, 5);
            r[3] = __builtin_shufflevector(c, d, 2, 3, 6, 7);
            for (int i = 0; i < 4; i++) memcpy(to + (step + i) * 64, &r[i], sizeof r[i]);
        }
    }
}
#endif

/* k codes of `count` rows, padded to `padded`; returns where the next go. */
static uint8_t *pack_rows(const row_form form, const uint8_t *rows, int64_t stride, int count, int64_t k, int64_t padded, uint8_t *to) {
    int64_t done = 0, a_step = k_of_step(form), a_lane = bytes_of_step(form);
#ifdef VECTOR_STEPS
    if (count == QN_NR && form != ROWS_INT4)
        for (; done + VECTOR_STEPS * a_step <= k; done += VECTOR_STEPS * a_step, rows += VECTOR_STEPS * a_lane, to += VECTOR_STEPS * 64)
            pack_steps(form, rows, stride, to);
#endif
    for (; done < padded; done += a_step, rows += a_lane, to += 64) {
        uint32_t lanes[QN_NR] = {0};
        if (done < k)
            for (int n = 0; n < count; n++) lanes[n] = lane_of_row(form, rows + n * stride, k - done);
        memcpy(to, lanes, sizeof lanes);
    }
    return to;
}

/* Do groups follow each other in a panel without padding, so that a row is packed as if it had none? */
static int has_whole_groups(const qn_weights *w) { return w->groups == 1 || w->group == w->group_k; }

/* A column's sum of codes is its product with a row of ones, which the kernel is quick at. */
static void sum_codes(const qn_kernel *kernel, const qn_weights *w, uint8_t *panel) {
    enum { AT_A_TIME = 1024 };
    uint16_t ones[AT_A_TIME];
    int int4 = w->format == QN_INT4;
    int32_t *sum = (int32_t *)(panel + w->sum_at), acc[QN_TILE_COLS];
    for (int i = 0; i < AT_A_TIME; i++) ones[i] = kernel->a_bytes == 2 ? 0x0001 : 0x0101;
    for (int64_t g = 0; g < w->groups; g++, sum += QN_NR) {
        memset(sum, 0, QN_NR * sizeof *sum);
        for (int64_t k0 = 0; k0 < w->group_k; k0 += AT_A_TIME) {
            const uint8_t *b = panel + w->codes_at + (g * w->group_k + k0) * QN_NR / (int4 ? 2 : 1);
            (int4 ? kernel->tile_int4 : kernel->tile_int8)(1, 1, qn_min64(AT_A_TIME, w->group_k - k0), (const uint8_t *)ones, 0, b,
                                                           0, acc);
            for (int n = 0; n < QN_NR; n++) sum[n] += acc[n];
        }
    }
}

static void fill_panel(const qn_kernel *kernel, const qn_weights *w, int64_t p, const row_form form, const uint8_t *rows, int64_t stride,
                       int count) {
    uint8_t *panel = w->data + p * w->panel_bytes, *to = panel + w->codes_at;
    if (has_whole_groups(w))
        to = pack_rows(form, rows, stride, count, w->k, w->groups * w->group_k, to);
    else /* never nibbles: a group may begin within a byte */
        for (int64_t g = 0; g < w->groups; g++, rows += w->group)
            to = pack_rows(form, rows, stride, count, qn_min64(w->group, w->k - g * w->group), w->group_k, to);
    memset(to, 0, (size_t)(panel + w->panel_bytes - to)); /* what rounding the panel up has left */
    if (w->has_sums) sum_codes(kernel, w, panel);
}

void qn_pack_panel(const qn_kernel *kernel, const qn_weights *w, int64_t p, const int8_t *codes, int64_t stride, int count) {
    fill_panel(kernel, w, p, w->format == QN_INT4 ? ROWS_INT4 : ROWS_INT8, (const uint8_t *)codes, stride, count);
}

void qn_unpack_panel(const qn_weights *w, int64_t p, int8_t *codes, int64_t stride, int count) {
    const uint8_t *from = w->data + p * w->panel_bytes + w->codes_at;
    for (int n = 0; n < count; n++) {
        for (int64_t g = 0; g < w->groups; g++) {
            int8_t *row = codes + n * stride + g * w->group;
            int64_t k = qn_min64(w->group, w->k - g * w->group), first = g * w->group_k;
            for (int64_t i = 0; i < k; i++) {
                uint8_t byte = from[code_at(w, n, first + i)];
                row[i] = (int8_t)(w->format == QN_INT4 ? byte >> (i / QN_KR % 2 * 4) & 15 : byte);
            }
        }
    }
}

/* ---- a whole matrix ---- */

/* Entry i of scales of a type. */
static float scale_at(qn_scale kind, const void *scales, int64_t i) {
    if (kind == QN_SCALE_FLOAT32) return ((const float *)scales)[i];
    uint16_t narrow = ((const uint16_t *)scales)[i];
    if (kind == QN_SCALE_FLOAT16 && narrow < 0x400) return (float)narrow * 0x1p-24f; /* subnormal */
    uint32_t bits = (uint32_t)narrow << (kind == QN_SCALE_BFLOAT16 ? 16 : 13);
    float scale;
    memcpy(&scale, &bits, 4);
    return kind == QN_SCALE_BFLOAT16 ? scale : scale * 0x1p112f;
}

float qn_weight_scale(const qn_weights *w, int64_t n, int64_t g) {
    return scale_at(w->scale, w->data + n / QN_NR * w->panel_bytes + w->scale_at, g * QN_NR + n % QN_NR);
}

int32_t qn_weight_zero(const qn_weights *w, int64_t n, int64_t g) {
    const uint8_t *at = w->data + n / QN_NR * w->panel_bytes + w->zero_at;
    if (!w->asymmetric) return 0;
    if (w->format != QN_INT4) return ((const int32_t *)(const void *)at)[g * QN_NR + n % QN_NR];
    if (w->one_zero >= 0) return w->one_zero;
    return at[(g * QN_NR + n % QN_NR) / 2] >> (n % 2 ? 4 : 0) & 15;
}

/* Scales, zero points and biases of a panel's columns. */
static void pack_terms(const qn_weights *w, int64_t p, const qn_source *from, int count) {
    uint8_t *panel = w->data + p * w->panel_bytes;
    uint8_t *scales = panel + w->scale_at, *zeros = panel + w->zero_at;
    int64_t first = p * QN_NR * w->groups;
    memset(panel, 0, (size_t)w->codes_at);
    for (int64_t g = 0; g < w->groups; g++) {
        if (w->scale != QN_SCALE_FLOAT32) {
            const uint16_t *scale = (const uint16_t *)from->scale + first + g;
            uint16_t given[QN_NR] = {0};
            for (int n = 0; n < count; n++) given[n] = scale[n * w->groups];
            memcpy(scales + g * sizeof given, given, sizeof given);
        } else {
            float given[QN_NR] = {0};
            for (int n = 0; n < count; n++) given[n] = scale_at(from->scale_type, from->scale, first + n * w->groups + g);
            memcpy(scales + g * sizeof given, given, sizeof given);
        }
    }
    int all_are_one = w->format == QN_INT4 && w->one_zero >= 0;
    for (int64_t g = 0; g < (w->asymmetric && !all_are_one ? w->groups : 0); g++) {
        int32_t given[QN_NR] = {0};
        for (int n = 0; n < count; n++) given[n] = from->zero[first + n * w->groups + g];
        if (w->format == QN_INT4)
            for (int n = 0; n < QN_NR; n += 2) zeros[(g * QN_NR + n) / 2] = (uint8_t)(given[n] | given[n + 1] << 4);
        else
            memcpy(zeros + g * sizeof given, given, sizeof given);
    }
    if (w->bias != QN_NO_BIAS) memcpy(panel + w->bias_at, (const uint8_t *)from->bias + p * QN_NR * 4, (size_t)count * 4);
}

/* Distance of the rows of a panel's codes in a buffer: an odd number of cache lines, as at a power of two sixteen rows
 * would want the same few places of the cache. */
static int64_t buffer_stride(const qn_weights *w) { return qn_round_up(w->k, 128) + 64; }

/* Are codes, one a byte, made in a buffer before they are packed? */
static int is_buffered(const qn_weights *w, const qn_source *from) {
    return from->values || (w->format == QN_INT4 && !has_whole_groups(w));
}

/* Codes of a panel's rows, one a byte, into a buffer. */
static void codes_of_panel(const qn_kernel *kernel, const qn_weights *w, int64_t p, const qn_source *from, int count, uint8_t *buffer) {
    const uint8_t *panel = w->data + p * w->panel_bytes;
    for (int n = 0; n < count; n++) {
        uint8_t *row = buffer + n * buffer_stride(w);
        const uint8_t *at = (const uint8_t *)(from->values ? (const void *)from->values : from->codes) + (p * QN_NR + n) * from->stride;
        if (from->values) {
            int32_t zero = w->asymmetric ? ((const int32_t *)(panel + w->zero_at))[n] : 0;
            kernel->quantize_values((const float *)(const void *)at, w->k, ((const float *)(panel + w->scale_at))[n], zero, from->low,
                                    from->high, row);
        } else {
            for (int64_t i = 0; i < w->k; i++) row[i] = i % 2 ? at[i / 2] >> 4 : at[i / 2] & 15;
        }
    }
}

typedef struct {
    const qn_kernel *kernel;
    const qn_weights *w;
    const qn_source *from;
    qn_atomic next;
} job;

static void pack_some(void *context, int thread) {
    (void)thread;
    job *j = context;
    const qn_weights *w = j->w;
    const int buffered = is_buffered(w, j->from);
    uint64_t mode = qn_enter_default_mode();
    uint8_t *buffer = qn_scratch_take(buffered ? QN_NR * buffer_stride(w) : 1);
    int64_t taken;
    while (buffer && (taken = qn_atomic_add(&j->next, 1)) < w->panels) {
        int64_t p = w->panels - 1 - taken; /* the last first: who has looked for ranges has just read them */
        int count = (int)qn_min64(QN_NR, w->n - p * QN_NR);
        pack_terms(w, p, j->from, count);
        if (buffered) {
            codes_of_panel(j->kernel, w, p, j->from, count, buffer);
            qn_pack_panel(j->kernel, w, p, (const int8_t *)buffer, buffer_stride(w), count);
        } else {
            const uint8_t *rows = (const uint8_t *)j->from->codes + p * QN_NR * j->from->stride;
            fill_panel(j->kernel, w, p, w->format == QN_INT4 ? ROWS_NIBBLES : ROWS_INT8, rows, j->from->stride, count);
        }
    }
    qn_scratch_give(buffer);
    qn_leave_default_mode(mode);
}

int qn_pack(const qn_kernel *kernel, const qn_weights *w, const qn_source *from, int threads, qn_share share) {
    job j = {.kernel = kernel, .w = w, .from = from};
    if (threads > 1)
        share(threads, pack_some, &j);
    else
        pack_some(&j, 0);
    return qn_atomic_get(&j.next) >= w->panels; /* a thread without a buffer takes none */
}

/* ---- ranges ---- */

typedef struct {
    const qn_kernel *kernel;
    const float *x;
    int64_t n, k, stride;
    float *low, *high;
    qn_atomic next, finite;
} range_job;

static void range_some(void *context, int thread) {
    (void)thread;
    range_job *j = context;
    int64_t row, finite = 0, rows = 16;
    uint64_t mode = qn_enter_default_mode();
    while ((row = qn_atomic_add(&j->next, rows)) < j->n)
        for (int64_t end = qn_min64(row + rows, j->n); row < end; row++)
            finite += j->kernel->range((const float *)(const void *)((const uint8_t *)j->x + row * j->stride), j->k, j->low + row, j->high + row);
    qn_atomic_add(&j->finite, finite);
    qn_leave_default_mode(mode);
}

int64_t qn_ranges(const qn_kernel *kernel, const float *x, int64_t n, int64_t k, int64_t stride, float *low, float *high,
                  int threads, qn_share share) {
    range_job j = {.kernel = kernel, .x = x, .n = n, .k = k, .stride = stride, .low = low, .high = high};
    if (threads > 1)
        share(threads, range_some, &j);
    else
        range_some(&j, 0);
    return qn_atomic_get(&j.finite);
}
