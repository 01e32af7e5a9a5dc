/* SPDX-License-Identifier: BSD-3-Clause
 *
 * Products in float32 with weights that are decoded on the way, the same text for every vector instruction set. Before
 * including this define the verbs that qn_tile.h lists (vf_fma among them) and the largest tile:
 *
 *   QN_FLOAT_ROWS, QN_FLOAT_PANELS   of a product with decoded weights: as many sums as leave registers for a row of weights
 *                                    and a broadcast
 *   QN_DIRECT_PANELS, QN_DIRECT_WIDE_ROWS   panels beside each other, of so many rows at most, of a product that decodes for
 *                                    itself; more rows take a panel at a time
 *
 * Every output is one chain of fused multiply-adds, k ascending, whatever the tile.
 */
#include "qn_decode.h"

/* Compilers start as many loads and products of an unrolled loop as they can before the first sum, and spill, or move sums from
 * register to register; the CPU is better at that. So one thing is done after the other, and a sum stays where it is. */
#ifdef QN_VECTOR_REGISTER
#define IN_TURN(v) __asm__ volatile("" : "+" QN_VECTOR_REGISTER(v))
#define POINTER_IN_TURN(p) __asm__ volatile("" : "+r"(p))
#define ADD_PRODUCT(sum, x, w) \
    __asm__ volatile("vfmadd231ps %2, %1, %0" : "+" QN_VECTOR_REGISTER(sum) : QN_VECTOR_REGISTER(x), QN_VECTOR_REGISTER(w))
#else
#define IN_TURN(v) (void)(v)
#define POINTER_IN_TURN(p) (void)(p)
#define ADD_PRODUCT(sum, x, w) (sum) = vf_fma(x, w, sum)
#endif

enum {
    PANEL_PARTS = QN_NR / QN_W, /* vectors of a panel */
    DIRECT_ROWS = 6             /* more rows are better served by weights that are decoded once for all of them */
};

/* ---- with decoded weights ---- */

QN_INLINE void multiply_row_of_weights(const int R, const int V, VF sum[][QN_TILE_PANELS * PANEL_PARTS], const float *a, const float *b) {
    VF w[QN_TILE_PANELS * PANEL_PARTS];
    POINTER_IN_TURN(b);
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) w[v] = vf_load(b + v * QN_W);
#pragma GCC unroll 9
    for (int r = 0; r < R; r++) {
        POINTER_IN_TURN(a);
        VF x = vf_splat(a[r * QN_KR]);
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) ADD_PRODUCT(sum[r][v], x, w[v]);
    }
}

/* R rows by V vectors of columns; the sums are carried in acc from call to call. */
QN_INLINE void tile_float_fixed(const int R, const int V, int64_t k, const float *a, const float *b, float *acc) {
    VF sum[QN_FLOAT_ROWS][QN_TILE_PANELS * PANEL_PARTS];
#pragma GCC unroll 9
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) sum[r][v] = vf_load(acc + r * QN_TILE_COLS + v * QN_W);
    int64_t i = 0;
    for (; i + QN_KR <= k; i += QN_KR, a += R * QN_KR, b += QN_KR * V * QN_W) {
#pragma GCC unroll 4
        for (int j = 0; j < QN_KR; j++) multiply_row_of_weights(R, V, sum, a + j, b + j * V * QN_W);
    }
    for (; i < k; i++, a++, b += V * QN_W) multiply_row_of_weights(R, V, sum, a, b);
#pragma GCC unroll 9
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) vf_store(acc + r * QN_TILE_COLS + v * QN_W, sum[r][v]);
}

#define FLOAT_ROWS_6(X, P) X(1, P) X(2, P) X(3, P) X(4, P) X(5, P) X(6, P)
#define FLOAT_ROWS_9(X, P) FLOAT_ROWS_6(X, P) X(7, P) X(8, P) X(9, P)
#if QN_FLOAT_ROWS == 9 && QN_FLOAT_PANELS == 3
#define FLOAT_SIZES(X) FLOAT_ROWS_9(X, 1) FLOAT_ROWS_9(X, 2) FLOAT_ROWS_9(X, 3)
#elif QN_FLOAT_ROWS == 6 && QN_FLOAT_PANELS == 1
#define FLOAT_SIZES(X) FLOAT_ROWS_6(X, 1)
#else
#error "list the sizes of this tile"
#endif

static void tile_float(int rows, int panels, int64_t k, const float *a, const float *b, float *acc) {
#define CASE(R, P) case (R) * 4 + (P): tile_float_fixed(R, (P) * PANEL_PARTS, k, a, b, acc); break;
    switch (rows * 4 + panels) { FLOAT_SIZES(CASE) }
#undef CASE
}

/* ---- decoding for that ---- */

QN_INLINE void decode_codes(const code_kind kind, const qn_weights *w, const uint8_t *panel, int64_t g, int64_t k0, int64_t k,
                            int scaled, float *out, int64_t stride) {
    const int step = k_of_step(kind);
    const int64_t end = k0 + k;
    const uint8_t *codes = codes_of_group(kind, w, panel, g) + k0 / step * 64;
    int careful = is_float8(kind) && scaled && has_huge_scales(kind, w, panel, 1, g, g + 1);
    decode_terms terms[PANEL_PARTS];
    for (int v = 0; v < PANEL_PARTS; v++) terms[v] = terms_of_group(kind, w, panel, g, v * QN_W, scaled);
    for (int64_t i = k0 / step * step; i < end; i += step, codes += 64) {
        VU code[PANEL_PARTS];
        for (int v = 0; v < PANEL_PARTS; v++) code[v] = vu_load((const uint32_t *)codes + v * QN_W);
        int whole = i >= k0 && i + step <= end;
        if (whole && is_float8(kind)) whole = !careful && !has_special(kind, PANEL_PARTS, code);
        if (!whole) {
            int last = end - i < step ? (int)(end - i) : step;
            for (int j = i < k0 ? (int)(k0 - i) : 0; j < last; j++, out += stride)
                for (int v = 0; v < PANEL_PARTS; v++) vf_store(out + v * QN_W, decode_one(kind, code[v], j, terms + v));
            continue;
        }
#pragma GCC unroll 2
        for (int half = 0; half < step / QN_KR; half++, out += QN_KR * stride) {
#pragma GCC unroll 4
            for (int v = 0; v < PANEL_PARTS; v++) {
                VU bytes = bytes_of_half(kind, half, code[v], terms + v);
#pragma GCC unroll 4
                for (int j = 0; j < QN_KR; j++) vf_store(out + j * stride + v * QN_W, decode_byte(kind, bytes, j, terms + v));
            }
        }
    }
}

#define CODE_KINDS(X) X(CODES_INT8) X(CODES_INT8_ZERO) X(CODES_INT4) X(CODES_E4M3FN) X(CODES_E5M2)

static void decode(const qn_weights *w, const uint8_t *panel, int64_t g, int64_t k0, int64_t k, int scaled, float *out,
                   int64_t stride) {
#define CASE(KIND) case KIND: decode_codes(KIND, w, panel, g, k0, k, scaled, out, stride); break;
    switch (kind_of_codes(w)) { CODE_KINDS(CASE) }
#undef CASE
}

/* ---- few rows: decoded into registers, and multiplied there ---- */

QN_INLINE void add_products_of_k(const int R, const int V, VF sum[][QN_DIRECT_PANELS * PANEL_PARTS], const float *const x[],
                                 int64_t k, const VF value[]) {
#pragma GCC unroll 6
    for (int r = 0; r < R; r++) {
        VF from_row = vf_splat(x[r][k]);
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) ADD_PRODUCT(sum[r][v], from_row, value[v]);
    }
}

/* The first `count` k of a k-step of V vectors, one by one. */
QN_INLINE void multiply_careful(const code_kind kind, const int R, const int V, VF sum[][QN_DIRECT_PANELS * PANEL_PARTS],
                                const float *const x[], int64_t k, int count, const VU code[], const decode_terms terms[]) {
    for (int j = 0; j < count; j++) {
        VF value[QN_DIRECT_PANELS * PANEL_PARTS];
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) value[v] = decode_one(kind, code[v], j, terms + v);
        add_products_of_k(R, V, sum, x, k + j, value);
    }
}

QN_INLINE void direct_fixed(const code_kind kind, const int R, const int P, const qn_call *c, const qn_rows *rows, int64_t row,
                            int count, int64_t panel, float *out) {
    const qn_weights *w = c->w;
    const int V = P * PANEL_PARTS, step = k_of_step(kind);
    const int scaled = !is_float8(kind) || c->input == QN_INPUT_FLOAT;
    const uint8_t *base = w->data + panel * w->panel_bytes;
    const int careful = is_float8(kind) && scaled && has_huge_scales(kind, w, base, P, 0, w->groups);
    const float *x[DIRECT_ROWS];
    VF sum[DIRECT_ROWS][QN_DIRECT_PANELS * PANEL_PARTS];
#pragma GCC unroll 6
    for (int r = 0; r < R; r++) { /* a tile that is larger than the rows there are has the last one several times */
        x[r] = (const float *)(const void *)(rows->a + (row + (r < count ? r : count - 1)) * rows->a_stride);
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) sum[r][v] = vf_splat(0.0f);
    }
    for (int64_t g = 0; g < w->groups; g++) {
        const uint8_t *codes = codes_of_group(kind, w, base, g);
        const int64_t first = g * w->group, end = qn_min64(first + w->group, w->k);
        decode_terms terms[QN_DIRECT_PANELS * PANEL_PARTS];
        VU code[QN_DIRECT_PANELS * PANEL_PARTS];
#pragma GCC unroll 8
        for (int v = 0; v < V; v++)
            terms[v] = terms_of_group(kind, w, base + v / PANEL_PARTS * w->panel_bytes, g, v % PANEL_PARTS * QN_W, scaled);
        int64_t k = first;
        for (; k < end; k += step, codes += 64) {
#pragma GCC unroll 8
            for (int v = 0; v < V; v++)
                code[v] = vu_load((const uint32_t *)(codes + v / PANEL_PARTS * w->panel_bytes) + v % PANEL_PARTS * QN_W);
            int left = end - k < step ? (int)(end - k) : step;
            if (left < step || (is_float8(kind) && (careful || has_special(kind, V, code)))) {
                multiply_careful(kind, R, V, sum, x, k, left, code, terms);
                continue;
            }
#pragma GCC unroll 2
            for (int half = 0; half < step / QN_KR; half++) {
                VU bytes[QN_DIRECT_PANELS * PANEL_PARTS];
#pragma GCC unroll 8
                for (int v = 0; v < V; v++) bytes[v] = bytes_of_half(kind, half, code[v], terms + v);
#pragma GCC unroll 4
                for (int j = 0; j < QN_KR; j++) {
                    VF value[QN_DIRECT_PANELS * PANEL_PARTS];
#pragma GCC unroll 8
                    for (int v = 0; v < V; v++) {
                        IN_TURN(bytes[v]);
                        value[v] = decode_byte(kind, bytes[v], j, terms + v);
                    }
                    add_products_of_k(R, V, sum, x, k + half * QN_KR + j, value);
                }
            }
        }
        if (scaled) continue; /* one chain over all groups; else a chain, a scale and a sum each */
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) {
            VF scale = vf_load((const float *)(base + v / PANEL_PARTS * w->panel_bytes + w->scale_at) + g * QN_NR + v % PANEL_PARTS * QN_W);
#pragma GCC unroll 6
            for (int r = 0; r < R; r++) {
                float *to = out + r * QN_TILE_COLS + v * QN_W;
                VF product = sum[r][v] * (vf_splat(rows->scale[row + (r < count ? r : count - 1)]) * scale);
                if (g > 0) product = vf_load(to) + product;
                vf_store(to, product);
                sum[r][v] = vf_splat(0.0f);
            }
        }
    }
    if (!scaled) return;
#pragma GCC unroll 6
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) vf_store(out + r * QN_TILE_COLS + v * QN_W, sum[r][v]);
}

/* Numbers of rows that there are tiles for: beside each other as many as pay, of a panel alone (often the last one) few. Others
 * take the next larger tile. */
#if QN_DIRECT_WIDE_ROWS == 6
#define WIDE_TILES(X, KIND) X(KIND, 1) X(KIND, 2) X(KIND, 4) X(KIND, 6)
#define NARROW_TILES(X, KIND) X(KIND, 1) X(KIND, 6)
#elif QN_DIRECT_WIDE_ROWS == 2
#define WIDE_TILES(X, KIND) X(KIND, 1) X(KIND, 2)
#define NARROW_TILES(X, KIND) X(KIND, 1) X(KIND, 4) X(KIND, 6)
#else
#error "list the tiles"
#endif

static void float_direct(const qn_call *c, const qn_rows *rows, int64_t row, int count, int64_t panel, int panels, float *out) {
#define CASE(KIND, R, P)                                                  \
    if (kind == (KIND) && count <= (R)) {                                 \
        direct_fixed(KIND, R, P, c, rows, row, count, panel, out);        \
        continue;                                                         \
    }
#define WIDE(KIND, R) CASE(KIND, R, QN_DIRECT_PANELS)
#define NARROW(KIND, R) CASE(KIND, R, 1)
    code_kind kind = kind_of_codes(c->w);
    /* Where more rows than these share the work of decoding, int8 without zero points is not worth a loop of its own. */
    if (kind == CODES_INT8 && count > 2) kind = CODES_INT8_ZERO;
    for (int wide; panels > 0; panels -= wide, panel += wide, out += wide * QN_NR) {
        wide = panels >= QN_DIRECT_PANELS && count <= QN_DIRECT_WIDE_ROWS ? QN_DIRECT_PANELS : 1;
        if (wide > 1) {
            WIDE(CODES_INT8, 1) WIDE(CODES_INT8, 2)
            WIDE_TILES(WIDE, CODES_INT8_ZERO) WIDE_TILES(WIDE, CODES_INT4)
            WIDE_TILES(WIDE, CODES_E4M3FN) WIDE_TILES(WIDE, CODES_E5M2)
        } else {
            if (kind == CODES_INT8) kind = CODES_INT8_ZERO;
            NARROW_TILES(NARROW, CODES_INT8_ZERO) NARROW_TILES(NARROW, CODES_INT4)
            NARROW_TILES(NARROW, CODES_E4M3FN) NARROW_TILES(NARROW, CODES_E5M2)
        }
    }
#undef NARROW
#undef WIDE
#undef CASE
}
