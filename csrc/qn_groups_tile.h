/* SPDX-License-Identifier: BSD-3-Clause
 *
 * Weights that are unpacked for many rows, the part that is the same for every vector: `unpack_groups` and `unpack_panel` of
 * qn_gemm.h, and what finishes a group.
 * Beside those of qn_tile.h, an instruction set's file defines these verbs:
 *
 *   vu_add_bytes(s, x)       each lane of s plus the four bytes of x, unsigned
 *   vu_add_pairs(a, b)       products of int16, the two of each lane added (where `finish_group` is used)
 */

static void unpack_groups(const qn_weights *w, const uint8_t *panel, int64_t first, int64_t groups, uint8_t *codes,
                          int64_t step, uint8_t *terms, int64_t term_step) {
    const VU low = vu_splat(0x0F0F0F0Fu);
    const int int4 = w->format == QN_INT4;
    const int64_t group_k = w->group_k;
    const uint8_t *b = panel + w->codes_at + first * group_k * QN_NR / (int4 ? 2 : 1);
    for (int64_t g = first; g < first + groups; g++, terms += term_step) {
        VU sum[QN_NR / QN_W];
        for (int n = 0; n < QN_NR / QN_W; n++) sum[n] = vu_splat(0);
        for (int64_t k = 0; k < group_k; k += 2 * QN_KR, b += int4 ? 64 : 128, codes += 2 * step) {
            for (int n = 0; n < QN_NR / QN_W; n++) {
                const int at = n * QN_W * QN_KR;
                VU even = vu_load((const uint32_t *)(const void *)(b + at)), odd;
                if (int4) {
                    odd = (even >> 4) & low;
                    even = even & low;
                    sum[n] = vu_add_bytes(sum[n], even + odd);
                } else {
                    odd = vu_load((const uint32_t *)(const void *)(b + at + 64));
                }
                vu_store((uint32_t *)(void *)(codes + at), even);
                vu_store((uint32_t *)(void *)(codes + step + at), odd);
            }
        }
        for (int n = 0; n < QN_NR; n += QN_W) {
            VU code_sum = int4 ? sum[n / QN_W] : sum_of_columns(w, panel, n, g), zero = zero_of_columns(w, panel, n, g);
            VU pair = ((vu_splat(0) - code_sum) & vu_splat(0xFFFF)) | (vu_splat(0) - zero) << 16;
            vf_store((float *)(void *)terms + n, scale_of_columns(w, panel, n, g));
            vu_store((uint32_t *)(void *)(terms + 64) + n, pair);
        }
    }
}

static void unpack_panel(const qn_weights *w, const uint8_t *panel, const qn_weights *to, uint8_t *out) {
    const VU low = vu_splat(0x0F0F0F0Fu);
    const uint8_t *b = panel + w->codes_at;
    uint8_t *codes = out + to->codes_at;
    memcpy(out, panel, (size_t)w->scale_at); /* the bias */
    for (int64_t g = 0; g < w->groups; g++) {
        VB zeros[QN_NR / QN_W];
        uint32_t k = (uint32_t)qn_min64(w->group, w->k - g * w->group);
        for (int n = 0; n < QN_NR; n += QN_W) {
            VU zero = zero_of_columns(w, panel, n, g);
            zeros[n / QN_W] = (VB)vu_multiply(zero, vu_splat(0x01010101));
            vf_store((float *)(void *)(out + to->scale_at) + g * QN_NR + n, scale_of_columns(w, panel, n, g));
            vu_store((uint32_t *)(void *)(out + to->sum_at) + g * QN_NR + n,
                     sum_of_columns(w, panel, n, g) - vu_multiply(zero, vu_splat(k)));
        }
        for (int64_t i = 0; i < w->group_k; i += 2 * QN_KR, b += 64, codes += 128) {
            for (int n = 0; n < QN_NR / QN_W; n++) {
                VU pairs = vu_load((const uint32_t *)(const void *)b + n * QN_W);
                vu_store((uint32_t *)(void *)codes + n * QN_W, (VU)((VB)(pairs & low) - zeros[n]));
                vu_store((uint32_t *)(void *)(codes + 64) + n * QN_W, (VU)((VB)((pairs >> 4) & low) - zeros[n]));
            }
        }
    }
}

#if QN_W == 8
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
#endif
