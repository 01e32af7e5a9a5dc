/* SPDX-License-Identifier: BSD-3-Clause
 *
 * The walk over weights with small groups: their codes are unpacked once for all rows of a block, a piece of k at a time.
 */
#include "qn_partition.h"

enum { PIECE_K = 256 }; /* of a tile's panels, unpacked: stays in the L1 cache beside the rows of a tile */

int qn_sums_groups(const qn_kernel *kernel, const qn_call *c) {
    return kernel->tile_groups && c->w->groups > 1 && c->w->group_k <= QN_PAIR_GROUP && c->w->format <= QN_INT4 && !c->wide &&
           c->input != QN_INPUT_FLOAT && c->output != QN_OUTPUT_ACC32 && c->w->bias != QN_BIAS_INT32;
}

static int64_t groups_of_piece(const qn_weights *w) { return qn_min64(w->groups, qn_quotient(PIECE_K, w->group_k)); }

/* | codes of a piece | its terms | totals of a block's rows |, each 64-byte aligned */
static int64_t code_bytes(const qn_weights *w) { return groups_of_piece(w) * w->group_k * QN_TILE_COLS; }
static int64_t term_bytes(const qn_weights *w) { return groups_of_piece(w) * QN_TILE_PANELS * QN_TERM_BYTES; }

int64_t qn_groups_scratch(const qn_weights *w, int64_t rows) {
    return code_bytes(w) + term_bytes(w) + rows * QN_TILE_COLS * 4;
}

void qn_pair_sums(const qn_call *c, const qn_rows *rows) {
    const qn_weights *w = c->w;
    for (int64_t g = 0; g < w->groups; g++) {
        int32_t k = (int32_t)qn_min64(w->group, w->k - g * w->group), *sum = rows->sum + g * rows->sum_group;
        for (int64_t i = 0; i < rows->count; i++, sum += rows->sum_row)
            *sum = (int32_t)(((uint32_t)-rows->zero[i] & 0xFFFFu) | (uint32_t)(k * rows->zero[i] - *sum) << 16);
    }
}

/* Ask for the lines from p to end. */
static inline void ask_for(const uint8_t *p, const uint8_t *end, const int to_write) {
#ifdef __GNUC__
    for (; p < end; p += 64) {
        if (to_write)
            __builtin_prefetch(p, 1);
        else
            __builtin_prefetch(p);
    }
#else
    (void)p, (void)end, (void)to_write;
#endif
}

/* For those of y that a tile will write. */
static void ask_for_outputs(const qn_call *c, const qn_rows *rows, int64_t row, int count, int64_t panel, int panels) {
    int64_t bytes = c->output == QN_OUTPUT_FLOAT32 ? 4 : 1, end = qn_min64((panel + panels) * QN_NR, c->w->n);
    const uint8_t *y = (const uint8_t *)c->y + (rows->first + row) * c->y_stride;
    for (int r = 0; r < count; r++, y += c->y_stride) ask_for(y + panel * QN_NR * bytes, y + end * bytes, 1);
}

/* For int4's scales and zero points of groups [g, g + groups). */
static void ask_for_terms(const qn_weights *w, const uint8_t *panel, int panels, int64_t g, int64_t groups) {
    int64_t scales = QN_NR * (w->scale == QN_SCALE_FLOAT32 ? 4 : 2), zeros = w->one_zero < 0 ? QN_NR / 2 : 0;
    for (int p = 0; p < panels; p++, panel += w->panel_bytes) {
        ask_for(panel + w->scale_at + g * scales, panel + w->scale_at + (g + groups) * scales, 0);
        ask_for(panel + w->zero_at + g * zeros, panel + w->zero_at + (g + groups) * zeros, 0);
    }
}

/* Totals of no groups yet: -0 + x is x, for every x. */
#define EIGHT(X) X, X, X, X, X, X, X, X
_Alignas(64) static const float nothing[QN_TILE_ROWS * QN_TILE_COLS] = {
    EIGHT(EIGHT(-0.0f)), EIGHT(EIGHT(-0.0f)), EIGHT(EIGHT(-0.0f)), EIGHT(EIGHT(-0.0f)), EIGHT(EIGHT(-0.0f)), EIGHT(EIGHT(-0.0f)),
};
#undef EIGHT

/* Rows of a block by a tile's panels, from `panel` on; `last` is the end of those that this thread does. */
static void groups_of_panels(const qn_kernel *kernel, const qn_call *c, const qn_rows *rows, int64_t panel, int panels,
                             int64_t last, uint8_t *scratch) {
    const qn_weights *w = c->w;
    uint8_t *codes = scratch, *terms = codes + code_bytes(w);
    float *sums = (float *)(void *)(terms + term_bytes(w));
    partition tiles = cut_evenly(rows->count, qn_pieces(rows->count, kernel->group_rows));
    int64_t most = groups_of_piece(w), group_bytes = w->group_k * QN_NR * (w->format == QN_INT4 ? 4 : 8) / 8;
    int64_t share = qn_round_up(qn_pieces(group_bytes * most, tiles.parts), 64), ask = qn_round_up(qn_pieces(share, most), 64);
    for (int64_t g = 0, groups; g < w->groups; g += groups) {
        groups = qn_min64(most, w->groups - g);
        kernel->unpack_groups(w, panel, panels, g, groups, codes, terms);
        /* What is unpacked next: the same panels' next groups, or the next panels' first ones. */
        int ends = g + groups == w->groups, more = !ends || panel + panels < last;
        const uint8_t *next = w->data + (ends ? panel + panels : panel) * w->panel_bytes;
        int64_t next_g = ends ? 0 : g + groups;
        if (more && w->format == QN_INT4) ask_for_terms(w, next, panels, next_g, qn_min64(most, w->groups - next_g));
        for (int64_t t = 0, row = 0; t < tiles.parts; row += part_size(&tiles, t++)) {
            int count = (int)part_size(&tiles, t);
            float *sum = sums + row * QN_TILE_COLS;
            qn_group_tile tile = {
                .rows = count, .panels = panels, .groups = groups, .group_k = w->group_k,
                .a = rows->a + row * rows->a_stride + g * w->group_k * kernel->a_bytes, .a_stride = rows->a_stride, .codes = codes, .terms = terms,
                .pairs = rows->sum + row * rows->sum_row + g * rows->sum_group, .pairs_stride = rows->sum_group,
                .row_scale = rows->scale + row, .before = g == 0 ? nothing : sum, .sum = sum,
                .ahead = more ? next + w->codes_at + next_g * group_bytes + t * share : 0, .ahead_apart = w->panel_bytes,
                .ask = (int32_t)ask, .asking = more ? (int32_t)qn_pieces(share, ask) : 0,
            };
            if (ends) ask_for_outputs(c, rows, row, count, panel, panels);
            kernel->tile_groups(&tile);
            if (ends) kernel->epilogue(c, rows, row, count, panel, panels, w->groups - 1, 0, 0, sum);
        }
    }
}

void qn_groups_block(const qn_kernel *kernel, const qn_call *c, const qn_rows *rows, int64_t first, int64_t last,
                     uint8_t *scratch) {
    if (rows->count == 1 && kernel->row_groups && c->w->format == QN_INT4) {
        kernel->row_groups(c, rows, 0, first, last);
        return;
    }
    partition tiles = cut_evenly(last - first, qn_pieces(last - first, kernel->group_panels));
    for (int64_t t = 0, panel = first; t < tiles.parts; panel += part_size(&tiles, t++))
        groups_of_panels(kernel, c, rows, panel, (int)part_size(&tiles, t), last, scratch);
}
