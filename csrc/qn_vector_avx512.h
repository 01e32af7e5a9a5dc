/* SPDX-License-Identifier: BSD-3-Clause
 *
 * The verbs of qn_tile.h for vectors of 512 bits. Define QN_A_BYTES as 1 and choose the target before including
 * this.
 */
#define QN_W 16
#define QN_X86_REGISTER "v"
typedef __m512 VF;
typedef uint32_t VU __attribute__((vector_size(64)));
typedef int32_t VI __attribute__((vector_size(64)));
typedef uint8_t VB __attribute__((vector_size(64)));

static inline VF vf_load(const float *p) { return _mm512_loadu_ps(p); }
static inline void vf_store(float *p, VF v) { _mm512_storeu_ps(p, v); }
static inline VU vu_load(const uint32_t *p) { return (VU)_mm512_loadu_si512(p); }
static inline void vu_store(uint32_t *p, VU v) { _mm512_storeu_si512(p, (__m512i)v); }
static inline VF vf_splat(float x) { return _mm512_set1_ps(x); }
static inline VU vu_splat(uint32_t x) { return (VU)_mm512_set1_epi32((int)x); }
static inline VU vu_splat_halves(const uint8_t *p) {
    __m512i both;
    __asm__("vpbroadcastd %1, %0" : "=v"(both) : "m"(*(const uint8_t(*)[4])p));
    __asm__("vpbroadcastd %1, %0%{%2%}" : "+v"(both) : "m"(*(const uint8_t(*)[4])(p + 4)), "Yk"((__mmask16)0xFF00));
    return (VU)both;
}
static inline VF vf_rint(VF x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline VF vf_abs(VF x) { return _mm512_abs_ps(x); }
static inline VF vf_min(VF a, VF b) { return _mm512_min_ps(a, b); }
static inline VF vf_max(VF a, VF b) { return _mm512_max_ps(a, b); }
static inline VU vu_max(VU a, VU b) { return (VU)_mm512_max_epu32((__m512i)a, (__m512i)b); }
static inline VU vi_max(VU a, VU b) { return (VU)_mm512_max_epi32((__m512i)a, (__m512i)b); }
static inline uint32_t vu_largest(VU a) { return _mm512_reduce_max_epu32((__m512i)a); }
static inline uint32_t vi_largest(VU a) { return (uint32_t)_mm512_reduce_max_epi32((__m512i)a); }
static inline VF vf_less(VF a, VF b, VF x, VF y) { return _mm512_mask_mov_ps(y, _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), x); }
static inline VF vf_nan_to_zero(VF x) { return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, x, _CMP_ORD_Q), x); }
static inline VF vf_from_vu(VU v) { return _mm512_cvtepi32_ps((__m512i)v); }
static inline VU vu_from_vf(VF x) { return (VU)_mm512_cvttps_epi32(x); }
static inline VF vf_bits(VU v) { return (VF)v; }
static inline VU vu_bits(VF x) { return (VU)x; }
static inline void vu_store_u8(uint8_t *p, VU v) { _mm_storeu_si128((__m128i *)p, _mm512_cvtepi32_epi8((__m512i)v)); }
static inline void vu_store_code(uint8_t *p, VU v) { vu_store_u8(p, v); }
#define QN_FMA
static inline VF vf_fma(VF a, VF b, VF c) { return _mm512_fmadd_ps(a, b, c); }
static inline VF vf_fnma(VF a, VF b, VF c) { return _mm512_fnmadd_ps(a, b, c); }
static inline VU vu_from_rounded(VF x) { return (VU)_mm512_cvtps_epi32(x); }
static inline VU vu_multiply(VU a, VU b) { return a * b; }
static inline __m512i bytes_of(const VU q[4], int32_t z) { /* each plus z; beyond 0..255: the ends */
    __m512i first = _mm512_packs_epi32((__m512i)q[0], (__m512i)q[1]), last = _mm512_packs_epi32((__m512i)q[2], (__m512i)q[3]);
    __m512i zero = _mm512_set1_epi16((short)z);
    __m512i bytes = _mm512_packus_epi16(_mm512_add_epi16(first, zero), _mm512_add_epi16(last, zero));
    /* each 128 bits hold four of each of the four vectors */
    return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), bytes);
}
static inline void vu_store_bytes(uint8_t *p, const VU q[4], int32_t z, int32_t b) {
    _mm512_storeu_si512(p, _mm512_add_epi8(bytes_of(q, z), _mm512_set1_epi8((char)b)));
}
static inline VU vu_store_codes(uint8_t *p, const VU q[4], int32_t z) {
    __m512i codes = bytes_of(q, z);
    _mm512_storeu_si512(p, codes);
    return (VU)_mm512_dpbusd_epi32(_mm512_setzero_si512(), codes, _mm512_set1_epi8(1));
}
static inline VU vu_load_u8(const uint8_t *p) { return (VU)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p)); }
static inline VU vu_load_u16(const uint16_t *p) { return (VU)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)); }
static inline VU vu_add_bytes(VU sum, VU x) { return (VU)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)x, _mm512_set1_epi8(1)); }
#define QN_SUMS_OF_8
static inline void sums_of_8(const uint8_t *p, uint64_t *sums) {
    _mm512_storeu_si512(sums, _mm512_sad_epu8(_mm512_loadu_si512(p), _mm512_setzero_si512()));
}
#define QN_LOOKUP
static inline VF vf_of_nibble(VU v) { /* the low four bits are what vpermps looks at */
    const VF values = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_permutexvar_ps((__m512i)v, values);
}
static inline int vu_bytes_above(int count, const VU v[], int from, int span) {
    __mmask64 above = 0;
#pragma GCC unroll 4
    for (int i = 0; i < count; i++) {
        __m512i twice = _mm512_sub_epi8(_mm512_add_epi8((__m512i)v[i], (__m512i)v[i]), _mm512_set1_epi8((char)from));
        above |= _mm512_cmpgt_epu8_mask(twice, _mm512_set1_epi8((char)span));
    }
    return above != 0;
}
