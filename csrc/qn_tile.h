/* SPDX-License-Identifier: BSD-3-Clause
 *
 * Everything around the products is the same on every instruction set. An instruction set's file defines a vector of QN_W floats and the
 * verbs below, then includes this file, which finishes a tile that is in registers, and of these what it has not from elsewhere, each
 * once and in this order:
 *
 *   qn_range.h               the range of a row of activations
 *   qn_rows.h                rows of activations to codes
 *   qn_epilogue.h            finished sums to y
 *   qn_unpack.h              weights with small groups, and int4, unpacked for many rows
 *   qn_groups_tile.h         what finishes a group, on vectors of 256 bits
 *
 * The text is one, so the order of every operation is one, and so are the bits. Kernels with vectors of one width have what is not
 * inlined from one file, under other names: qn_around_avx2.h.
 *
 *   VF, VI, VU               vectors of QN_W floats, int32, uint32 (plain numbers where QN_W is 1); + - * / & | ^ << >> work
 *   vf_load vf_store vu_load vu_store vf_splat vu_splat
 *   vu_splat_halves(p)       where QN_W is 16: the first four bytes at p in each lane of the first half, the next in the others
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

#ifndef QN_AROUND
#define QN_AROUND(name) name
#define QN_AROUND_LINKAGE QN_ONCE
#endif
QN_AROUND_LINKAGE void QN_AROUND(emit)(const qn_call *c, const qn_rows *rows, int64_t row, int count, int64_t column, int64_t columns, const float *values,
                    int64_t stride);
QN_AROUND_LINKAGE void QN_AROUND(epilogue)(const qn_call *c, const qn_rows *rows, int64_t row, int count, int64_t panel, int panels, int64_t g,
                        const int32_t *acc, const float *converted, float *sum);

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
        QN_AROUND(epilogue)(c, rows, row, R, panel + first / width, some / width, 0, acc, 0, values);
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
    if (!direct) QN_AROUND(emit)(c, rows, row, R, column, V * QN_W, values, V * QN_W);
}
