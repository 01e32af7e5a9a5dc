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
    const int32_t *pairs = t->pairs, pairs_stride = (int32_t)t->pairs_stride;
    const float *row_scale = t->row_scale;
    const uint8_t *ahead = t->ahead;
    const int64_t apart = t->ahead_apart, group_k = t->group_k;
    const float *before = t->before;
    float *totals = t->sum;
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 3
        for (int p = 0; p < P; p++) sum[r][p] = vu_splat(0);
    for (int64_t g = t->groups; g > 0; g--, terms += P * QN_TERM_BYTES, pairs += pairs_stride) {
        int64_t k = group_k;
        for (const uint8_t *stop = ahead + (g > t->groups - t->asking ? t->ask : 0); ahead < stop; ahead += 64)
#pragma GCC unroll 3
            for (int p = 0; p < P; p++) _mm_prefetch((const char *)ahead + p * apart, _MM_HINT_T0);
        for (; k >= 32; k -= 32, codes += 8 * P * 64, rows.a[0] += 32, rows.a[1] += 32)
            multiply_steps(8, R, P, sum, &rows, codes);
        for (; k > 0; k -= 8, codes += 2 * P * 64, rows.a[0] += 8, rows.a[1] += 8)
            multiply_steps(2, R, P, sum, &rows, codes);
        __asm__("" : "+r"(totals), "+r"(before)); /* a register for all of them */
#pragma GCC unroll 3
        for (int p = 0; p < P; p++) {
            VF scale = vf_load((const float *)(const void *)(terms + p * QN_TERM_BYTES)), factor;
            __m512i less = _mm512_load_si512(terms + p * QN_TERM_BYTES + 64);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
                const float(*from)[QN_NR] = (const float(*)[QN_NR])(before + r * QN_TILE_COLS + p * QN_NR);
                float(*total)[QN_NR] = (float(*)[QN_NR])(totals + r * QN_TILE_COLS + p * QN_NR);
                __asm__("vpdpwssd %[pair]%{1to16%}, %[less], %[sum]\n\t" /* less both corrections */
                        "vmulps %[row]%{1to16%}, %[scale], %[factor]\n\t"
                        "vcvtdq2ps %[sum], %[sum]\n\t"
                        "vmulps %[factor], %[sum], %[sum]\n\t"
                        "vaddps %[from], %[sum], %[sum]\n\t"
                        "vmovups %[sum], %[total]\n\t"
                        "vpxord %[sum], %[sum], %[sum]"
                        : [sum] "+v"(sum[r][p]), [total] "=m"(*total), [factor] "=&v"(factor)
                        : [from] "m"(*from), [less] "v"(less), [scale] "v"(scale), [pair] "m"(pairs[r]), [row] "m"(row_scale[r]));
            }
        }
        before = totals;
    }
}

/* What is found of a group while a row passes by: sums of products, of even k-steps and of odd ones, and of codes. */
typedef struct { VU even, odd, codes; } group_sums;

enum { GROUPS_AHEAD = 2048 }; /* bytes from what is unpacked to what is asked for */

/* Two k-steps of one row and a panel. */
QN_INLINE void row_steps(group_sums *sums, const uint8_t *a, const uint8_t *b) {
    const __m512i low_nibble = _mm512_set1_epi8(15);
    _mm_prefetch((const char *)b + GROUPS_AHEAD, _MM_HINT_T0);
    __m512i even = _mm512_loadu_si512(b), odd = _mm512_and_si512(_mm512_srli_epi16(even, 4), low_nibble);
    even = _mm512_and_si512(even, low_nibble);
    add_products(&sums->even, broadcast_step(a), even);
    add_products(&sums->odd, broadcast_step(a + 4), odd);
    add_products(&sums->codes, _mm512_add_epi8(even, odd), _mm512_set1_epi8(1));
}

/* The zero points of a panel's columns, times 2^16: each column's nibble is turned to where it is wanted. */
QN_INLINE __m512i high_zeros(const uint8_t *nibbles) {
    const __m512i turns = _mm512_setr_epi32(16, 12, 8, 4, 0, 28, 24, 20, 16, 12, 8, 4, 0, 28, 24, 20);
    int32_t halves[2];
    memcpy(halves, nibbles, sizeof halves);
    __m512i both = _mm512_mask_set1_epi32(_mm512_set1_epi32(halves[0]), 0xFF00, halves[1]);
    return _mm512_and_si512(_mm512_rolv_epi32(both, turns), _mm512_set1_epi32(15 << 16));
}

/* One row by one panel, codes unpacked in registers: a matter of reading the panel. The sums of codes are found beside the
 * product; with the zero points they are pairs as those that `tile_groups` is given. */
QN_INLINE VF row_of_groups(const qn_call *c, const qn_rows *rows, int64_t row, const uint8_t *panel) {
    const qn_weights *w = c->w;
    const uint8_t *a = rows->a + row * rows->a_stride, *b = panel + w->codes_at, *zeros = panel + w->zero_at;
    const int32_t *pairs = rows->sum + row * rows->sum_row;
    VF total = vf_splat(-0.0f), row_scale = vf_splat(rows->scale[row]);
    __m512i zero = (__m512i)vu_splat((uint32_t)w->one_zero << 16);
    for (int64_t g = 0; g < w->groups; g++, pairs += rows->sum_group) {
        group_sums sums = {vu_splat(0), vu_splat(0), vu_splat(0)};
        int64_t k = w->group_k;
        for (; k >= 32; k -= 32, a += 32, b += 256)
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) row_steps(&sums, a + 8 * i, b + 64 * i);
        for (; k > 0; k -= 8, a += 8, b += 64) row_steps(&sums, a, b);
        if (w->one_zero < 0) zero = high_zeros(zeros + g * QN_NR / 2);
        __m512i sum = (__m512i)(sums.even + sums.odd), terms = _mm512_or_si512((__m512i)sums.codes, zero);
        VF value = _mm512_cvtepi32_ps(_mm512_dpwssd_epi32(sum, terms, _mm512_set1_epi32(*pairs)));
        total = total + value * (row_scale * scale_of_columns(w, panel, 0, g));
    }
    return total;
}

/* Panels [first, last) for one row. */
static void row_groups(const qn_call *c, const qn_rows *rows, int64_t row, int64_t first, int64_t last) {
    const qn_weights *w = c->w;
    for (int64_t p = first; p < last; p++) {
        float sum[QN_NR];
        const uint8_t *panel = w->data + p * w->panel_bytes;
        vf_store(sum, row_of_groups(c, rows, row, panel));
        epilogue(c, rows, row, 1, p, 1, w->groups - 1, 0, 0, sum);
    }
}

static void tile_groups(const qn_group_tile *t) {
#define CASE(R, P) case SIZE(R, P): tile_groups_fixed(R, P, t); break;
    switch (SIZE(t->rows, t->panels)) { TILE_SIZES(CASE) }
#undef CASE
}
