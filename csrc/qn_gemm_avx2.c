/* SPDX-License-Identifier: BSD-3-Clause
 *
 * AVX2 and FMA. Exact for every u8 * s8: both operands are widened to 16 bits for vpmaddwd, whose pair sums fit int32
 * (the 8-bit vpmaddubsw would saturate). Activations are stored as 16-bit codes, so that only the weights are widened
 * in the loop, once for all rows of a tile.
 */
#include "qn_around_avx2.h"
#include "qn_float_vector.h"

#if defined(__x86_64__)
#include <immintrin.h>
#include <math.h>
#include <string.h>
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,prfchw"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,prfchw")
#endif

#define QN_A_BYTES 2
#include "qn_vector_avx2.h"

#include "qn_tile.h"

#include "qn_rows.h"

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

/* Addresses of a tile's rows: a[0] + (0..2) * stride and a[1] + (0..2) * stride, which x86 computes within the load. */
typedef struct { const uint8_t *a[2]; int64_t stride; } row_pointers;

/* sum += one k-step, `at` bytes on, of R rows times eight columns. The instructions of a row are written out: 12 sums, the
 * weights and these two temporaries are all 16 registers, and compilers that order and assign them by themselves spill or
 * move sums. */
QN_INLINE void multiply_step(const int R, __m256i sum[][2], const row_pointers *rows, int at, __m256i first_four,
                             __m256i last_four) {
#pragma GCC unroll 6
    for (int r = 0; r < R; r++) {
        const uint8_t *step = rows->a[r / 3] + r % 3 * rows->stride + at;
        __m256i x, product;
        __asm__("vpbroadcastq %[step], %[x]\n\t" /* a row's k-step, four 16-bit codes, to every column */
                "vpmaddwd %[first], %[x], %[product]\n\t"
                "vpaddd %[product], %[sum0], %[sum0]\n\t"
                "vpmaddwd %[last], %[x], %[x]\n\t"
                "vpaddd %[x], %[sum1], %[sum1]"
                : [sum0] "+x"(sum[r][0]), [sum1] "+x"(sum[r][1]), [x] "=&x"(x), [product] "=&x"(product)
                : [step] "m"(*(const uint8_t(*)[8])step), [first] "x"(first_four), [last] "x"(last_four));
    }
}

/* The sums over k of R rows by half a panel (8 columns) of int8 or int4 codes: 2 R accumulators. R and int4 are constants
 * where this is inlined. */
QN_INLINE void multiply(const int R, const int int4, int64_t k, const uint8_t *a, int64_t a_stride, const uint8_t *b,
                        VU out[]) {
    __m256i sum[6][2];
    const __m128i low_nibble = _mm_set1_epi8(15);
#pragma GCC unroll 6
    for (int r = 0; r < R; r++) sum[r][0] = sum[r][1] = _mm256_setzero_si256();
    row_pointers rows = {{a, a + 3 * a_stride}, a_stride};
    __asm__("" : "+r"(rows.a[1])); /* kept, not computed anew */
    for (const uint8_t *end = a + k * QN_A_BYTES; rows.a[0] < end; b += int4 ? 64 : 128) { /* two k-steps */
        if (int4) {
            __m128i first = _mm_loadu_si128((const __m128i *)b), last = _mm_loadu_si128((const __m128i *)(b + 16));
            multiply_step(R, sum, &rows, 0, _mm256_cvtepu8_epi16(_mm_and_si128(first, low_nibble)),
                          _mm256_cvtepu8_epi16(_mm_and_si128(last, low_nibble)));
            multiply_step(R, sum, &rows, 4 * QN_A_BYTES,
                          _mm256_cvtepu8_epi16(_mm_and_si128(_mm_srli_epi16(first, 4), low_nibble)),
                          _mm256_cvtepu8_epi16(_mm_and_si128(_mm_srli_epi16(last, 4), low_nibble)));
        } else {
#pragma GCC unroll 2
            for (int step = 0; step < 2; step++) {
                const uint8_t *w = b + 64 * step;
                multiply_step(R, sum, &rows, 4 * QN_A_BYTES * step, widen_signed(w), widen_signed(w + 16));
            }
        }
        rows.a[0] += 8 * QN_A_BYTES;
        rows.a[1] += 8 * QN_A_BYTES;
    }
#pragma GCC unroll 6
    for (int r = 0; r < R; r++) out[r] = (VU)add_pairs(sum[r][0], sum[r][1]);
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
QN_INLINE void layer_rows_fixed(const int R, const qn_call *c, const qn_rows *rows, int64_t row, int64_t column) {
    const qn_weights *w = c->w;
    VU sum[QN_TILE_ROWS][COLUMN_VECTORS], part[6];
    ask_for_outputs(R, QN_NR / 2, c, rows, row, column);
    multiply(R, 0, w->group_k, rows->a + row * rows->a_stride, rows->a_stride,
             w->data + column / QN_NR * w->panel_bytes + w->codes_at + column % QN_NR * QN_KR, part);
#pragma GCC unroll 6
    for (int r = 0; r < R; r++) sum[r][0] = part[r];
    finish_tile(R, 1, c, rows, row, column, sum);
}

static void layer_rows(const qn_call *c, const qn_rows *rows, int64_t row, int count, int64_t column) {
#define ROWS(R) layer_rows_fixed(R, c, rows, row, column)
    QN_ROWS_TO_6(count, ROWS)
#undef ROWS
}

static void layer_row(const qn_call *c, const qn_rows *rows, int64_t row, int64_t panel) {
    const qn_weights *w = c->w;
    VU sum[1][COLUMN_VECTORS];
    multiply_row(w->group_k, rows->a + row * rows->a_stride, w->data + panel * w->panel_bytes + w->codes_at, sum);
    finish_tile(1, 2, c, rows, row, panel * QN_NR, sum);
}

/* sum += one k-step of R rows times a panel that is widened: 12 sums for 3 rows, half of the weights in registers, the other
 * half read where it is multiplied. A broadcast then serves four products, of which a core could start more than it can be
 * told to if each two had one. */
QN_INLINE void multiply_wide_step(const int R, __m256i sum[][4], const uint8_t *const rows[], int64_t at, const __m256i *w) {
    __m256i w0 = _mm256_load_si256(w), w1 = _mm256_load_si256(w + 1);
#pragma GCC unroll 3
    for (int r = 0; r < R; r++) {
        const uint8_t *step = rows[r] + at;
        __m256i x, product;
        __asm__("vpbroadcastq %[step], %[x]\n\t"
                "vpmaddwd %[w0], %[x], %[product]\n\t"
                "vpaddd %[product], %[sum0], %[sum0]\n\t"
                "vpmaddwd %[w1], %[x], %[product]\n\t"
                "vpaddd %[product], %[sum1], %[sum1]\n\t"
                "vpmaddwd %[w2], %[x], %[product]\n\t"
                "vpaddd %[product], %[sum2], %[sum2]\n\t"
                "vpmaddwd %[w3], %[x], %[x]\n\t"
                "vpaddd %[x], %[sum3], %[sum3]"
                : [sum0] "+x"(sum[r][0]), [sum1] "+x"(sum[r][1]), [sum2] "+x"(sum[r][2]), [sum3] "+x"(sum[r][3]),
                  [x] "=&x"(x), [product] "=&x"(product)
                : [step] "m"(*(const uint8_t(*)[8])step), [w0] "x"(w0), [w1] "x"(w1), [w2] "m"(w[2]), [w3] "m"(w[3]));
    }
}

/* R rows by a panel of int8 weights with one group, widened: sums over a piece of k, added to `carried` unless it is the first;
 * the last piece goes on to y. */
typedef struct { int64_t k; const uint8_t *a; const __m256i *words; int first, last; } k_piece;
enum { PANEL_VECTORS = QN_NR / QN_W };

QN_INLINE void layer_wide_rows(const int R, const qn_call *c, const qn_rows *rows, int64_t row, int64_t panel,
                               const k_piece *piece, VU carried[][PANEL_VECTORS]) {
    __m256i sum[3][4];
    VU out[QN_TILE_ROWS][COLUMN_VECTORS];
    const uint8_t *pointers[3];
    if (piece->last) ask_for_outputs(R, QN_NR, c, rows, row, panel * QN_NR);
#pragma GCC unroll 3
    for (int r = 0; r < R; r++) {
        pointers[r] = piece->a + r * rows->a_stride;
        sum[r][0] = sum[r][1] = sum[r][2] = sum[r][3] = _mm256_setzero_si256();
    }
    const __m256i *w = piece->words;
    for (const uint8_t *end = pointers[0] + piece->k * QN_A_BYTES; pointers[0] < end; w += 8) { /* two k-steps */
        multiply_wide_step(R, sum, pointers, 0, w);
        multiply_wide_step(R, sum, pointers, 4 * QN_A_BYTES, w + 4);
#pragma GCC unroll 3
        for (int r = 0; r < R; r++) pointers[r] += 8 * QN_A_BYTES;
    }
#pragma GCC unroll 3
    for (int r = 0; r < R; r++) {
#pragma GCC unroll 2
        for (int v = 0; v < PANEL_VECTORS; v++) {
            out[r][v] = (VU)add_pairs(sum[r][2 * v], sum[r][2 * v + 1]);
            if (!piece->first) out[r][v] += carried[r][v];
            if (!piece->last) carried[r][v] = out[r][v];
        }
    }
    if (piece->last) finish_tile(R, PANEL_VECTORS, c, rows, row, panel * QN_NR, out);
}

enum {
    TILE_ROWS = 6,
    WIDE_ROWS = 3,              /* of a tile with widened weights */
    LAYER_ROWS = 86 * WIDE_ROWS, /* that share the work of widening: all of a block */
    WIDENED_K = 512             /* k of a panel that is widened at a time: it stays in the L1 cache beside a tile's rows */
};

/* Many rows by a panel: its codes are widened once for all of them, a piece of k at a time. */
static void layer_panel(const qn_call *c, const qn_rows *rows, int64_t row, int count, int64_t panel) {
    const qn_weights *w = c->w;
    const uint8_t *codes = w->data + panel * w->panel_bytes + w->codes_at;
    __m256i words[WIDENED_K / QN_KR * 4];
    VU carried[LAYER_ROWS][PANEL_VECTORS];
    int tiles = (count + WIDE_ROWS - 1) / WIDE_ROWS;
    for (int64_t k0 = 0; k0 < w->group_k; k0 += WIDENED_K) {
        k_piece piece = {.k = qn_min64(WIDENED_K, w->group_k - k0), .words = words, .first = k0 == 0, .last = k0 + WIDENED_K >= w->group_k};
        for (int64_t i = 0; i < piece.k * QN_NR / 16; i++) words[i] = widen_signed(codes + k0 * QN_NR + i * 16);
        /* What is widened next: a share of it is asked for beside each tile. */
        int ends = piece.last && panel + 1 == w->panels;
        const uint8_t *next = ends ? codes : piece.last ? codes + w->panel_bytes : codes + (k0 + WIDENED_K) * QN_NR;
        int64_t left = ends ? 0 : piece.last ? w->group_k : w->group_k - k0 - WIDENED_K, asked = 0;
        int64_t lines = qn_min64(WIDENED_K, left) / QN_KR;
        for (int tile = 0, done = 0; tile < tiles; tile++) { /* tiles of nearly the same size */
            int some = (count - done + tiles - tile - 1) / (tiles - tile);
            for (; asked < lines * (tile + 1) / tiles; asked++) _mm_prefetch((const char *)next + asked * 64, _MM_HINT_T1);
            piece.a = rows->a + (row + done) * rows->a_stride + k0 * QN_A_BYTES;
            switch (some) {
            case 1: layer_wide_rows(1, c, rows, row + done, panel, &piece, carried + done); break;
            case 2: layer_wide_rows(2, c, rows, row + done, panel, &piece, carried + done); break;
            default: layer_wide_rows(3, c, rows, row + done, panel, &piece, carried + done); break;
            }
            done += some;
        }
    }
}

static void layer_tile(const qn_call *c, const qn_rows *rows, int64_t row, int count, int64_t panel, int panels,
                       const uint8_t *ahead, int64_t ask) {
    (void)ahead, (void)ask;
    for (int64_t p = panel; p < panel + panels; p++) {
        if (count == 1)
            layer_row(c, rows, row, p);
        else if (count > TILE_ROWS)
            layer_panel(c, rows, row, count, p);
        else
            for (int64_t column = p * QN_NR; column < qn_min64((p + 1) * QN_NR, c->w->n); column += QN_NR / 2)
                layer_rows(c, rows, row, count, column);
    }
}

/* Sums of R rows by half a panel into acc. */
QN_INLINE void half_tile(const int R, const int int4, int64_t k, const uint8_t *a, int64_t a_stride, const uint8_t *b,
                         int32_t *acc) {
    VU sum[6];
    multiply(R, int4, k, a, a_stride, b, sum);
#pragma GCC unroll 6
    for (int r = 0; r < R; r++) vu_store((uint32_t *)acc + r * QN_TILE_COLS, sum[r]);
}

QN_INLINE void tile(const int int4, int rows, int panels, int64_t k, const uint8_t *a, int64_t a_stride,
                    const uint8_t *b, int64_t panel_bytes, int32_t *acc) {
    for (int p = 0; p < panels; p++, b += panel_bytes, acc += QN_NR) {
        for (int half = 0; half < 2; half++) {
#define ROWS(R) half_tile(R, int4, k, a, a_stride, b + 32 * half, acc + 8 * half)
            QN_ROWS_TO_6(rows, ROWS)
#undef ROWS
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

#include "qn_groups_tile.h"

/* R rows by one panel of unpacked codes, half of it at a time. */
QN_INLINE void tile_groups_fixed(const int R, const qn_group_tile *t) {
    const uint8_t *a = t->a, *codes = t->codes, *terms = t->terms;
    const int32_t *pairs = t->pairs;
    for (int64_t g = 0; g < t->groups; g++) {
        for (int half = 0; half < 2; half++) {
            VU sum[QN_TILE_ROWS][COLUMN_VECTORS], part[6];
            multiply(R, 0, t->group_k, a, t->a_stride, codes + 32 * half, part);
#pragma GCC unroll 6
            for (int r = 0; r < R; r++) sum[r][0] = part[r];
            finish_group(R, 1, half * QN_W, sum, terms, pairs, t->row_scale, g ? t->sum : t->before, t->sum);
        }
        a += t->group_k * QN_A_BYTES;
        codes += t->group_k * QN_NR;
        terms += QN_TERM_BYTES;
        pairs += t->pairs_stride;
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

static int usable(void) { return qn_cpu_features()->avx2 && qn_cpu_features()->fma; }

const qn_kernel qn_kernel_avx2 = {
    .name = "avx2", .layer_rows = LAYER_ROWS, .layer_panels = {0, 3, 3, 3, 3, 3, 3, 3, 3},
    .layer_tile = layer_tile, .usable = usable, .a_bytes = QN_A_BYTES, .rate = 75, .float_rate = 40, .rows = 6, .panels = 3, .float_rows = 6, .float_panels = 1, .direct_rows = 6, .direct_most = 6,
    .quantize_rows = quantize_rows, .range = qn_avx2_finite_range, .quantize_values = qn_avx2_quantize_values, .tile_int8 = tile_int8, .tile_int4 = tile_int4,
    .group_rows = 6, .group_panels = 1, .unpack_groups = qn_avx2_unpack_groups, .unpack_panel = qn_avx2_unpack_panel, .tile_groups = tile_groups, .tile_float = qn_avx2_tile_float,
    .float_direct = qn_avx2_float_direct, .decode = qn_avx2_decode, .epilogue = qn_avx2_epilogue,
};
#else
typedef int qn_gemm_avx2_is_for_x86_64; /* a translation unit may not be empty */
#endif
