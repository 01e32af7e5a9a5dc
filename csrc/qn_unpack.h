/* SPDX-License-Identifier: BSD-3-Clause
 *
 * Weights that are unpacked for many rows: `unpack_groups` and `unpack_panel` of qn_gemm.h. Made of the verbs that qn_tile.h lists and of
 *
 *   vu_add_bytes(s, x)       each lane of s plus the four bytes of x, unsigned
 */

/* Where a group's pairs are among its terms. */
enum { PAIRS_AT = QN_NR * 4 };

/* The codes of `groups` groups of a panel; of int4 also the sums of each column's, put into pairs that have the zero points. */
QN_INLINE void unpack_codes(const int int4, const uint8_t *b, int64_t groups, int64_t group_k, uint8_t *codes, int64_t step, uint8_t *terms,
                            int64_t term_step) {
    const VU low = vu_splat(0x0F0F0F0Fu);
    for (int64_t g = 0; g < groups; g++, terms += term_step) {
        VU sum[QN_NR / QN_W];
        for (int n = 0; n < QN_NR / QN_W; n++) sum[n] = vu_splat(0);
#pragma GCC unroll 4
        for (int64_t k = 0; k < group_k; k += 2 * QN_KR, b += int4 ? 64 : 128, codes += 2 * step) {
#pragma GCC unroll 2
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
        for (int n = 0; n < QN_NR / QN_W && int4; n++) {
            uint32_t *pair = (uint32_t *)(void *)(terms + PAIRS_AT) + n * QN_W;
            vu_store(pair, vu_load(pair) | sum[n]);
        }
    }
}

QN_INLINE void unpack_scales(const qn_scale kind, const uint8_t *scales, int64_t first, int64_t groups, uint8_t *terms, int64_t term_step) {
    for (int64_t g = first; g < first + groups; g++, terms += term_step)
        for (int n = 0; n < QN_NR; n += QN_W) vf_store((float *)(void *)terms + n, load_scales(kind, scales, g * QN_NR + n));
}

/* Zero points of int4, as pairs whose other half is 0. */
QN_INLINE void unpack_zeros(const qn_weights *w, const uint8_t *zeros, int64_t groups, uint8_t *terms, int64_t term_step) {
    const VU all = vu_splat((uint32_t)w->one_zero << 16);
    const int one = w->one_zero >= 0;
    for (int64_t g = 0; g < groups; g++, terms += term_step, zeros += QN_NR / 2) {
        for (int n = 0; n < QN_NR; n += QN_W)
            vu_store((uint32_t *)(void *)(terms + PAIRS_AT) + n, one ? all : load_zeros(zeros, n) << 16);
    }
}

/* What decides how is the same for all groups, so it is asked once, and each part has a loop of its own. */
QN_AROUND_LINKAGE void QN_AROUND(unpack_groups)(const qn_weights *w, int64_t panel, int panels, int64_t first, int64_t groups,
                                                uint8_t *codes, uint8_t *terms) {
    const int64_t step = panels * 64, term_step = panels * QN_TERM_BYTES, group_k = w->group_k;
    for (int p = 0; p < panels; p++, codes += 64, terms += QN_TERM_BYTES) {
        const uint8_t *from = w->data + (panel + p) * w->panel_bytes, *b = from + w->codes_at;
        switch (w->scale) {
        case QN_SCALE_FLOAT32: unpack_scales(QN_SCALE_FLOAT32, from + w->scale_at, first, groups, terms, term_step); break;
        case QN_SCALE_BFLOAT16: unpack_scales(QN_SCALE_BFLOAT16, from + w->scale_at, first, groups, terms, term_step); break;
        default: unpack_scales(QN_SCALE_FLOAT16, from + w->scale_at, first, groups, terms, term_step); break;
        }
        if (w->format != QN_INT4) {
            unpack_codes(0, b + first * group_k * QN_NR, groups, group_k, codes, step, terms, term_step);
            for (int64_t g = 0; g < groups; g++) {
                for (int n = 0; n < QN_NR; n += QN_W) {
                    VU code_sum = sum_of_columns(w, from, n, first + g) & vu_splat(0xFFFF);
                    vu_store((uint32_t *)(void *)(terms + g * term_step + PAIRS_AT) + n, code_sum | zero_of_columns(w, from, n, first + g) << 16);
                }
            }
        } else {
            b += first * group_k * QN_NR / 2;
            unpack_zeros(w, from + w->zero_at + first * QN_NR / 2, groups, terms, term_step);
            if (group_k == 32) /* the usual one: without a loop */
                unpack_codes(1, b, groups, 32, codes, step, terms, term_step);
            else
                unpack_codes(1, b, groups, group_k, codes, step, terms, term_step);
        }
    }
}

QN_AROUND_LINKAGE void QN_AROUND(unpack_panel)(const qn_weights *w, const uint8_t *panel, const qn_weights *to, uint8_t *out) {
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
