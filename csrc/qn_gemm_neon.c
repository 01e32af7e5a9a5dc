/* SPDX-License-Identifier: BSD-3-Clause
 *
 * NEON, in three levels of one source: the base that every aarch64 has (widening products and pairwise sums), dot products
 * (qn_gemm_dotprod.c includes this file) and 8-bit matrix products (qn_gemm_i8mm.c does).
 *
 * All are exact. Weights are signed and activations unsigned; base and dot products only multiply numbers of the same sign, so
 * there activations have 128 taken off, and 128 times the sum of the column's codes, which lies with the panel, is added again.
 * int4 weights are unsigned nibbles as they are. A register holds one k-step of four columns, and a panel has four.
 */
#include "qn_gemm.h"
#include "qn_float_vector.h"

#if defined(__aarch64__) && defined(__GNUC__)
#include <arm_neon.h>
#include <math.h>
#include <string.h>
#if defined(QN_I8MM)
#define QN_TARGET "arch=armv8.2-a+dotprod+i8mm"
#define QN_CLANG_TARGET "dotprod,i8mm"
#define KERNEL qn_kernel_i8mm
#elif defined(QN_DOTPROD)
#define QN_TARGET "arch=armv8.2-a+dotprod"
#define QN_CLANG_TARGET "dotprod"
#define KERNEL qn_kernel_dotprod
#else
#define KERNEL qn_kernel_neon
#endif
#define QN_PRAGMA(x) _Pragma(#x)
#if defined(QN_TARGET) && defined(__clang__)
#define QN_PUSH(t) QN_PRAGMA(clang attribute push(__attribute__((target(t))), apply_to = function))
QN_PUSH(QN_CLANG_TARGET)
#elif defined(QN_TARGET)
#define QN_PUSH(t) QN_PRAGMA(GCC target(t))
#pragma GCC push_options
QN_PUSH(QN_TARGET)
#endif

#include "qn_vector_neon.h"

#include "qn_tile.h"

#include "qn_range.h"
#include "qn_rows.h"
#include "qn_epilogue.h"

enum { PANEL_VECTORS = QN_NR / QN_W, HALF = PANEL_VECTORS / 2, TILE_ROWS = QN_TILE_ROWS };

/* The weights of vector v of a tile: a k-step of int8, two of int4 as nibbles. */
QN_INLINE uint8x16_t load_weights(const uint8_t *b, int64_t panel_bytes, int v) {
    return vld1q_u8(b + v / PANEL_VECTORS * panel_bytes + v % PANEL_VECTORS * 16);
}

QN_INLINE uint8x16_t low_nibbles(uint8x16_t w) { return vandq_u8(w, vdupq_n_u8(15)); }
QN_INLINE uint8x16_t high_nibbles(uint8x16_t w) { return vshrq_n_u8(w, 4); }

/* A row's k-step, four codes, to every column. */
QN_INLINE uint8x16_t broadcast_step(const uint8_t *p) {
    uint32_t step;
    memcpy(&step, p, 4);
    return vreinterpretq_u8_u32(vdupq_n_u32(step));
}

/* The same with 128 taken off. */
QN_INLINE int8x16_t broadcast_signed(const uint8_t *p) {
    return vreinterpretq_s8_u8(veorq_u8(broadcast_step(p), vdupq_n_u8(0x80)));
}

/* What a tile's integer sums are missing when activations are taken as signed, vector v: 128 times the sums of the columns' codes. */
QN_INLINE VU offset_of_panel(const qn_weights *w, int64_t panel, int v) {
    const uint8_t *from = w->data + (panel + v / PANEL_VECTORS) * w->panel_bytes;
    return vu_load((const uint32_t *)(from + w->sum_at) + v % PANEL_VECTORS * QN_W) << 7;
}

/* multiply(R, V, int4, offset, ...): sum[r][v] = offset[v] + the sums over k, a multiple of QN_K_PAD, of R rows by V vectors
 * of columns. Without an offset it is found on the way. R, V and int4 are constants where it is inlined. */
#if defined(QN_I8MM)

/* Two vectors of one k-step each as pairs of columns with eight k: | n0: k0..k7 | n1: k0..k7 | and n2, n3. */
QN_INLINE void pair_columns(uint8x16_t even, uint8x16_t odd, uint8x16_t pair[2]) {
    pair[0] = vreinterpretq_u8_u32(vzip1q_u32(vreinterpretq_u32_u8(even), vreinterpretq_u32_u8(odd)));
    pair[1] = vreinterpretq_u8_u32(vzip2q_u32(vreinterpretq_u32_u8(even), vreinterpretq_u32_u8(odd)));
}

/* One row: there is nothing to make a matrix of, so dot products of unsigned by signed. */
QN_INLINE void multiply_row(const int V, const int int4, int64_t k, const uint8_t *a, const uint8_t *b, int64_t panel_bytes,
                            VU sum[][COLUMN_VECTORS]) {
#pragma GCC unroll 16
    for (int v = 0; v < V; v++) sum[0][v] = vu_splat(0);
    for (int64_t i = 0; i < k; i += int4 ? 8 : 4, b += 64) {
        uint8x16_t x = broadcast_step(a + i), next = int4 ? broadcast_step(a + i + 4) : x;
#pragma GCC unroll 16
        for (int v = 0; v < V; v++) {
            uint8x16_t w = load_weights(b, panel_bytes, v);
            if (int4) {
                sum[0][v] = (VU)vdotq_u32((uint32x4_t)sum[0][v], low_nibbles(w), x);
                sum[0][v] = (VU)vdotq_u32((uint32x4_t)sum[0][v], high_nibbles(w), next);
            } else {
                sum[0][v] = (VU)vusdotq_s32((int32x4_t)sum[0][v], x, vreinterpretq_s8_u8(w));
            }
        }
    }
}

QN_INLINE void multiply(const int R, const int V, const int int4, const VU *offset, int64_t k, const uint8_t *a,
                        int64_t a_stride, const uint8_t *b, int64_t panel_bytes, VU sum[][COLUMN_VECTORS]) {
    enum { PAIRS = TILE_ROWS / 2 };
    uint32x4_t acc[PAIRS][2 * HALF]; /* two rows by two columns each */
    (void)offset;
    if (R == 1) {
        multiply_row(V, int4, k, a, b, panel_bytes, sum);
        return;
    }
#pragma GCC unroll 4
    for (int r = 0; r < (R + 1) / 2; r++)
#pragma GCC unroll 4
        for (int v = 0; v < 2 * V; v++) acc[r][v] = vdupq_n_u32(0);
    for (int64_t i = 0; i < k; i += 8, b += int4 ? 64 : 128) {
        uint8x16_t pair[2 * HALF];
#pragma GCC unroll 2
        for (int v = 0; v < V; v++) {
            uint8x16_t w = load_weights(b, panel_bytes, v);
            if (int4)
                pair_columns(low_nibbles(w), high_nibbles(w), pair + 2 * v);
            else
                pair_columns(w, load_weights(b + 64, panel_bytes, v), pair + 2 * v);
        }
#pragma GCC unroll 4
        for (int r = 0; r < (R + 1) / 2; r++) {
            const uint8_t *row = a + 2 * r * a_stride + i, *next = 2 * r + 1 < R ? row + a_stride : row;
            uint8x16_t x = vcombine_u8(vld1_u8(row), vld1_u8(next)); /* a matrix; a last odd row is there twice */
#pragma GCC unroll 4
            for (int v = 0; v < 2 * V; v++)
                acc[r][v] = int4 ? vmmlaq_u32(acc[r][v], x, pair[v])
                                 : vreinterpretq_u32_s32(vusmmlaq_s32(vreinterpretq_s32_u32(acc[r][v]), x, vreinterpretq_s8_u8(pair[v])));
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 2
        for (int v = 0; v < V; v++) {
            uint32x4_t first = acc[r / 2][2 * v], last = acc[r / 2][2 * v + 1];
            sum[r][v] = (VU)(r % 2 ? vcombine_u32(vget_high_u32(first), vget_high_u32(last))
                                   : vcombine_u32(vget_low_u32(first), vget_low_u32(last)));
        }
}

#elif defined(QN_DOTPROD)

QN_INLINE VU dot(const int int4, VU sum, uint8x16_t w, uint8x16_t x) {
    return int4 ? (VU)vdotq_u32((uint32x4_t)sum, w, x)
                : (VU)vdotq_s32((int32x4_t)sum, vreinterpretq_s8_u8(w), vreinterpretq_s8_u8(x));
}

QN_INLINE void multiply(const int R, const int V, const int int4, const VU *offset, int64_t k, const uint8_t *a,
                        int64_t a_stride, const uint8_t *b, int64_t panel_bytes, VU sum[][COLUMN_VECTORS]) {
    int32x4_t column[16];
#pragma GCC unroll 16
    for (int v = 0; v < V; v++) {
        column[v] = vdupq_n_s32(0);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) sum[r][v] = vu_splat(0);
    }
    for (int64_t i = 0; i < k; i += int4 ? 8 : 4, b += 64) {
        uint8x16_t x[TILE_ROWS];
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
            x[r] = int4 ? broadcast_step(a + r * a_stride + i) : vreinterpretq_u8_s8(broadcast_signed(a + r * a_stride + i));
#pragma GCC unroll 16
        for (int v = 0; v < V; v++) {
            uint8x16_t w = load_weights(b, panel_bytes, v), first = int4 ? low_nibbles(w) : w;
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) sum[r][v] = dot(int4, sum[r][v], first, x[r]);
            if (!int4 && !offset) column[v] = vdotq_s32(column[v], vreinterpretq_s8_u8(w), vdupq_n_s8(1));
        }
        if (!int4) continue;
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) x[r] = broadcast_step(a + r * a_stride + i + 4);
#pragma GCC unroll 16
        for (int v = 0; v < V; v++) {
            uint8x16_t w = high_nibbles(load_weights(b, panel_bytes, v));
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) sum[r][v] = dot(1, sum[r][v], w, x[r]);
        }
    }
    if (int4) return;
#pragma GCC unroll 16
    for (int v = 0; v < V; v++)
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) sum[r][v] += offset ? offset[v] : (VU)column[v] << 7;
}

#else

/* sum[2], of two columns each and of k0 k1 and k2 k3 apart, += a k-step of four columns; a product fits 16 bits and so does a pair's
 * sum but for (-128 * -128) * 2, so pairs are added in 32. */
QN_INLINE void add_signed(int32x4_t sum[2], int8x16_t w, int8x16_t x) {
    sum[0] = vpadalq_s16(sum[0], vmull_s8(vget_low_s8(w), vget_low_s8(x)));
    sum[1] = vpadalq_s16(sum[1], vmull_s8(vget_high_s8(w), vget_high_s8(x)));
}

/* The same for two k-steps of nibbles: 15 * 255 * 2 fits 16 bits. */
QN_INLINE void add_nibbles(int32x4_t sum[2], uint8x16_t w, uint8x16_t x, uint8x16_t next) {
    uint8x16_t low = low_nibbles(w), high = high_nibbles(w);
    uint16x8_t first = vmlal_u8(vmull_u8(vget_low_u8(low), vget_low_u8(x)), vget_low_u8(high), vget_low_u8(next));
    uint16x8_t last = vmlal_u8(vmull_u8(vget_high_u8(low), vget_high_u8(x)), vget_high_u8(high), vget_high_u8(next));
    sum[0] = vreinterpretq_s32_u32(vpadalq_u16(vreinterpretq_u32_s32(sum[0]), first));
    sum[1] = vreinterpretq_s32_u32(vpadalq_u16(vreinterpretq_u32_s32(sum[1]), last));
}

QN_INLINE void multiply(const int R, const int V, const int int4, const VU *offset, int64_t k, const uint8_t *a,
                        int64_t a_stride, const uint8_t *b, int64_t panel_bytes, VU sum[][COLUMN_VECTORS]) {
    int32x4_t acc[TILE_ROWS][8][2], column[8];
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) {
        column[v] = vdupq_n_s32(0);
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) acc[r][v][0] = acc[r][v][1] = vdupq_n_s32(0);
    }
    for (int64_t i = 0; i < k; i += int4 ? 8 : 4, b += 64) {
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) {
            uint8x16_t w = load_weights(b, panel_bytes, v);
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) {
                const uint8_t *step = a + r * a_stride + i;
                if (int4)
                    add_nibbles(acc[r][v], w, broadcast_step(step), broadcast_step(step + 4));
                else
                    add_signed(acc[r][v], vreinterpretq_s8_u8(w), broadcast_signed(step));
            }
            if (!int4 && !offset) column[v] = vpadalq_s16(column[v], vpaddlq_s8(vreinterpretq_s8_u8(w)));
        }
    }
#pragma GCC unroll 8
    for (int v = 0; v < V; v++)
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
            sum[r][v] = (VU)vpaddq_s32(acc[r][v][0], acc[r][v][1]);
            if (!int4) sum[r][v] += offset ? offset[v] : (VU)column[v] << 7;
        }
}

#endif

/* R rows by V vectors of int8 weights with one group, from codes to y; from half a panel on where h is 1. */
QN_INLINE void layer_tile_fixed(const int R, const int V, const int h, const qn_call *c, const qn_rows *rows, int64_t row,
                                int64_t panel) {
    const qn_weights *w = c->w;
    VU sum[TILE_ROWS][COLUMN_VECTORS], offset[16];
#pragma GCC unroll 16
    for (int v = 0; v < V; v++) offset[v] = offset_of_panel(w, panel, h * HALF + v);
    ask_for_outputs(R, V * QN_W, c, rows, row, panel * QN_NR + h * HALF * QN_W);
    multiply(R, V, 0, offset, w->group_k, rows->a + row * rows->a_stride, rows->a_stride,
             w->data + panel * w->panel_bytes + w->codes_at + h * HALF * 16, w->panel_bytes, sum);
    finish_tile(R, V, c, rows, row, panel * QN_NR + h * HALF * QN_W, sum);
}

#if defined(QN_DOTPROD) || defined(QN_I8MM)
enum { ROWS = 8, ROW_PANELS = 4 };
#define EACH_ROWS(CASE) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8)
#else
enum { ROWS = 4, ROW_PANELS = 2 };
#define EACH_ROWS(CASE) CASE(2) CASE(3) CASE(4)
#endif

/* A row alone takes several panels at once, so that there are sums enough to add to some in every cycle; more rows take half a panel. */
static void layer_tile(const qn_call *c, const qn_rows *rows, int64_t row, int count, int64_t panel, int panels,
                       const uint8_t *ahead, int64_t ask) {
    (void)ahead, (void)ask;
    if (count == 1) {
        switch (panels) {
        case 1: layer_tile_fixed(1, PANEL_VECTORS, 0, c, rows, row, panel); break;
        case 2: layer_tile_fixed(1, 2 * PANEL_VECTORS, 0, c, rows, row, panel); break;
#if defined(QN_DOTPROD) || defined(QN_I8MM)
        case 3: layer_tile_fixed(1, 3 * PANEL_VECTORS, 0, c, rows, row, panel); break;
        case 4: layer_tile_fixed(1, 4 * PANEL_VECTORS, 0, c, rows, row, panel); break;
#endif
        }
        return;
    }
    for (int64_t p = panel; p < panel + panels; p++) {
        for (int h = 0; h < 2; h++) {
            if (p * QN_NR + h * HALF * QN_W >= c->w->n) break;
#define CASE(R) case R: layer_tile_fixed(R, HALF, h, c, rows, row, p); break;
            switch (count) { EACH_ROWS(CASE) }
#undef CASE
        }
    }
}

/* Sums of R rows by half a panel into acc. */
QN_INLINE void half_tile(const int R, const int int4, int64_t k, const uint8_t *a, int64_t a_stride, const uint8_t *b,
                         int32_t *acc) {
    VU sum[TILE_ROWS][COLUMN_VECTORS];
    multiply(R, HALF, int4, 0, k, a, a_stride, b, 0, sum);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 2
        for (int v = 0; v < HALF; v++) vu_store((uint32_t *)acc + r * QN_TILE_COLS + v * QN_W, sum[r][v]);
}

QN_INLINE void tiles(const int int4, int rows, int panels, int64_t k, const uint8_t *a, int64_t a_stride, const uint8_t *b,
                     int64_t panel_bytes, int32_t *acc) {
    for (int p = 0; p < panels; p++, b += panel_bytes, acc += QN_NR) {
        for (int h = 0; h < 2; h++) {
#define CASE(R) case R: half_tile(R, int4, k, a, a_stride, b + h * HALF * 16, acc + h * HALF * QN_W); break;
            switch (rows) { CASE(1) EACH_ROWS(CASE) }
#undef CASE
        }
    }
}

static void tile_int8(int rows, int panels, int64_t k, const uint8_t *a, int64_t a_stride, const uint8_t *b,
                      int64_t panel_bytes, int32_t *acc) {
    tiles(0, rows, panels, k, a, a_stride, b, panel_bytes, acc);
}

static void tile_int4(int rows, int panels, int64_t k, const uint8_t *a, int64_t a_stride, const uint8_t *b,
                      int64_t panel_bytes, int32_t *acc) {
    tiles(1, rows, panels, k, a, a_stride, b, panel_bytes, acc);
}

#if defined(QN_TARGET) && defined(__clang__)
#pragma clang attribute pop
#elif defined(QN_TARGET)
#pragma GCC pop_options
#endif

static int usable(void) {
    const qn_cpu *cpu = qn_cpu_features();
#if defined(QN_I8MM)
    return cpu->neon && cpu->dotprod && cpu->i8mm;
#elif defined(QN_DOTPROD)
    return cpu->neon && cpu->dotprod;
#else
    return cpu->neon;
#endif
}

const qn_kernel KERNEL = {
#if defined(QN_I8MM)
    .name = "i8mm", .rate = 200,
#elif defined(QN_DOTPROD)
    .name = "dotprod", .rate = 100,
#else
    .name = "neon", .rate = 25,
#endif
    .usable = usable, .a_bytes = QN_A_BYTES, .float_rate = 16, .rows = ROWS, .panels = 3, .float_rows = 6, .float_panels = 1,
    .direct_rows = 6, .direct_most = 12, .layer_rows = ROWS, .layer_panels = {0, ROW_PANELS, 1, 1, 1, 1, 1, 1, 1}, .layer_tile = layer_tile,
    .quantize_rows = quantize_rows, .range = finite_range, .quantize_values = quantize_values, .tile_int8 = tile_int8,
    .tile_int4 = tile_int4, .tile_float = qn_neon_tile_float, .float_direct = qn_neon_float_direct, .decode = qn_neon_decode,
    .epilogue = epilogue,
};
#else
typedef int qn_gemm_neon_is_for_aarch64; /* a translation unit may not be empty */
#endif
