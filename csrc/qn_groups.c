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

static int64_t groups_of_piece(const qn_weights *w) { return qn_min64(w->groups, PIECE_K / w->group_k); }

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
            *sum = (int32_t)((uint32_t)rows->zero[i] | (uint32_t)(*sum - k * rows->zero[i]) << 16);
    }
}

/* Rows of a block by a tile's panels, from `panel` on. */
static void groups_of_panels(const qn_kernel *kernel, const qn_call *c, const qn_rows *rows, int64_t panel, int panels,
                             uint8_t *scratch) {
    const qn_weights *w = c->w;
    uint8_t *codes = scratch, *terms = codes + code_bytes(w);
    float *sums = (float *)(void *)(terms + term_bytes(w));
    partition tiles = cut_evenly(rows->count, (rows->count + kernel->group_rows - 1) / kernel->group_rows);
    for (int64_t i = 0; i < rows->count * QN_TILE_COLS; i++) sums[i] = -0.0f; /* -0 + x is x, for every x */
    for (int64_t g = 0, groups; g < w->groups; g += groups) {
        groups = qn_min64(groups_of_piece(w), w->groups - g);
        for (int p = 0; p < panels; p++)
            kernel->unpack_groups(w, w->data + (panel + p) * w->panel_bytes, g, groups, codes + p * 64, panels * 64,
                                  terms + p * QN_TERM_BYTES, panels * QN_TERM_BYTES);
        for (int64_t t = 0, row = 0; t < tiles.parts; row += part_size(&tiles, t++)) {
            qn_group_tile tile = {
                .rows = (int)part_size(&tiles, t), .panels = panels, .groups = groups, .group_k = w->group_k,
                .a = rows->a + row * rows->a_stride + g * w->group_k, .a_stride = rows->a_stride, .codes = codes, .terms = terms,
                .pairs = rows->sum + row * rows->sum_row + g * rows->sum_group, .pairs_stride = rows->sum_group,
                .row_scale = rows->scale + row, .sum = sums + row * QN_TILE_COLS,
            };
            kernel->tile_groups(&tile);
        }
    }
    for (int64_t t = 0, row = 0; t < tiles.parts; row += part_size(&tiles, t++))
        kernel->epilogue(c, rows, row, (int)part_size(&tiles, t), panel, panels, w->groups - 1, 0, 0, sums + row * QN_TILE_COLS);
}

void qn_groups_block(const qn_kernel *kernel, const qn_call *c, const qn_rows *rows, int64_t first, int64_t last,
                     uint8_t *scratch) {
    partition tiles = cut_evenly(last - first, (last - first + kernel->group_panels - 1) / kernel->group_panels);
    for (int64_t t = 0, panel = first; t < tiles.parts; panel += part_size(&tiles, t++))
        groups_of_panels(kernel, c, rows, panel, (int)part_size(&tiles, t), scratch);
}
