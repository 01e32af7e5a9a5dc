/* SPDX-License-Identifier: BSD-3-Clause
 *
 * AVX2 and FMA. Exact for every u8 * s8: both operands are widened to 16 bits for vpmaddwd, whose pair sums fit int32
 * (the 8-bit vpmaddubsw would saturate). Activations are stored as 16-bit codes, so that only the weights are widened
 * in the loop, once for all rows of a tile.
 */
#include "qn_gemm.h"

#if defined(__x86_64__)
#include <immintrin.h>
#include <math.h>
#include <string.h>
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

#define QN_W 8
#define QN_A_BYTES 2
typedef __m256 VF;
typedef uint32_t VU __attribute__((vector_size(32)));

static inline VF vf_load(const float *p) { return _mm256_loadu_ps(p); }
static inline void vf_store(float *p, VF v) { _mm256_storeu_ps(p, v); }
static inline VU vu_load(const uint32_t *p) { return (VU)_mm256_loadu_si256((const __m256i *)p); }
static inline void vu_store(uint32_t *p, VU v) { _mm256_storeu_si256((__m256i *)p, (__m256i)v); }
static inline VF vf_splat(float x) { return _mm256_set1_ps(x); }
static inline VU vu_splat(uint32_t x) { return (VU)_mm256_set1_epi32((int)x); }
static inline VF vf_rint(VF x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline VF vf_abs(VF x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }
static inline VF vf_min(VF a, VF b) { return _mm256_min_ps(a, b); }
static inline VF vf_max(VF a, VF b) { return _mm256_max_ps(a, b); }
static inline VF vf_less(VF a, VF b, VF x, VF y) { return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_LT_OQ)); }
static inline VF vf_nan_to_zero(VF x) { return _mm256_and_ps(x, _mm256_cmp_ps(x, x, _CMP_ORD_Q)); }
static inline VF vf_from_vu(VU v) { return _mm256_cvtepi32_ps((__m256i)v); }
static inline VU vu_from_vf(VF x) { return (VU)_mm256_cvttps_epi32(x); }
static inline VF vf_bits(VU v) { return (VF)v; }
static inline VU vu_bits(VF x) { return (VU)x; }
static inline __m128i narrow_16(VU v) { /* each lane's low 16 bits; lanes hold 0..65535 */
    return _mm_packus_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
}
static inline void vu_store_u8(uint8_t *p, VU v) {
    __m128i low = narrow_16(v & vu_splat(0xFF));
    _mm_storel_epi64((__m128i *)p, _mm_packus_epi16(low, low));
}
static inline void vu_store_code(uint8_t *p, VU v) { _mm_storeu_si128((__m128i *)p, narrow_16(v)); }
static inline VU vu_load_u8(const uint8_t *p) { return (VU)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p)); }

#include "qn_tile.h"

/* Four columns' k-step of weights, 16 bytes, as 16-bit words: | n0: k0 k1 k2 k3 | n1: ... | n2 | n3 | */
QN_INLINE __m256i widen_signed(const uint8_t *p) { return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)p)); }

/* A row's k-step, four 16-bit codes, to every column. */
QN_INLINE __m256i broadcast_step(const uint8_t *p) {
    int64_t step;
    memcpy(&step, p, 8);
    return _mm256_set1_epi64x(step);
}

/* Accumulators hold two sums a column, of k0 k1 and k2 k3; add the pairs of eight columns into output order. */
QN_INLINE __m256i add_pairs(__m256i first_four, __m256i last_four) {
    return _mm256_permute4x64_epi64(_mm256_hadd_epi32(first_four, last_four), 0xD8);
}

/* sum += one k-step of R rows times eight columns. */
QN_INLINE void multiply_step(const int R, __m256i sum[][2], const uint8_t *a, int64_t a_stride, __m256i first_four,
                             __m256i last_four) {
#pragma GCC unroll 6
    for (int r = 0; r < R; r++) {
        __m256i x = broadcast_step(a + r * a_stride);
        sum[r][0] = _mm256_add_epi32(sum[r][0], _mm256_madd_epi16(x, first_four));
        sum[r][1] = _mm256_add_epi32(sum[r][1], _mm256_madd_epi16(x, last_four));
        /* Finish a row before the next: left to itself gcc starts all products first and spills the sums to the stack. */
        __asm__ volatile("" : "+x"(sum[r][0]), "+x"(sum[r][1]));
    }
}

/* R rows by half a panel (8 columns): 2 R accumulators. */
QN_INLINE void half_tile(const int R, const int int4, int64_t k, const uint8_t *a, int64_t a_stride, const uint8_t *b,
                         int32_t *acc) {
    __m256i sum[6][2];
    const __m128i low_nibble = _mm_set1_epi8(15);
#pragma GCC unroll 6
    for (int r = 0; r < R; r++) sum[r][0] = sum[r][1] = _mm256_setzero_si256();
    for (int64_t i = 0; i < k; i += int4 ? 8 : 4, b += 64) {
        const uint8_t *step = a + i * QN_A_BYTES;
        if (int4) {
            __m128i first = _mm_loadu_si128((const __m128i *)b), last = _mm_loadu_si128((const __m128i *)(b + 16));
            multiply_step(R, sum, step, a_stride, _mm256_cvtepu8_epi16(_mm_and_si128(first, low_nibble)),
                          _mm256_cvtepu8_epi16(_mm_and_si128(last, low_nibble)));
            multiply_step(R, sum, step + 4 * QN_A_BYTES, a_stride,
                          _mm256_cvtepu8_epi16(_mm_and_si128(_mm_srli_epi16(first, 4), low_nibble)),
                          _mm256_cvtepu8_epi16(_mm_and_si128(_mm_srli_epi16(last, 4), low_nibble)));
        } else {
            multiply_step(R, sum, step, a_stride, widen_signed(b), widen_signed(b + 16));
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < R; r++)
        _mm256_storeu_si256((__m256i *)(acc + r * QN_TILE_COLS), add_pairs(sum[r][0], sum[r][1]));
}

QN_INLINE void tile(const int int4, int rows, int panels, int64_t k, const uint8_t *a, int64_t a_stride,
                    const uint8_t *b, int64_t panel_bytes, int32_t *acc) {
    for (int p = 0; p < panels; p++, b += panel_bytes, acc += QN_NR) {
        for (int half = 0; half < 2; half++) {
            switch (rows) {
            case 1: half_tile(1, int4, k, a, a_stride, b + 32 * half, acc + 8 * half); break;
            case 2: half_tile(2, int4, k, a, a_stride, b + 32 * half, acc + 8 * half); break;
            case 3: half_tile(3, int4, k, a, a_stride, b + 32 * half, acc + 8 * half); break;
            case 4: half_tile(4, int4, k, a, a_stride, b + 32 * half, acc + 8 * half); break;
            case 5: half_tile(5, int4, k, a, a_stride, b + 32 * half, acc + 8 * half); break;
            default: half_tile(6, int4, k, a, a_stride, b + 32 * half, acc + 8 * half); break;
            }
        }
    }
}

static void tile_int8(int rows, int panels, int64_t k, const uint8_t *a, int64_t a_stride, const uint8_t *b,
                      int64_t panel_bytes, int32_t *acc) {
    tile(0, rows, panels, k, a, a_stride, b, panel_bytes, acc);
}

static void tile_int4(int rows, int panels, int64_t k, const uint8_t *a, int64_t a_stride, const uint8_t *b,
                      int64_t panel_bytes, int32_t *acc) {
    tile(1, rows, panels, k, a, a_stride, b, panel_bytes, acc);
}

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

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

static int usable(void) { return qn_cpu_features()->avx2 && qn_cpu_features()->fma; }

const qn_kernel qn_kernel_avx2 = {
    .name = "avx2", .usable = usable, .a_bytes = QN_A_BYTES, .rows = 6, .panels = 3, .float_rows = 6, .float_panels = 1,
    .quantize_rows = quantize_rows, .tile_int8 = tile_int8, .tile_int4 = tile_int4, .tile_float = tile_float,
    .decode = decode, .epilogue = epilogue,
};
#else
typedef int qn_gemm_avx2_is_for_x86_64; /* a translation unit may not be empty */
#endif
