/* SPDX-License-Identifier: BSD-3-Clause
 *
 * AVX-512 VNNI: vpdpbusd adds four u8 * s8 products to each int32 lane without intermediate saturation (never
 * vpdpbusds, which saturates the sum). Activations are the unsigned operand, weights the signed one; nibbles 0..15 are
 * signed bytes as they are. A tile is 8 rows by 3 panels: 24 accumulators, 3 vectors of weights, one broadcast.
 */
#include "qn_gemm.h"
#include "qn_float_vector.h"

#if defined(__x86_64__)
#include <immintrin.h>
#include <math.h>
#include <string.h>
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma,prfchw"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma,prfchw")
#endif

#define QN_A_BYTES 1
#include "qn_vector_avx512.h"

#include "qn_tile.h"

#include "qn_range.h"
#include "qn_rows.h"
#include "qn_epilogue.h"

/* A row's k-step, four codes, to every column. */
QN_INLINE __m512i broadcast_step(const uint8_t *p) {
    int32_t step;
    memcpy(&step, p, 4);
    return _mm512_set1_epi32(step);
}

/* sum += products. As assembly, since gcc otherwise swaps registers of sums between two steps of a loop. */
QN_INLINE void add_products(VU *sum, __m512i x, __m512i w) { __asm__("vpdpbusd %2, %1, %0" : "+v"(*sum) : "v"(x), "v"(w)); }

/* Addresses of a tile's rows: a[0] + (0..3) * stride and a[1] + (0..3) * stride, which x86 computes within the load from
 * four registers; from a pointer a row compilers run out of registers. */
typedef struct { const uint8_t *a[2]; int64_t stride, stride3; } row_pointers;

QN_INLINE row_pointers pointers_of_rows(const uint8_t *a, int64_t stride) {
    row_pointers p = {{a, a + 4 * stride}, stride, 3 * stride};
    __asm__("" : "+r"(p.a[1]), "+r"(p.stride3)); /* kept, not computed anew */
    return p;
}

QN_INLINE const uint8_t *pointer_of_row(const row_pointers *p, int r) {
    return p->a[r / 4] + (r % 4 == 3 ? p->stride3 : r % 4 * p->stride);
}

/* sum += one k-step, `at` bytes on, of R rows times P vectors of weights. */
QN_INLINE void multiply_step(const int R, const int P, VU sum[][COLUMN_VECTORS], const row_pointers *rows, int64_t at,
                             const __m512i w[]) {
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
        __m512i x = broadcast_step(pointer_of_row(rows, r) + at);
#pragma GCC unroll 8
        for (int p = 0; p < P; p++) add_products(&sum[r][p], x, w[p]);
    }
}

/* What will be needed: a line a panel of each row of y, some at a time, since a core waits for a dozen lines at most; then
 * weights, for the L2 cache. */
typedef struct { const uint8_t *out, *out_stop; int64_t out_stride; const uint8_t *ahead, *stop; } needed_lines;

/* The sums over k of R rows by P panels; R, P, int4 and asks are constants where this is inlined, so the sums live in
 * registers. If it asks, it asks meanwhile for lines that will be needed, as far as k goes. */
QN_INLINE void multiply(const int R, const int P, const int int4, int64_t k, const uint8_t *a, int64_t a_stride,
                        const uint8_t *b, int64_t panel_bytes, const int asks, needed_lines lines, VU sum[][COLUMN_VECTORS]) {
    __m512i w[COLUMN_VECTORS];
    const __m512i low_nibble = _mm512_set1_epi8(15);
    row_pointers rows = pointers_of_rows(a, a_stride);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int p = 0; p < P; p++) sum[r][p] = vu_splat(0);
    for (const uint8_t *end = a + k; rows.a[0] < end; b += int4 ? 64 : 128) { /* two k-steps */
        if (asks && lines.out != lines.out_stop) {
#pragma GCC unroll 8
            for (int p = 0; p < P; p++) __builtin_prefetch(lines.out + 64 * p, 1);
            lines.out += lines.out_stride;
        } else if (asks && lines.ahead < lines.stop) {
            _mm_prefetch((const char *)lines.ahead, _MM_HINT_T1);
            _mm_prefetch((const char *)lines.ahead + 64, _MM_HINT_T1);
            lines.ahead += 128;
        }
#pragma GCC unroll 8
        for (int p = 0; p < P; p++) {
            w[p] = _mm512_loadu_si512(b + p * panel_bytes);
            if (int4) w[p] = _mm512_and_si512(w[p], low_nibble);
        }
        multiply_step(R, P, sum, &rows, 0, w);
        if (int4) __asm__ volatile("" ::: "memory"); /* load anew: there are no registers to keep both halves in */
#pragma GCC unroll 8
        for (int p = 0; p < P; p++) {
            w[p] = _mm512_loadu_si512(b + (int4 ? 0 : 64) + p * panel_bytes);
            if (int4) w[p] = _mm512_and_si512(_mm512_srli_epi16(w[p], 4), low_nibble);
        }
        multiply_step(R, P, sum, &rows, 4, w);
        rows.a[0] += 8;
        rows.a[1] += 8;
    }
}

/* Bytes from a load of a large matrix to the line that is asked for with it: weights that come from the last cache or from
 * memory are some per cent faster for it on Cascade Lake, and as fast on Zen 4; those in the L2 cache are slower. */
enum { ROW_AHEAD = 2048, ROW_LARGE = 512 << 10 };

/* One row by P panels that lie `apart` bytes from each other, with two sums a panel, since one cannot be added to in every
 * cycle; k is a multiple of 8. */
QN_INLINE void multiply_row(const int P, const int asks, int64_t k, const uint8_t *a, const uint8_t *b, int64_t apart,
                            VU sum[]) {
    VU part[2][2];
#pragma GCC unroll 2
    for (int p = 0; p < P; p++) part[p][0] = part[p][1] = vu_splat(0);
    for (int64_t i = 0; i < k; i += 8, b += 128) {
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) {
            __m512i x = broadcast_step(a + i + 4 * j);
#pragma GCC unroll 2
            for (int p = 0; p < P; p++) {
                const uint8_t *step = b + p * apart + 64 * j;
                if (asks) _mm_prefetch((const char *)step + ROW_AHEAD, _MM_HINT_T0);
                part[p][j] = (VU)_mm512_dpbusd_epi32((__m512i)part[p][j], x, _mm512_loadu_si512(step));
            }
        }
    }
#pragma GCC unroll 2
    for (int p = 0; p < P; p++) sum[p] = part[p][0] + part[p][1];
}

/* One row by any number of panels, which is a matter of reading them: as two streams, of the first half and of the second.
 * Of the ways that were tried (1 to 16 panels beside each other or apart) this one is at the speed of the best loop that
 * only reads, in every level of cache and from memory. */
QN_INLINE void layer_row_fixed(const int asks, const qn_call *c, const qn_rows *rows, int64_t row, int64_t panel,
                               int64_t panels) {
    const qn_weights *w = c->w;
    const uint8_t *a = rows->a + row * rows->a_stride, *b = w->data + panel * w->panel_bytes + w->codes_at;
    int64_t half = panels / 2;
    VU sum[2], one[1][COLUMN_VECTORS];
    for (int64_t p = 0; p < half; p++, b += w->panel_bytes) {
        multiply_row(2, asks, w->group_k, a, b, half * w->panel_bytes, sum);
        one[0][0] = sum[0];
        finish_tile(1, 1, c, rows, row, (panel + p) * QN_NR, one);
        one[0][0] = sum[1];
        finish_tile(1, 1, c, rows, row, (panel + half + p) * QN_NR, one);
    }
    if (panels % 2) {
        multiply_row(1, asks, w->group_k, a, b + half * w->panel_bytes, 0, one[0]);
        finish_tile(1, 1, c, rows, row, (panel + panels - 1) * QN_NR, one);
    }
}

static void layer_row(const qn_call *c, const qn_rows *rows, int64_t row, int64_t panel, int64_t panels) {
    if (c->w->panels * c->w->panel_bytes > ROW_LARGE)
        layer_row_fixed(1, c, rows, row, panel, panels);
    else
        layer_row_fixed(0, c, rows, row, panel, panels);
}

enum { SHORT_K = 256 }; /* too short a product to ask for lines of y in the course of it */

/* R rows by P panels of int8 weights with one group, from codes to y. */
QN_INLINE void layer_tile_fixed(const int R, const int P, const qn_call *c, const qn_rows *rows, int64_t row,
                                int64_t panel, const uint8_t *ahead, int64_t ask) {
    const qn_weights *w = c->w;
    const uint8_t *a = rows->a + row * rows->a_stride, *b = w->data + panel * w->panel_bytes + w->codes_at;
    VU sum[QN_TILE_ROWS][COLUMN_VECTORS];
    const uint8_t *y = output_at(c, rows, row, panel * QN_NR);
    needed_lines lines = {y, y + R * c->y_stride, c->y_stride, ahead, ahead + ask};
    if (w->group_k <= SHORT_K) {
        ask_for_outputs(R, P * QN_NR, c, rows, row, panel * QN_NR);
        lines.out = lines.out_stop;
    }
    multiply(R, P, 0, w->group_k, a, rows->a_stride, b, w->panel_bytes, 1, lines, sum);
    finish_tile(R, P, c, rows, row, panel * QN_NR, sum);
}

/* Sums of R rows by P panels into acc. */
QN_INLINE void tile(const int R, const int P, const int int4, int64_t k, const uint8_t *a, int64_t a_stride,
                    const uint8_t *b, int64_t panel_bytes, int32_t *acc) {
    VU sum[QN_TILE_ROWS][COLUMN_VECTORS];
    multiply(R, P, int4, k, a, a_stride, b, panel_bytes, 0, (needed_lines){0}, sum);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 3
        for (int p = 0; p < P; p++) vu_store((uint32_t *)acc + r * QN_TILE_COLS + p * QN_NR, sum[r][p]);
}

#define SIZES_OF_3(X, R) X(R, 1) X(R, 2) X(R, 3)
#define SIZES_OF_4(X, R) SIZES_OF_3(X, R) X(R, 4)
#define SIZES_OF_6(X, R) SIZES_OF_4(X, R) X(R, 5) X(R, 6)
#define TILE_SIZES(X) \
    SIZES_OF_3(X, 1) SIZES_OF_3(X, 2) SIZES_OF_3(X, 3) SIZES_OF_3(X, 4) SIZES_OF_3(X, 5) SIZES_OF_3(X, 6) SIZES_OF_3(X, 7) SIZES_OF_3(X, 8)
/* As many panels as leave registers for the weights. */
#define LAYER_SIZES(X) \
    SIZES_OF_6(X, 2) SIZES_OF_4(X, 3) SIZES_OF_4(X, 4) SIZES_OF_4(X, 5) SIZES_OF_4(X, 6) SIZES_OF_3(X, 7) SIZES_OF_3(X, 8)
#define SIZE(R, P) ((R) * 16 + (P))

static void layer_tile(const qn_call *c, const qn_rows *rows, int64_t row, int count, int64_t panel, int panels,
                       const uint8_t *ahead, int64_t ask) {
#define CASE(R, P) case SIZE(R, P): layer_tile_fixed(R, P, c, rows, row, panel, ahead, ask); break;
    if (count == 1) {
        layer_row(c, rows, row, panel, panels);
        return;
    }
    switch (SIZE(count, panels)) { LAYER_SIZES(CASE) }
#undef CASE
}

static void tile_int8(int rows, int panels, int64_t k, const uint8_t *a, int64_t a_stride, const uint8_t *b,
                      int64_t panel_bytes, int32_t *acc) {
#define CASE(R, P) case SIZE(R, P): tile(R, P, 0, k, a, a_stride, b, panel_bytes, acc); break;
    switch (SIZE(rows, panels)) { TILE_SIZES(CASE) }
#undef CASE
}

static void tile_int4(int rows, int panels, int64_t k, const uint8_t *a, int64_t a_stride, const uint8_t *b,
                      int64_t panel_bytes, int32_t *acc) {
#define CASE(R, P) case SIZE(R, P): tile(R, P, 1, k, a, a_stride, b, panel_bytes, acc); break;
    switch (SIZE(rows, panels)) { TILE_SIZES(CASE) }
#undef CASE
}

#include "qn_unpack.h"

#include "qn_groups_avx512.h"

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

static int usable(void) {
    const qn_cpu *cpu = qn_cpu_features();
    return cpu->avx512f && cpu->avx512bw && cpu->avx512dq && cpu->avx512vl && cpu->avx512_vnni && cpu->fma;
}

const qn_kernel qn_kernel_avx512vnni = {
    .name = "avx512vnni", .layer_rows = 8, .layer_panels = {0, QN_ANY_PANELS, 6, 4, 4, 4, 4, 3, 3}, .layer_tile = layer_tile, .usable = usable, .a_bytes = QN_A_BYTES, .rate = 200, .float_rate = 50, .rows = 8, .panels = 3, .float_rows = 9, .float_panels = 3, .direct_rows = 6, .direct_most = 12,
    .quantize_rows = quantize_rows, .range = finite_range, .quantize_values = quantize_values, .tile_int8 = tile_int8, .tile_int4 = tile_int4,
    .group_rows = 8, .group_panels = 3, .unpack_groups = unpack_groups, .unpack_panel = unpack_panel, .tile_groups = tile_groups, .row_groups = row_groups,
    .tile_float = qn_avx512_tile_float, .float_direct = qn_avx512_float_direct, .decode = qn_avx512_decode, .epilogue = epilogue,
};
#else
typedef int qn_gemm_vnni_is_for_x86_64; /* a translation unit may not be empty */
#endif
