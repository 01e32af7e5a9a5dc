/* SPDX-License-Identifier: BSD-3-Clause
 *
 * AVX-512 VNNI: vpdpbusd adds four u8 * s8 products to each int32 lane without intermediate saturation (never
 * vpdpbusds, which saturates the sum). Activations are the unsigned operand, weights the signed one; nibbles 0..15 are
 * signed bytes as they are. A tile is 8 rows by 3 panels: 24 accumulators, 3 vectors of weights, one broadcast.
 */
#include "qn_gemm.h"

#if defined(__x86_64__)
#include <immintrin.h>
#include <math.h>
#include <string.h>
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma")
#endif

#define QN_W 16
#define QN_A_BYTES 1
typedef __m512 VF;
typedef uint32_t VU __attribute__((vector_size(64)));

static inline VF vf_load(const float *p) { return _mm512_loadu_ps(p); }
static inline void vf_store(float *p, VF v) { _mm512_storeu_ps(p, v); }
static inline VU vu_load(const uint32_t *p) { return (VU)_mm512_loadu_si512(p); }
static inline void vu_store(uint32_t *p, VU v) { _mm512_storeu_si512(p, (__m512i)v); }
static inline VF vf_splat(float x) { return _mm512_set1_ps(x); }
static inline VU vu_splat(uint32_t x) { return (VU)_mm512_set1_epi32((int)x); }
static inline VF vf_rint(VF x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline VF vf_abs(VF x) { return _mm512_abs_ps(x); }
static inline VF vf_min(VF a, VF b) { return _mm512_min_ps(a, b); }
static inline VF vf_max(VF a, VF b) { return _mm512_max_ps(a, b); }
static inline VF vf_less(VF a, VF b, VF x, VF y) { return _mm512_mask_mov_ps(y, _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), x); }
static inline VF vf_nan_to_zero(VF x) { return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, x, _CMP_ORD_Q), x); }
static inline VF vf_from_vu(VU v) { return _mm512_cvtepi32_ps((__m512i)v); }
static inline VU vu_from_vf(VF x) { return (VU)_mm512_cvttps_epi32(x); }
static inline VF vf_bits(VU v) { return (VF)v; }
static inline VU vu_bits(VF x) { return (VU)x; }
static inline void vu_store_u8(uint8_t *p, VU v) { _mm_storeu_si128((__m128i *)p, _mm512_cvtepi32_epi8((__m512i)v)); }
static inline void vu_store_code(uint8_t *p, VU v) { vu_store_u8(p, v); }
static inline VU vu_load_u8(const uint8_t *p) { return (VU)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p)); }

#include "qn_tile.h"

/* A row's k-step, four codes, to every column. */
QN_INLINE __m512i broadcast_step(const uint8_t *p) {
    int32_t step;
    memcpy(&step, p, 4);
    return _mm512_set1_epi32(step);
}

/* sum += one k-step of R rows times P vectors of weights. */
QN_INLINE void multiply_step(const int R, const int P, __m512i sum[][QN_TILE_PANELS], const uint8_t *a, int64_t a_stride,
                             const __m512i w[]) {
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
        __m512i x = broadcast_step(a + r * a_stride);
#pragma GCC unroll 3
        for (int p = 0; p < P; p++) sum[r][p] = _mm512_dpbusd_epi32(sum[r][p], x, w[p]);
    }
}

/* R rows by P panels; R and P are constants where this is inlined, so the accumulators live in registers. */
QN_INLINE void tile(const int R, const int P, const int int4, int64_t k, const uint8_t *a, int64_t a_stride,
                    const uint8_t *b, int64_t panel_bytes, int32_t *acc) {
    __m512i sum[QN_TILE_ROWS][QN_TILE_PANELS], w[QN_TILE_PANELS], odd[QN_TILE_PANELS];
    const __m512i low_nibble = _mm512_set1_epi8(15);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 3
        for (int p = 0; p < P; p++) sum[r][p] = _mm512_setzero_si512();
    for (int64_t i = 0; i < k; i += int4 ? 8 : 4, b += 64) {
#pragma GCC unroll 3
        for (int p = 0; p < P; p++) {
            w[p] = _mm512_loadu_si512(b + p * panel_bytes);
            if (int4) {
                odd[p] = _mm512_and_si512(_mm512_srli_epi16(w[p], 4), low_nibble);
                w[p] = _mm512_and_si512(w[p], low_nibble);
            }
        }
        multiply_step(R, P, sum, a + i, a_stride, w);
        if (int4) multiply_step(R, P, sum, a + i + 4, a_stride, odd);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 3
        for (int p = 0; p < P; p++) _mm512_storeu_si512(acc + r * QN_TILE_COLS + p * QN_NR, sum[r][p]);
}

#define TILE(R, P) \
    case (R) * 4 + (P): tile(R, P, int4, k, a, a_stride, b, panel_bytes, acc); break;
#define TILES(R) TILE(R, 1) TILE(R, 2) TILE(R, 3)

QN_INLINE void tile_of_any_size(const int int4, int rows, int panels, int64_t k, const uint8_t *a, int64_t a_stride,
                                const uint8_t *b, int64_t panel_bytes, int32_t *acc) {
    switch (rows * 4 + panels) { TILES(1) TILES(2) TILES(3) TILES(4) TILES(5) TILES(6) TILES(7) TILES(8) }
}

static void tile_int8(int rows, int panels, int64_t k, const uint8_t *a, int64_t a_stride, const uint8_t *b,
                      int64_t panel_bytes, int32_t *acc) {
    tile_of_any_size(0, rows, panels, k, a, a_stride, b, panel_bytes, acc);
}

static void tile_int4(int rows, int panels, int64_t k, const uint8_t *a, int64_t a_stride, const uint8_t *b,
                      int64_t panel_bytes, int32_t *acc) {
    tile_of_any_size(1, rows, panels, k, a, a_stride, b, panel_bytes, acc);
}

/* R rows by one panel, group after group, with the groups' products added up in registers. */
QN_INLINE void sum_groups(const int R, const int int4, const qn_call *c, const qn_rows *rows, int64_t row,
                          const uint8_t *panel, float *sum) {
    const qn_weights *w = c->w;
    const uint8_t *a = rows->a + row * rows->a_stride, *b = panel + w->codes_at;
    const __m512i low_nibble = _mm512_set1_epi8(15), low_half = _mm512_set1_epi32(0xFFFF);
    __m512 total[QN_TILE_ROWS];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) total[r] = _mm512_set1_ps(-0.0f); /* -0 + x is x, for every x */
    for (int64_t g = 0; g < w->groups; g++) {
        __m512i acc[QN_TILE_ROWS][QN_TILE_PANELS], step[1], odd[1];
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) acc[r][0] = _mm512_setzero_si512();
        for (int64_t i = 0; i < w->group_k; i += int4 ? 8 : 4, a += int4 ? 8 : 4, b += 64) {
            step[0] = _mm512_loadu_si512(b);
            if (int4) {
                odd[0] = _mm512_and_si512(_mm512_srli_epi16(step[0], 4), low_nibble);
                step[0] = _mm512_and_si512(step[0], low_nibble);
            }
            multiply_step(R, 1, acc, a, rows->a_stride, step);
            if (int4) multiply_step(R, 1, acc, a + 4, rows->a_stride, odd);
        }
        __m512i pair = _mm512_and_si512(_mm512_loadu_si512(panel + w->sum_at + g * QN_NR * 4), low_half);
        if (w->asymmetric)
            pair = _mm512_or_si512(pair, _mm512_slli_epi32(_mm512_loadu_si512(panel + w->zero_at + g * QN_NR * 4), 16));
        VF scale = vf_load((const float *)(panel + w->scale_at) + g * QN_NR);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            __m512i correction = _mm512_madd_epi16(pair, _mm512_set1_epi32(rows->sum[(row + r) * w->groups + g]));
            VF value = _mm512_cvtepi32_ps(_mm512_sub_epi32(acc[r][0], correction));
            total[r] = total[r] + value * (vf_splat(rows->scale[row + r]) * scale);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) vf_store(sum + r * QN_TILE_COLS, total[r]);
}

static void tile_groups(const qn_call *c, const qn_rows *rows, int64_t row, int count, const uint8_t *panel, float *sum) {
#define GROUPS(R)                                                                                                      \
    case R:                                                                                                            \
        if (c->w->format == QN_INT4)                                                                                   \
            sum_groups(R, 1, c, rows, row, panel, sum);                                                         \
        else                                                                                                           \
            sum_groups(R, 0, c, rows, row, panel, sum);                                                         \
        break;
    switch (count) { GROUPS(1) GROUPS(2) GROUPS(3) GROUPS(4) GROUPS(5) GROUPS(6) GROUPS(7) GROUPS(8) }
#undef GROUPS
}

/* R rows by P panels of float weights; the sums are carried in acc from call to call. */
QN_INLINE void tile_float_fixed(const int R, const int P, int64_t k, const uint8_t *a, int64_t a_stride, const float *b,
                                float *acc) {
    __m512 sum[QN_TILE_ROWS][QN_TILE_PANELS];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 3
        for (int p = 0; p < P; p++) sum[r][p] = _mm512_loadu_ps(acc + r * QN_TILE_COLS + p * QN_NR);
    for (int64_t i = 0; i < k; i++, b += P * QN_NR) {
        __m512 w[QN_TILE_PANELS];
#pragma GCC unroll 3
        for (int p = 0; p < P; p++) w[p] = _mm512_loadu_ps(b + p * QN_NR);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            __m512 x = _mm512_set1_ps(((const float *)(a + r * a_stride))[i]);
#pragma GCC unroll 3
            for (int p = 0; p < P; p++) sum[r][p] = _mm512_fmadd_ps(x, w[p], sum[r][p]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 3
        for (int p = 0; p < P; p++) _mm512_storeu_ps(acc + r * QN_TILE_COLS + p * QN_NR, sum[r][p]);
}

#undef TILE
#define TILE(R, P) \
    case (R) * 4 + (P): tile_float_fixed(R, P, k, a, a_stride, b, acc); break;

static void tile_float(int rows, int panels, int64_t k, const uint8_t *a, int64_t a_stride, const float *b, float *acc) {
    switch (rows * 4 + panels) { TILES(1) TILES(2) TILES(3) TILES(4) TILES(5) TILES(6) TILES(7) TILES(8) }
}

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

static int usable(void) {
    const qn_cpu *cpu = qn_cpu_features();
    return cpu->avx512f && cpu->avx512bw && cpu->avx512dq && cpu->avx512vl && cpu->avx512_vnni && cpu->fma;
}

const qn_kernel qn_kernel_avx512vnni = {
    .name = "avx512vnni", .usable = usable, .a_bytes = QN_A_BYTES, .rows = 8, .panels = 3, .float_rows = 8, .float_panels = 3,
    .quantize_rows = quantize_rows, .tile_int8 = tile_int8, .tile_int4 = tile_int4,
    .tile_groups = tile_groups, .tile_float = tile_float,
    .decode = decode, .epilogue = epilogue,
};
#else
typedef int qn_gemm_vnni_is_for_x86_64; /* a translation unit may not be empty */
#endif
