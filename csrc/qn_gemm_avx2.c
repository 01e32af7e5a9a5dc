/* SPDX-License-Identifier: BSD-3-Clause
 *
 * AVX2 and FMA. Exact for every u8 * s8: both operands are widened to 16 bits for vpmaddwd, whose pair sums fit int32
 * (the 8-bit vpmaddubsw would saturate). Activations are stored as 16-bit codes, so that only the weights are widened
 * in the loop, once for all rows of a tile.
 */
#include "qn_gemm.h"

#if defined(__x86_64__)
#include <immintrin.h>
#include <math.h>
#include <string.h>
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

#define QN_A_BYTES 2
#include "qn_vector_avx2.h"

#include "qn_tile.h"

/* Four columns' k-step of weights, 16 bytes, as 16-bit words: | n0: k0 k1 k2 k3 | n1: ... | n2 | n3 | */
QN_INLINE __m256i widen_signed(const uint8_t *p) { return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)p)); }

/* A row's k-step, four 16-bit codes, to every column. */
QN_INLINE __m256i broadcast_step(const uint8_t *p) {
    int64_t step;
    memcpy(&step, p, 8);
    return _mm256_set1_epi64x(step);
}

/* Accumulators hold two sums a column, of k0 k1 and k2 k3; add the pairs of eight columns into output order. */
QN_INLINE __m256i add_pairs(__m256i first_four, __m256i last_four) {
    return _mm256_permute4x64_epi64(_mm256_hadd_epi32(first_four, last_four), 0xD8);
}

/* sum += one k-step of R rows times eight columns. The instructions of a row are written out: 12 sums, the weights and
 * these two temporaries are all 16 registers, and compilers that order and assign them by themselves spill or move sums. */
QN_INLINE void multiply_step(const int R, __m256i sum[][2], const uint8_t *a, int64_t a_stride, __m256i first_four,
                             __m256i last_four) {
#pragma GCC unroll 6
    for (int r = 0; r < R; r++) {
        __m256i x, product;
        __asm__("vpbroadcastq %[step], %[x]\n\t" /* a row's k-step, four 16-bit codes, to every column */
                "vpmaddwd %[first], %[x], %[product]\n\t"
                "vpmaddwd %[last], %[x], %[x]\n\t"
                "vpaddd %[product], %[sum0], %[sum0]\n\t"
                "vpaddd %[x], %[sum1], %[sum1]"
                : [sum0] "+x"(sum[r][0]), [sum1] "+x"(sum[r][1]), [x] "=&x"(x), [product] "=&x"(product)
                : [step] "m"(*(const uint8_t(*)[8])(a + r * a_stride)), [first] "x"(first_four), [last] "x"(last_four));
    }
}

/* The sums over k of R rows by half a panel (8 columns): 2 R accumulators. */
QN_INLINE void multiply(const int R, const int int4, int64_t k, const uint8_t *a, int64_t a_stride, const uint8_t *b,
                        VU out[][COLUMN_VECTORS]) {
    __m256i sum[6][2];
    const __m128i low_nibble = _mm_set1_epi8(15);
#pragma GCC unroll 6
    for (int r = 0; r < R; r++) sum[r][0] = sum[r][1] = _mm256_setzero_si256();
    for (int64_t i = 0; i < k; i += int4 ? 8 : 4, b += 64) {
        const uint8_t *step = a + i * QN_A_BYTES;
        if (int4) {
            __m128i first = _mm_loadu_si128((const __m128i *)b), last = _mm_loadu_si128((const __m128i *)(b + 16));
            multiply_step(R, sum, step, a_stride, _mm256_cvtepu8_epi16(_mm_and_si128(first, low_nibble)),
                          _mm256_cvtepu8_epi16(_mm_and_si128(last, low_nibble)));
            multiply_step(R, sum, step + 4 * QN_A_BYTES, a_stride,
                          _mm256_cvtepu8_epi16(_mm_and_si128(_mm_srli_epi16(first, 4), low_nibble)),
                          _mm256_cvtepu8_epi16(_mm_and_si128(_mm_srli_epi16(last, 4), low_nibble)));
        } else {
            multiply_step(R, sum, step, a_stride, widen_signed(b), widen_signed(b + 16));
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < R; r++) out[r][0] = (VU)add_pairs(sum[r][0], sum[r][1]);
}

/* The sums over k of one row by a panel of int8: 4 accumulators for even k-steps and 4 for odd ones, so that none waits
 * for the sum before; k is a multiple of 8. */
QN_INLINE void multiply_row(int64_t k, const uint8_t *a, const uint8_t *b, VU out[][COLUMN_VECTORS]) {
    __m256i sum[8];
#pragma GCC unroll 8
    for (int j = 0; j < 8; j++) sum[j] = _mm256_setzero_si256();
    for (int64_t i = 0; i < k; i += 8, b += 128) {
        __m256i even = broadcast_step(a + i * QN_A_BYTES), odd = broadcast_step(a + (i + 4) * QN_A_BYTES);
#pragma GCC unroll 8
        for (int j = 0; j < 8; j++) {
            sum[j] = _mm256_add_epi32(sum[j], _mm256_madd_epi16(j < 4 ? even : odd, widen_signed(b + 16 * j)));
            __asm__ volatile("" : "+x"(sum[j])); /* one after another, or gcc starts all products first and spills */
        }
    }
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++)
        out[0][h] = (VU)add_pairs(_mm256_add_epi32(sum[2 * h], sum[2 * h + 4]), _mm256_add_epi32(sum[2 * h + 1], sum[2 * h + 5]));
}

/* R rows by half a panel of int8 weights with one group, from codes to y. */
QN_INLINE void layer_tile_fixed(const int R, const qn_call *c, const qn_rows *rows, int64_t row, int64_t column) {
    const qn_weights *w = c->w;
    const uint8_t *panel = w->data + column / QN_NR * w->panel_bytes, *a = rows->a + row * rows->a_stride;
    VU sum[QN_TILE_ROWS][COLUMN_VECTORS];
    multiply(R, 0, w->group_k, a, rows->a_stride, panel + w->codes_at + column % QN_NR * 4, sum);
    finish_tile(R, 1, c, rows, row, column, sum);
}

static void layer_row(const qn_call *c, const qn_rows *rows, int64_t row, int64_t panel) {
    const qn_weights *w = c->w;
    VU sum[1][COLUMN_VECTORS];
    multiply_row(w->group_k, rows->a + row * rows->a_stride, w->data + panel * w->panel_bytes + w->codes_at, sum);
    finish_tile(1, 2, c, rows, row, panel * QN_NR, sum);
}

static void layer_tile(const qn_call *c, const qn_rows *rows, int64_t row, int count, int64_t panel, int panels,
                       const uint8_t *ahead) {
    (void)ahead;
    for (int64_t column = panel * QN_NR; column < (panel + panels) * QN_NR; column += QN_NR / 2) {
        if (column >= c->w->n) break;
        switch (count) {
        case 1:
            layer_row(c, rows, row, column / QN_NR);
            column += QN_NR / 2;
            break;
        case 2: layer_tile_fixed(2, c, rows, row, column); break;
        case 3: layer_tile_fixed(3, c, rows, row, column); break;
        case 4: layer_tile_fixed(4, c, rows, row, column); break;
        case 5: layer_tile_fixed(5, c, rows, row, column); break;
        default: layer_tile_fixed(6, c, rows, row, column); break;
        }
    }
}

/* Sums of R rows by half a panel into acc. */
QN_INLINE void half_tile(const int R, const int int4, int64_t k, const uint8_t *a, int64_t a_stride, const uint8_t *b,
                         int32_t *acc) {
    VU sum[6][COLUMN_VECTORS];
    multiply(R, int4, k, a, a_stride, b, sum);
#pragma GCC unroll 6
    for (int r = 0; r < R; r++) vu_store((uint32_t *)acc + r * QN_TILE_COLS, sum[r][0]);
}

QN_INLINE void tile(const int int4, int rows, int panels, int64_t k, const uint8_t *a, int64_t a_stride,
                    const uint8_t *b, int64_t panel_bytes, int32_t *acc) {
    for (int p = 0; p < panels; p++, b += panel_bytes, acc += QN_NR) {
        for (int half = 0; half < 2; half++) {
            switch (rows) {
            case 1: half_tile(1, int4, k, a, a_stride, b + 32 * half, acc + 8 * half); break;
            case 2: half_tile(2, int4, k, a, a_stride, b + 32 * half, acc + 8 * half); break;
            case 3: half_tile(3, int4, k, a, a_stride, b + 32 * half, acc + 8 * half); break;
            case 4: half_tile(4, int4, k, a, a_stride, b + 32 * half, acc + 8 * half); break;
            case 5: half_tile(5, int4, k, a, a_stride, b + 32 * half, acc + 8 * half); break;
            default: half_tile(6, int4, k, a, a_stride, b + 32 * half, acc + 8 * half); break;
            }
        }
    }
}

static void tile_int8(int rows, int panels, int64_t k, const uint8_t *a, int64_t a_stride, const uint8_t *b,
                      int64_t panel_bytes, int32_t *acc) {
    tile(0, rows, panels, k, a, a_stride, b, panel_bytes, acc);
}

static void tile_int4(int rows, int panels, int64_t k, const uint8_t *a, int64_t a_stride, const uint8_t *b,
                      int64_t panel_bytes, int32_t *acc) {
    tile(1, rows, panels, k, a, a_stride, b, panel_bytes, acc);
}

#include "qn_float_avx2.h"

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

static int usable(void) { return qn_cpu_features()->avx2 && qn_cpu_features()->fma; }

const qn_kernel qn_kernel_avx2 = {
    .name = "avx2", .layer_panels = {0, 3, 3, 3, 3, 3, 3}, .layer_tile = layer_tile, .usable = usable, .a_bytes = QN_A_BYTES, .rate = 75, .float_rate = 40, .rows = 6, .panels = 3, .float_rows = 6, .float_panels = 1,
    .quantize_rows = quantize_rows, .range = finite_range, .quantize_values = quantize_values, .tile_int8 = tile_int8, .tile_int4 = tile_int4, .tile_float = tile_float,
    .decode = decode, .epilogue = epilogue,
};
#else
typedef int qn_gemm_avx2_is_for_x86_64; /* a translation unit may not be empty */
#endif
