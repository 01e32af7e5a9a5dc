/* SPDX-License-Identifier: BSD-3-Clause
 *
 * Float products on vectors of 256 bits, the same for every instruction set that has AVX2 and FMA.
 */
/* R rows by one panel: 2 R accumulators, carried in acc from call to call. */
QN_INLINE void tile_float_rows(const int R, int64_t k, const uint8_t *a, int64_t a_stride, const float *b, float *acc) {
    __m256 sum[6][2];
#pragma GCC unroll 6
    for (int r = 0; r < R; r++)
#pragma GCC unroll 2
        for (int h = 0; h < 2; h++) sum[r][h] = _mm256_loadu_ps(acc + r * QN_TILE_COLS + 8 * h);
    for (int64_t i = 0; i < k; i++, b += QN_NR) {
        __m256 w0 = _mm256_loadu_ps(b), w1 = _mm256_loadu_ps(b + 8);
#pragma GCC unroll 6
        for (int r = 0; r < R; r++) {
            __m256 x = _mm256_broadcast_ss((const float *)(a + r * a_stride) + i);
            sum[r][0] = _mm256_fmadd_ps(x, w0, sum[r][0]);
            sum[r][1] = _mm256_fmadd_ps(x, w1, sum[r][1]);
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < R; r++)
#pragma GCC unroll 2
        for (int h = 0; h < 2; h++) _mm256_storeu_ps(acc + r * QN_TILE_COLS + 8 * h, sum[r][h]);
}

static void tile_float(int rows, int panels, int64_t k, const uint8_t *a, int64_t a_stride, const float *b, float *acc) {
    (void)panels; /* one */
    switch (rows) {
    case 1: tile_float_rows(1, k, a, a_stride, b, acc); break;
    case 2: tile_float_rows(2, k, a, a_stride, b, acc); break;
    case 3: tile_float_rows(3, k, a, a_stride, b, acc); break;
    case 4: tile_float_rows(4, k, a, a_stride, b, acc); break;
    case 5: tile_float_rows(5, k, a, a_stride, b, acc); break;
    default: tile_float_rows(6, k, a, a_stride, b, acc); break;
    }
}
