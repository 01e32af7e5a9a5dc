/* SPDX-License-Identifier: BSD-3-Clause
 *
 * What finishes a group of small ones, on vectors of 256 bits. Made of the verbs that qn_tile.h lists and of
 *
 *   vu_add_pairs(a, b)       products of int16, the two of each lane added
 */

/* Add a group's products, of R rows by V vectors of columns from column n of the panel on, to the totals. */
QN_INLINE void finish_group(const int R, const int V, const int n, VU sum[][COLUMN_VECTORS], const uint8_t *terms,
                            const int32_t *pairs, const float *row_scale, const float *before, float *totals) {
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) {
        VF scale = vf_load((const float *)(const void *)terms + n + v * QN_W);
        VU less = vu_load((const uint32_t *)(const void *)(terms + 64) + n + v * QN_W);
#pragma GCC unroll 6
        for (int r = 0; r < R; r++) {
            int at = r * QN_TILE_COLS + n + v * QN_W;
            VF value = vf_from_vu(sum[r][v] + vu_add_pairs(less, vu_splat((uint32_t)pairs[r])));
            vf_store(totals + at, vf_load(before + at) + value * (vf_splat(row_scale[r]) * scale));
        }
    }
}
