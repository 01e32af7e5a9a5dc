/* SPDX-License-Identifier: BSD-3-Clause
 *
 * VNNI on vectors of 256 bits, in two encodings of one source: AVX-512 VL (EVEX), and AVX-VNNI (VEX, where there is no
 * AVX-512), for which qn_gemm_avxvnni.c includes this file. A tile is 6 rows by 16 columns: 12 accumulators, two vectors
 * of weights and a broadcast leave one of the sixteen registers that both have.
 */
#include "qn_around_avx2.h"
#include "qn_float_vector.h"

#if defined(__x86_64__) && (!defined(QN_VEX) || __GNUC__ >= 11)
#include <immintrin.h>
#include <math.h>
#include <string.h>
#ifdef QN_VEX
#define QN_TARGET "avx2,fma,avxvnni,prfchw"
#define dpbusd _mm256_dpbusd_avx_epi32
#define KERNEL qn_kernel_avxvnni
#else
#define QN_TARGET "avx2,fma,avx512f,avx512vl,avx512vnni,prfchw"
#define dpbusd _mm256_dpbusd_epi32
#define KERNEL qn_kernel_vnni256
#endif
#define QN_PRAGMA(x) _Pragma(#x)
#ifdef __clang__
#define QN_PUSH(t) QN_PRAGMA(clang attribute push(__attribute__((target(t))), apply_to = function))
QN_PUSH(QN_TARGET)
#else
#define QN_PUSH(t) QN_PRAGMA(GCC target(t))
#pragma GCC push_options
QN_PUSH(QN_TARGET)
#endif

#define QN_A_BYTES 1
#include "qn_vector_avx2.h"

#include "qn_tile.h"

enum { PANEL_VECTORS = QN_NR / QN_W };

/* A row's k-step, four codes, to every column. */
QN_INLINE __m256i broadcast_step(const uint8_t *p) {
    int32_t step;
    memcpy(&step, p, 4);
    return _mm256_set1_epi32(step);
}

/* sum += one k-step of R rows times V vectors of eight columns. */
QN_INLINE void multiply_step(const int R, const int V, VU sum[][COLUMN_VECTORS], const uint8_t *a, int64_t a_stride,
                             const __m256i w[]) {
#pragma GCC unroll 6
    for (int r = 0; r < R; r++) {
        __m256i x = broadcast_step(a + r * a_stride);
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) sum[r][v] = (VU)dpbusd((__m256i)sum[r][v], x, w[v]);
    }
}

/* The vectors of weights at b: of P panels, int8 or the low or the high nibbles of int4. */
typedef enum { BYTES, LOW_NIBBLES, HIGH_NIBBLES } weight_part;

QN_INLINE void load_weights(const int P, const weight_part part, const uint8_t *b, int64_t panel_bytes, __m256i w[]) {
#pragma GCC unroll 8
    for (int v = 0; v < P * PANEL_VECTORS; v++) {
        w[v] = _mm256_loadu_si256((const __m256i *)(b + v / PANEL_VECTORS * panel_bytes + v % PANEL_VECTORS * 32));
        if (part == HIGH_NIBBLES) w[v] = _mm256_srli_epi16(w[v], 4);
        if (part != BYTES) w[v] = _mm256_and_si256(w[v], _mm256_set1_epi8(15));
    }
}

/* The sums over k of R rows by P panels; R, P and int4 are constants where this is inlined. */
QN_INLINE void multiply(const int R, const int P, const int int4, int64_t k, const uint8_t *a, int64_t a_stride,
                        const uint8_t *b, int64_t panel_bytes, VU sum[][COLUMN_VECTORS]) {
    __m256i w[8];
#pragma GCC unroll 6
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int v = 0; v < P * PANEL_VECTORS; v++) sum[r][v] = vu_splat(0);
    for (int64_t i = 0; i < k; i += int4 ? 8 : 4, b += 64) {
        load_weights(P, int4 ? LOW_NIBBLES : BYTES, b, panel_bytes, w);
        multiply_step(R, P * PANEL_VECTORS, sum, a + i, a_stride, w);
        if (int4) {
            __asm__ volatile("" ::: "memory"); /* load anew: there are no registers to keep both halves in */
            load_weights(P, HIGH_NIBBLES, b, panel_bytes, w);
            multiply_step(R, P * PANEL_VECTORS, sum, a + i + 4, a_stride, w);
        }
    }
}

/* R rows by P panels of int8 weights with one group, from codes to y. */
QN_INLINE void layer_tile_fixed(const int R, const int P, const qn_call *c, const qn_rows *rows, int64_t row, int64_t panel) {
    const qn_weights *w = c->w;
    VU sum[QN_TILE_ROWS][COLUMN_VECTORS];
    ask_for_outputs(R, P * QN_NR, c, rows, row, panel * QN_NR);
    multiply(R, P, 0, w->group_k, rows->a + row * rows->a_stride, rows->a_stride,
             w->data + panel * w->panel_bytes + w->codes_at, w->panel_bytes, sum);
    finish_tile(R, P * PANEL_VECTORS, c, rows, row, panel * QN_NR, sum);
}

/* Sums of R rows by one panel into acc. */
QN_INLINE void tile(const int R, const int int4, int64_t k, const uint8_t *a, int64_t a_stride, const uint8_t *b,
                    int32_t *acc) {
    VU sum[QN_TILE_ROWS][COLUMN_VECTORS];
    multiply(R, 1, int4, k, a, a_stride, b, 0, sum);
#pragma GCC unroll 6
    for (int r = 0; r < R; r++)
#pragma GCC unroll 2
        for (int v = 0; v < PANEL_VECTORS; v++) vu_store((uint32_t *)acc + r * QN_TILE_COLS + v * QN_W, sum[r][v]);
}

/* As many panels as leave registers: a row alone takes four, so that there are sums enough to add to one every cycle. */
static void layer_tile(const qn_call *c, const qn_rows *rows, int64_t row, int count, int64_t panel, int panels,
                       const uint8_t *ahead, int64_t ask) {
    (void)ahead, (void)ask;
#define CASE(R, P) case (R) * 8 + (P): layer_tile_fixed(R, P, c, rows, row, panel); break;
    switch (count * 8 + panels) {
        CASE(1, 1) CASE(1, 2) CASE(1, 3) CASE(1, 4) CASE(2, 1) CASE(2, 2) CASE(3, 1) CASE(4, 1) CASE(5, 1) CASE(6, 1)
    }
#undef CASE
}

QN_INLINE void tiles(const int int4, int rows, int panels, int64_t k, const uint8_t *a, int64_t a_stride, const uint8_t *b,
                     int64_t panel_bytes, int32_t *acc) {
    for (int p = 0; p < panels; p++, b += panel_bytes, acc += QN_NR) {
#define ROWS(R) tile(R, int4, k, a, a_stride, b, acc)
        QN_ROWS_TO_6(rows, ROWS)
#undef ROWS
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

#include "qn_groups_tile.h"

/* R rows by one panel of unpacked codes. */
QN_INLINE void tile_groups_fixed(const int R, const qn_group_tile *t) {
    const uint8_t *a = t->a, *codes = t->codes, *terms = t->terms;
    const int32_t *pairs = t->pairs;
    for (int64_t g = 0; g < t->groups; g++, a += t->group_k, codes += t->group_k * QN_NR, terms += QN_TERM_BYTES, pairs += t->pairs_stride) {
        VU sum[QN_TILE_ROWS][COLUMN_VECTORS];
        multiply(R, 1, 0, t->group_k, a, t->a_stride, codes, 0, sum);
        finish_group(R, PANEL_VECTORS, 0, sum, terms, pairs, t->row_scale, g ? t->sum : t->before, t->sum);
    }
}

static void tile_groups(const qn_group_tile *t) {
#define ROWS(R) tile_groups_fixed(R, t)
    QN_ROWS_TO_6(t->rows, ROWS)
#undef ROWS
}

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

static int usable(void) {
    const qn_cpu *cpu = qn_cpu_features();
#ifdef QN_VEX
    return cpu->avx2 && cpu->fma && cpu->avx_vnni;
#else
    return cpu->avx2 && cpu->fma && cpu->avx512f && cpu->avx512vl && cpu->avx512_vnni;
#endif
}

const qn_kernel KERNEL = {
#ifdef QN_VEX
    .name = "avxvnni",
#else
    .name = "vnni256",
#endif
    .usable = usable, .a_bytes = QN_A_BYTES, .rate = 200, .float_rate = 40, .rows = 6, .panels = 3, .float_rows = 6, .float_panels = 1, .direct_rows = 6, .direct_most = 6,
    .layer_rows = 6, .layer_panels = {0, 4, 2, 1, 1, 1, 1}, .layer_tile = layer_tile,
    .quantize_rows = qn_avx2_quantize_rows, .range = qn_avx2_finite_range, .quantize_values = qn_avx2_quantize_values, .tile_int8 = tile_int8, .tile_int4 = tile_int4,
    .group_rows = 6, .group_panels = 1, .unpack_groups = qn_avx2_unpack_groups, .unpack_panel = qn_avx2_unpack_panel, .tile_groups = tile_groups, .tile_float = qn_avx2_tile_float,
    .float_direct = qn_avx2_float_direct, .decode = qn_avx2_decode, .epilogue = qn_avx2_epilogue,
};
#else
typedef int qn_gemm_vnni256_is_for_x86_64; /* a translation unit may not be empty */
#endif
