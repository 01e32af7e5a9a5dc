/* SPDX-License-Identifier: BSD-3-Clause
 *
 * Weights with groups on AVX-512 VNNI: see `tile_groups` in qn_gemm.h. Included by qn_gemm_vnni.c.
 */

/* sum[r][p] += products of STEPS k-steps of R rows and P panels' unpacked codes. */
QN_INLINE void multiply_steps(const int STEPS, const int R, const int P, VU sum[][COLUMN_VECTORS], const row_pointers *rows,
                              const uint8_t *codes) {
#pragma GCC unroll 8
    for (int s = 0; s < STEPS; s++) {
        __m512i w[QN_TILE_PANELS];
#pragma GCC unroll 3
        for (int p = 0; p < P; p++) w[p] = _mm512_load_si512(codes + (s * P + p) * 64);
        multiply_step(R, P, sum, rows, s * QN_KR, w);
    }
}

/* R rows by P panels. A group's float operations take as long as a fifth of its products; written out, since gcc makes
 * copies of registers and spills otherwise. Totals stay in memory, which costs nothing here: loads and stores are done by units
 * that have little else to do. */
QN_INLINE void tile_groups_fixed(const int R, const int P, const qn_group_tile *t) {
    VU sum[QN_TILE_ROWS][COLUMN_VECTORS];
    row_pointers rows = pointers_of_rows(t->a, t->a_stride);
    const uint8_t *codes = t->codes, *terms = t->terms;
    const int32_t *pairs = t->pairs, pairs_stride = (int32_t)t->pairs_stride, ask = t->ask;
    const float *row_scale = t->row_scale;
    const uint8_t *ahead = t->ahead;
    const int64_t apart = t->ahead_apart, group_k = t->group_k;
    float *totals = t->sum;
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 3
        for (int p = 0; p < P; p++) sum[r][p] = vu_splat(0);
    for (int64_t g = t->groups; g > 0; g--, terms += P * QN_TERM_BYTES, pairs += pairs_stride) {
        int64_t k = group_k;
        for (const uint8_t *stop = ahead + ask; ahead < stop; ahead += 64)
#pragma GCC unroll 3
            for (int p = 0; p < P; p++) _mm_prefetch((const char *)ahead + p * apart, _MM_HINT_T1);
        for (; k >= 32; k -= 32, codes += 8 * P * 64, rows.a[0] += 32, rows.a[1] += 32)
            multiply_steps(8, R, P, sum, &rows, codes);
        for (; k > 0; k -= 8, codes += 2 * P * 64, rows.a[0] += 8, rows.a[1] += 8)
            multiply_steps(2, R, P, sum, &rows, codes);
        __asm__("" : "+r"(totals)); /* one register for all of them */
#pragma GCC unroll 3
        for (int p = 0; p < P; p++) {
            VF scale = vf_load((const float *)(const void *)(terms + p * QN_TERM_BYTES)), factor;
            __m512i less = _mm512_load_si512(terms + p * QN_TERM_BYTES + 64);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
                float(*total)[QN_NR] = (float(*)[QN_NR])(totals + r * QN_TILE_COLS + p * QN_NR);
                __asm__("vpdpwssd %[pair]%{1to16%}, %[less], %[sum]\n\t" /* less both corrections */
                        "vmulps %[row]%{1to16%}, %[scale], %[factor]\n\t"
                        "vcvtdq2ps %[sum], %[sum]\n\t"
                        "vmulps %[factor], %[sum], %[sum]\n\t"
                        "vaddps %[total], %[sum], %[sum]\n\t"
                        "vmovups %[sum], %[total]\n\t"
                        "vpxord %[sum], %[sum], %[sum]"
                        : [sum] "+v"(sum[r][p]), [total] "+m"(*total), [factor] "=&v"(factor)
                        : [less] "v"(less), [scale] "v"(scale), [pair] "m"(pairs[r]), [row] "m"(row_scale[r]));
            }
        }
    }
}

static void tile_groups(const qn_group_tile *t) {
#define CASE(R, P) case SIZE(R, P): tile_groups_fixed(R, P, t); break;
    switch (SIZE(t->rows, t->panels)) { TILE_SIZES(CASE) }
#undef CASE
}
