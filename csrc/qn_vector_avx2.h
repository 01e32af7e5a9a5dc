/* SPDX-License-Identifier: BSD-3-Clause
 *
 * The verbs of qn_tile.h for vectors of 256 bits, for every instruction set that has AVX2 and FMA. Define QN_A_BYTES, 1 or 2, and
 * choose the target before including this.
 */
#define QN_W 8
#define QN_VECTOR_REGISTER "x"
typedef __m256 VF;
typedef uint32_t VU __attribute__((vector_size(32)));
typedef int32_t VI __attribute__((vector_size(32)));
typedef uint8_t VB __attribute__((vector_size(32)));

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
static inline VU vu_max(VU a, VU b) { return (VU)_mm256_max_epu32((__m256i)a, (__m256i)b); }
static inline VU vi_max(VU a, VU b) { return (VU)_mm256_max_epi32((__m256i)a, (__m256i)b); }
static inline VF vf_less(VF a, VF b, VF x, VF y) { return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_LT_OQ)); }
static inline VF vf_nan_to_zero(VF x) { return _mm256_and_ps(x, _mm256_cmp_ps(x, x, _CMP_ORD_Q)); }
static inline VF vf_from_vu(VU v) { return _mm256_cvtepi32_ps((__m256i)v); }
#define QN_FMA
static inline VF vf_fma(VF a, VF b, VF c) { return _mm256_fmadd_ps(a, b, c); }
static inline VF vf_fnma(VF a, VF b, VF c) { return _mm256_fnmadd_ps(a, b, c); }
static inline VU vu_from_rounded(VF x) { return (VU)_mm256_cvtps_epi32(x); }
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
static inline VU vu_load_u8(const uint8_t *p) { return (VU)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p)); }
static inline uint32_t vu_largest(VU v) {
    v = vu_max(v, (VU)_mm256_permute4x64_epi64((__m256i)v, 0x4E));
    v = vu_max(v, (VU)_mm256_shuffle_epi32((__m256i)v, 0x4E));
    return vu_max(v, (VU)_mm256_shuffle_epi32((__m256i)v, 0xB1))[0];
}
static inline uint32_t vi_largest(VU v) {
    v = vi_max(v, (VU)_mm256_permute4x64_epi64((__m256i)v, 0x4E));
    v = vi_max(v, (VU)_mm256_shuffle_epi32((__m256i)v, 0x4E));
    return vi_max(v, (VU)_mm256_shuffle_epi32((__m256i)v, 0xB1))[0];
}
static inline int vu_bytes_above(int count, const VU v[], int from, int span) {
    __m256i above = _mm256_setzero_si256();
    for (int i = 0; i < count; i++) {
        __m256i twice = _mm256_sub_epi8(_mm256_add_epi8((__m256i)v[i], (__m256i)v[i]), _mm256_set1_epi8((char)from));
        above = _mm256_or_si256(above, _mm256_subs_epu8(twice, _mm256_set1_epi8((char)span)));
    }
    return !_mm256_testz_si256(above, above);
}
static inline VU vu_multiply(VU a, VU b) { return (VU)_mm256_mullo_epi32((__m256i)a, (__m256i)b); }
static inline __m256i bytes_of(const VU q[4], int32_t z) { /* each plus z; beyond 0..255: the ends */
    __m256i first = _mm256_packs_epi32((__m256i)q[0], (__m256i)q[1]), last = _mm256_packs_epi32((__m256i)q[2], (__m256i)q[3]);
    __m256i zero = _mm256_set1_epi16((short)z);
    __m256i bytes = _mm256_packus_epi16(_mm256_add_epi16(first, zero), _mm256_add_epi16(last, zero));
    /* each 128 bits hold four of each of the four vectors */
    return _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}
static inline void vu_store_bytes(uint8_t *p, const VU q[4], int32_t z, int32_t b) {
    _mm256_storeu_si256((__m256i *)p, _mm256_add_epi8(bytes_of(q, z), _mm256_set1_epi8((char)b)));
}
#if QN_A_BYTES == 2
static inline void vu_store_code(uint8_t *p, VU v) { _mm_storeu_si128((__m128i *)p, narrow_16(v)); }
static inline VU vu_store_codes(uint8_t *p, const VU q[4], int32_t z) {
    __m256i sum = _mm256_setzero_si256(), zero = _mm256_set1_epi16((short)z);
    for (int j = 0; j < 4; j += 2) {
        __m256i codes = _mm256_packs_epi32((__m256i)q[j], (__m256i)q[j + 1]);
        codes = _mm256_add_epi16(_mm256_permute4x64_epi64(codes, 0xD8), zero);
        codes = _mm256_min_epi16(_mm256_max_epi16(codes, _mm256_setzero_si256()), _mm256_set1_epi16(255));
        _mm256_storeu_si256((__m256i *)(p + j * 16), codes);
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(codes, _mm256_set1_epi16(1)));
    }
    return (VU)sum;
}
#else
static inline void vu_store_code(uint8_t *p, VU v) { vu_store_u8(p, v); }
static inline VU vu_store_codes(uint8_t *p, const VU q[4], int32_t z) {
    __m256i codes = bytes_of(q, z);
    _mm256_storeu_si256((__m256i *)p, codes);
    __m256i pairs = _mm256_maddubs_epi16(codes, _mm256_set1_epi8(1));
    return (VU)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}
#endif
